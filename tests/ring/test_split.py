"""Both halves of the split virtqueue, by hand: the bytes they write, what they make of the other side's, who is notified."""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import vblklab as vb
from tests.support import INDIRECT, NEXT, WRITE, HandRing, gpa_of, pair
from vblklab.memory import GuestMemory, GuestPages
from vblklab.ring import SplitDevice, SplitDriver, SplitLayout, need_event
from vblklab.ring.split import check_queue_size

DATA = 0x8000
READ = ([(DATA, 16)], [(DATA + 0x100, 512), (DATA + 0x400, 1)])
u16 = st.integers(0, 0xFFFF)


def bytes_of(ring: HandRing) -> dict[str, bytes]:
    """The three areas as they lie in memory."""
    areas = {"desc": (ring.desc_at, ring.avail_at), "avail": (ring.avail_at, ring.used_at), "used": (ring.used_at, ring.end)}
    return {name: ring.memory.read(start, end - start) for name, (start, end) in areas.items()}


def changed(ring: HandRing, action: Callable[[], object]) -> set[str]:
    """The areas whose bytes ``action`` changed."""
    before = bytes_of(ring)
    action()
    return {name for name, now in bytes_of(ring).items() if now != before[name]}


# -- the size and the layout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1 << bit for bit in range(16)])
def test_2_7_a_power_of_two_up_to_32768_is_a_queue_size(size: int) -> None:
    assert check_queue_size(size) == size
    vb.Split(size)


@pytest.mark.parametrize("size", [0, -1, -8, 3, 6, 100, 255, 65536, 1 << 20, 8.0, "8", None])
def test_2_7_another_queue_size_is_refused(size: Any) -> None:
    with pytest.raises(vb.ConfigError, match="power of two from 1 to 32768"):
        vb.Split(size)


@pytest.mark.clause("SPLIT-DRV-001", "SPLIT-DRV-002", "SPLIT-DRV-003", "SPLIT-DRV-021")
@pytest.mark.parametrize("size", [1, 2, 8, 256, 1024])
def test_2_7_areas_are_aligned_apart_and_zero(size: int) -> None:
    memory = GuestMemory(bytearray(b"\xa5" * (1 << 16)))
    layout = SplitLayout.alloc(GuestPages(memory, 0x1001), size)
    assert (layout.desc % 16, layout.avail % 2, layout.used % 4) == (0, 0, 0)
    areas = layout.areas()
    assert [length for _, length in areas] == [16 * size, 6 + 2 * size, 6 + 8 * size]
    assert all(start + length <= after for (start, length), (after, _) in pairwise(areas))
    assert all(memory.read(start, length) == bytes(length) for start, length in areas)


@pytest.mark.parametrize(
    "layout",
    [
        SplitLayout(8, 0x1008, 0x2000, 0x3000),
        SplitLayout(8, 0x1000, 0x2001, 0x3000),
        SplitLayout(8, 0x1000, 0x2000, 0x3002),
        SplitLayout(0, 0x1000, 0x2000, 0x3000),
        SplitLayout(6, 0x1000, 0x2000, 0x3000),
        SplitLayout(65536, 0x1000, 0x2000, 0x3000),
        SplitLayout(8, 0xFFF0, 0x2000, 0x3000),
        SplitLayout(8, 0x1000, 0xFFF0, 0x3000),
        SplitLayout(8, 0x1000, 0x2000, 0xFFF0),
        SplitLayout(8, 2**64 - 16, 0x2000, 0x3000),
    ],
    ids=str,
)
def test_2_7_a_device_refuses_a_ring_that_is_misaligned_misshapen_or_outside_memory(layout: SplitLayout) -> None:
    with pytest.raises(vb.VirtioError):
        SplitDevice(GuestMemory(bytearray(1 << 16)), layout)


# -- need_event --------------------------------------------------------------------------------------------------------------


@given(event=u16, old=u16, steps=st.integers(0, 300))
@example(event=65535, old=65535, steps=1)
@example(event=0, old=65535, steps=1)
@example(event=0, old=65535, steps=2)
@example(event=65534, old=65535, steps=300)
def test_2_7_10_need_event_is_that_the_event_was_passed(event: int, old: int, steps: int) -> None:
    passed = {(old + step) & 0xFFFF for step in range(steps)}
    assert need_event(event, (old + steps) & 0xFFFF, old) == (event in passed)


