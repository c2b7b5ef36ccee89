"""Lab 00 with its answers filled in, without any, and on a machine that has no live rung."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell

from .answered import execute, fill_in, judged, misjudged, reference_answers
from .answered import lab as copy_of

NAME = "00_the_whole_path"
ANSWERS = reference_answers(NAME)
REVEALS = {"reveal-used-len", "reveal-bars", "reveal-iops", "reveal-interrupts"}
DRAWN_ELSEWHERE = {"export", "export-caption"}  # the slowest cells; test_labs runs them
NO_LIVE_RUNG = (
    "import vblklab.machine.live as live_module\nlive_module.live_missing = lambda: 'the live machine needs Linux; L0 works here'"
)


@pytest.fixture
def lab(tmp_path: Path) -> nbformat.NotebookNode:
    return copy_of(NAME, tmp_path, without=DRAWN_ELSEWHERE)


def test_the_reference_answers_are_right(lab: nbformat.NotebookNode, tmp_path: Path) -> None:
    fill_in(lab, ANSWERS)
    shown = execute(lab, tmp_path)
    assert misjudged({name: shown[name] for name in [*ANSWERS, *REVEALS]}) == {}


def test_it_ends_without_answers_and_without_a_live_machine(lab: nbformat.NotebookNode, tmp_path: Path) -> None:
    lab.cells.insert(0, new_code_cell(NO_LIVE_RUNG, id="no-live-rung"))
    shown = execute(lab, tmp_path)
    assert judged(shown, [*ANSWERS, *REVEALS]) == {}
    assert shown["live-run"].startswith("the live machine needs Linux; L0 works here\n")
    assert "SimMachine" in shown["live-run"]
