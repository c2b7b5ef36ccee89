"""The simulator in the shape of a live machine: every step is the sum of the rows that belong to it, added up by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vblklab as vb
from tests.cost_tables import known_table
from vblklab.machine.insitu import Points
from vblklab.machine.like import shape_of
from vblklab.machine.loop import LogEntry

BS = 8192
STEPS = {
    "D1": ("sys_enter_io_submit",),
    "D2": ("block_bio_queue", "block_getrq"),
    "D3": ("virtio_queue_rq", "virtqueue_add_sgs", "virtqueue_kick_prepare"),
    "D4": ("vm_notify", "kvm_exit", "KICK", "wake:device", "device:epoll_wait", "virtio_queue_notify"),
    "D5": ("virtqueue_pop", "virtio_blk_handle_read"),
    "D6": ("host:sys_enter_preadv64", "store:ram:read_ns", "host:sys_exit_preadv64"),
    "U3": ("virtio_blk_rw_complete", "virtio_blk_req_complete", "virtqueue_fill", "virtqueue_flush"),
    "U4": ("virtio_notify_irqfd",),
    "U5": ("kvm_set_irq", "wake:vcpu-idle", "AWAKE"),
    "U6": ("vm_interrupt", "vring_interrupt", "virtblk_done", "virtqueue_get_buf", "block_rq_complete"),
    "U7": ("block_bio_complete", "virtqueue_enable_cb_prepare", "virtqueue_enable_cb", "wake:task"),
}
"""A read at queue depth 1, the rows that each step is made of."""
KICKS = {"ioeventfd": ("kvm_fast_mmio",), "mmio-exit": ("kvm_mmio", "kvm_userspace_exit")}


def recipe(kick: str = "ioeventfd", call: str = "irqfd", **parts: Any) -> vb.Pipeline:
    app = vb.Fio(rw="randread", bs=BS, number_ios=20, size="1m")
    return vb.Pipeline(app=app, disk=vb.Ram(1 << 20), kvm=vb.Kvm(kick=kick, call=call)).replace(**parts)


def machine(name: str, **options: Any) -> Any:
    return vb.KvmMachine(**options) if name == "kvm" else vb.LiveMachine(**options)


def simulated(p: vb.Pipeline, name: str, **options: Any) -> vb.Run:
    return p.run(vb.SimMachine(costs=known_table(name, **options), like=machine(name), trace=True))


@pytest.mark.parametrize("kick", KICKS)
@pytest.mark.parametrize("name", ["kvm", "live"])
def test_each_step_is_the_sum_of_its_rows(name: str, kick: str) -> None:
    table = known_table(name)
    run = simulated(recipe(kick), name)
    words = {"KICK": KICKS[kick], "AWAKE": ("vcpu:irq_handler_entry",) if name == "kvm" else ("guest:epoll_wait",)}
    want = dict.fromkeys((step.name for step in vb.STEPS), 0.0)
    for step, rows in STEPS.items():
        want[step] = sum(table[f"{name}/{key}"].ns for row in rows for key in words.get(row, (row,)))
    want["D6"] += BS * 1000 / table[f"{name}/store:ram:read_bytes_per_us"].ns
    found = np.diff(run.rows, axis=1)[1:]  # the first kick meets a device that has not yet slept
    assert len(found) == 19 and (found == found[0]).all(), "one number an I/O"
    assert dict(zip(want, found[0].tolist(), strict=True)) == want
    assert run.rows[1, -1] - run.rows[1, 0] == sum(want.values())


def test_both_kicks_wake_the_devices_own_thread() -> None:
    for kick in KICKS:
        run = simulated(recipe(kick), "kvm")
        served = {event.context for event in run.trace or () if event.key == "virtqueue_pop"}
        assert served == {"iothread"}
        assert run.counters["mmio_exits"] == (20 if kick == "mmio-exit" else 0)
        assert run.counters["fast_mmio"] == (20 if kick == "ioeventfd" else 0)


def test_a_line_that_a_main_loop_sets_costs_its_wake_up() -> None:
    table = known_table("kvm")
    line, fd = (simulated(recipe(call=call), "kvm") for call in ("intx", "irqfd"))
    at = [step.name for step in vb.STEPS].index("U4")
    times = [int(np.diff(run.rows, axis=1)[0, at]) for run in (line, fd)]
    assert times == [table["kvm/virtio_notify"].ns + table["kvm/wake:main-loop"].ns, table["kvm/virtio_notify_irqfd"].ns]


@pytest.mark.parametrize("parts", [{"queue": vb.Packed(64)}, {"transport": vb.Pci()}, {"transport": vb.Pci(), "kvm": vb.Kvm(call="msi")}])
def test_other_wires_have_the_shape_too(parts: dict[str, Any]) -> None:
    run = simulated(recipe(**parts), "kvm")
    assert run.ios == 20 and not run.errors
    keys = {event.key for event in run.trace or ()}
    assert {"device:epoll_wait", "vcpu:irq_handler_entry"} <= keys and "kvm_inj_virq" not in keys


def test_data_is_moved() -> None:
    app = vb.Fio(rw="randwrite", bs=4096, number_ios=40, size="1m", verify="crc32")
    run = simulated(recipe(app=app), "live")
    assert run.jobs[0].verified_ios and not run.mismatches


def test_the_run_says_whose_shape_it_has() -> None:
    run = simulated(recipe("mmio-exit"), "kvm")
    assert "as KvmMachine" in run.title and run.simulated and run.rung == "L0 simulated"
    assert any("KvmMachine's" in note and "writes an eventfd" in note for note in run.notes)
    vm = recipe().boot(vb.SimMachine(costs=known_table("kvm"), like=vb.KvmMachine()))
    assert all(line.startswith("plain path") and "KvmMachine" in line for line in vm.explain() if "drive" not in line)
    vm.close()


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (vb.SimMachine(), "give a vb.KvmMachine"),
        (vb.VhostUserMachine(), "give a vb.KvmMachine"),
        (vb.LiveMachine(poll_us=50), "only sleeping is modelled"),
        (vb.KvmMachine(idle="poll"), "only sleeping is modelled"),
        (vb.LiveMachine(), "no rows of LiveMachine"),
    ],
)
def test_a_shape_that_is_not_modelled_is_refused(like: Any, message: str) -> None:
    with pytest.raises(vb.ConfigError, match=message):
        vb.SimMachine(costs=known_table("kvm"), like=like)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"engine": vb.Threads()}, "only Sync is modelled"),
        ({"kvm": vb.Kvm(vcpus=2)}, "tasks share one thread"),
        ({"transport": vb.Pci(), "kvm": vb.Kvm(call="intx")}, "use call='irqfd'"),
    ],
)
def test_a_recipe_that_is_not_modelled_is_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(vb.ConfigError, match=message):
        recipe(**parts).boot(vb.SimMachine(costs=known_table("live"), like=vb.LiveMachine()))


# -- the way back: the costs of a machine out of its log -----------------------------------------------------------------------------

_YIELDED_AS = {
    "block_getrq": "bio_to_request",
    "virtqueue_add_sgs": "request_to_ring",
    "virtio_blk_handle_read": "pop_read",
    "virtio_blk_handle_write": "pop_write",
    "virtqueue_fill": "completion_to_ring",
    "virtblk_done": "virtblk_interrupt",
    "block_bio_complete": "request_done",
}
_NOT_LOGGED = {"block_bio_queue", "virtio_queue_rq", "virtqueue_pop", "virtio_blk_rw_complete", "virtio_blk_req_complete"}
_NOT_LOGGED |= {"vring_interrupt", "block_rq_complete", "kvm_exit", "kvm_fast_mmio", "kvm_mmio", "kvm_entry"}


def as_a_log(run: vb.Run) -> list[LogEntry]:
    """The trace of a simulated run as a live machine would log it: groups as one, sleeps with their context's number."""
    log: list[LogEntry] = []
    for event in run.trace or ():
        if event.key not in _NOT_LOGGED:
            awake = event.key in ("device:epoll_wait", "vcpu:irq_handler_entry", "guest:epoll_wait", "kvm_userspace_exit")
            number = -1 if awake else 1000 if event.context == "iothread" else 1 if "irq" in event.context else 0
            log.append((event.t_ns, number, (_YIELDED_AS.get(event.key, event.key), *event.args)))
    return log


