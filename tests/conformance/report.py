"""``docs/conformance.md``: each clause with its tests and its verdict.  ``python -m tests.conformance.report`` writes it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator

from tests.conformance.clauses import ROOT, Clause, clauses, shown_by, written_reasons
from tests.conformance.mutants import mutants, results

REPORT = ROOT / "docs" / "conformance.md"
PARTS = {
    "split": "Split virtqueues",
    "packed": "Packed virtqueues",
    "basic": "Basic facilities",
    "mmio": "virtio-mmio",
    "pci": "virtio-pci",
    "blk": "Block device",
    "blk-zoned": "Zoned block device",
    "scsi": "SCSI host",
}
HEAD = """\
# Conformance to VIRTIO 1.4, clause by clause

Written by `make conformance`; a test compares. The clauses are paraphrased in `data/spec/virtio-clauses.tsv`, which names their sources.
*Tested*: the tests named carry the clause's id (`@pytest.mark.clause`) and fail when it is broken. *Not applicable*: nothing here does
what the clause is about. *Not observable*: it binds something here, and no test can tell whether it holds; no such clause counts as
tested. *Open*: neither a test nor a reason yet. A mutant is a seeded break of a clause in the package's own code
(`tests/conformance/mutants_*.toml`), run against the tests of that clause alone.
"""


def verdict(clause: Clause) -> str:
    """tested, not applicable, not observable or open."""
    if clause.id in shown_by():
        return "tested"
    reason = written_reasons().get(clause.id)
    return reason.kind if reason else "open"


def _short(test: str) -> str:
    file, _, name = test.partition("::")
    return f"`{file.removeprefix('tests/').removesuffix('.py')}` {name.replace('::', ' ').replace('_', ' ').removeprefix('test ')}"


def _shown_by(clause: Clause) -> str:
    found = shown_by().get(clause.id)
    if found:
        return "<br>".join(_short(test) for test in found)
    reason = written_reasons().get(clause.id)
    return reason.reason if reason else ""


def _row(*cells: object) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _part(part: str) -> Iterator[str]:
    rows = [clause for clause in clauses().values() if clause.part == part]
    counts = Counter(map(verdict, rows))
    yield f"## {PARTS[part]}"
    yield ""
    yield f"{len(rows)} clauses: {', '.join(f'{counts[name]} {name}' for name in sorted(counts, key=counts.get, reverse=True))}."  # type: ignore[arg-type]
    yield ""
    if not counts.keys() - {"not applicable"} and len({_shown_by(clause) for clause in rows}) == 1:
        yield f"{_shown_by(rows[0])}"
        yield ""
        return
    yield _row("id", "level", "clause", "verdict", "test or reason")
    yield _row(*["---"] * 5)
    for clause in rows:
        yield _row(clause.id, clause.level, clause.clause, verdict(clause), _shown_by(clause))
    yield ""


def _totals() -> Iterator[str]:
    yield "## Totals"
    yield ""
    yield _row(
        "part", "clauses", "not applicable", "in scope", "tested", "not observable", "open", "MUST, MUST NOT in scope", "of them open"
    )
    yield _row("---", *["---:"] * 8)
    everything = list(clauses().values())
    for name, part in [*((part, [c for c in everything if c.part == part]) for part in PARTS), ("**all**", everything)]:
        counts = Counter(map(verdict, part))
        binding = [clause for clause in part if clause.binding and verdict(clause) != "not applicable"]
        cells = [len(part), counts["not applicable"], len(part) - counts["not applicable"]]
        cells += [counts["tested"], counts["not observable"], counts["open"]]
        yield _row(name, *cells, len(binding), sum(verdict(clause) == "open" for clause in binding))
    yield ""


def without_mutant() -> list[str]:
    """The tested MUST and MUST NOT of split, packed, basic and blk that no mutant breaks."""
    seeded = {name for part in mutants().values() for mutant in part for name in mutant.clause}
    parts = ("split", "packed", "basic", "blk")
    return [c.id for c in clauses().values() if c.part in parts and c.binding and verdict(c) == "tested" and c.id not in seeded]


def _mutants() -> Iterator[str]:
    known = results()
    yield "## Mutants"
    yield ""
    if commits := dict.fromkeys(f"`{found['commit']}`" for found in known["mutants"].values()):
        yield f"Measured at {', '.join(commits)} until {known['date']}; {known['seconds'] / 60:.0f} minutes, two trees side by side."
        yield ""
    yield _row("part", "seeded", "caught", "survived", "not run")
    yield _row("---", *["---:"] * 4)
    total: Counter[str] = Counter()
    survivors = []
    for part, seeded in mutants().items():
        counts: Counter[str] = Counter()
        for mutant in seeded:
            found = known["mutants"].get(mutant.key)
            counts["not run" if found is None else "caught" if found["caught"] else "survived"] += 1
            if found is not None and not found["caught"]:
                survivors.append(mutant)
        total += counts
        yield _row(part, len(seeded), counts["caught"], counts["survived"], counts["not run"])
    yield _row("**all**", total.total(), total["caught"], total["survived"], total["not run"])
    yield ""
    run = total["caught"] + total["survived"]
    if run:
        yield f"{100 * total['caught'] / run:.1f} % of the mutants that were run are caught."
        yield ""
    for mutant in survivors:
        yield f"- survived: {', '.join(mutant.clause)}, {mutant.why}. {mutant.survives or '**Unexplained.**'}"
    if survivors:
        yield ""
    if missing := without_mutant():
        yield f"Tested MUST and MUST NOT of split, packed, basic and blk without a mutant: {', '.join(missing)}."
        yield ""


def render() -> str:
    """The whole page."""
    lines = [HEAD]
    for part in PARTS:
        lines += _part(part)
    lines += _totals()
    lines += _mutants()
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    REPORT.write_text(render(), encoding="utf-8")
    sys.exit(0)
