"""What came out of a walk through every schedule: how many there were, and the shortest in which something is lost."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..errors import ConfigError
from .search import Graph
from .system import Setup, System, Violation
from .words import Words

__all__ = ["Frame", "Replay", "Schedules", "Step"]


class Step(NamedTuple):
    """One step of a schedule: who took it, the trace points it passed, what it stored."""

    number: int
    who: str
    points: tuple[str, ...]
    stores: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.number:3}  {self.who:15}  {self.said}"

    @property
    def said(self) -> str:
        """The step in words."""
        if self.who.endswith("stores"):
            return f"arrive: {', '.join(self.stores)}"
        passed = " → ".join(self.points)
        stored = f"{'; ' if passed else ''}stores {', '.join(self.stores)}" if self.stores else ""
        return (passed + stored) or "looks, and goes on"


class Frame(NamedTuple):
    """Guest memory after a step, as the driver and as the device see it, and where the ring lies in it."""

    label: str
    driver: bytes
    device: bytes
    layout: Any


class Replay:
    """A schedule taken again, one step at a time."""

    def __init__(self, setup: Setup, path: list[str]) -> None:
        self._path = path
        self.system = System(setup)
        self.taken: list[Step] = []
        self.ended: Violation | None = None
        ring = self.system.ring
        tables, size = ring._tables, ring._table_bytes
        self._words = Words(ring.layout, setup.queue.packed, self.system.requests, tables, size)

    def step(self) -> Step | None:
        """Take the next step; None at the end, where ``ended`` says what is lost."""
        number = len(self.taken)
        if number == len(self._path):
            if self.ended is None and not self.system.enabled():
                self.ended = self.system.lost()
            return None
        who = self._path[number]
        system = self.system
        side = system.host if who in ("device", "driver's stores") else system.guest  # who has what was stored, or gets it
        points: tuple[str, ...] = ()
        runs: tuple[tuple[int, bytes], ...] = ()
        try:
            points, runs = system.take(who)
        except Violation as violation:
            self.ended = violation
        step = Step(number + 1, who, points, tuple(self._words.say(runs, side.bytes)))
        self.taken.append(step)
        return step

    def __iter__(self) -> Iterator[Step]:
        while (step := self.step()) is not None:
            yield step

    def where(self) -> str:
        """Who can take a step now, and what comes next in this schedule."""
        left = self._path[len(self.taken) :]
        if not left:
            return "the end" + (f": {self.ended}" if self.ended else "")
        return f"next: {left[0]}; could go on: {', '.join(self.system.enabled())}"

    def frame(self, label: str) -> Frame:
        """Memory as it is now."""
        return Frame(label, bytes(self.system.guest.bytes), bytes(self.system.host.bytes), self.system.ring.layout)


class Schedules:
    """The result of ``vb.schedules()``.  ``print`` it, or show it in a notebook; ``ok`` says that nothing can be lost.

    ``schedules`` counts the orders of steps that were covered, ``states`` what they have in common, ``seconds`` the time it took;
    ``complete`` is False if the walk was stopped at ``most_states``.  ``lost`` is None or what the shortest bad schedule ends in:
    ``kick``, ``interrupt``, ``buffer``, ``byte`` or ``error``.
    """

    def __init__(self, setup: Setup, what: str, graph: Graph) -> None:
        self.setup = setup
        self.what = what
        self.states, self.steps = graph.states, sum(map(len, graph.steps))
        self.schedules, self.complete, self.seconds = graph.schedules, graph.complete, graph.seconds
        found = graph.shortest()
        self._path = found[0] if found else []
        self.violation = found[1] if found else None

    @property
    def lost(self) -> str | None:
        """The kind of what can be lost."""
        return self.violation.kind if self.violation is not None else None

    @property
    def ok(self) -> bool:
        """Every schedule was followed and nothing is lost in any."""
        return self.complete and self.violation is None

    @property
    def schedule(self) -> list[Step]:
        """The shortest schedule in which something is lost, [] if there is none."""
        return list(self.replay()) if self._path else []

    def replay(self) -> Replay:
        """The shortest bad schedule to be stepped through; ConfigError if there is none."""
        if not self._path:
            raise ConfigError("there is no schedule to replay", "nothing is lost in any; take something away with without=…")
        return Replay(self.setup, self._path)

    def frames(self) -> list[Frame]:
        """Memory before the first step of the bad schedule and after each of them."""
        replay = self.replay()
        return [replay.frame("before"), *(replay.frame(f"{step.who}: {step.said}") for step in replay)]

    @property
    def verdict(self) -> str:
        """One sentence."""
        covered = f"{self.schedules:,} schedules ({self.states:,} states, {self.seconds:.1f} s)"
        if self.violation is not None:
            return f"{self.what}: {self.violation}. The shortest such schedule has {len(self._path)} steps."
        if not self.complete:
            return f"{self.what}: nothing is lost in what was covered, but the walk was stopped at {self.states:,} states."
        return f"{self.what}: nothing is lost in any of {covered}."

    def text(self) -> str:
        """The verdict and, if something is lost, the steps that lead there."""
        return "\n".join([self.verdict, *map(str, self.schedule)])

    __str__ = text
    __repr__ = text

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{step.number}</td><td><b>{html.escape(step.who)}</b></td>"
            f'<td style="text-align:left">{html.escape(step.said)}</td></tr>'
            for step in self.schedule
        )
        table = f'<table><tr><th></th><th>who</th><th style="text-align:left">what</th></tr>{rows}</table>' if rows else ""
        return f"<p>{html.escape(self.verdict)}</p>{table}"
