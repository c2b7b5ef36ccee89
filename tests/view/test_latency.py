"""Latency distributions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vblklab.errors import ConfigError
from vblklab.view import latency

from .fake_run import live_run, sim_run

SIM, LIVE = sim_run(), live_run()


def _lines(fig: Any) -> list[Any]:
    return [trace for trace in fig.data if trace.type == "scatter" and trace.mode == "lines" and "median" not in trace.name]


def test_percentiles_have_one_over_one_minus_q_on_a_logarithmic_axis() -> None:
    fig = latency(SIM, unit="ns")
    (line,) = _lines(fig)
    x, y = np.asarray(line.x), np.asarray(line.y)
    assert fig.layout.xaxis.type == "log"
    assert np.all(np.diff(x) >= 0)
    assert np.all(np.diff(y) >= 0)
    assert (x[0], x[-1]) == (1, SIM.ios)
    assert y[-1] == SIM.clat.max_ns
    for p in (50, 90, 99, 99.9):
        drawn = y[np.searchsorted(x, 1 / (1 - p / 100) - 1e-6)]
        assert drawn == pytest.approx(SIM.clat.percentile(p), rel=0.02)
    assert list(fig.layout.xaxis.ticktext)[:3] == ["50 %", "90 %", "99 %"]


def test_marks_lie_on_the_percentiles() -> None:
    marks = next(trace for trace in latency(SIM, unit="ns").data if "marks" in trace.name)
    for own, x, y in zip(marks.customdata, marks.x, marks.y, strict=True):
        if own[0] < 100:
            assert x == pytest.approx(1 / (1 - own[0] / 100))
            assert y == SIM.clat.percentile(own[0])


def test_simulated_lines_are_dashed_and_live_lines_solid() -> None:
    sim, live = _lines(latency(SIM, LIVE))
    assert sim.line.dash != "solid"
    assert live.line.dash == "solid"


def test_histogram_is_binned_and_its_bins_add_up_to_all_ios_on_the_axis() -> None:
    fig = latency(SIM, LIVE, kind="histogram", unit="ns")
    for run, line in zip((SIM, LIVE), _lines(fig), strict=True):
        x, y = np.asarray(line.x), np.asarray(line.y)
        assert len(x) <= 130, "binned before it goes to the browser"
        shares = y[1:-1:2]
        durations = run.rows[:, 15] - run.rows[:, 1]
        inside = 100 * np.mean((durations >= x[0]) & (durations <= x[-1]))
        assert shares.sum() == pytest.approx(inside, abs=0.7)
        peak = x[1 + 2 * int(np.argmax(shares))]
        assert peak == pytest.approx(np.median(durations), rel=0.15)
    assert "Outside the axis" in fig.layout.meta["caption"]


def test_a_narrow_distribution_has_no_gaps_between_bins() -> None:
    (line,) = _lines(latency(SIM, kind="histogram"))
    shares = np.asarray(line.y)[1:-1:2]
    body = shares[shares.argmax() - 5 : shares.argmax() + 5]
    assert body.min() > 0.2 * body.max()


def test_legend_tells_p50_and_p99_of_each_run() -> None:
    names = [trace.name for trace in _lines(latency(SIM, LIVE))]
    assert all("p50" in name and "p99" in name for name in names)


def test_an_unknown_kind_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="percentiles, histogram"):
        latency(SIM, kind="violin")
