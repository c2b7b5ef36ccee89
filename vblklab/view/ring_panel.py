"""One frame of a film as boxes and texts at pixels, drawn alike by plotly (a figure) and as SVG (a player)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

from ..trace.film import Film
from ..trace.film_owners import Mark
from ..trace.film_tables import Row, Table, headline, tables_of
from .style import FAINT, FONT, GRID, INK, MUTED, RUN_COLOURS, STRIPE, text_on, tint
from .text import fit, text_px

__all__ = ["CHANGED", "MONO", "PANEL_WIDTH", "Box", "Panel", "Text", "key_row", "panel", "svg"]

PANEL_WIDTH = 790  # with its margins it fits beside the file browser of JupyterLab
MONO = "Liberation Mono, DejaVu Sans Mono, Consolas, monospace"
CHANGED = "#ffd978"
CELL_PX, SMALL_PX, HEAD_PX = 12, 11, 14
_CHAR, _PAD, _ROW, _CHIP, _GAP = 6.9, 6, 18, 31, 14


class Box(NamedTuple):
    """A rectangle; an empty ``fill`` or ``line`` is none."""

    x: float
    y: float
    width: float
    height: float
    fill: str = ""
    line: str = ""
    dashed: bool = False


class Text(NamedTuple):
    """A text whose middle is at ``y``; ``anchor`` is start, middle or end."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    size: int = CELL_PX
    colour: str = INK
    bold: bool = False
    mono: bool = False


@dataclass(slots=True)
class Panel:
    """What is drawn, in the order of drawing, and how high it is."""

    boxes: list[Box] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    height: float = 0.0


def panel(film: Film, number: int) -> Panel:
    """Frame ``number`` drawn ``PANEL_WIDTH`` pixels wide."""
    frame, drawn = film[number], Panel()
    drawn.boxes.append(Box(0, 0, PANEL_WIDTH, 24, STRIPE))
    drawn.boxes.append(Box(0, 0, 4, 24, INK))
    title = fit(headline(film, frame), PANEL_WIDTH - 24, HEAD_PX * 1.08)
    drawn.texts.append(Text(12, 12, title, size=HEAD_PX, bold=True))
    room = PANEL_WIDTH - 40 - text_px(title, HEAD_PX, bold=True)
    if room > 60:
        drawn.texts.append(Text(PANEL_WIDTH - 8, 12, fit(frame.what(), room, SMALL_PX), "end", SMALL_PX, MUTED))
    first, *rest = tables_of(film, number)
    x = _table(drawn, first, 0, 32)
    if frame.shot.packed:
        y = 32.0
        for table in rest:
            _table(drawn, table, x + _GAP, y)
            y += _height(table) + 14
    else:
        for table in rest:
            x = _table(drawn, table, x + _GAP, 32)
    return drawn


def _height(table: Table) -> float:
    return 36 + _ROW * (len(table.rows) + (table.left_out > 0))


def _table(drawn: Panel, table: Table, left: float, top: float) -> float:
    """Draw a table and return its right edge."""
    widths = [width * _CHAR + _PAD for _, width in table.columns]
    marked = any(name == "slot" for name, _ in table.columns)
    start = left + (_CHIP if marked else 0)
    right = start + sum(widths)
    drawn.texts.append(Text(left, top + 9, f"{table.title}", size=13, bold=True))
    drawn.texts.append(Text(left + 7.5 * len(table.title) + 4, top + 9, table.writer, size=SMALL_PX, colour=MUTED))
    x = start
    for (name, _), width in zip(table.columns, widths, strict=True):
        drawn.texts.append(_cell_text(name, name, x, width, top + 27)._replace(colour=MUTED, size=SMALL_PX, mono=False))
        x += width
    y = top + 36
    drawn.boxes.append(Box(start, y, right - start, _ROW * len(table.rows), "", FAINT))
    for row in table.rows:
        _row(drawn, table, row, left, start, widths, y)
        y += _ROW
    if table.left_out:
        drawn.texts.append(Text(start + 4, y + _ROW / 2, f"… {table.left_out:,} more slots", size=SMALL_PX, colour=MUTED))
        y += _ROW
    drawn.height = max(drawn.height, y + 6)
    remark = 5.6 * table.remark_width + 14 if table.remark_width else 0
    return right + min(remark, 62 if len(table.columns) < 5 else 120)


