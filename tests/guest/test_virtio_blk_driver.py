"""The virtio-blk driver: against a register file and rings without a machine, and on the simulator where time matters."""

from __future__ import annotations

import errno
from collections.abc import Generator
from typing import Any, ClassVar

import pytest

import vblklab as vb
from tests.support import HandRing, finish
from vblklab.iostack import Bio, IOStack, Op
from vblklab.memory import GuestMemory, GuestPages
from vblklab.spec.virtio import Feature, Status
from vblklab.spec.virtio_blk import BlkFeature
from vblklab.transport import MmioRegisters, MmioTransport

Steps = Generator[Any, int, Any]
RUNNING = int(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)
READ, WRITE, FLUSH, DISCARD, ZEROES, GET_ID = (int(op) for op in (Op.READ, Op.WRITE, Op.FLUSH, Op.DISCARD, Op.WRITE_ZEROES, Op.DRV_IN))


class Bus:
    """Register accesses as calls.  ``kicks`` notes the doorbells; nobody answers them."""

    def __init__(self, registers: MmioRegisters) -> None:
        self.registers = registers
        self.kicks: list[int] = []

    def read(self, offset: int, size: int = 4) -> Steps:
        return self.registers.read(offset, size)
        yield

    def write(self, offset: int, value: int, size: int = 4) -> Steps:
        self.registers.write(offset, value, size)
        return
        yield

    def notify(self, queue: int) -> Steps:
        self.kicks.append(queue)
        return
        yield


class Quiet(vb.VirtioBlkDevice):
    """A device without an event loop: it answers registers, and the test plays its part in the rings."""

    offers: int | None = None
    config: ClassVar[dict[int, bytes]] = {}

    def features(self) -> int:
        return super().features() if self.offers is None else self.offers

    def read_config(self) -> bytes:
        data = bytearray(super().read_config())
        for at, value in self.config.items():
            data[at : at + len(value)] = value
        return bytes(data)

    def reset(self) -> None:
        self.queues = {}
        self.on_reset_done()


