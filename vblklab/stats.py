"""What is counted while a job runs: latency histograms and totals per direction.

The histograms have fio's own bucket layout: 64 buckets for every power of two (fio stat.h, FIO_IO_U_PLAT_BITS 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["DirStat", "Histogram", "JobStat"]

_BITS = 6
_VALUES = 1 << _BITS
_GROUPS = 29
_BUCKETS = _GROUPS * _VALUES


def _bucket_of(values: Any) -> Any:
    """fio's plat_val_to_idx(), for an int64 array of ns."""
    msb = np.frexp(values.astype(np.float64))[1] - 1
    error_bits = np.maximum(msb - _BITS, 0)
    index = np.where(msb <= _BITS, values, ((error_bits + 1) << _BITS) + ((values >> error_bits) & (_VALUES - 1)))
    return np.clip(index, 0, _BUCKETS - 1)


def _value_of(index: int) -> int:
    """fio's plat_idx_to_val(): the middle of a bucket, in ns."""
    if index < _VALUES << 1:
        return index
    error_bits = (index >> _BITS) - 1
    return int((1 << (error_bits + _BITS)) + (index % _VALUES + 0.5) * (1 << error_bits))


class Histogram:
    """A stream of durations in ns: counts per bucket, exact count, mean, minimum, maximum and standard deviation."""

    def __init__(self) -> None:
        self._counts = np.zeros(_BUCKETS, dtype=np.int64)
        self._pending: list[int] = []
        self._count = 0
        self._sum = 0
        self._squares = 0.0
        self._min = 0
        self._max = 0

    def add(self, value_ns: int) -> None:
        """One duration; folded in by the thousand."""
        self._pending.append(value_ns)
        if len(self._pending) >= 4096:
            self._fold()

    def extend(self, values_ns: Sequence[int] | Any) -> None:
        """Many durations at once: a sequence or an integer array."""
        self._take(np.asarray(values_ns, dtype=np.int64))

    def _fold(self) -> None:
        if self._pending:
            pending, self._pending = self._pending, []
            self._take(np.array(pending, dtype=np.int64))

    def _take(self, values: Any) -> None:
        if not len(values):
            return
        values = np.maximum(values, 0)
        self._counts += np.bincount(_bucket_of(values), minlength=_BUCKETS)
        low, high = int(values.min()), int(values.max())
        self._min = low if not self._count else min(low, self._min)
        self._max = max(high, self._max)
        self._count += len(values)
        self._sum += int(values.sum())
        self._squares += float(np.square(values.astype(np.float64)).sum())

    @property
    def count(self) -> int:
        self._fold()
        return self._count

    @property
    def mean_ns(self) -> float:
        return self._sum / self._count if self.count else 0.0

    @property
    def min_ns(self) -> int:
        self._fold()
        return self._min

    @property
    def max_ns(self) -> int:
        self._fold()
        return self._max

    @property
    def std_ns(self) -> float:
        if self.count < 2:
            return 0.0
        mean = self.mean_ns
        return float(max(self._squares / self._count - mean * mean, 0.0) ** 0.5)

    def percentile(self, p: float) -> int:
        """The duration that ``p`` percent (0 to 100) do not exceed, as exact as the bucket (1.6 %); 0 without samples."""
        if not self.count:
            return 0
        if p <= 0:
            return self._min
        need = np.ceil(self._count * min(p, 100.0) / 100.0)
        index = int(np.searchsorted(np.cumsum(self._counts), need))
        return min(max(_value_of(index), self._min), self._max)

    def bins(self) -> list[tuple[int, int]]:
        """(duration in ns that stands for the bucket, count) of every bucket that is not empty, ascending."""
        self._fold()
        return [(_value_of(int(i)), int(self._counts[i])) for i in np.flatnonzero(self._counts)]

    @classmethod
    def of_bins(cls, latency: Mapping[str, Any]) -> Histogram:
        """What fio says of a latency in its json+ output: ``bins`` (ns → count), and its own mean, extremes and deviation."""
        histogram = cls()
        bins = {int(ns): int(count) for ns, count in latency.get("bins", {}).items() if int(count)}
        if not bins:
            return histogram
        histogram._counts += np.bincount(
            _bucket_of(np.array(list(bins), dtype=np.int64)), weights=np.array(list(bins.values())), minlength=_BUCKETS
        ).astype(np.int64)
        count = histogram._count = sum(bins.values())
        mean, deviation = float(latency["mean"]), float(latency["stddev"])
        histogram._sum = round(mean * count)
        histogram._squares = (deviation * deviation + mean * mean) * count
        histogram._min, histogram._max = int(latency["min"]), int(latency["max"])
        return histogram

    def merge(self, other: Histogram) -> None:
        """Add all of ``other``."""
        self._fold()
        other._fold()
        if not other._count:
            return
        self._min = other._min if not self._count else min(self._min, other._min)
        self._max = max(self._max, other._max)
        self._counts += other._counts
        self._count += other._count
        self._sum += other._sum
        self._squares += other._squares


@dataclass
class DirStat:
    """One direction of a job: read, write, trim or sync.  slat, clat and lat as fio defines them, in ns."""

    ios: int = 0
    bytes: int = 0
    errors: int = 0
    slat: Histogram = field(default_factory=Histogram)
    clat: Histogram = field(default_factory=Histogram)
    lat: Histogram = field(default_factory=Histogram)
    short_ios: int = 0
    drop_ios: int = 0
    _pending: list[int] = field(default_factory=list, repr=False)

    def add(self, length: int, start_ns: int, issue_ns: int, end_ns: int) -> None:
        """One I/O that is over."""
        self.ios += 1
        self.bytes += length
        pending = self._pending
        pending += (start_ns, issue_ns, end_ns)
        if len(pending) >= 12288:
            self.fold()

    def fold(self) -> None:
        """Take what is pending into the histograms; whoever reads them calls this first."""
        if self._pending:
            times = np.array(self._pending, dtype=np.int64).reshape(-1, 3)
            self._pending.clear()
            self.slat.extend(times[:, 1] - times[:, 0])
            self.clat.extend(times[:, 2] - times[:, 1])
            self.lat.extend(times[:, 2] - times[:, 0])


@dataclass
class JobStat:
    """One clone of a job.  ``depths`` counts, per I/O, how many were in flight when it was submitted."""

    name: str
    number: int
    options: dict[str, str]
    read: DirStat = field(default_factory=DirStat)
    write: DirStat = field(default_factory=DirStat)
    trim: DirStat = field(default_factory=DirStat)
    sync: DirStat = field(default_factory=DirStat)
    start_ns: int = 0
    end_ns: int = 0
    error: int = 0
    depths: dict[int, int] = field(default_factory=dict)
    mismatches: list[str] = field(default_factory=list)
    mismatch_count: int = 0
    verified_ios: int = 0

    @property
    def runtime_ns(self) -> int:
        """Machine time from the first submission to the last completion of the main phase."""
        return max(self.end_ns - self.start_ns, 0)

    @property
    def iodepth_level(self) -> dict[int, float]:
        """Percent of I/Os submitted at a depth of 1, from 2, from 4 … from 64 on, as fio classes them."""
        total = sum(self.depths.values())
        levels = dict.fromkeys((1, 2, 4, 8, 16, 32, 64), 0.0)
        for depth, count in self.depths.items():
            level = min(1 << (max(depth, 1).bit_length() - 1), 64)
            levels[level] += 100.0 * count / total
        return levels
