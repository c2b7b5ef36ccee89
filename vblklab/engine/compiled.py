"""The batch path over a loop that numba compiled: the work of ``inline.PythonDrain``, over raw addresses, without Python's lock.

Optional: ``pip install vblklab[fast]``.  ``loops()`` compiles on its first call or loads what was compiled before; boot calls it,
so that no request waits for a compiler.  The loop takes every framing with a header, data and a status byte of their own;
everything else it leaves to the steps.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..device import VirtioBlkDevice
from ..device.batch import PLAIN, Drain
from ..ring import SplitDevice
from .helper import Helper
from .inline import Image, PythonDrain

__all__ = ["CompiledDrain", "compiled_missing", "drain_of", "loops"]

_INT64_MAX = (1 << 63) - 1


def compiled_missing() -> str:
    """Why there is no compiled loop here, or nothing."""
    if find_spec("numba") is None:
        return "numba is not installed: pip install 'vblklab[fast]'"
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"the compiled loop needs Linux on x86-64 or arm64, this is {platform.system()} on {platform.machine()}"
    return ""


def _cache_folder() -> str:
    """Where compiled code is kept: a folder of the user's, since the package may be installed read-only, for these sources only.

    numba itself looks at no other file than the one of the function that it compiles.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vblklab" / "compiled"
    sources = (Path(__file__).with_name(name).read_bytes() for name in ("kernel.py", "share.py", "words.py"))
    return str(Path(os.environ.get("NUMBA_CACHE_DIR") or folder) / hashlib.sha256(b"".join(sources)).hexdigest()[:12])


@cache
def loops() -> tuple[Callable[[Any, Any], int], Callable[[int], int]]:
    """``kernel.serve`` and ``share.assist``, compiled; takes seconds the first time on a machine.  Raises ImportError without numba."""
    from numba import config, njit, types

    from .kernel import serve
    from .share import assist

    words = types.int64[::1]
    both = (types.int64(words, words), serve), (types.int64(types.int64), assist)
    before, config.CACHE_DIR = config.CACHE_DIR, _cache_folder()
    try:
        return tuple(njit(signature, nogil=True, cache=True)(function) for signature, function in both)
    except (RuntimeError, OSError):  # there is no folder to write to
        return tuple(njit(signature, nogil=True)(function) for signature, function in both)
    finally:
        config.CACHE_DIR = before


def drain_of(image: Callable[[], Image], how: str, fast: str) -> Drain:
    """The compiled loop where it is allowed (``fast`` is "auto") and there is one, else Python's."""
    if fast != "auto" or compiled_missing():
        return PythonDrain(image, how)
    try:
        return CompiledDrain(image, how)
    except ImportError as error:  # numba is there, and does not fit what else is installed
        return PythonDrain(image, f"{how} (numba cannot be imported: {error})")


class CompiledDrain:
    """A ``Drain`` that runs the compiled loop.  A ring with a record of buffers in flight must show it as ``view`` and ``counter``."""

    def __init__(self, image: Callable[[], Image], how: str) -> None:
        self._image = image
        self._python = PythonDrain(image, how)
        self._loop, assist = loops()
        self._helper = Helper(assist)
        self.name = f"compiled loop, {how}{', large reads by two threads' if self._helper.useful else ''}"

    def bind(self, device: VirtioBlkDevice, queue: SplitDevice) -> Callable[[int], int]:
        import numpy as np

        from . import kernel as k

        inflight: Any = queue.inflight
        if inflight is not None and not (hasattr(inflight, "view") and hasattr(inflight, "counter")):
            return self._python.bind(device, queue)
        held: list[Any] = []

        def address(view: Any) -> int:
            held.append(np.frombuffer(view, np.uint8))  # keeps the memory where it is
            return int(held[-1].ctypes.data)

        where = self._image()
        words = np.zeros(k.STATE, np.int64)
        state = memoryview(words.data)  # an item of it costs half of the array's
        scratch = np.zeros(k.SEGMENTS * 2, np.int64)
        iov = np.zeros(k.SEGMENTS * 2, np.int64)
        # The loop counts in int64: what lies higher it does not find, and the steps do.
        regions = [(start, end, address(view)) for start, end, view in queue._memory.regions if end <= _INT64_MAX]
        regions.sort(key=lambda region: region[0] - region[1])
        places = np.array(regions, np.int64).reshape(-1)
        state[k.DESC_TABLE], state[k.AVAIL], state[k.USED] = address(queue._desc), address(queue._avail), address(queue._used)
        state[k.SIZE], state[k.CHAIN_MAX] = queue.size, queue._chain_max
        state[k.INDIRECT], state[k.EVENT_IDX] = int(queue.indirect), int(queue.event_idx)
        state[k.FD] = where.fd
        if where.bytes is not None:
            state[k.IMAGE], state[k.IMAGE_BYTES] = address(where.bytes), len(where.bytes)
        if where.broken_flag is not None:
            state[k.BROKEN] = address(where.broken_flag)
        state[k.REGIONS], state[k.SCRATCH], state[k.IOV] = len(regions), scratch.ctypes.data, iov.ctypes.data
        state[k.INFLIGHT] = address(inflight.view) if inflight is not None else 0
        state[k.BLOCK] = device.block_size - 1
        serve = self._loop
        last_at, shadow_at, used_at, signalled_at, valid_at = k.LAST, k.SHADOW, k.USED_IDX, k.SIGNALLED, k.SIGNALLED_VALID
        decisions_at, capacity_at, writes_at, spins_at, counter_at = k.DECISIONS, k.CAPACITY, k.WRITES, k.SPINS, k.COUNTER
        large_at, share_at, helper = k.LARGE, k.SHARE, self._helper

        def drain(spins: int) -> int:
            if queue.in_flight:
                return PLAIN
            state[last_at], state[shadow_at], state[used_at] = queue.last_avail_idx, queue._shadow_avail_idx, queue.used_idx
            state[signalled_at], state[valid_at] = queue._signalled_idx, queue._signalled_valid
            state[capacity_at] = device.capacity_sectors
            state[writes_at] = device.writeback and not device.read_only
            state[spins_at] = spins
            if inflight is not None:
                state[counter_at] = inflight.counter
            stopped = serve(words, places)
            queue.last_avail_idx, queue._shadow_avail_idx = state[last_at], state[shadow_at]
            queue.used_idx = queue._flushed_idx = state[used_at]
            queue._signalled_idx, queue._signalled_valid = state[signalled_at], bool(state[valid_at])
            if inflight is not None:
                inflight.counter = state[counter_at]
            device.notify_decisions += state[decisions_at]
            state[decisions_at] = 0
            if state[large_at] and not state[share_at]:
                state[large_at], state[share_at] = 0, helper.start()
            return stopped

        drain.held = held, scratch, iov  # type: ignore[attr-defined]
        return drain

    def close(self) -> None:
        """Nobody drains any more."""
        self._helper.close()
