"""Samples of short things as areas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vblklab.errors import ConfigError
from vblklab.view import spread

EXITS, FAST = [26_000 + 10 * n for n in range(200)], [17_000 + 5 * n for n in range(100)]


def areas(figure: Any) -> list[Any]:
    return [trace for trace in figure.data if trace.fill == "tozeroy"]


def test_each_set_has_an_area_with_its_median_and_how_many_there_were() -> None:
    figure = spread({"exit": EXITS, "ioeventfd": FAST}, title="Two ways", caption="KVM: kvm_intel")
    assert [trace.name for trace in areas(figure)] == ["exit · median 27.0 µs · 200 times", "ioeventfd · median 17.2 µs · 100 times"]
    assert figure.layout.meta["title"] == "Two ways"
    assert "KVM: kvm_intel" in figure.layout.meta["caption"].splitlines()


def test_the_shares_of_a_set_and_what_is_beyond_the_axis_are_all_of_it() -> None:
    slow = [*FAST, *[1_000_000] * 2]
    figure = spread({"fast": slow, "exit": EXITS}, title="t")
    shown = sum(areas(figure)[0].y[1:-1:2])
    assert shown == pytest.approx(100 * 100 / 102)
    assert "Beyond the axis: fast 2.0 %" in figure.layout.meta["caption"]


def test_a_few_slow_ones_do_not_press_the_others_together() -> None:
    slow = [*FAST, *[1_000_000] * 60]
    figure = spread({"fast": slow}, title="t")
    assert figure.layout.xaxis.range[1] == pytest.approx(4 * np.median(slow) / 1000)


def test_samples_that_are_all_the_same_are_drawn() -> None:
    figure = spread({"model": [5000] * 10}, title="t")
    assert max(areas(figure)[0].y) == pytest.approx(100)
    assert np.all(np.diff(areas(figure)[0].x) >= 0)


@pytest.mark.parametrize("samples", [{}, {"one": [1]}, {str(n): [1, 2] for n in range(7)}])
def test_too_few_samples_and_too_many_sets_are_refused(samples: dict[str, list[float]]) -> None:
    with pytest.raises(ConfigError, match="spread of"):
        spread(samples, title="t")
