"""The ``disk`` part of a recipe: where the bytes are and, on the simulator, which drive they lie on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from ..errors import ConfigError
from .store import CACHES, RamStore, Store, open_image

__all__ = ["DRIVES", "Disk", "ImageFile", "Nvme", "Ram"]

DRIVES = ("P4800X", "P3700")
"""Drive models in the cost table: an Optane drive, where the software shows, and a NAND drive, where the media does."""


class Disk(Protocol):
    """A disk can be opened as often as a recipe boots; ``drive`` names the cost table's drive, None for no hardware at all."""

    @property
    def drive(self) -> str | None: ...

    def open(self) -> Store: ...


def _size(size: int, what: str) -> None:
    if not isinstance(size, int) or size < 512 or size % 512:
        raise ConfigError(f"{what} size={size!r} bytes", "give a multiple of 512, for example 64 << 20")


@dataclass(frozen=True)
class Ram:
    """``size`` bytes of memory, zero at every boot; the host's driver copies in the caller's context (brd)."""

    size: int = 64 << 20

    def __post_init__(self) -> None:
        _size(self.size, "Ram")

    @property
    def drive(self) -> None:
        return None

    def open(self) -> Store:
        """Fresh zeroes."""
        return RamStore(self.size)


@dataclass(frozen=True)
class Nvme:
    """An NVMe drive of ``size`` bytes, zero at every boot, with the queueing and the dies of a published drive.

    ``read_us`` and ``write_us`` override the model's latency; figures then say that you stated them.
    """

    size: int = 64 << 20
    model: str = "P4800X"
    queue_depth: int = 1023
    read_us: float | None = None
    write_us: float | None = None

    def __post_init__(self) -> None:
        _size(self.size, "Nvme")
        if self.model not in DRIVES:
            raise ConfigError(f"Nvme model={self.model!r}", f"the cost table knows {', '.join(DRIVES)}")
        if not isinstance(self.queue_depth, int) or not 1 <= self.queue_depth <= 65535:
            raise ConfigError(f"Nvme queue_depth={self.queue_depth!r}", "use 1 to 65535")
        for name in ("read_us", "write_us"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"Nvme {name}={value!r}", "a latency is 0 or more")

    @property
    def drive(self) -> str:
        return self.model

    def open(self) -> Store:
        """Fresh zeroes."""
        return RamStore(self.size)


@dataclass(frozen=True)
class ImageFile:
    """A raw image or block device at ``path``; its bytes are read and written for real on every machine.

    On the simulator the time is that of the drive model ``on``; live it is what the host takes.  ``cache`` is QEMU's:
    "writeback", "writethrough" (every write is stable before it ends), "none" (O_DIRECT), "directsync" (both), "unsafe" (a flush
    does nothing).
    """

    path: str
    read_only: bool = False
    on: str = "P4800X"
    cache: str = "writeback"

    def __post_init__(self) -> None:
        if self.cache not in CACHES:
            raise ConfigError(f"ImageFile cache={self.cache!r}", f"choose one of {', '.join(CACHES)}")
        object.__setattr__(self, "path", os.fspath(self.path))
        if self.on not in DRIVES:
            raise ConfigError(f"ImageFile on={self.on!r}", f"the cost table knows {', '.join(DRIVES)}")

    @property
    def drive(self) -> str:
        return self.on

    def open(self) -> Store:
        """Open the file; raises DiskError with the remedy."""
        return open_image(self.path, read_only=self.read_only, cache=self.cache)
