"""Samples of one short thing, timed many times in different ways: how they are spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from ..errors import ConfigError
from . import style
from .runs import check_unit, number, unit_key
from .style import RUN_COLOURS, Draft
from .text import escape

__all__ = ["spread"]

LEFT, RIGHT, PLOT_PX, BINS = 76, 40, 300, 60
_TAIL, _SPAN = 95.0, 4.0


def spread(samples: Mapping[str, Sequence[float]], *, title: str, caption: str = "", unit: str = "us") -> go.Figure:
    """Draw the share of the samples (in ns) in each of 60 bins, an area for each name, with its median.

    The axis ends where the slowest set has 95 % of its samples, or at four times its median if that is less; the small print
    says how much lies beyond.  ``caption`` says where the samples come from.
    """
    if not 1 <= len(samples) <= len(RUN_COLOURS) or any(len(values) < 2 for values in samples.values()):
        raise ConfigError(f"spread of {len(samples)} sets of samples", f"give 1 to {len(RUN_COLOURS)}, each with at least two numbers")
    scale, unit_name = check_unit(unit)
    found = {name: np.asarray(values, float) / scale for name, values in samples.items()}
    low = min(float(values.min()) for values in found.values())
    high = max(min(float(np.percentile(values, _TAIL)), _SPAN * float(np.median(values))) for values in found.values())
    edges = np.linspace(low, max(high, low * 1.01 + 1e-9), BINS + 1)
    draft, beyond, top = Draft(), [], 0.0
    shares = {name: 100 * np.histogram(values, edges)[0] / len(values) for name, values in found.items()}
    top = 1.08 * max(float(share.max()) for share in shares.values())
    for i, (name, values) in enumerate(found.items()):
        median, colour = float(np.median(values)), RUN_COLOURS[i]
        draft.scatter(
            x=np.repeat(edges, 2), y=np.concatenate([[0.0], np.repeat(shares[name], 2), [0.0]]), mode="lines", fill="tozeroy",
            name=escape(f"{name} · median {number(median)} {unit_name} · {len(values):,} times"), line=dict(color=colour, width=1.8),
            hovertemplate=f"%{{y:.2f}} % at %{{x:.4g}} {unit_name}<extra>{escape(name)}</extra>",
            meta={"columns": [], "x_unit": unit_key(unit_name), "y_unit": "percent of the samples in the bin"})
        draft.scatter(x=[median] * 2, y=[0, top], mode="lines", name=f"{escape(name)} · median", showlegend=False, hoverinfo="skip",
                      line=dict(color=colour, width=1.2, dash="dot"), meta={"columns": [], "x_unit": unit_key(unit_name), "y_unit": "line"})
        beyond.append(f"{name} {100 * float((values > edges[-1]).mean()):.1f} %")
    draft.xaxis.update(range=[float(edges[0]), float(edges[-1])], title_text=f"time ({unit_name})")
    draft.yaxis.update(range=[0, top], ticksuffix=" ")
    remark = f"Dotted: the median. Beyond the axis: {', '.join(beyond)}."
    return style.finish(draft, [], kind="spread", title=title, remark="\n".join(filter(None, (remark, caption))), plot_px=PLOT_PX,
                        left=LEFT, right=RIGHT, y_title="share of the samples in a bin (%)", legend_dx=9)
