"""A driver that finds the device and then does nothing: it takes requests and forgets them.  A learner fills it in a notebook."""

from __future__ import annotations

import errno
from collections.abc import Generator, Sequence
from typing import Any

from ..errors import VirtioError
from ..iostack import Op, Request
from ..memory import Segment
from ..spec.virtio import Feature
from ..spec.virtio_blk import REQ_HEADER_BYTES, BlkFeature
from .virtio_blk import _STATUS_UNWRITTEN, _TYPE_OF, VirtioBlkDriver

__all__ = ["EmptyDriver"]

Steps = Generator[Any, int, Any]


class EmptyDriver(VirtioBlkDriver):
    """Probe and requests' memory are there; what goes to the ring and what comes back is not.

    Say how a request looks in ``header`` and ``scatter``; put it on the ring in ``queue_rq`` and ``commit_rqs``; take it back in
    ``virtblk_done``, with ``error_of`` for what its status means.  A request that is queued after the device failed never ends.
    """

    FEATURES = Feature(int(VirtioBlkDriver.FEATURES) & ~int(BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES))

    # -- the learner's part ----------------------------------------------------------------------------------------------------

    def header(self, kind: int, sector: int) -> bytes:
        """The 16 bytes of a request's header."""
        return bytes(REQ_HEADER_BYTES)

    def scatter(self, kind: int, header: Segment, data: list[Segment], status: Segment) -> tuple[Sequence[Segment], Sequence[Segment]]:
        """The segments that the device may read, and those that it may write; each is (gpa, bytes)."""
        return [], []

    def queue_rq(self, rq: Request, last: bool) -> Generator[Any, int, bool]:
        """Take a request: True if it is on the ring, False if there is no room.  This one forgets it."""
        return True
        yield

    def commit_rqs(self, queue: int) -> Steps:
        """Tell the device of what was queued.  This one tells nobody."""
        return
        yield

    def virtblk_done(self, queue: int) -> Steps:
        """An interrupt came: take back what the device used.  This one looks at nothing."""
        return
        yield

    def error_of(self, status: int) -> int:
        """0 or the errno that a status byte means."""
        return errno.EIO

    # -- what a learner's part calls --------------------------------------------------------------------------------------------

    def prepare(self, rq: Request) -> tuple[Sequence[Segment], Sequence[Segment]]:
        """Write the request's header into its place, mark the status byte as unwritten, and return what ``scatter`` says."""
        header, status, _, _ = rq.pdu
        kind = _TYPE_OF[rq.op]
        sector = rq.sector if rq.op in (Op.READ, Op.WRITE) else 0
        self.memory.write(header, bytes(self.header(kind, sector))[:REQ_HEADER_BYTES])
        self.memory.write(status, bytes((_STATUS_UNWRITTEN,)))
        return self.scatter(kind, (header, REQ_HEADER_BYTES), list(rq.segments), (status, 1))

    def on_ring(self, rq: Request, head: int) -> tuple[Any, ...]:
        """The trace point between ring entry and index: ``yield self.on_ring(rq, head)``."""
        return ("request_to_ring", rq.key, rq.queue << 16 | head)

    def wants_kick(self, queue: int) -> bool:
        """Whether the device asked to be told of what was published: ``virtqueue_kick_prepare()``."""
        self.kick_decisions += 1
        return self.queues[queue].kick_prepare()

    def doorbell(self, queue: int) -> Steps:
        """Write the queue's number into QueueNotify: ``virtqueue_notify()``."""
        self.kicks += 1
        return self.transport.notify(queue)

    def end(self, rq: Request, written: int) -> Steps:
        """Give a request that came back to the block layer, with what ``error_of`` makes of its status byte."""
        status = self.memory.read(rq.pdu[1], 1)[0]
        yield ("virtqueue_get_buf", rq.key)
        yield from self.iostack.complete(rq, self.error_of(status))

    def interrupt(self, vector: int = 0) -> Steps:
        """As in the base class; a device that breaks the ring's rules ends every request with EIO."""
        try:
            yield from super().interrupt(vector)
        except VirtioError as error:
            yield from self._fail(error)
