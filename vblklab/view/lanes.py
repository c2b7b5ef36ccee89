"""Swim lanes: who runs when, from the recorded trace of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from ..errors import ConfigError
from ..events import EVENTS
from ..trace.kernel import leaves
from . import style
from .runs import RunLike, TraceEventLike, check_runs, check_unit, has_python, labels, number, unit_key
from .style import INK, MUTED, ROOM_COLOURS, ROOM_NAMES, Draft
from .text import SMALL_PX, TEXT_PX, escape, fit, text_px, wrap

__all__ = ["lanes"]

MOST_BARS = 3000
FIRST_IOS = 3
LEFT, RIGHT, ROW_PX, LANE_GAP = 110, 24, 26, 0.45
_KINDS = {"t": "kernel tracepoint", "f": "kernel function", "q": "QEMU trace event", "m": "point of this package's model"}
_DONE = ("block_bio_complete", "sys_exit_io_getevents")


@dataclass(frozen=True, slots=True)
class _Bar:
    """One event, lasting until its context's next event."""

    event: TraceEventLike
    begin: int
    end: int


def lanes(run: RunLike, start_ns: int | None = None, end_ns: int | None = None, unit: str = "us") -> go.Figure:
    """Draw which context runs when: lanes for vCPUs, KVM, iothread, main loop, host and disk; bars coloured by room.

    The kernel's work for a thread of QEMU is on the lanes KVM and host; where a main loop only raises interrupts, its calls are on its own.

    ``start_ns`` and ``end_ns`` count from the trace's first event; without them the window holds about the first three I/Os.
    A bar lasts from its trace point to the same context's next one; where the kernel's work ends, its last point is a line.
    At most 3,000 bars are drawn; the caption says when more were there.
    """
    check_runs([run])
    if not run.trace:
        raise ConfigError(f"run {run.title!r} kept no trace", "run it with tracing on; lanes() draws single events")
    scale, unit_name = check_unit(unit)
    zero = run.trace[0].t_ns
    first = 0 if start_ns is None else int(start_ns)
    last = _default_end(run.trace, zero, first) if end_ns is None else int(end_ns)
    if last <= first:
        raise ConfigError(f"start_ns={first}, end_ns={last}", "end_ns must be after start_ns; both count from the trace's first event")
    found = sorted(_bars(run.trace, zero, first, last), key=lambda bar: bar.begin)
    bars, cut = found[:MOST_BARS], len(found) > MOST_BARS
    if not bars:
        raise ConfigError(f"no event from {first:,} ns to {last:,} ns", f"the trace holds 0 to {run.trace[-1].t_ns - zero:,} ns")
    if cut:
        last = bars[-1].begin + 1
        bars = [_Bar(bar.event, bar.begin, min(bar.end, last)) for bar in bars]
    places, names, height = _rows(bars)
    draft = Draft()
    _draw(draft, run, bars, places, first, last, scale, unit_name)
    _lane_names(draft, names)
    draft.yaxis.update(range=[height + 0.1, -0.1], visible=False, fixedrange=True)
    pad = (last - first) * 0.01
    draft.xaxis.update(range=[(first - pad) / scale, (last + pad) / scale], title_text=f"time since the trace's first event ({unit_name})")
    remark = (f"Cut: the first {len(bars):,} of {len(found):,} bars of this window; give start_ns and end_ns to see others." if cut
              else f"A bar lasts until the same context's next trace point; {len(bars):,} bars.")
    if has_python([run]):
        remark += " Hatched: steps that are Python's own time."
    title = f"Who runs when: {number((last - first) / scale)} {unit_name}"
    return style.finish(draft, [run], kind="lanes", title=title, subtitle=labels([run])[0], remark=remark,
                        plot_px=round(ROW_PX * (height + 0.2)), left=LEFT, right=RIGHT)


