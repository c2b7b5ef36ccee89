"""Waterfalls: bars that begin where the step before ended."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from vblklab.errors import ConfigError
from vblklab.events import STEPS
from vblklab.view import waterfall

from .fake_run import KERNEL, live_run, sim_run

SIM, LIVE = sim_run(), live_run()


def _bars(fig: Any) -> list[Any]:
    return [trace for trace in fig.data if trace.type == "bar" and trace.base is not None]


def test_request_shows_the_stamps_of_that_io() -> None:
    (bar,) = _bars(waterfall(SIM, request=7, unit="ns"))
    row = SIM.rows[7]
    assert list(bar.base) == pytest.approx(row[:15] - row[0])
    assert list(bar.x) == pytest.approx(np.diff(row))
    assert list(bar.y) == list(range(15))
    assert [own[0] for own in bar.customdata] == [step.name for step in STEPS]


def test_a_negative_request_counts_from_the_end() -> None:
    (bar,) = _bars(waterfall(SIM, request=-1, unit="ns"))
    assert sum(bar.x) == SIM.rows[-1, 15] - SIM.rows[-1, 0]


def test_a_percentile_is_the_io_of_that_rank_so_its_steps_add_up() -> None:
    totals = np.sort(SIM.rows[:, 15] - SIM.rows[:, 0])
    bars = _bars(waterfall(SIM, percentiles=(50, 99, 100), unit="ns"))
    assert [sum(bar.x) for bar in bars] == [totals[round(p * (len(totals) - 1))] for p in (0.5, 0.99, 1.0)]


def test_each_bar_begins_where_the_one_before_ended() -> None:
    for bar in _bars(waterfall(SIM)):
        assert list(bar.base)[1:] == pytest.approx([b + x for b, x in zip(bar.base, bar.x, strict=True)][:-1])


def test_live_bars_are_split_into_plain_kernel_and_hatched_python() -> None:
    kernel, python = _bars(waterfall(LIVE, request=0, unit="ns"))
    whole = np.diff(LIVE.rows[0])
    for k, step in enumerate(STEPS):
        assert kernel.x[k] == pytest.approx(whole[k] * KERNEL.get(step.name, 0.0))
        assert python.base[k] == pytest.approx(kernel.base[k] + kernel.x[k])
    assert np.asarray(kernel.x) + np.asarray(python.x) == pytest.approx(whole)
    assert python.marker.pattern.shape == "/"
    assert not kernel.marker.pattern.shape


def test_simulated_bars_have_no_python() -> None:
    fig = waterfall(SIM)
    assert not any("Python" in trace.name for trace in fig.data)


def test_two_runs_share_the_axis_and_no_bars_overlap() -> None:
    bars = _bars(waterfall(SIM, LIVE))
    spans = sorted({(bar.offset, bar.offset + bar.width) for bar in bars})
    assert len(spans) == 4
    assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(spans))
    assert spans[0][0] >= -0.5
    assert spans[-1][1] <= 0.5


def test_axis_starts_at_the_call_and_holds_every_bar_and_its_label() -> None:
    fig = waterfall(SIM, LIVE)
    end = max(b + x for bar in _bars(fig) for b, x in zip(bar.base, bar.x, strict=True))
    assert fig.layout.xaxis.range[0] == 0
    assert fig.layout.xaxis.range[1] > 1.05 * end
    assert "µs" in fig.layout.xaxis.title.text


def test_many_runs_drop_the_labels_instead_of_overlapping_them() -> None:
    assert all(bar.text is None for bar in _bars(waterfall(SIM, LIVE, SIM)))


@pytest.mark.parametrize(("options", "said"), [
    (dict(request=8192), "0 to 8,191"), (dict(request=-8193), "0 to 8,191"), (dict(percentiles=()), "0 to 100"),
    (dict(percentiles=(101,)), "0 to 100"), (dict(percentiles=(1, 2, 3, 4, 5)), "at most 4"),
])
def test_a_wrong_option_is_a_config_error(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        waterfall(SIM, **options)
