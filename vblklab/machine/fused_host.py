"""The fused path of the simulator, host side: the device's loop down to the drive.

What ``fused.py`` says holds here too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from ..device import BlkRequest
from ..errors import VirtioError
from ..events import WAIT
from ..iostack import Op, Plug
from ..kvm import KvmInterrupt
from ..kvm.wiring import GSI
from ..ring import Chain
from ..spec.virtio_blk import ReqType
from .fused import DATA_IN, DATA_OUT, HEADER, INDIRECT, STATUS, unpack_three, unpack_two
from .fused_drive import HeadOp

__all__ = ["device_loop"]

Steps = Generator[Any, int, Any]
_READ, _WRITE, _FLUSH = 0, 1, int(Op.FLUSH)
_IN, _OUT = int(ReqType.IN), int(ReqType.OUT)
_PLUG_MAX = 32
_VIEWS_KEPT = 4096
_KIND = {DATA_IN >> 32: _IN, DATA_OUT >> 32: _OUT}


class _Ring:
    """What the loop keeps about a queue: by head the operation whose request is used again, by address the views of guest memory."""

    def __init__(self, queue: Any, end_io: Callable[[Any], None]) -> None:
        self.queue = queue
        self.ops: list[HeadOp | None] = [None] * queue.size
        self.elements = queue._used[4 : 4 + 8 * queue.size].cast("Q")
        self.views: dict[tuple[int, int], list[memoryview]] = {}
        self._end_io = end_io

    def view(self, memory: memoryview, gpa: int, half: int) -> list[memoryview] | None:
        """The data segment of a descriptor, or None if it is none of a plain request's."""
        length = half & 0xFFFFFFFF
        if half & ~0xFFFFFFFF not in (DATA_IN, DATA_OUT) or not length or length & 511 or gpa + length > len(memory):
            return None
        if len(self.views) >= _VIEWS_KEPT:
            self.views.clear()
        view = self.views[gpa, half] = [memory[gpa : gpa + length]]
        return view

    def op(self, head: int) -> HeadOp:
        """An operation for this head with a request of its own."""
        queue = self.queue
        request = BlkRequest(queue, Chain(head, queue._key | head))
        op = self.ops[head] = HeadOp(_READ, 0, 0, [], request.key, request, 0, self._end_io, True)
        op.ring = self
        return op


