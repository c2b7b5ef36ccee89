"""The disks of a real guest: each says the arguments of QEMU that make it.  They become /dev/vda, /dev/vdb … in their order."""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import ConfigError

__all__ = ["AIO", "GuestDisk", "QemuDisk", "VhostUserDisk", "escaped", "vhost_user_blk"]

AIO = ("threads", "native", "io_uring")
"""How QEMU reads and writes an image."""
_CACHE = {  # QEMU's cache modes: (write-cache of the device, O_DIRECT, flushes ignored)
    "writeback": (True, False, False),
    "none": (True, True, False),
    "writethrough": (False, False, False),
    "directsync": (False, True, False),
    "unsafe": (True, False, True),
}


class GuestDisk(Protocol):
    """Any kind of disk that QEMU can attach."""

    def check(self) -> None:
        """Raise ConfigError if QEMU could not start with it."""

    def arguments(self, number: int, qemu: tuple[int, ...]) -> list[str]:
        """QEMU's arguments for the disk with this number, for this version of QEMU."""


@dataclass(frozen=True)
class VhostUserDisk:
    """A disk that another process serves over vhost-user at the unix socket ``socket``: vhost-user-blk-pci.

    ``reconnect_s`` is how often QEMU tries again when the connection is lost; 0 gives up.  With ``packed`` QEMU offers the guest packed
    rings, if the other process does.
    """

    socket: str | Path
    queues: int = 1
    queue_size: int = 128
    reconnect_s: int = 1
    packed: bool = False

    def __post_init__(self) -> None:
        _check_queues(self, self.queues, self.queue_size)
        if self.reconnect_s < 0:
            raise ConfigError(f"{self}: reconnect_s={self.reconnect_s}", "give 0 (never) or whole seconds")

    def check(self) -> None:
        """Raise ConfigError unless somebody may be listening at the socket."""
        try:
            mode = Path(self.socket).stat().st_mode
        except OSError as error:
            raise ConfigError(f"vhost-user socket {self.socket}: {error.strerror}", "start the device's server first") from None
        if not stat.S_ISSOCK(mode):
            raise ConfigError(f"{self.socket} is not a socket", "give the socket at which the device's server listens")

    def arguments(self, number: int, qemu: tuple[int, ...]) -> list[str]:
        """A socket chardev and the device over it."""
        again = f"reconnect-ms={self.reconnect_s * 1000}" if qemu >= (9, 2) else f"reconnect={self.reconnect_s}"
        more = again if self.reconnect_s else ""
        arguments = vhost_user_blk(f"disk{number}", self.socket, queues=self.queues, queue_size=self.queue_size, more=more)
        return [*arguments[:-1], arguments[-1] + ",packed=on"] if self.packed else arguments


@dataclass(frozen=True)
class QemuDisk:
    """QEMU's own device over the raw image ``path``: virtio-blk-pci.  ``cache`` and ``aio`` are QEMU's modes.

    ``iothread`` serves it in a thread of its own, with ``poll_us`` of busy polling before that thread sleeps (QEMU's default is 32).
    """

    path: str | Path
    queues: int = 1
    queue_size: int = 256
    iothread: bool = False
    poll_us: int | None = None
    read_only: bool = False
    cache: str = "writeback"
    aio: str = "threads"

    def __post_init__(self) -> None:
        _check_queues(self, self.queues, self.queue_size)
        if self.cache not in _CACHE:
            raise ConfigError(f"QemuDisk cache={self.cache!r}", f"use one of {', '.join(_CACHE)}")
        if self.aio not in AIO:
            raise ConfigError(f"QemuDisk aio={self.aio!r}", f"use one of {', '.join(AIO)}")
        if self.aio == "native" and not _CACHE[self.cache][1]:
            raise ConfigError(f"QemuDisk aio='native' with cache={self.cache!r}", "use cache='none' or 'directsync'")
        if self.poll_us is not None and (self.poll_us < 0 or not self.iothread):
            raise ConfigError(f"QemuDisk poll_us={self.poll_us}, iothread={self.iothread}", "polling belongs to iothread=True; 0 or more")

    def check(self) -> None:
        """Raise ConfigError unless the image is a file or block device that can be opened as wanted."""
        try:
            with open(self.path, "rb" if self.read_only else "r+b"):
                pass
        except OSError as error:
            raise ConfigError(f"disk image {self.path}: {error.strerror}", "make it first, or read_only=True") from None

    def arguments(self, number: int, qemu: tuple[int, ...]) -> list[str]:
        """A block node, perhaps an iothread, and the device."""
        write_cache, direct, no_flush = _CACHE[self.cache]
        cache = {"direct": direct, "no-flush": no_flush}
        kind = "host_device" if stat.S_ISBLK(Path(self.path).stat().st_mode) else "file"
        file = {"driver": kind, "filename": str(self.path), "aio": self.aio, "cache": cache, "discard": "unmap"}
        node = {
            "driver": "raw",
            "node-name": f"node{number}",
            "read-only": self.read_only,
            "cache": cache,
            "discard": "unmap",
            "file": file,
        }
        device = f"virtio-blk-pci,id=disk{number},drive=node{number},num-queues={self.queues},queue-size={self.queue_size}"
        device += f",write-cache={'on' if write_cache else 'off'}"
        arguments = ["-blockdev", json.dumps(node)]
        if self.iothread:
            polling = "" if self.poll_us is None else f",poll-max-ns={self.poll_us * 1000}"
            arguments += ["-object", f"iothread,id=iothread{number}{polling}"]
            device += f",iothread=iothread{number}"
        return [*arguments, "-device", device]


def _check_queues(disk: object, queues: int, queue_size: int) -> None:
    if not 1 <= queues <= 1024:
        raise ConfigError(f"{disk}: queues={queues}", "give 1 to 1024")
    if not 4 <= queue_size <= 1024 or queue_size & (queue_size - 1):
        raise ConfigError(f"{disk}: queue_size={queue_size}", "give a power of 2 from 4 to 1024, as QEMU takes it")


def vhost_user_blk(name: str, socket: str | Path, *, queues: int, queue_size: int, more: str = "") -> list[str]:
    """A socket chardev, with ``more`` options, and the device over it; both are called ``name``."""
    chardev = f"socket,id={name},path={escaped(socket)}" + (f",{more}" if more else "")
    return ["-chardev", chardev, "-device", f"vhost-user-blk-pci,id={name},chardev={name},num-queues={queues},queue-size={queue_size}"]


def escaped(path: str | Path) -> str:
    """A path as the value of an option of QEMU's."""
    return str(path).replace(",", ",,")
