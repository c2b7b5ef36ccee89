"""Times between two trace points of a run."""

from __future__ import annotations

from ..errors import ConfigError
from ..events import EVENTS
from .run import Run

__all__ = ["between"]


def between(run: Run, first: str, second: str, *, at: int | None = None) -> list[int]:
    """ns from the earliest ``first`` to each ``second``, counted anew after every ``second``; of the points that the run kept.

    ``at`` leaves only points whose first argument it is, such as the offset of a register.

    ConfigError for a key that is not declared, or a run that kept no trace.
    """
    for key in (first, second):
        if key not in EVENTS:
            raise ConfigError(f"no trace point {key!r}", "vb.EVENTS lists them")
    if not run.trace:
        raise ConfigError(f"run {run.title!r} kept no trace", "run it with tracing on")
    gaps: list[int] = []
    since: int | None = None
    for event in run.trace:
        if at is not None and event.args[:1] != (at,):
            continue
        if event.key == second and since is not None:
            gaps.append(event.t_ns - since)
            since = None
        if event.key == first and since is None:
            since = event.t_ns
    return gaps
