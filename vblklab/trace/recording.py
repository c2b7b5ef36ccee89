"""Both sides of one run of a real guest, as they were recorded: small enough for a file, whole enough to be read again."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from .ftrace import FtraceText, read_ftrace
from .guest import Joined, device_side, guest_side, join, qemu_side
from .qemu_log import read_qemu_log

__all__ = ["GuestRecording"]

_QEMU_SLACK_NS = 1000
"""QEMU's log has whole µs, cut off."""


@dataclass(frozen=True)
class GuestRecording:
    """``ftrace`` is the guest's text, ``dev`` its disk (``254,0``), ``pairs`` the clock marks (host ns before, guest ns, host ns after).

    Of the device either ``device``, the log of one of ours (host ns, context, trace point), or ``qemu_log`` with what CLOCK_REALTIME
    was ahead of the host's clock.
    """

    ftrace: str
    dev: str
    pairs: tuple[tuple[int, int, int], ...]
    device: tuple[tuple[int, int, tuple[Any, ...]], ...] = ()
    qemu_log: str = ""
    realtime_minus_host_ns: int = 0

    def read(self) -> tuple[FtraceText, Joined]:
        """The guest's records, and both sides joined; TraceError for what cannot be."""
        text = read_ftrace(self.ftrace)
        guest = guest_side(text.records, self.dev)
        if self.qemu_log:
            served, points = qemu_side(read_qemu_log(self.qemu_log), self.realtime_minus_host_ns)
            slack = _QEMU_SLACK_NS
        else:
            served, points = device_side(self.device)
            slack = 0
        return text, join(guest, served, points, pairs=self.pairs, host_slack_ns=slack)

    def only_the_disk(self) -> GuestRecording:
        """Without the entries that this reading passes over: those of other queues and other disks."""
        queues = set(re.findall(r"virtblk_done: .*\bvq=(\w+)", self.ftrace))
        lines = self.ftrace.splitlines(keepends=True)
        kept = [line for line in lines if (found := re.search(r"\bvq=(\w+)", line)) is None or found[1] in queues]
        return replace(self, ftrace="".join(kept))

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def of_json(cls, kept: dict[str, Any]) -> GuestRecording:
        """What ``as_json`` gave; KeyError, TypeError or ValueError for anything else."""
        device = tuple((int(t), int(number), tuple(ev)) for t, number, ev in kept["device"])
        pairs = tuple((int(a), int(b), int(c)) for a, b, c in kept["pairs"])
        return cls(str(kept["ftrace"]), str(kept["dev"]), pairs, device, str(kept["qemu_log"]), int(kept["realtime_minus_host_ns"]))
