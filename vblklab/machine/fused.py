"""The fused path of the simulator: what a guest's task and its interrupt handler do, each as one flat generator.

A context may be fused while every part it runs through is as it was written (``paths.py``).  A fused context does what the parts
do, to the same rings, tags and requests, at the same times; what is not the usual case it leaves to the parts, by ``yield from``.
``tests/machine/test_fused.py`` compares times, traces and bytes.

    now += cost
    if now >= heap[0][0]:
        now = yield now if limit >= 0 else (now, key, *args)

is one trace point before something that others see or change: the context yields the time of its end if anything is due before it.
When somebody observes, something on the heap is due at a negative time and it yields the point too.  A point whose end nobody can
notice is passed without a look at what is due (``Scheduler.run_ahead``):

* ``if held and now >= heap[0][0]``: in the device's loop, the drive's interrupt and the guest's interrupt handler, which nothing
  preempts, between two looks at rings, tags or notifications;
* ``if now >= limit``: in the guest's task, so far as no interrupt can reach its vCPU.

A context that went ahead gives way (``if now >= heap[0][0] >= 0: now = yield now``) before it looks at or changes what is shared, and
before a part's own code.  ``sched.now`` is set before anything that asks for it: a wait, a notification, a part's own code.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Iterator, Sequence
from struct import Struct
from typing import Any

from ..events import WAIT, Wait
from ..guest import virtio_blk
from ..guest.fio import FioTask
from ..iostack import Bio
from ..kvm.pci_wiring import PCI_GSI
from ..kvm.wiring import GSI
from ..spec.virtio import Status
from ..spec.virtio_mmio import Reg
from ..transport import MmioRegisters
from ..transport.pci import CONFIG_VECTOR
from .sched import PAUSE

__all__ = ["DATA_IN", "DATA_OUT", "HEADER", "INDIRECT", "STATUS", "SlotBio", "guest_interrupts", "guest_task"]

Steps = Generator[Any, int, Any]
Solo = Callable[[Any, int, int, int, int], int]
pack_three = Struct("<6Q").pack_into  # three descriptors, each its address and its other half
pack_two = Struct("<2Q").pack_into
unpack_three = Struct("<6Q").unpack_from
unpack_two = Struct("<2Q").unpack_from
# The other half of a descriptor: length, flags, next.
INDIRECT = 48 | 4 << 32
HEADER = 16 | 1 << 32 | 1 << 48
DATA_IN, DATA_OUT = 3 << 32 | 2 << 48, 1 << 32 | 2 << 48
STATUS = 1 | 2 << 32
_NOTIFY, _CAUSES, _ACK = int(Reg.QUEUE_NOTIFY), int(Reg.INTERRUPT_STATUS), int(Reg.INTERRUPT_ACK)
_DRIVER_OK = int(Status.DRIVER_OK)
_ERRNO_OF = virtio_blk._ERRNO_OF
_READ, _WRITE, _SYNC = 0, 1, 3
_ALONE_MOST = 2000  # I/Os without a switch of contexts, after which the machine looks up


class SlotBio(Bio):
    """The bio of a task's buffer, used again for each of its I/Os; it ends in ``done`` and wakes ``context``."""

    __slots__ = ("context", "done")

    context: Any
    done: Any


def guest_task(vm: Any, task: FioTask, me: Any, solo: Solo | None) -> Steps:
    """``FioTask.run`` down to the doorbell, in the context ``me``; ``solo`` carries an I/O out that is alone on the machine."""
    job_phase = _phase(vm, task, me, solo, task._main_ios(), None, measured=True)
    return job_phase if task._shadow is None else _then_verify(job_phase, vm, task, me, solo)


def _then_verify(job_phase: Steps, vm: Any, task: FioTask, me: Any, solo: Solo | None) -> Steps:
    now = yield from job_phase
    if task._written and not task.stopping:
        yield from _phase(vm, task, me, solo, task._verify_ios(), now, measured=False)


