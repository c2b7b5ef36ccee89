"""Stores: the bytes of a disk, in memory or in a file.  Offsets and lengths are in bytes; failures are OSError."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import sys
import threading
from collections.abc import Sequence
from typing import Protocol

from ..errors import DiskError

__all__ = ["CACHES", "FileStore", "RamStore", "Store", "open_image"]


class Store(Protocol):
    """What an engine reads and writes.  Each call may raise OSError; the device turns it into VIRTIO_BLK_S_IOERR."""

    size: int
    read_only: bool

    def readv(self, offset: int, views: Sequence[memoryview]) -> None: ...

    def writev(self, offset: int, views: Sequence[memoryview]) -> None: ...

    def flush(self) -> None: ...

    def discard(self, offset: int, length: int) -> None: ...

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None: ...

    def resize(self, size: int) -> None: ...

    def current_size(self) -> int:
        """Bytes that are there now, whoever changed them; whole sectors."""

    def close(self) -> None: ...


class RamStore:
    """Zero-filled bytes in memory, given to nobody else."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.read_only = False
        self._map = mmap.mmap(-1, size)
        self.bytes = memoryview(self._map)

    def _end(self, offset: int, length: int) -> int:
        if offset < 0 or offset + length > self.size:
            raise OSError(errno.EIO, f"range {offset}+{length} is outside the disk of {self.size} bytes")
        return offset + length

    def readv(self, offset: int, views: Sequence[memoryview]) -> None:
        data, size = self.bytes, self.size
        for view in views:
            end = offset + len(view)
            if end > size:
                self._end(offset, len(view))
            view[:] = data[offset:end]
            offset = end

    def writev(self, offset: int, views: Sequence[memoryview]) -> None:
        data, size = self.bytes, self.size
        for view in views:
            end = offset + len(view)
            if end > size:
                self._end(offset, len(view))
            data[offset:end] = view
            offset = end

    def flush(self) -> None:
        """Memory has no cache to flush."""

    def discard(self, offset: int, length: int) -> None:
        self.write_zeroes(offset, length, True)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.bytes[offset : self._end(offset, length)] = bytes(length)

    def current_size(self) -> int:
        return self.size

    def resize(self, size: int) -> None:
        bigger = mmap.mmap(-1, size)
        keep = min(size, self.size)
        bigger[:keep] = self._map[:keep]
        self._map, self.bytes, self.size = bigger, memoryview(bigger), size

    def close(self) -> None:
        """The memory goes when the last view of it goes."""


_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE, _FALLOC_ZERO_RANGE = 1, 2, 16
_ZEROES = bytes(1 << 20)
_IOV_MAX = 1024
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)


CACHES = ("writeback", "writethrough", "none", "directsync", "unsafe")
"""QEMU's cache modes: writeback and none leave it to the guest to flush, writethrough and directsync make every write stable
before it ends, none and directsync go past the host's page cache (O_DIRECT), unsafe ignores flushes."""
_DIRECT_ALIGN = 4096


