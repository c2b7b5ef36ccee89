"""Programs for a guest and the shared libraries that they need, from the cache or from this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import NotHere
from .elf import dynamic
from .folders import SET_UP, cache_folder

__all__ = ["LIBRARIES", "PROGRAMS", "Program", "Programs", "find_programs"]

LIBRARIES = "/lib/vblk"
"""Where a guest has its shared libraries: LD_LIBRARY_PATH names it, so that every distribution's loader finds them."""
_FOLDERS = ("bin", "sbin", "usr/bin", "usr/sbin", "usr/local/bin")
_LIBRARY_FOLDERS = (
    *("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "usr/lib64", "lib", "usr/lib"),
    *("usr/lib/x86_64-linux-gnu/ceph", "usr/lib64/ceph", "usr/local/lib"),
)


@dataclass(frozen=True)
class Program:
    """A program of the guest: ``package`` is Debian's, ``names`` are what it is called by there."""

    name: str
    package: str
    names: tuple[str, ...] = ()
    needed: bool = False


PROGRAMS = (
    Program("busybox", "busybox-static", needed=True),
    Program("fio", "fio"),
    Program("mke2fs", "e2fsprogs", ("mkfs.ext4", "mkfs.ext3", "mkfs.ext2")),
    Program("e2fsck", "e2fsprogs", ("fsck.ext4", "fsck.ext3", "fsck.ext2")),
    Program("resize2fs", "e2fsprogs"),
    Program("dumpe2fs", "e2fsprogs"),
    Program("blkdiscard", "util-linux"),
)


@dataclass(frozen=True)
class Programs:
    """The programs below ``root``; all of them come from one place, so that they share one C library."""

    root: Path

    def path(self, name: str) -> Path | None:
        """The file of a program, None if it is not here."""
        return next((path for folder in _FOLDERS if (path := self.root / folder / name).is_file()), None)

    def files(self) -> Iterator[tuple[str, Path]]:
        """(path in the guest, file here) of every program that is here and of the libraries it needs."""
        todo = [(f"/bin/{each.name}", path) for each in PROGRAMS if (path := self.path(each.name))]
        seen = {path for path, _ in todo}
        while todo:
            guest_path, file = todo.pop(0)
            yield guest_path, file
            for found in self._needs(file):
                if found[0] not in seen:
                    seen.add(found[0])
                    todo.append(found)

    def _needs(self, file: Path) -> Iterator[tuple[str, Path]]:
        wants = dynamic(file.read_bytes(), str(file))
        if wants.interpreter:
            yield wants.interpreter, self._find(wants.interpreter.rpartition("/")[2], (wants.interpreter.rpartition("/")[0],), file)
        for name in wants.needed:
            yield f"{LIBRARIES}/{name}", self._find(name, wants.search, file)

    def _find(self, name: str, search: tuple[str, ...], user: Path) -> Path:
        for folder in (*(path.replace("$ORIGIN", str(user.parent)) for path in search), *_LIBRARY_FOLDERS):
            inside = Path(folder) if Path(folder).is_relative_to(self.root) and self.root != Path("/") else self.root / folder.lstrip("/")
            if (path := inside / name).is_file():
                return path
        raise NotHere(f"{user} needs the library {name}, which is not below {self.root}", f"install it, or {SET_UP}")


def find_programs() -> Programs:
    """The cache's programs, else this machine's; NotHere if neither has busybox."""
    for root in (cache_folder() / "programs", Path("/")):
        if all(Programs(root).path(each.name) for each in PROGRAMS if each.needed):
            return Programs(root)
    raise NotHere("no busybox for a guest here", SET_UP)
