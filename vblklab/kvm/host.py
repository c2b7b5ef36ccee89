"""What there is of KVM on this machine, and how to get what is missing of it."""

from __future__ import annotations

import errno
import os
import platform
import sys
from pathlib import Path

from ..errors import KvmError, NotHere
from .ioctl import API_VERSION, Ioctl, ioctl

__all__ = ["apicv", "emulates", "flavour", "found", "open_kvm"]

DEVICE, MODULES = "/dev/kvm", "/sys/module"
_FLAVOURS = ("kvm_amd", "kvm_hv", "kvm_intel", "kvm_pvm")
_RUNG = "SimMachine (L0) and LiveMachine (L2) work without it"


def flavour(modules: str = MODULES) -> str:
    """The modules that do the work: kvm_intel, kvm_amd, kvm_pvm.  Every figure of a real trap names them."""
    here = [name for name in _FLAVOURS if (Path(modules) / name).is_dir()]
    return " and ".join(here) or "no kvm_intel, kvm_amd or kvm_pvm module"


def emulates(modules: str = MODULES) -> bool:
    """Whether this KVM emulates a guest's ring 0 instruction by instruction."""
    return (Path(modules) / "kvm_pvm").is_dir()


def apicv(modules: str = MODULES) -> bool:
    """Whether the processor delivers interrupts itself (Intel's APICv, AMD's AVIC): then KVM's ``irq_injections`` does not count them."""
    for parameter in ("kvm_intel/parameters/enable_apicv", "kvm_amd/parameters/avic"):
        try:
            if (Path(modules) / parameter).read_text(encoding="ascii").strip() in ("Y", "1"):
                return True
        except OSError:
            continue
    return False


def found(device: str = DEVICE, modules: str = MODULES) -> tuple[bool, str, str]:
    """Whether KVM works here, what there is of it, and how to get what is missing."""
    if sys.platform != "linux":
        return False, f"KVM is a part of Linux, this is {platform.system()}", "a Linux host"
    if platform.machine() not in ("x86_64", "AMD64"):
        return False, f"the payload is x86 machine code, this is {platform.machine()}", "an x86-64 host"
    kind = flavour(modules)
    try:
        kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return (
            False,
            f"there is no {device}",
            "load kvm_intel or kvm_amd; inside a virtual machine its host must offer nested virtualization",
        )
    except PermissionError:
        return False, f"{device} ({kind}) is there, but not for you", "sudo usermod -aG kvm $USER, then log in again"
    except OSError as error:
        return False, f"{device} does not open: {os.strerror(error.errno or 0)}", "load kvm_intel or kvm_amd"
    try:
        version = ioctl(kvm, Ioctl.GET_API_VERSION)
        if version == API_VERSION:
            os.close(ioctl(kvm, Ioctl.CREATE_VM))
    except KvmError as error:
        return False, f"{device} opens, but makes no virtual machine: {os.strerror(error.errno)}", "use a host whose KVM works"
    finally:
        os.close(kvm)
    if version != API_VERSION:
        return False, f"{device} has API version {version}, not {API_VERSION}", "a current Linux"
    note = ", which emulates a guest's kernel code" if emulates(modules) else ""
    return True, f"{device} works (API version {version}, {kind}{note})", ""


def open_kvm(device: str = DEVICE) -> int:
    """The device's fd; raises NotHere with the remedy."""
    try:
        return os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        works, why, gain = found(device)
        if works or error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise NotHere(why, f"{gain}; {_RUNG}") from None
