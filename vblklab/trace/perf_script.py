"""Reading what ``perf script`` prints of trace events: command, thread, CPU, time, event and its words."""

from __future__ import annotations

import re

from ..errors import TraceError
from .event_text import event_of
from .ftrace import Record, ticks

__all__ = ["PERF_LINE", "read_perf_script"]

PERF_LINE = re.compile(
    r"\s*(?P<task>.+?)\s+(?P<pid>-?\d+)(?:/(?P<tid>-?\d+))?\s+\[(?P<cpu>\d+)\]\s+(?P<time>\d+\.\d+):\s+(?:\d+\s+)?(?P<rest>\w+:\w+:.*)"
)
_NOTHING = re.compile(r"\s*(#.*)?")
_STACK = re.compile(r"\s+[0-9a-f]{8,} .*\(.*\)$")


def read_perf_script(text: str) -> list[Record]:
    """The records; TraceError names the first line that is none."""
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        found = PERF_LINE.match(line)
        if found is None:
            if _NOTHING.fullmatch(line) or _STACK.match(line):
                continue
            raise _wrong(number, line)
        try:
            name, args = event_of(found["rest"].rstrip())
        except (ValueError, KeyError):
            raise _wrong(number, line) from None
        pid = int(found["tid"] or found["pid"])
        records.append(Record(ticks(found["time"]), int(found["cpu"]), found["task"].strip(), pid, name, args))
    if not records:
        raise TraceError("this trace has no entry", "give the text that perf script prints of trace events")
    return records


def _wrong(number: int, line: str) -> TraceError:
    return TraceError(f"line {number} is no entry of perf script: {line[:80]!r}", "give the text that perf script prints of trace events")
