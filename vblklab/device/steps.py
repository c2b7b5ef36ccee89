"""The declared steps of a device: what a learner may replace, the contract of each, and who replaced what."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["STEPS", "Step", "overridden"]


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


def overridden(part: Any, written: dict[str, Any], what: str) -> list[str]:
    """One sentence for each function in ``written`` that ``part``, its class or a class between them has replaced."""
    found = []
    cls = type(part)
    own = getattr(part, "__dict__", {})
    for name, function in written.items():
        kind = "step " if any(name == step.name for step in STEPS) else ""
        if name in own:
            found.append(f"{kind}{name}: set on this {what}")
            continue
        for owner in cls.__mro__:
            if name in owner.__dict__:
                if owner.__dict__[name] is not function:
                    found.append(f"{kind}{name}: replaced by {owner.__name__}.{name}")
                break
    return found
