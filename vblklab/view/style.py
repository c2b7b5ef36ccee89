"""The one look of all figures: template, colours of the rooms and runs, text that fits, caption and fixed margins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from ..events import STEPS
from .runs import RunLike, caption, labels, provenance_text
from .text import SMALL_PX, TEXT_PX, TITLE_PX, escape, text_px, wrap

__all__ = [
    "CONFIG", "MARKERS", "MARKERS_OF_LINES", "ROOM_COLOURS", "ROOM_NAMES", "ROOM_OF_STEP", "RUN_COLOURS", "TEMPLATE", "Draft",
    "finish", "hatch", "note", "plain", "text_on", "tint",
]

WIDTH, EDGE = 860, 20  # fits JupyterLab's output on a small screen, and a page at full width
FONT = "Open Sans, Liberation Sans, Arial, Helvetica, sans-serif"
INK, MUTED, FAINT, GRID = "#1d2733", "#57636f", "#9aa4ae", "#e4e8ec"
STRIPE = "#f6f8f9"

ROOM_NAMES = {
    "app": "guest application", "guest-stack": "guest I/O stack", "driver": "virtio-blk driver", "kvm": "KVM",
    "device": "virtio device (QEMU)", "host-stack": "host I/O stack", "host-driver": "host block driver", "disk": "hardware",
}
# One hue per side (guest blue, KVM violet, device green, host orange, drive grey), told apart by lightness as well.
ROOM_COLOURS = {
    "app": "#a9d4f2", "guest-stack": "#5aa5d8", "driver": "#174f80", "kvm": "#b05fae",
    "device": "#12906f", "host-stack": "#f3b84b", "host-driver": "#c9651b", "disk": "#3b434c",
}
ROOM_OF_STEP = dict(zip(
    (step.name for step in STEPS),
    ("app", "guest-stack", "driver", "kvm", "device", "host-stack", "host-driver", "disk",
     "host-driver", "host-stack", "device", "device", "kvm", "driver", "guest-stack"), strict=True,
))
MARKERS_OF_LINES = ("circle", "square", "diamond", "triangle-up", "x", "cross")
RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a0427e", "#4d3319", "#8a929b")

CONFIG: dict[str, Any] = {"displaylogo": False, "responsive": False, "modeBarButtonsToRemove": ["lasso2d", "select2d"]}
"""The plotly.js settings of an exported page; the upload buttons are removed by the template."""

_AXIS: dict[str, Any] = dict(
    showgrid=True, gridcolor=GRID, gridwidth=1, zeroline=False, showline=False, ticks="", automargin=False,
    exponentformat="none", separatethousands=True,
    tickfont=dict(size=TEXT_PX - 1, color=INK), title=dict(font=dict(size=TEXT_PX, color=INK), standoff=10),
)
TEMPLATE: Any = go.layout.Template(layout=dict(
    width=WIDTH, autosize=False, font=dict(family=FONT, size=TEXT_PX, color=INK), paper_bgcolor="white", plot_bgcolor="white",
    colorway=list(RUN_COLOURS), xaxis=_AXIS, yaxis=_AXIS, bargap=0.25, hovermode="closest", barmode="overlay",
    modebar=dict(remove=["sendChartToCloud", "sendDataToCloud", "lasso2d", "select2d"], bgcolor="rgba(255,255,255,0.7)",
                 color=FAINT, activecolor=INK, orientation="v"),
    hoverlabel=dict(bgcolor="white", bordercolor=FAINT, align="left", font=dict(family=FONT, size=TEXT_PX - 1, color=INK)),
    legend=dict(bgcolor="rgba(255,255,255,0)", font=dict(size=TEXT_PX - 1), itemsizing="constant"),
))
pio.templates["vblklab"] = TEMPLATE

def tint(colour: str, amount: float) -> str:
    """``colour`` mixed with white; ``amount`` 0 is white, 1 the colour itself."""
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 + (c - 255) * amount):02x}" for c in channels)


def text_on(colour: str) -> str:
    """Black or white, whichever reads better on ``colour`` (WCAG relative luminance)."""
    def linear(part: str) -> float:
        value = int(part, 16) / 255
        return value / 12.92 if value <= 0.04045 else float(((value + 0.055) / 1.055) ** 2.4)

    red, green, blue = (linear(colour[i : i + 2]) for i in (1, 3, 5))
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.3 else "white"


def note(text: str, **place: Any) -> dict[str, Any]:
    """An annotation without an arrow; ``place`` gives x, y, anchors and font."""
    return {"text": text, "showarrow": False, **place}


def hatch(colours: Sequence[str]) -> dict[str, Any]:
    """Marker settings of Python's own time: lines in the bar's colour on a pale ground."""
    return dict(color=list(colours), line=dict(width=0), pattern=dict(
        shape="/", fillmode="replace", fgcolor=list(colours), bgcolor=[tint(c, 0.25) for c in colours], size=5, solidity=0.35))


def dots(colours: Sequence[str]) -> dict[str, Any]:
    """Marker settings of an emulated CPU's time: dots in the bar's colour on a pale ground."""
    return dict(color=list(colours), line=dict(width=0), pattern=dict(
        shape=".", fillmode="replace", fgcolor=list(colours), bgcolor=[tint(c, 0.25) for c in colours], size=5, solidity=0.4))


MARKERS = {"Python": hatch, "by an emulated CPU": dots}
"""How whose time is drawn; all else is plain."""


def plain(colours: Sequence[str]) -> dict[str, Any]:
    """Marker settings of time in the kernel, the hardware or a simulation."""
    return dict(color=list(colours), line=dict(width=0), pattern=dict(shape=""))


@dataclass(slots=True)
class Draft:
    """A figure being drawn, as plain data: plotly checks every assignment to a figure of its own, so it gets it all at once."""

    traces: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    shapes: list[dict[str, Any]] = field(default_factory=list)
    xaxis: dict[str, Any] = field(default_factory=dict)
    yaxis: dict[str, Any] = field(default_factory=dict)
    xaxis2: dict[str, Any] = field(default_factory=dict)
    """A column of texts left of the plot, in pixels."""

    def bar(self, **trace: Any) -> None:
        """Add a trace of horizontal bars."""
        self.traces.append(dict(type="bar", orientation="h", **trace))

    def scatter(self, **trace: Any) -> None:
        """Add a trace of lines or points."""
        self.traces.append(dict(type="scatter", **trace))

    def texts(self, x: Sequence[float], y: Sequence[float], texts: Sequence[str], position: str, colour: str | Sequence[str], size: int,
              name: str, **more: Any) -> None:
        """Add texts as one trace: plotly.js redraws that much faster than annotations."""
        self.scatter(x=list(x), y=list(y), mode="text", text=list(texts), textposition=position, textfont=dict(size=size, color=colour),
                     cliponaxis=False, hoverinfo="skip", showlegend=False, name=name, meta={"data": False}, **more)

    def legend(self, name: str, marker: dict[str, Any], *, second: bool = False, group: str = "") -> None:
        """Add an entry without data to the legend, or to the second legend (one row for kinds)."""
        self.bar(x=[None], y=[None], name=name, marker=marker, hoverinfo="skip", meta={"data": False},
                 **({"legend": "legend2"} if second else {}), **({"legendgroup": group} if group else {}))


def finish(
    draft: Draft, runs: Sequence[RunLike], *, kind: str, title: str, subtitle: str = "", plot_px: int, left: int = 20, right: int = 24,
    axis_px: int = 54, legend_dx: int = 0, y_title: str = "", remark: str = "",
) -> go.Figure:
    """Make the figure: give it its title, legend, caption and fixed margins, so that nothing is cut and nothing overlaps.

    The legend lists the runs, one a row; traces with ``legend="legend2"`` share one row below it.  ``remark`` is printed before
    the caption.  ``y_title`` stands above the y axis.  All of it is placed by pixel from the figure's edges; ``axis_px`` is the room of
    the x axis and its title, ``legend_dx`` shifts a legend of lines so that it starts at the edge.
    """
    room = WIDTH - 2 * EDGE
    head = [f"<b>{escape(line)}</b>" for line in wrap(title, room - 40, TITLE_PX * 1.08)]
    sub = [f'<span style="font-size:{TEXT_PX}px;color:{MUTED}">{escape(line)}</span>' for line in wrap(subtitle, room - 20) if line]
    small = [line for line in wrap("\n".join((remark, caption(runs) if runs else "")), room, SMALL_PX) if line]
    text = head + sub
    head_px = 14 + 25 * len(text)
    title_px = 16 if len(text) == 1 else 29  # plotly.js lifts a title of several lines by about half a line
    runs_px, kinds_px = _legend_px(draft, WIDTH - left - right)
    top = head_px + runs_px + kinds_px + (14 if runs_px or kinds_px else 8) + (24 if y_title else 0)
    bottom = axis_px + 17 * len(small) + (12 if small else 0)
    height = top + plot_px + bottom
    legend = dict(xref="container", yref="container", x=(EDGE - 14 + legend_dx) / WIDTH, xanchor="left", yanchor="top", tracegroupgap=0,
                  font=dict(size=TEXT_PX - 1), itemsizing="constant", bgcolor="rgba(255,255,255,0)")
    notes = list(draft.notes)
    if y_title:
        notes.append(note(escape(y_title), name="y title", xref="paper", yref="paper", xanchor="left", yanchor="bottom",
                          x=(EDGE - left) / (WIDTH - left - right), y=1 + 6 / plot_px, font=dict(size=TEXT_PX)))
    if small:
        notes.append(note("<br>".join(escape(line) for line in small), name="caption", xref="paper", yref="paper", xanchor="left",
                          yanchor="bottom", x=(EDGE - left) / (WIDTH - left - right), y=(8 - bottom) / plot_px, align="left",
                          font=dict(size=SMALL_PX, color=MUTED)))
    layout = dict(
        template=TEMPLATE, width=WIDTH, height=height, margin=dict(l=left, r=right, t=top, b=bottom, pad=0, autoexpand=False),
        title=dict(text="<br>".join(text), xref="container", yref="container", x=EDGE / WIDTH, y=1 - title_px / height, xanchor="left",
                   yanchor="top", font=dict(size=TITLE_PX, color=INK), automargin=False),
        xaxis=draft.xaxis, yaxis=draft.yaxis, **({"xaxis2": draft.xaxis2} if draft.xaxis2 else {}),
        annotations=notes, shapes=draft.shapes, showlegend=runs_px + kinds_px > 0,
        legend=dict(legend, y=1 - (head_px + 2) / height, orientation="v"),
        legend2=dict(legend, y=1 - (head_px + 2 + runs_px) / height, orientation="h"),
        meta={"vblklab": kind, "title": title, "caption": "\n".join(small), "provenance": provenance_text(runs) if runs else "",
              "runs": labels(runs) if runs else []},
    )
    return go.Figure(data=draft.traces, layout=layout)


def _legend_px(draft: Draft, room: int) -> tuple[int, int]:
    """The heights of the two legends: one row for each run, and as many rows of kinds as their names need.

    ``room`` is the plot's width: plotly.js gives a legend above the plot no more, wherever it begins.
    """
    shown = [trace for trace in draft.traces if trace.get("showlegend", True)]
    widths = [text_px(trace["name"], TEXT_PX - 1) + 48 for trace in shown if trace.get("legend") == "legend2"]
    columns = len(widths) if sum(widths) < room else int(room // max(widths, default=1))
    return 22 * (len(shown) - len(widths)), 22 * -(-len(widths) // max(1, columns))
