"""Clauses of §2.1 to §2.6, §3 and §6 of VIRTIO 1.4: the driver's handshake, access by access, and what either side may touch."""

from __future__ import annotations

import errno
from typing import Any

import pytest

import vblklab as vb
from tests.guest.test_virtio_blk_driver import READ, Quiet
from tests.guest.test_virtio_blk_driver import Board as DriverBoard
from tests.support import ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, Board, HandRing, Trampoline, finish, pair
from tests.transport.test_mmio import (
    CONFIG,
    DEVICE_FEATURES,
    DRIVER_FEATURES,
    QUEUE_READY,
    QUEUE_SEL,
    QUEUE_SIZE_MAX,
    STATUS,
    WatchedBus,
    attached,
)
from vblklab.guest.virtio_blk import VirtioBlkDriver
from vblklab.memory import GuestMemory, GuestPages
from vblklab.ring import SplitDriver
from vblklab.spec.virtio import Feature
from vblklab.spec.virtio_blk import CONFIG_BYTES

SUSPEND = 16
VERSION_1 = 1 << 32
Access = tuple[str, int, int]


class Unwilling(vb.VirtioBlkDevice):
    """Refuses every subset of its features."""

    def accepts(self, features: int) -> bool:
        return False


class Offers(Quiet):
    """Offers a bit more."""

    more = 0

    def features(self) -> int:
        return super().features() | self.more


def probed(device: vb.VirtioBlkDevice | None = None, **options: Any) -> tuple[VirtioBlkDriver, WatchedBus]:
    driver, bus = attached(Board(device, queues=2, memory_bytes=1 << 20), **options)
    finish(driver.probe())
    return driver, bus


def accesses(bus: WatchedBus) -> list[Access]:
    return [(way, offset, value) for way, offset, value, _ in bus.log]


def written(bus: WatchedBus, offset: int) -> list[int]:
    return [value for way, at, value in accesses(bus) if (way, at) == ("write", offset)]


def place(bus: WatchedBus, way: str, offset: int, value: int | None = None, *, last: bool = False) -> int:
    """Where in the log the first (or last) such access stands."""
    found = [i for i, (w, o, v) in enumerate(accesses(bus)) if (w, o) == (way, offset) and value in (None, v)]
    assert found, f"no {way} of {offset:#x}"
    return found[-1 if last else 0]


# -- the handshake -------------------------------------------------------------------------------------------------------------------

STEPS = [0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | FEATURES_OK, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK]


@pytest.mark.clause("BASIC-DRV-001", "BASIC-DRV-002", "BASIC-DRV-023", "BASIC-DRV-024", "BASIC-DRV-025", "BASIC-DRV-039", "BASIC-DRV-040")
@pytest.mark.clause("MMIO-DRV-031")
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_status_is_written_bit_by_bit_from_reset_to_driver_ok(packed: bool) -> None:
    board = Board(vb.VirtioBlkDevice(packed=packed), queues=2, memory_bytes=1 << 20)
    driver, bus = attached(board)
    driver.packed = packed
    finish(driver.probe())
    assert written(bus, STATUS) == STEPS
    finish(driver.restart())
    assert written(bus, STATUS) == [*STEPS, 0, *STEPS]
    assert not any(value & SUSPEND for value in written(bus, STATUS))


@pytest.mark.clause("BASIC-DRV-001", "BASIC-DRV-026", "BASIC-DRV-027", "BASIC-DRV-028", "BASIC-DRV-029", "BASIC-DRV-030")
def test_each_step_stands_between_the_status_bits_around_it() -> None:
    _, bus = probed()
    acknowledged, driver, features_ok, driver_ok = (place(bus, "write", STATUS, value) for value in STEPS[1:])
    negotiation = [place(bus, way, at, last=last) for way, at in (("read", DEVICE_FEATURES), ("write", DRIVER_FEATURES)) for last in (0, 1)]
    assert acknowledged < driver < min(negotiation) and max(negotiation) < features_ok
    read_back = next(i for i, access in enumerate(accesses(bus)) if i > features_ok and access[:2] == ("read", STATUS))
    setup = [place(bus, way, at, last=last) for way, at in (("read", QUEUE_SIZE_MAX), ("write", QUEUE_READY)) for last in (0, 1)]
    setup += [i for i, (_, at, _) in enumerate(accesses(bus)) if at >= CONFIG or at == QUEUE_SEL]
    assert features_ok < read_back < min(setup) and max(setup) < driver_ok
    assert max(i for i, (way, _, _) in enumerate(accesses(bus)) if way == "write") == driver_ok


