"""Checks: ``vb.check.NAME(answer)`` judges an answer and shows praise or a hint; a bad answer never raises.

A chapter declares its questions in a module of its own (``lab/chapter_00.py``) as plain functions::

    @question("00", "To which step does `virtqueue_pop` belong?")
    def step_of_pop(answer): return right("…why…") or wrong("…a hint, never the solution…")

    @prediction("00", "Which bars will move?", read=steps_in)
    def predict_bars(guess, before, after): ...     # judged later, from runs: vb.check.predict_bars("D2").reveal(before, after)
"""

from __future__ import annotations

import difflib
import html
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

__all__ = ["Checks", "NoSuchQuestion", "Prediction", "Question", "Verdict", "Wrong", "check", "prediction", "question", "right", "wrong"]

_CHAPTERS = (
    "chapter_00",
    "chapter_01",
    "device_stages",
    "chapter_02",
    "driver_stages",
    "chapter_04",
    "interrupt_stages",
    "chapter_05",
    "chapter_06",
    "zoo.judge",
    "chapter_08",
)


@dataclass(frozen=True)
class Verdict:
    """What a check says; backticks mark code.

    ``state`` is ``right``, ``wrong``, ``noted`` (a prediction) or ``open`` (no answer yet).
    """

    state: str
    text: str

    @property
    def ok(self) -> bool:
        """Whether the answer is right."""
        return self.state == "right"

    def __str__(self) -> str:
        return f"{_LOOKS[self.state][0]} {self.text.replace('`', '')}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        sign, colour, ground = _LOOKS[self.state]
        return (
            f'<div style="max-width:850px;margin:2px 0;padding:8px 14px;line-height:1.5;border-left:4px solid {colour};'
            f'background:{ground}">'
            f'<b style="color:{colour}">{sign}</b>&ensp;{_markup(self.text)}</div>'
        )


