"""The live machine: two processes or two threads, clean ends whatever happens."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vblklab as vb
from vblklab.events import STEPS
from vblklab.machine import live, loop

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the live machine needs Linux")
HALVES = ["process", "thread"]


def recipe(**parts: object) -> vb.Pipeline:
    return vb.Pipeline(app=vb.Fio(rw="randread", bs=4096, iodepth=8, number_ios=400), disk=vb.Ram(8 << 20)).replace(**parts)


@pytest.mark.parametrize("device", HALVES)
def test_a_run_says_what_it_took_over_and_marks_its_times(device: str) -> None:
    run = recipe(disk=vb.Nvme(size=8 << 20)).run(vb.LiveMachine(device=device))
    assert (run.ios, run.errors, run.rung, run.simulated) == (400, 0, "L2 live", False)
    assert any(note.startswith("kick:") for note in run.notes)
    assert any("P4800X" in note for note in run.notes)
    assert run.kinds["D6"] == "mixed" and run.kinds["D2"] == "python"
    assert ("threads" in " ".join(run.notes)) == (device == "thread")
    hard, soft = run.split["D6"]
    assert hard > 0 and soft > 0
    assert (run.rows[:, 1:] >= run.rows[:, :-1]).all()


@pytest.mark.parametrize("device", HALVES)
def test_polling_and_several_queues_work(device: str) -> None:
    app = vb.Fio(rw="randrw", bs=4096, iodepth=8, numjobs=3, number_ios=100, size="4m", verify="md5")
    parts = dict(app=app, driver=vb.VirtioBlkDriver(poll=True), device=vb.VirtioBlkDevice(queues=3), kvm=vb.Kvm(vcpus=3))
    run = recipe(**parts).run(vb.LiveMachine(device=device, poll_us=30))
    assert (run.ios, run.errors, run.mismatches) == (300, 0, 0)
    assert run.counters["interrupts"] <= 3, "the first used buffer of a queue may interrupt: nothing was signalled before"


def test_two_threads_hand_the_global_lock_over_often_and_only_while_they_run() -> None:
    before = sys.getswitchinterval()
    first, second = (recipe().boot(vb.LiveMachine(device="thread")) for _ in range(2))
    assert sys.getswitchinterval() <= 1e-4
    first.close()
    assert sys.getswitchinterval() <= 1e-4
    second.close()
    assert sys.getswitchinterval() == before


@pytest.mark.parametrize("device", HALVES)
def test_an_exception_in_the_learners_device_arrives_with_its_traceback(device: str) -> None:
    class Broken(vb.VirtioBlkDevice):
        def handle_request(self, request):  # type: ignore[no-untyped-def]
            raise ZeroDivisionError("a learner's slip")
            yield

    with pytest.raises(vb.DeviceDied, match="a learner's slip") as caught:
        recipe(device=Broken).run(vb.LiveMachine(device=device))
    assert "handle_request" in caught.value.traceback


def test_a_killed_device_process_is_one_typed_error() -> None:
    vm = recipe(app=vb.Fio(rw="randread", bs=4096, iodepth=8, number_ios=1_000_000)).boot(vb.LiveMachine())
    assert vm._child is not None
    os.kill(vm._child.pid, signal.SIGKILL)
    with pytest.raises(vb.DeviceDied, match="SIGKILL"):
        vm.run()


def test_a_lost_interrupt_is_reported_and_not_waited_for_for_ever() -> None:
    class Silent(vb.VirtioBlkDevice):
        def should_notify(self, queue: object) -> bool:
            return False

    vm = recipe(device=Silent).boot(vb.LiveMachine())
    vm.machine.stall_s = 0.5
    with pytest.raises(vb.Stalled, match="in flight"):
        vm.run()


def test_a_device_that_takes_its_time_to_start_is_waited_for() -> None:
    class Slow(vb.VirtioBlkDevice):
        def attach(self, *args: Any, **more: Any) -> None:
            time.sleep(1.2)
            super().attach(*args, **more)

    run = recipe(device=Slow).run(vb.LiveMachine(stall_s=1))
    assert (run.ios, run.errors) == (400, 0)


def test_ctrl_c_ends_cleanly_with_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vblklab.machine.live._TICK_S", 0.0)

    def interrupt(done: int, total: int | None) -> None:
        if 100 < done < 50_000 and not fired:
            fired.append(done)
            raise KeyboardInterrupt

    fired: list[int] = []
    run = recipe(app=vb.Fio(rw="randread", bs=4096, iodepth=4, number_ios=100_000)).run(vb.LiveMachine(), progress=interrupt)
    assert run.interrupted and 100 <= run.ios < 100_000 and run.errors == 0


def test_a_missing_image_is_the_same_typed_error_from_the_device_process(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(vb.DiskError, match="does not exist"):
        recipe(disk=vb.ImageFile(str(tmp_path / "none.img"))).run(vb.LiveMachine())


def test_a_resize_reaches_the_driver() -> None:
    vm = recipe().boot(vb.LiveMachine())
    vm.resize(16 << 20)
    vm.run()
    assert vm.driver.capacity_sectors == 16 << 11


@pytest.mark.parametrize("error", [28, 5])
def test_a_full_disk_fails_that_request_and_nothing_else(error: int, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))

    class FullOnce(vb.VirtioBlkDevice):
        """The store under it fails every seventh write."""

        writes = 0

        def attach(self, engine, *args, **more):  # type: ignore[no-untyped-def]
            super().attach(engine, *args, **more)
            store, device = engine.store, self
            write = store.writev

            def writev(offset, views):  # type: ignore[no-untyped-def]
                device.writes += 1
                if device.writes % 7 == 0:
                    raise OSError(error, os.strerror(error))
                write(offset, views)

            store.writev = writev

    app = vb.Fio(rw="randwrite", bs=4096, iodepth=4, number_ios=70, size="1m")
    run = recipe(app=app, device=FullOnce, disk=vb.ImageFile(str(path))).run(vb.LiveMachine(device="thread"))
    assert (run.ios, run.errors) == (70, 10)
    assert run.jobs[0].error == 5, "the guest sees EIO for VIRTIO_BLK_S_IOERR"


@pytest.mark.parametrize("device", HALVES)
def test_an_io_that_takes_long_keeps_its_step_times(device: str) -> None:
    class Slow(vb.VirtioBlkDevice):
        def check(self, request: Any) -> int:
            time.sleep(0.3)  # longer than two windows of a long run's log
            return super().check(request)

    app = vb.Fio(rw="randread", bs=4096, iodepth=2, number_ios=4)
    run = recipe(app=app, device=Slow).run(vb.LiveMachine(device=device))
    assert len(run.rows) == run.ios == 4
    assert run.provenance["tracing"].endswith("step times of 4 I/Os")
    assert all(stat.mean_ns > 250e6 for stat in run.steps if stat.step == "D5")


def test_a_long_run_says_how_many_ios_the_gaps_of_its_log_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (loop, live):
        monkeypatch.setattr(module, "KEPT_FIRST", 2000)
    app = vb.Fio(rw="randread", bs=4096, iodepth=8, number_ios=1_000_000, runtime="2500ms")
    with contextlib.closing(recipe(app=app).boot(vb.LiveMachine(device="thread"))) as vm:
        run = vm.run()
        vm.save(tmp_path / "long.run.gz")
    said = re.search(r"step times of ([\d,]+) I/Os, ([\d,]+) more are cut by its gaps$", run.provenance["tracing"])
    assert said is not None, run.provenance["tracing"]
    timed, cut = (int(number.replace(",", "")) for number in said.groups())
    assert 100 < timed + cut < run.ios and cut
    steps = np.diff(run.rows, axis=1)
    served = [number for number, step in enumerate(STEPS) if step.name in ("D5", "D6", "U2", "U3")]
    assert (steps[:, served].max(axis=1) > 0).all(), "an I/O whose device's half was not kept is not timed"
    again = vb.recorded(tmp_path / "long.run.gz")
    assert np.array_equal(again.rows, run.rows)


def memfds() -> list[str]:
    names = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    return sorted(name for name in names if "vblklab-" in name or "eventfd" in name or "kvm-" in name)


MACHINES = [
    pytest.param(vb.LiveMachine, id="process"),
    pytest.param(lambda: vb.LiveMachine(device="thread"), id="thread"),
    pytest.param(vb.VhostUserMachine, id="vhost-user"),
    pytest.param(vb.KvmMachine, id="kvm", marks=pytest.mark.kvm),
]


@pytest.mark.parametrize("make", MACHINES)
@pytest.mark.parametrize("call", ["irqfd", "intx"])
def test_a_machine_that_was_booted_and_dropped_gives_everything_back(make: Any, call: str) -> None:
    gc.collect()
    before = memfds()
    vm = recipe(kvm=vb.Kvm(call=call)).boot(make())
    assert memfds() != before
    del vm
    gc.collect()
    gc.collect()  # what the device's thread held became garbage when the first one ended it
    assert memfds() == before


@pytest.mark.skipif(sys.version_info < (3, 13), reason="before Python 3.13 a mapping keeps a descriptor of its own")
@pytest.mark.parametrize("make", MACHINES)
def test_a_machine_that_has_run_keeps_no_descriptor_until_it_is_collected(make: Any) -> None:
    gc.collect()
    before = memfds()
    vm = recipe().boot(make())
    vm.run()
    assert memfds() == before
    assert len(vm.memory.read(0, 4096)) == 4096, "what lies in its memory can still be looked at"
