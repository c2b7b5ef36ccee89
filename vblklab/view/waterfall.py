"""One I/O as a waterfall: a row for each step from D1 to U7, a bar from its begin to its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from ..errors import ConfigError
from ..events import STEPS
from . import style
from .runs import RunLike, check_runs, check_unit, has_python, labels, number, parts_of, unit_key
from .style import INK, MUTED, ROOM_COLOURS, ROOM_OF_STEP, Draft, tint
from .text import SMALL_PX, TEXT_PX, escape, text_px

__all__ = ["waterfall"]

LEFT, RIGHT = 286, 60  # JupyterLab beside its file browser shows some 40 pixels less than the whole figure
MOST_LABELLED = 4
_LOOKS = {"Python": "hatched", "by an emulated CPU": "dotted"}
_COLUMNS = ["step", "part", "run", "which", "duration", "start"]


@dataclass(frozen=True, slots=True)
class _Series:
    """One I/O of one run: its begin-to-end stamps in the figure's unit, and how it is drawn."""

    run: RunLike
    label: str
    which: str
    stamps: list[float]
    shade: float
    colours: list[str]


def waterfall(*runs: RunLike, request: int | None = None, percentiles: Sequence[float] = (50, 99), unit: str = "us") -> go.Figure:
    """Draw where the time of one I/O goes, step by step, for each run on one axis.

    Without ``request`` a run shows, for each of ``percentiles``, the sampled I/O whose total time is nearest to that percentile:
    a real I/O, so its steps add up.  ``request`` picks one sampled I/O by its index.  Live runs show the kernel's and the
    hardware's part plain and Python's part hatched, divided by the mean shares of the step.
    """
    check_runs(runs)
    scale, unit_name = check_unit(unit)
    picks = [0.0] if request is not None else _percentiles(percentiles)
    series = [s for i, run in enumerate(runs) for s in _series(run, labels(runs)[i], i, len(runs), request, picks, scale)]
    draft = Draft()
    many = len(series) > MOST_LABELLED
    row_px = 28 if len(series) == 1 else 8 + (8 if many else 15) * len(series)
    height = (1 - 8 / row_px) / len(series)
    for i, one in enumerate(series):
        _bars(draft, one, -0.5 + 4 / row_px + i * height, height, f"s{i}", unit_name, labelled=not many)
    live = has_python(runs)
    _legend(draft, series, runs, unit_name, live)
    end = max(s.stamps[-1] for s in series) or 1.0
    widest = 0 if many else max(text_px(_amount(s, k, unit_name), SMALL_PX) for s in series for k in range(len(STEPS)))
    rows(draft, LEFT, RIGHT)
    draft.xaxis.update(range=[0, end * (1 + (widest + 14) / (style.WIDTH - LEFT - RIGHT - widest - 14))],
                       title_text=f"time since the application's call ({unit_name})")
    title, subtitle, remark = _words(series, runs, request, unit_name)
    return style.finish(draft, runs, kind="waterfall", title=title, subtitle=subtitle, remark=remark, plot_px=row_px * len(STEPS),
                        left=style.EDGE, right=RIGHT)


def rows(draft: Draft, left: int, right: int, extra: Sequence[str] = ()) -> None:
    """Lay out one row a step: names left of the bars, every second row on a faint ground, ``extra`` rows below the steps.

    The bars begin ``left`` pixels from the figure's edge; the figure's own left margin must be ``style.EDGE``.
    """
    names = [f"<b>{s.name}</b>  {escape(f'{s.source} → {s.target}' if s.source != s.target else s.source)}" for s in STEPS]
    names += [f"<b>{escape(name)}</b>" for name in extra]
    plot_px = style.WIDTH - style.EDGE - right
    split = (left - style.EDGE) / plot_px
    draft.xaxis["domain"] = [split, 1]
    draft.xaxis2.update(domain=[0, split], range=[0, left - style.EDGE], anchor="y", visible=False, fixedrange=True)
    draft.yaxis.update(range=[len(names) - 0.5, -0.5], showticklabels=False, showgrid=False, fixedrange=True)
    draft.texts([0] * len(names), range(len(names)), names, "middle right", INK, TEXT_PX - 1, "row names", xaxis="x2")
    draft.shapes += [dict(type="rect", xref="paper", x0=-8 / plot_px, x1=1, y0=k - 0.5, y1=k + 0.5, line=dict(width=0),
                          fillcolor=style.STRIPE, layer="below") for k in range(0, len(STEPS), 2)]


def _percentiles(percentiles: Sequence[float]) -> list[float]:
    if not percentiles or any(not 0 <= p <= 100 for p in percentiles):
        raise ConfigError(f"percentiles={tuple(percentiles)!r}", "give one or more numbers from 0 to 100")
    if len(percentiles) > 4:
        raise ConfigError(f"{len(percentiles)} percentiles on one axis", "give at most 4")
    return [float(p) for p in percentiles]


