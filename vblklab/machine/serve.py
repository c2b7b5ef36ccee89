"""Serving a device to a front-end elsewhere, from a process or thread of its own: ``vb.serve(MyDevice, disk)``."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..disk import Disk, Ram
from ..engine import Sync
from ..errors import ConfigError, DeviceDied, NotHere, VblkError
from ..peer.disks import vhost_user_blk
from ..peer.process import wait_or_kill
from ..vhost.channel import listen
from .base import fresh
from .live import live_missing
from .live_device import child_setup, recv_message, send_message, start_child
from .loop import LogEntry
from .vhost_server import VhostServer

__all__ = ["Served", "qemu_arguments", "serve"]

_START_S = 60.0
_ANSWER_S = 20.0
_END_S = 5.0
_FOLDER_MOST = 90


@dataclass(frozen=True)
class _Setup:
    device: Any
    engine: Any
    disk: Disk
    listener: int
    control: int
    poll_us: float
    trace: bool


def qemu_arguments(path: str, *, queues: int = 1, queue_size: int = 128, memory: str = "512M") -> list[str]:
    """QEMU's arguments for a disk behind the vhost-user socket at ``path``; its memory must be shared."""
    return [
        *("-m", memory, "-object", f"memory-backend-memfd,id=mem,size={memory},share=on", "-machine", "memory-backend=mem"),
        *vhost_user_blk("vblk", path, queues=queues, queue_size=queue_size, more="reconnect=1"),
    ]


def serve(
    device: Any = None,
    disk: Any = None,
    *,
    engine: Any = None,
    socket: str | None = None,
    where: str = "process",
    poll_us: float = 0,
    trace: bool = False,
    show: Callable[[str], None] | None = None,
) -> Served:
    """Serve ``device`` (a class or an instance, also one from a notebook's cell) over ``disk`` on a vhost-user socket.

    Returns at once; the device works in another process, or with ``where="thread"`` in a thread of this one.  ``socket`` None
    is a fresh path.  An exception in the device fails the request that it happened in, and ``show`` (default: standard error)
    gets its traceback.
    """
    from ..device import VirtioBlkDevice

    missing = live_missing()
    if missing:
        raise NotHere(missing)
    if where not in ("process", "thread"):
        raise ConfigError(f"serve where={where!r}", "choose 'process' or 'thread'")
    return Served(
        fresh(VirtioBlkDevice if device is None else device),
        Ram(64 << 20) if disk is None else disk,
        fresh(Sync() if engine is None else engine),
        path=socket,
        where=where,
        poll_us=poll_us,
        trace=trace,
        show=show or _to_stderr,
    )


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Served:
    """A device that is being served.  ``socket`` is its path; ``close()`` ends it, and so does leaving a ``with``."""

    def __init__(
        self,
        device: Any,
        disk: Any,
        engine: Any,
        *,
        path: str | None,
        where: str,
        poll_us: float,
        trace: bool,
        show: Callable[[str], None],
    ) -> None:
        self._parts = device, engine, disk
        self._where, self._poll_us, self._trace, self._show = where, poll_us, trace, show
        self._folder = None if path else _short_folder()
        self.socket = path or os.path.join(str(self._folder), "disk.sock")
        self.lines: list[str] = []
        self.exceptions: list[str] = []
        self._control: socket.socket | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._answers: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._closed = False
        try:
            self._listener = listen(self.socket)
        except BaseException:
            _remove(self._folder, None)
            raise
        self._finalizer = weakref.finalize(self, _remove, self._folder, self.socket)
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *what: object) -> None:
        self.close()

    def __repr__(self) -> str:
        device, _, disk = self._parts
        return f"Served({device!r}, {disk!r}, socket={self.socket!r}{', closed' if self._closed else ''})"

    @property
    def pid(self) -> int | None:
        """The process that serves, if it is one of its own and runs."""
        return None if self._child is None or self._child.poll() is not None else self._child.pid

    @property
    def qemu(self) -> str:
        """The arguments of QEMU that attach this disk."""
        device = self._parts[0]
        return " ".join(qemu_arguments(self.socket, queues=device.num_queues or 1))

    # -- beginning and ending ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve, also again after ``kill()``: front-ends that connect meanwhile have waited."""
        if self._closed:
            raise ConfigError(f"{self!r} is closed", "call vb.serve() again")
        if self._control is not None:
            raise ConfigError(f"{self!r} serves already", "kill() it first")
        control, other = socket.socketpair()
        device, engine, disk = self._parts
        setup = _Setup(device, engine, disk, self._listener.fileno(), other.fileno(), self._poll_us, self._trace)
        control.settimeout(_START_S)
        try:
            if self._where == "thread":
                threading.Thread(target=_serve_setup, args=(setup,), name="vblklab server", daemon=True).start()
                first = recv_message(control)
            else:
                first = self._spawn(control, setup)
        except EOFError:
            control.close()
            raise DeviceDied("the serving process ended before it was ready", "see its output above") from None
        except TimeoutError:
            control.close()
            what = f"the serving process was not ready within {_START_S:g} s"
            raise DeviceDied(what, "see what its imports or its attach() wait for") from None
        except BaseException:
            control.close()
            raise
        finally:
            if self._where == "thread":
                other.detach()  # the thread's own now
            else:
                other.close()
        if first[0] == "error":
            control.close()
            raise first[1]
        control.settimeout(None)
        self._control = control
        self._answers = queue.SimpleQueue()  # what was said of the one before does not count
        self._reader = threading.Thread(target=self._read, args=(control,), name="vblklab served", daemon=True)
        self._reader.start()

    def _spawn(self, control: socket.socket, setup: _Setup) -> Any:
        self._child = start_child(
            "vblklab.machine.serve",
            control,
            setup.control,
            setup,
            (setup.control, setup.listener),
            what="the device",
            remedy='make such objects in its attach(), or serve with where="thread"',
        )
        return recv_message(control)

    def kill(self) -> None:
        """End the process with SIGKILL, as a crash would; ``start()`` serves again."""
        if self._child is None:
            raise ConfigError("only a process can be killed", 'serve with where="process"')
        self._child.send_signal(signal.SIGKILL)
        self._child.wait()
        self._gone()

    def close(self) -> None:
        """Stop serving, wait for the end, remove the socket; a process whose device does not come back is killed after 5 s."""
        if self._closed:
            return
        self._closed = True
        if self._control is not None:
            try:
                self._answer(("stop",), _END_S)
            except VblkError:
                if self._child is not None:
                    self._child.kill()
        if self._child is not None:
            wait_or_kill(self._child, _END_S)
        self._gone()
        self._listener.close()
        self._finalizer()

    def _gone(self) -> None:
        if self._control is not None:
            try:
                self._control.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            if self._reader is not None:
                self._reader.join(_END_S)
            self._control.close()
            self._control = None

    # -- talking to it -----------------------------------------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """Connections, kicks, notifies, requests, queue errors so far."""
        counts: dict[str, int] = self._answer(("counters",))
        return counts

    def explain(self) -> list[str]:
        """Which path the device's requests take, and why."""
        lines: list[str] = self._answer(("explain",))
        return lines

    def resize(self, size: int) -> None:
        """Another size of the disk, in bytes; the guest is told."""
        self._answer(("resize", size))

    def take_log(self) -> list[LogEntry]:
        """The trace points since the last call (``trace=True``)."""
        log: list[LogEntry] = self._answer(("log",))
        return log

    def _answer(self, command: tuple[Any, ...], within_s: float = _ANSWER_S) -> Any:
        if self._control is None:
            raise DeviceDied("nothing serves this disk now", "start() it again")
        try:
            send_message(self._control, command)
        except OSError:
            raise DeviceDied("the serving process is gone", "start() it again") from None
        try:
            kind, value = self._answers.get(timeout=within_s)
        except queue.Empty:
            raise DeviceDied(f"the serving process does not answer {command[0]!r}", "close() it") from None
        if kind == "error":
            raise value
        return value

    def _read(self, control: socket.socket) -> None:
        """The reader's thread: answers to whoever waits, lines and exceptions to the reader of the notebook."""
        while True:
            try:
                message = recv_message(control)
            except (EOFError, OSError):
                self._answers.put(("error", DeviceDied("the serving process is gone", "start() it again")))
                return
            if message[0] == "line":
                self.lines.append(message[1])
            elif message[0] == "exception":
                self.exceptions.append(message[1])
                self._show(message[1])
            else:
                self._answers.put(message)


