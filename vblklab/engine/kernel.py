"""The compiled loop itself.  Imported only where numba is; ``compiled.py`` says when.

Everything is an int64: a hostile 64-bit address or sector is negative here and fails the first comparison.  Guest memory is read
once, into scratch memory of the loop's own; ring words are single loads and stores.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from ..device.batch import CALL, EMPTY, LIMIT, PLAIN
from ..spec.virtio_blk import REQ_HEADER_BYTES, ReqType
from ..spec.virtio_ring import DESC_BYTES
from .share import LEAST, awake, move
from .words import (
    fence,
    load8,
    load16,
    load32,
    load64,
    load_shared16,
    memmove,
    pause,
    pread,
    preadv,
    publish8,
    publish16,
    pwrite,
    pwritev,
    store8,
    store32,
    store64,
)

__all__ = ["serve"]

SEGMENTS = 256
"""Most segments of a buffer that the loop takes; the device's own bound is seg_max + 2."""
BATCH = 24
"""Requests between two looks at whether the driver wants an interrupt: of 32, the usual depth, some are left while it wakes."""
BATCH_BYTES = 768 << 10
"""Bytes between two such looks, if they come first: what was moved can be worked on while the rest is."""
MOST = 256
"""Requests between two looks at the rest of the world."""

# Places in the state of one ring.
(
    DESC_TABLE,
    AVAIL,
    USED,
    SIZE,
    CHAIN_MAX,
    INDIRECT,
    EVENT_IDX,
    LAST,
    SHADOW,
    USED_IDX,
    SIGNALLED,
    SIGNALLED_VALID,
    DECISIONS,
    CAPACITY,
    BLOCK,
    WRITES,
    SPINS,
    FD,
    IMAGE,
    IMAGE_BYTES,
    BROKEN,
    REGIONS,
    SCRATCH,
    IOV,
    WRITABLE,
    INFLIGHT,
    COUNTER,
    MOVED,
    SHARE,
    LARGE,
    STATE,
) = range(31)

_IN, _OUT, _HEADER = int(ReqType.IN), int(ReqType.OUT), REQ_HEADER_BYTES
_NEXT, _WRITE, _IS_INDIRECT = 1, 2, 4


@njit
def _host(regions: Any, count: int, gpa: int, length: int) -> int:
    """The host's address of a range that lies in one region, or 0."""
    for i in range(count):
        start = regions[3 * i]
        if start <= gpa <= regions[3 * i + 1] - length:
            return regions[3 * i + 2] + (gpa - start)  # type: ignore[no-any-return]
    return 0


@njit
def _gather(state: Any, regions: Any, head: int) -> int:
    """Map the buffer at ``head`` into the iovec array: header, data …, status; how many, or 0 if the steps must look at it."""
    scratch, iov, count = state[SCRATCH], state[IOV], state[REGIONS]
    size = state[SIZE]
    memmove(scratch, state[DESC_TABLE] + head * DESC_BYTES, DESC_BYTES)
    table = 0
    most = size
    flags = load16(scratch + 12)
    if flags & _IS_INDIRECT:
        length = load32(scratch + 8)
        most = length >> 4
        if not state[INDIRECT] or flags & _NEXT or length & 15 or most > state[CHAIN_MAX] or most > SEGMENTS or not most:
            return 0
        table = _host(regions, count, load64(scratch), length)
        if not table:
            return 0
        memmove(scratch, table, length)
    elif most > SEGMENTS:
        most = SEGMENTS
    at = scratch
    found = 0
    writable = 0
    while found < most:
        gpa, length, flags, link = load64(at), load32(at + 8), load16(at + 12), load16(at + 14)
        if flags & _IS_INDIRECT or not length:
            return 0
        if flags & _WRITE:
            writable += 1
        elif writable:
            return 0
        host = _host(regions, count, gpa, length)
        if not host:
            return 0
        store64(iov + 16 * found, host)
        store64(iov + 16 * found + 8, length)
        found += 1
        if not flags & _NEXT:
            break
        if table:
            if link >= most:
                return 0
            at = scratch + link * DESC_BYTES
        else:
            if link >= size:
                return 0
            memmove(scratch, state[DESC_TABLE] + link * DESC_BYTES, DESC_BYTES)
    else:
        return 0
    if found < 3 or load64(iov + 8) != _HEADER or load64(iov + 16 * found - 8) != 1:
        return 0
    if writable != 1 and writable != found - 1:
        return 0
    state[WRITABLE] = writable
    return found


