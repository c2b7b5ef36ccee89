"""The same rings through the plain path, the batch path in Python and the compiled one: nothing may tell them apart.

Hypothesis draws rounds of requests, good and hostile, with the driver's event words and indices near the wrap; after each round guest
memory (rings, data, status bytes), the disk, the device's state and its notifications are compared.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import vblklab as vb
from tests.support import (
    DISCARD,
    F_EVENT_IDX,
    F_FLUSH,
    F_INDIRECT,
    FLUSH,
    GET_ID,
    IN,
    INDIRECT,
    NEXT,
    OUT,
    WRITE,
    WRITE_ZEROES,
    Board,
    HandRing,
)
from vblklab.disk.store import RamStore, open_image
from vblklab.engine.compiled import compiled_missing
from vblklab.memory import GuestMemory
from vblklab.ring import SplitDevice, SplitLayout

SECTORS, SIZE = 128, 8
PATHS = ["plain", "off", *([] if compiled_missing() else ["auto"])]
SLOT = 0x2000  # bytes of guest memory a request may use
DATA_AT = 0x10000


@dataclass(frozen=True)
class Sent:
    """One buffer: a request and how it lies in memory."""

    kind: int
    sector: int
    lengths: tuple[int, ...]  # of its data segments
    indirect: bool = True
    header: int = 16
    status: int = 1
    spoil: str = ""


SPOILS = [
    "",
    "",
    "",
    "",
    "",
    "",
    "",
    "nested",
    "loop",
    "link",
    "empty",
    "far",
    "order",
    "odd table",
    "no table",
    "next too",
    "twice",
    "ring",
]

sent = st.builds(
    Sent,
    kind=st.sampled_from([IN, IN, IN, OUT, OUT, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 77]),
    sector=st.one_of(st.integers(0, SECTORS - 1), st.sampled_from([SECTORS, SECTORS - 1, 2**55, 2**63, 2**64 - 1])),
    lengths=st.lists(st.sampled_from([512, 1024, 4096, 512, 1, 20, 16]), max_size=4).map(tuple),
    indirect=st.booleans(),
    header=st.sampled_from([16, 16, 16, 16, 7, 17]),
    status=st.sampled_from([1, 1, 1, 1, 3]),
    spoil=st.sampled_from(SPOILS),
)
usual = st.builds(Sent, kind=st.sampled_from([IN, OUT]), sector=st.integers(0, SECTORS - 8), lengths=st.just((4096,)))


@dataclass(frozen=True)
class Round:
    """Buffers published with one avail.idx, and what the driver says about interrupts."""

    buffers: tuple[Sent, ...]
    event: int  # used_event, from where used.idx stands
    no_interrupt: bool = False
    jump: int = 0  # added to avail.idx


rounds = st.lists(
    st.builds(
        Round,
        buffers=st.lists(st.one_of(usual, usual, sent), max_size=SIZE // 2).map(tuple),
        event=st.integers(-3, 5),
        no_interrupt=st.booleans(),
        jump=st.sampled_from([0] * 30 + [SIZE + 1, 40000]),
    ),
    min_size=1,
    max_size=6,
)


class Bench:
    """A device on one of the paths, over its own memory and its own disk."""

    def __init__(self, path: str, store: Any, features: int, start: int, inflight: bool = False, cut: int = 0, top: int = 0) -> None:
        self.board = Board(vb.VirtioBlkDevice(), store=store, memory_bytes=1 << 18)
        device, memory = self.board.device, self.board.memory
        if path != "plain":
            device.batch_path(self.board.notified.append, fast=path)
            assert device.explain()[0].startswith("batch path"), device.explain()
        self.ring = HandRing(memory, SIZE, at=0x1000, start=start)
        self.ring.publish(start)
        self.ring.put("H", self.ring.used_at + 2, start)
        self.record = Record() if inflight else None
        regions = [(0, memory.bytes[:cut]), (top or cut, memory.bytes[cut:])] if cut else [(0, memory.bytes)]
        self.cut, self.lift = cut, top - cut if top else 0
        self.queue = SplitDevice(
            GuestMemory.of_regions(regions),
            SplitLayout(SIZE, self.ring.desc_at, self.ring.avail_at, self.ring.used_at),
            event_idx=bool(features & F_EVENT_IDX),
            indirect=bool(features & F_INDIRECT),
            chain_max=device.chain_max,
            last_avail_idx=start,
            used_idx=start,
            inflight=self.record,
        )
        self.features = features
        device.negotiated(features)
        device.start_queue(0, self.queue)
        self.board.machine.run()
        self.board.notified.clear()

    def play(self, one: Round) -> None:
        heads = []
        for i, each in enumerate(one.buffers):
            heads.append(self.lay(each, 2 * i, DATA_AT + i * SLOT))
            if each.spoil == "twice":
                heads.append(heads[-1])
        ring = self.ring
        if self.features & F_EVENT_IDX:
            ring.used_event = (self.queue.used_idx + one.event) & 0xFFFF
        else:
            ring.avail_flags = int(one.no_interrupt)
        for head in heads[: SIZE - 1]:
            ring.put("H", ring.avail_at + 4 + 2 * (ring.idx % SIZE), head)
            ring.idx = (ring.idx + 1) & 0xFFFF
        ring.publish((ring.idx + one.jump) & 0xFFFF)
        self.board.device.kick(0)
        self.board.machine.run()

    def lay(self, each: Sent, slot: int, at: int) -> int:
        """Write one buffer; returns its head."""
        ring, memory = self.ring, self.board.memory
        memory.write(at, bytes(i * 7 + slot & 0xFF for i in range(SLOT)))
        memory.write(at, struct.pack("<IIQ", each.kind, 0, each.sector))
        memory.write(at + 0x80, struct.pack("<QII", each.sector & 0xFF, 8, 0))
        writes = WRITE if each.kind in (IN, GET_ID) else 0
        pieces = [(at, each.header, 0)]
        place = at + 0x80
        for length in each.lengths:
            pieces.append((place, length, writes))
            place += length % 0x700 + 16
        pieces.append((at + 0x40, each.status, WRITE))
        pieces = self.spoiled(each.spoil, [(self.gpa(place), length, flags) for place, length, flags in pieces])
        if each.indirect or len(pieces) > SIZE:
            table = at + SLOT - 0x100
            ring.table(table, pieces)
            length = 16 * len(pieces)
            if each.spoil == "loop":
                ring.put("H", table + 14, 0)
            elif each.spoil == "link":
                ring.put("H", table + 14, 200)
            elif each.spoil == "nested":
                ring.put("H", table + 12, INDIRECT | NEXT)
            length += {"odd table": 3, "no table": -length}.get(each.spoil, 0)
            ring.desc(slot % SIZE, self.gpa(table), length, INDIRECT | (NEXT if each.spoil == "next too" else 0), 0)
            return slot % SIZE
        slots = [(slot + i) % SIZE for i in range(len(pieces))]
        head = ring.chain(pieces, slots)
        if each.spoil == "loop":
            ring.put("H", ring.desc_at + 16 * slots[-1] + 12, WRITE | NEXT)
        elif each.spoil == "link":
            ring.put("H", ring.desc_at + 16 * slots[0] + 14, 200)
        return head

    def gpa(self, at: int) -> int:
        """The guest-physical address of what lies at ``at`` in the buffer."""
        return at + self.lift if at >= self.cut else at

    def spoiled(self, spoil: str, pieces: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        if spoil == "empty":
            pieces[len(pieces) // 2] = (pieces[0][0], 0, pieces[len(pieces) // 2][2])
        elif spoil == "far":
            pieces[1] = ((1 << 64) - 4096, pieces[1][1], pieces[1][2])
        elif spoil == "order":
            pieces.reverse()
        elif spoil == "ring":  # the data lies in the ring itself
            pieces[1] = (self.ring.used_at + 4, pieces[1][1], pieces[1][2])
        return pieces

    def seen(self) -> dict[str, Any]:
        """All that a driver, or the next path over the same memory, could tell apart."""
        device, queue = self.board.device, self.queue
        return {
            "memory": bytes(self.board.memory.bytes),
            "disk": b"".join(read_all(self.board.store)),
            "broken": str(device.broken),
            "indices": (queue.last_avail_idx, queue.used_idx, queue._flushed_idx, queue.in_flight, queue.notification),
            "signalled": (queue._signalled_idx if queue.event_idx else None, queue._signalled_valid),
            "inflight": self.record and bytes(self.record.view),
        }


class Record:
    """An in-flight region of vhost-user, written by its specification's words."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(16 + 16 * SIZE))
        self.counter = 0
        self.batch: list[int] = []

    def popped(self, head: int) -> None:
        struct.pack_into("<Q", self.view, 24 + 16 * head, self.counter)
        self.counter += 1
        self.view[16 + 16 * head] = 1

    def filled(self, head: int) -> None:
        self.view[22 + 16 * head : 24 + 16 * head] = self.view[12:14]
        struct.pack_into("<H", self.view, 12, head)
        self.batch.append(head)

    def flushed(self, used_idx: int) -> None:
        for head in self.batch:
            self.view[16 + 16 * head] = 0
        self.batch = []
        struct.pack_into("<H", self.view, 14, used_idx)