class Board:
    """A driver that has not probed yet, the stack above it, a Quiet device below."""

    def __init__(self, device: vb.VirtioBlkDevice | None = None, *, queues: int = 1, size: int = 8, **options: Any) -> None:
        self.memory = GuestMemory(bytearray(4 << 20))
        self.device = device or Quiet()
        self.device.num_queues = queues
        self.registers = MmioRegisters(self.memory, self.device)
        self.device.attach(object(), 2048, read_only=False, notify=lambda queue: finish(_none()), wake=lambda: None)  # type: ignore[arg-type]
        self.device.on_reset_done = self.registers.reset_done
        self.device.on_config_changed = self.registers.config_changed
        self.bus = Bus(self.registers)
        self.stack = IOStack()
        self.driver = vb.VirtioBlkDriver(**options)
        self.driver.attach(GuestPages(self.memory, 0x1000), MmioTransport(self.bus), self.stack, queue_size=size)
        self.ended: list[tuple[int, int]] = []

    def probe(self) -> Board:
        finish(self.driver.probe())
        return self

    @property
    def status(self) -> int:
        return int(self.registers.status)

    def ring(self, queue: int = 0) -> HandRing:
        return HandRing.over(self.memory, self.driver.queues[queue].layout)

    def submit(
        self, op: int = READ, sector: int = 8, segments: list[tuple[int, int]] | None = None, *, io: int = 1, length: int = 0
    ) -> None:
        segments = [(0x300000, 4096)] if segments is None else segments
        length = length or sum(size for _, size in segments)
        bio = Bio(op, sector, length, segments, io, 0, lambda one: self.ended.append((one.io, one.status)))
        finish(self.stack.submit_bio(bio, None, lambda: None))

    def chain(self, head: int, queue: int = 0) -> list[tuple[int, int, int]]:
        """(gpa, length, flags) of a buffer, the indirect table followed."""
        ring = self.ring(queue)
        gpa, length, flags, link = ring.read_desc(head)
        if flags & 4:
            rows = [ring.get("QIHH", gpa + 16 * i) for i in range(length // 16)]
            at, out = 0, []
        else:
            rows, at, out = [ring.read_desc(slot) for slot in range(ring.size)], head, []
        while True:
            gpa, length, flags, link = rows[at]
            out.append((gpa, length, flags & ~1))
            if not flags & 1:
                return out
            at = link

    def use(self, head: int, length: int, status: int = 0, *, interrupt: bool = True) -> None:
        """The device's part: status byte, used element, used.idx, interrupt."""
        ring = self.ring()
        self.memory.write(self.chain(head)[-1][0], bytes((status,)))
        idx = ring.used_idx
        ring.put("II", ring.used_at + 4 + 8 * (idx % ring.size), head, length)
        ring.put("H", ring.used_at + 2, (idx + 1) & 0xFFFF)
        if interrupt:
            self.registers.interrupt.set(1)
            finish(self.driver.interrupt())


def _never() -> None:
    raise AssertionError("woken, but never waited")


def _none() -> Steps:
    return
    yield


# -- probe ---------------------------------------------------------------------------------------------------------------------


def test_3_1_1_probe_ends_with_driver_ok_and_the_devices_limits() -> None:
    board = Board(Quiet(seg_max=9, size_max=8192, block_size=4096), queues=3, size=16).probe()
    assert board.status == RUNNING
    limits = board.driver.limits
    assert (limits.max_segments, limits.max_segment_bytes, limits.logical_block_bytes) == (9, 8192, 4096)
    assert (board.driver.capacity_sectors, len(board.driver.queues)) == (2048, 3)
    assert sorted(board.device.queues) == [0, 1, 2]


@pytest.mark.parametrize("extra", [int(Feature.RING_PACKED), int(Feature.ORDER_PLATFORM), 1 << 50, int(BlkFeature.GEOMETRY), 1 << 24])
def test_6_1_a_feature_that_the_driver_does_not_know_is_never_accepted(extra: int) -> None:
    device = Quiet()
    device.offers = int(Feature.VERSION_1 | Feature.EVENT_IDX) | extra
    board = Board(device).probe()
    assert board.registers.driver_features == Feature.VERSION_1 | Feature.EVENT_IDX


@pytest.mark.clause("BASIC-DRV-046")
def test_the_allow_list_bounds_what_is_accepted() -> None:
    board = Board(features=int(Feature.INDIRECT_DESC)).probe()
    assert board.registers.driver_features == Feature.VERSION_1 | Feature.INDIRECT_DESC
    assert not board.driver.queues[0].event_idx


def test_an_allow_list_with_what_is_not_implemented_is_refused() -> None:
    with pytest.raises(vb.ConfigError, match="not implemented"):
        vb.VirtioBlkDriver(features=int(Feature.RING_PACKED))


class Refuses(Quiet):
    def accepts(self, features: int) -> bool:
        return False


@pytest.mark.clause("BASIC-DRV-011", "BASIC-DRV-034", "BASIC-DRV-047")
@pytest.mark.parametrize(
    ("device", "message"),
    [
        (Refuses(), "FEATURES_OK reads back as 0"),
        (type("Legacy", (Quiet,), {"offers": int(Feature.EVENT_IDX)})(), "FEATURES_OK reads back as 0"),
        (type("BlockOf3", (Quiet,), {"config": {20: b"\3\0\0\0"}})(), "blk_size 3"),
        (type("NoQueue", (Quiet,), {"config": {34: b"\0\0"}, "offers": int(Feature.VERSION_1 | BlkFeature.MQ)})(), "num_queues 0"),
        (
            type("Liar", (Quiet,), {"config": {34: b"\7\0"}, "offers": int(Feature.VERSION_1 | BlkFeature.MQ)})(),
            "queue 1 does not exist although num_queues is 7",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Quiet) else None,
)
def test_3_1_1_a_probe_that_cannot_go_on_sets_failed(device: Quiet, message: str) -> None:
    board = Board(device)
    with pytest.raises(vb.VirtioError, match=message):
        board.probe()
    assert board.status & Status.FAILED and not board.status & Status.DRIVER_OK


@pytest.mark.parametrize(("attribute", "value", "register"), [("device_id", 4, "DeviceID"), ("device_id", 1, "DeviceID")])
def test_4_2_3_1_1_a_device_of_another_kind_is_left_alone(attribute: str, value: int, register: str) -> None:
    device = Quiet()
    setattr(device, attribute, value)
    board = Board(device)
    with pytest.raises(vb.VirtioError, match=register):
        board.probe()
    assert board.status == 0, "not touched"


@pytest.mark.clause("MMIO-DRV-016")
def test_the_driver_uses_the_smaller_of_its_and_the_devices_queue_size() -> None:
    assert Board(Quiet(queue_size_max=4), size=16).probe().driver.queues[0].size == 4
    assert Board(Quiet(queue_size_max=64), size=16).probe().driver.queues[0].size == 16


def test_the_driver_caps_the_number_of_queues() -> None:
    driver = vb.VirtioBlkDriver(queues=2)
    board = Board(queues=4)
    driver.attach(GuestPages(board.memory, 0x1000), board.driver.transport, board.stack, queue_size=8)
    finish(driver.probe())
    assert len(driver.queues) == driver.num_queues == 2


def test_a_queue_of_2_without_indirect_is_refused() -> None:
    with pytest.raises(vb.ConfigError, match="a request needs 3 descriptors"):
        Board(Quiet(indirect=False), size=2).probe()


def test_5_2_4_without_indirect_a_request_never_has_more_segments_than_the_queue_has_room_for() -> None:
    assert Board(Quiet(indirect=False, seg_max=126), size=8).probe().driver.limits.max_segments == 6


# -- requests --------------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("BLK-DRV-008", "BLK-DRV-009", "BLK-DRV-011", "BLK-DRV-012", "BLK-DRV-018")
@pytest.mark.parametrize("indirect", [True, False])
@pytest.mark.parametrize(
    ("op", "kind", "sector", "flags"),
    [(READ, 0, 8, 2), (WRITE, 1, 8, 0), (FLUSH, 4, 0, None), (GET_ID, 8, 0, 2), (DISCARD, 11, 0, None), (ZEROES, 13, 0, None)],
)
def test_5_2_6_a_request_is_header_data_and_status(indirect: bool, op: int, kind: int, sector: int, flags: int | None) -> None:
    board = Board(Quiet(indirect=indirect)).probe()
    length = 4096 if op in (DISCARD, ZEROES) else 20 if op == GET_ID else 0
    board.submit(op, 8, [] if flags is None else [(0x300000, length or 4096)], length=length)
    assert board.bus.kicks == [0]
    head = board.ring().get("H", board.ring().avail_at + 4)
    header, *data, status = board.chain(head)
    assert header[1:] == (16, 0) and status[1:] == (1, 2)
    assert board.ring().get("IIQ", header[0]) == (kind, 0, sector)
    if flags is not None:
        assert data == [(0x300000, length or 4096, flags)]
    elif op == FLUSH:
        assert not data
    else:
        ((gpa, size, way),) = data
        assert (size, way) == (16, 0)
        assert board.ring().get("QII", gpa) == (8, 8, 1 if op == ZEROES else 0)
    assert board.memory.read(status[0], 1) != b"\0", "a device that writes no status must not look like success"
    board.use(head, (length or 4096) + 1 if op in (READ, GET_ID) else 1)
    assert board.ended == [(1, 0)]


@pytest.mark.parametrize(("status", "error"), [(0, 0), (1, errno.EIO), (2, errno.EOPNOTSUPP), (3, errno.EIO), (255, errno.EIO)])
def test_5_2_6_the_status_byte_becomes_an_errno(status: int, error: int) -> None:
    board = Board().probe()
    board.submit()
    board.use(board.ring().get("H", board.ring().avail_at + 4), 4097, status)
    assert board.ended == [(1, error)]


def test_completions_out_of_order_reach_their_own_bio() -> None:
    board = Board().probe()
    for io in (1, 2, 3):
        board.submit(sector=io * 8, segments=[(0x300000 + io * 4096, 4096)], io=io)
    heads = [board.ring().get("H", board.ring().avail_at + 4 + 2 * i) for i in range(3)]
    for at in (2, 0, 1):
        board.use(heads[at], 4097, status=at)
    assert board.ended == [(3, errno.EOPNOTSUPP), (1, 0), (2, errno.EIO)]


def test_a_full_ring_refuses_and_a_completion_lets_the_waiting_one_in() -> None:
    board = Board(Quiet(indirect=False), size=4).probe()
    for io in (1, 2, 3):
        board.submit(io=io)
    assert board.ring().avail_idx == 1 and board.stack.counts["requeues"] >= 2
    for io in (1, 2, 3):
        ring = board.ring()
        board.use(ring.get("H", ring.avail_at + 4 + 2 * ((io - 1) % 4)), 4097)
        assert board.ended == [(n, 0) for n in range(1, io + 1)]
        assert board.ring().avail_idx == min(io + 1, 3)


def test_a_device_that_lies_about_its_used_ring_ends_every_request_with_eio() -> None:
    board = Board().probe()
    for io in (1, 2):
        board.submit(io=io)
    ring = board.ring()
    ring.put("II", ring.used_at + 4, 777, 1)
    ring.put("H", ring.used_at + 2, 1)
    board.registers.interrupt.set(1)
    finish(board.driver.interrupt())
    assert board.driver.failed is not None and "777" in str(board.driver.failed)
    assert sorted(board.ended) == [(1, errno.EIO), (2, errno.EIO)]
    board.submit(io=3)
    assert board.ended[-1] == (3, errno.EIO), "nothing is put on a ring that nobody trusts"
    assert board.ring().avail_idx == 2


@pytest.mark.clause("MMIO-DRV-021", "MMIO-DRV-032")
def test_4_2_3_4_the_interrupt_is_acknowledged_before_the_ring_is_looked_at() -> None:
    board = Board().probe()
    board.submit()
    seen: list[int] = []
    more_used = board.driver.queues[0].more_used
    board.driver.queues[0].more_used = lambda: seen.append(board.registers.interrupt.read()) or more_used()  # type: ignore[method-assign,func-returns-value]
    board.use(board.ring().get("H", board.ring().avail_at + 4), 4097)
    assert seen == [0] and board.ended


@pytest.mark.clause("SPLIT-DRV-018")
def test_an_interrupt_without_a_cause_does_nothing() -> None:
    board = Board().probe()
    finish(board.driver.interrupt())
    assert board.driver.interrupts == 1 and board.driver.failed is None


# -- poll ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_idx", [True, False])
def test_2_7_7_a_polling_driver_asks_for_no_interrupt(event_idx: bool) -> None:
    board = Board(Quiet(event_idx=event_idx), poll=True).probe()
    board.submit()
    device = board.device.queues[0]
    chain = device.pop()
    assert chain is not None
    device.fill(chain, 4097)
    device.flush()
    first = device.should_notify()
    if not event_idx:
        assert not first
    board.memory.write(board.chain(chain.head)[-1][0], b"\0")
    assert finish(board.driver.poll_queue(0)) is True
    assert finish(board.driver.poll_queue(0)) is False
    assert board.ended == [(1, 0)] and board.driver.polls == 2
    board.submit(io=2)
    chain = device.pop()
    assert chain is not None
    device.fill(chain, 4097)
    device.flush()
    assert not device.should_notify(), "callbacks are still off after a poll"


def test_a_polling_driver_leaves_an_interrupt_of_the_ring_alone() -> None:
    board = Board(poll=True).probe()
    board.submit()
    board.use(board.ring().get("H", board.ring().avail_at + 4), 4097)
    assert not board.ended
    finish(board.driver.poll_queue(0))
    assert board.ended == [(1, 0)]


def test_two_pollers_do_not_drain_at_the_same_time() -> None:
    board = Board(poll=True).probe()
    for io in (1, 2):
        board.submit(io=io)
        board.use(board.ring().get("H", board.ring().avail_at + 2 + 2 * io), 4097, interrupt=False)
    first = board.driver.poll_queue(0)
    assert [next(first)[0], next(first)[0]] == ["virtblk_poll", "virtqueue_get_buf"]
    assert finish(board.driver.poll_queue(0)) is False and not board.ended
    finish(first)
    assert board.ended == [(1, 0), (2, 0)]


def _jobs(**options: Any) -> vb.Fio:
    return vb.Fio(**({"rw": "randrw", "bs": 4096, "iodepth": 64, "number_ios": 300, "size": 1 << 20, "verify": "crc32"} | options))


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_polled_run_takes_no_interrupts(jobs: int) -> None:
    run = vb.Pipeline(app=_jobs(numjobs=jobs, iodepth=8), driver=vb.VirtioBlkDriver(poll=True)).run(vb.SimMachine())
    assert (run.ios, run.errors, run.mismatches) == (300 * jobs, 0, 0)
    assert run.counters["polls"] > 300
    assert run.counters["interrupts"] <= jobs, "a device without EVENT_IDX history may send one per queue"


# -- back-pressure -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kick", ["ioeventfd", "mmio-exit"])
@pytest.mark.parametrize("event_idx", [True, False])
@pytest.mark.parametrize("poll", [True, False])
@pytest.mark.parametrize("batch", [1, 64])
def test_a_queue_of_4_without_indirect_carries_an_iodepth_of_64(kick: str, event_idx: bool, poll: bool, batch: int) -> None:
    recipe = vb.Pipeline(
        app=_jobs(iodepth_batch=batch),
        queue=vb.Split(4),
        device=vb.VirtioBlkDevice(indirect=False, event_idx=event_idx),
        driver=vb.VirtioBlkDriver(poll=poll),
        kvm=vb.Kvm(kick=kick),
        disk=vb.Ram(1 << 20),
    )
    run = recipe.run(vb.SimMachine(trace=0))
    assert (run.ios, run.errors, run.mismatches) == (300, 0, 0)
    assert run.counters["requeues"] > 50


@pytest.mark.parametrize("seed", range(12))
def test_no_schedule_loses_a_request_to_a_full_ring(seed: int) -> None:
    """A waiting request in one context's hand, a buffer added but not published by another: both once lost a wake-up here."""
    recipe = vb.Pipeline(
        app=_jobs(numjobs=3, iodepth=16, iodepth_batch=1 + seed % 5, number_ios=60),
        queue=vb.Split(4),
        device=vb.VirtioBlkDevice(indirect=False, event_idx=bool(seed & 1)),
        kvm=vb.Kvm(call="intx" if seed & 2 else "irqfd"),
        disk=vb.Nvme(size=1 << 20, queue_depth=2 if seed & 4 else 1023),
    )
    run = recipe.run(vb.SimMachine(seed=seed, interleave="random", trace=0))
    assert (run.ios, run.errors, run.mismatches) == (180, 0, 0)


def test_room_made_while_the_waiting_request_is_in_another_contexts_hand_is_not_missed() -> None:
    board = Board(Quiet(indirect=False), size=4).probe()
    board.submit(io=1)
    board.submit(io=2)
    retry = board.stack.run_hw_queue(0)
    assert next(retry)[0] == "virtio_queue_rq", "refused, and not back on the list yet"
    board.use(board.ring().get("H", board.ring().avail_at + 4), 4097)
    assert board.ring().avail_idx == 1
    finish(retry)
    assert board.ring().avail_idx == 2, "nobody else will ever try again"


def test_a_buffer_that_another_context_has_added_but_not_published_keeps_its_kick() -> None:
    board = Board(Quiet(event_idx=False)).probe()
    bio = Bio(READ, 8, 4096, [(0x300000, 4096)], 1, 0, lambda one: None)
    submit = board.stack.submit_bio(bio, None, lambda: None)
    while next(submit)[0] != "request_to_ring":
        pass  # added, not published; now an interrupt's context rings for what it may have queued
    finish(board.driver.commit_rqs(0))
    assert board.bus.kicks == []
    finish(submit)
    assert board.bus.kicks == [0]


# -- trouble -----------------------------------------------------------------------------------------------------------------------


class Sulks(vb.VirtioBlkDevice):
    """Declares the driver broken at its twentieth request, once."""

    count = 0

    def handle_request(self, request: Any) -> Steps:
        self.count += 1
        if self.count == 20:
            raise vb.VirtioError("I have had enough", "2.1.2")
        yield from super().handle_request(request)


@pytest.mark.parametrize("kick", ["ioeventfd", "mmio-exit"])
def test_2_1_2_device_needs_reset_ends_what_is_in_flight_with_eio_and_a_restart_serves_again(kick: str) -> None:
    recipe = vb.Pipeline(app=_jobs(iodepth=8, verify=None, number_ios=2000), device=Sulks, kvm=vb.Kvm(kick=kick), disk=vb.Ram(1 << 20))
    vm = recipe.boot(vb.SimMachine())
    while vm.driver.failed is None:
        assert vm.step() is not None
    assert vm.device_status & Status.NEEDS_RESET
    vm.task(vm.driver.restart())
    assert vm.driver.failed is None and int(vm.device_status) == RUNNING and vm.device.broken is None
    failed = vm.result().errors
    assert failed >= 1
    run = vm.run()
    assert run.ios == 2000 and run.errors <= failed + 8, "only what had failed and was not reaped yet"
    assert run.jobs[0].error == errno.EIO


@pytest.mark.clause("BASIC-DRV-004")
def test_device_needs_reset_ends_requests_that_wait_for_room_too() -> None:
    board = Board(Quiet(indirect=False), size=4).probe()
    for io in (1, 2, 3):
        board.submit(io=io)
    board.registers.needs_reset(vb.VirtioError("enough"))
    finish(board.driver.interrupt())
    assert sorted(board.ended) == [(1, errno.EIO), (2, errno.EIO), (3, errno.EIO)]


def test_a_context_that_a_restart_overtook_writes_nothing_to_the_new_ring() -> None:
    board = Board().probe()
    submit = board.stack.submit_bio(
        Bio(READ, 8, 4096, [(0x300000, 4096)], 1, 0, lambda one: board.ended.append((1, one.status))), None, _never
    )
    while next(submit)[0] != "request_to_ring":
        pass
    finish(board.driver.restart())
    assert board.ended == [(1, errno.EIO)]
    finish(submit)
    assert (board.ring().avail_idx, board.bus.kicks, board.ended) == (0, [], [(1, errno.EIO)])


def test_without_a_restart_every_later_io_ends_with_eio() -> None:
    run = vb.Pipeline(app=_jobs(iodepth=8, verify=None), device=Sulks, disk=vb.Ram(1 << 20)).run(vb.SimMachine())
    assert run.ios == 300 and run.errors >= 280


def test_restarts_use_the_same_memory_again() -> None:
    vm = vb.Pipeline(app=_jobs(numjobs=4, number_ios=50)).boot(vb.SimMachine())
    layouts = [ring.layout for ring in vm.driver.queues]
    for _ in range(20):
        vm.task(vm.driver.restart())
    assert [ring.layout for ring in vm.driver.queues] == layouts
    run = vm.run()
    assert run.ios == 200


@pytest.mark.parametrize("seed", range(10))
def test_a_restart_in_mid_run_ends_every_io_exactly_once(seed: int) -> None:
    recipe = vb.Pipeline(app=_jobs(numjobs=3, iodepth=8, verify=None, number_ios=80), kvm=vb.Kvm(vcpus=3), disk=vb.Nvme(size=1 << 20))
    vm = recipe.boot(vb.SimMachine(seed=seed, interleave="random"))
    for _ in range(3):
        vm.step(150 + 37 * seed)
        vm.task(vm.driver.restart())
    run = vm.run()
    assert run.ios == 240 and 0 < run.errors < 240
    for hctx in vm.iostack.queues:
        assert sorted(hctx.tags) == list(range(len(hctx.requests)))


# -- configuration -------------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("BLK-DRV-005")
def test_5_2_4_a_capacity_change_reaches_the_driver_and_the_new_sectors_serve() -> None:
    vm = vb.Pipeline(app=_jobs(number_ios=20, size=None), disk=vb.Ram(1 << 20)).boot(vb.SimMachine())
    assert vm.driver.capacity_sectors == 2048
    vm.resize(2 << 20)
    vm.run()
    assert (vm.driver.capacity_sectors, vm.driver.capacity_changes) == (4096, 1)


@pytest.mark.clause("BASIC-DRV-014", "BASIC-DRV-016")
def test_2_5_1_capacity_is_read_from_one_generation() -> None:
    board = Board().probe()
    reads = 0
    read_config = board.device.read_config

    def torn() -> bytes:
        nonlocal reads
        reads += 1
        if reads == 2:  # between the two halves of the capacity
            board.device.resize(0x1_0000_0001)
        return read_config()

    board.device.read_config = torn  # type: ignore[method-assign]
    board.device.resize(0x2_0000_0002)
    finish(board.driver.interrupt())
    assert board.driver.capacity_sectors == 0x1_0000_0001


@pytest.mark.clause("BLK-DRV-016")
def test_5_2_5_the_cache_mode_is_switched_through_the_configuration_space() -> None:
    board = Board().probe()
    finish(board.driver.set_write_cache(False))
    assert board.device.writeback is False
    finish(board.driver.set_write_cache(True))
    assert board.device.writeback is True
    without = Board(features=int(BlkFeature.FLUSH)).probe()
    with pytest.raises(vb.ConfigError, match="CONFIG_WCE"):
        finish(without.driver.set_write_cache(False))


def test_a_job_that_writes_to_a_read_only_disk_is_refused_before_it_starts() -> None:
    with pytest.raises(vb.JobError, match="read-only disk"):
        vb.Pipeline(app=_jobs(), device=vb.VirtioBlkDevice(read_only=True)).boot(vb.SimMachine())


@pytest.mark.parametrize("max_discard_sectors", [8, 13, 2048])
def test_trims_on_a_disk_of_4096_byte_blocks_are_cut_on_whole_blocks(max_discard_sectors: int) -> None:
    device = vb.VirtioBlkDevice(block_size=4096, max_discard_sectors=max_discard_sectors)
    app = vb.Fio(rw="randtrim", bs="64k", number_ios=20, size=1 << 20)
    run = vb.Pipeline(app=app, device=device, disk=vb.Ram(1 << 20)).run(vb.SimMachine())
    assert (run.ios, run.errors) == (20, 0)


def test_the_repr_says_what_was_given() -> None:
    assert repr(vb.VirtioBlkDriver()) == "VirtioBlkDriver()"
    assert repr(vb.VirtioBlkDriver(poll=True, queues=2)) == "VirtioBlkDriver(poll=True, queues=2)"


# -- what a driver must not do ------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("BLK-DRV-004")
def test_5_2_5_writeback_is_not_read_before_features_ok() -> None:
    board = Board()
    seen: list[int] = []
    read = board.registers.read

    def listened(offset: int, size: int = 4) -> int:
        if offset <= 0x100 + 32 < offset + size and not board.status & 8:
            seen.append(offset)
        return read(offset, size)

    board.registers.read = listened  # type: ignore[method-assign]
    board.probe()
    assert not seen and board.driver.features & 1 << 11


@pytest.mark.clause("BLK-DRV-006")
def test_5_2_6_1_no_job_reaches_beyond_the_end_of_the_disk() -> None:
    ends: list[int] = []

    class Listens(vb.VirtioBlkDevice):
        def check(self, request: Any) -> int:
            ends.append(request.sector + (request.length >> 9))
            return super().check(request)

    for rw in ("read", "randread", "write", "randwrite"):
        app = vb.Fio(rw=rw, bssplit="512/50:4k/40:12k/10", iodepth=4, number_ios=400)
        run = vb.Pipeline(app=app, device=Listens, disk=vb.Ram(96 << 10)).run(vb.SimMachine())
        assert run.ios and not run.errors
    assert max(ends) <= 96 << 1 and len(ends) > 400
    with pytest.raises(vb.ConfigError, match="of a disk of"):
        vb.Pipeline(app=vb.Fio(rw="read", bs=4096, size="200k", number_ios=1), disk=vb.Ram(96 << 10)).run(vb.SimMachine())


@pytest.mark.clause("BLK-DRV-010")
@pytest.mark.parametrize("bs", [100, 513, 4095])
def test_5_2_6_1_a_job_of_no_whole_sectors_is_refused(bs: int) -> None:
    with pytest.raises(vb.JobError, match="not a multiple of 512"):
        vb.Fio(rw="randread", bs=bs, number_ios=1)


@pytest.mark.clause("BLK-DRV-017")
def test_5_2_6_1_write_through_is_no_flush_of_what_was_written_before() -> None:
    board = Board().probe()
    finish(board.driver.set_write_cache(False))
    board.submit(FLUSH, 0, [])
    assert board.driver.limits.flush
    header = board.chain(board.ring().get("H", board.ring().avail_at + 4))[0]
    assert board.ring().get("IIQ", header[0])[0] == 4 and not board.ended, "the flush goes to the device"
