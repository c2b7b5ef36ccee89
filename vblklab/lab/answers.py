"""Reading answers: a number, step names or one of a few words from whatever was typed; raises Wrong with a hint."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from ..events import EVENTS, STEPS
from ..trace.run import Run
from .check import Wrong

__all__ = ["a_run", "number", "one_of", "steps_in"]

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
