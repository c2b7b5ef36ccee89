"""virtio-pci on the live machine: real eventfds a vector, register accesses that are counted, two processes and two threads."""

from __future__ import annotations

import sys
from typing import Any

import pytest

import vblklab as vb

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the live machine needs Linux")
WIRES = [(vb.Pci(), "irqfd"), (vb.Pci(), "msi"), (vb.Pci(), "intx"), (vb.Pci(vectors=2), "irqfd"), (vb.Pci(vectors=1), "intx")]


def recipe(transport: Any, call: str, *, kick: str = "ioeventfd", jobs: int = 2, **parts: Any) -> vb.Pipeline:
    app = vb.Fio(rw="randrw", bs=4096, number_ios=100, iodepth=4, numjobs=jobs, size=1 << 20, offset_increment=1 << 20, verify="crc32")
    return vb.Pipeline(app=app, transport=transport, kvm=vb.Kvm(kick=kick, call=call), disk=vb.Ram(8 << 20), **parts)


@pytest.mark.parametrize("machine", [{}, {"trace": False}, {"device": "thread"}], ids=["process", "untraced", "thread"])
@pytest.mark.parametrize(("transport", "call"), WIRES, ids=str)
def test_every_wire_carries_the_same_bytes(transport: Any, call: str, machine: dict[str, Any]) -> None:
    vm = recipe(transport, call).boot(vb.LiveMachine(**machine))
    booted = vm.bus.accesses
    assert booted > 50, "the probe went over the socket"
    run = vm.run()
    assert (run.ios, run.errors, run.mismatches) == (200, 0, 0)
    interrupts = run.counters["interrupts"]
    assert interrupts > 0
    assert vm.bus.accesses - booted == (interrupts if call == "intx" else 0), "the line's handler reads the ISR status, a message's nothing"


@pytest.mark.parametrize("queue", [vb.Split(64), vb.Packed(64)], ids=["split", "packed"])
@pytest.mark.parametrize("kick", ["ioeventfd", "mmio-exit"])
def test_either_ring_and_either_kick_works(kick: str, queue: Any) -> None:
    run = recipe(vb.Pci(notif_config_data=True), "irqfd", kick=kick, queue=queue).run(vb.LiveMachine())
    assert (run.ios, run.errors, run.mismatches) == (200, 0, 0)


def test_each_queue_has_an_eventfd_of_its_own() -> None:
    run = recipe(vb.Pci(), "irqfd", jobs=3).run(vb.LiveMachine())
    seen = {(event.context, event.args) for event in run.trace if event.key == "guest:irq_handler_entry"}
    assert seen == {(f"guest irq {queue + 1}", (queue + 1, queue)) for queue in range(3)}
    assert any("one for each vector" in note for note in run.notes)


def test_a_change_of_capacity_comes_as_the_configurations_message() -> None:
    vm = recipe(vb.Pci(), "irqfd", jobs=1).boot(vb.LiveMachine())
    vm.resize(16 << 20)
    vm.run()
    assert vm.driver.capacity_changes == 1


def test_a_table_larger_than_any_driver_needs_takes_no_more_descriptors_than_it_uses() -> None:
    vm = recipe(vb.Pci(vectors=2048), "irqfd").boot(vb.LiveMachine())
    assert vm.transport.vectors == 3
    assert vm.run().errors == 0


def test_vhost_user_says_that_it_has_no_vectors() -> None:
    run = recipe(vb.Pci(), "irqfd").run(vb.VhostUserMachine())
    assert (run.ios, run.errors) == (200, 0)
    assert any("in place of virtio-pci; there are no vectors" in note for note in run.notes)
