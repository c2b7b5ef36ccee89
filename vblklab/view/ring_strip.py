"""Frames of a film below each other, as one figure for a report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from ..errors import ConfigError
from ..ring.shot import AREAS, words_of
from ..trace.film import Film
from . import style
from .ring_panel import MONO, PANEL_WIDTH, Panel, Text, key_row, panel
from .text import escape

__all__ = ["strip"]

MOST_FRAMES, FIRST = 12, 4
_GAP = 14
_POSITION = {"start": "middle right", "middle": "middle center", "end": "middle left"}
_COLUMNS = ["frame", "label", "t_ns", "area", "slot", "field", "value", "changed"]


def strip(film: Film, frames: Sequence[int] | None = None) -> go.Figure:
    """Draw the frames of these numbers (at most 12; without ``frames`` the first four) with chains coloured by request.

    The data that ``vb.export`` writes beside it are the words of these frames.
    """
    numbers = _numbers(film, frames)
    draft = style.Draft()
    top = 0.0
    texts: list[Text] = []
    for part in (*(panel(film, number) for number in numbers), key_row(film)):
        _add(draft, part, top, texts)
        top += part.height + _GAP
    _texts(draft, texts)
    _data(draft, film, numbers)
    draft.xaxis.update(range=[0, PANEL_WIDTH], visible=False, fixedrange=True)
    draft.yaxis.update(range=[top, 0], visible=False, fixedrange=True)
    name = film.title.rpartition(":")[0] or film.title
    runs = [film.run] if film.run is not None else []
    shown = f"frames {', '.join(map(str, numbers))}" if len(numbers) > 1 else f"frame {numbers[0]}"
    return style.finish(draft, runs, kind="ring", title=name[:1].upper() + name[1:],
                        subtitle=f"{shown}; the film has {len(film)}", plot_px=round(top), left=style.EDGE,
                        right=style.EDGE, axis_px=4, remark=film.remark)


def _numbers(film: Film, frames: Sequence[int] | None) -> list[int]:
    if frames is None:
        return list(range(min(FIRST, len(film))))
    if isinstance(frames, int):
        frames = [frames]
    if isinstance(frames, (str, bytes)) or not isinstance(frames, Sequence) or not 1 <= len(frames) <= MOST_FRAMES:
        raise ConfigError(f"strip(frames={frames!r})", f"give 1 to {MOST_FRAMES} numbers of frames, for example [0, 1, 2]")
    return [film.check(number) for number in frames]


def _add(draft: style.Draft, part: Panel, top: float, texts: list[Text]) -> None:
    for box in part.boxes:
        line = dict(width=1 if box.line else 0, color=box.line or "rgba(0,0,0,0)", dash="dot" if box.dashed else "solid")
        draft.shapes.append(dict(type="rect", x0=box.x, x1=box.x + box.width, y0=box.y + top, y1=box.y + box.height + top,
                                 line=line, layer="below", **({"fillcolor": box.fill} if box.fill else {})))
    texts += [text._replace(y=text.y + top) for text in part.texts]


def _texts(draft: style.Draft, texts: Sequence[Text]) -> None:
    """One trace for each way of writing, as plotly.js wants it."""
    ways: dict[tuple[str, int, bool], list[Text]] = defaultdict(list)
    for text in texts:
        ways[text.anchor, text.size, text.mono].append(text)
    for (anchor, size, mono), some in ways.items():
        written = [f"<b>{escape(text.text)}</b>" if text.bold else escape(text.text) for text in some]
        draft.texts([text.x for text in some], [text.y for text in some], written, _POSITION[anchor], [text.colour for text in some],
                    size, "words")
        if mono:
            draft.traces[-1]["textfont"]["family"] = MONO


def _data(draft: style.Draft, film: Film, numbers: Sequence[int]) -> None:
    """The words of the frames as a trace that nobody sees, for the file of data."""
    rows: list[list[Any]] = []
    for number in numbers:
        frame = film[number]
        for area in AREAS:
            for slot in range(-1, frame.shot.layout.size):
                for place in words_of(frame.shot.layout, area, slot) if slot < 0 or (area, slot) in frame.marks else ():
                    value = frame.shot.value(area, place.word.field, slot)
                    rows.append([number, frame.label, frame.t_ns, area, slot, place.word.field, value, place.word in frame.changed])
    draft.scatter(x=[0] * len(rows), y=[0] * len(rows), mode="markers", marker=dict(size=1, opacity=0), hoverinfo="skip", showlegend=False,
                  name="words", customdata=rows, meta={"columns": _COLUMNS})
