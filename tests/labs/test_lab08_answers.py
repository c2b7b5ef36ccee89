"""Lab 08 with its answers filled in: from the recording everywhere, on a real guest where there is one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import nbformat
import pytest

from vblklab.peer.folders import cache_folder

from .jupyter_home import copy_labs, jupyter_env
from .test_labs import errors_in, run

NAME = "08_a_real_guest"
ANSWERS: dict[str, str] = json.loads((Path(__file__).parent / "solutions" / f"{NAME}.json").read_text(encoding="utf-8"))
REVEALS = ("reveal-exception", "kill")


def solved(tmp_path: Path, env: dict[str, str]) -> dict[str, str]:
    """What each cell shows, with the reference answers filled in."""
    notebook = nbformat.read(copy_labs(tmp_path / "labs") / f"{NAME}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.id in ANSWERS:
            assert cell.source.count("...") == 1
            cell.source = cell.source.replace("...", ANSWERS[cell.id])
        else:
            assert cell.cell_type == "markdown" or "..." not in cell.source, f"no answer for {cell.id}"
    asyncio.run(run(notebook, tmp_path / "labs", jupyter_env(tmp_path / "jupyter") | env))
    assert not (wrong := errors_in(notebook)), "\n".join(wrong)
    shown = {}
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        shown[cell.id] = "".join(one.get("text", "") or one.get("data", {}).get("text/plain", "") for one in outputs)
    return shown


def judge(shown: dict[str, str]) -> None:
    verdicts = {name: shown[name] for name in [*ANSWERS, *REVEALS]}
    signs = {name: "✎" if name.startswith("predict-") else "✓" for name in verdicts}
    assert {name: text for name, text in verdicts.items() if signs[name] not in text} == {}


def test_the_answers_are_right_on_the_recording(tmp_path: Path) -> None:
    shown = solved(tmp_path, {"VBLKLAB_CACHE": str(tmp_path / "none"), "PATH": "/nonexistent"})
    assert "recording answers" in shown["boot"] and "recorded:" in shown["boot"]
    judge(shown)


@pytest.mark.guest
@pytest.mark.xdist_group("guest")
def test_the_answers_are_right_on_a_real_guest(tmp_path: Path) -> None:
    shown = solved(tmp_path, {"VBLKLAB_CACHE": str(cache_folder())})
    assert "recorded:" not in shown["boot"] and "the guest takes commands" in shown["boot"]
    assert "RuntimeError: sector 2048 is bad" in "".join(shown.values())
    judge(shown)
