"""What can be taken away from a ring's halves: each fence, each second look and each order of stores that the specification asks for."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import ConfigError
from .sides import changes

__all__ = ["REMOVALS", "Removal", "removal"]


class Removal(NamedTuple):
    """One thing that a half of the ring can be made to leave out.  ``half`` is driver or device."""

    name: str
    half: str
    sections: str
    text: str
    remove: Callable[[type[Any]], type[Any]]


def _without_fence(method: str) -> Callable[[type[Any]], type[Any]]:
    """The class whose ``method`` reads without a fence before it."""

    def remove(half: type[Any]) -> type[Any]:
        written = getattr(half, method)

        def call(self: Any) -> Any:
            fence, self.fence = self.fence, lambda: None
            try:
                return written(self)
            finally:
                self.fence = fence

        return type(half.__name__, (half,), {method: call})

    return remove


def _without_look(method: str) -> Callable[[type[Any]], type[Any]]:
    """The class that does not look a second time and believes that nothing came."""
    return lambda half: type(half.__name__, (half,), {method: lambda self: True})


def _published_first(write: str, publish: str) -> Callable[[type[Any]], type[Any]]:
    """The class whose ``publish`` becomes visible before what ``write`` stored."""

    def remove(half: type[Any]) -> type[Any]:
        really_write, really_publish = getattr(half, write), getattr(half, publish)

        def early(self: Any, *arguments: Any) -> Any:
            memory = self._memory.bytes
            before = bytes(memory)
            result = really_write(self, *arguments)
            self.__dict__.setdefault("late", []).extend(changes(before, memory))
            memory[:] = before
            self.early = really_publish(self)
            return result

        def late(self: Any) -> Any:
            memory = self._memory.bytes
            for at, data in self.__dict__.pop("late", ()):
                memory[at : at + len(data)] = data
            return self.__dict__.pop("early", None)

        return type(half.__name__, (half,), {write: early, publish: late})

    return remove


_ALL = (
    Removal(
        "driver fence before kick",
        "driver",
        "2.7.13.4, 2.8.21.3",
        "the driver reads the device's event word while its own store of the new buffers may still be on the way",
        _without_fence("kick_prepare"),
    ),
    Removal(
        "driver second look",
        "driver",
        "2.7.14, 2.8.22",
        "the driver switches interrupts on and goes to sleep without looking at the ring again",
        _without_look("enable_cb_check"),
    ),
    Removal(
        "driver fence before second look",
        "driver",
        "2.7.14, 2.8.22",
        "the driver looks again while its store of the event word may still be on the way",
        _without_fence("enable_cb_check"),
    ),
    Removal(
        "driver descriptors before publish",
        "driver",
        "2.7.13.3, 2.8.21.1",
        "the driver publishes a buffer before its descriptors are in memory",
        _published_first("add_sgs", "publish"),
    ),
    Removal(
        "device fence before interrupt",
        "device",
        "2.7.7.2, 2.8.13",
        "the device reads the driver's event word while its own store of the used buffers may still be on the way",
        _without_fence("should_notify"),
    ),
    Removal(
        "device second look",
        "device",
        "2.7.10, 2.8.15",
        "the device switches kicks on and goes to sleep without looking at the ring again",
        _without_look("recheck"),
    ),
    Removal(
        "device fence before second look",
        "device",
        "2.7.10, 2.8.15",
        "the device looks again while its store of the event word may still be on the way",
        _without_fence("recheck"),
    ),
    Removal(
        "device used element before publish",
        "device",
        "2.7.8.2, 2.8.21.2",
        "the device publishes a used buffer before its used element is in memory",
        _published_first("fill", "flush"),
    ),
)
REMOVALS: dict[str, Removal] = {one.name: one for one in _ALL}


def removal(name: str) -> Removal:
    """The removal of this name; ConfigError lists them all."""
    found = REMOVALS.get(name)
    if found is None:
        near = difflib.get_close_matches(str(name), REMOVALS, 1)
        hint = f"did you mean {near[0]!r}? There are: " if near else "choose one of: "
        raise ConfigError(f"without={name!r}", hint + ", ".join(REMOVALS))
    return found
