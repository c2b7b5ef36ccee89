"""Every schedule of a small system loses nothing, and loses something as soon as one thing that the specification asks for is gone."""

from __future__ import annotations

import random
from typing import Any

import pytest

import vblklab as vb
from vblklab.interleave import REMOVALS, Schedules, schedules
from vblklab.interleave.sides import Side, changes
from vblklab.interleave.system import System
from vblklab.transport import MmioTransport

QUEUES = [vb.Split(2), vb.Packed(2)]
KINDS = {
    "driver fence before kick": {"kick"},
    "driver second look": {"interrupt"},
    "driver fence before second look": {"interrupt"},
    "driver descriptors before publish": {"buffer", "error", "byte"},
    "device fence before interrupt": {"interrupt"},
    "device second look": {"kick"},
    "device fence before second look": {"kick"},
    "device used element before publish": {"buffer", "error", "byte"},
}
"""What each removal can lose."""


def holds(found: Schedules) -> None:
    assert found.ok and found.lost is None and found.schedule == [], found.text()
    assert found.states > 400 and found.schedules > 10**9
    assert "nothing is lost in any" in found.verdict


@pytest.mark.parametrize("queue", QUEUES, ids=repr)
def test_two_buffers_lose_nothing_in_any_schedule(queue: Any) -> None:
    holds(schedules(queue=queue, buffers=2))


@pytest.mark.parametrize("event_idx", [True, False], ids=["event_idx", "flags"])
@pytest.mark.parametrize("queue", [vb.Split(4), vb.Packed(3)], ids=repr)
def test_two_buffers_in_chained_descriptors_lose_nothing(queue: Any, event_idx: bool) -> None:
    holds(schedules(queue=queue, buffers=2, event_idx=event_idx, indirect=False))


@pytest.mark.long
@pytest.mark.parametrize("queue", QUEUES, ids=repr)
def test_without_event_idx_two_buffers_lose_nothing(queue: Any) -> None:
    holds(schedules(queue=queue, buffers=2, event_idx=False))


@pytest.mark.long
@pytest.mark.parametrize("queue", [vb.Split(4), vb.Packed(4), *QUEUES], ids=repr)
def test_three_buffers_lose_nothing_in_the_first_ten_thousand_states(queue: Any) -> None:
    """There are many more, too many to follow; depth first, the last steps before an end come in every order."""
    found = schedules(queue=queue, buffers=3, most_states=10_000)
    assert found.lost is None and found.schedule == [], found.text()
    assert found.complete or found.states >= 10_000


def in_turn() -> list[Any]:
    """Each removal with one format of ring; with the other one too if the run is long."""
    pairs = [(name, queue, (at + which) % 2) for at, name in enumerate(REMOVALS) for which, queue in enumerate(QUEUES)]
    return [pytest.param(name, queue, id=f"{name}-{queue!r}", marks=[pytest.mark.long] if other else []) for name, queue, other in pairs]


@pytest.mark.parametrize(("name", "queue"), in_turn())
def test_each_thing_taken_away_loses_something(name: str, queue: Any) -> None:
    taken_away(name, queue, event_idx=True)


@pytest.mark.long
@pytest.mark.parametrize("queue", QUEUES, ids=repr)
@pytest.mark.parametrize("name", REMOVALS)
def test_and_without_event_idx_too(name: str, queue: Any) -> None:
    taken_away(name, queue, event_idx=False)


def taken_away(name: str, queue: Any, event_idx: bool) -> None:
    found = schedules(queue=queue, event_idx=event_idx, without=name)
    assert found.lost in KINDS[name], found.text()
    assert name in found.verdict and not found.ok
    replay = found.replay()
    steps = list(replay)
    assert replay.ended is not None and str(replay.ended) == str(found.violation)
    assert steps == found.schedule and len(found.frames()) == len(steps) + 1
    assert all(str(step.number) in found.text() for step in steps)
    assert replay.where().startswith("the end: ")


def test_a_walk_that_is_stopped_says_so_and_is_not_called_right() -> None:
    found = schedules(queue=vb.Split(2), most_states=50)
    assert not found.complete and not found.ok and "stopped at" in found.verdict


