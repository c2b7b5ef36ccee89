"""A recipe whose guest is a real Linux: the real fio runs its job, and both sides' recordings give the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vblklab as vb

pytestmark = pytest.mark.guest
SIZE = 64 << 20


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("linux") / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def recipe(image: Path, **parts: object) -> vb.Pipeline:
    app = vb.Fio(rw="randrw", bs=4096, iodepth=4, number_ios=200, size=SIZE)
    return vb.Pipeline(app=app, guest=vb.LinuxGuest(), disk=vb.ImageFile(image)).replace(**parts)


def check(run: vb.Run, ios: int) -> None:
    assert (run.ios, run.errors) == (ios, 0) and run.rung == "L3 real Linux guest"
    assert len(run.rows) >= 0.99 * ios, run.provenance["tracing"]
    assert (np.diff(run.rows, axis=1) >= 0).all() and (run.rows[:, 15] > run.rows[:, 0]).all()
    assert "error at most" in run.provenance["clock"]


def check_with_fio(run: vb.Run, fio: dict[str, Any]) -> None:
    """What fio in the guest measured of the same I/Os, from before io_submit to after io_getevents, holds the block layer's time."""
    whole = sum(job[way]["lat_ns"]["mean"] * job[way]["total_ios"] for job in fio["jobs"] for way in ("read", "write"))
    assert whole / 100 < (run.rows[:, 15] - run.rows[:, 1]).sum() < whole


def test_the_steps_of_a_real_linux_on_our_device(image: Path, tmp_path: Path) -> None:
    with recipe(image).boot(vb.VhostUserMachine()) as vm:
        with pytest.raises(vb.ConfigError, match="nothing has run"):
            vm.save(tmp_path / "x.run.gz")
        first, second = vm.run(), vm.run()
        vm.save(tmp_path / "x.run.gz")
        assert vm.guest.run("cat /sys/kernel/tracing/kprobe_events").output == "", "the guest's tracing is as it was"
        assert "trace points are recorded" in vm.explain()[0]
    for run in (first, second):
        check(run, 200)
        assert run.kinds["D5"] == "python" and run.counters["kicks"] > 0
    assert (vb.recorded(tmp_path / "x.run.gz").rows == second.rows).all()
    check_with_fio(second, vm._last.fio)


def test_the_steps_of_a_real_linux_on_qemus_device(image: Path) -> None:
    with recipe(image, host=vb.QemuDisk(image, iothread=True)).boot(vb.VhostUserMachine()) as vm:
        run = vm.run()
    check(run, 200)
    check_with_fio(run, vm._last.fio)
    assert run.kinds["D5"] == "qemu" and {event.key for event in run.trace or ()} >= {"blk_co_preadv", "virtio_notify_irqfd", "vp_notify"}


def test_without_a_trace_fio_s_numbers_are_the_run(image: Path) -> None:
    with recipe(image).boot(vb.VhostUserMachine(trace=False)) as vm:
        run = vm.run()
        assert vm.explain()[0].startswith("batch path")
    assert run.ios == 200 and len(run.rows) == 0 and run.trace is None and run.clat.count == 200
    assert "not timed" in run.provenance["tracing"]
