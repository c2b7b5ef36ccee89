"""The state of a system as one short key: two schedules that lead to the same state need to be followed only once from there."""

from __future__ import annotations

import marshal
from collections import deque
from hashlib import blake2b
from types import FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

from ..memory import GuestMemory, GuestPages
from .sides import Side
from .system import System

__all__ = ["key_of"]

_PLAIN = frozenset({int, str, bytes, bool, type(None), float})
_SKIP = (GuestMemory, GuestPages, Side, System, ModuleType, type)
_COUNTED = frozenset({"kicks", "kick_decisions", "interrupts", "polls", "notify_decisions", "setup", "side"})
"""Attributes that count and decide nothing, or lead out of the system."""


def key_of(system: System) -> bytes:
    """A digest of everything that the rest of a schedule can depend on."""
    memo: dict[int, int] = {}
    state = (
        bytes(system.guest.bytes),
        bytes(system.host.bytes),
        tuple(stores.runs for stores in system.guest.pending),
        tuple(stores.runs for stores in system.host.pending),
        system.status.read(),
        tuple(sorted(system.done)),
        tuple((c.waiting, c.notified, _frozen(c.generator, memo)) for c in system.contexts.values()),
        _frozen(system.ring, memo),
        _frozen(system.device, memo),
        _frozen(system.driver, memo),
        bytes(system.disk.bytes),
    )
    return blake2b(marshal.dumps(state, 2), digest_size=12).digest()


def _frozen(thing: Any, memo: dict[int, int]) -> Any:
    if type(thing) in _PLAIN:
        return thing
    if isinstance(thing, int):
        return int(thing)  # a member of an enumeration
    if isinstance(thing, _SKIP) or (callable(thing) and isinstance(thing, (FunctionType, MethodType))):
        return "."
    if isinstance(thing, memoryview):
        return len(thing)
    if id(thing) in memo:
        return "@", memo[id(thing)]
    memo[id(thing)] = len(memo)
    if isinstance(thing, GeneratorType):
        frame = thing.gi_frame
        if frame is None:
            return "ended"
        local = tuple((name, _frozen(value, memo)) for name, value in frame.f_locals.items())
        return thing.__name__, frame.f_lasti, local, _frozen(thing.gi_yieldfrom, memo)
    if isinstance(thing, (list, tuple, deque)):
        return tuple(_frozen(one, memo) for one in thing)
    if isinstance(thing, (set, frozenset)):
        return tuple(sorted(repr(_frozen(one, memo)) for one in thing))
    if isinstance(thing, dict):
        return tuple((_frozen(name, memo), _frozen(value, memo)) for name, value in thing.items())
    return type(thing).__name__, tuple((name, _frozen(value, memo)) for name, value in _attributes(thing))


def _attributes(thing: Any) -> list[tuple[str, Any]]:
    found = list(getattr(thing, "__dict__", {}).items())
    for cls in type(thing).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(thing, name):
                found.append((name, getattr(thing, name)))
    return [(name, value) for name, value in found if name not in _COUNTED]
