"""The simulator: deterministic, unchanged by observation, steppable, and clear when something is lost."""

from __future__ import annotations

import csv
import re

import pytest

import vblklab as vb
from vblklab._data import DATA
from vblklab.machine.costs import CostTable
from vblklab.machine.sched import Scheduler


def recipe(**parts: object) -> vb.Pipeline:
    app = vb.Fio(rw="randrw", bssplit="4k/70:64k/30", iodepth=4, numjobs=2, number_ios=60, size="8m")
    return vb.Pipeline(app=app).replace(**parts)


def text(run: vb.Run) -> list[str]:
    return [str(event) for event in run.trace]


@pytest.mark.parametrize("interleave", ["cost", "random"])
def test_same_seed_same_trace_and_another_seed_another(interleave: str) -> None:
    first, second, other = (recipe().run(vb.SimMachine(seed=seed, interleave=interleave, trace=True)) for seed in (5, 5, 6))
    assert text(first) == text(second)
    assert first.counters == second.counters
    assert text(first) != text(other)


def test_observing_changes_no_time() -> None:
    runs = [recipe().run(vb.SimMachine(trace=trace)) for trace in (0, True)]
    assert runs[0].duration_ns == runs[1].duration_ns
    assert runs[0].clat.bins() == runs[1].clat.bins()


def test_stepping_goes_over_the_points_of_the_run() -> None:
    small = recipe(app=vb.Fio(rw="randread", bs=4096, iodepth=2, number_ios=5))
    whole = [(event.t_ns, event.key) for event in small.run(vb.SimMachine(trace=True)).trace if event.key != "wait"]
    vm = small.boot(vb.SimMachine(trace=True))
    stepped = []
    while (event := vm.step()) is not None:
        stepped.append((event.t_ns, event.key))
    assert stepped == whole
    assert vm.result().ios == 5


def test_one_read_at_depth_1_hits_the_steps_in_the_order_of_the_path() -> None:
    run = vb.Pipeline(app=vb.Fio(rw="randread", bs=4096, number_ios=3)).run(vb.SimMachine())
    keys = [event.key for event in run.trace]
    order = [
        "sys_enter_io_submit",
        "block_bio_queue",
        "virtio_queue_rq",
        "virtqueue_add_sgs",
        "vm_notify",
        "kvm_fast_mmio",
        "virtqueue_pop",
        "host:block_bio_queue",
        "nvme_queue_rq",
        "nvme_cqe",
        "host:block_rq_complete",
        "virtio_blk_rw_complete",
        "virtqueue_fill",
        "virtio_notify_irqfd",
        "kvm_set_irq",
        "kvm_inj_virq",
        "vm_interrupt",
        "virtqueue_get_buf",
        "block_rq_complete",
        "block_bio_complete",
        "sys_exit_io_getevents",
    ]
    places = [keys.index(key) for key in order]
    assert places == sorted(places)
    assert (run.rows[:, 1:] >= run.rows[:, :-1]).all()
    assert run.rows.shape == (3, 16)


def test_where_names_step_function_and_line() -> None:
    vm = vb.Pipeline().boot(vb.SimMachine())
    assert "step()" in str(vm.where())
    vm.step_until("virtqueue_kick_prepare")
    where = vm.where()
    assert (where.step, where.key) == ("D3", "virtqueue_kick_prepare")
    assert "virtqueue_kick_prepare" in where.line
    assert where.functions[-1] == "VirtioBlkDriver.queue_rq"


def test_a_device_that_never_interrupts_stalls_with_a_typed_error() -> None:
    class Silent(vb.VirtioBlkDevice):
        def should_notify(self, queue: object) -> bool:
            return False

    with pytest.raises(vb.Stalled, match="in flight"):
        recipe(device=Silent).run(vb.SimMachine())


def test_polling_needs_no_interrupt() -> None:
    run = recipe(driver=vb.VirtioBlkDriver(poll=True)).run(vb.SimMachine())
    assert run.ios == 120
    assert run.counters["interrupts"] <= 2, "the first used buffer of a queue may interrupt: nothing was signalled before"
    assert run.counters["polls"] > 0


@pytest.mark.parametrize("kick", ["ioeventfd", "mmio-exit"])
@pytest.mark.parametrize("call", ["irqfd", "intx"])
@pytest.mark.parametrize("engine", [vb.Simulated, vb.Sync])
@pytest.mark.parametrize(
    "disk", [vb.Nvme(size=8 << 20), vb.Ram(8 << 20), vb.Nvme(size=8 << 20, queue_depth=2)], ids=["nvme", "ram", "shallow"]
)
def test_every_wiring_engine_and_disk_ends_the_job(kick: str, call: str, engine: type, disk: object) -> None:
    app = vb.Fio(rw="randrw", bssplit="512/30:4k/40:128k/30", iodepth=16, numjobs=2, number_ios=80, size="8m", verify="crc32")
    run = vb.Pipeline(app=app, kvm=vb.Kvm(kick=kick, call=call), engine=engine, disk=disk).run(vb.SimMachine())
    assert (run.ios, run.errors, run.mismatches) == (160, 0, 0)


