"""Running a learner's code: an exception in it, a missing ``return`` or an endless loop becomes a hint."""

from __future__ import annotations

import linecache
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from .check import Wrong

__all__ = ["call", "is_open", "said", "tried"]

_PACKAGE = str(Path(__file__).resolve().parents[1])
_LINES = 100_000


class _Endless(BaseException):
    """The budget is used up.  Not an Exception, so that the learner's own ``except`` does not catch it."""


def call(function: Callable[..., Any], *arguments: Any, lines: int = _LINES) -> Any:
    """What ``function`` returns; raises Wrong, with the line, if it raises or runs more than ``lines`` lines of its own."""
    left = lines
    before = sys.gettrace()

    def count(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        left -= 1
        if left < 0:
            raise _Endless
        return count

    try:
        if lines:
            sys.settrace(count)
        try:
            return function(*arguments)
        finally:
            sys.settrace(before)
    except Wrong:
        raise
    except _Endless:
        raise Wrong(f"It does not come to an end: stopped after {lines:,} lines. Which loop waits for what never comes?") from None
    except Exception as error:
        raise Wrong(said(error)) from None


def tried(function: Any, *arguments: Any) -> Any:
    """What the learner's function returns; Wrong says for which arguments it raised, and what, or that it does not end."""
    if not callable(function):
        raise Wrong("Give the function itself: its name without brackets behind it.")
    try:
        return call(function, *arguments)
    except Wrong as hint:
        given = ", ".join(f"{one!r}" if not isinstance(one, bytes) else f"{len(one)} bytes" for one in arguments)
        raise Wrong(f"Tried with ({given}). {hint}") from None


def said(error: BaseException) -> str:
    """One sentence for an exception: what it is, and the learner's line that it came from."""
    text = " ".join(str(error).split()).replace("`", "'")[:200]
    what = f"`{type(error).__name__}: {text}`" if text else f"`{type(error).__name__}`"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_PACKAGE):
            line = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip().replace("`", "'")[:120]
            return f"It raised {what} in `{frame.name}`, at the line `{line}`." if line else f"It raised {what} in `{frame.name}`."
    return f"It raised {what}."


def _nothing() -> None: ...


def is_open(function: Any) -> bool:
    """Whether this function's body is still three dots and nothing else."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return isinstance(code, CodeType) and code.co_code == _nothing.__code__.co_code and code.co_consts == _nothing.__code__.co_consts
