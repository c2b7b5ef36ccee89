"""The virtio-blk device: VIRTIO 1.4 §5.2, in the shape of QEMU's hw/block/virtio-blk.c, sans-I/O.

Subclass it in a cell and change one of its declared steps (``VirtioBlkDevice.STEPS``), or set one on an instance.  Plain methods
decide (``pop``, ``parse``, ``check``, ``should_notify``); generator methods contain trace points (``submit``, ``complete``,
``push``).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, ClassVar

from ..errors import ConfigError, VirtioError
from ..events import WAIT, Wait
from ..iostack import Op
from ..ring import Chain, SplitDevice
from ..spec.virtio_blk import WRITE_ZEROES_UNMAP, BlkFeature, BlkStatus, ReqType
from .answers import answer, check_ranges
from .batch import BatchPath
from .config import BlkConfig
from .engine_api import Engine, IoOp
from .request import BlkRequest, parse
from .steps import STEPS, Step, originals, overridden
from .zoned import PLAIN_KINDS, check_zoned, submit_zoned
from .zones import Zones

__all__ = ["VirtioBlkDevice"]

Steps = Generator[Any, int, Any]
# Plain ints: comparing enum members is slow in CPython and these run for every request.
_IN, _OUT, _GET_ID, _TYPE_FLUSH = int(ReqType.IN), int(ReqType.OUT), int(ReqType.GET_ID), int(ReqType.FLUSH)
_GET_LIFETIME = int(ReqType.GET_LIFETIME)
_READ, _WRITE, _FLUSH, _WRITE_ZEROES, _DISCARD = int(Op.READ), int(Op.WRITE), int(Op.FLUSH), int(Op.WRITE_ZEROES), int(Op.DISCARD)
_IOERR = int(BlkStatus.IOERR)
_OP_OF = {
    int(ReqType.DISCARD): _DISCARD,
    int(ReqType.WRITE_ZEROES): _WRITE_ZEROES,
    int(ReqType.SECURE_ERASE): int(Op.SECURE_ERASE),
}
"""Requests that name ranges: the engine's operation for each of them."""


_SPINS = 400
"""How often a compiled loop looks at an empty ring before the machine looks at the clock."""


