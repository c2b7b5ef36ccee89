"""Large reads that the ring's thread shares with a helper: the same bytes, the same errors, and a thread that ends."""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vblklab as vb
from tests.support import IN, IOERR, OK, WRITE, Board
from vblklab.disk.store import open_image
from vblklab.engine.compiled import loops
from vblklab.engine.helper import Helper

pytestmark = pytest.mark.numba
IMAGE = (6 << 20) + 512
SLOT = 5 << 20
DATA_AT = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(IMAGE))
    return path


@pytest.fixture(params=[vb.Sync, vb.Mapped])
def board(request: Any, image: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})  # there may be one CPU
    store = open_image(str(image))
    board = Board(store=store, engine=request.param(), memory_bytes=16 << 20)  # type: ignore[arg-type]
    assert board.device.batch_path(board.notified.append) is not None, board.device.explain()
    board.boot()
    yield board
    board.device._let_go()
    board.engine.close()
    board.store.close()
    assert not helpers()


def helpers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "vblklab large reads"]


def shared(board: Board) -> int:
    """How many reads were shared so far: the number above the count of chunks in the first of the shared words."""
    words = board.engine._drain._helper._words
    return 0 if words is None else int(words[0]) >> 16


def read_together(board: Board, reads: list[tuple[int, list[int]]]) -> list[tuple[int, bytes]]:
    """Reads of (offset, lengths of segments), published with one avail.idx; each one's status and bytes."""
    ring, memory = board.rings[0], board.memory
    heads, places = [], []
    for i, (offset, lengths) in enumerate(reads):
        at, table = 0x20000 + i * 0x4000, 0x21000 + i * 0x4000
        memory.write(at, IN.to_bytes(8, "little") + (offset >> 9).to_bytes(8, "little") + b"\xff")
        place, data = DATA_AT + i * SLOT, []
        for length in lengths:
            data.append((place, length, WRITE))
            place += length + 48
        memory.write(DATA_AT + i * SLOT, b"\xaa" * (place - DATA_AT - i * SLOT))
        ring.desc(i, *ring.table(table, [(at, 16, 0), *data, (at + 16, 1, WRITE)]), 4)
        heads.append(i)
        places.append((at + 16, data))
    ring.offer(*heads)
    board.kick()
    assert ring.used_idx == ring.idx
    for _, data in places:
        for place, length, _ in data:
            assert memory.read(place + length, 48) == b"\xaa" * 48  # nothing behind a segment
    return [(memory.read(status, 1)[0], b"".join(memory.read(at, length) for at, length, _ in data)) for status, data in places]


def cut(length: int, pieces: int, draw: random.Random) -> list[int]:
    """``length`` bytes in so many segments of any size."""
    cuts = sorted(draw.sample(range(1, length), pieces - 1))
    return [end - start for start, end in zip([0, *cuts], [*cuts, length], strict=True)]


def test_reads_of_any_size_and_framing_bring_their_own_bytes(board: Board, image: Path) -> None:
    content, draw = image.read_bytes(), random.Random(2)
    assert read_together(board, [(0, [128 << 10]), (512, [128 << 10])])[0][0] == OK  # the first that another waits behind starts it
    assert len(helpers()) == 1 and shared(board) == 0
    for number in range(1, 40):
        lengths = [draw.choice([64, 68, 97, 128, 256, 1000, 4100, 4500]) << 10 for _ in range(3)][: 3 if number % 4 else 2]
        reads = [(draw.randrange(0, IMAGE - length, 512), cut(length, draw.choice([1, 1, 2, 40, 120]), draw)) for length in lengths]
        for (offset, segments), (status, data) in zip(reads, read_together(board, reads), strict=True):
            assert status == OK and data == content[offset : offset + sum(segments)]
        assert shared(board) >= number  # at least one had another behind it


def test_a_short_read_fails_alone(board: Board, image: Path) -> None:
    content = image.read_bytes()
    read_together(board, [(0, [128 << 10]), (0, [128 << 10])])
    os.truncate(image, (1 << 20) + 4096)
    for _ in range(8):
        good = (512, [1 << 20])
        bad = ((1 << 20) - (64 << 10), [100, (256 << 10) - 100])  # its first chunk is there, its last is not
        statuses = [status for status, _ in read_together(board, [good, bad, good])]
        assert statuses == [OK, IOERR, OK]
    assert read_together(board, [good])[0][1] == content[512 : 512 + (1 << 20)]
    assert shared(board)


def test_there_is_no_helper_where_there_is_one_cpu(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert Helper(loops()[1]).start() == 0 and not helpers()


@pytest.mark.parametrize(("where", "error"), [(os, OSError(24, "")), (threading.Thread, RuntimeError("can't start new thread"))])
def test_a_helper_that_cannot_be_started_is_done_without(where: Any, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise error

    helper = Helper(loops()[1])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(where, "eventfd" if where is os else "start", refuse)
    assert helper.start() == 0 and not helpers()
    helper.close()


def test_the_helper_takes_chunks_by_itself_and_once_each(image: Path) -> None:
    """What it does while the ring's thread does nothing, as if that had been put aside."""
    import numpy as np

    from vblklab.engine import share

    helper = Helper(loops()[1])
    content, target = image.read_bytes(), mmap.mmap(-1, 1 << 20)
    base = np.frombuffer(target, np.uint8).ctypes.data
    fd = os.open(image, os.O_RDONLY)
    try:
        assert helper.start() == helper.start() != 0
        words = helper._words
        for number in range(1, 6):
            target[:] = bytes(len(target))
            words[share.FD], words[share.DONE], words[share.FAILED] = fd, 0, 0
            for chunk in range(4):
                iov = share._IOV + 2 * chunk
                words[iov], words[iov + 1] = base + 4096 * chunk, 4096
                offset = number * 512 + 4096 * chunk if chunk < 3 else IMAGE - 512
                words[share.CHUNKS + 4 * chunk : share.CHUNKS + 4 * chunk + 4] = words.ctypes.data + 8 * iov, 1, offset, 4096
            words[share.CLAIM] = (number << 16) + 4
            os.eventfd_write(helper._fd, 1)
            until = time.monotonic() + 20
            while words[share.DONE] != 4:
                assert time.monotonic() < until, "the helper does not take what is published"
                os.sched_yield()
            assert words[share.CLAIM] == number << 16 and words[share.FAILED] == 1  # the last chunk ends behind the image
            assert target[: 3 << 12] == content[number * 512 :][: 3 << 12]
    finally:
        helper.close()
        os.close(fd)
    assert not helpers()
