"""``vblk``: what it prints and where, what it writes, and the status it ends with."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vblklab as vb
from tests.leaks import LINUX
from vblklab import cli
from vblklab.disk import RamStore
from vblklab.machine.live import live_missing
from vblklab.machine.sim import SimVm
from vblklab.trace.run import TraceEvent

ROOT = Path(__file__).resolve().parents[1]
JOBS = sorted((ROOT / "data" / "jobs").glob("*.fio"))
MIB = 1 << 20

linux_only = pytest.mark.skipif(bool(live_missing()), reason="the live machine needs Linux")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write a job file; options are the job's."""

    def file(name: str = "job.fio", **options: object) -> str:
        lines = [f"{key}={value}" for key, value in ({"rw": "randread", "number_ios": 60} | options).items()]
        (tmp_path / name).write_text("\n".join(["[job]", *lines, ""]))
        return name

    return file


@pytest.fixture
def job(write: Callable[..., str]) -> str:
    return write()


def vblk(*args: str, encoding: str = "utf-8", **streams: Any) -> subprocess.Popen[str]:
    """``vblk`` as a program of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen([sys.executable, "-m", "vblklab", *args], text=True, env=env, **streams)


# -- vblk run ----------------------------------------------------------------------------------------------------------------


def test_run_prints_the_summary_and_the_steps(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", job]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("SimMachine (simulated)")
    assert "60 I/Os, 0.2 MiB" in out
    assert [line.split()[0] for line in out.splitlines() if re.match(r"(D\d|HW|U\d) ", line)] == [step.name for step in vb.STEPS]
    assert err == ""


def test_quiet_prints_nothing(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", job, "--quiet", "--json", "result.json"]) == 0
    assert capsys.readouterr() == ("", "")
    assert Path("result.json").exists()


def test_json_is_fio_s(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", job, "--json", "result.json"]) == 0
    result = json.loads(Path("result.json").read_text())
    assert result["jobs"][0]["jobname"] == "job"
    assert result["jobs"][0]["read"]["total_ios"] == 60
    assert "wrote result.json" in capsys.readouterr().out


def test_json_on_stdout_stands_alone_there(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", job, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["jobs"][0]["read"]["total_ios"] == 60
    assert "60 I/Os" in err
    assert not Path("-").exists()


def result_of(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, object]:
    """The measured part of ``--json -``."""
    assert cli.main(["run", *args, "--json", "-", "--quiet"]) == 0
    (only,) = json.loads(capsys.readouterr().out)["jobs"]
    return dict(only)


def test_the_seed_decides_the_result(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (result_of(capsys, job, "--seed", seed) for seed in ("7", "7", "8"))
    assert first == again
    assert first != other


def test_settings_exchange_parts(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", job, "--set", "kvm.kick=mmio-exit", "--set", "kvm.call=intx", "--set", "queue=16", "--json", "r.json"]) == 0
    assert "mmio-exit/intx" in capsys.readouterr().out
    recipe = json.loads(Path("r.json").read_text())["vblklab"]["recipe"]
    assert recipe["queue"] == "Split(size=16)"
    assert "kick='mmio-exit', call='intx'" in recipe["kvm"]


def test_an_image_is_read_and_written(write: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    image = Path("disk.img")
    image.write_bytes(bytes(MIB))
    assert cli.main(["run", write(rw="randwrite"), "--disk", str(image)]) == 0
    assert any(image.read_bytes())
    assert image.stat().st_size == MIB


def test_an_image_named_like_a_model_is_an_image(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", job, "--disk", "ram"]) == 2
    assert "disk image 'ram' does not exist" in capsys.readouterr().err


def test_no_trace_still_gives_step_times(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", job, "--trace", "0"]) == 0
    assert "\nD4 " in capsys.readouterr().out


@linux_only
@pytest.mark.parametrize("thread", [[], ["--thread"]])
def test_a_live_run_says_so(job: str, capsys: pytest.CaptureFixture[str], thread: list[str]) -> None:
    assert cli.main(["run", job, "--machine", "live", *thread]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"LiveMachine (live) · two {'threads' if thread else 'processes'}")
    assert "note: kick: the driver writes an eventfd" in out


@linux_only
def test_a_live_run_without_tracing_has_no_steps_and_no_figures_of_them(job: str) -> None:
    assert cli.main(["run", job, "--machine", "live", "--thread", "--trace", "0", "--html", "r.html", "--quiet"]) == 0
    page = Path("r.html").read_text(encoding="utf-8")
    assert "No waterfall: run" in page
    assert page.count('class="plotly-graph-div"') >= 1


def test_html_is_one_page_that_needs_no_network(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", job, "--html", "result.html"]) == 0
    page = Path("result.html").read_text(encoding="utf-8")
    assert page.count('class="plotly-graph-div"') == 3
    assert len(re.findall(r"\* plotly\.js v\d", page)) == 1
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", page)
    assert "60, 0.2 MiB" in page
    assert "published (data/costs, sources in data/published)" in page


# -- errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "gone.fio"], "gone.fio"),
        (["run", "."], "job file"),
        (["run", "bad.fio"], "bad.fio, line 2 [a]: ioengine=libaio"),
        (["run", "job.fio", "--disk", "gone.img"], "disk image 'gone.img' does not exist: make one: truncate"),
        (["run", "job.fio", "--disk", "odd.img"], "no multiple of 512"),
        (["run", "job.fio", "--set", "kvm"], "write part=value"),
        (["run", "job.fio", "--set", "cpu=1"], "no part 'cpu': the parts are app"),
        (["run", "job.fio", "--set", "queue=100"], "queue size 100"),
        (["run", "job.fio", "--set", "kvm.kick=smoke"], "smoke"),
        (["run", "job.fio", "--thread"], "add --machine live or --machine kvm"),
        (["run", "job.fio", "--machine", "live", "--seed", "1"], "--seed is for the simulator"),
        (["run", "job.fio", "--machine", "cloud"], "invalid choice: 'cloud'"),
        (["run", "job.fio", "--trace", "-1"], "not a whole number"),
        (["run"], "required: JOB.fio"),
        (["ru"], "invalid choice: 'ru'"),
        (["trace", "job.fio", "--trace", "0"], "leave --trace out"),
        (["trace", "gone.fio"], "gone.fio"),
    ],
)
def test_an_error_is_one_line_and_status_2(job: str, capsys: pytest.CaptureFixture[str], args: list[str], words: str) -> None:
    Path("bad.fio").write_text("[a]\nioengine=libaio\n")
    Path("odd.img").write_bytes(bytes(1000))
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"vblk: [^\n]+\n", err)
    assert words in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--json", "no/result.json"], "there is no folder 'no': make it first"),
        (["--html", "no/result.html"], "there is no folder 'no'"),
        (["--html", "."], "no file name"),
        (["--html", ""], "no file name"),
        (["--json", "job.fio"], "would overwrite job.fio"),
        (["--json", "one", "--html", "./one"], "would overwrite"),
        (["--disk", "disk.img", "--json", "disk.img"], "would overwrite disk.img"),
        (["--set", "disk=disk.img", "--html", "disk.img"], "would overwrite disk.img"),
    ],
)
def test_what_cannot_be_written_is_found_before_the_run(
    job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: list[str], words: str
) -> None:
    Path("disk.img").write_bytes(bytes(MIB))
    before = Path(job).read_text()
    monkeypatch.setattr(SimVm, "__init__", lambda *_: pytest.fail("it ran"))
    assert cli.main(["run", job, *args]) == 2
    assert words in capsys.readouterr().err
    assert Path(job).read_text() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_result_that_does_not_fit_is_an_error(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", job, "--json", "/dev/full"]) == 2
    assert "could not be written" in capsys.readouterr().err
    with open("/dev/full", "w", encoding="utf-8") as full:
        child = vblk("trace", job, stdout=full)
        assert child.communicate()[1] == "vblk: the output could not be written: no space is left\n"
    assert child.returncode == 2


def test_a_mismatch_is_status_1(write: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(store: RamStore, offset: int, views: list[memoryview]) -> None:
        readv(store, offset, views)
        views[0][100] ^= 1

    readv = RamStore.readv
    monkeypatch.setattr(RamStore, "readv", flip)
    assert cli.main(["run", write(rw="randrw", verify="crc32", size="64k"), "--html", "r.html"]) == 1
    out, err = capsys.readouterr()
    assert re.search(r"vblk: 0 I/O errors, \d+ sectors differ from what was written", err)
    assert "differ" in out
    assert "What verify found" in Path("r.html").read_text(encoding="utf-8")


def test_an_io_error_is_status_1(job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "broken")

    monkeypatch.setattr(RamStore, "readv", fail)
    assert cli.main(["run", job, "--json", "r.json"]) == 1
    assert "vblk: 60 I/O errors, 0 sectors" in capsys.readouterr().err
    assert json.loads(Path("r.json").read_text())["vblklab"]["errors"] == 60


# -- Ctrl-C and progress -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_a_terminal(*args: str) -> Iterator[tuple[subprocess.Popen[str], Callable[[str], str]]]:
    """vblk with stderr on a terminal of 80 columns, and a function that reads it until some text came."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    child = vblk(*args, stderr=theirs)
    os.close(theirs)
    seen = ""

    def read_until(text: str) -> str:
        nonlocal seen
        end = time.monotonic() + 60
        while text not in seen and time.monotonic() < end:
            if select.select([ours], [], [], 1)[0]:
                try:
                    seen += os.read(ours, 4096).decode(errors="replace")
                except OSError:  # the last one who had the other end has closed it
                    break
        return seen

    try:
        yield child, read_until
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()
        os.close(ours)


