"""Reading answers: a number, step names or one of a few words from whatever was typed; raises Wrong with a hint.

And reading runs: which steps moved between two of them, and whether a number grew.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

from ..events import EVENTS, STEPS
from ..trace.run import Run
from .check import Wrong

__all__ = ["TREND", "a_run", "change", "in_order", "means", "moved", "number", "one_of", "steps_in", "trend"]

_NAMES = tuple(step.name for step in STEPS)
_NONE = frozenset({"", "none", "no", "nothing", "no bar", "no bars", "no step", "no steps"})


def number(answer: Any, unit: str = "") -> float:
    """A finite number, also one written as text: ``58``, ``"58 %"``, ``"4,097 bytes"``."""
    if isinstance(answer, str):
        found = re.fullmatch(r"\s*(?:about|~|≈)?\s*([-+]?[\d,_]*\.?\d+)\s*(?:%|[a-zA-Zµ ]*)\s*", answer)
        if not found:
            raise Wrong(f"A number is wanted{f', in {unit}' if unit else ''}.")
        answer = float(found[1].replace(",", "").replace("_", ""))
    if isinstance(answer, bool) or not isinstance(answer, Real) or not math.isfinite(answer):
        raise Wrong(f"A number is wanted{f', in {unit}' if unit else ''}.")
    return float(answer)


def steps_in(answer: Any) -> frozenset[str]:
    """Names of steps: ``"D4"``, ``"D4, U5"``, ``["D4", "U5"]``, ``"none"``."""
    if isinstance(answer, str) and answer.strip().lower() in _NONE:
        return frozenset()
    words = re.findall(r"\w+", answer) if isinstance(answer, str) else answer
    if not isinstance(words, (list, tuple, set, frozenset)) or not all(isinstance(word, str) for word in words):
        raise Wrong('Give the names of steps, for example `["D2", "U2"]`, or `"none"`.')
    names = frozenset(word.strip().upper() for word in words) - {"AND"}
    for name in sorted(names):
        if name not in _NAMES:
            known = EVENTS.get(name.lower())
            more = f"; `{known.key}` is a trace point, and the question is about the steps" if known else ""
            raise Wrong(f"There is no step `{name[:20]}`: the steps are D1 to D7, HW and U1 to U7{more}.")
    return names


def one_of(**words: str) -> Callable[[Any], str]:
    """A reader for one of some words, each with its other spellings: ``one_of(more="up higher", fewer="down less")``."""
    spelling: Mapping[str, str] = {other: word for word, others in words.items() for other in (word, *others.split())}

    def read(answer: Any) -> str:
        key = answer.strip().lower() if isinstance(answer, str) else "?"
        if key not in spelling:
            raise Wrong(f"Choose one of {', '.join(f'`{word!r}`' for word in words)}.")
        return spelling[key]

    return read


def a_run(given: Any, what: str, *, least_ios: int = 1) -> Run:
    """``given`` if it is a Run with so many I/Os."""
    if not isinstance(given, Run):
        raise Wrong(f"Give {what}: a Run, which is what `recipe.run(machine)` returns.")
    if given.ios < least_ios:
        raise Wrong(f"Give {what}: this one finished no I/O.")
    return given


TREND = one_of(more="up higher faster", fewer="less down lower slower", same="equal unchanged")
"""A reader for how a count or a rate changes; ``trend`` says how it did."""
_SAME = 0.10  # counts and rates that differ by less are the same
_MOVED = 0.02  # of the whole time of an I/O: a bar that changes by less did not move


def trend(old: float, new: float) -> str:
    """``more``, ``fewer`` or ``same``: within a tenth."""
    if abs(new - old) <= _SAME * old:
        return "same"
    return "more" if new > old else "fewer"


def means(run: Run) -> dict[str, float]:
    """Step → its mean time in ns."""
    return {stat.step: stat.mean_ns for stat in run.steps}


def moved(before: Run, after: Run) -> dict[str, str]:
    """The steps whose mean changed by a fiftieth of the whole I/O or more, with how they changed."""
    old, new = means(before), means(after)
    least = _MOVED * sum(old.values())
    return {name: change(old[name], new[name]) for name in old if abs(new[name] - old[name]) >= least}


def change(old_ns: float, new_ns: float) -> str:
    """``1.20 → 3.40 µs``."""
    return f"{old_ns / 1e3:.2f} → {new_ns / 1e3:.2f} µs"


def in_order(names: Iterable[str]) -> str:
    """Steps in the order of the path, as code."""
    wanted = set(names)
    return ", ".join(f"`{step.name}`" for step in STEPS if step.name in wanted) or "none"
