"""Films of virtqueues: a frame for each change, whose slot is whose, and what does not belong in one."""

from __future__ import annotations

import functools
from typing import Any

import pytest

import vblklab as vb
from vblklab.interleave import Schedules
from vblklab.ring.shot import RingShot, Word
from vblklab.trace import film as film_module

QUEUES = {"split": vb.Split(8), "packed": vb.Packed(8)}
IN_ORDER = {"split in order": vb.Split(8, in_order=True), "packed in order": vb.Packed(8, in_order=True)}


def recipe(queue: Any, ios: int = 6, iodepth: int = 2, indirect: bool = False, **device: Any) -> vb.Pipeline:
    app = vb.Fio(rw="randread", bs=4096, iodepth=iodepth, number_ios=ios)
    return vb.Pipeline(app=app, queue=queue, device=vb.VirtioBlkDevice(indirect=indirect, **device))


def filmed(kind: str, **options: Any) -> vb.Film:
    return vb.film(recipe((QUEUES | IN_ORDER)[kind], **options).boot(vb.SimMachine()), steps=10_000)


@pytest.mark.parametrize("kind", QUEUES)
def test_every_frame_but_the_first_shows_a_change_and_none_is_lost(kind: str) -> None:
    film = filmed(kind)
    assert film[0].label == "start" and not film[0].changed
    for frame in film[1:]:
        assert frame.changed and frame.shot != film[frame.number - 1].shot
    vm = recipe(QUEUES[kind]).boot(vb.SimMachine())
    seen = {RingShot.of(vm.memory, vm.driver.queues[0].layout)}
    while vm.step():
        seen.add(RingShot.of(vm.memory, vm.driver.queues[0].layout))
    assert seen == {frame.shot for frame in film}


@pytest.mark.parametrize("kind", [*QUEUES, *IN_ORDER])
@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("event_idx", [False, True])
def test_requests_are_numbered_in_order_and_all_are_returned(kind: str, indirect: bool, event_idx: bool) -> None:
    film = filmed(kind, ios=40, indirect=indirect, event_idx=event_idx)
    states: dict[int, list[str]] = {}
    for frame in film:
        for mark in (mark for (area, _), mark in frame.marks.items() if area == "desc"):
            kept = states.setdefault(mark.request, [])
            if not kept or kept[-1] != mark.state:
                kept.append(mark.state)
    assert sorted(states) == list(range(1, 41))
    assert all(kept[-1] == "used" and "available" in kept for kept in states.values())
    assert all(kept in (["written", "available", "used"], ["available", "used"]) for kept in states.values())
    assert film.written().ios == 40


@pytest.mark.parametrize("kind", QUEUES)
def test_the_marks_are_those_of_the_driver(kind: str) -> None:
    """What the film works out from memory against what the trace says: which request has which descriptor or id."""
    vm = recipe(QUEUES[kind], ios=60, iodepth=5, indirect=True).boot(vb.SimMachine())
    layout, queue = vm.driver.queues[0].layout, vm.driver.queues[0]
    count, shots, truth = 0, [], []
    in_flight: dict[int, int] = {}
    shots.append(("start", RingShot.of(vm.memory, layout)))
    truth.append({})
    while event := vm.step():
        if event.key == "virtqueue_add_sgs":
            count += 1
            in_flight[event.args[1] & 0xFFFF] = count
        shots.append((event.key, RingShot.of(vm.memory, layout)))
        truth.append(dict(in_flight))
    film = vb.film(shots)
    compared = 0
    for frame, heads in zip(film, truth, strict=True):
        for (area, slot), mark in frame.marks.items():
            if area == "desc" and mark.state == "available":
                head = slot if kind == "split" else frame.shot.value("desc", "id", slot)
                assert heads[head] == mark.request
                compared += 1
    assert compared > 100 and queue.layout == layout


@pytest.mark.parametrize("kind", QUEUES)
def test_a_frame_is_labelled_with_the_point_that_reports_its_store(kind: str) -> None:
    film = filmed(kind)
    assert film[1].label == "virtqueue_add_sgs" and film[2].label == "virtqueue_kick_prepare"
    flush = film[film.frames_of("virtqueue_flush")[0]]
    assert flush.step == "U3"
    expected = {Word("used", -1, "idx")} if kind == "split" else {Word("desc", 0, "flags")}
    assert flush.changed == expected
    assert {flush.writer(word) for word in flush.changed} == {"device"}
    assert {film[1].writer(word) for word in film[1].changed} == {"driver"}


def test_the_bytes_of_a_split_request_are_counted() -> None:
    film = filmed("split", ios=1, iodepth=1)
    written = film.written()
    # descriptors: 3 addr, 3 len, 3 flags, 2 next (one is 0 and stays); avail.idx, and used_event when callbacks go off and on again
    assert (written.ios, written.driver_bytes) == (1, 3 * 8 + 3 * 4 + 3 * 2 - 0 + 2 * 2 + 2 + 2 * 2)
    # used element: len (id is 0), used.idx, avail_event
    assert written.device_bytes == 4 + 2 + 2
    assert "bytes per I/O" in str(written)
    assert film.written(stop=film.frames_of("virtqueue_fill")[0]).device_bytes == 2


def test_a_film_is_made_of_a_list() -> None:
    vm = recipe(vb.Split(4), indirect=True).boot(vb.SimMachine())
    first = vm.ring()
    vm.step_until("virtqueue_kick_prepare")
    film = vb.film([("before", first), ("after", vm.ring(), 12)], title="two moments")
    assert [frame.label for frame in film] == ["before", "after"] and film[1].t_ns == 12
    assert Word("avail", -1, "idx") in film[-1].changed
    assert str(film).startswith("two moments\n") and "avail.idx=1" in str(film)


