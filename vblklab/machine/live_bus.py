"""The wire of a live machine: the driver's accesses as messages on a socket, interrupts as eventfds, on both of its ends."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Generator
from typing import Any, Protocol

from ..errors import VblkError
from ..events import WAIT
from ..kvm.payload import SENT_AT, SENT_STRIDE
from ..memory import GuestMemory
from ..spec.virtio_mmio import Interrupt, Reg
from ..transport import InterruptStatus, Message, Mmio, MmioRegisters, Pci, PciRegisters

__all__ = ["ACCESS", "DeviceEnd", "LiveBus", "LivePciBus", "SharedInterruptStatus", "answer", "device_end", "interrupts", "messages"]

Steps = Generator[Any, int, Any]
ACCESS = struct.Struct("<BBQQ")
"""One register access on the mmio socket: bit 0 write, bit 1 PCI configuration space; size, offset or address, value."""
_WRITE, _CONFIG = 1, 2
_INTERRUPT_STATUS, _INTERRUPT_ACK = int(Reg.INTERRUPT_STATUS), int(Reg.INTERRUPT_ACK)


class SharedInterruptStatus(InterruptStatus):
    """InterruptStatus over words in shared memory, each written by one side only: causes raised, causes acknowledged."""

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self._seen = [0, 0]

    def set(self, bits: int) -> None:
        for bit in (0, 1):
            if bits >> bit & 1:
                self._words[bit] = (self._words[bit] + 1) & 0xFFFFFFFF

    def read(self) -> int:
        words, seen = self._words, self._seen
        seen[0], seen[1] = words[0], words[1]
        return int(seen[0] != words[2]) | int(seen[1] != words[3]) << 1

    def ack(self, bits: int) -> None:
        for bit in (0, 1):
            if bits >> bit & 1:
                self._words[2 + bit] = self._seen[bit]

    def clear(self) -> None:
        """Device side, during a reset: nothing is pending."""
        self.read()
        self.ack(3)


# -- the driver's end ----------------------------------------------------------------------------------------------------------


class _Socket:
    """Register accesses as questions and answers; the doorbells are eventfds."""

    def __init__(self, sock: socket.socket, kicks: tuple[int, ...], dead: Callable[[], VblkError]) -> None:
        self._sock = sock
        self._kicks = kicks
        self._dead = dead
        self.accesses = 0

    def _access(self, kind: int, offset: int, value: int, size: int) -> int:
        self.accesses += 1
        try:
            self._sock.send(ACCESS.pack(kind, size, offset, value))
            data = self._sock.recv(ACCESS.size)
        except OSError:
            data = b""
        if not data:
            raise self._dead()
        said: int = ACCESS.unpack(data)[3]
        return said


class LiveBus(_Socket):
    """virtio-mmio; InterruptStatus lies in shared memory."""

    def __init__(self, sock: socket.socket, kicks: tuple[int, ...], status: SharedInterruptStatus, dead: Callable[[], VblkError]) -> None:
        super().__init__(sock, kicks, dead)
        self._status = status

    def read(self, offset: int, size: int = 4) -> Steps:
        if offset == _INTERRUPT_STATUS:
            return self._status.read()
        return self._access(0, offset, 0, size)
        yield

    def write(self, offset: int, value: int, size: int = 4) -> Steps:
        if offset == _INTERRUPT_ACK:
            self._status.ack(value)
            return
        self._access(_WRITE, offset, value, size)
        return
        yield

    def notify(self, queue: int, data: int | None = None) -> Steps:
        yield ("vm_notify", queue)
        os.eventfd_write(self._kicks[queue], 1)


class LivePciBus(_Socket):
    """virtio-pci; the ISR status is a register like the others."""

    def config_read(self, offset: int, size: int) -> Steps:
        return self._access(_CONFIG, offset, 0, size)
        yield

    def config_write(self, offset: int, value: int, size: int) -> Steps:
        self._access(_CONFIG | _WRITE, offset, value, size)
        return
        yield

    def read(self, gpa: int, size: int = 4) -> Steps:
        return self._access(0, gpa, 0, size)
        yield

    def write(self, gpa: int, value: int, size: int = 4) -> Steps:
        self._access(_WRITE, gpa, value, size)
        return
        yield

    def notify(self, queue: int, gpa: int, value: int, size: int = 2) -> Steps:
        yield ("vp_notify", queue)
        os.eventfd_write(self._kicks[queue], 1)


def interrupts(handler: Callable[[], Steps], status: InterruptStatus) -> Steps:
    """The guest's interrupt context for a line whose causes lie in ``status``."""
    while True:
        if not status.read():
            yield WAIT
            continue
        yield from handler()


