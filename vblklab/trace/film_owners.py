"""Which request a slot of a ring belongs to, worked out from what becomes available and what is used, frame by frame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from ..ring.shot import RingShot
from ..spec.virtio_ring import DescFlag

__all__ = ["Mark", "Owners", "owners_of"]

Entry = TypeVar("Entry")


class Mark(NamedTuple):
    """A request, numbered from 1 in the order of publication, and its state.

    ``written``: the driver has filled it in and not published it; ``available``: published; ``used``: returned by the device.
    """

    request: int
    state: str


class Owners(NamedTuple):
    """What a frame knows of requests: marks by (area, slot), and for a packed ring the slot that each side writes next with its wrap."""

    marks: Mapping[tuple[str, int], Mark]
    driver: tuple[int, bool] | None = None
    device: tuple[int, bool] | None = None


def owners_of(shots: Sequence[RingShot], *, in_order: bool = False) -> Iterator[Owners]:
    """The owners of each shot's slots; what lay in the ring before the first shot has none.

    With ``in_order`` a used element stands for every buffer up to the one that it names (§2.7.9, §2.8.9).
    """
    if not shots:
        return iter(())
    return _packed(shots, in_order) if shots[0].packed else _split(shots, in_order)


def _returned(in_flight: dict[int, Entry], number: int, in_order: bool) -> list[Entry]:
    """What a used element that names ``number`` takes out of ``in_flight``, which is in the order of publication."""
    if number not in in_flight:
        return []
    numbers = list(in_flight)
    batch = numbers[: numbers.index(number) + 1] if in_order else [number]
    return [in_flight.pop(each) for each in batch]


def _end(marks: dict[tuple[str, int], Mark], requests: set[int]) -> None:
    """These requests are returned."""
    for key, mark in list(marks.items()):
        if mark.request in requests:
            marks[key] = Mark(mark.request, "used")


def _split(shots: Sequence[RingShot], in_order: bool) -> Iterator[Owners]:
    size = shots[0].layout.size
    avail_idx, used_idx = shots[0].value("avail", "idx"), shots[0].value("used", "idx")
    marks: dict[tuple[str, int], Mark] = {}
    owner: dict[int, int] = {}  # request of a head in flight
    count, before = 0, shots[0]
    for shot in shots:
        new_avail, new_used = shot.value("avail", "idx"), shot.value("used", "idx")
        for idx in _steps(avail_idx, new_avail, size):
            head = shot.value("avail", "head", idx % size)
            count += 1
            owner[head] = count
            marks["avail", idx % size] = Mark(count, "available")
            _mark(marks, _chain(shot, head), Mark(count, "available"))
        pending = shot.value("avail", "head", new_avail % size)
        touched = {(word.area, word.slot) for word in shot.changed_since(before)}
        if new_avail == avail_idx and touched & {("desc", pending), ("avail", new_avail % size)}:
            _mark(marks, _chain(shot, pending), Mark(count + 1, "written"))
            marks["avail", new_avail % size] = Mark(count + 1, "written")
        skipped = 0
        for idx in _steps(used_idx, new_used, size):
            marks.pop(("used", idx % size), None)
            if skipped:  # the element before stands for it
                skipped -= 1
            elif requests := _returned(owner, shot.value("used", "id", idx % size), in_order):
                _end(marks, set(requests))
                marks["used", idx % size] = Mark(requests[-1], "used")
                skipped = len(requests) - 1
        pending_id = shot.value("used", "id", new_used % size)
        if new_used == used_idx and ("used", new_used % size) in touched:
            marks["used", new_used % size] = Mark(owner.get(pending_id, 0), "written")
        avail_idx, used_idx, before = new_avail, new_used, shot
        yield Owners({key: mark for key, mark in marks.items() if mark.request})


def _steps(old: int, new: int, size: int) -> Iterator[int]:
    """The free-running indices from ``old`` up to ``new``; none if it moved by more than the ring holds, which no sound side does."""
    moved = (new - old) & 0xFFFF
    return iter((old + i) & 0xFFFF for i in range(moved if moved <= size else 0))


def _mark(marks: dict[tuple[str, int], Mark], slots: Sequence[int], mark: Mark) -> None:
    for slot in slots:
        marks["desc", slot] = mark


def _chain(shot: RingShot, head: int) -> list[int]:
    """The slots of a split chain; a loop or a link to nowhere ends it."""
    slots: list[int] = []
    while head < shot.layout.size and head not in slots:
        slots.append(head)
        if not shot.value("desc", "flags", head) & DescFlag.NEXT:
            break
        head = shot.value("desc", "next", head)
    return slots


def _packed(shots: Sequence[RingShot], in_order: bool) -> Iterator[Owners]:
    size = shots[0].layout.size
    driver = device = shots[0].driver_position()
    marks: dict[tuple[str, int], Mark] = {}
    lists: dict[int, tuple[int, int]] = {}  # of a buffer id in flight: its request, its descriptors
    count = 0
    before = shots[0]
    for shot in shots:
        while shot.bits(driver[0]) == (driver[1], not driver[1]) and (found := _list(shot, driver[0])):
            count += 1
            length, number = found
            lists[number] = count, length
            _mark(marks, [(driver[0] + i) % size for i in range(length)], Mark(count, "available"))
            driver = _ahead(driver, length, size)
        _unpublished(shot, before, marks, driver[0], count + 1)
        while shot.bits(device[0]) == (device[1], device[1]) and (
            entries := _returned(lists, shot.value("desc", "id", device[0]), in_order)
        ):
            _end(marks, {request for request, _ in entries})
            marks["desc", device[0]] = Mark(entries[0][0], "used")  # in order it is that one's slot
            device = _ahead(device, sum(length for _, length in entries), size)
        before = shot
        yield Owners(dict(marks), driver, device)


def _ahead(position: tuple[int, bool], length: int, size: int) -> tuple[int, bool]:
    """A slot and its wrap counter, ``length`` descriptors further."""
    slot = position[0] + length
    return slot % size, position[1] != (slot >= size)


def _list(shot: RingShot, start: int) -> tuple[int, int] | None:
    """How many descriptors the list at a slot has, and its buffer id, which the last of them holds; None if it never ends."""
    size = shot.layout.size
    for i in range(size):
        slot = (start + i) % size
        if not shot.value("desc", "flags", slot) & DescFlag.NEXT:
            return i + 1, shot.value("desc", "id", slot)
    return None


def _unpublished(shot: RingShot, before: RingShot, marks: dict[tuple[str, int], Mark], start: int, request: int) -> None:
    """Mark the descriptors from the driver's position on that it has just filled in; the first one's flags are still to come."""
    slots = {word.slot for word in shot.changed_since(before) if word.area == "desc"}
    for i in range(shot.layout.size):
        slot = (start + i) % shot.layout.size
        mark = marks.get(("desc", slot))
        if slot not in slots or (mark is not None and mark.state == "available"):
            break
        marks["desc", slot] = Mark(request, "written")
