"""Live figures in a notebook: a FigureWidget that is light on the browser, and sliders that redraw it in place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import numpy as np
import plotly
import plotly.graph_objects as go
import traitlets

from ..errors import ConfigError, VblkError
from .deferred import deferred
from .runs import RunLike, as_runs
from .style import WIDTH
from .waterfall import waterfall

__all__ = ["Explorer", "FigureWidget", "explore"]

_BUNDLE = Path(plotly.__file__).parent / "package_data" / "widgetbundle.js"
_SLOT = "__vblklab_plotly_" + "".join(c if c.isalnum() else "_" for c in str(plotly.__version__))


class _Loader(anywidget.AnyWidget):
    """Carries plotly.js to the page once; every FigureWidget of this kernel then takes it from there."""

    _esm = f"""
    function initialize({{ model }}) {{
      if (globalThis.{_SLOT}) return;
      const url = URL.createObjectURL(new Blob([model.get("bundle")], {{ type: "text/javascript" }}));
      globalThis.{_SLOT} = import(url).then((module) => {{ URL.revokeObjectURL(url); return module.default; }});
    }}
    export default {{ initialize }};
    """
    bundle = traitlets.Unicode().tag(sync=True)


@functools.cache
def _loader() -> _Loader:
    return _Loader(bundle=_BUNDLE.read_text(encoding="utf-8"))


# Through nbformat and jsonschema plotly's widget imports a parser of internationalised addresses: seconds of building a grammar.
with deferred("rfc3987_syntax", "is_valid_syntax"):
    _PlotlyWidget = go.FigureWidget


class FigureWidget(_PlotlyWidget):  # type: ignore[misc, valid-type]
    """``go.FigureWidget`` whose 5 MB of plotly.js go to the browser once per kernel, not once per figure."""

    _esm = f"""
    export default async () => {{
      for (let i = 0; !globalThis.{_SLOT} && i < 600; i++) await new Promise((done) => setTimeout(done, 50));
      if (!globalThis.{_SLOT}) throw new Error("plotly.js did not arrive within 30 s; run the cell again");
      const widget = await globalThis.{_SLOT};
      return typeof widget === "function" ? await widget() : widget;
    }};
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _loader()
        super().__init__(*args, **kwargs)
        self._config = {"displaylogo": False, **getattr(self, "_config", {})}


class Explorer(ipywidgets.VBox):  # type: ignore[misc]
    """Sliders above one figure; ``runs`` are the runs that the figure shows, ready for ``export(explorer.figure, …)``."""

    def __init__(self, recipe: Callable[..., Any], view: Callable[..., Any], sliders: Mapping[str, Any]) -> None:
        self.recipe, self.view, self.sliders = recipe, view, dict(sliders)
        self.runs: tuple[RunLike, ...] = ()
        self.figure = FigureWidget(layout=dict(width=WIDTH, height=120, xaxis=dict(visible=False), yaxis=dict(visible=False)))
        self.facts, self.message = ipywidgets.HTML(), ipywidgets.HTML()
        super().__init__([*self.sliders.values(), self.facts, self.figure, self.message])
        for slider in self.sliders.values():
            slider.observe(self._changed, "value")
        self.refresh()

    def refresh(self) -> None:
        """Call the recipe with the sliders' values and draw its run; a VblkError becomes the line below the old picture."""
        try:
            runs = tuple(as_runs(self.recipe(**{name: slider.value for name, slider in self.sliders.items()})))
            fig = self.view(*runs)
        except VblkError as error:
            self._say(f"{type(error).__name__}: {error}")
            return
        _redraw(self.figure, fig)
        self.runs = runs
        self.facts.value = "<br>".join(_facts(run) for run in runs)
        self._say("")

    def _changed(self, _change: Any) -> None:
        try:
            self.refresh()
        except Exception as error:
            # An exception of the learner's own function would only reach the kernel's log: show it here as well.
            self._say(f"the recipe raised {type(error).__name__}: {error}")
            raise

    def _say(self, text: str) -> None:
        self.message.value = f'<span class="vblklab-error" style="color:#b3261e">{escape(text)}</span>' if text else ""


def _facts(run: RunLike) -> str:
    """One line of counts above the figure."""
    counts = [f"{run.counters[name]:,} {name}" for name in ("kicks", "interrupts") if name in run.counters]
    return " · ".join([f"<b>{run.iops:,.0f} IOPS</b>", f"{run.ios:,} I/Os", *counts])