@pytest.mark.skipif(not LINUX, reason="needs a pseudo-terminal")
@pytest.mark.parametrize("machine", ["sim", pytest.param("live", marks=linux_only)])
def test_ctrl_c_ends_a_long_run_with_what_was_measured(write: Callable[..., str], machine: str) -> None:
    name = write(number_ios=50_000_000, iodepth=4)
    with on_a_terminal("run", name, "--machine", machine, "--json", "part.json") as (child, read_until):
        assert "of 50,000,000 I/Os" in read_until("50,000,000 I/Os"), "no bar"
        child.send_signal(signal.SIGINT)
        out, _ = child.communicate(timeout=60)
        said = read_until("so far")
    assert child.returncode == 130
    assert "interrupted]" in out
    assert "vblk: interrupted; this is what was measured so far" in said
    assert "Traceback" not in said
    part = json.loads(Path("part.json").read_text())
    assert part["vblklab"]["interrupted"]
    assert 0 < part["jobs"][0]["read"]["total_ios"] < 50_000_000


def test_ctrl_c_before_the_first_io_is_one_line(job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SimVm, "_boot", interrupt)
    assert cli.main(["run", job]) == 130
    assert capsys.readouterr() == ("", "vblk: interrupted\n")


@pytest.mark.skipif(not LINUX, reason="needs a pseudo-terminal")
def test_a_short_run_shows_no_bar(job: str) -> None:
    with on_a_terminal("run", job) as (child, read_until):
        out, _ = child.communicate(timeout=60)
        assert "60 I/Os" in out
        assert read_until("never").strip() == ""


