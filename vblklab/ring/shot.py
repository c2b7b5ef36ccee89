"""One moment of a virtqueue, split or packed: the bytes of its three areas, as words that can be compared with another moment.

Neither half of the queue is asked and nothing that lies in memory is trusted: a broken ring is shown as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from ..errors import ConfigError
from ..memory import GuestMemory
from ..spec.virtio_ring import DESC_BYTES, PACKED_AVAIL, PACKED_USED
from .packed import PackedLayout
from .split import SplitLayout

__all__ = ["AREAS", "Layout", "RingShot", "Word", "words_of"]

Layout: TypeAlias = "SplitLayout | PackedLayout"
AREAS = ("desc", "avail", "used")
"""The areas by the names of the registers that tell where they lie; a packed ring's ``avail`` and ``used`` are the two event words."""

_SPLIT_DESC = (("addr", 0, 8), ("len", 8, 4), ("flags", 12, 2), ("next", 14, 2))
_PACKED_DESC = (("addr", 0, 8), ("len", 8, 4), ("id", 12, 2), ("flags", 14, 2))
_EVENT = (("off_wrap", 0, 2), ("flags", 2, 2))


class Word(NamedTuple):
    """The name of one field of a ring; ``slot`` is -1 for a field that there is once, such as ``idx``."""

    area: str
    slot: int
    field: str


class Place(NamedTuple):
    """Where a word lies: its offset in its area and its bytes."""

    word: Word
    offset: int
    length: int


class RingShot(NamedTuple):
    """The bytes of the three areas at one moment; ``RingShot.of(memory, layout)`` copies them."""

    layout: Layout
    desc: bytes
    avail: bytes
    used: bytes

    @classmethod
    def of(cls, memory: GuestMemory, layout: Layout) -> RingShot:
        """A copy of the ring as it lies in memory now; BadAddress or VirtioError if the layout does not lie in it."""
        layout.check(memory)
        return cls(layout, *(memory.read(gpa, length) for gpa, length in layout.areas()))

    @property
    def packed(self) -> bool:
        """Whether the ring is packed (§2.8) rather than split (§2.7)."""
        return isinstance(self.layout, PackedLayout)

    @property
    def kept(self) -> int:
        """How many bytes are kept."""
        return len(self.desc) + len(self.avail) + len(self.used)

    def value(self, area: str, field: str, slot: int = -1) -> int:
        """The value of one word; ConfigError if the ring has none of this name."""
        for place in words_of(self.layout, area, slot) if -1 <= slot < self.layout.size and area in AREAS else ():
            if place.word.field == field:
                return int.from_bytes(self.area(area)[place.offset : place.offset + place.length], "little")
        raise ConfigError(f"no word {area}.{field}, slot {slot}", f"this ring has slots 0 to {self.layout.size - 1}")

    def area(self, area: str) -> bytes:
        """The bytes of one of ``AREAS``."""
        return self.desc if area == "desc" else self.avail if area == "avail" else self.used

    def changed_since(self, earlier: RingShot) -> frozenset[Word]:
        """The words whose bytes differ; ConfigError if the other is a shot of another ring."""
        if earlier.layout != self.layout:
            raise ConfigError(f"a ring at {self.layout} compared with one at {earlier.layout}", "take all frames of one queue")
        return frozenset(word for area in AREAS for word in self._differences(earlier, area))

    def _differences(self, earlier: RingShot, area: str) -> Iterator[Word]:
        now, before = self.area(area), earlier.area(area)
        if now == before:
            return
        slots = range(-1, self.layout.size) if area == "desc" or not self.packed else (-1,)
        for slot in slots:
            for place in words_of(self.layout, area, slot):
                end = place.offset + place.length
                if now[place.offset : end] != before[place.offset : end]:
                    yield place.word

    # -- packed rings ----------------------------------------------------------------------------------------------------

    def bits(self, slot: int) -> tuple[bool, bool]:
        """The AVAIL and USED bits of a packed descriptor."""
        flags = int.from_bytes(self.desc[slot * DESC_BYTES + 14 : slot * DESC_BYTES + 16], "little")
        return bool(flags & PACKED_AVAIL), bool(flags & PACKED_USED)

    def driver_position(self) -> tuple[int, bool]:
        """The slot that the driver of a packed ring fills next and its wrap counter, as the AVAIL bits say.

        Whoever writes a descriptor leaves its AVAIL bit at the lap's wrap counter, so the slots of this lap have one value and the
        slots of the lap before the other.
        """
        first = self.bits(0)[0]
        for slot in range(1, self.layout.size):
            if self.bits(slot)[0] != first:
                return slot, first
        return 0, not first


def words_of(layout: Layout, area: str, slot: int) -> tuple[Place, ...]:
    """The words of a slot of an area, or with slot -1 those that the area has once."""
    size = layout.size
    fields: tuple[tuple[str, int, int], ...]
    entry: tuple[tuple[str, int, int], ...]
    if isinstance(layout, PackedLayout):
        fields = _PACKED_DESC if area == "desc" and slot >= 0 else _EVENT if area != "desc" and slot < 0 else ()
        start = slot * DESC_BYTES if slot >= 0 else 0
    elif area == "desc":
        fields, start = (_SPLIT_DESC, slot * DESC_BYTES) if slot >= 0 else ((), 0)
    else:
        width, entry, event = (2, (("head", 0, 2),), "used_event") if area == "avail" else (8, (("id", 0, 4), ("len", 4, 4)), "avail_event")
        fields = entry if slot >= 0 else (("flags", 0, 2), ("idx", 2, 2), (event, 4 + width * size, 2))
        start = 4 + slot * width if slot >= 0 else 0
    return tuple(Place(Word(area, slot, name), start + offset, length) for name, offset, length in fields)
