"""The driver side of virtio-pci: VIRTIO 1.4 §4.1, and what Linux's virtio_pci_modern_dev.c and vp_find_vqs() make of it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

import vblklab as vb
from tests.support import finish
from tests.transport.pci_board import (
    COMMAND,
    COMMON,
    CONFIG_VECTOR,
    DEVICE,
    DEVICE_STATUS,
    FIELDS,
    ISR,
    MASTER,
    MEMORY,
    NO_VECTOR,
    NOTIFY,
    Q_ENABLE,
    Q_SELECT,
    Q_SIZE,
    Q_VECTOR,
    READ_ONLY,
    VNDR,
    WINDOW,
    WINDOWS,
    Access,
    RecordingBus,
    capabilities,
    msix_at,
    structure,
    structures,
)
from vblklab.iostack import IOStack
from vblklab.memory import GuestMemory, GuestPages
from vblklab.spec.virtio import Feature
from vblklab.transport import Message, PciRegisters, PciTransport


class Quiet(vb.VirtioBlkDevice):
    """A device without an event loop: it answers registers only."""

    def reset(self) -> None:
        self.queues = {}
        self.on_reset_done()


class Guest:
    """A driver on a function that nobody has touched yet."""

    def __init__(
        self, *, queues: int = 2, vcpus: int = 1, registers: Any = PciRegisters, driver: Any = None, packed: bool = False, **options: Any
    ) -> None:
        self.memory = GuestMemory(bytearray(8 << 20))
        self.device = Quiet()
        self.device.num_queues, self.device.packed = queues, packed
        self.regs: PciRegisters = registers(self.memory, self.device, **options)
        self.device.attach(object(), 2048, read_only=False, notify=lambda queue: iter(()), wake=lambda: None)  # type: ignore[arg-type, return-value]
        self.device.on_reset_done = self.regs.reset_done
        self.device.on_config_changed = self.regs.config_changed
        self.messages: list[Message] = []
        self.regs.on_message = self.messages.append
        self.bus = RecordingBus(self.regs)
        self.transport = PciTransport(self.bus, lambda queue: queue % vcpus)
        self.driver = driver or vb.VirtioBlkDriver()
        self.driver.attach(GuestPages(self.memory, 0x1000), self.transport, IOStack(), queue_size=8, packed=packed)

    def probe(self) -> Guest:
        finish(self.driver.probe())
        return self

    def accesses(self, field: tuple[int, int]) -> list[Access]:
        gpa = WINDOWS[4] + structure(self.regs, COMMON).offset + field[0]
        return [one for one in self.bus.log if one.what == "memory" and one.at == gpa]

    def stores(self, field: tuple[int, int]) -> list[int]:
        return [one.value for one in self.accesses(field) if one.write]

    def vectors(self) -> list[int]:
        """What each queue is mapped to, then the configuration."""
        return [queue.vector for queue in self.regs._queues] + [self.regs._config_vector]

    def interrupt(self, vector: int = 0) -> tuple[bool, list[int]]:
        config, queues = finish(self.transport.interrupt(vector))
        return config, list(queues)


# -- probe ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("PCI-DRV-001", "PCI-DRV-003", "PCI-DRV-004", "PCI-DRV-035")
@pytest.mark.parametrize("changed", [None, (0x08, 0, 1), (0x08, 0xFF, 1), (0x2C, 0x1234, 2), (0x2E, 0x0002, 2)])
def test_the_driver_binds_by_vendor_and_device_whatever_revision_and_subsystem(changed: tuple[int, int, int] | None) -> None:
    guest = Guest()
    if changed is not None:
        guest.regs.config.put(*changed)
    assert guest.probe().driver.capacity_sectors == 2048
    assert guest.regs.status == 15


@pytest.mark.clause("PCI-DRV-002")
def test_the_driver_binds_to_the_transitional_device_id_too() -> None:
    guest = Guest()
    guest.regs.config.put(0x02, 0x1001, 2)
    assert guest.probe().regs.status == 15


@pytest.mark.parametrize(("at", "value"), [(0x00, 0x8086), (0x02, 0x1041), (0x02, 0x1000), (0x02, 0x1002), (0x02, 0x0042)])
def test_another_function_is_left_alone(at: int, value: int) -> None:
    guest = Guest()
    guest.regs.config.put(at, value, 2)
    with pytest.raises(vb.VirtioError, match=f"{value:04x}"):
        guest.probe()
    assert not any(one.write for one in guest.bus.log)


def _unlink(guest: Guest, kind: int) -> None:
    """Take the capabilities of a type out of the list."""
    for cap in structures(guest.regs):
        if cap.kind == kind:
            guest.regs.config.put(cap.at + 3, 0x77, 1)


@pytest.mark.clause("PCI-DRV-036")
@pytest.mark.parametrize("how", ["no list", "an empty list", "no common configuration"])
def test_a_function_without_virtio_structures_is_legacy_and_refused_before_a_register_is_touched(how: str) -> None:
    guest = Guest()
    if how == "no list":
        guest.regs.config.put(0x06, 0, 2)
    elif how == "an empty list":
        guest.regs.config.put(0x34, 0, 1)
    else:
        _unlink(guest, COMMON)
    with pytest.raises(vb.VirtioError, match="legacy"):
        guest.probe()
    assert all(one.what == "config" for one in guest.bus.log)


@pytest.mark.parametrize(("kind", "name"), [(ISR, "ISR_CFG"), (NOTIFY, "NOTIFY_CFG")])
def test_a_function_that_lacks_a_structure_is_refused(kind: int, name: str) -> None:
    guest = Guest()
    _unlink(guest, kind)
    with pytest.raises(vb.VirtioError, match=name):
        guest.probe()


def test_a_disk_without_a_device_configuration_is_refused_and_told_so() -> None:
    guest = Guest()
    _unlink(guest, DEVICE)
    with pytest.raises(vb.VirtioError, match="device configuration"):
        guest.probe()
    assert guest.regs.status & 0x80, "FAILED"


@pytest.mark.parametrize("to", [0x40, 0x4C])
def test_a_list_that_bites_its_tail_ends(to: int) -> None:
    guest = Guest()
    last = capabilities(guest.regs)[-1][0]
    guest.regs.config.put(last + 1, to, 1)
    assert guest.probe().regs.status == 15


@pytest.mark.clause("PCI-DRV-010", "PCI-DRV-013", "PCI-DRV-011", "PCI-DEV-011")
@pytest.mark.parametrize(("at", "value"), [(3, 0x06), (3, 0x77), (3, 0), (4, 6), (4, 0xFF), (4, 0), (0, 0x05)])
def test_a_capability_of_a_reserved_type_or_region_is_passed_over_for_a_later_one(at: int, value: int) -> None:
    guest = Guest()
    first = structure(guest.regs, COMMON)
    body = bytes(guest.regs.config_read(first.at + one, 1) for one in range(2, 16))
    guest.regs.config.add_capability(VNDR, body)  # type: ignore[arg-type]
    guest.regs.config.put(first.at + at, value, 1)
    assert guest.probe().regs.status == 15


@pytest.mark.clause("PCI-DRV-011")
def test_of_two_structures_of_a_type_the_first_is_used() -> None:
    guest = Guest()
    first = structure(guest.regs, COMMON)
    body = bytes(guest.regs.config_read(first.at + one, 1) for one in range(2, 8)) + (0x3000).to_bytes(4, "little") + b"\x40\0\0\0"
    guest.regs.config.add_capability(VNDR, body)  # type: ignore[arg-type]
    assert guest.probe().regs.status == 15


@pytest.mark.clause("PCI-DRV-012", "PCI-DRV-015", "PCI-DRV-009", "PCI-DRV-014", "PCI-DEV-010", "PCI-DEV-012")
@pytest.mark.parametrize("kind", [COMMON, NOTIFY, ISR, DEVICE])
def test_larger_capabilities_and_longer_structures_are_accepted(kind: int) -> None:
    guest = Guest()
    cap = structure(guest.regs, kind)
    guest.regs.config.put(cap.at + 2, 0x30, 1)
    guest.regs.config.put(cap.at + 12, 0xFFFFFFF0, 4)
    assert guest.probe().regs.status == 15


@pytest.mark.clause("PCI-DRV-016")
@pytest.mark.parametrize(
    ("kind", "at", "value", "what"),
    [
        (COMMON, 12, 55, "55 bytes"),
        (NOTIFY, 12, 1, "1 bytes"),
        (ISR, 12, 0, "0 bytes"),
        (COMMON, 8, 0x2, "aligned"),
        (NOTIFY, 8, 0x3001, "aligned"),
        (COMMON, 8, 0x4000 - 32, "region"),
        (ISR, 8, 0x4000, "region"),
        (NOTIFY, 8, 0xFFFFFFFE, "region"),
        (NOTIFY, 12, 5, "doorbell"),
    ],
)
def test_a_structure_that_is_short_unaligned_or_outside_its_region_is_refused(kind: int, at: int, value: int, what: str) -> None:
    guest = Guest()
    guest.regs.config.put(structure(guest.regs, kind).at + at, value, 4)
    with pytest.raises(vb.VirtioError, match=what):
        guest.probe()


def test_the_regions_are_sized_placed_apart_and_switched_on() -> None:
    guest = Guest()
    guest.regs.config_write(COMMAND, MEMORY | MASTER, 2)  # as firmware may leave it
    guest.probe()
    assert guest.transport._bars == {1: (WINDOWS[1], 0x1000), 4: (WINDOWS[4], 0x4000)}
    off = [one.value for one in guest.bus.log if one.what == "config" and one.write and one.at == COMMAND]
    assert not off[0] & MEMORY and off[1] & (MEMORY | MASTER) == MEMORY | MASTER, "decoding is off while registers hold all ones"


def test_a_region_whose_size_is_no_power_of_two_is_refused() -> None:
    guest = Guest()
    guest.regs.config._mask[0x14:0x18] = (0xFFFF5000).to_bytes(4, "little")
    with pytest.raises(vb.VirtioError, match="power of two"):
        guest.probe()


# -- how registers are accessed ------------------------------------------------------------------------------------------------


@pytest.mark.clause("PCI-DRV-005", "PCI-DRV-006", "PCI-DRV-007", "PCI-DRV-008", "PCI-DRV-018", "PCI-DRV-019", "PCI-DRV-020", "PCI-DRV-023")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("notif_config_data", [False, True])
def test_every_access_has_the_width_of_its_field_and_none_stores_where_it_may_only_read(notif_config_data: bool, packed: bool) -> None:
    guest = Guest(notif_config_data=notif_config_data, packed=packed).probe()
    finish(guest.driver.restart())
    base = WINDOWS[4] + structure(guest.regs, COMMON).offset
    common = [one for one in guest.bus.log if one.what == "memory" and base <= one.at < base + 64]
    assert len(common) > 50
    assert {(one.at - base, one.size) for one in common} <= set(FIELDS)
    assert not {(one.at - base, one.size) for one in common if one.write} & READ_ONLY
    assert all(one.at % one.size == 0 and one.size <= 4 for one in guest.bus.log)
    device = [one for one in guest.bus.log if one.what == "memory" and one.at >= WINDOWS[4] + structure(guest.regs, DEVICE).offset]
    assert {one.size for one in device} == {1, 2, 4} - ({1} if not any(one.size == 1 for one in device) else set())
    assert set(guest.stores(Q_ENABLE)) == {1}
    assert set(guest.stores(Q_SIZE)) == {8}


@pytest.mark.clause("PCI-DRV-017", "PCI-DRV-032", "PCI-DRV-033", "PCI-DRV-034")
def test_the_driver_stores_into_no_virtio_capability_and_leaves_the_window_alone() -> None:
    guest = Guest().probe()
    caps = [(cap.at, cap.at + cap.length_of_cap) for cap in structures(guest.regs)]
    for one in guest.bus.log:
        if one.what == "config" and one.write:
            assert not any(start < one.at + one.size and one.at < end for start, end in caps)
    window = structure(guest.regs, WINDOW)
    assert not any(one.what == "config" and window.at + 16 <= one.at < window.at + 20 for one in guest.bus.log)


@pytest.mark.clause("PCI-DRV-021")
def test_a_queue_is_enabled_after_all_else_was_said_about_it() -> None:
    guest = Guest().probe()
    base = WINDOWS[4] + structure(guest.regs, COMMON).offset
    selected, enabled = -1, set()
    for one in guest.bus.log:
        if one.what != "memory" or not one.write or not base <= one.at < base + 64:
            continue
        field = (one.at - base, one.size)
        if field == Q_SELECT:
            selected = one.value
        elif field == Q_ENABLE:
            enabled.add(selected)
        elif field[0] > 22:
            assert selected not in enabled
    assert enabled == {0, 1}


@pytest.mark.clause("PCI-DRV-022")
def test_a_reset_waits_until_the_status_reads_0() -> None:
    class Slow(PciRegisters):
        reads = 0

        def _read_common(self, offset: int, size: int) -> int:
            if (offset, size) == DEVICE_STATUS and self._resetting:
                Slow.reads += 1
                if Slow.reads == 5:
                    self.reset_done()
            return super()._read_common(offset, size)

    guest = Guest(registers=Slow).probe()
    guest.device.on_reset_done = lambda: None
    finish(guest.transport.reset())
    assert Slow.reads == 5
    stores = [one for one in guest.accesses(DEVICE_STATUS) if one.write]
    assert stores[-1].value == 0


# -- vectors -------------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("PCI-DRV-037", "PCI-DRV-038", "PCI-DRV-039", "PCI-DRV-040")
@pytest.mark.parametrize(
    ("size", "used"), [(0, 0), (1, 0), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5), (64, 5), (0x7FF, 5), (0x800, 5)]
)  # 4 queues want 5
def test_the_driver_works_with_any_size_of_table(size: int, used: int) -> None:
    guest = Guest(queues=4, vectors=size, vcpus=2).probe()
    assert guest.regs.status == 15
    assert guest.transport.vectors == used
    each = [1, 2, 3, 4, 0] if used == 5 else [1, 1, 1, 1, 0] if used else [NO_VECTOR] * 5
    assert guest.vectors() == each
    assert guest.regs.msix_enabled == bool(used)
    assert all(value < size for value in guest.stores(Q_VECTOR) if value != NO_VECTOR)
    assert bool(guest.regs.config.command & 0x400) == bool(used), "the line is off while messages are on"


def test_each_queues_message_goes_to_its_vcpu() -> None:
    guest = Guest(queues=4, vcpus=4).probe()
    sent = [guest.regs.signal(queue) for queue in range(4)]
    assert [message.address if message else 0 for message in sent] == [0xFEE00000 | queue << 12 for queue in range(4)]
    for queue, message in enumerate(sent):
        assert message is not None
        vector = guest.transport.vector_of_irq(queue, message.data)
        assert guest.interrupt(vector) == (False, [queue])


@pytest.mark.clause("PCI-DRV-041", "PCI-DRV-042")
@pytest.mark.parametrize(("room", "used"), [(3, 3), (2, 2), (1, 0), (0, 0)])
def test_a_device_that_has_no_room_for_a_vector_gets_fewer_or_the_line(room: int, used: int) -> None:
    class Scarce(PciRegisters):
        """Its table is large, but not more than ``room`` of its vectors can be mapped."""

        def _map(self, old: int, new: int) -> int:
            return super()._map(old, new if new < room else NO_VECTOR)

    guest = Guest(registers=Scarce, vectors=8).probe()
    assert guest.transport.vectors == used
    assert guest.vectors() == {3: [1, 2, 0], 2: [1, 1, 0], 0: [NO_VECTOR] * 3}[used]
    assert guest.regs.msix_enabled == bool(used)
    base = WINDOWS[4] + structure(guest.regs, COMMON).offset
    log = [one for one in guest.bus.log if one.what == "memory" and one.at - base in (Q_VECTOR[0], CONFIG_VECTOR[0])]
    for written, read in itertools.pairwise(log):
        if written.write and written.value != NO_VECTOR:
            assert not read.write and read.at == written.at, "each vector is read back"
    assert guest.regs.status == 15


def test_a_vcpu_without_vectors_left_gets_a_shared_one() -> None:
    guest = Guest(queues=200, vcpus=1, vectors=256).probe()
    assert guest.transport.vectors == 2
    assert Guest(queues=200, vcpus=4, vectors=256).probe().transport.vectors == 201


def test_polled_queues_have_no_vector() -> None:
    guest = Guest(driver=vb.VirtioBlkDriver(poll=True), vectors=1).probe()
    assert guest.vectors() == [NO_VECTOR, NO_VECTOR, 0]
    assert guest.transport.vectors == 1
    assert guest.regs.signal(0) is None


def test_a_restart_sets_everything_up_again() -> None:
    guest = Guest().probe()
    finish(guest.driver.restart())
    assert guest.regs.status == 15 and guest.vectors() == [1, 2, 0]
    assert guest.regs.signal(1) is not None


def test_a_queue_can_be_set_up_by_itself_with_the_vector_it_had() -> None:
    guest = Guest().probe()
    queue = guest.regs._queues[1]
    queue.ready, queue.vector = False, NO_VECTOR  # what a reset of the queue leaves
    finish(guest.transport.setup_queue(1, guest.driver.queues[1].layout))
    assert (queue.ready, queue.vector) == (True, 2)
    with pytest.raises(vb.VirtioError, match="already in use"):
        finish(guest.transport.setup_queue(1, guest.driver.queues[1].layout))


# -- notifications -------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("BASIC-DRV-059", "PCI-DRV-043", "PCI-DRV-045", "PCI-DRV-047")
@pytest.mark.parametrize("config_data", [False, True])
def test_a_kick_stores_16_bits_to_the_queues_own_address(config_data: bool) -> None:
    guest = Guest(notif_config_data=config_data).probe()
    kicked: list[int] = []
    guest.regs.on_notify = kicked.append
    assert bool(guest.regs.driver_features & Feature.NOTIF_CONFIG_DATA) == config_data
    notify = structure(guest.regs, NOTIFY)
    for queue in (1, 0):
        finish(guest.transport.notify(queue))
    values = [1, 0] if not config_data else [0x8001, 0x8000]
    gpas = [WINDOWS[4] + notify.offset + 4 * queue for queue in (1, 0)]
    assert guest.bus.kicks == list(zip((1, 0), gpas, values, strict=True))
    assert kicked == [1, 0]


def test_queues_that_share_a_doorbell_are_told_apart_by_the_value() -> None:
    guest = Guest(notify_off_multiplier=0, queues=3).probe()
    kicked: list[int] = []
    guest.regs.on_notify = kicked.append
    for queue in (2, 0, 1):
        finish(guest.transport.notify(queue))
    assert kicked == [2, 0, 1]
    assert len({gpa for _, gpa, _ in guest.bus.kicks}) == 1


@pytest.mark.clause("PCI-DRV-029")
def test_a_message_is_served_without_touching_a_register() -> None:
    for vectors, answers in ((3, [(True, []), (False, [0]), (False, [1])]), (2, [(True, []), (False, [0, 1])])):
        guest = Guest(vectors=vectors).probe()
        guest.bus.log.clear()
        assert [guest.interrupt(vector) for vector in range(vectors)] == answers
        assert guest.bus.log == []


@pytest.mark.clause("PCI-DRV-049")
@pytest.mark.parametrize(("causes", "served"), [(0, (False, [])), (1, (False, [0, 1])), (2, (True, [0, 1])), (3, (True, [0, 1]))])
def test_one_interrupt_of_the_line_may_mean_both(causes: int, served: tuple[bool, list[int]]) -> None:
    guest = Guest(vectors=0).probe()
    guest.regs.interrupt.set(causes)
    guest.bus.log.clear()
    assert guest.interrupt() == served
    assert [(one.at, one.size, one.write) for one in guest.bus.log] == [(WINDOWS[4] + structure(guest.regs, ISR).offset, 1, False)]
    assert not guest.regs.line


def test_a_change_of_capacity_reaches_the_driver_by_its_vector() -> None:
    guest = Guest().probe()
    guest.device.resize(4096)
    assert [message.vector for message in guest.messages] == [0]
    finish(guest.driver.interrupt(0))
    assert guest.driver.capacity_sectors == 4096


def test_a_field_is_read_again_when_the_configuration_changes_between_its_halves() -> None:
    guest = Guest().probe()
    at, read = WINDOWS[4] + structure(guest.regs, DEVICE).offset, guest.regs.read
    changes = [0x1_0000_0001]

    def changing(gpa: int, size: int = 4) -> int:
        value = read(gpa, size)
        if gpa == at and changes:
            guest.device.resize(changes.pop())
        return value

    guest.regs.read = changing  # type: ignore[method-assign]
    capacity = finish(guest.transport.read_config(0, 8))
    assert int.from_bytes(capacity, "little") == 0x1_0000_0001, "no half of one capacity beside half of another"


def test_the_msix_table_may_not_lie_in_a_region_that_is_not_there() -> None:
    guest = Guest()
    guest.regs.config.put(msix_at(guest.regs) + 4, 5, 4)
    with pytest.raises(vb.VirtioError, match="region 5"):
        guest.probe()
