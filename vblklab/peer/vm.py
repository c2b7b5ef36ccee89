"""GuestVm: a booted guest, its console, commands, files, fio and ftrace."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ..errors import ConfigError, GuestCommandFailed, GuestDied, GuestTimeout
from ..guest.fio import Fio
from ..guest.job import Job
from .channel import LOST, Answer, Channel
from .ftrace import EVENTS, KPROBES, ClockPair, Ftrace, clock_pairs
from .process import Printing
from .real_fio import run_fio

__all__ = ["Completed", "GuestVm", "Listener"]


class _Milestone(NamedTuple):
    """How far the boot is when ``sign`` stands on the console; ``asks_disks``: next the firmware or the drivers read disks."""

    fraction: float
    what: str
    sign: str
    asks_disks: bool = False


_MILESTONES = (
    _Milestone(0.05, "QEMU runs", "", asks_disks=True),
    _Milestone(0.15, "the kernel starts", "Linux version"),
    _Milestone(0.30, "the kernel finds its CPUs and memory", "smp: Brought up"),
    _Milestone(0.40, "the kernel finds its devices", "PCI: Using configuration"),
    _Milestone(0.55, "the kernel unpacks the initramfs", "Freeing initrd memory"),
    _Milestone(0.70, "the first program runs", "Run /init as init process"),
    _Milestone(0.80, "file systems are mounted", "vblklab: mounted", asks_disks=True),
    _Milestone(0.95, "virtio modules are loaded", "vblklab: modules loaded"),
)
_PANIC = re.compile(r"Kernel panic - not syncing: .*|---\[ end Kernel panic.*")
_CONSOLE_LINES = 25
_PIECE_BYTES = 8 << 20
_FILES_TIMEOUT_S = 120.0


class Completed(NamedTuple):
    """A command that ended: its exit status, and all that it printed on stdout and stderr."""

    status: int
    output: str


class Listener:
    """Hands the console on, and says at which milestone the boot is."""

    def __init__(self, console: Callable[[str], object] | None, progress: Callable[[float, str], object] | None) -> None:
        self._console = console
        self._progress = progress
        self._left = list(_MILESTONES)
        self._tail = ""
        self("")

    def __call__(self, text: str) -> None:
        if self._console is not None and text:
            self._console(text)
        if self._progress is None or not self._left:
            return
        self._tail += text
        reached = [number for number, each in enumerate(self._left) if each.sign in self._tail]
        if reached:
            last = self._left[reached[-1]]
            del self._left[: reached[-1] + 1]
            self._progress(last.fraction, last.what)
        self._tail = self._tail[-200:]

    def ready(self) -> None:
        """The boot is over: the last milestone."""
        self._left.clear()
        if self._progress is not None:
            self._progress(1.0, "the guest takes commands")


class GuestVm:
    """A running guest.  ``close()``, leaving its ``with`` block, or the end of this process, however it ends, end QEMU too.

    ``kernel`` is the release that runs, ``accel`` kvm or tcg, ``pid`` QEMU's.
    """

    def __init__(self, process: Printing, agent: socket.socket, killer: socket.socket, folder: Path, *, kernel: str, accel: str) -> None:
        self._process = process
        self._channel = Channel(agent, killer)
        self._folder = folder
        self.kernel = kernel
        self.accel = accel
        self.pid = process.pid
        self._finalizer = weakref.finalize(self, _end, process, self._channel, folder)

    def __repr__(self) -> str:
        state = "running" if self.alive else "ended"
        return f"<GuestVm Linux {self.kernel}, {self.accel}, {state}>"

    def __enter__(self) -> GuestVm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End QEMU at once, as if the power were cut; a second call does nothing."""
        self._finalizer()

    def shut_down(self, timeout_s: float = 30.0) -> None:
        """Unmount, power the guest off and wait for QEMU's end; raises GuestTimeout if that takes longer."""
        self.run("sync; umount -a -r -t ext4,ext3,ext2,xfs,btrfs 2>/dev/null; true", timeout_s=timeout_s)
        try:
            self._channel.run(b"poweroff -f", b"", timeout_s)
        except (EOFError, TimeoutError):
            pass
        if not self._process.wait(timeout_s):
            raise GuestTimeout(f"the guest did not power off within {timeout_s:g} s", "close() ends it", self.console_end)
        self.close()

    @property
    def alive(self) -> bool:
        """Whether QEMU runs."""
        return not self._process.wait(0)

    # -- what it prints ---------------------------------------------------------------------------------------------------

    @property
    def console(self) -> str:
        """All that the guest printed on its console so far."""
        return self._process.text

    @property
    def console_end(self) -> str:
        """The last lines of the console, and what QEMU complained about."""
        lines = [line for line in self.console.splitlines() if line.strip()][-_CONSOLE_LINES:]
        return "\n".join([*lines, *self._process.errors.splitlines()[-5:]])

    @property
    def qemu_trace(self) -> str:
        """QEMU's trace log so far, for the events of ``LinuxGuest(trace=...)``: lines ``pid@seconds.microseconds:name arguments``."""
        log = self._folder / "trace.log"
        return log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""

    def dmesg(self) -> str:
        """The kernel's own messages."""
        return self.run("dmesg").output

    # -- commands ---------------------------------------------------------------------------------------------------------

    def run(self, command: str, *, input: bytes = b"", timeout_s: float | None = 60.0, check: bool = True) -> Completed:
        """Run a shell command (busybox ash, as root) and wait for its end.

        Raises GuestCommandFailed for a status other than 0 unless ``check`` is False; GuestTimeout after ``timeout_s``, when the command
        and its children are killed and the guest takes the next one; GuestDied if the guest has ended.  ``timeout_s=None`` waits as long
        as the command takes; an interrupt (Ctrl-C) kills it too.
        """
        answer = self._ask(command, input, timeout_s)
        output = answer.output.decode("utf-8", "replace")
        if check and answer.status:
            raise _failed(command, answer.status, output)
        return Completed(answer.status, output)

    def _ask(self, command: str, data: bytes, timeout_s: float | None, what: str = "") -> Answer:
        try:
            return self._channel.run(command.encode(), data, timeout_s)
        except TimeoutError as error:
            name = what or f"guest command {_short(command)!r}"
            answer: Answer | None = error.args[0]
            if answer is None:
                raise GuestTimeout(f"{name} took over {timeout_s:g} s, and the guest is silent", "close() it", self.console_end) from None
            left = "; its process waits for a disk and is left behind" if answer.status == LOST else ""
            output = answer.output.decode("utf-8", "replace")
            raise GuestTimeout(f"{name} took over {timeout_s:g} s and was killed{left}", "give it a longer timeout_s", output) from None
        except (EOFError, OSError, ValueError):
            raise self._died() from None

    def wait_for_agent(self, timeout_s: float) -> None:
        """Wait for the end of the boot; raises GuestDied or GuestTimeout."""
        try:
            self._channel.greeting(timeout_s)
        except TimeoutError:
            reached = [each for each in _MILESTONES if each.sign in self.console][-1]
            what = f"the guest (Linux {self.kernel}, {self.accel}) did not boot within {timeout_s:g} s (so far: {reached.what})"
            remedy = "give a longer boot_timeout_s" + (", or accel='tcg'" if self.accel != "tcg" else "")
            if reached.asks_disks:
                remedy += ", or look at its disks: here one that does not answer holds the boot up"
            raise GuestTimeout(what, remedy, self.console_end) from None
        except (EOFError, OSError):
            raise self._died() from None

    def _died(self) -> GuestDied:
        if not self._finalizer.alive:
            return GuestDied("the guest is closed", "boot another", "")
        self._process.wait(5.0)
        panic = _PANIC.search(self.console)
        if panic:
            what = f"the guest's kernel ended: {panic[0]}"
        else:
            complaint = self._process.errors.splitlines()[-1:]
            what = f"QEMU ended with status {self._process.status}" + "".join(f": {line}" for line in complaint)
        return GuestDied(what, "its console says more (.output)", self.console_end)

    # -- files ------------------------------------------------------------------------------------------------------------

    def put(self, data: bytes | Path, path: str) -> None:
        """Write bytes, or a file of the host, to ``path`` in the guest."""
        data = data.read_bytes() if isinstance(data, Path) else data
        where = _path(path)
        self.run(f": > {where}", timeout_s=_FILES_TIMEOUT_S)
        for start in range(0, len(data), _PIECE_BYTES):
            self.run(f"cat >> {where}", input=data[start : start + _PIECE_BYTES], timeout_s=_FILES_TIMEOUT_S)

    def get(self, path: str) -> bytes:
        """The contents of a file of the guest."""
        where = _path(path)
        size = int(self.run(f"cat < {where} | wc -c" if path.startswith(("/proc", "/sys")) else f"stat -L -c %s {where}").output)
        pieces = []
        for number in range(-(-size // _PIECE_BYTES)):
            piece = f"dd if={where} bs={_PIECE_BYTES} skip={number} count=1 iflag=fullblock 2>/dev/null"
            answer = self._ask(piece, b"", _FILES_TIMEOUT_S)
            if answer.status:
                raise _failed(f"read {path}", answer.status, "it cannot be read")
            pieces.append(answer.output)
        return b"".join(pieces)

    # -- measuring --------------------------------------------------------------------------------------------------------

    def capacity(self, disk: str = "vda") -> int:
        """The size of a disk in bytes, as the guest's kernel sees it."""
        if not re.fullmatch(r"[a-z0-9]+", disk):
            raise ConfigError(f"disk {disk!r}", "give a name such as vda")
        return int(self.run(f"cat /sys/block/{disk}/size").output) * 512

    def fio(
        self, job: Fio | Job | Sequence[Job] | str | Path, *, filename: str = "/dev/vda", timeout_s: float | None = 600.0, **extra: object
    ) -> dict[str, Any]:
        """Run the real fio and return its JSON+ output.

        ``job`` is the package's, a job file's text or its path.  The disk is ``filename``, through libaio with O_DIRECT; ``extra`` sets
        other options of fio for all jobs, such as ``ioengine="io_uring"``.  Raises JobError for a job that is not understood,
        GuestCommandFailed if fio reports an error, such as an I/O error or a failed verification.
        """
        return run_fio(self, job, filename=filename, timeout_s=timeout_s, extra=extra)

    def ftrace(
        self,
        events: Sequence[str] = EVENTS,
        kprobes: Sequence[str] = tuple(KPROBES),
        *,
        clock: str = "mono",
        buffer_kb: int = 16384,
        pairs: int = 5,
    ) -> Ftrace:
        """A context in which the guest's kernel records ``events`` (``block:*``, ``block:block_rq_issue``) and calls of ``kprobes``.

        ``clock`` is a trace_clock of Linux (``mono`` is CLOCK_MONOTONIC in µs, ``x86-tsc`` counter ticks), ``buffer_kb`` the buffer of each
        CPU, ``pairs`` how many clock pairs are taken at its begin and end.  Afterwards ``.text`` is the recording.
        """
        return Ftrace(self, tuple(events), tuple(kprobes), clock, buffer_kb, pairs)

    def clock_pairs(self, number: int = 10, *, clock: str = "mono") -> list[ClockPair]:
        """Host times (perf_counter_ns) around readings of the guest's trace clock, to estimate the offset between the two."""
        with Ftrace(self, (), (), clock, 64, 0) as trace:
            return clock_pairs(trace.take(number), self.get("/sys/kernel/tracing/trace").decode())

    def mark(self) -> tuple[int, int, int]:
        """Write ``vblk NUMBER`` to the guest's trace: (NUMBER, host ns before, host ns after)."""
        try:
            return self._channel.mark(10.0)
        except TimeoutError:
            raise GuestTimeout("the guest did not answer within 10 s", "close() it", self.console_end) from None
        except (EOFError, OSError, ValueError):
            raise self._died() from None


def _end(process: Printing, channel: Channel, folder: Path) -> None:
    process.end()
    channel.close()
    shutil.rmtree(folder, ignore_errors=True)


def _failed(command: str, status: int, output: str) -> GuestCommandFailed:
    last = output.strip().splitlines()[-1:] or ["it printed nothing"]
    error = GuestCommandFailed(f"guest command {_short(command)!r} ended with status {status}", last[0], output)
    error.status = status
    return error


def _short(command: str) -> str:
    line = " ".join(command.split())
    return line if len(line) <= 80 else line[:77] + "..."


def _path(path: str) -> str:
    if not path.startswith("/") or "\0" in path:
        raise ConfigError(f"guest path {path!r}", "give an absolute path")
    return shlex.quote(path)
