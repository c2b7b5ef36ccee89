"""The device side of virtio-pci: VIRTIO 1.4 §4.1, with offsets taken from the specification, not from the package."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vblklab as vb
from tests.support import ACKNOWLEDGE, DRIVER, DRIVER_OK, F_VERSION_1, FEATURES_OK, Board, HandRing, deadline, finish
from tests.transport.pci_board import (
    BAR0,
    COMMAND,
    COMMON,
    CONFIG_VECTOR,
    DEVICE,
    DF,
    DFSELECT,
    FIELDS,
    GENERATION,
    GF,
    GFSELECT,
    INTX_DISABLE,
    ISR,
    MASTER,
    MEMORY,
    MSIX,
    NO_VECTOR,
    NOTIFY,
    NUM_QUEUES,
    Q_CONFIG_DATA,
    Q_DESC,
    Q_ENABLE,
    Q_NOTIFY_OFF,
    Q_SELECT,
    Q_SIZE,
    READ_ONLY,
    WINDOW,
    WINDOWS,
    PciBoard,
    RecordingBus,
    capabilities,
    msix_at,
    place,
    structure,
    structures,
)
from vblklab.iostack import IOStack
from vblklab.memory import GuestPages
from vblklab.spec.virtio import Feature
from vblklab.transport import PciTransport


@pytest.fixture
def board() -> PciBoard:
    return PciBoard(queues=2)


# -- identity and configuration space ------------------------------------------------------------------------------------------


@pytest.mark.clause("PCI-DEV-003", "PCI-DEV-004", "PCI-DEV-006", "PCI-DEV-007", "PCI-DEV-008")
def test_the_function_says_what_it_is(board: PciBoard) -> None:
    read = board.regs.config_read
    assert (read(0x00, 2), read(0x02, 2)) == (0x1AF4, 0x1042)
    assert read(0x08, 1) >= 1, "revision of a non-transitional device"
    assert read(0x2E, 2) >= 0x40, "subsystem of a non-transitional device"
    assert read(0x0A, 2) == 0x0100, "a storage controller"
    assert read(0x0E, 1) == 0, "an ordinary function"


@pytest.mark.clause("PCI-DEV-001")
def test_a_region_reads_back_its_size_after_all_ones(board: PciBoard) -> None:
    for bar, size in ((1, 0x1000), (4, 0x4000)):
        at = BAR0 + 4 * bar
        board.regs.config_write(at, 0xFFFFFFFF, 4)
        low = board.regs.config_read(at, 4)
        assert low & 0xFFFFFFF0 == 0x100000000 - size
        if bar == 4:
            assert low & 0xF == 0xC, "64 bits, prefetchable"
            board.regs.config_write(at + 4, 0xFFFFFFFF, 4)
            assert board.regs.config_read(at + 4, 4) == 0xFFFFFFFF
    for bar in (0, 2, 3):
        board.regs.config_write(BAR0 + 4 * bar, 0xFFFFFFFF, 4)
        assert board.regs.config_read(BAR0 + 4 * bar, 4) == 0, "no such region"
    place(board.regs)
    board.boot()
    assert board.works()


@pytest.mark.clause("PCI-DEV-001")
def test_the_function_answers_in_memory_only_while_decoding_is_on_and_where_it_was_put(board: PciBoard) -> None:
    assert board.get(NUM_QUEUES) == 2
    board.regs.config_write(COMMAND, MASTER, 2)
    assert board.get(NUM_QUEUES) == 0xFFFF, "nobody answers"
    board.set_status(ACKNOWLEDGE)
    board.regs.config_write(COMMAND, MASTER | MEMORY, 2)
    assert board.status() == 0, "the store went nowhere"
    board.regs.config_write(BAR0 + 16, 0x10000000, 4)
    board.regs.config_write(BAR0 + 20, 0, 4)
    assert board.get(NUM_QUEUES) == 0xFFFF, "it moved away"
    assert board.regs.read(0x10000000 + NUM_QUEUES[0], 2) == 2


@pytest.mark.parametrize("offset", [0x00, 0x02, 0x06, 0x08, 0x0A, 0x0E, 0x2C, 0x2E, 0x34, 0x3D, 0x40, 0x42, 0x4C])
@pytest.mark.clause("PCI-DEV-001")
def test_a_store_to_a_read_only_field_changes_nothing(board: PciBoard, offset: int) -> None:
    size = 1 if offset % 2 else 2
    before = board.regs.config_read(offset, size)
    for value in (0, 0x3FFF if offset == msix_at(board.regs) + 2 else (1 << 8 * size) - 1):  # the upper two are the driver's
        board.regs.config_write(offset, value, size)
        assert board.regs.config_read(offset, size) == before


@pytest.mark.parametrize(("offset", "size"), [(1, 2), (2, 4), (0, 8), (0, 3), (255, 2), (-4, 4), (0x100, 4)])
def test_an_access_that_the_bus_cannot_carry_reads_all_ones_and_writes_nothing(board: PciBoard, offset: int, size: int) -> None:
    before = [board.regs.config_read(at, 4) for at in range(0, 256, 4)]
    board.regs.config_write(offset, 0, size)
    assert board.regs.config_read(offset, size) == (1 << 8 * size) - 1
    assert [board.regs.config_read(at, 4) for at in range(0, 256, 4)] == before


@pytest.mark.clause(
    "PCI-DEV-013",
    "PCI-DEV-016",
    "PCI-DEV-017",
    "PCI-DEV-035",
    "PCI-DEV-036",
    "PCI-DEV-037",
    "PCI-DEV-038",
    "PCI-DEV-039",
    "PCI-DEV-040",
    "PCI-DEV-046",
    "PCI-DEV-052",
    "PCI-DEV-053",
    "PCI-DEV-061",
    "PCI-DEV-041",
    "PCI-DEV-042",
    "PCI-DEV-043",
    "PCI-DEV-044",
    "PCI-DEV-045",
)
@pytest.mark.parametrize("queues", [1, 2, 64])
def test_every_structure_has_a_capability_that_is_long_aligned_and_inside_its_region(queues: int) -> None:
    board = PciBoard(queues=queues)
    found = {cap.kind: cap for cap in structures(board.regs)}
    assert set(found) == {COMMON, NOTIFY, ISR, DEVICE, WINDOW}
    assert board.regs.config_read(0x06, 2) & 0x10, "the Status register says that there is a list"
    size = {1: 0x1000, 4: 0x4000}
    for kind, cap in found.items():
        assert cap.length_of_cap == {NOTIFY: 20, WINDOW: 20}.get(kind, 16)
        if kind != WINDOW:
            assert cap.offset + cap.length <= size[cap.bar]
            assert cap.offset % 4 == 0
    assert found[COMMON].length >= 56
    assert found[ISR].length >= 1
    multiplier = board.regs.config_read(found[NOTIFY].at + 16, 4)
    assert multiplier and not multiplier & (multiplier - 1) and multiplier % 4 == 0
    for queue in range(queues):
        board.set(Q_SELECT, queue)
        assert found[NOTIFY].length >= board.get(Q_NOTIFY_OFF) * multiplier + 4, "room for NOTIFICATION_DATA too"


def test_no_two_structures_share_a_byte(board: PciBoard) -> None:
    lie = sorted((cap.offset, cap.offset + cap.length) for cap in structures(board.regs) if cap.kind != WINDOW)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(lie))


# -- the common configuration --------------------------------------------------------------------------------------------------


@pytest.mark.clause("PCI-DEV-018", "PCI-DEV-019")
def test_feature_bits_are_seen_through_windows_of_32(board: PciBoard) -> None:
    offered = board.offered()
    assert offered & F_VERSION_1
    for sel in (2, 3, 0x80000000, 0xFFFFFFFF):
        board.set(DFSELECT, sel)
        assert (board.get(DFSELECT), board.get(DF)) == (sel, 0)
        board.set(GFSELECT, sel)
        board.set(GF, 0xFFFFFFFF)
        assert (board.get(GFSELECT), board.get(GF)) == (sel, 0)
    board.set_status(ACKNOWLEDGE | DRIVER)
    assert board.accept(offered) & FEATURES_OK
    for sel in (0, 1):
        board.set(GFSELECT, sel)
        assert board.get(GF) == offered >> 32 * sel & 0xFFFFFFFF
    assert board.regs.driver_features == offered


def test_a_subset_that_does_not_fit_is_refused(board: PciBoard) -> None:
    board.set_status(ACKNOWLEDGE | DRIVER)
    assert not board.accept(board.offered() & ~F_VERSION_1) & FEATURES_OK
    assert not board.accept(board.offered() | 1 << 63) & FEATURES_OK
    assert board.accept(board.offered()) & FEATURES_OK


@pytest.mark.clause("PCI-DEV-021")
@pytest.mark.parametrize("changes", [1, 2, 255, 256, 257, 512])
def test_the_generation_differs_after_any_number_of_changes(board: PciBoard, changes: int) -> None:
    board.boot()
    before = board.get(GENERATION)
    for more in range(changes):
        board.device.resize(4096 + more)
    assert board.regs.read(board.gpa[DEVICE], 4) == 4096 + changes - 1
    assert board.get(GENERATION) != before
    assert board.get(GENERATION) == board.get(GENERATION), "and stays while nothing changes"


@pytest.mark.clause("PCI-DEV-022", "PCI-DEV-023", "PCI-DEV-024", "PCI-DEV-072")
def test_a_reset_gives_every_register_its_first_value(board: PciBoard) -> None:
    fresh = {(queue, field): _read(board, queue, field) for queue in (0, 1) for field in FIELDS if field != Q_SELECT}
    board.boot()
    board.enable_msix()
    board.set(CONFIG_VECTOR, 0)
    for queue in (0, 1):
        assert board.map_queue(queue, 1) == 1
    assert {(queue, field): _read(board, queue, field) for queue, field in fresh} != fresh
    board.set_status(0)
    board.machine.run()
    assert board.status() == 0
    for queue in (0, 1):
        assert _read(board, queue, Q_ENABLE) == 0
        assert board.get((26, 2)) == NO_VECTOR
    assert board.get(CONFIG_VECTOR) == NO_VECTOR
    board.set(DFSELECT, 0)
    board.set(GFSELECT, 0)
    assert {(queue, field): _read(board, queue, field) for queue, field in fresh} == fresh
    board.boot()
    assert board.works(0) and board.works(1)


def _read(board: PciBoard, queue: int, field: tuple[int, int]) -> int:
    board.set(Q_SELECT, queue)
    return board.get(field)


@pytest.mark.clause("PCI-DEV-031")
def test_a_queue_that_does_not_exist_has_size_0_and_takes_nothing(board: PciBoard) -> None:
    board.set(Q_SELECT, 2)
    for field in (Q_SIZE, Q_ENABLE, Q_NOTIFY_OFF, (Q_DESC, 4)):
        board.set(field, 8)
        assert board.get(field) == 0
    assert board.map_queue(2, 0) == NO_VECTOR


@pytest.mark.clause("PCI-DEV-032")
@pytest.mark.parametrize("most", [1024, 1000, 96])
def test_the_size_of_a_split_queue_is_a_power_of_two(most: int) -> None:
    device = vb.VirtioBlkDevice()
    device.queue_size_max = most
    board = PciBoard(device)
    for _ in range(2):
        size = board.get(Q_SIZE)
        assert size and not size & (size - 1) and size <= most
        for wrong in (size - 1, most * 2 + 1, 0xFFFF, 3):
            board.set(Q_SIZE, wrong)
            assert board.get(Q_SIZE) == size
        board.set(Q_SIZE, 8)
        assert board.get(Q_SIZE) == 8
        board.reset()


def test_a_queue_in_use_cannot_be_moved_nor_switched_off(board: PciBoard) -> None:
    board.boot()
    board.set(Q_SELECT, 0)
    before = [board.get(field) for field in FIELDS]
    for field in ((Q_DESC, 4), (Q_DESC + 4, 4), Q_SIZE, Q_ENABLE):
        board.set(field, 0)
    assert [board.get(field) for field in FIELDS] == before
    assert board.works()


@pytest.mark.parametrize("value", [0, 2, 0xFFFE, 0xFFFF])
def test_only_1_enables_a_queue(board: PciBoard, value: int) -> None:
    board.set(Q_ENABLE, value)
    assert board.get(Q_ENABLE) == 0


@pytest.mark.clause("PCI-DEV-009")
def test_each_half_of_an_address_is_accessible_by_itself(board: PciBoard) -> None:
    board.set((Q_DESC + 4, 4), 0x11223344)
    assert (board.get((Q_DESC, 4)), board.get((Q_DESC + 4, 4))) == (0, 0x11223344)
    board.set((Q_DESC, 4), 0x55667788)
    assert (board.get((Q_DESC, 4)), board.get((Q_DESC + 4, 4))) == (0x55667788, 0x11223344)
    board.set((Q_DESC + 4, 4), 0x99AABBCC)
    assert (board.get((Q_DESC, 4)), board.get((Q_DESC + 4, 4))) == (0x55667788, 0x99AABBCC)
    board.boot()
    capacity = board.regs.read(board.gpa[DEVICE], 4), board.regs.read(board.gpa[DEVICE] + 4, 4)
    assert capacity == (board.store.size >> 9, 0)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: f"at {field[0]}")
def test_a_field_answers_accesses_of_its_width_only(board: PciBoard, field: tuple[int, int]) -> None:
    board.set(Q_SELECT, 1)
    for size in {1, 2, 4} - {field[1]}:
        assert board.get((field[0], size)) == 0
        before = [board.get(one) for one in FIELDS]
        board.set((field[0], size), 1)
        assert [board.get(one) for one in FIELDS] == before


@pytest.mark.parametrize("field", sorted(READ_ONLY), ids=lambda field: f"at {field[0]}")
def test_a_read_only_field_takes_no_store(board: PciBoard, field: tuple[int, int]) -> None:
    before = board.get(field)
    board.set(field, before ^ 0xF)
    assert board.get(field) == before


# -- doorbells -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
def test_each_queue_has_a_doorbell_of_its_own_whatever_is_written(board: PciBoard, size: int) -> None:
    board.boot()
    for queue in (1, 0):
        head = board.rings[queue].chain(board.pieces(0, room=512))
        board.rings[queue].offer(head)
        board.doorbell(queue, value=0xABCD, size=size)
        board.machine.run()
        assert [entry[0] for entry in board.rings[queue].used()] == [head]
        assert board.notified == [queue]
        board.notified.clear()


def test_queues_that_share_an_address_are_told_apart_by_the_value() -> None:
    board = PciBoard(queues=3, options={"notify_off_multiplier": 0}).boot()
    assert board.multiplier == 0
    for queue in (2, 0, 1):
        assert board.works(queue)


@pytest.mark.clause("PCI-DEV-001")
@pytest.mark.parametrize("change", ["before DRIVER_OK", "no bus master", "between two doorbells", "beyond the last", "a byte"])
def test_a_store_that_is_no_doorbell_wakes_nobody(board: PciBoard, change: str) -> None:
    board.boot(ok=change != "before DRIVER_OK")
    kicked: list[int] = []
    board.regs.on_notify = kicked.append
    if change == "no bus master":
        board.regs.config_write(COMMAND, MEMORY, 2)
    at = {"between two doorbells": 2, "beyond the last": 8}.get(change, 0)
    board.regs.write(board.gpa[NOTIFY] + at, 0, 1 if change == "a byte" else 2)
    assert kicked == []


def test_with_notif_config_data_a_queue_says_what_to_write() -> None:
    board = PciBoard(queues=2, options={"notif_config_data": True, "notify_off_multiplier": 0})
    assert board.offered() & Feature.NOTIF_CONFIG_DATA
    assert board.get(Q_CONFIG_DATA) == 0, "not negotiated yet"
    board.boot()
    values = []
    for queue in (0, 1):
        board.set(Q_SELECT, queue)
        values.append(board.get(Q_CONFIG_DATA))
        ring = board.rings[queue]
        ring.offer(ring.chain(board.pieces(0, room=512, slot=queue)))
        board.doorbell(queue, value=values[-1])
        board.machine.run()
        assert len(ring.used()) == 1
    assert values[0] != values[1] and set(values).isdisjoint({0, 1})


# -- ISR status and the line ---------------------------------------------------------------------------------------------------


@pytest.mark.clause("PCI-DEV-048", "PCI-DEV-049", "PCI-DEV-050", "PCI-DEV-051")
def test_the_line_follows_the_isr_status_which_reading_clears(board: PciBoard) -> None:
    board.boot()
    assert (board.regs.line, board.pci_status() & 8, board.isr()) == (False, 0, 0)
    assert board.works()
    assert (board.regs.line, board.pci_status() & 8) == (True, 8)
    assert board.isr() == 1
    assert (board.regs.line, board.pci_status() & 8, board.isr()) == (False, 0, 0)
    board.regs.config_write(COMMAND, MEMORY | MASTER | INTX_DISABLE, 2)
    finish(board._notify(0))
    assert (board.regs.line, board.pci_status() & 8) == (False, 8), "pending, and the line is disabled"
    before = board.config_interrupts
    board.regs.config_write(COMMAND, MEMORY | MASTER, 2)
    assert board.regs.line and board.config_interrupts == before + 1, "whoever watches the line is told"


@pytest.mark.clause("PCI-DEV-047", "PCI-DEV-076")
@pytest.mark.parametrize("msix", [False, True])
def test_the_configuration_bit_of_the_isr_status_is_set_before_the_notification(board: PciBoard, msix: bool) -> None:
    board.boot()
    if msix:
        board.enable_msix()
        board.set(CONFIG_VECTOR, 2)
    seen: list[int] = []
    board.regs.on_interrupt = lambda: seen.append(board.isr())
    board.regs.on_message = lambda message: seen.append(board.isr())
    board.device.resize(4096)
    assert seen == [2]
    if not msix:
        finish(board._notify(0))
        board.device.resize(8192)
        assert seen == [2, 3], "one interrupt, both causes"


def test_the_isr_status_takes_no_store(board: PciBoard) -> None:
    board.boot()
    assert board.works()
    board.regs.write(board.gpa[ISR], 0, 1)
    assert board.isr() == 1


# -- MSI-X ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("PCI-DEV-066", "PCI-DEV-067", "PCI-DEV-068")
@pytest.mark.parametrize(("vectors", "size"), [(None, 3), (2, 2), (128, 128), (129, 129), (2048, 2048)])
def test_table_size_says_how_many_vectors_there_are(vectors: int | None, size: int) -> None:
    board = PciBoard(queues=2, options={"vectors": vectors})
    at = msix_at(board.regs)
    assert board.regs.config_read(at + 2, 2) & 0x7FF == size - 1
    table, pba = board.regs.config_read(at + 4, 4), board.regs.config_read(at + 8, 4)
    assert table & 7 == pba & 7 == 1
    board.regs.config_write(BAR0 + 4, 0xFFFFFFFF, 4)
    region = 0x100000000 - (board.regs.config_read(BAR0 + 4, 4) & ~0xF)
    assert (table & ~7) + 16 * size <= pba & ~7, "the table lies before the pending bits"
    assert (pba & ~7) + (size + 63) // 64 * 8 <= region
    place(board.regs)
    assert board.regs.read(board.entry(size - 1, 3), 4) == 1, "masked at first"


def test_without_vectors_there_is_no_capability() -> None:
    board = PciBoard(options={"vectors": 0})
    assert MSIX not in [identifier for _, identifier in capabilities(board.regs)]
    assert board.map_queue(0, 0) == NO_VECTOR
    board.set(CONFIG_VECTOR, 0)
    assert board.get(CONFIG_VECTOR) == NO_VECTOR
    board.boot()
    assert board.works() and board.isr() == 1


@pytest.mark.parametrize("count", [-1, 2049])
def test_a_table_that_cannot_be_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="vectors"):
        PciBoard(options={"vectors": count})
    with pytest.raises(vb.ConfigError, match="2048"):
        vb.Pci(vectors=count)


@pytest.mark.clause("PCI-DEV-069", "PCI-DEV-070", "PCI-DEV-071", "PCI-DEV-073")
def test_any_event_maps_to_any_vector_and_off_again(board: PciBoard) -> None:
    for vector in (0, 1, 2, NO_VECTOR, 1):
        for queue in (0, 1):
            assert board.map_queue(queue, vector) == vector
        board.set(CONFIG_VECTOR, vector)
        assert board.get(CONFIG_VECTOR) == vector
    assert board.map_queue(0, 2) == 2
    board.set(Q_SELECT, 1)
    assert board.get((26, 2)) == 1, "each queue has its own"


@pytest.mark.clause("PCI-DEV-074")
@pytest.mark.parametrize("vector", [3, 4, 0x7FF, 0xFFFE])
def test_a_vector_outside_the_table_reads_back_no_vector(board: PciBoard, vector: int) -> None:
    assert board.map_queue(0, 1) == 1
    assert board.map_queue(0, vector) == NO_VECTOR
    board.set(CONFIG_VECTOR, vector)
    assert board.get(CONFIG_VECTOR) == NO_VECTOR


def test_an_event_sends_its_vectors_message_and_sets_no_isr_bit_for_a_queue(board: PciBoard) -> None:
    board.boot()
    board.enable_msix()
    board.map_queue(0, 1)
    board.map_queue(1, 2)
    board.set(CONFIG_VECTOR, 0)
    assert board.works(1)
    assert {(m.vector, m.address, m.data) for m in board.messages} == {(2, 0xFEE02000, 0x42)}
    board.messages.clear()
    assert board.works(0)
    assert {(m.vector, m.address, m.data) for m in board.messages} == {(1, 0xFEE01000, 0x41)}
    board.messages.clear()
    assert board.isr() == 0 and not board.regs.line
    board.device.resize(4096)
    assert [m.vector for m in board.messages] == [0]


@pytest.mark.clause("PCI-DEV-075", "PCI-DEV-077")
def test_an_event_without_a_vector_interrupts_nobody(board: PciBoard) -> None:
    board.boot()
    board.enable_msix()
    before = board.config_interrupts
    assert board.works()
    board.device.resize(4096)
    assert board.messages == [] and not board.regs.line and board.config_interrupts == before
    assert board.pending() == 0


@pytest.mark.parametrize("how", ["its own mask", "the mask for all", "no bus master"])
def test_a_masked_message_is_pending_and_goes_out_once_when_its_mask_is_lifted(board: PciBoard, how: str) -> None:
    board.boot()
    board.enable_msix()
    flags, control = board.regs.config_read(msix_at(board.regs) + 2, 2), msix_at(board.regs) + 2

    def mask(on: bool) -> None:
        if how == "its own mask":
            board.mask(1, on)
        elif how == "the mask for all":
            board.regs.config_write(control, flags | (0x4000 if on else 0), 2)
        else:
            board.regs.config_write(COMMAND, MEMORY | (0 if on else MASTER), 2)

    board.map_queue(0, 1)
    mask(True)
    for _ in range(2):
        finish(board._notify(0))
    assert board.messages == [] and board.pending() == 1 << 1
    board.regs.write(WINDOWS[1] + 0x800, 0, 4)
    assert board.pending() == 1 << 1, "pending bits are read-only"
    board.regs.write(board.entry(1, 2), 0x77)
    mask(False)
    assert [(m.vector, m.data) for m in board.messages] == [(1, 0x77)], "once, with the data of now"
    assert board.pending() == 0
    mask(True)
    mask(False)
    assert len(board.messages) == 1


def test_a_message_needs_both_masks_lifted(board: PciBoard) -> None:
    board.boot()
    board.enable_msix(0xC000)
    board.mask(1, True)
    board.map_queue(0, 1)
    finish(board._notify(0))
    board.regs.config_write(msix_at(board.regs) + 2, 0x8000, 2)
    assert board.messages == []
    board.mask(1, False)
    assert [m.vector for m in board.messages] == [1]


@pytest.mark.parametrize("how", ["mapped away", "reset"])
def test_what_is_pending_on_a_vector_that_nobody_uses_any_more_is_dropped(board: PciBoard, how: str) -> None:
    board.boot()
    board.enable_msix()
    board.mask(1, True)
    board.map_queue(0, 1)
    board.map_queue(1, 1)
    finish(board._notify(0))
    if how == "reset":
        board.reset()
    else:
        board.map_queue(0, 2)
        assert board.pending() == 1 << 1, "the other queue still uses it"
        board.map_queue(1, NO_VECTOR)
    assert board.pending() == 0
    board.mask(1, False)
    assert board.messages == []


def test_messages_off_means_the_line_again(board: PciBoard) -> None:
    board.boot()
    board.enable_msix()
    board.map_queue(0, 1)
    board.regs.config_write(msix_at(board.regs) + 2, 0, 2)
    assert board.works()
    assert board.messages == [] and board.regs.line and board.isr() == 1


# -- the window in configuration space ------------------------------------------------------------------------------------------


def window(board: PciBoard, bar: int, offset: int, length: int) -> int:
    at = structure(board.regs, WINDOW).at
    board.regs.config_write(at + 4, bar, 1)
    board.regs.config_write(at + 8, offset, 4)
    board.regs.config_write(at + 12, length, 4)
    return at + 16


@pytest.mark.clause("PCI-DEV-062", "PCI-DEV-063")
def test_every_field_can_be_reached_through_the_window_even_with_decoding_off(board: PciBoard) -> None:
    board.set(Q_SELECT, 1)
    values = {field: board.get(field) for field in FIELDS}
    common = structure(board.regs, COMMON)
    board.regs.config_write(COMMAND, 0, 2)
    for field, value in values.items():
        data = window(board, common.bar, common.offset + field[0], field[1])
        assert board.regs.config_read(data, 4) & (1 << 8 * field[1]) - 1 == value
    data = window(board, common.bar, common.offset + Q_SIZE[0], 2)
    board.regs.config_write(data, 0xFFFF0010, 4)
    board.regs.config_write(COMMAND, MEMORY | MASTER, 2)
    board.set(Q_SELECT, 1)
    assert board.get(Q_SIZE) == 16, "the first two bytes were stored"
    assert board.get(Q_ENABLE) == values[Q_ENABLE]


def test_the_window_reads_the_isr_status_too_and_so_clears_it(board: PciBoard) -> None:
    board.boot()
    assert board.works() and board.regs.line
    isr = structure(board.regs, ISR)
    assert board.regs.config_read(window(board, isr.bar, isr.offset, 1), 1) == 1
    assert not board.regs.line


@pytest.mark.parametrize(
    ("bar", "offset", "length"), [(0, 0, 4), (5, 0, 4), (6, 0, 4), (255, 0, 4), (4, 0, 3), (4, 0, 0), (4, 0, 8), (4, 18, 4), (4, 0x4000, 4)]
)
def test_a_window_that_stands_nowhere_reaches_nothing(board: PciBoard, bar: int, offset: int, length: int) -> None:
    before = [board.get(field) for field in FIELDS]
    data = window(board, bar, offset, length)
    board.regs.config_write(data, 0x12345678, 4)
    assert board.regs.config_read(data, 4) == 0x12345678, "the register keeps what was stored"
    assert [board.get(field) for field in FIELDS] == before


# -- hostile drivers -----------------------------------------------------------------------------------------------------------

ACCESSES = st.tuples(
    st.sampled_from(["config", "common", "notify", "isr", "device", "msix", "memory"]),
    st.integers(0, 0x110),
    st.one_of(st.integers(0, 16), st.integers(0, 2**32 - 1)),
    st.sampled_from([1, 2, 4, 8]),
)


@given(stores=st.lists(ACCESSES, max_size=60), vectors=st.sampled_from([None, 0, 1, 2]), multiplier=st.sampled_from([0, 4]))
def test_no_sequence_of_accesses_crashes_the_function_or_keeps_a_driver_from_starting(
    stores: list[tuple[str, int, int, int]], vectors: int | None, multiplier: int
) -> None:
    board = PciBoard(queues=2, options={"vectors": vectors, "notify_off_multiplier": multiplier, "notif_config_data": True})
    bases = {"common": board.gpa[COMMON], "notify": board.gpa[NOTIFY], "isr": board.gpa[ISR], "device": board.gpa[DEVICE]}
    bases |= {"msix": WINDOWS[1], "memory": 0}
    with deadline(60):
        for where, offset, number, size in stores:
            value = number & (1 << 8 * size) - 1
            if where == "config":
                board.regs.config_write(offset, value, size)
                assert 0 <= board.regs.config_read(offset, size) < 1 << 8 * size
            else:
                board.regs.write(bases[where] + offset, value, size)
                assert 0 <= board.regs.read(bases[where] + offset, size) < 1 << 8 * size
            board.machine.run()
    assert starts(board)


def starts(board: PciBoard) -> bool:
    """Whether our own driver, which knows nothing of what was before, gets a capacity and both queues."""
    transport = PciTransport(RecordingBus(board.regs))
    driver = vb.VirtioBlkDriver()
    driver.attach(GuestPages(board.memory, 0x8000), transport, IOStack(), queue_size=8)
    steps = driver.probe()
    for _ in range(1000):
        try:
            next(steps)
        except StopIteration:
            break
        board.machine.run()
    return board.status() == 15 and driver.capacity_sectors == board.store.size >> 9 and len(driver.queues) == 2


def test_a_ring_outside_memory_makes_the_function_ask_for_a_reset(board: PciBoard) -> None:
    board.reset()
    board.set_status(ACKNOWLEDGE | DRIVER)
    board.accept(F_VERSION_1)
    ring = HandRing(board.memory, 8)
    board.queue(0, ring)
    board.set(Q_SELECT, 1)
    board.set((Q_DESC + 4, 4), 0xFFFFFFFF)
    board.set(Q_ENABLE, 1)
    board.set_status(board.status() | DRIVER_OK)
    assert board.status() & 0x40
    assert board.isr() == 2, "and says so"
    assert board.boot().works()


def test_a_board_over_mmio_answers_the_same_requests() -> None:
    data = bytes(range(256)) * 2
    answers = []
    for board in (Board(queues=1).boot(), PciBoard(queues=1).boot()):
        answers.append((board.request(1, 3, data=data), board.request(0, 3, room=512), board.request(99, 0)))
    assert answers[0] == answers[1]
