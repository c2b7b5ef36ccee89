"""KVM as a part of the recipe: how a store to the doorbell reaches the device (kick) and how the device interrupts (call).

kick  ``mmio-exit``  every doorbell store leaves to user space; the vCPU's own thread serves the queue
      ``ioeventfd``  the store is answered in the kernel, which wakes the device's thread
call  ``intx``       QEMU's main loop sets the line with KVM_IRQ_LINE; an iothread must first wake the main loop
      ``msi``        virtio-pci: QEMU's main loop sends the message with KVM_SIGNAL_MSI; an iothread must first wake it
      ``irqfd``      the device's thread writes an eventfd and the kernel sets the line, or sends the vector's message

All other register accesses leave to user space, the interrupt handler's InterruptStatus and InterruptACK too.
The big QEMU lock is not modelled; its cost is inside the published figure for an exit to user space.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol

from ..device import VirtioBlkDevice
from ..errors import ConfigError
from ..events import WAIT
from ..spec.virtio_mmio import Interrupt, Reg
from ..transport import MmioRegisters

__all__ = ["CALLS", "KICKS", "Kvm", "KvmBus", "KvmInterrupt", "VcpuState"]

Steps = Generator[Any, int, Any]
KICKS = ("ioeventfd", "mmio-exit")
CALLS = ("irqfd", "msi", "intx")
GSI = 5
_VRING = int(Interrupt.VRING)
_QUEUE_NOTIFY, _INTERRUPT_ACK = int(Reg.QUEUE_NOTIFY), int(Reg.INTERRUPT_ACK)


@dataclass(frozen=True)
class Kvm:
    """The ``kvm`` part.  ``vcpus`` None is one per job, at most 4; ``iothread`` None is yes with ioeventfd, no without."""

    kick: str = "ioeventfd"
    call: str = "irqfd"
    vcpus: int | None = None
    iothread: bool | None = None

    def __post_init__(self) -> None:
        if self.kick not in KICKS:
            raise ConfigError(f"kvm kick={self.kick!r}", f"choose {' or '.join(KICKS)}")
        if self.call not in CALLS:
            raise ConfigError(f"kvm call={self.call!r}", "choose irqfd, msi or intx")
        if self.vcpus is not None and (not isinstance(self.vcpus, int) or not 1 <= self.vcpus <= 64):
            raise ConfigError(f"kvm vcpus={self.vcpus!r}", "use 1 to 64")
        if self.iothread and self.kick == "mmio-exit":
            raise ConfigError(
                "kvm kick='mmio-exit' with iothread=True", "an iothread is woken by an ioeventfd: use kick='ioeventfd' or iothread=False"
            )

    @property
    def has_iothread(self) -> bool:
        """Whether the device has a thread of its own."""
        return self.kick == "ioeventfd" if self.iothread is None else self.iothread


class VcpuState(Protocol):
    """What the bus tells the machine: outside guest mode a vCPU takes no interrupt."""

    def leave_guest(self) -> None: ...

    def enter_guest(self) -> None: ...


class KvmBus:
    """The driver's register accesses as traps."""

    def __init__(self, kvm: Kvm, registers: MmioRegisters, device: VirtioBlkDevice, vcpu: VcpuState) -> None:
        self.kvm = kvm
        self.registers = registers
        self.device = device
        self._vcpu = vcpu
        self._fast = kvm.kick == "ioeventfd"
        self._level = kvm.call == "intx"
        self._kicked: list[int] = []
        self.fast_mmio = self.exits = 0
        registers.on_notify = device.kick if self._fast else self._note_kick

    def _note_kick(self, queue: int) -> None:
        self._kicked.append(queue)

    def read(self, offset: int, size: int = 4) -> Steps:
        self.exits += 1
        yield ("mmio_read", offset, 0, 0)
        return self.registers.read(offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> Steps:
        self.exits += 1
        yield ("mmio_write", offset, 1, value)
        self.registers.write(offset, value, size)
        if self._level and offset == _INTERRUPT_ACK and not self.registers.interrupt.read():
            yield ("kvm_set_irq", GSI, 0)  # QEMU lowers the line

    def notify(self, queue: int, data: int | None = None) -> Steps:
        """The doorbell: answered in the kernel, or served by this vCPU's thread in QEMU, which alone sees ``data``."""
        if self._fast:
            self.fast_mmio += 1
            yield ("doorbell_fast", _QUEUE_NOTIFY, queue)
            self.registers.write(_QUEUE_NOTIFY, queue)
            yield ("kvm_entry",)
            return
        vcpu = self._vcpu
        vcpu.leave_guest()  # the vCPU's thread works in QEMU: it takes no interrupt and runs no other task
        self.exits += 1
        yield ("doorbell_exit", _QUEUE_NOTIFY, queue, 1)
        self.registers.write(_QUEUE_NOTIFY, queue if data is None else data << 16 | queue)
        kicked, self._kicked = self._kicked, []
        for number in kicked:
            yield from self.device.handle_output(number)
        yield ("kvm_entry",)
        vcpu.enter_guest()


class KvmInterrupt:
    """The device's interrupt as one line.  ``wake_vcpu`` notifies the interrupt context of the vCPU that takes it."""

    def __init__(self, kvm: Kvm, registers: MmioRegisters, wake_vcpu: Callable[[], None], wake_main_loop: Callable[[], None]) -> None:
        self._irqfd = kvm.call == "irqfd"
        self._direct = not kvm.has_iothread
        self.registers = registers
        self._wake_vcpu = wake_vcpu
        self._wake_main_loop = wake_main_loop
        self._asked: deque[int] = deque()
        self._pending = registers.interrupt
        self.notifies = 0
        registers.on_interrupt = self.config_change

    def notify(self, queue: int) -> Steps:
        """``virtio_notify()``, in the device's context."""
        self.notifies += 1
        self._pending.set(_VRING)
        if self._irqfd:
            yield ("irqfd", queue, GSI, 1)
            self._wake_vcpu()
        elif self._direct:
            yield ("irq_line", queue, GSI, 1)
            self._wake_vcpu()
        else:  # the guest notifier's eventfd is read by the main loop, which holds the right to set the line
            yield ("virtio_notify", queue)
            self._asked.append(queue)
            self._wake_main_loop()

    def config_change(self) -> None:
        """A configuration change or DEVICE_NEEDS_RESET: rare, so it costs nothing in the model."""
        self._wake_vcpu()

    def main_loop(self) -> Steps:
        """The main loop's context where an iothread leaves the line to it."""
        while True:
            if not self._asked:
                yield WAIT
                continue
            self._asked.clear()
            yield ("kvm_set_irq", GSI, 1)
            self._wake_vcpu()

    def vcpu_interrupts(self, handler: Callable[[], Steps]) -> Steps:
        """The interrupt context of the vCPU that has the line: while it is high, inject and run the guest's handler."""
        pending = self.registers.interrupt
        while True:
            if not pending.read():
                yield WAIT
                continue
            yield ("kvm_inj_virq", GSI)
            yield from handler()