@given(old=u16, steps=st.integers(0, 40), near=st.integers(-3, 43))
def test_2_7_10_need_event_near_its_edges(old: int, steps: int, near: int) -> None:
    assert need_event((old + near) & 0xFFFF, (old + steps) & 0xFFFF, old) == (0 <= near < steps)


# -- what the driver writes --------------------------------------------------------------------------------------------------


@pytest.mark.clause("SPLIT-DRV-005", "SPLIT-DRV-006")
def test_2_7_5_a_buffer_is_a_chain_of_descriptors() -> None:
    driver, _, ring = pair()
    head = driver.add_sgs(*READ, token="a")
    first = ring.read_desc(head)
    second = ring.read_desc(first[3])
    third = ring.read_desc(second[3])
    assert first[:3] == (DATA, 16, NEXT)
    assert second[:3] == (DATA + 0x100, 512, NEXT | WRITE)
    assert third == (DATA + 0x400, 1, WRITE, 0)
    assert len({head, first[3], second[3]}) == 3
    assert driver.num_free == 5


@pytest.mark.clause("SPLIT-DRV-004", "SPLIT-DRV-006", "SPLIT-DRV-009", "SPLIT-DRV-011")
def test_2_7_5_3_an_indirect_buffer_is_one_descriptor_and_a_table() -> None:
    driver, _, ring = pair(indirect=4)
    head = driver.add_sgs(*READ, token="a")
    at, length, flags, link = ring.read_desc(head)
    assert (length, flags, link) == (48, INDIRECT, 0)
    table = list(struct.iter_unpack("<QIHH", ring.memory.read(at, length)))
    assert table == [(DATA, 16, NEXT, 1), (DATA + 0x100, 512, NEXT | WRITE, 2), (DATA + 0x400, 1, WRITE, 0)]
    assert driver.num_free == 7


def test_2_7_5_3_every_head_has_a_table_of_its_own() -> None:
    driver, _, ring = pair(indirect=4)
    heads = [driver.add_sgs([(DATA + 64 * i, 8)] * 2, [(DATA, 1)] * 2, i) for i in range(8)]
    spans = sorted(ring.read_desc(head)[:2] for head in heads)
    assert all(at + length <= after for (at, length), (after, _) in pairwise(spans))


@pytest.mark.clause("SPLIT-DRV-004")
@pytest.mark.parametrize("readable", [0, 1, 2, 5])
@pytest.mark.parametrize("writable", [0, 1, 2, 3])
@pytest.mark.parametrize("indirect", [0, 3, 8])
def test_2_7_4_the_device_sees_the_pieces_as_the_driver_cut_them(readable: int, writable: int, indirect: int) -> None:
    if not readable + writable:
        return
    driver, device, ring = pair(indirect=indirect)
    pieces = [(DATA + 0x40 * i, 1 + 7 * i) for i in range(readable + writable)]
    head = driver.add_sgs(pieces[:readable], pieces[readable:], "token")
    driver.publish()
    chain = device.pop()
    assert chain is not None
    assert chain.head == head
    assert [gpa_of(ring.memory, view) for view in chain.readable] == pieces[:readable]
    assert [gpa_of(ring.memory, view) for view in chain.writable] == pieces[readable:]


@pytest.mark.clause("SPLIT-DEV-023", "SPLIT-DRV-031")
def test_2_7_13_nothing_is_visible_before_it_is_published() -> None:
    driver, device, ring = pair(start=65535)
    driver.add_sgs(*READ, token="a")
    assert changed(ring, lambda: driver.add_sgs(*READ, token="b")) == {"desc", "avail"}
    assert ring.avail_idx == 65535
    assert device.empty()
    assert device.pop() is None
    assert changed(ring, driver.publish) == {"avail"}
    assert not device.empty()
    assert len(list(iter(device.pop, None))) == 2


