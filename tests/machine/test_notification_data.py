"""VIRTIO_F_NOTIFICATION_DATA: the doorbell says the queue and how far the driver is in it.  VIRTIO 1.4 §2.9, §4.1.5.2, §4.2.3.3."""

from __future__ import annotations

import struct
from typing import Any

import pytest

import vblklab as vb
from tests.support import pair

EXIT = vb.Kvm(kick="mmio-exit")
TRANSPORTS = [vb.Mmio(), vb.Pci(), vb.Pci(notif_config_data=True)]


def boot(queue: Any, transport: Any, **app: Any) -> Any:
    options: dict[str, Any] = dict(rw="randrw", bs=4096, iodepth=4, number_ios=200, verify="crc32") | app
    device = vb.VirtioBlkDevice(notification_data=True, indirect=False, seg_max=4)
    return vb.Pipeline(app=vb.Fio(**options), queue=queue, transport=transport, device=device, kvm=EXIT).boot(vb.SimMachine())


def doorbells(vm: Any, *, pci: bool) -> list[tuple[int, int, Any]]:
    """(value, bytes, where the ring stands) of each store to a doorbell."""
    seen: list[tuple[int, int, Any]] = []
    write, ring = vm.registers.write, vm.driver.queues[0]
    at = vm.transport._doorbells[0][0] if pci else 0x050

    def noted(offset: int, value: int, size: int = 4) -> None:
        if offset == at:
            idx = struct.unpack("<H", vm.memory.read(ring.layout.avail + 2, 2))[0]
            seen.append((value, size, ring._published if hasattr(ring, "_published") else idx))
        write(offset, value, size)

    vm.registers.write = noted
    return seen


@pytest.mark.clause("PCI-DRV-044", "PCI-DRV-046", "PCI-DRV-048")
@pytest.mark.parametrize("transport", TRANSPORTS, ids=["mmio", "pci", "pci with configuration data"])
def test_a_split_rings_doorbell_carries_avail_idx(transport: Any) -> None:
    vm = boot(vb.Split(16), transport)
    seen = doorbells(vm, pci=isinstance(transport, vb.Pci))
    run = vm.run()
    assert (run.ios, run.errors, run.mismatches) == (200, 0, 0)
    low = vm.registers._read_queue(56) if transport == TRANSPORTS[2] else 0
    assert bool(low) == (transport == TRANSPORTS[2])
    assert len(seen) > 50 and all(size == 4 and value == idx << 16 | low for value, size, idx in seen)


@pytest.mark.clause("PACKED-DRV-006", "PACKED-DRV-007")
@pytest.mark.parametrize("transport", TRANSPORTS[:2], ids=["mmio", "pci"])
@pytest.mark.parametrize("size", [7, 16])
def test_a_packed_rings_doorbell_carries_offset_and_wrap_counter(transport: Any, size: int) -> None:
    vm = boot(vb.Packed(size), transport)
    seen = doorbells(vm, pci=isinstance(transport, vb.Pci))
    run = vm.run()
    assert (run.ios, run.errors, run.mismatches) == (200, 0, 0)
    for value, width, position in seen:
        assert (width, value & 0xFFFF) == (4, 0)
        assert (value >> 16 & 0x7FFF, value >> 31) == (position % size, (position // size + 1) % 2)
    assert {value >> 31 for value, _, _ in seen} == {0, 1}


def test_a_split_device_believes_what_is_news_and_can_be() -> None:
    driver, device, hand = pair(8, start=65534)
    for token in "abc":
        driver.add_sgs([(0x8000, 16)], [], token)
    driver.publish()
    assert driver.next_avail() == 1
    assert device.pop() is not None
    device.notified(65535)  # it came late
    device.notified(1 + 9)  # more than the ring has
    assert device._shadow_avail_idx == 1
    driver.add_sgs([(0x8000, 16)], [], "d")
    driver.publish()
    device.notified(driver.next_avail())
    hand.put("H", hand.avail_at + 2, 1)  # avail.idx is not looked at any more
    assert [device.pop() is not None for _ in range(3)] == [True] * 3


def test_the_value_means_the_queue_alone_without_the_feature() -> None:
    vm = vb.Pipeline(app=vb.Fio(number_ios=1), kvm=EXIT).boot(vb.SimMachine())
    kicked: list[int] = []
    vm.registers.on_notify = kicked.append
    vm.registers.write(0x050, 1 << 16)
    assert kicked == []
    vm.registers.write(0x050, 0)
    assert kicked == [0]


def test_a_doorbell_that_is_an_eventfd_has_no_room_for_data() -> None:
    recipe = vb.Pipeline(app=vb.Fio(number_ios=1), device=vb.VirtioBlkDevice(notification_data=True))
    for machine in (vb.SimMachine(), vb.LiveMachine()):
        for transport in (vb.Mmio(), vb.Pci()):
            with pytest.raises(vb.ConfigError, match="no room for the data"):
                recipe.replace(transport=transport).boot(machine)
    with pytest.raises(vb.ConfigError, match="no room for the data"):
        recipe.replace(kvm=EXIT).boot(vb.LiveMachine())
