"""What a picture reads of a run: the seam to ``trace.Run``, its label, its units and its provenance caption."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..errors import ConfigError
from ..events import STEPS
from .text import fit, text_px

__all__ = [
    "RunLike",
    "as_runs",
    "caption",
    "check_runs",
    "check_unit",
    "difference",
    "emulated",
    "has_python",
    "labels",
    "letter",
    "number",
    "origin",
    "parts_of",
    "provenance_text",
    "python_part",
    "unit_key",
]

MOST_RUNS = 6
UNITS = {"ns": (1.0, "ns"), "us": (1e3, "µs"), "ms": (1e6, "ms")}
_SHOWN = {
    True: {"model": "model {}", "cost table": "cost table {}", "seed": "seed {}"},
    False: {"host": "{}", "cpu": "{}", "kernel": "kernel {}", "kvm": "KVM: {}", "python": "{}", "tracing": "tracing: {}",
            "kernel trace": "kernel trace: {}",            "clock": "{}", "probe cost": "probe cost {}"},
}
"""What a caption shows of the provenance, for simulated and for other runs; the file beside an exported figure has all of it."""


class HistogramLike(Protocol):
    @property
    def count(self) -> int: ...
    @property
    def min_ns(self) -> float: ...
    @property
    def max_ns(self) -> float: ...
    @property
    def mean_ns(self) -> float: ...
    def percentile(self, p: float, /) -> float: ...
    def bins(self) -> Sequence[tuple[float, int]]: ...


class StepStatLike(Protocol):
    @property
    def step(self) -> str: ...
    @property
    def mean_ns(self) -> float: ...
    @property
    def p50_ns(self) -> float: ...
    @property
    def p90_ns(self) -> float: ...
    @property
    def p99_ns(self) -> float: ...


class TraceEventLike(Protocol):
    @property
    def t_ns(self) -> int: ...
    @property
    def context(self) -> str: ...
    @property
    def lane(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def args(self) -> tuple[int, ...]: ...


class RunLike(Protocol):
    """The part of a Run that the pictures read; every property is as ``trace.Run`` documents it."""

    @property
    def title(self) -> str: ...
    @property
    def rung(self) -> str: ...
    @property
    def simulated(self) -> bool: ...
    @property
    def provenance(self) -> Mapping[str, str]: ...
    @property
    def recipe(self) -> Mapping[str, str]: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def counters(self) -> Mapping[str, int]: ...
    @property
    def ios(self) -> int: ...
    @property
    def iops(self) -> float: ...
    @property
    def errors(self) -> int: ...
    @property
    def mismatches(self) -> int: ...
    @property
    def interrupted(self) -> bool: ...
    @property
    def rows(self) -> Any: ...
    @property
    def kinds(self) -> Mapping[str, str]: ...
    @property
    def split(self) -> Mapping[str, tuple[float, float]]: ...
    @property
    def steps(self) -> Sequence[StepStatLike]: ...
    @property
    def clat(self) -> HistogramLike: ...
    @property
    def trace(self) -> Sequence[TraceEventLike] | None: ...


def as_runs(runs: RunLike | Sequence[RunLike] | None) -> list[RunLike]:
    """One run, several or none, as a list."""
    if runs is None:
        return []
    return list(runs) if isinstance(runs, Sequence) and not isinstance(runs, str) else [runs]


def check_runs(runs: Sequence[RunLike], least: int = 1, most: int = MOST_RUNS) -> None:
    """Refuse, typed, a number of runs that one axis cannot show."""
    if len(runs) < least:
        raise ConfigError(f"{len(runs)} runs to draw", f"give at least {least}, for example the result of boot(...).run()")
    if len(runs) > most:
        raise ConfigError(f"{len(runs)} runs on one axis", f"give at most {most}, or draw several figures")
    for run in runs:
        if not hasattr(run, "provenance"):
            raise ConfigError(f"cannot draw a {type(run).__name__}", "give the Run that boot(...).run() returns")


def check_unit(unit: str) -> tuple[float, str]:
    """Nanoseconds per ``unit`` and the unit's printed name."""
    if unit not in UNITS:
        raise ConfigError(f"unit={unit!r}", f"use one of {', '.join(UNITS)}")
    return UNITS[unit]