def test_2_7_10_1_a_kick_is_for_what_is_published_and_not_for_what_another_context_has_added() -> None:
    driver, device, _ = pair()
    driver.add_sgs([(DATA, 4)], [], "mine")
    driver.publish()
    driver.add_sgs([(DATA, 4)], [], "another's")
    assert driver.kick_prepare()
    device.set_notification(False)
    assert device.pop() is not None
    device.set_notification(True)
    assert device.recheck(), "the device sleeps"
    driver.publish()
    assert driver.kick_prepare()


@pytest.mark.clause("SPLIT-DRV-013", "SPLIT-DRV-029")
def test_2_7_13_3_idx_runs_free_and_wraps() -> None:
    driver, device, ring = pair(size=4, start=65533)
    for turn in range(12):
        driver.add_sgs([(DATA, 4)], [], turn)
        driver.publish()
        assert ring.avail_idx == (65534 + turn) & 0xFFFF
        chain = device.pop()
        assert chain is not None
        device.fill(chain, 0)
        device.flush()
        assert ring.used_idx == (65534 + turn) & 0xFFFF
        assert driver.get_buf() == (turn, 0)
    assert driver.num_free == 4


@pytest.mark.clause("SPLIT-DEV-023", "SPLIT-DRV-028", "SPLIT-DRV-030")
def test_several_buffers_are_published_with_one_idx() -> None:
    driver, device, ring = pair(start=65534)
    heads = [driver.add_sgs([(DATA, 4)], [], i) for i in range(5)]
    driver.publish()
    assert ring.avail_idx == 3
    assert [chain.head for chain in iter(device.pop, None)] == heads


# -- a full ring -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("indirect", "each", "fit"), [(0, 1, 8), (0, 3, 2), (0, 8, 1), (4, 1, 8), (4, 3, 8), (4, 5, 1), (12, 10, 8)])
def test_a_full_ring_says_so_and_changes_nothing(indirect: int, each: int, fit: int) -> None:
    driver, device, ring = pair(indirect=indirect)
    pieces = [(DATA + 16 * i, 8) for i in range(each)]
    for i in range(fit):
        driver.add_sgs(pieces, [], i)
    free, idx = driver.num_free, driver.avail_idx

    def one_more() -> None:
        with pytest.raises(vb.QueueFull):
            driver.add_sgs(pieces, [], "too many")

    assert not changed(ring, one_more)
    assert (driver.num_free, driver.avail_idx) == (free, idx)
    driver.publish()
    assert len(list(iter(device.pop, None))) == fit


def test_a_full_ring_goes_on_after_one_completion() -> None:
    driver, device, _ = pair(size=4)
    for i in range(4):
        driver.add_sgs([(DATA, 4)], [], i)
    driver.publish()
    chains = list(iter(device.pop, None))
    device.fill(chains[2], 0)
    device.flush()
    assert driver.get_buf() == (2, 0)
    assert driver.add_sgs([(DATA, 4)], [], "next") == chains[2].head


@pytest.mark.clause("SPLIT-DRV-010")
@pytest.mark.parametrize(
    ("readable", "writable", "why"), [([], [], "without a segment"), ([(DATA, 1)] * 9, [], "9 segments on a queue of 8")]
)
def test_a_buffer_that_can_never_fit_is_a_mistake_and_not_a_full_queue(readable: Any, writable: Any, why: str) -> None:
    driver, _, _ = pair()
    with pytest.raises(vb.ConfigError, match=why):
        driver.add_sgs(readable, writable, "token")
    assert driver.num_free == 8


# -- completion --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indirect", [0, 4])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_2_7_14_buffers_come_back_in_the_devices_order(order: list[int], indirect: int) -> None:
    driver, device, _ = pair(size=16, indirect=indirect)
    for i in range(4):
        driver.add_sgs([(DATA, 4)], [(DATA + 0x100 * i, 64)], f"token {i}")
    driver.publish()
    chains = list(iter(device.pop, None))
    for i in order:
        device.fill(chains[i], 10 + i)
    assert driver.get_buf() is None, "filled is not published"
    assert device.flush() == 4
    assert [driver.get_buf() for _ in range(5)] == [*((f"token {i}", 10 + i) for i in order), None]
    assert driver.num_free == 16
    assert device.in_flight == 0


