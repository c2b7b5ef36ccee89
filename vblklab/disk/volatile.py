"""A drive whose write cache forgets: writes lie in memory until a flush, and a process that is killed is a power cut."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from .model import Disk
from .store import Store

__all__ = ["VolatileCache", "VolatileStore"]

_SECTOR = 512


@dataclass(frozen=True)
class VolatileCache:
    """``disk`` behind a volatile write cache, as drives without power-loss protection have: only FLUSH makes writes stable (§5.2.6.2).

    An orderly end writes everything back.  ``served.kill()`` is the power cut.
    """

    disk: Disk

    @property
    def drive(self) -> str | None:
        return self.disk.drive

    def open(self) -> Store:
        """Open the disk below, with an empty cache."""
        return VolatileStore(self.disk.open())


class VolatileStore:
    """The store of a ``VolatileCache``: whole sectors that were written and not yet flushed, over another store."""

    def __init__(self, below: Store) -> None:
        self._below = below
        self._dirty: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self.read_only = below.read_only
        self.size = below.size

    def readv(self, offset: int, views: Sequence[memoryview]) -> None:
        with self._lock:
            for view in views:
                self._below.readv(offset, [view])
                for sector in range(offset // _SECTOR, -(-(offset + len(view)) // _SECTOR)) if self._dirty else ():
                    kept = self._dirty.get(sector)
                    if kept is not None:
                        at = sector * _SECTOR - offset
                        view[max(at, 0) : at + _SECTOR] = kept[max(-at, 0) : len(view) - at]
                offset += len(view)

    def writev(self, offset: int, views: Sequence[memoryview]) -> None:
        self._keep(offset, b"".join(views))

    def _keep(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        if offset % _SECTOR or end % _SECTOR or end > self.size:
            self._below.writev(offset, [memoryview(data)])  # the store below says what is wrong with it
            return
        with self._lock:
            for at in range(0, len(data), _SECTOR):
                self._dirty[(offset + at) // _SECTOR] = data[at : at + _SECTOR]

    def flush(self) -> None:
        with self._lock:
            for sector in sorted(self._dirty):
                self._below.writev(sector * _SECTOR, [memoryview(self._dirty[sector])])
            self._dirty.clear()
            self._below.flush()

    def discard(self, offset: int, length: int) -> None:
        self._keep(offset, bytes(length))

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._keep(offset, bytes(length))

    def current_size(self) -> int:
        return self._below.current_size()

    def resize(self, size: int) -> None:
        with self._lock:
            self._below.resize(size)
            self._dirty = {sector: data for sector, data in self._dirty.items() if (sector + 1) * _SECTOR <= size}
        self.size = size

    def close(self) -> None:
        if not self.read_only:
            self.flush()
        self._below.close()
