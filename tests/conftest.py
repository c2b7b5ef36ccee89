"""What every test shares: when a marked test runs, what no test may leave behind, how far hypothesis looks."""

from __future__ import annotations

import gc
import os
import platform
import shlex
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.leaks import adopt_orphans, left_since, snapshot
from tests.peers import MARKERS, why_not

# With VBLKLAB_CI=1 the real peers must be there: a missing one fails. A machine without KVM is still a machine.
CI = os.environ.get("VBLKLAB_CI") == "1"
MAY_BE_MISSING_IN_CI = {"kvm"}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vblklab")
    group.addoption("--long", action="store_true", help="run the tests marked long too, and let hypothesis explore")
    group.addoption("--long-report", metavar="FILE", type=Path, help="write what was run, skipped and slow to FILE (Markdown)")


def pytest_configure(config: pytest.Config) -> None:
    # A time limit for one example would make the suite depend on how busy the machine is.
    slow_machine = [HealthCheck.too_slow]
    settings.register_profile("suite", derandomize=True, database=None, deadline=None, suppress_health_check=slow_machine)
    settings.register_profile("long", max_examples=2000, database=None, deadline=None, print_blob=True, suppress_health_check=slow_machine)
    settings.load_profile("long" if config.getoption("--long") else "suite")


def pytest_collection_finish() -> None:
    # What was loaded by now stays to the end: no collection needs to look through it again, and many tests ask for one.
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("long") and not item.config.getoption("--long"):
        pytest.skip("long: only with --long (make long)")
    for marker in MARKERS:
        if item.get_closest_marker(marker) and (reason := why_not(marker)):
            if CI and marker not in MAY_BE_MISSING_IN_CI:
                pytest.fail(f"{reason} (VBLKLAB_CI=1: a missing peer is a failure)", pytrace=False)
            pytest.skip(reason)


# --- nothing is left behind ---

_passed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "call":
        item.stash[_passed] = report.passed
    return report


@pytest.fixture(scope="session", autouse=True)
def _own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A temporary folder of this worker's own: what appears in it was made by this worker's test. Short, for socket names."""
    tmp_path_factory.getbasetemp()  # tmp_path stays where pytest wants it
    before, folder = (os.environ.get("TMPDIR"), tempfile.tempdir), tempfile.mkdtemp(prefix="vblk-")
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    adopt_orphans()
    yield
    tempfile.tempdir = before[1]
    if before[0] is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before[0]
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that passed but left a process, a thread, an open file or a temporary file behind."""
    before = snapshot()
    yield
    # A failed test keeps its objects alive through its traceback.
    if request.node.stash.get(_passed, False) and (left := left_since(before)):
        pytest.fail(f"left behind: {left}", pytrace=False)


# --- the report of a long run ---

_started = pytest.StashKey[float]()


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_started] = time.time()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    path: Path | None = config.getoption("--long-report")
    if path is None:
        return
    stats = terminalreporter.stats
    ended = {0: "all passed", 1: "some failed", 2: "interrupted before the end"}.get(int(exitstatus), f"exit status {int(exitstatus)}")
    counts = [f"{len(stats[name])} {name}" for name in ("passed", "failed", "error", "skipped", "xfailed") if stats.get(name)]
    skipped = sorted({str(report.longrepr[2]).removeprefix("Skipped: ") for report in stats.get("skipped", [])})
    calls = [report for name in ("passed", "failed") for report in stats.get(name, []) if report.when == "call"]
    slowest = sorted(calls, key=lambda report: -report.duration)[:20]
    failed = [report.nodeid for name in ("failed", "error") for report in stats.get(name, [])]
    arguments = [text for text in config.invocation_params.args if not text.startswith("--long-report")]
    minutes = (time.time() - config.stash[_started]) / 60
    lines = [
        "# The last long run",
        "",
        f"- {time.strftime('%Y-%m-%d', time.gmtime())}, {minutes:.1f} minutes, {ended}",
        f"- {', '.join(counts) or 'no test'}",
        f"- Python {platform.python_version()}, {platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} CPUs",
        f"- `pytest {shlex.join(arguments)}`; written by `tests/conftest.py`",
        *[f"- failed: {name}" for name in failed],
        *[f"- skipped: {reason}" for reason in skipped],
        "",
        "| seconds | slowest tests |",
        "|---:|---|",
        *[f"| {report.duration:.1f} | {report.nodeid} |" for report in slowest],
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
