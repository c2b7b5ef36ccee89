"""The clauses, the tests that name them, and the reasons why some have none."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CLAUSES = ROOT / "data" / "spec" / "virtio-clauses.tsv"
NOT_TESTED = HERE / "not_tested.toml"
KINDS = ("not applicable", "not observable")


class Clause(NamedTuple):
    """One row of ``data/spec/virtio-clauses.tsv``."""

    id: str
    part: str
    side: str
    level: str
    clause: str
    spec_ref: str

    @property
    def binding(self) -> bool:
        """Whether it is a MUST or a MUST NOT."""
        return self.level.startswith("MUST")


class Reason(NamedTuple):
    """Why clauses have no test; ``ids`` may hold globs."""

    ids: list[str]
    kind: str
    reason: str


@cache
def clauses() -> dict[str, Clause]:
    """Every clause by its id, in the order of the file."""
    with CLAUSES.open(encoding="utf-8", newline="") as file:
        return {row["id"]: Clause(**row) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)}


def reasons() -> list[Reason]:
    """What ``not_tested.toml`` says."""
    return [Reason(**entry) for entry in tomllib.loads(NOT_TESTED.read_text(encoding="utf-8"))["not_tested"]]


def reasons_by_id(given: Iterable[Reason] | None = None) -> dict[str, Reason]:
    """The reason of each clause that has one, globs expanded; ValueError on a kind, glob or id that cannot be, or two for one clause."""
    return _expanded(reasons() if given is None else given)


@cache
def written_reasons() -> dict[str, Reason]:
    """``reasons_by_id()`` of the file, read once: the page asks for each clause."""
    return reasons_by_id()


def _expanded(given: Iterable[Reason]) -> dict[str, Reason]:
    found: dict[str, Reason] = {}
    for reason in given:
        if reason.kind not in KINDS:
            raise ValueError(f"kind {reason.kind!r} is none of {KINDS}")
        for pattern in reason.ids:
            matching = [name for name in clauses() if fnmatchcase(name, pattern)]
            if not matching:
                raise ValueError(f"{pattern} names no clause")
            if twice := found.keys() & set(matching):
                raise ValueError(f"{sorted(twice)[0]} has two reasons")
            found.update(dict.fromkeys(matching, reason))
    return found


class _Collector:
    """A pytest plugin that notes which test functions carry which clauses."""

    def __init__(self) -> None:
        self.tests: dict[str, list[str]] = {}

    def pytest_collection_finish(self, session: Any) -> None:
        for item in session.items:
            name = item.nodeid.partition("[")[0]
            for marker in item.iter_markers("clause"):
                for clause in marker.args:
                    if name not in self.tests.setdefault(clause, []):
                        self.tests[clause].append(name)


def marked_files() -> list[str]:
    """The test files that speak of clauses."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if "mark.clause" in path.read_text("utf-8"))


@cache
def shown_by() -> dict[str, list[str]]:
    """Node ids (without parameters) of the tests that carry each id, collected by a pytest of its own."""
    collect = [sys.executable, "-m", "tests.conformance.clauses", *marked_files()]
    done = subprocess.run(collect, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the tests cannot be collected: {(done.stdout + done.stderr).strip()[-2000:]}")
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _collect(files: list[str]) -> int:
    import pytest

    collector = _Collector()
    status = pytest.main(["--collect-only", "-qq", "--no-summary", "-p", "no:cacheprovider", "-p", "no:xdist", *files], plugins=[collector])
    print(json.dumps(collector.tests))
    return int(status)


if __name__ == "__main__":
    sys.exit(_collect(sys.argv[1:]))
