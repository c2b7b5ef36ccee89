"""Two CPUs that share guest memory the way x86 lets them: each sees its own stores at once and the other's later, in order.

The model is x86-TSO (Sewell et al., "x86-TSO", CACM 53(7), 2010): stores wait in a buffer, loads may overtake them, a fence or an exit
empties it.  What one trace point's code stores becomes visible as a whole: order inside it is not fixed by the specification.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..memory import GuestMemory

__all__ = ["Side", "Stores", "changes", "watched"]

_SHARED = {
    "driver": ("publish", "kick_prepare", "get_buf", "more_used", "enable_cb_check"),
    "device": ("empty", "pop", "flush", "should_notify", "recheck", "map_chain"),
}


class Stores(NamedTuple):
    """What one step stored: (address, bytes) of each run of bytes that it changed."""

    runs: tuple[tuple[int, bytes], ...]


class Side:
    """One CPU's view of guest memory, and its stores that the other does not see yet."""

    def __init__(self, name: str, size: int, told: Sequence[Stores | None] = ()) -> None:
        """``told``: what the first looks at memory find, known from the same steps taken before."""
        self.name = name
        self.bytes = bytearray(size)
        self.memory = GuestMemory(self.bytes, fence=self.fence)
        self.pending: deque[Stores] = deque()
        self.touched = False
        self.stored: list[Stores] = []
        self.other: Side
        self.looks: list[Stores | None] = []  # what each look at memory found
        self._told = told
        self._seen = bytes(size)

    def begin(self) -> None:
        """A step of this side begins."""
        self.touched = False
        self.stored = []
        if len(self.looks) >= len(self._told):
            self._seen = bytes(self.bytes)

    def collect(self) -> None:
        """Put what was stored since the last look into the buffer."""
        number = len(self.looks)
        if number < len(self._told):
            stores = self._told[number]
            if number + 1 == len(self._told):
                self._seen = bytes(self.bytes)
        else:
            stores = self._stored()
        self.looks.append(stores)
        if stores is not None:
            self.pending.append(stores)
            self.stored.append(stores)
            self.touched = True

    def _stored(self) -> Stores | None:
        """What was stored since the last look, None if nothing."""
        now = self.bytes
        if now == self._seen:
            return None
        stores = Stores(tuple(changes(self._seen, now)))
        self._seen = bytes(now)
        return stores

    def fence(self) -> None:
        """A full barrier: everything stored so far is visible before the next load."""
        self.touched = True
        self.drain()

    def drain(self) -> None:
        """Empty the buffer: a fence, an exit, a system call."""
        self.collect()
        while self.pending:
            self.arrive()

    def arrive(self) -> Stores:
        """The oldest stores in the buffer become visible to the other side; it still sees its own newer ones over them."""
        stores = self.pending.popleft()
        other = self.other
        for at, data in stores.runs:
            other.bytes[at : at + len(data)] = data
        for own in other.pending:
            for at, data in own.runs:
                other.bytes[at : at + len(data)] = data
        return stores


def changes(before: bytes, after: bytearray | memoryview) -> list[tuple[int, bytes]]:
    """The runs of bytes in which ``after`` differs: (address, bytes)."""
    where = np.flatnonzero(np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8))
    if not len(where):
        return []
    breaks = np.flatnonzero(np.diff(where) > 1)
    starts, ends = where[[0, *(breaks + 1)]].tolist(), where[[*breaks, -1]].tolist()
    return [(start, bytes(after[start : end + 1])) for start, end in zip(starts, ends, strict=True)]


@cache
def watched(half: type[Any], which: str) -> type[Any]:
    """The class of a ring's half whose calls that look at shared memory are noted on ``side``, an attribute set afterwards."""
    return type(half.__name__, (half,), {name: _noted(getattr(half, name)) for name in _SHARED[which] if hasattr(half, name)})


def _noted(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *arguments: Any) -> Any:
        self.side.touched = True
        return method(self, *arguments)

    call.__name__ = method.__name__
    return call
