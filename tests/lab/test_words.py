"""The tables of words say what events.py says."""

from __future__ import annotations

import pytest

import vblklab as vb


def test_all_steps_are_listed_in_order() -> None:
    table = vb.words()
    assert [row[0] for row in table.rows] == [step.name for step in vb.STEPS]
    assert len(str(table).splitlines()) == 16


def test_only_names_of_real_systems_are_called_seen() -> None:
    models = {event.name for event in vb.EVENTS.values() if event.kind == "m"}
    assert not [row for row in vb.words().rows if models & set(row[3].split(", "))]


@pytest.mark.parametrize("step", [step.name for step in vb.STEPS])
def test_one_step_lists_its_trace_points(step: str) -> None:
    table = vb.words(step)
    assert [row[0] for row in table.rows] == [event.name for event in vb.EVENTS.values() if event.step == step]
    assert all(len(row) == len(table.head) for row in table.rows)
    assert table._repr_html_().count("<tr>") == len(table.rows) + 1


@pytest.mark.parametrize("step", ["D8", "", 4, [], {}])
def test_an_unknown_step_is_refused(step: object) -> None:
    with pytest.raises(vb.ConfigError, match="give one of D1"):
        vb.words(step)  # type: ignore[arg-type]
