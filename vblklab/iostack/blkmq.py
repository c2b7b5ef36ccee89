"""blk-mq in small: bio → request, plugging, front and back merge, split, tags.  Linux block/blk-mq.c, blk-merge.c.

One class serves both sides.  A segment is ``(gpa, length)`` in the guest and a memoryview on the host.  Contexts that may have
to wait for a tag pass ``waker``, which is called when one is free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from ..errors import ConfigError
from ..events import WAIT, Wait

__all__ = ["Bio", "BlockDriver", "IOStack", "Limits", "Op", "Plug", "Request"]

Steps = Generator[Any, int, Any]
Segment = Any


class Op(IntEnum):
    """``enum req_op``, include/linux/blk_types.h."""

    READ = 0  # REQ_OP_READ
    WRITE = 1  # REQ_OP_WRITE
    FLUSH = 2  # REQ_OP_FLUSH
    DISCARD = 3  # REQ_OP_DISCARD
    SECURE_ERASE = 5  # REQ_OP_SECURE_ERASE
    WRITE_ZEROES = 9  # REQ_OP_WRITE_ZEROES
    ZONE_OPEN = 10  # REQ_OP_ZONE_OPEN
    ZONE_CLOSE = 11  # REQ_OP_ZONE_CLOSE
    ZONE_FINISH = 12  # REQ_OP_ZONE_FINISH
    ZONE_APPEND = 13  # REQ_OP_ZONE_APPEND
    ZONE_RESET = 15  # REQ_OP_ZONE_RESET
    ZONE_RESET_ALL = 17  # REQ_OP_ZONE_RESET_ALL
    DRV_IN = 34  # REQ_OP_DRV_IN: a driver's own request that reads; the bio's token is its type


# Plain ints for the paths where every nanosecond counts: comparing enum members is slow in CPython.
_WRITE, _DISCARD, _WRITE_ZEROES, _SECURE_ERASE = int(Op.WRITE), int(Op.DISCARD), int(Op.WRITE_ZEROES), int(Op.SECURE_ERASE)


@dataclass(frozen=True)
class Limits:
    """``struct queue_limits`` of the device below; sizes in 512-byte sectors where named so."""

    max_sectors: int = 2560  # BLK_DEF_MAX_SECTORS_CAP: 1280 KiB
    max_segments: int = 126
    max_segment_bytes: int = 0xFFFFFFFF
    max_discard_sectors: int = 0
    max_write_zeroes_sectors: int = 0
    max_secure_erase_sectors: int = 0
    logical_block_bytes: int = 512
    read_only: bool = False
    flush: bool = True
    physical_block_bytes: int = 512
    alignment_offset: int = 0
    io_min: int = 0
    io_opt: int = 0
    chunk_sectors: int = 0  # no request reaches over a multiple of this: a zone; 0 for no such edges

    def most_sectors(self, op: int) -> int:
        """The most sectors that one request of a kind without data may name, 0 for no limit."""
        return {_DISCARD: self.max_discard_sectors, _WRITE_ZEROES: self.max_write_zeroes_sectors}.get(op, self.max_secure_erase_sectors)


class Bio:
    """One I/O as the layer above sees it.  ``end_io(bio)`` is called once, with ``status`` 0 or an errno."""

    __slots__ = ("end_io", "io", "length", "op", "queue", "remaining", "sector", "segments", "status", "token")

    def __init__(
        self,
        op: int,
        sector: int,
        length: int,
        segments: list[Segment],
        io: int,
        queue: int,
        end_io: Callable[[Any], None],
        token: Any = None,
    ) -> None:
        self.op = op
        self.sector = sector
        self.length = length  # bytes
        self.segments = segments
        self.io = io
        self.queue = queue
        self.end_io = end_io
        self.token = token
        self.remaining = 1
        self.status = 0


class Request:
    """One command for the driver below; a slot per tag, used again and again.  ``key`` is queue << 16 | tag."""

    __slots__ = ("bios", "key", "length", "op", "pdu", "queue", "sector", "segments", "started", "tag")

    def __init__(self, queue: int, tag: int) -> None:
        self.queue = queue
        self.tag = tag
        self.key = queue << 16 | tag
        self.op = 0
        self.sector = 0
        self.length = 0  # bytes
        self.segments: list[Segment] = []
        self.bios: list[Bio] = []
        self.started = False
        self.pdu: Any = None


class Plug(list[Request]):
    """Requests held back by one task until ``flush_plug``: ``struct blk_plug``."""


class BlockDriver(Protocol):
    """``struct blk_mq_ops``: what stands below the block layer."""

    def queue_rq(self, rq: Request, last: bool) -> Generator[Any, int, bool]:
        """Take the request; False means "no room now" (BLK_STS_DEV_RESOURCE) and the stack tries again after a completion."""
        ...

    def commit_rqs(self, queue: int) -> Steps:
        """Tell the device of requests that were queued with ``last=False`` and never followed by ``last=True``."""
        ...


class _HwQueue:
    """``struct blk_mq_hw_ctx``: tags, and the requests that the driver could not take."""

    def __init__(self, number: int, tags: int) -> None:
        self.requests = [Request(number, tag) for tag in range(tags)]
        self.tags = list(range(tags - 1, -1, -1))
        self.dispatch: deque[Request] = deque()
        self.waiters: list[Callable[[], None]] = []
        self.running = False
        self.rerun = False


def _cut_gpa(segment: tuple[int, int], start: int, size: int) -> tuple[int, int]:
    return segment[0] + start, size


def _cut_view(view: memoryview, start: int, size: int) -> memoryview:
    return view[start : start + size]


_PLUG_MAX = 32  # BLK_MAX_REQUEST_COUNT


class IOStack:
    """One block layer: a recipe's ``iostack`` (guest) or ``host_iostack``.

    ``max_sectors`` and ``max_segments`` lower the device's own limits; ``nr_requests`` bounds the tags a queue has;
    ``merge=False`` is ``nomerges=2``.
    """

    def __init__(
        self, *, max_sectors: int | None = None, max_segments: int | None = None, nr_requests: int | None = None, merge: bool = True
    ) -> None:
        for name, value in (("max_sectors", max_sectors), ("max_segments", max_segments), ("nr_requests", nr_requests)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"iostack {name}={value!r}", "give a whole number, 1 or more")
        if max_sectors is not None and max_sectors < 8:
            raise ConfigError(f"iostack max_sectors={max_sectors}", "a page of 8 sectors is the least Linux takes")
        self.max_sectors = max_sectors
        self.max_segments = max_segments
        self.nr_requests = nr_requests
        self.merge = merge

    def __repr__(self) -> str:
        given = {
            k: v
            for k, v in (("max_sectors", self.max_sectors), ("max_segments", self.max_segments), ("nr_requests", self.nr_requests))
            if v
        }
        if not self.merge:
            given["merge"] = False
        return f"IOStack({', '.join(f'{k}={v}' for k, v in given.items())})"

    def attach(self, driver: BlockDriver, limits: Limits, *, queues: int, tags: int, host: bool = False) -> None:
        """Stand on ``driver``; ``host`` says that segments are memoryviews and trace points the host's."""
        side = "host:" if host else ""
        self._views = host
        self.driver = driver
        self.poll: Callable[[int], Steps] | None = None
        self.limits = limits
        self._max_bytes = min(limits.max_sectors, self.max_sectors or limits.max_sectors) * 512
        self._max_segments = min(limits.max_segments, self.max_segments or limits.max_segments)
        self._max_segment_bytes = limits.max_segment_bytes
        tags = min(tags, self.nr_requests or tags)
        self.queues = [_HwQueue(number, tags) for number in range(queues)]
        self.counts = {"backmerges": 0, "frontmerges": 0, "splits": 0, "requeues": 0}
        self._chunk = limits.chunk_sectors
        self._cut_always = limits.max_segment_bytes < 0xFFFFFFFF or self._chunk > 0
        self._e_merged = {side + f"block_bio_{end}merge": side + f"bio_to_{end}merge" for end in ("back", "front")}
        self._e_plain, self._e_done = side + "bio_to_request", side + "request_done"
        self._e_queue, self._e_split, self._e_getrq = side + "block_bio_queue", side + "block_split", side + "block_getrq"
        self._e_back, self._e_front = side + "block_bio_backmerge", side + "block_bio_frontmerge"
        self._e_unplug, self._e_requeue = side + "block_unplug", side + "block_rq_requeue"
        self._e_rq_complete, self._e_bio_complete = side + "block_rq_complete", side + "block_bio_complete"

    def submit_bio(self, bio: Bio, plug: Plug | None, waker: Callable[[], None]) -> Steps:
        """Split, merge into ``plug`` or take a tag and go to the driver: ``blk_mq_submit_bio()``."""
        op = bio.op
        length = bio.length
        segments = bio.segments
        if plug is None and op <= _WRITE and length <= self._max_bytes and len(segments) <= self._max_segments and not self._cut_always:
            hctx = self.queues[bio.queue]
            if hctx.tags:  # the plain case: one bio, one request, straight to the driver
                rq = hctx.requests[hctx.tags.pop()]
                rq.op = op
                rq.sector = bio.sector
                rq.length = length
                rq.segments = segments
                rq.bios = [bio]
                yield (self._e_plain, bio.io, bio.sector, length >> 9, rq.key)
                if hctx.dispatch or not (yield from self.driver.queue_rq(rq, True)):
                    yield from self._requeue(hctx, rq)
                return
        if plug and op <= _WRITE and self.merge and length <= self._max_bytes and not self._cut_always:
            merged = self._attempt_merge(bio, bio.sector, length, segments, plug)
            if merged is not None:
                yield (self._e_merged[merged[0]], bio.io, bio.sector, length >> 9, merged[2])
                return
        yield (self._e_queue, bio.io, bio.sector, length >> 9)
        if op <= _WRITE:
            if length > self._max_bytes or len(segments) > self._max_segments or self._cut_always:
                yield from self._submit_split(bio, plug, waker)
                return
        elif op in (_DISCARD, _WRITE_ZEROES, _SECURE_ERASE):
            limit = self.limits.most_sectors(op) * 512
            limit -= limit % self.limits.logical_block_bytes  # cuts fall on whole blocks
            if limit and length > limit:
                yield from self._submit_ranges(bio, limit, plug, waker)
                return
        yield from self._submit_part(bio, bio.sector, length, segments, plug, waker)

    def _submit_split(self, bio: Bio, plug: Plug | None, waker: Callable[[], None]) -> Steps:
        """Cut a bio by max_sectors, chunk_sectors, max_segments and max_segment_bytes: ``bio_split_rw()``.  Cuts fall on logical blocks."""
        parts = self._cut_segments(bio)
        bio.remaining = len(parts)
        sector = bio.sector
        for i, (length, segments) in enumerate(parts):
            if i:
                self.counts["splits"] += 1
                yield (self._e_split, bio.io, sector)
            yield from self._submit_part(bio, sector, length, segments, plug, waker)
            sector += length >> 9

    def _cut_segments(self, bio: Bio) -> list[tuple[int, list[Segment]]]:
        block = self.limits.logical_block_bytes
        cut = _cut_view if self._views else _cut_gpa
        sizes = [len(view) for view in bio.segments] if self._views else [size for _, size in bio.segments]
        parts: list[tuple[int, list[Segment]]] = []
        at = skip = 0  # the segment that the next request begins in, and how far inside
        sector = bio.sector
        while at < len(sizes):
            pieces: list[tuple[int, int, int]] = []
            length = 0
            most = min(self._max_bytes, (self._chunk - sector % self._chunk) << 9) if self._chunk else self._max_bytes
            while at < len(sizes) and len(pieces) < self._max_segments:
                take = min(sizes[at] - skip, self._max_segment_bytes, most - length)
                if not take:
                    break
                pieces.append((at, skip, take))
                length += take
                skip += take
                if skip == sizes[at]:
                    at, skip = at + 1, 0
            excess = length % block if at < len(sizes) else 0
            length -= excess
            while excess:  # a request ends on a whole block; what reaches beyond it is given back
                at, skip, take = pieces.pop()
                if take > excess:
                    pieces.append((at, skip, take - excess))
                    skip += take - excess
                excess = max(excess - take, 0)
            if not length:
                raise ConfigError(
                    f"{self._max_segments} segments do not hold one block of {block} bytes", "raise max_segments or use larger segments"
                )
            parts.append((length, [cut(bio.segments[number], start, size) for number, start, size in pieces]))
            sector += length >> 9
        return parts

    def _submit_ranges(self, bio: Bio, limit: int, plug: Plug | None, waker: Callable[[], None]) -> Steps:
        """Cut a discard or write-zeroes bio, which has a range but no data."""
        bio.remaining = -(-bio.length // limit)
        for start in range(0, bio.length, limit):
            if start:
                self.counts["splits"] += 1
                yield (self._e_split, bio.io, bio.sector + (start >> 9))
            yield from self._submit_part(bio, bio.sector + (start >> 9), min(limit, bio.length - start), [], plug, waker)

    def _submit_part(
        self, bio: Bio, sector: int, length: int, segments: list[Segment], plug: Plug | None, waker: Callable[[], None]
    ) -> Steps:
        if plug and self.merge and bio.op <= _WRITE:
            event = self._attempt_merge(bio, sector, length, segments, plug)
            if event is not None:
                yield event
                return
        hctx = self.queues[bio.queue]
        tags = hctx.tags
        while not tags:
            if plug:
                yield from self.flush_plug(plug)
                continue
            if self.poll is not None:  # nothing will interrupt: who waits looks for completions itself
                yield from self.poll(bio.queue)
                yield Wait(0)
                continue
            hctx.waiters.append(waker)
            yield WAIT
        rq = hctx.requests[tags.pop()]
        rq.op = bio.op
        rq.sector = sector
        rq.length = length
        rq.segments = segments
        rq.bios = [bio]
        yield (self._e_getrq, bio.io, rq.key)
        if plug is None:
            yield from self._dispatch(hctx, rq, True)
            return
        plug.append(rq)
        if len(plug) >= _PLUG_MAX:
            yield from self.flush_plug(plug)

    def _attempt_merge(self, bio: Bio, sector: int, length: int, segments: list[Segment], plug: Plug) -> tuple[str, int, int] | None:
        """Join the bio to a plugged request that it touches: ``blk_attempt_plug_merge()``."""
        for rq in reversed(plug):
            if rq.op != bio.op or rq.queue != bio.queue or rq.length + length > self._max_bytes:
                continue
            if len(rq.segments) + len(segments) > self._max_segments:
                continue
            if self._chunk and rq.sector // self._chunk != sector // self._chunk:
                continue
            if rq.sector + (rq.length >> 9) == sector:
                rq.segments = rq.segments + segments
                self.counts["backmerges"] += 1
                event = self._e_back
            elif sector + (length >> 9) == rq.sector:
                rq.segments = segments + rq.segments
                rq.sector = sector
                self.counts["frontmerges"] += 1
                event = self._e_front
            else:
                continue
            rq.length += length
            rq.bios.append(bio)
            return (event, bio.io, rq.key)
        return None

    def flush_plug(self, plug: Plug) -> Steps:
        """Hand the plugged requests to the driver, a queue at a time: ``blk_flush_plug()``."""
        requests = plug[:]
        plug.clear()
        if not requests:
            return
        yield (self._e_unplug, requests[0].queue, len(requests))
        for number in dict.fromkeys(rq.queue for rq in requests):
            mine = [rq for rq in requests if rq.queue == number]
            for i, rq in enumerate(mine):
                yield from self._dispatch(self.queues[number], rq, i == len(mine) - 1)

    def _dispatch(self, hctx: _HwQueue, rq: Request, last: bool) -> Steps:
        """One request to the driver, behind those that already wait for it."""
        if hctx.dispatch or not (yield from self.driver.queue_rq(rq, last)):
            yield from self._requeue(hctx, rq)

    def _requeue(self, hctx: _HwQueue, rq: Request) -> Steps:
        """The driver is busy: the request waits, in order, for a completion to make room."""
        hctx.dispatch.append(rq)
        self.counts["requeues"] += 1
        yield (self._e_requeue, rq.key)
        yield from self.driver.commit_rqs(rq.queue)
        yield from self.run_hw_queue(rq.queue)

    def run_hw_queue(self, queue: int) -> Steps:
        """Try the waiting requests of one queue again; called after completions made room: ``blk_mq_run_hw_queue()``."""
        hctx = self.queues[queue]
        if hctx.running:
            hctx.rerun = True  # whoever is inside looks once more before it leaves
            return
        hctx.running = True
        try:
            while hctx.dispatch:
                hctx.rerun = False
                rq = hctx.dispatch.popleft()
                taken = yield from self.driver.queue_rq(rq, not hctx.dispatch)
                if not taken:
                    hctx.dispatch.appendleft(rq)
                    yield from self.driver.commit_rqs(queue)
                    if not hctx.rerun:
                        return
        finally:
            hctx.running = False

    def complete(self, rq: Request, status: int) -> Steps:
        """The driver ended ``rq`` with 0 or an errno: end its bios, free its tag: ``blk_mq_end_request()``."""
        bios = rq.bios
        hctx = self.queues[rq.queue]
        if len(bios) == 1 and bios[0].remaining == 1:
            bio = bios[0]
            yield (self._e_done, rq.key, bio.io)
            if status:
                bio.status = status
            bio.remaining = 0
            self._free(hctx, rq)
            bio.end_io(bio)
            return
        yield (self._e_rq_complete, rq.key)
        self._free(hctx, rq)
        for bio in bios:
            if status:
                bio.status = status
            bio.remaining -= 1
            if not bio.remaining:
                yield (self._e_bio_complete, bio.io)
                bio.end_io(bio)

    @staticmethod
    def _free(hctx: _HwQueue, rq: Request) -> None:
        rq.bios = []
        rq.segments = []
        hctx.tags.append(rq.tag)
        if hctx.waiters:
            waiters, hctx.waiters = hctx.waiters, []
            for wake in waiters:
                wake()
