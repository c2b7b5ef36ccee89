"""A cost table as text for a terminal and as HTML for a notebook."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .costs import Cost, CostTable

__all__ = ["table_html", "table_text"]

_WIDTH = 118
_LEFT, _RIGHT = 'style="text-align:left"', 'style="text-align:right;white-space:nowrap"'
_HEAD = {"": "boundaries of kernel and hardware, and what the simulator's own rows become"}


def table_text(table: CostTable) -> list[str]:
    """Lines: what the table is, the measured rows with their spread, and which rows were not measured."""
    lines = [f"cost table {table.name}"]
    lines += [line for name, text in table.about.items() for line in _wrapped(f"  {name:10} ", text)]
    for title, rows in _groups(table):
        lines += ["", title, f"  {'':42}{'median':>12}  {'p25':>9} {'p75':>9} {'n':>7}  kind"]
        lines += [f"  {key:42}{_value(key, cost):>12}  {_row(_spread(key, cost))}  {cost.kind}" for key, cost in rows]
    return [*lines, "", *_wrapped("", _others(table))]


def table_html(table: CostTable) -> str:
    """The same for a notebook; the source of a row is its tooltip."""
    about = "".join(
        f"<tr><td {_LEFT}>{html.escape(name)}</td><td {_LEFT}>{html.escape(text)}</td></tr>" for name, text in table.about.items()
    )
    parts = [f"<b>cost table {html.escape(table.name)}</b>", f"<table>{about}</table>" if about else ""]
    for number, (title, rows) in enumerate(_groups(table)):
        body = "".join(
            f'<tr title="{html.escape(cost.source)}"><td {_LEFT}><code>{html.escape(key)}</code></td>'
            f"{''.join(f'<td {_RIGHT}>{cell}</td>' for cell in (_value(key, cost), *_spread(key, cost)))}"
            f"<td {_LEFT}>{html.escape(cost.kind)}</td></tr>"
            for key, cost in rows
        )
        names = "".join(f"<th {_RIGHT}>{name}</th>" for name in ("median", "p25, µs", "p75, µs", "samples"))
        head = f"<tr><th></th>{names}<th {_LEFT}>kind</th></tr>"
        parts.append(f"<details{' open' * (not number)}><summary>{html.escape(title)}</summary><table>{head}{body}</table></details>")
    return f"<div>{''.join(parts)}<p>{html.escape(_others(table))}</p></div>"


def _groups(table: CostTable) -> Iterator[tuple[str, list[tuple[str, Cost]]]]:
    """The measured rows: those of the machine as a whole, then each live machine's own."""
    rows: dict[str, list[tuple[str, Cost]]] = {}
    for key, cost in table.measured.items():
        machine, _, name = key.rpartition("/")
        rows.setdefault(machine, []).append((name, cost))
    for machine, found in sorted(rows.items()):
        yield _HEAD.get(machine, f"in the shape of {machine}: from each trace point to the next one of its thread"), found


def _value(key: str, cost: Cost) -> str:
    return f"{cost.ns:,.0f} B/µs" if key.endswith("bytes_per_us") else f"{cost.ns / 1e3:,.2f} µs"


def _spread(key: str, cost: Cost) -> tuple[str, str, str]:
    """The quartiles in µs and the number of samples; a rate has no quartiles."""
    if key.endswith("bytes_per_us"):
        return "", "", f"{cost.n:,}"
    return f"{cost.p25 / 1e3:,.2f}", f"{cost.p75 / 1e3:,.2f}", f"{cost.n:,}"


def _row(spread: tuple[str, str, str]) -> str:
    return f"{spread[0]:>9} {spread[1]:>9} {spread[2]:>7}"


def _others(table: CostTable) -> str:
    kinds: dict[str, list[str]] = {}
    for key, cost in table.items():
        if not cost.n and "/" not in key:
            kinds.setdefault("measured elsewhere" if cost.kind == "measured" else cost.kind, []).append(key)
    said = [f"{len(keys)} {kind} ({', '.join(keys[:6])}{' …' * (len(keys) > 6)})" for kind, keys in kinds.items()]
    return f"Not measured here: {'; '.join(said)}." if said else ""


def _wrapped(front: str, text: str) -> list[str]:
    return textwrap.wrap(front + text, _WIDTH, subsequent_indent=" " * len(front), break_on_hyphens=False, drop_whitespace=True)
