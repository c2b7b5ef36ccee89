"""VIRTIO_F_IN_ORDER on both formats: descriptors in the table's order, one used element for a batch, nothing used before its turn."""

from __future__ import annotations

import struct
from typing import Any

import pytest

import vblklab as vb
from tests.ring.test_packed import halves
from tests.support import IN, NEXT, OUT, Board, Held, pair
from vblklab.ring.in_order import Offered

FORMATS = ["split", "packed"]


def both(form: str, size: int = 8, start: int = 0, **options: Any) -> tuple[Any, Any, Any]:
    """Driver half, device half, guest memory."""
    if form == "packed":
        driver, device = halves(size, start, in_order=True, **options)
        return driver, device, driver._memory
    split, other, hand = pair(size, start=start, in_order=True, **options)
    return split, other, hand.memory


def offer(driver: Any, *tokens: str, readable: int = 1, writable: int = 1) -> None:
    for token in tokens:
        driver.add_sgs([(0x8000 + 64 * i, 16) for i in range(readable)], [(0x9000 + 64 * i, 32) for i in range(writable)], token)
    driver.publish()


def taken(device: Any, count: int) -> list[Any]:
    return [device.pop() for _ in range(count)]


def returned(driver: Any) -> list[tuple[Any, int]]:
    found = []
    while (got := driver.get_buf()) is not None:
        found.append(got)
    return found


@pytest.mark.clause("BASIC-DEV-036")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("start", [0, 5, 65534])
def test_what_ends_early_waits_for_those_before_it(form: str, start: int) -> None:
    driver, device, _ = both(form, start=start)
    offer(driver, "a", "b", "c")
    a, b, c = taken(device, 3)
    device.fill(c, 32)
    device.fill(b, 32)
    assert device.flush() == 0 and not device.should_notify() and device.in_flight == 3
    assert driver.get_buf() is None and not driver.more_used()
    device.fill(a, 32)
    assert device.flush() == 3 and device.should_notify() and device.in_flight == 0
    assert returned(driver) == [("a", 32), ("b", 32), ("c", 32)]


def test_2_7_9_a_batch_of_a_split_ring_is_one_used_element_at_the_firsts_place() -> None:
    driver, device, hand = pair(8, start=65533, in_order=True)
    offer(driver, "a", "b", "c", "d")
    chains = taken(device, 4)
    before = [hand.get("II", hand.used_at + 4 + 8 * slot) for slot in range(8)]
    for chain in chains:
        device.fill(chain, 32)
    assert hand.used_idx == 65533
    device.flush()
    after = [hand.get("II", hand.used_at + 4 + 8 * slot) for slot in range(8)]
    assert hand.used_idx == 1 and after[65533 % 8] == (chains[-1].head, 32)
    assert [slot for slot in range(8) if after[slot] != before[slot]] == [65533 % 8]
    assert [got[0] for got in returned(driver)] == list("abcd")


def test_2_8_9_a_batch_of_a_packed_ring_is_one_used_descriptor_at_the_firsts_place() -> None:
    driver, device = halves(8, 6, in_order=True)
    offer(driver, "a", "b", "c")  # two descriptors each: slots 6 and 7, then 0 to 3 of the next lap
    before = driver._memory.read(driver.layout.desc, 128)
    chains = taken(device, 3)
    for chain in chains:
        device.fill(chain, 32)
    assert driver._memory.read(driver.layout.desc + 16 * 6 + 14, 2) == before[16 * 6 + 14 :][:2], "not flushed"
    assert device.flush() == 3
    after = driver._memory.read(driver.layout.desc, 128)
    assert [slot for slot in range(8) if after[16 * slot :][:16] != before[16 * slot :][:16]] == [6]
    assert struct.unpack_from("<IHH", after, 16 * 6 + 8) == (32, chains[-1].head, 2 | 1 << 7 | 1 << 15)
    assert [got[0] for got in returned(driver)] == list("abc")
    assert driver.num_free == 8


@pytest.mark.parametrize("form", FORMATS)
def test_the_skipped_buffers_of_a_batch_count_as_used_completely(form: str) -> None:
    driver, device, _ = both(form)
    driver.add_sgs([(0x8000, 16)], [(0x9000, 32), (0xA000, 1)], "a")
    driver.add_sgs([(0x8000, 16)], [], "b")
    driver.add_sgs([], [(0x9000, 32)], "c")
    driver.publish()
    a, b, c = taken(device, 3)
    device.fill(a, 33)
    device.fill(b, 0)
    device.fill(c, 7)
    device.flush()
    assert returned(driver) == [("a", 33), ("b", 0), ("c", 7)]


@pytest.mark.parametrize("form", FORMATS)
def test_a_buffer_that_was_not_written_completely_ends_its_batch(form: str) -> None:
    """What is said of a skipped buffer is that all of it was written: so it must not be skipped."""
    driver, device, _ = both(form)
    offer(driver, "a", "b", "c", "d", writable=1, readable=0)
    a, b, c, d = taken(device, 4)
    for chain, written in ((d, 32), (b, 5), (a, 32), (c, 0)):
        device.fill(chain, written)
    assert device.flush() == 4
    assert returned(driver) == [("a", 32), ("b", 5), ("c", 0), ("d", 32)]


