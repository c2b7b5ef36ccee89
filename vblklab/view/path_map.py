"""The picture of the kit: eight rooms, seven arrows down, seven up, each with the time that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from ..errors import ConfigError
from ..events import EVENTS, STEPS
from . import style
from .runs import RunLike, StepStatLike, check_runs, check_unit, difference, has_python, labels, letter, number, python_part
from .style import FAINT, INK, MUTED, ROOM_COLOURS, ROOM_NAMES, ROOM_OF_STEP, Draft, note, tint
from .text import SMALL_PX, TEXT_PX, balanced, escape, wrap

__all__ = ["path_map"]

BOX_LEFT, BOX_WIDTH, BOX_PX = 254, 276, 44
PLOT_WIDTH = style.WIDTH - 2 * style.EDGE
LEFT_TEXT, RIGHT_TEXT = BOX_LEFT - 18, BOX_LEFT + BOX_WIDTH + 36
DOWN_X, UP_X = BOX_LEFT + 0.26 * BOX_WIDTH, BOX_LEFT + 0.74 * BOX_WIDTH
UNLIT = "#d9dee3"
SIDES = (("guest", 0, 2), ("hypervisor", 3, 4), ("host", 5, 7))
INSIDE = {
    "app": "issues I/O: fio, a database", "guest-stack": "VFS, page cache, block layer", "driver": "fills the ring, rings the doorbell",
    "kvm": "traps, eventfds, interrupts", "device": "pops chains, fills the used ring", "host-stack": "VFS, page cache, block layer",
    "host-driver": "NVMe, SATA or a RAM disk",
}
_STEP = {step.name: step for step in STEPS}
_DOWN, _UP = [f"D{n}" for n in range(1, 8)], [f"U{n}" for n in range(7, 0, -1)]
_STATISTICS = {"mean": "mean_ns", "median": "p50_ns"}


@dataclass(frozen=True, slots=True)
class _Times:
    """One run's time per step in the figure's unit."""

    run: RunLike
    step: dict[str, float]
    stat: dict[str, StepStatLike]
    total: float

    def share(self, step: str) -> float:
        return self.step[step] / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True)
class _Sheet:
    """What every part of the drawing needs: the times, the lit steps, and how far apart the boxes stand."""

    times: list[_Times]
    unit: str
    lit: frozenset[str]
    points: bool
    """Lit steps name their trace points (the plain map with a highlight)."""

    @property
    def gap_px(self) -> int:
        return (62 if self.points else 50, 50, 54, 74)[len(self.times)]

    def top(self, box: int) -> int:
        return box * (BOX_PX + self.gap_px)

    def middle_of_gap(self, gap: int) -> float:
        return self.top(gap + 1) - self.gap_px / 2


def path_map(
    run: RunLike | None = None, *others: RunLike, highlight: Sequence[str] = (), statistic: str = "mean", unit: str = "us",
) -> go.Figure:
    """Draw the path of one I/O; with runs, each arrow carries its time and is as wide as its part of the whole path.

    ``highlight`` lights some steps and dims the others; without a run it gives the plain map.  ``statistic`` is ``"mean"``
    (its shares add up) or ``"median"``.  At most three runs; the second and third show their difference to the first.
    """
    runs = [] if run is None else [run, *others]
    check_runs(runs, least=0, most=3)
    asked = (highlight,) if isinstance(highlight, str) else tuple(highlight)
    for name in asked:
        if name not in _STEP:
            raise ConfigError(f"highlight={name!r}", f"use steps of {', '.join(_STEP)}")
    highlight = [name for name in _STEP if name in asked]
    if statistic not in _STATISTICS:
        raise ConfigError(f"statistic={statistic!r}", f"use one of {', '.join(_STATISTICS)}")
    scale, unit_name = check_unit(unit)
    sheet = _Sheet([_times(r, _STATISTICS[statistic], scale) for r in runs], unit_name, frozenset(highlight) or frozenset(_STEP),
                   points=bool(highlight) and not runs)
    draft = style.Draft()
    _sides(draft, sheet)
    _boxes(draft, sheet)
    for names, x, position in ((_DOWN, LEFT_TEXT, "middle left"), (_UP, RIGHT_TEXT, "middle right")):
        for gap, name in enumerate(names):
            _arrow(draft, sheet, name, gap)
        draft.texts([x] * 7, [sheet.middle_of_gap(gap) for gap in range(7)], [_label(sheet, name) for name in names], position,
                    [INK if name in sheet.lit else FAINT for name in names], TEXT_PX, f"labels {names[0][0]}")
    plot_px = sheet.top(7) + BOX_PX + 6
    draft.xaxis.update(visible=False, range=[0, PLOT_WIDTH], fixedrange=True)
    draft.yaxis.update(visible=False, range=[plot_px - 1, -1], fixedrange=True)
    _hover(draft, sheet, statistic)
    title, subtitle, remark = _words(sheet, statistic, highlight)
    return style.finish(draft, runs, kind="path_map", title=title, subtitle=subtitle, remark=remark, plot_px=plot_px, left=style.EDGE,
                        right=style.EDGE, axis_px=14)


def _times(run: RunLike, field: str, scale: float) -> _Times:
    stat = {s.step: s for s in run.steps}
    missing = [name for name in _STEP if name not in stat]
    if missing:
        raise ConfigError(f"run {run.title!r} has no times for {', '.join(missing)}", "give a Run that finished at least one I/O")
    step = {name: float(getattr(stat[name], field)) / scale for name in _STEP}
    if not sum(step.values()):
        raise ConfigError(f"run {run.title!r} has no finished I/O", "give a Run that finished at least one I/O")
    return _Times(run, step, stat, sum(step.values()))


def _words(sheet: _Sheet, statistic: str, highlight: Sequence[str]) -> tuple[str, str, str]:
    runs = [t.run for t in sheet.times]
    if not runs:
        what = " · ".join(f"{name}: {_STEP[name].meaning}" for name in highlight) if len(highlight) < 3 else f"Lit: {', '.join(highlight)}"
        return "The path of one virtio-blk I/O", what or "Seven steps down (D1 to D7), the drive's work (HW), seven steps up (U1 to U7)", ""
    remark = f"Times are the {statistic} of each step; the width of an arrow is proportional to its time."
    if has_python(runs):
        remark += " Live: full colour is kernel, hardware or an emulated CPU, pale is Python."
    if len(runs) == 1:
        return f"The path of one I/O: {number(sheet.times[0].total)} {sheet.unit}", labels(runs)[0], remark
    totals = " · ".join(f"{letter(i)} {number(t.total)} {sheet.unit}" for i, t in enumerate(sheet.times))
    return f"The path of one I/O: {totals}", f"Differences are to {letter(0)}", remark


def _sides(draft: Draft, sheet: _Sheet) -> None:
    """Faint bands that say which boxes are guest, hypervisor and host."""
    for name, first, last in SIDES:
        top, bottom = max(0, sheet.top(first) - 7), sheet.top(last) + BOX_PX + (7 if last < 7 else 4)
        draft.shapes.append(dict(type="rect", x0=BOX_LEFT - 10, x1=BOX_LEFT + BOX_WIDTH + 26, y0=top, y1=bottom, layer="below",
                           line=dict(width=0), fillcolor="#f1f3f5"))
        draft.notes.append(note(name, x=BOX_LEFT + BOX_WIDTH + 14, y=(top + bottom) / 2, textangle=90,
                                font=dict(size=SMALL_PX, color=MUTED)))


def _boxes(draft: Draft, sheet: _Sheet) -> None:
    near = {room for name in sheet.lit for room in _ends(name)}
    texts: list[str] = []
    for i, (room, title) in enumerate(ROOM_NAMES.items()):
        top, on = sheet.top(i), room in near
        colour = ROOM_COLOURS[room]
        draft.shapes.append(dict(type="rect", layer="below", x0=BOX_LEFT, x1=BOX_LEFT + BOX_WIDTH, y0=top, y1=top + BOX_PX,
                           fillcolor=tint(colour, 0.22) if on else "white",
                           line=dict(color=colour if on else tint(colour, 0.5), width=1.5)))
        draft.shapes.append(dict(type="rect", layer="below", x0=BOX_LEFT, x1=BOX_LEFT + 7, y0=top, y1=top + BOX_PX, line=dict(width=0),
                           fillcolor=colour if on else tint(colour, 0.5)))
        below = _hardware(sheet) if room == "disk" else INSIDE[room]
        texts.append(f"<b>{title}</b><br>{_small(below, MUTED if on else FAINT, markup=True)}")
    draft.texts([BOX_LEFT + BOX_WIDTH / 2 + 3] * 8, [sheet.top(i) + BOX_PX / 2 for i in range(8)], texts, "middle center",
                [INK if room in near else FAINT for room in ROOM_NAMES], TEXT_PX, "rooms")


def _ends(name: str) -> tuple[str, ...]:
    """The two rooms that the arrow of a step joins; of HW only the hardware."""
    rooms = list(ROOM_NAMES)
    if name == "HW":
        return ("disk",)
    upper = int(name[1]) - 1 if name[0] == "D" else 7 - int(name[1])
    return rooms[upper], rooms[upper + 1]


def _hardware(sheet: _Sheet) -> str:
    if not sheet.times:
        return "HW: its own queue and the media"
    texts = [f"<b>{number(t.step['HW'])} {sheet.unit}</b>" for t in sheet.times]
    if len(texts) == 1:
        return f"HW {texts[0]} · {100 * sheet.times[0].share('HW'):.0f} %"
    return "HW " + " · ".join(f'<span style="color:{style.RUN_COLOURS[i]}">{letter(i)} {text}</span>' for i, text in enumerate(texts))


def _arrow(draft: Draft, sheet: _Sheet, name: str, gap: int) -> None:
    """A fat arrow in the gap between two boxes; one for each run, as wide as its time, pale where Python took it."""
    count = max(1, len(sheet.times))
    span = (112, 62, 42)[count - 1]
    widest = max((t.step[s] for t in sheet.times for s in _STEP if s != "HW"), default=1.0) or 1.0
    for i in range(count):
        width = 2.5 + (span - 16) * sheet.times[i].step[name] / widest if sheet.times else 9.0
        colour = (ROOM_COLOURS[ROOM_OF_STEP[name]] if count == 1 else style.RUN_COLOURS[i]) if name in sheet.lit else UNLIT
        python = python_part(sheet.times[i].run, name) if sheet.times else None
        x = (UP_X if name[0] == "U" else DOWN_X) + (i - (count - 1) / 2) * span
        place = (x, sheet.top(gap) + BOX_PX + 3, sheet.gap_px - 6)
        parts = [(1.0, colour)] if python is None else [(1.0, tint(colour, 0.45)), (1 - python, colour)]
        draft.shapes += [dict(type="path", layer="below", line=dict(width=0), fillcolor=fill,
                              path=_arrow_path(*place, width, name[0] == "U", part)) for part, fill in parts if part > 0]


def _arrow_path(x: float, top: float, length: float, width: float, up: bool, part: float = 1.0) -> str:
    """The outline of an arrow; ``part`` below 1 keeps that much of its shaft, from the left."""
    head, half, wide = 15.0, width / 2, width / 2 + 6
    tail, neck, tip = (top + length, top + head, top) if up else (top, top + length - head, top + length)
    corners = [(x - half, tail), (x - half, neck), (x - wide, neck)]
    cut = x - half + part * width
    if part < 1:
        corners += [(x, tip)] * (cut > x) + [(cut, neck + (tip - neck) * (1 - abs(cut - x) / wide)), (cut, tail)]
    else:
        corners += [(x, tip), (x + wide, neck), (x + half, neck), (x + half, tail)]
    return "M" + " L".join(f"{px:.1f},{py:.1f}" for px, py in corners) + " Z"


def _small(text: str, colour: str, markup: bool = False) -> str:
    return f'<span style="font-size:{SMALL_PX}px;color:{colour}">{text if markup else escape(text)}</span>'


def _label(sheet: _Sheet, name: str) -> str:
    """The text beside an arrow: the step and its time, then what happens there."""
    right, lit = name[0] == "U", name in sheet.lit
    width = PLOT_WIDTH - RIGHT_TEXT if right else LEFT_TEXT
    soft = MUTED if lit else FAINT
    meaning = [_small(line, soft) for line in balanced(_STEP[name].meaning, width, SMALL_PX)]
    if not sheet.times:
        lines = [f"<b>{name}</b>", *meaning, *(_points(name, width, 4 - len(meaning)) if sheet.points and lit else [])]
    elif len(sheet.times) == 1:
        lines = [f"<b>{name}</b>  {_single(sheet, name, soft)}", *meaning]
    else:
        first = _run_line(sheet, name, 0)
        lines = [f"{first}   <b>{name}</b>" if not right else f"<b>{name}</b>   {first}"]
        lines += [_run_line(sheet, name, i) for i in range(1, len(sheet.times))] + meaning
    return "<br>".join(lines)


def _single(sheet: _Sheet, name: str, soft: str) -> str:
    times = sheet.times[0]
    share = 100 * times.share(name)
    python = python_part(times.run, name)
    small = f"{share:.{1 if share < 9.95 else 0}f} %"
    if python is not None and python > 0.005:
        small += f" · Python {number(python * times.step[name], like=times.step[name])} {sheet.unit}"
    return f'<span style="font-size:{TEXT_PX + 2}px"><b>{number(times.step[name])} {sheet.unit}</b></span>  {_small(small, soft)}'


def _points(name: str, width: float, most: int) -> list[str]:
    """The names of a step's trace points, as the real systems report them, in at most ``most`` lines."""
    names = list(dict.fromkeys(e.name for e in EVENTS.values() if e.step == name and e.kind != "m"))
    for count in range(len(names), 0, -1):
        lines = balanced(", ".join(names[:count]) + (", …" if count < len(names) else ""), width, SMALL_PX)
        if len(lines) <= most:
            return [f"<i>{_small(line, MUTED)}</i>" for line in lines]
    return []