def _row(drawn: Panel, table: Table, row: Row, left: float, start: float, widths: list[float], y: float) -> None:
    colour = _colour(row.mark)
    if row.mark:
        drawn.boxes.append(Box(start, y, sum(widths), _ROW, tint(colour, 0.07 if row.mark.state == "used" else 0.2)))
        _chip(drawn, row.mark, colour, left, y)
    elif table.columns[0][0] == "slot" and not row.cells[0].text.isdigit():
        drawn.boxes.append(Box(start, y, sum(widths), _ROW, STRIPE))
    x = start
    for (name, _), width, cell in zip(table.columns, widths, row.cells, strict=True):
        if cell.changed or cell.on_the_way:
            drawn.boxes.append(Box(x + 1, y + 1, width - 2, _ROW - 2, CHANGED if cell.changed else "#ffffff", INK, cell.on_the_way))
        if cell.text:
            drawn.texts.append(_cell_text(name, cell.shown, x, width, y + _ROW / 2)._replace(bold=cell.changed))
        x += width
    drawn.boxes.append(Box(start, y + _ROW - 0.5, sum(widths), 0.5, GRID))
    if row.remark:
        drawn.texts.append(Text(x + 3, y + _ROW / 2, f"◂ {row.remark}", size=SMALL_PX, colour=INK))


def _cell_text(column: str, text: str, x: float, width: float, y: float) -> Text:
    if column in ("flags", "word") or (column == "slot" and not text.isdigit() and text != "slot"):
        return Text(x + 5, y, text, mono=True)
    return Text(x + width - 5, y, text, "end", mono=True)


def _colour(mark: Mark | None) -> str:
    return RUN_COLOURS[(mark.request - 1) % len(RUN_COLOURS)] if mark else INK


def _chip(drawn: Panel, mark: Mark, colour: str, x: float, y: float) -> None:
    """The request's name: full while the device has it, dashed before it is published, pale when it is returned."""
    fill = {"available": colour, "written": "#ffffff", "used": tint(colour, 0.25)}[mark.state]
    drawn.boxes.append(Box(x, y + 2, _CHIP - 3, _ROW - 4, fill, colour, mark.state == "written"))
    text = text_on(colour) if mark.state == "available" else INK
    drawn.texts.append(Text(x + (_CHIP - 3) / 2, y + _ROW / 2, f"r{mark.request}", "middle", SMALL_PX, text, mark.state == "available"))


def key_row(film: Film) -> Panel:
    """What chips, marks and arrows mean, as one row."""
    drawn, x, y = Panel(height=24), 0.0, 3.0
    for state, words in (("written", "written, not published"), ("available", "published"), ("used", "returned")):
        _chip(drawn, Mark(1, state), RUN_COLOURS[0], x, y)
        drawn.texts.append(Text(x + _CHIP + 2, y + _ROW / 2, words, size=SMALL_PX, colour=MUTED))
        x += _CHIP + 18 + 6.1 * len(words)
    drawn.boxes.append(Box(x, y + 1, 26, _ROW - 2, CHANGED, INK))
    drawn.texts.append(Text(x + 13, y + _ROW / 2, "7", "middle", bold=True, mono=True))
    drawn.texts.append(Text(x + 32, y + _ROW / 2, "has changed", size=SMALL_PX, colour=MUTED))
    x += 112
    if any(frame.on_the_way for frame in film):
        drawn.boxes.append(Box(x, y + 1, 26, _ROW - 2, "#ffffff", INK, dashed=True))
        drawn.texts.append(Text(x + 13, y + _ROW / 2, "7~", "middle", mono=True))
        drawn.texts.append(Text(x + 32, y + _ROW / 2, "stored, the other side still reads the old", size=SMALL_PX, colour=MUTED))
    else:
        arrows = "◂ where a side writes next, its wrap" if film[0].shot.packed else "◂ idx: next slot   ◂ event: tell me of this slot"
        drawn.texts.append(Text(x, y + _ROW / 2, arrows, size=SMALL_PX, colour=MUTED))
    return drawn


def svg(parts: Sequence[tuple[Panel, float]], height: float) -> str:
    """Panels at their heights as one SVG element on a white ground, ``height`` pixels high."""
    width = PANEL_WIDTH + 8
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:g}" viewBox="-4 0 {width} {height:g}"'
           f' font-family="{FONT}"><rect x="-4" width="100%" height="100%" fill="#fff"/>']
    texts: dict[str, list[str]] = {}
    for drawn, top in parts:
        for box in drawn.boxes:
            line = f' stroke="{box.line}"' + ' stroke-dasharray="3 2"' * box.dashed if box.line else ""
            place = f'x="{box.x:g}" y="{box.y + top:g}" width="{box.width:g}" height="{box.height:g}"'
            out.append(f'<rect {place} fill="{box.fill or "none"}"{line}/>')
        for text in drawn.texts:
            look = f'font-size="{text.size}" fill="{text.colour}"' + f' text-anchor="{text.anchor}"' * (text.anchor != "start")
            look += ' font-weight="bold"' * text.bold + f' font-family="{MONO}"' * text.mono
            y = text.y + top + 0.35 * text.size
            texts.setdefault(look, []).append(f'<text x="{text.x:g}" y="{y:g}">{escape(text.text)}</text>')
    out += [f"<g {look}>{''.join(some)}</g>" for look, some in texts.items()]
    return "".join([*out, "</svg>"])
