"""The words of the path as tables: all steps, or the trace points of one step, from ``events``."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..events import EVENTS, STEPS

__all__ = ["Words", "words"]

_KINDS = {"t": "kernel tracepoint", "f": "kernel function", "q": "QEMU trace event", "m": "model only"}
_NAMES_SHOWN = 4


@dataclass(frozen=True)
class Words:
    """A table of text; ``_repr_html_`` for a notebook, ``str`` for a terminal."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    code: frozenset[int]  # columns that hold names

    def __str__(self) -> str:
        lines = [self.head, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cell = 'style="text-align:left;vertical-align:top;padding:4px 12px 4px 4px"'
        head = "".join(f"<th {cell}>{html.escape(name)}</th>" for name in self.head)
        rows = "".join(f"<tr>{''.join(self._cell(i, text, cell) for i, text in enumerate(row))}</tr>" for row in self.rows)
        return f'<table style="margin:4px 0"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'

    def _cell(self, column: int, text: str, style: str) -> str:
        text = html.escape(text)
        if column in self.code and text:
            text = ", ".join(f"<code>{name}</code>" if name != "…" else name for name in text.split(", "))
        return f"<td {style}>{text}</td>"


def words(step: str | None = None) -> Words:
    """The fifteen steps with the names that real systems report; with a step's name the trace points of that step."""
    if step is None:
        return Words(("step", "from → to", "what happens", "seen as"), tuple(_row(one) for one in STEPS), frozenset({3}))
    if not any(one.name == step for one in STEPS):
        raise ConfigError(f"words({step!r})", f"give one of {', '.join(one.name for one in STEPS)}, or nothing for all steps")
    events = [e for e in EVENTS.values() if e.step == step]
    head: tuple[str, ...] = ("trace point", "kind", "what it says")
    rows: list[tuple[str, ...]] = [(e.name, _KINDS[e.kind], e.meaning) for e in events]
    if any(e.section for e in events):
        head, rows = (*head, "section"), [(*row, e.section) for row, e in zip(rows, events, strict=True)]
    return Words(head, tuple(rows), frozenset({0}))


def _row(step: Any) -> tuple[str, ...]:
    names = list(dict.fromkeys(e.name for e in EVENTS.values() if e.step == step.name and e.kind != "m"))
    seen = names[:_NAMES_SHOWN] + ["…"] * (len(names) > _NAMES_SHOWN)
    where = step.source if step.source == step.target else f"{step.source} → {step.target}"
    return step.name, where, step.meaning, ", ".join(seen)