@pytest.mark.clause("SPLIT-DEV-015")
def test_2_7_8_fill_is_the_element_and_flush_is_the_idx() -> None:
    driver, device, ring = pair(start=65535)
    for i in range(2):
        driver.add_sgs([(DATA, 4)], [(DATA, 64)], i)
    driver.publish()
    first, second = device.pop(), device.pop()
    assert first is not None and second is not None
    device.fill(second, 33)
    device.fill(first, 44)
    assert ring.used_idx == 65535
    device.flush()
    assert ring.used_idx == 1
    assert ring.used() == [(second.head, 33), (first.head, 44)]
    assert device.flush() == 0


@pytest.mark.clause("SPLIT-DEV-003", "SPLIT-DEV-006")
def test_2_7_5_the_device_leaves_the_drivers_areas_alone() -> None:
    driver, device, ring = pair(indirect=4)
    driver.add_sgs(*READ, token="a")
    driver.publish()
    before = bytes(ring.memory.bytes)

    def serve() -> None:
        chain = device.pop()
        assert chain is not None
        device.fill(chain, 1)
        device.flush()
        device.should_notify()
        device.set_notification(False)
        device.set_notification(True)
        device.recheck()

    assert changed(ring, serve) == {"used"}
    after = bytes(ring.memory.bytes)
    assert after[: ring.used_at] + after[ring.end :] == before[: ring.used_at] + before[ring.end :]


def test_2_7_8_the_driver_leaves_the_used_ring_alone() -> None:
    driver, device, ring = pair()
    driver.add_sgs(*READ, token="a")
    driver.publish()
    chain = device.pop()
    assert chain is not None
    device.fill(chain, 1)
    device.flush()

    def drain() -> None:
        driver.disable_cb()
        driver.get_buf()
        driver.enable_cb()
        driver.enable_cb_check()
        driver.kick_prepare()

    assert changed(ring, drain) <= {"avail"}


def test_after_a_reset_the_driver_takes_back_what_never_came() -> None:
    driver, device, _ = pair(size=8)
    for i in range(3):
        driver.add_sgs([(DATA, 4)], [(DATA, 1)], f"token {i}")
    driver.publish()
    chain = device.pop()
    assert chain is not None
    device.fill(chain, 0)
    device.flush()
    assert driver.get_buf() == ("token 0", 0)
    assert sorted(map(str, driver.detach_unused_bufs())) == ["token 1", "token 2"]
    assert driver.num_free == 8
    assert driver.detach_unused_bufs() == []
    assert len({driver.add_sgs([(DATA, 4)], [], i) for i in range(8)}) == 8


def test_a_renewed_ring_is_out_of_reach_of_whoever_still_stands_in_the_old_one() -> None:
    old, _, ring = pair(indirect=4)
    for i in range(3):
        old.add_sgs([(DATA, 4)], [(DATA, 1)], i)
    old.publish()
    old.broken = vb.VirtioError("a reset")
    assert sorted(old.detach_unused_bufs()) == [0, 1, 2]
    new = old.renew(event_idx=True)
    assert new.layout == old.layout and new.num_free == 8
    assert not any(b"".join(bytes_of(ring).values())), "as fresh as an allocated one"

    def stale() -> None:
        old.publish()
        old.kick_prepare()
        assert old.get_buf() is None
        old.disable_cb()
        old.enable_cb()
        old.enable_cb_check()

    assert not changed(ring, stale)
    new.add_sgs([(DATA, 4)], [], "new")
    new.publish()
    chain = SplitDevice(ring.memory, new.layout).pop()
    assert chain is not None and chain.head == 0


def test_a_queues_number_is_in_the_key_of_its_chains() -> None:
    driver, device, _ = pair(number=3)
    head = driver.add_sgs(*READ, token="a")
    driver.publish()
    chain = device.pop()
    assert chain is not None
    assert chain.key == 3 << 16 | head


# -- a device that lies ------------------------------------------------------------------------------------------------------


def two_in_flight() -> tuple[SplitDriver, HandRing, list[int]]:
    driver, _, ring = pair(start=65535)
    heads = [driver.add_sgs([(DATA, 16)], [(DATA + 0x100, 512), (DATA + 0x400, 1)], i) for i in range(2)]
    driver.publish()
    return driver, ring, heads


