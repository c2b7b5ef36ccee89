"""virtio-pci on the simulator: every way to kick and to call, what each costs, who is interrupted, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

import vblklab as vb
from vblklab.spec.virtio import Feature

KICKS = ("ioeventfd", "mmio-exit")
WIRES = [
    (vb.Mmio(), "irqfd"),
    (vb.Mmio(), "intx"),
    (vb.Pci(), "irqfd"),
    (vb.Pci(), "msi"),
    (vb.Pci(), "intx"),
    (vb.Pci(vectors=2), "irqfd"),
    (vb.Pci(vectors=2), "msi"),
    (vb.Pci(vectors=1), "intx"),
    (vb.Pci(notif_config_data=True), "irqfd"),
]


def recipe(kick: str = "ioeventfd", call: str = "irqfd", transport: Any = None, *, jobs: int = 1, **parts: Any) -> vb.Pipeline:
    app = vb.Fio(rw="randrw", bs=4096, number_ios=60, iodepth=4, numjobs=jobs, offset_increment=1 << 20, size=1 << 20, verify="crc32")
    return vb.Pipeline(**{"app": app, "transport": transport or vb.Pci(), "kvm": vb.Kvm(kick=kick, call=call), **parts})


def one(call: str, transport: Any, kick: str = "ioeventfd", **kvm: Any) -> vb.Run:
    """One I/O at a time, each with an interrupt of its own."""
    app = vb.Fio(rw="randread", bs=4096, number_ios=100)
    return vb.Pipeline(app=app, transport=transport, kvm=vb.Kvm(kick=kick, call=call, **kvm)).run(vb.SimMachine(trace=True))


def keys(run: vb.Run) -> list[str]:
    return [event.key for event in run.trace]


@pytest.mark.parametrize("queue", [vb.Split(64), vb.Packed(64)], ids=["split", "packed"])
@pytest.mark.parametrize(("transport", "call"), WIRES, ids=str)
@pytest.mark.parametrize("kick", KICKS)
def test_every_wire_carries_the_same_bytes(kick: str, call: str, transport: Any, queue: Any) -> None:
    vm = recipe(kick, call, transport, jobs=2, queue=queue).boot(vb.SimMachine(interleave="random"))
    run = vm.run()
    assert run.ios == 120 and not any(job.error for job in run.jobs)
    assert run.counters["interrupts"] > 0


@pytest.mark.parametrize("kick", KICKS)
@pytest.mark.parametrize(
    ("call", "transport", "exits"), [("irqfd", vb.Mmio(), 2), ("irqfd", vb.Pci(), 0), ("msi", vb.Pci(), 0), ("intx", vb.Pci(), 1)]
)
def test_a_message_saves_the_two_exits_that_a_line_costs(kick: str, call: str, transport: Any, exits: int) -> None:
    run = one(call, transport, kick)
    interrupts, doorbells = run.counters["interrupts"], run.counters["kicks"] if kick == "mmio-exit" else 0
    assert interrupts == 100
    assert run.counters["mmio_exits"] == exits * interrupts + doorbells


def test_the_saved_exits_are_saved_time() -> None:
    mmio, pci = one("irqfd", vb.Mmio()), one("irqfd", vb.Pci())
    costs = vb.CostTable.load()
    exit_ns = sum(costs.of_event(key).ns for key in ("kvm_exit", "kvm_mmio", "kvm_userspace_exit", "kvm_entry"))
    saved = mmio.jobs[0].read.clat.mean_ns - pci.jobs[0].read.clat.mean_ns
    assert saved == pytest.approx(2 * exit_ns, rel=0.05)


@pytest.mark.parametrize("kick", KICKS)
@pytest.mark.parametrize(
    ("call", "points"),
    [
        ("irqfd", ["virtio_notify_irqfd", "kvm_msi_set_irq", "kvm_inj_virq", "guest:irq_handler_entry", "vring_interrupt"]),
        ("msi", ["virtio_notify", "kvm_msi_set_irq", "kvm_inj_virq", "guest:irq_handler_entry", "vring_interrupt"]),
        ("intx", ["virtio_notify", "kvm_set_irq", "kvm_inj_virq", "vp_interrupt", "kvm_exit", "kvm_set_irq", "vring_interrupt"]),
    ],
)
def test_an_interrupt_passes_these_points(kick: str, call: str, points: list[str]) -> None:
    seen = keys(one(call, vb.Pci(), kick))
    at = len(seen) - 1 - seen[::-1].index(points[0])  # the last interrupt
    for point in points:
        at = seen.index(point, at) + 1
    assert ("vm_interrupt" in seen, "vm_notify" in seen, "vp_notify" in seen) == (False, False, True)


@pytest.mark.parametrize("call", ["msi", "intx"])
@pytest.mark.parametrize(("iothread", "cpu"), [(True, "main loop"), (False, "main loop")])
def test_the_main_loop_sends_what_is_not_an_irqfd(call: str, iothread: bool, cpu: str) -> None:
    run = one(call, vb.Pci(), iothread=iothread)
    key = "kvm_msi_set_irq" if call == "msi" else "kvm_set_irq"
    assert {event.context for event in run.trace if event.key == key and event.args[1]} == {cpu}
    asked = {event.context for event in run.trace if event.key == "virtio_notify"}
    assert asked == {"iothread" if iothread else "main loop"}


def test_with_irqfd_the_main_loop_has_nothing_to_do() -> None:
    run = one("irqfd", vb.Pci())
    assert {event.context for event in run.trace if event.key == "kvm_msi_set_irq"} == {"iothread"}
    assert "main loop" not in {event.context for event in run.trace}


def test_each_queue_interrupts_its_own_vcpu() -> None:
    run = recipe(jobs=3).run(vb.SimMachine(trace=True))
    handled = {(event.context, event.args[1]) for event in run.trace if event.key == "guest:irq_handler_entry"}
    assert handled == {("vCPU 0 irq", 0), ("vCPU 1 irq", 1), ("vCPU 2 irq", 2)}
    messages = {event.args for event in run.trace if event.key == "kvm_msi_set_irq"}
    assert {address >> 12 & 0xFF for address, _ in messages} == {0, 1, 2}
    assert len(messages) == 3


@pytest.mark.parametrize(("transport", "call"), [(vb.Pci(vectors=2), "irqfd"), (vb.Pci(), "intx"), (vb.Mmio(), "irqfd")], ids=str)
def test_one_interrupt_for_all_queues_goes_to_vcpu_0(transport: Any, call: str) -> None:
    run = recipe(call=call, transport=transport, jobs=3).run(vb.SimMachine(trace=True))
    assert {event.context for event in run.trace if event.key == "kvm_inj_virq"} == {"vCPU 0 irq"}


def test_polled_queues_interrupt_nobody() -> None:
    run = recipe(driver=vb.VirtioBlkDriver(poll=True)).run(vb.SimMachine())
    assert run.ios == 60
    assert run.counters["interrupts"] == 0 and run.counters["polls"] > 0


@pytest.mark.parametrize(
    ("call", "transport", "remedy"),
    [
        ("msi", vb.Mmio(), r"use transport=vb.Pci\(\)"),
        ("msi", vb.Pci(vectors=0), "use vectors=2 or more"),
        ("msi", vb.Pci(vectors=1), "use vectors=2 or more"),
        ("irqfd", vb.Pci(vectors=0), "no irqfd: use vectors=2 or more, or call='intx'"),
        ("intx", vb.Pci(vectors=3), "leave vectors out"),
    ],
)
@pytest.mark.parametrize("machine", [vb.SimMachine, vb.LiveMachine, vb.VhostUserMachine])
def test_what_cannot_be_is_refused_with_the_remedy(machine: Any, call: str, transport: Any, remedy: str) -> None:
    with pytest.raises(vb.ConfigError, match=remedy):
        recipe(call=call, transport=transport).boot(machine())


def test_the_machine_with_real_exits_refuses_messages_without_pci_too() -> None:
    with pytest.raises(vb.ConfigError, match=r"use transport=vb.Pci\(\)"):
        recipe(call="msi", transport=vb.Mmio()).boot(vb.KvmMachine())


@pytest.mark.parametrize(
    ("transport", "call", "vectors"), [(vb.Pci(), "irqfd", 3), (vb.Pci(vectors=2), "irqfd", 2), (vb.Pci(vectors=1), "intx", 0)]
)
def test_the_driver_takes_what_it_gets(transport: Any, call: str, vectors: int) -> None:
    assert recipe(call=call, transport=transport, jobs=2).boot(vb.SimMachine()).transport.vectors == vectors


def test_notif_config_data_is_negotiated_where_it_is_offered() -> None:
    vm = recipe(transport=vb.Pci(notif_config_data=True)).boot(vb.SimMachine())
    assert vm.driver.features & Feature.NOTIF_CONFIG_DATA
    assert not recipe().boot(vb.SimMachine()).driver.features & Feature.NOTIF_CONFIG_DATA
    assert vm.run().ios == 60


def test_a_part_by_text() -> None:
    pipeline = vb.Pipeline().set("transport=pci").set("transport.vectors=2").set("kvm.call=msi")
    assert pipeline.transport == vb.Pci(vectors=2)
    assert pipeline.set("kvm.call=irqfd").set("transport=mmio").transport == vb.Mmio()


def test_the_fused_path_is_taken_and_a_function_of_ones_own_keeps_the_plain_one() -> None:
    vm = vb.Pipeline(transport=vb.Pci()).boot(vb.SimMachine())
    assert all(line.startswith("fused") for line in vm.explain())
    vm.registers.msix.signal = lambda vector: None
    told = vm.explain()
    assert sum("Msix.signal is set on this instance" in line for line in told) == len(told) - 2, "all but the drive's side"


@pytest.mark.parametrize("call", ["irqfd", "msi", "intx"])
@pytest.mark.parametrize("kick", KICKS)
def test_a_change_of_capacity_reaches_the_driver(kick: str, call: str) -> None:
    vm = recipe(kick, call).boot(vb.SimMachine())
    vm.resize(vm.store.size + (1 << 20))
    vm.run()
    assert vm.driver.capacity_changes == 1


@pytest.mark.parametrize("call", ["irqfd", "msi", "intx"])
def test_a_driver_restarts_in_the_middle_of_a_run(call: str) -> None:
    vm = recipe(call=call).boot(vb.SimMachine())
    vm.step_until("virtio_blk_handle_read")
    vm.task(vm.driver.restart())
    assert vm.device_status == 15
    assert vm.transport.vectors == (0 if call == "intx" else 2)


def test_a_message_to_nowhere_is_lost_and_the_run_says_so() -> None:
    vm = recipe().boot(vb.SimMachine())
    entry = vm.registers.config.address(1) + 16  # vector 1
    vm.registers.write(entry, 0xFEE07000)
    with pytest.raises(vb.Stalled, match="in flight"):
        vm.run()


def test_a_mask_holds_interrupts_back_until_it_is_lifted() -> None:
    vm = vb.Pipeline(transport=vb.Pci(), app=vb.Fio(number_ios=5)).boot(vb.SimMachine())
    mask = vm.registers.config.address(1) + 16 + 12
    vm.registers.write(mask, 1)
    with pytest.raises(vb.Stalled):
        while vm.step() is not None:
            pass
    assert vm.registers.msix.read(0x800, 4) == 2
    vm.registers.write(mask, 0)
    while vm.step() is not None:
        pass
    assert vm.result().ios == 5


def test_the_run_is_the_same_twice() -> None:
    one, two = (recipe(jobs=2).run(vb.SimMachine(seed=7, interleave="random", trace=True)) for _ in range(2))
    assert [(e.t_ns, e.context, e.key, e.args) for e in one.trace] == [(e.t_ns, e.context, e.key, e.args) for e in two.trace]