@pytest.mark.clause("SPLIT-DRV-007")
def test_2_7_5_1_next_is_the_following_descriptor_and_0_behind_the_last() -> None:
    driver, device, hand = pair(8, start=0, in_order=True)
    for _ in range(5):
        offer(driver, "a", "b", readable=1, writable=2)
        links = [(slot, hand.read_desc(slot)) for slot in range(8)]
        assert all(link == (slot + 1) % 8 for slot, (_, _, flags, link) in links if flags & NEXT)
        heads = [chain.head for chain in taken(device, 2)]
        assert heads[1] == (heads[0] + 3) % 8
        for chain in [device.map_chain(head) for head in heads]:
            device.fill(chain, 64)
        device.flush()
        assert len(returned(driver)) == 2
    assert [hand.read_desc(slot)[3] for slot in range(7)] != [0] * 7


@pytest.mark.clause("SPLIT-DRV-012")
@pytest.mark.parametrize("count", [2, 3, 7, 12])
def test_2_7_5_3_1_an_indirect_table_links_each_entry_to_the_following_one(count: int) -> None:
    driver, device, hand = pair(4, start=0, in_order=True, indirect=12)
    for turn in range(6):
        offer(driver, "a", readable=1, writable=count - 1)
        head = turn % 4
        table, length, flags, _ = hand.read_desc(head)
        assert (length, flags) == (16 * count, 4)
        entries = [hand.get("QIHH", table + 16 * i) for i in range(count)]
        assert [entry[3] for entry in entries[:-1]] == list(range(1, count))
        chain = device.pop()
        assert chain.head == head
        device.fill(chain, 0)
        device.flush()
        assert returned(driver) == [("a", 0)]


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_left_after_a_reset_comes_in_the_order_it_was_offered(form: str) -> None:
    driver, device, _ = both(form)
    offer(driver, "a", "b", "c", "d")
    first, *_ = taken(device, 4)
    device.fill(first, 32)
    device.flush()
    assert returned(driver) == [("a", 32)]
    offer(driver, "e", readable=0)
    assert driver.detach_unused_bufs() == ["b", "c", "d", "e"]
    assert driver.num_free == 8 and driver.detach_unused_bufs() == []


@pytest.mark.parametrize("form", FORMATS)
def test_a_buffer_that_the_device_lets_go_of_does_not_hold_the_others_back(form: str) -> None:
    driver, device, _ = both(form)
    offer(driver, "a", "b", "c")
    a, b, c = taken(device, 3)
    device.detach(c)
    device.fill(b, 32)
    device.fill(a, 32)
    assert device.flush() == 2 and device.in_flight == 0
    assert returned(driver) == [("a", 32), ("b", 32)]


def test_a_split_device_that_skips_more_than_used_idx_says_is_found_out() -> None:
    driver, _, hand = pair(8, start=0, in_order=True)
    offer(driver, "a", "b", "c")
    for used, says in (((4, 0), "stands for 3 buffers"), ((7, 0), "not the head"), ((4, 33), "33 is more than")):
        driver.broken = None
        hand.put("II", hand.used_at + 4, *used)
        hand.put("H", hand.used_at + 2, 3 if used[1] else 2)
        driver._order.left = 0
        with pytest.raises(vb.VirtioError, match=says):
            driver.get_buf()
    assert driver.detach_unused_bufs() == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("number", "length", "says"), [(7, 0, "stands for 2 buffers"), (5, 0, "not in flight"), (6, 33, "33 is more than")]
)
def test_a_packed_device_that_skips_what_was_not_offered_is_found_out(number: int, length: int, says: str) -> None:
    driver, _ = halves(8, in_order=True)
    offer(driver, "a")
    driver.add_sgs([(0x8000, 16)], [(0x9000, 32)], "b")
    first, second = driver._order.ids  # type: ignore[union-attr]
    named = {7: second, 5: 5, 6: first}[number]
    driver._memory.write(driver.layout.desc, struct.pack("<QIHH", 0, length, named, 1 << 7 | 1 << 15))
    with pytest.raises(vb.VirtioError, match=says):
        driver.get_buf()
    assert driver.detach_unused_bufs() == ["a", "b"]


@pytest.mark.parametrize("event_idx", [True, False])
def test_2_7_9_what_a_virtio_blk_device_ends_together_is_one_used_element(event_idx: bool) -> None:
    engine = Held()
    board = Board(vb.VirtioBlkDevice(in_order=True, event_idx=event_idx), engine=engine, size=16, memory_bytes=1 << 19).boot()
    kinds = [IN, OUT, OUT, IN]
    for slot, kind in enumerate(kinds):
        framing = {"room": 512} if kind == IN else {"data": b"x" * 512}
        board.send(board.pieces(kind, slot, slot=slot, **framing), slots=range(3 * slot, 3 * slot + 3))
    for op in reversed(engine.started):
        engine.end(op)
    board.machine.run()
    ring = board.rings[0]
    assert ring.used_idx == 4
    assert ring.get("II", ring.used_at + 4) == (9, 513), "the last one's head at the first one's place"
    assert ring.memory.read(ring.used_at + 12, 3 * 8) == bytes(3 * 8), "nothing is written for the others"
    assert len(board.notified) == 1


@pytest.mark.parametrize("queue", [vb.Split(32, in_order=True), vb.Packed(32, in_order=True)], ids=repr)
def test_batches_of_a_whole_run_stand_for_several_buffers(queue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    batch = Offered.batch
    monkeypatch.setattr(Offered, "batch", lambda self, last, written: sizes.append(batch(self, last, written)) or sizes[-1])
    app = vb.Fio(rw="randrw", bs=4096, iodepth=12, number_ios=200, verify="crc32", size=1 << 20)
    run = vb.Pipeline(app=app, queue=queue, disk=vb.Ram(1 << 20)).run(vb.SimMachine())
    assert (run.ios, run.errors, run.mismatches) == (200, 0, 0)
    assert sum(sizes) >= 200 and max(sizes) > 1