@pytest.mark.parametrize(
    "device", [dict(event_idx=False), dict(indirect=False), dict(seg_max=2), dict(size_max=4096), dict(queues=1), dict(block_size=4096)]
)
def test_a_full_ring_of_four_entries_holds_back_and_loses_nothing(device: dict[str, object]) -> None:
    app = vb.Fio(rw="randrw", bs="16k", iodepth=64, numjobs=2, number_ios=100, size="8m", verify="crc32", segment_bytes=4096)
    run = vb.Pipeline(app=app, queue=vb.Split(4), device=vb.VirtioBlkDevice(**device), disk=vb.Nvme(size=8 << 20)).run(vb.SimMachine())
    assert (run.ios, run.errors, run.mismatches) == (200, 0, 0)


def test_merging_joins_sequential_ios_of_one_submission() -> None:
    app = vb.Fio(rw="read", bs=4096, iodepth=8, iodepth_batch=8, number_ios=64)
    merged = vb.Pipeline(app=app).run(vb.SimMachine())
    apart = vb.Pipeline(app=app, iostack=vb.IOStack(merge=False)).run(vb.SimMachine())
    assert merged.counters["backmerges"] > 40 and apart.counters["backmerges"] == 0
    assert merged.ios == apart.ios == 64
    assert (merged.rows[:, -1] > merged.rows[:, 0]).all()


def test_flush_discard_and_the_write_cache_work() -> None:
    app = vb.Fio.parse(
        "[w]\nrw=randwrite\nbs=4k\nnumber_ios=40\nfsync=4\nsize=1m\n[t]\nrw=randtrim\nbs=64k\nnumber_ios=20\noffset=1m\nsize=2m\n"
    )
    for write_cache in (True, False):
        run = vb.Pipeline(app=app, device=vb.VirtioBlkDevice(write_cache=write_cache)).run(vb.SimMachine())
        assert run.errors == 0
        assert run.jobs[0].sync.ios == 10
        assert run.jobs[1].trim.ios == 20


def test_a_resize_reaches_the_driver() -> None:
    vm = vb.Pipeline(disk=vb.Ram(8 << 20)).boot(vb.SimMachine())
    vm.resize(16 << 20)
    vm.run()
    assert vm.driver.capacity_sectors == 16 << 11
    assert vm.driver.capacity_changes == 1


def test_a_reset_with_io_in_flight_ends_it_with_an_error_and_the_rest_goes_on() -> None:
    vm = vb.Pipeline(app=vb.Fio(rw="randread", bs=4096, iodepth=16, number_ios=200)).boot(vb.SimMachine())
    vm.step_until("host:block_rq_complete")
    vm.task(vm.driver.restart())
    run = vm.run()
    assert run.ios == 200
    assert 0 < run.errors <= 16


def test_ctrl_c_returns_what_was_measured_so_far() -> None:
    fired: list[int] = []

    def interrupt(done: int, total: int | None) -> None:
        if done > 500 and not fired:
            fired.append(done)
            raise KeyboardInterrupt

    vm = vb.Pipeline(app=vb.Fio(rw="randread", bs=4096, number_ios=50_000)).boot(vb.SimMachine())
    run = vm.run(progress=interrupt)
    assert run.interrupted and 500 < run.ios < 50_000


def test_a_machine_runs_once() -> None:
    vm = vb.Pipeline().boot(vb.SimMachine())
    vm.run()
    with pytest.raises(vb.VblkError, match="already run"):
        vm.run()


def test_an_undeclared_trace_point_is_named() -> None:
    class Chatty(vb.VirtioBlkDevice):
        def handle_request(self, request):  # type: ignore[no-untyped-def]
            yield ("never_declared",)
            yield from super().handle_request(request)

    with pytest.raises(vb.ConfigError, match="never_declared"):
        recipe(device=Chatty).run(vb.SimMachine())


def test_a_cost_stated_by_the_learner_is_charged_and_said() -> None:
    base = vb.Pipeline().run(vb.SimMachine())
    costs = CostTable.load().replace(kvm_fast_mmio=10_000)
    slow = vb.Pipeline().run(vb.SimMachine(costs=costs))
    lat = [run.jobs[0].read.lat.mean_ns for run in (base, slow)]
    assert lat[1] - lat[0] == pytest.approx(10_000 - CostTable.load()["kvm_fast_mmio"].ns, rel=0.05)
    assert slow.costs["kvm_fast_mmio"].kind == "stated by you"


def test_every_trace_point_has_a_cost_with_a_source() -> None:
    table = CostTable.load()
    for key in vb.EVENTS:
        cost = table.of_event(key)
        assert cost.ns >= 0 and cost.source
    assert Scheduler(table, interleave=None).table["bio_to_request"] == round(table["block_bio_queue"].ns) + round(table["block_getrq"].ns)


def test_published_costs_recompute_from_the_published_figures() -> None:
    with (DATA / "published" / "calibration.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with (DATA / "costs" / "published.csv").open(newline="", encoding="utf-8") as file:
        for entry in csv.DictReader(file):
            if entry["kind"] != "published":
                continue
            total = 0.0
            for sign, line in re.findall(r"([+-])(\d+)", entry["terms"]):
                row = rows[int(line) - 2]
                assert row["evidence"] != "memory, unverified"
                scale = {"us": 1000.0, "ns": 1.0, "ms": 1e6}.get(row["unit"].split()[0]) or 1 / float(entry["ghz"])
                total += float(sign + "1") * float(row["value"]) * scale
            assert CostTable.load()[entry["key"]].ns == pytest.approx(total * float(entry["share"])), entry["key"]
