"""The table of clauses keeps what it promises: ids exist, reasons are needed, the page is in date, mutants can be applied and die."""

from __future__ import annotations

import re

import pytest

from tests.conformance.clauses import ROOT, Reason, clauses, reasons_by_id, shown_by
from tests.conformance.mutants import Mutant, checks_of, mutants, play, results, tree
from tests.conformance.report import PARTS, REPORT, render, without_mutant

ALL = [mutant for part in mutants().values() for mutant in part]


def test_every_clause_has_an_id_of_its_part_and_says_something() -> None:
    assert len(clauses()) >= 527
    for clause in clauses().values():
        assert clause.part in PARTS and clause.side in ("driver", "device") and clause.clause and clause.spec_ref
        assert re.fullmatch(r"[A-Z]+-(DRV|DEV)-\d{3}", clause.id)


def test_every_marker_names_a_clause() -> None:
    unknown = {name: tests for name, tests in shown_by().items() if name not in clauses()}
    assert not unknown


def test_no_reason_stands_beside_a_test() -> None:
    assert not reasons_by_id().keys() & shown_by().keys()


@pytest.mark.parametrize(
    "given",
    [
        [Reason(["SPLIT-DRV-001"], "too hard", "")],
        [Reason(["SPLIT-XXX-*"], "not applicable", "")],
        [Reason(["SPLIT-DRV-001"], "not applicable", ""), Reason(["SPLIT-*"], "not observable", "")],
    ],
    ids=["kind", "glob", "twice"],
)
def test_a_reason_that_cannot_be_is_refused(given: list[Reason]) -> None:
    with pytest.raises(ValueError, match=r"kind|names no clause|two reasons"):
        reasons_by_id(given)


def test_the_page_is_in_date() -> None:
    assert REPORT.read_text(encoding="utf-8") == render(), "make conformance"


# -- mutants -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.key)
def test_a_mutant_can_be_applied_and_has_tests(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, mutant.old
    assert mutant.old != mutant.new and mutant.why
    compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
    assert set(mutant.clause) <= clauses().keys()
    assert checks_of(mutant)


def test_mutants_are_told_apart() -> None:
    assert len({mutant.key for mutant in ALL}) == len(ALL)


def test_every_tested_must_has_a_mutant() -> None:
    """Of the parts that have mutants at all; the page names the others."""
    assert not [name for name in without_mutant() if clauses()[name].part in mutants()]


def test_the_last_run_of_the_mutants_caught_all_but_those_that_are_explained() -> None:
    """Mutants that are newer than that run are counted as such on the page."""
    outcomes = results()["mutants"]
    run = [mutant for mutant in ALL if mutant.key in outcomes]
    survivors = [mutant for mutant in run if not outcomes[mutant.key]["caught"]]
    assert len(survivors) <= 0.05 * len(run)
    assert not [mutant.clause for mutant in survivors if not mutant.survives]


def test_a_mutant_is_caught_and_the_tree_as_it_is_passes() -> None:
    mutant = next(one for one in ALL if one.clause == ["SPLIT-DRV-002"])
    with tree() as copy:
        before = (copy.folder / mutant.file).read_text(encoding="utf-8")
        assert copy.run(mutant, checks_of(mutant)).caught
        assert (copy.folder / mutant.file).read_text(encoding="utf-8") == before
        assert not copy.run(None, checks_of(mutant)).caught
        hang = mutant._replace(old="layout.clear(pages.memory)\n        return", new="while True: pass\n        return")
        assert copy.run(hang, checks_of(mutant), timeout_s=3) == (True, "timeout")


@pytest.mark.long
@pytest.mark.parametrize("part", mutants())
def test_every_mutant_is_caught_or_explained(part: str) -> None:
    survivors = [mutant for mutant, outcome, _ in play(mutants()[part]) if not outcome.caught]
    assert not [mutant for mutant in survivors if not mutant.survives]
    assert len(survivors) <= 0.05 * len(mutants()[part])