@pytest.mark.parametrize("name", ["kvm", "live"])
@pytest.mark.parametrize("kick", KICKS)
def test_the_log_of_a_simulated_machine_gives_its_costs_back(name: str, kick: str) -> None:
    table = known_table(name, together=True)
    if name == "live":
        table = vb.CostTable("x", dict(table) | dict.fromkeys([f"live/kvm_{one}" for one in _TRAP], table["live/kvm_set_irq"]))
    points = Points()
    for size in (4096, 16384):
        app = vb.Fio(rw="randrw", bs=size, number_ios=40, size="1m")
        points.add(as_a_log(recipe(kick, app=app).run(vb.SimMachine(costs=table, like=machine(name), trace=True))))
    shape = shape_of(machine(name))
    want = shape.costs(table)
    rows = points.rows("test", kvm=shape.kvm, crossed={f"kvm_{one}": want[f"kvm_{one}"] for one in _TRAP} if shape.kvm else {})
    passed = ["sys_enter_io_submit", "block_getrq", "virtqueue_add_sgs", "virtqueue_kick_prepare", "sys_exit_io_submit", "wake:device"]
    passed += ["device:epoll_wait", "virtio_queue_notify", "virtio_blk_handle_read", "virtio_blk_handle_write", "host:sys_exit_preadv64"]
    passed += ["virtqueue_fill", "virtqueue_flush", "virtio_notify_irqfd", "wake:vcpu-idle", "vm_interrupt", "virtblk_done"]
    passed += ["virtqueue_get_buf", "block_bio_complete", "virtqueue_enable_cb_prepare", "virtqueue_enable_cb", "wake:task"]
    passed += ["vcpu:irq_handler_entry"] if name == "kvm" else ["guest:epoll_wait", "vm_notify"]
    before = {"ioeventfd": "vm_notify", "mmio-exit": "kvm_userspace_exit"}[kick]  # a calibration has the first in kvm_exit, and logs the
    lifted = {"wake:device": want[before].ns if name == "kvm" else 0.0}  # second when it is over
    assert {key: rows[key].ns for key in passed} == {key: want[key].ns + lifted.get(key, 0.0) for key in passed}
    store = points.store("test")
    assert {key: pytest.approx(want[f"store:ram:{key}"].ns, rel=1e-3) for key in store} == {key: cost.ns for key, cost in store.items()}
    assert set(vb.EVENTS) <= rows.keys() and rows["block_split"].kind == "room default", "nothing published is left among them"


def test_a_register_access_that_wakes_the_device_is_no_kick() -> None:
    log: list[LogEntry] = [
        (100, 0, ("vm_notify", 0)),
        (140, -1, ("device:epoll_wait",)),
        (141, -1, ("wait",)),
        (150, 1000, ("virtio_queue_notify", 0)),
        (160, 1000, ("wait",)),
        (300, -1, ("device:epoll_wait",)),
        (900, -1, ("device:epoll_wait",)),
    ]
    points = Points()
    points.add(log)
    assert points.by_key["device:epoll_wait"] == [10] and points.spans["kick"] == [40] and points.by_key["virtio_queue_notify"] == [10]


_TRAP = ("exit", "mmio", "fast_mmio", "userspace_exit", "entry")
