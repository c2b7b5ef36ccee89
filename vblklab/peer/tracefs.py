"""Recording what this host's kernel does: events of its own ftrace, in an instance of tracefs that nobody else uses.

An instance has buffers, events, filters and a clock of its own, so whatever else is traced on this machine goes on as before.  A helper
process, which waits for the end of this one, removes it: also after a crash, after Ctrl-C or a SIGKILL.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from ..errors import ConfigError, NotHere, TraceError

__all__ = ["INSTANCE", "Captured", "KernelTrace", "tracing_missing"]

INSTANCE = "vblklab-{pid}"
_MOUNTS = "/proc/mounts"
_RUN_ON = "the run works without kernel_trace"
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_FSCONFIG_CMD_CREATE, _CLOEXEC = 6, 1
_PAGE_MOST = 1 << 16
# The helper stands in instances/, which keeps a tracefs that is mounted nowhere alive; its stdin ends with the process that traces.
_REMOVE = """\
read _
tries=0
while [ -d "$0" ] && [ $tries -lt 100 ]; do
    echo 0 > "$0/tracing_on"
    rmdir "$0" || sleep 0.05
    tries=$((tries + 1))
done
"""


@dataclass
class Captured:
    """What the kernel wrote: for each CPU the pages of its ring buffer, and the layout of pages and events as tracefs states it.

    ``dropped`` is for each CPU how many events found its buffer full; those are the last ones.  ``overrun`` are events lost in between.
    ``missing`` are the events asked for that this kernel does not have.
    """

    header_page: str = ""
    formats: list[str] = field(default_factory=list)
    pages: dict[int, list[bytes]] = field(default_factory=dict)
    dropped: dict[int, int] = field(default_factory=dict)
    overrun: int = 0
    missing: tuple[str, ...] = ()


def _mounted(mounts: str = _MOUNTS) -> str:
    """Where tracefs is mounted, or nothing."""
    try:
        lines = Path(mounts).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    places = [fields[1] for line in lines if (fields := line.split())[2:3] == ["tracefs"]]
    return next((place for place in places if os.access(f"{place}/instances", os.W_OK | os.X_OK)), "")


def _detached() -> int:
    """A tracefs of our own that is mounted nowhere: the fd of its root, or -1 with errno set."""
    libc = ctypes.CDLL(None, use_errno=True)
    context = libc.syscall(_SYS_FSOPEN, b"tracefs", _CLOEXEC)
    if context < 0:
        return -1
    try:
        if libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0) < 0:
            return -1
        return int(libc.syscall(_SYS_FSMOUNT, context, _CLOEXEC, 0))
    finally:
        os.close(context)


def tracing_missing(mounts: str = _MOUNTS) -> tuple[str, str]:
    """What this machine lacks for ``kernel_trace`` and how to get it, or two empty texts."""
    if sys.platform != "linux":
        return f"tracing the kernel needs Linux (this is {sys.platform})", "a Linux host"
    if _mounted(mounts):
        return "", ""
    if os.geteuid():
        return f"tracing the kernel needs root (this is uid {os.geteuid()})", "run it as root, with sudo"
    root = _detached()
    if root < 0:
        why = os.strerror(ctypes.get_errno())
        return (
            f"root may not mount tracefs here ({why})",
            "mount it on the host and give it to this container: mount -t tracefs nodev /sys/kernel/tracing",
        )
    os.close(root)
    return "", ""


class KernelTrace:
    """One recording: ``with KernelTrace(events) as trace: …``, then ``trace.captured``.

    ``events`` maps ``system:event`` to a filter in ftrace's own language, or to "".  A buffer that is full (``buffer_kb`` for each CPU)
    drops what comes later.  Times are those of ``clock``; ``mono`` is ``perf_counter_ns``.  NotHere, with the remedy, without root.
    """

    def __init__(self, events: Mapping[str, str], *, buffer_kb: int = 8192, clock: str = "mono") -> None:
        for name in events:
            if not re.fullmatch(r"\w+:\w+", name):
                raise ConfigError(f"trace event {name!r}", "write system:event, such as block:block_rq_issue")
        self.name = INSTANCE.format(pid=os.getpid())
        self.captured: Captured | None = None
        self._events, self._buffer_kb, self._clock = events, buffer_kb, clock
        self._root = self._base = ""
        self._root_fd = self._hold = -1
        self._helper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> KernelTrace:
        what, remedy = tracing_missing()
        if what:
            raise NotHere(what, f"{remedy}; {_RUN_ON}")
        try:
            self._open()
            self._set_up()
        except OSError as error:
            self.close()
            raise TraceError(f"tracefs refused {error.filename or self.name}: {error.strerror}", _RUN_ON) from None
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if kind is None and self.captured is None:
                self.stop()
        finally:
            self.close()

    # -- the instance ----------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._root = _mounted()
        if not self._root:
            self._root_fd = _detached()
            self._root = f"/proc/self/fd/{self._root_fd}"
        instances = f"{self._root}/instances"
        _sweep(instances)
        self._base = f"{instances}/{self.name}"
        quiet = subprocess.DEVNULL
        command = ["/bin/sh", "-c", _REMOVE, self.name]
        try:
            os.mkdir(self._base)
        except FileExistsError:
            raise TraceError(
                f"{self.name} is recording already", "end the run that traces the kernel before you start another one"
            ) from None
        self._helper = subprocess.Popen(command, cwd=instances, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)
        self._hold = os.open(f"{self._base}/tracing_on", os.O_RDONLY | os.O_CLOEXEC)

    def _set_up(self) -> None:
        self._write("tracing_on", "0")
        self._write("trace_clock", self._clock)
        self._write("buffer_size_kb", str(self._buffer_kb))
        self._write("options/overwrite", "0")
        captured = Captured(header_page=self._read(f"{self._root}/events/header_page"))
        missing = []
        for name, wanted in self._events.items():
            folder = "events/" + name.replace(":", "/")
            try:
                captured.formats.append(self._read(f"{self._root}/{folder}/format"))
            except FileNotFoundError:
                missing.append(name)
                continue
            if wanted:
                self._write(f"{folder}/filter", wanted)
            self._write(f"{folder}/enable", "1")
        captured.missing = tuple(missing)
        self._begun = captured
        self._write("tracing_on", "1")

    def stop(self) -> Captured:
        """End the recording and read it."""
        self._write("tracing_on", "0")
        captured = self._begun
        for folder in sorted(Path(self._base, "per_cpu").iterdir()):
            cpu = int(folder.name.removeprefix("cpu"))
            pages = _pages(folder / "trace_pipe_raw")
            if pages:
                captured.pages[cpu] = pages
            stats = dict(re.findall(r"^([\w ]+): (\d+)$", (folder / "stats").read_text(encoding="ascii"), re.MULTILINE))
            captured.dropped[cpu] = int(stats.get("dropped events", 0))
            captured.overrun += int(stats.get("overrun", 0)) + int(stats.get("commit overrun", 0))
        self.captured = captured
        return captured

    def close(self) -> None:
        """Remove the instance; TraceError if the kernel does not let go of it."""
        helper, self._helper = self._helper, None
        try:
            if self._hold >= 0:
                os.close(self._hold)
                self._hold = -1
            if helper is not None:
                assert helper.stdin is not None
                helper.stdin.close()
                helper.wait()
                if os.path.isdir(self._base):
                    raise TraceError(f"the kernel keeps the trace instance {self.name}", f"see who uses {self._base}, then rmdir it")
        finally:
            if self._root_fd >= 0:
                os.close(self._root_fd)
                self._root_fd = -1

    def _write(self, name: str, text: str) -> None:
        path = f"{self._base}/{name}"
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        except OSError as error:
            raise OSError(error.errno, f"{text!r} ({error.strerror})", path) from None
        finally:
            os.close(fd)

    def _read(self, path: str) -> str:
        return Path(path).read_text(encoding="ascii")


def _pages(path: Path) -> list[bytes]:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    pages = []
    try:
        with suppress(BlockingIOError):
            while page := os.read(fd, _PAGE_MOST):
                pages.append(page)
    finally:
        os.close(fd)
    return pages


def _sweep(instances: str) -> None:
    """Remove what a process that is gone has left, should its helper have been killed too; the kernel refuses for one in use."""
    for name in os.listdir(instances):
        found = re.fullmatch(INSTANCE.format(pid=r"(\d+)"), name)
        if found and not os.path.exists(f"/proc/{found[1]}"):
            with suppress(OSError):
                os.rmdir(f"{instances}/{name}")
