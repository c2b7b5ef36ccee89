"""A vCPU: KVM_RUN until something is asked of user space.

``run()`` may be called from any one thread at a time; that thread is the vCPU's while it runs.  Another thread ends a run with
``kick()``: the kick is a signal that only KVM_RUN lets through, so one that comes a moment too early is not lost.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import mmap
from typing import NamedTuple

from ..errors import KvmError, KvmExit, VblkError
from . import ioctl as abi
from .ioctl import Exit, Ioctl, ioctl

__all__ = ["Interrupted", "IoExit", "MmioExit", "Vcpu"]

KICK = signal.SIGURG
"""Ignored wherever it is not blocked, so that a kick that nobody waits for does nothing."""
_MMIO, _IO, _INTR = int(Exit.MMIO), int(Exit.IO), int(Exit.INTR)
_REASON = struct.Struct("<I")
_MMIO_FIELDS = struct.Struct("<Q8sIB")
_IO_FIELDS = struct.Struct("<BBHIQ")
_REASON_AT, _UNION_AT = abi.kvm_run.exit_reason.offset, abi.kvm_run.exit.offset
_DATA_AT = _UNION_AT + 8
_SHOWN = ("rip", "rsp", "rflags", "rax", "rbx", "rcx", "rdx", "rsi", "rdi")


class MmioExit(NamedTuple):
    """KVM_EXIT_MMIO: a load or store where there is no memory.  A load is answered by ``Vcpu.answer`` before the next run."""

    addr: int
    size: int
    write: bool
    value: int


class IoExit(NamedTuple):
    """KVM_EXIT_IO: an ``in`` or ``out``."""

    port: int
    size: int
    write: bool
    value: int


class Interrupted(NamedTuple):
    """The run was ended by a kick or by another signal; nothing is asked."""


_INTERRUPTED = Interrupted()


class Vcpu:
    """Made by ``Vm.vcpu()``.  ``exits`` counts what came to user space by kind: mmio, io, interrupted."""

    def __init__(self, fd: int, run_bytes: int, read_memory: Callable[[int, int], bytes]) -> None:
        self.fd = fd
        self._read_memory = read_memory
        self._page = mmap(fd, run_bytes)
        self.shared = memoryview(self._page)
        self.exits = {"mmio": 0, "io": 0, "interrupted": 0}
        self._owner: int | None = None
        self._lock = threading.Lock()
        self._stats: tuple[int, dict[str, int]] | None = None

    def close(self) -> None:
        """Give the vCPU back; raises VblkError while another thread runs it."""
        if self._owner not in (None, threading.get_ident()):
            raise VblkError("another thread still runs this vCPU", "kick() it and join the thread first")
        if self._stats is not None:
            os.close(self._stats[0])
            self._stats = None
        if self.fd >= 0:
            self.shared.release()
            self._page.close()
            os.close(self.fd)
            self.fd = -1

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Inside, this thread runs the vCPU and may be kicked.  Its signal mask is restored at the end."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {KICK})
        let_in = abi.kvm_signal_mask(8, _sigset(before - {KICK}))
        try:
            ioctl(self.fd, Ioctl.SET_SIGNAL_MASK, let_in)
            with self._lock:
                self._owner = threading.get_ident()
            yield
        finally:
            with self._lock:
                self._owner = None
            _drain()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def kick(self) -> None:
        """From another thread: end the run under way, or else the next one.  Without an owner it does nothing."""
        with self._lock:
            if self._owner is not None:
                signal.pthread_kill(self._owner, KICK)

    def run(self) -> MmioExit | IoExit | Interrupted:
        """Until user space is asked; raises KvmExit for everything that nobody can serve (a triple fault, an unknown exit)."""
        shared = self.shared
        try:
            ioctl(self.fd, _RUN)
        except KvmError as error:
            if error.errno != _EINTR:
                raise
            _drain()
            self.exits["interrupted"] += 1
            return _INTERRUPTED
        reason = _REASON.unpack_from(shared, _REASON_AT)[0]
        if reason == _MMIO:
            self.exits["mmio"] += 1
            addr, data, size, write = _MMIO_FIELDS.unpack_from(shared, _UNION_AT)
            return MmioExit(addr, size, bool(write), int.from_bytes(data[:size], "little") if write else 0)
        if reason == _IO:
            self.exits["io"] += 1
            out, size, port, _, at = _IO_FIELDS.unpack_from(shared, _UNION_AT)
            return IoExit(port, size, bool(out), int.from_bytes(shared[at : at + size], "little") if out else 0)
        if reason == _INTR:
            self.exits["interrupted"] += 1
            return _INTERRUPTED
        raise self.stopped(self._reason(reason))

    def answer(self, value: int) -> None:
        """What the load of the last MmioExit reads."""
        self.shared[_DATA_AT : _DATA_AT + 8] = value.to_bytes(8, "little")

    # -- state -----------------------------------------------------------------------------------------------------------------

    def registers(self) -> dict[str, int]:
        """The general registers by name."""
        regs = abi.kvm_regs()
        ioctl(self.fd, Ioctl.GET_REGS, regs)
        return {field[0]: getattr(regs, field[0]) for field in abi.kvm_regs._fields_}

    def start_at(self, rip: int, rsp: int, *, gdt: tuple[int, int], idt: tuple[int, int], code: int = 8, data: int = 16) -> None:
        """Stand in flat 32-bit protected mode at ``rip`` with interrupts off.

        ``gdt`` and ``idt`` are (gpa, bytes) of tables in guest memory, ``code`` and ``data`` selectors in the gdt.
        """
        sregs = abi.kvm_sregs()
        ioctl(self.fd, Ioctl.GET_SREGS, sregs)
        flat = dict(base=0, limit=0xFFFFFFFF, present=1, dpl=0, db=1, s=1, l=0, g=1)
        sregs.cs = abi.kvm_segment(selector=code, type=0b1011, **flat)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, abi.kvm_segment(selector=data, type=0b0011, **flat))
        sregs.gdt.base, sregs.gdt.limit = gdt[0], gdt[1] - 1
        sregs.idt.base, sregs.idt.limit = idt[0], idt[1] - 1
        sregs.cr0 |= 1  # PE
        ioctl(self.fd, Ioctl.SET_SREGS, sregs)
        ioctl(self.fd, Ioctl.SET_REGS, abi.kvm_regs(rip=rip, rsp=rsp, rflags=2))

    def leave_hlt(self) -> None:
        """A vCPU that was kicked out of ``hlt`` goes on behind it at the next run."""
        ioctl(self.fd, Ioctl.SET_MP_STATE, abi.kvm_mp_state(abi.MP_STATE_RUNNABLE))

    def tsc_khz(self) -> int:
        """The rate of the guest's time stamp counter."""
        return ioctl(self.fd, Ioctl.GET_TSC_KHZ)

    def stats(self) -> dict[str, int]:
        """The kernel's own counters of this vCPU, such as ``mmio_exits``, ``halt_exits``, ``irq_injections``; {} before Linux 5.14."""
        if self._stats is None:
            try:
                fd = ioctl(self.fd, Ioctl.GET_STATS_FD)
            except KvmError:
                return {}
            self._stats = fd, _stat_places(fd)
        fd, places = self._stats
        return {name: int.from_bytes(os.pread(fd, 8, at), "little") for name, at in places.items()}

    def stopped(self, words: str) -> KvmExit:
        """The error that says where and why (``words``) the vCPU stands."""
        registers = self.registers()
        return KvmExit(words, {name: registers[name] for name in _SHOWN}, self._read_memory(registers["rip"], 16))

    def _reason(self, reason: int) -> str:
        if reason not in Exit._value2member_map_:
            return f"exit {reason}, which is not known here"
        name = Exit(reason).name
        words = {"SHUTDOWN": "KVM_EXIT_SHUTDOWN (a triple fault)"}.get(name, f"KVM_EXIT_{name}")
        if reason == Exit.INTERNAL_ERROR:
            words += f" (suberror {_REASON.unpack_from(self.shared, _UNION_AT)[0]}: 1 is an instruction that KVM cannot emulate)"
        elif reason == Exit.FAIL_ENTRY:
            words += f" (hardware reason {struct.unpack_from('<Q', self.shared, _UNION_AT)[0]:#x})"
        return words


_RUN = Ioctl.RUN
_EINTR = 4


def _drain() -> None:
    """Take the kicks that are pending, so that they do not end the next run."""
    while signal.sigtimedwait((KICK,), 0) is not None:
        pass


def _sigset(signals: set[int | signal.Signals]) -> ctypes.Array[ctypes.c_uint8]:
    bits = sum(1 << (number - 1) for number in signals)
    return (ctypes.c_uint8 * 8)(*bits.to_bytes(8, "little"))


def _stat_places(fd: int) -> dict[str, int]:
    """Name → file offset of every counter with one 64-bit value."""
    head = abi.kvm_stats_header.from_buffer_copy(os.pread(fd, ctypes.sizeof(abi.kvm_stats_header), 0))
    size = ctypes.sizeof(abi.kvm_stats_desc) + head.name_size
    places = {}
    for number in range(head.num_desc):
        data = os.pread(fd, size, head.desc_offset + number * size)
        desc = abi.kvm_stats_desc.from_buffer_copy(data)
        if desc.size == 1:
            name = data[ctypes.sizeof(abi.kvm_stats_desc) :].split(b"\0", 1)[0].decode("ascii", "replace")
            places[name] = head.data_offset + desc.offset
    return places
