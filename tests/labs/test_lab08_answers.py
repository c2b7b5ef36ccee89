"""Lab 08 with its answers filled in: from the recording everywhere, on a real guest where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from vblklab.peer.folders import cache_folder

from .answered import execute, fill_in, lab, misjudged, reference_answers

NAME = "08_a_real_guest"
ANSWERS = reference_answers(NAME)
REVEALS = ("reveal-exception", "reveal-bugs", "kill", "reveal-steps")
FOUR_BUGS = frozenset({"predict-bugs", "wrong-length", "status-first", "no-flush", "lost", "reveal-bugs"})
SUITE = FOUR_BUGS | {"real-runs", "predict-steps", "model", "reveal-steps"}  # tests/machine/test_linux_vm.py measures both of them
BOOTS_S = 1200.0  # eleven boots, each of which takes its time on a busy machine


def solved(tmp_path: Path, env: dict[str, str], without: frozenset[str] = frozenset()) -> dict[str, str]:
    """What each cell shows, with the reference answers filled in."""
    notebook = lab(NAME, tmp_path)
    fill_in(notebook, ANSWERS)
    notebook.cells = [cell for cell in notebook.cells if cell.id not in without]
    return execute(notebook, tmp_path, env, BOOTS_S)


def judge(shown: dict[str, str], without: frozenset[str] = frozenset()) -> None:
    assert misjudged({name: shown[name] for name in {*ANSWERS, *REVEALS} - without}) == {}


def test_the_answers_are_right_on_the_recording(tmp_path: Path) -> None:
    shown = solved(tmp_path, {"VBLKLAB_CACHE": str(tmp_path / "none"), "PATH": "/nonexistent"})
    assert "A recording answers" in shown["boot"] and "recorded:" in shown["boot"]
    assert "on Debian" in shown["boot"] and "on Debian" not in shown["read-bad"]
    assert "RuntimeError: sector 2048 is bad" in shown["read-bad"]
    judge(shown)


@pytest.mark.guest
@pytest.mark.parametrize(
    "without",
    [SUITE, pytest.param(frozenset(), marks=pytest.mark.long)],
    ids=["three boots: bytes, exception, kill", "whole"],
)
def test_the_answers_are_right_on_a_real_guest(without: frozenset[str], tmp_path: Path) -> None:
    shown = solved(tmp_path, {"VBLKLAB_CACHE": str(cache_folder())}, without)
    assert "recorded:" not in shown["boot"] and "the guest takes commands" in shown["boot"]
    assert "RuntimeError: sector 2048 is bad" in "".join(shown.values())
    judge(shown, without)
