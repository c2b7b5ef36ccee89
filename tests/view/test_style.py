"""The look that all figures share: colours that can be told apart, text that fits, nothing that uploads."""

from __future__ import annotations

import itertools

import numpy as np
import plotly.io as pio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vblklab import view
from vblklab.events import EVENTS, STEPS, event
from vblklab.view import style, text
from vblklab.view.runs import difference, number

from .fake_run import live_run, make_trace, sim_run

# Machado, Oliveira & Fernandes 2009, full strength, for linear RGB.
SEEN_BY = {
    "everyone": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}


def _lab(colour: str, eye: np.ndarray) -> np.ndarray:
    """CIE Lab of ``#rrggbb`` as this eye sees it."""
    value = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    linear = np.clip(eye @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear / [0.9505, 1, 1.089]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eye", SEEN_BY)
@pytest.mark.parametrize("colours", [tuple(style.ROOM_COLOURS.values()), style.RUN_COLOURS], ids=["rooms", "runs"])
def test_colours_can_be_told_apart_by(eye: str, colours: tuple[str, ...]) -> None:
    apart = {(a, b): float(np.linalg.norm(_lab(a, SEEN_BY[eye]) - _lab(b, SEEN_BY[eye]))) for a, b in itertools.combinations(colours, 2)}
    assert min(apart.values()) > 13, min(apart, key=lambda pair: apart[pair])


def test_every_step_has_the_room_that_events_gives_it() -> None:
    try:
        rooms = {step.name: EVENTS[event(f"view_test_{step.name}", step=step.name, cost_ns=1)].room for step in STEPS}
    finally:
        for step in STEPS:
            EVENTS.pop(f"view_test_{step.name}", None)
    assert rooms == style.ROOM_OF_STEP
    assert set(rooms.values()) <= set(style.ROOM_COLOURS) == set(style.ROOM_NAMES)


def test_every_room_of_an_event_has_a_colour() -> None:
    assert {e.room for e in EVENTS.values()} <= set(style.ROOM_COLOURS)


def test_template_is_registered_but_not_made_the_default() -> None:
    assert "vblklab" in pio.templates
    assert pio.templates.default == "plotly"


SIM, SLOW, LIVE = sim_run(), sim_run("mmio-exit (simulated)", seed=3, scale={"D4": 4}), live_run()
LONG = sim_run("A title that goes on for much longer than a figure is wide, " * 3)
FIGURES = {
    "plain map": view.path_map(), "lit map": view.path_map(highlight=["D5"]),
    "map": view.path_map(SIM), "maps": view.path_map(SIM, SLOW, LIVE),
    "waterfall": view.waterfall(SIM), "waterfalls": view.waterfall(SIM, LIVE, LONG), "lanes": view.lanes(LIVE),
    "deep lanes": view.lanes(sim_run(trace=make_trace(64, iodepth=8))), "latency": view.latency(SIM, LONG),
    "histogram": view.latency(LIVE, kind="histogram"), "compare": view.compare(SIM, LIVE), "compare three": view.compare(SIM, LONG, SLOW),
    "spread": view.spread({"exit to user space": [26_000, 27_000], "ioeventfd": [17_000, 18_000]}, title="Two ways", caption="KVM: none"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_has_no_upload_button_fixed_size_and_room_for_its_texts(name: str) -> None:
    fig = FIGURES[name]
    assert {"sendChartToCloud", "sendDataToCloud"} <= set(fig.layout.template.layout.modebar.remove)
    assert fig.layout.width == style.WIDTH
    margin = fig.layout.margin
    plot = fig.layout.height - margin.t - margin.b
    assert plot >= 100
    assert (1 - fig.layout.title.y) * fig.layout.height > 0
    caption = [note for note in fig.layout.annotations if note.name == "caption"]
    for note in caption:
        lines = note.text.count("<br>") + 1
        bottom = margin.b + note.y * plot  # pixels from the lower edge
        assert bottom >= 0
        axis = 4 if fig.layout.xaxis.visible is False else 44
        assert bottom + 17 * lines <= margin.b - axis, "the caption runs into the axis"
    rows = [trace for trace in fig.data if trace.showlegend is not False and trace.legend is None]
    if fig.layout.showlegend and rows:
        assert (1 - fig.layout.legend.y) * fig.layout.height + 20 * len(rows) <= margin.t, "the legend runs into the plot"


@pytest.mark.parametrize("name", [name for name in FIGURES if name not in ("plain map", "lit map")])
def test_legend_and_title_are_not_wider_than_the_figure(name: str) -> None:
    fig = FIGURES[name]
    for trace in fig.data:
        if trace.showlegend is not False and trace.legend is None:
            assert text.text_px(trace.name, text.TEXT_PX - 1) < style.WIDTH - 60


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\n"), max_size=300), st.integers(60, 900))
def test_wrapped_lines_fit_and_lose_no_short_word(words: str, width: int) -> None:
    lines = text.wrap(words, width, 12)
    assert all(text.text_px(line, 12) <= width for line in lines)
    if all(text.text_px(word, 12) <= width for word in words.split(" ")):
        assert " ".join(lines).split(" ") == words.strip(" ").split(" ") or " ".join(lines) == words


@pytest.mark.parametrize(("value", "printed"), [
    (0, "0"), (0.000652, "0.00065"), (0.0652, "0.065"), (0.65, "0.65"), (1.924, "1.92"), (88.24, "88.2"), (99.97, "100"),
    (1234.4, "1,234"), (-3.5, "−3.50"),
])
def test_number_has_three_digits_and_no_exponent(value: float, printed: str) -> None:
    assert number(value) == printed


@pytest.mark.parametrize(("first", "second", "printed"), [
    (2, 2, "±0"), (2, 3.48, "+1.48 (+74 %)"), (4, 2, "−2.00 (−50 %)"), (2, 15, "+13.0 (×7.5)"), (0, 1.5, "+1.50"), (100, 100.2, "±0"),
])
def test_difference_is_absolute_and_relative(first: float, second: float, printed: str) -> None:
    assert difference(first, second) == printed
