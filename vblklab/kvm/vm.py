"""A virtual machine of KVM: memory slots, the in-kernel interrupt controllers, eventfds in both directions.

Every method is one ioctl and raises KvmError if the kernel refuses it.  All of it may be called from any thread of the process
that made the VM; the kernel refuses every other process, which may still write the eventfds.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from . import ioctl as abi
from .host import open_kvm
from .ioctl import Ioctl, ioctl
from .vcpu import Vcpu

__all__ = ["IRQCHIP_IOAPIC", "MSI_ADDRESS", "Line", "Msi", "Vm"]

MSI_ADDRESS = 0xFEE0_0000
"""Where a message-signalled interrupt for the APIC with id 0 is written to (physical destination, no redirection)."""
IRQCHIP_IOAPIC = 2
_TSS_GPA = 0xFFFB_D000  # three pages that Intel's KVM takes for itself, below the BIOS


@dataclass(frozen=True)
class Line:
    """A GSI that is a pin of the I/O APIC."""

    gsi: int
    pin: int


@dataclass(frozen=True)
class Msi:
    """A GSI that is a message: for irqfds, one per MSI-X vector."""

    gsi: int
    vector: int
    address: int = MSI_ADDRESS


class Vm:
    """One VM with an in-kernel irqchip.  ``close()`` ends it with its vCPUs; it is also a context manager.

    Raises NotHere, with the remedy, where /dev/kvm is missing or refused.
    """

    def __init__(self) -> None:
        self._slots: list[tuple[int, int, ctypes.c_char]] = []  # gpa, bytes, the first of them; keeps the mapping alive
        self.vcpus: list[Vcpu] = []
        kvm = open_kvm()
        try:
            version = ioctl(kvm, Ioctl.GET_API_VERSION)
            if version != abi.API_VERSION:
                raise ConfigError(f"KVM's API version is {version}, not {abi.API_VERSION}", "use a current Linux")
            self._run_bytes = ioctl(kvm, Ioctl.GET_VCPU_MMAP_SIZE)
            self.fd = ioctl(kvm, Ioctl.CREATE_VM)
        finally:
            os.close(kvm)
        try:
            ioctl(self.fd, Ioctl.SET_TSS_ADDR, _TSS_GPA)
            ioctl(self.fd, Ioctl.CREATE_IRQCHIP)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back; the kernel takes eventfds and memory slots out by itself."""
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus.clear()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._slots.clear()

    def map_memory(self, gpa: int, buffer: memoryview) -> None:
        """Let ``buffer``, a writable mapping of whole pages, be guest memory from ``gpa`` on."""
        if gpa % 4096 or len(buffer) % 4096 or not len(buffer):
            raise ConfigError(f"a memory slot of {len(buffer):#x} bytes at {gpa:#x}", "use whole pages of 4096 bytes")
        start = ctypes.c_char.from_buffer(buffer)
        region = abi.kvm_userspace_memory_region(len(self._slots), 0, gpa, len(buffer), ctypes.addressof(start))
        ioctl(self.fd, Ioctl.SET_USER_MEMORY_REGION, region)
        self._slots.append((gpa, len(buffer), start))

    def vcpu(self, number: int = 0) -> Vcpu:
        """A new vCPU; its APIC has the id ``number``."""
        vcpu = Vcpu(ioctl(self.fd, Ioctl.CREATE_VCPU, number), self._run_bytes, self.read_memory)
        self.vcpus.append(vcpu)
        return vcpu

    def read_memory(self, gpa: int, length: int) -> bytes:
        """What a vCPU would fetch at ``gpa``; fewer bytes, or none, where memory ends.  For error messages."""
        for start, size, first in self._slots:
            if start <= gpa < start + size:
                return ctypes.string_at(ctypes.addressof(first) + gpa - start, min(length, start + size - gpa))
        return b""

    # -- interrupts ------------------------------------------------------------------------------------------------------------

    def route(self, routes: Sequence[Line | Msi]) -> None:
        """Say what each GSI is; replaces every route that was there, the chips' own too."""
        entries = (abi.kvm_irq_routing_entry * len(routes))()
        for entry, route in zip(entries, routes, strict=True):
            entry.gsi = route.gsi
            if isinstance(route, Line):
                entry.type = abi.IRQ_ROUTING_IRQCHIP
                entry.u.irqchip.irqchip, entry.u.irqchip.pin = IRQCHIP_IOAPIC, route.pin
            else:
                entry.type = abi.IRQ_ROUTING_MSI
                entry.u.msi.address_lo, entry.u.msi.address_hi = route.address & 0xFFFFFFFF, route.address >> 32
                entry.u.msi.data = route.vector
        table = ctypes.create_string_buffer(bytes(abi.kvm_irq_routing(len(routes), 0)) + bytes(entries))
        ioctl(self.fd, Ioctl.SET_GSI_ROUTING, ctypes.addressof(table))

    def irq_line(self, gsi: int, level: bool) -> bool:
        """KVM_IRQ_LINE_STATUS: set the line.  False if the interrupt was merged with one that is pending, or is masked."""
        status = abi.kvm_irq_level(gsi, level)
        ioctl(self.fd, Ioctl.IRQ_LINE_STATUS, status)
        return ctypes.c_int32(status.irq).value > 0

    def signal_msi(self, vector: int, address: int = MSI_ADDRESS) -> bool:
        """KVM_SIGNAL_MSI: deliver one message.  False if the guest blocks it; a merge with one that is pending is not told."""
        message = abi.kvm_msi(address_lo=address & 0xFFFFFFFF, address_hi=address >> 32, data=vector)
        return ioctl(self.fd, Ioctl.SIGNAL_MSI, message) > 0

    def irqfd(self, eventfd: int, gsi: int) -> None:
        """Whoever writes ``eventfd``, in whatever process, raises ``gsi`` once: an edge."""
        ioctl(self.fd, Ioctl.IRQFD, abi.kvm_irqfd(fd=eventfd, gsi=gsi))

    def remove_irqfd(self, eventfd: int, gsi: int) -> None:
        """The eventfd is an ordinary one again."""
        ioctl(self.fd, Ioctl.IRQFD, abi.kvm_irqfd(fd=eventfd, gsi=gsi, flags=abi.IRQFD_DEASSIGN))

    # -- doorbells -------------------------------------------------------------------------------------------------------------

    def ioeventfd(self, eventfd: int, addr: int, length: int, *, datamatch: int | None = None, pio: bool = False) -> None:
        """A store of ``length`` bytes to ``addr`` adds 1 to ``eventfd`` and does not leave the kernel.

        With ``datamatch`` only a store of that value; without it, and with ``length`` 0 (memory only), a store of any width.
        """
        ioctl(self.fd, Ioctl.IOEVENTFD, _ioeventfd(eventfd, addr, length, datamatch, abi.IOEVENTFD_PIO * pio))

    def remove_ioeventfd(self, eventfd: int, addr: int, length: int, *, datamatch: int | None = None, pio: bool = False) -> None:
        """The store leaves to user space again; the arguments are those it was added with."""
        flags = abi.IOEVENTFD_PIO * pio | abi.IOEVENTFD_DEASSIGN
        ioctl(self.fd, Ioctl.IOEVENTFD, _ioeventfd(eventfd, addr, length, datamatch, flags))


def _ioeventfd(eventfd: int, addr: int, length: int, datamatch: int | None, flags: int) -> abi.kvm_ioeventfd:
    if datamatch is not None:
        flags |= abi.IOEVENTFD_DATAMATCH
    return abi.kvm_ioeventfd(datamatch=datamatch or 0, addr=addr, len=length, fd=eventfd, flags=flags)
