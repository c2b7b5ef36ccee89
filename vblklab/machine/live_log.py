"""What becomes of the log of a live run: step times, whose time they are, and the trace that figures show."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..events import EVENTS, GROUPS, STEPS, expand
from ..trace.correlate import Correlator
from ..trace.run import TraceEvent
from .loop import LogEntry

__all__ = ["LiveLog", "probe_cost_ns"]

_TRACE_KEPT, _KERNEL_TRACE_KEPT = 4_000, 20_000
_LANES = {"kvm": "KVM", "host-stack": "host", "host-driver": "host", "disk": "disk"}


@dataclass(frozen=True)
class LiveLog:
    """The points of both halves, and of the kernel if it was traced, in the order of time; ``names`` are those of the contexts.

    ``threads``: driver and device were threads of one interpreter, so that a wake-up is the global lock's hand-over.
    """

    entries: Sequence[LogEntry]
    names: Mapping[int, str]
    threads: bool = False
    kernel: bool = False

    def correlate(self) -> Correlator:
        """The steps of each I/O that is whole in the log."""
        correlator = Correlator(kernel=self.kernel)
        window = 0
        for now, _, ev in self.entries:
            if (now >> 26) - window > 1:
                correlator.forget()  # points between two windows were not kept
            window = now >> 26
            for one in expand(ev) if ev[0] in GROUPS else (ev,):
                correlator.feed(now, one)
        correlator.fold()
        return correlator

    def split(self, correlator: Correlator) -> dict[str, tuple[float, float]]:
        """Per step, mean ns of kernel and hardware and of Python.  Between two threads a wake-up is the global lock's: Python."""
        count = correlator.matched
        split = {}
        for number, step in enumerate(STEPS if count else ()):
            mean = correlator.durations[number].mean_ns
            hard = correlator.hard_ns[number] / count
            if self.threads and step.name in ("D4", "U5"):
                hard = 0.0
            hard = min(hard, mean)
            split[step.name] = (hard, mean - hard)
        return split

    def trace(self) -> list[TraceEvent]:
        """The first points, one by one."""
        events = []
        for now, number, ev in self.entries[: _KERNEL_TRACE_KEPT if self.kernel else _TRACE_KEPT]:
            name = self.names.get(number, "KVM")
            for key, *args in expand(ev):
                lane = _LANES.get(EVENTS[key].room, "iothread" if number >= 1000 else "vCPU 0") if key in EVENTS else name
                events.append(TraceEvent(now, name, lane, key, tuple(args)))
        return events


def probe_cost_ns() -> float:
    """What logging one trace point costs here, measured now."""
    log: list[Any] = []
    start = time.perf_counter_ns()
    for _ in range(2000):
        log.append((time.perf_counter_ns(), 0, ("virtqueue_pop", 0)))
    return (time.perf_counter_ns() - start) / 2000
