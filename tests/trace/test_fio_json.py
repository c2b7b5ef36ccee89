"""Our JSON has the real fio's shape and meaning, and goes through fio's own tools."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.guest import fio_peer
from vblklab.stats import DirStat, Histogram, JobStat
from vblklab.trace.fio_json import fio_json


@dataclass
class FakeRun:
    """As much of a Run as is reported."""

    jobs: list[JobStat]
    title: str = "SimMachine · ioeventfd/irqfd · iodepth 8"
    rung: str = "L0 simulated"
    simulated: bool = True
    interrupted: bool = False
    provenance: dict[str, str] = field(
        default_factory=lambda: {"machine": "SimMachine", "vblklab": "0.1.0", "date": "2026-11-23T05:00:00+00:00"}
    )
    recipe: dict[str, str] = field(default_factory=lambda: {"queue": "Split(256)"})
    notes: list[str] = field(default_factory=lambda: ["kick: an eventfd; this machine has no trap"])
    counters: dict[str, int] = field(default_factory=lambda: {"kicks": 12})
    errors: int = 0
    mismatches: int = 0


def _direction(latencies_ns: list[int], bs: int = 4096) -> DirStat:
    stat = DirStat(ios=len(latencies_ns), bytes=bs * len(latencies_ns))
    stat.slat.extend([150] * len(latencies_ns))
    stat.clat.extend(latencies_ns)
    stat.lat.extend([ns + 150 for ns in latencies_ns])
    return stat


@pytest.fixture
def run() -> FakeRun:
    """Two clones: one reads, writes and syncs for 2.5 ms, the other trims for 4 s."""
    first = JobStat("mix", 0, {"rw": "randrw", "iodepth": "8"}, start_ns=1000, end_ns=2_501_000, depths={1: 50, 3: 50, 8: 50, 100: 50})
    first.read = _direction([1_000 + 37 * at for at in range(100)])
    first.write = _direction([90, 25_000, 3_000_000] * 20, bs=8192)
    first.sync = _direction([70_000] * 7, bs=0)
    second = JobStat("trim", 1, {"rw": "trim"}, end_ns=4_000_000_000)
    second.trim = _direction([30_000_000_000, 2_500_000_000, 5])
    return FakeRun([first, second])


def test_totals_and_rates(run: FakeRun) -> None:
    first, second = fio_json(run)["jobs"]
    assert (first["jobname"], first["error"], first["job_runtime"], first["elapsed"], second["elapsed"]) == ("mix", 0, 2, 1, 4)
    read = first["read"]
    assert (read["total_ios"], read["io_bytes"], read["io_kbytes"], read["runtime"]) == (100, 409_600, 400, 2)
    assert read["iops"] == pytest.approx(40_000)
    assert (read["bw_bytes"], read["bw"]) == (163_840_000, 160_000)
    assert second["read"]["total_ios"] == second["read"]["runtime"] == second["read"]["iops"] == 0
    assert second["trim"]["iops"] == pytest.approx(0.75)
    assert first["sync"]["total_ios"] == 7
    assert first["job options"] == {"name": "mix", "rw": "randrw", "iodepth": "8"}
    assert (first["latency_depth"], second["latency_depth"]) == (8, 1)


def test_latencies_have_bins_and_percentiles_where_there_are_samples(run: FakeRun) -> None:
    first, second = fio_json(run)["jobs"]
    clat = first["read"]["clat_ns"]
    assert (clat["min"], clat["max"], clat["N"]) == (1000, 4663, 100)
    assert sum(clat["bins"].values()) == 100
    assert set(map(str, clat["percentile"].values())) <= set(clat["bins"])
    assert clat["percentile"]["50.000000"] == pytest.approx(2831, rel=0.02)
    assert "bins" not in first["trim"]["clat_ns"]
    assert "bins" in first["sync"]["lat_ns"]
    assert max(map(int, second["trim"]["clat_ns"]["bins"])) == 17_112_760_320


def test_depth_levels_hold_what_fio_puts_there(run: FakeRun) -> None:
    levels = fio_json(run)["jobs"][0]["iodepth_level"]
    assert levels == {"1": 25.0, "2": 25.0, "4": 0.0, "8": 25.0, "16": 0.0, "32": 0.0, ">=64": 25.0}


def test_latency_classes_add_up_to_all(run: FakeRun) -> None:
    first, second = fio_json(run)["jobs"]
    for job in (first, second):
        assert sum(sum(job[f"latency_{unit}"].values()) for unit in ("ns", "us", "ms")) == pytest.approx(100)
    assert first["latency_ns"]["250"] == pytest.approx(12.5)
    assert first["latency_ms"]["4"] == pytest.approx(12.5)
    assert second["latency_ms"][">=2000"] == pytest.approx(200 / 3)
    assert second["latency_ns"]["250"] == pytest.approx(100 / 3)


def test_the_extra_key_says_what_it_was_measured_on(run: FakeRun) -> None:
    out = fio_json(run)
    assert out["fio version"] == "fio-3.33-vblklab-0.1.0"
    assert (out["timestamp"], out["timestamp_ms"]) == (1_795_410_000, 1_795_410_000_000)
    extra = out["vblklab"]
    assert extra["simulated"] is True
    assert extra["provenance"]["machine"] == "SimMachine"
    assert (extra["rung"], extra["counters"], extra["notes"]) == ("L0 simulated", {"kicks": 12}, run.notes)


def test_a_run_without_date_or_jobs_is_reported_too() -> None:
    out = fio_json(FakeRun([], provenance={}))
    assert out["jobs"] == []
    assert out["timestamp"] > 1_700_000_000
    assert out["fio version"] == "fio-3.33-vblklab"


def test_it_is_plain_json(run: FakeRun) -> None:
    out = fio_json(run)
    assert json.loads(json.dumps(out, allow_nan=False)) == out


# -- the real fio --

_OPAQUE = ("bins", "job options")
"""Keys whose own keys are data."""


def _shape(value: Any, at: str = "") -> set[str]:
    """Every path of keys with the JSON type at its end."""
    if isinstance(value, dict) and not at.endswith(_OPAQUE):
        return {path for key, inner in value.items() for path in _shape(inner, f"{at}/{key}")} | {at}
    if isinstance(value, list):
        return {path for inner in value for path in _shape(inner, f"{at}[]")} | {at}
    return {f"{at}: {type(value).__name__}"}


@pytest.mark.fio
def test_every_key_and_type_is_fios(run: FakeRun) -> None:
    real = fio_peer.report(
        "--name=mix", "--ioengine=null", "--size=1m", "--rw=randrw", "--fsync=4", "--name=t", "--ioengine=null", "--size=1m", "--rw=trim"
    )
    ours = fio_json(run)
    assert ours.pop("vblklab")
    assert _shape(ours) == _shape(real)
    for mine, theirs in zip(ours["jobs"], real["jobs"], strict=True):
        mine["sync"] = theirs["sync"] = {}
        assert _shape(mine) == _shape(theirs)
        assert list(mine) == list(theirs)


@pytest.mark.fio
def test_percentiles_follow_fios_rule() -> None:
    (real,) = fio_peer.report("--name=x", "--ioengine=null", "--size=4m", "--rw=randread")["jobs"]
    theirs = real["read"]["clat_ns"]
    clat = Histogram()
    for value, count in theirs["bins"].items():
        clat.extend([int(value)] * count)
    stat = JobStat("x", 0, {}, end_ns=1000)
    stat.read = DirStat(ios=clat.count, clat=clat)
    ours = fio_json(FakeRun([stat]))["jobs"][0]["read"]["clat_ns"]
    assert ours["bins"] == theirs["bins"]
    assert ours["percentile"] == theirs["percentile"]


@pytest.mark.fio
def test_fios_own_tool_reads_it(run: FakeRun, tmp_path: Path) -> None:
    tool = shutil.which("fio_jsonplus_clat2csv")
    assert tool, "fio's package holds fio_jsonplus_clat2csv"
    # all that the tool uses of the package six, which a machine with fio need not have
    (tmp_path / "six.py").write_text("def iteritems(mapping):\n    return iter(mapping.items())\n")
    source, target = tmp_path / "run.json", tmp_path / "run.csv"
    source.write_text(json.dumps(fio_json(run)))
    for arguments in ([], ["--validate"]):
        command = [sys.executable, tool, *arguments, str(source), str(target)]
        done = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("validated") == 2
    rows = (tmp_path / "run_job0.csv").read_text().splitlines()
    assert len(rows) > 10
