"""Seeded mutants: one small break of a clause each, which the tests that carry the clause must catch.

A mutant is applied to a copy of the tree, and a pytest of its own runs the tests of its clauses there.  A hang is caught by time.

    python -m tests.conformance.mutants               run every mutant, write mutation.json
    python -m tests.conformance.mutants new           run those that mutation.json does not know, add them to it
    python -m tests.conformance.mutants SPLIT-DEV-015  run those of these clauses (globs), write nothing
"""

from __future__ import annotations

import hashlib
import json
import os
import py_compile
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from tests.conformance.clauses import HERE, ROOT, shown_by

RESULTS = HERE / "mutation.json"
TIMEOUT_S = 60
COPIED = ("vblklab", "tests", "data", "docs", "pyproject.toml")


class Mutant(NamedTuple):
    """``old`` occurs once in ``file`` and is replaced by ``new``; ``survives`` explains why no test can see it."""

    clause: list[str]
    file: str
    old: str
    new: str
    why: str
    survives: str = ""

    @property
    def key(self) -> str:
        """Its name in ``mutation.json``: another break is another mutant."""
        return hashlib.sha256("\0".join((self.file, self.old, self.new, *self.clause)).encode()).hexdigest()[:12]


class Outcome(NamedTuple):
    """``how``: the test that failed, "timeout", or empty if it survived."""

    caught: bool
    how: str


def mutants() -> dict[str, list[Mutant]]:
    """The mutants of each part, from ``mutants_PART.toml``."""
    files = sorted(HERE.glob("mutants_*.toml"))
    read = {file.stem.removeprefix("mutants_"): tomllib.loads(file.read_text(encoding="utf-8")) for file in files}
    return {part: [Mutant(**entry) for entry in content["mutant"]] for part, content in read.items()}


def results() -> dict[str, Any]:
    """What ``mutation.json`` holds: date, and the outcome of each mutant by its key with the commit it was measured at."""
    if not RESULTS.exists():
        return {"date": "", "seconds": 0, "mutants": {}}
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


class Tree:
    """A copy of the project in which mutants are applied, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, folder / name)
        for path in folder.rglob("*.py"):  # by content: a mutant of the same second and length must not run as the original
            py_compile.compile(str(path), invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)

    def run(self, mutant: Mutant | None, tests: Iterable[str], timeout_s: float = TIMEOUT_S) -> Outcome:
        """Apply the mutant, run the tests, take it back.  None runs the tree as it is."""
        if mutant is None:
            return self._pytest(tests, timeout_s)
        path = self.folder / mutant.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            raise ValueError(f"{mutant.file} holds {text.count(mutant.old)} times: {mutant.old!r}")
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        try:
            return self._pytest(tests, timeout_s)
        finally:
            path.write_text(text, encoding="utf-8")

    def _pytest(self, tests: Iterable[str], timeout_s: float) -> Outcome:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--no-header",
            "--tb=line",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            *tests,
        ]
        temporary = self.folder / "tmp"  # what a killed pytest leaves behind goes with the tree
        temporary.mkdir(exist_ok=True)
        env = os.environ | {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(temporary)}
        process = subprocess.Popen(
            command, cwd=self.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return Outcome(True, "timeout")
        if process.returncode == 0:
            return Outcome(False, "")
        if process.returncode != 1:  # 1: a test failed
            raise RuntimeError(f"pytest ended with {process.returncode}: {said[-2000:]}")
        failed = [line for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return Outcome(True, failed[0].split()[1].partition("[")[0] if failed else "")


@contextmanager
def tree() -> Iterator[Tree]:
    """A copy of the project for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="vblk-mutants-") as folder:
        yield Tree(Path(folder))


def checks_of(mutant: Mutant) -> list[str]:
    """The tests that carry a clause of the mutant; ValueError if there is none."""
    found = sorted({test for clause in mutant.clause for test in shown_by().get(clause, [])})
    if not found:
        raise ValueError(f"no test carries a clause of the mutant {mutant.clause}")
    return found


def play(chosen: Iterable[Mutant], *, workers: int = 1) -> Iterator[tuple[Mutant, Outcome, float]]:
    """Run mutants, in ``workers`` trees side by side; each with its outcome and its seconds, in the order given."""
    trees: SimpleQueue[Tree] = SimpleQueue()

    def one(mutant: Mutant) -> tuple[Mutant, Outcome, float]:
        copy, start = trees.get(), time.monotonic()
        try:
            return mutant, copy.run(mutant, checks_of(mutant)), time.monotonic() - start
        finally:
            trees.put(copy)

    with ExitStack() as stack:
        for _ in range(workers):
            trees.put(stack.enter_context(tree()))
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        yield from pool.map(one, chosen)


def _main(asked: list[str]) -> int:
    every = [mutant for part in mutants().values() for mutant in part]
    kept = results()["mutants"] if asked == ["new"] else {}
    kept = {mutant.key: kept[mutant.key] for mutant in every if mutant.key in kept}
    if asked == ["new"]:
        chosen = [mutant for mutant in every if mutant.key not in kept]
    else:
        chosen = [one for one in every if not asked or any(fnmatchcase(name, pattern) for name in one.clause for pattern in asked)]
    done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    commit, seconds = done.stdout.strip(), 0.0
    for mutant, outcome, took in play(chosen, workers=2):
        verdict = outcome.how or "SURVIVED"
        print(f"{took:5.1f} s  {' '.join(mutant.clause)}: {verdict}  ({mutant.why})", flush=True)
        kept[mutant.key] = {"clause": mutant.clause, "caught": outcome.caught, "how": outcome.how, "commit": commit}
        seconds += took
    if asked in ([], ["new"]):
        seconds += results()["seconds"] if asked else 0
        date = time.strftime("%Y-%m-%d", time.gmtime())
        said = {"date": date, "seconds": round(seconds), "mutants": kept}
        RESULTS.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
