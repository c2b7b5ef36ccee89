"""Runs, or a model and a measurement, step by step: what each step costs and by how much it differs from the first run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from ..errors import ConfigError
from ..events import STEPS
from . import style
from .runs import RunLike, check_runs, check_unit, difference, has_python, labels, letter, number, python_part, unit_key
from .style import INK, MUTED, RUN_COLOURS, Draft
from .text import SMALL_PX, TEXT_PX, escape, text_px
from .waterfall import rows

__all__ = ["compare"]

NAMES_PX, COLUMN_PX, RIGHT = 272, 66, 24
TOTAL = "total"
_NO_DIFFERENCE = 0.05  # of the first run's total: an axis shows at least so much
_ROWS = [s.name for s in STEPS] + [TOTAL]


@dataclass(frozen=True, slots=True)
class _Column:
    """One run's time per row, and Python's part of it for a live run."""

    run: RunLike
    label: str
    values: list[float]
    python: list[float | None]


def compare(*runs: RunLike, statistic: str = "mean", unit: str = "us") -> go.Figure:
    """Draw each step's difference to the first run on one axis, in the order of the path, with the total below.

    Give two to four runs, simulated, live or both.  ``statistic`` is ``"mean"`` (the steps add up to the total) or ``"median"``
    (they need not).  The columns beside the bars are each run's own times.
    """
    check_runs(runs, least=2, most=4)
    if statistic not in ("mean", "median"):
        raise ConfigError(f"statistic={statistic!r}", "use one of mean, median")
    scale, unit_name = check_unit(unit)
    columns = [_column(run, label, statistic, scale) for run, label in zip(runs, labels(runs), strict=True)]
    show_python = len(runs) == 2 and has_python(runs)
    left = NAMES_PX + sum(COLUMN_PX * (2 if show_python and c.python[-1] is not None else 1) for c in columns)
    plot_px = style.WIDTH - left - RIGHT
    draft = Draft()
    rows(draft, left, RIGHT, extra=(TOTAL,))
    _table(draft, columns, show_python)
    row_px = 30 if len(runs) == 2 else 10 + 15 * (len(runs) - 1)
    for i in range(1, len(columns)):
        _bars(draft, columns, i, row_px, unit_name, statistic)
    _ranges(draft, columns, plot_px)
    draft.xaxis.update(title_text=f"difference to {letter(0)} in the {statistic} time ({unit_name})",
                       nticks=6, zeroline=True, zerolinecolor=INK, zerolinewidth=1)
    for i, text in enumerate(labels(runs, style.WIDTH - 90)):
        draft.legend(text, style.plain([RUN_COLOURS[i]]), group=f"run {i}")
    remark = "" if statistic == "mean" else "The medians of the steps need not add up to the median of the total."
    return style.finish(draft, runs, kind="compare", title=_title(columns, unit_name), remark=remark, plot_px=row_px * len(_ROWS) + 24,
                        left=style.EDGE, right=RIGHT)


def _column(run: RunLike, label: str, statistic: str, scale: float) -> _Column:
    stat = {s.step: s for s in run.steps}
    if any(s.name not in stat for s in STEPS):
        raise ConfigError(f"run {run.title!r} lacks the times of some steps", "give a Run that finished at least one I/O")
    values = [(stat[s.name].mean_ns if statistic == "mean" else stat[s.name].p50_ns) / scale for s in STEPS]
    total = sum(values) if statistic == "mean" else float(np.median(run.rows[:, 15] - run.rows[:, 0])) / scale
    parts = [python_part(run, s.name) for s in STEPS]
    python = [None if part is None else part * value for part, value in zip(parts, values, strict=True)]
    split = None if any(p is None for p in python) else sum(p for p in python if p is not None)
    return _Column(run, label, [*values, total], [*(p if split is not None else None for p in python), split])


def _title(columns: Sequence[_Column], unit: str) -> str:
    totals = [c.values[-1] for c in columns]
    if len(columns) == 2:
        change = difference(totals[0], totals[1], unit)
        both = f"{letter(0)} {number(totals[0])} {unit}, {letter(1)} {number(totals[1])} {unit} an I/O"
        return f"{both}: {'no difference' if change == '±0' else change}"
    return "Step by step: " + " · ".join(f"{letter(i)} {number(t)} {unit}" for i, t in enumerate(totals))


def _table(draft: Draft, columns: Sequence[_Column], show_python: bool) -> None:
    """The columns of numbers between the names and the bars."""
    x = NAMES_PX - style.EDGE - 14.0
    y = [-0.85, *range(len(_ROWS))]
    for i, one in enumerate(columns):
        x += COLUMN_PX
        texts = [f"<b>{letter(i)}</b>", *_cells(one.values)]
        draft.texts([x] * len(y), y, texts, "middle left", RUN_COLOURS[i], TEXT_PX - 1, f"column {letter(i)}", xaxis="x2")
        if show_python and one.python[-1] is not None:
            x += COLUMN_PX
            texts = ["Python", *_cells(one.python)]
            draft.texts([x] * len(y), y, texts, "middle left", MUTED, SMALL_PX, f"column {letter(i)} Python", xaxis="x2")
    draft.shapes.append(dict(type="line", xref="paper", x0=-8 / (style.WIDTH - style.EDGE - RIGHT), x1=1, y0=len(STEPS) - 0.5,
                             y1=len(STEPS) - 0.5, line=dict(color=MUTED, width=1)))
    draft.yaxis.update(range=[len(_ROWS) - 0.5, -1.3])


def _cells(values: Sequence[float | None]) -> list[str]:
    texts = ["" if value is None else number(value) for value in values]
    return [*texts[:-1], f"<b>{texts[-1]}</b>"]


def _bars(draft: Draft, columns: Sequence[_Column], i: int, row_px: int, unit: str, statistic: str) -> None:
    first, column = columns[0], columns[i]
    height = (1 - 10 / row_px) / (len(columns) - 1)
    deltas = [b - a for a, b in zip(first.values, column.values, strict=True)]
    texts = [difference(a, b) for a, b in zip(first.values, column.values, strict=True)]
    draft.bar(
        x=deltas, y=list(range(len(_ROWS))), offset=-0.5 + 5 / row_px + (i - 1) * height, width=height * 0.92,
        showlegend=False, name=f"{column.label} − {letter(0)}", legendgroup=f"run {i}", marker=style.plain([RUN_COLOURS[i]] * len(_ROWS)),
        text=texts, textposition="outside", textfont=dict(size=SMALL_PX, color=INK), constraintext="none", cliponaxis=False,
        customdata=[[name, first.values[k], column.values[k], column.python[k], texts[k]] for k, name in enumerate(_ROWS)],
        hovertemplate=f"<b>%{{customdata[0]}}</b> {escape(column.label)}<br>{letter(0)} %{{customdata[1]:.4g}} {unit}, "
                      f"{letter(i)} %{{customdata[2]:.4g}} {unit}<br>%{{customdata[4]}}<extra></extra>",
        meta={"columns": ["step", f"{statistic}_{letter(0)}", f"{statistic}_{letter(i)}", f"python_{letter(i)}", "difference"],
              "x_unit": unit_key(unit), "y_unit": "row"})


def _ranges(draft: Draft, columns: Sequence[_Column], plot_px: int) -> None:
    """Leave room for the longest label on either side of the zero line; differences of next to nothing stay short bars."""
    low = high = 0.0
    low_px = high_px = 0.0
    for one in columns[1:]:
        for a, b in zip(columns[0].values, one.values, strict=True):
            width = text_px(difference(a, b), SMALL_PX) + 10
            low, high = min(low, b - a), max(high, b - a)
            low_px, high_px = (max(low_px, width), high_px) if b < a else (low_px, max(high_px, width))
    least = _NO_DIFFERENCE * columns[0].values[-1]
    low, high = (low, high) if high - low >= least else (min(low, -least / 2), max(high, least / 2))
    span = (high - low) or 1.0
    each = span / max(60.0, plot_px - low_px - high_px)
    draft.xaxis.update(range=[low - low_px * each - 4 * each, high + high_px * each + 4 * each])