def unit_key(printed: str) -> str:
    """A printed unit as a plain word for a data file: ``us`` for ``µs``."""
    return printed.replace("µ", "u")


def letter(index: int) -> str:
    """``A`` for the first run of a figure, ``B`` for the second."""
    return chr(ord("A") + index)


def origin(run: RunLike) -> str:
    """``simulated``, ``live`` or ``live, recorded``: the words that every legend carries; also that a guest's time is emulated."""
    if run.simulated:
        return "simulated"
    return "live" + (", recorded" if run.rung.startswith("L1") else "") + (", guest emulated" if emulated(run) else "")


def labels(runs: Sequence[RunLike], room_px: float | None = None) -> list[str]:
    """Legend texts: letter (when there are several), title and origin; the title is cut so that all of it fits ``room_px``."""
    out = []
    for i, (run, title) in enumerate(zip(runs, _titles(runs), strict=True)):
        front, back = "" if len(runs) == 1 else f"{letter(i)} · ", f" ({origin(run)})"
        shown = title if room_px is None else fit(title, room_px - text_px(front))
        if origin(run) not in shown:
            shown = (title if room_px is None else fit(title.removesuffix(back), room_px - text_px(front + back))) + back
        out.append(front + shown)
    return out


def _titles(runs: Sequence[RunLike]) -> list[str]:
    """The runs' titles; where two are the same, each with what differs: parts of the recipe, seed, cost table."""
    titles = [" ".join(run.title.split()) for run in runs]
    if len(set(titles)) == len(titles):
        return titles
    recipes = [{**run.recipe, "seed": _fact(run, "seed"), "costs": _fact(run, "cost table")} for run in runs]
    for part in recipes[0]:
        for i, text in enumerate(_apart([recipe.get(part, "") for recipe in recipes])):
            titles[i] += f" · {part} {text}" if text else ""
    return titles


def _fact(run: RunLike, name: str) -> str:
    return run.provenance.get(name, "").partition(" (")[0]


def _apart(texts: Sequence[str]) -> list[str]:
    """Of calls of one name the arguments that not all of them have, of other texts the whole; nothing if they are the same."""
    if len(set(texts)) == 1:
        return [""] * len(texts)
    calls = [re.fullmatch(r"(\w+)\((.*)\)", text) for text in texts]
    if any(call is None for call in calls) or len({call[1] for call in calls if call}) > 1:
        return list(texts)
    arguments = [call[2].split(", ") for call in calls if call]
    return [", ".join(one for one in own if not all(one in other for other in arguments)).replace("'", "") for own in arguments]


def number(value: float, sign: bool = False, like: float | None = None) -> str:
    """Three significant digits without an exponent: 0.0123, 1.92, 88.2, 1,234; or as many decimals as ``like`` would get."""
    size = abs(value if like is None else like)
    if not size:
        return "0"
    digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.0995 else min(6, 1 - math.floor(math.log10(size)))
    text = f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def difference(first: float, value: float, unit: str = "") -> str:
    """``+1.48 (+77 %)``, with the unit if given, ``±0`` when it rounds to nothing, and a factor above five-fold."""
    delta = value - first
    like = max(abs(first), abs(value))
    text = number(delta, sign=True, like=like)
    if not any(c in "123456789" for c in text) or abs(delta) < 0.005 * abs(first):
        return "±0"
    text = f"{text} {unit}".rstrip()
    if not first:
        return text
    if value > 5 * first:
        return f"{text} (×{value / first:.{0 if value > 9.95 * first else 1}f})"
    return f"{text} ({100 * delta / first:+.0f} %)".replace("-", "\N{MINUS SIGN}")


