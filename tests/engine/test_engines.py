"""Every engine over a real image: the same bytes, the same statuses, and an image that is cut off under it."""

from __future__ import annotations

import errno
import mmap
import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vblklab as vb
from tests.support import DISCARD, FLUSH, IN, IOERR, OK, OUT, WRITE_ZEROES, Board
from vblklab.disk.store import CACHES, open_image
from vblklab.engine.uring import Uring

SECTORS = 2048


def io_uring_missing() -> str:
    try:
        fd = os.eventfd(0)
        try:
            Uring(4, fd).close()
        finally:
            os.close(fd)
    except OSError as error:
        return f"io_uring: {error.strerror}"
    return ""


needs_uring = pytest.mark.skipif(bool(io_uring_missing()), reason=io_uring_missing())
ENGINES = [vb.Sync, vb.Mapped, vb.Threads, pytest.param(vb.IoUring, marks=needs_uring)]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(SECTORS << 9))
    return path


class FileBoard(Board):
    """A board whose requests may end in another thread: it waits for the engine's eventfd as a machine does."""

    def kick(self, queue: int = 0) -> None:
        ring = self.rings[queue]
        super().kick(queue)
        while ring.used_idx != ring.idx and self.device.broken is None:
            assert self.engine.event_fd is not None, "a request did not end, and nobody will say when"
            assert select.select([self.engine.event_fd], [], [], 10)[0], "nothing ended for 10 s"
            os.eventfd_read(self.engine.event_fd)
            self.machine.notify()
            self.machine.run()


@pytest.fixture
def boards(image: Path) -> Iterator[Any]:
    made: list[Board] = []

    def make(engine: Any, *, cache: str = "writeback", read_only: bool = False, path: str = "") -> FileBoard:
        store = open_image(str(image), read_only=read_only, cache=cache)
        try:
            board = FileBoard(vb.VirtioBlkDevice(), store=store, engine=engine)  # type: ignore[arg-type]
        except BaseException:
            store.close()
            raise
        made.append(board)
        if path:
            assert board.device.batch_path(board.notified.append, fast=path) is not None, board.device.explain()
        board.boot()
        return board

    yield make
    for board in made:
        board.device._let_go()
        board.engine.close()
        board.store.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_reads_writes_flushes_and_discards(engine: Any, boards: Any, image: Path) -> None:
    board = boards(engine())
    content = image.read_bytes()
    assert board.request(IN, 7, room=4096) == (OK, 4097, content[7 << 9 : (7 << 9) + 4096])
    data = os.urandom(2048)
    assert board.request(OUT, 9, data=data, cuts=(512, 16, 700)) == (OK, 1, b"")
    assert board.request(FLUSH)[0] == OK
    assert board.request(IN, 9, room=2048, cuts=(100, 2000))[2] == data
    assert image.read_bytes()[9 << 9 : (9 << 9) + 2048] == data
    for kind in (WRITE_ZEROES, DISCARD):
        assert board.request(kind, data=(32).to_bytes(8, "little") + (8).to_bytes(4, "little") + bytes(4))[0] == OK
    assert board.request(IN, 32, room=4096)[2] == bytes(4096)
    assert board.request(IN, SECTORS, room=512)[0] == IOERR


@pytest.mark.parametrize("path", ["", "off", "auto"])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_image_cut_off_under_the_device_is_an_error_of_the_request(engine: Any, path: str, boards: Any, image: Path) -> None:
    if path and engine not in (vb.Sync, vb.Mapped):
        pytest.skip("this engine has no batch path")
    board = boards(engine(), path=path)
    head = image.read_bytes()[:4096]
    assert board.request(IN, 0, room=4096)[0] == OK
    os.truncate(image, 64 << 10)
    assert board.request(IN, SECTORS - 8, room=4096)[0] == IOERR
    assert board.request(IN, 0, room=4096) == (OK, 4097, head)
    if engine is vb.Mapped:
        assert board.request(OUT, SECTORS - 8, data=bytes(4096))[0] == IOERR
    assert board.request(OUT, 1, data=b"x" * 512)[0] == OK
    assert image.read_bytes()[512:1024] == b"x" * 512


def test_a_mapped_image_that_grows_is_mapped_anew(boards: Any, image: Path) -> None:
    board = boards(vb.Mapped(), path="off")
    assert board.request(IN, 0, room=512)[0] == OK
    board.store.resize(2 * SECTORS << 9)
    board.device.resize(2 * SECTORS)
    assert board.request(OUT, 2 * SECTORS - 1, data=b"y" * 512)[0] == OK
    assert image.read_bytes()[-512:] == b"y" * 512


@pytest.mark.parametrize("engine", [vb.Sync, vb.Mapped])
def test_a_read_only_image_is_read(engine: Any, boards: Any, image: Path) -> None:
    board = boards(engine(), read_only=True, path="off")
    assert board.request(IN, 3, room=512)[2] == image.read_bytes()[3 << 9 : 4 << 9]
    assert board.request(OUT, 3, data=bytes(512))[0] == IOERR


