"""The simulator's scheduler alone: contexts made of lists, a cost table made up for the test."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vblklab as vb
from vblklab.events import GROUPS, WAIT, Spend, Wait
from vblklab.machine.costs import Cost
from vblklab.machine.sched import Context, Cpu, Scheduler

Steps = Generator[Any, int, Any]
POP, FILL, FLUSH, KICK = ("virtqueue_pop", 0), ("virtqueue_fill", 0, 0), ("virtqueue_flush", 0, 1), ("virtqueue_kick_prepare", 0)
NS = {"virtqueue_pop": 100, "virtqueue_fill": 30, "virtqueue_flush": 7, "virtqueue_kick_prepare": 0}


class Flat:
    """A cost table of four trace points; everything else costs 1 ns."""

    def of_event(self, key: str) -> Cost:
        return Cost(NS.get(key, 1), "made up", "model")


class Bench:
    """A scheduler and a note of what happened: (now, context, what)."""

    def __init__(self, seed: int | None = None) -> None:
        self.sched = Scheduler(Flat(), interleave=None if seed is None else random.Random(seed))  # type: ignore[arg-type]
        self.log: list[tuple[int, str, str]] = []

    def note(self, name: str, what: str) -> None:
        self.log.append((self.sched.now, name, what))

    def walk(self, name: str, evs: list[Any], rounds: int = 1) -> Steps:
        """Yields the events, noting when it goes on after each; between rounds it waits."""
        for number in range(rounds):
            if number:
                yield WAIT
            self.note(name, "start" if not number else "woken")
            for ev in evs:
                now = yield ev
                assert ev is WAIT or now == self.sched.now
                self.note(name, ev[0] if isinstance(ev, tuple) else type(ev).__name__)

    def add(self, name: str, cpu: Cpu, evs: list[Any], *, rounds: int = 1, task: bool = True, **wake: Any) -> Context:
        return self.sched.add(name, cpu, self.walk(name, evs, rounds), task=task, **wake)

    def run(self, points: int = 10_000) -> bool:
        return self.sched.run(points)


def test_the_cost_of_a_trace_point_passes_before_its_context_goes_on() -> None:
    bench = Bench()
    context = bench.add("a", Cpu("x"), [POP, FILL, FLUSH])
    assert not bench.log, "nothing runs before it is notified"
    context.notify()
    bench.run()
    assert bench.log == [(0, "a", "start"), (100, "a", "virtqueue_pop"), (130, "a", "virtqueue_fill"), (137, "a", "virtqueue_flush")]
    assert context.done and not bench.sched.tasks_left


def test_a_group_costs_the_sum_of_its_members() -> None:
    bench = Bench()
    bench.add("a", Cpu("x"), [("completion_to_ring", 0, 0, 0, 0)]).notify()
    bench.run()
    assert bench.sched.now == sum(NS.get(key, 1) for key, _ in GROUPS["completion_to_ring"])


def test_contexts_of_two_cpus_run_side_by_side_in_the_order_of_time() -> None:
    bench = Bench()
    bench.add("a", Cpu("x"), [POP, POP]).notify()
    bench.add("b", Cpu("y"), [FILL] * 5).notify()
    bench.run()
    assert [now for now, _, _ in bench.log] == sorted(now for now, _, _ in bench.log)
    assert [(now, name) for now, name, _ in bench.log[2:]] == [
        (30, "b"), (60, "b"), (90, "b"), (100, "a"), (120, "b"), (150, "b"), (200, "a"),
    ]  # fmt: skip


def test_at_the_same_time_the_first_to_be_added_runs_first() -> None:
    """Not the first to be notified: which of two was notified first depends on where a fused context looks up."""
    bench = Bench()
    contexts = [bench.add(name, Cpu(name), [POP]) for name in "abcde"]
    for context in reversed(contexts):
        context.notify()
    bench.run()
    assert [name for _, name, what in bench.log if what == "start"] == ["a", "b", "c", "d", "e"]


def test_two_tasks_of_one_cpu_take_turns_when_one_waits_and_not_before() -> None:
    bench, cpu = Bench(), Cpu("vCPU 0")
    bench.add("a", cpu, [POP, POP]).notify()
    bench.add("b", cpu, [FILL], wake_ns=1000).notify()
    bench.run()
    assert [(now, name) for now, name, _ in bench.log] == [(0, "a"), (100, "a"), (200, "a"), (1200, "b"), (1230, "b")]


def test_waking_an_idle_context_costs_its_wake_up() -> None:
    bench = Bench()
    bench.add("a", Cpu("x"), [POP], wake_ns=500).notify()
    bench.run()
    assert [now for now, _, _ in bench.log] == [500, 600]


def test_spend_passes_the_time_it_says() -> None:
    bench = Bench()
    bench.add("a", Cpu("x"), [Spend(12345), POP]).notify()
    bench.add("b", Cpu("y"), [POP] * 200).notify()
    bench.run()
    assert (12345, "a", "Spend") in bench.log and (12445, "a", "virtqueue_pop") in bench.log
    assert bench.sched.now == 20000


# -- notifications ---------------------------------------------------------------------------------------------------------------


def test_a_notification_before_the_wait_is_not_lost_and_two_are_one() -> None:
    bench = Bench()
    context = bench.add("a", Cpu("x"), [POP], rounds=3, task=False)
    context.notify()
    bench.run(1)  # stands at POP
    context.notify()
    context.notify()
    bench.run()
    assert [what for _, _, what in bench.log] == ["start", "virtqueue_pop", "woken", "virtqueue_pop"]
    assert context.waiting, "the second notification was the same level, not another edge"
    context.notify()
    bench.run()
    assert context.done


def test_a_deadline_wakes_a_context_at_its_time() -> None:
    bench = Bench()
    bench.add("a", Cpu("x"), [POP, Wait(5000), FILL]).notify()
    bench.run()
    assert bench.log[-2:] == [(5000, "a", "Wait"), (5030, "a", "virtqueue_fill")]


def test_a_notification_before_the_deadline_wakes_once_and_the_timer_is_stale() -> None:
    bench = Bench()
    context = bench.add("a", Cpu("x"), [Wait(5000), POP, WAIT, POP], task=False)
    context.notify()
    bench.sched.at(700, lambda now: context.notify())
    bench.run()
    assert [(now, what) for now, _, what in bench.log] == [(0, "start"), (700, "Wait"), (800, "virtqueue_pop")]
    assert context.waiting and bench.sched.now == 5000, "the old timer passed and did not wake the second wait"


def test_a_deadline_in_the_past_gives_way_to_another_task_of_the_cpu_once() -> None:
    bench, cpu = Bench(), Cpu("vCPU 0")
    bench.add("a", cpu, [POP, Wait(0), POP, Wait(0), POP]).notify()
    bench.add("b", cpu, [FILL]).notify()
    bench.run()
    names = [name for _, name, _ in bench.log]
    assert names == ["a", "a", "b", "b", "a", "a", "a", "a"]


def test_the_hardwares_clockwork_is_called_at_its_time_between_contexts() -> None:
    bench = Bench()
    calls: list[tuple[int, int]] = []
    bench.add("a", Cpu("x"), [POP] * 5).notify()
    for when in (250, 100, 450):
        bench.sched.at(when, lambda now: calls.append((now, bench.sched.now)))
    bench.run()
    assert calls == [(100, 100), (250, 250), (450, 450)]


# -- interrupts ------------------------------------------------------------------------------------------------------------------


def _vcpu(bench: Bench, **more: Any) -> tuple[Cpu, Context]:
    """A vCPU with an interrupt context that handles one interrupt per notification."""
    cpu = Cpu("vCPU 0")
    irq = bench.add("irq", cpu, [FLUSH], rounds=50, task=False, wake_ns=1000, interrupt_ns=5, **more)
    return cpu, irq


def test_an_interrupt_is_taken_at_the_next_trace_point_and_the_task_goes_on_after_it() -> None:
    bench = Bench()
    cpu, irq = _vcpu(bench)
    bench.add("task", cpu, [POP] * 3).notify()
    bench.sched.at(150, lambda now: irq.notify())
    bench.run()
    assert bench.log == [
        (0, "task", "start"), (100, "task", "virtqueue_pop"),
        (205, "irq", "start"), (212, "irq", "virtqueue_flush"),
        (212, "task", "virtqueue_pop"), (312, "task", "virtqueue_pop"),
    ]  # fmt: skip


def test_an_interrupt_of_an_idle_vcpu_costs_the_wake_up() -> None:
    bench = Bench()
    _, irq = _vcpu(bench)
    irq.notify()
    bench.run()
    assert bench.log[0] == (1000, "irq", "start")


def test_an_interrupt_does_not_interrupt_an_interrupt() -> None:
    bench = Bench()
    cpu, irq = _vcpu(bench)
    bench.add("task", cpu, [POP] * 2).notify()
    bench.sched.at(50, lambda now: irq.notify())
    bench.sched.at(108, lambda now: irq.notify())  # inside the handler
    bench.run()
    assert [what for _, name, what in bench.log if name == "irq"] == ["start", "virtqueue_flush", "woken", "virtqueue_flush"]
    assert [now for now, name, _ in bench.log if name == "task"] == [0, 119, 219]


def test_a_second_interrupt_context_of_the_cpu_waits_for_the_first() -> None:
    bench = Bench()
    cpu, irq = _vcpu(bench)
    other = bench.add("other irq", cpu, [FLUSH], task=False, wake_ns=1000, interrupt_ns=5)
    bench.add("task", cpu, [POP] * 2).notify()
    bench.sched.at(50, lambda now: irq.notify())
    bench.sched.at(107, lambda now: other.notify())
    bench.run()
    assert [name for _, name, _ in bench.log] == ["task", "irq", "irq", "other irq", "other irq", "task", "task"]


def test_a_task_that_raises_its_own_interrupt_is_interrupted_at_its_next_trace_point() -> None:
    bench = Bench()
    cpu, irq = _vcpu(bench)

    def task() -> Steps:
        yield POP
        irq.notify()
        yield POP
        bench.note("task", "second")
        yield POP

    bench.sched.add("task", cpu, task(), task=True).notify()
    bench.run()
    assert bench.log == [(205, "irq", "start"), (212, "irq", "virtqueue_flush"), (212, "task", "second")]


def test_an_interrupt_waits_while_the_vcpu_is_outside_guest_mode() -> None:
    bench = Bench()
    cpu, irq = _vcpu(bench)

    def task() -> Steps:
        yield POP
        bench.sched.leave_guest()
        bench.note("task", "left")
        yield POP
        yield POP
        bench.sched.enter_guest()
        bench.note("task", "entered")
        yield POP
        bench.note("task", "end")

    bench.sched.add("task", cpu, task(), task=True).notify()
    bench.sched.at(120, lambda now: irq.notify())
    bench.run()
    assert bench.log == [
        (100, "task", "left"), (300, "task", "entered"),
        (405, "irq", "start"), (412, "irq", "virtqueue_flush"), (412, "task", "end"),
    ]  # fmt: skip


@pytest.mark.parametrize("wait", [WAIT, Wait(9000)], ids=["until notified", "with a deadline"])
def test_outside_guest_mode_a_wait_keeps_the_cpu_from_its_other_tasks(wait: Wait) -> None:
    bench = Bench()
    cpu = Cpu("vCPU 0")

    def leaver() -> Steps:
        yield POP
        bench.sched.leave_guest()
        yield wait
        bench.note("a", "woken")
        bench.sched.enter_guest()
        yield POP

    first = bench.sched.add("a", cpu, leaver(), task=True)
    first.notify()
    bench.add("b", cpu, [FILL]).notify()
    bench.sched.at(9000, lambda now: first.notify())
    bench.run()
    assert bench.log == [(9000, "a", "woken"), (9100, "b", "start"), (9130, "b", "virtqueue_fill")]


def test_a_task_that_was_preempted_goes_on_before_one_that_is_ready() -> None:
    bench = Bench()
    cpu, irq = _vcpu(bench)
    bench.add("task", cpu, [POP, POP]).notify()
    bench.add("other", cpu, [FILL]).notify()
    bench.sched.at(50, lambda now: irq.notify())
    bench.run()
    assert [name for _, name, _ in bench.log] == ["task", "irq", "irq", "task", "task", "other", "other"]


# -- budgets, jitter, observers --------------------------------------------------------------------------------------------------


def _traffic(seed: int | None = None) -> tuple[Bench, list[Context]]:
    """Four contexts on three CPUs that wake each other, many of them due at the same time."""
    bench = Bench(seed)
    cpus = [Cpu(name) for name in "xyz"]
    contexts: list[Context] = []

    def walk(name: str, at: int) -> Steps:
        for number in range(40):
            bench.note(name, str(number))
            yield (POP, KICK, POP, FILL)[number % 4]  # many are due at the same time
            if number % 3 == at % 3:
                contexts[(at + number) % 4].notify()
            if number % 5 == at:
                yield Wait(bench.sched.now + 200)

    contexts += [bench.sched.add(f"c{at}", cpus[at % 3], walk(f"c{at}", at), task=True) for at in range(4)]
    for context in contexts:
        context.notify()
    return bench, contexts


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("points", [1, 2, 3, 7])
def test_where_a_budget_ends_changes_nothing(points: int, seed: int | None) -> None:
    whole, _ = _traffic(seed)
    whole.run()
    pieces, _ = _traffic(seed)
    while pieces.sched.tasks_left:
        pieces.run(points)
    assert pieces.log == whole.log and len(whole.log) == 160


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_no_sequence_of_budgets_changes_anything(budgets: list[int]) -> None:
    whole, _ = _traffic(4)
    whole.run()
    pieces, _ = _traffic(4)
    for points in budgets:
        pieces.run(points)
        if not pieces.sched.tasks_left:
            break
    pieces.run()
    assert pieces.log == whole.log


def test_jitter_is_the_seeds_and_lies_between_nothing_and_a_long_stall() -> None:
    logs = {}
    for seed in (1, 1, 2):
        bench, _ = _traffic(seed)
        bench.run()
        assert logs.setdefault(seed, bench.log) == bench.log
    assert logs[1] != logs[2]
    gaps = []
    bench = Bench(3)
    bench.add("a", Cpu("x"), [POP] * 2000).notify()
    bench.run()
    times = [now for now, _, _ in bench.log]
    gaps = [later - earlier for earlier, later in pairwise(times[1:])]
    assert min(gaps) < 10 and max(gaps) > 20_000
    assert 0.05 < sum(gap > 200 for gap in gaps) / len(gaps) < 0.15


def test_observing_changes_nothing_and_sees_everything() -> None:
    plain, _ = _traffic()
    plain.run()
    seen: list[tuple[int, str, Any]] = []
    watched, _ = _traffic()
    watched.sched.observe = lambda now, context, ev: seen.append((now, context.name, ev))
    watched.run()
    assert watched.log == plain.log
    assert sum(isinstance(ev, tuple) for _, _, ev in seen) == 160
    assert [now for now, _, _ in seen] == sorted(now for now, _, _ in seen)


def test_next_ns_says_when_something_happens_next() -> None:
    bench = Bench()
    bench.sched.at(700, lambda now: None)
    assert bench.sched.next_ns == 700
    bench.run()
    assert bench.sched.next_ns > 10**15 and not bench.run(), "nothing will ever happen"


# -- errors ----------------------------------------------------------------------------------------------------------------------


def _one(evs: Callable[[], Steps]) -> None:
    bench = Bench()
    bench.sched.add("mine", Cpu("x"), evs(), task=True).notify()
    bench.run()


@pytest.mark.parametrize("ev", [None, 5, "virtqueue_pop", ["virtqueue_pop"], Wait])
def test_a_yield_that_is_no_event_is_named_with_its_context(ev: Any) -> None:
    def steps() -> Steps:
        yield ev

    with pytest.raises(vb.ConfigError, match=r"mine yielded .*: yield a trace point"):
        _one(steps)


def test_an_undeclared_trace_point_says_how_to_declare_it() -> None:
    def steps() -> Steps:
        yield ("nobody_declared_this", 1)

    with pytest.raises(vb.ConfigError, match=r"'nobody_declared_this', which is not declared: declare it: vb\.event"):
        _one(steps)


def test_a_key_error_of_the_contexts_own_code_stays_a_key_error() -> None:
    def steps() -> Steps:
        yield POP
        {}["missing"]

    with pytest.raises(KeyError, match="missing"):
        _one(steps)


def test_a_declared_trace_point_is_charged_after_a_refresh() -> None:
    bench = Bench()
    bench.add("a", Cpu("x"), [("test_sched_own", 1)]).notify()
    vb.event("test_sched_own", step="D5", cost_ns=300)
    try:
        NS["test_sched_own"] = 300
        bench.sched.refresh()
        bench.run()
        assert bench.sched.now == 300
    finally:
        del NS["test_sched_own"], vb.EVENTS["test_sched_own"]
