"""KvmMachine: the live machine with a real trap in it.  Rung L4.

Our driver fills guest memory; its register accesses, its doorbell and its idling are done by the payload on a real vCPU, which also
takes the interrupts.  The calling thread is the vCPU's: between two entries it runs the driver, as a guest's kernel would run.  The
device is in another process or thread, as on the live machine.  Where the line is raised by KVM_IRQ_LINE a main loop does it: a thread.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import ConfigError, KvmExit, NotHere
from ..kvm import check_wire
from ..kvm import host as kvm_host
from ..kvm.bare import BareGuest
from ..kvm.guest import FIRST_MSI_GSI, GSI, LINE_EDGE, LINE_LEVEL, GuestClock, PayloadVm
from ..kvm.payload import ISR_VECTOR, LINE_VECTOR, MSI_VECTORS, REGISTERS_GPA, SENT_AT, SENT_STRIDE, Mail
from ..kvm.vcpu import MmioExit
from ..kvm.vm import MSI_ADDRESS
from ..spec.virtio_mmio import Reg
from ..trace.kernel import Kernel
from ..trace.run import Run
from ..transport import InterruptStatus, MmioTransport, Pci, PciTransport
from .base import Recipe, not_simulated
from .live import LiveMachine, LiveVm, live_missing
from .live_bus import LiveBus, LivePciBus, SharedInterruptStatus, Steps, interrupts, messages
from .live_device import Fds
from .loop import LiveLoop

__all__ = ["KvmMachine", "KvmVm"]

_NOTIFY, _STATUS, _ACK = int(Reg.QUEUE_NOTIFY), int(Reg.INTERRUPT_STATUS), int(Reg.INTERRUPT_ACK)
_BELL = REGISTERS_GPA + _NOTIFY
_REGISTERS_END = REGISTERS_GPA + 0x1000
_ECAM, _ECAM_END = 0xE020_0000, 0xE020_1000
"""Where the one PCI function's configuration space is, as memory."""
_WINDOW, _WINDOW_END = 0xC000_0000, 0xE000_0000
_LONGEST_S = 0.25
_DRAIN_S = 2.0
_CONFIG = 2  # of live_bus.ACCESS
_clock = time.perf_counter_ns


class KvmMachine(LiveMachine):
    """Runs recipes through a real VM.  Options are LiveMachine's, and ``idle``: how the vCPU waits, "hlt" or "poll".

    ``boot()`` raises NotHere, with the remedy, where /dev/kvm is missing or refused.
    """

    def __init__(self, *, idle: str = "hlt", **options: Any) -> None:
        super().__init__(**options)
        if idle not in ("hlt", "poll"):
            raise ConfigError(f"KvmMachine idle={idle!r}", "choose 'hlt' (in the kernel) or 'poll' (in the guest)")
        self.idle = idle

    def __repr__(self) -> str:
        more = f", idle={self.idle!r}" if self.idle != "hlt" else ""
        more += f", poll_us={self.poll_us:g}" if self.poll_us else ""
        more += f", cpus={self.cpus}" if self.cpus else ""
        more += ", kernel_trace=True" if self.kernel_trace else ""
        return f"KvmMachine(device={self.device!r}{more})"

    real_sides = (BareGuest.kind,)

    def boot(self, recipe: Recipe) -> KvmVm:
        """Make the VM, start the device's half, let the driver probe it through the vCPU, and stand before the first I/O."""
        missing = live_missing()
        if missing:
            raise NotHere(missing)
        check_wire(recipe.kvm, recipe.transport)
        works, why, gain = kvm_host.found()
        if not works:
            raise NotHere(why, f"{gain}; SimMachine (L0) and LiveMachine (L2) work without it")
        self.check_tracing()
        if recipe.guest is not None:
            from .bare import BareVm

            return BareVm(self, recipe)
        return KvmVm(self, recipe)


class _Causes(InterruptStatus):
    """The causes that the payload's handler has read and acknowledged, and the driver has not yet looked at."""

    def __init__(self, mail: memoryview) -> None:
        self._mail = mail

    def read(self) -> int:
        return int(self._mail[Mail.CAUSES])

    def ack(self, bits: int) -> None:
        self._mail[Mail.CAUSES] &= ~bits & 0xFFFFFFFF


