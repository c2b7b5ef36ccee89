"""The memory table: regions of the front-end's memory, mapped here, and its addresses translated."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import BadAddress, ConfigError, VhostUserError
from ..memory import GuestMemory
from .effects import Region
from .guard import Guard, protect

__all__ = ["MemoryTable", "map_shared"]

_GRANULE = mmap.ALLOCATIONGRANULARITY


@dataclass(frozen=True, slots=True)
class _Mapped:
    region: Region
    view: memoryview
    guard: Guard


def map_shared(fd: int, size: int, offset: int, what: str) -> tuple[memoryview, Guard]:
    """Map ``size`` bytes of a file; VhostUserError if it is no file, is shorter, or may not be written."""
    try:
        info = os.fstat(fd)
    except OSError as error:
        raise VhostUserError(f"{what}: {error.strerror}") from None
    if not stat.S_ISREG(info.st_mode):
        raise VhostUserError(f"{what}: its file descriptor is no file")
    if offset + size > info.st_size:
        raise VhostUserError(f"{what} lies about its size: {offset + size:#x} bytes are asked for, the file has {info.st_size:#x}")
    start = offset & -_GRANULE
    try:
        try:
            mapping = mmap.mmap(fd, offset - start + size, offset=start)
        except OSError:
            if not start:
                raise
            start = 0  # huge pages: the file offset must be a multiple of their size
            mapping = mmap.mmap(fd, offset + size)
    except (OSError, ValueError, OverflowError) as error:
        raise VhostUserError(f"{what} cannot be mapped: {error}") from None
    return memoryview(mapping)[offset - start : offset - start + size], protect(mapping)


class MemoryTable:
    """What SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG leave: mapped regions.  Mappings go when the last view of them goes."""

    def __init__(self, fence: Callable[[], None]) -> None:
        self._fence = fence
        self._mapped: tuple[_Mapped, ...] = ()
        self.memory: GuestMemory | None = None

    def set(self, regions: tuple[Region, ...]) -> None:
        """Map the new regions (those with a file descriptor, which is closed), keep the known ones, drop the rest."""
        known = {mapped.region.place: mapped for mapped in self._mapped}
        try:
            taken = []
            for region in regions:
                if region.fd < 0:
                    taken.append(known[region.place])
                else:
                    what = f"memory region {region.gpa:#x}+{region.size:#x}"
                    taken.append(_Mapped(region, *map_shared(region.fd, region.size, region.offset, what)))
        finally:
            for region in regions:
                if region.fd >= 0:
                    os.close(region.fd)
        self._mapped = tuple(taken)
        try:
            self.memory = GuestMemory.of_regions([(m.region.gpa, m.view) for m in taken], self._fence) if taken else None
        except ConfigError as error:
            raise VhostUserError(str(error)) from None

    def gpa(self, user: int, length: int) -> int:
        """The guest-physical address of ``length`` bytes at the front-end's address ``user``; BadAddress outside every region."""
        for mapped in self._mapped:
            region = mapped.region
            if region.user <= user and user + length <= region.user + region.size:
                return region.gpa + user - region.user
        raise BadAddress(user, length, "2.7")

    @property
    def broken(self) -> bool:
        """Whether the front-end's file shrank under a mapping."""
        return any(mapped.guard.broken for mapped in self._mapped)
