"""Lab 06 with its answers filled in, on a machine without KVM; test_labs runs it without answers, and on KVM where there is one."""

from __future__ import annotations

from pathlib import Path

from nbformat.v4 import new_code_cell

from .answered import NO_KVM, execute, fill_in, misjudged, reference_answers
from .answered import lab as copy_of

NAME = "06_a_real_trap"
ANSWERS = reference_answers(NAME)
REVEALS = {"reveal-rip", "reveal-match"}
DRAWN_ELSEWHERE = {"export"}  # the slowest cell; test_labs runs it


def test_the_reference_answers_are_right_without_kvm(tmp_path: Path) -> None:
    lab = copy_of(NAME, tmp_path, without=DRAWN_ELSEWHERE)
    fill_in(lab, ANSWERS)
    lab.cells.insert(0, new_code_cell(NO_KVM, id="no-kvm"))
    shown = execute(lab, tmp_path)
    assert misjudged({name: shown[name] for name in [*ANSWERS, *REVEALS]}) == {}
    assert "there is no /dev/kvm: load kvm_intel or kvm_amd\nA model of the payload plays the exits." in shown["first-exit"]
    assert shown["whole"].count("A recording answers.") == 1
    assert "there is no /dev/kvm" in shown["reveal-bare"] and "nothing can be compared" in shown["reveal-bare"]
    assert "µs an I/O, measured" in shown["predict"], "the live machine is predicted"
    assert shown["measure-last"].count("The simulator stands in.") <= 1
