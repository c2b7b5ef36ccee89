"""The guest's block driver: Linux drivers/block/virtio_blk.c, sans-I/O."""

from __future__ import annotations

import errno
from collections.abc import Generator
from dataclasses import replace
from typing import Any

from ..errors import ConfigError, QueueFull, VirtioError
from ..events import Wait
from ..iostack import Bio, IOStack, Limits, Op, Request
from ..memory import GuestPages, Segment
from ..ring import PackedDriver, SplitDriver
from ..ring.packed import check_packed_size
from ..ring.split import check_queue_size
from ..spec.virtio import DEVICE_ID_BLOCK, Feature, Status
from ..spec.virtio_blk import (
    CONFIG_OFFSETS,
    DISCARD_SEG,
    DISCARD_SEG_BYTES,
    ID_BYTES,
    LIFETIME,
    REQ_HEADER,
    REQ_HEADER_BYTES,
    WRITE_ZEROES_UNMAP,
    BlkFeature,
    BlkStatus,
    ReqType,
)
from ..spec.virtio_blk_zoned import APPEND_SECTOR, ZoneModel
from ..transport import Transport
from .zoned import ZonedDisk, probe_zoned

__all__ = ["VirtioBlkDriver"]

Steps = Generator[Any, int, Any]

_TYPE = {
    Op.READ: ReqType.IN,
    Op.WRITE: ReqType.OUT,
    Op.FLUSH: ReqType.FLUSH,
    Op.DISCARD: ReqType.DISCARD,
    Op.WRITE_ZEROES: ReqType.WRITE_ZEROES,
    Op.SECURE_ERASE: ReqType.SECURE_ERASE,
    Op.ZONE_OPEN: ReqType.ZONE_OPEN,
    Op.ZONE_CLOSE: ReqType.ZONE_CLOSE,
    Op.ZONE_FINISH: ReqType.ZONE_FINISH,
    Op.ZONE_APPEND: ReqType.ZONE_APPEND,
    Op.ZONE_RESET: ReqType.ZONE_RESET,
    Op.ZONE_RESET_ALL: ReqType.ZONE_RESET_ALL,
    Op.DRV_IN: ReqType.GET_ID,  # unless the bio's token says which
}
_ERRNO = {
    BlkStatus.OK: 0,
    BlkStatus.UNSUPP: errno.EOPNOTSUPP,
    BlkStatus.ZONE_OPEN_RESOURCE: errno.ETOOMANYREFS,
    BlkStatus.ZONE_ACTIVE_RESOURCE: errno.EOVERFLOW,
}
_STATUS_UNWRITTEN = 0xFF
_OWN_IO = 0xFFFF << 32  # the trace's number for I/O that no job asked for
_LOOK_NS = 20_000
_pack_header = REQ_HEADER.pack_into
# Plain ints: enum arithmetic is slow in CPython and these run for every request.
_READ, _WRITE, _DISCARD, _WRITE_ZEROES, _DRV_IN = (int(op) for op in (Op.READ, Op.WRITE, Op.DISCARD, Op.WRITE_ZEROES, Op.DRV_IN))
_SECURE_ERASE, _ZONE_OPEN, _ZONE_APPEND = int(Op.SECURE_ERASE), int(Op.ZONE_OPEN), int(Op.ZONE_APPEND)
_ZONE_REPORT = int(ReqType.ZONE_REPORT)
_TYPE_OF = {int(op): int(kind) for op, kind in _TYPE.items()}
_ERRNO_OF = {int(status): error for status, error in _ERRNO.items()}


