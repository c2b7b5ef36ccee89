"""Every schedule of a small system: a walk through the graph of its states."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from .freeze import key_of
from .system import Setup, System, Violation

__all__ = ["Graph", "search"]


@dataclass
class Graph:
    """The states that were reached, the steps between them, and the states in which something is lost."""

    steps: list[list[tuple[str, int]]] = field(default_factory=list)  # of a state: who, and the state it leads to
    violations: dict[int, Violation] = field(default_factory=dict)
    schedules: int = 0
    complete: bool = True
    seconds: float = 0.0

    @property
    def states(self) -> int:
        return len(self.steps)

    def shortest(self) -> tuple[list[str], Violation] | None:
        """The shortest schedule that ends in a violation."""
        before: dict[int, tuple[int, str]] = {}
        line = deque([0])
        seen = {0}
        while line:
            state = line.popleft()
            if state in self.violations:
                path = []
                at = state
                while at:
                    at, who = before[at]
                    path.append(who)
                return path[::-1], self.violations[state]
            for who, to in self.steps[state]:
                if to not in seen:
                    seen.add(to)
                    before[to] = state, who
                    line.append(to)
        return None


def search(setup: Setup, most_states: int) -> Graph:
    """Depth first, each state once; a system that left the path is made again and led back to it."""
    graph = Graph()
    began = time.perf_counter()
    known: dict[bytes, int] = {}
    counts: dict[int, int] = {}  # schedules from a state to an end
    system: System | None = System(setup)
    assert system is not None
    known[key_of(system)] = 0
    graph.steps.append([])
    path: list[str] = []
    stack = [(0, system.enabled(), 0, system.looks())]
    while stack:
        state, choices, at, looks = stack.pop()
        if at == len(choices):
            counts[state] = sum(counts.get(to, 0) for _, to in graph.steps[state]) if choices else 1
            if path:
                path.pop()
            system = None
            continue
        stack.append((state, choices, at + 1, looks))
        if system is None:
            system = System(setup, looks)
            for who in path:
                system.take(who)
        who = choices[at]
        path.append(who)
        lost: Violation | None = None
        enabled: list[str] = []
        try:
            system.take(who)
            enabled = system.enabled()
            lost = None if enabled else system.lost()
            key = key_of(system)
        except Violation as violation:
            lost, key = violation, b"%d %s" % (state, who.encode())
        to = known.get(key)
        fresh = to is None
        if to is None:
            to = known[key] = len(graph.steps)
            graph.steps.append([])
            if lost is not None:
                graph.violations[to] = lost
        graph.steps[state].append((who, to))
        if fresh and lost is None and len(known) < most_states:
            stack.append((to, enabled, 0, system.looks()))
            continue
        if fresh:
            counts[to] = 1
            graph.complete &= lost is not None
        elif to not in counts:
            graph.violations.setdefault(to, Violation("error", "the same state again: this schedule never ends"))
        path.pop()
        system = None
    graph.schedules = counts.get(0, 0)
    graph.seconds = time.perf_counter() - began
    return graph
