"""Which I/O comes next: the sequence of (operation, offset, length) of one clone of a job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from itertools import chain, repeat
from typing import Any

import numpy as np

from ..errors import JobError
from .fio_values import READ, TRIM, WRITE, Percent
from .job import Job

__all__ = ["READ", "TRIM", "WRITE", "Workload"]

_CHUNK_FIRST = 64
_CHUNK_LARGEST = 8192

Io = tuple[int, int, int]


class Workload:
    """The I/Os of one clone, each (op, offset in bytes, length in bytes) with op READ 0, WRITE 1 or TRIM 2.

    A pure function of the job's options, name and randseed, of ``clone`` and ``disk_bytes``.  Sequential jobs advance a position per
    direction and go around their region; random offsets are uniform over the region's blocks, aligned to the direction's smallest
    block size, and may repeat.  No I/O leaves the region (fio's last sequential one may).  Directions, sizes and offsets follow fio's
    rules but not fio's random numbers: the real fio reads other offsets.  The end is number_ios I/Os, or else as many as fit into
    ``size`` bytes.

    ``start`` and ``region`` (bytes) say where the clone works.  Raises JobError if that is not on the disk.

    >>> from .job import job
    >>> list(Workload(job(rw="write", bs="64k", size="192k", offset="1m"), 0, 1 << 22))
    [(1, 1048576, 65536), (1, 1114112, 65536), (1, 1179648, 65536)]
    """

    next: Callable[[], Io | None]
    """The next I/O, or None at the end."""

    def __init__(self, job: Job, clone: int, disk_bytes: int) -> None:
        self.job = job
        self.clone = clone
        self.start, self.region = _region(job, clone, disk_bytes)
        self._random = [_stream(job, clone, use) for use in ("direction", "size", "offset")]
        self._cursor = dict.fromkeys(job.directions, 0)
        self._mix = {direction: _Sizes(job, direction) for direction in job.directions}
        self._ios: Iterator[Io] = chain.from_iterable(self._chunks())
        self.next = partial(next, self._ios, None)

    def __iter__(self) -> Iterator[Io]:
        """The I/Os that are left; shared with ``next``, and the fastest way to draw them."""
        return self._ios

    def _chunks(self) -> Iterator[Iterator[Io]]:
        count = self.job.number_ios
        budget = self.region if count is None else None
        size = _CHUNK_FIRST
        while count is None or count:
            ios = size if count is None else min(size, count)
            ops, lengths = self._draw(ios)
            if budget is not None:
                ends = np.cumsum(lengths)
                ios = int(np.searchsorted(ends, budget, side="right"))
                budget -= int(ends[ios - 1]) if ios else 0
                ops, lengths = ops[:ios], lengths[:ios]
            if ios:
                yield self._zipped(ops, self._offsets(ops, lengths), lengths)
            if budget is not None and ios < size:
                return
            if count is not None:
                count -= ios
            size = min(size * 4, _CHUNK_LARGEST)

    def _draw(self, ios: int) -> tuple[Any, Any]:
        """Operations and lengths of the next I/Os: int64 arrays of (ios,)."""
        directions = self.job.directions
        if len(directions) == 1:
            ops = np.full(ios, directions[0], np.int64)
        else:
            ops = np.where(_uniform(self._random[0], ios) * 100 < self.job.rwmixread, READ, WRITE)
        if all(mix.fixed for mix in self._mix.values()):
            table = np.zeros(3, np.int64)
            for direction, mix in self._mix.items():
                table[direction] = mix.fixed
            return ops, table[ops]
        lengths = np.empty(ios, np.int64)
        draws = _uniform(self._random[1], ios) * 100
        for direction, mix in self._mix.items():
            chosen = ops == direction
            lengths[chosen] = mix.pick(draws[chosen])
        return ops, lengths

    def _offsets(self, ops: Any, lengths: Any) -> Any:
        offsets = np.empty(len(ops), np.int64)
        draws = _uniform(self._random[2], len(ops)) if self.job.random else None
        for direction, mix in self._mix.items():
            chosen = slice(None) if len(self._mix) == 1 else ops == direction
            if draws is None:
                offsets[chosen] = self._sequential(direction, lengths[chosen], mix.fixed)
            else:
                places = (self.region - lengths[chosen]) // mix.align + 1
                offsets[chosen] = (draws[chosen] * places).astype(np.int64) * mix.align
        return offsets + self.start

    def _sequential(self, direction: int, lengths: Any, fixed: int) -> Any:
        """Positions of I/Os that follow each other; one that does not fit starts at the region's beginning again."""
        cursor = self._cursor[direction]
        if not len(lengths):
            return lengths
        if fixed:
            blocks = self.region // fixed
            positions = (cursor // fixed + np.arange(len(lengths))) % blocks * fixed
            self._cursor[direction] = int(positions[-1]) + fixed
            return positions
        ends = cursor + np.cumsum(lengths)
        while ends[-1] > self.region:
            first = int(np.searchsorted(ends, self.region, side="right"))
            ends[first:] -= ends[first] - lengths[first]
        self._cursor[direction] = int(ends[-1])
        return ends - lengths

    def _zipped(self, ops: Any, offsets: Any, lengths: Any) -> Iterator[Io]:
        if len(self._mix) == 1:
            (direction, mix), *_ = self._mix.items()
            if mix.fixed:
                return zip(repeat(direction), offsets.tolist(), repeat(mix.fixed), strict=False)
            return zip(repeat(direction), offsets.tolist(), lengths.tolist(), strict=False)
        return zip(ops.tolist(), offsets.tolist(), lengths.tolist(), strict=True)


class _Sizes:
    """The block sizes of one direction; ``fixed`` is the only one, or 0.

    What percentages leave of 100 goes to the size with the largest, as in fio.
    """

    def __init__(self, job: Job, direction: int) -> None:
        pairs = sorted((pair for pair in job.split(direction) if pair[1]), key=lambda pair: pair[1])
        self.align = min(size for size, _ in job.split(direction))
        self._sizes = np.array([size for size, _ in pairs], np.int64)
        self._limits = np.cumsum([percent for _, percent in pairs])[:-1]
        self.fixed = pairs[0][0] if len(set(self._sizes.tolist())) == 1 else 0

    def pick(self, draws: Any) -> Any:
        """Sizes for uniform draws in [0, 100)."""
        return self._sizes[np.searchsorted(self._limits, draws, side="right")]


def _stream(job: Job, clone: int, use: str) -> Any:
    key = blake2b(f"{job.randseed}/{clone}/{use}/{job.name}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return np.random.PCG64(int.from_bytes(key, "little"))


def _uniform(stream: Any, count: int) -> Any:
    """float64 in [0, 1) out of raw bits: numpy keeps a bit generator's stream stable, its distributions not."""
    return (stream.random_raw(count) >> np.uint64(11)) * 2.0**-53


def _region(job: Job, clone: int, disk_bytes: int) -> tuple[int, int]:
    """Where a clone works: (start, length) in bytes, by fio's rules for percentages (file setup in fio's filesetup.c)."""
    where = f"job {job.name!r}, clone {clone}"
    if not 0 <= clone < job.numjobs:
        raise JobError(f"{where}: the job has numjobs={job.numjobs}", "clones count from 0")
    align = job.min_bs
    start = _bytes(job.offset, disk_bytes) + clone * _bytes(job.offset_increment, disk_bytes)
    if isinstance(job.offset, Percent) or isinstance(job.offset_increment, Percent):
        start = -(-start // align) * align
    rest = max(disk_bytes - start, 0)
    if job.size is None or job.size == Percent(100):
        region = rest
    elif isinstance(job.size, Percent):
        region = min(job.size.of(disk_bytes), rest) // align * align
    else:
        region = job.size
    if start + region > disk_bytes or region < job.max_bs:
        size = "the rest of the disk" if job.size is None else f"size={job.options()['size']}"
        what = f"{where}: {size} at offset {start} is bytes {start} to {start + region} of a disk of {disk_bytes}"
        remedy = "shrink size, offset, offset_increment or numjobs, or enlarge the disk"
        raise JobError(f"{what}, with blocks of up to {job.max_bs}", remedy)
    return start, region


def _bytes(value: int | Percent, disk_bytes: int) -> int:
    return value.of(disk_bytes) if isinstance(value, Percent) else value
