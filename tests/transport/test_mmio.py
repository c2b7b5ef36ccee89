"""virtio-mmio: the register file by plain calls, and the driver's face to it, watched by a bus that knows the specification."""

from __future__ import annotations

import struct
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vblklab as vb
from tests.support import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    F_CONFIG_WCE,
    F_DISCARD,
    F_EVENT_IDX,
    F_FLUSH,
    F_INDIRECT,
    F_MQ,
    F_VERSION_1,
    FAILED,
    FEATURES_OK,
    GET_ID,
    IN,
    NEEDS_RESET,
    OUT,
    Board,
    HandRing,
    Held,
    Trampoline,
    finish,
)
from vblklab.guest.virtio_blk import VirtioBlkDriver
from vblklab.iostack import IOStack
from vblklab.memory import GuestPages
from vblklab.transport import MmioTransport

MAGIC, VERSION, DEVICE_ID, VENDOR_ID, DEVICE_FEATURES, DEVICE_FEATURES_SEL = 0x000, 0x004, 0x008, 0x00C, 0x010, 0x014
DRIVER_FEATURES, DRIVER_FEATURES_SEL, QUEUE_SEL, QUEUE_SIZE_MAX, QUEUE_SIZE = 0x020, 0x024, 0x030, 0x034, 0x038
QUEUE_READY, QUEUE_NOTIFY, INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x044, 0x050, 0x060, 0x064, 0x070
ADDRESSES = {0x080, 0x084, 0x090, 0x094, 0x0A0, 0x0A4}
SHM, QUEUE_RESET, GENERATION, CONFIG = {0x0AC, 0x0B0, 0x0B4, 0x0B8, 0x0BC}, 0x0C0, 0x0FC, 0x100
READABLE = {MAGIC, VERSION, DEVICE_ID, VENDOR_ID, DEVICE_FEATURES, QUEUE_SIZE_MAX, QUEUE_READY, INTERRUPT_STATUS, STATUS, GENERATION}
WRITABLE = {DEVICE_FEATURES_SEL, DRIVER_FEATURES, DRIVER_FEATURES_SEL, QUEUE_SEL, QUEUE_SIZE, QUEUE_READY, QUEUE_NOTIFY, INTERRUPT_ACK}
WRITABLE |= {STATUS} | ADDRESSES
# A configuration field's offset → (bytes, the feature it belongs to), from the specification's structure
FIELDS = {0: (8, None), 8: (4, 1), 12: (4, 2), 16: (2, 4), 18: (1, 4), 19: (1, 4), 20: (4, 6), 24: (1, 10), 25: (1, 10), 26: (2, 10)}
FIELDS |= {28: (4, 10), 32: (1, 11), 34: (2, 12), 36: (4, 13), 40: (4, 13), 44: (4, 13), 48: (4, 14), 52: (4, 14), 56: (1, 14)}


@pytest.fixture
def board() -> Board:
    return Board(queues=2)


def negotiated(board: Board, features: int | None = None) -> Board:
    """Up to FEATURES_OK."""
    board.reset()
    board.regs.write(STATUS, ACKNOWLEDGE | DRIVER)
    assert board.accept(board.offered() if features is None else features | F_VERSION_1) & FEATURES_OK
    return board


# -- constant registers --------------------------------------------------------------------------------------------------------


@pytest.mark.clause("MMIO-DEV-001", "MMIO-DEV-002")
def test_4_2_2_1_identity_registers_read_what_the_specification_says(board: Board) -> None:
    assert [board.regs.read(offset) for offset in (MAGIC, VERSION, DEVICE_ID)] == [0x74726976, 2, 2]
    assert board.regs.read(VENDOR_ID) == int.from_bytes(b"vblk", "little")


@pytest.mark.parametrize("offset", [MAGIC, VERSION, DEVICE_ID, VENDOR_ID, QUEUE_SIZE_MAX, STATUS, GENERATION, DEVICE_FEATURES])
def test_a_read_only_register_ignores_stores_and_odd_widths(board: Board, offset: int) -> None:
    before = board.regs.read(offset)
    if offset != STATUS:
        board.regs.write(offset, 0xFFFFFFFF)
    for size in (1, 2, 8):
        assert board.regs.read(offset, size) == 0
        board.regs.write(offset, 1, size)
    assert board.regs.read(offset) == before


@pytest.mark.parametrize("offset", [*sorted(WRITABLE - READABLE), 0x018, 0x040, 0x0A8, 0x0C4, 0x0F8, 0x001, 0x006, QUEUE_RESET])
def test_a_write_only_or_unknown_register_reads_0(board: Board, offset: int) -> None:
    board.boot()
    for size in (1, 2, 4):
        assert board.regs.read(offset, size) == 0


@given(
    stores=st.lists(st.tuples(st.integers(0, 0x180), st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4])), max_size=40),
)
def test_no_store_to_any_offset_crashes_the_register_file(stores: list[tuple[int, int, int]]) -> None:
    board = Board(queues=2)
    for offset, value, size in stores:
        board.regs.write(offset, value & (1 << 8 * size) - 1, size)
        board.regs.read(offset, size)
        board.machine.run()
    board.boot()
    assert board.works(0) and board.works(1)