def _phase(
    vm: Any, task: FioTask, me: Any, solo: Solo | None, units: Iterator[tuple[int, int, int]], began: int | None, *, measured: bool
) -> Steps:
    """``FioTask._phase``, one I/O a system call; returns the time."""
    sched, bus, registers, iostack, driver = vm.scheduler, vm._bus, vm.registers, vm.iostack, vm.driver
    mmio, transport = isinstance(registers, MmioRegisters), vm.transport
    heap, cost = sched._heap, sched.table
    c_enter, c_bio, c_ring, c_prepare = (
        cost[key] for key in ("sys_enter_io_submit", "bio_to_request", "request_to_ring", "virtqueue_kick_prepare")
    )
    c_bell, c_entry, c_exit, c_reap = (cost[key] for key in ("doorbell_fast", "kvm_entry", "sys_exit_io_submit", "sys_exit_io_getevents"))
    free, done, guard, stat, shared, wake = task._free, task._done, task._guard, task.stat, task._shared, task.wake
    reads, depths, all_slots, poll, whole, queue = stat.read, stat.depths, task._depth, task._poll, task._size, task.queue
    pending_reads = reads._pending
    runtime_ns = task.job.runtime_ns if measured else None
    plain_reads = task._shadow is None and shared.log is None
    plain_ends = task._shadow is None and guard is None and measured
    hctx, ring = iostack.queues[queue], driver.queues[queue]
    tags, requests, memory = hctx.tags, hctx.requests, vm.memory.bytes
    desc, avail, used16, mask = ring._desc, ring._avail, ring._used16, ring._mask
    heads, tokens, writable, event_idx, event_at = ring._free, ring._tokens, ring._writable, ring.event_idx, ring._avail_event_at
    tables_at, table_bytes = ring._tables, ring._table_bytes
    # the longest that the block layer takes as one request and the ring as one table of three descriptors
    most = iostack._max_bytes if not iostack._cut_always and ring.indirect_segments >= 3 else 0
    unit: tuple[int, int, int] | None = None
    exhausted = started = False
    ended_ns = alone = 0
    now: int = (yield None) if began is None else began
    limit: int = heap[0][0]
    while True:
        while free and not exhausted:
            unit = unit or next(units, None)
            if unit is None or task.stopping or (runtime_ns is not None and started and ended_ns - stat.start_ns >= runtime_ns):
                exhausted = True
                break
            op, offset, length = unit
            if guard is not None and op != _SYNC and not guard.enter(op, offset, length):
                guard.waiters.append(wake)
                break
            slot = free.pop()
            if op == _READ and plain_reads:
                slot.op, slot.offset, slot.length = op, offset, length
            else:
                task._prepare(slot, unit)
            unit = None
            task._io = io = task._io + 1
            bio = slot.bio
            if bio is None:
                bio = slot.bio = SlotBio(op, 0, length, slot.segments, io, queue, task._end_io, slot)
                bio.done, bio.context = done, me
            if solo is not None and not free and not done and (woken := solo(slot, op, offset, length, now)):
                if not started:
                    started = True
                    if measured:
                        stat.start_ns = slot.start_ns
                depths[all_slots] = depths.get(all_slots, 0) + 1
                bio.io = io
                bio.status = 0
                done.append(bio)
                now = woken
                alone += 1
                if not alone % _ALONE_MOST:
                    sched.now = now
                    now = yield PAUSE
                    limit = heap[0][0]
                break
            now += c_enter
            if now >= limit:
                now = yield now if limit >= 0 else (now, "sys_enter_io_submit", io, 1)
                limit = heap[0][0] + sched.quiet_ns
            start_ns = now
            if op > _WRITE or length > most or len(slot.segments) != 1 or not tags:
                if now >= heap[0][0] >= 0:
                    now = yield now
                sched.now = now
                yield from iostack.submit_bio(task._bio(slot, io), None, wake)
                now = sched.now
                limit = heap[0][0]
            else:
                if bio.length != length:
                    bio.length = length
                    bio.segments = slot.segments if length == whole else [(slot.gpa, length)]
                bio.op = op
                bio.sector = sector = offset >> 9
                bio.io = io
                bio.remaining = 1
                bio.status = 0
                rq = requests[tags.pop()]
                rq.op = op
                rq.sector = sector
                rq.length = length
                rq.segments = bio.segments
                rq.bios = [bio]
                now += c_bio
                if now >= limit:
                    now = yield now if limit >= 0 else (now, "bio_to_request", io, sector, length >> 9, rq.key)
                    limit = heap[0][0] + sched.quiet_ns
                if hctx.dispatch or driver.failed is not None or not heads or driver.queues[queue] is not ring:
                    if now >= heap[0][0] >= 0:
                        now = yield now
                    sched.now = now
                    yield from iostack._dispatch(hctx, rq, True)
                    now = sched.now
                    limit = heap[0][0]
                else:
                    header, status, _, _ = rq.pdu
                    memory[status] = 0xFF
                    pack_two(memory, header, op, sector)
                    head = heads.pop()
                    at = tables_at + head * table_bytes
                    if op == _READ:
                        pack_three(memory, at, header, HEADER, slot.gpa, DATA_IN | length, status, STATUS)
                        writable[head] = length + 1
                    else:
                        pack_three(memory, at, header, HEADER, slot.gpa, DATA_OUT | length, status, STATUS)
                        writable[head] = 1
                    pack_two(desc, head << 4, at, INDIRECT)
                    tokens[head] = rq
                    idx = ring.avail_idx
                    avail[2 + (idx & mask)] = head
                    ring.avail_idx = (idx + 1) & 0xFFFF
                    now += c_ring
                    if now >= heap[0][0]:
                        now = yield now if limit >= 0 else (now, "request_to_ring", rq.key, queue << 16 | head)
                        limit = heap[0][0] + sched.quiet_ns
                    if ring.broken is None:
                        avail[1] = ring._published_idx = ring.avail_idx
                    driver.kick_decisions += 1
                    now += c_prepare
                    if now >= heap[0][0]:
                        now = yield now if limit >= 0 else (now, "virtqueue_kick_prepare", queue)
                        limit = heap[0][0] + sched.quiet_ns
                    new = ring._published_idx
                    old = ring._kicked_idx
                    ring._kicked_idx = new
                    if ((new - used16[event_at] - 1) & 0xFFFF) < ((new - old) & 0xFFFF) if event_idx else new != old and not used16[0] & 1:
                        driver.kicks += 1
                        if mmio:
                            bus.fast_mmio += 1
                            now += c_bell
                            if now >= heap[0][0]:
                                now = yield now if limit >= 0 else (now, "doorbell_fast", _NOTIFY, queue)
                                limit = heap[0][0] + sched.quiet_ns
                            sched.now = now
                            if registers.status & _DRIVER_OK and not registers._resetting:
                                registers.on_notify(queue)
                            limit = heap[0][0] + sched.quiet_ns
                            now += c_entry
                            if now >= limit:
                                now = yield now if limit >= 0 else (now, "kvm_entry")
                                limit = heap[0][0] + sched.quiet_ns
                        else:
                            sched.now = now
                            yield from transport.notify(queue)
                            now = sched.now
                            limit = heap[0][0]
            now += c_exit
            if now >= limit:
                now = yield now if limit >= 0 else (now, "sys_exit_io_submit", io)
                limit = heap[0][0] + sched.quiet_ns
            slot.start_ns = start_ns
            slot.issue_ns = ended_ns = now
            if not started:
                started = True
                if measured:
                    stat.start_ns = start_ns
            depth = all_slots - len(free)
            depths[depth] = depths.get(depth, 0) + 1
        if not done:
            if exhausted and len(free) == all_slots:
                if now >= heap[0][0] >= 0:
                    now = yield now
                break
            sched.now = now
            if poll is None:
                yield WAIT
            else:
                yield from poll(queue)
                if not done:
                    yield Wait(0)
            now = sched.now
            limit = heap[0][0] + sched.quiet_ns
            continue
        now += c_reap
        if now >= limit:
            now = yield now if limit >= 0 else (now, "sys_exit_io_getevents", done[-1].io, len(done))
            limit = heap[0][0] + sched.quiet_ns
        ended_ns = now
        ended = ended_bytes = 0
        while done:
            bio = done.popleft()
            slot = bio.token
            if slot.op or bio.status or not plain_ends:
                sched.now = now
                task._reap(bio, now, measured)
                limit = heap[0][0]
                continue
            ended += 1
            ended_bytes += slot.length
            pending_reads += (slot.start_ns, slot.issue_ns, now)
            free.append(slot)
        shared.completed += ended
        reads.ios += ended
        reads.bytes += ended_bytes
        if len(pending_reads) >= 12288:
            reads.fold()
    sched.now = now
    if measured:
        stat.end_ns = ended_ns
    return now