def read_all(store: Any) -> list[bytes]:
    data = bytearray(SECTORS << 9)
    store.readv(0, [memoryview(data)])
    return [bytes(data)]


def compare(benches: list[Bench], played: list[Round]) -> None:
    plain, *others = benches
    for number, one in enumerate(played):
        decided_before = plain.queue._signalled_valid  # the very first decision is always to notify
        for bench in benches:
            bench.board.notified.clear()
            bench.play(one)
        want = plain.seen()
        for bench in others:
            got = bench.seen()
            assert {k for k in want if want[k] != got[k]} == set(), f"round {number}"
            calls, plain_calls = len(bench.board.notified), len(plain.board.notified)
            assert bool(calls) == bool(plain_calls) and calls <= plain_calls, f"round {number}: {calls}, plain {plain_calls}"
            if plain.queue.event_idx and decided_before:
                assert calls == plain_calls, f"round {number}: one crossing of used_event, one call"


USUAL = Round((Sent(IN, 0, (4096,)), Sent(OUT, 9, (4096,)), Sent(IN, 9, (4096,))), event=1)


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)
@given(
    played=rounds,
    start=st.sampled_from([0, 65530, 65534, 32767]),
    event_idx=st.booleans(),
    indirect=st.booleans(),
    flush=st.booleans(),
    inflight=st.booleans(),
    cut=st.sampled_from([0, 0, 0, DATA_AT, DATA_AT + SLOT, DATA_AT + 0x300, DATA_AT + SLOT - 0xF0]),
)
@example(played=[USUAL, USUAL, USUAL], start=65530, event_idx=True, indirect=True, flush=True, inflight=True, cut=0)
@example(played=[USUAL, USUAL, USUAL], start=65534, event_idx=False, indirect=True, flush=False, inflight=False, cut=0)
@example(played=[USUAL, USUAL], start=0, event_idx=True, indirect=True, flush=True, inflight=False, cut=DATA_AT + SLOT)
def test_all_paths_leave_the_same_memory_status_used_entries_and_notifications(
    played: list[Round], start: int, event_idx: bool, indirect: bool, flush: bool, inflight: bool, cut: int
) -> None:
    features = F_EVENT_IDX * event_idx | F_INDIRECT * indirect | F_FLUSH * flush
    benches = []
    for path in PATHS:
        store = RamStore(SECTORS << 9)
        store.bytes[:] = bytes(i * 13 & 0xFF for i in range(SECTORS << 9))
        benches.append(Bench(path, store, features, start, inflight, cut))
    compare(benches, played)


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture], deadline=None)
@given(played=rounds, start=st.sampled_from([0, 65534]))
@example(played=[USUAL, USUAL], start=65530)
def test_the_same_over_an_image_file(played: list[Round], start: int, tmp_path: Path) -> None:
    benches = []
    for path in PATHS:
        (tmp_path / path).write_bytes(bytes(i * 13 & 0xFF for i in range(SECTORS << 9)))
        benches.append(Bench(path, open_image(str(tmp_path / path)), F_EVENT_IDX | F_INDIRECT | F_FLUSH, start))
    try:
        compare(benches, played)
    finally:
        for bench in benches:
            bench.board.store.close()