@pytest.mark.clause("BASIC-DEV-042")
def test_an_absent_shared_memory_region_has_all_ones(board: Board) -> None:
    for offset in sorted(SHM - {0x0AC}):
        assert board.regs.read(offset) == 0xFFFFFFFF


# -- status and features -------------------------------------------------------------------------------------------------------


def test_3_1_1_the_whole_handshake_step_by_step() -> None:
    board = Board(queues=1)
    regs = board.regs
    board.reset()
    assert regs.read(STATUS) == 0
    for bits in (ACKNOWLEDGE, ACKNOWLEDGE | DRIVER):
        regs.write(STATUS, bits)
        assert regs.read(STATUS) == bits
    offered = board.offered()
    assert offered & F_VERSION_1
    assert board.accept(offered) == ACKNOWLEDGE | DRIVER | FEATURES_OK
    assert regs.driver_features == offered
    regs.write(QUEUE_SEL, 0)
    assert regs.read(QUEUE_READY) == 0
    assert regs.read(QUEUE_SIZE_MAX) == 1024
    ring = HandRing(board.memory, 8)
    board.rings = [ring]
    board.queue(0, ring)
    assert regs.read(QUEUE_READY) == 1
    regs.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
    assert regs.read(STATUS) == 15
    assert board.works()


def test_2_1_a_status_bit_is_never_cleared_but_by_a_reset(board: Board) -> None:
    negotiated(board)
    board.regs.write(STATUS, ACKNOWLEDGE)
    assert board.status() == ACKNOWLEDGE | DRIVER | FEATURES_OK
    board.regs.write(STATUS, FAILED)
    assert board.status() == ACKNOWLEDGE | DRIVER | FEATURES_OK | FAILED
    board.reset()
    assert board.status() == 0


@pytest.mark.clause("BASIC-DEV-019")
def test_2_1_the_driver_cannot_set_needs_reset_nor_suspend_a_device_that_does_not_offer_it(board: Board) -> None:
    board.boot()
    board.regs.write(STATUS, 0xFF)
    assert board.status() == 15 | FAILED
    board.device.fail(vb.VirtioError("test"))
    board.regs.write(STATUS, 15)
    assert board.status() & NEEDS_RESET, "nor clear it"


def test_a_store_to_status_counts_its_low_byte(board: Board) -> None:
    board.reset()
    board.regs.write(STATUS, 0xABCDEF01)
    assert board.status() == ACKNOWLEDGE


@pytest.mark.clause("BASIC-DEV-007")
@pytest.mark.parametrize("bits", [1 << 0, 1 << 23, 1 << 34, 1 << 35, 1 << 40, 1 << 63])
def test_2_2_2_a_subset_with_a_bit_that_was_not_offered_is_refused(board: Board, bits: int) -> None:
    board.reset()
    board.regs.write(STATUS, ACKNOWLEDGE | DRIVER)
    assert not board.offered() & bits
    assert not board.accept(board.offered() | bits) & FEATURES_OK
    assert board.accept(board.offered()) & FEATURES_OK, "and a good one accepted after it"


@pytest.mark.clause("BASIC-DEV-032")
def test_6_2_a_driver_without_version_1_is_refused(board: Board) -> None:
    board.reset()
    board.regs.write(STATUS, ACKNOWLEDGE | DRIVER)
    assert not board.accept(board.offered() & ~F_VERSION_1) & FEATURES_OK
    assert not board.accept(0) & FEATURES_OK


@pytest.mark.clause("BASIC-DEV-007")
def test_2_2_2_a_device_that_does_not_accept_a_subset_shows_it() -> None:
    class Picky(vb.VirtioBlkDevice):
        def accepts(self, features: int) -> bool:
            return not features & F_MQ

    board = Board(Picky(), queues=2)
    board.reset()
    board.regs.write(STATUS, ACKNOWLEDGE | DRIVER)
    assert not board.accept(board.offered()) & FEATURES_OK
    assert board.accept(board.offered() & ~F_MQ) & FEATURES_OK


OFFERED = Board(queues=2).offered()
OFFERED_BITS = [1 << bit for bit in range(64) if OFFERED >> bit & 1 and 1 << bit != F_VERSION_1]


@pytest.mark.parametrize("left_out", OFFERED_BITS, ids=hex)
def test_2_2_2_the_device_works_without_any_one_feature(left_out: int) -> None:
    features = OFFERED & ~left_out
    if left_out == F_FLUSH:
        features &= ~F_CONFIG_WCE
    board = Board(queues=2).boot(features)
    assert board.works(0) and board.works(1)


@pytest.mark.clause("BASIC-DEV-006")
@given(st.sets(st.sampled_from(OFFERED_BITS)))
def test_2_2_2_the_device_works_with_any_subset(bits: set[int]) -> None:
    features = sum(bits)
    if not features & F_FLUSH:
        features &= ~F_CONFIG_WCE
    board = Board(queues=2).boot(features)
    assert board.works(0) and board.works(1)


def test_3_1_1_features_are_frozen_by_features_ok(board: Board) -> None:
    negotiated(board, F_EVENT_IDX)
    board.regs.write(DRIVER_FEATURES_SEL, 0)
    board.regs.write(DRIVER_FEATURES, 0xFFFFFFFF)
    assert board.regs.driver_features == F_EVENT_IDX | F_VERSION_1
    assert board.status() & FEATURES_OK