@njit
def _move(state: Any, kind: int, found: int, at: int, length: int, more: bool) -> bool:
    """The data between guest and disk; whether all of it went.  A large read is shared with the helper while ``more`` waits behind it."""
    iov = state[IOV] + 16
    segments = found - 2
    image = state[IMAGE]
    if kind == _IN and length >= LEAST:
        state[LARGE] += more
        share = state[SHARE]
        if share and (more or awake(share)) and (not image or at + length <= state[IMAGE_BYTES]):
            whole = move(share, state[FD], image, iov, segments, at, length)
            return whole and (not state[BROKEN] or not load8(state[BROKEN]))
    if image:
        if at + length > state[IMAGE_BYTES]:
            return False
        place = image + at
        for i in range(segments):
            host, step = load64(iov + 16 * i), load64(iov + 16 * i + 8)
            if kind == _IN:
                memmove(host, place, step)
            else:
                memmove(place, host, step)
            place += step
        return not state[BROKEN] or not load8(state[BROKEN])
    fd = np.int32(state[FD])
    if segments == 1:
        host = load64(iov)
        if kind == _IN:
            return pread(fd, host, length, at) == length  # type: ignore[no-any-return]
        return pwrite(fd, host, length, at) == length  # type: ignore[no-any-return]
    if kind == _IN:
        return preadv(fd, iov, np.int32(segments), at) == length  # type: ignore[no-any-return]
    return pwritev(fd, iov, np.int32(segments), at) == length  # type: ignore[no-any-return]


@njit
def _popped(state: Any, head: int) -> None:
    """vhost-user's in-flight region: the buffer at ``head`` was taken."""
    entry = state[INFLIGHT] + 16 + 16 * head
    store64(entry + 8, state[COUNTER])
    state[COUNTER] += 1
    publish8(entry, 1)


@njit
def _return(state: Any, head: int, written: int) -> None:
    """The used element, then used.idx; around it what the in-flight region has to say."""
    used_idx, inflight = state[USED_IDX], state[INFLIGHT]
    place = state[USED] + 4 + 8 * (used_idx & (state[SIZE] - 1))
    used_idx = (used_idx + 1) & 0xFFFF
    state[USED_IDX] = used_idx
    store32(place, head)
    store32(place + 4, written)
    if inflight:
        entry = inflight + 16 + 16 * head
        publish16(entry + 6, load16(inflight + 12))
        publish16(inflight + 12, head)
        publish16(state[USED] + 2, used_idx)
        publish8(entry, 0)
        publish16(inflight + 14, used_idx)
    else:
        publish16(state[USED] + 2, used_idx)


@njit
def _wants_call(state: Any) -> bool:
    """``SplitDevice.should_notify()``."""
    state[DECISIONS] += 1
    fence()
    if not state[EVENT_IDX]:
        return not load_shared16(state[AVAIL]) & 1
    new, old, valid = state[USED_IDX], state[SIGNALLED], state[SIGNALLED_VALID]
    state[SIGNALLED] = new
    state[SIGNALLED_VALID] = 1
    event = load_shared16(state[AVAIL] + 4 + 2 * state[SIZE])
    return not valid or ((new - event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)


@njit
def _serve_one(state: Any, regions: Any, head: int, more: bool) -> bool:
    """One read or write from descriptors to used.idx; False, with nothing published, if it is not a usual one or failed."""
    found = _gather(state, regions, head)
    if not found:
        return False
    iov, scratch, writable = state[IOV], state[SCRATCH], state[WRITABLE]
    memmove(scratch, load64(iov), _HEADER)
    kind, sector = load32(scratch), load64(scratch + 8)
    if kind == _IN:
        if writable == 1:
            return False
    elif kind != _OUT or writable != 1 or not state[WRITES]:
        return False
    length = 0
    for i in range(1, found - 1):
        length += load64(iov + 16 * i + 8)
    if sector < 0 or sector > state[CAPACITY] - (length >> 9) or length & state[BLOCK] or (sector << 9) & state[BLOCK]:
        return False
    if state[INFLIGHT]:
        _popped(state, head)
    if not _move(state, kind, found, sector << 9, length, more):
        return False
    state[MOVED] += length
    store8(load64(iov + 16 * found - 16), 0)
    _return(state, head, length + 1 if kind == _IN else 1)
    return True


def serve(state: Any, regions: Any) -> int:
    """Serve one ring; EMPTY, PLAIN or LIMIT, with CALL beside it if the driver is to be interrupted now.

    ``regions`` holds (first address, address behind the last, host's address) of each region of guest memory.
    """
    size, avail = state[SIZE], state[AVAIL]
    spins, left, batch = state[SPINS], MOST, 0
    last, shadow = state[LAST], state[SHADOW]
    while True:
        stopped = -1
        if shadow == last:
            shadow = load_shared16(avail + 2)
            while shadow == last and spins > 0 and not batch:
                spins -= 1
                pause()
                shadow = load_shared16(avail + 2)
            state[SHADOW] = shadow
            if shadow == last:
                stopped = EMPTY
        if stopped < 0:
            head = load16(avail + 4 + 2 * (last & (size - 1)))
            if ((shadow - last) & 0xFFFF) > size or head >= size or not _serve_one(state, regions, head, shadow != (last + 1) & 0xFFFF):
                stopped = PLAIN
            else:
                last = (last + 1) & 0xFFFF
                state[LAST] = last
                spins = state[SPINS]
                batch += 1
                left -= 1
                if not left:
                    stopped = LIMIT
        if batch and (stopped >= 0 or batch == BATCH or state[MOVED] >= BATCH_BYTES):
            batch = 0
            state[MOVED] = 0
            if _wants_call(state):
                return (LIMIT if stopped < 0 else stopped) | CALL
            if stopped == EMPTY and spins > 0:
                continue
        if stopped >= 0:
            return stopped
