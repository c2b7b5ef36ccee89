"""A film of a virtqueue: its words at each moment when one changed, and which request each slot belongs to.

All of it is read from the ring's memory, so a film of a broken driver or device shows what that one did.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ConfigError
from ..events import EVENTS, GROUPS
from ..memory import GuestMemory
from ..ring.dump import RingView
from ..ring.shot import AREAS, RingShot, Word, words_of
from ..spec.virtio import Feature
from .film_owners import Mark, Owners, owners_of

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Film", "Frame", "Written", "film"]

MOST_BYTES = 64 << 20
"""A film keeps at most so many bytes of rings; then the recording ends, and the film says so."""
_LINE = 64

_STORES = {
    members[0][0]: key
    for members in GROUPS.values()
    for key, _ in members[1:]
    if key.startswith("virtqueue_") and EVENTS[members[0][0]].step == EVENTS[key].step
}
"""Points that stand at the begin of a group: the store that is seen there is the one that this later point of the group reports."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One moment: the ring, the words that changed since the frame before, and the request that each slot belongs to.

    ``label`` says what was done (a trace point's key), ``t_ns`` when (None where there is no time).  ``on_the_way`` are words that one
    side has stored and the other does not see yet, in a film of a schedule (``vb.schedules``).
    """

    number: int
    label: str
    t_ns: int | None
    shot: RingShot
    changed: frozenset[Word]
    owners: Owners
    on_the_way: frozenset[Word] = frozenset()

    @property
    def marks(self) -> Mapping[tuple[str, int], Mark]:
        """The request that a slot belongs to, by (area, slot)."""
        return self.owners.marks

    @property
    def step(self) -> str:
        """The step of the path that the label belongs to, or nothing."""
        event = EVENTS.get(self.label)
        return event.step if event else ""

    def writer(self, word: Word) -> str:
        """Who wrote a word that changed: ``driver`` or ``device``."""
        if not self.shot.packed:
            return "device" if word.area == "used" else "driver"
        if word.area != "desc":
            return "driver" if word.area == "avail" else "device"
        if (event := EVENTS.get(self.label)) is not None and event.room in ("driver", "device"):
            return event.room
        available, used = self.shot.bits(word.slot)
        return "device" if available == used else "driver"

    def what(self) -> str:
        """The changed words in one line: ``avail.idx=1``."""
        order = {area: i for i, area in enumerate(AREAS)}
        parts = []
        for slot_of in sorted({(order[w.area], w.slot) for w in self.changed}):
            area, slot = AREAS[slot_of[0]], slot_of[1]
            fields = [p.word.field for p in words_of(self.shot.layout, area, slot) if p.word in self.changed]
            if slot < 0:
                values = [(field, self.shot.value(area, field)) for field in fields]
                parts += [f"{_area_name(self.shot, area)}.{field}={_shown(field, value)}" for field, value in values]
            else:
                parts.append(f"{_area_name(self.shot, area)}[{slot}]" + (f".{fields[0]}" if len(fields) == 1 else ""))
        return " ".join(parts)


def _shown(field: str, value: int) -> str:
    return f"{value & 0x7FFF},wrap={value >> 15}" if field == "off_wrap" else str(value)


def _area_name(shot: RingShot, area: str) -> str:
    if not shot.packed:
        return area
    return {"desc": "ring", "avail": "driver_event", "used": "device_event"}[area]


class Written(NamedTuple):
    """What changed in a ring over a film: buffers returned, bytes of changed words by each side, and 64-byte lines by each side.

    A store that leaves a word as it was changes nothing and is not counted.  A line counts once a frame.
    """

    ios: int
    driver_bytes: int
    device_bytes: int
    driver_lines: int
    device_lines: int

    def __str__(self) -> str:
        """A small table for the end of a cell: ``print(film.written())``."""
        per = self.ios or 1
        rows = [("driver writes", self.driver_bytes, self.driver_lines), ("device writes", self.device_bytes, self.device_lines)]
        rows.append(("together", self.driver_bytes + self.device_bytes, self.driver_lines + self.device_lines))
        head = f"{f'{self.ios} I/Os':13} bytes per I/O   64-byte lines per I/O"
        return "\n".join([head, *(f"{name:13} {size / per:13.1f} {lines / per:23.2f}" for name, size, lines in rows)])


class Taken(NamedTuple):
    """What a frame is made of."""

    label: str
    shot: RingShot
    t_ns: int | None = None
    on_the_way: frozenset[Word] = frozenset()


class Film(Sequence[Frame]):
    """Frames of one virtqueue, in order.  ``film[n]`` is a frame, ``film.text(n)`` its text, ``film.strip()`` a picture of several.

    In a notebook a film is a player; ``print(film)`` lists the frames.  ``run`` is the Run up to the last frame, where there is one;
    ``event_idx`` says whether the event words of a split ring mean anything, ``in_order`` whether a used element may stand for several.
    """

    def __init__(
        self, shots: Iterable[Taken], *, title: str, run: Any = None, remark: str = "", event_idx: bool = True, in_order: bool = False
    ) -> None:
        self.title = title
        self.run = run
        self.remark = remark
        self.event_idx = event_idx
        self._frames: list[Frame] = []
        before: RingShot | None = None
        taken = list(shots)
        owned = owners_of([one.shot for one in taken], in_order=in_order)
        for number, ((label, shot, t_ns, away), owners) in enumerate(zip(taken, owned, strict=True)):
            changed = shot.changed_since(before) if before is not None else frozenset()
            self._frames.append(Frame(number, label, t_ns, shot, changed, owners, away))
            before = shot

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return self._frames[number]
        return self._frames[self.check(number)]

    def __iter__(self) -> Iterator[Frame]:
        return iter(self._frames)

    def check(self, number: Any) -> int:
        """``number`` as the number of a frame, counted from the end if negative; ConfigError if there is no such frame."""
        if not isinstance(number, int) or isinstance(number, bool) or not -len(self) <= number < len(self):
            raise ConfigError(f"frame {number!r} of a film", f"this one has the frames 0 to {len(self) - 1}")
        return number % len(self)

    def frames_of(self, label: str) -> list[int]:
        """The numbers of the frames with this label; ConfigError if there is none."""
        numbers = [frame.number for frame in self if frame.label == label]
        if not numbers:
            known = ", ".join(dict.fromkeys(frame.label for frame in self))
            raise ConfigError(f"no frame {label!r} in this film", f"its labels are {known}")
        return numbers

    def written(self, start: int = 0, stop: int | None = None) -> Written:
        """What driver and device changed in the ring from frame ``start`` up to, not with, ``stop``."""
        lines = {"driver": 0, "device": 0}
        sizes = {"driver": 0, "device": 0}
        part = self._frames[start:stop]
        for frame in part:
            seen = set()
            for word in frame.changed:
                who = frame.writer(word)
                place = next(p for p in words_of(frame.shot.layout, word.area, word.slot) if p.word == word)
                sizes[who] += place.length
                base = getattr(frame.shot.layout, word.area)
                seen.add((who, (base + place.offset) // _LINE))
            for who, _ in seen:
                lines[who] += 1
        returned = {mark.request for frame in part for mark in frame.marks.values() if mark.state == "used"}
        earlier = {mark.request for mark in self._frames[start - 1].marks.values() if mark.state == "used"} if start > 0 else set()
        return Written(len(returned - earlier), sizes["driver"], sizes["device"], lines["driver"], lines["device"])

    # -- text and pictures -----------------------------------------------------------------------------------------------

    def text(self, number: int = 0) -> str:
        """One frame as text of fixed width; ``*`` marks what changed, ``r1`` the request that a slot belongs to."""
        from .film_text import frame_text

        return frame_text(self, self.check(number))

    def __str__(self) -> str:
        width = max((len(frame.label) for frame in self), default=0)
        lines = [f"{frame.number:4}  {time_text(frame):>12}  {frame.label:<{width}}  {frame.what()}".rstrip() for frame in self]
        return "\n".join([self.title, *([self.remark] if self.remark else []), *lines])

    def __repr__(self) -> str:
        return f"<{self.title}>"

    def strip(self, frames: Sequence[int] | None = None) -> Any:
        """A figure of some frames below each other, for a report: a ``plotly`` Figure; without ``frames`` the first four."""
        from ..view.ring_strip import strip

        return strip(self, frames)

    def player(self, start: int = 0) -> Any:
        """A widget that plays, steps and scrubs through the frames; it starts at frame ``start``."""
        from ..view.ring_player import RingPlayer

        return RingPlayer(self, start)

    def _repr_mimebundle_(self, **_: Any) -> Any:
        """A player; where there are no widgets, the first frames as pictures."""
        return self.player().bundle()


def time_text(frame: Frame) -> str:
    """When the frame was taken."""
    return "" if frame.t_ns is None else f"{frame.t_ns / 1000:.3f} µs"


def film(source: Any, *, queue: int = 0, steps: int = 200, title: str = "") -> Film:
    """Film a virtqueue: step a booted ``SimMachine`` over ``steps`` trace points, with a frame whenever the ring's memory changed.

    ``source`` may also be a list of (label, shot) or (label, shot, ns), where a shot is a ``RingShot`` or what ``vm.ring()``
    returns; or what ``vb.schedules()`` found.  At most 64 MiB of rings are kept.  ConfigError for anything else.
    """
    if callable(getattr(source, "frames", None)) and hasattr(source, "what"):
        setup = source.setup
        return _film_of_list(source.frames(), title or str(source.what), setup.event_idx, bool(getattr(setup.queue, "in_order", False)))
    if callable(getattr(source, "step", None)) and hasattr(source, "driver"):
        return _film_of_vm(source, queue, steps, title)
    if isinstance(source, Iterable) and not isinstance(source, (str, bytes)):
        return _film_of_list(list(source), title)
    raise ConfigError(f"a film of a {type(source).__name__}", "give recipe.boot(vb.SimMachine()) or a list of (label, shot)")


def _film_of_list(items: list[Any], title: str, event_idx: bool = True, in_order: bool = False) -> Film:
    shots: list[Taken] = []
    kept = 0
    for number, item in enumerate(items):
        if hasattr(item, "driver") and hasattr(item, "device"):
            shots.append(_two_views(item, shots[-1] if shots else None))
            continue
        parts = tuple(item) if isinstance(item, (tuple, list)) else ()
        label, shot, t_ns = (*parts, None, None, None)[:3]
        if isinstance(shot, RingView):
            shot = shot.shot()
        if len(parts) not in (2, 3) or not isinstance(label, str) or not isinstance(shot, RingShot) or not isinstance(t_ns, int | None):
            raise ConfigError(f"frame {number} is {_short(item)}", "give (label, shot) or (label, shot, ns), where shot is a RingShot")
        kept += shot.kept
        if kept > MOST_BYTES:
            raise ConfigError(f"a film of {len(items):,} frames of {shot.kept:,} bytes", f"it keeps {MOST_BYTES >> 20} MiB: give fewer")
        shots.append(Taken(label, shot, t_ns))
    if not shots:
        raise ConfigError("a film of an empty list", "give at least one (label, shot)")
    return Film(shots, title=title or _title(shots[0].shot, len(shots)), event_idx=event_idx, in_order=in_order)


def _film_of_vm(vm: Any, queue: int, steps: int, title: str) -> Film:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ConfigError(f"film(steps={steps!r})", "give how many trace points to step over, for example 200")
    queues = vm.driver.queues
    if not isinstance(queue, int) or isinstance(queue, bool) or not 0 <= queue < len(queues):
        raise ConfigError(f"film(queue={queue!r})", f"this machine's queues are 0 to {len(queues) - 1}")
    shots = [Taken("start", RingShot.of(vm.memory, queues[queue].layout), vm.now_ns)]
    kept, remark = shots[0].shot.kept, ""
    for _ in range(steps):
        event = vm.step()
        if event is None:
            break
        shot = RingShot.of(vm.memory, queues[queue].layout)
        if shot == shots[-1].shot:
            continue
        kept += shot.kept
        if kept > MOST_BYTES:
            remark = f"The recording ended at {len(shots)} frames: a film keeps at most {MOST_BYTES >> 20} MiB of rings."
            break
        shots.append(Taken(_STORES.get(event.key, event.key), shot, event.t_ns))
    has = vm.driver.features
    options = dict(event_idx=bool(has & Feature.EVENT_IDX), in_order=bool(has & Feature.IN_ORDER))
    return Film(shots, title=title or _title(shots[0].shot, len(shots), queue), run=vm.result(), remark=remark, **options)


def _two_views(item: Any, before: Taken | None) -> Taken:
    """A frame of a schedule, in which driver and device may see other values: each word as the side that stored it last sees it.

    Both saw the same before the store, so the new value is the one that is not the old; while the word is on the way it stays.
    """
    driver, device = (RingShot.of(GuestMemory(bytearray(view)), item.layout) for view in (item.driver, item.device))
    differ = driver.changed_since(device)
    areas = {area: bytearray(driver.area(area)) for area in AREAS}
    for word in differ:
        place = next(p for p in words_of(item.layout, word.area, word.slot) if p.word == word)
        where = slice(place.offset, place.offset + place.length)
        old = before.shot.area(word.area)[where] if before is not None else b""
        views = driver.area(word.area)[where], device.area(word.area)[where]
        stays = before is not None and word in before.on_the_way and old in views
        areas[word.area][where] = old if stays else next(view for view in views if view != old)
    return Taken(item.label, RingShot(item.layout, *(bytes(areas[area]) for area in AREAS)), None, differ)


def _title(shot: RingShot, frames: int, queue: int | None = None) -> str:
    name = "a virtqueue" if queue is None else f"virtqueue {queue}"
    return f"{name}, {'packed' if shot.packed else 'split'}, {shot.layout.size} entries: {frames} frames"


def _short(item: Any) -> str:
    return f"a {type(item).__name__}" + (f" of {len(item)}" if isinstance(item, (tuple, list)) else "")
