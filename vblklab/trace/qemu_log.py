"""Reading QEMU's trace log: the ``log`` backend, as ``-trace … -D FILE`` writes it."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import TraceError

__all__ = ["QemuRecord", "read_qemu_log"]


class QemuRecord(NamedTuple):
    """One event: ``t_ns`` of CLOCK_REALTIME (whole µs), the thread, the event's name and its arguments."""

    t_ns: int
    thread: int
    name: str
    args: dict[str, int]


_LINE = re.compile(r"(\d+)@(\d+)\.(\d{6}):(\w+) ?(.*)")
_ARGUMENT = re.compile(r"(\w+)[ =:]+(0x[0-9a-f]+|-?\d+)")


def read_qemu_log(text: str) -> list[QemuRecord]:
    """The events of a log; other lines, QEMU's messages, are passed over.  TraceError for an event that is cut, or for no event at all."""
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        found = _LINE.fullmatch(line)
        if found is not None:
            pid, seconds, micros, name, said = found.groups()
            args = {key: int(value, 0) for key, value in _ARGUMENT.findall(said)}
            records.append(QemuRecord(int(seconds) * 10**9 + int(micros) * 1000, int(pid), name, args))
        elif re.match(r"\d+@", line):
            raise TraceError(f"line {number} of QEMU's trace log is cut: {line[:80]!r}", "give the whole log")
    if not records:
        raise TraceError("this text has no event of QEMU's log backend", "boot with LinuxGuest(trace=('virtio_blk_*', 'virtio_notify*'))")
    return records