def use(ring: HandRing, *elements: tuple[int, int]) -> None:
    """The device's side of the used ring by hand."""
    idx = ring.used_idx
    for head, length in elements:
        ring.put("II", ring.used_at + 4 + 8 * (idx % ring.size), head, length)
        idx = (idx + 1) & 0xFFFF
    ring.put("H", ring.used_at + 2, idx)


@pytest.mark.parametrize("head", [8, 9, 255, 65536, 2**31, 2**32 - 1])
def test_2_7_8_a_used_id_beyond_the_queue_breaks_it(head: int) -> None:
    driver, ring, _ = two_in_flight()
    use(ring, (head, 0))
    with pytest.raises(vb.VirtioError, match="not the head of a buffer in flight"):
        driver.get_buf()
    assert driver.broken is not None and driver.broken.section == "2.7.8"


def test_2_7_8_a_used_id_inside_a_chain_breaks_the_queue() -> None:
    driver, ring, heads = two_in_flight()
    use(ring, (ring.read_desc(heads[0])[3], 0))
    with pytest.raises(vb.VirtioError, match="not the head"):
        driver.get_buf()


def test_2_7_8_a_used_id_that_was_never_offered_breaks_the_queue() -> None:
    driver, ring, heads = two_in_flight()
    free = next(
        slot for slot in range(8) if slot not in {*heads, *(ring.read_desc(head)[3] for head in heads)} and not ring.read_desc(slot)[1]
    )
    use(ring, (free, 0))
    with pytest.raises(vb.VirtioError, match="not the head"):
        driver.get_buf()


def test_2_7_8_a_buffer_used_twice_breaks_the_queue() -> None:
    driver, ring, heads = two_in_flight()
    use(ring, (heads[0], 513), (heads[0], 513))
    assert driver.get_buf() == (0, 513)
    with pytest.raises(vb.VirtioError, match="not the head"):
        driver.get_buf()


@pytest.mark.parametrize("length", [514, 529, 2**31, 2**32 - 1])
def test_2_7_8_2_a_used_length_beyond_the_writable_bytes_breaks_the_queue(length: int) -> None:
    driver, ring, heads = two_in_flight()
    use(ring, (heads[1], length))
    with pytest.raises(vb.VirtioError, match="more than the 513 writable bytes"):
        driver.get_buf()
    assert driver.broken is not None and driver.broken.section == "2.7.8.2"


def test_a_used_idx_that_jumps_gives_no_buffer_twice() -> None:
    driver, ring, heads = two_in_flight()
    use(ring, (heads[0], 1))
    ring.put("H", ring.used_at + 2, 30_000)
    got = []
    with pytest.raises(vb.VirtioError):
        while (buffer := driver.get_buf()) is not None:
            got.append(buffer)
    assert got == [(0, 1)]


def test_a_broken_queue_gives_nothing_more_but_what_is_detached() -> None:
    driver, ring, heads = two_in_flight()
    use(ring, (77, 0), (heads[0], 0))
    with pytest.raises(vb.VirtioError):
        driver.get_buf()
    assert driver.get_buf() is None
    assert driver.get_buf() is None
    assert driver.detach_unused_bufs() == [0, 1]


# -- suppression: the driver's kicks -----------------------------------------------------------------------------------------


@pytest.mark.clause("SPLIT-DRV-022", "SPLIT-DRV-023", "SPLIT-DRV-024")
@pytest.mark.parametrize("avail_event", [0, 65529, 65530, 65531, 1234])
@pytest.mark.parametrize(("flags", "kick"), [(0, True), (1, False)])
def test_2_7_10_1_without_event_idx_only_the_flag_decides_about_a_kick(flags: int, kick: bool, avail_event: int) -> None:
    driver, _, ring = pair(event_idx=False)
    ring.used_flags, ring.avail_event = flags, avail_event
    driver.add_sgs(*READ, token="a")
    driver.publish()
    assert driver.kick_prepare() is kick
    assert driver.kick_prepare() is False, "nothing new since"


