"""Lab 00 with its answers filled in, without any, and on a machine that has no live rung."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell

from .jupyter_home import copy_labs, jupyter_env
from .test_labs import errors_in, run

NAME = "00_the_whole_path"
ANSWERS: dict[str, str] = json.loads((Path(__file__).parent / "solutions" / f"{NAME}.json").read_text(encoding="utf-8"))
REVEALS = {"reveal-used-len", "reveal-bars", "reveal-iops", "reveal-interrupts"}
DRAWN_ELSEWHERE = {"export", "export-caption"}  # the slowest cells; test_labs runs them
NO_LIVE_RUNG = (
    "import vblklab.machine.live as live_module\nlive_module.live_missing = lambda: 'the live machine needs Linux; L0 works here'"
)


@pytest.fixture
def lab(tmp_path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(copy_labs(tmp_path / "labs") / f"{NAME}.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.id not in DRAWN_ELSEWHERE]
    return notebook


def execute(notebook: nbformat.NotebookNode, tmp_path: Path) -> dict[str, str]:
    """Run it; the text that each code cell shows."""
    asyncio.run(run(notebook, tmp_path / "labs", jupyter_env(tmp_path / "jupyter")))
    assert not (wrong := errors_in(notebook)), "\n".join(wrong)
    shown = {}
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        shown[cell.id] = "".join(one.get("text", "") or one.get("data", {}).get("text/plain", "") for one in outputs)
    return shown


def test_the_reference_answers_are_right(lab: nbformat.NotebookNode, tmp_path: Path) -> None:
    for cell in lab.cells:
        if cell.id in ANSWERS:
            assert cell.source.count("...") == 1
            cell.source = cell.source.replace("...", ANSWERS[cell.id])
        else:
            assert cell.cell_type == "markdown" or "..." not in cell.source, f"no answer for {cell.id}"
    shown = execute(lab, tmp_path)
    verdicts = {name: shown[name] for name in [*ANSWERS, *REVEALS]}
    signs = {name: "✎" if name.startswith("predict-") else "✓" for name in verdicts}
    assert {name: text for name, text in verdicts.items() if not text.startswith(signs[name])} == {}


def test_it_ends_without_answers_and_without_a_live_machine(lab: nbformat.NotebookNode, tmp_path: Path) -> None:
    lab.cells.insert(0, new_code_cell(NO_LIVE_RUNG, id="no-live-rung"))
    shown = execute(lab, tmp_path)
    assert {name: shown[name] for name in [*ANSWERS, *REVEALS] if not shown[name].startswith("…")} == {}
    assert shown["live-run"].startswith("the live machine needs Linux; L0 works here\n")
    assert "SimMachine" in shown["live-run"]
