"""The load generator of bench/: what it says of good, wrong, hanging and dying back-ends, and the benchmark around it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import vblklab as vb
from vblklab.peer.storage_daemon import StorageDaemon
from vblklab.spec.virtio_blk import BlkStatus, ReqType

BENCH = Path(__file__).resolve().parents[2] / "bench"
STRICT = ("-Wall", "-Wextra", "-Wconversion", "-Wpedantic", "-Werror")
VERIFY = ("--verify", "--bs", "8192", "--iodepth", "16", "--size", str(4 << 20), "--ios", "1000")
pytestmark = pytest.mark.cc


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bench") / "vhost_load"
    subprocess.run(["cc", "-std=c11", "-O2", *STRICT, "-o", path, BENCH / "vhost_load.c"], check=True)
    return str(path)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(8 << 20)
    return path


def load(program: str, path: str, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, the line of JSON, what was said."""
    done = subprocess.run([program, path, *arguments], capture_output=True, text=True, timeout=60)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.mark.parametrize("more", [(), ("--poll",), ("--queues", "2")], ids=["calls", "poll", "queues"])
@pytest.mark.parametrize("rw", ["randread", "randwrite", "read", "write"])
def test_a_verify_job_on_our_device(program: str, rw: str, more: tuple[str, ...], image: Path) -> None:
    with vb.serve(vb.VirtioBlkDevice(queues=2), vb.ImageFile(image), poll_us=20) as served:
        status, result, said = load(program, served.socket, *VERIFY, "--rw", rw, *more)
        assert (status, said) == (0, "")
        assert (result["rw"], result["ios"], result["errors"], result["mismatches"]) == (rw, 1000, 0, 0)
        assert 0 < result["p50_ns"] <= result["p95_ns"] <= result["p99_ns"] and result["iops"] > 0
        assert (result["calls"] == 0) == ("--poll" in more)
        assert served.counters()["requests"] > 1000, "the pass that fills the disk or reads it back is part of the job"


@pytest.mark.qemu
@pytest.mark.parametrize("more", [(), ("--poll",)], ids=["calls", "poll"])
@pytest.mark.parametrize("rw", ["randread", "write"])
def test_a_verify_job_on_the_storage_daemon(program: str, rw: str, more: tuple[str, ...], image: Path) -> None:
    with StorageDaemon(str(image)).start() as daemon:
        status, result, said = load(program, daemon.socket, *VERIFY, "--rw", rw, *more)
        assert (status, said) == (0, "")
        assert (result["ios"], result["errors"], result["mismatches"]) == (1000, 0, 0)


class ReadsElsewhere(vb.VirtioBlkDevice):
    def check(self, request: Any) -> int:
        if request.type == ReqType.IN and request.sector == 1024:
            request.sector += 16
        return super().check(request)


class Refuses(vb.VirtioBlkDevice):
    def check(self, request: Any) -> int:
        return BlkStatus.IOERR if request.sector == 1024 else super().check(request)


class Hangs(vb.VirtioBlkDevice):
    def check(self, request: Any) -> int:
        time.sleep(3600)
        return super().check(request)


@pytest.mark.parametrize("rw", ["read", "write"])
def test_verify_finds_data_of_another_place(program: str, rw: str) -> None:
    with vb.serve(ReadsElsewhere) as served:
        status, result, _ = load(program, served.socket, "--verify", "--rw", rw, "--size", "1048576", "--ios", "256")
        assert (status, result["errors"], result["mismatches"]) == (1, 0, 1)


def test_a_failed_request_is_counted(program: str) -> None:
    with vb.serve(Refuses) as served:
        status, result, _ = load(program, served.socket, "--rw", "read", "--size", "1048576", "--ios", "256")
        assert (status, result["errors"]) == (1, 1)