def device_loop(vm: Any, hardware: Any) -> Steps:
    """``VirtioBlkDevice.run`` with ``Simulated.flush``, the host's block layer and ``nvme_queue_rq`` inside it."""
    sched, device, engine, host, interrupt = vm.scheduler, vm.device, vm.engine, vm._host_stack, vm._interrupt
    heap, cost = sched._heap, sched.table
    c_notify, c_empty, c_on, c_read, c_write = (
        cost[key] for key in ("virtio_queue_notify", "virtio_queue_empty", "virtio_queue_set_notification", "pop_read", "pop_write")
    )
    c_fill, c_flush, c_irqfd = cost["completion_to_ring"], cost["virtqueue_flush"], cost["irqfd"]
    c_submit, c_bio, c_command = cost["host:sys_enter_io_submit"], cost["host:bio_to_request"], cost["nvme_command"]
    memory = vm.memory.bytes
    end_of_memory = len(memory)
    irqfd = isinstance(interrupt, KvmInterrupt) and interrupt._irqfd
    pending, wake_vcpu = vm.registers.interrupt, vm._irq_contexts[0].notify
    driver, hctx, wake = host.driver, host.queues[0], engine._wake
    tags, requests, fetch = hctx.tags, hctx.requests, hardware.fetch
    most = 0 if host._cut_always else host._max_bytes
    block_mask = (device.block_size >> 9) - 1
    rings: dict[int, _Ring] = {}
    tails: dict[int, memoryview] = {}  # status bytes by address
    now = yield None  # the time at which it begins
    held = sched.held
    while True:
        work = False
        completed = engine._done
        if completed:
            sched.quiet_ns = 0  # an interrupt is near
            engine._done = []
            engine.in_flight -= len(completed)
            work = True
            epoch = device.epoch
            for op in completed:
                if type(op) is not HeadOp or op.status or op.epoch != epoch:
                    sched.now = now
                    for spent in completed:
                        if type(spent) is HeadOp:
                            spent.ring.ops[spent.request.chain.head] = None
                    yield from device.complete_batch(completed)
                    now = sched.now
                    held = sched.held
                    break
            else:
                touched = {}
                for op in completed:
                    request = op.request
                    request.left = 0
                    if op.op == _WRITE and not device.writeback:  # write-through: stable before it is acknowledged
                        op.ring.ops[request.chain.head] = None
                        device.operate(request, _FLUSH, 0, 0, [])
                        continue
                    queue = request.queue
                    number = queue.number
                    if device.queues.get(number) is not queue and not device._owns(queue):
                        continue
                    request.status_view[0] = 0
                    written = request.length + 1 if op.op == _READ else 1
                    idx = queue.used_idx
                    op.ring.elements[idx & queue._mask] = written << 32 | request.chain.head
                    queue.used_idx = (idx + 1) & 0xFFFF
                    now += c_fill
                    if held and now >= heap[0][0]:
                        now = yield now if heap[0][0] >= 0 else (now, "completion_to_ring", request.key, 0, 0, written)
                        held = sched.held
                    touched[number] = queue
                if engine.batch:
                    if now >= heap[0][0] >= 0:
                        now = yield now
                    sched.now = now
                    yield from engine.flush()
                    now = sched.now
                    held = sched.held
                for number, queue in touched.items():
                    if device.queues.get(number) is not queue and not device._owns(queue):
                        continue
                    if now >= heap[0][0] >= 0:
                        now = yield now
                        held = sched.held
                    new = queue.used_idx
                    count = (new - queue._flushed_idx) & 0xFFFF
                    queue._flushed_idx = new
                    queue.in_flight -= count
                    queue._used16[1] = new
                    device.notify_decisions += 1
                    now += c_flush
                    if now >= heap[0][0]:
                        now = yield now if heap[0][0] >= 0 else (now, "virtqueue_flush", number, count)
                        held = sched.held
                    if (device.queues.get(number) is not queue and not device._owns(queue)) or not queue.should_notify():
                        continue
                    if irqfd:
                        interrupt.notifies += 1
                        pending._bits |= 1
                        now += c_irqfd
                        if now >= heap[0][0]:
                            now = yield now if heap[0][0] >= 0 else (now, "irqfd", number, GSI, 1)
                            held = sched.held
                        sched.now = now
                        wake_vcpu()
                    else:
                        sched.now = now
                        yield from interrupt.notify(number)
                        now = sched.now
                        held = sched.held
            sched.quiet_ns = sched.quiet_most
        while device._kicked and not device.resetting:
            work = True
            number = device._kicked.pop()
            queue = device.queues.get(number)
            inside = device._inside
            if queue is None or device.broken is not None or number in inside or device.resubmits(number):
                sched.now = now
                sched.quiet_ns = 0
                yield from device.handle_output(number)
                sched.quiet_ns = sched.quiet_most
                now = sched.now
                held = sched.held
                continue
            ring = rings.get(number)
            if ring is None or ring.queue is not queue:
                ring = rings[number] = _Ring(queue, engine.end_io)
            ops, views, threes, desc, avail, mask, size = (
                ring.ops,
                ring.views,
                queue._threes,
                queue._desc,
                queue._avail,
                queue._mask,
                queue.size,
            )
            inside.add(number)
            try:
                now += c_notify
                if now >= heap[0][0]:
                    now = yield now if heap[0][0] >= 0 else (now, "virtio_queue_notify", number)
                    held = sched.held
                plain = threes and (queue._shadow_avail_idx - queue.last_avail_idx) & 0xFFFF <= size
                while device.queues.get(number) is queue:
                    if queue.notification:
                        queue.set_notification(False)
                    while not held or device.queues.get(number) is queue:
                        last = queue.last_avail_idx
                        shadow = queue._shadow_avail_idx
                        if shadow == last:
                            if now >= heap[0][0] >= 0:
                                now = yield now
                                held = sched.held
                                if device.queues.get(number) is not queue:
                                    break
                            queue._shadow_avail_idx = shadow = avail[1]
                            if shadow == last:
                                break
                            plain = threes and (shadow - last) & 0xFFFF <= size
                        head = avail[2 + (last & mask)]
                        segments = None
                        if plain and head < size and queue.in_flight < size:
                            at, half = unpack_two(desc, head << 4)
                            if half == INDIRECT and at + 48 <= end_of_memory:
                                header, header_half, data, half, tail, tail_half = unpack_three(memory, at)
                                if header_half == HEADER and tail_half == STATUS and header + 16 <= end_of_memory and tail < end_of_memory:
                                    segments = views.get((data, half)) or ring.view(memory, data, half)
                        if segments is not None:
                            kind, sector = unpack_two(memory, header)
                            op = ops[head] or ring.op(head)
                            request = op.request
                            if request.left or kind != _KIND[half >> 32]:
                                segments = None
                        if segments is None:
                            if now >= heap[0][0] >= 0:
                                now = yield now
                            sched.now = now
                            sched.quiet_ns = 0
                            yield from device.serve_one(queue)
                            sched.quiet_ns = sched.quiet_most
                            now = sched.now
                            held = sched.held
                            if device.queues.get(number) is not queue:
                                break
                            plain = threes and (queue._shadow_avail_idx - queue.last_avail_idx) & 0xFFFF <= size
                            continue
                        if op.segments is not segments:
                            op.segments = request.data = segments
                            request.writable = [] if kind else segments
                            op.length = request.length = half & 0xFFFFFFFF
                        op.op = request.type = kind
                        op.sector = request.sector = sector
                        request.status_view = tails.get(tail) or tails.setdefault(tail, memory[tail : tail + 1])
                        queue.last_avail_idx = (last + 1) & 0xFFFF
                        queue.in_flight += 1
                        sectors = op.length >> 9
                        now += c_write if kind else c_read
                        if held and now >= heap[0][0]:
                            now = yield now if heap[0][0] >= 0 else (now, "pop_write" if kind else "pop_read", request.key, sector, sectors)
                            held = sched.held
                            if device.queues.get(number) is not queue and not device._owns(queue):
                                break
                        if (
                            sector & block_mask
                            or sectors & block_mask
                            or sector + sectors > device.capacity_sectors
                            or (kind and device.read_only)
                        ):
                            ops[head] = None
                            if now >= heap[0][0] >= 0:
                                now = yield now
                            sched.now = now
                            sched.quiet_ns = 0
                            yield from device.handle_request(request)
                            sched.quiet_ns = sched.quiet_most
                            now = sched.now
                            held = sched.held
                            if device.queues.get(number) is not queue:
                                break
                            continue
                        request.left = 1
                        op.remaining = 1
                        op.epoch = device.epoch
                        engine.batch.append(op)
                        engine.in_flight += 1
                    batch = engine.batch
                    if batch:
                        engine.batch = []
                        op = batch[0]
                        now += c_submit
                        if now >= heap[0][0]:
                            now = yield now if heap[0][0] >= 0 else (now, "host:sys_enter_io_submit", op.io)
                            held = sched.held
                        if len(batch) > 1:
                            now = yield from _submit_plugged(vm, batch, fetch, now)
                            held = sched.held
                        elif type(op) is not HeadOp or op.length > most or not tags:
                            sched.now = now
                            yield from host.submit_bio(op, None, wake)
                            now = sched.now
                            held = sched.held
                        else:
                            rq = requests[tags.pop()]
                            rq.op = op.op
                            rq.sector = sector = op.sector
                            rq.length = length = op.length
                            rq.segments = op.segments
                            rq.bios = batch
                            now += c_bio
                            if now >= heap[0][0]:
                                now = yield now if heap[0][0] >= 0 else (now, "host:bio_to_request", op.io, sector, length >> 9, rq.key)
                                held = sched.held
                            if hctx.dispatch or not driver.free or driver._held:
                                if now >= heap[0][0] >= 0:
                                    now = yield now
                                sched.now = now
                                yield from host._dispatch(hctx, rq, True)
                                now = sched.now
                                held = sched.held
                            else:
                                driver.free -= 1
                                now += c_command
                                if (held or hctx.running) and now >= heap[0][0]:
                                    now = yield now if heap[0][0] >= 0 else (now, "nvme_command", rq.key, 0)
                                    held = sched.held
                                fetch(rq, now)
                    now += c_empty
                    if now >= heap[0][0]:
                        now = yield now if heap[0][0] >= 0 else (now, "virtio_queue_empty", number)
                        held = sched.held
                    if device.queues.get(number) is not queue:
                        break
                    queue.set_notification(True)
                    now += c_on
                    if now >= heap[0][0]:
                        now = yield now if heap[0][0] >= 0 else (now, "virtio_queue_set_notification", number, 1)
                        held = sched.held
                    if number in device._again:
                        device._again.discard(number)
                    elif queue.recheck():
                        break
            except VirtioError as error:
                device.failed(number, error)
                yield from engine.flush()
                now = sched.now
                held = sched.held
            finally:
                device.leave(number)
        if device._stopping:
            device._end_stops()
        if device.resetting and not engine.in_flight and not device._inside:
            device._end_reset()
        if not work:
            sched.now = now
            yield WAIT
            now = sched.now
            held = sched.held


