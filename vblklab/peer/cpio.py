"""Writing an initramfs archive: cpio in the "newc" format, which the Linux kernel unpacks (Documentation/driver-api/early-userspace)."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

__all__ = ["Entry", "directory", "newc", "regular", "symlink"]

_LAST = "TRAILER!!!"


@dataclass(frozen=True)
class Entry:
    """One file of the archive: ``path`` is absolute, ``mode`` holds type and permissions, ``data`` contents or a link's target."""

    path: str
    mode: int
    data: bytes = b""


def directory(path: str) -> Entry:
    """A folder that everybody may enter."""
    return Entry(path, stat.S_IFDIR | 0o755)


def regular(path: str, data: bytes, permissions: int = 0o755) -> Entry:
    """A file."""
    return Entry(path, stat.S_IFREG | permissions, data)


def symlink(path: str, target: str) -> Entry:
    """A symbolic link."""
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def newc(entries: Iterable[Entry]) -> Iterator[bytes]:
    """The archive's bytes, piece by piece; folders that entries need and nobody gives are added before them."""
    made: set[str] = {"/"}
    number = 0
    for entry in entries:
        for parent in [str(each) for each in reversed(PurePosixPath(entry.path).parents)]:
            if parent not in made:
                made.add(parent)
                number += 1
                yield from _record(directory(parent), number)
        if entry.path not in made:
            made.add(entry.path)
            number += 1
            yield from _record(entry, number)
    yield from _record(Entry("/" + _LAST, 0), 0)


def _record(entry: Entry, number: int) -> Iterator[bytes]:
    name = entry.path.removeprefix("/").encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # number, mode, user, group, links, time, size, four device numbers, length of the name, check (unused)
    fields = (number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
    header = b"070701" + b"".join(b"%08x" % each for each in fields) + name
    yield header + bytes(-len(header) % 4)
    yield entry.data
    yield bytes(-len(entry.data) % 4)
