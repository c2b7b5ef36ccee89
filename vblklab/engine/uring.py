"""io_uring by its three system calls: two rings shared with the kernel, entries in, results out.

Source: Linux include/uapi/linux/io_uring.h and io_uring(7).  64-bit Linux; the numbers of the calls are the same on every machine.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator

__all__ = ["Uring"]

_SETUP, _ENTER, _REGISTER = 425, 426, 427
_ENTER_GETEVENTS = 1
_REGISTER_EVENTFD = 4
_OFF_SQ_RING, _OFF_SQES = 0, 0x10000000
_FEAT_SINGLE_MMAP = 1
_OP_READV, _OP_WRITEV, _OP_FSYNC = 1, 2, 3
_FSYNC_DATASYNC = 1
_PARAMS = struct.Struct("<7I12x8IQ8IQ")
_SQE = struct.Struct("<BBHiQQIIQ24x")  # opcode, flags, ioprio, fd, off, addr, len, op flags, user_data
_CQE = struct.Struct("<QiI")  # user_data, res, flags


class Uring:
    """One ring of at least ``entries`` entries whose completions are counted in ``eventfd``.  Raises OSError."""

    def __init__(self, entries: int, eventfd: int) -> None:
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.restype = ctypes.c_long
        params = bytearray(_PARAMS.size)
        self.fd = self._call(_SETUP, entries, (ctypes.c_char * len(params)).from_buffer(params))
        try:
            self._map(params)
            self._call(_REGISTER, self.fd, _REGISTER_EVENTFD, ctypes.byref(ctypes.c_int(eventfd)), 1)
        except BaseException:
            os.close(self.fd)
            raise
        self._held: dict[int, object] = {}
        self._tail = self._sq[self._sq_tail]
        self._unsubmitted = 0

    def _map(self, params: bytearray) -> None:
        values = _PARAMS.unpack(params)
        self.entries, cq_entries, _, _, _, features, _ = values[:7]
        sq, cq = values[7:16], values[16:25]
        if not features & _FEAT_SINGLE_MMAP:
            raise OSError(38, "the kernel's io_uring is older than 5.4")
        length = max(sq[6] + 4 * self.entries, cq[5] + _CQE.size * cq_entries)
        self._ring = mmap.mmap(self.fd, length, offset=_OFF_SQ_RING)
        self._sqes = mmap.mmap(self.fd, 64 * self.entries, offset=_OFF_SQES)
        self._sq = memoryview(self._ring)[: length & ~3].cast("I")
        self._sq_tail, self._sq_mask, self._array = sq[1] >> 2, self._sq[sq[2] >> 2], sq[6] >> 2
        self._cq_head, self._cq_tail, self._cq_mask, self._cqes = cq[0] >> 2, cq[1] >> 2, self._sq[cq[2] >> 2], cq[5]

    def _call(self, number: int, *args: object) -> int:
        result = int(self._syscall(ctypes.c_long(number), *args))
        if result < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return result

    def move(self, write: bool, fd: int, views: list[memoryview], offset: int, number: int) -> None:
        """Queue a readv or writev; ``number`` comes back with its result, and the views are held until then."""
        buffers = [(ctypes.c_char * len(view)).from_buffer(view) for view in views]
        iovecs = (ctypes.c_uint64 * (2 * len(views)))()
        for i, buffer in enumerate(buffers):
            iovecs[2 * i], iovecs[2 * i + 1] = ctypes.addressof(buffer), len(buffer)
        self._held[number] = (iovecs, buffers)
        self._queue(_OP_WRITEV if write else _OP_READV, fd, offset, ctypes.addressof(iovecs), len(views), 0, number)

    def fdatasync(self, fd: int, number: int) -> None:
        """Queue a flush of what has ended before."""
        self._queue(_OP_FSYNC, fd, 0, 0, 0, _FSYNC_DATASYNC, number)

    def _queue(self, opcode: int, fd: int, offset: int, address: int, length: int, flags: int, number: int) -> None:
        slot = self._tail & self._sq_mask
        _SQE.pack_into(self._sqes, 64 * slot, opcode, 0, 0, fd, offset, address, length, flags, number)
        self._sq[self._array + slot] = slot
        self._tail = (self._tail + 1) & 0xFFFFFFFF
        self._unsubmitted += 1

    def enter(self) -> None:
        """Start what was queued."""
        if not self._unsubmitted:
            return
        self._sq[self._sq_tail] = self._tail  # the system call below orders it behind the entries
        while self._unsubmitted:
            try:
                self._unsubmitted -= self._call(_ENTER, self.fd, self._unsubmitted, 0, 0, None, 0)
            except InterruptedError:
                continue

    def completions(self) -> Iterator[tuple[int, int]]:
        """(number, bytes moved or minus the errno) of everything that has ended."""
        head = self._sq[self._cq_head]
        while head != self._sq[self._cq_tail]:
            number, result, _ = _CQE.unpack_from(self._ring, self._cqes + _CQE.size * (head & self._cq_mask))
            head = (head + 1) & 0xFFFFFFFF
            self._sq[self._cq_head] = head
            self._held.pop(number, None)
            yield number, result

    def close(self) -> None:
        """Give the rings back; what still runs is waited for, because it writes to memory that others own."""
        while self._held:
            self._call(_ENTER, self.fd, 0, 1, _ENTER_GETEVENTS, None, 0)
            for _ in self.completions():
                pass
        self._sq.release()
        self._ring.close()
        self._sqes.close()
        os.close(self.fd)