@pytest.mark.clause("BASIC-DRV-028", "BASIC-DRV-035")
def test_a_device_that_refuses_the_features_is_abandoned() -> None:
    driver, bus = attached(Board(Unwilling(), memory_bytes=1 << 20))
    with pytest.raises(vb.VirtioError):
        finish(driver.probe())
    after = accesses(bus)[place(bus, "write", STATUS, STEPS[3]) + 1 :]
    assert {(way, at) for way, at, _ in after} == {("read", STATUS), ("write", STATUS)}
    assert written(bus, STATUS)[-1] == STEPS[2] | FAILED


@pytest.mark.clause("BASIC-DRV-003")
def test_a_driver_that_failed_begins_again_with_a_reset() -> None:
    driver, bus = attached(Board(Unwilling(), memory_bytes=1 << 20))
    for _ in range(2):
        bus.log.clear()
        with pytest.raises(vb.VirtioError):
            finish(driver.probe())
        assert written(bus, STATUS) == [*STEPS[:4], STEPS[2] | FAILED]


@pytest.mark.clause("BASIC-DRV-032", "BASIC-DRV-033")
def test_negotiation_writes_no_configuration_and_is_over_with_features_ok() -> None:
    driver, bus = probed()
    features_ok = place(bus, "write", STATUS, STEPS[3])
    finish(driver.set_write_cache(False))
    writes = [i for i, (way, at, _) in enumerate(accesses(bus)) if way == "write" and at >= CONFIG]
    assert writes and min(writes) > features_ok
    assert place(bus, "write", DRIVER_FEATURES, last=True) < features_ok
    assert driver.features == bus.board.regs.driver_features


@pytest.mark.clause("BASIC-DRV-036")
@pytest.mark.parametrize("poll", [False, True])
def test_no_kick_comes_before_driver_ok(poll: bool) -> None:
    driver, bus = attached(Board(queues=2, memory_bytes=1 << 20), poll=poll)
    kicks: list[int] = []
    bus.notify = lambda queue: kicks.append(bus.board.status()) or iter(())  # type: ignore[assignment,func-returns-value]
    finish(driver.probe())
    finish(driver.restart())
    assert all(status & DRIVER_OK for status in kicks)


# -- features ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("BASIC-DRV-005", "BASIC-DRV-007", "BASIC-DRV-008", "BASIC-DRV-009", "BASIC-DRV-012")
@pytest.mark.clause("BASIC-DRV-055", "BASIC-DRV-056")
@pytest.mark.parametrize("bit", [*range(64)])
def test_of_what_is_offered_only_what_the_driver_knows_is_accepted(bit: int) -> None:
    """Each bit alone beside VERSION_1: unknown, reserved and SR_IOV bits are passed over, and the driver goes on."""
    device = Quiet()
    device.offers = VERSION_1 | 1 << bit
    device.accepts = lambda features: True  # type: ignore[method-assign]
    board = DriverBoard(device).probe()
    accepted = board.registers.driver_features
    assert not accepted & ~device.offers
    assert accepted & ~VERSION_1 == (1 << bit & int(VirtioBlkDriver.FEATURES) & ~VERSION_1)
    assert not accepted & Feature.SR_IOV
    assert board.status == STEPS[4]