class VirtioBlkDevice(BlkConfig):
    """A recipe's ``device``.

    ``queues`` is num_queues (None: one per vCPU), ``queue_size_max`` the largest ring accepted; ``seg_max`` data segments and
    ``size_max`` bytes a segment (0: no limit); ``serial`` up to 20 bytes; ``write_cache`` True is write-back.  A device on a
    read-only store is read-only.

    ``on_exception`` None lets an exception out of a step end the run.  A function there is told of it instead: that request
    fails with VIRTIO_BLK_S_IOERR, an interrupt that could not be decided is sent, everything else lives.
    """

    STEPS: ClassVar[tuple[Step, ...]] = STEPS
    on_exception: Callable[[BaseException], None] | None = None
    zoned: Zones | None = None

    # -- wiring, called by the machine -----------------------------------------------------------------------------------

    def attach(
        self, engine: Engine, capacity_sectors: int, *, read_only: bool, notify: Callable[[int], Steps], wake: Callable[[], None]
    ) -> None:
        """Take the engine below, the way to interrupt the guest and this device's own notifier."""
        self.engine = engine
        self.capacity_sectors = capacity_sectors
        self.read_only = self.read_only or read_only
        self.chain_max = self.seg_max + 2
        self.zoned = self.zones if self.zones is not None and self.zones.model else None
        if self.zoned is not None:
            self.zoned.attach(capacity_sectors)
            self.chain_max += 1  # append_sector
        self._notify = notify
        self._wake = wake
        self.queues: dict[int, SplitDevice] = {}
        self.driver_features = 0
        self.writeback = self.write_cache
        self.epoch = 0
        self.notify_decisions = 0
        self.broken: VirtioError | None = None
        self.broken_queue: int | None = None
        self.resetting = False
        self._kicked: set[int] = set()
        self._inside: set[int] = set()
        self._again: set[int] = set()
        self._stopping: list[tuple[SplitDevice, Callable[[], None]]] = []
        self._resubmits: dict[int, list[int]] = {}
        self._path: BatchPath | None = None
        self._plain = ["no machine asked for the batch path"]
        self.on_reset_done: Callable[[], None] = lambda: None
        self.on_needs_reset: Callable[[VirtioError], None] = lambda error: None
        self.on_config_changed: Callable[[], None] = lambda: None

    # -- what the transport asks -----------------------------------------------------------------------------------------

    def negotiated(self, features: int) -> None:
        """These features are in force.  With no queue running, a device that had failed starts afresh."""
        self.driver_features = features
        if not features & BlkFeature.FLUSH:
            self.writeback = False  # a driver that cannot flush gets write-through: §5.2.6.2
        elif not features & BlkFeature.CONFIG_WCE:
            self.writeback = self.write_cache
        if not self.queues:
            self.broken = self.broken_queue = None

    def start(self, features: int, queues: dict[int, SplitDevice]) -> None:
        """DRIVER_OK: these queues are live.  Buffers may already wait in them (§3.1.1)."""
        self.negotiated(features)
        self.queues = queues
        self._kicked.update(queues)
        self._wake()

    def start_queue(self, number: int, ring: SplitDevice, resubmit: Sequence[int] = ()) -> None:
        """One more queue is live; ``resubmit`` are heads in flight of a device that died, which are served first."""
        if resubmit:
            self._resubmits[number] = list(resubmit)
        self.queues[number] = ring
        self.kick(number)

    def stop_queue(self, number: int, done: Callable[[], None]) -> None:
        """Pop nothing more from this queue; what is in flight completes, then ``done()`` is called from the device's context."""
        self._stopping.append((self.queues.pop(number), done))
        self._kicked.discard(number)
        self._resubmits.pop(number, None)
        self._wake()

    def reset_queue(self, number: int, done: Callable[[], None]) -> None:
        """RING_RESET: pop, use and tell nothing more of this queue; ``done()`` is called when no request is in guest memory (§2.6.1).

        What is in flight ends without a used element, since the driver offers it again.
        """
        self.queues[number].abandon()
        self.stop_queue(number, done)

    def reset(self) -> None:
        """The driver wrote 0 to Status.  Stop taking buffers now; ``run`` reports when nothing is in flight any more."""
        self.epoch += 1
        self.resetting = True
        self.queues = {}
        self._kicked.clear()
        self._resubmits.clear()
        self._wake()

    def kick(self, queue: int) -> None:
        """A doorbell for ``queue`` reached the device's event loop."""
        self._kicked.add(queue)
        self._wake()

    def check_resize(self) -> None:
        """ConfigError if the disk cannot have another size."""
        if self.zoned is not None:
            raise ConfigError("a zoned disk with another size", "its zones lie over the size it has: boot a new machine")

    def resize(self, capacity_sectors: int) -> None:
        """The image has another size now; tell the driver (§5.2.4, configuration change)."""
        self.check_resize()
        self.capacity_sectors = capacity_sectors
        if self._path is not None:
            self._path.forget()
        self.on_config_changed()

    def batch_path(self, call: Callable[[int], None], *, fast: str = "auto") -> BatchPath | None:
        """Take the batch path from here on if nothing stands against it; ``explain`` says what does.

        ``call(queue)`` interrupts the guest at once, without a trace point.  ``fast`` "auto" lets the engine use its compiled loop
        where it can, "off" never.
        """
        self._path = None
        self._plain = overridden(self, WRITTEN, "device")
        if self.zoned is not None:
            self._plain.append("a zoned disk: its zones are asked about every request")
        drain = self.engine.drain(fast)
        if isinstance(drain, str):
            self._plain.append(drain)
        elif not self._plain:
            self._path = BatchPath(self, drain, call)
        return self._path

    def explain(self) -> list[str]:
        """The path that requests take; for the plain path each reason for it."""
        if self._path is not None:
            return [f"batch path: {self._path.drain.name}"]
        return [f"plain path: {reason}" for reason in self._plain]

    # -- the device's context --------------------------------------------------------------------------------------------

    def run(self) -> Steps:
        """The event loop: completions and kicked queues, then idle.  Runs in an iothread or in the main loop."""
        engine = self.engine
        while True:
            work = False
            completed = engine.reap()
            if completed:
                work = True
                yield from self.complete_batch(completed)
            while self._kicked and not self.resetting:
                work = True
                yield from self.handle_output(self._kicked.pop())
            if self._stopping:
                self._end_stops()
            if self.resetting and not engine.in_flight and not self._inside:
                self._end_reset()
            if not work:
                yield WAIT

    def _end_stops(self) -> None:
        """Report the stopped queues that have nothing in flight any more."""
        waiting, self._stopping = self._stopping, []
        for queue, done in waiting:
            if queue.in_flight or queue.number in self._inside:
                self._stopping.append((queue, done))
            else:
                self._let_go()
                done()

    def _end_reset(self) -> None:
        self.resetting = False
        self.broken = self.broken_queue = None
        self.driver_features = 0
        self.writeback = self.write_cache
        stopped, self._stopping = self._stopping, []
        self._let_go()
        for _, done in stopped:
            done()
        self.on_reset_done()

    def _let_go(self) -> None:
        """A ring is over: hold nothing that looks into its memory."""
        if self._path is not None:
            self._path.forget()

    def poll_queues(self) -> bool:
        """Look at every queue without a kick; True if one has something, which is then handled (QEMU: the poll handler)."""
        if self._path is not None:
            return self._path.poll(_SPINS)
        for number, queue in self.queues.items():
            if not queue.empty():
                self.kick(number)
                return True
        return False

    def poll_begin(self) -> None:
        """Somebody calls ``poll_queues`` from here on: the batch path asks for no kicks."""
        if self._path is not None:
            self._path.poll_begin()

    def poll_end(self) -> bool:
        """Nobody looks any more; True if a buffer slipped in, whose queue is then kicked."""
        return self._path is not None and self._path.poll_end()

    def handle_output(self, number: int) -> Steps:
        """Serve one queue until it is empty: ``virtio_blk_handle_vq()``."""
        if self._path is not None:
            self._path.serve(number)
            if number in self._kicked:
                yield Wait(0)  # it does not come to an end: give way
            return
        if number not in self.queues or self.broken is not None or not self.enter(number):
            return
        queue = self.queues[number]
        try:
            yield ("virtio_queue_notify", number)
            idle = 0
            while self.queues.get(number) is queue:
                if queue.notification:
                    queue.set_notification(False)
                idle += 1
                while self.queues.get(number) is queue and (yield from self.serve_one(queue)):
                    idle = 0
                if self.engine.batch:
                    yield from self.engine.flush()
                yield ("virtio_queue_empty", number)
                if self.queues.get(number) is not queue:
                    break
                queue.set_notification(True)
                yield ("virtio_queue_set_notification", number, 1)
                if number in self._again:
                    self._again.discard(number)
                elif queue.recheck():
                    break
                if idle > 1:  # there is a buffer, and a learner's pop does not take it
                    yield Wait(0)
        except VirtioError as error:
            self.failed(number, error)
            yield from self.engine.flush()
        finally:
            self.leave(number)

    def serve_one(self, queue: SplitDevice) -> Steps:
        """Take the next buffer through the steps; False if none waits."""
        request = self._next(queue)
        if request is None:
            return False
        kind = request.type
        if kind == _IN:
            yield ("pop_read", request.key, request.sector, request.length >> 9)
        elif kind == _OUT:
            yield ("pop_write", request.key, request.sector, request.length >> 9)
        else:
            yield ("pop_other", request.key, kind)
        if self._owns(queue):  # no reset meanwhile
            yield from self.handle_request(request)
            engine = self.engine
            if engine.batch and not engine.batched:
                yield from engine.flush()
                yield from self.complete_batch(engine.reap())
        elif queue.abandoned:
            queue.detach(request.chain)
        return True

    def enter(self, number: int) -> bool:
        """Begin to serve a queue; False if another context is at it, which then looks again before it leaves."""
        if number in self._inside:
            self._again.add(number)
            return False
        self._inside.add(number)
        return True

    def leave(self, number: int) -> None:
        """The queue is served."""
        self._inside.discard(number)
        if self.resetting or self._stopping:
            self._wake()

    def failed(self, number: int, error: VirtioError) -> None:
        """The driver of this queue broke the specification."""
        self.broken_queue = number
        self.fail(error)

    def resubmits(self, number: int) -> bool:
        """Whether heads of a device that died wait to be served again."""
        return number in self._resubmits

    def _owns(self, queue: SplitDevice) -> bool:
        """Whether this ring's memory is still the device's: the queue runs, or was stopped and finishes."""
        if self.queues.get(queue.number) is queue:
            return True
        return not queue.abandoned and any(stopping is queue for stopping, _ in self._stopping)

    # -- the steps -------------------------------------------------------------------------------------------------------

    def pop(self, queue: SplitDevice) -> Chain | None:
        """The next available buffer of ``queue``, or None: ``virtqueue_pop()``."""
        return queue.pop()

    def parse(self, queue: SplitDevice, chain: Chain) -> BlkRequest:
        """Header, data and status byte of a chain of any framing; raises VirtioError if one is missing (§2.7.4, §5.2.6)."""
        return parse(queue, chain)

    def check(self, request: BlkRequest) -> int:
        """0 if the request may run, else the status that ends it: whole blocks inside the disk, a known type, not read-only."""
        kind = request.type
        if kind == _IN or kind == _OUT:
            block = self.block_size
            if request.length % block or (request.sector << 9) % block:
                return _IOERR
            if request.sector + (request.length >> 9) > self.capacity_sectors:
                return _IOERR
            return _IOERR if kind == _OUT and self.read_only else 0
        if kind == _TYPE_FLUSH or kind == _GET_ID or (kind == _GET_LIFETIME and self.lifetime is not None):
            return 0
        return check_ranges(self, request) if kind in _OP_OF else check_zoned(self, request)

    def submit(self, request: BlkRequest) -> Steps:
        """Hand the request to the engine, or end it if it needs none: ``virtio_blk_handle_request()`` behind its checks."""
        kind = request.type
        if self.zoned is not None and kind not in PLAIN_KINDS:
            yield from submit_zoned(self, self.zoned, request)
        elif kind == _IN:
            self.operate(request, _READ, request.sector << 9, request.length, request.data)
        elif kind == _OUT:
            self.operate(request, _WRITE, request.sector << 9, request.length, request.data)
        elif kind == _TYPE_FLUSH:
            self.operate(request, _FLUSH, 0, 0, [])
        elif kind == _GET_ID or kind == _GET_LIFETIME:
            yield from self.end(request, answer(self, request))
        else:
            self.operate_ranges(request)

    def complete(self, request: BlkRequest, status: int) -> Steps:
        """The status byte first, then the used element, still unpublished: ``virtio_blk_req_complete()``, §5.2.6."""
        queue = request.queue
        if not self._owns(queue):
            return
        request.status = status
        request.status_view[0] = status  # type: ignore[index]
        request.written = written = self.used_length(request)
        queue.fill(request.chain, written)
        request.ended = True
        yield ("completion_to_ring", request.key, request.error, status, written)

    def push(self, queue: SplitDevice) -> Steps:
        """Publish the used elements and interrupt the guest if it asked for it: ``virtqueue_flush()``, ``virtio_notify()``."""
        if not self._owns(queue):
            return
        count = queue.flush()
        self.notify_decisions += 1
        yield ("virtqueue_flush", queue.number, count)
        if self._owns(queue) and self.should_notify(queue):
            yield from self._notify(queue.number)

    def should_notify(self, queue: SplitDevice) -> bool:
        """Whether to interrupt the guest for what was just published: ``virtio_should_notify()``, §2.7.7.2."""
        return queue.should_notify()

    # -- between the steps -----------------------------------------------------------------------------------------------

    def _next(self, queue: SplitDevice) -> BlkRequest | None:
        """Pop and parse, after the heads of a device that died."""
        before = queue.last_avail_idx
        chain = None
        try:
            chain = self.pop(queue) if not self._resubmits else self._pop_or_resubmit(queue)
            return None if chain is None else self.parse(queue, chain)
        except VirtioError:
            if chain is not None:
                queue.detach(chain)
            raise
        except Exception as error:
            return self._rescue(queue, chain, before, error)

    def _pop_or_resubmit(self, queue: SplitDevice) -> Chain | None:
        heads = self._resubmits.get(queue.number)
        if not heads:
            self._resubmits.pop(queue.number, None)
            return self.pop(queue)
        return queue.resubmit(heads.pop(0))

    def _rescue(self, queue: SplitDevice, chain: Chain | None, before: int, error: Exception) -> BlkRequest | None:
        """A step failed over a buffer: take the buffer as the base class does, and let it end with IOERR."""
        popped = queue.last_avail_idx != before
        self._report(error)
        if chain is not None:
            chain = queue.map_chain(chain.head)
        elif popped:
            chain = queue.last_popped()
        else:
            chain = queue.pop()
        if chain is None:
            return None
        try:
            request = parse(queue, chain)
        except VirtioError:
            queue.detach(chain)
            raise
        request.status = _IOERR
        return request

    def _report(self, error: Exception) -> None:
        """Tell the owner of an exception out of a step, or raise it if nobody listens."""
        if self.on_exception is None or isinstance(error, VirtioError):
            raise error
        self.on_exception(error)

    def handle_request(self, request: BlkRequest) -> Steps:
        """Check one request, then submit it or end it at once."""
        try:
            status = request.status or self.check(request)
            if not status:
                yield from self.submit(request)
                return
        except Exception as error:
            self._report(error)
            status = request.status = _IOERR
            if request.left or request.ended:
                return  # it ends with the operations it has in the engine
        yield from self.end(request, status)

    def operate(self, request: BlkRequest, op: int, offset: int, length: int, views: list[memoryview], unmap: bool = True) -> None:
        """One engine operation on behalf of ``request``; it starts with the batch, when the queue is empty."""
        request.left += 1
        engine = self.engine
        engine.submit(IoOp(op, offset, length, views, request.key, request, self.epoch, engine.end_io, unmap))

    def operate_ranges(self, request: BlkRequest) -> None:
        """One engine operation for each range of a DISCARD, WRITE_ZEROES or SECURE_ERASE."""
        op = _OP_OF[request.type]
        for sector, sectors, flags in request.ranges:
            self.operate(request, op, sector << 9, sectors << 9, [], bool(flags & WRITE_ZEROES_UNMAP) or op == _DISCARD)

    def end(self, request: BlkRequest, status: int) -> Steps:
        """End a request that has nothing in the engine: complete and push."""
        yield from self._complete(request, status)
        yield from self._push(request.queue)

    def _complete(self, request: BlkRequest, status: int) -> Steps:
        queue = request.queue
        try:
            if not queue.abandoned:
                yield from self.complete(request, status)
        except Exception as error:
            self._report(error)
            if not request.ended:
                yield from VirtioBlkDevice.complete(self, request, _IOERR)
        if queue.abandoned and not request.ended:
            queue.detach(request.chain)
            request.ended = True

    def _push(self, queue: SplitDevice) -> Steps:
        try:
            yield from self.push(queue)
        except Exception as error:
            self._report(error)
            if self._owns(queue):
                queue.flush()
                yield from self._notify(queue.number)

    def complete_batch(self, completed: list[IoOp]) -> Steps:
        """End what the engine finished, with one used.idx store and one interrupt decision a queue."""
        touched: dict[int, SplitDevice] = {}
        for op in completed:
            if op.epoch != self.epoch:
                continue  # the driver reset the device meanwhile: its memory is no longer ours
            request: BlkRequest = op.request
            request.left -= 1
            if op.status:
                request.status = _IOERR
                request.error = -op.status
                request.written = 0
            elif op.op == _READ:
                if not request.status:
                    request.written = request.length
            elif not self.writeback and (op.op == _WRITE or op.op == _WRITE_ZEROES):
                self.operate(request, _FLUSH, 0, 0, [])  # write-through: stable before it is acknowledged
            if request.left:
                continue
            yield from self._complete(request, request.status)
            touched[request.queue.number] = request.queue
        if self.engine.batch:
            yield from self.engine.flush()
        for queue in touched.values():
            yield from self._push(queue)

    def used_length(self, request: BlkRequest) -> int:
        """Bytes written without a gap from the first device-writable one on, for the used element (§2.7.8.2).

        That is the data and the status byte behind it, but only the data where it does not fill its place.
        """
        written = request.written
        if request.type == _IN and not request.status:
            return written + 1
        return written + (written == sum(map(len, request.writable)))

    def fail(self, error: VirtioError) -> None:
        """The driver broke the specification: stop, set DEVICE_NEEDS_RESET (``virtio_error()``, §2.1.2)."""
        self.broken = error
        self.on_needs_reset(error)


WRITTEN = originals(VirtioBlkDevice)
