"""Clauses of the packed virtqueue (VIRTIO 1.4 §2.8), looked at descriptor by descriptor."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

import vblklab as vb
from tests.guest.test_virtio_blk_driver import READ, Board, Quiet
from tests.ring.test_packed import AVAIL, INDIRECT, NEXT, USED, WRITE, desc, halves
from tests.support import finish, gpa_of
from vblklab.iostack import Bio
from vblklab.memory import GuestMemory, GuestPages
from vblklab.ring import Chain, PackedDevice, PackedDriver, PackedLayout

R, W = [(0x8000, 16)], [(0x9000, 512), (0xA000, 1)]


def bits(driver: PackedDriver) -> list[int]:
    """The AVAIL and USED bits of every slot."""
    return [desc(driver, slot)[3] & (AVAIL | USED) for slot in range(driver.size)]


def ring_bytes(driver: PackedDriver) -> list[bytes]:
    """Every slot as it lies in memory."""
    return [driver._memory.read(driver.layout.desc + 16 * slot, 16) for slot in range(driver.size)]


def pops(device: PackedDevice) -> list[Chain]:
    return list(iter(device.pop, None))


def use(device: PackedDevice, *chains: Chain, written: int = 0) -> None:
    for chain in chains:
        device.fill(chain, written)
    device.flush()


# -- the layout ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("PACKED-DRV-001", "PACKED-DRV-002", "PACKED-DRV-003")
@pytest.mark.parametrize("size", [1, 3, 8, 256])
def test_the_drivers_areas_are_aligned(size: int) -> None:
    layout = PackedLayout.alloc(GuestPages(GuestMemory(bytearray(1 << 16)), 0x1003), size)
    assert (layout.desc % 16, layout.avail % 4, layout.used % 4) == (0, 0, 0)


# -- the device's side ---------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("PACKED-DEV-001")
@pytest.mark.parametrize("start", [0, 6, 9])
def test_buffers_are_taken_in_ring_order(start: int) -> None:
    driver, device = halves(8, start)
    for turn in range(5):
        numbers = [driver.add_sgs([(0x8000 + 16 * i, 16)], [(0x9000, 1)], (turn, i)) for i in range(3)]
        driver.publish()
        chains = pops(device)
        assert [chain.head for chain in chains] == numbers
        assert [gpa_of(driver._memory, chain.readable[0])[0] for chain in chains] == [0x8000, 0x8010, 0x8020]
        use(device, *reversed(chains))
        while driver.get_buf():
            pass


@pytest.mark.clause("PACKED-DEV-002", "PACKED-DEV-003")
def test_used_descriptors_follow_each_other_in_completion_order() -> None:
    driver, device = halves(8)
    numbers = [driver.add_sgs(R, [], i) for i in range(4)]
    driver.publish()
    chains = pops(device)
    for i in (2, 0, 3):
        device.fill(chains[i], 0)
    assert driver.get_buf() is None and desc(driver, 1)[2] == numbers[0] and desc(driver, 0)[3] & USED == 0, (
        "the first one's flags are last"
    )
    device.flush()
    assert [desc(driver, slot)[2] for slot in range(3)] == [numbers[i] for i in (2, 0, 3)]
    use(device, chains[1])
    assert [driver.get_buf() for _ in range(5)] == [(2, 0), (0, 0), (3, 0), (1, 0), None]


@pytest.mark.clause("PACKED-DEV-004")
def test_the_device_half_writes_nothing_but_used_descriptors_and_its_event() -> None:
    driver, device = halves(8, indirect=4)
    memory, layout = driver._memory, driver.layout
    for _ in range(3):
        driver.add_sgs(R, W, "token")
    driver.publish()
    before = bytearray(memory.bytes)
    chains = pops(device)
    use(device, *chains, written=5)
    device.should_notify()
    device.set_notification(False)
    device.set_notification(True)
    device.recheck()
    after = bytearray(memory.bytes)
    for at, length in ((layout.desc, 16 * 8), (layout.used, 4)):
        before[at : at + length] = after[at : at + length] = bytes(length)
    assert after == before


@pytest.mark.clause("PACKED-DEV-006")
@pytest.mark.parametrize("start", [0, 4, 8])
def test_a_descriptor_is_left_alone_until_its_avail_bit_flips(start: int) -> None:
    driver, device = halves(4, start)
    lap = start // 4 & 1
    slot = driver.layout.desc + 16 * (start % 4)
    for old in (0, AVAIL | USED, AVAIL if lap else USED):  # never used, used in the lap before, available in the lap before
        driver._memory.write(slot, struct.pack("<QIHH", 0x8000, 16, 0, old))
        assert device.empty() and device.pop() is None
    driver._memory.write(slot, struct.pack("<QIHH", 0x8000, 16, 0, USED if lap else AVAIL))
    assert not device.empty() and device.pop() is not None
    assert device.pop() is None


@pytest.mark.clause("PACKED-DEV-007")
def test_a_used_descriptor_is_not_touched_again() -> None:
    driver, device = halves(8)
    for i in range(4):
        driver.add_sgs(R, W[:1], i)
    driver.publish()
    chains = pops(device)
    use(device, chains[0], written=7)
    kept = ring_bytes(driver)[0]
    for chain in chains[1:]:
        use(device, chain)
        device.should_notify()
        device.set_notification(False)
        device.set_notification(True)
        assert ring_bytes(driver)[0] == kept


@pytest.mark.clause("PACKED-DEV-008")
@pytest.mark.parametrize("indirect", [0, 8])
def test_the_elements_of_a_list_are_taken_as_they_were_supplied(indirect: int) -> None:
    driver, device = halves(8, 6, indirect=indirect)
    readable, writable = [(0x8000 + 64 * i, 8 + i) for i in range(3)], [(0x9000 - 64 * i, 20 + i) for i in range(3)]
    driver.add_sgs(readable, writable, "token")
    driver.publish()
    (chain,) = pops(device)
    assert [gpa_of(driver._memory, view) for view in chain.readable] == readable
    assert [gpa_of(driver._memory, view) for view in chain.writable] == writable


@pytest.mark.clause("PACKED-DEV-009")
def test_the_device_bounds_a_table_and_refuses_more() -> None:
    for entries in (8, 9):
        driver, device = halves(4, indirect=8)
        memory = driver._memory
        memory.write(0xC000, struct.pack("<QIHH", 0x8000, 16, 0, 0) * entries)
        memory.write(driver.layout.desc, struct.pack("<QIHH", 0xC000, 16 * entries, 0, INDIRECT | AVAIL))
        if entries == 8:
            assert len(pops(device)[0].readable) == 8
        else:
            with pytest.raises(vb.VirtioError, match="at most 8"):
                device.pop()


@pytest.mark.clause("PACKED-DEV-010")
def test_a_published_list_is_read_at_once_and_as_a_whole() -> None:
    driver, device = halves(8)
    driver.add_sgs(R, W, "a")
    driver.add_sgs(R, W, "b")
    driver.publish()
    assert [len(chain.writable) for chain in pops(device)] == [2, 2]


@pytest.mark.clause("PACKED-DEV-011")
@pytest.mark.parametrize("event_idx", [True, False])
def test_a_device_that_polls_is_not_kicked(event_idx: bool) -> None:
    driver, device = halves(8, event_idx=event_idx)
    device.set_notification(False)
    for _ in range(20):
        driver.add_sgs(R, [], "token")
        driver.publish()
        assert not driver.kick_prepare()
        use(device, *pops(device))
        assert driver.get_buf()


# -- the driver's side ---------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("PACKED-DRV-004", "PACKED-DRV-012", "PACKED-DRV-013")
def test_a_slot_is_written_again_only_when_its_buffer_was_used() -> None:
    driver, device = halves(8)
    for i in range(4):
        driver.add_sgs(R, W[:1], i)
    driver.publish()
    chains = pops(device)
    held = ring_bytes(driver)
    for readable, writable in ((R, []), (R, W), (R * 4, W * 2)):
        with pytest.raises(vb.QueueFull):
            driver.add_sgs(readable, writable, "too early")
        assert ring_bytes(driver) == held
    use(device, chains[2])
    held = ring_bytes(driver)
    with pytest.raises(vb.QueueFull):
        driver.add_sgs(R, [], "used, but not seen")
    assert driver.get_buf() == (2, 0)
    with pytest.raises(vb.QueueFull):
        driver.add_sgs(R, W, "a list of 3 where 2 are free")
    driver.publish()
    assert ring_bytes(driver) == held and device.empty(), "nothing of a list that does not fit"
    driver.add_sgs(R, W[:1], "now")
    assert ring_bytes(driver)[2:] == held[2:]


@pytest.mark.clause("PACKED-DRV-005")
def test_an_available_descriptor_is_not_touched_again() -> None:
    driver, device = halves(8)
    driver.add_sgs(R, W, "first")
    driver.publish()
    kept = ring_bytes(driver)[:3]
    actions: list[Callable[[], object]] = [
        lambda: driver.add_sgs(R, W, "second"),
        driver.publish,
        driver.kick_prepare,
        driver.disable_cb,
        driver.get_buf,
        driver.enable_cb,
        driver.enable_cb_check,
    ]
    for action in actions:
        action()
        assert ring_bytes(driver)[:3] == kept
    assert len(pops(device)) == 2 and ring_bytes(driver)[:3] == kept


@pytest.mark.clause("PACKED-DRV-010")
def test_a_list_longer_than_the_ring_is_a_mistake_and_not_a_full_ring() -> None:
    driver, _ = halves(4)
    before = ring_bytes(driver)
    with pytest.raises(vb.ConfigError, match="5 segments on a queue of 4"):
        driver.add_sgs(R * 5, [], "token")
    assert ring_bytes(driver) == before
    driver.add_sgs(R * 3, W[:1], "token")
    assert [flags & NEXT for *_, flags in (desc(driver, slot) for slot in range(4))] == [0, 1, 1, 0], "the first one is not shown yet"
    driver.publish()
    assert [flags & NEXT for *_, flags in (desc(driver, slot) for slot in range(4))] == [1, 1, 1, 0]


@pytest.mark.clause("PACKED-DRV-009", "PACKED-DRV-010", "PACKED-DRV-017", "PACKED-DRV-015")
@pytest.mark.parametrize("indirect", [True, False], ids=["indirect", "direct"])
@pytest.mark.parametrize(("seg_max", "size"), [(3, 32), (126, 8)])
def test_no_request_is_longer_than_the_device_or_the_ring_takes(indirect: bool, seg_max: int, size: int) -> None:
    board = Board(Quiet(indirect=indirect, seg_max=seg_max, packed=True), size=size)
    board.driver.attach(board.driver.pages, board.driver.transport, board.stack, queue_size=size, packed=True)
    finish(board.driver.probe())
    segments = [(0x300000 + 8192 * i, 512) for i in range(2 * min(seg_max, size - 2))]
    finish(board.stack.submit_bio(Bio(READ, 0, 512 * len(segments), segments, 1, 0, lambda bio: None), None, lambda: None))
    layout = board.driver.queues[0].layout
    flags = [struct.unpack("<QIHH", board.memory.read(layout.desc + 16 * slot, 16)) for slot in range(size)]
    assert any(each[3] & INDIRECT for each in flags) is indirect
    lengths, run = [], 0
    for _, length, _, each in flags:
        if each & (AVAIL | USED):
            run += length // 16 if each & INDIRECT else 1
            if not each & NEXT:
                lengths.append(run)
                run = 0
    assert max(lengths) == min(seg_max + 2, size)


@pytest.mark.clause("PACKED-DRV-011", "PACKED-DRV-018")
@pytest.mark.parametrize("indirect", [0, 4])
def test_readable_elements_come_first_and_tables_stand_alone(indirect: int) -> None:
    driver, _ = halves(16, indirect=indirect)
    for readable, writable in ((R, W), (R * 2, []), (R * 3, W), ([], W), (R, [])):
        driver.add_sgs(readable, writable, "token")
    driver.publish()
    inside, seen = False, []
    for _, length, _, flags in (desc(driver, slot) for slot in range(16)):
        if not flags & (AVAIL | USED) or not length:
            continue
        seen.append(("list" if inside or flags & NEXT else "alone", flags & INDIRECT))
        inside = bool(flags & NEXT)
    assert ("list", INDIRECT) not in seen
    assert (("alone", INDIRECT) in seen) is bool(indirect)
    for slot in range(16):
        at, length, _, flags = desc(driver, slot)
        if flags & INDIRECT:
            ways = [struct.unpack_from("<QIHH", driver._memory.read(at, length), 16 * i)[3] & WRITE for i in range(length // 16)]
            assert ways == sorted(ways)
        elif flags & NEXT and flags & WRITE:
            assert desc(driver, slot + 1)[3] & WRITE


@pytest.mark.clause("PACKED-DRV-014", "PACKED-DRV-019", "PACKED-DRV-020")
@pytest.mark.parametrize("start", [0, 6, 8])
def test_the_first_descriptor_is_shown_when_every_later_one_is_there(start: int) -> None:
    """What a device sees after each store: nothing, until the whole batch."""
    driver, device = halves(8, start)
    seen: list[int] = []

    class Watched:
        """The ring's words; a look is taken before each store."""

        def __init__(self, words: memoryview) -> None:
            self.words = words

        def __getitem__(self, at: int) -> int:
            return self.words[at]

        def __setitem__(self, at: int, value: int) -> None:
            seen.append(int(device.empty()))
            assert all(flags == driver._available(start + i) for i, flags in lap(1)), "a later descriptor is not there yet"
            self.words[at] = value

    def lap(first: int) -> list[tuple[int, int]]:
        return [(i, desc(driver, (start + i) % 8)[3] & (AVAIL | USED)) for i in range(first, 5)]

    driver._words = Watched(driver._words)  # type: ignore[assignment]
    driver.add_sgs(R, W, "first")
    assert device.empty()
    driver.add_sgs(R, W[:1], "second")
    assert device.empty()
    driver.publish()
    assert seen == [1] and len(pops(device)) == 2