def _default_end(trace: Sequence[TraceEventLike], zero: int, first: int) -> int:
    """The end of the third I/O after ``first``, or of the trace."""
    for key in _DONE:
        ends = [e.t_ns - zero for e in trace if e.key == key and e.t_ns - zero >= first]
        if ends:
            end = ends[min(FIRST_IOS, len(ends)) - 1]
            return end + max(1, (end - first) // 40)
    return max(first + 1, trace[-1].t_ns - zero)


def _bars(trace: Iterable[TraceEventLike], zero: int, first: int, last: int) -> Iterable[_Bar]:
    """The bars that touch the window; a context's last event has no end and is not drawn."""
    running: dict[str, TraceEventLike] = {}
    for event in trace:
        before = running.get(event.context)
        if before is not None and before.key != "wait":
            begin = before.t_ns - zero
            end = begin if leaves(before.key, before.context) else event.t_ns - zero
            if end > first and begin < last:
                yield _Bar(before, max(begin, first), min(end, last))
        running[event.context] = event


def _order(lane: str) -> tuple[int, str]:
    for rank, word in enumerate(("vcpu", "kvm", "iothread", "main loop", "host", "disk")):
        if lane.lower().startswith(word):
            return rank, lane
    return 9, lane


def _rows(bars: Sequence[_Bar]) -> tuple[dict[tuple[str, str], float], list[tuple[str, float, float]], float]:
    """A row for each context in each lane; contexts that never overlap share one.  Gives places, (lane, top, bottom), height."""
    spans: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for bar in bars:
        spans.setdefault(bar.event.lane, {}).setdefault(bar.event.context, []).append((bar.begin, bar.end))
    places: dict[tuple[str, str], float] = {}
    names: list[tuple[str, float, float]] = []
    y = 0.0
    for lane in sorted(spans, key=_order):
        filled: list[list[tuple[int, int]]] = []
        for context, own in spans[lane].items():
            row = next((r for r in filled if not _overlap(r, own)), None)
            if row is None:
                filled.append(row := [])
            row += own
            row.sort()
            places[lane, context] = y + next(i for i, r in enumerate(filled) if r is row)
        names.append((lane, y, y + len(filled)))
        y += len(filled) + LANE_GAP
    return places, names, y - LANE_GAP


def _overlap(row: Sequence[tuple[int, int]], own: Sequence[tuple[int, int]]) -> bool:
    """Whether two sorted lists of spans overlap anywhere."""
    i = j = 0
    while i < len(row) and j < len(own):
        if row[i][1] <= own[j][0]:
            i += 1
        elif own[j][1] <= row[i][0]:
            j += 1
        else:
            return True
    return False


def _draw(
    draft: Draft, run: RunLike, bars: Sequence[_Bar], places: dict[tuple[str, str], float], first: int, last: int, scale: float, unit: str,
) -> None:
    """One trace of bars for each room."""
    kinds = run.kinds
    px = (style.WIDTH - LEFT - RIGHT) / ((last - first) * 1.02)
    rooms: dict[str, list[_Bar]] = {}
    for bar in bars:
        rooms.setdefault(EVENTS[bar.event.key].room if bar.event.key in EVENTS else "", []).append(bar)
    for room in [*ROOM_COLOURS, ""]:
        if room not in rooms:
            continue
        own, colour, name = rooms[room], ROOM_COLOURS.get(room, MUTED), ROOM_NAMES.get(room, "other")
        wide = [(bar.end - bar.begin) * px for bar in own]
        python = [b.event.key in EVENTS and kinds.get(EVENTS[b.event.key].step) == "python" for b in own]
        marker = (style.hatch if any(python) else style.plain)([colour] * len(own))
        if any(python):
            marker["pattern"]["shape"] = ["/" if p else "" for p in python]
        draft.bar(
            name=name, showlegend=False, x=[(b.end - b.begin) / scale for b in own], base=[b.begin / scale for b in own],
            y=[places[b.event.lane, b.event.context] for b in own], offset=0.06, width=0.88,
            marker={**marker, "line": dict(color=["white" if w > 4 else colour for w in wide], width=0.8)},
            text=[_inside(b.event.key, w) for b, w in zip(own, wide, strict=True)], textposition="inside", insidetextanchor="middle",
            textangle=0, constraintext="none", cliponaxis=True,
            insidetextfont=dict(size=SMALL_PX, color=[INK if p else style.text_on(colour) for p in python]),
            customdata=[[b.event.key, b.event.lane, b.event.context, _args(b.event), _meaning(run, b.event), b.event.t_ns] for b in own],
            hovertemplate="<b>%{customdata[0]}</b> · %{customdata[1]} · %{customdata[2]}<br>%{customdata[4]}<br>%{customdata[3]}"
                          f"<br>at %{{base:,.4f}} {unit} for %{{x:,.4f}} {unit}<extra></extra>",
            meta={"columns": ["key", "lane", "context", "args", "meaning", "t_ns"], "x_unit": unit_key(unit), "y_unit": "row"})
        draft.legend(_SHORT.get(room, name), style.plain([colour]), second=True)


_SHORT = {"app": "app", "guest-stack": "guest stack", "driver": "driver", "kvm": "KVM", "device": "device",
          "host-stack": "host stack", "host-driver": "host driver", "disk": "drive"}


def _inside(key: str, width_px: float) -> str:
    """The event's name if it fits into its bar."""
    name = key.partition(":")[2] or key
    return name if text_px(name, SMALL_PX) + 8 <= width_px else ""


def _args(event: TraceEventLike) -> str:
    names = EVENTS[event.key].args if event.key in EVENTS else ()
    return ", ".join(f"{names[i] if i < len(names) else f'arg{i}'}={value}" for i, value in enumerate(event.args)) or "no arguments"


def _meaning(run: RunLike, event: TraceEventLike) -> str:
    known = EVENTS.get(event.key)
    if known is None:
        return "not declared in events.py"
    lines = [f"{known.step}, {known.name}: {_KINDS.get(known.kind, known.kind)}", *wrap(escape(known.meaning), 380)]
    return "<br>".join([*lines, known.section] if known.section else lines)


def _lane_names(draft: Draft, names: Sequence[tuple[str, float, float]]) -> None:
    plot = style.WIDTH - LEFT - RIGHT
    edge = (style.EDGE - LEFT) / plot
    texts = [style.note(f"<b>{escape(fit(lane, (LEFT - style.EDGE - 8) / 1.08))}</b>", x=edge, xref="paper", xanchor="left",
                        y=(top + bottom) / 2, yanchor="middle", align="left", font=dict(size=TEXT_PX, color=INK), name=lane)
             for lane, top, bottom in names]
    bands = [dict(type="rect", xref="paper", x0=edge - 8 / plot, x1=1, y0=top - 0.1, y1=bottom + 0.1, line=dict(width=0),
                  fillcolor=style.STRIPE, layer="below") for _, top, bottom in names]
    draft.notes += texts
    draft.shapes += bands
