"""Two clocks that nobody synchronised, joined by causality: what causes lies before what is caused.

An event of the guest that must lie before one of the host bounds the difference of the clocks from above, one that must lie after it
bounds it from below.  All bounds together leave a band for the line ``host = guest + offset + drift · guest``; the line in the middle
of its widest place is taken, and the error at a moment is how far any other line in the band is from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import TraceError

__all__ = ["ClockFit", "fit_clock"]

DRIFT_MOST = 1e-3
"""No two clocks of one machine run apart faster: a guest calibrates its counter to some ten millionths."""
_ROUNDS = 100


@dataclass(frozen=True)
class ClockFit:
    """``host_ns(guest_ns)``, and the largest error of it in the time that was looked at, in ns."""

    origin_ns: int
    offset_ns: float
    drift: float
    error_ns: int
    bounds: int

    def host_ns(self, guest_ns: int) -> int:
        """A time of the guest's clock on the host's."""
        since = guest_ns - self.origin_ns
        return guest_ns + round(self.offset_ns + self.drift * since)

    def __str__(self) -> str:
        drift, error = self.drift * 1e6, self.error_ns / 1e3
        return f"guest clock joined by {self.bounds:,} causal bounds, drift {drift:+.1f} ppm, error at most {error:.1f} µs"


def fit_clock(before: Sequence[tuple[int, int]], after: Sequence[tuple[int, int]], span: tuple[int, int] | None = None) -> ClockFit:
    """Join the clocks from pairs (guest ns, host ns): in ``before`` the guest's event lies first, in ``after`` the host's.

    ``span`` is the time of the guest, first and last ns, for which the error is stated; without it, that of all pairs.
    TraceError if there is no bound on one side, or if the pairs contradict each other for every drift.
    """
    if not before or not after:
        missing = "after" if before else "before"
        raise TraceError(f"no event of the guest lies {missing} one of the host", "record the whole run, on both sides")
    upper, lower = (np.array(pairs, dtype=np.int64) for pairs in (before, after))
    first, last = int(min(upper[:, 0].min(), lower[:, 0].min())), int(max(upper[:, 0].max(), lower[:, 0].max()))
    first, last = span or (first, last)
    origin = (first + last) // 2
    base = int(upper[0, 1] - upper[0, 0])
    high_t, high = (upper[:, 0] - origin).astype(float), (upper[:, 1] - upper[:, 0] - base).astype(float)
    low_t, low = (lower[:, 0] - origin).astype(float), (lower[:, 1] - lower[:, 0] - base).astype(float)

    def ceiling(drift: float) -> float:
        return float((high - drift * high_t).min())

    def floor(drift: float) -> float:
        return float((low - drift * low_t).max())

    def width(drift: float) -> float:
        return ceiling(drift) - floor(drift)

    best = _highest(width, -DRIFT_MOST, DRIFT_MOST)
    if width(best) < 0:
        raise TraceError(
            f"the two recordings contradict each other by {-width(best) / 1e3:.1f} µs: something would happen before its cause",
            "they must come from one run, and the guest's trace clock must be mono",
        )
    least, most = _edge(width, best, -DRIFT_MOST), _edge(width, best, DRIFT_MOST)
    offset = (ceiling(best) + floor(best)) / 2
    error = 0.0
    for since in (float(first - origin), 0.0, float(last - origin)):
        top = _highest(lambda drift, at=since: ceiling(drift) + drift * at, least, most)  # type: ignore[misc]
        bottom = _highest(lambda drift, at=since: -floor(drift) - drift * at, least, most)  # type: ignore[misc]
        here = offset + best * since
        error = max(error, ceiling(top) + top * since - here, here - floor(bottom) - bottom * since)
    return ClockFit(origin, base + offset, best, int(np.ceil(error)) + 1, len(before) + len(after))


def _highest(f: Callable[[float], float], left: float, right: float) -> float:
    """Where a concave function is highest."""
    for _ in range(_ROUNDS):
        third = (right - left) / 3
        a, b = left + third, right - third
        if f(a) < f(b):
            left = a
        else:
            right = b
    return (left + right) / 2


def _edge(f: Callable[[float], Any], inside: float, end: float) -> float:
    """The last place between ``inside`` and ``end`` where a concave function is not below 0."""
    if f(end) >= 0:
        return end
    outside = end
    for _ in range(_ROUNDS):
        middle = (inside + outside) / 2
        if f(middle) >= 0:
            inside = middle
        else:
            outside = middle
    return outside