def messages(handler: Callable[[], Steps]) -> Steps:
    """The guest's interrupt context for an eventfd that stands for a message, or for a line that only the handler asks."""
    while True:
        yield WAIT
        yield from handler()


# -- the device's end ----------------------------------------------------------------------------------------------------------


class DeviceEnd(Protocol):
    """What the device's half needs of its transport: the register file, and how it interrupts."""

    registers: Any

    def notify(self, queue: int) -> Steps: ...

    def call(self, queue: int) -> None: ...

    def reset_done(self) -> None: ...


class _MmioEnd:
    def __init__(self, memory: GuestMemory, device: Any, calls: tuple[int, ...], words: memoryview, irqfd: bool) -> None:
        self._call = calls[0]
        self._irqfd = irqfd
        self.registers = MmioRegisters(memory, device)
        self.registers.interrupt = self._status = SharedInterruptStatus(words)
        self.registers.on_interrupt = self._ring

    def _ring(self) -> None:
        os.eventfd_write(self._call, 1)

    def notify(self, queue: int) -> Steps:
        """The used buffer notification, with its trace points."""
        self._status.set(Interrupt.VRING)
        if not self._irqfd:
            yield ("virtio_notify", queue)
            self._ring()
            return
        yield ("virtio_notify_irqfd", queue)
        self._ring()
        yield ("kvm_set_irq", 0, 1)

    def call(self, queue: int) -> None:
        """The same without."""
        self._status.set(Interrupt.VRING)
        self._ring()

    def reset_done(self) -> None:
        self._status.clear()
        self.registers.reset_done()


class _PciEnd:
    """``calls`` are the line's eventfd and one for each vector; ``words`` counts what was sent to each, for who takes it."""

    def __init__(
        self,
        memory: GuestMemory,
        device: Any,
        calls: tuple[int, ...],
        words: memoryview,
        irqfd: bool,
        *,
        vectors: int | None,
        notif_config_data: bool,
    ) -> None:
        self._calls = calls
        self._words = words
        self._irqfd = irqfd
        self.registers = PciRegisters(memory, device, vectors=vectors, notif_config_data=notif_config_data)
        self.registers.on_interrupt = self._line
        self.registers.on_message = self._send
        self.reset_done = self.registers.reset_done

    def _line(self) -> None:
        self._words[0] = (self._words[0] + 1) & 0xFFFFFFFF
        os.eventfd_write(self._calls[0], 1)

    def _send(self, message: Message) -> None:
        if 1 + message.vector < len(self._calls):
            at = SENT_AT + SENT_STRIDE * message.vector
            if at < len(self._words):
                self._words[at] = (self._words[at] + 1) & 0xFFFFFFFF
            os.eventfd_write(self._calls[1 + message.vector], 1)

    def notify(self, queue: int) -> Steps:
        message = self.registers.signal(queue)
        if not self._irqfd:
            yield ("virtio_notify", queue)
            if message is not None:
                self._send(message)
            elif self.registers.line:
                self._line()
        elif message is not None:
            yield ("virtio_notify_irqfd", queue)
            self._send(message)
            yield ("kvm_msi_set_irq", message.address, message.data)
        elif self.registers.line:
            yield ("virtio_notify", queue)
            self._line()
            yield ("kvm_set_irq", 0, 1)
        else:
            yield ("virtio_notify", queue)  # masked, or without a vector

    def call(self, queue: int) -> None:
        message = self.registers.signal(queue)
        if message is not None:
            self._send(message)
        elif self.registers.line:
            self._line()


def device_end(
    transport: Mmio | Pci,
    vectors: int | None,
    memory: GuestMemory,
    device: Any,
    calls: tuple[int, ...],
    words: memoryview,
    *,
    irqfd: bool = True,
) -> DeviceEnd:
    """The device's end of a transport.  ``words`` is shared with the driver's half; ``calls`` are eventfds that it watches.

    Without ``irqfd`` they are read by a main loop, which raises the interrupt: only it knows when.
    """
    if isinstance(transport, Pci):
        return _PciEnd(memory, device, calls, words, irqfd, vectors=vectors, notif_config_data=transport.notif_config_data)
    return _MmioEnd(memory, device, calls, words, irqfd)


def answer(registers: Any, data: bytes) -> bytes:
    """Do what an access asks and return the answer."""
    kind, size, offset, value = ACCESS.unpack(data)
    read, write = (registers.config_read, registers.config_write) if kind & _CONFIG else (registers.read, registers.write)
    if kind & _WRITE:
        write(offset, value, size)
        return ACCESS.pack(kind, size, offset, 0)
    return ACCESS.pack(kind, size, offset, read(offset, size))
