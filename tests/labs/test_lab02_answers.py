"""Lab 02 with its answers filled in; test_labs runs it without any."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from .answered import execute, fill_in, misjudged, reference_answers
from .answered import lab as copy_of

NAME = "02_the_driver"
ANSWERS = reference_answers(NAME)
REVEALS = {"reveal-accesses", "check-driver", "kick-runs", "reveal-polling"}
DRAWN_ELSEWHERE = {"export"}  # the slowest cell; test_labs runs it


@pytest.fixture
def lab(tmp_path: Path) -> nbformat.NotebookNode:
    return copy_of(NAME, tmp_path, without=DRAWN_ELSEWHERE)


def test_the_reference_answers_are_right(lab: nbformat.NotebookNode, tmp_path: Path) -> None:
    fill_in(lab, ANSWERS)
    shown = execute(lab, tmp_path)
    assert misjudged({name: shown[name] for name in [*ANSWERS, *REVEALS]}) == {}
    assert "nothing can complete them" in shown["empty"]
    assert shown["run-mine"].count("MyDriver on") == shown["run-mine"].count("0 errors, 0 wrong blocks") == 2
    assert "an interrupt is lost" in shown["second-look"]
