"""A frame of a film as text of fixed width."""

from __future__ import annotations

from functools import partial
from itertools import zip_longest

from .film import Film
from .film_tables import Row, Table, headline, tables_of

__all__ = ["frame_text"]

_STATES = {"written": "?", "available": " ", "used": "."}
_KEY = "r1 a request, r1? written but not published, r1. returned; * changed since the frame before"
_ARROWS = {
    False: "← idx: the next slot; ← event: the other side asks to be told when this slot is filled",
    True: "← driver, device: where each side writes next, with its wrap counter",
}


def frame_text(film: Film, number: int) -> str:
    """The tables of one frame side by side, at most 128 columns wide."""
    frame = film[number]
    first, *rest = tables_of(film, number)
    columns = [[first], rest] if frame.shot.packed else [[first], *([table] for table in rest)]
    blocks = [[line for table in column for line in [*_lines(table), ""]] for column in columns]
    widths = [max(map(_width, column)) for column in columns]
    lines = ["  ".join(f"{line:<{w}}" for line, w in zip(row, widths, strict=True)).rstrip() for row in zip_longest(*blocks, fillvalue="")]
    while not lines[-1]:
        lines.pop()
    name = film.title.rpartition(":")[0] or film.title
    key = [_KEY, _ARROWS[frame.shot.packed]]
    if any(other.on_the_way for other in film):
        key.append("~ stored and on the way: the other side still reads the old value")
    return "\n".join([f"{name} · {headline(film, frame)}", "", *lines, "", *key])


def _width(table: Table) -> int:
    """Of a whole block, so that nothing moves from frame to frame."""
    cells = 5 + sum(width + 1 for _, width in table.columns)
    return max(cells + (table.remark_width + 3 if table.remark_width else 0), len(_title(table)))


def _title(table: Table) -> str:
    return f"{table.title} ({table.writer})"


def _lines(table: Table) -> list[str]:
    head = "".join(f"{name:<{width}} " if name == "flags" else f"{name:>{width}} " for name, width in table.columns)
    lines = [_title(table), f"     {head}".rstrip(), *map(partial(_row, table), table.rows)]
    return lines + ([f"     … {table.left_out:,} more slots"] if table.left_out else [])


def _row(table: Table, row: Row) -> str:
    mark = f"r{row.mark.request}{_STATES[row.mark.state]}" if row.mark else ""
    cells = []
    for (name, width), cell in zip(table.columns, row.cells, strict=True):
        text = f"{cell.shown}*" if cell.changed else f"{cell.shown} "
        cells.append(f"{text:<{width + 1}}" if name == "flags" else f"{text:>{width + 1}}")
    return f"{mark:<4} {''.join(cells)}{' ← ' + row.remark if row.remark else ''}".rstrip()
