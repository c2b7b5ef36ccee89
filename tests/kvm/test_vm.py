"""VM, vCPU and payload against the real KVM: doorbells, interrupts, time, and clean ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from mmap import mmap

import pytest

from vblklab.errors import KvmError, KvmExit, NotHere, VblkError
from vblklab.kvm import host, payload
from vblklab.kvm.guest import FIRST_MSI_GSI, GSI, LINE_EDGE, LINE_LEVEL, PayloadVm
from vblklab.kvm.payload import PORT_IRQ, REGISTERS_GPA, Mail
from vblklab.kvm.vcpu import Interrupted, IoExit, MmioExit

pytestmark = pytest.mark.kvm
BELL = REGISTERS_GPA + 0x50
STATUS, ACK = REGISTERS_GPA + 0x60, REGISTERS_GPA + 0x64


class Machine(PayloadVm):
    """A payload whose exits are answered from ``values`` and kept in ``seen``."""

    def __init__(self) -> None:
        self.seen: list[MmioExit] = []
        self.values: dict[int, int] = {}
        self.memory = memoryview(mmap(-1, 1 << 20))
        self.words = memoryview(mmap(-1, 4096)).cast("I")
        super().__init__(self.memory, self.words.cast("B"), self.answer, stall_s=60)

    def answer(self, exit_: MmioExit) -> int:
        self.seen.append(exit_)
        if exit_.addr == ACK:
            self.values[STATUS] = 0
            self.vm.irq_line(GSI, False)
        return self.values.get(exit_.addr, 0)


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    with machine.vcpu.owned():
        yield machine
    machine.close()


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def summed(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


@pytest.mark.parametrize("size", [1, 2, 4])
def test_loads_and_stores_of_every_width_reach_user_space_with_their_value(machine: Machine, size: int) -> None:
    value = 0x8765_4321 & (1 << 8 * size) - 1
    machine.values[REGISTERS_GPA + 0x100] = value
    assert machine.load(REGISTERS_GPA + 0x100, size) == value
    machine.store(REGISTERS_GPA + 0x24, value, size)
    assert machine.seen == [MmioExit(REGISTERS_GPA + 0x100, size, False, 0), MmioExit(REGISTERS_GPA + 0x24, size, True, value)]
    machine.store(0x800, value, size)
    assert machine.memory[0x800 : 0x800 + size] == value.to_bytes(size, "little"), "memory needs no exit"
    assert len(machine.seen) == 2


def test_doorbell_exits_equal_the_vcpus_own_count(machine: Machine) -> None:
    for number in range(50):
        machine.ring(BELL, number, leaves=True)
    assert [exit_.value for exit_ in machine.seen] == list(range(50))
    assert machine.mail[Mail.RUNG] == machine.vcpu.exits["mmio"] == 50
    stats = machine.vcpu.stats()
    assert not stats or stats["mmio_exits"] == 50


def test_an_ioeventfd_with_datamatch_takes_its_value_and_leaves_the_others(machine: Machine, eventfd: int) -> None:
    machine.vm.ioeventfd(eventfd, BELL, 4, datamatch=3)
    for value in (3, 2, 3, 3):
        machine.ring(BELL, value, leaves=value != 3)
    assert summed(eventfd) == 3
    assert [exit_.value for exit_ in machine.seen] == [2]
    machine.vm.remove_ioeventfd(eventfd, BELL, 4, datamatch=3)
    machine.ring(BELL, 3, leaves=True)
    assert summed(eventfd) == 0 and machine.seen[-1].value == 3


@pytest.mark.parametrize("length", [0, 2])
def test_an_ioeventfd_without_datamatch_takes_every_value(machine: Machine, eventfd: int, length: int) -> None:
    machine.vm.ioeventfd(eventfd, BELL, length)
    for value in range(4):
        machine.ring(BELL, value, 2, leaves=False)
    assert (summed(eventfd), machine.seen) == (4, [])
    if length:
        machine.ring(BELL, 1, 4, leaves=True)
        assert summed(eventfd) == 0, "a store of another width is not its"


def test_the_same_ioeventfd_twice_is_the_kernels_error(machine: Machine, eventfd: int) -> None:
    machine.vm.ioeventfd(eventfd, BELL, 4)
    with pytest.raises(KvmError, match="KVM_IOEVENTFD failed with errno 17"):
        machine.vm.ioeventfd(eventfd, BELL, 4)


def test_a_level_line_is_taken_acknowledged_and_lowered(machine: Machine) -> None:
    machine.set_up_apic(LINE_LEVEL)
    for number in range(1, 21):
        machine.words[0] = number
        machine.values[STATUS] = 1
        machine.vm.irq_line(GSI, True)
        assert machine.idle()
        assert machine.mail[Mail.TAKEN] == machine.mail[Mail.SEEN] == number
    assert machine.mail[Mail.CAUSES] == 1
    assert machine.mail[Mail.COALESCED] == 0
    assert sum(exit_.addr == ACK for exit_ in machine.seen) == 20


def test_interrupts_that_merge_are_counted(machine: Machine, eventfd: int) -> None:
    machine.set_up_apic(LINE_EDGE)
    machine.vm.irqfd(eventfd, GSI)
    for _ in range(5):
        machine.words[0] += 1
        os.eventfd_write(eventfd, 1)
    machine.values[STATUS] = 1
    assert machine.idle()
    while machine.take_pending():
        pass
    assert machine.mail[Mail.TAKEN] + machine.mail[Mail.COALESCED] == machine.mail[Mail.SEEN] == 5


def test_messages_reach_their_vector_by_ioctl_and_by_irqfd(machine: Machine, eventfd: int) -> None:
    machine.set_up_apic(LINE_EDGE)
    taken = [0] * len(payload.MSI_VECTORS)
    for number, vector in enumerate(payload.MSI_VECTORS):
        machine.vm.irqfd(eventfd, FIRST_MSI_GSI + number)
        for _ in range(number):
            assert machine.vm.signal_msi(vector)
            assert machine.idle()
        os.eventfd_write(eventfd, 1)
        assert machine.idle(poll=number == 3)
        machine.vm.remove_irqfd(eventfd, FIRST_MSI_GSI + number)
        taken[number] = number + 1
    assert machine.by_message() == taken
    assert machine.mail[Mail.TAKEN] == sum(taken)


def test_a_pending_interrupt_is_taken_without_idling(machine: Machine) -> None:
    machine.set_up_apic(LINE_EDGE)
    assert not machine.take_pending()
    for vector in payload.MSI_VECTORS:
        machine.vm.signal_msi(vector)
    assert machine.take_pending()
    assert machine.by_message() == [1] * len(payload.MSI_VECTORS)


@pytest.mark.parametrize("poll", [False, True])
def test_a_kick_ends_an_idle_vcpu_which_then_does_the_next_op(machine: Machine, poll: bool) -> None:
    kicker = threading.Timer(0.05, machine.vcpu.kick)
    kicker.start()
    assert machine.idle(poll=poll) is False
    kicker.join()
    machine.store(0x800, 7)
    assert machine.memory[0x800] == 7


def test_a_kick_before_the_run_is_not_lost(machine: Machine) -> None:
    machine.vcpu.kick()
    assert machine.vcpu.run() == Interrupted()


def test_a_kick_in_the_middle_of_an_op_does_not_end_the_op(machine: Machine) -> None:
    machine.vcpu.kick()
    machine.store(0x800, 9)
    assert machine.memory[0x800] == 9 and machine.interrupted


def test_a_vcpu_that_another_thread_runs_cannot_be_closed(machine: Machine) -> None:
    errors: list[BaseException] = []

    def close() -> None:
        try:
            machine.vcpu.close()
        except VblkError as error:
            errors.append(error)

    thread = threading.Thread(target=close)
    thread.start()
    thread.join()
    assert "another thread still runs this vCPU" in str(errors[0])


def test_a_triple_fault_shows_registers_and_the_bytes_at_rip(machine: Machine) -> None:
    machine.set_up_apic(LINE_EDGE)
    machine.vm.signal_msi(0x90)  # a vector without a gate
    with pytest.raises(KvmExit, match=r"triple fault.*rip=0xe00000.*rsp=.*bytes at rip: [0-9a-f]{2}") as caught:
        machine.idle()
    rip = caught.value.registers["rip"] - payload.BASE
    assert caught.value.code == payload.CODE[rip : rip + 16]


def test_an_exit_that_nobody_serves_is_named(machine: Machine) -> None:
    assert "exit 77" in machine.vcpu._reason(77)
    error = machine.vcpu.stopped("KVM_EXIT_77")
    assert error.reason == "KVM_EXIT_77" and error.registers["rip"] == payload.BASE


def test_guest_time_is_host_time_within_its_stated_error(machine: Machine) -> None:
    clock = machine.clock()
    later = machine.clock()
    assert 0 < clock.error_ns < 10_000_000
    assert abs(clock.drift_ns(later)) <= clock.error_ns + later.error_ns + 1_000


def test_the_interrupt_is_told_on_its_own_port(machine: Machine) -> None:
    machine.set_up_apic(LINE_EDGE)
    machine.vm.signal_msi(payload.MSI_VECTORS[0])
    machine._ask(payload.Op.HLT, 0, 0, 0)
    exit_ = machine.vcpu.run()
    assert isinstance(exit_, IoExit) and (exit_.port, exit_.write) == (PORT_IRQ, True)


def test_a_vm_from_another_process_is_refused_but_its_eventfds_are_not(machine: Machine, eventfd: int) -> None:
    machine.set_up_apic(LINE_EDGE)
    machine.vm.irqfd(eventfd, FIRST_MSI_GSI)
    child = os.fork()
    if not child:
        try:
            machine.vm.signal_msi(payload.MSI_VECTORS[0])
            os._exit(1)
        except KvmError:
            os.eventfd_write(eventfd, 1)
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert machine.idle()
    assert machine.by_message()[0] == 1


def test_no_kvm_is_one_typed_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotHere, match=r"there is no /dev/no-kvm.*nested virtualization.*SimMachine"):
        host.open_kvm("/dev/no-kvm")
