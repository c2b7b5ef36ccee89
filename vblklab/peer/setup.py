"""Fetch what a guest boots from: ``make guest``, or ``python -m vblklab.peer.setup [--all]``.

Debian packages are downloaded and unpacked into the cache folder; nothing is installed and no root is needed.  This is the only place
that reaches for packages: a guest itself boots from what is there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import NotHere, VblkError
from .folders import cache_folder
from .kernels import kernels
from .programs import PROGRAMS, find_programs

__all__ = ["main"]

_KERNELS = {"cloud": "linux-image-cloud-amd64", "generic": "linux-image-amd64"}
_TOOLS = ("apt-get", "apt-cache", "dpkg-deb")


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the cache with what is missing; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vblklab.peer.setup", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--all", action="store_true", help="also Debian's generic kernel, as a second one")
    wanted = ("cloud", "generic") if parser.parse_args(argv).all else ("cloud",)
    try:
        for flavour in wanted:
            _kernel(flavour)
        _programs()
    except VblkError as error:
        print(f"vblk: {error}", file=sys.stderr)
        return 2
    print(f"a guest can boot {', '.join(kernel.release for kernel in kernels())}")
    return 0


def _kernel(flavour: str) -> None:
    if any(kernel.flavour == flavour for kernel in kernels()):
        return
    package = next((name for name in _depends(_KERNELS[flavour]) if name.startswith("linux-image-")), None)
    if package is None:
        raise NotHere(f"no package {_KERNELS[flavour]} in the package lists", "apt-get update, on Debian")
    with tempfile.TemporaryDirectory() as folder:
        root = _unpack([package], Path(folder))
        for image in root.glob("boot/vmlinuz-*"):
            release = image.name.removeprefix("vmlinuz-")
            modules = next(path for path in (root / "lib/modules" / release, root / "usr/lib/modules" / release) if path.is_dir())
            _move(image, modules, cache_folder() / "kernels" / release)


def _move(image: Path, modules: Path, target: Path) -> None:
    """A kernel is there when its folder is, so the folder appears whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=".new-"))
    shutil.copy(image, fresh / "vmlinuz")
    shutil.copytree(modules, fresh / "modules", symlinks=True, ignore=shutil.ignore_patterns("build", "source"))
    try:
        os.rename(fresh, target)
    except OSError:  # somebody else was quicker
        shutil.rmtree(fresh, ignore_errors=True)


def _programs() -> None:
    try:
        here = find_programs()
    except NotHere:
        here = None
    if here is not None and all(here.path(each.name) for each in PROGRAMS if each.package != "util-linux"):
        return
    names: dict[str, None] = dict.fromkeys(each.package for each in PROGRAMS)
    for name in list(names):
        names |= dict.fromkeys(_depends(name, recurse=True))
    target = cache_folder() / "programs"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        root = _unpack(sorted(names), Path(folder))
        shutil.rmtree(target, ignore_errors=True)
        os.rename(root, target)


def _depends(package: str, *, recurse: bool = False) -> list[str]:
    """The packages that this one depends on, by the package lists."""
    only = ["--no-recommends", "--no-suggests", "--no-conflicts", "--no-breaks", "--no-replaces", "--no-enhances"]
    lines = _run("apt-cache", "depends", *only, *(["--recurse"] if recurse else []), package).splitlines()
    if recurse:
        return [line for line in lines if line[:1].isalnum()]
    return [line.split()[-1] for line in lines if "Depends:" in line]


def _unpack(packages: Sequence[str], folder: Path) -> Path:
    print(f"fetching {', '.join(packages) if len(packages) < 4 else f'{len(packages)} packages'}", flush=True)
    _run("apt-get", "download", *packages, cwd=folder)
    root = folder / "root"
    root.mkdir()
    for archive in sorted(folder.glob("*.deb")):
        _run("dpkg-deb", "--extract", str(archive), str(root))
    return root


def _run(*command: str, cwd: Path | None = None) -> str:
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise NotHere(f"no {', '.join(missing)} here", "set the guest up on Debian or Ubuntu, and copy its cache folder to this machine")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise NotHere(f"{' '.join(command[:2])} failed: {last}", "apt-get update, then try again")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
