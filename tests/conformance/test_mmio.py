"""Clauses of virtio-mmio (VIRTIO 1.4 §4.2) about the driver's accesses, read from a log of them."""

from __future__ import annotations

import pytest

import vblklab as vb
from tests.conformance.test_basic import accesses, probed
from tests.support import Board, finish
from tests.transport.test_mmio import (
    CONFIG,
    DEVICE_FEATURES,
    DEVICE_FEATURES_SEL,
    DEVICE_ID,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SEL,
    INTERRUPT_ACK,
    INTERRUPT_STATUS,
    MAGIC,
    QUEUE_READY,
    QUEUE_SEL,
    QUEUE_SIZE,
    VERSION,
    attached,
)


@pytest.mark.clause("MMIO-DRV-012", "MMIO-DRV-013", "MMIO-DRV-028", "MMIO-DRV-029", "MMIO-DRV-026", "MMIO-DRV-027")
def test_a_placeholder_is_passed_over_without_an_error() -> None:
    board = Board(memory_bytes=1 << 20)
    board.device.device_id = 0
    driver, bus = attached(board)
    finish(driver.probe())
    assert accesses(bus) == [("read", at, 0) for at in (MAGIC, VERSION, DEVICE_ID)]
    assert not driver.queues and board.status() == 0


def test_a_machine_says_that_there_is_no_device() -> None:
    device = vb.VirtioBlkDevice()
    device.device_id = 0
    with pytest.raises(vb.ConfigError, match="there is no device"):
        vb.Pipeline(device=device, disk=vb.Ram(1 << 20)).boot(vb.SimMachine())


@pytest.mark.clause("MMIO-DRV-014", "MMIO-DRV-015")
def test_each_half_of_the_features_is_selected_before_it_is_accessed() -> None:
    _, bus = probed()
    log = accesses(bus)
    for select, way, register in ((DEVICE_FEATURES_SEL, "read", DEVICE_FEATURES), (DRIVER_FEATURES_SEL, "write", DRIVER_FEATURES)):
        found = [(log[i - 1], value) for i, (w, at, value) in enumerate(log) if (w, at) == (way, register)]
        assert [before for before, _ in found] == [("write", select, 0), ("write", select, 1)]
        if way == "write":
            assert sum(value << 32 * half for half, (_, value) in enumerate(found)) == bus.board.regs.driver_features


@pytest.mark.clause("MMIO-DRV-005", "MMIO-DRV-001", "MMIO-DRV-002")
@pytest.mark.parametrize("writeback", [False, True])
def test_the_cache_mode_is_one_byte(writeback: bool) -> None:
    driver, bus = probed()
    bus.log.clear()
    finish(driver.set_write_cache(writeback))
    assert bus.log == [("write", CONFIG + 32, int(writeback), 1)] and bus.broken == []


@pytest.mark.clause("MMIO-DRV-017")
def test_a_queue_is_described_before_it_is_made_ready() -> None:
    _, bus = probed()
    ready: set[int] = set()
    queue = -1
    for way, at, value in accesses(bus):
        if (way, at) == ("write", QUEUE_SEL):
            queue = value
        elif (way, at) == ("write", QUEUE_READY):
            assert value == 1
            ready.add(queue)
        elif way == "write" and (at == QUEUE_SIZE or 0x080 <= at <= 0x0A4):
            assert queue not in ready
    assert ready == {0, 1}


@pytest.mark.clause("MMIO-DRV-033")
def test_one_used_buffer_interrupt_is_news_of_every_queue() -> None:
    board = Board(queues=2, memory_bytes=1 << 20)
    driver, _ = attached(board)
    finish(driver.probe())
    board.regs.interrupt.set(1)
    _, queues = finish(driver.transport.interrupt())
    assert list(queues) == [0, 1]


@pytest.mark.clause("MMIO-DRV-021", "MMIO-DRV-032", "MMIO-DRV-034")
@pytest.mark.parametrize("causes", [1, 2, 3])
def test_an_interrupt_is_read_once_and_what_was_read_is_acknowledged(causes: int) -> None:
    board = Board(queues=2, memory_bytes=1 << 20)
    driver, bus = attached(board)
    finish(driver.probe())
    board.regs.interrupt.set(causes)
    bus.log.clear()
    finish(driver.interrupt())
    about = [access for access in accesses(bus) if access[1] in (INTERRUPT_STATUS, INTERRUPT_ACK)]
    assert about == [("read", INTERRUPT_STATUS, 0), ("write", INTERRUPT_ACK, causes)]
    assert board.regs.interrupt.read() == 0
