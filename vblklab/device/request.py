"""A request of virtio-blk as the device holds it, taken from a buffer of any framing: VIRTIO 1.4 §5.2.6 and §2.7.4."""

from __future__ import annotations

from ..errors import VirtioError
from ..ring import Chain, SplitDevice
from ..spec.virtio_blk import DISCARD_SEG, DISCARD_SEG_BYTES, REQ_HEADER, REQ_HEADER_BYTES, ReqType

__all__ = ["BlkRequest", "parse"]

_unpack_header = REQ_HEADER.unpack
_READS = frozenset(int(kind) for kind in (ReqType.IN, ReqType.GET_ID, ReqType.GET_LIFETIME, ReqType.ZONE_REPORT))
_RANGED = frozenset(int(kind) for kind in (ReqType.DISCARD, ReqType.WRITE_ZEROES, ReqType.SECURE_ERASE))
_RANGES_BYTES = 256 * DISCARD_SEG_BYTES  # more than any device here takes: nothing the driver says sizes a list


class BlkRequest:
    """One request taken from a queue: its header, the data views and where the status byte goes."""

    __slots__ = (
        "chain",
        "data",
        "ended",
        "error",
        "key",
        "left",
        "length",
        "queue",
        "ranges",
        "sector",
        "status",
        "status_view",
        "type",
        "writable",
        "written",
    )

    def __init__(self, queue: SplitDevice, chain: Chain) -> None:
        self.queue = queue
        self.chain = chain
        self.key = chain.key
        self.type = 0
        self.sector = 0
        self.data: list[memoryview] = []
        self.length = 0  # bytes of data
        self.ranges: list[tuple[int, int, int]] = []  # sector, sectors, flags of DISCARD, WRITE_ZEROES and SECURE_ERASE
        self.status_view: memoryview | None = None
        self.writable: list[memoryview] = []  # what the device may write before the status byte
        self.status = 0
        self.error = 0  # minus the errno of the engine's failure
        self.written = 0  # bytes of data the device wrote; once it is complete, the length in the used element
        self.left = 0  # engine operations still running
        self.ended = False  # the used element is written


def parse(queue: SplitDevice, chain: Chain) -> BlkRequest:
    """Header, data and status byte of a chain, which stays as it is; raises VirtioError if header or status byte is missing."""
    request = BlkRequest(queue, chain)
    readable, writable = chain.readable, chain.writable
    if not writable:
        raise VirtioError("a request without a device-writable status byte", "5.2.6")
    last = writable[-1]
    if len(last) == 1:
        request.status_view, writable = last, writable[:-1]
    else:
        request.status_view, writable = last[-1:], [*writable[:-1], last[:-1]]
    request.writable = writable
    if not readable:
        raise VirtioError("a request without a header", "5.2.6")
    if len(readable[0]) == 16:
        kind, _, request.sector = _unpack_header(readable[0])
        readable = readable[1:]
    else:
        header, readable = _take(readable, REQ_HEADER_BYTES)
        if len(header) < REQ_HEADER_BYTES:
            raise VirtioError(f"a request header of {len(header)} bytes, {REQ_HEADER_BYTES} are needed", "5.2.6")
        kind, _, request.sector = _unpack_header(header)
    request.type = kind
    request.data = data = writable if kind in _READS else readable
    request.length = len(data[0]) if len(data) == 1 else sum(map(len, data))
    if kind in _RANGED and not request.length % DISCARD_SEG_BYTES and request.length <= _RANGES_BYTES:
        request.ranges = list(DISCARD_SEG.iter_unpack(b"".join(data)))
    return request


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