@pytest.mark.clause("PACKED-DRV-021")
@pytest.mark.parametrize("look", ["kick_prepare", "enable_cb_check", "should_notify", "recheck"])
def test_the_other_sides_word_is_read_behind_the_fence(look: str) -> None:
    """The fence is the moment at which the other side's store arrives: what is read must be the new value."""
    driver, device = halves(8)
    memory, layout = driver._memory, driver.layout
    driver.add_sgs(R, W[:1], "token")
    driver.publish()
    (chain,) = pops(device)
    seen = []
    if look in ("kick_prepare", "should_notify"):
        event = layout.used if look == "kick_prepare" else layout.avail
        memory.write(event, struct.pack("<HH", 0, 1))
        arrives: Callable[[], object] = lambda: memory.write(event, struct.pack("<HH", 0, 0))  # noqa: E731
    elif look == "enable_cb_check":
        arrives = lambda: use(device, chain)  # noqa: E731
    else:
        arrives = lambda: (driver.add_sgs(R, [], "second"), driver.publish())  # noqa: E731
    if look == "should_notify":
        use(device, chain)
    half = driver if hasattr(driver, look) else device

    def fence() -> None:
        seen.append(bits(driver)[0])
        arrives()

    half.fence = fence
    assert getattr(half, look)() is (look in ("kick_prepare", "should_notify"))
    assert len(seen) == 1
    assert seen[0] & AVAIL, "what was published is in memory before the fence"


@pytest.mark.clause("PACKED-DRV-022")
@pytest.mark.parametrize("event_idx", [True, False])
def test_what_slipped_in_while_callbacks_were_off_is_seen_by_the_second_look(event_idx: bool) -> None:
    driver, device = halves(8, event_idx=event_idx)
    driver.disable_cb()
    driver.add_sgs(R, [], "token")
    driver.publish()
    use(device, *pops(device))
    assert not device.should_notify()
    driver.enable_cb()
    assert not driver.enable_cb_check() and driver.get_buf() == ("token", 0)
