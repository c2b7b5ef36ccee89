"""The map of fourteen arrows."""

from __future__ import annotations

from typing import Any

import pytest

from vblklab.errors import ConfigError
from vblklab.events import STEPS
from vblklab.view import path_map
from vblklab.view.path_map import UNLIT  # type: ignore[attr-defined]
from vblklab.view.style import ROOM_COLOURS, ROOM_NAMES, ROOM_OF_STEP, RUN_COLOURS, tint

from .fake_run import live_run, sim_run

ARROWS = [step.name for step in STEPS if step.name != "HW"]
SIM, SLOW, LIVE = sim_run(), sim_run("slow (simulated)", seed=9, scale={"D4": 3}), live_run()


def _labels(fig: Any) -> dict[str, str]:
    down, up = (next(t for t in fig.data if t.name == f"labels {side}") for side in "DU")
    return {**{f"D{i + 1}": text for i, text in enumerate(down.text)}, **{f"U{7 - i}": text for i, text in enumerate(up.text)}}


def _arrows(fig: Any) -> list[Any]:
    return [shape for shape in fig.layout.shapes if shape.type == "path"]


def _width(shape: Any) -> float:
    """The shaft's width of an arrow: twice the distance from its tail corner to its tip."""
    xs = [float(part.split(",")[0]) for part in shape.path[1:-2].split(" L")]
    return xs[-1] - xs[0]


def test_plain_map_has_eight_rooms_fourteen_arrows_and_every_meaning() -> None:
    fig = path_map()
    rooms = next(t for t in fig.data if t.name == "rooms")
    assert [text.split("</b>")[0].removeprefix("<b>") for text in rooms.text] == list(ROOM_NAMES.values())
    assert list(rooms.y) == sorted(rooms.y)
    assert fig.layout.yaxis.range[0] > fig.layout.yaxis.range[1], "hardware is at the bottom"
    assert len(_arrows(fig)) == 14
    assert set(_labels(fig)) == set(ARROWS)
    assert all(f"<b>{name}</b>" in text for name, text in _labels(fig).items())


def test_down_arrows_stand_left_and_point_down_up_arrows_stand_right_and_point_up() -> None:
    for shape, (name, _) in zip(_arrows(path_map()), ((n, g) for g in range(7) for n in (f"D{g + 1}",)), strict=False):
        points = [tuple(map(float, part.split(","))) for part in shape.path[1:-2].split(" L")]
        tail, tip = points[0][1], points[3][1]
        assert tip > tail, name  # y grows downwards
    up = _arrows(path_map())[7:]
    for shape in up:
        points = [tuple(map(float, part.split(","))) for part in shape.path[1:-2].split(" L")]
        assert points[3][1] < points[0][1]
        assert points[0][0] > 390


def test_each_arrow_carries_its_mean_and_its_share() -> None:
    labels = _labels(path_map(SIM))
    total = sum(stat.mean_ns for stat in SIM.steps)
    for stat in SIM.steps:
        if stat.step != "HW":
            assert f"{stat.mean_ns / 1e3:.2f} µs" in labels[stat.step]
            assert f"{100 * stat.mean_ns / total:.1f} %" in labels[stat.step]


def test_median_and_unit_change_the_numbers() -> None:
    labels = _labels(path_map(SIM, statistic="median", unit="ns"))
    stat = next(s for s in SIM.steps if s.step == "D4")
    assert f"{stat.p50_ns:,} ns" in labels["D4"]


def test_arrow_width_grows_with_time() -> None:
    arrows = dict(zip([f"D{n}" for n in range(1, 8)] + [f"U{n}" for n in range(7, 0, -1)], _arrows(path_map(SIM)), strict=True))
    mean = {stat.step: stat.mean_ns for stat in SIM.steps}
    by_time = sorted(ARROWS, key=lambda name: mean[name])
    widths = [_width(arrows[name]) for name in by_time]
    assert widths == sorted(widths)
    assert widths[-1] / widths[0] > 3


def test_arrows_have_the_colour_of_their_room() -> None:
    colours = {shape.fillcolor for shape in _arrows(path_map(SIM))}
    assert colours == {ROOM_COLOURS[ROOM_OF_STEP[name]] for name in ARROWS}


def test_a_second_run_stands_beside_with_its_difference() -> None:
    fig = path_map(SIM, SLOW)
    text = _labels(fig)["D4"]
    assert RUN_COLOURS[0] in text
    assert RUN_COLOURS[1] in text
    assert "(+20" in text
    assert len(_arrows(fig)) == 28
    assert {shape.fillcolor for shape in _arrows(fig)} == set(RUN_COLOURS[:2])


def test_live_arrows_are_pale_where_python_took_the_time() -> None:
    fills = [shape.fillcolor for shape in _arrows(path_map(LIVE))]
    device = ROOM_COLOURS["device"]
    assert tint(device, 0.45) in fills
    assert ROOM_COLOURS["kvm"] in fills
    assert "Python" in _labels(path_map(LIVE))["D5"]
    assert "Python" not in _labels(path_map(LIVE))["U1"]


def test_highlight_lights_its_steps_only_and_names_their_trace_points() -> None:
    fig = path_map(highlight=("D5", "U3"))
    labels = _labels(fig)
    assert "virtio_queue_notify" in labels["D5"]
    assert "virtqueue_fill" in labels["U3"]
    assert "kvm_exit" not in labels["D4"]
    fills = [shape.fillcolor for shape in _arrows(fig)]
    assert fills.count(UNLIT) == 12
    assert fills.count(ROOM_COLOURS["device"]) == 2


def test_highlight_works_with_a_run_and_as_one_word() -> None:
    fills = [shape.fillcolor for shape in _arrows(path_map(SIM, highlight="D4"))]
    assert fills.count(UNLIT) == 13


def test_all_numbers_are_in_the_data_for_the_csv() -> None:
    trace = next(t for t in path_map(SIM).data if t.customdata is not None)
    assert [row[0] for row in trace.customdata] == [step.name for step in STEPS]
    shares = [row[trace.meta["columns"].index("share")] for row in trace.customdata]
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("wrong", [dict(highlight=("D9",)), dict(statistic="mode"), dict(unit="h")])
def test_a_wrong_option_is_a_config_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        path_map(SIM, **wrong)