def test_feature_words_beyond_the_second_do_not_exist(board: Board) -> None:
    board.reset()
    for sel in (2, 3, 0xFFFFFFFF):
        board.regs.write(DEVICE_FEATURES_SEL, sel)
        assert board.regs.read(DEVICE_FEATURES) == 0
        board.regs.write(DRIVER_FEATURES_SEL, sel)
        board.regs.write(DRIVER_FEATURES, 0xFFFFFFFF)
    assert board.regs.driver_features == 0


@pytest.mark.clause("BASIC-DEV-005", "BASIC-DEV-008", "BASIC-DEV-031", "BASIC-DEV-041")
def test_2_2_2_what_is_offered_has_its_prerequisites() -> None:
    for device in (
        vb.VirtioBlkDevice(),
        vb.VirtioBlkDevice(read_only=True),
        vb.VirtioBlkDevice(discard=False, event_idx=False, indirect=False),
    ):
        offered = Board(device).offered()
        assert offered & F_VERSION_1
        assert offered & F_FLUSH or not offered & F_CONFIG_WCE
        assert offered >> 24 & 0xFF & ~(F_INDIRECT >> 24 | F_EVENT_IDX >> 24) == 0
        assert offered >> 32 == 1, "no reserved feature beside VERSION_1"


@pytest.mark.clause("BASIC-DEV-009")
def test_2_2_2_the_same_features_are_accepted_again_after_a_reset(board: Board) -> None:
    for _ in range(3):
        board.boot()
        assert board.works()


def test_driver_ok_without_features_ok_needs_a_reset(board: Board) -> None:
    board.reset()
    board.regs.write(STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK)
    assert board.status() & NEEDS_RESET
    assert board.config_interrupts == 1
    assert board.boot().works()


# -- queues --------------------------------------------------------------------------------------------------------------------


def test_a_queue_that_does_not_exist_has_no_size_and_takes_nothing(board: Board) -> None:
    negotiated(board)
    for number in (2, 3, 1000, 0xFFFFFFFF):
        board.regs.write(QUEUE_SEL, number)
        assert board.regs.read(QUEUE_SIZE_MAX) == 0
        board.regs.write(QUEUE_READY, 1)
        assert board.regs.read(QUEUE_READY) == 0


def test_queue_registers_belong_to_the_selected_queue(board: Board) -> None:
    negotiated(board)
    board.queue(1, HandRing(board.memory, 8))
    assert board.regs.read(QUEUE_READY) == 1
    board.regs.write(QUEUE_SEL, 0)
    assert board.regs.read(QUEUE_READY) == 0


def test_4_2_2_2_a_ready_queue_is_not_moved(board: Board) -> None:
    negotiated(board)
    ring = HandRing(board.memory, 8)
    board.rings = [ring]
    board.queue(0, ring)
    board.regs.write(QUEUE_SIZE, 1024)
    for offset in ADDRESSES:
        board.regs.write(offset, 0x7000)
    board.regs.write(STATUS, 15)
    assert board.works()


def test_an_address_has_two_halves() -> None:
    board = negotiated(Board(queues=1))
    ring = HandRing(board.memory, 8)
    board.queue(0, ring)
    board.regs.write(QUEUE_READY, 0)
    board.regs.write(0x084, 1)  # descriptor table above 4 GiB, where no memory is
    board.regs.write(QUEUE_READY, 1)
    board.regs.write(STATUS, 15)
    assert board.status() & NEEDS_RESET
    assert f"{(1 << 32) + ring.desc_at:#x}" in str(board.regs.error)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (QUEUE_SIZE, 0),
        (QUEUE_SIZE, 3),
        (QUEUE_SIZE, 2048),
        (QUEUE_SIZE, 65536),
        (0x080, 0x1001),
        (0x090, 0x2001),
        (0x0A0, 0x3002),
        (0x0A0, 1 << 18),
    ],
)
def test_a_ring_that_cannot_be_needs_a_reset_when_the_driver_is_ready(offset: int, value: int) -> None:
    board = negotiated(Board(queues=1))
    board.queue(0, HandRing(board.memory, 8))
    board.regs.write(QUEUE_READY, 0)
    board.regs.write(offset, value)
    board.regs.write(QUEUE_READY, 1)
    assert board.status() == ACKNOWLEDGE | DRIVER | FEATURES_OK
    board.regs.write(STATUS, 15)
    assert board.status() & NEEDS_RESET
    assert board.regs.read(INTERRUPT_STATUS) == 2
    assert board.boot().works()


def test_a_queue_that_is_not_ready_is_not_served(board: Board) -> None:
    negotiated(board)
    ring = HandRing(board.memory, 8)
    board.rings = [ring]
    board.queue(0, ring)
    board.regs.write(STATUS, 15)
    assert board.works(0)
    board.kick(1)
    assert board.status() == 15


