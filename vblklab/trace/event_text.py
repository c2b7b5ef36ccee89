"""What a kernel event says of itself in text, in ftrace's, trace-cmd's and perf's output alike: its name and its arguments.

The arguments have the names of the event's fields, as in the binary trace, so that all sources can be joined in one way.
"""

from __future__ import annotations

import re

from ..spec.kvm_exit import reason_number

__all__ = ["Args", "event_of"]

Args = dict[str, "int | str"]
_ENTER = re.compile(r"sys_(\w+)\((.*)\)$")
_EXIT = re.compile(r"sys_(\w+) -> (0x[0-9a-f]+|-?\d+)$")
_EVENT = re.compile(r"(?:\w+:)?(\w+):\s*(.*)$")
_BLOCK = re.compile(r"(\d+,\d+) ([A-Z]+) (?:(\d+) )?(?:\([^)]*\) )?(\d+) (?:\+ (\d+)|/ (\d+)) .*\[(-?[^\]]*)\]$")
_VALUE = re.compile(r"(\w+)[=:] ?(0x[0-9a-f]+|[0-9a-f]{8,}\b|-?\d+)")
_NUMBER = re.compile(r"(?:0x[0-9a-f]+|-?\d+)$")
_SECTORED = frozenset(
    [
        "block_bio_queue",
        "block_getrq",
        "block_split",
        "block_bio_backmerge",
        "block_bio_frontmerge",
        "block_rq_insert",
        "block_rq_issue",
        "block_rq_complete",
    ]
)
_MMIO_KINDS = {"unsatisfied-read": 0, "read": 1, "write": 2}
_MSI_BASE, _EINTR, _EXIT_INTR = 0xFEE00000, 4, 10
_KVM = {
    "kvm_exit": re.compile(r"(?:vcpu (?P<vcpu_id>\d+) )?reason (?P<reason>\S+) "),
    "kvm_entry": re.compile(r"(?:vcpu (?P<vcpu_id>\d+))?"),
    "kvm_mmio": re.compile(r"mmio (?P<kind>[\w-]+) len (?P<len>\d+) gpa (?P<gpa>0x[0-9a-f]+) val (?P<val>0x[0-9a-f]+)"),
    "kvm_fast_mmio": re.compile(r"fast mmio at gpa (?P<gpa>0x[0-9a-f]+)"),
    "kvm_userspace_exit": re.compile(r"reason (?P<word>\w+) \((?P<reason>\d+)\)"),
    "kvm_set_irq": re.compile(r"gsi (?P<gsi>\d+) level (?P<level>-?\d+) source (?P<irq_source_id>\d+)"),
    "kvm_msi_set_irq": re.compile(r"dst (?P<dst>[0-9a-f]+) vec (?P<vec>\d+)"),
    "kvm_apic_accept_irq": re.compile(r"apicid (?P<apicid>[0-9a-f]+) vec (?P<vec>\d+)"),
    "kvm_vcpu_wakeup": re.compile(r"\w+ time (?P<ns>\d+) ns"),
    "kvm_inj_virq": re.compile(r"(?:irq (?P<irq>\d+)|(?:IRQ|Soft/INTn|\w+) (?P<vector>0x[0-9a-f]+))"),
    "kvm_eoi": re.compile(r"apicid (?P<apicid>[0-9a-f]+) vector (?P<vector>-?\d+)"),
}


def event_of(rest: str) -> tuple[str, Args]:
    """Name and arguments of ``name: what it says``; ValueError for anything else."""
    if ended := _EXIT.match(rest):
        return f"sys_exit_{ended[1]}", {"ret": _signed(ended[2])}
    if entered := _ENTER.match(rest):
        return f"sys_enter_{entered[1]}", _values(entered[2])
    event = _EVENT.match(rest)
    if event is None:
        raise ValueError(rest)
    name, said = event[1], event[2]
    if name.startswith("block_") and (block := _BLOCK.match(said)):
        return name, _block(*block.groups())
    if name in _SECTORED:
        raise ValueError(rest)
    if name in _KVM:
        return name, _kvm(name, said)
    if name.startswith("sys_exit_") and _NUMBER.match(said):
        return name, {"ret": _signed(said)}
    return name, {**_values(said), "text": said}


def _block(dev: str, rwbs: str, nbytes: str | None, sector: str, nr: str | None, new: str | None, by: str) -> Args:
    args: Args = {"dev": dev, "rwbs": rwbs, "sector": int(sector), "by": by}
    args |= {"nr_sector": int(nr)} if nr is not None else {"new_sector": int(new or 0)}
    return args | ({"bytes": int(nbytes)} if nbytes is not None else {})


def _kvm(name: str, said: str) -> Args:
    found = _KVM[name].match(said)
    if found is None:
        raise ValueError(said)
    words = {key: value for key, value in found.groupdict().items() if value is not None}
    if name == "kvm_exit":
        reason = reason_number(words["reason"])
        return {"isa": reason >> 32, "exit_reason": reason & 0xFFFFFFFF, "vcpu_id": int(words.get("vcpu_id", 0))}
    if name == "kvm_mmio":
        return {"type": _MMIO_KINDS[words["kind"]], "len": int(words["len"]), "gpa": int(words["gpa"], 16), "val": int(words["val"], 16)}
    if name == "kvm_msi_set_irq":  # as an address and data: only destination and vector are said
        return {"address": _MSI_BASE | int(words["dst"], 16) << 12, "data": int(words["vec"])}
    if name == "kvm_userspace_exit":
        failed = not words["word"].startswith("KVM_EXIT_")  # then the number is an errno
        return {"reason": _EXIT_INTR, "errno": -int(words["reason"])} if failed else {"reason": int(words["reason"]), "errno": 0}
    return {key: int(value, 16 if key == "apicid" else 0) for key, value in words.items()}


def _signed(text: str) -> int:
    value = int(text, 0)
    return value - (1 << 64) if value >> 63 > 0 else value


def _values(said: str) -> Args:
    return {key: int(value, 16 if not value.startswith(("0x", "-")) and len(value) >= 8 else 0) for key, value in _VALUE.findall(said)}