@pytest.mark.parametrize("path", ["off", pytest.param("auto", marks=pytest.mark.numba)])
def test_the_batch_path_is_really_taken(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(path, RamStore(SECTORS << 9), F_EVENT_IDX | F_INDIRECT | F_FLUSH, 0)
    one_by_one: list[int] = []
    monkeypatch.setattr(bench.queue, "pop", lambda: one_by_one.append(1))
    bench.play(USUAL)
    assert bench.queue.used_idx == 3 and not one_by_one
    assert bench.board.device._path is not None and bench.board.device._path.requests == 3


# -- any override is honoured ------------------------------------------------------------------------------------------------------


def nothing(*_: Any) -> Any: ...


@pytest.mark.parametrize("step", [step.name for step in vb.VirtioBlkDevice.STEPS] + ["handle_request", "complete_batch", "used_length"])
def test_an_overridden_step_chooses_the_plain_path_and_is_named(step: str) -> None:
    own = type("Own", (vb.VirtioBlkDevice,), {step: getattr(vb.VirtioBlkDevice, step)})
    changed = type("Changed", (vb.VirtioBlkDevice,), {step: nothing})
    for device, why in ((own(), None), (changed(), f"{step}: replaced by Changed.{step}")):
        board = Board(device, store=RamStore(SECTORS << 9))
        path = board.device.batch_path(nothing, fast="off")
        assert (path is None) == (why is not None)
        assert why is None or any(why in line for line in board.device.explain())
    board = Board(vb.VirtioBlkDevice(), store=RamStore(SECTORS << 9))
    setattr(board.device, step, nothing)
    assert board.device.batch_path(nothing) is None
    assert any(f"{step}: set on this device" in line for line in board.device.explain())


def test_a_patched_base_class_an_own_store_and_an_own_engine_choose_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnSync(vb.Sync):
        def flush(self) -> Any:
            yield from super().flush()

    assert "store LoggedStore" in reasons(Board())
    assert "OwnSync.flush" in reasons(Board(store=RamStore(1 << 16), engine=OwnSync()))
    assert "engine Simulated" in reasons(Board(store=RamStore(1 << 16), engine=vb.Simulated()))
    monkeypatch.setattr(vb.VirtioBlkDevice, "check", nothing)
    assert "step check: replaced by VirtioBlkDevice.check" in reasons(Board(store=RamStore(1 << 16)))


def reasons(board: Board) -> str:
    assert board.device.batch_path(nothing, fast="off") is None
    return " ".join(board.device.explain())


def test_a_ring_of_somebody_s_own_is_popped_through_its_own_method() -> None:
    popped = []

    class OwnRing(SplitDevice):
        def pop(self) -> Any:
            popped.append(self.last_avail_idx)
            return super().pop()

    bench = Bench("off", RamStore(SECTORS << 9), F_EVENT_IDX | F_INDIRECT | F_FLUSH, 0)
    bench.queue.__class__ = OwnRing
    bench.board.device.batch_path(bench.board.notified.append, fast="off")
    bench.play(USUAL)
    assert popped[:3] == [0, 1, 2] and bench.queue.used_idx == 3


# -- rings that come and go, steps that raise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_stopped_queue_pops_nothing_more_and_says_when_it_is_done(path: str) -> None:
    bench = Bench(path, RamStore(SECTORS << 9), F_EVENT_IDX | F_INDIRECT | F_FLUSH, 65530)
    bench.play(USUAL)
    done: list[int] = []
    bench.board.device.stop_queue(0, lambda: done.append(bench.queue.last_avail_idx))
    bench.play(USUAL)
    assert done == [65533] and bench.queue.used_idx == 65533
    bench.board.device.start_queue(0, bench.queue)
    bench.board.machine.run()
    assert bench.queue.used_idx == 0


@pytest.mark.parametrize("path", PATHS)
def test_heads_of_a_device_that_died_are_served_first(path: str) -> None:
    bench = Bench(path, RamStore(SECTORS << 9), F_EVENT_IDX | F_INDIRECT | F_FLUSH, 0)
    device = bench.board.device
    device.stop_queue(0, lambda: None)
    bench.board.machine.run()
    heads = [bench.lay(each, 2 * i, DATA_AT + i * SLOT) for i, each in enumerate(USUAL.buffers)]
    bench.ring.idx = 2
    bench.ring.publish(2)
    queue = SplitDevice(bench.board.memory, bench.queue.layout, chain_max=128, last_avail_idx=2, used_idx=0)
    device.start_queue(0, queue, resubmit=[heads[2], heads[0]])
    bench.board.machine.run()
    assert [head for head, _ in bench.ring.used()] == [heads[2], heads[0]]
    assert (queue.last_avail_idx, queue.in_flight) == (2, 0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("top", [(1 << 63) - (1 << 18), (1 << 63) - 4096, 1 << 63, (1 << 64) - (1 << 18)])
def test_guest_memory_may_lie_anywhere_in_64_bits(top: int, path: str) -> None:
    """The compiled loop counts in 63 bits: memory above them is the steps' work."""
    bench = Bench(path, RamStore(SECTORS << 9), F_EVENT_IDX | F_INDIRECT | F_FLUSH, 0, cut=DATA_AT, top=top)
    bench.play(USUAL)
    assert bench.board.device.broken is None and bench.queue.used_idx == len(USUAL.buffers)
    assert [bench.board.memory.bytes[DATA_AT + i * SLOT + 0x40] for i in range(len(USUAL.buffers))] == [0] * len(USUAL.buffers)


@pytest.mark.parametrize("step", [step.name for step in vb.VirtioBlkDevice.STEPS])
def test_an_exception_in_a_step_fails_its_request_and_no_other(step: str) -> None:
    told: list[BaseException] = []
    base = getattr(vb.VirtioBlkDevice, step)
    calls = 0

    def raises(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ZeroDivisionError("mine")
        return base(self, *args)

    device = type("Own", (vb.VirtioBlkDevice,), {step: raises})()
    board = Board(device, store=RamStore(SECTORS << 9)).boot()
    device.on_exception = told.append
    calls = 0
    statuses = [board.request(IN, 3, room=512)[0] for _ in range(4)]
    notified = step in ("push", "should_notify")
    assert [str(error) for error in told] == ["mine"]
    if step == "pop":  # the second call finds the ring empty; the third request is the fourth call or so
        assert statuses.count(0) == 4
    else:
        assert statuses == [0, 0 if notified else 1, 0, 0]
    assert board.works() and len(board.notified) >= 1 + notified, "what could not be decided is sent"
    told.clear()
    device.on_exception = None
    calls = 1
    with pytest.raises(ZeroDivisionError):
        board.request(IN, 3, room=512)


@pytest.mark.parametrize("path", PATHS[1:])
def test_polling_asks_for_no_kick_and_loses_no_buffer_when_it_ends(path: str) -> None:
    bench = Bench(path, RamStore(SECTORS << 9), F_INDIRECT | F_FLUSH, 0)
    device = bench.board.device
    device.poll_begin()
    assert bench.ring.used_flags == 1
    for i in range(4):
        bench.ring.offer(bench.lay(Sent(IN, i, (512,)), 2 * (i % 4), DATA_AT))
        assert device.poll_queues() is True
    assert bench.ring.used_idx == 4 and device.poll_queues() is False and bench.ring.used_flags == 1
    bench.ring.offer(bench.lay(Sent(IN, 1, (512,)), 0, DATA_AT))
    assert device.poll_end() is True and bench.ring.used_flags == 0
    bench.board.machine.run()
    assert bench.ring.used_idx == 5 and device._path is not None


def test_the_compiled_loop_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vblklab.engine.compiled.find_spec", nothing)
    bench = Bench("auto", RamStore(SECTORS << 9), F_INDIRECT | F_FLUSH, 0)
    assert bench.board.device.explain() == ["batch path: Python, memory"]