def python_part(run: RunLike, step: str) -> float | None:
    """The part of a live step (0 to 1) that is Python's own time; None for a simulated step."""
    kind = run.kinds.get(step, "simulated" if run.simulated else "kernel/hardware")
    if kind == "mixed":
        hard, soft = run.split.get(step, (0.0, 0.0))
        return float(soft / (hard + soft)) if hard + soft else 0.0
    return {"simulated": None, "python": 1.0}.get(kind, 0.0)


def emulated(run: RunLike) -> list[str]:
    """The steps whose time an emulated CPU spent (QEMU's TCG, a KVM that emulates ring 0): it says nothing about hardware."""
    return [step for step, kind in run.kinds.items() if kind == "emulated"]


def parts_of(run: RunLike) -> list[tuple[str, list[float]]]:
    """Whose time a step is: for each part that the run has, its share (0 to 1) of every step."""
    if run.simulated:
        return [("simulated", [1.0] * len(STEPS))]
    slow = set(emulated(run))
    python = [python_part(run, step.name) or 0.0 for step in STEPS]
    alien = [float(step.name in slow) for step in STEPS]
    plain = [1 - a - b for a, b in zip(python, alien, strict=True)]
    found = [("kernel and hardware", plain), ("Python", python if has_python([run]) else []), ("by an emulated CPU", alien if slow else [])]
    return [(name, shares) for name, shares in found if shares]


def has_python(runs: Sequence[RunLike]) -> bool:
    """Whether any step of any run contains Python's own time."""
    return any(kind in ("python", "mixed") for run in runs if not run.simulated for kind in run.kinds.values())


def _state(run: RunLike) -> list[str]:
    parts = [f"{run.ios:,} I/Os"]
    if run.errors:
        parts.append(f"{run.errors:,} I/O errors")
    if run.mismatches:
        parts.append(f"{run.mismatches:,} data mismatches")
    if run.interrupted:
        parts.append("interrupted: a part of the job")
    if has_python([run]):
        mean = {stat.step: stat.mean_ns for stat in run.steps}
        python = sum(ns * (python_part(run, step) or 0) for step, ns in mean.items())
        parts.append(f"of {number(sum(mean.values()) / 1e3)} µs an I/O, {number(python / 1e3)} µs are Python's")
    return parts


def _one(run: RunLike) -> str:
    facts = run.provenance
    parts = [run.rung or origin(run)]
    if origin(run) not in parts[0]:
        parts[0] += f" ({origin(run)})"
    if facts.get("machine"):
        parts.append(facts["machine"])
    for key, form in _SHOWN[run.simulated].items():
        if facts.get(key) and f"{key}=" not in facts.get("machine", ""):
            parts.append(form.format(facts[key]))
    if slow := emulated(run):
        parts.append(f"{', '.join(slow)} are times of an emulated CPU")
    return " · ".join(parts + _state(run))


def caption(runs: RunLike | Sequence[RunLike]) -> str:
    """The small print below a figure: rung, machine, cost table or host, number of I/Os; a line for each run (or for alike runs)."""
    several = as_runs(runs)
    if len(several) == 1:
        return _one(several[0])
    same: dict[str, list[str]] = {}
    for i, run in enumerate(several):
        same.setdefault(_one(run), []).append(letter(i))
    return "\n".join(f"{', '.join(letters)}: {line}" for line, letters in same.items())


def provenance_text(runs: Sequence[RunLike]) -> str:
    """Everything that is known about the runs, as plain lines for a file beside the figure."""
    lines: list[str] = []
    for label, run in zip(labels(runs), runs, strict=True):
        lines += [label, "-" * len(label), ", ".join(_state(run))]
        lines += [f"{key}: {value}" for key, value in run.provenance.items()]
        for head, pairs in (("recipe", run.recipe), ("counters", run.counters)):
            if pairs:
                lines += ["", f"{head}:"] + [f"  {key}: {value}" for key, value in pairs.items()]
        if run.notes:
            lines += ["", "what the machine took over:"] + [f"  {note}" for note in run.notes]
        lines.append("")
    return "\n".join(lines)