def test_the_steps_name_the_words_of_the_ring() -> None:
    found = schedules(queue=vb.Split(2), buffers=2, without="device second look")
    said = [step.said for step in found.schedule]
    assert any("stores avail.idx = 1" in each for each in said) and any("used.idx = 1" in each for each in said)
    assert any("virtqueue_kick_prepare" in each for each in said)
    assert "<table>" in found._repr_html_() and "device second look" in found._repr_html_()


@pytest.mark.parametrize("seed", range(40))
def test_the_same_choices_give_the_same_data_on_split_and_packed(seed: int) -> None:
    disks = []
    for queue in QUEUES:
        choose = random.Random(seed)
        system = System(schedules(queue=queue, buffers=3, most_states=2).setup)
        while enabled := system.enabled():
            system.take(choose.choice(enabled))
        assert system.lost() is None and sorted(system.done) == [0, 1, 2]
        disks.append(bytes(system.disk.bytes))
    assert disks[0] == disks[1]


class NoStatus(vb.VirtioBlkDevice):
    """Ends a request without its status byte."""

    def complete(self, request: Any, status: int) -> Any:
        request.queue.fill(request.chain, self.used_length(request))
        request.ended = True
        yield ("completion_to_ring", request.key, 0, 0, 0)


class Forgets(vb.VirtioBlkDevice):
    """Never interrupts."""

    def should_notify(self, queue: Any) -> bool:
        return False


class NoAcknowledge(MmioTransport):
    """Leaves the line high."""

    def interrupt(self, vector: int = 0) -> Any:
        yield ("vm_interrupt",)
        return False, range(1)


@pytest.mark.parametrize(
    ("parts", "lost"),
    [({"device": NoStatus}, "byte"), ({"device": Forgets}, "interrupt"), ({"transport": NoAcknowledge}, "error")],
    ids=lambda value: "",
)
def test_a_learners_class_is_judged_too(parts: dict[str, Any], lost: str) -> None:
    found = schedules(queue=vb.Split(2), buffers=1, **parts)
    assert found.lost == lost, found.text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue": vb.Split(256)}, "too large"),
        ({"queue": 2}, "give vb.Split"),
        ({"buffers": 0}, "use 1 to 4"),
        ({"buffers": True}, "use 1 to 4"),
        ({"indirect": False}, "three descriptors"),
        ({"without": "device second lok"}, "did you mean 'device second look'"),
        ({"without": "sleep"}, "choose one of: driver fence before kick"),
    ],
)
def test_what_cannot_be_walked_is_one_clear_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vb.ConfigError, match=message):
        schedules(**{"queue": vb.Split(2), **options})


def test_there_is_no_replay_of_what_does_not_go_wrong() -> None:
    with pytest.raises(vb.ConfigError, match="without="):
        schedules(queue=vb.Split(2), buffers=1).replay()


# -- the store buffers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sides() -> tuple[Side, Side]:
    one, two = Side("driver", 64), Side("device", 64)
    one.other, two.other = two, one
    return one, two


def test_own_stores_are_seen_at_once_and_the_other_sees_them_in_order(sides: tuple[Side, Side]) -> None:
    one, two = sides
    for value in (1, 2):
        one.begin()
        one.memory.write(8 * value, bytes([value]))
        one.collect()
    assert (one.bytes[8], one.bytes[16], two.bytes[8], two.bytes[16]) == (1, 2, 0, 0)
    one.arrive()
    assert (two.bytes[8], two.bytes[16]) == (1, 0)
    one.memory.fence()
    assert two.bytes[16] == 2 and not one.pending


def test_what_arrives_does_not_hide_ones_own_newer_store(sides: tuple[Side, Side]) -> None:
    one, two = sides
    for side, value in ((one, 7), (two, 9)):
        side.begin()
        side.bytes[4] = value
        side.collect()
    one.arrive()
    assert two.bytes[4] == 9
    two.arrive()
    assert one.bytes[4] == 9


def test_changes_are_runs_of_bytes() -> None:
    assert changes(b"abcdef", bytearray(b"aXcdYZ")) == [(1, b"X"), (4, b"YZ")]
    assert changes(b"abc", bytearray(b"abc")) == []


@pytest.mark.parametrize("buffers", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("queue", [vb.Split(2, in_order=True), vb.Packed(2, in_order=True)], ids=repr)
def test_in_order_loses_nothing_either(queue: Any, buffers: int) -> None:
    found = vb.schedules(queue=queue, buffers=buffers)
    assert found.ok and found.schedule == [] and "in_order=True" in found.verdict
