"""One I/O alone on the whole machine: nothing else is due and every context idles, so nobody can meet it on its way.

The path is then one line of times, and the loads and stores of both ring halves and of the drive follow in their order without a
switch of contexts.  Every condition is looked at before the first store; what is not so is left to the contexts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .fused import DATA_IN, DATA_OUT, HEADER, INDIRECT, STATUS, pack_three, pack_two, unpack_three, unpack_two
from .sched import Fused
from .untouched import plain_memory

__all__ = ["solo_path"]

_READ = 0


def solo_path(vm: Any, task: Any, me: Any, hardware: Any) -> Callable[[Any, int, int, int, int], int] | None:
    """A function that takes (slot, op, offset, length, now), carries the I/O out and returns the time at which the task runs again.

    It returns 0, and has done nothing, if the I/O must go the long way.  None if this machine's I/Os always must.
    """
    sched, driver, device, host, bus, interrupt = vm.scheduler, vm.driver, vm.device, vm._host_stack, vm._bus, vm._interrupt
    irq, store = vm._irq_contexts[0], vm.store
    if me.cpu is not irq.cpu or driver.poll or not interrupt._irqfd or not bus._fast or not plain_memory(store):
        return None
    number = task.queue
    ring, queue, hctx = driver.queues[number], device.queues.get(number), vm.iostack.queues[number]
    contexts = (irq, vm._device_context, vm._host_irq)
    if queue is None or not ring.event_idx or ring.indirect_segments < 3 or vm.iostack._cut_always or host._cut_always:
        return None
    heap, cpu, memory = sched._heap, me.cpu, vm.memory.bytes
    desc, avail, used16, mask = ring._desc, ring._avail, ring._used16, ring._mask
    elements = ring._used[4 : 4 + 8 * ring.size].cast("Q")
    used_event_at, avail_event_at = ring._used_event_at, ring._avail_event_at
    requests, tags, heads, tables_at, table_bytes = hctx.requests, hctx.tags, ring._free, ring._tables, ring._table_bytes
    waiting = (hctx.dispatch, host.queues[0].dispatch)
    most, block = min(vm.iostack._max_bytes, host._max_bytes), max(device.block_size, 512) - 1

    cost = sched.table

    def total(*keys: str) -> int:
        return sum(cost[key] for key in keys)

    to_bell = total("bio_to_request", "request_to_ring", "virtqueue_kick_prepare", "doorbell_fast")
    to_issue = to_bell + total("kvm_entry", "sys_exit_io_submit")
    to_fetch = {
        op: to_bell
        + vm._device_context.wake_ns
        + total("virtio_queue_notify", pop, "host:sys_enter_io_submit", "host:bio_to_request", "nvme_command")
        for op, pop in ((0, "pop_read"), (1, "pop_write"))
    }
    to_idle = total("virtio_queue_empty", "virtio_queue_set_notification")
    to_device = vm._host_irq.wake_ns + total("nvme_interrupt", "host:request_done")
    to_task = (
        to_device
        + vm._device_context.wake_ns
        + total("completion_to_ring", "virtqueue_flush", "irqfd")
        + irq.wake_ns
        + total("kvm_inj_virq", "vm_interrupt", "mmio_read", "mmio_write", "virtblk_interrupt", "virtqueue_get_buf", "request_done")
        + total("virtqueue_enable_cb_prepare", "virtqueue_enable_cb")
        + me.wake_ns
    )
    enter, done = cost["sys_enter_io_submit"], hardware.done
    if to_fetch[0] - to_bell + hardware.least_ns + to_device <= max(to_fetch[0] - to_bell + to_idle, to_issue - to_bell):
        return None  # a drive so fast that its interrupt meets the device's loop or the task before they sleep

    def solo(slot: Any, op: int, offset: int, length: int, now: int) -> int:
        idx, used = ring.avail_idx, ring.last_used_idx
        if (
            (len(heap) != 1 or cpu.ready or op > 1 or length > most or (offset | length) & block or len(slot.segments) != 1)
            or (ring._published_idx != idx or queue.last_avail_idx != idx or used16[avail_event_at] != idx or ring.broken is not None)
            or (queue.used_idx != used or avail[used_event_at] != used or not ring.callbacks or queue.in_flight)
            or (waiting[0] or waiting[1] or not tags or not heads or not host.queues[0].tags or host.driver.free < 1)
            or (offset + length > device.capacity_sectors << 9 or offset + length > store.size or driver.failed is not None)
            or ((op and (device.read_only or not device.writeback)) or device.queues.get(number) is not queue or device.broken is not None)
            or driver.queues[number] is not ring
            or any(type(context) is not Fused for context in contexts)
        ):
            return 0
        # D1 to D3: the driver's half
        header, status, _, _ = requests[tags[-1]].pdu
        head = heads[-1]
        at = tables_at + head * table_bytes
        memory[status] = 0xFF
        pack_two(memory, header, op, offset >> 9)
        pack_three(memory, at, header, HEADER, slot.gpa, (DATA_OUT if op else DATA_IN) | length, status, STATUS)
        pack_two(desc, head << 4, at, INDIRECT)
        avail[2 + (idx & mask)] = head
        after = (idx + 1) & 0xFFFF
        avail[1] = ring.avail_idx = ring._published_idx = ring._kicked_idx = after
        # D4, D5: the device's half takes from memory what it finds there
        head = avail[2 + (idx & mask)]
        at, _ = unpack_two(desc, head << 4)
        header, _, data, half, tail, _ = unpack_three(memory, at)
        kind, sector = unpack_two(memory, header)
        size = half & 0xFFFFFFFF
        queue.last_avail_idx = queue._shadow_avail_idx = used16[avail_event_at] = avail[1]
        # D6 to U2: the drive moves the bytes when it is done
        slot.start_ns = start_ns = now + enter
        slot.issue_ns = start_ns + to_issue
        ended = done(start_ns + to_fetch[kind], kind, sector, size)
        if kind == _READ:
            memory[data : data + size] = store.bytes[sector << 9 : (sector << 9) + size]
        else:
            store.bytes[sector << 9 : (sector << 9) + size] = memory[data : data + size]
        # U3, U4
        memory[tail] = 0
        elements[used & mask] = (size + 1 if kind == _READ else 1) << 32 | head
        used16[1] = queue.used_idx = queue._flushed_idx = queue._signalled_idx = (used + 1) & 0xFFFF
        queue._signalled_valid = True
        # U5 to U7: callbacks off, the used element, callbacks on
        avail[used_event_at] = (used - 1) & 0xFFFF
        ring.last_used_idx = avail[used_event_at] = used16[1]
        driver.kick_decisions += 1
        driver.kicks += 1
        driver.interrupts += 1
        device.notify_decisions += 1
        interrupt.notifies += 1
        bus.fast_mmio += 1
        bus.exits += 2
        woken: int = ended + to_task
        return woken

    return solo
