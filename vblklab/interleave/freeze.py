"""The state of a system as one short key: two schedules that lead to the same state need to be followed only once from there."""

from __future__ import annotations

import marshal
from collections import deque
from functools import cache
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
    kind: Any = type(thing)
    if kind in _PLAIN:
        return thing
    how = _how(kind)
    if how is int:
        return int(thing)  # a member of an enumeration
    if how is None:
        return "."
    if how is memoryview:
        return len(thing)
    if id(thing) in memo:
        return "@", memo[id(thing)]
    memo[id(thing)] = len(memo)
    # Most of what is in there is plain: a call for each of them would be most of the time.
    if how is GeneratorType:
        frame = thing.gi_frame
        if frame is None:
            return "ended"
        local = tuple([(name, one if type(one) in _PLAIN else _frozen(one, memo)) for name, one in frame.f_locals.items()])
        return thing.__name__, frame.f_lasti, local, _frozen(thing.gi_yieldfrom, memo)
    if how is tuple:
        return tuple([one if type(one) in _PLAIN else _frozen(one, memo) for one in thing])
    if how is set:
        return tuple(sorted(repr(_frozen(one, memo)) for one in thing))
    if how is dict:
        return tuple([(_frozen(name, memo), one if type(one) in _PLAIN else _frozen(one, memo)) for name, one in thing.items()])
    return kind.__name__, tuple([(name, one if type(one) in _PLAIN else _frozen(one, memo)) for name, one in _attributes(thing, kind)])


@cache
def _how(kind: type) -> type | None:
    """What to take a thing of this class for; None if it is left out."""
    if issubclass(kind, int):
        return int
    if issubclass(kind, (*_SKIP, FunctionType, MethodType)):
        return None
    for like, taken_for in ((memoryview, memoryview), (GeneratorType, GeneratorType), ((list, tuple, deque), tuple), (dict, dict)):
        if issubclass(kind, like):
            return taken_for
    return set if issubclass(kind, (set, frozenset)) else object


def _attributes(thing: Any, kind: Any) -> list[tuple[str, Any]]:
    found = [one for one in getattr(thing, "__dict__", {}).items() if one[0] not in _COUNTED]
    found += [(name, getattr(thing, name)) for name in _slots(kind) if hasattr(thing, name)]
    return found


@cache
def _slots(kind: type) -> list[str]:
    every = (each.__dict__.get("__slots__", ()) for each in kind.__mro__)
    return [name for slots in every for name in ((slots,) if isinstance(slots, str) else slots) if name not in _COUNTED]