@pytest.mark.clause("MMIO-DEV-008")
def test_4_2_2_1_a_queue_is_left_alone_once_queue_ready_reads_0(board: Board) -> None:
    board.boot()
    board.regs.write(QUEUE_SEL, 0)
    board.regs.write(QUEUE_READY, 0)
    assert board.regs.read(QUEUE_READY) == 0
    before = bytes(board.memory.bytes)
    ring = board.rings[0]
    head = ring.chain(board.pieces(IN, 0, room=512))
    ring.offer(head)
    touched = bytes(board.memory.bytes)
    board.kick(0)
    assert bytes(board.memory.bytes) == touched != before
    assert board.works(1), "the other queue goes on"


@pytest.mark.clause("MMIO-DEV-008")
def test_4_2_2_1_a_completion_does_not_reach_a_queue_that_was_stopped_meanwhile() -> None:
    engine = Held()
    board = Board(engine=engine).boot()
    board.send(board.pieces(OUT, 0, data=b"x" * 512))
    board.regs.write(QUEUE_SEL, 0)
    board.regs.write(QUEUE_READY, 0)
    engine.end()
    before = bytes(board.memory.bytes)
    board.machine.run()
    assert bytes(board.memory.bytes) == before
    assert board.notified == []


@pytest.mark.clause("MMIO-DEV-008")
@pytest.mark.parametrize("after", range(6))
def test_4_2_2_1_a_queue_stopped_at_any_trace_point_is_left_alone_from_there_on(after: int) -> None:
    board = Board().boot()
    board.send(board.pieces(GET_ID, room=20), kick=False)
    board.regs.write(QUEUE_NOTIFY, 0)
    for _ in range(after):
        board.machine.step()
    board.regs.write(QUEUE_SEL, 0)
    board.regs.write(QUEUE_READY, 0)
    before = bytes(board.memory.bytes)
    board.machine.run()
    assert bytes(board.memory.bytes) == before


@pytest.mark.clause("BASIC-DEV-001", "BASIC-DEV-002")
def test_2_1_2_no_buffer_is_taken_before_driver_ok_and_those_that_wait_are_taken_then() -> None:
    board = Board().boot(ok=False)
    head = board.send(board.pieces(IN, 0, room=512))
    board.kick()
    assert board.rings[0].used() == [] and board.notified == []
    board.regs.write(STATUS, 15)
    board.machine.run()
    assert board.rings[0].used() == [(head, 513)]
    assert board.notified == [0]


@pytest.mark.parametrize("value", [2, 3, 100, 65535, 65536, 0xFFFFFFFF])
def test_a_kick_for_a_queue_that_does_not_exist_is_ignored(board: Board, value: int) -> None:
    board.boot()
    board.kick(value)
    assert board.status() == 15 and board.works(0)


def test_a_kick_is_delivered_to_a_running_device_only(board: Board) -> None:
    delivered: list[int] = []
    board.boot(ok=False)
    board.regs.on_notify = delivered.append
    board.regs.write(QUEUE_NOTIFY, 0)
    assert delivered == []
    board.regs.write(STATUS, 15)
    for value in (0, 1, 2, 0xFFFFFFFF):
        board.regs.write(QUEUE_NOTIFY, value)
    board.regs.write(QUEUE_NOTIFY, 0, 2)
    assert delivered == [0, 1]
    board.regs.write(STATUS, 0)
    board.regs.write(QUEUE_NOTIFY, 0)
    assert delivered == [0, 1]


@pytest.mark.clause("SPLIT-DEV-022")
def test_2_7_10_2_a_kick_without_a_buffer_is_ignored(board: Board) -> None:
    board.boot()
    for _ in range(5):
        board.kick(0)
    assert board.rings[0].used() == [] and board.notified == []
    assert board.works()


# -- interrupts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("MMIO-DEV-003", "MMIO-DEV-004")
def test_4_2_2_1_an_interrupt_bit_stays_until_it_is_acknowledged(board: Board) -> None:
    board.boot()
    assert board.regs.read(INTERRUPT_STATUS) == 0
    board.works()
    assert board.regs.read(INTERRUPT_STATUS) == 1
    assert board.regs.read(INTERRUPT_STATUS) == 1, "reading clears nothing"
    board.regs.write(INTERRUPT_ACK, 2)
    assert board.regs.read(INTERRUPT_STATUS) == 1, "another bit's acknowledgement neither"
    board.device.resize(4096)
    assert board.regs.read(INTERRUPT_STATUS) == 3
    board.regs.write(INTERRUPT_ACK, 1)
    assert board.regs.read(INTERRUPT_STATUS) == 2
    board.regs.write(INTERRUPT_ACK, 3)
    assert board.regs.read(INTERRUPT_STATUS) == 0


@pytest.mark.clause("MMIO-DEV-003", "MMIO-DEV-004")
def test_acknowledging_all_ones_leaves_no_undefined_bit(board: Board) -> None:
    board.boot(F_FLUSH)  # without EVENT_IDX every used buffer is told
    board.works()
    board.regs.write(INTERRUPT_ACK, 0xFFFFFFFF)
    assert board.regs.read(INTERRUPT_STATUS) == 0
    board.works()
    assert board.regs.read(INTERRUPT_STATUS) == 1


