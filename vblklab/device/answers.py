"""Requests that are no reads or writes: ranges to be checked, and what the device says of itself.  VIRTIO 1.4 §5.2.6."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..spec.virtio_blk import DISCARD_SEG_BYTES, ID_BYTES, LIFETIME, WRITE_ZEROES_UNMAP, BlkStatus, ReqType
from .request import BlkRequest

if TYPE_CHECKING:
    from .config import BlkConfig

__all__ = ["answer", "check_ranges"]

_OK, _IOERR, _UNSUPP = int(BlkStatus.OK), int(BlkStatus.IOERR), int(BlkStatus.UNSUPP)
_GET_ID, _SECURE_ERASE, _WRITE_ZEROES = int(ReqType.GET_ID), int(ReqType.SECURE_ERASE), int(ReqType.WRITE_ZEROES)


def check_ranges(device: BlkConfig, request: BlkRequest) -> int:
    """0 if a DISCARD, WRITE_ZEROES or SECURE_ERASE may run, else its status (§5.2.6.2).  All segments are checked before one runs."""
    kind = request.type
    if not (device.secure_erase if kind == _SECURE_ERASE else device.discard):
        return _UNSUPP
    if device.read_only or request.length % DISCARD_SEG_BYTES or not request.length:
        return _IOERR
    if not 1 <= len(request.ranges) <= device.max_discard_seg:
        return _UNSUPP
    allowed = WRITE_ZEROES_UNMAP if kind == _WRITE_ZEROES else 0
    if any(flags & ~allowed for _, _, flags in request.ranges):
        return _UNSUPP
    block = device.block_size >> 9
    for sector, sectors, _ in request.ranges:
        if sectors > device.max_discard_sectors or sector + sectors > device.capacity_sectors or sector % block or sectors % block:
            return _IOERR
    return 0


def answer(device: BlkConfig, request: BlkRequest) -> int:
    """Write what GET_ID or GET_LIFETIME asks for; returns the status.  A buffer of another size gets what fits, and IOERR."""
    if request.type == _GET_ID:
        data = device.serial.encode().ljust(ID_BYTES, b"\0")  # no NUL if it has all 20
    else:
        assert device.lifetime is not None
        data = LIFETIME.pack(*device.lifetime)
    at = 0
    for view in request.data:
        part = data[at : at + len(view)]
        view[: len(part)] = part
        at += len(part)
    request.written = at
    return _OK if at == len(data) else _IOERR
