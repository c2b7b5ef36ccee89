"""What a frame of a film shows, as tables of words: the same for text, for a figure and for a widget."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..ring.shot import Word
from ..spec.virtio_ring import (
    AVAIL_NO_INTERRUPT,
    EVENT_DESC,
    EVENT_DISABLE,
    EVENT_ENABLE,
    PACKED_AVAIL,
    PACKED_USED,
    USED_NO_NOTIFY,
    DescFlag,
)
from .film import Film, Frame
from .film_owners import Mark

__all__ = ["Cell", "Row", "Table", "headline", "tables_of"]

MOST_ROWS = 12
_EVENTS = {EVENT_ENABLE: "ENABLE", EVENT_DISABLE: "DISABLE", EVENT_DESC: "DESC"}


class Cell(NamedTuple):
    """A printed value, whether its word changed since the frame before, and whether the other side still sees the old one."""

    text: str
    changed: bool = False
    on_the_way: bool = False

    @property
    def shown(self) -> str:
        """The text, with ``~`` behind what is on the way."""
        return f"{self.text}~" if self.on_the_way else self.text


class Row(NamedTuple):
    """A slot or a single word: the request it belongs to, its cells, and who points at it."""

    mark: Mark | None
    cells: tuple[Cell, ...]
    remark: str = ""


class Table(NamedTuple):
    """One area: its name, who writes it, the columns' names and widths in characters, the rows.

    ``remark_width`` is the longest remark that there can be; ``left_out`` slots are not shown.
    """

    title: str
    writer: str
    columns: tuple[tuple[str, int], ...]
    rows: tuple[Row, ...]
    remark_width: int = 0
    left_out: int = 0


def headline(film: Film, frame: Frame) -> str:
    """One line: which frame, when, and what was done."""
    time = "" if frame.t_ns is None else f" · {frame.t_ns / 1000:.3f} µs"
    step = f" ({frame.step})" if frame.step else ""
    return f"frame {frame.number} of {len(film) - 1}{time} · {frame.label}{step}"


def tables_of(film: Film, number: int) -> tuple[Table, ...]:
    """The areas of one frame, of a large ring the slots in which something happened last."""
    frame = film[number]
    return _packed(film, frame) if frame.shot.packed else _split(film, frame)


# -- split -------------------------------------------------------------------------------------------------------------------


def _split(film: Film, frame: Frame) -> tuple[Table, ...]:
    shot, size = frame.shot, frame.shot.layout.size
    slots = _shown(film, frame, "desc", ())
    desc = Table(
        "descriptor table",
        "driver writes",
        (("slot", 4), ("addr", 8), ("len", 5), ("flags", 11), ("next", 5)),
        tuple(_split_desc(frame, slot) for slot in slots),
        left_out=size - len(slots),
    )
    flags = shot.value("avail", "flags"), shot.value("used", "flags")
    # With EVENT_IDX the device's wish stands in avail_event, which counts entries of the available ring, and the other way round.
    avail = _ring(
        film,
        frame,
        "avail",
        "available ring",
        "driver writes",
        ("head",),
        "used_event",
        shot.value("used", "avail_event"),
        "NO_INTERRUPT" if flags[0] & AVAIL_NO_INTERRUPT else "",
    )
    used = _ring(
        film,
        frame,
        "used",
        "used ring",
        "device writes",
        ("id", "len"),
        "avail_event",
        shot.value("avail", "used_event"),
        "NO_NOTIFY" if flags[1] & USED_NO_NOTIFY else "",
    )
    return desc, avail, used


def _split_desc(frame: Frame, slot: int) -> Row:
    shot = frame.shot
    flags = shot.value("desc", "flags", slot)
    texts = {
        "addr": f"{shot.value('desc', 'addr', slot):#x}",
        "len": str(shot.value("desc", "len", slot)),
        "flags": _flag_names(flags),
        "next": str(shot.value("desc", "next", slot)) if flags & DescFlag.NEXT else "",
    }
    return Row(frame.marks.get(("desc", slot)), (Cell(str(slot)), *_cells(frame, "desc", slot, texts)))


def _ring(film: Film, frame: Frame, area: str, title: str, writer: str, fields: tuple[str, ...], event: str, wish: int, flag: str) -> Table:
    shot, size = frame.shot, frame.shot.layout.size
    idx = shot.value(area, "idx")
    blank = (Cell(""),) * (len(fields) - 1)

    def single(field: str, remark: str = "") -> Row:
        return Row(None, (Cell(field), _cell(frame, Word(area, -1, field), str(shot.value(area, field))), *blank), remark)

    slots = _shown(film, frame, area, (idx % size,))
    rows = [single("flags", flag), single("idx")]
    for slot in slots:
        texts = {field: str(shot.value(area, field, slot)) for field in fields}
        points = ["idx"] * (slot == idx % size) + ["event"] * (film.event_idx and slot == wish % size)
        rows.append(Row(frame.marks.get((area, slot)), (Cell(str(slot)), *_cells(frame, area, slot, texts)), " ".join(points)))
    rows.append(single(event))
    widths = (("slot", len(event)), *((field, 5) for field in fields))
    return Table(title, writer, widths, tuple(rows), len("NO_INTERRUPT"), size - len(slots))


# -- packed ------------------------------------------------------------------------------------------------------------------


def _packed(film: Film, frame: Frame) -> tuple[Table, ...]:
    size = frame.shot.layout.size
    sides = [("driver", frame.owners.driver), ("device", frame.owners.device)]
    slots = _shown(film, frame, "desc", [at[0] for _, at in sides if at])
    rows = []
    for slot in slots:
        points = [f"{who} {at[1]:d}" for who, at in sides if at and at[0] == slot]
        rows.append(_packed_desc(film, frame, slot)._replace(remark=" ".join(points)))
    ring = Table(
        "descriptor ring",
        "both write",
        (("slot", 4), ("addr", 8), ("len", 5), ("id", 4), ("flags", 11), ("AVAIL", 5), ("USED", 5)),
        tuple(rows),
        len("driver 1 device 1"),
        size - len(slots),
    )
    return ring, _event(frame, "avail", "driver's event", "driver writes"), _event(frame, "used", "device's event", "device writes")


def _packed_desc(film: Film, frame: Frame, slot: int) -> Row:
    shot = frame.shot
    flags = shot.value("desc", "flags", slot)
    texts = {
        "addr": f"{shot.value('desc', 'addr', slot):#x}",
        "len": str(shot.value("desc", "len", slot)),
        "id": str(shot.value("desc", "id", slot)),
        "flags": _flag_names(flags & ~(PACKED_AVAIL | PACKED_USED)),
    }
    bits = [Cell(f"{now:d}", now != old) for now, old in zip(shot.bits(slot), film[max(frame.number - 1, 0)].shot.bits(slot), strict=True)]
    cells = _cells(frame, "desc", slot, texts)
    if any(bit.changed for bit in bits):
        cells = (*cells[:-1], cells[-1]._replace(changed=_flags_before(film, frame, slot) != texts["flags"]))
    return Row(frame.marks.get(("desc", slot)), (Cell(str(slot)), *cells, *bits))


def _flags_before(film: Film, frame: Frame, slot: int) -> str:
    before = film[max(frame.number - 1, 0)].shot
    return _flag_names(before.value("desc", "flags", slot) & ~(PACKED_AVAIL | PACKED_USED))


def _event(frame: Frame, area: str, title: str, writer: str) -> Table:
    shot = frame.shot
    off_wrap, flags = shot.value(area, "off_wrap"), shot.value(area, "flags")
    place, flags_word = Word(area, -1, "off_wrap"), Word(area, -1, "flags")
    rows = (
        ("off", _cell(frame, place, str(off_wrap & 0x7FFF))),
        ("wrap", _cell(frame, place, str(off_wrap >> 15))),
        ("flags", _cell(frame, flags_word, _EVENTS.get(flags & 3, str(flags)))),
    )
    return Table(title, writer, (("word", 6), ("value", 8)), tuple(Row(None, (Cell(name), cell)) for name, cell in rows))


# -- both --------------------------------------------------------------------------------------------------------------------


def _cells(frame: Frame, area: str, slot: int, texts: dict[str, str]) -> tuple[Cell, ...]:
    return tuple(_cell(frame, Word(area, slot, field), text) for field, text in texts.items())


def _cell(frame: Frame, word: Word, text: str) -> Cell:
    return Cell(text, word in frame.changed, word in frame.on_the_way)


def _flag_names(flags: int) -> str:
    names = [str(flag.name) for flag in DescFlag if flags & flag]
    unknown = flags & ~sum(DescFlag)
    return " ".join([*names, *([f"{unknown:#x}?"] if unknown else [])])


def _shown(film: Film, frame: Frame, area: str, always: Iterable[int]) -> list[int]:
    """The slots to show: all of a small ring, else those that changed last, filled up from slot 0."""
    size = frame.shot.layout.size
    if size <= MOST_ROWS:
        return list(range(size))
    slots = dict.fromkeys(always)
    for number in range(frame.number, -1, -1):
        for word in sorted(film[number].changed):
            if word.area == area and word.slot >= 0 and len(slots) < MOST_ROWS:
                slots[word.slot] = None
        if len(slots) >= MOST_ROWS:
            break
    for slot in range(MOST_ROWS):
        if len(slots) < MOST_ROWS:
            slots[slot] = None
    return sorted(slots)
