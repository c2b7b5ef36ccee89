"""Recording the host's kernel: the instance is ours alone, the pages hold what ftrace's text says, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vblklab as vb
from vblklab.peer import tracefs
from vblklab.peer.tracefs import KernelTrace, tracing_missing
from vblklab.trace.ftrace import read_ftrace
from vblklab.trace.ring_buffer import read_pages

missing = tracing_missing()[0]
traced = pytest.mark.skipif(bool(missing), reason=missing)
OURS = f"common_pid == {os.getpid()}"
READS = {"syscalls:sys_enter_pread64": OURS, "syscalls:sys_exit_pread64": OURS}
SETTINGS = ("tracing_on", "current_tracer", "trace_clock", "set_event", "buffer_size_kb")


@pytest.fixture
def root() -> Iterator[Path]:
    """tracefs, from which no setting and no instance may be missing or left at the end; nor a mount."""
    place = tracefs._mounted()
    fd = -1 if place else tracefs._detached()
    folder = Path(place or f"/proc/self/fd/{fd}")
    before = state(folder)
    yield folder
    after = state(folder)
    if fd >= 0:
        os.close(fd)
    assert after == before


def state(folder: Path) -> tuple[object, ...]:
    instances = sorted(path.name for path in (folder / "instances").iterdir())
    return instances, {name: (folder / name).read_text() for name in SETTINGS}, Path("/proc/mounts").read_text().count("tracefs")


def read_some(times: int = 20) -> None:
    with open("/proc/self/exe", "rb") as file:
        for at in range(times):
            os.pread(file.fileno(), 1, at)


@traced
def test_the_pages_hold_what_the_text_says(root: Path) -> None:
    with KernelTrace(READS | {"sched:sched_switch": OURS}) as trace:
        read_some()
        (root / "instances" / trace.name / "tracing_on").write_text("0")
        text = read_ftrace((root / "instances" / trace.name / "trace").read_text()).records
    captured = trace.captured
    assert captured is not None and not captured.missing and captured.overrun == 0
    records, lost = read_pages(captured.header_page, captured.formats, captured.pages)
    assert not lost and len(records) == len(text) >= 40
    for ours, theirs in zip(records, sorted(text, key=lambda record: record.t_ns), strict=True):
        assert (ours.cpu, ours.pid, ours.name) == (theirs.cpu, theirs.pid, theirs.name)
        assert abs(ours.t_ns - theirs.t_ns) <= 1000
        shared = {name for name in ours.args.keys() & theirs.args.keys() if isinstance(theirs.args[name], int)}
        assert {name: ours.args[name] for name in shared} == {name: theirs.args[name] for name in shared}


@traced
def test_its_clock_is_the_machines(root: Path) -> None:
    with KernelTrace(READS) as trace:
        before = time.perf_counter_ns()
        read_some(1)
        after = time.perf_counter_ns()
    assert trace.captured is not None
    records, _ = read_pages(trace.captured.header_page, trace.captured.formats, trace.captured.pages)
    assert len(records) == 2 and all(before <= record.t_ns <= after for record in records)


@traced
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(root: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), KernelTrace(READS):
        raise error


@traced
def test_a_killed_process_leaves_nothing(root: Path) -> None:
    code = (
        "from vblklab.peer.tracefs import KernelTrace; import sys\n"
        "with KernelTrace({'syscalls:sys_enter_pread64': ''}) as trace:\n    print(trace.name, flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        name = child.stdout.readline().strip()
        assert (root / "instances" / name).is_dir()
        child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while (root / "instances" / name).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not (root / "instances" / name).exists()


@traced
def test_what_a_dead_process_left_is_swept_and_what_is_in_use_is_not(root: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    stale = root / "instances" / f"vblklab-{child.pid}"
    stale.mkdir()
    with KernelTrace(READS) as trace:
        assert not stale.exists()
        with pytest.raises(OSError):
            (root / "instances" / trace.name).rmdir()


@traced
def test_two_recordings_of_one_process_are_refused_and_the_first_goes_on(root: Path) -> None:
    with KernelTrace(READS) as trace:
        with pytest.raises(vb.TraceError, match="is recording already"), KernelTrace(READS):
            pass
        read_some(3)
    assert trace.captured is not None and trace.captured.pages


@traced
def test_a_full_buffer_keeps_the_beginning_and_counts_the_rest(root: Path) -> None:
    with KernelTrace(READS, buffer_kb=8) as trace:
        first = time.perf_counter_ns()
        read_some(3000)
    captured = trace.captured
    assert captured is not None
    records, lost = read_pages(captured.header_page, captured.formats, captured.pages)
    assert not lost and sum(captured.dropped.values()) + len(records) == 6000 and sum(captured.dropped.values()) > 0
    assert [record.args.get("pos") for record in records if record.name == "sys_enter_pread64"][:3] == [0, 1, 2] and records[
        0
    ].t_ns >= first


@traced
def test_an_event_that_the_kernel_lacks_is_named_and_a_wrong_filter_refused(root: Path) -> None:
    with KernelTrace(READS | {"kvm:kvm_of_tomorrow": ""}) as trace:
        pass
    assert trace.captured is not None and trace.captured.missing == ("kvm:kvm_of_tomorrow",)
    with pytest.raises(vb.TraceError, match=r"tracefs refused .*filter"), KernelTrace({"sched:sched_switch": "no_such_field == 1"}):
        pass
    with pytest.raises(vb.ConfigError, match="system:event"):
        KernelTrace({"kvm": ""})


def test_without_root_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mounts").write_text("")
    monkeypatch.setattr(tracefs.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(tracefs, "_MOUNTS", str(tmp_path / "mounts"))
    assert "needs root" in tracing_missing(str(tmp_path / "mounts"))[0]
    monkeypatch.setattr(
        tracefs, "tracing_missing", lambda: ("tracing the kernel needs root (this is uid 1000)", "run it as root, with sudo")
    )
    with pytest.raises(vb.NotHere, match="with sudo; the run works without kernel_trace"), KernelTrace(READS):
        pass