def explore(recipe: Callable[..., Any], view: Callable[..., Any] = waterfall, **sliders: Any) -> Explorer:
    """Draw a recipe's run and redraw it while sliders move: ``explore(lambda iodepth: run_of(iodepth), iodepth=(1, 64))``.

    ``recipe`` takes the sliders' values by name and returns a Run or several; ``view`` draws them.  A slider is
    ``(low, high)`` or ``(low, high, step)``, a list of values (a slider for numbers, a menu for words), a dict label → value,
    ``True`` or ``False``, or an ipywidgets widget.  A default of the recipe's parameter is where the slider starts.
    """
    if not sliders:
        raise ConfigError("explore() without a slider", "give one, for example iodepth=(1, 64)")
    start = _defaults(recipe, sliders)
    return Explorer(recipe, view, {name: _slider(name, spec, start.get(name)) for name, spec in sliders.items()})


def _defaults(recipe: Callable[..., Any], sliders: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of the recipe's parameters; refuses sliders that the recipe does not take."""
    try:
        signature = inspect.signature(recipe)
    except (TypeError, ValueError):
        return {}
    try:
        signature.bind(**sliders)
    except TypeError as error:
        raise ConfigError(f"explore(): the recipe takes {signature}, the sliders are {', '.join(sliders)}", f"{error}") from None
    return {name: p.default for name, p in signature.parameters.items() if p.default is not p.empty}


def _slider(name: str, spec: Any, start: Any) -> Any:
    common: dict[str, Any] = dict(description=name, style={"description_width": "initial"})
    wide = ipywidgets.Layout(width="420px")
    if isinstance(spec, ipywidgets.Widget):
        return spec
    if isinstance(spec, bool):
        return ipywidgets.Checkbox(value=spec if start is None else bool(start), **common)
    if isinstance(spec, tuple) and len(spec) in (2, 3) and all(_is_number(v) for v in spec):
        if spec[0] > spec[1] or (len(spec) == 3 and spec[2] <= 0):
            raise ConfigError(f"slider {name}={spec!r}", "give (low, high) or (low, high, step) with low <= high and step > 0")
        kind = ipywidgets.IntSlider if all(isinstance(v, int) for v in spec) else ipywidgets.FloatSlider
        value = start if _is_number(start) and spec[0] <= start <= spec[1] else spec[0]
        step = {"step": spec[2]} if len(spec) == 3 else {}
        return kind(value=value, min=spec[0], max=spec[1], layout=wide, **step, **common)
    if isinstance(spec, Mapping) and spec:
        value = start if start in spec.values() else next(iter(spec.values()))
        return ipywidgets.Dropdown(options=list(spec.items()), value=value, **common)
    if isinstance(spec, (list, tuple, range)) and len(spec):
        values = list(spec)
        value = start if start in values else values[0]
        if all(_is_number(v) for v in values):
            return ipywidgets.SelectionSlider(options=[(f"{v:,}", v) for v in values], value=value, layout=wide, **common)
        return ipywidgets.Dropdown(options=[(str(v), v) for v in values], value=value, **common)
    raise ConfigError(f"slider {name}={spec!r}", "give (low, high), a list of values, a dict, True or False, or a widget")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _redraw(widget: Any, fig: Any) -> None:
    """Make ``widget`` show ``fig``, sending only what changed; the traces stay the same objects where their kinds allow."""
    shared = 0
    while shared < min(len(widget.data), len(fig.data)) and widget.data[shared].type == fig.data[shared].type:
        shared += 1
    if shared < len(widget.data):
        widget.data = widget.data[:shared]
    with widget.batch_update():
        for old, new in zip(widget.data, fig.data, strict=False):
            _assign(old, new, frozenset({"type", "uid"}))
        _assign(widget.layout, fig.layout, frozenset({"template"} if shared else ()))
    if len(fig.data) > shared:
        widget.add_traces(list(fig.data[shared:]))


def _assign(old: Any, new: Any, skip: frozenset[str]) -> None:
    before, after = old.to_plotly_json(), new.to_plotly_json()
    for key in {*before, *after} - skip:
        if not _same(before.get(key), after.get(key)):
            old[key] = after.get(key)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return a is not None and b is not None and np.array_equal(np.asarray(a), np.asarray(b))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
