"""QEMU's own device behind our driver, or behind a real guest: qemu-storage-daemon's vhost-user-blk export."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, DiskError, NotHere, VblkError
from .disks import AIO, escaped
from .process import die_with_parent, wait_or_kill

__all__ = ["RunningDaemon", "StorageDaemon"]

_START_S, _END_S = 60.0, 5.0


@dataclass(frozen=True)
class StorageDaemon:
    """A recipe's ``host`` side: qemu-storage-daemon serves the raw image ``image``.

    ``aio`` is how it reads and writes (threads, native, io_uring), ``cache_direct`` opens the image with O_DIRECT, and
    ``poll_max_ns`` gives the device an iothread that polls so long before it sleeps.
    """

    image: str
    queues: int = 1
    writable: bool = True
    aio: str = "threads"
    cache_direct: bool = False
    poll_max_ns: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", os.fspath(self.image))
        if self.aio not in AIO:
            raise ConfigError(f"StorageDaemon aio={self.aio!r}", f"choose one of {', '.join(AIO)}")
        if self.aio == "native" and not self.cache_direct:
            raise ConfigError("StorageDaemon aio='native' without cache_direct", "Linux AIO needs O_DIRECT: cache_direct=True")
        if not 1 <= self.queues <= 64:
            raise ConfigError(f"StorageDaemon queues={self.queues}", "use 1 to 64")

    def arguments(self, path: str) -> list[str]:
        """The command line after the program's name; the device listens at ``path``."""
        direct, writable = "on" if self.cache_direct else "off", "on" if self.writable else "off"
        export = f"vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={path},num-queues={self.queues},writable={writable}"
        read_only = "off" if self.writable else "on"
        node = f"driver=file,node-name=disk,filename={escaped(self.image)},aio={self.aio},cache.direct={direct},read-only={read_only}"
        if self.poll_max_ns is None:
            return ["--blockdev", node, "--export", export]
        thread = f"iothread,id=thread,poll-max-ns={self.poll_max_ns}"
        return ["--object", thread, "--blockdev", node, "--export", f"{export},iothread=thread"]

    def start(self) -> RunningDaemon:
        """Start the daemon and wait until it takes connections."""
        program = shutil.which("qemu-storage-daemon")
        if program is None:
            raise NotHere("no qemu-storage-daemon here", "apt install qemu-system-common (it comes with qemu-system-x86)")
        if not os.path.exists(self.image):
            raise DiskError(f"disk image {self.image!r} does not exist", f"make one: truncate -s 64M {self.image}")
        return RunningDaemon(self, program)


class RunningDaemon:
    """A daemon that runs; ``socket`` is its path.  ``close()`` ends it, and so does the end of this process."""

    def __init__(self, daemon: StorageDaemon, program: str) -> None:
        self.daemon = daemon
        self._folder = tempfile.mkdtemp(prefix="vblk-qsd-", dir="/tmp")  # a socket's path must be short
        self.socket = os.path.join(self._folder, "disk.sock")
        self._errors = Path(self._folder, "stderr")
        self._process: subprocess.Popen[bytes] | None = None
        try:
            with self._errors.open("wb") as errors:
                self._process = subprocess.Popen(
                    die_with_parent([program, *daemon.arguments(self.socket)]),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    start_new_session=True,
                )
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        """Until the socket is bound; the daemon serves one front-end, so nobody connects to try."""
        assert self._process is not None
        end = time.monotonic() + _START_S
        while not os.path.exists(self.socket):
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(0.01)
                said = self._errors.read_text(errors="replace").strip().splitlines() or ["no message"]
                raise VblkError(f"qemu-storage-daemon ended with status {code}: {said[-1]}", "see its options in StorageDaemon")
            if time.monotonic() > end:
                raise VblkError(f"qemu-storage-daemon made no socket within {_START_S:g} s", "try again, or see whether it hangs")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> RunningDaemon:
        return self

    def __exit__(self, *what: object) -> None:
        self.close()

    def close(self) -> None:
        """End the daemon in order, so that the image is flushed; a second call does nothing."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGTERM)
            wait_or_kill(process, _END_S)
        shutil.rmtree(self._folder, ignore_errors=True)