@pytest.mark.clause("SPLIT-DRV-025", "SPLIT-DRV-026", "SPLIT-DRV-027")
@pytest.mark.parametrize("flags", [0, 1])
@pytest.mark.parametrize(("event", "kick"), [(0, True), (1, True), (2, True), (3, False), (-1, False), (-2, False), (30_000, False)])
def test_2_7_10_1_with_event_idx_only_the_event_decides_about_a_kick(event: int, kick: bool, flags: int) -> None:
    driver, _, ring = pair(size=16, start=65534)
    ring.used_flags, ring.avail_event = flags, (65534 + event) & 0xFFFF
    for i in range(3):
        driver.add_sgs(*READ, token=i)
    driver.publish()
    assert driver.kick_prepare() is kick


@pytest.mark.clause("SPLIT-DRV-026", "SPLIT-DRV-027")
@given(size=st.sampled_from([4, 16]), start=u16, offset=st.integers(-20, 20), batches=st.lists(st.integers(0, 4), max_size=8))
def test_2_7_10_1_a_kick_for_every_batch_that_passes_the_event(size: int, start: int, offset: int, batches: list[int]) -> None:
    driver, device, ring = pair(size=size, start=start)
    idx = start
    event = (start + offset) & 0xFFFF
    for count in batches:
        placed = [(idx + i) & 0xFFFF for i in range(count)]
        for _ in placed:
            driver.add_sgs([(DATA, 4)], [], "token")
        driver.publish()
        ring.avail_event = event
        assert driver.kick_prepare() == (event in placed)
        idx = (idx + count) & 0xFFFF
        device.notification = False  # so that pop leaves avail_event to the test
        for chain in iter(device.pop, None):
            device.fill(chain, 0)
        device.flush()
        while driver.get_buf():
            pass


# -- suppression: the device's interrupts ------------------------------------------------------------------------------------


def serve(driver: SplitDriver, device: SplitDevice, count: int) -> None:
    """``count`` buffers all the way to a published used element."""
    for _ in range(count):
        driver.add_sgs([(DATA, 4)], [], "token")
        driver.publish()
        chain = device.pop()
        assert chain is not None
        device.fill(chain, 0)
    device.flush()


@pytest.mark.clause("SPLIT-DEV-009", "SPLIT-DEV-010", "SPLIT-DEV-011")
@pytest.mark.parametrize("used_event", [0, 65530, 65531, 1234])
@pytest.mark.parametrize(("flags", "notify"), [(0, True), (1, False)])
def test_2_7_7_2_without_event_idx_only_the_flag_decides_about_an_interrupt(flags: int, notify: bool, used_event: int) -> None:
    driver, device, ring = pair(event_idx=False)
    ring.avail_flags, ring.used_event = flags, used_event
    for _ in range(3):
        serve(driver, device, 1)
        assert device.should_notify() is notify


@pytest.mark.clause("SPLIT-DEV-012", "SPLIT-DEV-013", "SPLIT-DEV-014")
@pytest.mark.parametrize("flags", [0, 1])
@pytest.mark.parametrize(("event", "notify"), [(0, True), (1, True), (2, True), (3, False), (-1, False), (30_000, False)])
def test_2_7_7_2_with_event_idx_only_the_event_decides_about_an_interrupt(event: int, notify: bool, flags: int) -> None:
    driver, device, ring = pair(size=16, start=65533)
    serve(driver, device, 1)
    device.should_notify()
    ring.avail_flags, ring.used_event = flags, (65534 + event) & 0xFFFF
    serve(driver, device, 3)
    assert device.should_notify() is notify


def test_2_7_7_2_the_first_used_buffer_is_always_told() -> None:
    """Before the first decision the device has nothing to compare with."""
    driver, device, ring = pair()
    ring.used_event = 12345
    serve(driver, device, 1)
    assert device.should_notify() is True
    serve(driver, device, 1)
    assert device.should_notify() is False