@pytest.mark.clause("MMIO-DEV-005", "MMIO-DEV-006")
def test_4_2_2_1_a_reset_clears_interrupts_and_queues(board: Board) -> None:
    board.boot()
    board.works()
    board.device.resize(4096)
    board.reset()
    assert board.regs.read(INTERRUPT_STATUS) == 0
    for queue in (0, 1):
        board.regs.write(QUEUE_SEL, queue)
        assert board.regs.read(QUEUE_READY) == 0


# -- configuration space -------------------------------------------------------------------------------------------------------


def expected_config() -> bytes:
    data = bytearray(60)
    struct.pack_into("<QII4xI", data, 0, 2048, 4096, 126, 4096)
    struct.pack_into("<BxHIIIIIB", data, 32, 1, 2, 1000, 1, 8, 1000, 1, 1)
    return bytes(data)


@pytest.fixture
def full() -> Board:
    return Board(vb.VirtioBlkDevice(size_max=4096, block_size=4096, max_discard_sectors=1000), queues=2)


def test_5_2_4_the_configuration_space_is_the_specifications(full: Board) -> None:
    assert bytes(full.regs.read(CONFIG + at, 1) for at in range(60)) == expected_config()


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_2_5_2_every_width_and_offset_reads_the_same_bytes_and_0_beyond_the_end(full: Board, size: int) -> None:
    padded = expected_config() + bytes(80)
    for at in range(100):
        assert full.regs.read(CONFIG + at, size) == int.from_bytes(padded[at : at + size], "little"), at


@pytest.mark.clause("BASIC-DEV-013")
def test_2_5_2_configuration_is_readable_before_features_ok(full: Board) -> None:
    full.reset()
    assert full.regs.read(CONFIG) == 2048
    assert full.regs.read(CONFIG + 36) == 1000


@pytest.mark.clause("MMIO-DEV-007")
def test_4_2_2_1_the_generation_changes_with_the_configuration(board: Board) -> None:
    board.boot()
    seen = [board.regs.read(GENERATION)]
    for sectors in (4096, 8192, 1 << 33):
        board.device.resize(sectors)
        seen.append(board.regs.read(GENERATION))
        assert board.regs.read(CONFIG) | board.regs.read(CONFIG + 4) << 32 == sectors
    assert len(set(seen)) == 4
    assert board.config_interrupts == 3


def test_2_1_2_a_change_before_driver_ok_is_not_told(board: Board) -> None:
    negotiated(board)
    before = board.regs.read(GENERATION)
    board.device.resize(4096)
    assert board.config_interrupts == 0 and board.regs.read(INTERRUPT_STATUS) == 0
    assert board.regs.read(GENERATION) != before


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_store_to_a_configuration_field_of_the_device_is_ignored(full: Board, size: int) -> None:
    full.boot()
    for at in range(70):
        if at != 32 or size != 1:
            full.regs.write(CONFIG + at, (1 << 8 * size) - 1, size)
    assert bytes(full.regs.read(CONFIG + at, 1) for at in range(60)) == expected_config()


# -- reset ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("BASIC-DEV-010")
def test_2_4_1_a_reset_of_a_device_that_does_nothing_has_happened_when_status_reads_0(board: Board) -> None:
    """Status reads 0 at once, so nothing of the reset may still be to come: the very next store counts."""
    for _ in range(3):
        board.regs.write(STATUS, 0)
        assert board.status() == 0
        board.regs.write(STATUS, ACKNOWLEDGE)
        board.machine.run()
        assert board.status() == ACKNOWLEDGE
        board.reset()


@pytest.mark.clause("BASIC-DEV-010", "BASIC-DEV-011", "BASIC-DEV-012")
@pytest.mark.parametrize("kind", [IN, OUT])
def test_2_4_status_is_not_0_while_the_drive_may_still_touch_guest_memory(kind: int) -> None:
    engine = Held()
    board = Board(engine=engine).boot()
    for sector in (0, 1):
        board.send(
            board.pieces(kind, sector, **({"room": 512} if kind == IN else {"data": b"n" * 512}), slot=sector), slots=range(4 * sector, 8)
        )
    assert len(engine.started) == 2
    board.regs.write(STATUS, 0)
    for left in (2, 1, 0):
        board.machine.run()
        assert bool(board.status()) == bool(left)
        board.regs.write(STATUS, 0)
        if left:
            engine.end()
    before = bytes(board.memory.bytes)
    board.machine.run()
    board.kick()
    assert bytes(board.memory.bytes) == before
    assert board.rings[0].used() == [] and board.notified == []
    assert board.regs.read(INTERRUPT_STATUS) == 0
    assert board.device.engine.in_flight == 0


def test_2_4_stores_during_a_reset_do_not_undo_it() -> None:
    engine = Held()
    board = Board(engine=engine).boot()
    board.send(board.pieces(IN, 0, room=512))
    board.regs.write(STATUS, 0)
    board.regs.write(STATUS, 15)
    board.regs.write(QUEUE_NOTIFY, 0)
    board.machine.run()
    engine.end()
    board.machine.run()
    assert board.status() == 0
    board.boot()
    board.send(board.pieces(IN, 0, room=512))
    engine.end()
    board.machine.run()
    assert len(board.rings[0].used()) == 1


