"""A Run in the layout of ``fio --output-format=json+`` (fio 3.33), so that tools made for fio read it.

What a Run does not keep is 0, as in fio without samples: bandwidth and IOPS over time, batch sizes, CPU use, faults.  Times are the
machine's: simulated ns on a simulator, and the key ``vblklab`` says so.  Rates are computed from ns where fio rounds to ms first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Protocol

from ..stats import DirStat, Histogram, JobStat

__all__ = ["fio_json"]

_PERCENTILES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 99.5, 99.9, 99.95, 99.99)
_LARGEST_BIN_NS = 17_112_760_320
"""The last of fio's buckets; fio's own fio_jsonplus_clat2csv never ends on a larger one."""
_DEPTHS = (1, 2, 4, 8, 16, 32, 64)
_BATCHES = ("0", "4", "8", "16", "32", "64", ">=64")
_LATENCIES = (2, 4, 10, 20, 50, 100, 250, 500, 750, 1000)


class _Run(Protocol):
    """What of a Run is read here."""

    @property
    def title(self) -> str: ...
    @property
    def rung(self) -> str: ...
    @property
    def simulated(self) -> bool: ...
    @property
    def interrupted(self) -> bool: ...
    @property
    def provenance(self) -> Mapping[str, str]: ...
    @property
    def recipe(self) -> Mapping[str, str]: ...
    @property
    def notes(self) -> list[str]: ...
    @property
    def counters(self) -> Mapping[str, int]: ...
    @property
    def jobs(self) -> list[JobStat]: ...
    @property
    def errors(self) -> int: ...
    @property
    def mismatches(self) -> int: ...


def fio_json(run: _Run) -> dict[str, Any]:
    """The run as fio would report it: one entry of ``jobs`` per clone, times in ns, and one extra key ``vblklab``.

    The result holds plain Python numbers, text, lists and dicts: ``json.dump`` writes it.
    """
    stamp_ms = _stamp_ms(run.provenance)
    version = run.provenance.get("vblklab") or run.provenance.get("vblklab version")
    return {
        "fio version": f"fio-3.33-vblklab-{version}" if version else "fio-3.33-vblklab",
        "timestamp": stamp_ms // 1000,
        "timestamp_ms": stamp_ms,
        "time": time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(stamp_ms // 1000)),
        "jobs": [_job(one) for one in run.jobs],
        "vblklab": {
            "title": run.title,
            "rung": run.rung,
            "simulated": bool(run.simulated),
            "interrupted": bool(run.interrupted),
            "errors": int(run.errors),
            "mismatches": int(run.mismatches),
            "provenance": {key: str(value) for key, value in run.provenance.items()},
            "recipe": {key: str(value) for key, value in run.recipe.items()},
            "notes": [str(note) for note in run.notes],
            "counters": {key: int(value) for key, value in run.counters.items()},
        },
    }


def _stamp_ms(provenance: Mapping[str, str]) -> int:
    """When the run was made, by its provenance, or else now: ms since 1970."""
    try:
        return round(datetime.fromisoformat(provenance.get("date", "")).timestamp() * 1000)
    except (ValueError, OverflowError, OSError):
        return time.time_ns() // 1_000_000


def _job(stat: JobStat) -> dict[str, Any]:
    runtime_ms = _ms(stat.runtime_ns)
    moving = (stat.read, stat.write, stat.trim)
    depth = stat.options.get("iodepth", "1")
    return {
        "jobname": stat.name,
        "groupid": 0,
        "error": int(stat.error),
        "eta": 0,
        "elapsed": max(1, -(-runtime_ms // 1000)),
        "job options": {"name": stat.name, **stat.options},
        "read": _direction(stat.read, stat.runtime_ns),
        "write": _direction(stat.write, stat.runtime_ns),
        "trim": _direction(stat.trim, stat.runtime_ns),
        "sync": {"total_ios": int(stat.sync.ios), "lat_ns": _latency(stat.sync.lat, bins=True)},
        "job_runtime": runtime_ms,
        "usr_cpu": 0.0,
        "sys_cpu": 0.0,
        "ctx": 0,
        "majf": 0,
        "minf": 0,
        "iodepth_level": _depth_levels(stat.depths),
        "iodepth_submit": dict.fromkeys(_BATCHES, 0.0),
        "iodepth_complete": dict.fromkeys(_BATCHES, 0.0),
        **_latency_classes([one.lat for one in moving]),
        "latency_depth": int(depth) if depth.isdecimal() else 1,
        "latency_target": 0,
        "latency_percentile": 100.0,
        "latency_window": 0,
    }


def _ms(ns: int) -> int:
    """Whole ms, as fio counts run time; 1 for anything that took time at all."""
    return max(1, round(ns / 1e6)) if ns > 0 else 0


def _direction(stat: DirStat, runtime_ns: int) -> dict[str, Any]:
    runtime_ns = runtime_ns if stat.ios else 0
    rate = 1e9 / runtime_ns if runtime_ns else 0.0
    return {
        "io_bytes": int(stat.bytes),
        "io_kbytes": int(stat.bytes) >> 10,
        "bw_bytes": int(stat.bytes * rate),
        "bw": int(stat.bytes * rate) >> 10,
        "iops": stat.ios * rate,
        "runtime": _ms(runtime_ns),
        "total_ios": int(stat.ios),
        "short_ios": int(stat.short_ios),
        "drop_ios": int(stat.drop_ios),
        "slat_ns": _latency(stat.slat, bins=False),
        "clat_ns": _latency(stat.clat, bins=True),
        "lat_ns": _latency(stat.lat, bins=False),
        "bw_min": 0,
        "bw_max": 0,
        "bw_agg": 0.0,
        "bw_mean": 0.0,
        "bw_dev": 0.0,
        "bw_samples": 0,
        "iops_min": 0,
        "iops_max": 0,
        "iops_mean": 0.0,
        "iops_stddev": 0.0,
        "iops_samples": 0,
    }


def _latency(histogram: Histogram, *, bins: bool) -> dict[str, Any]:
    """One of slat_ns, clat_ns, lat_ns; percentiles and bins only where fio has them and there are samples."""
    count = int(histogram.count)
    if not count:
        return {"min": 0, "max": 0, "mean": 0.0, "stddev": 0.0, "N": 0}
    out: dict[str, Any] = {
        "min": int(histogram.min_ns),
        "max": int(histogram.max_ns),
        "mean": float(histogram.mean_ns),
        "stddev": float(histogram.std_ns),
        "N": count,
    }
    if bins:
        found = _bins(histogram)
        out["percentile"] = _percentiles(found, count)
        out["bins"] = {str(value): number for value, number in found.items()}
    return out


def _bins(histogram: Histogram) -> dict[int, int]:
    """Counts by the value that fio prints for the bucket, its middle."""
    found: dict[int, int] = {}
    for value, number in histogram.bins():
        middle = min(int(value), _LARGEST_BIN_NS)
        found[middle] = found.get(middle, 0) + int(number)
    return found


def _percentiles(bins: Mapping[int, int], count: int) -> dict[str, int]:
    """fio's rule: the first bucket at which the running count reaches the share."""
    out: dict[str, int] = {}
    seen, wanted = 0, list(_PERCENTILES)
    for value, number in bins.items():
        seen += number
        while wanted and seen * 100 >= wanted[0] * count:
            out[f"{wanted.pop(0):f}"] = value
    return out


