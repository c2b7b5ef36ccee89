"""Differences step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vblklab.errors import ConfigError
from vblklab.events import STEPS
from vblklab.view import compare

from .fake_run import live_run, sim_run

SIM, SLOW, LIVE = sim_run(), sim_run("slow (simulated)", scale={"D4": 3, "U6": 0.5}), live_run()


def _bars(fig: Any) -> list[Any]:
    return [trace for trace in fig.data if trace.type == "bar" and trace.customdata is not None]


def test_bars_are_the_differences_in_the_order_of_the_path_with_the_total_below() -> None:
    fig = compare(SIM, SLOW, unit="ns")
    (bar,) = _bars(fig)
    means = [np.array([stat.mean_ns for stat in run.steps]) for run in (SIM, SLOW)]
    assert [row[0] for row in bar.customdata] == [*(step.name for step in STEPS), "total"]
    assert list(bar.x)[:15] == pytest.approx(means[1] - means[0])
    assert bar.x[15] == pytest.approx(sum(means[1]) - sum(means[0]))
    assert fig.layout.yaxis.range[0] > fig.layout.yaxis.range[1], "D1 is at the top"


def test_the_step_that_got_slower_and_the_one_that_got_faster_say_by_how_much() -> None:
    (bar,) = _bars(compare(SIM, SLOW))
    texts = dict(zip([row[0] for row in bar.customdata], bar.text, strict=True))
    assert "(+200 %)" in texts["D4"]
    assert "(−50 %)" in texts["U6"]
    assert texts["HW"] == "±0"


def test_columns_hold_each_runs_times_and_pythons_part_of_a_live_run() -> None:
    columns = {trace.name: list(trace.text) for trace in compare(SIM, LIVE).data if trace.type == "scatter" and trace.mode == "text"}
    assert columns["column A"][0] == "<b>A</b>"
    assert len(columns["column A"]) == len(columns["column B"]) == len(columns["column B Python"]) == 17
    assert columns["column B Python"][STEPS.index(next(s for s in STEPS if s.name == "HW")) + 1] == "0"
    assert "column A Python" not in columns


def test_axis_holds_every_bar_and_its_label() -> None:
    fig = compare(SIM, SLOW)
    (bar,) = _bars(fig)
    low, high = fig.layout.xaxis.range
    assert low < min(bar.x) < 0 < max(bar.x) < high


def test_medians_use_the_median_of_the_totals_and_say_that_they_do_not_add_up() -> None:
    fig = compare(SIM, SLOW, statistic="median", unit="ns")
    (bar,) = _bars(fig)
    medians = [float(np.median(run.rows[:, 15] - run.rows[:, 0])) for run in (SIM, SLOW)]
    assert bar.x[15] == pytest.approx(medians[1] - medians[0])
    assert "need not add up" in fig.layout.meta["caption"]


def test_equal_runs_have_no_difference() -> None:
    fig = compare(SIM, SIM)
    assert "no difference" in fig.layout.title.text
    assert set(_bars(fig)[0].text) == {"±0"}


@pytest.mark.parametrize("count", [1, 5])
def test_one_run_or_five_are_a_config_error(count: int) -> None:
    with pytest.raises(ConfigError):
        compare(*[SIM] * count)


def test_an_unknown_statistic_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="mean, median"):
        compare(SIM, SLOW, statistic="p99")