class VirtioBlkDriver:
    """A recipe's ``driver``: probes the device, turns block requests into buffers on a virtqueue, ends them.

    ``features`` is the allow-list; a bit that the device offers and the list lacks is never accepted.  ``poll=True`` sets no
    interrupts up for data queues: the task that waits polls (Linux: poll queues).  ``queues`` caps the number of queues used.
    """

    FEATURES = (
        Feature.VERSION_1
        | Feature.EVENT_IDX
        | Feature.INDIRECT_DESC
        | Feature.IN_ORDER
        | Feature.RING_RESET
        | Feature.NOTIFICATION_DATA
        | BlkFeature.SIZE_MAX
        | BlkFeature.SEG_MAX
        | BlkFeature.RO
        | BlkFeature.BLK_SIZE
        | BlkFeature.FLUSH
        | BlkFeature.TOPOLOGY
        | BlkFeature.CONFIG_WCE
        | BlkFeature.MQ
        | BlkFeature.DISCARD
        | BlkFeature.WRITE_ZEROES
        | BlkFeature.SECURE_ERASE
        | BlkFeature.LIFETIME
        | BlkFeature.ZONED
    )

    def __init__(self, *, features: int | None = None, poll: bool = False, queues: int | None = None) -> None:
        if queues is not None and queues < 1:
            raise ConfigError(f"driver queues={queues}", "use 1 or more")
        self.allowed = self.FEATURES if features is None else features | Feature.VERSION_1
        unknown = int(self.allowed) & ~int(self.FEATURES)
        if unknown:
            raise ConfigError(f"driver features {unknown:#x} are not implemented", f"choose from {int(self.FEATURES):#x}")
        self.poll = poll
        self.max_queues = queues

    def __repr__(self) -> str:
        given = [f"features={int(self.allowed):#x}"] * (self.allowed != self.FEATURES) + ["poll=True"] * self.poll
        given += [f"queues={self.max_queues}"] * (self.max_queues is not None)
        return f"{type(self).__name__}({', '.join(given)})"

    def attach(self, pages: GuestPages, transport: Transport, iostack: IOStack, *, queue_size: int, packed: bool = False) -> None:
        """Take the guest's allocator, the transport below and the block layer above; ``packed`` rings need a device that offers them."""
        self.pages = pages
        self.memory = pages.memory
        self.transport = transport
        self.iostack = iostack
        self.queue_size = queue_size
        self.packed = packed
        self.queues: list[SplitDriver | PackedDriver] = []
        self.capacity_sectors = 0
        self.capacity_changes = 0
        self.limits = Limits()
        self.zoned: ZonedDisk | None = None
        self.failed: VirtioError | None = None
        self._restarts = 0
        self._restarting = False
        self.kicks = self.kick_decisions = self.interrupts = self.polls = 0
        self._polling: set[int] = set()
        self._most: dict[int, int] = {}
        self._replaced: int | None = None  # the queue that is being reset: nothing is put on it
        self._spare: dict[tuple[int, int], SplitDriver | PackedDriver] = {}  # rings of another size, by queue and size

    # -- probe -----------------------------------------------------------------------------------------------------------

    def probe(self) -> Steps:
        """The initialisation handshake of §3.1.1 and ``virtblk_probe()``; raises VirtioError and sets FAILED if it cannot.

        Where no device is, it does nothing: ``queues`` stays empty.
        """
        transport = self.transport
        if (yield from transport.probe(DEVICE_ID_BLOCK)):
            return
        yield from transport.reset()
        yield from transport.add_status(Status.ACKNOWLEDGE)
        yield from transport.add_status(Status.DRIVER)
        try:
            offered = yield from transport.device_features()
            self.features = offered & (int(self.allowed) | transport.features)
            if self.packed:
                if not offered & Feature.RING_PACKED:
                    raise VirtioError("the recipe's queue is packed, and the device does not offer RING_PACKED", "2.8")
                self.features |= Feature.RING_PACKED
            if (yield from self._field("model", 1, BlkFeature.ZONED)) == ZoneModel.HM:
                self.features &= ~int(BlkFeature.DISCARD)  # §5.2.5.1
            yield from transport.accept_features(self.features)
            yield from self._read_config()
            yield from self._find_queues()
        except VirtioError:
            yield from transport.add_status(Status.FAILED)
            raise
        yield from transport.add_status(Status.DRIVER_OK)

    def _read_config(self) -> Steps:
        has = self.features
        self.capacity_sectors = yield from self._field("capacity", 8)
        seg_max = yield from self._field("seg_max", 4, BlkFeature.SEG_MAX, 1)
        size_max = yield from self._field("size_max", 4, BlkFeature.SIZE_MAX)
        block = yield from self._field("blk_size", 4, BlkFeature.BLK_SIZE, 512)
        max_discard = yield from self._field("max_discard_sectors", 4, BlkFeature.DISCARD)
        max_zeroes = yield from self._field("max_write_zeroes_sectors", 4, BlkFeature.WRITE_ZEROES)
        max_erase = yield from self._field("max_secure_erase_sectors", 4, BlkFeature.SECURE_ERASE)
        exponent = yield from self._field("physical_block_exp", 1, BlkFeature.TOPOLOGY)
        offset = yield from self._field("alignment_offset", 1, BlkFeature.TOPOLOGY)
        least = yield from self._field("min_io_size", 2, BlkFeature.TOPOLOGY)
        best = yield from self._field("opt_io_size", 4, BlkFeature.TOPOLOGY)
        self.num_queues = yield from self._field("num_queues", 2, BlkFeature.MQ, 1)
        if block < 512 or block & (block - 1):
            raise VirtioError(f"blk_size {block}", "5.2.4")
        self.limits = Limits(
            max_segments=max(1, seg_max),
            max_segment_bytes=size_max or 0xFFFFFFFF,
            max_discard_sectors=max_discard,
            max_write_zeroes_sectors=max_zeroes,
            max_secure_erase_sectors=max_erase,
            logical_block_bytes=block,
            physical_block_bytes=block << exponent,
            alignment_offset=offset * block,
            io_min=least * block,
            io_opt=best * block,
            read_only=bool(has & BlkFeature.RO),
            flush=bool(has & BlkFeature.FLUSH),
        )
        self.zoned, self.limits = yield from probe_zoned(self, self.limits)
        if self.num_queues < 1:
            raise VirtioError(f"num_queues {self.num_queues}", "5.2.4")
        if self.max_queues is not None:
            self.num_queues = min(self.num_queues, self.max_queues)

    def _field(self, name: str, size: int, feature: int = 0, otherwise: int = 0) -> Steps:
        """One field of configuration space, or ``otherwise`` if the feature that it belongs to was not negotiated (§2.5.1)."""
        if feature and not self.features & feature:
            return otherwise
        return int.from_bytes((yield from self.transport.read_config(CONFIG_OFFSETS[name], size)), "little")

    def _find_queues(self) -> Steps:
        """Set up the rings and, once, a request slot per tag: header and status live in guest memory, like Linux's pdu."""
        first = not self.queues
        sizes = []
        for number in range(self.num_queues):
            most = yield from self.transport.queue_size_max(number)
            if not most:
                raise VirtioError(f"queue {number} does not exist although num_queues is {self.num_queues}", "4.2.3.2")
            self._most[number] = most  # virtio-pci tells it until the queue is set up
            sizes.append(min(self.queue_size, most))
        least = min(sizes)
        # a chain is never longer than its queue, in a table or not: §2.7.5.3.1
        around = 2 if self.zoned is None else 3  # header and status; append_sector
        if least <= around:
            raise ConfigError(f"a queue of {least} entries", f"a request needs {around + 1} descriptors")
        self.limits = replace(self.limits, max_segments=min(self.limits.max_segments, least - around))
        indirect = self.limits.max_segments + around if self.features & Feature.INDIRECT_DESC else 0
        event_idx, in_order = bool(self.features & Feature.EVENT_IDX), bool(self.features & Feature.IN_ORDER)
        for number, size in enumerate(sizes):
            old = None if first else self.queues[number]
            if old is not None and (old.size, old.indirect_segments) == (size, indirect):
                ring = self.queues[number] = old.renew(event_idx=event_idx, in_order=in_order)
            else:
                half = PackedDriver if self.packed else SplitDriver
                ring = half.alloc(self.pages, size, event_idx=event_idx, in_order=in_order, indirect_segments=indirect)
                self.queues[number:] = [ring, *self.queues[number + 1 :]]
            if self.poll:
                ring.disable_cb()
        yield from self.transport.find_vqs([ring.layout for ring in self.queues], polled=self.poll)
        if first:
            self.iostack.attach(self, self.limits, queues=self.num_queues, tags=self.queues[0].size)
            self.iostack.poll = self.poll_queue if self.poll else None
            for hctx in self.iostack.queues:
                for rq in hctx.requests:
                    header, status = self.pages.alloc(REQ_HEADER_BYTES + DISCARD_SEG_BYTES, 16), self.pages.alloc(1, 1)
                    rq.pdu = header, status, [(header, REQ_HEADER_BYTES)], [(status, 1)]

    # -- down: queue_rq and commit_rqs -----------------------------------------------------------------------------------

    def queue_rq(self, rq: Request, last: bool) -> Generator[Any, int, bool]:
        """``virtio_queue_rq()``: build header, data and status, put them on the ring, kick if ``last``."""
        if self.failed is not None:
            yield ("virtio_queue_rq", rq.key)
            yield from self.iostack.complete(rq, errno.EIO)
            return True
        queue = rq.queue
        if queue == self._replaced:
            yield ("virtio_queue_rq", rq.key)
            return False
        ring = self.queues[queue]
        try:
            head = ring.add_sgs(*self._segments(rq), rq)
        except QueueFull:
            yield ("virtio_queue_rq", rq.key)
            return False
        yield ("request_to_ring", rq.key, queue << 16 | head)
        ring.publish()
        if last:
            self.kick_decisions += 1
            yield ("virtqueue_kick_prepare", queue)
            if ring.kick_prepare():
                self.kicks += 1
                yield from self._kick(queue)
        return True

    def _segments(self, rq: Request) -> tuple[list[Segment], list[Segment]]:
        """Write the request's header; the device-readable and device-writable segments of its buffer."""
        op = rq.op
        header, status, head, tail = rq.pdu
        memory, base = self.memory.bytes, self.memory.base
        memory[status - base] = _STATUS_UNWRITTEN
        if op == _READ:
            _pack_header(memory, header - base, 0, 0, rq.sector)
            return head, rq.segments + tail
        kind = _TYPE_OF[op] if op != _DRV_IN else rq.bios[0].token or _TYPE_OF[op]
        named = op == _WRITE or _ZONE_OPEN <= op < _DRV_IN or kind == _ZONE_REPORT
        _pack_header(memory, header - base, kind, 0, rq.sector if named else 0)
        if op == _WRITE:
            return head + rq.segments, tail
        if op == _DRV_IN:
            return head, rq.segments + tail
        if op == _ZONE_APPEND:
            return head + rq.segments, [(header + REQ_HEADER_BYTES, APPEND_SECTOR.size), *tail]
        if op == _DISCARD or op == _WRITE_ZEROES or op == _SECURE_ERASE:
            flags = WRITE_ZEROES_UNMAP if op == _WRITE_ZEROES else 0
            DISCARD_SEG.pack_into(memory, header - base + REQ_HEADER_BYTES, rq.sector, rq.length >> 9, flags)
            return [*head, (header + REQ_HEADER_BYTES, DISCARD_SEG_BYTES)], tail
        return head, tail

    def commit_rqs(self, queue: int) -> Steps:
        """``virtio_commit_rqs()``: the kick for requests queued with ``last=False``."""
        if queue == self._replaced:
            return
        self.kick_decisions += 1
        yield ("virtqueue_kick_prepare", queue)
        if self.queues[queue].kick_prepare():
            self.kicks += 1
            yield from self._kick(queue)

    def _kick(self, queue: int) -> Steps:
        """The available buffer notification; with NOTIFICATION_DATA it says how far the driver is."""
        if self.features & Feature.NOTIFICATION_DATA:
            return self.transport.notify(queue, self.queues[queue].next_avail())
        return self.transport.notify(queue)

    # -- up: interrupt, poll ---------------------------------------------------------------------------------------------

    def interrupt(self, vector: int = 0) -> Steps:
        """The handler of an interrupt: the transport says what it was about (``vector``: which message, with MSI-X), then it is served."""
        self.interrupts += 1
        config, queues = yield from self.transport.interrupt(vector)
        if config:
            yield from self._config_changed()
        if not self.poll:
            for queue in queues:
                if self.queues[queue].more_used():
                    yield from self.virtblk_done(queue)

    def virtblk_done(self, queue: int) -> Steps:
        """Drain the used ring with callbacks off, switch them on, look again: ``virtblk_done()``."""
        ring = self.queues[queue]
        yield ("virtblk_interrupt", queue)
        while True:
            ring.disable_cb()
            yield from self._drain(ring)
            yield ("virtqueue_enable_cb_prepare", queue)
            ring.enable_cb()
            yield ("virtqueue_enable_cb", queue)
            if ring.broken is not None or ring.enable_cb_check():
                break
        hctx = self.iostack.queues[queue]
        if hctx.dispatch or hctx.running:  # running: someone holds the only waiting request in its hand and may have been refused
            yield from self.iostack.run_hw_queue(queue)

    def poll_queue(self, queue: int) -> Generator[Any, int, bool]:
        """``virtblk_poll()``: end what is used; True if there was anything."""
        self.polls += 1
        yield ("virtblk_poll", queue)
        ring = self.queues[queue]
        if queue in self._polling or not ring.more_used():
            return False
        self._polling.add(queue)  # one task drains at a time, as under vq->lock
        try:
            yield from self._drain(ring)
        finally:
            self._polling.discard(queue)
        yield from self.iostack.run_hw_queue(queue)
        return True

    def _drain(self, ring: SplitDriver | PackedDriver) -> Steps:
        memory, base = self.memory.bytes, self.memory.base
        complete = self.iostack.complete
        while True:
            try:
                got = ring.get_buf()
            except VirtioError as error:
                yield from self._fail(error)
                return
            if got is None:
                return
            rq: Request = got[0]  # type: ignore[assignment]
            status = memory[rq.pdu[1] - base]
            if not status and rq.op == _READ and got[1] < rq.length:
                status = _STATUS_UNWRITTEN  # nothing is known of the data behind the used length: §2.7.8.2
            if _ZONE_OPEN <= rq.op < _DRV_IN:
                at = rq.pdu[0] - base + REQ_HEADER_BYTES
                rq.bios[0].token = status, APPEND_SECTOR.unpack_from(memory, at)[0]
            yield ("virtqueue_get_buf", rq.key)
            yield from complete(rq, _ERRNO_OF.get(status, errno.EIO) if status else 0)

    # -- trouble ---------------------------------------------------------------------------------------------------------

    def _config_changed(self) -> Steps:
        """``virtblk_config_changed()``: a new capacity, or DEVICE_NEEDS_RESET."""
        status = yield from self.transport.status()
        if status & Status.NEEDS_RESET:
            yield from self._fail(VirtioError("the device set DEVICE_NEEDS_RESET", "2.1.2"))
            return
        data = yield from self.transport.read_config(CONFIG_OFFSETS["capacity"], 8)
        capacity = int.from_bytes(data, "little")
        if capacity != self.capacity_sectors:
            self.capacity_sectors = capacity
            self.capacity_changes += 1

    def _fail(self, error: VirtioError) -> Steps:
        """Nothing more will come back: reset the device, so that no buffer is its own any more (§3.3.1), and end every request."""
        self._break(error)
        restarts = self._restarts
        yield from self.transport.reset(lambda: self._restarts != restarts)
        if self._restarts == restarts:
            yield from self._end_all()

    def _break(self, error: VirtioError) -> None:
        self.failed = error
        for ring in self.queues:
            ring.broken = ring.broken or error

    def _end_all(self) -> Steps:
        """End every request in flight with EIO; the device was reset."""
        for ring in self.queues:
            for rq in ring.detach_unused_bufs():
                yield from self.iostack.complete(rq, errno.EIO)  # type: ignore[arg-type]
        for hctx in self.iostack.queues:
            while hctx.dispatch:
                yield from self.iostack.complete(hctx.dispatch.popleft(), errno.EIO)

    def restart(self) -> Steps:
        """Reset and probe again after a failure; what was in flight ends with EIO first.  A queue that is being reset is waited for."""
        self._restarts += 1
        self._restarting = True
        try:
            while self._replaced is not None:  # two walks over the queue's registers must not mix
                now = yield ("virtblk_poll", self._replaced)
                yield Wait(now + _LOOK_NS)
            yield from self.transport.reset()
            self._break(VirtioError("the driver reset the device", "2.4"))
            yield from self._end_all()
            yield from self.probe()
            self.failed = None
        finally:
            self._restarting = False

    def reset_queue(self, queue: int, size: int | None = None) -> Steps:
        """Reset one queue and use it again, of ``size`` entries if given, while the others go on (RING_RESET, §2.6).

        What was in flight is offered again: ``virtqueue_reset()``, ``virtqueue_resize()``.  Raises ConfigError if the feature was not
        negotiated, there is no such queue, the size cannot be, or a queue is being reset already.
        """
        size = self._new_size(queue, size)
        old = self.queues[queue]
        self._replaced = queue
        try:
            yield from self.transport.reset_queue(queue)
            yield from self._drain(old)  # used before the device was asked
            old.broken = old.broken or VirtioError("the driver reset this queue", "2.6.1")
            left = old.detach_unused_bufs()
            if self.failed is None:
                ring = self._replacement(queue, old, size)
                yield from self.transport.setup_queue(queue, ring.layout)
                self.queues[queue] = ring
            self.iostack.queues[queue].dispatch.extendleft(reversed(left))  # type: ignore[arg-type]
        finally:
            self._replaced = None
        yield from self.iostack.run_hw_queue(queue)

    def _new_size(self, queue: int, size: int | None) -> int:
        """The size for a queue that is to be reset; ConfigError if it cannot be."""
        if not self.features & Feature.RING_RESET:
            raise ConfigError(
                "a queue cannot be reset by itself", "the device did not offer RING_RESET: vb.VirtioBlkDevice(ring_reset=True)"
            )
        if not 0 <= queue < len(self.queues):
            raise ConfigError(f"no queue {queue!r}", f"this driver's queues are 0 to {len(self.queues) - 1}")
        if self._restarting:
            raise ConfigError(f"queue {queue} cannot be reset now", "the driver is being restarted: wait until its restart() ends")
        if self._replaced is not None:
            raise ConfigError(f"queue {self._replaced} is being reset", "wait until its reset_queue() ends")
        if size is None or size == self.queues[queue].size:
            return self.queues[queue].size
        least = self.limits.max_segments + (2 if self.zoned is None else 3)  # a chain is never longer than its queue: §2.7.5.3.1
        most = self._most[queue]
        if not least <= size <= most:
            raise ConfigError(f"queue {queue} of {size} entries", f"use {least}, the longest request, to {most}, the device's limit")
        (check_packed_size if self.packed else check_queue_size)(size)
        return size

    def _replacement(self, queue: int, old: SplitDriver | PackedDriver, size: int) -> SplitDriver | PackedDriver:
        """A ring without a buffer in place of ``old``, over its memory if the size is the same."""
        self._spare[queue, old.size] = old
        known = self._spare.pop((queue, size), None)
        if known is not None:
            ring = known.renew(event_idx=old.event_idx, in_order=old.in_order)
        else:
            segments, half = old.indirect_segments, type(old)
            ring = half.alloc(self.pages, size, event_idx=old.event_idx, in_order=old.in_order, indirect_segments=segments)
        if self.poll:
            ring.disable_cb()
        return ring

    # -- requests of the driver's own ------------------------------------------------------------------------------------

    def serial(self) -> Generator[Any, int, str]:
        """GET_ID: the device's serial, ``/sys/block/vda/serial``; a walk for ``vm.task()``.  Raises OSError if the device refuses."""
        data = yield from self._ask(ReqType.GET_ID, ID_BYTES)
        return data.split(b"\0")[0].decode(errors="replace")

    def lifetime(self) -> Generator[Any, int, tuple[int, int, int]]:
        """GET_LIFETIME: (pre_eol_info, device_lifetime_est_typ_a, device_lifetime_est_typ_b), §5.2.6; needs VIRTIO_BLK_F_LIFETIME."""
        if not self.features & BlkFeature.LIFETIME:
            raise ConfigError("the lifetime cannot be asked for", "the device did not offer VIRTIO_BLK_F_LIFETIME: give it lifetime=")
        found: tuple[int, int, int] = LIFETIME.unpack((yield from self._ask(ReqType.GET_LIFETIME, LIFETIME.size)))
        return found

    def _ask(self, kind: int, length: int) -> Generator[Any, int, bytes]:
        """One request that reads ``length`` bytes about the device, waited for by looking every 20 µs."""
        gpa = self.pages.alloc(length, 16)
        bio = yield from self.execute(_DRV_IN, 0, [(gpa, length)], kind)
        if bio.status:
            raise OSError(bio.status, f"the device refuses {ReqType(kind).name}: {errno.errorcode[bio.status]}")
        return bytes(self.memory.read(gpa, length))

    def execute(self, op: int, sector: int, segments: list[Segment], token: Any = None) -> Generator[Any, int, Bio]:
        """One request of the driver's own and its end, waited for by looking every 20 µs: ``blk_execute_rq()``."""
        ended: list[Bio] = []
        length = sum(size for _, size in segments)
        yield from self.iostack.submit_bio(Bio(op, sector, length, segments, _OWN_IO, 0, ended.append, token), None, lambda: None)
        while not ended:
            now = yield ("virtblk_poll", 0)
            yield Wait(now + _LOOK_NS)
        return ended[0]

    def set_write_cache(self, writeback: bool) -> Steps:
        """Switch the device's cache mode through ``writeback`` in configuration space (§5.2.5.1, CONFIG_WCE)."""
        if not self.features & BlkFeature.CONFIG_WCE:
            raise ConfigError("the cache mode cannot be changed", "the device did not offer CONFIG_WCE")
        yield from self.transport.write_config(CONFIG_OFFSETS["writeback"], bytes((writeback,)))
