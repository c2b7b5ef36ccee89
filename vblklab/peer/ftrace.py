"""Recording what the guest's kernel does: trace events and kprobes of its own ftrace, and pairs of clock readings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple, Protocol

from ..errors import ConfigError, GuestError

__all__ = ["EVENTS", "KPROBES", "PATH_EVENTS", "PATH_KPROBES", "ClockPair", "Ftrace", "clock_pairs"]

TRACING = "/sys/kernel/tracing"
EVENTS = ("block:*",)
KPROBES = {  # function: its arguments worth recording, by register of the x86-64 calling convention
    "virtio_queue_rq": "rq=+0(%si):x64 last=+8(%si):u8 hctx=%di:x64",
    "virtio_queue_rqs": "first=+0(%di):x64",
    "virtqueue_add_sgs": "vq=%di:x64 data=%r8:x64",
    "virtqueue_kick_prepare": "vq=%di:x64",
    "vp_notify": "vq=%di:x64",
    "vring_interrupt": "irq=%di:s32 vq=%si:x64",
    "virtblk_done": "vq=%di:x64",
    "virtblk_request_done": "rq=%di:x64",
}
"""The functions that a recording has when nothing else is asked for; others can be named too, and are recorded without arguments."""

PATH_EVENTS = (
    *(f"block:block_{name}" for name in ("bio_queue", "getrq", "bio_backmerge", "bio_frontmerge", "rq_issue", "rq_complete")),
    "sched:sched_switch",
    *(f"syscalls:sys_{name}" for name in ("enter_io_submit", "exit_io_submit", "exit_io_getevents", "exit_io_pgetevents")),
)
PATH_KPROBES = (
    *("virtio_queue_rq", "virtio_queue_rqs", "virtqueue_add_sgs", "virtqueue_kick_prepare", "vp_notify", "vring_interrupt", "virtblk_done"),
)
"""What the steps of an I/O are told apart by."""

_CLOCKS = ("local", "global", "counter", "uptime", "perf", "mono", "mono_raw", "boot", "tai", "x86-tsc")
_MARK = re.compile(r"\s(\d+(?:\.\d+)?): tracing_mark_write: vblk (\d+)\s")


class ClockPair(NamedTuple):
    """``guest``, a reading of the trace clock (ns; ticks with x86-tsc), lies between two host times in perf_counter ns."""

    before_ns: int
    guest: int
    after_ns: int


class _Guest(Protocol):
    def run(self, command: str, *, input: bytes = ..., timeout_s: float | None = ..., check: bool = ...) -> object: ...
    def get(self, path: str) -> bytes: ...
    def mark(self) -> tuple[int, int, int]: ...


class Ftrace:
    """One recording; see ``GuestVm.ftrace``.

    After the ``with`` block ``text`` is ftrace's own text format, ``clock`` the clock of its times, ``pairs`` the clock pairs taken at its
    begin and end, ``missing`` the events and functions that this kernel does not have, ``lost`` how many entries fell out of the buffer.
    """

    def __init__(self, guest: _Guest, events: tuple[str, ...], kprobes: tuple[str, ...], clock: str, buffer_kb: int, pairs: int) -> None:
        for name in events:
            if not re.fullmatch(r"[a-z0-9_]+(:([A-Za-z0-9_]+|\*))", name):
                raise ConfigError(f"ftrace event {name!r}", "write system:event or system:*, such as block:block_rq_issue")
        for name in kprobes:
            if not re.fullmatch(r"[A-Za-z_][\w.]*", name):
                raise ConfigError(f"kprobe {name!r}", "give the name of a kernel function")
        if clock not in _CLOCKS or buffer_kb < 1:
            raise ConfigError(f"ftrace clock={clock!r}, buffer_kb={buffer_kb}", f"the clock is one of {', '.join(_CLOCKS)}")
        self._guest = guest
        self._events = events
        self._kprobes = kprobes
        self._buffer_kb = buffer_kb
        self._number_pairs = pairs
        self._marks: list[tuple[int, int, int]] = []
        self.clock = clock
        self.text = ""
        self.missing: tuple[str, ...] = ()
        self.lost = 0
        self.pairs: list[ClockPair] = []

    def __enter__(self) -> Ftrace:
        try:
            said = self._guest.run(self._begin())
            self.missing = tuple(re.findall(r"^missing (\S+)$", getattr(said, "output", ""), re.MULTILINE))
            self._marks = self.take(self._number_pairs)
        except BaseException:
            with suppress(GuestError):
                self._guest.run(_END)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is not None:
            with suppress(GuestError):  # the first error says more
                self._collect()
            return
        self._collect()

    def take(self, number: int) -> list[tuple[int, int, int]]:
        """So many marks in the recording: (number, host ns before, host ns after)."""
        return [self._guest.mark() for _ in range(number)]

    def _collect(self) -> None:
        try:
            self._marks += self.take(self._number_pairs)
            self._guest.run(f"echo 0 > {TRACING}/tracing_on; cat {TRACING}/trace > /tmp/vblk.trace", timeout_s=300.0)
            self.text = self._guest.get("/tmp/vblk.trace").decode("utf-8", "replace")
        finally:
            self._guest.run(_END)
        kept = re.search(r"entries-in-buffer/entries-written: (\d+)/(\d+)", self.text)
        self.lost = int(kept[2]) - int(kept[1]) if kept else 0
        self.pairs = clock_pairs(self._marks, self.text)

    def _begin(self) -> str:
        names = "\\|".join(name.replace(".", "\\.") for name in self._kprobes) or "-"
        lines = [_PREPARE.format(tracing=TRACING, clock=shlex.quote(self.clock), kb=self._buffer_kb, names=names)]
        lines += [f"probe {name} {shlex.quote(KPROBES.get(name, ''))}" for name in self._kprobes]
        lines += [f"event {shlex.quote(name.removesuffix('*').replace(':', '/').rstrip('/'))} {shlex.quote(name)}" for name in self._events]
        return "\n".join([*lines, "echo 1 > tracing_on"])


_PREPARE = """\
cd {tracing} || exit
echo 0 > tracing_on
echo {clock} > trace_clock || exit
echo {kb} > buffer_size_kb || exit
echo > trace
known=$(sed -n 's/^[^ ]* [^ ]* \\({names}\\)\\($\\|[[:space:]].*\\)/-\\1-/p' /proc/kallsyms)
probe() {{
    if [ -z "${{known##*-$1-*}}" ] && echo "p:vblk/$1 $1 $2" >> kprobe_events 2>/dev/null
    then echo 1 > events/vblk/$1/enable
    else echo "missing $1"
    fi
}}
event() {{
    if [ -e "events/$1/enable" ]; then echo 1 > "events/$1/enable"; else echo "missing $2"; fi
}}
"""
_END = f"""\
cd {TRACING} || exit
echo 0 > tracing_on
echo > set_event
echo > kprobe_events
echo > trace
echo 1 > buffer_size_kb
rm -f /tmp/vblk.trace
"""


def clock_pairs(marks: Sequence[tuple[int, int, int]], text: str) -> list[ClockPair]:
    """The pairs of ``marks`` (number, host ns before, host ns after) that are in a recording's text."""
    readings = {int(number): _ns(stamp) for stamp, number in _MARK.findall(text)}
    return [ClockPair(before, readings[number], after) for number, before, after in marks if number in readings]


def _ns(stamp: str) -> int:
    """A time of the text as an integer: seconds with a fraction become ns, a counter stays what it is."""
    whole, point, fraction = stamp.partition(".")
    return int(whole) * 10**9 + int(fraction.ljust(9, "0")) if point else int(whole)
