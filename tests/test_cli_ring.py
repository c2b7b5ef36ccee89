"""``vblk ring``: which frames it prints and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vblklab import cli, cli_ring

ROOT = Path(__file__).resolve().parents[1]


def test_it_lists_the_frames(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ring"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("virtqueue 0, split, 8 entries: ")
    assert lines[1].split()[0] == "0" and lines[1].endswith("start") and any("avail.idx=8" in line for line in lines)


def test_the_queue_is_chosen_and_a_frame_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ring", "--queue", "packed:4", "--frame", "-1"]) == 0
    out = capsys.readouterr().out
    assert "packed, 4 entries" in out and "driver's event" in out and "← driver" in out


def test_a_job_has_the_queue_of_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "job.fio"
    job.write_text("[job]\nrw=randwrite\nnumber_ios=3\n")
    assert cli.main(["ring", str(job), "--steps", "80"]) == 0
    assert "split, 256 entries" in capsys.readouterr().out
    assert cli.main(["ring", str(job), "--set", "queue=16", "--frame", "2"]) == 0
    assert "16 entries" in capsys.readouterr().out


def test_without_event_idx_no_arrow_speaks_of_events(capsys: pytest.CaptureFixture[str]) -> None:
    for setting, arrows in (("true", True), ("false", False)):
        assert cli.main(["ring", "--set", f"device.event_idx={setting}", "--frame", "5"]) == 0
        tables = capsys.readouterr().out.split("\n\n")[1]
        assert ("event\n" in tables.replace("avail_event", "").replace("used_event", "")) is arrows


def test_played_into_a_pipe_it_prints_every_frame_at_once() -> None:
    command = [sys.executable, "-m", "vblklab", "ring", "--play", "--steps", "60", "--rate", "0.001"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert done.stdout.count("descriptor table") == done.stdout.count(" · frame ") > 5
    assert "\x1b" not in done.stdout and done.stderr == ""


def test_on_a_terminal_each_frame_takes_the_place_of_the_last(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    slept: list[float] = []
    monkeypatch.setattr(cli_ring.time, "sleep", slept.append)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(["ring", "--play", "--steps", "60", "--rate", "4"]) == 0
    out = capsys.readouterr().out
    assert out.count("\x1b[H\x1b[2J") == len(slept) == out.count(" · frame ") and set(slept) == {0.25}


@pytest.mark.parametrize(
    "wrong",
    [
        ["--queue", "8"],
        ["--queue", "split:"],
        ["--queue", "packed:x"],
        ["--queue", "split:7"],
        ["--queue", "packed:0"],
        ["--queue", "ring:8"],
        ["--frame", "9999"],
        ["--virtqueue", "3"],
        ["--steps", "0"],
        ["--rate", "0", "--play"],
        ["--rate", "nan"],
        ["--frame", "1", "--play"],
        ["nowhere.fio"],
    ],
)
def test_what_is_wrong_gives_one_line(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ring", *wrong]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("vblk: ") and err.count("\n") == 1
