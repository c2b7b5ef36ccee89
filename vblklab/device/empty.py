"""A device with nothing in it yet: it is no block device, offers nothing and knows no request.  A learner fills it in a notebook."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from ..errors import ConfigError, VirtioError
from ..events import WAIT
from ..iostack import Op
from ..ring import Chain, SplitDevice
from ..spec.virtio_blk import REQ_HEADER, REQ_HEADER_BYTES, BlkStatus, ReqType
from .engine_api import IoOp
from .virtio_blk import VirtioBlkDevice

__all__ = ["EmptyDevice"]

Steps = Generator[Any, int, Any]
_UNTOUCHED = 0


class _Pending:
    """A disk operation that ``serve`` waits for."""

    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = False
        self.error = 0


class EmptyDevice(VirtioBlkDevice):
    """What a machine needs to hold a device (event loop, queues, reset), and of the device itself nothing.

    Say what it is in ``device_id``, ``features()`` and ``read_config()``; answer a buffer in ``serve``.  It serves one buffer at a
    time.  All machines run it; a request never takes the batch path or the fused path.
    """

    device_id = 0  # no device: a driver looks no further (§4.2.2)

    def features(self) -> int:
        """The feature bits offered: none."""
        return 0

    def accepts(self, features: int) -> bool:
        """Any subset of what is offered."""
        return True

    def read_config(self) -> bytes:
        """The configuration space: no field."""
        return b""

    def serve(self, readable: list[memoryview], writable: list[memoryview]) -> Any:
        """Answer one buffer, given as the parts that the device may read and those that it may write; returns the bytes written.

        A plain method, or a generator if it waits for the disk: ``yield from self.disk_read(sector, parts)``.
        """
        return _UNTOUCHED

    # -- the disk ----------------------------------------------------------------------------------------------------------------

    def disk_read(self, sector: int, parts: Sequence[memoryview]) -> Steps:
        """Fill ``parts`` from the disk, one after the other, from ``sector`` (of 512 bytes) on; raises OSError."""
        return self._wait_for(Op.READ, sector, parts)

    def disk_write(self, sector: int, parts: Sequence[memoryview]) -> Steps:
        """Store ``parts`` on the disk from ``sector`` on; raises OSError."""
        return self._wait_for(Op.WRITE, sector, parts)

    def disk_flush(self) -> Steps:
        """Wait until all that was written is stable; raises OSError."""
        return self._wait_for(Op.FLUSH, 0, ())

    def _wait_for(self, op: Op, sector: int, parts: Sequence[memoryview]) -> Steps:
        views, pending, engine = list(parts), _Pending(), self.engine
        length = sum(map(len, views))
        engine.submit(IoOp(int(op), sector << 9, length, views, self._key, pending, self.epoch, engine.end_io, False))
        yield from engine.flush()
        while True:
            yield from self.complete_batch(engine.reap())
            if pending.done:
                break
            yield WAIT
        if pending.error:
            raise OSError(pending.error, "the disk could not do it")

    def complete_batch(self, completed: list[IoOp]) -> Steps:
        """Tell whoever waits for these operations; any context of the device may have found them."""
        for op in completed:
            op.request.error = op.status
            op.request.done = True
        return
        yield

    # -- from buffer to buffer ---------------------------------------------------------------------------------------------------

    def serve_one(self, queue: SplitDevice) -> Steps:
        """Take the next buffer through ``serve``; False if none waits."""
        chain = self._pop_or_resubmit(queue) if self._resubmits else self.pop(queue)
        if chain is None:
            return False
        yield _popped(chain)
        if not self._owns(queue):
            return True
        status = int(BlkStatus.OK)
        try:
            written = yield from self._bytes_written(chain)
        except VirtioError:
            queue.detach(chain)
            raise
        except Exception as error:
            self._report(error)
            written, status = _failed(chain), int(BlkStatus.IOERR)
        if self._owns(queue):
            queue.fill(chain, written)
            yield ("completion_to_ring", chain.key, 0, status, written)
            yield from self._push(queue)
        return True

    def _bytes_written(self, chain: Chain) -> Steps:
        self._key = chain.key
        written = self.serve(list(chain.readable), list(chain.writable))
        if hasattr(written, "send"):
            written = yield from self._carried(written, chain.key)
        if isinstance(written, bool) or not isinstance(written, int) or not 0 <= written < 1 << 32:
            raise ConfigError(f"serve() returned {written!r}", "return the number of bytes that were written, for the used element")
        return written

    def _carried(self, work: Steps, key: int) -> Steps:
        """Run ``work``; other contexts may serve other buffers in between, so the key of this one is put back each time."""
        try:
            event = next(work)
            while True:
                now_ns = yield event
                self._key = key
                event = work.send(now_ns)
        except StopIteration as end:
            return end.value


def _popped(chain: Chain) -> tuple[Any, ...]:
    """The trace points of a pop.  They name the request's type and sector, which are read here for the trace alone."""
    header = bytes(chain.readable[0][:REQ_HEADER_BYTES]) if chain.readable else b""
    if len(header) < REQ_HEADER_BYTES:
        return ("virtqueue_pop", chain.key)
    kind, _, sector = REQ_HEADER.unpack(header)
    if kind == ReqType.IN:
        return ("pop_read", chain.key, sector, sum(map(len, chain.writable[:-1])) >> 9)
    if kind == ReqType.OUT:
        return ("pop_write", chain.key, sector, sum(map(len, chain.readable[1:])) >> 9)
    return ("pop_other", chain.key, kind)


def _failed(chain: Chain) -> int:
    """End a buffer with IOERR; the bytes written without a gap."""
    if not chain.writable:
        return 0
    chain.writable[-1][-1] = int(BlkStatus.IOERR)
    return int(len(chain.writable) == 1 and len(chain.writable[0]) == 1)