def _series(
    run: RunLike, label: str, index: int, count: int, request: int | None, picks: Sequence[float], scale: float,
) -> Iterator[_Series]:
    rows = run.rows
    if len(rows) == 0:
        raise ConfigError(f"run {run.title!r} has no sampled I/O", "give a Run that finished at least one I/O")
    if request is not None and not -len(rows) <= request < len(rows):
        raise ConfigError(f"request={request}", f"this run has the sampled I/Os 0 to {len(rows) - 1:,}")
    totals = rows[:, 15] - rows[:, 0]
    order = totals.argsort(kind="stable")
    for k, pick in enumerate(picks):
        row = rows[request if request is not None else order[round(pick / 100 * (len(rows) - 1))]]
        base = [ROOM_COLOURS[ROOM_OF_STEP[s.name]] if count == 1 else style.RUN_COLOURS[index] for s in STEPS]
        shade = 1.0 if len(picks) == 1 else (1.0, 0.5, 0.3, 0.18)[k]
        which = f"I/O {request % len(rows)}" if request is not None else f"p{pick:g}"
        yield _Series(run, label, which, [(int(t) - int(row[0])) / scale for t in row], shade, [tint(c, shade) for c in base])


def _amount(one: _Series, k: int, unit: str) -> str:
    return f"{number(one.stamps[k + 1] - one.stamps[k])} {unit}"


def _bars(draft: Draft, one: _Series, offset: float, height: float, group: str, unit: str, labelled: bool) -> None:
    """The bars of one I/O: whole steps, or for a live run the kernel's part and then Python's part."""
    durations = [one.stamps[k + 1] - one.stamps[k] for k in range(len(STEPS))]
    parts = [(name, [d * share for d, share in zip(durations, shares, strict=True)]) for name, shares in parts_of(one.run)]
    start = one.stamps[:-1]
    for part, lengths in parts:
        last = labelled and part == parts[-1][0]
        draft.bar(
            x=lengths, base=start, y=list(range(len(STEPS))), offset=offset, width=height * 0.94,
            legendgroup=group, showlegend=False, name=f"{one.label} · {one.which} · {part}",
            marker=style.MARKERS.get(part, style.plain)(one.colours),
            customdata=[[s.name, part, one.label, one.which, durations[k], one.stamps[k]] for k, s in enumerate(STEPS)],
            hovertemplate=f"<b>%{{customdata[0]}}</b> {escape(one.which)}, {escape(one.label)}<br>{part} %{{x:.4g}} {unit}"
                          f" of %{{customdata[4]:.4g}} {unit}<br>starts at %{{customdata[5]:.4g}} {unit}<extra></extra>",
            text=[_amount(one, k, unit) for k in range(len(STEPS))] if last else None, textposition="outside" if last else "none",
            cliponaxis=False, textfont=dict(size=SMALL_PX, color=INK), constraintext="none",
            meta={"columns": _COLUMNS, "x_unit": unit_key(unit), "y_unit": "row"})
        start = [s + d for s, d in zip(start, lengths, strict=True)]


def _legend(draft: Draft, series: Sequence[_Series], runs: Sequence[RunLike], unit: str, live: bool) -> None:
    """With several runs a legend row for each series; with one run its percentiles in the row of kinds."""
    per_run = len(series) // len(runs)
    for i, one in enumerate(series):
        value = f" · {one.which} · {number(one.stamps[-1])} {unit}"
        if len(runs) > 1:
            name = labels(runs, style.WIDTH - 80 - text_px(value))[i // per_run] + value
            draft.legend(name, style.plain([one.colours[0]]), group=f"s{i}")
        elif len(series) > 1:
            draft.legend(value.removeprefix(" · "), style.plain([tint(MUTED, one.shade)]), second=True, group=f"s{i}")
    present = list(dict.fromkeys(part for run in runs for part, _ in parts_of(run)))
    if live or len(present) > 1:
        for part in present:
            draft.legend(f"{_LOOKS.get(part, 'plain')}: {part}", style.MARKERS.get(part, style.plain)([MUTED]), second=True)


def _words(series: Sequence[_Series], runs: Sequence[RunLike], request: int | None, unit: str) -> tuple[str, str, str]:
    title = "Where the time of one I/O goes"
    remark = "" if request is not None else (
        "A percentile is the sampled I/O whose total time is nearest to it; its steps add up to its total.")
    if has_python(runs):
        remark = f"{remark} Live bars are split by mean shares.".strip()
    if len(series) == 1:
        return f"{title}: {number(series[0].stamps[-1])} {unit}", f"{series[0].label} · {series[0].which}", remark
    return title, labels(runs)[0] if len(runs) == 1 else "", remark
