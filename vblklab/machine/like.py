"""The shape of a live machine, for the simulator: ``SimMachine(costs=table, like=vb.KvmMachine())``.

A live machine is not QEMU.  Its driver is Python in one thread and its device Python in another, and

- the device has its own thread whatever the kick is: where the doorbell leaves to user space (KvmMachine, ``mmio-exit``) the vCPU's
  thread serves the exit by writing an eventfd, and goes on; on LiveMachine every kick is that eventfd;
- the driver's register accesses have no points of their own: KvmMachine's payload does them before the driver is told, and on
  LiveMachine InterruptStatus is shared memory;
- a device or driver that sleeps says when it wakes: ``device:epoll_wait``, ``guest:epoll_wait``, ``vcpu:irq_handler_entry``;
- the engine blocks in preadv or pwritev, and a model of a drive is memory.

Parts, rings and contexts stay what they are; only the wire and the engine are exchanged, and the costs are rows that were measured
on that machine: ``vb.calibrate()``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ..disk.drive import execute
from ..engine import Sync
from ..errors import ConfigError
from ..events import WAIT, Spend
from ..iostack import Op
from ..kvm import Kvm, KvmBus, PciKvmBus
from ..spec.virtio_mmio import Reg
from ..transport import Pci
from .base import Recipe, default_vcpus, not_simulated, real_engine
from .costs import CostTable
from .kvm import KvmMachine
from .live import LiveMachine
from .wire import Wire, wire

__all__ = ["NO_HOST", "STORES", "Shape", "TimedSync", "in_flight", "shape_of"]

Steps = Generator[Any, int, Any]
_READ, _WRITE = int(Op.READ), int(Op.WRITE)
_QUEUE_NOTIFY = int(Reg.QUEUE_NOTIFY)
STORES = ("ram", "cached", "direct")
"""Where a live machine's bytes are: in memory, in a file behind the page cache, in a file past it (O_DIRECT)."""
NO_HOST: Any = SimpleNamespace(counts={}, driver=None)
"""In place of the host's block layer, which a live machine reaches by one system call."""


@dataclass(frozen=True)
class Shape:
    """One live machine as the simulator plays it.  ``rows`` is what its rows of a cost table begin with."""

    name: str
    rows: str
    kvm: bool

    def costs(self, table: CostTable) -> CostTable:
        """The table with this machine's rows in the place of the simulator's own; ConfigError if it has none."""
        mine = table.on(self.rows)
        if mine is None:
            raise ConfigError(f"the cost table {table.name!r} has no rows of {self.name}", f"measure them: vb.calibrate({self.name}())")
        return mine

    def notes(self, recipe: Recipe) -> list[str]:
        """What the simulator does as that machine does it, where it differs from a recipe's QEMU."""
        kick = "writes an eventfd"
        if self.kvm and recipe.kvm.kick == "mmio-exit":
            kick = "leaves to user space, where the vCPU's thread writes an eventfd"
        elif self.kvm:
            kick = "is answered by an ioeventfd"
        notes = [f"shape: {self.name}'s. The doorbell {kick}; the device's own thread serves the queue; registers have no points"]
        notes += [f"shape: {limit}"] if (limit := self.limit(recipe)) else []
        return notes + not_simulated(recipe)

    def limit(self, recipe: Recipe) -> str:
        """What figures must say where the model is not made for the recipe; else nothing."""
        most = in_flight(recipe)
        return f"made for one I/O in flight, times with {most} may be off by half" if most > 1 else ""

    def check(self, recipe: Recipe) -> None:
        """ConfigError for a recipe whose live form is not modelled."""
        engine = real_engine(recipe)
        if type(engine) is not Sync:
            raise ConfigError(f"engine={engine!r} in the shape of {self.name}", "only Sync is modelled: engine=None or vb.Sync()")
        if isinstance(recipe.transport, Pci) and recipe.kvm.call == "intx" and not self.kvm:
            raise ConfigError(f"call='intx' over virtio-pci in the shape of {self.name}", "use call='irqfd'")
        if default_vcpus(recipe) > 1:
            raise ConfigError(
                f"{default_vcpus(recipe)} vCPUs in the shape of {self.name}, whose tasks share one thread", "use Kvm(vcpus=1)"
            )

    def wire(
        self,
        recipe: Recipe,
        memory: Any,
        device: Any,
        sched: Any,
        vcpus: int,
        wake_vcpu: Callable[[int], None],
        wake_main: Callable[[], None],
    ) -> Wire:
        """The wire with this machine's kick, call and register accesses."""
        call = recipe.kvm.call if self.kvm or isinstance(recipe.transport, Pci) else "irqfd"
        own_thread = _Recipe(Kvm(kick="ioeventfd", call=call, vcpus=recipe.kvm.vcpus), recipe.transport)
        made = wire(own_thread, memory, device, sched, vcpus, wake_vcpu, wake_main)  # type: ignore[arg-type]
        kind = _LikePciBus if isinstance(recipe.transport, Pci) else _LikeBus
        bus: Any = kind(own_thread.kvm, made.registers, device, sched)  # type: ignore[arg-type]
        bus.exit = recipe.kvm.kick == "mmio-exit"
        made.transport.bus = bus
        handlers = [_woken_by(handler, self._point) for handler in made.handlers]
        return made._replace(bus=bus, handlers=handlers)

    @property
    def _point(self) -> tuple[Any, ...]:
        return ("vcpu:irq_handler_entry", 5) if self.kvm else ("guest:epoll_wait",)

    def engine(self, recipe: Recipe, costs: CostTable) -> TimedSync:
        """``Sync`` over the store alone, with the measured time of the call."""
        return TimedSync(costs, store_of(recipe.disk))

    def device(self, steps: Steps) -> Steps:
        """The device's context, with a point where its thread wakes."""
        value: Any = None
        while True:
            ev = steps.send(value)
            value = yield ev
            if ev is WAIT:
                value = yield ("device:epoll_wait",)


