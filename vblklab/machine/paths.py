"""Which contexts of a simulated machine take the fused path, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from ..device import VirtioBlkDevice
from ..disk import Drive, NvmeDriver, ServiceTime
from ..engine import Simulated
from ..guest.fio import FioTask
from ..guest.virtio_blk import VirtioBlkDriver
from ..iostack import IOStack
from ..kvm import KvmBus, KvmInterrupt, PciInterrupt, PciKvmBus
from ..ring import SplitDevice, SplitDriver
from ..spec.virtio import Feature
from ..transport import InterruptStatus, MmioRegisters, MmioTransport, Msix, PciConfig, PciRegisters, PciTransport
from .fused import Solo, guest_interrupts, guest_task
from .fused_drive import Hardware, host_interrupts
from .fused_host import device_loop
from .fused_solo import solo_path
from .sched import Context, Fused
from .untouched import Written

__all__ = ["Choice", "choose", "fuse"]

_WRITTEN = Written(
    *(FioTask, IOStack, VirtioBlkDriver, SplitDriver, KvmBus, KvmInterrupt, MmioRegisters, MmioTransport, InterruptStatus),
    *(PciKvmBus, PciInterrupt, PciRegisters, PciTransport, PciConfig, Msix),
    *(VirtioBlkDevice, SplitDevice, Simulated, NvmeDriver, Drive, ServiceTime),
)
_NOT_FUSED = {
    Feature.IN_ORDER: "VIRTIO_F_IN_ORDER: the fused path takes descriptors in any order",
    Feature.NOTIFICATION_DATA: "VIRTIO_F_NOTIFICATION_DATA: the fused path's doorbell says the queue only",
    Feature.RING_RESET: "VIRTIO_F_RING_RESET: the fused path keeps to the rings that it began with",
}
_PLACED = ("on_notify", "on_interrupt")  # functions that the machine itself sets on the registers


class Choice(NamedTuple):
    """One context: ``why`` it keeps to the parts' own code, or None and ``steps`` to make its fused generator."""

    context: Context
    why: str | None
    steps: Callable[[], Generator[Any, int, Any]]


def choose(vm: Any) -> Iterator[Choice]:
    """What each context of a machine that stands before its first I/O should run."""
    rings, guest_parts = vm.driver.queues, (vm.iostack, vm.driver, vm.transport, vm._bus, vm.registers, vm.registers.interrupt)
    engine_parts = (vm.engine, vm._host_stack, vm._host_stack.driver)
    queues = vm.device.queues.values()
    drive = getattr(vm._host_stack.driver, "drive", None)
    host_parts = (*engine_parts, drive, getattr(drive, "service", None))
    general = None if vm.machine.fast == "auto" else f"SimMachine(fast={vm.machine.fast!r})"
    general = general or (
        None if vm.machine.shape is None else f"in the shape of {vm.machine.shape.name}: its kick and call are not QEMU's"
    )
    general = general or ("guest memory does not begin at address 0" if vm.memory.base else None)
    general = general or ("a zoned disk: its zones are asked about every request" if vm.device.zoned is not None else None)
    if any(context.started and type(context) is not Fused for context in vm.task_contexts):
        general = general or "the application was stepped into"
    mmio = isinstance(vm.registers, MmioRegisters)
    if not mmio:
        guest_parts += (vm.registers.config, *([vm.registers.msix] if vm.registers.msix is not None else []))
    negotiated = getattr(vm.driver, "features", 0)
    wire = general or next((why for feature, why in _NOT_FUSED.items() if negotiated & feature), None)
    guest = wire or (None if vm._bus._fast else "kvm kick='mmio-exit': the vCPU's thread serves the queue")
    irq_why = guest or _first((*guest_parts, vm._interrupt, *rings))
    device_why = wire or _first((vm.device, *host_parts, vm._interrupt, *queues))
    if any(getattr(queue, "inflight", None) is not None for queue in queues):
        device_why = device_why or "a queue keeps a record of its buffers in flight"
    host_why = general or (None if drive is not None else "no drive") or _first(host_parts)
    hardware = Hardware(vm) if drive is not None and device_why is None else None
    alone = mmio and irq_why is None and host_why is None and hardware is not None

    def solo(task: FioTask, context: Context) -> Solo | None:
        return solo_path(vm, task, context, hardware) if alone else None

    for task, context in zip(vm.tasks, vm.task_contexts, strict=True):
        why = guest or _first((task, *guest_parts, *rings))
        if why is None and task.job.iodepth_batch != 1:
            why = "iodepth_batch is not 1: a plug may merge"
        yield Choice(context, why, partial(_task, vm, task, context, solo))
    for vcpu, context in enumerate(vm._irq_contexts):
        yield Choice(context, irq_why, partial(guest_interrupts, vm, vcpu))
    yield Choice(vm._device_context, device_why, partial(device_loop, vm, hardware))
    if drive is not None:
        yield Choice(vm._host_irq, host_why, partial(host_interrupts, vm))


def _task(vm: Any, task: FioTask, context: Context, solo: Callable[[FioTask, Context], Solo | None]) -> Generator[Any, int, Any]:
    return guest_task(vm, task, context, solo(task, context))


def _first(parts: Iterable[Any]) -> str | None:
    """Why the first of these parts that was touched was; ``attach`` only wires."""
    for part in parts:
        why = _WRITTEN.touched(part, but=("attach", *_PLACED))
        if why is not None:
            return why
    return None


def fuse(choices: Iterable[Choice]) -> list[Choice]:
    """Put fused generators in the place of those that may be and idle or have not begun; returns what has to wait for that."""
    busy = []
    for one in choices:
        if one.why is None:
            if _at_rest(one.context):
                one.context.replace(one.steps())
            else:
                busy.append(one)
    return busy


def _at_rest(context: Context) -> bool:
    """Not begun, or idle in the outermost loop and not somewhere inside it, where a part waits for a tag or an operation."""
    generator: Any = context.generator
    inner = generator.gi_yieldfrom
    if inner is not None and generator.gi_code.co_name == "_start_device":
        inner = inner.gi_yieldfrom
    return not context.started or (context.waiting and inner is None)


def lead(vm: Any, choices: Iterable[Choice]) -> int:
    """How long after what is due next a vCPU's context knows that no interrupt will meet it, in ns; 0 if nothing is known.

    With one vCPU everything is fused and the only interrupt is the device's: it comes no sooner than the used element and the
    index after the drive's end, whatever is due now.  Calls at a time (``Scheduler.at``) may do anything.
    """
    sched = vm.scheduler
    known = all(type(one.context) is Fused for one in choices) and len(vm.vcpus) == 1 and vm._interrupt._irqfd and not vm.driver.poll
    return sched.table["completion_to_ring"] + sched.table["virtqueue_flush"] if known and not sched.called else 0
