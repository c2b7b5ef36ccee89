"""Both halves of the split virtqueue in every order of their steps, against a model of lists and naive definitions.

The model knows nothing of rings: it holds the buffers in the order they were offered and used.  A side may fall asleep only
as the protocol says (ask for a notification, fence, look again); from then on it may be woken by a notification alone, and
whatever schedule hypothesis finds, no side sleeps while there is something for it and nobody is left to tell it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

import vblklab as vb
from tests.support import gpa_of, pair
from vblklab.ring import Chain

DATA, ROOM = 0x10000, 0x400  # every buffer has a place of its own, this many bytes long
lengths = st.lists(st.integers(1, 60), max_size=5)


@dataclass
class Buffer:
    """What the driver offered, in plain words."""

    number: int
    readable: list[tuple[int, int]]
    writable: list[tuple[int, int]]
    content: bytes
    slots: int
    chain: Chain | None = None
    written: int = 0
    answer: bytes = b""


class Ring(RuleBasedStateMachine):
    """Driver and device take their steps in any order."""

    event_idx = True
    in_order = False
    segments = 0

    @initialize(size=st.sampled_from([1, 2, 4, 8]), start=st.sampled_from([0, 1, 65528, 65531, 65533, 65534, 65535]))
    def begin(self, size: int, start: int) -> None:
        self.prepare(size, start)

    def prepare(self, size: int, start: int) -> None:
        self.size, self.start = size, start
        self.make()
        self.count = self.returned = 0
        self.added: list[Buffer] = []  # not yet published
        self.offered: list[Buffer] = []  # published, not yet popped
        self.held: list[Buffer] = []  # with the device
        self.waiting: list[Buffer] = []  # ended before its turn, with IN_ORDER
        self.filled: list[Buffer] = []  # a used element is written
        self.used: list[Buffer] = []  # published to the driver
        self.free = size
        self.places = list(range(size + 1))
        self.place_of: dict[int, int] = {}
        self.avail_idx = self.kicked_idx = start  # of the model: how many were published, at the last look for a kick
        self.used_idx = self.told_idx = start
        self.told_once = False
        self.device_enabled = self.driver_enabled = True  # asked for notifications
        self.device_asleep, self.driver_asleep = True, True
        self.kicks = self.interrupts = 0

    # -- what a split ring is, in naive words: another format puts its own in their place ----------------------------------

    def make(self) -> None:
        """Both halves, at ``start``."""
        self.driver, self.device, self.hand = pair(
            self.size, event_idx=self.event_idx, in_order=self.in_order, indirect=self.segments, start=self.start
        )
        self.memory = self.hand.memory

    def steps(self, buffers: list[Buffer]) -> int:
        """How far an index moves for these buffers."""
        return len(buffers)

    def kick_expected(self) -> bool:
        placed = [(self.kicked_idx + i) & 0xFFFF for i in range((self.avail_idx - self.kicked_idx) & 0xFFFF)]
        return self.hand.avail_event in placed if self.event_idx else bool(placed) and self.hand.used_flags == 0

    def interrupt_expected(self) -> bool:
        placed = [(self.told_idx + i) & 0xFFFF for i in range((self.used_idx - self.told_idx) & 0xFFFF)]
        asked = not self.told_once or self.hand.used_event in placed
        if self.in_order and self.told_idx == self.used_idx:
            return False  # nothing to tell of
        return asked if self.event_idx else self.hand.avail_flags == 0

    def check_words(self) -> None:
        assert self.hand.avail_idx == self.avail_idx
        assert self.hand.used_idx == self.used_idx

    # -- driver ----------------------------------------------------------------------------------------------------------

    @rule(readable=lengths, writable=lengths, content=st.binary(min_size=8, max_size=8))
    def add(self, readable: list[int], writable: list[int], content: bytes) -> None:
        count = len(readable) + len(writable)
        if not count or count > max(self.size, self.segments):
            return
        slots = 1 if 1 < count <= self.segments else count
        if slots > self.size:
            return
        place = self.places[0]
        at = DATA + place * ROOM
        pieces = []
        for length in [*readable, *writable]:
            pieces.append((at, length))
            at += length + 1
        into = pieces[len(readable) :]
        text = (content * 40)[: sum(readable)]
        buffer = Buffer(self.count, pieces[: len(readable)], into, text, slots)
        if slots > self.free:
            before, free = bytes(self.memory.bytes), self.driver.num_free
            with pytest.raises(vb.QueueFull):
                self.driver.add_sgs(buffer.readable, into, buffer)
            assert (bytes(self.memory.bytes), self.driver.num_free) == (before, free)
            return
        self.places.pop(0)
        self.place_of[self.count] = place
        done = 0
        for gpa, length in buffer.readable:
            self.memory.write(gpa, text[done : done + length])
            done += length
        for gpa, length in into:
            self.memory.write(gpa, b"\xcc" * length)
        self.driver.add_sgs(buffer.readable, into, buffer)
        self.free -= slots
        self.count += 1
        self.added.append(buffer)

    @rule()
    def publish_and_look(self) -> None:
        """One schedule in which nobody comes between; the two rules below give all the others."""
        self.publish()
        self.look_for_kick()

    @rule()
    def publish(self) -> None:
        self.driver.publish()
        self.offered += self.added
        self.avail_idx = (self.avail_idx + self.steps(self.added)) & 0xFFFF
        self.added = []

    @rule()
    def look_for_kick(self) -> None:
        expected = self.kick_expected()
        assert self.driver.kick_prepare() == expected
        self.kicked_idx = self.avail_idx
        if expected:
            self.kicks += 1
            self.device_asleep = False

    @rule()
    def get_buf(self) -> None:
        self.driver_asleep = False  # reading the used ring without being told is allowed: polling
        got = self.driver.get_buf()
        if not self.used:
            assert got is None
            return
        buffer = self.used.pop(0)
        assert got is not None and got[0] is buffer, "buffers come back in the order of the used ring"
        assert got[1] == buffer.written
        self._returned(buffer)

    def _returned(self, buffer: Buffer) -> None:
        answer = b"".join(self.memory.read(gpa, length) for gpa, length in buffer.writable)
        assert answer[: buffer.written] == buffer.answer[: buffer.written]
        assert answer[buffer.written :] == b"\xcc" * (len(answer) - buffer.written)
        self.free += buffer.slots
        self.returned += 1
        self.places.append(self.place_of.pop(buffer.number))
        assert self.driver.num_free == self.free

    @rule()
    def disable_cb(self) -> None:
        if not self.driver_asleep:
            self.driver.disable_cb()
            self.driver_enabled = False

    @rule()
    def enable_cb(self) -> None:
        self.driver.enable_cb()
        self.driver_enabled = True

    @rule()
    def look_again_and_sleep_driver(self) -> None:
        nothing = self.driver.enable_cb_check()
        assert nothing == (not self.used)
        if self.driver_enabled or not nothing:
            self.driver_asleep = nothing

    # -- device ----------------------------------------------------------------------------------------------------------

    @rule()
    def pop(self) -> None:
        self.device_asleep = False
        chain = self.device.pop()
        if not self.offered:
            assert chain is None
            return
        buffer = self.offered.pop(0)
        assert chain is not None
        assert [gpa_of(self.memory, view) for view in chain.readable] == buffer.readable
        assert [gpa_of(self.memory, view) for view in chain.writable] == buffer.writable
        assert b"".join(chain.readable) == buffer.content
        buffer.chain = chain
        self.held.append(buffer)

    @rule(which=st.integers(0, 7), share=st.just(1.0) | st.floats(0, 1), pattern=st.binary(min_size=4, max_size=4))
    @precondition(lambda self: self.held)
    def fill(self, which: int, share: float, pattern: bytes) -> None:
        buffer = self.held[which % len(self.held)]
        chain = buffer.chain
        assert chain is not None
        room = sum(map(len, chain.writable))
        buffer.written = int(room * share)
        buffer.answer = (pattern * 80)[: buffer.written]
        done = 0
        for view in chain.writable:
            part = buffer.answer[done : done + len(view)]
            view[: len(part)] = part
            done += len(part)
        self.device.fill(chain, buffer.written)
        self.held.remove(buffer)
        if not self.in_order:
            self.filled.append(buffer)
            return
        self.waiting.append(buffer)
        before = min((other.number for other in self.held), default=self.count)
        ready = sorted((one for one in self.waiting if one.number < before), key=lambda one: one.number)
        self.waiting = [one for one in self.waiting if one not in ready]
        self.filled += ready

    @rule()
    def flush_and_look(self) -> None:
        self.flush()
        self.look_for_interrupt()

    @rule()
    def flush(self) -> None:
        assert self.device.flush() == len(self.filled)
        self.used += self.filled
        self.used_idx = (self.used_idx + self.steps(self.filled)) & 0xFFFF
        self.filled = []

    @rule()
    @precondition(lambda self: self.used_idx != self.told_idx)
    def look_for_interrupt(self) -> None:
        expected = self.interrupt_expected()
        assert self.device.should_notify() == expected
        self.told_once = self.told_once or not self.in_order or self.told_idx != self.used_idx
        self.told_idx = self.used_idx
        if expected:
            self.interrupts += 1
            self.driver_asleep = False

    @rule()
    def disable_notification(self) -> None:
        if not self.device_asleep:
            self.device.set_notification(False)
            self.device_enabled = False

    @rule()
    def enable_notification(self) -> None:
        self.device.set_notification(True)
        self.device_enabled = True

    @rule()
    def look_again_and_sleep_device(self) -> None:
        nothing = self.device.recheck()
        assert nothing == (not self.offered)
        if self.device_enabled or not nothing:  # a device that has seen a buffer is awake, even if it does not take it yet
            self.device_asleep = nothing

    # -- both, several at a time -------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 4), pieces=st.sampled_from([([], [5]), ([3], [5]), ([3], [])]))
    def offer_and_take(self, count: int, pieces: tuple[list[int], list[int]]) -> None:
        for _ in range(count):
            self.add(*pieces, b"together")
        self.publish()
        for _ in range(count):
            self.pop()

    @rule(last_first=st.booleans(), share=st.sampled_from([1.0, 1.0, 0.5]))
    def end_all(self, last_first: bool, share: float) -> None:
        while self.held:
            self.fill(-1 if last_first else 0, share, b"all.")
        self.flush()

    # -- always ----------------------------------------------------------------------------------------------------------

    @invariant()
    def no_notification_is_lost(self) -> None:
        if not hasattr(self, "driver"):
            return
        if self.offered and self.kicked_idx == self.avail_idx:
            assert not self.device_asleep, "buffers are offered, the driver has looked for a kick, and the device sleeps"
        if self.used and self.told_idx == self.used_idx:
            assert not self.driver_asleep, "buffers are used, the device has looked for an interrupt, and the driver sleeps"

    @invariant()
    def the_words_in_memory_are_the_models(self) -> None:
        if not hasattr(self, "driver"):
            return
        self.check_words()
        assert self.device.in_flight == len(self.held) + len(self.waiting) + len(self.filled)

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        self.publish()
        for _ in range(2 * self.size):
            self.pop()
        while self.held:
            self.fill(-1, 1.0, b"last")
        self.flush()
        for _ in range(2 * self.size):
            self.get_buf()
        assert self.driver.num_free == self.size
        assert self.driver.detach_unused_bufs() == []
        assert self.avail_idx == self.used_idx and self.returned == self.count


@pytest.mark.parametrize("event_idx", [True, False], ids=["event_idx", "flags"])
@pytest.mark.parametrize("segments", [0, 2, 10], ids=["direct", "indirect 2", "indirect 10"])
def test_every_buffer_comes_back_once_and_no_notification_is_lost(segments: int, event_idx: bool) -> None:
    play(Ring, event_idx, segments)


@pytest.mark.clause("BASIC-DEV-036")
@pytest.mark.parametrize(("segments", "event_idx"), [(0, True), (10, False)], ids=["direct-event_idx", "indirect 10-flags"])
def test_in_order_every_buffer_comes_back_in_the_order_it_was_offered(segments: int, event_idx: bool) -> None:
    play(Ring, event_idx, segments, in_order=True)


def play(ring: type[Ring], event_idx: bool, segments: int, *, in_order: bool = False) -> None:
    machine = type("Ring", (ring,), {"event_idx": event_idx, "segments": segments, "in_order": in_order})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=max(settings.default.max_examples // 2, 50),  # type: ignore[union-attr]
            stateful_step_count=60,
            suppress_health_check=list(HealthCheck),
        ),
    )


@given(
    readable=st.lists(st.integers(1, 3000), max_size=12),
    writable=st.lists(st.integers(1, 3000), max_size=12),
    size=st.sampled_from([4, 16, 32]),
    segments=st.sampled_from([0, 3, 24]),
)
def test_2_7_4_any_framing_arrives_as_it_was_cut(readable: list[int], writable: list[int], size: int, segments: int) -> None:
    count = len(readable) + len(writable)
    if not count or (count > segments and count > size):
        return
    driver, device, hand = pair(size, indirect=segments)
    pieces, at = [], DATA
    for length in [*readable, *writable]:
        pieces.append((at, length))
        at += length
    driver.add_sgs(pieces[: len(readable)], pieces[len(readable) :], "token")
    driver.publish()
    chain = device.pop()
    assert chain is not None
    assert [gpa_of(hand.memory, view) for view in [*chain.readable, *chain.writable]] == pieces
    assert len(chain.readable) == len(readable)
    device.fill(chain, sum(writable))
    device.flush()
    assert driver.get_buf() == ("token", sum(writable))
    assert driver.num_free == size