def shape_of(machine: Any) -> Shape:
    """The shape of a LiveMachine or KvmMachine; ConfigError for another, or for options that are not modelled."""
    if not isinstance(machine, LiveMachine) or type(machine) not in (LiveMachine, KvmMachine):
        raise ConfigError(f"like={machine!r}", "give a vb.KvmMachine() or vb.LiveMachine()")
    if machine.poll_us or getattr(machine, "idle", "hlt") != "hlt":
        raise ConfigError(f"{machine!r} polls", "only sleeping is modelled: poll_us=0, idle='hlt'")
    kvm = isinstance(machine, KvmMachine)
    name = type(machine).__name__
    rows = ("kvm" if kvm else "live") + ("-thread" if machine.device == "thread" else "")
    return Shape(name, rows, kvm)


def in_flight(recipe: Recipe) -> int:
    """How many I/Os the recipe's jobs keep in flight together, at most."""
    return sum(job.iodepth * job.numjobs for job in recipe.app.jobs)


def store_of(disk: Any) -> str:
    """Which of ``STORES`` a live machine would keep this disk in."""
    if not hasattr(disk, "path"):
        return "ram"
    return "direct" if getattr(disk, "cache", "") in ("none", "directsync") else "cached"


@dataclass(frozen=True)
class _Recipe:
    """What ``wire`` reads of a recipe."""

    kvm: Kvm
    transport: Any


class TimedSync(Sync):
    """``preadv`` and ``pwritev`` for real, in the simulated time that was measured for their length."""

    def __init__(self, costs: CostTable, store: str) -> None:
        name = f"store:{store}:"
        self._base = {op: costs.number(f"{name}{word}_ns") for op, word in ((_READ, "read"), (_WRITE, "write"))}
        self._per_us = {op: costs.number(f"{name}{word}_bytes_per_us") for op, word in ((_READ, "read"), (_WRITE, "write"))}

    def flush(self) -> Steps:
        while self.batch:
            op = self.batch.pop(0)
            yield ("host:sys_enter_preadv64", op.io)
            kind = _READ if op.op == _READ else _WRITE
            length = op.length if op.op in (_READ, _WRITE) else 0
            yield Spend(round(self._base[kind] + 1e3 * length / self._per_us[kind]))
            op.status = execute(self.store, op.op, op.sector << 9, op.length, op.segments, op.unmap)
            self._done.append(op)
            yield ("host:sys_exit_preadv64", op.io)
        self._wake()


def _woken_by(handler: Callable[[Any], Steps], point: tuple[Any, ...]) -> Callable[[Any], Steps]:
    """An interrupt context of which ``point`` says that its thread is awake, in the place of KVM's injection."""

    def steps(driver: Any) -> Steps:
        inner = handler(driver)
        value: Any = None
        while True:
            ev = inner.send(value)
            value = yield point if type(ev) is tuple and ev[0] == "kvm_inj_virq" else ev

    return steps


class _Registers:
    """Register accesses without a point: the payload, or shared memory, has done them."""

    registers: Any
    exit = False

    def read(self, offset: int, size: int = 4) -> Steps:
        return self.registers.read(offset, size)
        yield

    def write(self, offset: int, value: int, size: int = 4) -> Steps:
        self.registers.write(offset, value, size)
        return
        yield


class _LikeBus(_Registers, KvmBus):
    """virtio-mmio: after the doorbell, however it is answered, the device's own thread is woken."""

    def notify(self, queue: int, data: int | None = None) -> Steps:
        if self.exit:
            self.exits += 1
            yield ("doorbell_exit", _QUEUE_NOTIFY, queue, 1)
        else:
            self.fast_mmio += 1
            yield ("doorbell_fast", _QUEUE_NOTIFY, queue)
        self.device.kick(queue)
        yield ("kvm_entry",)


class _LikePciBus(_Registers, PciKvmBus):
    """virtio-pci: the same, at the queue's own address."""

    def config_read(self, offset: int, size: int) -> Steps:
        return self.registers.config_read(offset, size)
        yield

    def config_write(self, offset: int, value: int, size: int) -> Steps:
        self.registers.config_write(offset, value, size)
        return
        yield

    def notify(self, queue: int, gpa: int, value: int, size: int = 2) -> Steps:
        if self.exit:
            self.exits += 1
            yield ("vp_doorbell_exit", gpa, queue, 1, value)
        else:
            self.fast_mmio += 1
            yield ("vp_doorbell_fast", gpa, queue)
        self.registers.write(gpa, value, size)
        yield ("kvm_entry",)
