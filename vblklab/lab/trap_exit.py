"""One exit of a vCPU, as it is seen from user space: the page that KVM fills, the registers, and where in the payload it happened."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..kvm.ioctl import Exit, kvm_run
from ..kvm.payload import BASE, LISTING, PORT_DONE

__all__ = ["PAGE_BYTES", "TrapExit", "instructions"]

PAGE_BYTES = 56
"""What is kept of the page: the head and the exit's fields, without the padding behind ``is_write``."""
_REASON_AT, _UNION_AT = kvm_run.exit_reason.offset, kvm_run.exit.offset
_FIELDS = {
    Exit.MMIO: (("mmio.phys_addr", 0, 8), ("mmio.data", 8, 8), ("mmio.len", 16, 4), ("mmio.is_write", 20, 1)),
    Exit.IO: (("io.direction", 0, 1), ("io.size", 1, 1), ("io.port", 2, 2), ("io.count", 4, 4), ("io.data_offset", 8, 8)),
}
_SHOWN = ("rip", "rax", "rcx", "rdx", "rbx", "rsi", "rdi", "rsp", "rflags")
_AROUND = 4
_CELL = 'style="text-align:left;padding:1px 14px 1px 4px;white-space:pre;font-family:monospace"'


def instructions() -> list[tuple[int, str, str]]:
    """The payload's listing: (address, bytes in hex, source) of each instruction."""
    found = []
    for line in LISTING.splitlines():
        offset, code = line.split(maxsplit=2)[:2]
        found.append((BASE + int(offset, 16), code, line[len(offset) + 2 + max(22, len(code) + 1) :]))
    return found


@dataclass(frozen=True)
class TrapExit:
    """What ``Trap.run()`` returns.  ``page`` is the beginning of ``struct kvm_run`` as it was then, ``registers`` the vCPU's by name.

    ``addr`` is the guest-physical address of a load or store, or the port of an ``in`` or ``out``; ``value`` is what was stored.
    """

    page: bytes
    registers: Mapping[str, int]
    value: int

    @property
    def reason(self) -> str:
        """``KVM_EXIT_MMIO``: a load or store where there is no memory; ``KVM_EXIT_IO``: an ``in`` or ``out``."""
        return f"KVM_EXIT_{self._kind.name}"

    @property
    def _kind(self) -> Exit:
        return Exit(int.from_bytes(self.page[_REASON_AT : _REASON_AT + 4], "little"))

    def _field(self, name: str) -> int:
        at, size = next((at, size) for field, at, size in _FIELDS[self._kind] if field.endswith(f".{name}"))
        return int.from_bytes(self.page[_UNION_AT + at : _UNION_AT + at + size], "little")

    @property
    def addr(self) -> int:
        return self._field("phys_addr" if self._kind is Exit.MMIO else "port")

    @property
    def size(self) -> int:
        """Bytes of the access."""
        return self._field("len" if self._kind is Exit.MMIO else "size")

    @property
    def write(self) -> bool:
        return bool(self._field("is_write" if self._kind is Exit.MMIO else "direction"))

    def fields(self) -> list[tuple[str, str, str, str]]:
        """The page: (offset, field of struct kvm_run, its bytes, what they say)."""
        rows = [(str(_REASON_AT), "exit_reason", self.page[_REASON_AT : _REASON_AT + 4], f"{int(self._kind)}: {self.reason}")]
        for name, at, size in _FIELDS[self._kind]:
            rows.append((str(_UNION_AT + at), name, self.page[_UNION_AT + at : _UNION_AT + at + size], self._says(name)))
        return [(at, name, data.hex(" "), says) for at, name, data, says in rows]

    def _says(self, name: str) -> str:
        value = self._field(name.partition(".")[2])
        if name == "mmio.data":
            return f"{self.value:#x}: was stored" if self.write else "wanted: the answer goes here"
        if name in ("mmio.is_write", "io.direction"):
            return f"{value}: {('a load', 'a store')[value] if name[0] == 'm' else ('in', 'out')[value]}"
        if name == "io.port":
            return f"{value:#x}{', which this payload uses to say: done' if value == PORT_DONE else ''}"
        if name == "io.data_offset":
            return f"{value}: in the next page, {self.value:#x}"
        return hex(value) if name == "mmio.phys_addr" else str(value)

    def around(self) -> list[tuple[str, str, str, str]]:
        """The payload around rip: (mark, address, bytes, source); ``→`` is rip, ``*`` the instruction that left."""
        lines = instructions()
        rip = self.registers["rip"]
        here = next((i for i, line in enumerate(lines) if line[0] == rip), 0)
        left = here if self._kind is Exit.MMIO and not self.write else here - 1
        first = max(0, min(left, here) - _AROUND)
        return [
            ("→" * (i == here) + "*" * (i == left), f"{at:#x}", code, source)
            for i, (at, code, source) in enumerate(lines)
            if first <= i <= here + _AROUND
        ]

    def __str__(self) -> str:
        registers = [(name, f"{self.registers[name]:#x}") for name in _SHOWN]
        return "\n\n".join((_lines(self.fields()), _lines(registers), _lines(self.around())))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        fields = _table(("offset", "struct kvm_run", "bytes", "says"), self.fields())
        registers = _table(("register", ""), [(name, f"{self.registers[name]:#x}") for name in _SHOWN])
        code = _table(("", "address", "bytes", "the payload"), self.around())
        return f'<div style="display:flex;flex-wrap:wrap;gap:6px 26px;align-items:flex-start">{fields}{registers}{code}</div>'


def _lines(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    top = "".join(f"<th {_CELL}>{html.escape(name)}</th>" for name in head)
    body = ""
    for row in rows:
        marked = ' style="background:rgba(201,101,27,0.14)"' if "*" in row[0] else ""
        body += f"<tr{marked}>{''.join(f'<td {_CELL}>{html.escape(cell)}</td>' for cell in row)}</tr>"
    return f'<table style="margin:2px 0"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
