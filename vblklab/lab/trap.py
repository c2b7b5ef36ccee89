"""A virtual machine to take apart in a notebook: one vCPU, a payload that loads or stores what it is told, and nothing at the registers.

Where there is no KVM a model of the payload plays the same exits, from its listing; ``real`` says which.
"""

from __future__ import annotations

import gzip
import json
import os
import struct
import time
from mmap import mmap
from typing import Any, Protocol

from .._data import DATA
from ..errors import ConfigError, NotHere
from ..kvm import host
from ..kvm.guest import PayloadVm
from ..kvm.ioctl import Exit, kvm_run
from ..kvm.payload import APIC_GPA, BASE, MAILBOX_GPA, PORT_DONE, REGISTERS_GPA, STACK_TOP, WORDS_GPA, Mail, Op, offset_of
from ..kvm.vcpu import Interrupted, IoExit, MmioExit
from .trap_exit import PAGE_BYTES, TrapExit, instructions

__all__ = ["Trap"]

RECORDING = "recorded/trap_rings.json.gz"
_LOADS = {1: Op.LOAD1, 2: Op.LOAD2, 4: Op.LOAD4}
_STORES = {1: Op.STORE1, 2: Op.STORE2, 4: Op.STORE4}
_PAGE = 4096


class _Machine(Protocol):
    """What a Trap drives: the real virtual machine, or the model of it."""

    def ask(self, op: Op, addr: int, value: int) -> None: ...

    def run(self) -> TrapExit: ...

    def answer(self, value: int) -> None: ...

    def hook(self, eventfd: int, addr: int, size: int, datamatch: int | None) -> None: ...

    def ring(self, times: int) -> list[int]: ...

    def close(self) -> None: ...


class Trap:
    """``store`` and ``load`` tell the payload what to do, ``run`` lets the vCPU go until it leaves the guest.

    Registers are offsets from 0 to 0xfff, as those of virtio-mmio: 0x50 is the doorbell.  At first nothing is there, so every access
    leaves to user space: to you.  A new ``store`` or ``load`` first lets the payload end the one before.  ``close()`` ends the machine;
    so does the next Trap.
    """

    _open: Trap | None = None
    _said = ""

    def __init__(self) -> None:
        if Trap._open is not None:
            Trap._open.close()
        works, why, gain = host.found()
        self.real = works
        self.provenance = f"KVM: {host.flavour()}{', which emulates ring 0' if host.emulates() else ''}"
        if not works:
            self.provenance = "simulated: a model of the payload"
            missing = str(NotHere(why, gain))
            if Trap._said != missing:
                Trap._said = missing
                print(f"{missing}\nA model of the payload plays the exits.")
        self._vm: _Machine = _Real() if works else _Model()
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        Trap._open = self

    def __repr__(self) -> str:
        return f"<a virtual machine with one vCPU; {self.provenance}>"

    def close(self) -> None:
        """Give everything back."""
        if Trap._open is self:
            Trap._open = None
        if self._eventfd >= 0:
            self._vm.close()
            os.close(self._eventfd)
            self._eventfd = -1

    def store(self, register: int, value: int, size: int = 4) -> None:
        """Let the payload's next instructions store ``value``, of ``size`` bytes (1, 2 or 4), to a register."""
        _check(register, size)
        if not isinstance(value, int) or not 0 <= value < 1 << 8 * size:
            raise ConfigError(f"a store of {value!r} with {size} bytes", f"give 0 to {(1 << 8 * size) - 1:#x}")
        self._vm.ask(_STORES[size], REGISTERS_GPA + register, value)

    def load(self, register: int, size: int = 4) -> None:
        """Let the payload's next instructions load from a register."""
        _check(register, size)
        self._vm.ask(_LOADS[size], REGISTERS_GPA + register, 0)

    def run(self) -> TrapExit:
        """``ioctl(vcpu, KVM_RUN)``: go on until the vCPU leaves the guest for user space.

        When the payload has done what it was told it leaves by an ``out``; run once more, and it does the same again.
        """
        return self._vm.run()

    def answer(self, value: int) -> None:
        """Write what a load reads into the page, for the next ``run``."""
        if not isinstance(value, int) or not 0 <= value < 1 << 64:
            raise ConfigError(f"answer({value!r})", "give a whole number of at most 64 bits")
        self._vm.answer(value)

    def ioeventfd(self, register: int, datamatch: int | None = None, size: int = 4) -> None:
        """Let the kernel answer a store to this register, if its value is ``datamatch`` (None: any), by counting an eventfd up."""
        _check(register, size)
        self._vm.hook(self._eventfd, REGISTERS_GPA + register, size, datamatch)

    def kicks(self) -> int:
        """How often the eventfd was signalled since the last time; 0 if not."""
        try:
            return os.eventfd_read(self._eventfd)
        except BlockingIOError:
            return 0

    def ring(self, times: int, register: int = 0x50, value: int = 0) -> list[int]:
        """Store so often, and take the time of each in ns, from KVM_RUN to the payload's "done".

        It holds, besides the store's own way, the payload's other instructions, its ``out`` and this loop's Python, which are the same
        whoever answers.  Without KVM the times are recorded ones, at most as many as there are; ``provenance`` says where from.
        """
        self.store(register, value)
        took = self._vm.ring(times)
        if isinstance(self._vm, _Model):
            self.provenance = f"recorded: {_recorded()['provenance']}"
        return took


