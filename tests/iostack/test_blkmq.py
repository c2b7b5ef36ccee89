"""The block layer between an application that submits bios and a driver that takes, refuses and ends requests as it likes."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Generator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import finish
from vblklab.errors import ConfigError
from vblklab.events import WAIT
from vblklab.iostack import Bio, IOStack, Limits, Op, Plug, Request

Steps = Generator[Any, int, Any]
Part = tuple[int, int, list[tuple[int, int]]]
READ, WRITE, DISCARD, ZEROES = int(Op.READ), int(Op.WRITE), int(Op.DISCARD), int(Op.WRITE_ZEROES)


class FakeDriver:
    """Has ``room`` places.  Keeps what it took in ``inside``, in order; the device knows the first ``shown`` of them."""

    def __init__(self, room: int = 1_000_000) -> None:
        self.room = room
        self.inside: list[Request] = []
        self.taken: list[Part] = []
        self.order: list[int] = []
        self.kicked = 0  # how many of ``taken`` the device has been told of
        self.shown = 0
        self.refused = 0

    def queue_rq(self, rq: Request, last: bool) -> Generator[Any, int, bool]:
        full = len(self.inside) >= self.room
        if not full:
            self.inside.append(rq)
            self.taken.append((rq.sector, rq.length, list(rq.segments)))
            self.order += [bio.io for bio in rq.bios]
        yield ("virtio_queue_rq", rq.key)
        if full:
            self.refused += 1
            return False
        if last:
            self.kick()
        return True

    def commit_rqs(self, queue: int) -> Steps:
        yield ("virtqueue_kick_prepare", queue)
        self.kick()

    def kick(self) -> None:
        self.kicked, self.shown = len(self.taken), len(self.inside)

    def end(self, at: int = 0) -> Request:
        """The device has done one of the requests that it knows of."""
        assert at < self.shown, "the device was never told"
        self.shown -= 1
        return self.inside.pop(at)


class Board:
    """A stack on a fake driver.  ``ended`` is (io, status) of every bio in the order of its end."""

    def __init__(self, limits: Limits | None = None, *, room: int = 1_000_000, tags: int = 64, queues: int = 1, **options: Any) -> None:
        self.driver = FakeDriver(room)
        self.stack = IOStack(**options)
        self.stack.attach(self.driver, limits or Limits(), queues=queues, tags=tags)
        self.ended: list[tuple[int, int]] = []
        self.next_io = 0

    def bio(self, sector: int, segments: list[tuple[int, int]], op: int = READ, queue: int = 0) -> Bio:
        self.next_io += 1
        return Bio(op, sector, sum(size for _, size in segments), segments, self.next_io, queue, self._end)

    def range(self, op: int, sector: int, length: int) -> Bio:
        self.next_io += 1
        return Bio(op, sector, length, [], self.next_io, 0, self._end)

    def _end(self, bio: Bio) -> None:
        self.ended.append((bio.io, bio.status))

    def submit(self, bio: Bio, plug: Plug | None = None) -> None:
        finish(self.stack.submit_bio(bio, plug, _nobody))

    def complete(self, at: int = 0, status: int = 0) -> None:
        """The device ends one of the requests inside the driver, then the driver makes use of the room."""
        finish(self.stack.complete(self.driver.end(at), status))
        finish(self.stack.run_hw_queue(0))

    def complete_all(self) -> None:
        while self.driver.inside:
            self.complete()


def _nobody() -> None:
    raise AssertionError("nobody was waiting")


def _bytes(segments: list[tuple[int, int]]) -> list[int]:
    """Every address of a scattered buffer, in order."""
    return [gpa + i for gpa, size in segments for i in range(size)]


# -- split ---------------------------------------------------------------------------------------------------------------------


@st.composite
def _cut(draw: st.DrawFn) -> tuple[Limits, dict[str, int], list[tuple[int, int]]]:
    """Limits, and a buffer of whole blocks in segments of any size that do not touch."""
    block = draw(st.sampled_from([512, 1024, 4096]))
    max_segments = draw(st.integers(1, 12))
    limits = Limits(
        max_sectors=draw(st.integers(8, 64)),
        max_segments=max_segments,
        max_segment_bytes=draw(st.one_of(st.just(0xFFFFFFFF), st.integers(512, 5000))),
        logical_block_bytes=block,
    )
    own: dict[str, int] = draw(st.sampled_from([{}, {"max_sectors": 9}, {"max_segments": 7}, {"max_sectors": 16, "max_segments": 5}]))
    length = block * draw(st.integers(1, 24))
    segments: list[tuple[int, int]] = []
    gpa = 0x1000
    while length:
        size = min(length, draw(st.one_of(st.integers(400, 6000), st.sampled_from([1, 511, 512, 513, 4096]))))
        segments.append((gpa, size))
        gpa += size + draw(st.integers(1, 3))
        length -= size
    return limits, own, segments


def _can_be_cut(limits: Limits, own: dict[str, int], segments: list[tuple[int, int]]) -> bool:
    """Whether no single block lies in more pieces than a request may have."""
    block, most = limits.logical_block_bytes, min(limits.max_segments, own.get("max_segments", 999))
    pieces: dict[int, int] = {}
    at = 0
    for _, size in segments:
        for number in range(at // block, (at + size - 1) // block + 1):
            inside = min(at + size, (number + 1) * block) - max(at, number * block)
            pieces[number] = pieces.get(number, 0) - (-inside // limits.max_segment_bytes)
        at += size
    return max(pieces.values()) <= most


@given(_cut())
def test_the_parts_of_a_split_bio_concatenate_to_it_and_each_is_whole_blocks_within_the_limits(
    case: tuple[Limits, dict[str, int], list[tuple[int, int]]],
) -> None:
    limits, own, segments = case
    board = Board(limits, **own)
    bio = board.bio(800, segments, WRITE)
    try:
        board.submit(bio)
    except ConfigError:
        assert not _can_be_cut(limits, own, segments)
        return
    assert _can_be_cut(limits, own, segments)
    parts = board.driver.taken
    at = 800
    for sector, length, pieces in parts:
        assert sector == at and length == sum(size for _, size in pieces)
        assert length and length % limits.logical_block_bytes == 0
        assert length <= 512 * min(limits.max_sectors, own.get("max_sectors", 999))
        assert len(pieces) <= min(limits.max_segments, own.get("max_segments", 999))
        assert all(0 < size <= limits.max_segment_bytes for _, size in pieces)
        at += length >> 9
    assert _bytes([piece for _, _, pieces in parts for piece in pieces]) == _bytes(segments)
    assert board.stack.counts["splits"] == len(parts) - 1
    board.complete_all()
    assert board.ended == [(bio.io, 0)]


@given(_cut())
def test_the_host_cuts_views_of_the_same_bytes(case: tuple[Limits, dict[str, int], list[tuple[int, int]]]) -> None:
    limits, own, segments = case
    memory = memoryview(random.Random(7).randbytes(max(gpa + size for gpa, size in segments)))
    stack, driver = IOStack(**own), FakeDriver()
    stack.attach(driver, limits, queues=1, tags=64, host=True)
    views = [memory[gpa : gpa + size] for gpa, size in segments]
    try:
        finish(stack.submit_bio(Bio(READ, 0, sum(map(len, views)), views, 1, 0, lambda bio: None), None, _nobody))  # type: ignore[arg-type]
    except ConfigError:
        return
    pieces = [piece for _, _, part in driver.taken for piece in part]
    assert b"".join(pieces) == b"".join(views)  # type: ignore[arg-type]
    assert all(len(piece) <= limits.max_segment_bytes for piece in pieces)


def test_a_block_that_max_segments_cannot_hold_is_refused_by_name() -> None:
    board = Board(Limits(max_segments=3))
    with pytest.raises(ConfigError, match="3 segments do not hold one block of 512 bytes"):
        board.submit(board.bio(0, [*((0x1000 + i * 200, 100) for i in range(10)), (0x9000, 24)]))


@given(
    length=st.integers(1, 400).map(lambda blocks: blocks * 4096),
    limit=st.integers(8, 500),
    op=st.sampled_from([DISCARD, ZEROES]),
    block=st.sampled_from([512, 4096]),
)
def test_a_discard_is_cut_into_adjacent_ranges_of_whole_blocks(length: int, limit: int, op: int, block: int) -> None:
    board = Board(Limits(max_discard_sectors=limit, max_write_zeroes_sectors=limit, logical_block_bytes=block), tags=512)
    bio = board.range(op, 64, length)
    board.submit(bio)
    at = 64
    for sector, size, segments in board.driver.taken:
        assert (sector, segments) == (at, []) and size <= limit * 512 and size % block == 0 and size
        at += size >> 9
    assert at == 64 + (length >> 9)
    board.complete_all()
    assert board.ended == [(bio.io, 0)]


# -- plug and merge --------------------------------------------------------------------------------------------------------------


def test_a_bio_behind_a_plugged_request_is_merged_at_its_back() -> None:
    board, plug = Board(), Plug()
    board.submit(board.bio(8, [(0x1000, 4096)], WRITE), plug)
    board.submit(board.bio(16, [(0x8000, 512)], WRITE), plug)
    assert not board.driver.taken
    finish(board.stack.flush_plug(plug))
    assert board.driver.taken == [(8, 4608, [(0x1000, 4096), (0x8000, 512)])]
    assert (board.stack.counts["backmerges"], board.stack.counts["frontmerges"]) == (1, 0)
    board.complete(status=errno.EIO)
    assert board.ended == [(1, errno.EIO), (2, errno.EIO)]


def test_a_bio_before_a_plugged_request_is_merged_at_its_front() -> None:
    board, plug = Board(), Plug()
    board.submit(board.bio(8, [(0x1000, 4096)]), plug)
    board.submit(board.bio(4, [(0x8000, 2048)]), plug)
    finish(board.stack.flush_plug(plug))
    assert board.driver.taken == [(4, 6144, [(0x8000, 2048), (0x1000, 4096)])]
    assert (board.stack.counts["backmerges"], board.stack.counts["frontmerges"]) == (0, 1)
    board.complete()
    assert sorted(board.ended) == [(1, 0), (2, 0)]


@pytest.mark.parametrize(
    ("why", "limits", "options", "second"),
    [
        ("another operation", Limits(), {}, (16, WRITE, 0)),
        ("another queue", Limits(), {}, (16, READ, 1)),
        ("a gap", Limits(), {}, (17, READ, 0)),
        ("an overlap", Limits(), {}, (15, READ, 0)),
        ("too many sectors", Limits(max_sectors=15), {}, (16, READ, 0)),
        ("too many segments", Limits(max_segments=1), {}, (16, READ, 0)),
        ("merge=False", Limits(), {"merge": False}, (16, READ, 0)),
    ],
)
def test_bios_are_not_merged_across(why: str, limits: Limits, options: dict[str, Any], second: tuple[int, int, int]) -> None:
    board, plug = Board(limits, queues=2, **options), Plug()
    sector, op, queue = second
    board.submit(board.bio(8, [(0x1000, 4096)]), plug)
    board.submit(board.bio(sector, [(0x8000, 4096)], op, queue), plug)
    finish(board.stack.flush_plug(plug))
    assert len(board.driver.taken) == 2, why
    assert board.driver.kicked == 2


def test_discards_are_never_merged() -> None:
    board, plug = Board(Limits(max_discard_sectors=1000)), Plug()
    board.submit(board.range(DISCARD, 0, 4096), plug)
    board.submit(board.range(DISCARD, 8, 4096), plug)
    finish(board.stack.flush_plug(plug))
    assert len(board.driver.taken) == 2


def test_a_plug_of_32_requests_goes_to_the_driver_by_itself() -> None:
    board, plug = Board(), Plug()
    for i in range(31):
        board.submit(board.bio(i * 100, [(0x1000, 512)]), plug)
    assert len(plug) == 31 and not board.driver.taken
    board.submit(board.bio(9999, [(0x1000, 512)]), plug)
    assert not plug and len(board.driver.taken) == 32
    assert board.driver.kicked == 32, "one kick, for the last of them"


def test_a_plug_kicks_each_queue_once() -> None:
    board, plug = Board(queues=3), Plug()
    kicks = []
    for i in range(9):
        board.submit(board.bio(i * 100, [(0x1000, 512)], queue=i % 3), plug)
    steps = board.stack.flush_plug(plug)
    queue_rq = board.driver.queue_rq

    def noted(rq: Request, last: bool) -> Generator[Any, int, bool]:
        kicks.append((rq.queue, last))
        return queue_rq(rq, last)

    board.driver.queue_rq = noted  # type: ignore[method-assign]
    finish(steps)
    assert [queue for queue, last in kicks if last] == [0, 1, 2]
    assert [queue for queue, _ in kicks] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


# -- tags ------------------------------------------------------------------------------------------------------------------------


def _start(steps: Steps) -> Any:
    """Run until the context waits; returns the steps, which can be gone on with."""
    ev = next(steps)
    while ev is not WAIT:
        ev = steps.send(0)
    return steps


def test_without_a_tag_the_bio_waits_and_goes_on_when_one_is_free() -> None:
    board = Board(tags=2)
    woken: list[str] = []
    board.submit(board.bio(0, [(0x1000, 512)]))
    board.submit(board.bio(8, [(0x1000, 512)]))
    waits = _start(board.stack.submit_bio(board.bio(16, [(0x1000, 512)]), None, lambda: woken.append("third")))
    assert len(board.driver.taken) == 2 and not woken
    board.complete()
    assert woken == ["third"]
    finish(waits)
    assert len(board.driver.taken) == 3
    board.complete_all()
    assert [io for io, _ in board.ended] == [1, 2, 3]


def test_a_context_that_is_woken_in_vain_waits_for_a_tag_again() -> None:
    board = Board(tags=1)
    board.submit(board.bio(0, [(0x1000, 512)]))
    woken: list[int] = []
    steps = _start(board.stack.submit_bio(board.bio(8, [(0x1000, 512)]), None, lambda: woken.append(1)))
    assert steps.send(0) is WAIT, "something else woke its context"
    board.complete()
    assert woken
    finish(steps)
    board.complete_all()
    assert [io for io, _ in board.ended] == [1, 2]


def test_nr_requests_bounds_the_tags() -> None:
    board = Board(tags=64, nr_requests=3)
    for i in range(3):
        board.submit(board.bio(i * 8, [(0x1000, 512)]))
    _start(board.stack.submit_bio(board.bio(99, [(0x1000, 512)]), None, lambda: None)).close()
    assert len(board.driver.taken) == 3


def test_who_holds_the_tags_in_its_own_plug_gives_them_to_the_driver_before_it_waits() -> None:
    board, plug = Board(tags=2), Plug()
    board.submit(board.bio(0, [(0x1000, 512)]), plug)
    board.submit(board.bio(100, [(0x1000, 512)]), plug)
    steps = _start(board.stack.submit_bio(board.bio(200, [(0x1000, 512)]), plug, lambda: None))
    assert len(board.driver.taken) == 2 and board.driver.kicked == 2
    board.complete()
    finish(steps)
    finish(board.stack.flush_plug(plug))
    board.complete_all()
    assert len(board.ended) == 3


def test_a_polled_stack_polls_for_a_tag_instead_of_waiting() -> None:
    board = Board(tags=1)
    polls: list[int] = []

    def poll(queue: int) -> Steps:
        polls.append(queue)
        yield ("virtblk_poll", queue)
        if len(polls) == 3:
            yield from board.stack.complete(board.driver.end(), 0)

    board.stack.poll = poll
    board.submit(board.bio(0, [(0x1000, 512)]))
    board.submit(board.bio(8, [(0x1000, 512)]))
    assert polls == [0, 0, 0] and len(board.driver.taken) == 2


# -- a busy driver -----------------------------------------------------------------------------------------------------------------


def test_requests_that_a_busy_driver_refused_go_down_in_order() -> None:
    board = Board(room=2)
    for i in range(10):
        board.submit(board.bio(i * 8, [(0x1000, 512)]))
    assert len(board.driver.taken) == 2
    assert [rq.bios[0].io for rq in board.stack.queues[0].dispatch] == list(range(3, 11))
    assert board.stack.counts["requeues"] == 8
    board.complete_all()
    assert board.driver.order == list(range(1, 11))
    assert [io for io, _ in board.ended] == list(range(1, 11))
    assert board.driver.kicked == 10


def test_a_plug_that_the_driver_takes_only_in_part_is_kicked_for_what_it_took() -> None:
    board, plug = Board(room=3), Plug()
    for i in range(8):
        board.submit(board.bio(i * 100, [(0x1000, 512)]), plug)
    finish(board.stack.flush_plug(plug))
    assert len(board.driver.taken) == 3 and board.driver.kicked == 3, "without the kick nothing would ever make room"
    board.complete_all()
    assert board.driver.order == list(range(1, 9)) and board.driver.kicked == 8


def test_a_new_bio_does_not_overtake_one_that_waits_for_the_driver() -> None:
    board = Board(room=1)
    board.submit(board.bio(0, [(0x1000, 512)]))
    board.submit(board.bio(8, [(0x1000, 512)]))
    board.driver.room = 5
    board.submit(board.bio(16, [(0x1000, 512)]))
    assert board.driver.order == [1, 2, 3]


def test_run_hw_queue_is_entered_once_and_looks_again_for_who_came_meanwhile() -> None:
    board = Board(room=1)
    board.submit(board.bio(0, [(0x1000, 512)]))
    board.submit(board.bio(8, [(0x1000, 512)]))
    inside = board.stack.run_hw_queue(0)
    assert next(inside) == ("virtio_queue_rq", 1 << 0), "refused: the driver is full"
    # while this context stands inside queue_rq, the interrupt's context makes room and runs the queue as well
    finish(board.stack.complete(board.driver.end(), 0))
    finish(board.stack.run_hw_queue(0))
    assert board.driver.order == [1], "the second context did not touch the request in the first one's hand"
    finish(inside)
    assert board.driver.order == [1, 2], "without the second look the request would wait for ever"


@pytest.mark.parametrize("seed", range(40))
def test_whatever_the_driver_does_every_bio_ends_exactly_once_with_the_worst_status_of_its_parts(seed: int) -> None:
    rng = random.Random(seed)
    options = {"nr_requests": rng.choice([None, 1, 2, 5]), "max_sectors": rng.choice([None, 8, 24]), "merge": rng.random() < 0.7}
    board = Board(Limits(max_segments=4, max_discard_sectors=24), room=rng.choice([1, 2, 7, 100]), tags=16, queues=1, **options)
    bios = [_any_bio(board, rng) for _ in range(60)]
    expected = {bio.io: 0 for bio in bios}
    ready: list[Steps] = []
    idle: list[Steps] = []

    def wake(steps_of: list[Steps]) -> Callable[[], None]:
        def woken() -> None:
            for steps in steps_of:
                if steps in idle:
                    idle.remove(steps)
                    ready.append(steps)

        return woken

    while bios:
        batch = [bios.pop(0) for _ in range(min(len(bios), rng.randrange(1, 9)))]
        mine: list[Steps] = []
        mine.append(_task(board, batch, rng.random() < 0.7, wake(mine)))
        ready += mine
    while ready or board.driver.shown:
        if ready and (not board.driver.shown or rng.random() < 0.8):
            steps = rng.choice(ready)  # any context may go on at any trace point
            try:
                if next(steps) is WAIT:
                    ready.remove(steps)
                    idle.append(steps)
            except StopIteration:
                ready.remove(steps)
            continue
        rq = board.driver.end(rng.randrange(board.driver.shown))
        status = rng.choice([0, 0, 0, errno.EIO])
        for bio in rq.bios:
            expected[bio.io] = status or expected[bio.io]
        ready.append(_interrupt(board, rq, status))
    assert not idle, "a context sleeps and nothing will wake it"
    assert sorted(io for io, _ in board.ended) == sorted(expected), "each exactly once"
    assert dict(board.ended) == expected
    hctx = board.stack.queues[0]
    assert sorted(hctx.tags) == list(range(len(hctx.requests))) and not hctx.dispatch and not hctx.running
    assert board.driver.kicked == len(board.driver.taken)


def _any_bio(board: Board, rng: random.Random) -> Bio:
    op = rng.choice([READ, READ, WRITE, WRITE, DISCARD])
    sector = rng.randrange(0, 64) * 8
    if op == DISCARD:
        return board.range(op, sector, rng.randrange(1, 9) * 4096)
    return board.bio(sector, [(0x1000 * i, 4096) for i in range(rng.randrange(1, 7))], op)


def _task(board: Board, bios: list[Bio], plugged: bool, wake: Callable[[], None]) -> Steps:
    plug = Plug() if plugged else None
    for bio in bios:
        yield from board.stack.submit_bio(bio, plug, wake)
    if plug is not None:
        yield from board.stack.flush_plug(plug)


def _interrupt(board: Board, rq: Request, status: int) -> Steps:
    """As the drivers do: end it, then run the queue if someone waits or has a request in its hand."""
    yield from board.stack.complete(rq, status)
    hctx = board.stack.queues[0]
    if hctx.dispatch or hctx.running:
        yield from board.stack.run_hw_queue(0)


def test_an_error_reaches_every_bio_of_its_request_and_no_other() -> None:
    board, plug = Board(Limits(max_sectors=16)), Plug()
    first = board.bio(0, [(0x1000, 4096)])
    merged = board.bio(8, [(0x2000, 4096)])
    split = board.bio(100, [(0x4000, 16384)])
    for bio in (first, merged, split):
        board.submit(bio, plug)
    finish(board.stack.flush_plug(plug))
    assert [length for _, length, _ in board.driver.taken] == [8192, 8192, 8192]
    board.complete()
    board.complete(at=1, status=errno.ENOSPC)  # the second half of the split bio
    assert board.ended == [(1, 0), (2, 0)]
    board.complete()
    assert board.ended == [(1, 0), (2, 0), (3, errno.ENOSPC)]


# -- options ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_sectors": 0}, "max_sectors=0: give a whole number"),
        ({"max_sectors": 7}, "max_sectors=7: a page of 8 sectors"),
        ({"max_segments": -1}, "max_segments=-1"),
        ({"nr_requests": "many"}, "nr_requests='many'"),
        ({"max_segments": 2.5}, r"max_segments=2\.5"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IOStack(**options)


def test_the_repr_says_what_was_given() -> None:
    assert repr(IOStack()) == "IOStack()"
    assert repr(IOStack(max_sectors=8, merge=False)) == "IOStack(max_sectors=8, merge=False)"
