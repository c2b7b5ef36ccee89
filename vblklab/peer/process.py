"""A child process that never outlives this one, with one thread that starts it and collects what it prints."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

__all__ = ["Printing", "die_with_parent", "wait_or_kill"]

_LAUNCH = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def die_with_parent(arguments: Sequence[str]) -> list[str]:
    """The command that runs ``arguments`` such that SIGKILL ends them with the thread that started them (Linux).

    The thread, not the process: start it from one that lives as long as the child may.
    """
    return [sys.executable, "-ISc", _LAUNCH, str(os.getpid()), *arguments]


def wait_or_kill(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for the end of a process that was asked to end; SIGKILL if it takes longer."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Printing:
    """A running process and the text that comes from ``console`` (its end of a socket pair) and from its stderr, as it comes.

    ``heard(text)`` is called from the collecting thread with each piece of the console.  Give it nothing that
    refers to what owns this object.
    """

    def __init__(self, arguments: Sequence[str], console: socket.socket, pass_fds: Sequence[int], heard: Callable[[str], None]) -> None:
        self._console = console
        self._heard = heard
        self._pieces: list[str] = []
        self._errors: list[str] = []
        self._started = threading.Event()
        self._failed: BaseException | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, args=(list(arguments), tuple(pass_fds)), name="vblklab-guest", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failed is not None:
            raise self._failed

    @property
    def text(self) -> str:
        """The console so far."""
        return "".join(self._pieces)

    @property
    def errors(self) -> str:
        """What the process itself complained about."""
        return "".join(self._errors).strip()

    @property
    def pid(self) -> int:
        """The process; also after its end."""
        assert self._process is not None
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status, None while it runs."""
        return None if self._thread.is_alive() or self._process is None else self._process.returncode

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended, and all that it printed is here, within so many seconds."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def end(self, grace_s: float = 3.0) -> None:
        """SIGTERM, on which QEMU stops its devices, and SIGKILL if that takes too long; at once if it has ended."""
        if self._process is not None and self._thread.is_alive():
            self._process.terminate()
            if not self.wait(grace_s):
                self._process.kill()
                self._thread.join()

    def _run(self, arguments: list[str], pass_fds: tuple[int, ...]) -> None:
        # This thread starts the process because PR_SET_PDEATHSIG is about the thread.
        try:
            self._process = subprocess.Popen(
                die_with_parent(arguments), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=pass_fds
            )
        except BaseException as error:
            self._failed = error
            self._console.close()
            return
        finally:
            self._started.set()
        with self._process, self._console:
            self._collect()

    def _collect(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._console, selectors.EVENT_READ, self._console_said)
            selector.register(self._process.stderr, selectors.EVENT_READ, self._errors.append)
            while selector.get_map():
                for key, _ in selector.select():
                    data = os.read(key.fd, 65536)
                    if data:
                        key.data(data.decode("utf-8", "replace"))
                    else:
                        selector.unregister(key.fileobj)

    def _console_said(self, text: str) -> None:
        text = text.replace("\r\n", "\n")
        self._pieces.append(text)
        self._heard(text)
