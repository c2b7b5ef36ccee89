"""Kernels for a guest: where they are, what release they are, and which modules they need in which order."""

from __future__ import annotations

import gzip
import lzma
import re
import shutil
import struct
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import ConfigError, NotHere
from .elf import modinfo
from .folders import SET_UP, cache_folder

__all__ = ["MODULES", "Kernel", "find_kernel", "kernels", "release_of"]

MODULES = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_console", "crc32c_generic", "ext4")
"""What every guest loads, with everything that these need."""
_NEEDED = {"virtio_pci": "the bus of its disks", "virtio_blk": "the driver of its disks", "virtio_console": "the way to its commands"}

_SUFFIXES = ("", ".gz", ".xz", ".zst")
_FLAVOURS = (("cloud", re.compile(r"-cloud-amd64$")), ("generic", re.compile(r"-(amd64|generic)$")))


@dataclass(frozen=True)
class Kernel:
    """One bootable kernel: ``image`` is its bzImage, ``folder`` holds its modules (None: everything is built in)."""

    release: str
    image: Path
    folder: Path | None

    @property
    def flavour(self) -> str:
        """``cloud`` (small, for virtual machines), ``generic`` (Debian's and Ubuntu's usual one) or nothing."""
        return next((name for name, pattern in _FLAVOURS if pattern.search(self.release)), "")

    @property
    def version(self) -> tuple[int, ...]:
        """The numbers of the release, for comparison."""
        return tuple(map(int, re.findall(r"\d+", self.release)))

    @cached_property
    def files(self) -> dict[str, Path]:
        """Module name (with _ for -) -> file."""
        found = {}
        for path in sorted(self.folder.rglob("*.ko*")) if self.folder else ():
            stem, dot_ko, suffix = path.name.rpartition(".ko")
            if dot_ko and suffix in _SUFFIXES:
                found[_plain(stem)] = path
        return found

    @cached_property
    def built_in(self) -> frozenset[str]:
        """Names of the modules that are part of the image."""
        lists = [self.folder / "modules.builtin"] if self.folder else []
        return frozenset(
            _plain(Path(line).name.removesuffix(".ko")) for path in lists if path.is_file() for line in path.read_text().split()
        )

    def modules(self, names: Iterable[str] = MODULES) -> dict[str, bytes]:
        """File name -> contents, decompressed, in the order of loading: ``names`` and what they depend on.

        Raises NotHere for a module that a guest cannot do without, ConfigError for one that was asked for beyond ``MODULES``.
        """
        loaded: dict[str, bytes] = {}
        for name in names:
            self._add(_plain(name), loaded, ())
        return {f"{name}.ko": data for name, data in loaded.items()}

    def _add(self, name: str, loaded: dict[str, bytes], above: tuple[str, ...]) -> None:
        if name in loaded or name in self.built_in or name in above or self.folder is None:
            return
        if name not in self.files:
            self._miss(name, above)
            return
        data = read_module(self.files[name])
        facts = modinfo(data, str(self.files[name]))
        for other in _first(facts):
            if not above or other in self.files:
                self._add(other, loaded, (*above, name))
        loaded[name] = data

    def _miss(self, name: str, above: tuple[str, ...]) -> None:
        if name in _NEEDED:
            raise NotHere(f"kernel {self.release} in {self.image.parent} has no {name}, {_NEEDED[name]}", SET_UP)
        if not above and name not in MODULES:
            names = ", ".join(sorted(self.files)) if len(self.files) < 60 else f"one of the {len(self.files)} in {self.folder}"
            raise ConfigError(f"kernel {self.release} has no module {name!r}", f"use {names}")


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _first(facts: dict[str, list[str]]) -> Iterator[str]:
    """What must be loaded before a module with these facts."""
    for line in facts.get("depends", ()):
        yield from (_plain(name) for name in line.split(",") if name)
    for line in facts.get("softdep", ()):
        before = line.partition("pre:")[2].partition("post:")[0]
        yield from map(_plain, before.split())


def read_module(path: Path) -> bytes:
    """A module's contents, decompressed; zstd needs the program of that name."""
    data = path.read_bytes()
    match path.suffix:
        case ".gz":
            return gzip.decompress(data)
        case ".xz":
            return lzma.decompress(data)
        case ".zst":
            zstd = shutil.which("zstd")
            if zstd is None:
                raise NotHere(f"kernel module {path} is compressed with zstd, and there is no program zstd here", "apt install zstd")
            return subprocess.run([zstd, "-dcq"], input=data, stdout=subprocess.PIPE, check=True).stdout
    return data


def release_of(image: Path) -> str:
    """The release that a bzImage says it is (the x86 boot protocol's kernel_version); ConfigError if it is no bzImage."""
    try:
        with image.open("rb") as file:
            head = file.read(0x10000)
    except OSError as error:
        raise ConfigError(f"kernel {image} cannot be read: {error.strerror}", "give a readable bzImage") from None
    if head[0x202:0x206] != b"HdrS":
        raise ConfigError(f"kernel {image} is not an x86 bzImage", "give a vmlinuz")
    at = struct.unpack_from("<H", head, 0x20E)[0] + 0x200
    return head[at : head.find(b"\0", at)].decode("utf-8", "replace").split(" ")[0]


def _in_cache() -> Iterator[Kernel]:
    for image in cache_folder().glob("kernels/*/vmlinuz"):
        yield Kernel(image.parent.name, image, image.parent / "modules")


def _installed(boot: Path = Path("/boot"), modules: Path = Path("/lib/modules")) -> Iterator[Kernel]:
    for image in boot.glob("vmlinuz-*"):
        release = image.name.removeprefix("vmlinuz-")
        if (modules / release).is_dir() and _readable(image):
            yield Kernel(release, image, modules / release)


def _readable(path: Path) -> bool:
    try:
        path.open("rb").close()
    except OSError:
        return False
    return True


def kernels() -> list[Kernel]:
    """Every kernel that a guest can boot here, the cached ones first, each kind with the newest first."""
    newest = [sorted(found, key=lambda each: each.version, reverse=True) for found in (_in_cache(), _installed())]
    return [kernel for kind in newest for kernel in kind]


def find_kernel(wanted: str = "auto") -> Kernel:
    """``auto``, ``cloud`` or ``generic``, the beginning of a release (``"6.1"``), or the path of a bzImage.

    ``auto`` is the cloud kernel of the distribution's own series (the oldest one), else any.  Raises NotHere with what would bring one.
    """
    if "/" in wanted:
        return _by_path(Path(wanted).expanduser())
    found = kernels()
    clouds = sorted((each for each in found if each.flavour == "cloud"), key=lambda each: each.version[:2])
    match wanted:
        case "auto":
            fits = clouds or found
        case "cloud":
            fits = clouds
        case "generic":
            fits = [each for each in found if each.flavour == "generic"]
        case _:
            starts = [each for each in found if re.match(re.escape(wanted) + r"(?!\d)", each.release)]
            fits = sorted(starts, key=lambda each: each.flavour != "cloud")
    if not fits:
        here = ", ".join(each.release for each in found)
        raise NotHere(f"no kernel {wanted!r} for a guest here" + (f" (there is {here})" if here else ""), SET_UP)
    return fits[0]


def _by_path(image: Path) -> Kernel:
    release = release_of(image)
    places = (image.parent / "modules", image.parent.parent / "lib/modules" / release, Path("/lib/modules") / release)
    return Kernel(release, image, next((place for place in places if place.is_dir()), None))
