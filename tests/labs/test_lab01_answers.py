"""Lab 01 with its answers filled in; test_labs runs it without any."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from .answered import execute, fill_in, misjudged, reference_answers
from .answered import lab as copy_of

NAME = "01_the_device"
ANSWERS = reference_answers(NAME)
REVEALS = {"reveal-status", "reveal-reset", "check-device", "reveal-depth"}
DRAWN_ELSEWHERE = {"export"}  # the slowest cell; test_labs runs it
NO_GUEST = {"VBLKLAB_CACHE": "/nonexistent"}


@pytest.fixture
def lab(tmp_path: Path) -> nbformat.NotebookNode:
    return copy_of(NAME, tmp_path, without=DRAWN_ELSEWHERE)


def test_the_reference_answers_are_right(lab: nbformat.NotebookNode, tmp_path: Path) -> None:
    fill_in(lab, ANSWERS)
    shown = execute(lab, tmp_path, NO_GUEST)
    assert misjudged({name: shown[name] for name in [*ANSWERS, *REVEALS]}) == {}
    assert "DeviceID reads 0" in shown["empty"]
    assert "MyDevice: 0 errors, 0 wrong blocks" in shown["run-mine"]
    assert "LiveMachine" in shown["run-live"]
    assert "make guest" in shown["run-linux"] or "QEMU" in shown["run-linux"]
