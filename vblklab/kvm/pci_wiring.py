"""KVM between a virtio-pci driver and its device: register accesses, doorbells by address, messages or the line.

With MSI-X the interrupt handler touches no register: the two exits of virtio-mmio's InterruptStatus and InterruptACK are not there.
A message goes to the vCPU that its address names.  The line costs one exit, the read of the ISR status.  QEMU has no irqfd for
the line of a PCI function: its main loop sets it, whatever ``call`` says (``virtio_pci_set_guest_notifiers()``).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from ..device import VirtioBlkDevice
from ..errors import ConfigError
from ..events import WAIT
from ..spec.pci import MSI_ADDRESS, MSI_DEST_SHIFT
from ..transport import Message, Mmio, Pci, PciRegisters
from .wiring import Kvm, VcpuState

__all__ = ["NO_ROOM", "PciInterrupt", "PciKvmBus", "check_wire", "vectors_of"]

Steps = Generator[Any, int, Any]
PCI_GSI = 22
ECAM = 0xB0000000
"""Where the guest sees configuration space: one trap an access, as on QEMU's q35."""
_MSI_MASK = 0xFFF00000
_MSI_DEST = 0xFF


NO_ROOM = "an eventfd has no room for the data, and QEMU refuses it too: use SimMachine and kick='mmio-exit', or leave it out"


def check_wire(kvm: Kvm, transport: Any, *, notification_data: bool = False) -> None:
    """Refuse a way to interrupt or to kick that the transport does not have; ConfigError names the remedy."""
    what = f"kvm call={kvm.call!r} with transport={transport!r}"
    if notification_data and kvm.kick == "ioeventfd":
        raise ConfigError("device notification_data=True with kvm kick='ioeventfd'", NO_ROOM)
    if isinstance(transport, Mmio):
        if kvm.call == "msi":
            raise ConfigError(what, "virtio-mmio has one line and no messages: use transport=vb.Pci(), or call='irqfd' or 'intx'")
        return
    vectors = transport.vectors
    if kvm.call == "intx" and vectors is not None and vectors > 1:
        raise ConfigError(what, "a driver that finds MSI-X vectors uses them: leave vectors out, or use call='irqfd' or 'msi'")
    if kvm.call != "intx" and vectors is not None and vectors < 2:
        reason = "a driver needs 2 vectors, one for the configuration and one for queues, or it takes the line, which has no irqfd"
        raise ConfigError(what, f"{reason}: use vectors=2 or more, or call='intx'")


def vectors_of(kvm: Kvm, transport: Any) -> int | None:
    """The size of the MSI-X table that the device gets; without one there is only the line.  None is one a queue and one more."""
    if not isinstance(transport, Pci):
        return 0
    return (transport.vectors or 0) if kvm.call == "intx" else transport.vectors


class PciKvmBus:
    """The driver's accesses as traps."""

    def __init__(self, kvm: Kvm, registers: PciRegisters, device: VirtioBlkDevice, vcpu: VcpuState) -> None:
        self.kvm = kvm
        self.registers = registers
        self.device = device
        self._vcpu = vcpu
        self._fast = kvm.kick == "ioeventfd"
        self._kicked: list[int] = []
        self.fast_mmio = self.exits = 0
        registers.on_notify = device.kick if self._fast else self._kicked.append

    def config_read(self, offset: int, size: int) -> Steps:
        self.exits += 1
        yield ("mmio_read", ECAM + offset, 0, 0)
        return self.registers.config_read(offset, size)

    def config_write(self, offset: int, value: int, size: int) -> Steps:
        self.exits += 1
        yield ("mmio_write", ECAM + offset, 1, value)
        self.registers.config_write(offset, value, size)

    def read(self, gpa: int, size: int = 4) -> Steps:
        self.exits += 1
        yield ("mmio_read", gpa, 0, 0)
        high = self.registers.line
        value = self.registers.read(gpa, size)
        if high and not self.registers.line:
            yield ("kvm_set_irq", PCI_GSI, 0)  # the ISR status was read: QEMU lowers the line
        return value

    def write(self, gpa: int, value: int, size: int = 4) -> Steps:
        self.exits += 1
        yield ("mmio_write", gpa, 1, value)
        self.registers.write(gpa, value, size)

    def notify(self, queue: int, gpa: int, value: int, size: int = 2) -> Steps:
        """The doorbell: its address names the queue, so that the kernel's ioeventfd need not look at the value."""
        if self._fast:
            self.fast_mmio += 1
            yield ("vp_doorbell_fast", gpa, queue)
            self.registers.write(gpa, value, 2)
            yield ("kvm_entry",)
            return
        vcpu = self._vcpu
        vcpu.leave_guest()  # the vCPU's thread works in QEMU: it takes no interrupt and runs no other task
        self.exits += 1
        yield ("vp_doorbell_exit", gpa, queue, 1, value)
        self.registers.write(gpa, value, size)
        kicked = self._kicked[:]
        self._kicked.clear()
        for number in kicked:
            yield from self.device.handle_output(number)
        yield ("kvm_entry",)
        vcpu.enter_guest()