@pytest.mark.clause("BASIC-DRV-010")
@pytest.mark.parametrize("missing", [bit for bit in range(64) if Board(queues=2).offered() >> bit & 1 and bit != 32])
def test_the_driver_does_without_any_one_feature(missing: int) -> None:
    device = Quiet()
    device.offers = Board(queues=2).offered() & ~(1 << missing) & ~(1 << 11)
    board = DriverBoard(device, queues=2).probe()
    board.submit(READ)
    board.use(board.ring().get("H", board.ring().avail_at + 4), 4097)
    assert board.ended == [(1, 0)]


@pytest.mark.clause("BASIC-DRV-011")
@pytest.mark.parametrize("missing", ["VERSION_1", "RING_PACKED"])
def test_without_what_it_cannot_do_without_the_driver_sets_failed(missing: str) -> None:
    device = Quiet()
    device.offers = int(Feature.EVENT_IDX) | (0 if missing == "VERSION_1" else VERSION_1)
    board = DriverBoard(device)
    board.driver.packed = missing == "RING_PACKED"
    with pytest.raises(vb.VirtioError):
        board.probe()
    assert board.status & FAILED and not board.status & DRIVER_OK


@pytest.mark.clause("BASIC-DEV-005", "BASIC-DEV-008", "BASIC-DEV-031", "BASIC-DEV-041")
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("queues", [1, 4])
def test_the_device_offers_what_it_honours(queues: int, read_only: bool, packed: bool) -> None:
    offered = Board(vb.VirtioBlkDevice(packed=packed, read_only=read_only, size_max=4096), queues=queues).offered()
    assert offered & VERSION_1 and bool(offered >> 34 & 1) is packed
    assert offered & 1 << 9, "FLUSH, which CONFIG_WCE needs"
    reserved = offered >> 24 & ~(1 << 4 | 1 << 5 | 1 << 8 | 1 << 10)
    assert not reserved & ~(1 << 11 | 1 << 14 | 1 << 16), "of the reserved bits IN_ORDER, NOTIFICATION_DATA and RING_RESET at most"
    assert not offered & (1 << 0 | 1 << 3 | 1 << 4 | 1 << 7 | 1 << 8), "legacy bits and a geometry that nobody has"
    assert bool(offered >> 5 & 1) is read_only and bool(offered >> 12 & 1) is (queues > 1)


# -- configuration space -------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("BASIC-DRV-018")
@pytest.mark.parametrize("beyond", [0, 4, 196])
def test_a_configuration_space_larger_than_known_is_no_reason_to_stop(beyond: int) -> None:
    class Newer(Quiet):
        def read_config(self) -> bytes:
            return super().read_config()[:CONFIG_BYTES] + b"\x5a" * beyond

    assert DriverBoard(Newer()).probe().status == STEPS[4]


@pytest.mark.clause("BASIC-DEV-013")
def test_every_offered_field_reads_the_same_before_and_after_features_ok() -> None:
    board = Board(vb.VirtioBlkDevice(size_max=4096, block_size=4096), queues=2)

    def fields() -> list[int]:
        return [board.regs.read(CONFIG + at, 1) for at in range(CONFIG_BYTES)]

    board.reset()
    before = fields()
    assert before[8:10] == [0x00, 0x10] and before[34:36] == [2, 0] and before[36:40] != [0] * 4
    board.boot()
    assert fields() == before


# -- buffers -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("BASIC-DRV-037")
@pytest.mark.parametrize("indirect", [0, 4])
@pytest.mark.parametrize("event_idx", [True, False])
def test_what_describes_a_buffer_in_flight_stays_as_it_is(indirect: int, event_idx: bool) -> None:
    driver, device, ring = pair(size=8, indirect=indirect, event_idx=event_idx)
    head = driver.add_sgs([(0x8000, 16)], [(0x9000, 512), (0xA000, 1)], "held")
    driver.publish()
    held = device.pop()
    assert held is not None

    def described() -> list[Any]:
        found: list[Any] = [ring.get("H", ring.avail_at + 4 + 2 * (65530 % 8)), ring.read_desc(head)]
        if indirect:
            return [*found, ring.memory.read(found[1][0], 48)]
        second = ring.read_desc(found[1][3])
        return [*found, second, ring.read_desc(second[3])]

    before = described()
    for turn in range(4):
        driver.add_sgs([(0x8000, 16)], [(0xB000, 1)], turn)
        driver.publish()
        driver.kick_prepare()
        chain = device.pop()
        assert chain is not None
        device.fill(chain, 1)
        device.flush()
        driver.disable_cb()
        assert driver.get_buf() == (turn, 1)
        driver.enable_cb()
        driver.enable_cb_check()
        assert described() == before


