"""KVM's ioctl numbers and structures, as linux/kvm.h declares them for x86-64, and the call itself.

``fcntl.ioctl`` refuses integers of 2**31 and more and copies its buffers; the call goes through ctypes, which lets go of
Python's global lock while KVM_RUN runs.  `tests/kvm/test_kernel_header.py` compares every number, size and offset.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_int16, c_int32, c_uint8, c_uint16, c_uint32, c_uint64
from enum import IntEnum
from typing import Any

from ..errors import KvmError

__all__ = [
    "API_VERSION",
    "CAP_IMMEDIATE_EXIT",
    "CAP_IOEVENTFD_NO_LENGTH",
    "IOEVENTFD_DATAMATCH",
    "IOEVENTFD_DEASSIGN",
    "IOEVENTFD_PIO",
    "IRQFD_DEASSIGN",
    "IRQ_ROUTING_IRQCHIP",
    "IRQ_ROUTING_MSI",
    "MP_STATE_RUNNABLE",
    "STRUCTS",
    "Exit",
    "Ioctl",
    "ioctl",
]


class _Struct(ctypes.Structure):
    """A structure of linux/kvm.h; the class is named as there."""


class kvm_userspace_memory_region(_Struct):
    _fields_ = (
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    )


_GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{number}" for number in range(8, 16)))


class kvm_regs(_Struct):
    _fields_ = tuple((name, c_uint64) for name in (*_GENERAL, "rip", "rflags"))


class kvm_segment(_Struct):
    _fields_ = (
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        *((name, c_uint8) for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable", "padding")),
    )


class kvm_dtable(_Struct):
    _fields_ = (("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3))


class kvm_sregs(_Struct):
    _fields_ = (
        *((name, kvm_segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", kvm_dtable),
        ("idt", kvm_dtable),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", c_uint64 * 4),
    )


class kvm_mp_state(_Struct):
    _fields_ = (("mp_state", c_uint32),)


class kvm_signal_mask(_Struct):
    """The mask's length, then its bytes: eight on Linux."""

    _fields_ = (("len", c_uint32), ("sigset", c_uint8 * 8))


class kvm_irq_level(_Struct):
    _fields_ = (("irq", c_uint32), ("level", c_uint32))


class kvm_irq_routing_irqchip(_Struct):
    _fields_ = (("irqchip", c_uint32), ("pin", c_uint32))


class kvm_irq_routing_msi(_Struct):
    _fields_ = (("address_lo", c_uint32), ("address_hi", c_uint32), ("data", c_uint32), ("pad", c_uint32))


class _Route(ctypes.Union):
    _fields_ = (("irqchip", kvm_irq_routing_irqchip), ("msi", kvm_irq_routing_msi), ("pad", c_uint32 * 8))


class kvm_irq_routing_entry(_Struct):
    _fields_ = (("gsi", c_uint32), ("type", c_uint32), ("flags", c_uint32), ("pad", c_uint32), ("u", _Route))


class kvm_irq_routing(_Struct):
    """The head; the entries follow it."""

    _fields_ = (("nr", c_uint32), ("flags", c_uint32))