class PciInterrupt:
    """The device's interrupts.  ``wake_vcpu(n)`` notifies the interrupt context of vCPU ``n``."""

    def __init__(
        self, kvm: Kvm, registers: PciRegisters, vcpus: int, wake_vcpu: Callable[[int], None], wake_main_loop: Callable[[], None]
    ) -> None:
        self._irqfd = kvm.call == "irqfd"
        self._direct = not kvm.has_iothread
        self.registers = registers
        self._wake_vcpu = wake_vcpu
        self._wake_main_loop = wake_main_loop
        self._asked: dict[int, Message | None] = {}  # queue → its message, None for the line: what the main loop is to send
        self._requested: list[set[int]] = [set() for _ in range(vcpus)]  # the local APICs' request registers
        self.notifies = 0
        registers.on_interrupt = self.line_change
        registers.on_message = self.deliver

    def notify(self, queue: int) -> Steps:
        """``virtio_notify()``, in the device's context."""
        self.notifies += 1
        registers = self.registers
        message = registers.signal(queue)
        if message is None and registers.msix_enabled:
            yield ("virtio_notify", queue)  # masked, and pending from now on; or the queue has no vector
        elif message is not None and self._irqfd:
            yield ("irqfd_msi", queue, message.address, message.data)
            self.deliver(message)
        elif not self._direct:  # the guest notifier's eventfd is read by the main loop
            yield ("virtio_notify", queue)
            self._asked[queue] = message
            self._wake_main_loop()
        elif message is not None:
            yield ("signal_msi", queue, message.address, message.data)
            self.deliver(message)
        else:
            yield ("irq_line", queue, PCI_GSI, 1)
            self.line_change()

    def main_loop(self) -> Steps:
        """The main loop's context where an iothread leaves interrupts to it."""
        while True:
            if not self._asked:
                yield WAIT
                continue
            asked, self._asked = self._asked, {}
            for message in asked.values():
                if message is not None:
                    yield ("kvm_msi_set_irq", message.address, message.data)
                    self.deliver(message)
            if None in asked.values():
                yield ("kvm_set_irq", PCI_GSI, 1)
                self.line_change()

    def deliver(self, message: Message) -> None:
        """KVM takes a message: it becomes a request in the local APIC of the vCPU that the address names, if there is one."""
        vcpu = message.address >> MSI_DEST_SHIFT & _MSI_DEST
        if message.address & _MSI_MASK == MSI_ADDRESS and vcpu < len(self._requested):
            self._requested[vcpu].add(message.data & 0xFF)
            self._wake_vcpu(vcpu)

    def line_change(self) -> None:
        """The line may be high now; it goes to vCPU 0."""
        self._wake_vcpu(0)

    def vcpu_interrupts(self, vcpu: int, handler: Callable[[int], Steps]) -> Steps:
        """The interrupt context of a vCPU: inject what is requested, the highest vector first, and run the guest's handler for it.

        The handler is given the processor's vector, or -1 for the line.
        """
        requested, registers = self._requested[vcpu], self.registers
        while True:
            if requested:
                irq = max(requested)
                requested.discard(irq)
                yield ("kvm_inj_virq", irq)
                yield from handler(irq)
            elif vcpu == 0 and registers.line:
                yield ("kvm_inj_virq", PCI_GSI)
                yield from handler(-1)
            else:
                yield WAIT
