"""One number of many runs against the part or option that was turned between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import plotly.graph_objects as go

from ..errors import ConfigError
from . import style
from .runs import RunLike, number
from .style import INK, MARKERS_OF_LINES, RUN_COLOURS, Draft
from .text import TEXT_PX, escape

__all__ = ["sweep"]

LEFT, RIGHT, PLOT_PX = 76, 40, 340


def sweep(lines: Mapping[str, Mapping[float, RunLike]], value: Callable[[RunLike], float], *, x: str, y: str, title: str) -> go.Figure:
    """Draw ``value(run)`` over the number that each run was made with, a line for each name.

    ``lines`` is name → {number: run}, at most six lines; the x axis is logarithmic with base 2, so numbers are positive.  ``x`` and
    ``y`` are the axes' titles, with their units.
    """
    if not lines or len(lines) > len(RUN_COLOURS) or not all(lines.values()):
        raise ConfigError(f"sweep of {len(lines)} lines", f"give 1 to {len(RUN_COLOURS)} lines, each with at least one run")
    knobs = sorted({at for points in lines.values() for at in points})
    if knobs[0] <= 0:
        raise ConfigError(f"sweep over {knobs[0]}", "the x axis is logarithmic: give positive numbers")
    draft, most = Draft(), 0.0
    for i, (name, points) in enumerate(lines.items()):
        at = sorted(points)
        values = [value(points[one]) for one in at]
        most = max(most, *values)
        draft.scatter(
            x=at, y=values, name=escape(name), mode="lines+markers", line=dict(color=RUN_COLOURS[i], width=2.2),
            marker=dict(size=8, symbol=MARKERS_OF_LINES[i]), hovertemplate=f"{escape(x)} %{{x}}: %{{customdata}} {escape(y)}",
            customdata=[number(one) for one in values], showlegend=len(lines) > 1,
        )
    draft.xaxis = dict(type="log", dtick="D1", tickmode="array", tickvals=knobs, ticktext=[f"{knob:g}" for knob in knobs],
                       title=dict(text=escape(x), font=dict(size=TEXT_PX, color=INK)))
    draft.yaxis = dict(rangemode="tozero", range=[0, 1.08 * most or 1])
    firsts = [points[min(points)] for points in lines.values()]
    runs = [run for i, run in enumerate(firsts) if run not in firsts[:i]]
    total = sum(map(len, lines.values()))
    remark = f"{total} runs; below, the first of each line." if total > len(runs) else ""
    return style.finish(draft, runs, kind="sweep", title=title, remark=remark, plot_px=PLOT_PX, left=LEFT, right=RIGHT, y_title=y,
                        legend_dx=9)
