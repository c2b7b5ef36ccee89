"""A run as one page for a browser: figures, tables, and where the numbers come from; nothing is fetched from a network."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import plotly.io as pio

from ..errors import ConfigError
from ..events import STEPS
from .latency import latency
from .path_map import path_map
from .runs import number
from .style import CONFIG, FAINT, GRID, INK, MUTED, STRIPE, WIDTH
from .waterfall import waterfall

if TYPE_CHECKING:
    from ..trace.run import Run

__all__ = ["report"]

_STYLE = f"""
body {{ margin: 24px auto; max-width: {WIDTH}px; padding: 0 12px; font: 15px/1.5 Open Sans, Liberation Sans, Arial, Helvetica, sans-serif;
  color: {INK}; background: #fff }}
h1 {{ font-size: 24px; line-height: 1.25; margin: 0 }}
h2 {{ font-size: 18px; margin: 36px 0 8px }}
p.rung {{ color: {MUTED}; margin: 4px 0 16px }}
div.figure {{ margin: 28px 0; overflow-x: auto }}
table {{ border-collapse: collapse; font-size: 14px }}
th, td {{ text-align: left; vertical-align: top; padding: 3px 18px 3px 6px; overflow-wrap: anywhere }}
th {{ border-bottom: 1px solid {FAINT} }}
tr:nth-child(even) td {{ background: {STRIPE} }}
.n {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }}
.k {{ white-space: nowrap; color: {MUTED}; overflow-wrap: normal }}
.bad {{ color: #b3261e; font-weight: bold }}
.missing {{ color: {MUTED}; border: 1px dashed {GRID}; padding: 12px }}
code {{ font-size: 13px }}
"""


def report(run: Run) -> str:
    """The text of a self-contained HTML page about ``run``; a figure that it has no data for is replaced by the reason."""
    state = " · <b>interrupted: a part of the job</b>" if run.interrupted else ""
    made = run.provenance.get("date", "")
    head = f'<meta charset="utf-8"><title>{html.escape(run.title)}</title><style>{_STYLE}</style>'
    title = f'<h1>{html.escape(run.title)}</h1>\n<p class="rung">{html.escape(run.rung)}{made and f" · {html.escape(made)}"}{state}</p>'
    body = "\n".join([title, _result(run), _figures(run), _steps(run), _provenance(run)])
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def _figures(run: Run) -> str:
    """The three figures; the first that can be drawn brings plotly.js along."""
    parts, have_library = [], False
    for draw in (path_map, waterfall, latency):
        try:
            figure = draw(run)
        except ConfigError as error:
            name = draw.__name__.replace("_", " ")
            parts.append(f'<p class="missing">No {name}: {html.escape(str(error))}</p>')
            continue
        div = pio.to_html(figure, config=CONFIG, include_plotlyjs=not have_library, include_mathjax=False, full_html=False)
        have_library = True
        parts.append(f'<div class="figure">{div}</div>')
    return "\n".join(parts)


def _result(run: Run) -> str:
    unit = "simulated ms" if run.simulated else "ms"
    clat = run.clat
    rows = [
        ("I/Os", f"{run.ios:,}, {run.bytes / 2**20:,.1f} MiB"),
        ("time", f"{run.duration_ns / 1e6:,.3f} {unit}"),
        ("rate", f"{run.iops:,.0f} IOPS, {run.bytes * 1e9 / 2**20 / run.duration_ns if run.duration_ns else 0:,.1f} MiB/s"),
        ("completion latency", " · ".join(f"{name} {number(ns / 1e3)} µs" for name, ns in (
            ("mean", clat.mean_ns), ("p50", clat.percentile(50)), ("p99", clat.percentile(99)), ("slowest", clat.max_ns)))),
    ]
    if run.errors or run.mismatches:
        rows.append(("wrong", f"{run.errors:,} I/O errors, {run.mismatches:,} sectors differ from what was written"))
    body = "".join(f'<tr><td class="k">{name}</td><td{_BAD * (name == "wrong")}>{html.escape(text)}</td></tr>' for name, text in rows)
    return f"<table>{body}</table>"


_BAD = ' class="bad"'


def _steps(run: Run) -> str:
    rows = []
    for stat, step in zip(run.steps, STEPS, strict=True):
        if stat.count:
            times = "".join(f'<td class="n">{number(ns / 1e3)}</td>' for ns in (stat.mean_ns, stat.p50_ns, stat.p90_ns, stat.p99_ns))
            where = step.source if step.source == step.target else f"{step.source} → {step.target}"
            rows.append(f"<tr><td><b>{step.name}</b></td><td>{html.escape(where)}</td>{times}<td>{html.escape(stat.kind)}</td></tr>")
    if not rows:
        return ""
    heads = "".join(f'<th class="n">{name}</th>' for name in ("mean µs", "p50", "p90", "p99"))
    return f"<h2>The steps</h2>\n<table><tr><th>step</th><th>from → to</th>{heads}<th>time is</th></tr>{''.join(rows)}</table>"


def _provenance(run: Run) -> str:
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in run.notes)
    parts = [
        "<h2>The recipe</h2>", _pairs(run.recipe, code=True),
        *(["<h2>What the machine took over</h2>", f"<ul>{notes}</ul>"] if notes else []),
        "<h2>Counts</h2>", _pairs({name.replace("_", " "): f"{count:,}" for name, count in run.counters.items()}),
        "<h2>Where these numbers come from</h2>", _pairs(run.provenance),
    ]
    wrong = [line for job in run.jobs for line in job.mismatches]
    if wrong:
        parts[:0] = ["<h2>What verify found</h2>", _lines(wrong)]
    return "\n".join(parts)


def _pairs(pairs: Mapping[str, str], code: bool = False) -> str:
    tag = ("<code>", "</code>") if code else ("", "")
    rows = (f'<tr><td class="k">{html.escape(k)}</td><td>{tag[0]}{html.escape(str(v))}{tag[1]}</td></tr>' for k, v in pairs.items())
    return f"<table>{''.join(rows)}</table>"


def _lines(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"
