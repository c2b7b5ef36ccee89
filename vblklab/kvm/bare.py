"""BareGuest: a recipe's guest side that is machine code, and the list of requests that it works through.

A job becomes the list once, before the run: operation, sector and length of every I/O in order, the number of each write, and which
earlier requests must be done first because they overlap.  From then on the guest needs nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import ConfigError
from ..guest.job import Job
from ..guest.workload import READ, WRITE, Workload
from ..spec.virtio_blk import ReqType
from .bare_payload import REQUEST

__all__ = ["DEPTH_MOST", "LIST_MOST", "BareGuest", "Requests"]

DEPTH_MOST = 32
LIST_MOST = 4_000_000
"""Requests in a list: 320 MB of guest memory."""
_SYNC = 3
_TYPES = np.array([ReqType.IN, ReqType.OUT, 0, ReqType.FLUSH], np.uint32)
_SECTOR = 512


@dataclass(frozen=True)
class BareGuest:
    """A guest without an operating system: machine code on a real vCPU is application, block layer and driver in one.

    ``p.replace(guest=vb.BareGuest()).run(vb.KvmMachine())`` runs the recipe's job, one job with an iodepth of up to 32, on the recipe's
    device.  The driver's ``features`` and ``poll`` are honoured, its ``probe`` does the handshake; then no Python runs on the guest's side.
    """

    kind: ClassVar[str] = "bare guest"


class Requests:
    """The list of one job: ``table`` is an array of ``REQUEST``; the first ``main`` are the job, the others read back what it wrote.

    ``table["wait"]`` counts requests until ``at`` turns it into addresses.  Raises ConfigError for what the machine code cannot do.
    """

    def __init__(self, job: Job, disk_bytes: int) -> None:
        self.job = job
        workload = Workload(job, 0, disk_bytes)
        count = job.number_ios if job.number_ios is not None else workload.region // job.min_bs
        if count > LIST_MOST:
            raise ConfigError(f"{count:,} I/Os with BareGuest, whose list holds {LIST_MOST:,}", "give number_ios= or a smaller size=")
        self.first_sector = workload.start // _SECTOR
        self.sectors = -(-(workload.start + workload.region) // _SECTOR) - self.first_sector
        if self.first_sector + self.sectors > 1 << 32:
            raise ConfigError(f"a region up to sector {self.first_sector + self.sectors:,}", "the bare guest reaches 2 TiB: give size=")
        ops = np.array(list(_with_syncs(iter(workload), job.fsync)), np.int64).reshape(-1, 3)
        self.main = len(ops)
        if job.verify:
            written = np.array(list(dict.fromkeys(map(tuple, ops[ops[:, 0] == WRITE, 1:].tolist()))), np.int64).reshape(-1, 2)
            ops = np.concatenate([ops, np.insert(written, 0, READ, axis=1)])
        self.ops = ops
        table = self.table = np.zeros(len(ops), REQUEST)
        table["type"] = _TYPES[ops[:, 0]]
        table["sector"] = np.where(ops[:, 0] == _SYNC, 0, ops[:, 1] // _SECTOR)
        table["bytes"] = ops[:, 2]
        if job.verify:
            writes = ops[:, 0] == WRITE
            table["stamp"][writes] = np.arange(1, writes.sum() + 1)
        if job.verify or job.serialize_overlap:
            table["wait"] = self._overlaps()
            table["wait"][self.main :] = self.main

    def _overlaps(self) -> Any:
        """For each request, how many of the first must be done before it: up to the last one that overlaps, one of the two a write."""
        waits = np.zeros(len(self.ops), np.int64)
        any_last, write_last = np.zeros(self.sectors, np.int64), np.zeros(self.sectors, np.int64)
        sector = self.table["sector"].astype(np.int64) - self.first_sector
        places = zip(self.ops[: self.main, 0].tolist(), sector.tolist(), (self.ops[:, 2] // _SECTOR).tolist(), strict=False)
        for number, (op, start, count) in enumerate(places):
            if op == _SYNC:
                continue
            here = slice(start, start + count)
            waits[number] = (any_last if op == WRITE else write_last)[here].max()
            any_last[here] = number + 1
            if op == WRITE:
                write_last[here] = number + 1
        return waits

    def at(self, gpa: int) -> bytes:
        """The list as it lies at ``gpa``."""
        self.table["wait"] = np.where(self.table["wait"] > 0, gpa + self.table["wait"].astype(np.int64) * REQUEST.itemsize, 0)
        return self.table.tobytes()


def _with_syncs(ios: Iterator[tuple[int, int, int]], every: int) -> Iterator[tuple[int, int, int]]:
    """A flush after every so many writes; 0 for none."""
    writes = 0
    for io in ios:
        yield io
        if every and io[0] == WRITE:
            writes += 1
            if writes == every:
                writes = 0
                yield (_SYNC, 0, 0)
