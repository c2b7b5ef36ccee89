"""A small system: the package's own driver and device over one ring, a step at a time, in any order that somebody chooses.

The guest has one vCPU (a task that queues requests, and the interrupt handler, which pre-empts it), the host one thread for the device.
A step of a context is its code up to the next trace point at which it has touched what others see.  The code before that is private and
commutes with everything, so no schedule is lost by not interrupting it.
"""

from __future__ import annotations

import errno
from collections.abc import Generator, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

from ..disk.store import RamStore
from ..engine import Sync
from ..errors import VblkError
from ..events import WAIT, Wait, expand
from ..iostack import Op, Request
from ..memory import GuestPages
from ..spec.virtio import Feature
from ..spec.virtio_blk import REQ_HEADER_BYTES, BlkFeature
from ..spec.virtio_mmio import Interrupt, Reg
from ..transport import InterruptStatus
from .sides import Side, Stores, watched

__all__ = ["Setup", "System", "Violation"]

Steps = Generator[Any, int, Any]
Told = tuple[Sequence[Stores | None], Sequence[Stores | None]]
"""Of the driver's side and of the device's."""
_SECTOR = 512
_VRING = int(Interrupt.VRING)
_MOST_POINTS = 400
"""Trace points that one step may pass; more is an endless loop."""


class Violation(Exception):
    """What a schedule ended in: ``kind`` is kick, interrupt, buffer, byte or error."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Setup(SimpleNamespace):
    """queue (Split or Packed), buffers, event_idx, indirect, and the classes: driver, device, driver_half, device_half, transport."""


class _Disk(RamStore):
    """A disk in ordinary memory: a system is made for each schedule, so it must cost little."""

    def __init__(self, side: Side, sectors: int) -> None:
        self.size = sectors * _SECTOR
        self.read_only = False
        self.bytes = memoryview(bytearray(self.size))
        self.side = side

    def readv(self, offset: int, views: Any) -> None:
        self.side.touched = True
        super().readv(offset, views)

    def writev(self, offset: int, views: Any) -> None:
        self.side.touched = True
        super().writev(offset, views)

    def flush(self) -> None:
        """Nothing is volatile here."""


class _Context:
    """One generator and whether it waits."""

    __slots__ = ("ended", "generator", "name", "notified", "side", "started", "waiting")

    def __init__(self, name: str, side: Side, generator: Steps) -> None:
        self.name = name
        self.side = side
        self.generator = generator
        self.started = self.waiting = self.notified = self.ended = False

    def notify(self) -> None:
        self.notified = True


class _Bus:
    """virtio-mmio's registers as far as they matter once a queue runs.  Each access is an exit, which empties the store buffer."""

    def __init__(self, system: System) -> None:
        self.system = system

    def read(self, offset: int, size: int = 4) -> Steps:
        yield ("mmio_read", offset, 0, 0)
        self.system.guest.fence()
        return self.system.status.read() if offset == Reg.INTERRUPT_STATUS else 0

    def write(self, offset: int, value: int, size: int = 4) -> Steps:
        yield ("mmio_write", offset, 1, value)
        self.system.guest.fence()
        if offset == Reg.INTERRUPT_ACK:
            self.system.status.ack(value)

    def notify(self, queue: int, data: int | None = None) -> Steps:
        yield ("doorbell_fast", int(Reg.QUEUE_NOTIFY), queue)
        self.system.guest.fence()
        self.system.kicks += 1
        self.system.device.kick(queue)


