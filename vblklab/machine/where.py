"""Where a stepped machine stands: the chain of functions that are inside a trace point, with the line of source."""

from __future__ import annotations

import html
import linecache
from dataclasses import dataclass
from typing import Any

from ..events import EVENTS, STEPS

__all__ = ["Where", "where"]

_ARROWS = {step.name: step for step in STEPS}


@dataclass(frozen=True)
class Where:
    """One place on the path.  ``functions`` from the context's own down to the one that hit the trace point."""

    now_ns: int
    context: str
    key: str
    name: str
    step: str
    room: str
    meaning: str
    section: str
    functions: tuple[str, ...]
    line: str

    def __str__(self) -> str:
        if not self.key:
            return "before the first trace point: step() goes to it"
        arrow = _ARROWS[self.step]
        section = f"  ({self.section})" if self.section else ""
        return (
            f"{self.step}  {arrow.source} → {arrow.target}\n"
            f"{self.name}: {self.meaning}{section}\n"
            f"in {' → '.join(self.functions)}, on {self.context}\n"
            f"    {self.line}"
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def where(last: Any, now_ns: int) -> Where:
    """Describe the trace point that a machine stands at; ``last`` is an observe.Seen or None."""
    if last is None:
        return Where(now_ns, "", "", "", "", "", "", "", (), "")
    context, ev = last.context, last.ev
    event = EVENTS[ev[0]]
    functions, line = [], ""
    generator = context.generator
    while generator is not None:
        code = generator.gi_code
        functions.append(getattr(code, "co_qualname", code.co_name))
        if generator.gi_frame is not None:
            line = linecache.getline(code.co_filename, generator.gi_frame.f_lineno).strip()
        generator = generator.gi_yieldfrom
        if not hasattr(generator, "gi_code"):
            break
    return Where(now_ns, context.name, event.key, event.name, event.step, event.room, event.meaning, event.section, tuple(functions), line)
