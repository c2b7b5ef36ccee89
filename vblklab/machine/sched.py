"""The simulator's scheduler: contexts on CPUs, one heap of times, interrupts at trace points only.

A trace point is hit at a time, then its cost passes on the context's CPU, then the context goes on; the code between two
yields happens in an instant.  While nothing else is due earlier the context goes on without touching the heap.  Of two contexts that
are due at the same time the one that was added first runs first.

A fused context (``fused.py``) passes a trace point by itself if nothing is due before the point's end or nobody can notice; else it
yields the time of its end, or (end, key, …) for who observes.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator, Iterator
from functools import partial
from heapq import heappop, heappush, heappushpop
from itertools import chain, count, repeat
from typing import Any

from ..errors import ConfigError
from ..events import EVENTS, GROUPS, WAIT, Spend, Wait
from .costs import CostTable

__all__ = ["PAUSE", "Call", "Context", "Cpu", "Fused", "Scheduler"]


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
        "rank", "resume", "send", "serial", "started", "task", "waiting", "wake_ns", "watched",
    )  # fmt: skip

    def __init__(
        self, scheduler: Scheduler, name: str, cpu: Cpu, generator: Generator[Any, int, Any], *, wake_ns: int, interrupt_ns: int | None
    ) -> None:
        self.name = name
        self.cpu = cpu
        self.resume: Callable[[int], Any] = partial(scheduler._plain, self)
        self.generator = generator
        self.send = generator.send
        self.watched: Callable[[Any], Any] | None = None
        self.wake_ns = wake_ns
        self.interrupt_ns = interrupt_ns  # not None: an interrupt context, and what it costs to reach a running CPU
        self.waiting = True
        self.notified = False
        self.serial = 0
        self.rank = len(scheduler.contexts)  # of two that are due at the same time the lower goes first
        self.started = False
        self.done = False
        self.task = False
        self._scheduler = scheduler
        self.notify = partial(scheduler.notify, self)
        """Wake the context; if it is not idle it will not idle the next time it tries to."""

    def replace(self, generator: Generator[Any, int, Any]) -> None:
        """From its next turn on run a fused generator; the context must be idle or not have begun."""
        self.generator.close()
        self.generator = generator
        self.send = self.resume = generator.send
        self.watched = None
        next(generator)  # to its first yield, where it is given the time at which it begins
        self.started = True
        self.__class__ = Fused
        self._scheduler.fused = True


class Fused(Context):
    """A context with a generator of the fused path.  ``resume`` is its ``send``, or what preempts it first."""

    __slots__ = ()


class Call:
    """Something on the heap that is no context: ``resume(now)`` at its time."""

    __slots__ = ("resume",)

    def __init__(self, resume: Callable[[int], Any]) -> None:
        self.resume = resume


_FOREVER = 1 << 62
PAUSE = object()
"""Yielded by a fused context that has gone on long without a switch: the end of a chunk, for who waits between chunks."""
_DUE = (-(1 << 62), 0, None)  # earlier than everything: a fused context that finds it on the heap passes no trace point by itself
_GOES_ON = -1  # the rank of who was running


_LOOK = Call(lambda now: None)
"""On the heap as something due now: makes the running context stop, so that an interrupt can be taken."""
_STOP, _END = object(), object()  # what a turn among fused contexts returns when the budget has ended, and when all has


class Scheduler:
    """Runs contexts in simulated time.  ``now`` is in ns.

    ``observe(now, context, ev)`` sees every yield while it is set; it must not change anything that a context can see.
    """

    def __init__(self, costs: CostTable, *, interleave: random.Random | None) -> None:
        self.now = 0
        self.current: Context | None = None
        self.contexts: list[Context] = []
        self.tasks_left = 0
        self.fused = False
        self.observe: Callable[[int, Context, Any], None] | None = None
        self._heap: list[tuple[int, int, Any]] = [(_FOREVER, 0, Call(self._nothing_left))]
        self._order = count(1 << 20)  # for what is no context and comes after them
        self._interleave = interleave
        self._costs = costs
        self.table: dict[str, int] = {}
        self.called = False
        self.keep_together()
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
        """Call ``call(when)`` at a time; it may change anything."""
        self.called = True
        self.keep_together()
        self.clockwork(when, call)

    def clockwork(self, when: int, call: Callable[[int], None]) -> None:
        """The same for the hardware's own ends of work, which touch no more than its interrupt."""
        heappush(self._heap, (when, next(self._order), Call(partial(self._called, call))))

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
        self.keep_together()
        self.contexts.append(context)
        if task:
            self.tasks_left += 1
            context.task = True
        return context

    def run_ahead(self, quiet_ns: int) -> None:
        """Fused contexts may pass trace points before what is due earlier has happened, where that cannot make a difference.

        ``held`` is then False: nobody can see or change what a context does until it next looks at what is shared, so it goes that far.
        ``quiet_ns``: so long after what is due next no interrupt reaches a vCPU; the device's loop sets it to 0 from the first
        completion on until it has sent the interrupt.
        """
        self.together = False
        self.quiet_ns = self.quiet_most = quiet_ns

    def keep_together(self) -> None:
        """Whatever is new may meet the contexts anywhere: none goes ahead of what is due any more."""
        self.together = self.held = True
        self.quiet_ns = self.quiet_most = 0

    # -- notifications ---------------------------------------------------------------------------------------------------

    def _push(self, when: int, context: Context) -> None:
        heappush(self._heap, (when, context.rank, context))

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
            heappush(self._heap, (self.now + context.wake_ns, context.rank, context))
        elif cpu.current is context:  # it kept its CPU while it waited outside guest mode
            self._push(self.now + context.wake_ns, context)
        elif context.interrupt_ns is not None:
            cpu.pending = context
            self._look_soon(cpu)
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
            self._look_soon(cpu)

    def _look_soon(self, cpu: Cpu) -> None:
        """An interrupt waits: the running context stops at its next trace point."""
        heappush(self._heap, (self.now, next(self._order), _LOOK))
        running = cpu.current
        if type(running) is Fused and running.interrupt_ns is None:
            running.resume = partial(self._resume, running)

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
        watched = self.observe is not None or self._interleave is not None
        self.held = self.together or watched
        if self.fused and not watched:
            return self._run_fused(points)
        heap = self._heap
        budget = repeat(None, points)
        while True:
            now, _, context = heappop(heap)
            if not isinstance(context, Context):
                if context.resume(now) is _END:
                    return False
            elif not self._preempted(context, now) and self._turn(context, now, None, budget):
                return True

    def _run_fused(self, points: int) -> bool:
        """The same for fused contexts that nobody observes; all others get their turn from it too."""
        heap = self._heap
        budget = self._budget = repeat(None, points)
        now, rank, context = heappop(heap)
        for _ in budget:
            self.now = now
            resume = context.resume
            try:
                ev = resume(now)
            except StopIteration:
                if self._ended(context):
                    return True
            else:
                if type(ev) is int:  # it has looked: something is due before that time
                    now, rank, context = heappushpop(heap, (ev, context.rank, context))
                    continue
                if ev is WAIT:
                    if context.notified:
                        context.notified = False
                        now = self.now
                        continue
                    context.waiting = True
                    cpu = context.cpu
                    if not cpu.masked:
                        if cpu.pending is None and cpu.preempted is None and not cpu.ready:
                            cpu.current = None
                        else:
                            self._next(cpu)
                elif ev is not None:
                    if ev is PAUSE:
                        heappush(heap, (self.now, _GOES_ON, context))
                        return True
                    if ev is _STOP:
                        return True
                    if ev is _END:
                        return False
                    if self._turn(context, now, ev, budget):
                        return True
            now, rank, context = heappop(heap)
        heappush(heap, (now, rank, context))
        return True

    def _plain(self, context: Context, now: int) -> Any:
        """The turn of a context that is not fused, among fused ones."""
        ends = not self._preempted(context, now) and self._turn(context, now, None, chain((None,), self._budget))
        return _STOP if ends else None

    def _turn(self, context: Context, now: int, ev: Any, budget: Iterator[None]) -> bool:
        """Run a context until it stops, on from ``ev`` if it has yielded that already.

        True when the budget or the last task has ended.
        """
        heap = self._heap
        table = self.table
        cpu = context.cpu
        jitter = self._jitter if self._interleave is not None else None
        self.current = context
        send = context.send if self.observe is None and jitter is None else context.watched or self._watched(context)
        argument: Any = now if context.started else None
        if ev is None:
            self.now = now
            context.started = True
        try:
            for _ in budget if ev is None else chain((None,), budget):
                if ev is None:
                    ev = send(argument)
                if type(ev) is tuple:
                    cost = table[ev[0]]
                    if jitter is not None:
                        cost = jitter(cost)
                    self.now = now = argument = self.now + cost
                    if heap[0][0] <= now:
                        heappush(heap, (now, context.rank, context))
                        return False
                elif type(ev) is int and type(context) is Fused:
                    heappush(heap, (ev, context.rank, context))
                    return False
                elif ev is WAIT:
                    if not context.notified:
                        context.waiting = True
                        if not cpu.masked:
                            if cpu.pending is None and cpu.preempted is None and not cpu.ready:
                                cpu.current = None
                            else:
                                self._next(cpu)
                        return False
                    context.notified = False
                    now = argument = self.now
                elif self._other(ev, context, cpu):
                    return False
                else:
                    now = argument = self.now
                ev = None
        except KeyError as error:
            self._unknown(error, context)
            raise
        except StopIteration:
            return self._ended(context)
        context.started = argument is not None  # the budget may have ended before its first step
        heappush(heap, (now, _GOES_ON, context))  # where the budget ends must change nothing
        return True

    def _resume(self, context: Context, now: int) -> Any:
        """A fused context's turn after an interrupt came for its CPU."""
        context.resume = context.send
        return None if self._preempted(context, now) else context.send(now)

    def _preempted(self, context: Context, now: int) -> bool:
        """Whether a context that was about to go on has given way to an interrupt."""
        cpu = context.cpu
        interrupt = cpu.pending
        if interrupt is None or cpu.masked or context.interrupt_ns is not None:
            return False
        cpu.pending = None
        cpu.preempted = context
        cpu.current = interrupt
        self._push(now + (interrupt.interrupt_ns or 0), interrupt)
        return True

    def _ended(self, context: Context) -> bool:
        """A context has run to its end; True if it was the last task."""
        context.done = True
        context.waiting = False
        context.cpu.masked = False
        self._next(context.cpu)
        if context.task:
            self.tasks_left -= 1
        return context.task and not self.tasks_left

    def _called(self, call: Callable[[int], None], now: int) -> None:
        self.now = now
        call(now)

    def _timer(self, context: Context, serial: int, now: int) -> None:
        self.now = now
        if context.waiting and serial == context.serial:
            self.notify(context)

    def _nothing_left(self, now: int) -> Any:
        heappush(self._heap, (_FOREVER, 0, Call(self._nothing_left)))
        return _END

    def _other(self, ev: Any, context: Context, cpu: Cpu) -> bool:
        """A wait with a deadline, or work whose cost is given; True if the context stops here."""
        if type(ev) is Spend:
            self.now += ev.ns
            if self._heap[0][0] > self.now:
                return False
            self._push(self.now, context)
            return True
        if type(ev) is not Wait or ev.until_ns is None:
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
        heappush(self._heap, (ev.until_ns, next(self._order), Call(partial(self._timer, context, context.serial))))
        if not cpu.masked:
            self._next(cpu)
        return True

    def _watched(self, context: Context) -> Callable[[Any], Any]:
        """``context.send`` with a look at what it yields; a fused context yields every point then, and is sent on until it stops."""
        send, heap, table = context.send, self._heap, self.table

        def watched(argument: Any) -> Any:
            ev = send(argument)
            if self.observe is not None:
                self.observe(self.now, context, ev)
            return ev

        def watched_fused(argument: Any) -> Any:
            observe = self.observe
            heappush(heap, _DUE)
            try:
                while True:
                    ev = send(argument)
                    if type(ev) is not tuple or type(when := ev[0]) is not int:
                        if observe is not None:
                            observe(self.now, context, ev)
                        return ev
                    ev = ev[1:]
                    self.now = now = when - table[ev[0]]
                    if observe is not None:
                        observe(now, context, ev)
                    if self._interleave is not None:
                        return ev
                    if heap[1][0] <= when or (len(heap) > 2 and heap[2][0] <= when):  # below the root: what is due first
                        return when
                    self.now = argument = when
            finally:
                heappop(heap)

        context.watched = watched_fused if type(context) is Fused else watched
        return context.watched

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