def _check(register: int, size: int) -> None:
    if size not in _LOADS:
        raise ConfigError(f"an access of {size!r} bytes", "choose 1, 2 or 4")
    if not isinstance(register, int) or not 0 <= register <= 0x1000 - size:
        raise ConfigError(f"register {register!r}", "give an offset from 0 to 0xfff; QueueNotify is 0x50")


class _Real:
    """The payload on a real vCPU."""

    def __init__(self) -> None:
        self._memory, self._words = memoryview(mmap(-1, 1 << 20)), memoryview(mmap(-1, _PAGE))
        self._guest = PayloadVm(self._memory, self._words, _nobody)
        self._trapped = False

    def close(self) -> None:
        self._guest.close()

    def ask(self, op: Op, addr: int, value: int) -> None:
        while self._trapped:  # the payload first ends what it was told before
            self.run()
        mail = self._guest.mail
        mail[Mail.ADDR], mail[Mail.VALUE], mail[Mail.TELL], mail[Mail.OP] = addr, value, 1, op

    def run(self) -> TrapExit:
        vcpu = self._guest.vcpu
        while isinstance(exit_ := vcpu.run(), Interrupted):
            pass
        self._trapped = isinstance(exit_, MmioExit)
        return TrapExit(bytes(vcpu.shared[:PAGE_BYTES]), vcpu.registers(), exit_.value)

    def answer(self, value: int) -> None:
        self._guest.vcpu.answer(value)

    def hook(self, eventfd: int, addr: int, size: int, datamatch: int | None) -> None:
        self._guest.vm.ioeventfd(eventfd, addr, size, datamatch=datamatch)

    def ring(self, times: int) -> list[int]:
        run, clock, took = self._guest.vcpu.run, time.perf_counter_ns, []
        for _ in range(times):
            begin = clock()
            while run().__class__ is not IoExit:
                pass
            took.append(clock() - begin)
        return took


def _nobody(exit_: MmioExit) -> int:
    return 0


def _recorded() -> dict[str, Any]:
    """What bench/record_rings.py wrote: provenance, and the times by who answers."""
    kept: dict[str, Any] = json.loads(gzip.decompress((DATA / RECORDING).read_bytes()))
    return kept


class _Model:
    """What the listing says that the payload does with one op, exit by exit."""

    def __init__(self) -> None:
        self._op, self._addr, self._value = Op.LOAD4, REGISTERS_GPA, 0
        self._trapped = False
        self._page = bytearray(PAGE_BYTES)
        self._hooks: list[tuple[int, int, int, int | None]] = []
        self._lines = [line[0] for line in instructions()]

    def close(self) -> None:
        pass

    def ask(self, op: Op, addr: int, value: int) -> None:
        self._op, self._addr, self._value = op, addr, value
        self._trapped = False

    def answer(self, value: int) -> None:
        at = kvm_run.exit.offset + 8
        self._page[at : at + 8] = value.to_bytes(8, "little")

    def hook(self, eventfd: int, addr: int, size: int, datamatch: int | None) -> None:
        self._hooks.append((eventfd, addr, size, datamatch))

    def run(self) -> TrapExit:
        store = self._op in _STORES.values()
        size = next(size for size, op in (_STORES if store else _LOADS).items() if op == self._op)
        hooked = self._hooked(size) if store else None
        if not self._trapped and hooked is None:
            self._trapped = True
            return self._mmio(store, size)
        if hooked is not None:
            os.eventfd_write(hooked, 1)
        answered = int.from_bytes(self._page[kvm_run.exit.offset + 8 :][:size], "little")
        self._trapped = False
        return self._done(self._value if store else answered)

    def ring(self, times: int) -> list[int]:
        hooked = self._hooked(4)
        took: list[int] = _recorded()["exit" if hooked is None else "ioeventfd"][:times]
        if hooked is not None:
            os.eventfd_write(hooked, len(took))
        return took

    def _hooked(self, size: int) -> int | None:
        """The eventfd that takes the store, if there is one."""
        for eventfd, addr, wide, match in self._hooks:
            if (addr, wide) == (self._addr, size) and match in (None, self._value):
                return eventfd
        return None

    def _mmio(self, store: bool, size: int) -> TrapExit:
        data = self._value.to_bytes(8, "little") if store else bytes(8)
        self._fill(Exit.MMIO, struct.pack("<Q8sIB", self._addr, data, size, store))
        start = self._lines.index(BASE + offset_of(self._op.name.lower()))
        # KVM has finished a store when it leaves: rip is behind it.  A load waits for its value.
        return self._exit(self._lines[start + 2 * store], self._value if store else int(self._op), self._value)

    def _done(self, eax: int) -> TrapExit:
        self._fill(Exit.IO, struct.pack("<BBHIQ", 1, 1, PORT_DONE, 1, _PAGE))
        return self._exit(self._lines[self._lines.index(BASE + offset_of("tell")) + 1], eax, eax & 0xFF)

    def _fill(self, reason: Exit, union: bytes) -> None:
        at = kvm_run.exit_reason.offset
        self._page[at : at + 4] = int(reason).to_bytes(4, "little")
        at = kvm_run.exit.offset
        self._page[at : at + len(union)] = union

    def _exit(self, rip: int, eax: int, value: int) -> TrapExit:
        registers = {"rip": rip, "rax": eax, "rcx": self._addr, "rdx": 0, "rbx": MAILBOX_GPA, "rsi": REGISTERS_GPA, "rdi": WORDS_GPA}
        registers |= {"rbp": APIC_GPA, "rsp": STACK_TOP, "rflags": 2}
        return TrapExit(bytes(self._page), registers, value)
