"""Every lab runs from top to bottom in a fresh kernel, without an error and without an answer."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from .jupyter_home import LABS, copy_labs, jupyter_env

LIMIT_S = 600  # a hang ends; how long a lab takes is not judged on a busy machine
NOTEBOOKS = sorted(LABS.glob("*.ipynb"))
SHOWN = {
    "01_the_device": {"run-mine": "VirtioBlkDevice: 0 errors, 0 wrong blocks"},
    "02_the_driver": {"run-mine": "VirtioBlkDriver on SimMachine(seed=1): 1,000 I/Os, 0 errors"},
}
"""What a cell shows to someone who has answered nothing."""


async def run(notebook: nbformat.NotebookNode, folder: Path, env: dict[str, str], limit_s: float = LIMIT_S) -> None:
    client = NotebookClient(notebook, kernel_name="python3", store_widget_state=False, resources={"metadata": {"path": str(folder)}})
    async with asyncio.timeout(limit_s), client.async_setup_kernel(env=env):
        for index, cell in enumerate(notebook.cells):
            await client.async_execute_cell(cell, index)


def errors_in(notebook: nbformat.NotebookNode) -> list[str]:
    """What went wrong: an error nobody announced with the tag ``raises-exception``, or a traceback on stderr."""
    wrong = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error" and "raises-exception" not in cell.metadata.get("tags", []):
                wrong.append(f"cell {cell.id}: {output.ename}: {output.evalue}")
            if output.output_type == "stream" and output.name == "stderr" and "Traceback (most recent call last)" in output.text:
                wrong.append(f"cell {cell.id}: {output.text}")
    return wrong


def shown_in(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """The text that each cell shows."""
    return {
        cell.id: "".join(one.get("text", "") or one.get("data", {}).get("text/plain", "") for one in cell.get("outputs", []))
        for cell in notebook.cells
    }


def test_the_first_lab_is_there() -> None:
    assert LABS / "00_the_whole_path.ipynb" in NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_lab_runs_from_top_to_bottom(path: Path, tmp_path: Path) -> None:
    """Nothing is judged that nobody has answered: an open check says so, and no cell finds an answer right, wrong or noted."""
    labs = copy_labs(tmp_path / "labs")
    notebook = nbformat.read(labs / path.name, as_version=4)
    asyncio.run(run(notebook, labs, jupyter_env(tmp_path / "jupyter")))
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip())
    assert not (wrong := errors_in(notebook)), "\n".join(wrong)
    shown = shown_in(notebook)
    answers = json.loads((Path(__file__).parent / "solutions" / path.with_suffix(".json").name).read_text(encoding="utf-8"))
    assert {name: shown[name] for name in answers if not shown[name].startswith("…")} == {}
    assert {name: text for name, text in shown.items() if any(line[:1] in set("✓✗✎") for line in text.splitlines())} == {}
    for name, text in SHOWN.get(path.stem, {}).items():
        assert text in shown[name]
