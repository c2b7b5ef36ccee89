"""The wire of a simulated machine: the device's registers, the driver's way to them, and the interrupts between."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from ..kvm import KvmBus, KvmInterrupt, PciInterrupt, PciKvmBus, check_wire, vectors_of
from ..memory import GuestMemory
from ..transport import MmioRegisters, MmioTransport, Pci, PciRegisters, PciTransport
from .base import Recipe
from .sched import Scheduler

__all__ = ["Wire", "wire"]


class Wire(NamedTuple):
    """``handlers`` has, for each vCPU that may be interrupted, what makes its interrupt context out of the driver."""

    registers: MmioRegisters | PciRegisters
    bus: KvmBus | PciKvmBus
    transport: MmioTransport | PciTransport
    interrupt: KvmInterrupt | PciInterrupt
    handlers: list[Callable[[Any], Generator[Any, int, Any]]]
    main_loop: bool


def wire(
    recipe: Recipe,
    memory: GuestMemory,
    device: Any,
    sched: Scheduler,
    vcpus: int,
    wake_vcpu: Callable[[int], None],
    wake_main_loop: Callable[[], None],
) -> Wire:
    """Registers, bus, transport and interrupts of a recipe; ``main_loop`` says whether the main loop has a part in interrupts.

    Raises ConfigError where the recipe's ``kvm`` and ``transport`` do not fit.
    """
    kvm = recipe.kvm
    check_wire(kvm, recipe.transport, notification_data=device.notification_data)
    if isinstance(recipe.transport, Pci):
        return _pci(recipe, memory, device, sched, vcpus, wake_vcpu, wake_main_loop)
    registers = MmioRegisters(memory, device)
    bus = KvmBus(kvm, registers, device, sched)
    interrupt = KvmInterrupt(kvm, registers, lambda: wake_vcpu(0), wake_main_loop)
    handlers = [lambda driver: interrupt.vcpu_interrupts(driver.interrupt)]
    return Wire(registers, bus, MmioTransport(bus), interrupt, handlers, kvm.call == "intx" and kvm.has_iothread)


def _pci(
    recipe: Recipe,
    memory: GuestMemory,
    device: Any,
    sched: Scheduler,
    vcpus: int,
    wake_vcpu: Callable[[int], None],
    wake_main_loop: Callable[[], None],
) -> Wire:
    kvm, part = recipe.kvm, recipe.transport
    registers = PciRegisters(memory, device, vectors=vectors_of(kvm, part), notif_config_data=part.notif_config_data)
    bus = PciKvmBus(kvm, registers, device, sched)
    interrupt = PciInterrupt(kvm, registers, vcpus, wake_vcpu, wake_main_loop)
    transport = PciTransport(bus, lambda queue: queue % vcpus)

    def handled_by(vcpu: int) -> Callable[[Any], Generator[Any, int, Any]]:
        def interrupts(driver: Any) -> Generator[Any, int, Any]:
            return interrupt.vcpu_interrupts(vcpu, lambda irq: driver.interrupt(transport.vector_of_irq(vcpu, irq)))

        return interrupts

    return Wire(registers, bus, transport, interrupt, [handled_by(vcpu) for vcpu in range(vcpus)], kvm.has_iothread)