class FileStore:
    """An image file or block device, read and written at offsets; short transfers are continued.

    With O_DIRECT (``cache`` none or directsync) what is not aligned goes through a buffer that is.
    """

    def __init__(self, fd: int, size: int, *, read_only: bool, path: str = "", cache: str = "writeback") -> None:
        self.fd = fd
        self.size = size
        self.read_only = read_only
        self.path = path
        self.cache = cache
        self.direct = cache in ("none", "directsync")
        self._bounce = threading.Lock()

    def readv(self, offset: int, views: Sequence[memoryview]) -> None:
        want = 0
        for view in views:
            want += len(view)
        try:
            got = os.preadv(self.fd, views if len(views) <= _IOV_MAX else views[:_IOV_MAX], offset)
            if got != want:
                self._continue(offset, views, want, got, os.preadv, "read")
        except OSError as error:
            if not self.direct or error.errno != errno.EINVAL:
                raise
            self._bounced(offset, views, want, write=False)

    def writev(self, offset: int, views: Sequence[memoryview]) -> None:
        want = 0
        for view in views:
            want += len(view)
        if offset + want > self.size:
            raise OSError(errno.EIO, f"range {offset}+{want} is outside the disk of {self.size} bytes")
        try:
            done = os.pwritev(self.fd, views if len(views) <= _IOV_MAX else views[:_IOV_MAX], offset)
            if done != want:
                self._continue(offset, views, want, done, os.pwritev, "write")
        except OSError as error:
            if not self.direct or error.errno != errno.EINVAL:
                raise
            self._bounced(offset, views, want, write=True)

    def _bounced(self, offset: int, views: Sequence[memoryview], want: int, *, write: bool) -> None:
        """An O_DIRECT transfer whose address, length or offset is not aligned, through whole blocks in a buffer of its own."""
        start = offset & -_DIRECT_ALIGN
        length = (offset + want + _DIRECT_ALIGN - 1 & -_DIRECT_ALIGN) - start
        with self._bounce, mmap.mmap(-1, length or _DIRECT_ALIGN) as buffer, memoryview(buffer) as blocks:
            got = os.preadv(self.fd, [blocks], start)
            if got < offset + want - start:
                raise OSError(errno.EIO, f"short read: {got} of {length} bytes at {start} (image truncated meanwhile?)", self.path)
            at = offset - start
            for view in views:
                if write:
                    blocks[at : at + len(view)] = view
                else:
                    view[:] = blocks[at : at + len(view)]
                at += len(view)
            if write and os.pwritev(self.fd, [blocks[:got]], start) != got:
                raise OSError(errno.EIO, f"short write at {start}", self.path)

    def _continue(self, offset: int, views: Sequence[memoryview], want: int, done: int, call: object, what: str) -> None:
        """The kernel moved fewer bytes than asked (a signal, IOV_MAX, the end of the file): go on until it moves none."""
        while done < want:
            left, skip = [], done
            for view in views:
                if skip >= len(view):
                    skip -= len(view)
                    continue
                left.append(view[skip:])
                skip = 0
                if len(left) == _IOV_MAX:
                    break
            moved = call(self.fd, left, offset + done)  # type: ignore[operator]
            if moved <= 0:
                raise OSError(errno.EIO, f"short {what}: {done} of {want} bytes at {offset} (image truncated meanwhile?)", self.path)
            done += moved

    def flush(self) -> None:
        if self.cache == "unsafe":
            return
        getattr(os, "fdatasync", os.fsync)(self.fd)

    def discard(self, offset: int, length: int) -> None:
        self.write_zeroes(offset, length, True)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        if offset < 0 or offset + length > self.size:
            raise OSError(errno.EIO, f"range {offset}+{length} is outside the disk of {self.size} bytes")
        mode = _FALLOC_KEEP_SIZE | (_FALLOC_PUNCH_HOLE if unmap else _FALLOC_ZERO_RANGE)
        if _fallocate(self.fd, mode, offset, length):
            return
        while length:  # this file system has neither holes nor zero ranges
            step = min(length, len(_ZEROES))
            if self.direct:
                self._bounced(offset, [memoryview(_ZEROES)[:step]], step, write=True)
                done = step
            else:
                done = os.pwrite(self.fd, memoryview(_ZEROES)[:step], offset)
            offset += done
            length -= done

    def current_size(self) -> int:
        return os.lseek(self.fd, 0, os.SEEK_END) & -512

    def resize(self, size: int) -> None:
        if self.read_only:
            raise DiskError(f"disk image {self.path!r} is open for reading only", "a disk that can be resized needs read_only=False")
        os.ftruncate(self.fd, size)
        self.size = size

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """Linux fallocate(2); False where the file system or the host does not offer the mode."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if call(fd, mode, offset, length) == 0:
        return True
    error = ctypes.get_errno()
    if error in _UNSUPPORTED:
        return False
    raise OSError(error, os.strerror(error))


def open_image(path: str, *, read_only: bool = False, cache: str = "writeback") -> FileStore:
    """Open a raw image with one of ``CACHES``.

    DiskError says what is wrong with it: missing, a directory, no permission, size no multiple of 512, no O_DIRECT.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDONLY if read_only else os.O_RDWR)  # a FIFO would wait for its writer
    if cache in ("none", "directsync"):
        flags |= getattr(os, "O_DIRECT", 0)
    if cache in ("writethrough", "directsync"):
        flags |= getattr(os, "O_DSYNC", os.O_SYNC)
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        raise DiskError(f"disk image {path!r} does not exist", f"make one: truncate -s 64M {path}") from None
    except IsADirectoryError:
        raise DiskError(f"disk image {path!r} is a directory", "give the path of a raw image file") from None
    except PermissionError:
        raise DiskError(
            f"disk image {path!r} cannot be opened for {'reading' if read_only else 'writing'}",
            "change its permissions" if read_only else "change its permissions or use read_only=True",
        ) from None
    except ValueError as error:
        raise DiskError(f"disk image {path!r}: {error}", "check the path") from None
    except OSError as error:
        if error.errno == errno.EINVAL and cache in ("none", "directsync"):
            raise DiskError(
                f"disk image {path!r} lies on a file system without O_DIRECT, which cache={cache!r} needs",
                "use cache='writeback', or another file system",
            ) from None
        raise DiskError(
            f"disk image {path!r}: {error.strerror}", "use read_only=True" if error.errno == errno.EROFS else "check the path"
        ) from None
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(fd)
        raise DiskError(f"disk image {path!r} is neither a regular file nor a block device", "give the path of a raw image file")
    size = os.lseek(fd, 0, os.SEEK_END)
    if size == 0 or size % 512:
        os.close(fd)
        what = "is empty" if size == 0 else f"has {size:,} bytes, no multiple of 512"
        raise DiskError(f"disk image {path!r} {what}", f"grow it to whole sectors: truncate -s {max(size + 511 & ~511, 1 << 20)} {path}")
    if cache in ("none", "directsync") and size % _DIRECT_ALIGN:
        os.close(fd)
        raise DiskError(
            f"disk image {path!r} has {size:,} bytes, no multiple of {_DIRECT_ALIGN}, as cache={cache!r} (O_DIRECT) needs",
            f"grow it: truncate -s {(size + _DIRECT_ALIGN - 1) & -_DIRECT_ALIGN} {path}",
        )
    return FileStore(fd, size, read_only=read_only, path=path, cache=cache)