def _short_folder() -> str:
    """A fresh folder for a socket, whose path has at most 107 bytes."""
    folder = tempfile.mkdtemp(prefix="vblk-")
    if len(os.fsencode(folder)) < _FOLDER_MOST:
        return folder
    os.rmdir(folder)
    return tempfile.mkdtemp(prefix="vblk-", dir="/tmp")


def _remove(folder: str | None, path: str | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    elif path is not None and os.path.exists(path):
        os.unlink(path)


# -- the serving side ----------------------------------------------------------------------------------------------------------


def _serve_setup(setup: _Setup) -> None:
    """The body of the process or thread."""
    control = socket.socket(fileno=setup.control)
    with control:
        try:
            store = setup.disk.open()
        except Exception as error:
            send_message(control, ("error", error))
            return
        listener = socket.socket(fileno=os.dup(setup.listener))

        def tell(*message: Any) -> None:
            try:
                send_message(control, message)
            except OSError:
                pass  # nobody is left to tell; the loop sees it too

        def exception(error: BaseException) -> None:
            tell("exception", "".join(traceback.format_exception(error)))

        try:
            server = VhostServer(
                setup.device,
                setup.engine,
                store,
                listener,
                poll_us=setup.poll_us,
                trace=setup.trace,
                log=lambda line: tell("line", line),
            )
            server.device.on_exception = exception
        except Exception as error:
            tell("error", error)
            store.close()
            listener.close()
            return
        server.loop.watch(control.fileno(), lambda: _command(server, control, tell))
        tell("ready", None)
        try:
            while not server.stopped:
                server.turn()
        except Exception as error:
            exception(error)
        finally:
            server.close()


def _command(server: VhostServer, control: socket.socket, tell: Callable[..., None]) -> None:
    try:
        name, *arguments = recv_message(control)
    except (EOFError, OSError):
        server.stop()
        return
    try:
        value: Any = None
        if name == "resize":
            server.resize(*arguments)
        elif name == "log":
            value, server.loop.log = server.loop.log or [], None if server.loop.log is None else []
        elif name == "explain":
            value = server.explain()
        else:
            value = server.counters()
    except Exception as error:
        tell("error", error)
        return
    if name == "stop":
        server.stop()
    tell("answer", value)


def _cannot_be_made(error: Exception) -> tuple[str, ConfigError]:
    return "error", ConfigError(f"the device cannot be made in the serving process: {type(error).__name__}: {error}")


if __name__ == "__main__":
    _received = child_setup(sys.argv[1:], _cannot_be_made)
    if _received is not None:
        _serve_setup(_received)
