"""A lab with its answers filled in, executed, and what its cells show."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping
from pathlib import Path

import nbformat

from .jupyter_home import copy_labs, jupyter_env
from .test_labs import LIMIT_S, errors_in, run, shown_in

__all__ = ["NO_KVM", "execute", "fill_in", "judged", "lab", "misjudged", "reference_answers"]

NO_KVM = "import vblklab.kvm.host as kvm_host\nkvm_host.found = lambda: (False, 'there is no /dev/kvm', 'load kvm_intel or kvm_amd')"
"""A first cell for a kernel that finds no KVM."""


def reference_answers(name: str) -> dict[str, str]:
    """Cell id -> the answer that is right."""
    answers: dict[str, str] = json.loads((Path(__file__).parent / "solutions" / f"{name}.json").read_text(encoding="utf-8"))
    return answers


def lab(name: str, tmp_path: Path, *, without: Collection[str] = ()) -> nbformat.NotebookNode:
    """A learner's own copy of a lab, ``without`` the cells of these ids."""
    notebook = nbformat.read(copy_labs(tmp_path / "labs") / f"{name}.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.id not in without]
    return notebook


def fill_in(notebook: nbformat.NotebookNode, answers: Mapping[str, str]) -> None:
    """Put each answer in the place of its cell's dots; no other cell has any."""
    for cell in notebook.cells:
        if cell.id in answers:
            assert cell.source.count("...") == 1
            cell.source = cell.source.replace("...", answers[cell.id])
        else:
            assert cell.cell_type == "markdown" or "..." not in cell.source, f"no answer for {cell.id}"


def execute(
    notebook: nbformat.NotebookNode, tmp_path: Path, env: Mapping[str, str] | None = None, limit_s: float = LIMIT_S
) -> dict[str, str]:
    """Run it; the text that each cell shows."""
    asyncio.run(run(notebook, tmp_path / "labs", jupyter_env(tmp_path / "jupyter") | dict(env or {}), limit_s))
    assert not (wrong := errors_in(notebook)), "\n".join(wrong)
    return shown_in(notebook)


def misjudged(verdicts: Mapping[str, str]) -> dict[str, str]:
    """What does not give the one verdict it should: a prediction is noted, everything else is right."""
    signs = {name: "✎" if name.startswith("predict-") else "✓" for name in verdicts}
    return {
        name: text for name, text in verdicts.items() if [line[0] for line in text.splitlines() if line[:1] in set("✓✗✎")] != [signs[name]]
    }


def judged(shown: Mapping[str, str], verdicts: Collection[str]) -> dict[str, str]:
    """Of the cells that show a verdict, those that say more than "there is no answer yet"."""
    return {name: shown[name] for name in verdicts if not shown[name].startswith("…")}