class _Exits:
    """What a doorbell is on this machine, on both sides of the exit."""

    guest: PayloadVm
    causes: InterruptStatus
    leaves: bool
    note: Callable[[int, int, Any], None]
    doorbell_exits = 0

    def rung(self, offset: int, kick: int) -> int:
        """The vCPU's thread, after the exit: hand the kick to the device's thread."""
        self.note(_clock(), -1, ("kvm_userspace_exit", offset))
        self.doorbell_exits += 1
        os.eventfd_write(kick, 1)
        return 0

    def nothing_at(self, addr: int) -> KvmExit:
        return self.guest.vcpu.stopped(f"KVM_EXIT_MMIO at {addr:#x}, where nothing is")


class _MmioBus(_Exits, LiveBus):
    """virtio-mmio.  The driver's accesses are the payload's loads and stores; ``serve`` is the other side of their exits."""

    lower: Callable[[Callable[[], int]], None]

    def read(self, offset: int, size: int = 4) -> Steps:
        if offset == _STATUS:
            return self.causes.read()
        return self.guest.load(REGISTERS_GPA + offset, size)
        yield

    def write(self, offset: int, value: int, size: int = 4) -> Steps:
        if offset == _ACK:
            self.causes.ack(value)
        else:
            self.guest.store(REGISTERS_GPA + offset, value, size)
        return
        yield

    def notify(self, queue: int, data: int | None = None) -> Steps:
        yield ("vm_notify", queue)
        self.guest.ring(_BELL, queue, leaves=self.leaves)

    def serve(self, exit_: MmioExit) -> int:
        """Do what an exit asks, in the vCPU's thread."""
        addr = exit_.addr
        if addr == _BELL and exit_.value < len(self._kicks):
            return self.rung(_NOTIFY, self._kicks[exit_.value])
        if not REGISTERS_GPA <= addr < _REGISTERS_END:
            raise self.nothing_at(addr)
        offset = addr - REGISTERS_GPA
        if offset == _STATUS:
            pending = self._status.read()
            if not pending:
                self.lower(self._status.read)
            return pending
        if offset == _ACK:
            self._status.ack(exit_.value)
            self.lower(self._status.read)
            return 0
        return self._access(int(exit_.write), offset, exit_.value, exit_.size)


class _PciBus(_Exits, LivePciBus):
    """virtio-pci: configuration space is memory (ECAM), and each queue has its doorbell where the device says."""

    isr_gpa = -1
    left: Callable[[], int] | None = None  # once the device's half has ended: the causes that it left behind
    bells: dict[tuple[int, int], int]
    lower: Callable[[Callable[[], int]], None]

    def config_read(self, offset: int, size: int) -> Steps:
        return self.guest.load(_ECAM + offset, size)
        yield

    def config_write(self, offset: int, value: int, size: int) -> Steps:
        self.guest.store(_ECAM + offset, value, size)
        return
        yield

    def read(self, gpa: int, size: int = 4) -> Steps:
        if gpa != self.isr_gpa:
            return self.guest.load(gpa, size)
        causes = self.causes.read()
        self.causes.ack(causes)
        return causes
        yield

    def write(self, gpa: int, value: int, size: int = 4) -> Steps:
        self.guest.store(gpa, value, size)
        return
        yield

    def notify(self, queue: int, gpa: int, value: int, size: int = 2) -> Steps:
        yield ("vp_notify", queue)
        self.guest.ring(gpa, value, size, leaves=self.leaves)

    def serve(self, exit_: MmioExit) -> int:
        """Do what an exit asks, in the vCPU's thread."""
        addr = exit_.addr
        if exit_.write and (addr, exit_.value) in self.bells:
            return self.rung(addr, self._kicks[self.bells[addr, exit_.value]])
        if _ECAM <= addr < _ECAM_END:
            return self._access(_CONFIG | exit_.write, addr - _ECAM, exit_.value, exit_.size)
        if not _WINDOW <= addr < _WINDOW_END:
            raise self.nothing_at(addr)
        if addr == self.isr_gpa:
            self.lower(lambda: 0)  # before the read that clears it: who sets it again later raises the line again
            if self.left is not None:
                return self.left()
        return self._access(int(exit_.write), addr, exit_.value, exit_.size)


class _KvmLoop(LiveLoop):
    """The vCPU's thread: it sleeps in the guest, until an interrupt or until it is kicked."""

    guest: PayloadVm
    rest: Callable[[float], None]
    look: Callable[[], None]

    def _sleep(self, timeout_s: float) -> list[tuple[int, int]]:
        if timeout_s > 0:
            self.rest(timeout_s)
        else:
            self.guest.take_pending()  # a guest that never idles takes interrupts too
            self.guest.interrupted = False
        self.look()
        return super()._sleep(0)


