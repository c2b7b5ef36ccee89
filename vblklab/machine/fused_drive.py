"""The fused path of the simulator, below the host's stack: the drive and its interrupt.

What ``fused.py`` says holds here too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from heapq import heappush
from typing import Any

from ..device import IoOp
from ..disk.drive import execute
from ..events import WAIT
from ..iostack import Op
from .sched import Call
from .untouched import plain_memory

__all__ = ["Hardware", "HeadOp", "host_interrupts"]

Steps = Generator[Any, int, Any]
_READ, _WRITE, _FLUSH = 0, 1, int(Op.FLUSH)


class Hardware:
    """The drive: ``fetch`` is ``Drive.submit``, and each tag has a function of its own that ends its command."""

    def __init__(self, vm: Any) -> None:
        driver = vm._host_stack.driver
        drive, service, sched = driver.drive, driver.drive.service, vm.scheduler
        store, completion = drive.store, drive.completion
        heap, order, irq, notify, trace = sched._heap, sched._order, vm._host_irq, vm._host_irq.notify, drive._trace
        ram = plain_memory(store)
        work = [[int(ns * factor) for factor in service._factors] for ns in (service.read_ns, service.write_ns)]
        dies, laps, ways, bytes_per_us = service._dies, len(service._factors), len(service._dies), service.bytes_per_us

        def done(now: int, op: int, sector: int, length: int) -> int:
            """``ServiceTime.done``."""
            end: int
            if op > _WRITE:
                end = service.done(now, op, sector, length)
                return end
            service._next = lap = (service._next + 1) % laps
            die = (sector >> 3) * 0x9E3779B1 % 0xFFFFFFFB % ways
            end = dies[die]
            if end < now:
                end = now
            dies[die] = end = end + work[op][lap]
            if service._link_free > end:
                end = service._link_free
            service._link_free = end = end + length * 1000 // bytes_per_us
            return end

        # The link makes commands end in the order of their fetch, so all but the first stand in line instead of on the heap.
        line: deque[tuple[int, int, Call]] = deque()

        def end(rq: Any, now: int) -> None:
            line.popleft()
            if line:
                heappush(heap, line[0])
            views = rq.segments
            error = 0
            if ram and rq.op <= _WRITE and len(views) == 1 and (stop := (start := rq.sector << 9) + rq.length) <= store.size:
                if rq.op == _READ:
                    views[0][:] = store.bytes[start:stop]
                else:
                    store.bytes[start:stop] = views[0]
            else:
                error = execute(store, rq.op, rq.sector << 9, rq.length, views, getattr(rq.bios[0], "unmap", True))
            if sched.observe is not None:
                sched.now = now
                trace(("nvme_cqe", rq.key))
            completion.append((rq, error))
            if irq.waiting:
                sched.now = now
                notify()
            else:
                irq.notified = True

        ends = [Call(partial(end, rq)) for rq in vm._host_stack.queues[0].requests]

        def fetch(rq: Any, now: int) -> None:
            if sched.observe is not None:
                sched.now = now
                trace(("nvme_fetch", rq.key))
            entry = (done(now, rq.op, rq.sector, rq.length), next(order), ends[rq.tag])
            if not line:
                heappush(heap, entry)
            elif rq.op > _WRITE or entry[0] < line[-1][0]:  # a flush does not cross the link
                sched.clockwork(entry[0], partial(drive._end, rq))
                return
            line.append(entry)

        self.done = done
        self.least_ns = min(min(one) for one in work)
        self.fetch: Callable[[Any, int], None] = fetch


class HeadOp(IoOp):
    """The operation of a buffer at one head, used again with its request for each there until one ends in another way than usual."""

    __slots__ = ("ring",)

    ring: Any


def host_interrupts(vm: Any) -> Steps:
    """``NvmeDriver.interrupts``."""
    sched, host, engine, device = vm.scheduler, vm._host_stack, vm.engine, vm._device_context
    driver = host.driver
    heap, cost = sched._heap, sched.table
    c_first, c_next, c_end = cost["nvme_interrupt"], cost["nvme_irq"], cost["host:request_done"]
    completion = driver.drive.completion
    hctx = host.queues[0]
    tags = hctx.tags
    vcpu_may_wait = not vm._bus._fast
    now = yield None  # the time at which it begins
    held = sched.held
    while True:
        if not completion:
            sched.now = now
            yield WAIT
            now = sched.now
            held = sched.held
            continue
        first = True
        while completion:
            rq, error = completion.popleft()
            driver.free += 1
            if first:
                now += c_first
                if held and now >= heap[0][0]:
                    now = yield now if heap[0][0] >= 0 else (now, "nvme_interrupt", rq.key, 0)
                    held = sched.held
                first = False
            else:
                now += c_next
                if held and now >= heap[0][0]:
                    now = yield now if heap[0][0] >= 0 else (now, "nvme_irq", rq.key)
                    held = sched.held
            bios = rq.bios
            bio = bios[0]
            if bio.remaining != 1 or len(bios) != 1:
                if now >= heap[0][0] >= 0:
                    now = yield now
                sched.now = now
                yield from host.complete(rq, error)
                now = sched.now
                held = sched.held
                continue
            now += c_end
            if now >= heap[0][0]:
                now = yield now if heap[0][0] >= 0 else (now, "host:request_done", rq.key, bio.io)
                held = sched.held
            sched.now = now
            if error:
                bio.status = error
            bio.remaining = 0
            if hctx.waiters:
                host._free(hctx, rq)
            else:
                tags.append(rq.tag)
            if type(bio) is not HeadOp or vcpu_may_wait:
                bio.end_io(bio)
                continue
            engine._done.append(bio)
            if device.waiting:
                device.notify()
            else:
                device.notified = True
        if hctx.dispatch or hctx.running:
            sched.now = now
            yield from host.run_hw_queue(0)
            now = sched.now
            held = sched.held
