"""Reading ftrace's text: ``/sys/kernel/tracing/trace``, or what ``trace-cmd report`` prints."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import TraceError
from .event_text import event_of

__all__ = ["FtraceText", "Record", "read_ftrace"]


class Record(NamedTuple):
    """One entry: ``t_ns`` on the trace's own clock (ticks with x86-tsc), and the arguments that its text names.

    A block event has dev, rwbs, sector, nr_sector; a kprobe what it was asked to fetch; a system call its arguments or ``ret``.
    """

    t_ns: int
    cpu: int
    task: str
    pid: int
    name: str
    args: dict[str, int | str]


class FtraceText(NamedTuple):
    """The records in the order of the text, and how many entries the kernel says it lost."""

    records: list[Record]
    lost: int


_LINE = re.compile(
    r"\s*(?P<task>.+)-(?P<pid>\d+)\s+(?:\(\s*[-\d]+\)\s+)?\[(?P<cpu>\d+)\]\s+(?:[\w.#*]{4,6}\s+)?(?P<time>\d+(?:\.\d+)?):\s+(?P<rest>\S.*)"
)
_NOTHING = re.compile(r"\s*(#.*|cpus=\d+|version = \d+|CPU \d+ is empty)?")
_LOST = re.compile(r"CPU:\d+ \[(?:LOST (\d+) EVENTS|EVENTS DROPPED)\]|\[(\d+) EVENTS DROPPED\]")
_WRITTEN = re.compile(r"entries-in-buffer/entries-written: (\d+)/(\d+)")


def read_ftrace(text: str) -> FtraceText:
    """The records of a recording; TraceError names the first line that is none."""
    records = []
    lost = overwritten = 0
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        found = _LINE.match(line)
        if found is None:
            if dropped := _LOST.search(line):
                lost += int(dropped[1] or dropped[2] or 1)
            elif written := _WRITTEN.search(line):
                overwritten = int(written[2]) - int(written[1])
            elif not _NOTHING.fullmatch(line):
                raise _wrong(number, line)
            continue
        if number == len(lines):
            raise TraceError(f"line {number} of the trace ends in the middle: {line[:80]!r}", "give the whole text, to its last line end")
        try:
            name, args = event_of(found["rest"])
        except (ValueError, TypeError):
            raise _wrong(number, line) from None
        records.append(Record(ticks(found["time"]), int(found["cpu"]), found["task"].strip(), int(found["pid"]), name, args))
    if not records:
        raise TraceError("this trace has no entry", "give the text of /sys/kernel/tracing/trace or of trace-cmd report")
    return FtraceText(records, max(lost, overwritten))


def _wrong(number: int, line: str) -> TraceError:
    return TraceError(
        f"line {number} of the trace is no ftrace entry: {line[:80]!r}", "give the text of /sys/kernel/tracing/trace or of trace-cmd report"
    )


def ticks(time: str) -> int:
    """A time of the text as an integer: seconds with a fraction become ns, a counter stays what it is."""
    whole, point, fraction = time.partition(".")
    return int(whole) * 10**9 + int(fraction[:9].ljust(9, "0")) if point else int(whole)
