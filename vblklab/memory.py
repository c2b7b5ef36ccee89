"""Guest-physical memory: writable regions, range-checked views and a fence.

The machine gives the buffer (a bytearray, an mmap of a memfd, a KVM slot) and the fence; driver and device each hold a
``GuestMemory`` over the same bytes.  Little-endian hosts only, because ring words are single native loads and stores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TypeAlias

from .errors import BadAddress, ConfigError

__all__ = ["GuestMemory", "GuestPages", "Segment"]

Segment: TypeAlias = "tuple[int, int]"
"""(gpa, length in bytes)."""


def _no_fence() -> None:
    """Between coroutines of one thread program order is memory order."""


class GuestMemory:
    """Range-checked access to guest-physical memory: one buffer from address ``base`` on, or several regions.

    ``bytes``, ``base`` and ``size`` are the largest region, where parts on the data path look first; ``regions`` are all of
    them, (start, end, bytes), sorted.  ``fence()`` is a full barrier between this side's last store and its next load.
    """

    __slots__ = ("base", "bytes", "fence", "regions", "size")

    def __init__(self, buffer: bytearray | memoryview, base: int = 0, fence: Callable[[], None] = _no_fence) -> None:
        self._take([(base, buffer)], fence)

    @classmethod
    def of_regions(cls, regions: Iterable[tuple[int, bytearray | memoryview]], fence: Callable[[], None] = _no_fence) -> GuestMemory:
        """Memory of several regions, each (gpa, buffer); raises ConfigError if there is none or two overlap."""
        memory = cls.__new__(cls)
        memory._take(list(regions), fence)
        return memory

    def _take(self, regions: list[tuple[int, bytearray | memoryview]], fence: Callable[[], None]) -> None:
        if sys.byteorder != "little":  # pragma: no cover - no such host in the suite
            raise ConfigError("this host is big-endian", "vblklab needs a little-endian host (x86-64, arm64, riscv64)")
        if not regions:
            raise ConfigError("guest memory without a region", "give at least one (gpa, buffer)")
        taken: list[tuple[int, int, memoryview]] = []
        for base, buffer in sorted(regions, key=lambda region: region[0]):
            view = memoryview(buffer).cast("B")
            if view.readonly:
                raise ConfigError("guest memory over a read-only buffer", "give a writable buffer")
            if taken and base < taken[-1][1]:
                raise ConfigError(f"guest memory regions overlap at {base:#x}", "give each guest-physical address once")
            taken.append((base, base + len(view), view))
        self.regions = tuple(taken)
        self.base, end, self.bytes = max(taken, key=lambda region: region[1] - region[0])
        self.size = end - self.base
        self.fence = fence

    def view(self, gpa: int, length: int) -> memoryview:
        """A writable view of ``length`` bytes at ``gpa``; raises BadAddress unless they all lie in one region."""
        start = gpa - self.base
        end = start + length
        if start < 0 or length < 0 or end > self.size:
            return self._elsewhere(gpa, length)
        return self.bytes[start:end]

    def _elsewhere(self, gpa: int, length: int) -> memoryview:
        for start, end, view in self.regions:
            if length >= 0 and start <= gpa and gpa + length <= end:
                return view[gpa - start : gpa - start + length]
        raise BadAddress(gpa, length)

    def views(self, gpa: int, length: int) -> list[memoryview]:
        """The same for a range that may run through regions without a gap between them: one view a region."""
        if length < 0:
            raise BadAddress(gpa, length)
        pieces, at, left = [], gpa, length
        for start, end, view in self.regions:
            if left and start <= at < end:
                step = min(left, end - at)
                pieces.append(view[at - start : at - start + step])
                at += step
                left -= step
        if left:
            raise BadAddress(gpa, length)
        return pieces

    def read(self, gpa: int, length: int) -> bytes:
        """A copy of ``length`` bytes at ``gpa``."""
        return bytes(self.view(gpa, length))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``gpa``.  For bytes that are not yet published; ring words go through their cast views."""
        self.view(gpa, len(data))[:] = data


class GuestPages:
    """The guest's allocator: hands out aligned ranges and never takes one back (a boot is its lifetime)."""

    def __init__(self, memory: GuestMemory, start: int | None = None) -> None:
        self.memory = memory
        self._next = memory.base if start is None else start

    def alloc(self, length: int, align: int = 4096) -> int:
        """The gpa of ``length`` fresh bytes, ``align`` a power of two; raises ConfigError when memory is used up."""
        gpa = (self._next + align - 1) & -align
        if gpa + length > self.memory.base + self.memory.size:
            raise ConfigError(
                f"guest memory of {self.memory.size >> 20} MiB is used up (asked for {length:,} bytes more)",
                "boot with memory_bytes= larger, or lower iodepth, numjobs or the block size",
            )
        self._next = gpa + length
        return gpa