def _markup(text: str) -> str:
    """HTML of a text in which backticks mark code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text, quote=False))


_LOOKS = {
    "right": ("✓", "#1a8a5c", "rgba(26,138,92,0.10)"),
    "wrong": ("✗", "#c9651b", "rgba(201,101,27,0.10)"),
    "noted": ("✎", "#5a7a9a", "rgba(90,122,154,0.10)"),
    "open": ("…", "#5a7a9a", "rgba(90,122,154,0.10)"),
}


class Wrong(Exception):
    """Raised while an answer is read: it cannot be one; the message is the hint."""


class NoSuchQuestion(ConfigError, AttributeError):
    """``vb.check`` has no question of this name."""


def right(text: str) -> Verdict:
    """Praise: say why the answer is right."""
    return Verdict("right", text)


def wrong(hint: str) -> Verdict:
    """A hint that helps with this kind of wrong answer and does not give the solution away."""
    return Verdict("wrong", hint)


@dataclass(frozen=True)
class Question:
    """One question; calling it judges an answer, or for a prediction notes it."""

    name: str
    chapter: str
    asks: str
    judge: Callable[..., Verdict]
    read: Callable[[Any], Any] | None = None

    def __call__(self, *answer: Any, **options: Any) -> Any:
        if self.read is None:
            return _judge(self, self.judge, answer, options)
        noted = _judge(self, self._note, answer, options)
        return Prediction(self, noted, answer[0] if noted.state == "noted" else None)

    def _note(self, answer: Any) -> Verdict:
        self.read(answer)  # type: ignore[misc]
        return Verdict("noted", f"Noted: `{_shown(answer)}`. Run on to see what happens.")

    def __repr__(self) -> str:
        return f"vb.check.{self.name}: {self.asks.replace('`', '')}"


class Prediction:
    """A guess that is committed before the result is seen; ``reveal`` judges it from what was run.  ``ok``: it is noted."""

    def __init__(self, question: Question, noted: Verdict, guess: Any) -> None:
        self.question = question
        self.noted = noted
        self.guess = guess

    @property
    def ok(self) -> bool:
        return self.noted.state == "noted"

    def reveal(self, *runs: Any) -> Verdict:
        """Compare the guess with the runs."""
        if not self.ok:
            return Verdict("open", "There is no guess yet. Go back to the cell that asks for it: a wrong guess teaches most.")
        read = self.question.read or (lambda guess: guess)
        return _judge(self.question, lambda *given: self.question.judge(read(self.guess), *given), runs, {}, self.question.judge)

    def __str__(self) -> str:
        return str(self.noted)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.noted._repr_html_()


def _judge(
    question: Question, judge: Callable[..., Verdict], answer: tuple[Any, ...], options: dict[str, Any], signature: Any = None
) -> Verdict:
    """Whatever is given, a Verdict comes back."""
    if any(one is ... for one in (*answer, *options.values())):
        return Verdict("open", f"{question.asks} Put your answer in the place of the three dots, then run this cell again.")
    try:
        if trouble := _does_not_fit(judge if signature is None else signature, answer, options, skip=signature is not None):
            return wrong(trouble)
        return judge(*answer, **options)
    except Wrong as hint:
        return wrong(str(hint))
    except Exception as error:  # an answer is any object at all, and every method of it may raise
        given = " and ".join(f"`{_shown(one)}`" for one in answer)
        return wrong(f"I could not use {given} ({type(error).__name__}). The question was: {question.asks}")


def _does_not_fit(judge: Callable[..., Any], answer: tuple[Any, ...], options: dict[str, Any], skip: bool) -> str:
    """What to give instead, if the arguments are not those of the question."""
    signature = inspect.signature(judge)
    parameters = list(signature.parameters.values())[int(skip) :]
    try:
        signature.replace(parameters=parameters).bind(*answer, **options)
    except TypeError:
        return f"This one takes {len(parameters)} in the brackets: {', '.join(p.name.replace('_', ' ') for p in parameters)}."
    return ""


def _shown(answer: Any) -> str:
    """A short text for any object, also one whose own repr fails."""
    try:
        text = " ".join(repr(answer).split()).replace("`", "'")
    except Exception:  # a learner's own __repr__
        text = f"a {type(answer).__name__}"
    return text if len(text) <= 60 else text[:57] + "…"


# -- declaring and finding questions -----------------------------------------------------------------------------------------

_QUESTIONS: dict[str, Question] = {}


def _declare(one: Question) -> Question:
    known = _QUESTIONS.setdefault(one.name, one)
    if known.judge.__module__ != one.judge.__module__:
        raise ConfigError(f"two chapters have a question {one.name!r}: {known.chapter} and {one.chapter}", "give one of them another name")
    return known


def question(chapter: str, asks: str) -> Callable[[Callable[..., Verdict]], Question]:
    """Declare a question: the function takes the answer (and what it is judged from) and returns ``right`` or ``wrong``."""
    return lambda judge: _declare(Question(judge.__name__, chapter, asks, judge))


def prediction(chapter: str, asks: str, *, read: Callable[[Any], Any]) -> Callable[[Callable[..., Verdict]], Question]:
    """Declare a prediction: ``read`` turns an answer into a guess or raises Wrong; the function judges a guess from runs."""
    return lambda judge: _declare(Question(judge.__name__, chapter, asks, judge, read))


def _all() -> dict[str, Question]:
    for chapter in _CHAPTERS:
        importlib.import_module(f".{chapter}", __package__)
    return _QUESTIONS


class Checks:
    """``vb.check``: an attribute for each question of all chapters; shown by itself it lists them."""

    def __getattr__(self, name: str) -> Question:
        if name.startswith("_"):
            raise AttributeError(name)
        known = _all()
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise NoSuchQuestion(f"no question {name!r}", f"did you mean vb.check.{near[0]}?" if near else "vb.check lists them all")
        return known[name]

    def __dir__(self) -> list[str]:
        return sorted(_all())

    def __repr__(self) -> str:
        return "\n".join(f"{one.chapter}  {one}" for one in _all().values())

    def _repr_html_(self) -> str:
        left = "text-align:left;vertical-align:top"
        rows = "".join(
            f'<tr><td style="{left}">{one.chapter}</td><td style="{left}"><code>{one.name}</code></td>'
            f'<td style="{left}">{_markup(one.asks)}</td></tr>'
            for one in _all().values()
        )
        return f"<table>{rows}</table>"


check = Checks()