def _weakly(method: Callable[..., object], *args: object) -> Callable[[], object]:
    """A call that does not keep the method's object alive: a machine that was dropped ends its threads, if they let it go."""
    reference = weakref.WeakMethod(method)

    def call() -> object:
        alive = reference()
        return None if alive is None else alive(*args)

    return call


class _MainLoop:
    """A thread beside the vCPU's: it raises interrupts (``calls``: eventfd → what to do), and kicks the vCPU for others."""

    def __init__(self, control: int, calls: dict[int, Callable[[], object]], kick: Callable[[], None]) -> None:
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._control, self._calls, self._kick = control, calls, kick
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._epoll.register(control, select.EPOLLIN | select.EPOLLONESHOT)
        for call in calls:
            self._epoll.register(call, select.EPOLLIN)
        self._deadline = 0.0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="vblklab main loop", daemon=True)
        self._thread.start()
        self.native_id = self._thread.native_id or 0

    def arm(self, timeout_s: float) -> None:
        """Before the vCPU idles: kick it after this time at the latest, or when the control socket is readable."""
        self._deadline = time.monotonic() + timeout_s
        self._epoll.modify(self._control, select.EPOLLIN | select.EPOLLONESHOT)
        if timeout_s < _LONGEST_S:
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self._thread:  # it may be the one that collects a dropped machine
            self._thread.join()
        self._epoll.close()
        os.close(self._wake)

    def _run(self) -> None:
        while not self._stopping:
            left = self._deadline - time.monotonic()
            events = self._epoll.poll(min(left, _LONGEST_S) if left > 0 else _LONGEST_S)
            for fd, _ in events:
                if fd == self._control:
                    self._kick()
                else:
                    try:
                        os.eventfd_read(fd)
                    except BlockingIOError:
                        continue
                    if fd in self._calls:
                        self._calls[fd]()
            if self._deadline and time.monotonic() >= self._deadline:
                self._deadline = 0.0
                self._kick()


