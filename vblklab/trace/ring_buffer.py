"""The kernel's own binary trace: pages of ftrace's ring buffer and the layout of its events, as tracefs states both.

ftrace's text has whole microseconds; these pages have nanoseconds, and cost the traced system no formatting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..errors import TraceError
from .ftrace import Record

__all__ = ["Layout", "read_pages"]

_FIELD = re.compile(r"\tfield:(?P<decl>[^;]*);\s*offset:(?P<offset>\d+);\s*size:(?P<size>\d+);\s*signed:(?P<signed>[01]);")
_PADDING, _TIME_EXTEND, _TIME_STAMP, _LONGEST = 29, 30, 31, 28
_DELTA_BITS = 27
_MISSED, _MISSED_STORED = 1 << 31, 1 << 30
_COMMIT_MASK = (1 << 20) - 1
_TOP5 = 0xF8 << 56
_DATA_LOC = "__data_loc"


class _Field(NamedTuple):
    name: str
    offset: int
    size: int
    signed: bool
    text: bool


class Layout:
    """Of one event, from its ``format`` file: its number, its name and where its fields are.  TraceError for anything else."""

    def __init__(self, text: str) -> None:
        name, number = re.search(r"^name: (\w+)$", text, re.MULTILINE), re.search(r"^ID: (\d+)$", text, re.MULTILINE)
        if name is None or number is None:
            raise TraceError(f"this is no event's format: {text[:60]!r}", "give what events/SYSTEM/EVENT/format says")
        self.name, self.id = name[1], int(number[1])
        self.fields = [_field(found) for found in _FIELD.finditer(text)]

    def values(self, data: bytes) -> dict[str, int | str]:
        """The event's own fields; of a character array the text."""
        found: dict[str, int | str] = {}
        for name, offset, size, signed, text in self.fields:
            part = data[offset : offset + size]
            if text:
                found[name] = part.split(b"\0", 1)[0].decode("ascii", "replace")
            else:
                found[name] = int.from_bytes(part, "little", signed=signed)
        return found


def _field(found: re.Match[str]) -> _Field:
    declared = found["decl"]
    name = re.sub(r"\[.*\]$", "", declared.strip()).split()[-1]
    text = "char" in declared and "[" in declared and not declared.startswith(_DATA_LOC)
    return _Field(name, int(found["offset"]), int(found["size"]), found["signed"] == "1", text)


def read_pages(header_page: str, formats: Iterable[str], pages: Mapping[int, Iterable[bytes]]) -> tuple[list[Record], int]:
    """The records of all CPUs in the order of their times, and how many the kernel says were lost between them.

    ``header_page`` is what events/header_page says, ``formats`` the format files of the events that were enabled.
    """
    header = {_field(found).name: _field(found) for found in _FIELD.finditer(header_page)}
    if not {"timestamp", "commit", "data"} <= header.keys():
        raise TraceError(f"this is no layout of a page: {header_page[:60]!r}", "give what events/header_page says")
    layouts = {layout.id: layout for layout in map(Layout, formats)}
    records: list[Record] = []
    lost = 0
    for cpu, its_pages in pages.items():
        for page in its_pages:
            lost += _read_page(page, header, layouts, cpu, records)
    records.sort(key=lambda record: record.t_ns)
    return records, lost


def _read_page(page: bytes, header: Mapping[str, _Field], layouts: Mapping[int, Layout], cpu: int, records: list[Record]) -> int:
    """Append the page's records; how many were lost before it."""
    now = _number(page, header["timestamp"])
    commit = _number(page, header["commit"])
    at = header["data"].offset
    end = at + (commit & _COMMIT_MASK)
    if end > len(page):
        raise TraceError(f"a page of CPU {cpu} ends in the middle: {len(page)} bytes of {end}", "read trace_pipe_raw page by page")
    lost = 0
    if commit & _MISSED:
        lost = int.from_bytes(page[end : end + header["commit"].size], "little") if commit & _MISSED_STORED else 1
    while at + 4 <= end:
        word = int.from_bytes(page[at : at + 4], "little")
        kind, delta = word & 31, word >> 5
        at += 4
        if kind == _PADDING:
            if not delta:
                break  # the rest of the page
            now += delta
            at += int.from_bytes(page[at : at + 4], "little")
            continue
        if kind in (_TIME_EXTEND, _TIME_STAMP):
            stamp = (int.from_bytes(page[at : at + 4], "little") << _DELTA_BITS) + delta
            now = now + stamp if kind == _TIME_EXTEND else stamp | now & _TOP5
            at += 4
            continue
        now += delta
        if kind:
            length = kind * 4
        else:
            length = int.from_bytes(page[at : at + 4], "little") - 4
            at += 4
        data = page[at : at + length]
        at += length
        layout = layouts.get(int.from_bytes(data[:2], "little"))
        if layout is not None:
            values = layout.values(data)
            pid = values["common_pid"]
            assert isinstance(pid, int)
            args = {name: value for name, value in values.items() if not name.startswith("common_")}
            records.append(Record(now, cpu, "", pid, layout.name, args))
    return lost


def _number(page: bytes, field: _Field) -> int:
    return int.from_bytes(page[field.offset : field.offset + field.size], "little")
