"""The checks of chapter 05: right answers in several forms, and for each kind of wrong answer the hint that helps."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import vblklab as vb
from vblklab.interleave import Schedules, Step
from vblklab.lab.check import Verdict

Decode = Callable[[bytes, int], Any]


def chain(table: bytes, head: int, layout: str = "<QIHH") -> Any:
    parts = []
    while True:
        addr, length, flags, following = struct.unpack_from(layout, table, 16 * head)
        parts.append((addr, length, bool(flags & 2)))
        if not flags & 1:
            return parts
        head = following


def says(verdict: Verdict, words: str) -> bool:
    return verdict.state == "wrong" and words in verdict.text


def neighbours(table: bytes, head: int) -> Any:
    parts, slot = [], head
    while True:
        addr, length, flags, _ = struct.unpack_from("<QIHH", table, 16 * (slot % 8))
        parts.append((addr, length, bool(flags & 2)))
        if not flags & 1 or len(parts) > 8:
            return parts
        slot += 1


def endless(table: bytes, head: int) -> Any:
    while True:
        head += 1


def one_too_many(table: bytes, head: int) -> Any:
    parts = chain(table, head)
    return [*parts, (1, 1, False)]


def test_decode_is_judged() -> None:
    check = vb.check.decode_chain
    assert check(chain).ok and check(lambda table, head: tuple(map(list, chain(table, head)))).ok
    wrong: list[tuple[Decode, str]] = [
        (lambda table, head: chain(table, 0), "slot 0"),
        (lambda table, head: [(*struct.unpack_from(">QI", table, 16 * head), False)], "little-endian"),
        (lambda table, head: chain(table, head)[:1], "goes on"),
        (lambda table, head: [(a, n, True) for a, n, _ in chain(table, head)], "WRITE"),
        (lambda table, head: [(a, n + 1, w) for a, n, w in chain(table, head)], "lengths"),
        (lambda table, head: [(a + 1, n, w) for a, n, w in chain(table, head)], "first address"),
        (lambda table, head: [1, 2], "tuples"),
        (lambda table, head: 1 / 0, "ZeroDivisionError"),
        (neighbours, "neighbour"),
        (endless, "does not come to an end"),
        (one_too_many, "follow `next` of the last"),
    ]
    for decode, words in wrong:
        assert says(check(decode), words), (words, check(decode))
    assert {check(lambda table, head, nothing=nothing: nothing).state for nothing in (None, ..., [])} == {check(...).state} == {"open"}
    assert says(check(5), "function itself")


def encoded(parts: Any, layout: str = "<QIHH", last: int = 0, write: int = 2, step: int = 1) -> bytes:
    end = len(parts) - 1
    return b"".join(
        struct.pack(layout, addr, length, (1 if slot < end else last) + write * writes, slot + step if slot < end else 0)
        for slot, (addr, length, writes) in enumerate(parts)
    )


def test_encode_is_judged() -> None:
    check = vb.check.encode_chain
    assert check(encoded).ok and check(lambda parts: bytearray(encoded(parts))).ok
    wrong: list[tuple[Callable[[Any], Any], str]] = [
        (lambda parts: encoded(parts, layout=">QIHH"), "wrong order"),
        (lambda parts: encoded(parts, last=1), "last descriptor"),
        (lambda parts: encoded(parts, write=0), "WRITE"),
        (lambda parts: encoded(parts, step=2), "should name slot"),
        (lambda parts: encoded(parts)[:-1], "bytes, yours have"),
        (lambda parts: encoded(parts).hex(), "Return bytes"),
        (lambda parts: encoded([(a, n + 1, w) for a, n, w in parts]), "`len`"),
        (lambda parts: encoded([(a + 1, n, w) for a, n, w in parts]), "`addr`"),
        (lambda parts: encoded(parts, write=6), "no one asked"),
    ]
    for encode, words in wrong:
        assert says(check(encode), words), (words, check(encode))


def test_indices_are_judged() -> None:
    check = vb.check.index_wrap
    assert check(lambda avail, used: (avail - used) & 0xFFFF).ok
    assert says(check(lambda avail, used: avail - used), "behind 65535 comes 0")
    assert says(check(lambda avail, used: (avail - used) % 8), "only count up")
    assert says(check(lambda avail: avail), "TypeError")


def test_event_words_are_judged() -> None:
    check = vb.check.event_between
    assert check(lambda event, new, old: (event - old) % 65536 < (new - old) % 65536).ok
    assert check(lambda event, new, old: ((new - event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)).ok
    assert says(check(lambda event, new, old: old <= event < new), "until the index wraps")
    assert says(check(lambda event, new, old: True), "nothing to tell")
    assert says(check(lambda event, new, old: old < event <= new), "first new one")
    assert says(check(lambda event, new, old: old <= event <= new and new != old), "still empty")


def test_packed_flags_are_judged() -> None:
    def state(flags: int, wrap: int) -> str:
        avail, used = flags >> 7 & 1, flags >> 15 & 1
        return "neither" if avail != wrap else "used" if used == wrap else "available"

    check = vb.check.packed_state
    assert check(state).ok
    assert says(check(lambda flags, wrap: state(flags, 1)), "laps with wrap counter 1")
    assert says(check(lambda flags, wrap: "available"), "nobody has touched")
    assert says(check(lambda flags, wrap: "neither"), "bits are 7")
    assert says(check(lambda flags, wrap: True), "three words")


def film_of(queue: Any, reads: int = 16, iodepth: int = 8, **device: Any) -> vb.Film:
    app = vb.Fio(rw="randread", bs=4096, iodepth=iodepth, number_ios=reads)
    return vb.film(vb.Pipeline(app=app, queue=queue, device=vb.VirtioBlkDevice(**device)).boot(vb.SimMachine()), steps=4000)


def test_the_lines_of_both_rings_are_compared() -> None:
    films = film_of(vb.Split(64), iodepth=16), film_of(vb.Packed(64), iodepth=16)
    assert vb.check.predict_lines("packed").reveal(*films).ok
    verdict = vb.check.predict_lines("split").reveal(*films)
    assert says(verdict, "lines for an I/O")
    assert says(vb.check.predict_lines("packed").reveal(*films[::-1]), "split ring first")
    assert says(vb.check.predict_lines("packed").reveal(1, 2), "a film")
    assert vb.check.predict_lines("left").noted.state == "wrong"


def test_the_room_of_a_ring_is_judged() -> None:
    crowded = film_of(vb.Split(8), indirect=False)
    assert vb.check.predict_in_flight(2).reveal(crowded).ok
    assert says(vb.check.predict_in_flight(8).reveal(crowded), "three descriptors")

    def eight(queue: Any) -> vb.Film:
        return film_of(queue, indirect=False)

    assert vb.check.smallest_ring(24, eight).ok
    assert says(vb.check.smallest_ring(23, eight), "at most 7")
    assert says(vb.check.smallest_ring(32, eight), "not the smallest")
    assert says(vb.check.smallest_ring(0, eight), "1 to 256")
    assert says(vb.check.smallest_ring(24, 3), "the function")
    assert says(vb.check.smallest_ring(24, lambda queue: 3), "a film")


class FoundSchedule(Schedules):
    """A verdict without the walk that leads to it."""

    def __init__(self, steps: list[Step]) -> None:
        self.violation: Any = object()
        self._steps = steps

    @property
    def schedule(self) -> list[Step]:
        return self._steps


def test_the_moment_of_the_race_is_judged() -> None:
    whos = ["driver", "driver", "driver", "driver", "driver", "driver", "device"]
    points = [
        ("virtqueue_add_sgs",),
        ("virtqueue_kick_prepare",),
        ("vm_notify",),
        ("virtqueue_add_sgs",),
        ("virtqueue_kick_prepare",),
        (),
        (),
    ]
    found = FoundSchedule([Step(i + 1, who, at, ()) for i, (who, at) in enumerate(zip(whos, points, strict=True))])
    check = vb.check.lost_moment
    assert check(6, found).ok and check("6", found).ok
    for answer, words in ((5, "next step"), (2, "before the second"), (7, "not the driver's"), (99, "steps 1 to 7"), (6.5, "steps 1 to 7")):
        assert says(check(answer, found), words)
    assert says(check(6, 3), "holds the schedule")


def test_kicks_are_judged_from_two_runs() -> None:
    recipe = vb.Pipeline(app=vb.Fio(rw="randread", bs=4096, iodepth=16, number_ios=500))
    runs = [recipe.replace(device=vb.VirtioBlkDevice(event_idx=on)).run(vb.SimMachine()) for on in (True, False)]
    assert vb.check.predict_kicks("more").reveal(*runs).ok
    assert says(vb.check.predict_kicks("fewer").reveal(*runs), "kicks for 1,000 I/Os")
    assert vb.check.predict_kicks(...).reveal(*runs).state == "open"
