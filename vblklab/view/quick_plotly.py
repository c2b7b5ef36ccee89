"""Loads plotly in one second instead of six; imported before everything else in this folder that draws.

plotly imports nbformat, which imports jsonschema, which, where it finds ``rfc3987_syntax``, builds a grammar that checks IRIs: five
seconds of a CPU in every process that draws, for a check that no figure asks for.  While plotly loads, that package is not found;
jsonschema then leaves the formats "iri" and "iri-reference" unchecked, as it does where the package is not installed.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

__all__ = ["load"]

_SLOW, _BUILDS = "rfc3987_syntax", "jsonschema"


def load() -> Any:
    """plotly's graph objects and their widgets, with what these import."""
    hide = _SLOW not in sys.modules and _BUILDS not in sys.modules
    if hide:
        sys.modules[_SLOW] = None  # type: ignore[assignment]  # the import system's own way to say: not found
    try:
        return importlib.import_module("plotly.graph_objects").FigureWidget
    except ImportError:
        return None  # without ipywidgets there is no FigureWidget, and figures work
    finally:
        if hide:
            del sys.modules[_SLOW]


load()