def _run_line(sheet: _Sheet, name: str, i: int) -> str:
    first, value = sheet.times[0].step[name], sheet.times[i].step[name]
    lit = name in sheet.lit
    text = f'<span style="color:{style.RUN_COLOURS[i] if lit else FAINT}">{letter(i)} <b>{number(value)} {sheet.unit}</b></span>'
    return text if i == 0 else f"{text}  {_small(difference(first, value), INK if lit else FAINT)}"


def _hover(draft: Draft, sheet: _Sheet, statistic: str) -> None:
    """Unseen points over the arrows: they carry the hover text, the legend of the runs and the data for the CSV."""
    xs = [DOWN_X] * 7 + [BOX_LEFT + BOX_WIDTH / 2] + [UP_X] * 7
    down = [sheet.middle_of_gap(gap) for gap in range(7)]
    ys = [*down, sheet.top(7) + BOX_PX / 2, *reversed(down)]
    columns = ["step", "arrow", "meaning", "trace_points"]
    hover = "<b>%{customdata[0]}</b> %{customdata[1]}<br>%{customdata[2]}<br><i>%{customdata[3]}</i>"
    fields = ("mean_ns", "p50_ns", "p90_ns", "p99_ns")
    if sheet.times:
        columns += [f"{statistic}_{sheet.unit.replace('µ', 'u')}", "share", *fields]
        hover += (f"<br><b>%{{customdata[4]:.4g}} {sheet.unit}</b> · %{{customdata[5]:.1%}}<br>mean %{{customdata[6]:,.0f}} ns"
                  " · p50 %{customdata[7]:,.0f} ns · p90 %{customdata[8]:,.0f} ns · p99 %{customdata[9]:,.0f} ns")
    names = {s.name: wrap(", ".join(dict.fromkeys(e.name for e in EVENTS.values() if e.step == s.name)), 420) for s in STEPS}
    texts = labels([t.run for t in sheet.times], style.WIDTH - 80) if sheet.times else ["the path"]
    span = (112, 62, 42)[max(1, len(texts)) - 1]
    for i, text in enumerate(texts):
        rows: list[list[Any]] = [[s.name, f"{s.source} → {s.target}", s.meaning, "<br>".join(names[s.name])] for s in STEPS]
        if sheet.times:
            t = sheet.times[i]
            rows = [[*row, t.step[row[0]], t.share(row[0]), *(float(getattr(t.stat[row[0]], f)) for f in fields)] for row in rows]
        draft.scatter(
            x=[x + (i - (len(texts) - 1) / 2) * span for x in xs], y=ys, mode="markers", name=text, customdata=rows, showlegend=False,
            hovertemplate=hover + "<extra></extra>", marker=dict(size=36, symbol="square", color="rgba(0,0,0,0)", line=dict(width=0)),
            meta={"columns": columns, "x_unit": "px", "y_unit": "px"})
        if len(texts) > 1:
            draft.legend(text, style.plain([style.RUN_COLOURS[i]]))
