"""``Mapped``: the image lies in memory, a request is a copy.

The mapping is guarded: where the image was cut off under it, the copy finds zeroes instead of ending the process, and from then on
everything goes through the file, which says that there is nothing there.  (Between the end of an image that was cut within a page and
the end of that page zeroes are read, as through any mapping.)
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Sequence

from ..device.batch import Drain
from ..disk import FileStore, RamStore, Store
from ..errors import ConfigError
from ..iostack import IOStack
from ..vhost.guard import protect
from .compiled import drain_of
from .engines import Sync
from .inline import Image, image_of

__all__ = ["Mapped"]


class _MappedFile:
    """A ``Store`` over a file's mapping; all but reads and writes is the file's own business."""

    def __init__(self, file: FileStore) -> None:
        self.file = file
        self.size = file.size
        self.read_only = file.read_only
        self.flush, self.discard, self.write_zeroes, self.resize = file.flush, file.discard, file.write_zeroes, file.resize
        self.close, self.current_size = file.close, file.current_size
        self._map()

    def _map(self) -> None:
        access = mmap.ACCESS_COPY if self.read_only else mmap.ACCESS_WRITE  # a copy that nobody writes is the page cache's own pages
        mapping = mmap.mmap(self.file.fd, self.file.size, access=access)
        self.guard = protect(mapping)
        self._bytes = memoryview(mapping)

    def unmap(self) -> None:
        """Let go of the mapping; it ends with the last view of it, and its guard with it."""
        self._bytes = memoryview(b"")

    def bytes(self) -> memoryview | None:
        """The image, mapped anew if it has another size; None once a part of it was found gone."""
        if len(self._bytes) != self.file.size:
            self.size = self.file.size
            self._map()
        return None if self.guard.broken else self._bytes

    def readv(self, offset: int, views: Sequence[memoryview]) -> None:
        data, at = self.bytes(), offset
        if data is not None and offset >= 0 and offset + sum(map(len, views)) <= len(data):
            for view in views:
                view[:] = data[at : at + len(view)]
                at += len(view)
            if not self.guard.broken:
                return
        self.file.readv(offset, views)

    def writev(self, offset: int, views: Sequence[memoryview]) -> None:
        data, at = self.bytes(), offset
        end = offset + sum(map(len, views))
        if data is not None and offset >= 0 and end <= len(data):
            for view in views:
                data[at : at + len(view)] = view
                at += len(view)
            if not self.guard.broken:
                return
        if self.guard.broken and end > os.lseek(self.file.fd, 0, os.SEEK_END):
            raise OSError(errno.EIO, f"range {offset}+{end - offset} is behind the image's end (truncated meanwhile?)", self.file.path)
        self.file.writev(offset, views)


class Mapped(Sync):
    """Blocking like ``Sync``, over the image mapped into memory; a flush is fdatasync, which takes the mapping's pages along.

    Takes an ``ImageFile`` with the cache modes writeback and unsafe: a mapping is the page cache.  A disk in memory is one already.
    On the simulator it is ``Sync``.
    """

    def attach(self, iostack: IOStack | None, store: Store, wake: Callable[[], None]) -> None:
        self._file: _MappedFile | None = None
        if iostack is None and isinstance(store, FileStore):
            if store.cache not in ("writeback", "unsafe"):
                raise ConfigError(f"engine Mapped over cache={store.cache!r}", "use cache='writeback' or 'unsafe', or the engine Sync")
            path = store.path
            try:
                store = self._file = _MappedFile(store)
            except (OSError, ValueError) as error:
                raise ConfigError(f"engine Mapped cannot map {path!r}: {error}", "use the engine Sync") from None
        elif iostack is None and not isinstance(store, RamStore):
            raise ConfigError(f"engine Mapped over {type(store).__name__}", "use an ImageFile, or the engine Sync")
        super().attach(iostack, store, wake)

    def close(self) -> None:
        super().close()
        file, self._file = self._file, None
        if file is not None:
            file.unmap()

    def drain(self, fast: str) -> Drain | str:
        """Copies in the batch path too."""
        file = self._file
        if file is None or type(self) is not Mapped:
            return super().drain(fast)
        reason = image_of(file.file)
        return reason if isinstance(reason, str) else self._takes(drain_of(lambda: _image(file), "mapped image", fast))


def _image(file: _MappedFile) -> Image:
    data = file.bytes()
    if data is None:
        return Image(file.file.fd)
    return Image(data=data, broken_flag=memoryview(file.guard.flag))