class KvmVm(LiveVm):
    """A booted recipe of which the vCPU is real.  ``guest`` is the VM with the payload."""

    RUNG = "L4 real KVM"
    guest: PayloadVm
    bus: _MmioBus | _PciBus
    loop: _KvmLoop

    def _take_over(self, kvm: Any, vcpus: int) -> None:
        notes = self.notes
        notes.append("driver: its Python fills guest memory; each register access, doorbell and wait is done by the payload on the vCPU")
        if kvm.kick == "mmio-exit":
            notes.append("kick: the vCPU's thread serves the exit by writing an eventfd; the device's own thread serves the queue")
        how = {"intx": "sets the line with KVM_IRQ_LINE", "msi": "sends the vector's message with KVM_SIGNAL_MSI"}.get(kvm.call)
        if how:
            notes.append(f"call: the device writes an eventfd, and a main loop's thread {how}")
        if isinstance(self.recipe.transport, Pci):
            notes.append(
                "interrupt: the payload's handler counts it, and on the line reads the ISR status; the driver is told by the payload"
            )
        else:
            notes.append(
                "interrupt: the payload's handler reads InterruptStatus and writes InterruptACK, each an exit; "
                "the driver reads the causes from the payload. InterruptStatus lies in memory shared with the device"
            )
        notes.append("registers: exits are answered over a socket by the device's half")
        if vcpus > 1:
            notes.append(f"vCPUs: the tasks of {vcpus} vCPUs share one; it takes an interrupt when they wait")
        if kvm_host.emulates():
            notes.append("KVM: this host's emulates ring 0, so every instruction of the payload costs about a microsecond")
        notes += not_simulated(self.recipe)
        if self.machine.device == "thread":
            notes.append("threads: kick and call include the hand-over of Python's global lock; use device='process' for wake-up times")

    def _irqfd(self) -> bool:
        return bool(self.recipe.kvm.call == "irqfd")

    def _make_loop(self) -> _KvmLoop:
        return _KvmLoop("guest:epoll_wait", trace=self.machine.trace)

    def _connect(self, mmio: socket.socket, fds: Fds, status: SharedInterruptStatus) -> None:
        self._line = threading.Lock()
        self._line_status = SharedInterruptStatus(self._words.cast("I"))
        self._fds = fds
        pci = isinstance(self.recipe.transport, Pci)
        if pci and len(fds.calls) - 1 > len(MSI_VECTORS):
            raise ConfigError(
                f"{len(fds.calls) - 1} MSI-X vectors on KvmMachine, whose payload takes {len(MSI_VECTORS)}",
                "use fewer queues or Pci(vectors=…)",
            )
        bus = self.bus = _PciBus(mmio, fds.kicks, self._dead) if pci else _MmioBus(mmio, fds.kicks, status, self._dead)
        guest = self.guest = PayloadVm(self.memory.bytes, self._words, bus.serve, stall_s=self.machine.stall_s)
        self._closers.append(guest.close)
        self.loop.guest = bus.guest = guest
        self.loop.rest, self.loop.look = self._rest, self._look
        bus.causes, bus.leaves, bus.note, bus.lower = _Causes(guest.mail), self.recipe.kvm.kick == "mmio-exit", self.loop.note, self._lower
        with guest.vcpu.owned():
            guest.set_up_apic(LINE_EDGE if self._irqfd() else LINE_LEVEL, ISR_VECTOR if pci else LINE_VECTOR)
        if self._irqfd():
            guest.vm.irqfd(fds.calls[0], GSI)
        self._irqs = [self.loop.add("guest irq", interrupts(self.driver.interrupt, bus.causes))]
        if isinstance(bus, _PciBus):
            bus.bells = {}
            self.transport = PciTransport(bus, above_4g=False)
            for vector in range(len(fds.calls) - 1):
                self._irqs.append(self.loop.add(f"guest irq {vector}", messages(partial(self.driver.interrupt, vector))))
        else:
            self.transport = MmioTransport(bus)
            if not bus.leaves:
                for queue, kick in enumerate(fds.kicks):
                    guest.vm.ioeventfd(kick, _BELL, 4, datamatch=queue)
        self._taken = [0] * (len(self._irqs) - 1)
        calls: dict[int, Callable[[], object]] = {}
        if not self._irqfd():
            calls[fds.calls[0]] = _weakly(self._raise_line)
            for number, fd in enumerate(fds.calls[1:]):
                calls[fd] = _weakly(self._send_message, number)
        self._main_loop = _MainLoop(self._control.fileno(), calls, guest.vcpu.kick)
        self._closers.append(self._main_loop.close)

    def _pci_doorbells(self, transport: PciTransport, bus: _PciBus) -> None:
        """Once the driver has found its queues: what each doorbell and each vector of the function is."""
        bus.isr_gpa = self.guest.mail[Mail.ISR_GPA] = transport.isr_gpa
        vm, addresses = self.guest.vm, [gpa for gpa, _ in transport.doorbells.values()]
        for queue, (gpa, value) in transport.doorbells.items():
            if bus.leaves:
                bus.bells[gpa, value] = queue
            else:  # an address of its own needs no look at the value
                vm.ioeventfd(self._fds.kicks[queue], gpa, 2, datamatch=value if addresses.count(gpa) > 1 else None)
        if self._irqfd():
            for vector in range(transport.vectors):
                vm.irqfd(self._fds.calls[1 + vector], FIRST_MSI_GSI + vector)

    # -- interrupts and the idle vCPU --------------------------------------------------------------------------------------------

    def _raise_line(self) -> None:
        """The main loop's thread.  On virtio-mmio the line follows InterruptStatus; virtio-pci's is read in the handler only."""
        with self._line:
            if isinstance(self.bus, _PciBus) or self._line_status.read():
                self.loop.note(_clock(), -1, ("kvm_set_irq", GSI, 1))
                self.guest.vm.irq_line(GSI, True)

    def _lower(self, pending: Callable[[], int]) -> None:
        """The vCPU's thread, after an acknowledge: the same."""
        if not self._irqfd():
            with self._line:
                if not pending():
                    self.guest.vm.irq_line(GSI, False)

    def _send_message(self, number: int) -> None:
        """The main loop's thread.  Message n of the function is the driver's n-th vector, because one vCPU takes them all."""
        self.loop.note(_clock(), -1, ("kvm_msi_set_irq", MSI_ADDRESS, MSI_VECTORS[number]))
        self.guest.vm.signal_msi(MSI_VECTORS[number])

    def _rest(self, timeout_s: float) -> None:
        guest = self.guest
        if guest.interrupted:  # kicked in the middle of an op: look at the socket before idling
            guest.interrupted = False
            return
        self._main_loop.arm(timeout_s)
        if guest.idle(poll=self.machine.idle == "poll"):  # type: ignore[attr-defined]
            now = _clock()
            taken = min(max(self._clock.ns(guest.tsc()), guest.entered_ns), now)
            self.loop.note(taken, -1, ("vcpu:irq_handler_entry", GSI))

    def _look(self) -> None:
        """Notify the contexts of the interrupts that the payload has taken."""
        mail = self.guest.mail
        if mail[Mail.CAUSES]:
            self._irqs[0].notify()
        for number, before in enumerate(self._taken):
            count = mail[Mail.BY_MESSAGE + 5 * number]
            if count != before:
                self._taken[number] = count
                self._irqs[1 + number].notify()

    # -- boot, run, end ----------------------------------------------------------------------------------------------------------

    def _boot(self) -> None:
        with self.guest.vcpu.owned():
            self._clock: GuestClock = self.guest.clock()
            super()._boot()
        if isinstance(self.bus, _PciBus) and isinstance(self.transport, PciTransport):
            self._pci_doorbells(self.transport, self.bus)

    def run(self, *, progress: Callable[[int, int | None], None] | None = None) -> Run:
        """Run to the end; Ctrl-C stops submitting, reaps what is in flight and returns what was measured so far."""
        self._check_open()
        with self.guest.vcpu.owned():
            return super().run(progress=progress)

    def _traced(self) -> Kernel:
        if isinstance(self.bus, _PciBus):
            return Kernel((), frozenset(), gsi=GSI)
        return Kernel((), frozenset(), REGISTERS_GPA, _REGISTERS_END, GSI, line_irqfd=self._irqfd())

    def _clock_error_ns(self) -> int:
        return self._clock.error_ns + abs(self._clock.drift_ns(self.guest.clock()))

    def _finish_device(self) -> None:
        super()._finish_device()
        guest = self.guest
        if isinstance(self.bus, _PciBus):
            self.bus.left = lambda: int(guest.mail[Mail.SEEN] != self._raised())
        self._later = guest.clock()
        self._drift_ns = self._clock.drift_ns(self._later)
        deadline = time.monotonic() + _DRAIN_S
        while guest.take_pending() or guest.mail[Mail.SEEN] != self._raised():  # what was sent after the last I/O was reaped
            if time.monotonic() > deadline:
                break
        self._counters = self._count()

    def _raised(self) -> int:
        words = self._words.cast("I")
        messages_sent = sum(words[SENT_AT + SENT_STRIDE * number] for number in range(len(MSI_VECTORS)))
        return (words[0] + words[1] + messages_sent) & 0xFFFFFFFF

    def _count(self) -> dict[str, int]:
        guest = self.guest
        stats, mail = guest.vcpu.stats(), guest.mail
        kernel = {f"vcpu_{name}": stats[name] for name in ("mmio_exits", "halt_exits", "irq_injections") if name in stats}
        return {
            "doorbell_stores": mail[Mail.RUNG],
            "doorbell_exits": self.bus.doorbell_exits,
            "mmio_exits": guest.vcpu.exits["mmio"],
            "interrupts_sent": self._raised(),
            "interrupts_seen": mail[Mail.SEEN],
            "interrupts_taken": mail[Mail.TAKEN],
            "interrupts_coalesced": mail[Mail.COALESCED],
            "interrupts_spurious": mail[Mail.SPURIOUS],
            **kernel,
        }

    def _thread_names(self) -> dict[int, str]:
        return super()._thread_names() | {self._main_loop.native_id: "main loop"}

    def _more_counters(self) -> dict[str, int]:
        return self._counters

    def _idles(self) -> str:
        return f"idles by {self.machine.idle}"  # type: ignore[attr-defined]

    def _title(self) -> str:
        kvm = self.recipe.kvm
        return f"KvmMachine (real KVM) · {kvm.kick} + {kvm.call}"

    def _peers(self) -> dict[str, str]:
        clock = self._clock
        return {
            "kvm": kvm_host.flavour() + (", which emulates ring 0" if kvm_host.emulates() else ""),
            "vCPU": f"one, payload in 32-bit mode, {self._idles()}",
            "interrupt delivery": "by the processor (APICv or AVIC): vcpu_irq_injections is no count of them"
            if kvm_host.apicv()
            else "injected by KVM: vcpu_irq_injections = taken + spurious, and one more for each entry that was cancelled",
            "guest clock": f"TSC of {clock.khz} kHz joined to CLOCK_MONOTONIC within {clock.error_ns / 1e3:.1f} µs "
            f"at boot, {self._drift_ns / 1e3:+.1f} µs off at the end",
        }
