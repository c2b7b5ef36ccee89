"""What the bare guest finds in memory when it starts: its code and control page, its list, its slots, and what writes contain."""

from __future__ import annotations

from collections.abc import Callable
from mmap import mmap
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..guest.verify import POOL_SECTORS, pool_of
from ..memory import GuestMemory, GuestPages
from ..ring import SplitLayout
from ..spec.virtio_ring import DESC_BYTES, DescFlag
from . import bare_payload
from .bare import Requests
from .bare_payload import REQUEST, SLOT, Ctl
from .payload import MEMORY_MOST

__all__ = ["BareMemory"]

_PAGE = 4096
_TABLE_BYTES = 3 * DESC_BYTES


class BareMemory:
    """``map_memory(gpa, view)`` makes memory the guest's.  ``ctl`` is the control page; ``table()`` the list as the guest left it.

    Slots, buffers and indirect tables come from ``pages``, which the device reaches too; everything else only the guest sees.  Raises
    ConfigError if the queue is too small for the job's iodepth, or the memory for its list.
    """

    def __init__(
        self, map_memory: Callable[[int, memoryview], None], pages: GuestPages, layout: SplitLayout, requests: Requests, *, indirect: bool
    ) -> None:
        depth = requests.job.iodepth
        each = 1 if indirect else 3
        if depth * each > layout.size:
            remedy = f"use queue=vb.Split({1 << (depth * each - 1).bit_length()})" + ("" if indirect else " or a device with indirect=True")
            raise ConfigError(f"iodepth={depth} with BareGuest needs {depth * each} descriptors of a queue of {layout.size}", remedy)
        self._requests = requests
        self._bytes = len(requests.table) * REQUEST.itemsize
        at = self._private(map_memory, pages.memory, layout.size)
        self._image = memoryview(mmap(-1, bare_payload.IMAGE_BYTES))
        self._image[:] = bare_payload.image()
        map_memory(bare_payload.BASE, self._image)
        self.ctl = self._image[bare_payload.CONTROL_AT :].cast("I")
        size = layout.size
        for word, value in {
            Ctl.NEXT: at["list"],
            Ctl.LOW: at["list"],
            Ctl.END: at["list"] + self._bytes,
            Ctl.FREE: self._slots(pages, layout, indirect),
            Ctl.BATCH: requests.job.iodepth_batch * REQUEST.itemsize,
            Ctl.INDIRECT: int(indirect),
            Ctl.DESC: layout.desc,
            Ctl.AVAIL: layout.avail,
            Ctl.USED: layout.used,
            Ctl.MASK: size - 1,
            Ctl.USED_EVENT: layout.avail + 4 + 2 * size,
            Ctl.AVAIL_EVENT: layout.used + 4 + 8 * size,
            Ctl.TOKENS: at["tokens"],
            Ctl.SHADOW: at["shadow"],
            Ctl.FIRST: requests.first_sector,
            Ctl.POOL: at["pool"],
            Ctl.SECTORS: POOL_SECTORS,
        }.items():
            self.ctl[word] = value

    def _private(self, map_memory: Callable[[int, memoryview], None], memory: GuestMemory, queue_size: int) -> dict[str, int]:
        """Where list, tokens, shadow and pool are: in a memory slot of their own, behind the other memory."""
        requests, verify = self._requests, self._requests.job.verify
        pool = pool_of(requests.job.randseed, verify) if verify else memoryview(b"")
        sizes = {"list": self._bytes, "tokens": 4 * queue_size, "shadow": 4 * requests.sectors if verify else 0, "pool": len(pool)}
        gpa = end = -(-memory.size // _PAGE) * _PAGE
        at = {}
        for name, size in sizes.items():
            at[name] = end if size else 0
            end += -(-size // _PAGE) * _PAGE
        if end > MEMORY_MOST:
            remedy = "lower number_ios; with verify, give a smaller size="
            raise ConfigError(f"{end >> 20:,} MiB of guest memory with BareGuest, which reaches {MEMORY_MOST >> 20:,}", remedy)
        view = memoryview(mmap(-1, end - gpa))
        view[: self._bytes] = requests.at(gpa)
        if verify:
            view[at["pool"] - gpa :][: len(pool)] = pool
        map_memory(gpa, view)
        self._list, self.list_gpa = view[: self._bytes], gpa
        return at

    def _slots(self, pages: GuestPages, layout: SplitLayout, indirect: bool) -> int:
        """The address of the first of iodepth slots."""
        job = self._requests.job
        gpa = pages.alloc(job.iodepth * SLOT.itemsize, SLOT.itemsize)
        slots = np.zeros(job.iodepth, SLOT)
        number = np.arange(job.iodepth)
        slots["next"][:-1] = gpa + number[1:] * SLOT.itemsize
        slots["head"] = number if indirect else 3 * number
        follows = np.ones_like(number) if indirect else 3 * number + 1  # in an indirect table descriptors count from 0
        slots["link"] = follows << 16 | int(DescFlag.NEXT)
        tables = pages.alloc(job.iodepth * _TABLE_BYTES, DESC_BYTES) if indirect else layout.desc
        slots["descs"] = tables + number * _TABLE_BYTES
        slots["data"] = [pages.alloc(job.max_bs, _PAGE) for _ in number]
        pages.memory.write(gpa, slots.tobytes())
        return gpa

    def table(self) -> Any:
        """A copy of the list as the guest has left it: an array of ``REQUEST``."""
        return np.frombuffer(self._list, REQUEST).copy()
