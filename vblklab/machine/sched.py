"""The simulator's scheduler: contexts on CPUs, one heap of times, interrupts at trace points only.

A trace point is hit at a time, then its cost passes on the context's CPU, then the context goes on; the code between two
yields happens in an instant.  While nothing else is due earlier the context goes on without touching the heap.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from heapq import heappop, heappush
from itertools import repeat
from typing import Any

from ..errors import ConfigError
from ..events import EVENTS, GROUPS, WAIT, Spend, Wait
from .costs import CostTable

__all__ = ["Context", "Cpu", "Scheduler"]


class Cpu:
    """Something that runs one context at a time: a vCPU, an iothread, the host's interrupt CPU, a drive."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.current: Context | None = None
        self.ready: deque[Context] = deque()
        self.pending: Context | None = None  # an interrupt that waits for the next trace point
        self.preempted: Context | None = None
        self.masked = False  # outside guest mode: no interrupt is taken, no other task runs


class Context:
    """One generator, pinned to a CPU.  ``notify`` sets its one level-like notifier."""

    __slots__ = (
        "_scheduler", "cpu", "done", "generator", "interrupt_ns", "name", "notified", "notify",
        "send", "serial", "started", "task", "waiting", "wake_ns",
    )  # fmt: skip

    def __init__(
        self, scheduler: Scheduler, name: str, cpu: Cpu, generator: Generator[Any, int, Any], *, wake_ns: int, interrupt_ns: int | None
    ) -> None:
        self.name = name
        self.cpu = cpu
        self.generator = generator
        self.send = generator.send
        self.wake_ns = wake_ns
        self.interrupt_ns = interrupt_ns  # not None: an interrupt context, and what it costs to reach a running CPU
        self.waiting = True
        self.notified = False
        self.serial = 0
        self.started = False
        self.done = False
        self.task = False
        self._scheduler = scheduler
        self.notify = partial(scheduler.notify, self)
        """Wake the context; if it is not idle it will not idle the next time it tries to."""


class _Timer:
    __slots__ = ("context", "serial")

    def __init__(self, context: Context) -> None:
        self.context = context
        self.serial = context.serial


_FOREVER = 1 << 62


def _look() -> None:
    """On the heap as something due now: makes the running context stop, so that an interrupt can be taken."""