def _submit_plugged(vm: Any, batch: list[Any], fetch: Callable[[Any, int], None], now: int) -> Steps:
    """``IOStack.submit_bio`` of several operations behind one plug, then ``flush_plug``; returns the time."""
    sched, host, wake = vm.scheduler, vm._host_stack, vm.engine._wake
    heap, cost, hctx, merge = sched._heap, sched.table, host.queues[0], host.merge
    c_queue, c_tag = cost["host:block_bio_queue"], cost["host:block_getrq"]
    tags, requests = hctx.tags, hctx.requests
    most = 0 if host._cut_always else host._max_bytes
    plug = Plug()
    held = sched.held
    touching: set[int] = set()  # where plugged requests begin and end, as sectors: only there can an operation join one
    for op in batch:
        length, sector = op.length, op.sector
        if type(op) is not HeadOp or length > most or not tags:
            if now >= heap[0][0] >= 0:
                now = yield now
            sched.now = now
            yield from host.submit_bio(op, plug, wake)
            now = sched.now
            held = sched.held
            for rq in plug:
                touching |= {rq.sector, rq.sector + (rq.length >> 9)}
            continue
        after = sector + (length >> 9)
        if merge and (sector in touching or after in touching):
            merged = host._attempt_merge(op, sector, length, op.segments, plug)
            if merged is not None:
                touching |= {sector, after}
                sched.now = now
                now = yield (host._e_merged[merged[0]], op.io, sector, length >> 9, merged[2])
                held = sched.held
                continue
        now += c_queue
        if now >= heap[0][0]:
            now = yield now if heap[0][0] >= 0 else (now, "host:block_bio_queue", op.io, sector, length >> 9)
            held = sched.held
        if not tags:
            sched.now = now
            yield from host._submit_part(op, sector, length, op.segments, plug, wake)
            now = sched.now
            held = sched.held
            continue
        rq = requests[tags.pop()]
        rq.op = op.op
        rq.sector = sector
        rq.length = length
        rq.segments = op.segments
        rq.bios = [op]
        now += c_tag
        if held and now >= heap[0][0]:
            now = yield now if heap[0][0] >= 0 else (now, "host:block_getrq", op.io, rq.key)
            held = sched.held
        plug.append(rq)
        touching.add(sector)
        touching.add(after)
        if len(plug) >= _PLUG_MAX:
            now = yield from _flush_plug(vm, plug, fetch, now)
            held = sched.held
    return (yield from _flush_plug(vm, plug, fetch, now))


