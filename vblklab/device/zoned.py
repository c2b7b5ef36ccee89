"""Requests to a zoned disk: what its zones say decides, then the engine moves the bytes.  VIRTIO 1.4 §5.2.6.

Zones change when a request is taken, in the order of the queue: several writes and appends to one zone may be in flight.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from ..iostack import Op
from ..spec.virtio_blk import BlkFeature, BlkStatus, ReqType
from ..spec.virtio_blk_zoned import APPEND_SECTOR
from .request import BlkRequest
from .zones import Zones

if TYPE_CHECKING:
    from .virtio_blk import VirtioBlkDevice

__all__ = ["PLAIN_KINDS", "check_zoned", "submit_zoned"]

PLAIN_KINDS = frozenset({ReqType.FLUSH, ReqType.GET_ID, ReqType.GET_LIFETIME, ReqType.DISCARD})
"""Requests that zones have no part in."""
_MANAGES = frozenset({ReqType.ZONE_OPEN, ReqType.ZONE_CLOSE, ReqType.ZONE_FINISH, ReqType.ZONE_RESET, ReqType.ZONE_RESET_ALL})
_OK, _IOERR, _UNSUPP = int(BlkStatus.OK), int(BlkStatus.IOERR), int(BlkStatus.UNSUPP)
_INVALID_CMD = int(BlkStatus.ZONE_INVALID_CMD)


def check_zoned(device: VirtioBlkDevice, request: BlkRequest) -> int:
    """0 if a request of a kind that only zoned devices know may go to the zones, else its status."""
    kind = request.type
    if device.zoned is None or not device.driver_features & BlkFeature.ZONED:
        return _UNSUPP
    if kind == ReqType.ZONE_REPORT:
        return _OK
    if device.read_only and (kind == ReqType.ZONE_APPEND or kind in _MANAGES):
        return _IOERR
    if kind == ReqType.ZONE_APPEND:
        whole = not request.length % device.block_size and sum(map(len, request.writable)) == APPEND_SECTOR.size
        return _OK if whole else _IOERR
    return _OK if kind in _MANAGES else _UNSUPP


def submit_zoned(device: VirtioBlkDevice, zones: Zones, request: BlkRequest) -> Generator[Any, int, Any]:
    """Ask the zones, then hand the request to the engine, or end it with their status."""
    kind, sector = request.type, request.sector
    if kind == ReqType.OUT:
        status = zones.write((sector, request.length >> 9))
        if not status:
            device.operate(request, Op.WRITE, sector << 9, request.length, request.data)
            return
    elif kind == ReqType.IN:
        status = zones.read(sector, request.length >> 9)
        if not status and _read(device, zones, request):
            return
    elif kind == ReqType.ZONE_APPEND:
        status, at = zones.append(sector, request.length >> 9)
        if not status:
            request.written = _scatter(request.writable, APPEND_SECTOR.pack(at))
            device.operate(request, Op.WRITE, at << 9, request.length, request.data)
            return
    elif kind == ReqType.ZONE_REPORT:
        status = _report(zones, request)
    elif kind in _MANAGES:
        status = _manage(zones, kind, sector)
    else:
        status = _ranges(zones, request)
        if not status:
            device.operate_ranges(request)
            return
    yield from device.end(request, _told(device, status))


def _told(device: VirtioBlkDevice, status: int) -> int:
    """The status as a driver without ZONED knows it."""
    return status if status <= _UNSUPP or device.driver_features & BlkFeature.ZONED else _IOERR


def _read(device: VirtioBlkDevice, zones: Zones, request: BlkRequest) -> bool:
    """Read what is written and fill the rest with zeros; False if there was nothing to read."""
    first = request.sector
    at, found = 0, False
    for low, high in zones.written(first, request.length >> 9):
        start, end = (low - first) << 9, (high - first) << 9
        _zero(_cut(request.data, at, start))
        device.operate(request, Op.READ, low << 9, end - start, _cut(request.data, start, end))
        at, found = end, True
    _zero(_cut(request.data, at, request.length))
    if not found:
        request.written = request.length
    return found


def _report(zones: Zones, request: BlkRequest) -> int:
    data = zones.report(request.sector, request.length)
    if data is None:
        return _INVALID_CMD
    request.written = _scatter(request.data, data)
    return _OK


def _manage(zones: Zones, kind: int, sector: int) -> int:
    if kind == ReqType.ZONE_RESET_ALL:
        return zones.reset_all()
    if kind == ReqType.ZONE_OPEN:
        return zones.open(sector)
    if kind == ReqType.ZONE_CLOSE:
        return zones.close(sector)
    return zones.finish(sector) if kind == ReqType.ZONE_FINISH else zones.reset(sector)


def _ranges(zones: Zones, request: BlkRequest) -> int:
    """SECURE_ERASE resets zones; WRITE_ZEROES, for host-aware disks only, writes them."""
    if request.type == ReqType.SECURE_ERASE:
        return zones.erase([(sector, sectors) for sector, sectors, _ in request.ranges])
    return zones.write(*((sector, sectors) for sector, sectors, _ in request.ranges))


def _cut(views: list[memoryview], start: int, end: int) -> list[memoryview]:
    """The bytes from ``start`` to ``end`` of a scattered buffer."""
    out = []
    for view in views:
        size = len(view)
        if start < size and end > 0:
            out.append(view[max(start, 0) : min(end, size)])
        start, end = start - size, end - size
    return [view for view in out if len(view)]


def _zero(views: list[memoryview]) -> None:
    for view in views:
        view[:] = bytes(len(view))


def _scatter(views: list[memoryview], data: bytes) -> int:
    """Put ``data`` into the first bytes of a scattered buffer; returns how many there was room for."""
    at = 0
    for view in views:
        part = data[at : at + len(view)]
        view[: len(part)] = part
        at += len(part)
    return at
