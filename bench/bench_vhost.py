"""vhost-user-blk: our back-end against qemu-storage-daemon, with the same load generator, image and run.

`vhost_load.c` is built with the C compiler that is here.  Each job runs in alternating rounds over all back-ends, each a process of
its own over one image in a warm page cache.  `python bench/bench_vhost.py [--quick] [--json FILE] [--idle]`
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vblklab.engine.compiled import compiled_missing
from vblklab.peer.process import wait_or_kill
from vblklab.peer.storage_daemon import StorageDaemon

SOURCE = Path(__file__).with_name("vhost_load.c")
POLL_US = 50
"""How long a polling back-end looks for work before it sleeps, ours and the daemon's."""
IDLE_GOAL = 0.005
_END_S = 10.0


@dataclass(frozen=True)
class Running:
    """A back-end that runs: its socket, its process and what it says about the path of its requests."""

    socket: str
    pid: int
    path: str


@contextmanager
def daemon(image: str, aio: str, poll: bool) -> Iterator[Running]:
    """qemu-storage-daemon's export; polling needs an iothread."""
    with StorageDaemon(image, aio=aio, poll_max_ns=POLL_US * 1000 if poll else None).start() as running:
        yield Running(running.socket, running.pid, f"aio={aio}" + (f", iothread poll-max-ns={POLL_US * 1000}" if poll else ""))


