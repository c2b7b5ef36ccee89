"""A split virtqueue as its bytes in memory say it is: descriptor table, available ring, used ring, and what changed since.

Neither half of the queue is asked and nothing that lies in memory is trusted: a broken ring is shown as it is.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..errors import BadAddress, ConfigError
from ..memory import GuestMemory
from ..spec.virtio_ring import AVAIL_NO_INTERRUPT, DESC, DESC_BYTES, USED_ELEM, USED_NO_NOTIFY, DescFlag
from .shot import RingShot
from .split import SplitLayout

__all__ = ["AvailRing", "Desc", "HexView", "RingView", "UsedRing"]

_DESC_ROWS, _TABLE_ROWS, _RING_ROWS, _CHANGED_ROWS = 16, 20, 6, 24  # shown at most
_HEX_ROW = 16


class Desc(NamedTuple):
    """One descriptor as it lies in memory (§2.7.5)."""

    addr: int
    len: int
    flags: int
    next: int

    @property
    def flag_names(self) -> str:
        """The flags by name; bits that have none as a number."""
        names = [flag.name or "" for flag in DescFlag if self.flags & flag]
        unknown = self.flags & ~sum(DescFlag)
        return " ".join([*names, *([f"{unknown:#x}?"] if unknown else [])])


class AvailRing(NamedTuple):
    """The available ring, which the driver writes (§2.7.6): heads of chains, and with EVENT_IDX when it wants an interrupt."""

    flags: int
    idx: int
    ring: list[int]
    used_event: int


class UsedRing(NamedTuple):
    """The used ring, which the device writes (§2.7.8): (id, len) pairs, and with EVENT_IDX when it wants a kick."""

    flags: int
    idx: int
    ring: list[tuple[int, int]]
    avail_event: int


class RingView:
    """What the memory of one split virtqueue held when the view was made: ``vm.ring()``.

    ``print(view)`` gives text, a notebook shows tables.  ``view.diff(earlier)`` is the same view with everything marked that
    changed since ``earlier``.  ``desc``, ``table``, ``avail`` and ``used`` give the values, ``hex`` any bytes of that moment: a
    view holds a copy of all guest memory.
    """

    def __init__(self, memory: GuestMemory, layout: SplitLayout, queue: int = 0) -> None:
        layout.check(memory)
        self.layout = layout
        self.queue = queue
        self._now = _Snapshot(memory.base, bytes(memory.bytes))
        self._before: _Snapshot | None = None

    # -- values ----------------------------------------------------------------------------------------------------------

    def desc(self, slot: int) -> Desc:
        """The descriptor at ``slot`` of the descriptor table."""
        if not 0 <= slot < self.layout.size:
            raise ConfigError(f"slot {slot!r} of queue {self.queue}", f"it has slots 0 to {self.layout.size - 1}")
        return Desc(*DESC.unpack(self._now.read(self.layout.desc + slot * DESC_BYTES, DESC_BYTES)))

    def table(self, slot: int) -> list[Desc]:
        """The indirect table that the descriptor at ``slot`` points to, [] if it points to none; BadAddress if that is not memory."""
        desc = self.desc(slot)
        if not desc.flags & DescFlag.INDIRECT:
            return []
        data = self._now.read(desc.addr, desc.len)
        return self._entries(data, len(data) // DESC_BYTES)

    @staticmethod
    def _entries(data: bytes, count: int) -> list[Desc]:
        return [Desc(*fields) for fields in DESC.iter_unpack(data[: count * DESC_BYTES])]

    @property
    def written(self) -> list[int]:
        """The slots of the descriptor table that hold anything but zeroes."""
        table = self._now.read(self.layout.desc, self.layout.size * DESC_BYTES)
        return [slot for slot in range(self.layout.size) if any(table[slot * DESC_BYTES : (slot + 1) * DESC_BYTES])]

    @property
    def avail(self) -> AvailRing:
        """The available ring."""
        at, size, u16 = self.layout.avail, self.layout.size, self._now.u16
        return AvailRing(u16(at), u16(at + 2), [u16(at + 4 + 2 * slot) for slot in range(size)], u16(at + 4 + 2 * size))

    @property
    def used(self) -> UsedRing:
        """The used ring."""
        at, size, u16 = self.layout.used, self.layout.size, self._now.u16
        return UsedRing(u16(at), u16(at + 2), list(USED_ELEM.iter_unpack(self._now.read(at + 4, 8 * size))), u16(at + 4 + 8 * size))

    @property
    def in_flight(self) -> int:
        """Buffers that are published and not yet returned: ``avail.idx`` minus ``used.idx`` modulo 2**16."""
        return (self._now.u16(self.layout.avail + 2) - self._now.u16(self.layout.used + 2)) & 0xFFFF

    def hex(self, gpa: int, length: int = 64) -> HexView:
        """``length`` bytes at ``gpa`` as they were when the view was made; BadAddress if they are not memory."""
        data = self._now.read(gpa, length)
        return HexView(gpa, data, self._before.read(gpa, length) if self._before else data)

    def shot(self) -> RingShot:
        """The same moment as a ``RingShot``, of which ``vb.film`` makes films."""
        return RingShot(self.layout, *(self._now.read(gpa, length) for gpa, length in self.layout.areas()))

    # -- what changed ----------------------------------------------------------------------------------------------------

    def diff(self, earlier: RingView) -> RingView:
        """This view with everything marked that changed since ``earlier``: ``*`` in text, a colour in a notebook."""
        if not isinstance(earlier, RingView):
            raise ConfigError(f"diff with a {type(earlier).__name__}", "give an earlier view: before = vm.ring()")
        if (earlier.layout, earlier._now.base, len(earlier._now.data)) != (self.layout, self._now.base, len(self._now.data)):
            raise ConfigError(f"diff of queue {self.queue} with queue {earlier.queue}: other memory", "compare two views of one queue")
        marked = object.__new__(RingView)
        marked.layout, marked.queue, marked._now, marked._before = self.layout, self.queue, self._now, earlier._now
        return marked

    def _changed(self, gpa: int, length: int) -> bool:
        return self._before is not None and length > 0 and self._before.read(gpa, length) != self._now.read(gpa, length)

    # -- the three areas as tables ---------------------------------------------------------------------------------------

    def _areas(self) -> tuple[_Area, _Area, _Area]:
        avail, used = self.avail, self.used
        quiet = "NO_INTERRUPT" if avail.flags & AVAIL_NO_INTERRUPT else "", "NO_NOTIFY" if used.flags & USED_NO_NOTIFY else ""
        heads = [(head,) for head in avail.ring]
        return (
            self._desc_area(avail),
            self._ring_area("available ring", "the driver writes", self.layout.avail, avail.idx, heads, quiet[0], "used_event"),
            self._ring_area("used ring", "the device writes", self.layout.used, used.idx, used.ring, quiet[1], "avail_event"),
        )

    def _desc_area(self, avail: AvailRing) -> _Area:
        at, size, written = self.layout.desc, self.layout.size, self.written
        changed = (slot for slot in range(size) if self._changed(at + slot * DESC_BYTES, DESC_BYTES))
        slots = _first(_DESC_ROWS, changed, self._newest_chains(avail), written)
        left = len(set(written).difference(slots))
        return _Area(
            "descriptor table",
            f"at {at:#x}, {len(written)} of {size} entries written",
            (),
            ("slot", "addr", "len", "flags", "next"),
            [row for slot in sorted(slots) for row in self._desc_rows(slot)],
            f"… and {left:,} more" if left else "",
        )

    def _newest_chains(self, avail: AvailRing) -> Iterator[int]:
        """The written slots of the chains that the next and the newest entries of the available ring name."""
        size = self.layout.size
        for back in range(min(size, _RING_ROWS + 1)):
            slot = avail.ring[(avail.idx - back) % size]
            for _ in range(_DESC_ROWS):
                if slot >= size or not any(desc := self.desc(slot)):
                    break
                yield slot
                if not desc.flags & DescFlag.NEXT:
                    break
                slot = desc.next

    def _desc_rows(self, slot: int) -> Iterator[_Row]:
        desc, at = self.desc(slot), self.layout.desc + slot * DESC_BYTES
        if not desc.flags & DescFlag.INDIRECT or self._outside(desc):
            yield _desc_row(str(slot), desc, at, self._remark(desc))
            return
        count, rest = divmod(desc.len, DESC_BYTES)
        yield _desc_row(str(slot), desc, at, f"a table of {count:,}{f' and {rest} bytes' if rest else ''}:")
        for i, entry in enumerate(self._entries(self._now.read(desc.addr, desc.len), min(count, _TABLE_ROWS))):
            remark = "a table in a table" if entry.flags & DescFlag.INDIRECT else self._remark(entry)
            yield _desc_row(f"{slot}.{i}", entry, desc.addr + i * DESC_BYTES, remark)
        if count > _TABLE_ROWS:
            yield _Row((_Cell("…"), *[_Cell("")] * 4), f"and {count - _TABLE_ROWS:,} more")

    def _outside(self, desc: Desc) -> bool:
        return desc.addr < self._now.base or desc.addr + desc.len > self._now.base + len(self._now.data)

    def _remark(self, desc: Desc) -> str:
        if not any(desc):
            return ""
        return "outside memory" if self._outside(desc) else "device writes" if desc.flags & DescFlag.WRITE else "device reads"

    def _ring_area(self, title: str, writer: str, at: int, idx: int, ring: Sequence[tuple[int, ...]], flag: str, event_name: str) -> _Area:
        """A ring of entries whose fields are equally wide: 2 bytes in the available ring, 4 in the used ring."""
        size = self.layout.size
        names, field = (("head",), 2) if len(ring[0]) == 1 else (("id", "len"), 4)
        width = field * len(names)
        newest = [(idx - back) % size for back in range(min(size - 1, _RING_ROWS), 0, -1) if back <= idx or any(ring[(idx - back) % size])]
        shown = [*newest, idx % size]
        older = [slot for slot in range(size) if slot not in shown and self._changed(at + 4 + slot * width, width)]
        rows = []
        for slot in [*older[:_CHANGED_ROWS], *shown]:
            cells = [_Cell(str(value), at + 4 + slot * width + i * field, field) for i, value in enumerate(ring[slot])]
            last = slot == idx % size
            rows.append(_Row((_Cell(str(slot)), *cells), "← idx: not published" if last else "", faint=last))
        words = (("flags", at, flag), ("idx", at + 2, ""), (event_name, at + 4 + size * width, ""))
        return _Area(
            title,
            f"at {at:#x}, {writer}",
            tuple((name, _Cell(str(self._now.u16(gpa)), gpa, 2), meaning) for name, gpa, meaning in words),
            ("slot", *names),
            rows,
            f"… and {len(older) - _CHANGED_ROWS:,} more that changed" if len(older) > _CHANGED_ROWS else "",
        )

    # -- text and HTML ---------------------------------------------------------------------------------------------------

    def _headline(self) -> str:
        count, size = self.in_flight, self.layout.size
        if count > size:
            return f"{size} entries; avail.idx is {count:,} ahead of used.idx, more than fit: one side is broken"
        return f"{size} entries; {count or 'no'} buffer{'' if count == 1 else 's'} with the device (avail.idx − used.idx)"

    def __str__(self) -> str:
        lines = [f"virtqueue {self.queue}: {self._headline()}{'; * has changed' if self._before else ''}"]
        for area in self._areas():
            lines += ["", f"{area.title} {area.where}"]
            if area.words:
                words = (f"{name} {self._text(cell).rstrip()}{meaning and f' {meaning}'}" for name, cell, meaning in area.words)
                lines.append("  " + "   ".join(words))
            head = [*(f"{name} " for name in area.head), ""]
            body = [[*map(self._text, row.cells), row.remark] for row in area.rows]
            widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
            left = {i for i, name in enumerate(head) if name in ("", "flags ")}
            for line in [head, *body]:
                cells = [f"{text:<{w}}" if i in left else f"{text:>{w}}" for i, (text, w) in enumerate(zip(line, widths, strict=True))]
                lines.append("  " + " ".join(cells).rstrip())
            lines += [f"  {area.more}"] if area.more else []
        return "\n".join(lines)

    __repr__ = __str__

    def _text(self, cell: _Cell) -> str:
        return cell.text + ("*" if self._changed(cell.gpa, cell.length) else " ")

    def _repr_html_(self) -> str:
        desc, avail, used = map(self._html_area, self._areas())
        marks = f"; {_span(_CHANGED, 'coloured')} has changed" if self._before else ""
        return (
            f'<div style="margin:4px 0 10px"><b>virtqueue {self.queue}</b>: {html.escape(self._headline())}{marks}'
            f'<div style="display:flex;flex-wrap:wrap;gap:0 44px">{desc}<div>{avail}{used}</div></div></div>'
        )

    def _html_area(self, area: _Area) -> str:
        words = "&emsp;".join(f"{name} {self._html(cell)} {html.escape(meaning)}" for name, cell, meaning in area.words)
        head = "".join(f'<th style="{_TD}">{html.escape(name)}</th>' for name in (*area.head, ""))
        rows = []
        for row in area.rows:
            cells = "".join(f'<td style="{_TD}">{self._html(cell)}</td>' for cell in row.cells)
            rows.append(f'<tr{_FAINT * row.faint}>{cells}<td style="{_TD};text-align:left">{html.escape(row.remark)}</td></tr>')
        return (
            f'<div style="margin-top:8px"><b>{area.title}</b> {html.escape(area.where)}'
            f"{words and f'<div>{words}</div>'}"
            f'<table style="margin:4px 0;font-size:inherit"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
            f"{area.more and f'<div>{html.escape(area.more)}</div>'}</div>"
        )

    def _html(self, cell: _Cell) -> str:
        text = html.escape(cell.text)
        if not cell.length:
            return text
        return _span(_MONO + _CHANGED * self._changed(cell.gpa, cell.length), text)


class HexView:
    """Bytes of guest memory, sixteen a line; those that changed since an earlier view are marked."""

    def __init__(self, gpa: int, data: bytes, before: bytes) -> None:
        self.gpa = gpa
        self.data = data
        self._before = before

    def _lines(self) -> Iterator[tuple[str, list[tuple[str, bool]], str]]:
        for at in range(0, len(self.data), _HEX_ROW):
            row = self.data[at : at + _HEX_ROW]
            cells = [(f"{new:02x}", new != old) for new, old in zip(row, self._before[at : at + _HEX_ROW], strict=True)]
            yield f"{self.gpa + at:#010x}", cells, "".join(chr(b) if 32 <= b < 127 else "." for b in row)

    def __str__(self) -> str:
        return "\n".join(
            f"{gpa}  {''.join(text + ('* ' if changed else '  ') for text, changed in cells):<{4 * _HEX_ROW}} {ascii_text}"
            for gpa, cells, ascii_text in self._lines()
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = (
            f"{gpa}  {' '.join(_span(_CHANGED, text) if changed else text for text, changed in cells)}"
            f"{'   ' * (_HEX_ROW - len(cells))}  {html.escape(ascii_text)}"
            for gpa, cells, ascii_text in self._lines()
        )
        return f'<pre style="{_MONO}">{chr(10).join(lines)}</pre>'


# -- what a picture of a ring is made of -------------------------------------------------------------------------------------

_TD = "padding:1px 9px 1px 4px;text-align:right;white-space:nowrap"
_MONO = "font-family:var(--jp-code-font-family,monospace);"
_CHANGED = "background:rgba(255,179,0,0.45);font-weight:bold"
_FAINT = ' style="opacity:0.6"'


class _Snapshot(NamedTuple):
    """Guest memory at one moment."""

    base: int
    data: bytes

    def read(self, gpa: int, length: int) -> bytes:
        start = gpa - self.base
        if start < 0 or length < 0 or start + length > len(self.data):
            raise BadAddress(gpa, length)
        return self.data[start : start + length]

    def u16(self, gpa: int) -> int:
        return int.from_bytes(self.read(gpa, 2), "little")


class _Cell(NamedTuple):
    """A printed value and the bytes it was read from; length 0 if it was worked out."""

    text: str
    gpa: int = 0
    length: int = 0


class _Row(NamedTuple):
    cells: tuple[_Cell, ...]
    remark: str = ""
    faint: bool = False


class _Area(NamedTuple):
    """Descriptor table or ring: words such as idx as (name, cell, meaning), then a table, then what it leaves out."""

    title: str
    where: str
    words: tuple[tuple[str, _Cell, str], ...]
    head: tuple[str, ...]
    rows: list[_Row]
    more: str


def _span(style: str, text: str) -> str:
    return f'<span style="{style}">{text}</span>'


def _desc_row(name: str, desc: Desc, at: int, remark: str) -> _Row:
    cells = (
        _Cell(f"{desc.addr:#x}", at, 8),
        _Cell(str(desc.len), at + 8, 4),
        _Cell(desc.flag_names or "0", at + 12, 2),
        _Cell(str(desc.next), at + 14, 2),
    )
    return _Row((_Cell(name), *cells), remark)


def _first(most: int, *sources: Iterable[int]) -> list[int]:
    """The first ``most`` different slots of several lists, the most important list first."""
    found: dict[int, None] = {}
    for source in sources:
        for slot in source:
            if len(found) >= most:
                break
            found[slot] = None
    return list(found)