def test_2_4_driver_ok_during_a_reset_starts_nothing() -> None:
    board = Board().boot(ok=False)
    head = board.rings[0].chain(board.pieces(IN, 0, room=512))
    board.rings[0].offer(head)
    board.regs.write(STATUS, 0)
    assert board.status(), "the device has not seen it yet"
    board.regs.write(STATUS, 15)
    board.machine.run()
    assert board.status() == 0
    board.kick()
    assert board.rings[0].used() == [] and board.notified == []


@pytest.mark.clause("BASIC-DEV-011", "BASIC-DEV-012")
@given(after=st.integers(0, 14), batched=st.booleans())
def test_2_4_a_reset_at_any_trace_point_leaves_memory_alone_once_status_reads_0(after: int, batched: bool) -> None:
    """The device stands at any point of serving two requests when the driver resets it."""
    engine = Held() if batched else vb.Sync()
    board = Board(engine=engine).boot()
    for sector in (0, 1):
        pieces = board.pieces(IN, sector, room=512, slot=sector)
        board.send(pieces, slots=range(4 * sector, 4 * sector + 3), kick=False)
    board.regs.write(QUEUE_NOTIFY, 0)
    for _ in range(after):
        if board.machine.step() is vb.WAIT and batched and engine.started:
            engine.end()
    board.regs.write(STATUS, 0)
    board.machine.run()
    while board.status():
        assert batched and engine.started, "a reset that nothing holds up has to end"
        engine.end()
        board.machine.run()
    snapshot = bytes(board.memory.bytes)
    board.kick()
    board.machine.run()
    assert bytes(board.memory.bytes) == snapshot
    assert board.regs.read(INTERRUPT_STATUS) == 0
    board.boot()
    if batched:
        board.send(board.pieces(IN, 0, room=512))
        engine.end()
        board.machine.run()
        assert len(board.rings[0].used()) == 1
    else:
        assert board.works()


@pytest.mark.clause("BASIC-DEV-004")
def test_needs_reset_is_told_once_the_driver_is_ready_and_cleared_by_a_reset(board: Board) -> None:
    board.boot()
    board.device.fail(vb.VirtioError("test"))
    assert board.status() == 15 | NEEDS_RESET
    assert board.config_interrupts == 1 and board.regs.read(INTERRUPT_STATUS) == 2
    board.reset()
    assert board.status() == 0 and board.regs.error is None
    assert board.boot().works()


# -- the driver's face: what every access must obey ------------------------------------------------------------------------------


