"""Captions and labels: no figure without the origin of its numbers."""

from __future__ import annotations

import dataclasses

import pytest

from vblklab import view
from vblklab.errors import ConfigError
from vblklab.trace.run import Run
from vblklab.view.runs import labels, provenance_text, python_part

from .fake_run import COST_TABLE, KERNEL, live_run, sim_run

SIM, LIVE = sim_run(), live_run()
RECORDED = dataclasses.replace(live_run("fio on a real host"), rung="L1 recorded", split=dict.fromkeys(LIVE.kinds, (1.0, 0.0)))

PICTURES = {
    "path_map": view.path_map, "waterfall": view.waterfall, "lanes": view.lanes, "latency": view.latency,
    "histogram": lambda *runs: view.latency(*runs, kind="histogram"), "compare": view.compare,
}
SEVERAL = [name for name in PICTURES if name != "lanes"]


def _caption(fig: object) -> str:
    texts = [note.text for note in fig.layout.annotations if note.name == "caption"]  # type: ignore[attr-defined]
    assert len(texts) == 1
    return str(texts[0]).replace("<br>", " ")


@pytest.mark.parametrize("name", PICTURES)
def test_a_figure_of_simulated_data_says_simulated_and_names_its_cost_table(name: str) -> None:
    runs = (SIM, SIM) if name == "compare" else (SIM,)
    printed = _caption(PICTURES[name](*runs))
    assert "simulated" in printed
    assert COST_TABLE in printed
    assert "10,000 I/Os" in printed


@pytest.mark.parametrize("name", PICTURES)
def test_a_figure_of_live_data_names_host_and_pythons_part(name: str) -> None:
    runs = (LIVE, LIVE) if name == "compare" else (LIVE,)
    printed = _caption(PICTURES[name](*runs))
    assert "L2 live" in printed
    assert "AMD EPYC 7B13" in printed
    assert "Python's" in printed
    assert "simulated" not in printed


@pytest.mark.parametrize("name", SEVERAL)
def test_simulated_and_live_runs_are_told_apart_in_the_legend(name: str) -> None:
    fig = PICTURES[name](SIM, LIVE)
    shown = [trace.name for trace in fig.data if trace.showlegend is not False and trace.legend is None]
    assert all(("simulated" in text) != ("live" in text) for text in shown)
    assert any("simulated" in text for text in shown)
    assert any("live" in text for text in shown)
    assert {text[0] for text in shown} == {"A", "B"}


def test_caption_of_one_run_and_of_several() -> None:
    assert view.caption(SIM) == view.caption([SIM])
    lines = view.caption([SIM, LIVE]).splitlines()
    assert lines[0].startswith("A: L0 simulated")
    assert lines[1].startswith("B: L2 live")


def test_caption_joins_runs_of_the_same_provenance() -> None:
    assert view.caption([SIM, LIVE, SIM]).splitlines()[0].startswith("A, C: ")


def test_caption_does_not_hide_errors_mismatches_or_an_interruption() -> None:
    bad = dataclasses.replace(sim_run(), interrupted=True)
    bad.jobs[0].read.errors, bad.jobs[0].mismatch_count = 3, 2
    assert "3 I/O errors · 2 data mismatches · interrupted" in view.caption(bad)


def test_recorded_runs_are_called_recorded_and_have_no_python() -> None:
    assert labels([RECORDED]) == ["fio on a real host (live, recorded)"]
    assert "Python's" not in view.caption(RECORDED)
    assert python_part(RECORDED, "D5") == 0.0


def test_python_part_is_the_share_of_the_split() -> None:
    assert python_part(SIM, "D3") is None
    assert python_part(LIVE, "D1") == 1.0
    assert python_part(LIVE, "HW") == 0.0
    assert python_part(LIVE, "D4") == pytest.approx(1 - KERNEL["D4"])


def test_a_cut_label_keeps_its_origin() -> None:
    run = sim_run("long " * 60)
    (label,) = labels([run], 300)
    assert label.endswith("… (simulated)")


def test_provenance_text_holds_everything() -> None:
    text = provenance_text([SIM, LIVE])
    for part in (*SIM.provenance.values(), *LIVE.provenance.values(), *LIVE.notes, *SIM.recipe.values(), "kicks: 9812"):
        assert part in text


@pytest.mark.parametrize("name", PICTURES)
def test_anything_but_a_run_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot draw a str"):
        PICTURES[name](*(["no run"] * (2 if name == "compare" else 1)))


@pytest.mark.parametrize("name", [*SEVERAL, "path_map"])
def test_too_many_runs_are_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match="on one axis"):
        PICTURES[name](*[SIM] * 7)


@pytest.mark.parametrize("name", PICTURES)
def test_an_unknown_unit_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match="unit='s'"):
        {**PICTURES, "histogram": view.latency}[name](*([SIM] * (2 if name == "compare" else 1)), unit="s")


@pytest.mark.parametrize("name", ["waterfall", "latency", "path_map"])
def test_a_run_without_a_finished_io_is_a_config_error(name: str) -> None:
    empty = Run(title="empty", rung="L0 simulated", simulated=True, provenance={}, recipe={}, notes=[], jobs=[], counters={},
                rows=SIM.rows[:0], durations=[type(SIM.clat)() for _ in range(15)], duration_ns=0)
    with pytest.raises(ConfigError, match="'empty' has no"):
        PICTURES[name](empty)
