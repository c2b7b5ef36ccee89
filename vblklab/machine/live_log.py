"""What becomes of the log of a live run: step times, whose time they are, and the trace that figures show."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..events import EVENTS, GROUPS, STEPS, expand
from ..trace.correlate import Correlator
from ..trace.run import TraceEvent
from .loop import LogEntry, kept_window

__all__ = ["LiveLog", "probe_cost_ns"]

_TRACE_KEPT, _KERNEL_TRACE_KEPT = 4_000, 20_000
_LANES = {"kvm": "KVM", "host-stack": "host", "host-driver": "host", "disk": "disk"}


@dataclass(frozen=True)
class LiveLog:
    """The points of both halves, and of the kernel if it was traced, in the order of time; ``names`` are those of the contexts.

    ``threads``: driver and device were threads of one interpreter, so that a wake-up is the global lock's hand-over.
    ``whole_ns``: until then both halves kept every point, afterwards those of some windows; None: every point to the end.
    """

    entries: Sequence[LogEntry]
    names: Mapping[int, str]
    threads: bool = False
    kernel: bool = False
    whole_ns: int | None = None

    def correlate(self) -> Correlator:
        """The steps of each I/O that is whole in the log, however long it took; those that a gap cuts are counted (``cut``)."""
        correlator = Correlator(kernel=self.kernel)
        starts = self._starts()
        whole_ns = self.whole_ns
        open_window = None if whole_ns is None else kept_window(whole_ns)
        for now, _, ev in self.entries:
            if whole_ns is not None and now > whole_ns:
                window = kept_window(now)
                if window != open_window:
                    correlator.forget()
                    open_window = window
                if window is None or now < starts.get(window, now + 1):
                    continue  # one half's only
            for one in expand(ev) if ev[0] in GROUPS else (ev,):
                correlator.feed(now, one)
        if whole_ns is not None:
            correlator.forget()
        correlator.fold()
        return correlator

    def _starts(self) -> dict[int, int]:
        """From when on each window has the points of both halves: what a half had begun before the window is not in it."""
        whole_ns = self.whole_ns
        if whole_ns is None:
            return {}
        firsts: tuple[dict[int, int], dict[int, int]] = {}, {}
        for now, number, _ in self.entries:
            if now > whole_ns and number >= 0 and (window := kept_window(now)) is not None:
                firsts[number >= 1000].setdefault(window, now)
        starts = {window: max(first, firsts[1][window]) for window, first in firsts[0].items() if window in firsts[1]}
        if (window := kept_window(whole_ns)) is not None:
            starts[window] = whole_ns  # its points before were kept too
        return starts

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
