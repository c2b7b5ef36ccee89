"""Lab 04 with its answers filled in, on real KVM where there is one and on a machine that has none; test_labs runs it without answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell

from .answered import execute, fill_in, lab, misjudged, reference_answers

NAME = "04_interrupts"
ANSWERS = reference_answers(NAME)
REVEALS = {
    "reveal-line-exits",
    "no-ack",
    "reveal-vcpus",
    "reveal-irqfd",
    "reveal-per-interrupt",
    "reveal-fourth",
    "reveal-polled",
}
DRAWN_ELSEWHERE = {"export"}  # the slowest cell; test_labs runs it
NO_KVM = "import vblklab.kvm.host as kvm_host\nkvm_host.found = lambda: (False, 'there is no /dev/kvm', 'load kvm_intel or kvm_amd')"


def solved(tmp_path: Path, *, kvm: bool) -> dict[str, str]:
    """What each cell shows, with the reference answers filled in."""
    notebook = lab(NAME, tmp_path)
    notebook.cells = [cell for cell in notebook.cells if cell.id not in DRAWN_ELSEWHERE]
    fill_in(notebook, ANSWERS)
    if not kvm:
        notebook.cells.insert(0, new_code_cell(NO_KVM, id="no-kvm"))
    shown = execute(notebook, tmp_path)
    assert misjudged({name: shown[name] for name in [*ANSWERS, *REVEALS]}) == {}
    return shown


def test_the_reference_answers_are_right_without_kvm(tmp_path: Path) -> None:
    shown = solved(tmp_path, kvm=False)
    assert shown["measure"].startswith("there is no /dev/kvm: load kvm_intel or kvm_amd; SimMachine")
    assert shown["measure"].count("The simulator stands in.") == 1


@pytest.mark.kvm
def test_the_reference_answers_are_right_on_a_real_vcpu(tmp_path: Path) -> None:
    shown = solved(tmp_path, kvm=True)
    assert "The simulator stands in" not in shown["measure"]
