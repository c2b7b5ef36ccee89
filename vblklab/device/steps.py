"""The declared steps of a device: what a learner may replace, the contract of each, and who replaced what."""

from __future__ import annotations

from types import FunctionType
from typing import Any, NamedTuple

__all__ = ["STEPS", "Step", "overridden", "replaced"]


class Step(NamedTuple):
    """A method of the device that may be overridden in a class or on an instance."""

    name: str
    contract: str


STEPS = (
    Step("pop", "pop(queue) -> Chain | None: the next available buffer of this queue, counted as in flight, or None if there is none"),
    Step("parse", "parse(queue, chain) -> BlkRequest: header, data and status byte of a buffer; each guest byte is read once"),
    Step("check", "check(request) -> int: 0 if the request may run, else the status byte that ends it; changes nothing"),
    Step("submit", "submit(request): a generator; hands the request to the engine with operate(), or ends it with end()"),
    Step("complete", "complete(request, status): a generator; stores the status byte, then the used element, unpublished"),
    Step("push", "push(queue): a generator; publishes the used elements with one used.idx and notifies if should_notify says so"),
    Step("should_notify", "should_notify(queue) -> bool: whether the driver wants an interrupt for what was just published"),
)
"""In the order in which a request passes them."""

_BETWEEN = ("handle_output", "serve_one", "handle_request", "operate", "end", "complete_batch", "used_length")
"""Not steps, but what runs them: whoever replaces one of these has replaced the path too."""


def originals(cls: type) -> dict[str, Any]:
    """The functions of ``cls`` as they were written, taken before anybody can have replaced one."""
    return {name: cls.__dict__[name] for name in (*(step.name for step in STEPS), *_BETWEEN) if name in cls.__dict__}


def replaced(part: Any, name: str, written: Any) -> Any:
    """What stands in for ``name`` as it was ``written``: ``part`` itself, a class of its, or None if nothing does.

    The instance is asked without its ``__dict__``: making one slows every attribute of the part from then on.
    """
    cls = type(part)
    owner = next((one for one in cls.__mro__ if name in one.__dict__), None)
    if owner is None:
        return None
    held = owner.__dict__[name]
    if isinstance(held, (FunctionType, staticmethod)) and getattr(part, name) != held.__get__(part, cls):
        return part
    return owner if held is not written else None


def overridden(part: Any, written: dict[str, Any], what: str) -> list[str]:
    """One sentence for each function in ``written`` that ``part``, its class or a class between them has replaced."""
    found = []
    for name, function in written.items():
        kind = "step " if any(name == step.name for step in STEPS) else ""
        by = replaced(part, name, function)
        if by is part:
            found.append(f"{kind}{name}: set on this {what}")
        elif by is not None:
            found.append(f"{kind}{name}: replaced by {by.__name__}.{name}")
    return found