@contextmanager
def ours(image: str, engine: str, path: str, poll: bool) -> Iterator[Running]:
    """``vblk serve``; its first line says which path it takes."""
    folder = tempfile.mkdtemp(prefix="vblk-bench-")
    socket = os.path.join(folder, "disk.sock")
    arguments = ["--socket", socket, "--queue-size", "128", "--engine", engine, "--path", path, "--poll-us", str(POLL_US if poll else 0)]
    process = subprocess.Popen([sys.executable, "-m", "vblklab", "serve", image, *arguments], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        first = process.stderr.readline().strip()
        if "serving" not in first:
            raise SystemExit(f"vblk serve did not start: {first}{process.stderr.read()}")
        yield Running(socket, process.pid, first.partition(f"{socket}; ")[2] + (f", --poll-us {POLL_US}" if poll else ""))
    finally:
        process.terminate()
        wait_or_kill(process, _END_S)
        process.stderr.close()
        shutil.rmtree(folder, ignore_errors=True)


Start = Callable[[str, bool], Any]
THREADS, URING = "daemon, aio=threads", "daemon, aio=io_uring"
PYTHON, COMPILED, MAPPED_PYTHON, MAPPED = "sync, Python", "sync, compiled", "mapped, Python", "mapped, compiled"
SIDES: dict[str, Start] = {
    THREADS: lambda image, poll: daemon(image, "threads", poll),
    URING: lambda image, poll: daemon(image, "io_uring", poll),
    PYTHON: lambda image, poll: ours(image, "sync", "batch", poll),
    COMPILED: lambda image, poll: ours(image, "sync", "auto", poll),
    MAPPED_PYTHON: lambda image, poll: ours(image, "mmap", "batch", poll),
    MAPPED: lambda image, poll: ours(image, "mmap", "auto", poll),
}


@dataclass(frozen=True)
class Goal:
    """What ``side`` must reach: at least so many times the daemon's figure, or at most where ``p50_ns`` is the figure."""

    side: str
    threads: float
    uring: float
    aim: float | None = None


@dataclass(frozen=True)
class Job:
    name: str
    arguments: tuple[str, ...]
    figure: str
    goals: tuple[Goal, ...]
    poll: bool = False


JOBS = (
    Job(
        "4 KiB randread, iodepth 32",
        ("--rw", "randread", "--bs", "4096", "--iodepth", "32"),
        "iops",
        (Goal(COMPILED, 3, 1.5, 4), Goal(PYTHON, 1.8, 0.7)),
    ),
    Job("4 KiB randwrite, iodepth 32", ("--rw", "randwrite", "--bs", "4096", "--iodepth", "32"), "iops", (Goal(COMPILED, 2, 1.3, 2),)),
    Job("128 KiB read, iodepth 8", ("--rw", "read", "--bs", "131072", "--iodepth", "8"), "mb_s", (Goal(COMPILED, 1.3, 1.1, 1.8),)),
    Job(
        "4 KiB randread, iodepth 1, both sides polling",
        ("--rw", "randread", "--bs", "4096", "--iodepth", "1", "--poll"),
        "p50_ns",
        (Goal(COMPILED, 0.5, 1.0, 0.3),),
        poll=True,
    ),
)
SHOWN = {"iops": ("kIOPS", 1e3), "mb_s": ("MB/s", 1.0), "p50_ns": ("µs p50", 1e3)}


def load(program: str, socket: str, *arguments: str) -> dict[str, Any]:
    """One run of the load generator; an I/O error ends the benchmark."""
    done = subprocess.run([program, socket, *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(done.args[1:])}: {(done.stderr or done.stdout).strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(job: Job, program: str, image: str, sides: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    """``rounds`` runs of the job on each side, in turn; every run starts with a clean page cache."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    before = os.getloadavg()
    with ExitStack() as stack:
        started: dict[str, Running] = {side: stack.enter_context(SIDES[side](image, job.poll)) for side in sides}
        for number in range(rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                write_back(image)
                seed = ("--seed", str(number + 1))
                runs[side].append(load(program, started[side].socket, *job.arguments, "--seconds", str(seconds), *seed))
    return {
        "job": job.name,
        "figure": job.figure,
        "load average before": before,
        "load average after": os.getloadavg(),
        "sides": {side: {"path": started[side].path, **summary(runs[side], job.figure), "runs": runs[side]} for side in sides},
    }


def write_back(image: str) -> None:
    fd = os.open(image, os.O_RDWR)
    os.fsync(fd)
    os.close(fd)


def summary(runs: list[dict[str, Any]], figure: str) -> dict[str, Any]:
    values = [run[figure] for run in runs]
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "p50_ns": statistics.median(run["p50_ns"] for run in runs),
        "p99_ns": statistics.median(run["p99_ns"] for run in runs),
        "kicks per I/O": statistics.median(run["kicks"] / run["ios"] for run in runs),
        "calls per I/O": statistics.median(run["calls"] / run["ios"] for run in runs),
    }


def verdicts(job: Job, result: dict[str, Any]) -> list[dict[str, Any]]:
    """One for each goal whose sides were measured."""
    found = []
    for goal in job.goals:
        if goal.side not in result["sides"]:
            continue
        ratios = [result["sides"][goal.side]["median"] / result["sides"][side]["median"] for side in (THREADS, URING)]
        wanted = (goal.threads, goal.uring)
        less = job.figure == "p50_ns"
        met = all(ratio <= want if less else ratio >= want for ratio, want in zip(ratios, wanted, strict=True))
        aim = goal.aim is not None and (ratios[0] <= goal.aim if less else ratios[0] >= goal.aim)
        found.append(
            {"job": job.name, "side": goal.side, "ratios": ratios, "goals": wanted, "aim": goal.aim, "met": met, "aim met": met and aim}
        )
    return found


def show(job: Job, result: dict[str, Any]) -> None:
    unit, scale = SHOWN[job.figure]
    print(f"\n{job.name}   load average {result['load average before'][0]:.2f} to {result['load average after'][0]:.2f}")
    print(f"  {'back-end':22} {unit:>8}  {'least … most':>17}  threads  io_uring  p50 µs  p99 µs  kicks/IO  calls/IO")
    threads, uring = (result["sides"][side]["median"] for side in (THREADS, URING))
    for side, one in result["sides"].items():
        median, spread = one["median"], f"{one['least'] / scale:.1f} … {one['most'] / scale:.1f}"
        ratios = f"{median / threads:6.2f}x  {median / uring:7.2f}x"
        times = f"{one['p50_ns'] / 1e3:6.1f}  {one['p99_ns'] / 1e3:6.1f}"
        counts = f"{one['kicks per I/O']:8.3f}  {one['calls per I/O']:8.3f}"
        print(f"  {side:22} {median / scale:8.1f}  {spread:>17}  {ratios}  {times}  {counts}")
    sign = "≤" if job.figure == "p50_ns" else "≥"
    for one in result["goals"]:
        threads, uring = one["ratios"]
        goal = f"goal {sign} {one['goals'][0]:g}x and {sign} {one['goals'][1]:g}x: {'met' if one['met'] else 'missed'}"
        aim = "" if one["aim"] is None else f"; aim {sign} {one['aim']:g}x threads: {'met' if one['aim met'] else 'missed'}"
        print(f"  {one['side']}: {threads:.2f}x threads, {uring:.2f}x io_uring; {goal}{aim}")


# -- a back-end with nothing to do ---------------------------------------------------------------------------------------------


def idle(program: str, image: str, sides: list[str], seconds: float) -> list[dict[str, Any]]:
    """CPU time of each back-end, and of each with polling, while a guest that did a few requests is connected and does nothing."""
    found = []
    for side in sides:
        for poll in (False, True):
            with SIDES[side](image, poll) as running:
                arguments = [program, running.socket, "--ios", "1000", "--iodepth", "8", "--stay"]
                client = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                assert client.stdout is not None
                if not client.stdout.readline():
                    raise SystemExit(f"{side}: the load generator ended")
                time.sleep(0.2)  # the poll time ends
                start, before = time.monotonic(), cpu_seconds(running.pid)
                time.sleep(seconds)
                share = (cpu_seconds(running.pid) - before) / (time.monotonic() - start)
                client.communicate(timeout=_END_S)
                if client.returncode:
                    raise SystemExit(f"{side}: the back-end did not stay")
                found.append({"side": side, "path": running.path, "poll": poll, "cpu": share})
                verdict = "" if side in (THREADS, URING) else "   goal below 0.5 %: " + ("met" if share < IDLE_GOAL else "missed")
                print(f"  {side + (', polling' if poll else ''):32} {share:7.3%} of a core over {seconds:g} s{verdict}", flush=True)
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process, in steps of a clock tick (10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- the whole -----------------------------------------------------------------------------------------------------------------


def host() -> dict[str, Any]:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    said = subprocess.run(["qemu-storage-daemon", "--version"], check=True, capture_output=True, text=True).stdout.split("\n")[0]
    numba = "none"
    if not compiled_missing():
        import numba as module

        numba = module.__version__
    return {
        "kernel": platform.release(),
        "cpu": f"{os.cpu_count()} x {names[0] if names else platform.machine()}",
        "python": platform.python_version(),
        "numba": numba,
        "daemon": said,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def fill(path: str, size: int) -> None:
    """In pieces of 4 KiB, so that the page cache holds small folios: in large ones ext4 walks all blocks for each that is written, and
    the kernel's 20 µs a write hide every back-end."""
    with open(path, "wb", buffering=0) as image:
        random = os.urandom(1 << 20)
        for at in range(0, size, 4096):
            image.write(random[at % (1 << 20) :][:4096])
        os.fsync(image.fileno())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="vhost-user-blk: our back-end against qemu-storage-daemon")
    parser.add_argument("--quick", action="store_true", help="three short rounds over a small image: the figures are rough")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure there")
    parser.add_argument("--idle", action="store_true", help="measure the CPU time of idle back-ends instead")
    parser.add_argument("--only", metavar="WORDS", default="", help="only the jobs whose name contains this")
    parser.add_argument("--dir", metavar="FOLDER", default=".", help="where the image is made (default: here)")
    parser.add_argument("--rounds", metavar="N", type=int, help="default 5; 3 with --quick")
    parser.add_argument("--seconds", metavar="S", type=float, help="of each run: default 2, 0.3 with --quick; with --idle 10 and 2")
    args = parser.parse_args()
    args.rounds = args.rounds or (3 if args.quick else 5)
    args.seconds = args.seconds or ((2.0 if args.quick else 10.0) if args.idle else (0.3 if args.quick else 2.0))
    return args


def main() -> int:
    args = parse()
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        print("skipped: no C compiler here to build bench/vhost_load.c; on Debian: apt install gcc libc6-dev")
        return 0
    if shutil.which("qemu-storage-daemon") is None:
        print("skipped: no qemu-storage-daemon here to compare with; on Debian: apt install qemu-system-common")
        return 0
    jobs = [job for job in JOBS if args.only in job.name]
    if not jobs:
        print(f"--only {args.only!r}: no such job; there are: {'; '.join(job.name for job in JOBS)}", file=sys.stderr)
        return 2
    sides = list(SIDES)
    if missing := compiled_missing():
        print(f"without the compiled loop: {missing}")
        sides = [side for side in sides if side not in (COMPILED, MAPPED)]
    report: dict[str, Any] = {"host": host(), "rounds": args.rounds, "seconds": args.seconds}
    print("   ".join(f"{name} {value}" for name, value in report["host"].items()))
    with tempfile.TemporaryDirectory(prefix="vblk-bench-", dir=args.dir) as folder:
        program, image = os.path.join(folder, "vhost_load"), os.path.join(folder, "disk.img")
        subprocess.run([compiler, "-std=c11", "-O2", "-o", program, str(SOURCE)], check=True)
        size = 64 << 20 if args.quick else 512 << 20
        fill(image, size)
        print(f"{'idle' if args.idle else f'{args.rounds} alternating rounds'} for {args.seconds:g} s, image {size >> 20} MiB, "
              "page cache warm, one queue of 128 entries")  # fmt: skip
        if args.idle:
            report["idle"] = idle(program, image, sides, args.seconds)
        else:
            report["jobs"] = []
            for job in jobs:
                result = measure(job, program, image, sides, args.rounds, args.seconds)
                result["goals"] = verdicts(job, result)
                report["jobs"].append(result)
                show(job, result)
            print("\nengine and path of each back-end:")
            for side, one in report["jobs"][0]["sides"].items():
                print(f"  {side:22} {one['path']}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
