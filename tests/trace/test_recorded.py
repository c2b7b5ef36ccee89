"""Real guests, recorded: every I/O is joined, nothing happens before its cause, and files that are none are refused."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import vblklab as vb
from vblklab._data import DATA
from vblklab.machine.guest_run import GuestRun
from vblklab.trace.ftrace import read_ftrace
from vblklab.trace.guest import guest_side
from vblklab.trace.run import TraceEvent

NAMES = ("linux-ours-d1", "linux-ours-d8", "linux-qemu-d1", "linux-qemu-iothread-d1")
SEEN = ["D1", "D2", "D3", "D4", "D5", "D6", "U3", "U4", "U6", "U7"]


def load(name: str) -> GuestRun:
    return GuestRun.load(DATA / "recorded" / f"{name}.run.gz")


@pytest.mark.parametrize("name", NAMES)
def test_every_io_has_its_steps_in_order(name: str) -> None:
    run = vb.recorded(name)
    assert run.rung == "L1 recorded" and not run.simulated and run.ios == 300 and run.errors == 0
    assert len(run.rows) == run.ios
    _, joined = load(name).recording.read()  # type: ignore[union-attr]
    rows = np.array(joined.rows)
    assert joined.unmatched == 0 and joined.ios == run.ios
    rows = np.where(rows == 0, -1, rows)
    for row in rows:
        seen = [stamp for stamp in row if stamp >= 0]
        assert seen == sorted(seen), "a step began before the one before it"
    steps = {stat.step: stat for stat in run.steps}
    assert all(steps[name].mean_ns > 0 for name in SEEN)
    # what fio in the guest measured as its own latency is the whole path
    whole = np.diff(run.rows[:, [0, 15]], axis=1)
    assert 0.5 < np.median(whole) / run.clat.percentile(50) < 2.5
    assert int(whole.min()) > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_figures_say_what_the_times_are(name: str) -> None:
    run = vb.recorded(name)
    assert run.kinds["D2"] == "emulated" and run.kinds["D5"] == ("python" if "ours" in name else "qemu")
    assert "error at most" in run.provenance["clock"] and "300 of 300 I/Os" in run.provenance["tracing"]
    model = vb.Pipeline(app=vb.Fio(rw="randread", bs=4096, number_ios=50)).run(vb.SimMachine())
    for figure in (vb.waterfall(model, run), vb.compare(model, run), vb.path_map(run), vb.lanes(run)):
        caption = figure.layout.meta["caption"]
        assert "emulated" in caption and "error at most" in caption and "recorded" in caption
    dotted = [t for t in vb.waterfall(run).data if t.name.endswith("by an emulated CPU") and t.marker.pattern.shape == "."]
    assert any(any(length for length in t.x if length) for t in dotted)
    assert any("D7" in note for note in run.notes)


def test_a_merged_and_a_split_bio_are_followed() -> None:
    def line(t: int, name: str, said: str) -> str:
        return f"  fio-9  [000] .....  1.{t:06d}: {name}: {said}"

    lines = [
        *(line(1, "block_bio_queue", "254,0 W 0 + 8 [fio]"), line(2, "block_getrq", "254,0 W 0 + 8 [fio]")),
        *(line(3, "block_bio_queue", "254,0 W 8 + 8 [fio]"), line(4, "block_bio_backmerge", "254,0 W 8 + 8 [fio]")),
        *(line(5, "block_rq_issue", "254,0 W 8192 () 0 + 16 [fio]"), line(6, "virtqueue_add_sgs", "(x) vq=0x10 data=0x1")),
        *(line(7, "block_bio_queue", "254,0 R 100 + 24 [fio]"), line(8, "block_split", "254,0 R 100 / 116 [fio]")),
        *(line(9, "block_getrq", "254,0 R 100 + 16 [fio]"), line(10, "block_rq_issue", "254,0 R 8192 () 100 + 16 [fio]")),
        *(line(11, "virtqueue_add_sgs", "(x) vq=0x10 data=0x2"), line(12, "block_getrq", "254,0 R 116 + 8 [fio]")),
        *(line(13, "block_rq_issue", "254,0 R 4096 () 116 + 8 [fio]"), line(14, "virtqueue_add_sgs", "(x) vq=0x10 data=0x3")),
        *(line(20, "block_rq_complete", "254,0 W () 0 + 16 [0]"), line(21, "block_rq_complete", "254,0 R () 116 + 8 [0]")),
        line(22, "block_rq_complete", "254,0 R () 100 + 16 [0]"),
    ]
    side = guest_side(read_ftrace("\n".join(lines) + "\n").records, "254,0")
    assert [(io.op, (io.done - 10**9) // 1000) for io in side.ios] == [("W", 20), ("W", 20), ("R", 22)]
    assert [request.asks for request in side.requests] == [("W", 0, 16), ("R", 100, 16), ("R", 116, 8)]
    assert all(request.added and request.ended for request in side.requests)
    assert side.ios[2].first is side.requests[1] and side.ios[2].last is side.requests[1]


def test_sides_of_two_runs_do_not_join() -> None:
    ours, other = load("linux-ours-d1").recording, load("linux-qemu-d1").recording
    assert ours is not None and other is not None
    mixed = replace(ours, qemu_log=other.qemu_log, realtime_minus_host_ns=other.realtime_minus_host_ns)
    with pytest.raises(vb.TraceError, match=r"contradict|no request"):
        mixed.read()
    with pytest.raises(vb.TraceError, match="no request of the guest"):
        replace(ours, dev="254,16").read()
    with pytest.raises(vb.TraceError, match="virtio_blk"):
        replace(other, qemu_log="1@2.000003:virtio_notify vdev 0x1 vq 0x2\n").read()


def test_a_run_survives_its_file(tmp_path: Path) -> None:
    one = load("linux-ours-d8")
    one.save(tmp_path / "mine.run.gz")
    again = vb.recorded(tmp_path / "mine.run.gz")
    first = vb.recorded("linux-ours-d8")
    assert (again.rows == first.rows).all() and again.provenance == first.provenance and again.trace == first.trace


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(vb.ConfigError, match=r"there are kvm-.*, linux-ours-d1, linux-ours-d8"):
        vb.recorded("nothing")
    path = tmp_path / "x.run.gz"
    kept = json.loads(gzip.decompress((DATA / "recorded" / "linux-qemu-d1.run.gz").read_bytes()))
    for content in (b"", b"text", gzip.compress(b"text"), gzip.compress(b"{}"), gzip.compress(b"[1]"),
                    gzip.compress(json.dumps(kept | {"form": 99}).encode()),
                    gzip.compress(json.dumps(kept | {"recording": {"pairs": 1}}).encode()),
                    gzip.compress(json.dumps(kept | {"more": 1}).encode())):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(vb.TraceError, match=r"recording .*x\.run\.gz.*"):
            vb.recorded(path)


@pytest.mark.parametrize("name", ["kvm-mmio-exit-intx-d1", "kvm-ioeventfd-irqfd-d1", "linux-ours-d1"])
def test_a_printed_trace_point_keeps_to_its_columns(name: str) -> None:
    points = vb.recorded(name).trace or []
    lines = [str(point._replace(t_ns=point.t_ns - points[0].t_ns)) for point in points]
    assert {line.index(point.key, 40) for line, point in zip(lines, points, strict=True)} == {45}
    assert not [line for line in lines if "…" in line], "every context that a machine has is shown whole"


def test_a_printed_trace_point_cuts_a_long_name_of_a_job() -> None:
    point = TraceEvent(1000, "vCPU 0 a-job-with-a-long-name", "vCPU 0", "virtqueue_pop", (1,))
    assert str(point) == "       1.000 µs  D5  vCPU 0 a-job-with-a-l…  virtqueue_pop                  vq_head=0:1"
    assert point.context == "vCPU 0 a-job-with-a-long-name"