@pytest.mark.parametrize("more", [(), ("--poll",)], ids=["calls", "poll"])
def test_a_back_end_that_hangs_ends_in_an_error(program: str, more: tuple[str, ...]) -> None:
    with vb.serve(Hangs) as served:
        status, result, said = load(program, served.socket, "--iodepth", "1", "--timeout", "1.5", *more)
        assert (status, result) == (2, {})
        assert said == "vhost_load: the back-end hangs: requests in flight 1, none came back for 1.5 s\n"
        served.kill()


@pytest.mark.parametrize("more", [(), ("--poll",)], ids=["calls", "poll"])
def test_a_back_end_that_dies_ends_in_an_error(program: str, more: tuple[str, ...]) -> None:
    with vb.serve() as served:
        client = subprocess.Popen(
            [program, served.socket, "--ios", "1", "--stay", *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert client.stdout is not None
        assert json.loads(client.stdout.readline())["ios"] == 1
        served.kill()
        _, said = client.communicate(timeout=60)
        assert (client.returncode, said) == (2, b"vhost_load: the back-end ended the connection while its rings run\n")


@contextmanager
def answering(folder: Path, answer: bytes) -> Iterator[str]:
    """A back-end that has one answer, to the first message."""
    path = str(folder / "bad.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(12)
                connection.sendall(answer)
                with suppress(ConnectionResetError):
                    connection.recv(1)  # until the client has gone

        thread = threading.Thread(target=serve)
        thread.start()
        yield path
        thread.join(60)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "does not answer GET_FEATURES within 0.3 s"),
        (struct.pack("<IIIQ", 2, 5, 8, 0), "the answer to GET_FEATURES is request 2"),
        (struct.pack("<IIIQ", 1, 1, 8, 0), "with flags 0x1"),
        (struct.pack("<IIIQ", 1, 5, 9, 0), "has 9 bytes instead of 8"),
        (struct.pack("<IIIQ", 1, 5, 8, 1 << 32), "not all of VERSION_1, EVENT_IDX, INDIRECT_DESC"),
    ],
    ids=["silent", "request", "flags", "size", "features"],
)
def test_an_answer_is_checked(program: str, answer: bytes, says: str, tmp_path: Path) -> None:
    with answering(tmp_path, answer) as path:
        status, _, said = load(program, path, *(() if answer else ("--timeout", "0.3")))
        assert status == 2 and says in said, said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "cannot connect to"),
        (("--bs", "1000"), "not whole sectors"),
        (("--iodepth", "129"), "from 1 to 128"),
        (("--rw", "trim"), "choose randread"),
        (("--ios", "5", "--seconds", "1"), "give one of them"),
        (("--wrong", "1"), "--wrong: unknown"),
    ],
)
def test_a_wrong_command_line_is_one_line(program: str, arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    status, _, said = load(program, str(tmp_path / "none.sock"), *arguments)
    assert status == 2 and says in said and said.count("\n") == 1


# --- the benchmark ---


def bench(*arguments: str, **environment: str) -> str:
    command = [sys.executable, str(BENCH / "bench_vhost.py"), *arguments]
    path = os.pathsep.join([str(BENCH.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.qemu
def test_the_benchmark_compares_with_the_daemon(tmp_path: Path) -> None:
    arguments = ("--quick", "--rounds", "1", "--seconds", "0.05", "--only", "iodepth 8", "--dir", str(tmp_path))
    shown = bench(*arguments, "--json", str(tmp_path / "figures.json"))
    (job,) = json.loads((tmp_path / "figures.json").read_text())["jobs"]
    assert list(job["sides"])[:3] == ["daemon, aio=threads", "daemon, aio=io_uring", "sync, Python"]
    assert job["sides"]["sync, Python"]["path"] == "batch path: Python, preadv"
    assert all(side["median"] > 0 and side["median"] == side["runs"][0]["mb_s"] for side in job["sides"].values())
    assert all(goal["ratios"][0] > 0 for goal in job["goals"])
    assert "128 KiB read, iodepth 8" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_without_a_compiler_the_benchmark_says_so(tmp_path: Path) -> None:
    assert bench("--quick", PATH=str(tmp_path)).startswith("skipped: no C compiler here")
    assert shutil.which("cc", path=str(tmp_path)) is None
