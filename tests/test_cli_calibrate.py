"""``vblk calibrate``, and a cost table in ``vblk run``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vblklab as vb
from tests.cost_tables import known_table
from vblklab import cli
from vblklab.kvm import host
from vblklab.lab import calibrate as calibration
from vblklab.lab import predict as prediction
from vblklab.machine.live import live_missing

linux_only = pytest.mark.skipif(bool(live_missing()), reason="the live machine needs Linux")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.fio").write_text("[job]\nrw=randread\nbs=4k\nnumber_ios=20\n")


def test_run_simulates_with_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    known_table("kvm").replace(virtio_queue_notify=9_000_000).save("mine.csv")
    assert cli.main(["run", "job.fio", "--costs", "mine.csv"]) == 0
    plain = capsys.readouterr().out
    assert "mean 9" in plain.split("completion latency")[1]
    assert cli.main(["run", "job.fio", "--costs", "mine.csv", "--like", "kvm"]) == 0
    assert "SimMachine (simulated as KvmMachine)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "job.fio", "--costs", "none.csv"], "cost table none.csv: No such file"),
        (["run", "job.fio", "--costs", "job.fio"], "cost table job.fio, line 2: there is no column 'key'"),
        (["run", "job.fio", "--like", "kvm"], "no rows of KvmMachine: measure them"),
        (["run", "job.fio", "--machine", "live", "--like", "kvm"], "--costs and --like are for the simulator"),
        (["calibrate", "--set", "queue=8"], "--set, --disk and --html belong to --predict"),
        (["calibrate", "--out", "none/mine.csv"], "--out 'none/mine.csv' is no file in a folder that is there"),
        (["calibrate", "--seconds", "0"], "seconds=0.0"),
        (["calibrate", "--predict", "none.fio"], "none.fio"),
    ],
)
@linux_only
def test_what_is_wrong_is_said_in_a_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@linux_only
def test_calibrate_prints_and_writes_the_table_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "found", lambda *_: (False, "there is no /dev/kvm", "load kvm_intel"))
    monkeypatch.setattr(calibration.Calibration, "live", lambda *_, **__: None)
    assert cli.main(["calibrate", "--seconds", "0.2", "--out", "mine.csv"]) == 0
    out, err = capsys.readouterr()
    assert "eventfd:other-process" in out and out.endswith("wrote mine.csv\n")
    assert err == "vblk: without KVM: there is no /dev/kvm. To gain it: load kvm_intel\n"
    assert vb.CostTable.load("mine.csv")["syscall"].n


@linux_only
def test_predict_runs_the_recipe_and_its_status_is_the_verdict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    def predict(recipe: Any, machine: Any, **options: Any) -> prediction.Prediction:
        asked.extend((recipe, machine, options["rounds"]))
        runs = [recipe.run(vb.SimMachine(costs=known_table("live"), like=machine)) for _ in range(2)]
        steps = prediction._errors(runs[0].rows, runs[1].rows * asked[-1])
        return prediction.Prediction(*runs, known_table("live"), steps, ("a note",))

    monkeypatch.setattr(prediction, "predict", predict)
    args = ["calibrate", "--predict", "job.fio", "--machine", "live", "--set", "kvm.kick=mmio-exit", "--out", "mine.csv"]
    assert cli.main([*args, "--rounds", "1", "--html", "run.html"]) == 0
    out = capsys.readouterr().out
    assert "within 15 % of the median" in out and "note: a note" in out and "wrote mine.csv\nwrote run.html\n" in out
    assert asked[0].kvm.kick == "mmio-exit" and asked[0].app.jobs[0].number_ios == 20 and isinstance(asked[1], vb.LiveMachine)
    assert "<html>" in Path("run.html").read_text(encoding="utf-8")
    assert cli.main([*args, "--rounds", "3"]) == 1
    assert "missed" in capsys.readouterr().out
