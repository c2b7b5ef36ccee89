"""What a test must not leave behind: child processes, threads, open files, temporary files.

``snapshot()`` before and ``left_since(before)`` after. Children and open files are seen on Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

__all__ = ["Left", "adopt_orphans", "left_since", "snapshot"]

LINUX = sys.platform == "linux"
GRACE_S = 30.0  # a browser's helpers and a kernel's threads need a moment to go

# Opened once by a library and kept for the life of the process: (what /proc/self/fd says, who).
KEPT_OPEN: tuple[tuple[re.Pattern[str], str], ...] = ((re.compile(r"/dev/(null|urandom|random)"), "the random and subprocess modules"),)
# Started once by the standard library and ended with the process: (what the command line holds, who).
KEPT_RUNNING: tuple[tuple[str, str], ...] = (
    ("multiprocessing.resource_tracker", "multiprocessing.shared_memory"),
    ("multiprocessing.forkserver", "multiprocessing's forkserver"),
)
# Made once by the standard library and removed with the process: (how the name begins, who).
KEPT_TEMPORARY: tuple[tuple[str, str], ...] = (("pymp-", "multiprocessing's forkserver"),)


@dataclass(frozen=True)
class Left:
    """Everything a test can leave behind, as it stands now; empty and falsy if there is nothing."""

    children: frozenset[int] = frozenset()
    threads: frozenset[threading.Thread] = frozenset()
    open_files: frozenset[tuple[int, str]] = frozenset()
    temporary: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.children or self.threads or self.open_files or self.temporary)

    def __str__(self) -> str:
        lines = [f"process {pid}: {_command(pid) or 'gone meanwhile'}" for pid in sorted(self.children)]
        lines += [f"thread {thread.name}" for thread in self.threads]
        lines += [f"open file {number}: {target}" for number, target in sorted(self.open_files)]
        lines += [f"temporary file {name}" for name in sorted(self.temporary)]
        return "; ".join(lines)


def adopt_orphans() -> None:
    """Let grandchildren whose parent ended come to this process, so that they are seen (Linux's child subreaper)."""
    if LINUX:
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def snapshot() -> Left:
    """What there is now."""
    return Left(
        children=frozenset(_children()),
        threads=frozenset(thread for thread in threading.enumerate() if not thread.daemon),
        open_files=frozenset(_open_files()),
        temporary=frozenset(os.listdir(tempfile.gettempdir())),
    )


def left_since(before: Left) -> Left:
    """What is there now, was not there ``before`` and does not go away within a moment."""
    deadline = time.monotonic() + GRACE_S
    while left := _difference(before):
        gc.collect()  # each time: what a thread still held the last time may have become garbage
        if not (left := _difference(before)) or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return left


def _difference(before: Left) -> Left:
    now = snapshot()
    return Left(
        children=frozenset(pid for pid in now.children - before.children if not _harmless_child(pid)),
        threads=now.threads - before.threads,
        open_files=frozenset(file for file in now.open_files - before.open_files if not _harmless_file(*file)),
        temporary=frozenset(name for name in now.temporary - before.temporary if not _harmless_temporary(name)),
    )


def _children() -> Iterator[int]:
    if not LINUX:
        return
    for task in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/self/task/{task}/children", encoding="ascii") as file:
            yield from map(int, file.read().split())


def _harmless_child(pid: int) -> bool:
    if _has_ended(pid):  # an orphan that came to us and ended, or a Popen nobody waited for, which Python itself reports
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        return True
    return any(words in _command(pid) for words, _ in KEPT_RUNNING)


def _has_ended(pid: int) -> bool:
    return _read(pid, "stat").rpartition(") ")[2][:1] in {"", "Z"}  # "pid (name) state ...", nothing when it is gone


def _command(pid: int) -> str:
    return _read(pid, "cmdline").replace("\0", " ").strip()[:200]


def _read(pid: int, name: str) -> str:
    with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/{name}", encoding="utf-8", errors="replace") as file:
        return file.read()
    return ""


def _open_files() -> Iterator[tuple[int, str]]:
    if not LINUX:
        return
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing itself
            yield int(name), os.readlink(f"/proc/self/fd/{name}")


def _harmless_file(number: int, target: str) -> bool:
    return number in _multiprocessing_files() or any(pattern.fullmatch(target) for pattern, _ in KEPT_OPEN)


def _harmless_temporary(name: str) -> bool:
    return any(name.startswith(start) for start, _ in KEPT_TEMPORARY)


def _multiprocessing_files() -> set[int | None]:
    """The ends of the pipes to the processes of KEPT_RUNNING."""
    tracker = sys.modules.get("multiprocessing.resource_tracker")
    server = sys.modules.get("multiprocessing.forkserver")
    return {
        getattr(getattr(tracker, "_resource_tracker", None), "_fd", None),
        getattr(getattr(server, "_forkserver", None), "_forkserver_alive_fd", None),
    }