def _depth_levels(depths: Mapping[int, int]) -> dict[str, float]:
    """Percent of I/Os submitted at each depth; as in fio the level 2 holds depths 2 and 3, the last 64 and more."""
    levels = dict.fromkeys(_DEPTHS, 0)
    for depth, number in depths.items():
        levels[max(level for level in _DEPTHS if level <= max(depth, 1))] += number
    total = sum(levels.values()) or 1
    return {f">={level}" if level == 64 else str(level): 100.0 * number / total for level, number in levels.items()}


def _latency_classes(histograms: list[Histogram]) -> dict[str, dict[str, float]]:
    """Percent of I/Os per class of total latency: latency_ns, latency_us and latency_ms, each class up to but excluding its key."""
    scales = (("ns", 1, _LATENCIES), ("us", 1000, _LATENCIES), ("ms", 1_000_000, (*_LATENCIES, 2000)))
    edges = [(edge * scale, unit, str(edge)) for unit, scale, classes in scales for edge in classes]
    out: dict[str, dict[str, float]] = {f"latency_{unit}": {str(edge): 0.0 for edge in classes} for unit, _, classes in scales}
    out["latency_ms"][">=2000"] = 0.0
    total = sum(histogram.count for histogram in histograms)
    for histogram in histograms:
        for value, number in histogram.bins():
            unit, key = next(((unit, key) for edge, unit, key in edges if value < edge), ("ms", ">=2000"))
            out[f"latency_{unit}"][key] += 100.0 * number / total
    return out
