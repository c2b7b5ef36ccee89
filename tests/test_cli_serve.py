"""``vblk serve``: what it prints, what it serves, and how it ends."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vblklab as vb
from vblklab import cli
from vblklab.machine.live import live_missing

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
pytestmark = pytest.mark.skipif(bool(live_missing()), reason="serving needs Linux")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
    return path


class Serving:
    """The program, and the lines it has printed."""

    def __init__(self, child: subprocess.Popen[str], socket: str) -> None:
        self.child, self.socket = child, socket
        self.lines: list[str] = []

    def until(self, text: str) -> str:
        assert self.child.stderr is not None
        for line in self.child.stderr:
            self.lines.append(line.removeprefix("vblk: ").rstrip())
            if text in line:
                return self.lines[-1]
        raise AssertionError(f"it ended without saying {text!r}: {self.lines}")

    def end(self, number: int) -> int:
        self.child.send_signal(number)
        self.until("stopped")
        return self.child.wait(60)

    def run(self, **job: object) -> vb.Run:
        machine = vb.VhostUserMachine(trace=False)
        return vb.Pipeline(app=vb.Fio(**job), queue=vb.Split(64), host=vb.VhostUserBackend(self.socket)).run(machine)  # type: ignore[arg-type]


@contextmanager
def serving(image: Path, *options: str) -> Iterator[Serving]:
    socket = str(image.parent / "s")
    command = [sys.executable, "-m", "vblklab", "serve", str(image), "--socket", socket, *options]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        yield Serving(child, socket)
    finally:
        child.kill()
        child.wait()
        assert child.stderr is not None
        child.stderr.close()


VERIFY = {"rw": "randrw", "bssplit": "512/40:4k/50:64k/10", "iodepth": 16, "size": 4 * MIB, "number_ios": 300, "verify": "crc32"}


@pytest.mark.parametrize(
    ("engine", "cache", "path"),
    [
        ("sync", "writeback", "auto"),
        ("sync", "none", "batch"),
        ("threads", "writethrough", "auto"),
        ("threads", "directsync", "plain"),
        ("mmap", "unsafe", "auto"),
        ("mmap", "writeback", "batch"),
    ],
)
def test_every_engine_and_cache_mode_serves_a_verify_job(engine: str, cache: str, path: str, image: Path) -> None:
    with serving(image, "--engine", engine, "--cache", cache, "--path", path) as server:
        assert f"{path if path == 'plain' else ''} path" in server.until("serving")
        run = server.run(**VERIFY)
        assert (run.errors, run.mismatches) == (0, 0) and run.ios >= 300
        assert server.end(signal.SIGTERM) == 0
        total = server.until("requests")
        counts = {name: int(value.replace(",", "")) for name, value in re.findall(r"([a-z ]+) ([\d,]+)(?:, |$)", total)}
        assert counts["connections"] == 1 and counts["requests"] >= run.ios and counts["kicks"] and not counts["queue errors"]
    assert not Path(server.socket).exists()
    assert any(image.read_bytes())


def test_it_prints_the_line_for_qemu_and_sees_a_grown_image(image: Path) -> None:
    with serving(image, "--queues", "2", "--queue-size", "64", "--serial", "mine") as server:
        line = server.until("attach it with")
        for piece in (f"path={server.socket}", "num-queues=2", "queue-size=64", "share=on", "vhost-user-blk-pci"):
            assert piece in line, line
        with image.open("r+b") as file:
            file.truncate(16 * MIB)
        server.child.send_signal(signal.SIGHUP)
        assert "16,777,216 bytes now" in server.until("the image has")
        run = server.run(rw="write", bs=65536, size=4 * MIB, offset=12 * MIB)
        assert not run.errors
        assert server.end(signal.SIGINT) == 0


def test_a_read_only_disk_refuses_to_write_and_discard_can_be_left_out(image: Path) -> None:
    before = image.read_bytes()
    with serving(image, "--read-only", "--no-discard", "--block-size", "4096") as server:
        server.until("serving")
        with pytest.raises(vb.VblkError, match="read-only"):
            server.run(rw="write", bs=4096, number_ios=4)
        assert not server.run(rw="read", bs=4096, number_ios=4).errors
        assert server.end(signal.SIGINT) == 0
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--poll-us", "-1"], "0 or more"),
        (["--block-size", "1000"], "block"),
        (["--block-size", str(16 * MIB)], "block"),
        (["--queue-size", "100"], "power"),
        (["--queues", "0"], "queues"),
        (["--serial", "x" * 21], "20"),
        (["--engine", "mmap", "--cache", "none"], "mmap|Mapped"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line(options: list[str], says: str, image: Path, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.main(["serve", str(image), "--socket", str(image.parent / "s"), *options])
    except SystemExit as end:  # argparse's own way
        status = int(end.code or 0)
    said = capfd.readouterr().err.strip()
    assert status == 2 and re.search(says, said.splitlines()[-1]), said
    assert "Traceback" not in said and not (image.parent / "s").exists()


def test_a_missing_image_and_a_socket_in_use(image: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", str(image.parent / "none.img"), "--socket", str(image.parent / "s")]) == 2
    assert "none.img" in capfd.readouterr().err
    with serving(image) as server:
        server.until("attach")
        assert cli.main(["serve", str(image), "--socket", server.socket]) == 2
        assert "in use" in capfd.readouterr().err
        assert server.end(signal.SIGINT) == 0


def test_a_file_system_without_o_direct_is_said(image: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    opened = os.open

    def refuse(path: str, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)  # as such a file system does
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    assert cli.main(["serve", str(image), "--socket", str(image.parent / "s"), "--cache", "none"]) == 2
    said = capfd.readouterr().err
    assert "without O_DIRECT" in said and "cache='none'" in said
