"""Guest-physical memory: one writable buffer, range-checked views and a fence.

The machine gives the buffer (a bytearray, an mmap of a memfd, a KVM slot) and the fence; driver and device each hold a
``GuestMemory`` over the same bytes.  Little-endian hosts only, because ring words are single native loads and stores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeAlias

from .errors import BadAddress, ConfigError

__all__ = ["GuestMemory", "GuestPages", "Segment"]

Segment: TypeAlias = "tuple[int, int]"
"""(gpa, length in bytes)."""


def _no_fence() -> None:
    """Between coroutines of one thread program order is memory order."""


class GuestMemory:
    """Range-checked access to ``buffer``, whose first byte is guest-physical address ``base``.

    ``fence()`` is a full barrier between this side's last store and its next load.
    """

    __slots__ = ("base", "bytes", "fence", "size")

    def __init__(self, buffer: bytearray | memoryview, base: int = 0, fence: Callable[[], None] = _no_fence) -> None:
        if sys.byteorder != "little":  # pragma: no cover - no such host in the suite
            raise ConfigError("this host is big-endian", "vblklab needs a little-endian host (x86-64, arm64, riscv64)")
        view = memoryview(buffer).cast("B")
        if view.readonly:
            raise ConfigError("guest memory over a read-only buffer", "give a writable buffer")
        self.bytes = view
        self.base = base
        self.size = len(view)
        self.fence = fence

    def view(self, gpa: int, length: int) -> memoryview:
        """A writable view of ``length`` bytes at ``gpa``; raises BadAddress if any of them is not memory."""
        start = gpa - self.base
        end = start + length
        if start < 0 or length < 0 or end > self.size:
            raise BadAddress(gpa, length)
        return self.bytes[start:end]

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
