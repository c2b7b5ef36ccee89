"""Pictures of runs: the path map, waterfalls, swim lanes, latency and comparisons, live in a notebook or as files for a report.

Every function takes one or several Runs and returns a ``plotly.graph_objects.Figure``; nothing here touches a stage.
``import vblklab`` does not import this package, because plotly is large.
"""

from __future__ import annotations

from .compare import compare
from .export import Exported, export
from .lanes import lanes
from .latency import latency
from .path_map import path_map
from .runs import RunLike, caption
from .spread import spread
from .sweep import sweep
from .waterfall import waterfall
from .widget import Explorer, FigureWidget, explore

__all__ = [
    "Explorer", "Exported", "FigureWidget", "RunLike", "caption", "compare", "explore", "export", "lanes", "latency", "path_map",
    "spread", "sweep", "waterfall",
]
