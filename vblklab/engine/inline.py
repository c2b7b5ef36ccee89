"""The batch path's loop in Python: preadv and pwritev into guest memory, or slices of an image that lies in memory."""

from __future__ import annotations

import os
from collections.abc import Callable

from ..device import VirtioBlkDevice
from ..device.batch import CALL, EMPTY, LIMIT, PLAIN
from ..device.steps import overridden
from ..disk import FileStore, RamStore, Store
from ..ring import SplitDevice
from ..spec.virtio_blk import REQ_HEADER, REQ_HEADER_BYTES, ReqType
from ..spec.virtio_ring import DESC, DESC_TABLE_OF_THREE

__all__ = ["Image", "PythonDrain", "image_of"]

_IN, _OUT = int(ReqType.IN), int(ReqType.OUT)
_BATCH = 16
"""Requests between two looks at whether the driver wants an interrupt: a driver that sleeps starts while the rest is served."""


class Image:
    """Where a drain finds the disk's bytes: ``fd`` to read and write at offsets, or ``bytes``, all of it in memory.

    ``broken_flag`` is a byte that is looked at after each request on ``bytes``: not 0 if what was moved may not be the disk's.
    """

    def __init__(self, fd: int = -1, data: memoryview | None = None, broken_flag: memoryview | None = None) -> None:
        self.fd = fd
        self.bytes = data
        self.broken_flag = broken_flag


_CALLS = ("readv", "writev", "flush")
_WRITTEN = {cls: {name: cls.__dict__[name] for name in _CALLS} for cls in (FileStore, RamStore)}


def image_of(store: Store) -> tuple[Callable[[], Image], str] | str:
    """How a drain reaches the bytes of ``store`` behind its back, and the words for it; or why it must not."""
    if isinstance(store, FileStore) and not overridden(store, _WRITTEN[FileStore], "store"):
        return lambda: Image(store.fd), "preadv"
    if isinstance(store, RamStore) and not overridden(store, _WRITTEN[RamStore], "store"):
        return lambda: Image(data=store.bytes), "memory"
    return f"store {type(store).__name__}: its readv, writev or flush is its own"


class PythonDrain:
    """A ``Drain`` for the framing that Linux sends: an indirect table of header, one data segment and status byte."""

    def __init__(self, image: Callable[[], Image], how: str) -> None:
        self.name = f"Python, {how}"
        self._image = image

    def bind(self, device: VirtioBlkDevice, queue: SplitDevice) -> Callable[[int], int]:
        # Every name of the loop is a local or a cell: an attribute costs as much as the rest of its line.
        where = self._image()
        fd, image, broken = where.fd, where.bytes, where.broken_flag
        preadv, pwritev = os.preadv, os.pwritev
        unpack_desc, unpack_three, unpack_header = DESC.unpack_from, DESC_TABLE_OF_THREE.unpack_from, REQ_HEADER.unpack_from
        memory, base, limit = queue._bytes, queue._base, queue._end
        avail, used16, desc = queue._avail, queue._used16, queue._desc
        used32 = queue._used[4 : 4 + 8 * queue.size].cast("I")
        size, mask = queue.size, queue._mask
        inflight = queue.inflight
        fits = queue._threes
        block = device.block_size - 1

        def drain(spins: int) -> int:
            last, shadow, used_idx = queue.last_avail_idx, queue._shadow_avail_idx, queue.used_idx
            capacity = device.capacity_sectors
            writes = device.writeback and not device.read_only
            left = _BATCH
            stopped = PLAIN
            if not fits or queue.in_flight:
                return PLAIN
            try:
                while True:
                    if last == shadow:
                        shadow = avail[1]
                        if last == shadow:
                            stopped = EMPTY
                            break
                        if (shadow - last) & 0xFFFF > size:
                            break
                    head = avail[2 + (last & mask)]
                    if head >= size:
                        break
                    table, length, flags, _ = unpack_desc(desc, head << 4)
                    if flags != 4 or length != 48 or table < base or table + 48 > limit:
                        break
                    a0, l0, f0, n0, a1, l1, f1, n1, a2, l2, f2, _ = unpack_three(memory, table - base)  # read once
                    if f0 != 1 or n0 != 1 or n1 != 2 or f2 != 2 or l0 != REQ_HEADER_BYTES or l2 != 1 or not l1:
                        break
                    end = a1 + l1
                    if a0 < base or a1 < base or a2 < base or a0 + l0 > limit or end > limit or a2 >= limit:
                        break
                    kind, _, sector = unpack_header(memory, a0 - base)
                    at = sector << 9
                    if l1 & block or at & block or sector + (l1 >> 9) > capacity:
                        break
                    if kind == _IN:
                        if f1 != 3:
                            break
                    elif kind != _OUT or f1 != 1 or not writes:
                        break
                    if inflight is not None:
                        inflight.popped(head)
                    view = memory[a1 - base : end - base]
                    if kind == _IN:
                        if image is not None:
                            view[:] = image[at : at + l1]
                        elif preadv(fd, (view,), at) != l1:
                            break
                        written = l1 + 1
                    else:
                        if image is not None:
                            image[at : at + l1] = view
                        elif pwritev(fd, (view,), at) != l1:
                            break
                        written = 1
                    if broken is not None and broken[0]:
                        break
                    memory[a2 - base] = 0
                    slot = (used_idx & mask) << 1
                    used32[slot] = head
                    used32[slot + 1] = written
                    if inflight is not None:
                        inflight.filled(head)
                    last = (last + 1) & 0xFFFF
                    used16[1] = used_idx = (used_idx + 1) & 0xFFFF
                    if inflight is not None:
                        inflight.flushed(used_idx)
                    left -= 1
                    if not left:
                        stopped = LIMIT
                        break
            except OSError:
                pass  # the steps meet it again, and say what it becomes
            finally:
                queue.last_avail_idx, queue._shadow_avail_idx = last, shadow
                queue.used_idx = queue._flushed_idx = used_idx
            if left < _BATCH:
                device.notify_decisions += 1
                if queue.should_notify():
                    return stopped | CALL
            return stopped

        return drain

    def close(self) -> None:
        """Nothing to give back."""