@pytest.mark.clause("SPLIT-DEV-013", "SPLIT-DEV-014")
@given(start=u16, offset=st.integers(-20, 20), batches=st.lists(st.integers(0, 4), max_size=8))
def test_2_7_7_2_an_interrupt_for_every_batch_that_passes_the_event(start: int, offset: int, batches: list[int]) -> None:
    driver, device, ring = pair(size=4, start=start)
    driver.disable_cb()
    serve(driver, device, 1)
    device.should_notify()
    idx = (start + 1) & 0xFFFF
    event = (start + offset) & 0xFFFF
    for count in batches:
        driver.get_buf()
        while driver.get_buf():
            pass
        serve(driver, device, count)
        placed = [(idx + i) & 0xFFFF for i in range(count)]
        ring.used_event = event
        assert device.should_notify() == (event in placed)
        idx = (idx + count) & 0xFFFF


# -- the words that each side writes -----------------------------------------------------------------------------------------


@pytest.mark.clause("SPLIT-DRV-014", "SPLIT-DRV-015", "SPLIT-DRV-016")
@pytest.mark.parametrize("event_idx", [True, False])
def test_2_7_7_1_the_drivers_flags_are_0_or_1_and_always_0_with_event_idx(event_idx: bool) -> None:
    driver, device, ring = pair(event_idx=event_idx)
    flags = []
    for action in (driver.disable_cb, driver.enable_cb, lambda: serve(driver, device, 1), driver.get_buf, driver.disable_cb):
        action()  # type: ignore[operator]
        flags.append(ring.avail_flags)
    assert flags == ([0, 0, 0, 0, 0] if event_idx else [1, 0, 0, 0, 1])


@pytest.mark.clause("SPLIT-DEV-018", "SPLIT-DEV-019", "SPLIT-DEV-020")
@pytest.mark.parametrize("event_idx", [True, False])
def test_2_7_10_2_the_devices_flags_are_0_or_1_and_always_0_with_event_idx(event_idx: bool) -> None:
    driver, device, ring = pair(event_idx=event_idx)
    flags = []
    for action in (lambda: device.set_notification(False), lambda: serve(driver, device, 1), lambda: device.set_notification(True)):
        action()
        flags.append(ring.used_flags)
    assert flags == ([0, 0, 0] if event_idx else [1, 1, 0])


@pytest.mark.parametrize("event_idx", [True, False])
def test_2_7_7_with_callbacks_on_taking_a_buffer_asks_to_be_told_of_the_next(event_idx: bool) -> None:
    driver, device, _ = pair(event_idx=event_idx)
    for _ in range(10):
        serve(driver, device, 1)
        assert device.should_notify()
        assert driver.get_buf() == ("token", 0)


@pytest.mark.clause("SPLIT-DRV-017")
def test_2_7_7_with_callbacks_off_no_batch_that_fits_the_queue_is_told() -> None:
    driver, device, _ = pair(size=8)
    serve(driver, device, 1)
    device.should_notify()
    assert driver.get_buf() == ("token", 0)
    driver.disable_cb()
    for _ in range(40):
        while driver.get_buf():
            pass
        serve(driver, device, 8)
        assert not device.should_notify()


@pytest.mark.parametrize("event_idx", [True, False])
def test_2_7_10_with_kicks_on_taking_a_buffer_asks_to_be_told_of_the_next(event_idx: bool) -> None:
    driver, device, _ = pair(event_idx=event_idx)
    for _ in range(5):
        driver.add_sgs([(DATA, 4)], [], "token")
        driver.publish()
        assert driver.kick_prepare()
        assert device.pop() is not None


@pytest.mark.clause("SPLIT-DEV-021", "SPLIT-DEV-024")
@pytest.mark.parametrize("event_idx", [True, False])
def test_2_7_10_with_kicks_off_nothing_is_kicked_but_what_was_asked_for_before(event_idx: bool) -> None:
    """With EVENT_IDX the device cannot take back the event it wrote: the batch that passes it is kicked, and no other."""
    driver, device, _ = pair(size=8, event_idx=event_idx)
    device.set_notification(False)
    kicks = []
    for _ in range(40):
        for _ in range(8):
            driver.add_sgs([(DATA, 4)], [], "token")
        driver.publish()
        kicks.append(driver.kick_prepare())
        for chain in iter(device.pop, None):
            device.fill(chain, 0)
        device.flush()
        while driver.get_buf():
            pass
    assert kicks == [event_idx] + [False] * 39