def guest_interrupts(vm: Any, vcpu: int) -> Steps:
    """``vcpu_interrupts`` of virtio-mmio's line or of virtio-pci's messages, with ``VirtioBlkDriver.interrupt`` inside it."""
    sched, bus, iostack, driver, pending = vm.scheduler, vm._bus, vm.iostack, vm.driver, vm.registers.interrupt
    registers, transport, mmio = vm.registers, vm.transport, isinstance(vm.registers, MmioRegisters)
    heap, cost = sched._heap, sched.table
    c_inject, c_handler, c_read, c_write, c_lower = (
        cost[key] for key in ("kvm_inj_virq", "vm_interrupt", "mmio_read", "mmio_write", "kvm_set_irq")
    )
    c_done, c_get, c_end, c_off, c_on = (
        cost[key]
        for key in ("virtblk_interrupt", "virtqueue_get_buf", "request_done", "virtqueue_enable_cb_prepare", "virtqueue_enable_cb")
    )
    c_own, c_shared = cost["guest:irq_handler_entry"], cost["vp_vring_interrupt"]
    requested: set[int] = set() if mmio else vm._interrupt._requested[vcpu]
    memory, level = vm.memory.bytes, mmio and bus._level
    elements_of: dict[Any, memoryview] = {}
    queues: Sequence[int]
    now = yield None  # the time at which it begins
    held = sched.held
    while True:
        if mmio:
            if not pending._bits:
                sched.now = now
                yield WAIT
                now = sched.now
                held = sched.held
                continue
            now += c_inject
            if held and now >= heap[0][0]:
                now = yield now if heap[0][0] >= 0 else (now, "kvm_inj_virq", GSI)
                held = sched.held
            driver.interrupts += 1
            now += c_handler
            if held and now >= heap[0][0]:
                now = yield now if heap[0][0] >= 0 else (now, "vm_interrupt")
                held = sched.held
            bus.exits += 1
            now += c_read
            if now >= heap[0][0]:
                now = yield now if heap[0][0] >= 0 else (now, "mmio_read", _CAUSES, 0, 0)
                held = sched.held
            causes = pending._bits & 3
            if causes:
                bus.exits += 1
                now += c_write
                if now >= heap[0][0]:
                    now = yield now if heap[0][0] >= 0 else (now, "mmio_write", _ACK, 1, causes)
                    held = sched.held
                pending._bits &= ~causes
                if level and not pending._bits:
                    now += c_lower
                    if now >= heap[0][0]:
                        now = yield now if heap[0][0] >= 0 else (now, "kvm_set_irq", GSI, 0)
                        held = sched.held
                if causes & 2:
                    sched.now = now
                    yield from driver._config_changed()
                    now = sched.now
                    held = sched.held
            if not causes & 1 or driver.poll:
                continue
            queues = range(len(driver.queues))
        elif not requested:
            sched.now = now
            if vcpu == 0 and registers.line:
                yield ("kvm_inj_virq", PCI_GSI)
                yield from driver.interrupt()
            else:
                yield WAIT
            now = sched.now
            held = sched.held
            continue
        else:
            irq = max(requested)
            requested.discard(irq)
            now += c_inject
            if held and now >= heap[0][0]:
                now = yield now if heap[0][0] >= 0 else (now, "kvm_inj_virq", irq)
                held = sched.held
            vector = transport.vector_of_irq(vcpu, irq)
            if vector == CONFIG_VECTOR or not transport.vectors:
                if now >= heap[0][0] >= 0:
                    now = yield now
                sched.now = now
                yield from driver.interrupt(vector)
                now = sched.now
                held = sched.held
                continue
            driver.interrupts += 1
            if transport._per_queue:
                queues = (vector - 1,)
                now += c_own
                if now >= heap[0][0]:
                    now = yield now if heap[0][0] >= 0 else (now, "guest:irq_handler_entry", vector, vector - 1)
                    held = sched.held
            else:
                queues = transport._queues
                now += c_shared
                if now >= heap[0][0]:
                    now = yield now if heap[0][0] >= 0 else (now, "vp_vring_interrupt")
                    held = sched.held
            if driver.poll:
                continue
        for queue in queues:
            ring = driver.queues[queue]
            used16, avail, event_idx = ring._used16, ring._avail, ring.event_idx
            if used16[1] == ring.last_used_idx:
                continue
            if ring not in elements_of:
                elements_of[ring] = ring._used[4 : 4 + 8 * ring.size].cast("Q")
            hctx, elements, event_at, mask, size = iostack.queues[queue], elements_of[ring], ring._used_event_at, ring._mask, ring.size
            writable, tags = ring._writable, hctx.tags
            now += c_done
            if now >= heap[0][0]:
                now = yield now if heap[0][0] >= 0 else (now, "virtblk_interrupt", queue)
                held = sched.held
            while True:
                ring.callbacks = False
                if event_idx:
                    avail[event_at] = (ring.last_used_idx - 1) & 0xFFFF
                else:
                    avail[0] = 1
                while True:
                    last = ring.last_used_idx
                    if used16[1] == last or ring.broken is not None:
                        if not now >= heap[0][0] >= 0:
                            break
                        now = yield now
                        held = sched.held
                        if used16[1] == last or ring.broken is not None:
                            break
                    element = elements[last & mask]
                    head = element & 0xFFFFFFFF
                    if head >= size or (rq := ring._tokens[head]) is None or element >> 32 != writable[head]:
                        if now >= heap[0][0] >= 0:
                            now = yield now
                        sched.now = now
                        yield from driver._drain(ring)  # the device lies, or the request failed
                        now = sched.now
                        held = sched.held
                        break
                    ring._tokens[head] = None
                    if head in ring._chains:
                        ring._free.extend(reversed(ring._chains.pop(head)))
                    else:
                        ring._free.append(head)
                    ring.last_used_idx = (last + 1) & 0xFFFF
                    status = memory[rq.pdu[1]]
                    now += c_get
                    if held and now >= heap[0][0]:
                        now = yield now if heap[0][0] >= 0 else (now, "virtqueue_get_buf", rq.key)
                        held = sched.held
                    bios = rq.bios
                    bio = bios[0]
                    if status or bio.remaining != 1 or len(bios) != 1:
                        if now >= heap[0][0] >= 0:
                            now = yield now
                        sched.now = now
                        yield from iostack.complete(rq, _ERRNO_OF.get(status, errno.EIO) if status else 0)
                        now = sched.now
                        held = sched.held
                        continue
                    now += c_end
                    if held and now >= heap[0][0]:
                        now = yield now if heap[0][0] >= 0 else (now, "request_done", rq.key, bio.io)
                        held = sched.held
                    sched.now = now
                    bio.remaining = 0
                    if hctx.waiters:
                        iostack._free(hctx, rq)
                    else:
                        tags.append(rq.tag)
                    if type(bio) is not SlotBio:
                        bio.end_io(bio)
                        continue
                    bio.done.append(bio)
                    if bio.context.waiting:
                        bio.context.notify()
                    else:
                        bio.context.notified = True
                now += c_off
                if now >= heap[0][0]:
                    now = yield now if heap[0][0] >= 0 else (now, "virtqueue_enable_cb_prepare", queue)
                    held = sched.held
                ring.callbacks = True
                if event_idx:
                    avail[event_at] = ring.last_used_idx
                else:
                    avail[0] = 0
                now += c_on
                if now >= heap[0][0]:
                    now = yield now if heap[0][0] >= 0 else (now, "virtqueue_enable_cb", queue)
                    held = sched.held
                if ring.broken is not None or used16[1] == ring.last_used_idx:
                    break
            if hctx.dispatch or hctx.running:
                sched.now = now
                yield from iostack.run_hw_queue(queue)
                now = sched.now
                held = sched.held
