"""The distribution of the completion latency: percentiles far into the tail, or a histogram."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ..errors import ConfigError
from . import style
from .runs import HistogramLike, RunLike, check_runs, check_unit, labels, letter, number, unit_key
from .style import INK, RUN_COLOURS, Draft
from .text import SMALL_PX, escape, text_px

__all__ = ["latency"]

LEFT, RIGHT, PLOT_PX = 76, 40, 380
DASHES = "7px,4px"
MARKS = (50.0, 90.0, 99.0, 99.9, 99.99, 99.999)


def latency(*runs: RunLike, kind: str = "percentiles", unit: str = "us") -> go.Figure:
    """Draw the completion latency of every I/O of each run.

    ``kind="percentiles"`` has 1/(1-q) on a logarithmic axis, so that 90 %, 99 % and 99.9 % are equally far apart; simulated
    runs are dashed, live runs are solid.  ``kind="histogram"`` has the share of the I/Os in each of 60 bins.
    """
    check_runs(runs)
    scale, unit_name = check_unit(unit)
    if kind not in ("percentiles", "histogram"):
        raise ConfigError(f"kind={kind!r}", "use one of percentiles, histogram")
    hists = [run.clat for run in runs]  # a Run merges its jobs' histograms on every access
    for run, hist in zip(runs, hists, strict=True):
        if not hist.count:
            raise ConfigError(f"run {run.title!r} has no completed I/O", "give a Run that finished at least one I/O")
    draft = Draft()
    y_title, remark = (_percentiles if kind == "percentiles" else _histogram)(draft, runs, hists, scale, unit_name)
    one = len(runs) == 1
    title = f"Completion latency: {_summary(hists[0], scale, unit_name)}" if one else "Completion latency"
    return style.finish(draft, runs, kind="latency", title=title, subtitle=labels(runs)[0] if one else "", remark=remark, plot_px=PLOT_PX,
                        left=LEFT, right=RIGHT, y_title=y_title, legend_dx=9)


def _summary(hist: HistogramLike, scale: float, unit: str) -> str:
    return " · ".join(f"p{p:g} {number(hist.percentile(p) / scale)} {unit}" for p in (50, 99))


def _names(runs: Sequence[RunLike], hists: Sequence[HistogramLike], scale: float, unit: str) -> list[str]:
    tails = [f" · {_summary(hist, scale, unit)}" for hist in hists]
    cut = [labels(runs, style.WIDTH - 110 - text_px(tail))[i] for i, tail in enumerate(tails)]
    return [name + tail for name, tail in zip(cut, tails, strict=True)]


def _line(run: RunLike, i: int) -> dict[str, Any]:
    """Steps, because that is what a percentile of a finite number of I/Os is."""
    return dict(color=RUN_COLOURS[i], width=2.2, shape="vh", dash=DASHES if run.simulated else "solid")


def _curve(hist: HistogramLike) -> tuple[Any, Any]:
    """1/(1-q) and the latency in ns of every bucket; the last point is the slowest I/O at 1/(1-q) = count."""
    values, counts = np.array(hist.bins(), dtype=float).T
    below = np.cumsum(counts)
    x = hist.count / np.maximum(1.0, hist.count - below)
    x = np.concatenate([[1.0], x])
    y = np.concatenate([[float(hist.min_ns)], np.clip(values[:-1], hist.min_ns, hist.max_ns), [float(hist.max_ns)]])
    return x, y


def _percentiles(
    draft: Draft, runs: Sequence[RunLike], hists: Sequence[HistogramLike], scale: float, unit: str,
) -> tuple[str, str]:
    most, high = 10.0, 0.0
    for i, (run, hist, name) in enumerate(zip(runs, hists, _names(runs, hists, scale, unit), strict=True)):
        x, y = _curve(hist)
        y = y / scale
        most, high = max(most, float(x[-1])), max(high, float(y[-1]))
        draft.scatter(
            x=x, y=y, mode="lines", name=name, line=_line(run, i), showlegend=len(runs) > 1,
            customdata=np.round(100 * (1 - 1 / x), 5)[:, None],
            hovertemplate=f"%{{customdata[0]:.6g}} % of the I/Os within %{{y:.4g}} {unit}<extra>{escape(labels(runs)[i])}</extra>",
            meta={"columns": ["percentile"], "x_unit": "1/(1-q)", "y_unit": unit_key(unit)})
        marks = [p for p in MARKS if _tail(p) < 0.7 * x[-1]]
        points = [*(hist.percentile(p) / scale for p in marks), float(y[-1])]
        texts = [*(f"{number(v)} {unit}" for v in points[:-1]), f"slowest {number(points[-1])} {unit}"]
        draft.scatter(
            x=[*map(_tail, marks), x[-1]], y=points, mode="markers+text" if len(runs) == 1 else "markers", name=f"{name} · marks",
            marker=dict(size=8, color=RUN_COLOURS[i]), text=texts if len(runs) == 1 else None, textposition="top left",
            textfont=dict(size=SMALL_PX, color=INK), showlegend=False, hoverinfo="skip", cliponaxis=False,
            customdata=[[p] for p in (*marks, 100.0)], meta={"columns": ["percentile"], "x_unit": "1/(1-q)", "y_unit": unit_key(unit)})
    ticks = [p for p in MARKS if _tail(p) <= most * 1.2]
    draft.xaxis.update(type="log", range=[0, math.log10(most) * 1.02], tickvals=[*map(_tail, ticks)], ticktext=[f"{p:g} %" for p in ticks],
                     title_text="share of the I/Os that are at least as fast")
    log = _latency_axis(draft, min(h.percentile(1) for h in hists) / scale, min(h.percentile(50) for h in hists) / scale, high)
    return f"completion latency ({unit}{', logarithmic' if log else ''})", ""


def _tail(p: float) -> float:
    return round(1 / (1 - p / 100), 6)


def _latency_axis(draft: Draft, low: float, median: float, high: float) -> bool:
    """A linear axis from zero, or a logarithmic one (True) when the slowest I/O took more than thirty times the median."""
    log = low > 0 and high > 30 * median
    if log:
        first, last = math.log10(low * 0.8), math.log10(high * 1.35)
        ticks = _ticks(first, last)
        draft.yaxis.update(type="log", range=[first, last], tickvals=ticks, ticktext=[f"{t:,g} " for t in ticks])
    else:
        draft.yaxis.update(range=[0, high * 1.12 or 1], ticksuffix=" ")
    return log


def _ticks(first: float, last: float) -> list[float]:
    """1, 2, 5 of every power of ten between two logarithms; only 1 when there are many."""
    ticks = [m * 10.0**e for e in range(math.floor(first), math.ceil(last)) for m in ((1, 2, 5) if last - first < 4 else (1,))]
    return [t for t in ticks if first <= math.log10(t) <= last]


def _cumulative(hist: HistogramLike) -> tuple[Any, Any]:
    """The share of I/Os at or below each bucket border; a bucket's I/Os are spread evenly over its width."""
    xs: list[float] = []
    ys: list[float] = []
    done = 0
    for middle, count in hist.bins():
        half = 2.0 ** max(0, int(middle).bit_length() - 7) / 2
        lower = max(middle - half, hist.min_ns - 0.5, xs[-1] if xs else 0)
        xs += [lower, max(lower, min(middle + half, hist.max_ns + 0.5))]
        ys += [done, done + count]
        done += count
    return np.array(xs), np.array(ys) / max(1, done)