def test_without_a_terminal_progress_is_plain_lines(job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_LINE_EVERY_S", 0)
    assert cli.main(["run", job]) == 0
    assert set(capsys.readouterr().err.splitlines()) == {"vblk: 60 of 60 I/Os"}


# -- vblk trace --------------------------------------------------------------------------------------------------------------


def traced(capsys: pytest.CaptureFixture[str], *args: str) -> list[tuple[float, str, str]]:
    """(µs, step, trace point) of each line."""
    assert cli.main(["trace", *args]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [re.match(r" *([\d.]+) µs  (\w\w)  .{22}  (\S+)", line) for line in lines]
    assert all(found), lines[found.index(None)]
    return [(float(match[1]), match[2], match[3]) for match in found if match]


def test_trace_follows_one_io_down_and_up(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    points = traced(capsys, job, "--ios", "1")
    keys = [key for _, _, key in points]
    assert keys[0] == "sys_enter_io_submit"
    assert keys[-1] == "sys_exit_io_getevents"
    assert keys.index("virtqueue_add_sgs") < keys.index("virtqueue_pop") < keys.index("virtqueue_flush") < keys.index("block_bio_complete")
    assert {step for _, step, _ in points} == {step.name for step in vb.STEPS}
    assert [at for at, _, _ in points] == sorted(at for at, _, _ in points)


def test_trace_lines_are_those_of_stepping(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", job, "--ios", "1", "--set", "kvm.kick=mmio-exit", "--seed", "5"]) == 0
    recipe = vb.Pipeline(app=vb.Fio.load(job), kvm=vb.Kvm(kick="mmio-exit"))
    vm = recipe.boot(vb.SimMachine(seed=5))
    lines = capsys.readouterr().out.splitlines()
    stepped = [str(vm.step()) for _ in range(len(lines) + 5)]
    start = next(i for i, line in enumerate(stepped) if "sys_enter_io_submit" in line)
    assert lines == stepped[start : start + len(lines)]
    vm.close()


@pytest.mark.parametrize(("ios", "begun"), [([], 3), (["--ios", "0"], 0), (["--ios", "7"], 7), (["--ios", "1000"], 60)])
def test_trace_shows_the_first_ios(job: str, capsys: pytest.CaptureFixture[str], ios: list[str], begun: int) -> None:
    keys = [key for _, _, key in traced(capsys, job, *ios)]
    assert keys.count("block_bio_complete") == begun
    assert keys.count("sys_enter_io_submit") == begun


def test_trace_waits_for_a_first_io_that_others_overtake() -> None:
    hits = [
        ("D", 0),
        ("submit", 1),
        ("submit", 2),
        ("submit", 3),
        ("done", 2),
        ("done", 3),
        ("reap", 3),
        ("done", 1),
        ("reap", 1),
        ("submit", 4),
    ]
    keys = {"submit": "sys_enter_io_submit", "done": "block_bio_complete", "reap": "sys_exit_io_getevents", "D": "virtio_queue_notify"}
    events = [TraceEvent(at, "vCPU 0", "vCPU 0", keys[key], (io, 1)) for at, (key, io) in enumerate(hits)]
    assert list(cli._of_first_ios(events, 2)) == events[1:9]
    assert list(cli._of_first_ios(events, 9)) == events[1:]


def test_trace_of_two_jobs_on_two_cpus(capsys: pytest.CaptureFixture[str]) -> None:
    points = traced(capsys, str(ROOT / "data" / "jobs" / "verify.fio"), "--ios", "40")
    assert sum(key == "sys_enter_io_submit" for _, _, key in points) >= 40


@linux_only
@pytest.mark.parametrize("thread", [[], ["--thread"]])
def test_a_live_trace_starts_at_zero(write: Callable[..., str], capsys: pytest.CaptureFixture[str], thread: list[str]) -> None:
    points = traced(capsys, write(number_ios=5_000), "--machine", "live", "--ios", "2", *thread)
    assert points[0] == (0.0, "D1", "sys_enter_io_submit")
    keys = [key for _, _, key in points]
    assert keys.count("sys_enter_io_submit") == keys.count("virtqueue_pop") == keys.count("sys_exit_io_getevents") == 2


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="needs SIGPIPE")
def test_a_closed_pipe_is_no_error(job: str) -> None:
    child = vblk("trace", job, "--ios", "60")
    assert child.stdout is not None
    assert "sys_enter_io_submit" in child.stdout.readline()
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == ""
    child.stderr.close()
    assert child.wait(60) == 141


# -- the rest ----------------------------------------------------------------------------------------------------------------


def test_doctor_names_every_rung(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert [name for name in ("L0", "L1", "L2", "L3", "L4") if re.search(rf"^  [✓–] {name}  ", out, flags=re.MULTILINE)] == [
        "L0", "L1", "L2", "L3", "L4",
    ]  # fmt: skip
    assert max(map(len, out.splitlines())) <= 90


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"vblklab {vb.__version__}\n"
    for args in (["--help"], ["run", "--help"], ["trace", "--help"], ["doctor", "--help"]):
        assert cli.main(args) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 125


def test_the_job_in_the_help_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    lines = capsys.readouterr().err.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("an example job"))
    example = "\n".join(line.strip() for line in lines[start + 1 : lines.index("", start)])
    assert vb.Fio.parse(example).jobs[0].number_ios == 10_000


@pytest.mark.parametrize("part", re.findall(r"^  (\w[\w.]+=[\w-]+)  ", cli._SETTINGS, flags=re.MULTILINE))
def test_every_setting_in_the_help_works(part: str) -> None:
    assert vb.Pipeline().set(part) != vb.Pipeline()


def test_a_terminal_without_utf_8_gets_a_question_mark(job: str) -> None:
    child = vblk("run", job, encoding="ascii")
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")
    assert "latency ?s" in out


def test_version_loads_no_numpy() -> None:
    code = "import sys; from vblklab.cli import main; main(['--version']); sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True).returncode == 0


def test_the_installed_command_is_this_one() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"] == {"vblk": "vblklab.cli:main"}


# -- the jobs that come with vblklab -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_shipped_job_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(path)]) == 0
    assert path.read_text().startswith("# "), "it tells a student what it is"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_the_commands_in_a_shipped_job_are_understood(path: Path) -> None:
    commands = re.findall(r"^#   vblk (.*?)(?:   .*)?$", path.read_text(), flags=re.MULTILINE)
    assert commands
    for command in commands:
        args = cli._parser().parse_args(command.split())
        assert args.job == path.name
        for setting in args.settings:
            vb.Pipeline().set(setting)


@pytest.mark.fio
@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_the_real_fio_takes_a_shipped_job(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["fio", str(path), "--parse-only", f"--filename={tmp_path}/disk.img", "--ioengine=libaio"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_there_are_three_shipped_jobs() -> None:
    assert [path.stem for path in JOBS] == ["randread", "seqread-128k", "verify"]


def test_the_kernel_trace_is_for_the_live_machines(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", job, "--kernel-trace"]) == 2
    assert "add --machine live or --machine kvm" in capsys.readouterr().err
