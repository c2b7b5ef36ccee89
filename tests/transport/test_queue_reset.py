"""VIRTIO_F_RING_RESET on both transports: one queue is reset with I/O in flight and used again, the other goes on.  VIRTIO 1.4 §2.6."""

from __future__ import annotations

from typing import Any

import pytest

import vblklab as vb
from tests.support import DRIVER_OK, IN, NEEDS_RESET, OK, OUT, Board, HandRing, Held
from tests.transport.pci_board import Q_ENABLE, Q_SELECT, Q_SIZE, PciBoard

Q_RESET = (58, 2)
F_IN_ORDER, F_RING_RESET = 1 << 35, 1 << 40
BOARDS = {"mmio": Board, "pci": PciBoard}
BYTES = bytes(range(256)) * 2


def resetting(board: Any, number: int = 0, *, ask: bool = False) -> int:
    """What QueueReset reads for a queue; ``ask`` writes 1 to it first."""
    if isinstance(board, PciBoard):
        board.set(Q_SELECT, number)
        if ask:
            board.set(Q_RESET, 1)
        return board.get(Q_RESET)
    board.regs.write(0x030, number)
    if ask:
        board.regs.write(0x0C0, 1)
    return int(board.regs.read(0x0C0))


def ready(board: Any, number: int = 0) -> int:
    if isinstance(board, PciBoard):
        board.set(Q_SELECT, number)
        return board.get(Q_ENABLE)
    board.regs.write(0x030, number)
    return int(board.regs.read(0x044))


@pytest.fixture(params=BOARDS)
def board(request: pytest.FixtureRequest) -> Any:
    """Two queues, an engine that ends what it is told to end, RING_RESET accepted."""
    made = BOARDS[request.param](vb.VirtioBlkDevice(ring_reset=True), engine=Held(), queues=2)
    return made.boot()


def end_all(board: Any) -> None:
    while board.engine.started:
        board.engine.end()
    board.machine.run()


@pytest.mark.clause(
    "MMIO-DEV-011", "MMIO-DEV-012", "MMIO-DEV-013", "MMIO-DEV-014", "PCI-DEV-027", "PCI-DEV-028", "PCI-DEV-029", "PCI-DEV-030"
)
def test_a_queue_is_reset_when_what_was_in_flight_has_left_guest_memory(board: Any) -> None:
    board.send(board.pieces(OUT, 1, data=BYTES))
    board.send(board.pieces(IN, 1, room=512, slot=1), slots=range(3, 6))
    assert len(board.engine.started) == 2
    assert resetting(board, ask=True) == 1
    board.machine.run()
    assert resetting(board) == 1
    board.engine.end()
    board.machine.run()
    assert resetting(board) == 1, "one is still in flight"
    board.engine.end()
    board.machine.run()
    assert (resetting(board), ready(board)) == (0, 0)
    assert (resetting(board, 1), ready(board, 1)) == (0, 1)


@pytest.mark.clause("BASIC-DEV-014", "BASIC-DEV-015")
def test_2_6_1_a_queue_that_is_reset_is_not_served_and_tells_nothing(board: Any) -> None:
    board.send(board.pieces(OUT, 1, data=BYTES))
    board.send(board.pieces(OUT, 2, data=BYTES, slot=1), slots=range(3, 6), kick=False)
    board.notified.clear()
    resetting(board, ask=True)
    board.kick()
    end_all(board)
    board.kick()
    assert board.notified == [] and board.rings[0].used() == [] and board.engine.started == []
    assert [entry[1] for entry in board.store.log if entry[0] == "writev"] == [512]


def test_the_other_queue_goes_on_while_one_is_reset(board: Any) -> None:
    board.send(board.pieces(OUT, 1, data=BYTES))
    held = board.engine.started[0]
    resetting(board, ask=True)
    pieces = board.pieces(OUT, 4, data=BYTES, slot=1)
    head = board.send(pieces, queue=1)
    board.engine.end(next(op for op in board.engine.started if op is not held))
    board.machine.run()
    assert [each[0] for each in board.rings[1].used()] == [head] and board.writable(pieces) == b"\0"
    assert board.notified == [1] and resetting(board) == 1
    end_all(board)
    assert resetting(board) == 0


@pytest.mark.clause("BASIC-DEV-016", "BASIC-DEV-017", "MMIO-DEV-010", "PCI-DEV-026")
@pytest.mark.parametrize("size", [4, 8, 16])
def test_2_6_2_a_queue_that_was_reset_begins_afresh_where_and_as_large_as_it_is_told(board: Any, size: int) -> None:
    for turn in range(3):
        board.send(board.pieces(OUT, turn, data=BYTES))
        end_all(board)
    resetting(board, ask=True)
    board.machine.run()
    assert resetting(board) == 0
    board.rings[0] = HandRing(board.memory, size, at=0x8000)
    board.queue(0, board.rings[0])
    assert (resetting(board), ready(board)) == (0, 1)
    for turn in range(2 * size):
        pieces = board.pieces(IN, 1, room=512)
        head = board.send(pieces)
        end_all(board)
        assert board.rings[0].used() == [(head, 513)] and board.rings[0].used_idx == turn + 1
        assert board.writable(pieces) == BYTES + bytes((OK,))
    assert board.device.queues[0].size == size


