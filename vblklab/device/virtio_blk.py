"""The virtio-blk device: VIRTIO 1.4 §5.2, in the shape of QEMU's hw/block/virtio-blk.c, sans-I/O.

Subclass it in a cell and change one method.  Plain methods decide (``should_notify``, ``parse``, ``features``); generator
methods contain trace points (``handle_request``, ``complete``).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator
from typing import Any

from ..errors import BadAddress, ConfigError, VirtioError
from ..events import WAIT
from ..iostack import Op
from ..ring import Chain, SplitDevice
from ..spec.virtio import DEVICE_ID_BLOCK, Feature
from ..spec.virtio_blk import (
    CONFIG_BYTES,
    CONFIG_OFFSETS,
    DISCARD_SEG,
    DISCARD_SEG_BYTES,
    ID_BYTES,
    REQ_HEADER,
    REQ_HEADER_BYTES,
    WRITE_ZEROES_UNMAP,
    BlkFeature,
    BlkStatus,
    ReqType,
)
from .engine_api import Engine, IoOp

__all__ = ["BlkRequest", "VirtioBlkDevice"]

Steps = Generator[Any, int, Any]
_unpack_header = REQ_HEADER.unpack
# Plain ints: comparing enum members is slow in CPython and these run for every request.
_IN, _OUT, _GET_ID = int(ReqType.IN), int(ReqType.OUT), int(ReqType.GET_ID)
_READ, _WRITE, _FLUSH, _WRITE_ZEROES = int(Op.READ), int(Op.WRITE), int(Op.FLUSH), int(Op.WRITE_ZEROES)
_OK, _IOERR = int(BlkStatus.OK), int(BlkStatus.IOERR)


class BlkRequest:
    """One request taken from a queue: its header, the data views and where the status byte goes."""

    __slots__ = ("chain", "data", "key", "left", "length", "queue", "sector", "status", "status_view", "type", "written")

    def __init__(self, queue: SplitDevice, chain: Chain) -> None:
        self.queue = queue
        self.chain = chain
        self.key = chain.key
        self.type = 0
        self.sector = 0
        self.data: list[memoryview] = []
        self.length = 0  # bytes of data
        self.status_view: memoryview | None = None
        self.status = 0
        self.written = 0  # bytes of data the device wrote; once it is finished, the length in the used element
        self.left = 0  # engine operations still running


class VirtioBlkDevice:
    """A recipe's ``device``.

    ``queues`` is num_queues (None: one per vCPU), ``queue_size_max`` the largest ring accepted; ``seg_max`` data segments and
    ``size_max`` bytes a segment (0: no limit); ``serial`` up to 20 bytes; ``write_cache`` True is write-back.  A device on a
    read-only store is read-only.
    """

    device_id = DEVICE_ID_BLOCK

    def __init__(
        self,
        *,
        queues: int | None = None,
        queue_size_max: int = 1024,
        read_only: bool = False,
        serial: str = "vblklab",
        block_size: int = 512,
        seg_max: int = 126,
        size_max: int = 0,
        write_cache: bool = True,
        discard: bool = True,
        max_discard_sectors: int = 0x3FFFFF,
        event_idx: bool = True,
        indirect: bool = True,
    ) -> None:
        if queues is not None and not 1 <= queues <= 1024:
            raise ConfigError(f"device queues={queues}", "use 1 to 1024")
        if queue_size_max < 1 or queue_size_max > 32768 or queue_size_max & (queue_size_max - 1):
            raise ConfigError(f"device queue_size_max={queue_size_max}", "use a power of two up to 32768")
        if block_size < 512 or block_size > 32768 or block_size & (block_size - 1):
            raise ConfigError(f"device block_size={block_size}", "use a power of two from 512 to 32768")
        if not 1 <= seg_max <= 65534:
            raise ConfigError(f"device seg_max={seg_max}", "use 1 to 65534")
        if size_max and size_max < 512:
            raise ConfigError(f"device size_max={size_max}", "use 512 or more bytes a segment, or 0 for no limit")
        if max_discard_sectors < 1:
            raise ConfigError(f"device max_discard_sectors={max_discard_sectors}", "use 1 or more")
        if len(serial.encode()) > ID_BYTES:
            raise ConfigError(f"device serial={serial!r}", f"at most {ID_BYTES} bytes")
        self.num_queues = queues or 0
        self.queue_size_max = queue_size_max
        self.read_only = read_only
        self.serial = serial
        self.block_size = block_size
        self.seg_max = seg_max
        self.size_max = size_max
        self.write_cache = write_cache
        self.discard = discard
        self.max_discard_sectors = max_discard_sectors
        self.event_idx = event_idx
        self.indirect = indirect

    def __repr__(self) -> str:
        plain = VirtioBlkDevice().__dict__
        changed = {k: v for k, v in self.__dict__.items() if k in plain and plain[k] != v}
        names = {"num_queues": "queues"}
        return f"{type(self).__name__}({', '.join(f'{names.get(k, k)}={v!r}' for k, v in changed.items())})"

    # -- wiring, called by the machine -----------------------------------------------------------------------------------

    def attach(
        self, engine: Engine, capacity_sectors: int, *, read_only: bool, notify: Callable[[int], Steps], wake: Callable[[], None]
    ) -> None:
        """Take the engine below, the way to interrupt the guest and this device's own notifier."""
        self.engine = engine
        self.capacity_sectors = capacity_sectors
        self.read_only = self.read_only or read_only
        self.chain_max = self.seg_max + 2
        self._notify = notify
        self._wake = wake
        self.queues: dict[int, SplitDevice] = {}
        self.driver_features = 0
        self.writeback = self.write_cache
        self.epoch = 0
        self.notify_decisions = 0
        self.broken: VirtioError | None = None
        self.resetting = False
        self._kicked: set[int] = set()
        self._inside: set[int] = set()
        self._again: set[int] = set()
        self.on_reset_done: Callable[[], None] = lambda: None
        self.on_needs_reset: Callable[[VirtioError], None] = lambda error: None
        self.on_config_changed: Callable[[], None] = lambda: None

    # -- what the transport asks -----------------------------------------------------------------------------------------

    def features(self) -> int:
        """The feature bits offered."""
        bits = Feature.VERSION_1 | BlkFeature.SEG_MAX | BlkFeature.BLK_SIZE | BlkFeature.FLUSH | BlkFeature.CONFIG_WCE | BlkFeature.TOPOLOGY
        if self.num_queues > 1:
            bits |= BlkFeature.MQ
        if self.event_idx:
            bits |= Feature.EVENT_IDX
        if self.indirect:
            bits |= Feature.INDIRECT_DESC
        if self.size_max:
            bits |= BlkFeature.SIZE_MAX
        if self.read_only:
            bits |= BlkFeature.RO
        elif self.discard:
            bits |= BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES
        return int(bits)

    def accepts(self, features: int) -> bool:
        """Whether this subset of the offered features works; False makes FEATURES_OK read back as 0."""
        return not (features & BlkFeature.CONFIG_WCE and not features & BlkFeature.FLUSH)

    def read_config(self) -> bytes:
        """The configuration space, §5.2.4."""
        data = bytearray(CONFIG_BYTES)

        def put(name: str, code: str, value: int) -> None:
            struct.pack_into("<" + code, data, CONFIG_OFFSETS[name], value)

        put("capacity", "Q", self.capacity_sectors)
        put("size_max", "I", self.size_max)
        put("seg_max", "I", self.seg_max)
        put("blk_size", "I", self.block_size)
        put("writeback", "B", self.writeback)
        put("num_queues", "H", self.num_queues)
        if self.discard and not self.read_only:
            put("max_discard_sectors", "I", self.max_discard_sectors)
            put("max_discard_seg", "I", 1)
            put("discard_sector_alignment", "I", self.block_size >> 9)
            put("max_write_zeroes_sectors", "I", self.max_discard_sectors)
            put("max_write_zeroes_seg", "I", 1)
            put("write_zeroes_may_unmap", "B", 1)
        return bytes(data)

    def write_config(self, offset: int, data: bytes) -> None:
        """Only ``writeback`` can be written, and only with CONFIG_WCE negotiated (§5.2.5)."""
        if offset == CONFIG_OFFSETS["writeback"] and len(data) == 1 and self.driver_features & BlkFeature.CONFIG_WCE and data[0] <= 1:
            self.writeback = bool(data[0])

    def start(self, features: int, queues: dict[int, SplitDevice]) -> None:
        """DRIVER_OK: these queues are live.  Buffers may already wait in them (§3.1.1)."""
        self.driver_features = features
        self.queues = queues
        if not features & BlkFeature.FLUSH:
            self.writeback = False  # a driver that cannot flush gets write-through: §5.2.6.2
        elif not features & BlkFeature.CONFIG_WCE:
            self.writeback = self.write_cache
        self._kicked.update(queues)
        self._wake()

    def reset(self) -> None:
        """The driver wrote 0 to Status.  Stop taking buffers now; ``run`` reports when nothing is in flight any more."""
        self.epoch += 1
        self.resetting = True
        self.queues = {}
        self._kicked.clear()
        self._wake()

    def kick(self, queue: int) -> None:
        """A doorbell for ``queue`` reached the device's event loop."""
        self._kicked.add(queue)
        self._wake()

    def resize(self, capacity_sectors: int) -> None:
        """The image has another size now; tell the driver (§5.2.4, configuration change)."""
        self.capacity_sectors = capacity_sectors
        self.on_config_changed()

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
            if self.resetting and not engine.in_flight and not self._inside:
                self.resetting = False
                self.broken = None
                self.driver_features = 0
                self.writeback = self.write_cache
                self.on_reset_done()
            if not work:
                yield WAIT

    def poll_queues(self) -> bool:
        """Look at every queue without a kick; True if one has something, which is then handled (QEMU: the poll handler)."""
        for number, queue in self.queues.items():
            if not queue.empty():
                self.kick(number)
                return True
        return False

    def handle_output(self, number: int) -> Steps:
        """Serve one queue until it is empty: ``virtio_blk_handle_vq()``."""
        if number not in self.queues or self.broken is not None:
            return
        if number in self._inside:
            self._again.add(number)  # another context is at it and looks again before it leaves
            return
        self._inside.add(number)
        queue = self.queues[number]
        engine = self.engine
        inline = not engine.batched
        live = self.queues
        try:
            yield ("virtio_queue_notify", number)
            while live.get(number) is queue:
                if queue.notification:
                    queue.set_notification(False)
                while (chain := queue.pop()) is not None:
                    request = self.parse(queue, chain)
                    kind = request.type
                    if kind == _IN:
                        yield ("pop_read", request.key, request.sector, request.length >> 9)
                    elif kind == _OUT:
                        yield ("pop_write", request.key, request.sector, request.length >> 9)
                    else:
                        yield ("pop_other", request.key, kind)
                    live = self.queues
                    if live.get(number) is not queue:
                        break  # reset meanwhile
                    yield from self.handle_request(request)
                    if inline and engine.batch:
                        yield from engine.flush()
                        yield from self.complete_batch(engine.reap())
                if engine.batch:
                    yield from engine.flush()
                yield ("virtio_queue_empty", number)
                live = self.queues
                if live.get(number) is not queue:
                    break
                queue.set_notification(True)
                yield ("virtio_queue_set_notification", number, 1)
                if number in self._again:
                    self._again.discard(number)
                elif queue.recheck():
                    break
                live = self.queues
        except (VirtioError, BadAddress) as error:
            self.fail(error)
            yield from engine.flush()
        finally:
            self._inside.discard(number)
            if self.resetting:
                self._wake()

    def parse(self, queue: SplitDevice, chain: Chain) -> BlkRequest:
        """Header and status byte of a chain of any framing (§2.7.4, §5.2.6); raises VirtioError if one is missing."""
        request = BlkRequest(queue, chain)
        readable, writable = chain.readable, chain.writable
        if not writable:
            raise VirtioError("a request without a device-writable status byte", "5.2.6")
        last = writable.pop()
        if len(last) == 1:
            request.status_view = last
        else:
            request.status_view = last[-1:]
            writable.append(last[:-1])
        if not readable:
            raise VirtioError("a request without a header", "5.2.6")
        if len(readable[0]) == 16:
            kind, _, request.sector = _unpack_header(readable.pop(0))
        else:
            header, readable = _take(readable, REQ_HEADER_BYTES)
            if len(header) < REQ_HEADER_BYTES:
                raise VirtioError(f"a request header of {len(header)} bytes, {REQ_HEADER_BYTES} are needed", "5.2.6")
            kind, _, request.sector = _unpack_header(header)
        request.type = kind
        request.data = data = writable if kind == _IN or kind == _GET_ID else readable
        request.length = len(data[0]) if len(data) == 1 else sum(map(len, data))
        return request

    def handle_request(self, request: BlkRequest) -> Steps:
        """Check one request and hand it to the engine, or end it at once: ``virtio_blk_handle_request()``."""
        kind = request.type
        if kind == _IN or kind == _OUT:
            if self.in_range(request):
                request.left += 1
                op = _READ if kind == _IN else _WRITE
                engine = self.engine
                engine.submit(
                    IoOp(op, request.sector << 9, request.length, request.data, request.key, request, self.epoch, engine.end_io, True)
                )
            else:
                yield from self.complete(request, _IOERR)
        elif kind == ReqType.FLUSH:
            self.submit(request, _FLUSH, 0, 0, [])
        elif kind == _GET_ID:
            yield from self._get_id(request)
        elif kind in (ReqType.DISCARD, ReqType.WRITE_ZEROES) and self.discard:
            yield from self._discard(request)
        else:
            yield from self.complete(request, BlkStatus.UNSUPP)

    def in_range(self, request: BlkRequest) -> bool:
        """Whether a read or write fits: whole blocks, inside the disk, not a write to a read-only one."""
        block = self.block_size
        if request.length % block or (request.sector << 9) % block:
            return False
        if request.sector + (request.length >> 9) > self.capacity_sectors:
            return False
        return not (request.type == _OUT and self.read_only)

    def submit(self, request: BlkRequest, op: int, offset: int, length: int, views: list[memoryview], unmap: bool = True) -> None:
        """One engine operation on behalf of ``request``; it starts with the batch, when the queue is empty."""
        request.left += 1
        engine = self.engine
        engine.submit(IoOp(op, offset, length, views, request.key, request, self.epoch, engine.end_io, unmap))

    def _get_id(self, request: BlkRequest) -> Steps:
        """The serial, NUL-padded to 20 bytes; no NUL if it has all 20 (§5.2.6)."""
        text = self.serial.encode().ljust(ID_BYTES, b"\0")
        at = 0
        for view in request.data:
            part = text[at : at + len(view)]
            view[: len(part)] = part
            at += len(part)
        request.written = at
        yield from self.complete(request, BlkStatus.OK if at == ID_BYTES else BlkStatus.IOERR)

    def _discard(self, request: BlkRequest) -> Steps:
        """DISCARD and WRITE_ZEROES take one range each here (max_…_seg is 1): §5.2.6.2."""
        raw = b"".join(bytes(view) for view in request.data)
        kind = request.type
        if self.read_only or len(raw) % DISCARD_SEG_BYTES or not raw:
            yield from self.complete(request, BlkStatus.IOERR)
            return
        if len(raw) > DISCARD_SEG_BYTES:
            yield from self.complete(request, BlkStatus.UNSUPP)
            return
        sector, sectors, flags = DISCARD_SEG.unpack(raw)
        allowed = WRITE_ZEROES_UNMAP if kind == ReqType.WRITE_ZEROES else 0
        if flags & ~allowed:
            yield from self.complete(request, BlkStatus.UNSUPP)
            return
        block = self.block_size >> 9
        if sectors > self.max_discard_sectors or sector + sectors > self.capacity_sectors or sector % block or sectors % block:
            yield from self.complete(request, BlkStatus.IOERR)
            return
        op = Op.DISCARD if kind == ReqType.DISCARD else Op.WRITE_ZEROES
        self.submit(request, op, sector << 9, sectors << 9, [], bool(flags & WRITE_ZEROES_UNMAP) or op == Op.DISCARD)

    # -- completions -----------------------------------------------------------------------------------------------------

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
            elif op.op == _READ:
                request.written = request.length
            elif not self.writeback and (op.op == _WRITE or op.op == _WRITE_ZEROES):
                self.submit(request, _FLUSH, 0, 0, [])  # write-through: stable before it is acknowledged
            if request.left:
                continue
            queue = request.queue
            if self.finish(request):
                yield ("completion_to_ring", request.key, -op.status, request.status, request.written)
                touched[queue.number] = queue
        if self.engine.batch:
            yield from self.engine.flush()
        for queue in touched.values():
            yield from self.push_and_notify(queue)

    def complete(self, request: BlkRequest, status: int) -> Steps:
        """End a request that needs no engine: ``virtio_blk_req_complete()``."""
        request.status = status
        if self.finish(request):
            yield ("completion_to_ring", request.key, 0, status, request.written)
            yield from self.push_and_notify(request.queue)

    def finish(self, request: BlkRequest) -> bool:
        """Status byte first, then the used element, still unpublished (§5.2.6); False if the driver reset the queue."""
        queue = request.queue
        if self.queues.get(queue.number) is not queue:
            return False
        request.status_view[0] = request.status  # type: ignore[index]
        request.written = written = self.used_length(request)
        queue.fill(request.chain, written)
        return True

    def used_length(self, request: BlkRequest) -> int:
        """Bytes written without a gap from the first device-writable one on, for the used element (§2.7.8.2).

        That is the data and the status byte behind it, but only the data where it does not fill its place.
        """
        written = request.written
        if request.type == _IN and not request.status:
            return written + 1
        return written + (written == sum(map(len, request.chain.writable)))

    def push_and_notify(self, queue: SplitDevice) -> Steps:
        """Publish the used elements and interrupt the guest if it asked for it."""
        if self.queues.get(queue.number) is not queue:
            return
        count = queue.flush()
        self.notify_decisions += 1
        yield ("virtqueue_flush", queue.number, count)
        if self.queues.get(queue.number) is queue and self.should_notify(queue):
            yield from self._notify(queue.number)

    def should_notify(self, queue: SplitDevice) -> bool:
        """Whether to interrupt the guest for what was just published: ``virtio_should_notify()``, §2.7.7.2."""
        return queue.should_notify()

    def fail(self, error: VirtioError) -> None:
        """The driver broke the specification: stop, set DEVICE_NEEDS_RESET (``virtio_error()``, §2.1.2)."""
        self.broken = error
        self.on_needs_reset(error)


def _take(views: list[memoryview], count: int) -> tuple[bytes, list[memoryview]]:
    """The first ``count`` bytes of a scattered buffer, and what is left of it."""
    taken = bytearray()
    for i, view in enumerate(views):
        need = count - len(taken)
        taken += view[:need]
        if len(view) > need:
            return bytes(taken), [view[need:], *views[i + 1 :]]
        if len(taken) == count:
            return bytes(taken), views[i + 1 :]
    return bytes(taken), []