class kvm_ioeventfd(_Struct):
    _fields_ = (
        ("datamatch", c_uint64),
        ("addr", c_uint64),
        ("len", c_uint32),
        ("fd", c_int32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    )


class kvm_irqfd(_Struct):
    _fields_ = (("fd", c_uint32), ("gsi", c_uint32), ("flags", c_uint32), ("resamplefd", c_uint32), ("pad", c_uint8 * 16))


class kvm_msi(_Struct):
    _fields_ = (
        ("address_lo", c_uint32),
        ("address_hi", c_uint32),
        ("data", c_uint32),
        ("flags", c_uint32),
        ("devid", c_uint32),
        ("pad", c_uint8 * 12),
    )


class kvm_stats_header(_Struct):
    _fields_ = tuple((name, c_uint32) for name in ("flags", "name_size", "num_desc", "id_offset", "desc_offset", "data_offset"))


class kvm_stats_desc(_Struct):
    """The head; the name follows it."""

    _fields_ = (("flags", c_uint32), ("exponent", c_int16), ("size", c_uint16), ("offset", c_uint32), ("bucket_size", c_uint32))


class _Mmio(_Struct):
    _fields_ = (("phys_addr", c_uint64), ("data", c_uint8 * 8), ("len", c_uint32), ("is_write", c_uint8))


class _Io(_Struct):
    _fields_ = (("direction", c_uint8), ("size", c_uint8), ("port", c_uint16), ("count", c_uint32), ("data_offset", c_uint64))


class _FailEntry(_Struct):
    _fields_ = (("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32))


class _Internal(_Struct):
    _fields_ = (("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16))


class _SystemEvent(_Struct):
    _fields_ = (("type", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16))


class _ExitUnion(ctypes.Union):
    _fields_ = (
        ("mmio", _Mmio),
        ("io", _Io),
        ("fail_entry", _FailEntry),
        ("internal", _Internal),
        ("system_event", _SystemEvent),
        ("padding", c_uint8 * 256),
    )


class kvm_run(_Struct):
    """The page that a vCPU shares with user space; what follows the exit's union is not used here."""

    _anonymous_ = ("exit",)
    _fields_ = (
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("exit", _ExitUnion),
    )


STRUCTS: tuple[type[ctypes.Structure], ...] = (
    kvm_userspace_memory_region,
    kvm_regs,
    kvm_segment,
    kvm_dtable,
    kvm_sregs,
    kvm_mp_state,
    kvm_irq_level,
    kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
    kvm_irq_routing_entry,
    kvm_irq_routing,
    kvm_ioeventfd,
    kvm_irqfd,
    kvm_msi,
    kvm_stats_header,
    kvm_stats_desc,
)
"""The structures whose size is the kernel's own; ``kvm_run`` and ``kvm_signal_mask`` are compared field by field."""


def _number(direction: int, number: int, size: int = 0) -> int:
    return direction << 30 | size << 16 | 0xAE << 8 | number


def _io(number: int) -> int:
    return _number(0, number)


def _iow(number: int, what: type[Any], size: int | None = None) -> int:
    return _number(1, number, ctypes.sizeof(what) if size is None else size)


def _ior(number: int, what: type[Any]) -> int:
    return _number(2, number, ctypes.sizeof(what))


class Ioctl(IntEnum):
    """The requests, named as in linux/kvm.h without KVM_; an argument that is no number is a structure's address."""

    GET_API_VERSION = _io(0x00)
    CREATE_VM = _io(0x01)
    CHECK_EXTENSION = _io(0x03)
    GET_VCPU_MMAP_SIZE = _io(0x04)
    CREATE_VCPU = _io(0x41)
    SET_USER_MEMORY_REGION = _iow(0x46, kvm_userspace_memory_region)
    SET_TSS_ADDR = _io(0x47)
    CREATE_IRQCHIP = _io(0x60)
    IRQ_LINE = _iow(0x61, kvm_irq_level)
    IRQ_LINE_STATUS = _number(3, 0x67, ctypes.sizeof(kvm_irq_level))
    SET_GSI_ROUTING = _iow(0x6A, kvm_irq_routing)
    IRQFD = _iow(0x76, kvm_irqfd)
    IOEVENTFD = _iow(0x79, kvm_ioeventfd)
    RUN = _io(0x80)
    GET_REGS = _ior(0x81, kvm_regs)
    SET_REGS = _iow(0x82, kvm_regs)
    GET_SREGS = _ior(0x83, kvm_sregs)
    SET_SREGS = _iow(0x84, kvm_sregs)
    SET_SIGNAL_MASK = _iow(0x8B, kvm_signal_mask, 4)  # its mask is a flexible array
    SET_MP_STATE = _iow(0x99, kvm_mp_state)
    GET_TSC_KHZ = _io(0xA3)
    SIGNAL_MSI = _iow(0xA5, kvm_msi)
    GET_STATS_FD = _io(0xCE)


class Exit(IntEnum):
    """Why KVM_RUN came back: KVM_EXIT_*."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24


API_VERSION = 12
CAP_IMMEDIATE_EXIT, CAP_IOEVENTFD_NO_LENGTH = 136, 100
IOEVENTFD_DATAMATCH, IOEVENTFD_PIO, IOEVENTFD_DEASSIGN = 1 << 0, 1 << 1, 1 << 2
IRQFD_DEASSIGN = 1 << 0
IRQ_ROUTING_IRQCHIP, IRQ_ROUTING_MSI = 1, 2
MP_STATE_RUNNABLE = 0

_ioctl = ctypes.CDLL(None, use_errno=True).ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
_ioctl.restype = ctypes.c_int


def ioctl(fd: int, request: Ioctl, argument: int | ctypes.Structure = 0) -> int:
    """The call's answer; raises KvmError(request, errno).  A structure is read and written in place."""
    value = argument if isinstance(argument, int) else ctypes.addressof(argument)
    answer: int = _ioctl(fd, request, value)
    if answer < 0:
        number = ctypes.get_errno()
        raise KvmError(f"KVM_{request.name}", number, os.strerror(number))
    return answer
