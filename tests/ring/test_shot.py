"""One moment of a ring as words: every byte has one name, and what is compared is what changed."""

from __future__ import annotations

import pytest

from vblklab.errors import BadAddress, ConfigError
from vblklab.memory import GuestMemory, GuestPages
from vblklab.ring.packed import PackedDriver, PackedLayout
from vblklab.ring.shot import AREAS, Layout, RingShot, Word, words_of
from vblklab.ring.split import SplitDriver, SplitLayout

KINDS = {"split": SplitLayout, "packed": PackedLayout}


def ring(kind: str, size: int = 8) -> tuple[GuestPages, Layout]:
    pages = GuestPages(GuestMemory(bytearray(1 << 16)))
    return pages, KINDS[kind].alloc(pages, size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_every_byte_of_a_ring_belongs_to_one_word(kind: str, size: int) -> None:
    pages, layout = ring(kind, size)
    shot = RingShot.of(pages.memory, layout)
    for area in AREAS:
        slots = range(-1, size)
        covered = [byte for slot in slots for p in words_of(layout, area, slot) for byte in range(p.offset, p.offset + p.length)]
        assert sorted(covered) == list(range(len(shot.area(area))))


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_that_is_changed_is_reported_as_its_word(kind: str) -> None:
    pages, layout = ring(kind)
    before = RingShot.of(pages.memory, layout)
    for area in AREAS:
        for slot in range(-1, layout.size):
            for place in words_of(layout, area, slot):
                at = getattr(layout, area) + place.offset + place.length - 1
                pages.memory.write(at, b"\x01")
                now = RingShot.of(pages.memory, layout)
                assert now.changed_since(before) == {place.word}
                assert now.value(*place.word[::2], place.word.slot) == 1 << 8 * (place.length - 1)
                pages.memory.write(at, b"\x00")


def test_a_split_driver_changes_the_words_of_the_specification() -> None:
    pages, layout = ring("split")
    driver = SplitDriver(pages.memory, layout)
    before = RingShot.of(pages.memory, layout)
    driver.add_sgs([(0x8000, 16)], [(0x9000, 512)], "token")
    driver.publish()
    changed = RingShot.of(pages.memory, layout).changed_since(before)
    assert {Word("desc", 0, "addr"), Word("desc", 0, "len"), Word("desc", 1, "addr"), Word("avail", -1, "idx")} <= changed
    assert not any(word.area == "used" for word in changed)


def test_the_position_of_a_packed_driver_is_read_from_the_ring() -> None:
    pages, layout = ring("packed", 4)
    driver = PackedDriver(pages.memory, layout)
    assert RingShot.of(pages.memory, layout).driver_position() == (0, True)
    driver.add_sgs([(0x8000, 16)], [(0x9000, 512), (0xA000, 1)], "token")
    driver.publish()
    assert RingShot.of(pages.memory, layout).driver_position() == (3, True)


def test_two_rings_are_not_compared_and_unknown_words_are_refused() -> None:
    pages, layout = ring("split")
    shot = RingShot.of(pages.memory, layout)
    other = RingShot.of(pages.memory, SplitLayout.alloc(pages, 8))
    with pytest.raises(ConfigError, match="one queue"):
        shot.changed_since(other)
    for area, name, slot in (("avail", "head", 8), ("avail", "head", -2), ("desc", "id", 0), ("there", "idx", -1)):
        with pytest.raises(ConfigError, match="slots 0 to 7"):
            shot.value(area, name, slot)
    with pytest.raises(BadAddress):
        RingShot.of(pages.memory, layout._replace(desc=1 << 20))
