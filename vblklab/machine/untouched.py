"""Who replaced what: the rule for every fast path is that it stands in only for code that nobody has changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..device.steps import replaced
from ..disk.store import RamStore

__all__ = ["Written", "plain_memory"]


class Written:
    """The methods of some classes as they were written, taken at import time, before anybody can have replaced one."""

    def __init__(self, *classes: type) -> None:
        self._methods: dict[type, dict[str, Any]] = {}
        for cls in classes:
            found: dict[str, Any] = {}
            for owner in reversed(cls.__mro__[:-1]):
                found |= {
                    name: value for name, value in vars(owner).items() if callable(value) or isinstance(value, (staticmethod, property))
                }
            self._methods[cls] = found

    def touched(self, part: Any, but: Iterable[str] = ()) -> str | None:
        """One sentence about the first method that ``part``, its class or a class between has replaced; None if it is as written.

        Methods in ``but`` and those that only build or print a part may be replaced.
        """
        cls = type(part)
        base = next((one for one in cls.__mro__ if one in self._methods), None)
        if base is None:
            return f"{cls.__name__} is a part of its own"
        for name, method in self._methods[base].items():
            if name in ("__init__", "__repr__", *but):
                continue
            by = replaced(part, name, method)
            if by is part:
                return f"{base.__name__}.{name} is set on this instance"
            if by is not None:
                return f"{base.__name__}.{name} is replaced by {by.__qualname__}.{name}"
        return None


_STORES = Written(RamStore)


def plain_memory(store: Any) -> bool:
    """Whether a disk's bytes may be copied without asking it: memory whose methods are as they were written."""
    return _STORES.touched(store) is None