def _flush_plug(vm: Any, plug: Plug, fetch: Callable[[Any, int], None], now: int) -> Steps:
    """``IOStack.flush_plug`` with ``NvmeDriver.queue_rq``: the last one rings the doorbell for all; returns the time."""
    sched, host = vm.scheduler, vm._host_stack
    heap, cost, hctx, driver = sched._heap, sched.table, host.queues[0], host.driver
    c_unplug, c_held, c_command = cost["host:block_unplug"], cost["nvme_queue_rq"], cost["nvme_command"]
    requests = plug[:]
    plug.clear()
    if not requests:
        return now
    full = bool(hctx.dispatch or hctx.running) or driver.free < len(requests)
    if full and now >= heap[0][0] >= 0:  # the drive's interrupt may submit some of them: nothing goes ahead of it
        now = yield now
    held = full or sched.held
    now += c_unplug
    if held and now >= heap[0][0]:
        now = yield now if heap[0][0] >= 0 else (now, "host:block_unplug", 0, len(requests))
        held = full or sched.held
    last = requests[-1]
    for rq in requests:
        if hctx.dispatch or not driver.free:
            if now >= heap[0][0] >= 0:
                now = yield now
            sched.now = now
            yield from host._dispatch(hctx, rq, rq is last)
            now = sched.now
            held = True
            continue
        driver.free -= 1
        if rq is not last:
            driver._held.append(rq)
            now += c_held
            if held and now >= heap[0][0]:
                now = yield now if heap[0][0] >= 0 else (now, "nvme_queue_rq", rq.key)
                held = full or sched.held
            continue
        now += c_command
        if held and now >= heap[0][0]:
            now = yield now if heap[0][0] >= 0 else (now, "nvme_command", rq.key, 0)
            held = full or sched.held
        queued, driver._held = driver._held, []
        for other in queued:
            fetch(other, now)
        fetch(rq, now)
    return now
