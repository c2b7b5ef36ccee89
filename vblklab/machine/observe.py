"""What a machine writes down while it runs: the first trace points, and rows of stamps for a share of the I/Os."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Any, NamedTuple

from ..events import EVENTS, GROUPS, Wait
from ..trace.correlate import Correlator
from ..trace.run import TraceEvent
from .sched import Context, Cpu, Scheduler

__all__ = ["MainLoop", "Observer", "Seen", "trace_event"]

_ALL = 500  # I/Os whose every step is followed; after them one window in 32 is
_WINDOWS = 32


class MainLoop(Cpu):
    """QEMU's main loop beside an iothread.  Its calls of KVM are all that is seen of it, so its own lane has them."""


class Seen(NamedTuple):
    """One trace point as it was hit."""

    now_ns: int
    order: int
    context: Context
    ev: tuple[Any, ...]


_Planned = tuple[int, str, "tuple[int, ...] | None", Any]


class Observer:
    """Expands groups, feeds the correlator, records.  Observing changes nothing that a context can see."""

    def __init__(self, scheduler: Scheduler, correlator: Correlator, trace: int | bool) -> None:
        self._scheduler = scheduler
        self._correlator = correlator
        self._trace_left = (1 << 62) if trace is True else int(trace)
        self.recorded: list[Seen] = []
        self._order = 0
        self._stepping = False
        self._queue: list[Seen] = []
        self._window = 0
        self._correlating = True
        self._plans: dict[str, tuple[list[_Planned], list[_Planned]]] = {}

    def before(self, completed: int) -> None:
        """A chunk of the run begins: decide whether it is observed."""
        correlate = self._stepping or completed < _ALL
        if not correlate:
            self._window += 1
            correlate = self._window % _WINDOWS == 0
            if correlate:
                self._correlator.forget()  # the window before this one was not seen: nothing may be matched across it
                self._plans.clear()
        self._correlating = correlate
        self._scheduler.observe = self._observe if correlate or self._trace_left > 0 else None

    def stepping(self) -> None:
        """From now on every point is kept in order for ``next_seen``."""
        self._stepping = True
        self._correlating = True
        self._scheduler.observe = self._observe

    def next_seen(self) -> Seen | None:
        """The next point in the order of time, once nothing earlier can come any more."""
        queue = self._queue
        if queue and (queue[0].now_ns <= self._scheduler.next_ns or not self._scheduler.tasks_left):
            return heappop(queue)
        return None

    def _observe(self, now: int, context: Context, ev: Any) -> None:
        if type(ev) is not tuple:
            if isinstance(ev, Wait) and self._trace_left > 0:
                self._keep(now, context, ("wait",))
            return
        plan = self._plans.get(ev[0])
        if plan is None:
            plan = self._plan(ev[0])
        if self._correlating:
            for after_ns, key, places, handler in plan[0]:
                one = ev if places is None else (key, *[ev[at] for at in places])
                try:
                    handler(now + after_ns, one)
                except KeyError:
                    self._correlator.unmatched += 1
                except IndexError:
                    self._correlator.feed(now + after_ns, one)  # says what the point lacks
        if self._trace_left > 0 or self._stepping:
            for after_ns, key, places, _ in plan[1]:
                self._keep(now + after_ns, context, ev if places is None else (key, *[ev[at] for at in places]))

    def _plan(self, key: str) -> tuple[list[_Planned], list[_Planned]]:
        """What a yielded key stands for: its points, each with the time after the first, its arguments and who wants it.

        First those that the correlator wants, then all.
        """
        handlers, table = self._correlator.handlers, self._scheduler.table
        points: list[_Planned] = []
        after_ns = 0
        for member, places in GROUPS.get(key, ((key, None),)):
            points.append((after_ns, member, places, handlers.get(member)))
            after_ns += table.get(member, 0)
        plan = self._plans[key] = ([point for point in points if point[3] is not None], points)
        return plan

    def _keep(self, now: int, context: Context, ev: tuple[Any, ...]) -> None:
        self._order += 1
        seen = Seen(now, self._order, context, ev)
        if self._stepping and ev[0] != "wait":
            heappush(self._queue, seen)
        if self._trace_left > 0:
            self._trace_left -= 1
            self.recorded.append(seen)

    def trace(self) -> list[TraceEvent]:
        """What was recorded, in the order of time; the drive goes idle when its last command ends."""
        events = []
        commands = 0
        for seen in sorted(self.recorded):
            event = trace_event(seen)
            events.append(event)
            commands += (event.key == "nvme_fetch") - (event.key == "nvme_cqe")
            if event.key == "nvme_cqe" and commands <= 0:
                events.append(TraceEvent(event.t_ns, event.context, event.lane, "wait", ()))
        return events


_LANES = {"kvm": "KVM", "host-stack": "host", "host-driver": "host", "disk": "disk"}


def trace_event(seen: Seen) -> TraceEvent:
    """A recorded point with the lane that it is drawn in."""
    key = seen.ev[0]
    event = EVENTS.get(key)
    cpu = seen.context.cpu
    if event is not None and event.room == "disk":
        return TraceEvent(seen.now_ns, "drive", "disk", key, seen.ev[1:])
    lane = cpu.name if event is None or isinstance(cpu, MainLoop) else _LANES.get(event.room, cpu.name)
    return TraceEvent(seen.now_ns, seen.context.name, lane, key, seen.ev[1:])
