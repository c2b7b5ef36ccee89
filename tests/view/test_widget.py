"""Live figures, as Python sees them: sliders, one figure that stays, errors as a line."""

from __future__ import annotations

from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go
import pytest

from vblklab.errors import ConfigError, NotHere
from vblklab.trace.run import Run
from vblklab.view import FigureWidget, compare, explore, export, lanes, latency, path_map, waterfall
from vblklab.view.widget import _BUNDLE, _Loader, _loader  # type: ignore[attr-defined]

from .fake_run import live_run, sim_run

RUNS = {depth: sim_run(f"SimMachine (simulated) · iodepth {depth}", seed=depth, scale={"D4": depth}) for depth in (1, 2, 3, 4)}
LIVE = live_run()


def _pick(iodepth: int) -> Run:
    if iodepth not in RUNS:
        raise NotHere(f"iodepth={iodepth} <b>bold</b>", "use up to 4")
    return RUNS[iodepth]


def _same(widget: Any, fig: Any) -> bool:
    """Whether the widget shows exactly this figure."""
    mine, theirs = go.Figure(widget).to_plotly_json(), fig.to_plotly_json()
    for trace in (*mine["data"], *theirs["data"]):
        trace.pop("uid", None)
    mine["layout"].pop("template")
    theirs["layout"].pop("template")
    np.testing.assert_equal(mine, theirs)
    return True


def test_sliders_are_made_from_what_they_range_over() -> None:
    def recipe(a: int, b: float, c: int, d: str, e: bool, f: int, g: int, h: int = 4) -> Run:
        return RUNS[1]

    own = ipywidgets.BoundedIntText(value=7)
    sliders = explore(recipe, a=(1, 64), b=(0.0, 1.0, 0.5), c=[1, 4, 16], d=["mmio-exit", "ioeventfd"], e=True, f={"one": 1, "two": 2},
                      g=own, h=range(1, 9)).sliders
    assert {name: type(slider) for name, slider in sliders.items()} == {
        "a": ipywidgets.IntSlider, "b": ipywidgets.FloatSlider, "c": ipywidgets.SelectionSlider, "d": ipywidgets.Dropdown,
        "e": ipywidgets.Checkbox, "f": ipywidgets.Dropdown, "g": ipywidgets.BoundedIntText, "h": ipywidgets.SelectionSlider}
    assert {name: slider.value for name, slider in sliders.items()} == {
        "a": 1, "b": 0.0, "c": 1, "d": "mmio-exit", "e": True, "f": 1, "g": 7, "h": 4}
    assert (sliders["a"].min, sliders["a"].max) == (1, 64)
    assert sliders["b"].step == 0.5
    assert all(slider.description == name for name, slider in sliders.items() if name != "g")


def test_moving_a_slider_changes_the_same_traces_of_the_same_figure() -> None:
    explorer = explore(_pick, iodepth=(1, 8))
    figure, traces = explorer.figure, explorer.figure.data
    for depth in (3, 2, 4):
        explorer.sliders["iodepth"].value = depth
        assert explorer.figure is figure
        assert all(a is b for a, b in zip(figure.data, traces, strict=True))
        assert _same(figure, waterfall(RUNS[depth]))
        assert explorer.runs == (RUNS[depth],)


@pytest.mark.parametrize("view", [path_map, waterfall, latency, lanes, compare, lambda *runs: latency(*runs, kind="histogram")])
def test_every_picture_can_be_explored(view: Any) -> None:
    alone = view is lanes

    def recipe(iodepth: int) -> Any:
        return RUNS[iodepth] if alone else (RUNS[iodepth], LIVE)

    explorer = explore(recipe, view=view, iodepth=[1, 2, 3])
    explorer.sliders["iodepth"].value = 3
    assert _same(explorer.figure, view(RUNS[3]) if alone else view(RUNS[3], LIVE))


def test_more_or_fewer_traces_and_another_view_of_the_data_are_drawn_too() -> None:
    shown = {1: (RUNS[1],), 2: (RUNS[1], LIVE), 3: (RUNS[2], RUNS[3], RUNS[4])}
    explorer = explore(lambda runs: shown[runs], view=path_map, runs=(1, 3))
    for count in (2, 3, 1, 3, 2, 1):
        explorer.sliders["runs"].value = count
        assert _same(explorer.figure, path_map(*shown[count]))


def test_an_error_of_the_recipe_is_a_line_below_the_picture_that_stays() -> None:
    explorer = explore(_pick, iodepth=(1, 8))
    explorer.sliders["iodepth"].value = 2
    explorer.sliders["iodepth"].value = 7
    assert "NotHere: iodepth=7 &lt;b&gt;bold&lt;/b&gt;: use up to 4" in explorer.message.value
    assert _same(explorer.figure, waterfall(RUNS[2]))
    assert explorer.runs == (RUNS[2],)
    explorer.sliders["iodepth"].value = 3
    assert explorer.message.value == ""
    assert _same(explorer.figure, waterfall(RUNS[3]))


def test_an_error_at_the_start_still_gives_sliders_to_move_on() -> None:
    explorer = explore(_pick, iodepth=[9, 1])
    assert "NotHere" in explorer.message.value
    explorer.sliders["iodepth"].value = 1
    assert _same(explorer.figure, waterfall(RUNS[1]))


def test_a_recipe_that_returns_no_run_is_told_so() -> None:
    explorer = explore(lambda k: "a pipeline", k=(1, 2))
    assert "cannot draw" in explorer.message.value


def test_a_bug_in_the_recipe_is_shown_and_raised() -> None:
    explorer = explore(lambda k: RUNS[k], k=(1, 9))
    with pytest.raises(KeyError):
        explorer.sliders["k"].value = 8
    assert "the recipe raised KeyError: 8" in explorer.message.value


@pytest.mark.parametrize(("sliders", "said"), [
    ({}, "without a slider"), (dict(depth=(1, 2)), "the recipe takes"), (dict(iodepth=(4, 1)), "low <= high"),
    (dict(iodepth=[]), "iodepth="), (dict(iodepth=3), "iodepth=3"), (dict(iodepth=(1, 4, 0)), "step > 0"),
])
def test_a_wrong_slider_is_a_config_error(sliders: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        explore(_pick, **sliders)


def test_plotly_js_is_sent_once_for_all_figures_of_a_kernel() -> None:
    figures = [FigureWidget(), FigureWidget(), explore(_pick, iodepth=(1, 2)).figure]
    assert all(len(figure._esm) < 2000 for figure in figures)
    assert _loader() is _loader()
    assert isinstance(_loader(), _Loader)
    assert _loader().bundle == _BUNDLE.read_text(encoding="utf-8")
    assert all(figure._config["displaylogo"] is False for figure in figures)


def test_an_explored_figure_can_be_exported_with_its_runs(tmp_path: Any) -> None:
    explorer = explore(_pick, iodepth=(1, 4))
    export(explorer.figure, tmp_path / "e.html", explorer.runs)
    assert "iodepth 1" in (tmp_path / "e.txt").read_text(encoding="utf-8")
    assert (tmp_path / "e.csv").stat().st_size > 1000
