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
from collections.abc import Callable
from typing import Any

from ..errors import ConfigError, NotHere
from ..kvm import check_wire
from ..kvm import host as kvm_host
from ..kvm.guest import GSI, LINE_EDGE, LINE_LEVEL, GuestClock, PayloadVm
from ..kvm.payload import REGISTERS_GPA, Mail
from ..kvm.vcpu import MmioExit
from ..spec.virtio_mmio import Reg
from ..trace.run import Run
from ..transport import InterruptStatus, MmioTransport, Pci
from .base import Recipe, not_simulated
from .live import LiveMachine, LiveVm, live_missing
from .live_bus import LiveBus, SharedInterruptStatus, Steps, interrupts
from .live_device import Fds
from .loop import LiveLoop

__all__ = ["KvmMachine", "KvmVm"]

_NOTIFY, _STATUS, _ACK = int(Reg.QUEUE_NOTIFY), int(Reg.INTERRUPT_STATUS), int(Reg.INTERRUPT_ACK)
_BELL = REGISTERS_GPA + _NOTIFY
_REGISTERS_END = REGISTERS_GPA + 0x1000
_LONGEST_S = 0.25
_DRAIN_S = 2.0
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
        return f"KvmMachine(device={self.device!r}{more})"

    def boot(self, recipe: Recipe) -> KvmVm:
        """Make the VM, start the device's half, let the driver probe it through the vCPU, and stand before the first I/O."""
        missing = live_missing()
        if missing:
            raise NotHere(missing)
        if isinstance(recipe.transport, Pci):
            raise ConfigError("transport=Pci on KvmMachine", "use transport=vb.Mmio(); virtio-pci runs on SimMachine and LiveMachine")
        check_wire(recipe.kvm, recipe.transport)
        works, why, gain = kvm_host.found()
        if not works:
            raise NotHere(why, f"{gain}; SimMachine (L0) and LiveMachine (L2) work without it")
        return KvmVm(self, recipe)


class _Causes(InterruptStatus):
    """The causes that the payload's handler has read and acknowledged, and the driver has not yet looked at."""

    def __init__(self, mail: memoryview) -> None:
        self._mail = mail

    def read(self) -> int:
        return int(self._mail[Mail.CAUSES])

    def ack(self, bits: int) -> None:
        self._mail[Mail.CAUSES] &= ~bits & 0xFFFFFFFF


class _VcpuBus(LiveBus):
    """The driver's accesses as the payload's loads and stores.  ``serve`` is the other side of the exits that they cause."""

    def __init__(
        self,
        sock: socket.socket,
        kicks: tuple[int, ...],
        status: SharedInterruptStatus,
        dead: Callable[[], Any],
        *,
        leaves: bool,
        note: Callable[[int, int, Any], None],
        lower: Callable[[SharedInterruptStatus], None],
    ) -> None:
        super().__init__(sock, kicks, status, dead)
        self.guest: PayloadVm
        self.causes: InterruptStatus
        self.doorbell_exits = 0
        self._leaves = leaves
        self._note = note
        self._lower = lower

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

    def notify(self, queue: int) -> Steps:
        yield ("vm_notify", queue)
        self.guest.ring(_BELL, queue, leaves=self._leaves)

    def serve(self, exit_: MmioExit) -> int:
        """Do what an exit asks, in the vCPU's thread."""
        addr = exit_.addr
        if addr == _BELL:
            self._note(_clock(), -1, ("kvm_userspace_exit", _NOTIFY))
            self.doorbell_exits += 1
            if exit_.value < len(self._kicks):
                os.eventfd_write(self._kicks[exit_.value], 1)
            return 0
        offset = addr - REGISTERS_GPA
        if not REGISTERS_GPA <= addr < _REGISTERS_END:
            raise self.guest.vcpu.stopped(f"KVM_EXIT_MMIO at {addr:#x}, where nothing is")
        if offset == _STATUS:
            pending = self._status.read()
            if not pending:
                self._lower(self._status)
            return pending
        if offset == _ACK:
            self._status.ack(exit_.value)
            self._lower(self._status)
            return 0
        return self._access(int(exit_.write), offset, exit_.value, exit_.size)


class _KvmLoop(LiveLoop):
    """The vCPU's thread: it sleeps in the guest, until an interrupt or until it is kicked."""

    guest: PayloadVm
    rest: Callable[[float], None]

    def _sleep(self, timeout_s: float) -> list[tuple[int, int]]:
        if timeout_s > 0:
            self.rest(timeout_s)
        else:
            self.guest.take_pending()  # a guest that never idles takes interrupts too
            self.guest.interrupted = False
        return super()._sleep(0)