def _histogram(
    draft: Draft, runs: Sequence[RunLike], hists: Sequence[HistogramLike], scale: float, unit: str,
) -> tuple[str, str]:
    low = min(float(h.percentile(0.1)) for h in hists) * 0.95
    high = max(1.5 * float(h.percentile(99)) - 0.5 * float(h.percentile(50)) for h in hists) * 1.03 + 1
    log = low > 0 and high > 6 * low
    edges = np.geomspace(low, high, 61) if log else np.linspace(low, high, 61)
    shares = [100 * np.diff(np.interp(edges, *_cumulative(hist), left=0.0, right=1.0)) for hist in hists]
    top = max(float(share.max()) for share in shares) * 1.08 or 1.0
    for i, (run, hist, name) in enumerate(zip(runs, hists, _names(runs, hists, scale, unit), strict=True)):
        x, y = np.repeat(edges / scale, 2), np.concatenate([[0.0], np.repeat(shares[i], 2), [0.0]])
        draft.scatter(
            x=x, y=y, mode="lines", name=name, line=dict(color=RUN_COLOURS[i], width=1.8), fill="tozeroy",
            fillcolor=_glass(RUN_COLOURS[i], run.simulated), showlegend=len(runs) > 1,
            hovertemplate=f"%{{y:.2f}} % of the I/Os at %{{x:.4g}} {unit}<extra>{escape(labels(runs)[i])}</extra>",
            meta={"columns": [], "x_unit": unit_key(unit), "y_unit": "percent of I/Os in the bin"})
        draft.scatter(
            x=[hist.percentile(50) / scale] * 2, y=[0, top], mode="lines", name=f"{name} · median", showlegend=False, hoverinfo="skip",
            line=dict(color=RUN_COLOURS[i], width=1.2, dash="dot"), meta={"columns": [], "x_unit": unit_key(unit), "y_unit": "line"})
    first, last = math.log10(low / scale), math.log10(high / scale)
    if log:
        draft.xaxis.update(type="log", range=[first, last], tickvals=_ticks(first, last), ticktext=[f"{t:,g}" for t in _ticks(first, last)])
    else:
        draft.xaxis.update(range=[low / scale, high / scale])
    draft.xaxis.update(title_text=f"completion latency ({unit}{', logarithmic' if log else ''})")
    draft.yaxis.update(range=[0, top], ticksuffix=" ")
    missing = [max(0.0, 100 - float(share.sum())) for share in shares]
    beyond = [f"{'' if len(runs) == 1 else letter(i) + ' '}{'<0.01' if 0 < m < 0.01 else f'{m:.2g}'} %" for i, m in enumerate(missing)]
    return "share of the I/Os in a bin (%)", f"Dotted: the median. Outside the axis: {', '.join(beyond)} of the I/Os."


def _glass(colour: str, pale: bool) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{0.1 if pale else 0.25})"
