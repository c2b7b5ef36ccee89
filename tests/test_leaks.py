"""The check that nothing is left behind sees what it is there to see."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import pytest

from tests import leaks

SLEEP = ("sleep", "60")


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "GRACE_S", 0.1)


@contextmanager
def a_child() -> Iterator[None]:
    with subprocess.Popen(SLEEP) as child:
        yield
        child.kill()


@contextmanager
def an_orphan() -> Iterator[None]:
    said = subprocess.run(["sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!"], capture_output=True, text=True, check=True).stdout
    yield
    os.kill(int(said), 9)
    os.waitpid(int(said), 0)


@contextmanager
def a_thread() -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    yield
    stop.set()
    thread.join()


@contextmanager
def an_open_pipe() -> Iterator[None]:
    ends = os.pipe()
    yield
    for end in ends:
        os.close(end)


@contextmanager
def a_temporary_file() -> Iterator[None]:
    with tempfile.NamedTemporaryFile():
        yield


linux = partial(pytest.param, marks=pytest.mark.skipif(not leaks.LINUX, reason="seen on Linux only"))


@pytest.mark.parametrize(
    ("left", "kind"),
    [
        linux(a_child, "children"),
        linux(an_orphan, "children"),
        (a_thread, "threads"),
        linux(an_open_pipe, "open_files"),
        (a_temporary_file, "temporary"),
    ],
)
def test_what_is_left_is_seen_until_it_is_gone(left: Callable[[], AbstractContextManager[None]], kind: str) -> None:
    before = leaks.snapshot()
    with left():
        assert getattr(leaks.left_since(before), kind)
    assert not leaks.left_since(before)


@pytest.mark.skipif(not leaks.LINUX, reason="seen on Linux only")
def test_a_process_that_ended_is_not_left() -> None:
    before = leaks.snapshot()
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not leaks.left_since(before)
    child.wait()