@pytest.mark.parametrize("event_idx", [True, False])
def test_a_side_that_asks_again_is_told_of_the_next_one(event_idx: bool) -> None:
    driver, device, _ = pair(event_idx=event_idx)
    for _ in range(3):
        device.set_notification(False)
        driver.disable_cb()
        serve(driver, device, 1)
        device.should_notify()
        while driver.get_buf():
            pass
        driver.enable_cb()
        device.set_notification(True)
        assert driver.enable_cb_check() and device.recheck()
        driver.add_sgs([(DATA, 4)], [], "token")
        driver.publish()
        assert driver.kick_prepare()
        chain = device.pop()
        assert chain is not None
        device.fill(chain, 0)
        device.flush()
        assert device.should_notify()
        assert driver.get_buf() == ("token", 0)


@pytest.mark.clause("SPLIT-DRV-033")
@pytest.mark.parametrize("event_idx", [True, False])
def test_2_7_14_what_slipped_in_while_callbacks_were_off_is_seen_by_the_second_look(event_idx: bool) -> None:
    driver, device, _ = pair(event_idx=event_idx)
    driver.disable_cb()
    driver.enable_cb()
    serve(driver, device, 1)
    assert not driver.enable_cb_check()
    assert driver.more_used()


@pytest.mark.parametrize("event_idx", [True, False])
def test_2_7_10_what_slipped_in_while_kicks_were_off_is_seen_by_the_second_look(event_idx: bool) -> None:
    driver, device, _ = pair(event_idx=event_idx)
    device.set_notification(False)
    assert device.pop() is None
    device.set_notification(True)
    driver.add_sgs([(DATA, 4)], [], "token")
    driver.publish()
    assert not device.recheck()


# -- fences ------------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("SPLIT-DRV-032")
@pytest.mark.parametrize(
    ("look", "word", "before", "after"),
    [
        ("kick_prepare", "avail_event", 12345, 65530),
        ("should_notify", "used_event", 12345, 65531),
        ("enable_cb_check", "used_idx", 65531, 65532),
        ("recheck", "avail_idx", 65531, 65532),
    ],
)
def test_2_7_13_4_the_other_sides_word_is_read_behind_the_fence(look: str, word: str, before: int, after: int) -> None:
    """The fence of this machine is the moment at which the other side's store arrives: what is read must be the new value."""
    driver, device, ring = pair()
    if look != "kick_prepare":
        serve(driver, device, 1)
        if look == "should_notify":
            device.should_notify()
            driver.add_sgs([(DATA, 4)], [], "second")
            driver.publish()
            chain = device.pop()
            assert chain is not None
            device.fill(chain, 0)
            device.flush()
        driver.get_buf()
    else:
        driver.add_sgs([(DATA, 4)], [], "token")
        driver.publish()
    gpa = {
        "avail_event": ring.used_at + 4 + 8 * ring.size,
        "used_event": ring.avail_at + 4 + 2 * ring.size,
        "used_idx": ring.used_at + 2,
        "avail_idx": ring.avail_at + 2,
    }[word]
    ring.put("H", gpa, before)
    fences = []

    def fence() -> None:
        fences.append(word)
        ring.put("H", gpa, after)

    half = driver if hasattr(driver, look) else device
    half.fence = fence
    said = getattr(half, look)()
    assert fences == [word]
    assert said is (look in ("kick_prepare", "should_notify"))


@pytest.mark.clause("SPLIT-DRV-032")
def test_2_7_13_the_published_idx_is_in_memory_before_the_fence() -> None:
    driver, _, ring = pair()
    driver.add_sgs([(DATA, 4)], [], "token")
    driver.publish()
    seen = []
    driver.fence = lambda: seen.append(ring.avail_idx)
    driver.kick_prepare()
    assert seen == [65531]


def test_ring_words_are_stored_whole() -> None:
    """struct.pack_into zeroes first and a peer process sees it: idx, flags and event words go through views of 16-bit words."""
    driver, device, _ = pair()
    for half in (driver, device):
        for view in (half._avail, half._used16):
            assert (view.format, view.itemsize) == ("H", 2)