@pytest.mark.clause("MMIO-DEV-009", "PCI-DEV-025")
def test_a_reset_of_the_device_ends_that_of_a_queue(board: Any) -> None:
    board.send(board.pieces(OUT, 1, data=BYTES))
    assert resetting(board, ask=True) == 1
    board.set_status(0)
    board.machine.run()
    assert board.status() != 0
    end_all(board)
    assert (board.status(), resetting(board), ready(board)) == (0, 0, 0)
    board.rings.clear()
    board.engine.__class__ = type("Prompt", (Held,), {"flush": _at_once})
    assert board.boot().works(0) and board.works(1)


def _at_once(self: Held) -> Any:
    yield from Held.flush(self)
    while self.started:
        self.end()


def test_nothing_is_written_to_a_queue_that_is_being_reset(board: Any) -> None:
    board.send(board.pieces(OUT, 1, data=BYTES))
    resetting(board, ask=True)
    board.queue(0, HandRing(board.memory, 4, at=0x8000))
    assert resetting(board, ask=True) == 1
    end_all(board)
    assert (resetting(board), ready(board)) == (0, 0)
    if isinstance(board, PciBoard):
        assert board.get(Q_SIZE) == board.device.queue_size_max


def test_without_the_feature_nobody_can_reset_a_queue(board: Any) -> None:
    for made in BOARDS.values():
        other: Any = made(queues=1)
        assert not other.boot().offered() & F_RING_RESET
        assert resetting(other, ask=True) == 0 and ready(other) == 1 and other.works()
    board.reset()
    board.rings.clear()
    board.boot(board.offered() & ~F_RING_RESET)
    assert resetting(board, ask=True) == 0 and ready(board) == 1


def test_a_queue_that_was_reset_and_lies_nowhere_asks_for_a_reset(board: Any) -> None:
    resetting(board, ask=True)
    board.machine.run()
    ring = HandRing(board.memory, 8, at=0x8000)
    ring.desc_at = 1 << 40
    board.queue(0, ring)
    assert board.status() & NEEDS_RESET and board.config_interrupts


def test_a_queue_that_is_not_ready_is_reset_at_once(board: Any) -> None:
    assert resetting(board, 7, ask=True) == 0
    resetting(board, ask=True)
    board.machine.run()
    assert resetting(board, ask=True) == 0 and ready(board) == 0


@pytest.mark.parametrize("made", BOARDS.values(), ids=BOARDS)
@pytest.mark.parametrize("in_order", [False, True])
def test_what_was_filled_and_not_shown_is_forgotten(made: Any, in_order: bool) -> None:
    board = made(vb.VirtioBlkDevice(ring_reset=True, in_order=in_order), engine=Held(), queues=1).boot()
    assert bool(board.offered() & F_IN_ORDER) == in_order
    for slot in range(2):
        board.send(board.pieces(OUT, slot, data=BYTES, slot=slot), slots=range(3 * slot, 3 * slot + 3))
    first, second = board.engine.started
    board.engine.end(second)
    while board.machine.step()[0] != "completion_to_ring":
        pass
    if in_order:
        board.machine.run()
        assert board.rings[0].used() == [], "it waits for its turn"
    resetting(board, ask=True)
    board.machine.run()
    assert resetting(board) == 1
    board.engine.end(first)
    board.machine.run()
    assert resetting(board) == 0 and board.rings[0].used() == []
    assert board.status() & DRIVER_OK and not board.status() & NEEDS_RESET


@pytest.mark.parametrize("made", BOARDS.values(), ids=BOARDS)
def test_a_buffer_that_was_popped_and_not_yet_handled_is_let_go_of(made: Any) -> None:
    board = made(vb.VirtioBlkDevice(ring_reset=True), engine=Held(), queues=1).boot()
    board.send(board.pieces(OUT, 1, data=BYTES), kick=False)
    board.doorbell(0)
    while board.machine.step()[0] != "pop_write":
        pass
    resetting(board, ask=True)
    board.machine.run()
    assert resetting(board) == 0 and board.engine.started == [] and board.store.log == []


def test_a_learners_step_that_takes_its_time_does_not_hold_the_reset_up() -> None:
    class Slow(vb.VirtioBlkDevice):
        def complete(self, request: Any, status: int) -> Any:
            yield ("virtio_queue_empty", 0)
            yield from super().complete(request, status)

    board = Board(Slow(ring_reset=True), engine=Held(), queues=1).boot()
    board.send(board.pieces(OUT, 1, data=BYTES))
    board.engine.end()
    while board.machine.step()[0] != "virtio_queue_empty":
        pass
    assert resetting(board, ask=True) == 1
    board.machine.run()
    assert resetting(board) == 0 and board.rings[0].used() == []