@pytest.mark.parametrize("cache", CACHES)
def test_every_cache_mode_keeps_the_bytes(cache: str, boards: Any, image: Path) -> None:
    try:
        board = boards(vb.Sync(), cache=cache, path="off")
    except vb.DiskError as error:
        assert "O_DIRECT" in str(error)
        pytest.skip(str(error))
    flags = __import__("fcntl").fcntl(board.store.fd, 3)
    assert bool(flags & os.O_DIRECT) == (cache in ("none", "directsync"))
    assert bool(flags & os.O_DSYNC) == (cache in ("writethrough", "directsync"))
    before = image.read_bytes()
    for sector, sectors in ((0, 8), (1, 3), (SECTORS - 1, 1), (13, 16)):
        data = os.urandom(sectors << 9)
        assert board.request(OUT, sector, data=data)[0] == OK
        before = before[: sector << 9] + data + before[sector + sectors << 9 :]
        assert board.request(IN, sector, room=sectors << 9)[2] == data
    assert board.request(FLUSH)[0] == OK
    assert image.read_bytes() == before


def test_zeroes_reach_an_o_direct_image_without_holes(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        store = open_image(str(image), cache="none")
    except vb.DiskError as error:
        pytest.skip(str(error))
    monkeypatch.setattr("vblklab.disk.store._fallocate", lambda *args: False)
    before = image.read_bytes()
    store.write_zeroes(512, 8192, False)
    store.close()
    assert image.read_bytes() == before[:512] + bytes(8192) + before[8704:]


def test_what_an_engine_cannot_do_is_one_clear_error(image: Path, boards: Any) -> None:
    for make in (lambda: vb.Threads(0), lambda: vb.Threads(65), lambda: vb.IoUring(0), lambda: vb.ImageFile("x", cache="on")):
        with pytest.raises(vb.ConfigError):
            make()
    with pytest.raises(vb.ConfigError, match="cache='writethrough'"):
        boards(vb.Mapped(), cache="writethrough")
    with pytest.raises(vb.ConfigError, match="LoggedStore"):
        Board(engine=type("Own", (vb.Mapped,), {})(), store=open_store())


def open_store() -> Any:
    class LoggedStore:
        size, read_only = 512, False

    return LoggedStore()


def test_a_kernel_without_io_uring_is_named(image: Path, boards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("vblklab.engine.background.Uring", refused)
    with pytest.raises(vb.NotHere, match=r"io_uring: Operation not permitted"):
        boards(vb.IoUring())


@needs_uring
def test_uring_gives_each_number_its_result(image: Path) -> None:
    fd, event = os.open(image, os.O_RDWR), os.eventfd(0)
    ring = Uring(4, event)
    memory = memoryview(mmap.mmap(-1, 4 * 4096))
    try:
        for number in range(4):
            ring.move(False, fd, [memory[number * 4096 : (number + 1) * 4096]], number * 4096, number)
        ring.enter()
        results: dict[int, int] = {}
        while len(results) < 4:
            os.eventfd_read(event)
            results |= dict(ring.completions())
        assert results == dict.fromkeys(range(4), 4096) and memory == image.read_bytes()[: 4 * 4096]
        ring.move(False, -1, [memory[:512]], 0, 9)
        ring.enter()
        os.eventfd_read(event)
        assert list(ring.completions()) == [(9, -errno.EBADF)]
    finally:
        ring.close()
        os.close(fd)
        os.close(event)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_runs_on_both_machines(engine: Any, image: Path) -> None:
    app = vb.Fio(rw="randrw", bs=4096, iodepth=8, number_ios=60, verify="md5", size="512k")
    recipe = vb.Pipeline(app=app, engine=engine, disk=vb.ImageFile(str(image)))
    for machine in (vb.SimMachine(), vb.LiveMachine(trace=False)):
        run = recipe.run(machine)
        assert (run.ios, run.errors, run.mismatches) == (60, 0, 0)


@pytest.mark.parametrize(
    ("trace", "device", "words"),
    [(True, vb.VirtioBlkDevice, "trace points"), (False, vb.VirtioBlkDevice, "batch path: "),
                                                        (False, "own", "step check: replaced by Own.check")])  # fmt: skip
def test_a_live_machine_explains_its_path(trace: bool, device: Any, words: str, image: Path) -> None:
    class Own(vb.VirtioBlkDevice):
        def check(self, request: Any) -> int:
            return super().check(request)

    recipe = vb.Pipeline(app=vb.Fio(number_ios=40), device=Own if device == "own" else device, disk=vb.ImageFile(str(image)))
    vm = recipe.boot(vb.LiveMachine(trace=trace, fast="off"))
    assert words in " ".join(vm.explain())
    run = vm.run()
    assert run.ios == 40
    assert run.counters["interrupts"] >= 1 and run.counters["kicks"] >= 1
