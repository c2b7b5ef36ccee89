"""A hostile driver: whatever lies in guest memory, the device hangs not, crashes not and touches nothing outside memory.

Each hostile ring is tried three times: against ``SplitDevice.pop``, against a device behind its registers, and against the
device of a whole simulated machine.  The answer is DEVICE_NEEDS_RESET or, where the ring is well-formed and the request is
not, an error status; after a reset the device serves again.
"""

from __future__ import annotations

import errno
import itertools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vblklab as vb
from tests.support import (
    DISCARD,
    DRIVER_OK,
    F_EVENT_IDX,
    F_FLUSH,
    F_INDIRECT,
    FLUSH,
    GET_ID,
    IN,
    INDIRECT,
    NEEDS_RESET,
    NEXT,
    OUT,
    WRITE,
    Board,
    HandRing,
    Held,
    deadline,
    gpa_of,
)
from vblklab.iostack import Bio
from vblklab.memory import GuestMemory
from vblklab.ring import Chain, SplitDevice
from vblklab.ring.split import _kept_table

MEMORY = 1 << 18
TABLE, PLACE = 0x9000, 0x10000  # where tables and requests lie


@pytest.fixture(autouse=True)
def _no_hang(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests of drawn examples have a deadline for each of them instead."""
    if hasattr(request.function, "hypothesis"):
        yield
        return
    with deadline(120):
        yield


# -- hostile rings -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hostile:
    """A way to break the ring, what the error says, and of which section."""

    build: Callable[[HandRing, int], None]
    says: str
    section: str


HOSTILE: dict[str, Hostile] = {}


def hostile(says: str, section: str) -> Callable[[Callable[[HandRing, int], None]], Callable[[HandRing, int], None]]:
    def add(build: Callable[[HandRing, int], None]) -> Callable[[HandRing, int], None]:
        HOSTILE[build.__name__] = Hostile(build, says, section)
        return build

    return add


def request(ring: HandRing, *, kind: int = IN, data: int = 512) -> list[tuple[int, int, int]]:
    """A good request, to be spoilt: header, data, status."""
    ring.memory.write(PLACE, struct.pack("<IIQ", kind, 0, 0))
    return [(PLACE, 16, 0), (PLACE + 0x100, data, WRITE), (PLACE + 0x20, 1, WRITE)]


@hostile("a loop", "2.7.5")
def chain_to_itself(ring: HandRing, end: int) -> None:
    ring.desc(0, PLACE, 16, NEXT, 0)
    ring.offer(0)


@hostile("a loop", "2.7.5")
def chain_through_every_slot_and_back(ring: HandRing, end: int) -> None:
    for slot in range(ring.size):
        ring.desc(slot, PLACE, 16, NEXT, (slot + 1) % ring.size)
    ring.offer(0)


@hostile("a loop", "2.7.5")
def chain_into_a_loop_of_writable_ones(ring: HandRing, end: int) -> None:
    ring.desc(0, PLACE, 16, NEXT, 1)
    ring.desc(1, PLACE, 16, NEXT | WRITE, 2)
    ring.desc(2, PLACE, 16, NEXT | WRITE, 1)
    ring.offer(0)


@hostile("descriptor.next", "2.7.5")
def next_out_of_range(ring: HandRing, end: int) -> None:
    ring.desc(0, PLACE, 16, NEXT, ring.size)
    ring.offer(0)


@hostile("descriptor.next", "2.7.5")
def next_far_out_of_range(ring: HandRing, end: int) -> None:
    ring.desc(0, PLACE, 16, NEXT, 65535)
    ring.offer(0)


@hostile("outside memory", "2.7.5")
def address_outside_memory(ring: HandRing, end: int) -> None:
    ring.chain([*request(ring)[:1], (end + 0x1000, 512, WRITE), (PLACE + 0x20, 1, WRITE)])
    ring.offer(0)


@hostile("outside memory", "2.7.5")
def address_one_byte_beyond_memory(ring: HandRing, end: int) -> None:
    ring.chain([*request(ring)[:1], (end - 511, 512, WRITE), (PLACE + 0x20, 1, WRITE)])
    ring.offer(0)


@hostile("outside memory", "2.7.5")
def address_that_wraps(ring: HandRing, end: int) -> None:
    ring.chain([(2**64 - 16, 32, 0), *request(ring)[1:]])
    ring.offer(0)


@hostile("outside memory", "2.7.5")
def address_that_wraps_to_good_memory(ring: HandRing, end: int) -> None:
    ring.chain([*request(ring)[:1], (2**64 - 2**31 + PLACE, 2**31, WRITE), (PLACE, 1, WRITE)])
    ring.offer(0)


@hostile("outside memory", "2.7.5")
def length_of_four_gigabytes(ring: HandRing, end: int) -> None:
    ring.chain([*request(ring)[:1], (PLACE, 2**32 - 1, WRITE), (PLACE + 0x20, 1, WRITE)])
    ring.offer(0)


@hostile("zero-length", "2.7.5")
def zero_length(ring: HandRing, end: int) -> None:
    ring.chain([*request(ring)[:1], (PLACE, 0, WRITE), (PLACE + 0x20, 1, WRITE)])
    ring.offer(0)


@hostile("zero-length", "2.7.5")
def zero_length_outside_memory(ring: HandRing, end: int) -> None:
    ring.chain([(2**64 - 1, 0, 0)])
    ring.offer(0)


@hostile("readable descriptor behind a device-writable", "2.7.4.2")
def readable_after_writable(ring: HandRing, end: int) -> None:
    header, data, status = request(ring)
    ring.chain([data, header, status])
    ring.offer(0)


@hostile("jumped", "2.7.6")
def avail_idx_one_too_far(ring: HandRing, end: int) -> None:
    ring.chain(request(ring))
    ring.publish((ring.idx + ring.size + 1) & 0xFFFF)


@hostile("jumped", "2.7.6")
def avail_idx_far_away(ring: HandRing, end: int) -> None:
    ring.publish((ring.idx + 30_000) & 0xFFFF)


@hostile("jumped", "2.7.6")
def avail_idx_backwards(ring: HandRing, end: int) -> None:
    ring.publish((ring.idx - 1) & 0xFFFF)


@hostile("available ring names", "2.7.6")
def head_out_of_range(ring: HandRing, end: int) -> None:
    ring.offer(ring.size)


@hostile("available ring names", "2.7.6")
def head_far_out_of_range(ring: HandRing, end: int) -> None:
    ring.offer(65535)


def _indirect(ring: HandRing, at: int, length: int, flags: int = 0, link: int = 0) -> None:
    ring.desc(0, at, length, INDIRECT | flags, link)
    ring.offer(0)


@hostile("no multiple of 16", "2.7.5.3")
def indirect_table_of_no_length(ring: HandRing, end: int) -> None:
    _indirect(ring, TABLE, 0)


@hostile("no multiple of 16", "2.7.5.3")
def indirect_table_of_odd_length(ring: HandRing, end: int) -> None:
    ring.table(TABLE, request(ring))
    _indirect(ring, TABLE, 47)


@hostile("at most", "2.7.5.3.1")
def indirect_table_too_long(ring: HandRing, end: int) -> None:
    _indirect(ring, TABLE, 16 * 4096)


@hostile("at most", "2.7.5.3.1")
def indirect_table_of_four_gigabytes(ring: HandRing, end: int) -> None:
    _indirect(ring, TABLE, 2**32 - 16)


@hostile("outside memory", "2.7.5")
def indirect_table_outside_memory(ring: HandRing, end: int) -> None:
    _indirect(ring, end - 32, 48)


@hostile("outside memory", "2.7.5")
def indirect_table_that_wraps(ring: HandRing, end: int) -> None:
    _indirect(ring, 2**64 - 16, 48)


@hostile("both INDIRECT and NEXT", "2.7.5.3.1")
def indirect_and_next(ring: HandRing, end: int) -> None:
    ring.table(TABLE, request(ring))
    ring.desc(1, PLACE + 0x20, 1, WRITE)
    _indirect(ring, TABLE, 48, NEXT, 1)


@hostile("inside an indirect table", "2.7.5.3.1")
def indirect_table_nested(ring: HandRing, end: int) -> None:
    ring.table(TABLE, request(ring))
    ring.table(TABLE + 0x100, [*request(ring)[:1], (TABLE, 48, INDIRECT)])
    _indirect(ring, TABLE + 0x100, 32)


@hostile("inside an indirect table", "2.7.5.3.1")
def indirect_table_in_itself(ring: HandRing, end: int) -> None:
    ring.table(TABLE, [(TABLE, 16, INDIRECT)])
    _indirect(ring, TABLE, 16)


@hostile("a loop", "2.7.5.3")
def indirect_table_with_a_loop(ring: HandRing, end: int) -> None:
    for i in range(4):
        ring.put("QIHH", TABLE + 16 * i, PLACE, 16, NEXT, (i + 1) % 4)
    _indirect(ring, TABLE, 64)


@hostile("a loop", "2.7.5.3")
def indirect_table_of_three_with_a_loop(ring: HandRing, end: int) -> None:
    for i in range(3):
        ring.put("QIHH", TABLE + 16 * i, PLACE, 16, NEXT, (i + 1) % 3)
    _indirect(ring, TABLE, 48)


@hostile("indirect descriptor.next", "2.7.5.3")
def indirect_next_out_of_range(ring: HandRing, end: int) -> None:
    ring.put("QIHH", TABLE, PLACE, 16, NEXT, 3)
    _indirect(ring, TABLE, 48)


@hostile("outside memory", "2.7.5")
def indirect_data_outside_memory(ring: HandRing, end: int) -> None:
    header, _, status = request(ring)
    ring.table(TABLE, [header, (end - 1, 512, WRITE), status])
    _indirect(ring, TABLE, 48)


@hostile("outside memory", "2.7.5")
def indirect_status_outside_memory(ring: HandRing, end: int) -> None:
    ring.table(TABLE, [*request(ring)[:2], (end, 1, WRITE)])
    _indirect(ring, TABLE, 48)


@hostile("outside memory", "2.7.5")
def indirect_header_that_wraps(ring: HandRing, end: int) -> None:
    ring.table(TABLE, [(2**64 - 8, 16, 0), *request(ring)[1:]])
    _indirect(ring, TABLE, 48)


@hostile("zero-length", "2.7.5")
def indirect_zero_length(ring: HandRing, end: int) -> None:
    header, _, status = request(ring)
    ring.table(TABLE, [header, (PLACE, 0, WRITE), status])
    _indirect(ring, TABLE, 48)


@hostile("readable descriptor behind", "2.7.4.2")
def indirect_readable_after_writable(ring: HandRing, end: int) -> None:
    header, data, status = request(ring)
    ring.table(TABLE, [data, header, status])
    _indirect(ring, TABLE, 48)


@hostile("readable descriptor behind", "2.7.4.2")
def indirect_readable_after_direct_writable(ring: HandRing, end: int) -> None:
    header, data, _ = request(ring)
    ring.table(TABLE, [header])
    ring.desc(0, data[0], data[1], WRITE | NEXT, 1)
    ring.desc(1, TABLE, 16, INDIRECT)
    ring.offer(0)


@pytest.fixture(params=HOSTILE, ids=str)
def bad(request: pytest.FixtureRequest) -> Hostile:
    return HOSTILE[request.param]


def pieces_of(ring: HandRing, chain: Chain) -> list[tuple[int, int, int]]:
    """What a chain really holds: (gpa, length, WRITE or 0)."""
    return [(*gpa_of(ring.memory, view), flag) for views, flag in ((chain.readable, 0), (chain.writable, WRITE)) for view in views]


# -- against pop -------------------------------------------------------------------------------------------------------------


def a_queue(size: int = 8, *, indirect: bool = True, start: int = 65530) -> tuple[HandRing, SplitDevice]:
    memory = GuestMemory(bytearray(MEMORY))
    ring = HandRing(memory, size, start=start)
    device = SplitDevice(memory, ring.layout, indirect=indirect, chain_max=128)
    for name in vars(device):
        if name.endswith("_idx") and name != "event_idx":
            setattr(device, name, start)
    return ring, device


@pytest.mark.parametrize("start", [0, 65535])
def test_pop_rejects(bad: Hostile, start: int) -> None:
    ring, device = a_queue(start=start)
    bad.build(ring, MEMORY)
    before = bytes(ring.memory.bytes)
    for _ in range(2):  # and it does not get past the bad entry
        with pytest.raises(vb.VirtioError, match=bad.says) as error:
            device.pop()
        assert error.value.section == bad.section
        assert bytes(ring.memory.bytes) == before
    assert device.in_flight == 0


def test_2_7_5_3_1_pop_rejects_an_indirect_descriptor_that_was_not_negotiated() -> None:
    ring, device = a_queue(indirect=False)
    ring.table(TABLE, request(ring))
    _indirect(ring, TABLE, 48)
    with pytest.raises(vb.VirtioError, match="was not negotiated"):
        device.pop()


def test_2_7_13_pop_rejects_a_head_that_is_offered_again_and_again() -> None:
    """A driver that never looks at the used ring cannot make the device hold more buffers than the queue has."""
    ring, device = a_queue(size=4)
    ring.chain([(PLACE, 16, 0)])
    for _ in range(4):
        ring.offer(0)
        assert device.pop() is not None
    ring.offer(0)
    with pytest.raises(vb.VirtioError, match="in flight"):
        device.pop()


@pytest.mark.parametrize("size", [1, 2, 8])
def test_pop_takes_a_chain_of_exactly_the_queues_size(size: int) -> None:
    ring, device = a_queue(size)
    ring.chain([(PLACE + 32 * i, 16, 0) for i in range(size)])
    ring.offer(0)
    chain = device.pop()
    assert chain is not None and len(chain.readable) == size


@pytest.mark.clause("SPLIT-DEV-002")
def test_2_7_5_3_1_the_longest_table_is_what_the_owner_says() -> None:
    ring, device = a_queue()
    _indirect(ring, *ring.table(TABLE, [(PLACE, 1, 0)] * 128))
    chain = device.pop()
    assert chain is not None and len(chain.readable) == 128
    _indirect(ring, *ring.table(TABLE, [(PLACE, 1, 0)] * 129))
    with pytest.raises(vb.VirtioError, match="at most 128"):
        device.pop()


def test_tables_of_every_length_do_not_pile_up() -> None:
    """What is kept for speed is bounded, whatever lengths a driver sends."""
    memory = GuestMemory(bytearray(MEMORY))
    ring = HandRing(memory, 8)
    device = SplitDevice(memory, ring.layout, chain_max=1024)
    pieces = [(PLACE, 1, 0)] * 1024
    ring.table(0x8000, pieces)
    for entries in range(1, 1025):
        ring.put("HH", 0x8000 + 16 * entries - 4, 0, 0)
        ring.desc(0, 0x8000, 16 * entries, INDIRECT)
        ring.offer(0)
        chain = device.pop()
        assert chain is not None and len(chain.readable) == entries
        device.detach(chain)
        ring.put("HH", 0x8000 + 16 * entries - 4, NEXT, entries)
    assert _kept_table.cache_info().currsize < 140


@pytest.mark.clause("SPLIT-DEV-007")
@pytest.mark.parametrize("entries", [1, 2, 3, 4, 10, 128])
def test_2_7_5_3_2_write_on_the_descriptor_of_a_table_is_disregarded(entries: int) -> None:
    ring, device = a_queue()
    pieces = [(PLACE + 64 * i, 8 + i, 0 if i < entries // 2 else WRITE) for i in range(entries)]
    at, length = ring.table(TABLE, pieces)
    _indirect(ring, at, length, WRITE)
    chain = device.pop()
    assert chain is not None
    got = pieces_of(ring, chain)
    assert got == pieces


@pytest.mark.clause("SPLIT-DEV-008")
@pytest.mark.parametrize("direct", [0, 1, 2, 5])
def test_2_7_5_3_2_direct_descriptors_may_end_in_one_table(direct: int) -> None:
    ring, device = a_queue()
    pieces = [(PLACE + 64 * i, 8 + i, 0 if i < 4 else WRITE) for i in range(8)]
    at, length = ring.table(TABLE, pieces[direct:])
    ring.chain([*pieces[:direct], (at, length, INDIRECT)])
    ring.offer(0)
    chain = device.pop()
    assert chain is not None
    assert pieces_of(ring, chain) == pieces


def test_2_7_5_3_a_table_is_followed_by_next_and_not_by_place() -> None:
    ring, device = a_queue()
    ring.put("QIHH", TABLE, PLACE, 16, NEXT, 3)
    ring.put("QIHH", TABLE + 16, 2**64 - 1, 0xFFFFFFFF, 0xFFFF, 0xFFFF)  # not in the chain
    ring.put("QIHH", TABLE + 32, PLACE + 0x20, 1, WRITE, 9999)
    ring.put("QIHH", TABLE + 48, PLACE + 0x100, 512, WRITE | NEXT, 2)
    _indirect(ring, TABLE, 64)
    chain = device.pop()
    assert chain is not None
    assert [gpa_of(ring.memory, view) for view in [*chain.readable, *chain.writable]] == [
        (PLACE, 16),
        (PLACE + 0x100, 512),
        (PLACE + 0x20, 1),
    ]


# -- garbage, against a second reader of the specification ---------------------------------------------------------------------


class Refused(Exception):
    """The second reader finds the ring broken."""


def second_reader(
    memory: bytes | memoryview, ring: HandRing, last: int, *, indirect: bool, longest: int
) -> list[tuple[int, int, int]] | None:
    """The next chain as (gpa, length, writable), None if there is none, Refused if it breaks the specification."""

    def word(at: int) -> int:
        return int.from_bytes(memory[at : at + 2], "little")

    waiting = (word(ring.avail_at + 2) - last) & 0xFFFF
    if waiting == 0:
        return None
    slot = word(ring.avail_at + 4 + 2 * (last % ring.size))
    if waiting > ring.size or slot >= ring.size:
        raise Refused
    out: list[tuple[int, int, int]] = []
    table, entries, inside, left = ring.desc_at, ring.size, False, ring.size
    while True:
        if slot >= entries or left == 0:
            raise Refused
        left -= 1
        gpa, length, flags, link = struct.unpack_from("<QIHH", memory, table + 16 * slot)
        if flags & INDIRECT:
            if inside or not indirect or flags & NEXT or not length or length % 16 or length // 16 > max(longest, ring.size):
                raise Refused
            if gpa + length > len(memory):
                raise Refused
            table, entries, inside, left, slot = gpa, length // 16, True, length // 16, 0
            continue
        if not length or gpa + length > len(memory) or (out and out[-1][2] and not flags & WRITE):
            raise Refused
        out.append((gpa, length, flags & WRITE))
        if not flags & NEXT:
            return out
        slot = link


SIZE = 4
addresses = st.one_of(
    st.sampled_from(
        [0, 1, TABLE, TABLE + 16, TABLE + 48, PLACE, PLACE + 0x20, MEMORY - 1, MEMORY - 16, MEMORY, 2**64 - 1, 2**64 - 16, 2**63]
    ),
    st.integers(0x1000, 0x1100),  # the rings themselves
    st.integers(0, 2**64 - 1),
)
table_lengths = st.sampled_from([16, 32, 48, 48, 64, 80])
spans = st.one_of(st.sampled_from([0, 1, 16, 512, 513, 4096, 2**31, 2**32 - 1]), table_lengths, st.integers(0, 2**32 - 1))
flags = st.one_of(st.sampled_from([0, NEXT, NEXT, NEXT | WRITE, WRITE, INDIRECT]), st.integers(0, 7), st.integers(0, 0xFFFF))
links = st.one_of(st.integers(0, SIZE + 1), st.integers(0, 0xFFFF))
good_pieces = st.tuples(st.sampled_from([PLACE, PLACE + 0x20, PLACE + 0x100]), st.sampled_from([1, 16, 512]))
good = st.tuples(good_pieces, st.sampled_from([NEXT, NEXT, NEXT | WRITE, NEXT | WRITE, WRITE]), st.integers(0, 4)).map(
    lambda d: (*d[0], *d[1:])
)
tables = st.tuples(st.sampled_from([TABLE, TABLE, TABLE + 16, TABLE + 64]), table_lengths, st.just(INDIRECT), links)
descriptors = st.one_of(good, good, tables, st.tuples(addresses, spans, flags, links))


@dataclass
class Garbage:
    """A whole ring as a driver gone mad may have left it."""

    desc: list[tuple[int, int, int, int]]
    table: list[tuple[int, int, int, int]]
    heads: list[int]
    ahead: int
    avail_flags: int
    used_event: int
    header: tuple[int, int, int]

    def put(self, ring: HandRing) -> None:
        for i, desc in enumerate(self.desc):
            ring.put("QIHH", ring.desc_at + 16 * i, *desc)
        for i, desc in enumerate(self.table):
            ring.put("QIHH", TABLE + 16 * i, *desc)
        for i, head in enumerate(self.heads):
            ring.put("H", ring.avail_at + 4 + 2 * ((ring.idx + i) % ring.size), head)
        ring.avail_flags, ring.used_event = self.avail_flags, self.used_event
        ring.put("IIQ", PLACE, *self.header)
        ring.publish((ring.idx + self.ahead) & 0xFFFF)


u16, u64 = st.integers(0, 0xFFFF), st.integers(0, 2**64 - 1)
garbage = st.builds(
    Garbage,
    desc=st.lists(descriptors, min_size=SIZE, max_size=SIZE),
    table=st.lists(descriptors, min_size=6, max_size=6),
    heads=st.lists(st.one_of(st.integers(0, SIZE - 1), st.integers(0, SIZE - 1), u16), min_size=SIZE, max_size=SIZE),
    ahead=st.one_of(st.integers(1, SIZE), st.integers(0, SIZE + 1), u16),
    avail_flags=st.one_of(st.sampled_from([0, 1]), u16),
    used_event=u16,
    header=st.tuples(
        st.one_of(st.sampled_from([IN, OUT, FLUSH, GET_ID, DISCARD, 13]), st.integers(0, 2**32 - 1)),
        st.integers(0, 2**32 - 1),
        st.one_of(st.integers(0, 2100), u64),
    ),
)
many = settings(max_examples=settings.default.max_examples * 4, suppress_health_check=list(HealthCheck))  # type: ignore[union-attr]


@many
@given(
    junk=garbage, start=st.sampled_from([0, 65533, 65535]), indirect=st.booleans(), event_idx=st.booleans(), longest=st.sampled_from([0, 5])
)
@deadline(60)
def test_pop_and_a_second_reader_agree_about_garbage(junk: Garbage, start: int, indirect: bool, event_idx: bool, longest: int) -> None:
    ring, _ = a_queue(SIZE, start=start)
    device = SplitDevice(ring.memory, ring.layout, indirect=indirect, event_idx=event_idx, chain_max=longest)
    device.last_avail_idx = device._shadow_avail_idx = start
    junk.put(ring)
    snapshot = bytes(ring.memory.bytes)
    last = start
    for _ in range(SIZE + 2):
        try:
            expected = second_reader(snapshot, ring, last, indirect=indirect, longest=longest)
        except Refused:
            with pytest.raises(vb.VirtioError):
                device.pop()
            break
        chain = device.pop()
        if expected is None:
            assert chain is None
            break
        assert chain is not None
        got = pieces_of(ring, chain)
        assert got == expected
        assert chain.head == struct.unpack_from("<H", snapshot, ring.avail_at + 4 + 2 * (last % SIZE))[0]
        last = (last + 1) & 0xFFFF
    else:
        raise AssertionError("more chains than the queue has slots")
    now = bytes(ring.memory.bytes)
    event = ring.used_at + 4 + 8 * SIZE
    assert now[:event] == snapshot[:event] and now[event + 2 :] == snapshot[event + 2 :], "pop writes avail_event and nothing else"


def test_pop_and_a_second_reader_agree_about_every_table_of_three() -> None:
    """Three entries in order is what Linux sends and what the device takes in one look: every other table must not pass for it."""
    ring, device = a_queue(SIZE, start=0)
    _indirect(ring, TABLE, 48)
    places = (PLACE, 16), (PLACE + 0x100, 512), (PLACE + 0x20, 1)
    for words in itertools.product(*[(0, 1, 2, 3, 4, 9)] * 3, *[(0, 1, 2, 3)] * 3):
        for i, (gpa, length) in enumerate(places):
            ring.put("QIHH", TABLE + 16 * i, gpa, length, words[i], words[i + 3])
        device.last_avail_idx = device.in_flight = 0
        try:
            expected = second_reader(ring.memory.bytes, ring, 0, indirect=True, longest=128)
        except Refused:
            expected = None
        try:
            chain = device.pop()
        except vb.VirtioError:
            chain = None
        got = chain and [
            (*gpa_of(ring.memory, view), flag) for views, flag in ((chain.readable, 0), (chain.writable, WRITE)) for view in views
        ]
        assert got == expected, words


@many
@given(data=st.binary(min_size=16 * SIZE + 6 + 2 * SIZE, max_size=16 * SIZE + 6 + 2 * SIZE), place=st.binary(min_size=64, max_size=64))
@deadline(60)
def test_pop_of_random_bytes_returns_or_raises_a_virtio_error(data: bytes, place: bytes) -> None:
    ring, device = a_queue(SIZE, start=0)
    ring.memory.write(ring.desc_at, data)
    ring.memory.write(0, place)
    try:
        for _ in range(SIZE + 1):
            if device.pop() is None:
                break
        else:
            raise AssertionError("more chains than the queue has slots")
    except vb.VirtioError:
        pass


# -- against a device ----------------------------------------------------------------------------------------------------------


def boot(features: int | None = None, **options: Any) -> Board:
    return Board(queues=2, **options).boot(features)


def recovered(board: Board) -> None:
    """After a reset both queues serve."""
    board.reset()
    assert board.device.broken is None
    board.boot()
    assert board.works(0) and board.works(1)


@pytest.mark.clause("BASIC-DEV-003", "BASIC-DEV-004")
@pytest.mark.parametrize("event_idx", [True, False])
def test_2_1_2_the_device_asks_for_a_reset_and_serves_again_after_it(bad: Hostile, event_idx: bool) -> None:
    board = boot(F_INDIRECT | F_FLUSH | (F_EVENT_IDX if event_idx else 0))
    assert board.works(0) and board.works(1)
    bad.build(board.rings[0], MEMORY)
    board.notified.clear()
    board.kick(0)
    assert board.status() & (NEEDS_RESET | DRIVER_OK) == NEEDS_RESET | DRIVER_OK
    assert (board.config_interrupts, board.regs.read(0x060) & 2) == (1, 2), "a configuration change notification"
    assert board.rings[0].used() == [] and board.notified == []
    assert isinstance(board.regs.error, vb.VirtioError) and bad.says in str(board.regs.error)
    recovered(board)


def test_a_device_that_needs_a_reset_leaves_every_queue_alone(bad: Hostile) -> None:
    board = boot()
    bad.build(board.rings[0], MEMORY)
    board.kick(0)
    pieces = board.pieces(OUT, 5, data=b"x" * 512, slot=1)
    board.send(pieces, queue=1)
    assert board.rings[1].used() == []
    assert not any(entry[0] == "writev" for entry in board.store.log)
    board.kick(0)
    assert board.config_interrupts == 1, "it says so once"
    recovered(board)


def test_what_was_taken_before_the_bad_chain_is_answered() -> None:
    board = boot()
    ring = board.rings[0]
    pieces = board.pieces(IN, 0, room=512)
    head = ring.chain(pieces, slots=[4, 5, 6])
    ring.desc(0, PLACE, 16, NEXT, 0)
    ring.offer(head, 0)
    board.kick()
    assert board.status() & NEEDS_RESET
    assert ring.used() == [(head, 513)]


def test_2_4_a_reset_waits_for_what_is_in_flight_beside_the_bad_chain() -> None:
    engine = Held()
    board = boot(engine=engine)
    board.send(board.pieces(IN, 0, room=512, slot=1), queue=1)
    chain_to_itself(board.rings[0], MEMORY)
    board.kick(0)
    board.regs.write(0x070, 0)
    board.machine.run()
    assert board.status() & NEEDS_RESET, "the drive still writes to guest memory"
    engine.end()
    board.machine.run()
    assert board.status() == 0
    assert board.rings[1].used() == []


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ([(PLACE, 16, 0)], "status byte"),
        ([(PLACE, 16, 0), (PLACE + 0x100, 512, 0), (PLACE + 0x20, 1, 0)], "status byte"),
        ([(PLACE + 0x20, 1, WRITE)], "header"),
        ([(PLACE + 0x100, 512, WRITE), (PLACE + 0x20, 1, WRITE)], "header"),
        ([(PLACE, 15, 0), (PLACE + 0x20, 1, WRITE)], "header of 15 bytes"),
        ([(PLACE, 1, 0), (PLACE + 0x20, 1, WRITE)], "header of 1 bytes"),
        ([(PLACE, 8, 0), (PLACE + 8, 7, 0), (PLACE + 0x100, 512, WRITE), (PLACE + 0x20, 1, WRITE)], "header of 15 bytes"),
    ],
    ids=["no status", "status not writable", "status alone", "no header", "header short", "header of a byte", "header in two, short"],
)
def test_5_2_6_a_request_without_header_or_status_byte_needs_a_reset(pieces: list[tuple[int, int, int]], says: str) -> None:
    board = boot()
    board.memory.write(PLACE, struct.pack("<IIQ", OUT, 0, 0))
    board.send(pieces)
    assert board.status() & NEEDS_RESET
    assert says in str(board.regs.error)
    assert [entry for entry in board.store.log if entry[0] == "writev"] == []
    recovered(board)


def test_a_status_byte_inside_the_ring_breaks_nothing_but_the_drivers_own_ring() -> None:
    board = boot()
    ring = board.rings[0]
    board.send([(PLACE, 16, 0), (PLACE + 0x100, 512, WRITE), (ring.avail_at + 2, 1, WRITE)])
    recovered(board)


def test_data_read_over_the_ring_itself_is_the_drivers_own_loss() -> None:
    board = boot()
    ring = board.rings[0]
    board.store.bytes[:4096] = b"\xff" * 4096
    board.memory.write(PLACE, struct.pack("<IIQ", IN, 0, 0))
    board.send([(PLACE, 16, 0), (ring.desc_at & ~511, 512, WRITE), (PLACE + 0x20, 1, WRITE)])
    board.kick()
    recovered(board)


@settings(max_examples=settings.default.max_examples * 2, suppress_health_check=list(HealthCheck))  # type: ignore[union-attr]
@given(junk=garbage, more=garbage, both=st.booleans())
@deadline(60)
def test_a_device_survives_garbage_and_serves_after_a_reset(junk: Garbage, more: Garbage, both: bool) -> None:
    board = Board(queues=2, size=SIZE).boot()
    for queue, each in ((0, junk), (1, more))[: 1 + both]:
        each.put(board.rings[queue])
        board.kick(queue)
        board.kick(queue)
    status = board.status()
    assert status & DRIVER_OK
    assert bool(status & NEEDS_RESET) == (board.device.broken is not None) == bool(board.regs.read(0x060) & 2)
    recovered(board)


# -- against a machine ---------------------------------------------------------------------------------------------------------


class Machine:
    """A simulated machine whose application has ended, to be spoilt and repaired."""

    def __init__(self, kick: str = "ioeventfd") -> None:
        app = vb.Fio(rw="randrw", bs=4096, iodepth=4, number_ios=20, numjobs=2, verify="crc32", size=1 << 20)
        kvm = vb.Kvm(kick=kick, vcpus=2)
        recipe = vb.Pipeline(app=app, device=vb.VirtioBlkDevice(queues=2), queue=vb.Split(64), disk=vb.Ram(1 << 20), kvm=kvm)
        self.vm = recipe.boot(vb.SimMachine())
        while self.vm.step():
            pass
        self.said: list[str] = []  # why the device asked for a reset
        needs_reset = self.vm.device.on_needs_reset
        self.vm.device.on_needs_reset = lambda error: (self.said.append(str(error)), needs_reset(error))[1]  # type: ignore[func-returns-value]
        self.buffer = self.vm.pages.alloc(4096)

    def spoil(self, name: str, queue: int = 0) -> None:
        """A hostile ring in place of the driver's, and a kick."""
        vm = self.vm
        HOSTILE[name].build(HandRing.over(vm.memory, vm.driver.queues[queue].layout), vm.memory.size)
        vm.task(vm.transport.bus.notify(queue), "kick")
        vm.task(self._pause(1_000_000), "pause")

    def _pause(self, ns: int) -> Any:
        now = yield ("vm_interrupt",)
        yield vb.Wait(now + ns)

    def io(self, op: int, queue: int) -> int:
        """One I/O of 4 KiB through block layer, driver, device and back; returns its errno."""
        ended: list[int] = []

        def task() -> Any:
            wake = self.vm.scheduler.current.notify

            def end_io(bio: Bio) -> None:
                ended.append(bio.status)
                wake()

            yield from self.vm.iostack.submit_bio(Bio(op, 8 * queue, 4096, [(self.buffer, 4096)], 0, queue, end_io), None, wake)
            while not ended:
                yield vb.WAIT

        self.vm.task(task(), "io")
        return ended[0]

    def serves(self) -> bool:
        """Whether what is written to either queue is read back."""
        good = []
        for queue in (0, 1):
            data = bytes([queue + 65]) * 4096
            self.vm.memory.write(self.buffer, data)
            good.append(self.io(1, queue) == 0)
            self.vm.memory.write(self.buffer, bytes(4096))
            good.append(self.io(0, queue) == 0 and self.vm.memory.read(self.buffer, 4096) == data)
        return all(good)


@pytest.mark.parametrize("kick", ["ioeventfd", "mmio-exit"])
@pytest.mark.parametrize("queue", [0, 1])
def test_a_machine_recovers_from_hostile_rings_one_after_the_other(kick: str, queue: int) -> None:
    machine = Machine(kick)
    vm = machine.vm
    assert machine.serves()
    for name, bad in HOSTILE.items():
        machine.spoil(name, queue)
        assert bad.says in machine.said[-1], name
        assert vm.driver.failed is not None, "the driver was told"
        assert machine.io(0, 0) == machine.io(0, 1) == errno.EIO
        vm.task(vm.driver.restart())
        assert int(vm.device_status) == 15 and vm.device.broken is None
        assert machine.serves(), name
    run = vm.result()
    vm.close()
    assert (run.errors, run.mismatches) == (0, 0)


@pytest.mark.parametrize("kick", ["ioeventfd", "mmio-exit"])
@pytest.mark.parametrize("after", [1, 3, 20])
def test_every_io_of_a_ring_spoilt_in_mid_run_ends(after: int, kick: str) -> None:
    app = vb.Fio(rw="randread", bs=4096, iodepth=4, number_ios=40, numjobs=2, size=1 << 20)
    recipe = vb.Pipeline(
        app=app, device=vb.VirtioBlkDevice(queues=2), queue=vb.Split(8), disk=vb.Nvme(1 << 20), kvm=vb.Kvm(kick=kick, vcpus=2)
    )
    vm = recipe.boot(vb.SimMachine())
    for _ in range(after):
        vm.step_until("virtqueue_kick_prepare")  # something is published and not yet taken
    for ring in vm.driver.queues:
        vm.memory.write(ring.layout.avail + 4, b"\xff" * (2 * ring.size))
    run = vm.run()
    assert run.ios == 80
    assert 0 < run.errors <= 80