class Scheduler:
    """Runs contexts in simulated time.  ``now`` is in ns.

    ``observe(now, context, ev)`` sees every yield while it is set; it must not change anything that a context can see.
    """

    def __init__(self, costs: CostTable, *, interleave: random.Random | None) -> None:
        self.now = 0
        self.current: Context | None = None
        self.contexts: list[Context] = []
        self.tasks_left = 0
        self.observe: Callable[[int, Context, Any], None] | None = None
        self._heap: list[tuple[int, int, Any]] = [(_FOREVER, 0, _look)]
        self._order = 0
        self._interleave = interleave
        self._costs = costs
        self.table: dict[str, int] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take in trace points that were declared meanwhile."""
        table = self.table
        for key in EVENTS:
            table[key] = round(self._costs.of_event(key).ns)
        for group, members in GROUPS.items():
            table[group] = sum(table[key] for key, _ in members)

    @property
    def next_ns(self) -> int:
        """When the next thing happens; a long time from now if nothing will."""
        return self._heap[0][0]

    def at(self, when: int, call: Callable[[int], None]) -> None:
        """Call ``call(when)`` at a time: the hardware's own clockwork, outside all contexts."""
        self._order += 1
        heappush(self._heap, (when, self._order, call))

    def add(
        self,
        name: str,
        cpu: Cpu,
        generator: Generator[Any, int, Any],
        *,
        wake_ns: float = 0,
        interrupt_ns: float | None = None,
        task: bool = False,
    ) -> Context:
        """A new context; it runs its first lines when it is first notified.  ``task`` contexts are those whose end ends the run."""
        context = Context(
            self, name, cpu, generator, wake_ns=round(wake_ns), interrupt_ns=None if interrupt_ns is None else round(interrupt_ns)
        )
        self.contexts.append(context)
        if task:
            self.tasks_left += 1
            context.task = True
        return context

    # -- notifications ---------------------------------------------------------------------------------------------------

    def _push(self, when: int, what: Any) -> None:
        self._order += 1
        heappush(self._heap, (when, self._order, what))

    def notify(self, context: Context) -> None:
        """The one way to wake a context."""
        if not context.waiting:
            context.notified = True
            return
        context.waiting = False
        context.serial += 1
        cpu = context.cpu
        if cpu.current is None:
            cpu.current = context
            self._order = order = self._order + 1
            heappush(self._heap, (self.now + context.wake_ns, order, context))
        elif cpu.current is context:  # it kept its CPU while it waited outside guest mode
            self._push(self.now + context.wake_ns, context)
        elif context.interrupt_ns is not None:
            cpu.pending = context
            self._push(self.now, _look)
        else:
            cpu.ready.append(context)

    def leave_guest(self) -> None:
        """The running context's vCPU exits: no interrupt until it enters again."""
        self.current.cpu.masked = True  # type: ignore[union-attr]

    def enter_guest(self) -> None:
        """Guest mode again; an interrupt that waited is taken at the next trace point."""
        cpu = self.current.cpu  # type: ignore[union-attr]
        cpu.masked = False
        if cpu.pending is not None:
            self._push(self.now, _look)

    def _next(self, cpu: Cpu) -> None:
        """The CPU is free: go on with what was preempted, take a pending interrupt, or the next task."""
        context: Context | None = None
        delay = 0
        if cpu.pending is not None:
            context, cpu.pending = cpu.pending, None
            delay = context.interrupt_ns or 0
        elif cpu.preempted is not None:
            context, cpu.preempted = cpu.preempted, None
        elif cpu.ready:
            context = cpu.ready.popleft()
            delay = context.wake_ns
        cpu.current = context
        if context is not None:
            self._push(self.now + delay, context)

    # -- running ---------------------------------------------------------------------------------------------------------

    def run(self, points: int) -> bool:
        """Go over at most ``points`` yields; True if anything is left to run."""
        heap = self._heap
        table = self.table
        observe = self.observe
        jitter = self._jitter if self._interleave is not None else None
        budget = repeat(None, points)
        while True:
            now, order, context = heappop(heap)
            if context.__class__ is not Context:
                if not self._not_a_context(now, context):
                    return False
                continue
            cpu = context.cpu
            if cpu.pending is not None and not cpu.masked and context.interrupt_ns is None:
                interrupt, cpu.pending = cpu.pending, None
                cpu.preempted = context
                cpu.current = interrupt
                self._push(now + (interrupt.interrupt_ns or 0), interrupt)
                continue
            self.current = context
            self.now = now
            send = context.send if observe is None else self._observed(context, observe)
            argument: Any = now if context.started else None
            context.started = True
            try:
                for _ in budget:
                    ev = send(argument)
                    if ev.__class__ is tuple:
                        cost = table[ev[0]]
                        if jitter is not None:
                            cost = jitter(cost)
                        self.now = now = argument = now + cost
                        if heap[0][0] <= now:
                            self._order = order = self._order + 1
                            heappush(heap, (now, order, context))
                            break
                    elif ev is WAIT:
                        if context.notified:
                            context.notified = False
                            continue
                        context.waiting = True
                        if not cpu.masked:
                            if cpu.pending is None and cpu.preempted is None and not cpu.ready:
                                cpu.current = None
                            else:
                                self._next(cpu)
                        break
                    elif self._other(ev, context, cpu):
                        break
                    else:
                        now = argument = self.now
                else:
                    context.started = argument is not None  # the budget may have ended before its first step
                    heappush(heap, (now, order, context))  # in its old place: where the budget ends must change nothing
                    return True
            except KeyError as error:
                self._unknown(error, context)
                raise
            except StopIteration:
                context.done = True
                context.waiting = False
                cpu.masked = False
                self._next(cpu)
                if context.task:
                    self.tasks_left -= 1
                    if not self.tasks_left:
                        return True

    def _not_a_context(self, now: int, what: Any) -> bool:
        """A timer, a call of the hardware, or the end of everything (False)."""
        if what.__class__ is _Timer:
            self.now = now
            if what.context.waiting and what.serial == what.context.serial:
                self.notify(what.context)
        elif what is not _look:
            self.now = now
            what(now)
        elif now == _FOREVER:
            self._heap.append((_FOREVER, 0, _look))
            return False
        return True

    def _other(self, ev: Any, context: Context, cpu: Cpu) -> bool:
        """A wait with a deadline, or work whose cost is given; True if the context stops here."""
        if ev.__class__ is Spend:
            self.now += ev.ns
            if self._heap[0][0] > self.now:
                return False
            self._push(self.now, context)
            return True
        if ev.__class__ is not Wait or ev.until_ns is None:
            raise ConfigError(f"{context.name} yielded {ev!r}", "yield a trace point (a tuple), WAIT or Wait(until_ns)")
        if context.notified:
            context.notified = False
            return False
        if ev.until_ns <= self.now:  # gives way to others on its CPU
            if cpu.masked or not cpu.ready:
                return False
            cpu.ready.append(context)
            context.waiting = False
            self._next(cpu)
            return True
        context.waiting = True
        self._push(ev.until_ns, _Timer(context))
        if not cpu.masked:
            self._next(cpu)
        return True

    def _observed(self, context: Context, observe: Callable[[int, Context, Any], None]) -> Callable[[Any], Any]:
        """``context.send`` with a look at what it yields."""
        send = context.send

        def observed(argument: Any) -> Any:
            ev = send(argument)
            observe(self.now, context, ev)
            return ev

        return observed

    def _unknown(self, error: KeyError, context: Context) -> None:
        key = error.args[0] if error.args else None
        inside = error.__traceback__ is not None and error.__traceback__.tb_next is not None  # the context's own code raised it
        if not inside and key not in self.table:
            raise ConfigError(
                f"{context.name} yielded the trace point {key!r}, which is not declared",
                'declare it: vb.event("name", step="D5", cost_ns=300)',
            ) from None

    def _jitter(self, cost: int) -> int:
        """Random interleaving: from no time at all to a stall that lets everyone else run."""
        rng = self._interleave
        assert rng is not None
        draw = rng.random()
        return int(cost * 2 * draw) if draw < 0.9 else cost + rng.randrange(40_000)
