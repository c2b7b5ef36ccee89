"""Lab 05 with its answers filled in; test_labs runs it without any."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from .answered import execute, fill_in, misjudged, reference_answers
from .answered import lab as copy_of

NAME = "05_the_virtqueue"
ANSWERS = reference_answers(NAME)
REVEALS = {"reveal-kicks", "reveal-lines", "reveal-in-flight"}
DRAWN_ELSEWHERE = {"export", "keep-words"}  # the slowest cells; test_labs runs them


@pytest.fixture
def lab(tmp_path: Path) -> nbformat.NotebookNode:
    return copy_of(NAME, tmp_path, without=DRAWN_ELSEWHERE)


def test_the_reference_answers_are_right(lab: nbformat.NotebookNode, tmp_path: Path) -> None:
    fill_in(lab, ANSWERS)
    shown = execute(lab, tmp_path)
    assert misjudged({name: shown[name] for name in [*ANSWERS, *REVEALS]}) == {}
    assert "a kick is lost" in shown["race"]
