"""Stores: the bytes of a disk, in memory or in a file.  Offsets and lengths are in bytes; failures are OSError."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import sys
from collections.abc import Sequence
from typing import Protocol

from ..errors import DiskError

__all__ = ["FileStore", "RamStore", "Store", "open_image"]


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


class FileStore:
    """An image file or block device, read and written at offsets; short transfers are continued."""

    def __init__(self, fd: int, size: int, *, read_only: bool, path: str = "") -> None:
        self.fd = fd
        self.size = size
        self.read_only = read_only
        self.path = path

    def readv(self, offset: int, views: Sequence[memoryview]) -> None:
        want = 0
        for view in views:
            want += len(view)
        got = os.preadv(self.fd, views if len(views) <= _IOV_MAX else views[:_IOV_MAX], offset)
        if got != want:
            self._continue(offset, views, want, got, os.preadv, "read")

    def writev(self, offset: int, views: Sequence[memoryview]) -> None:
        want = 0
        for view in views:
            want += len(view)
        if offset + want > self.size:
            raise OSError(errno.EIO, f"range {offset}+{want} is outside the disk of {self.size} bytes")
        done = os.pwritev(self.fd, views if len(views) <= _IOV_MAX else views[:_IOV_MAX], offset)
        if done != want:
            self._continue(offset, views, want, done, os.pwritev, "write")

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
            done = os.pwrite(self.fd, memoryview(_ZEROES)[:step], offset)
            offset += done
            length -= done

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


def open_image(path: str, *, read_only: bool = False) -> FileStore:
    """Open a raw image; DiskError says what is wrong with it: missing, a directory, no permission, size no multiple of 512."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDONLY if read_only else os.O_RDWR)  # a FIFO would wait for its writer
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
    return FileStore(fd, size, read_only=read_only, path=path)
