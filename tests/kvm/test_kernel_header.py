"""linux/kvm.h judges the numbers and structures in ``vblklab.kvm.ioctl``, asked of the C compiler."""

from __future__ import annotations

import ctypes
import platform
import re
import subprocess
from pathlib import Path

import pytest

from vblklab.kvm import ioctl as abi
from vblklab.spec import kvm_exit

pytestmark = [
    pytest.mark.cc,
    pytest.mark.skipif(
        not Path("/usr/include/linux/kvm.h").exists() or platform.machine() != "x86_64",
        reason="no linux/kvm.h of x86-64 here; on Debian: apt install linux-libc-dev",
    ),
]
NUMBERS = {
    "KVM_API_VERSION": abi.API_VERSION,
    "KVM_CAP_IMMEDIATE_EXIT": abi.CAP_IMMEDIATE_EXIT,
    "KVM_CAP_IOEVENTFD_NO_LENGTH": abi.CAP_IOEVENTFD_NO_LENGTH,
    "KVM_IOEVENTFD_FLAG_DATAMATCH": abi.IOEVENTFD_DATAMATCH,
    "KVM_IOEVENTFD_FLAG_PIO": abi.IOEVENTFD_PIO,
    "KVM_IOEVENTFD_FLAG_DEASSIGN": abi.IOEVENTFD_DEASSIGN,
    "KVM_IRQFD_FLAG_DEASSIGN": abi.IRQFD_DEASSIGN,
    "KVM_IRQ_ROUTING_IRQCHIP": abi.IRQ_ROUTING_IRQCHIP,
    "KVM_IRQ_ROUTING_MSI": abi.IRQ_ROUTING_MSI,
    "KVM_MP_STATE_RUNNABLE": abi.MP_STATE_RUNNABLE,
    **{f"KVM_{request.name}": int(request) for request in abi.Ioctl},
    **{f"KVM_EXIT_{reason.name}": int(reason) for reason in abi.Exit},
}
# What Python's structure holds beyond the kernel's, which ends in a flexible array, or before it, which goes on.
OWN_SIZE = {"kvm_run", "kvm_signal_mask"}


def ask_c(folder: Path, expressions: list[str]) -> list[int]:
    source, program = folder / "ask.c", folder / "ask"
    lines = "".join(f'printf("%llu\\n", (unsigned long long)({expression}));\n' for expression in expressions)
    source.write_text(f"#include <stdio.h>\n#include <stddef.h>\n#include <linux/kvm.h>\nint main(void) {{ {lines} return 0; }}")
    subprocess.run(["gcc", "-o", program, source], check=True)
    return [int(line) for line in subprocess.run([program], check=True, capture_output=True).stdout.split()]


def test_every_number_is_the_kernels(tmp_path: Path) -> None:
    assert dict(zip(NUMBERS, ask_c(tmp_path, list(NUMBERS)), strict=True)) == NUMBERS


def test_every_structure_has_the_kernels_size_and_offsets(tmp_path: Path) -> None:
    wanted: dict[str, int] = {}
    for struct in (*abi.STRUCTS, abi.kvm_run, abi.kvm_signal_mask):
        name = struct.__name__
        if name not in OWN_SIZE:
            wanted[f"sizeof(struct {name})"] = ctypes.sizeof(struct)
        for field, *_ in struct._fields_:
            if field != "exit":
                wanted[f"offsetof(struct {name}, {field})"] = getattr(struct, field).offset
    union = abi.kvm_run.exit.offset
    for member, kind in dict(abi._ExitUnion._fields_).items():
        fields = [] if member == "padding" else [field for field, *_ in kind._fields_]
        for field in fields:
            wanted[f"offsetof(struct kvm_run, {member}.{field})"] = union + getattr(kind, field).offset
    answers = dict(zip(wanted, ask_c(tmp_path, list(wanted)), strict=True))
    assert answers == wanted


@pytest.mark.parametrize(("file", "isa"), [("vmx.h", 1), ("svm.h", 2)])
def test_every_exit_reason_has_the_kernels_name(file: str, isa: int) -> None:
    text = next(Path("/usr/include").glob(f"*/asm/{file}")).read_text(encoding="utf-8")
    numbers = {name: int(value, 0) for name, value in re.findall(r"#define (\w+)\s+(-?(?:0x)?[0-9a-fA-F]+)\s", text)}
    names = re.findall(r"\{ *(\w+), *\"([^\"]+)\" *\}", text)
    assert len(names) > 50
    for symbol, name in names:
        number = isa << 32 | numbers[symbol] & 0xFFFFFFFF
        assert (kvm_exit.reason_name(number), kvm_exit.reason_number(name)) == (name, number)


def test_every_reason_of_a_user_space_exit_has_the_kernels_name() -> None:
    text = Path("/usr/include/linux/kvm.h").read_text(encoding="utf-8")
    numbers = dict(re.findall(r"#define KVM_EXIT_(\w+)\s+(\d+)", text))
    assert all(int(numbers[name]) == number for number, name in kvm_exit.USERSPACE.items())
    assert kvm_exit.reason_name(6) == "MMIO" and kvm_exit.reason_name(1 << 32 | 0x80000021) == "INVALID_STATE"
    assert kvm_exit.reason_name(2 << 32 | 0x777) == "0x777" and kvm_exit.reason_number("0x777") == 0x777
