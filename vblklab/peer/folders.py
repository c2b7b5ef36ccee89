"""Where a guest's parts are kept, and the one line that says how to get them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..errors import ConfigError

__all__ = ["SET_UP", "cache_folder", "write_atomically"]

SET_UP = (
    "run `make guest` or `python -m vblklab.peer.setup` (on Debian and Ubuntu, as any user), "
    "or apt install linux-image-cloud-amd64 busybox-static e2fsprogs fio"
)


def cache_folder() -> Path:
    """``$VBLKLAB_CACHE``, or else vblklab/guest in the user's cache folder; it need not exist."""
    named = os.environ.get("VBLKLAB_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(named or f"{base}/vblklab/guest").expanduser()


def write_atomically(path: Path, pieces: Iterable[bytes]) -> Path:
    """Write ``path``, with its folders, so that it is seen whole or not at all, also when two processes write it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                file.writelines(pieces)
                os.chmod(file.name, 0o644)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", "set VBLKLAB_CACHE to a folder of your own") from None
    return path
