"""The guest's root: kernel modules, programs and the two scripts that make a command channel of them, in one initramfs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from .cpio import Entry, directory, newc, regular, symlink
from .folders import cache_folder, write_atomically
from .kernels import MODULES, Kernel
from .programs import LIBRARIES, PROGRAMS, Programs

__all__ = ["entries", "initramfs"]

_HERE = Path(__file__).parent
_SCRIPTS = ("init.sh", "agent.sh")
_FOLDERS = ("/proc", "/sys", "/dev", "/run", "/tmp", "/mnt", "/root", "/etc", "/var", "/modules", LIBRARIES)
_KEPT_S = 86_400
"""An archive of the same kernel that is older than this may go: nobody is about to start with it."""


def initramfs(kernel: Kernel, programs: Programs, more_modules: Iterable[str] = ()) -> Path:
    """The archive for this kernel and these programs, built when the cache has none; two processes may build it at once."""
    names = (*MODULES, *more_modules)
    files = list(programs.files())
    path = cache_folder() / "initramfs" / f"{kernel.release}-{_key(kernel, files, names)}.cpio"
    if not path.is_file():
        write_atomically(path, newc(entries(kernel, files, names)))
        _remove_old(path, kernel.release)
    return path


def entries(kernel: Kernel, files: Iterable[tuple[str, Path]], names: Iterable[str]) -> Iterator[Entry]:
    """Everything in the archive, ``files`` being (path in the guest, file here)."""
    yield from map(directory, _FOLDERS)
    yield regular("/init", (_HERE / "init.sh").read_bytes())
    yield regular("/agent", (_HERE / "agent.sh").read_bytes())
    modules = kernel.modules(names)
    yield regular("/modules/order", "".join(f"{name}\n" for name in modules).encode(), 0o644)
    for name, data in modules.items():
        yield regular(f"/modules/{name}", data, 0o644)
    links = {f"/bin/{program.name}": program.names for program in PROGRAMS}
    for guest_path, file in files:
        yield regular(guest_path, file.read_bytes())
        yield from (symlink(f"/bin/{name}", guest_path) for name in links.get(guest_path, ()))
    yield symlink("/bin/sh", "busybox")
    yield regular("/etc/passwd", b"root::0:0:root:/root:/bin/sh\n", 0o644)
    yield symlink("/etc/mtab", "/proc/mounts")


def _key(kernel: Kernel, files: Iterable[tuple[str, Path]], names: Iterable[str]) -> str:
    """A name for the contents: what goes in, by path, size and time of change, and the scripts' text."""
    digest = hashlib.sha256()
    parts = [("", kernel.image), *((kernel.release, path) for path in sorted(kernel.files.values())), *files]
    for where, path in parts:
        found = path.stat()
        digest.update(f"{where} {path} {found.st_size} {found.st_mtime_ns}\n".encode())
    digest.update(" ".join(names).encode())
    for script in (*_SCRIPTS, "initramfs.py", "cpio.py"):
        digest.update((_HERE / script).read_bytes())
    return digest.hexdigest()[:16]


def _remove_old(newest: Path, release: str) -> None:
    for path in newest.parent.glob(f"{release}-*.cpio"):
        if path != newest and time.time() - path.stat().st_mtime > _KEPT_S:
            path.unlink(missing_ok=True)
