"""A VM whose one vCPU runs the payload: ``load``, ``store``, ``ring`` and ``idle`` are done by its machine code.

The thread that calls is the vCPU's thread: it enters the guest to do one thing and leaves when that is done.  Whatever the
payload does is served by ``serve(exit)``: a load's answer is what it returns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from mmap import mmap

from ..errors import ConfigError, Stalled
from . import payload
from .payload import MEMORY_MOST, PORT_DONE, PORT_IRQ, Mail, Op
from .vcpu import Interrupted, IoExit, MmioExit
from .vm import Line, Msi, Vm

__all__ = ["FIRST_MSI_GSI", "GSI", "LINE_EDGE", "LINE_LEVEL", "GuestClock", "PayloadVm"]

GSI = 5
LINE_EDGE, LINE_LEVEL = 0, 1 << 15
FIRST_MSI_GSI = 24  # behind the I/O APIC's pins
_LOAD = {1: Op.LOAD1, 2: Op.LOAD2, 4: Op.LOAD4}
_STORE = {1: Op.STORE1, 2: Op.STORE2, 4: Op.STORE4}
_OP, _ADDR, _VALUE, _TELL = (int(word) for word in (Mail.OP, Mail.ADDR, Mail.VALUE, Mail.TELL))
_RING = {2: int(Op.RING2), 4: int(Op.RING4)}
_clock = time.perf_counter_ns


class PayloadVm:
    """``memory`` becomes guest memory from address 0, ``words`` the page with the device's counts of causes raised.

    ``stall_s`` is how long one op may take.  Use it inside ``vcpu.owned()``; ``close()`` gives everything back.
    """

    def __init__(self, memory: memoryview, words: memoryview, serve: Callable[[MmioExit], int], *, stall_s: float = 20.0) -> None:
        if len(memory) > MEMORY_MOST:
            raise ConfigError(
                f"{len(memory) >> 20} MiB of guest memory on KvmMachine, whose 32-bit payload reaches {MEMORY_MOST >> 20}",
                "lower iodepth, numjobs, the block size, the number or size of queues, or seg_max",
            )
        self.serve = serve
        self.interrupted = False
        self.entered_ns = 0
        self._stall_s = stall_s
        self._halted = False
        self.vm = Vm()
        try:
            self._slot = mmap(-1, payload.SLOT_BYTES)
            self._view = memoryview(self._slot)
            self._view[:] = payload.image()
            self.mail = self._view[payload.MAILBOX_AT :].cast("I")
            self.vm.map_memory(0, memory)
            self.vm.map_memory(payload.BASE, self._view)
            self.vm.map_memory(payload.WORDS_GPA, words)
            self.vcpu = self.vm.vcpu()
            self.restart()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """The VM with its vCPU; what it was given stays open."""
        self.vm.close()

    def restart(self) -> None:
        """Let the vCPU stand at the payload's first instruction: at first, and after another payload has run."""
        gdt, idt = (payload.GDT_GPA, payload.GDT_BYTES), (payload.IDT_GPA, payload.IDT_BYTES)
        self.vcpu.start_at(payload.BASE, payload.STACK_TOP, gdt=gdt, idt=idt)

    # -- what the payload does -------------------------------------------------------------------------------------------------

    def load(self, addr: int, size: int = 4) -> int:
        """A load by the vCPU: what arrived in its register."""
        self._do(_LOAD[size], addr)
        return self.mail[Mail.RESULT]

    def store(self, addr: int, value: int, size: int = 4) -> None:
        """A store by the vCPU."""
        self._do(_STORE[size], addr, value)

    def ring(self, addr: int, value: int, size: int = 4, *, leaves: bool) -> None:
        """The doorbell.  ``leaves``: it comes to user space; else an ioeventfd answers it, and the payload says that it went on."""
        if not leaves:
            self._do(_RING[size], addr, value)
            return
        self._ask(_RING[size], addr, value, 0)
        while True:
            exit_ = self._run()
            if exit_.__class__ is MmioExit:
                self._serve(exit_)
                if exit_.addr == addr and exit_.write:
                    return

    def take_pending(self) -> bool:
        """Let pending interrupts in; whether one was taken."""
        before = self.mail[Mail.TAKEN]
        self._do(Op.WINDOW)
        return self.mail[Mail.TAKEN] != before

    def idle(self, *, poll: bool = False) -> bool:
        """Until an interrupt was taken, True, or the vCPU was kicked, False: by HLT in the kernel, or by polling in the guest."""
        self._ask(Op.POLL if poll else Op.HLT, 0, 0, 0)
        self.entered_ns = _clock()
        while True:
            exit_ = self.vcpu.run()
            if exit_.__class__ is MmioExit:
                self._serve(exit_)
            elif exit_.__class__ is IoExit and exit_.port == PORT_IRQ:
                return True
            elif exit_.__class__ is Interrupted:
                self._halted = True
                return False

    def set_up_apic(self, mode: int, vector: int = payload.LINE_VECTOR) -> None:
        """Switch the APIC on, route the line (LINE_EDGE or LINE_LEVEL) to ``vector``, and the messages: real stores of the payload.

        Message n, for an irqfd on FIRST_MSI_GSI + n, is payload.MSI_VECTORS[n].
        """
        self.store(payload.APIC_GPA + 0xF0, 0x1FF)  # spurious vector 0xff, APIC on
        pin = GSI
        for register, value in ((0x10 + 2 * pin, vector | mode), (0x11 + 2 * pin, 0)):
            self.store(payload.IOAPIC_GPA, register)
            self.store(payload.IOAPIC_GPA + 0x10, value)
        messages = [Msi(FIRST_MSI_GSI + number, message) for number, message in enumerate(payload.MSI_VECTORS)]
        self.vm.route([Line(GSI, pin), *messages])

    def by_message(self) -> list[int]:
        """How often each message was taken."""
        return [self.mail[Mail.BY_MESSAGE + 5 * number] for number in range(len(payload.MSI_VECTORS))]

    def tsc(self) -> int:
        """The time stamp counter when the payload last read it: at ``Op.STAMP``, or at the entry of an interrupt's handler."""
        return self.mail[Mail.TSC] | self.mail[Mail.TSC + 1] << 32

    def clock(self, tries: int = 20) -> GuestClock:
        """Join the guest's time to ``perf_counter_ns``: the narrowest of ``tries`` brackets around an rdtsc of the payload."""
        best = (1 << 62, 0, 0)
        for _ in range(tries):
            before = _clock()
            self._do(Op.STAMP)
            width = _clock() - before
            best = min(best, (width, before + width // 2, self.tsc()))
        return GuestClock(best[1], best[2], self.vcpu.tsc_khz(), best[0] // 2)

    # -- one op ----------------------------------------------------------------------------------------------------------------

    def _ask(self, op: int, addr: int, value: int, tell: int) -> None:
        mail = self.mail
        mail[_ADDR] = addr
        mail[_VALUE] = value
        mail[_TELL] = tell
        mail[_OP] = op
        if self._halted:
            if op != Op.HLT:
                self.vcpu.leave_hlt()
            self._halted = False

    def _do(self, op: int, addr: int = 0, value: int = 0) -> None:
        """Until the payload tells that the op is done."""
        self._ask(op, addr, value, 1)
        deadline = 0.0
        while True:
            exit_ = self._run()
            if exit_.__class__ is IoExit:
                if exit_.port == PORT_DONE:
                    return
            elif exit_.__class__ is MmioExit:
                self._serve(exit_)
            else:
                deadline = deadline or time.monotonic() + self._stall_s
                if time.monotonic() > deadline:
                    raise Stalled(
                        f"the payload does not end {Op(op).name}", "boot the recipe again; the vCPU's registers are in vcpu.registers()"
                    )

    def _run(self) -> MmioExit | IoExit | Interrupted:
        exit_ = self.vcpu.run()
        if exit_.__class__ is Interrupted:
            self.interrupted = True  # whoever kicked wants to be looked after, once this op is done
        return exit_

    def _serve(self, exit_: MmioExit) -> None:
        value = self.serve(exit_)
        if not exit_.write:
            self.vcpu.answer(value)


class GuestClock:
    """The guest's time stamp counter as ``perf_counter_ns``; ``error_ns`` is half the bracket that it was measured in."""

    def __init__(self, at_ns: int, at_tsc: int, khz: int, error_ns: int) -> None:
        self.khz = khz
        self.error_ns = error_ns
        self._at_ns, self._at_tsc = at_ns, at_tsc

    def ns(self, tsc: int) -> int:
        """When the counter read ``tsc``."""
        return self._at_ns + (tsc - self._at_tsc) * 1_000_000 // self.khz

    def bracket(self) -> tuple[int, int, int]:
        """The counter's value, and the host's time in ns shortly before and after it was read."""
        return self._at_tsc, self._at_ns - self.error_ns - 1, self._at_ns + self.error_ns + 1

    def drift_ns(self, later: GuestClock) -> int:
        """How far this clock is off where ``later`` was measured."""
        return self.ns(later._at_tsc) - later._at_ns