class WatchedBus:
    """Passes accesses on to a board, one trace point each, and notes which rules of §4.2.2.2 and §3.1.1 they break."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.log: list[tuple[str, int, int, int]] = []
        self.broken: list[str] = []
        self._written: set[int] = set()
        self._features = 0
        self._read_back = False

    def _rule(self, holds: object, text: str) -> None:
        if not holds:
            self.broken.append(f"{text}; after {self.log[-1]}")

    def _access(self, way: str, offset: int, value: int, size: int) -> None:
        self.log.append((way, offset, value, size))
        if offset >= CONFIG:
            self._config(way, offset - CONFIG, size)
            return
        self._rule(size == 4 and offset % 4 == 0, "control registers take aligned 32-bit accesses only")
        self._rule(offset in (READABLE if way == "read" else WRITABLE), f"{way} of a register that has none")

    def _config(self, way: str, at: int, size: int) -> None:
        start, (width, feature) = next((s, f) for s, f in sorted(FIELDS.items(), reverse=True) if s <= at)
        self._rule(at + size <= start + width, "an access over the end of its field")
        self._rule(size == min(width, 4) and at % size == 0, f"a field of {width} bytes takes accesses of its own width")
        self._rule(feature is None or self.board.offered() >> feature & 1, "a field whose feature is not offered")
        self._rule(start != 32 or self.board.status() & FEATURES_OK, "writeback is read behind FEATURES_OK")

    def read(self, offset: int, size: int = 4) -> Generator[Any, int, int]:
        yield ("mmio_read", offset, 0, 0)
        self._access("read", offset, 0, size)
        if offset == DEVICE_FEATURES:
            self._rule(DEVICE_FEATURES_SEL in self._written, "DeviceFeaturesSel comes before DeviceFeatures")
        if offset == STATUS:
            self._read_back = True
        value = self.board.regs.read(offset, size)
        if self.board.machine is not None:
            self.board.machine.run()
        return value

    def write(self, offset: int, value: int, size: int = 4) -> Generator[Any, int, None]:
        yield ("mmio_write", offset, 1, value)
        self._access("write", offset, value, size)
        status = self.board.status()
        self._written.add(offset)
        if offset == STATUS and value:
            self._status(status, value)
        elif offset == STATUS:
            self._written = set()
        elif offset == DRIVER_FEATURES:
            self._rule(DRIVER_FEATURES_SEL in self._written, "DriverFeaturesSel comes before DriverFeatures")
            self._rule(status & DRIVER and not status & FEATURES_OK, "features are written between DRIVER and FEATURES_OK")
        elif offset in ADDRESSES | {QUEUE_SIZE, QUEUE_READY}:
            self._rule(status & FEATURES_OK and not status & DRIVER_OK, "queues are set up between FEATURES_OK and DRIVER_OK")
            self._rule(offset == QUEUE_READY or not self.board.regs.read(QUEUE_READY), "a ready queue is left alone")
            self._rule(offset != QUEUE_SIZE or value <= self.board.regs.read(QUEUE_SIZE_MAX), "QueueSize is at most QueueSizeMax")
        elif offset == INTERRUPT_ACK:
            self._rule(not value & ~3, "no undefined bit is acknowledged")
        self.board.regs.write(offset, value, size)
        self.board.machine.run()

    def _status(self, old: int, new: int) -> None:
        self._rule(not old & ~new, "a status bit is never cleared")
        added = new & ~old
        self._rule(not added & added - 1, "one status bit at a time")
        before = {ACKNOWLEDGE: 0, DRIVER: ACKNOWLEDGE, FEATURES_OK: DRIVER, DRIVER_OK: FEATURES_OK}
        if added in before:
            self._rule(old & before[added] == before[added], "status bits in the order of §3.1.1")
        if added == FEATURES_OK:
            self._rule(DRIVER_FEATURES in self._written, "features are written before FEATURES_OK")
            self._read_back = False
        if added == DRIVER_OK:
            self._rule(self._read_back, "FEATURES_OK is read back")

    def notify(self, queue: int) -> Generator[Any, int, None]:
        self._rule(self.board.status() & DRIVER_OK, "no kick before DRIVER_OK")
        self.board.kick(queue)
        yield ("doorbell_fast", QUEUE_NOTIFY, queue)


def attached(board: Board, **options: Any) -> tuple[VirtioBlkDriver, WatchedBus]:
    bus = WatchedBus(board)
    driver = VirtioBlkDriver(**options)
    driver.attach(GuestPages(board.memory, 0x1000), MmioTransport(bus), IOStack(), queue_size=8)
    return driver, bus


DEVICES = {
    "all": dict(size_max=4096, block_size=4096),
    "plain": dict(discard=False, event_idx=False, indirect=False),
    "read-only": dict(read_only=True),
    "small queues": dict(queue_size_max=4),
}


@pytest.mark.clause(
    "BASIC-DRV-017",
    "MMIO-DRV-001",
    "MMIO-DRV-002",
    "MMIO-DRV-003",
    "MMIO-DRV-004",
    "MMIO-DRV-005",
    "MMIO-DRV-006",
    "MMIO-DRV-007",
    "MMIO-DRV-016",
    "MMIO-DRV-026",
    "MMIO-DRV-027",
    "MMIO-DRV-030",
)
@pytest.mark.parametrize("queues", [1, 2])
@pytest.mark.parametrize("device", DEVICES)
def test_4_2_2_2_every_access_of_the_drivers_probe_is_allowed(device: str, queues: int) -> None:
    board = Board(vb.VirtioBlkDevice(**DEVICES[device]), queues=queues, memory_bytes=1 << 20)  # type: ignore[arg-type]
    driver, bus = attached(board)
    finish(driver.probe())
    assert bus.broken == []
    assert board.status() == 15
    assert [(entry[:2], entry[2]) for entry in bus.log[:4]] == [
        (("read", MAGIC), 0),
        (("read", VERSION), 0),
        (("read", DEVICE_ID), 0),
        (("write", STATUS), 0),
    ]
    assert not driver.features & ~board.offered()
    assert driver.features & F_VERSION_1
    assert driver.num_queues == queues


@pytest.mark.clause("MMIO-DRV-001", "MMIO-DRV-002", "MMIO-DRV-003", "MMIO-DRV-017")
def test_4_2_2_2_every_access_of_a_second_probe_is_allowed() -> None:
    board = Board(queues=2, memory_bytes=1 << 20)
    driver, bus = attached(board)
    finish(driver.probe())
    for _ in range(5):
        finish(driver.restart())
    assert bus.broken == [] and board.status() == 15


@pytest.mark.clause("MMIO-DRV-020", "MMIO-DRV-021", "MMIO-DRV-022", "MMIO-DRV-032", "MMIO-DRV-034", "SPLIT-DRV-018")
@pytest.mark.parametrize("pending", [1, 2, 3, 0xFFFFFFFF, 0xFFFFFFF0])
def test_4_2_2_2_undefined_interrupt_bits_are_disregarded_and_not_acknowledged(pending: int) -> None:
    board = Board(memory_bytes=1 << 20)
    driver, bus = attached(board)
    finish(driver.probe())
    board.regs.interrupt.set(pending)
    bus.log.clear()
    finish(driver.interrupt())
    assert bus.broken == []
    assert bus.log[0][:2] == ("read", INTERRUPT_STATUS)
    assert [entry[2] for entry in bus.log if entry[1] == INTERRUPT_ACK] == ([pending & 3] if pending & 3 else [])


def test_the_probe_reads_what_the_device_says() -> None:
    device = vb.VirtioBlkDevice(size_max=4096, block_size=4096, seg_max=6, max_discard_sectors=800)
    driver, _ = attached(Board(device, queues=2, memory_bytes=1 << 20, sectors=4096))
    finish(driver.probe())
    assert driver.capacity_sectors == 4096
    limits = driver.limits
    assert (limits.max_segments, limits.max_segment_bytes, limits.logical_block_bytes) == (6, 4096, 4096)
    assert (limits.max_discard_sectors, limits.max_write_zeroes_sectors, limits.flush, limits.read_only) == (800, 800, True, False)


@pytest.mark.clause("MMIO-DRV-008", "MMIO-DRV-009", "MMIO-DRV-010", "MMIO-DRV-011")
@pytest.mark.parametrize(("offset", "value"), [(MAGIC, 0), (MAGIC, 0x74726977), (VERSION, 1), (VERSION, 3), (DEVICE_ID, 1), (DEVICE_ID, 4)])
def test_4_2_3_1_1_a_device_that_is_no_virtio_block_device_is_left_alone(offset: int, value: int) -> None:
    board = Board(memory_bytes=1 << 20)
    driver, bus = attached(board)
    read = board.regs.read
    board.regs.read = lambda at, size=4: value if at == offset else read(at, size)  # type: ignore[method-assign]
    with pytest.raises(vb.VirtioError, match=f"reads {value:#x}"):
        finish(driver.probe())
    assert [entry[1] for entry in bus.log] == [MAGIC, VERSION, DEVICE_ID][: [MAGIC, VERSION, DEVICE_ID].index(offset) + 1]


def test_3_1_1_a_driver_whose_features_are_refused_sets_failed_and_goes_no_further() -> None:
    class Refuses(vb.VirtioBlkDevice):
        def accepts(self, features: int) -> bool:
            return False

    board = Board(Refuses(), memory_bytes=1 << 20)
    driver, bus = attached(board)
    with pytest.raises(vb.VirtioError, match="refuses the features"):
        finish(driver.probe())
    assert board.status() == ACKNOWLEDGE | DRIVER | FAILED
    assert not {entry[1] for entry in bus.log} & {QUEUE_SIZE, QUEUE_READY}


def test_2_2_1_the_driver_ignores_an_offered_bit_that_it_does_not_know() -> None:
    class Newer(vb.VirtioBlkDevice):
        def features(self) -> int:
            return super().features() | 1 << 22 | 1 << 45 | 1 << 62

    board = Board(Newer(), memory_bytes=1 << 20)
    driver, _ = attached(board)
    finish(driver.probe())
    assert board.status() == 15
    assert not driver.features & (1 << 22 | 1 << 45 | 1 << 62)


@pytest.mark.clause("BASIC-DRV-014", "BASIC-DRV-016")
def test_2_5_1_a_field_is_read_again_while_the_generation_changes() -> None:
    board = Board(memory_bytes=1 << 20)
    driver, _ = attached(board)
    finish(driver.probe())
    capacities = iter([1 << 40, 3 << 33, 5 << 32 | 7])
    read, seen = board.regs.read, []

    def torn(at: int, size: int = 4) -> int:
        """The capacity changes between its two halves, three times."""
        value = read(at, size)
        seen.append(at)
        if at == CONFIG and (capacity := next(capacities, None)) is not None:
            board.device.resize(capacity)
        return value

    board.regs.read = torn  # type: ignore[method-assign]
    data = finish(driver.transport.read_config(0, 8))
    assert int.from_bytes(data, "little") == 5 << 32 | 7
    assert seen.count(CONFIG) == 4


@pytest.mark.clause("BASIC-DRV-013")
def test_a_driver_waits_until_a_reset_is_over() -> None:
    engine = Held()
    board = Board(engine=engine, memory_bytes=1 << 20).boot()
    board.send(board.pieces(IN, 0, room=512))
    driver, _ = attached(board)
    reset = Trampoline(driver.transport.reset())
    for _ in range(50):
        reset.step()
    engine.end()
    with pytest.raises(StopIteration):
        for _ in range(10):
            reset.step()
    assert board.status() == 0


@pytest.mark.clause("MMIO-DRV-017")
def test_4_2_3_2_a_queue_in_use_is_not_set_up_again() -> None:
    board = Board(memory_bytes=1 << 20)
    driver, _ = attached(board)
    finish(driver.probe())
    with pytest.raises(vb.VirtioError, match="already in use"):
        finish(driver.transport.setup_queue(0, driver.queues[0].layout))


@pytest.mark.clause("BASIC-DRV-010")
@pytest.mark.parametrize("left_out", [F_EVENT_IDX, F_INDIRECT, F_MQ, F_DISCARD, F_CONFIG_WCE, F_FLUSH | F_CONFIG_WCE], ids=hex)
def test_the_drivers_allow_list_is_never_exceeded(left_out: int) -> None:
    board = Board(queues=2, memory_bytes=1 << 20)
    driver, bus = attached(board, features=int(VirtioBlkDriver.FEATURES) & ~left_out)
    finish(driver.probe())
    assert bus.broken == []
    assert not board.regs.driver_features & left_out
    assert board.regs.driver_features == driver.features


def test_no_schedule_of_the_boot_loses_a_status_bit() -> None:
    """A stalled device thread must not find a reset to do when the driver is long past it."""
    for seed in range(200):
        vm = vb.Pipeline(disk=vb.Ram(1 << 20)).boot(vb.SimMachine(seed=seed, interleave="random"))
        status = int(vm.device_status)
        vm.close()
        assert status == 15, seed
