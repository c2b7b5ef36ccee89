"""A module that takes seconds to import, put off until somebody calls it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["deferred"]


@contextmanager
def deferred(name: str, function: str) -> Iterator[None]:
    """Whoever imports ``function`` from the module ``name`` meanwhile gets one that imports the module when it is first called.

    Nothing changes where the module is loaded already; afterwards ``import name`` is as it was.
    """
    if name in sys.modules:
        yield
        return

    def call(*args: Any, **options: Any) -> Any:
        return getattr(import_module(name), function)(*args, **options)

    stand_in = ModuleType(name)
    setattr(stand_in, function, call)
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
