"""The live machine's scheduler: contexts of one OS thread, an epoll set, measured time."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Generator
from typing import Any

from ..errors import ConfigError
from ..events import EVENTS, GROUPS, WAIT, Spend, Wait

__all__ = ["KEPT_FIRST", "KEPT_MOST", "LiveContext", "LiveLoop", "LogEntry", "kept_window"]

LogEntry = tuple[int, int, Any]
"""(time in ns, context number, event tuple)."""

clock = time.perf_counter_ns
KEPT_FIRST = 60_000  # log entries that are always kept, about 3,000 I/Os
KEPT_MOST = 300_000
_LONGEST_SPIN_NS = 1_000_000
_IDLE = ("wait",)


def kept_window(now_ns: int) -> int | None:
    """The number of the window that is kept of a long run, None between two; ``note`` and ``_run`` ask the same in place."""
    return None if now_ns >> 26 & 7 else now_ns >> 26


class LiveContext:
    """One generator of this thread.  ``notify`` may be called from this thread only; other threads write an eventfd."""

    __slots__ = ("deadline_ns", "done", "generator", "name", "notified", "number", "send", "started", "task")

    def __init__(self, name: str, number: int, generator: Generator[Any, int, Any], task: bool) -> None:
        self.name = name
        self.number = number
        self.generator = generator
        self.send = generator.send
        self.task = task
        self.notified = True
        self.started = False
        self.done = False
        self.deadline_ns: int | None = None

    def notify(self) -> None:
        self.notified = True


class LiveLoop:
    """Runs contexts until none is ready, sleeps in epoll, and keeps a log of trace points.

    The log holds the first 60,000 points and then those of one window in eight (67 ms each, the same in every process), so
    that a long run stays in bounded memory.  ``first_number`` keeps the context numbers of two processes apart.

    ``spin`` looks for work without a notification, for ``spin_ns`` before the loop sleeps, between ``spin_begin`` and
    ``spin_end``, which say to whoever notifies that somebody looks.
    """

    def __init__(self, wake_event: str, *, trace: bool, first_number: int = 0) -> None:
        self.contexts: list[LiveContext] = []
        self.tasks_left = 0
        self.log: list[LogEntry] | None = [] if trace else None
        self.spin: Callable[[], bool] | None = None
        self.spin_begin: Callable[[], None] = lambda: None
        self.spin_end: Callable[[], bool] = lambda: False
        self.spin_ns = 0
        self._looking = False
        self._wake_event = (wake_event,)
        self._first = first_number
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[], None]] = {}
        self._known = {*EVENTS, *GROUPS}
        self._turns = 0

    def add(self, name: str, generator: Generator[Any, int, Any], *, task: bool = False) -> LiveContext:
        """A new context, ready to run."""
        context = LiveContext(name, self._first + len(self.contexts), generator, task)
        self.contexts.append(context)
        self.tasks_left += task
        return context

    def watch(self, fd: int, call: Callable[[], None]) -> None:
        """Call ``call`` whenever ``fd`` is readable."""
        self._epoll.register(fd, select.EPOLLIN)
        self._calls[fd] = call

    def unwatch(self, fd: int) -> None:
        """No longer; for an fd that is still open."""
        if self._calls.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def watch_eventfd(self, fd: int, call: Callable[[], None]) -> None:
        """Empty the eventfd, then call."""

        def readable() -> None:
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                return
            call()

        self.watch(fd, readable)

    def close(self) -> None:
        self._epoll.close()
        for context in self.contexts:
            context.generator.close()

    def turn(self, timeout_s: float) -> None:
        """Run what is ready; sleep at most ``timeout_s`` if nothing is."""
        idle = True
        for context in self.contexts:
            if context.notified and not context.done:
                idle = False
                self._run(context)
        self._turns += 1
        if idle and self.spin is not None:
            idle = not self._spin()
        elif idle and self._looking:
            idle = not self._look_away()
        if not idle and self._turns & 63:
            return  # look at the fds only now and then while there is work: a kick that is pending stays pending
        timeout = self._timeout(timeout_s) if idle else 0.0
        events = self._sleep(timeout)
        if events and idle and timeout and self.log is not None:
            self.note(clock(), -1, self._wake_event)
        for fd, _ in events:
            call = self._calls.get(fd)
            if call is not None:  # a call before it may have unwatched it
                call()
        now = clock()
        if events and idle and timeout and self.log is not None:
            self.note(now, -1, _IDLE)
        for context in self.contexts:
            if context.deadline_ns is not None and context.deadline_ns <= now:
                context.deadline_ns = None
                context.notified = True

    def _sleep(self, timeout_s: float) -> list[tuple[int, int]]:
        """Wait for one of the fds, at most so long; 0 only looks."""
        return self._epoll.poll(timeout_s)

    def _timeout(self, most_s: float) -> float:
        deadlines = [c.deadline_ns for c in self.contexts if c.deadline_ns is not None]
        return max(min(most_s, (min(deadlines) - clock()) / 1e9), 0.0) if deadlines else most_s

    def _spin(self) -> bool:
        """Adaptive polling, as QEMU's poll-max-ns: look for work for a while before sleeping.

        ``spin`` looks once and is True if it found something; it goes on as long as it serves what it finds by itself, at most
        for a millisecond.  Only when it found nothing ``spin_end`` says so to the other side, and is True if something slipped in.
        """
        spin = self.spin
        assert spin is not None
        now = clock()
        end = last = now + self.spin_ns
        found = False
        if not self._looking:
            self._looking = True
            self.spin_begin()
        while True:
            served = spin()
            now = clock()
            if served:
                if any(context.notified for context in self.contexts):
                    return True
                end = now + self.spin_ns
                if not found:
                    found, last = True, now + _LONGEST_SPIN_NS
            if now >= end or now >= last:
                return found or self._look_away()

    def _look_away(self) -> bool:
        self._looking = False
        return self.spin_end()

    def note(self, now: int, number: int, ev: Any) -> None:
        """Log a point that no context of this loop yields; -1 is nobody's number."""
        log = self.log
        if log is not None and (len(log) < KEPT_FIRST or (not (now >> 26) & 7 and len(log) < KEPT_MOST)):
            log.append((now, number, ev))

    def _run(self, context: LiveContext) -> None:
        """Until the context waits.  Its notifier is cleared first, so a notification meanwhile is not lost."""
        context.notified = False
        now = clock()
        log = self.log
        keep = None
        if log is not None and (len(log) < KEPT_FIRST or (not (now >> 26) & 7 and len(log) < KEPT_MOST)):
            keep = log.append
        number = context.number
        send = context.send
        argument: Any = now if context.started else None
        context.started = True
        try:
            while True:
                ev = send(argument)
                if ev.__class__ is tuple:
                    argument = clock()
                    if keep is not None:
                        keep((argument, number, ev))
                        if ev[0] not in self._known:
                            self._declared(ev, context)
                elif ev is WAIT:
                    if not context.notified:
                        if keep is not None:
                            keep((clock(), number, _IDLE))
                        return
                    context.notified = False
                    argument = clock()
                elif ev.__class__ is Spend:
                    argument = clock()
                elif ev.__class__ is Wait and ev.until_ns is not None:
                    if ev.until_ns <= clock():
                        context.notified = True  # gives way, then goes on
                    else:
                        context.deadline_ns = ev.until_ns
                        if keep is not None:
                            keep((clock(), number, _IDLE))
                    return
                else:
                    raise ConfigError(f"{context.name} yielded {ev!r}", "yield a trace point (a tuple), WAIT or Wait(until_ns)")
        except StopIteration:
            context.done = True
            self.tasks_left -= context.task

    def _declared(self, ev: Any, context: LiveContext) -> None:
        if ev[0] not in EVENTS:
            raise ConfigError(
                f"{context.name} yielded the trace point {ev[0]!r}, which is not declared",
                'declare it: vb.event("name", step="D5", cost_ns=300)',
            )
        self._known.add(ev[0])