class _MainLoop:
    """A thread beside the vCPU's: it sets the line, and kicks the vCPU when a socket or a deadline wants its thread."""

    def __init__(self, control: int, call: int | None, raise_line: Callable[[], None], kick: Callable[[], None]) -> None:
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._control, self._call = control, call
        self._raise_line, self._kick = raise_line, kick
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._epoll.register(control, select.EPOLLIN | select.EPOLLONESHOT)
        if call is not None:
            self._epoll.register(call, select.EPOLLIN)
        self._deadline = 0.0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="vblklab main loop", daemon=True)
        self._thread.start()

    def arm(self, timeout_s: float) -> None:
        """Before the vCPU idles: kick it after this time at the latest, or when the control socket is readable."""
        self._deadline = time.monotonic() + timeout_s
        self._epoll.modify(self._control, select.EPOLLIN | select.EPOLLONESHOT)
        if timeout_s < _LONGEST_S:
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        self._stopping = True
        os.eventfd_write(self._wake, 1)
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
                    if fd == self._call:
                        self._raise_line()
            if self._deadline and time.monotonic() >= self._deadline:
                self._deadline = 0.0
                self._kick()


class KvmVm(LiveVm):
    """A booted recipe of which the vCPU is real.  ``guest`` is the VM with the payload."""

    RUNG = "L4 real KVM"
    guest: PayloadVm
    bus: _VcpuBus
    loop: _KvmLoop

    def _take_over(self, kvm: Any, vcpus: int) -> None:
        notes = self.notes
        notes.append("driver: its Python fills guest memory; each register access, doorbell and wait is done by the payload on the vCPU")
        if kvm.kick == "mmio-exit":
            notes.append("kick: the vCPU's thread serves the exit by writing an eventfd; the device's own thread serves the queue")
        if kvm.call == "intx":
            notes.append("call: the device writes an eventfd, and a main loop's thread sets the line with KVM_IRQ_LINE")
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
        leaves = self.recipe.kvm.kick == "mmio-exit"
        bus = self.bus = _VcpuBus(mmio, fds.kicks, status, self._dead, leaves=leaves, note=self.loop.note, lower=self._lower)
        guest = self.guest = PayloadVm(self.memory.bytes, self._words, bus.serve, stall_s=self.machine.stall_s)
        self._closers.append(guest.close)
        self.loop.guest = bus.guest = guest
        self.loop.rest = self._rest
        bus.causes = _Causes(guest.mail)
        with guest.vcpu.owned():
            guest.set_up_apic(LINE_EDGE if self._irqfd() else LINE_LEVEL)
        if self._irqfd():
            guest.vm.irqfd(fds.calls[0], GSI)
        if not leaves:
            for queue, kick in enumerate(fds.kicks):
                guest.vm.ioeventfd(kick, _BELL, 4, datamatch=queue)
        self._main_loop = _MainLoop(self._control.fileno(), None if self._irqfd() else fds.calls[0], self._raise_line, guest.vcpu.kick)
        self._closers.append(self._main_loop.close)
        self.transport = MmioTransport(bus)
        self._irq = self.loop.add("guest irq", interrupts(self.driver.interrupt, bus.causes))

    # -- the line and the idle vCPU ----------------------------------------------------------------------------------------------

    def _raise_line(self) -> None:
        """The main loop's thread: the line follows InterruptStatus."""
        with self._line:
            if self._line_status.read():
                self.loop.note(_clock(), -1, ("kvm_set_irq", GSI, 1))
                self.guest.vm.irq_line(GSI, True)

    def _lower(self, status: SharedInterruptStatus) -> None:
        """The vCPU's thread, after an acknowledge: the same."""
        if not self._irqfd():
            with self._line:
                if not status.read():
                    self.guest.vm.irq_line(GSI, False)

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
        if guest.mail[Mail.CAUSES]:
            self._irq.notify()

    # -- boot, run, end ----------------------------------------------------------------------------------------------------------

    def _boot(self) -> None:
        with self.guest.vcpu.owned():
            self._clock: GuestClock = self.guest.clock()
            super()._boot()

    def run(self, *, progress: Callable[[int, int | None], None] | None = None) -> Run:
        """Run to the end; Ctrl-C stops submitting, reaps what is in flight and returns what was measured so far."""
        self._check_open()
        with self.guest.vcpu.owned():
            return super().run(progress=progress)

    def _finish_device(self) -> None:
        super()._finish_device()
        guest = self.guest
        self._drift_ns = self._clock.drift_ns(guest.clock())
        deadline = time.monotonic() + _DRAIN_S
        while guest.mail[Mail.SEEN] != self._raised() and time.monotonic() < deadline:
            guest.take_pending()  # what was sent after the last I/O was reaped
        self._counters = self._count()

    def _raised(self) -> int:
        words = self._words.cast("I")
        return (words[0] + words[1]) & 0xFFFFFFFF

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

    def _more_counters(self) -> dict[str, int]:
        return self._counters

    def _title(self) -> str:
        kvm = self.recipe.kvm
        return f"KvmMachine (real KVM) · {kvm.kick} + {kvm.call}"

    def _peers(self) -> dict[str, str]:
        clock = self._clock
        return {
            "kvm": kvm_host.flavour() + (", which emulates ring 0" if kvm_host.emulates() else ""),
            "vCPU": f"one, payload in 32-bit mode, idles by {self.machine.idle}",  # type: ignore[attr-defined]
            "guest clock": f"TSC of {clock.khz} kHz joined to CLOCK_MONOTONIC within {clock.error_ns / 1e3:.1f} µs "
            f"at boot, {self._drift_ns / 1e3:+.1f} µs off at the end",
        }