class Slow(Quiet):
    """Its reset takes as long as the test wants."""

    def reset(self) -> None:
        self.queues = {}


@pytest.mark.clause("BASIC-DRV-038")
@pytest.mark.parametrize("why", ["restart", "DEVICE_NEEDS_RESET", "a lie in the used ring"])
def test_buffers_are_taken_back_when_the_reset_is_over(why: str) -> None:
    board = DriverBoard(Slow())
    finish_reset = board.device.on_reset_done
    finish_reset()
    board.probe()
    board.submit(READ, io=1)
    board.submit(READ, io=2)
    ring = board.ring()
    if why == "restart":
        steps = board.driver.restart()
    else:
        steps = board.driver.interrupt()
        if why == "DEVICE_NEEDS_RESET":
            board.registers.needs_reset(vb.VirtioError("enough"))
        else:
            board.registers.interrupt.set(1)
            ring.put("II", ring.used_at + 4, 777, 1)
            ring.put("H", ring.used_at + 2, 1)
    walk = Trampoline(steps)
    reads = 0

    def read(offset: int, size: int = 4) -> Any:
        nonlocal reads
        reads += offset == STATUS
        yield ("mmio_read", offset, 0, 0)
        return board.registers.read(offset, size)

    board.bus.read = read  # type: ignore[method-assign]
    for _ in range(40):
        walk.step()
    assert reads > 10 and board.ended == [] and board.status, "still the device's"
    finish_reset()
    with pytest.raises(StopIteration):
        for _ in range(1000):
            walk.step()
    assert sorted(board.ended) == [(1, errno.EIO), (2, errno.EIO)]


def test_a_restart_overtakes_a_driver_that_waits_for_its_reset() -> None:
    board = DriverBoard(Slow())
    finish_reset = board.device.on_reset_done
    finish_reset()
    board.probe()
    board.submit(READ)
    board.registers.needs_reset(vb.VirtioError("enough"))

    def read(offset: int, size: int = 4) -> Any:
        yield ("mmio_read", offset, 0, 0)
        return board.registers.read(offset, size)

    board.bus.read = read  # type: ignore[method-assign]
    failing, restarting = Trampoline(board.driver.interrupt()), Trampoline(board.driver.restart())
    for walk in (failing, restarting):
        for _ in range(20):
            walk.step()
    with pytest.raises(StopIteration):
        failing.run()
    assert not board.ended
    finish_reset()
    with pytest.raises(StopIteration):
        restarting.run()
    assert board.ended == [(1, errno.EIO)] and board.driver.failed is None and board.status == STEPS[4]


@pytest.mark.clause("BASIC-DRV-050")
@pytest.mark.parametrize("indirect", [0, 4])
def test_the_device_is_given_guest_physical_addresses(indirect: int) -> None:
    """Memory that begins at 4 GiB, so that an offset into it or a host address would be elsewhere."""
    base = 1 << 32
    memory = GuestMemory(bytearray(1 << 16), base)
    driver = SplitDriver.alloc(GuestPages(memory), 8, indirect_segments=indirect)
    driver.add_sgs([(base + 0x8000, 16)], [(base + 0x9000, 1)], "token")
    ring = HandRing.over(memory, driver.layout)
    at, length, flags, link = ring.read_desc(0)
    rows = [ring.get("QIHH", at), ring.get("QIHH", at + 16)] if flags & 4 else [(at, length, flags, link), ring.read_desc(link)]
    assert base <= at < base + (1 << 16) and all(base <= gpa < base + (1 << 16) for gpa, _ in driver.layout.areas())
    assert [row[0] for row in rows] == [base + 0x8000, base + 0x9000]