@pytest.mark.parametrize("source", [None, 5, "film", b"film", [], [1], [("a",)], [("a", 1)], [(1, 2)], [("a", "b", "c", "d")], vb.Split(8)])
def test_what_is_no_film_is_refused_with_one_error(source: Any) -> None:
    with pytest.raises(vb.ConfigError, match="give"):
        vb.film(source)


@pytest.mark.parametrize(
    "options", [{"queue": 1}, {"queue": -1}, {"queue": True}, {"queue": "0"}, {"steps": 0}, {"steps": 1.5}, {"steps": True}]
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(vb.ConfigError):
        vb.film(recipe(vb.Split(8)).boot(vb.SimMachine()), **options)


@pytest.mark.parametrize("number", [99, -99, True, 1.0, "1", None])
def test_a_frame_that_is_not_there_is_refused(number: Any) -> None:
    film = vb.film(recipe(vb.Split(8)).boot(vb.SimMachine()), steps=30)
    for ask in (film.__getitem__, film.text, lambda n: film.strip([n])):
        with pytest.raises(vb.ConfigError, match="frames 0 to"):
            ask(number)
    with pytest.raises(vb.ConfigError, match="its labels are"):
        film.frames_of("virtqueue_detach")


def test_a_film_keeps_a_bounded_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(film_module, "MOST_BYTES", 4000)
    vm = recipe(vb.Split(8)).boot(vb.SimMachine())
    film = vb.film(vm, steps=10_000)
    assert 2 < len(film) <= 4000 // film[0].shot.kept and "recording ended" in str(film)
    with pytest.raises(vb.ConfigError, match="give fewer"):
        vb.film([(frame.label, frame.shot) for frame in film] * 2)


@pytest.mark.parametrize("kind", QUEUES)
def test_the_text_of_all_frames_has_one_shape(kind: str) -> None:
    film = filmed(kind)
    texts = [film.text(n).splitlines() for n in range(len(film))]
    assert len({len(lines) for lines in texts}) == 1
    assert max(len(line) for lines in texts for line in lines) <= 128
    columns = "used ring" if kind == "split" else "driver's event"
    assert len({next(line.index(columns) for line in lines if columns in line) for lines in texts}) == 1


def test_the_text_names_request_change_and_arrows() -> None:
    film = filmed("split")
    written, published = film.text(1), film.text(2)
    assert "r1?     0" in written and "0x" in written and "NEXT WRITE*" in written
    row = next(line for line in published.splitlines() if " idx " in line)
    assert "1*" in row and "← idx" in published and "← event" in published
    packed = filmed("packed")
    assert "← driver 1 device 1" in packed.text(0) and "← driver 0" in packed.text(packed.frames_of("virtqueue_flush")[1])


def test_of_a_large_ring_the_slots_of_the_last_changes_are_shown() -> None:
    vm = recipe(vb.Split(256), ios=60, iodepth=16, indirect=True).boot(vb.SimMachine())
    text = vb.film(vm, steps=10_000).text(-1)
    assert "244 more slots" in text and len(text.splitlines()) < 25
    assert "← idx" in text


@pytest.mark.parametrize("kind", QUEUES)
def test_garbage_in_a_ring_is_shown_as_it_is(kind: str) -> None:
    vm = recipe(QUEUES[kind]).boot(vb.SimMachine())
    layout = vm.driver.queues[0].layout
    shots = [("sound", RingShot.of(vm.memory, layout))]
    for fill in (0xFF, 0x80, 0x01, 0x00):
        for gpa, length in layout.areas():
            vm.memory.write(gpa, bytes([fill]) * length)
        shots.append((f"{fill:#x}", RingShot.of(vm.memory, layout)))
    film = vb.film(shots)
    assert all(film.text(n) for n in range(len(film))) and str(film)


@functools.cache
def lost_kick(packed: bool) -> Schedules:
    return vb.schedules(queue=vb.Packed(2) if packed else vb.Split(2), buffers=2, without="driver fence before kick")


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.long)], ids=["split", "packed"])
def test_a_film_of_a_schedule_shows_what_is_on_the_way(packed: bool) -> None:
    found = lost_kick(packed)
    film = vb.film(found)
    frames = found.frames()
    assert len(film) == len(frames) and film.title == found.what
    assert any(frame.on_the_way for frame in film) and "~" in film.text(next(f.number for f in film if f.on_the_way))
    for frame, given in zip(film, frames, strict=True):
        for area, (gpa, length) in zip(("desc", "avail", "used"), given.layout.areas(), strict=True):
            views = given.driver[gpa : gpa + length], given.device[gpa : gpa + length]
            shown = frame.shot.area(area)
            assert all(byte in pair for byte, *pair in zip(shown, *views, strict=True))
            if not any(word.area == area for word in frame.on_the_way):
                assert shown == views[0] == views[1]
    requests = [mark.request for frame in film for mark in frame.marks.values()]
    assert max(requests) == 2


def test_a_word_on_the_way_keeps_its_new_value() -> None:
    film = vb.film(lost_kick(False))
    waiting = [frame.number for frame in film if Word("avail", -1, "idx") in frame.on_the_way]
    assert len(waiting) > 1
    indices = [frame.shot.value("avail", "idx") for frame in film]
    assert indices == sorted(indices)
