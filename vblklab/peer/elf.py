"""What is needed of ELF files: the shared libraries of a program, and the facts that a kernel module states about itself."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from ..errors import ConfigError

__all__ = ["Dynamic", "dynamic", "modinfo"]

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 15, 29
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")  # type, flags, offset, vaddr, paddr, filesz, memsz, align
_SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")  # name, type, flags, addr, offset, size, link, info, addralign, entsize


@dataclass(frozen=True)
class Dynamic:
    """What a program or library asks of the dynamic loader; all empty for a static program."""

    interpreter: str = ""
    needed: tuple[str, ...] = ()
    search: tuple[str, ...] = field(default=())
    """RUNPATH or RPATH, with $ORIGIN as it stands."""


def dynamic(data: bytes, name: str) -> Dynamic:
    """Read the program headers of the 64-bit little-endian ELF file ``data``; ``name`` is for the ConfigError if it is none."""
    try:
        headers = list(_program_headers(data, name))
        found = {kind: data[offset : offset + size] for kind, offset, _, size in headers}
        entries = _entries(found.get(_PT_DYNAMIC, b""))
        table = next((value for tag, value in entries if tag == _DT_STRTAB), 0)
        strings = next((at + table - start for kind, at, start, size in headers if kind == _PT_LOAD and start <= table < start + size), 0)
        paths = [_text(data, strings + value) for tag, value in entries if tag in (_DT_RPATH, _DT_RUNPATH)]
        return Dynamic(
            interpreter=found.get(_PT_INTERP, b"").rstrip(b"\0").decode(),
            needed=tuple(_text(data, strings + value) for tag, value in entries if tag == _DT_NEEDED),
            search=tuple(part for path in paths for part in path.split(":") if part),
        )
    except (struct.error, ValueError) as error:
        raise ConfigError(f"{name} is a damaged ELF file: {error}", "install it again") from None


def modinfo(data: bytes, name: str) -> dict[str, list[str]]:
    """The ``.modinfo`` section of a kernel module: key -> values, such as ``depends`` and ``softdep``."""
    try:
        _check_magic(data, name)
        table_at, entry_size, count, names_index = *struct.unpack_from("<Q", data, 40), *struct.unpack_from("<HHH", data, 58)
        sections = [_SECTION_HEADER.unpack_from(data, table_at + number * entry_size) for number in range(count)]
        names_at = sections[names_index][4]
        found = next((each for each in sections if _text(data, names_at + each[0]) == ".modinfo"), None)
    except (struct.error, ValueError, IndexError) as error:
        raise ConfigError(f"{name} is a damaged kernel module: {error}", "install the kernel again") from None
    facts: dict[str, list[str]] = {}
    for line in data[found[4] : found[4] + found[5]].split(b"\0") if found else ():
        key, equals, value = line.decode("utf-8", "replace").partition("=")
        if equals:
            facts.setdefault(key, []).append(value)
    return facts


def _check_magic(data: bytes, name: str) -> None:
    if data[:6] != b"\x7fELF\x02\x01":
        raise ConfigError(f"{name} is not a 64-bit little-endian ELF file", "give a file of an x86-64 Linux")


def _program_headers(data: bytes, name: str) -> list[tuple[int, int, int, int]]:
    """(type, file offset, address, size in the file) of every program header."""
    _check_magic(data, name)
    (table_at,), (entry_size, count) = struct.unpack_from("<Q", data, 32), struct.unpack_from("<HH", data, 54)
    rows = [_PROGRAM_HEADER.unpack_from(data, table_at + number * entry_size) for number in range(count)]
    return [(kind, offset, address, size) for kind, _, offset, address, _, size, _, _ in rows]


def _entries(section: bytes) -> list[tuple[int, int]]:
    entries = []
    for tag, value in struct.iter_unpack("<qQ", section[: len(section) // 16 * 16]):
        if tag == _DT_NULL:
            break
        entries.append((tag, value))
    return entries


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()