class _Stack:
    """The block layer above the driver: it checks each request that ends."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.queues = [SimpleNamespace(dispatch=[], running=0, requests=[])]
        self.poll = None

    def complete(self, rq: Request, error: int) -> Steps:
        self.system.ended(rq, error)
        return
        yield

    def run_hw_queue(self, queue: int) -> Steps:
        self.system.task.notify()
        return
        yield


class System:
    """Made fresh for each schedule.  ``enabled()`` says who can take a step, ``take(who)`` takes it and says what happened."""

    def __init__(self, setup: Setup, told: Told = ((), ())) -> None:
        """``told``: what ``looks()`` of another system said, which took the steps that this one takes first."""
        self.setup = setup
        count = setup.buffers
        size = _memory_bytes(setup)
        self.guest, self.host = Side("driver", size, told[0]), Side("device", size, told[1])
        self.guest.other, self.host.other = self.host, self.guest
        self.status = InterruptStatus()
        self.kicks = self.interrupts = 0
        self.pages = GuestPages(self.guest.memory)
        self.done: list[int] = []
        self._make_driver(setup)
        self._make_requests(count)
        self.guest.drain()
        self._make_device(setup, count)
        self.host.drain()
        self.task = _Context("driver", self.guest, self._submit())
        self.handler = _Context("handler", self.guest, self._interrupts())
        self.handler.waiting = True
        self.contexts = {"driver": self.task, "handler": self.handler, "device": self.worker}
        while _ready(self.worker):  # the device looks at the empty ring and goes to sleep
            self.take("device")
        self.host.drain()

    def _make_driver(self, setup: Setup) -> None:
        self.driver = driver = setup.driver()
        transport = setup.transport(_Bus(self))
        transport._queues = range(1)
        driver.attach(self.pages, transport, _Stack(self), queue_size=setup.queue.size, packed=setup.queue.packed)
        driver.features = _features(setup)
        half = watched(setup.driver_half, "driver")
        options = _in_order(setup) | {"event_idx": setup.event_idx, "indirect_segments": 3 if setup.indirect else 0}
        ring = half.alloc(self.pages, setup.queue.size, **options)
        ring.side = self.guest
        driver.queues = [ring]
        self.ring = ring

    def _make_requests(self, count: int) -> None:
        pages, memory = self.pages, self.guest.memory
        self.requests = []
        for number in range(count):
            rq = Request(0, number)
            data, header, status = pages.alloc(_SECTOR, 16), pages.alloc(REQ_HEADER_BYTES, 16), pages.alloc(1, 1)
            rq.pdu = header, status, [(header, REQ_HEADER_BYTES)], [(status, 1)]
            rq.op, rq.sector, rq.length, rq.segments = int(Op.WRITE if number & 1 else Op.READ), number, _SECTOR, [(data, _SECTOR)]
            if number & 1:
                memory.write(data, _pattern(number))
            self.requests.append(rq)

    def _make_device(self, setup: Setup, count: int) -> None:
        self.device = device = setup.device()
        self.disk = _Disk(self.host, count)
        for number in range(0, count, 2):
            self.disk.bytes[number * _SECTOR : (number + 1) * _SECTOR] = _pattern(number)
        self.worker = _Context("device", self.host, device.run())
        engine = Sync()
        engine.attach(None, self.disk, self.worker.notify)
        device.attach(engine, count, read_only=False, notify=self._notify, wake=self.worker.notify)
        device.on_needs_reset = self._needs_reset
        half = watched(setup.device_half, "device")
        layout = self.ring.layout
        options = _in_order(setup) | {"event_idx": setup.event_idx, "indirect": setup.indirect, "chain_max": device.chain_max}
        ring = half(self.host.memory, layout, **options)
        ring.side = self.host
        self.device_ring = ring
        device.negotiated(_features(setup))
        device.start_queue(0, ring)

    # -- the contexts ------------------------------------------------------------------------------------------------------------

    def _submit(self) -> Steps:
        """The guest's task: queue every request, wait where the ring is full."""
        hctx = self.driver.iostack.queues[0]
        hctx.running = 1  # whoever drains the ring tells this task, even if it is just being refused
        for rq in self.requests:
            while not (yield from self.driver.queue_rq(rq, True)):
                yield WAIT
        hctx.running = 0

    def _interrupts(self) -> Steps:
        """The vCPU's handler: runs while the line is high."""
        while True:
            if not self.status.read():
                yield WAIT
                continue
            self.interrupts += 1
            yield from self.driver.interrupt()

    def _notify(self, queue: int) -> Steps:
        """The device's interrupt: a system call, which empties the store buffer."""
        yield ("virtio_notify_irqfd", queue)
        self.host.fence()
        self.status.set(_VRING)

    def _needs_reset(self, error: Exception) -> None:
        raise Violation("error", f"the device finds the ring broken: {error}")

    # -- what is right -----------------------------------------------------------------------------------------------------------

    def ended(self, rq: Request, error: int) -> None:
        """A request came back to the block layer."""
        if rq.tag in self.done:
            raise Violation("buffer", f"request {rq.tag} came back twice")
        if self.driver.failed is not None:
            raise Violation("buffer", f"the driver gives up: {self.driver.failed}")
        if error:
            raise Violation("byte", f"request {rq.tag} came back with {errno.errorcode.get(error, error)}: its status byte was not there")
        data = rq.segments[0][0]
        if self.guest.memory.read(data, _SECTOR) != _pattern(rq.tag):
            raise Violation("byte", f"request {rq.tag} came back without its data")
        if rq.tag & 1 and self.disk.bytes[rq.sector * _SECTOR : (rq.sector + 1) * _SECTOR] != _pattern(rq.tag):
            raise Violation("byte", f"request {rq.tag} came back and the disk has not its data")
        self.done.append(rq.tag)

    def lost(self) -> Violation | None:
        """Nobody can take a step: what is missing, or None if every request came back."""
        if len(self.done) == len(self.requests):
            return None
        if not self.device_ring.empty():
            return Violation("kick", "a kick is lost: the device sleeps, and a buffer is available")
        if self.ring.more_used():
            return Violation("interrupt", "an interrupt is lost: the driver sleeps, and a buffer is used")
        return Violation("buffer", f"a buffer is lost: {len(self.requests) - len(self.done)} of {len(self.requests)} never came back")

    # -- steps -------------------------------------------------------------------------------------------------------------------

    def enabled(self) -> list[str]:
        """Who can take a step now."""
        found = []
        handling = not self.handler.waiting
        if handling or self.status.read():
            found.append("handler")
        if not handling and _ready(self.task):
            found.append("driver")
        if _ready(self.worker):
            found.append("device")
        if self.guest.pending:
            found.append("driver's stores")
        if self.host.pending:
            found.append("device's stores")
        return found

    def looks(self) -> Told:
        """What each look of a side at its memory found so far: a system that is led the same way need not compare it again."""
        return tuple(self.guest.looks), tuple(self.host.looks)

    def take(self, who: str) -> tuple[tuple[str, ...], tuple[tuple[int, bytes], ...]]:
        """One step: the trace points it passed and what it stored.  Raises Violation."""
        if who.endswith("stores"):
            side = self.guest if who.startswith("driver") else self.host
            return (), side.arrive().runs
        context = self.contexts[who]
        side = context.side
        side.begin()
        points: list[str] = []
        if context.waiting:
            context.waiting = context.notified = False
        try:
            self._run(context, points)
        except Violation:
            raise
        except VblkError as error:
            raise Violation("error", str(error)) from None
        return tuple(points), tuple(run for stores in side.stored for run in stores.runs)

    def _run(self, context: _Context, points: list[str]) -> None:
        side, send = context.side, context.generator.send
        for _ in range(_MOST_POINTS):
            try:
                ev = send(0) if context.started else next(context.generator)
            except StopIteration:
                context.ended = context.waiting = True
                side.collect()
                return
            finally:
                context.started = True
            if ev is WAIT:
                if context.notified:
                    context.notified = False
                    continue
                context.waiting = True
                side.collect()
                return
            if ev.__class__ is not Wait:
                points += [one[0] for one in expand(ev)]
            side.collect()
            if side.touched:
                return
        raise Violation("error", f"the {context.name} goes on without touching the ring: an endless loop")


def _ready(context: _Context) -> bool:
    return not context.ended and (not context.waiting or context.notified)


@cache
def _pattern(number: int) -> bytes:
    return bytes(((number + 1) * 37 + i) & 0xFF for i in range(_SECTOR))


def _memory_bytes(setup: Setup) -> int:
    """Room for the ring, its tables and the requests."""
    size = int(setup.queue.size)
    return 256 + size * 16 + size * 16 + size * 48 * bool(setup.indirect) + int(setup.buffers) * (_SECTOR + 64)


def _in_order(setup: Setup) -> dict[str, Any]:
    """The option of both halves, if the recipe's queue asks for it."""
    return {"in_order": True} if getattr(setup.queue, "in_order", False) else {}


def _features(setup: Setup) -> int:
    bits = int(Feature.VERSION_1 | BlkFeature.FLUSH)
    bits |= int(Feature.EVENT_IDX) if setup.event_idx else 0
    bits |= int(Feature.INDIRECT_DESC) if setup.indirect else 0
    bits |= int(Feature.IN_ORDER) if _in_order(setup) else 0
    return bits | (int(Feature.RING_PACKED) if setup.queue.packed else 0)
