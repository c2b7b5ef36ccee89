"""Where the bytes of a disk are: images that are missing, short, full, read-only, or change under a run."""

from __future__ import annotations

import errno
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vblklab as vb
from vblklab.disk import store as store_module
from vblklab.disk.store import FileStore, RamStore, open_image

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture(params=["file", "ram", "volatile"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Any, None, None]:
    if request.param == "ram":
        made: Any = RamStore(SIZE)
    elif request.param == "volatile":
        made = vb.VolatileCache(vb.Ram(SIZE)).open()
    else:
        path = tmp_path / "zero.img"
        path.write_bytes(bytes(SIZE))
        made = open_image(str(path))
    yield made
    made.close()


def _read(store: Any, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(length))
    store.readv(offset, [view])
    return bytes(view)


def _pieces(data: bytes, sizes: Sequence[int]) -> list[memoryview]:
    views, at = [], 0
    for size in sizes:
        views.append(memoryview(bytearray(data[at : at + size])))
        at += size
    return [*views, memoryview(bytearray(data[at:]))] if at < len(data) else views


# -- opening -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [True, False])
def test_an_image_that_is_not_there_is_named_with_the_command_that_makes_one(read_only: bool, tmp_path: Path) -> None:
    with pytest.raises(vb.DiskError, match=r"none\.img' does not exist: make one: truncate -s 64M .*none\.img"):
        open_image(str(tmp_path / "none.img"), read_only=read_only)


@pytest.mark.parametrize("read_only", [True, False])
def test_a_directory_a_fifo_a_socket_and_a_terminal_are_no_images(read_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo, sock = tmp_path / "fifo", tmp_path / "sock"
    os.mkfifo(fifo)
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("sock")
        for path, message in (
            (tmp_path, "directory|neither a regular file nor a block device"),
            (fifo, "neither a regular file nor a block device"),
            (sock, "No such device or address: check the path"),
            ("/dev/null", "neither a regular file nor a block device"),
            ("a\0b", "null byte: check the path"),
        ):
            with pytest.raises(vb.DiskError, match=message):
                open_image(str(path), read_only=read_only)


@pytest.mark.parametrize(("size", "message"), [(0, "is empty"), (1, "has 1 bytes, no multiple of 512"), (1000, "has 1,000 bytes")])
def test_a_size_that_is_no_multiple_of_512_is_refused_with_the_command_that_mends_it(size: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(bytes(size))
    with pytest.raises(vb.DiskError, match=message) as caught:
        open_image(str(path))
    assert "truncate -s 1048576" in caught.value.remedy
    large = tmp_path / "large.img"
    large.write_bytes(bytes(SIZE + 1))
    with pytest.raises(vb.DiskError, match=f"truncate -s {SIZE + 512}"):
        open_image(str(large))


def test_what_may_not_be_written_says_how_to_read_it(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: str, flags: int, *args: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)  # root may open anything
    with pytest.raises(vb.DiskError, match="cannot be opened for writing: change its permissions or use read_only=True"):
        open_image(str(image))
    with pytest.raises(vb.DiskError, match="cannot be opened for reading: change its permissions"):
        open_image(str(image), read_only=True)


def test_a_read_only_file_system_says_how_to_read_it(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: str, flags: int, *args: Any) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(vb.DiskError, match="Read-only file system: use read_only=True"):
        open_image(str(image))


def test_nothing_stays_open_when_an_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(bytes(1000))
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    for _ in range(5):
        with pytest.raises(vb.DiskError):
            open_image(str(path))
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) == before


# -- bytes -------------------------------------------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["write", "zero", "discard"]), st.integers(0, 63), st.integers(1, 16), st.lists(st.integers(1, 700), max_size=5)
        ),
        max_size=12,
    )
)
def test_a_store_holds_what_was_written_and_zeroed(store: Any, steps: list[tuple[str, int, int, list[int]]]) -> None:
    store.write_zeroes(0, SIZE, False)
    shadow = bytearray(SIZE)
    for number, (what, sector, sectors, sizes) in enumerate(steps):
        offset, length = sector << 9, sectors << 9
        if what == "write":
            data = random.Random(number).randbytes(length)
            store.writev(offset, [view for view in _pieces(data, sizes) if len(view)])
            shadow[offset : offset + length] = data
        elif what == "zero":
            store.write_zeroes(offset, length, bool(number & 1))
            shadow[offset : offset + length] = bytes(length)
        else:
            store.discard(offset, length)
            shadow[offset : offset + length] = bytes(length)
    assert _read(store, 0, 128 << 9) == shadow[: 128 << 9]
    scattered = _pieces(bytes(4096), [1, 700, 33])
    store.readv(512, scattered)
    assert b"".join(scattered) == shadow[512 : 512 + 4096]


@pytest.mark.parametrize("views", [1, 1023, 1024, 1025, 3000])
def test_more_segments_than_the_kernel_takes_at_once_are_moved_all(views: int, image: Path) -> None:
    store = open_image(str(image))
    data = random.Random(2).randbytes(views * 8)
    store.writev(512, _pieces(data, [8] * views))
    back = _pieces(bytes(views * 8), [8] * views)
    store.readv(512, back)
    store.close()
    assert b"".join(back) == data == image.read_bytes()[512 : 512 + views * 8]


@pytest.mark.parametrize("most", [1, 100, 513, 1003, 1500])
def test_a_short_transfer_is_continued(most: int, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal, a file system, an IOV_MAX: the kernel may move less than asked."""
    preadv, pwritev = os.preadv, os.pwritev

    def short(call: Callable[..., int]) -> Callable[..., int]:
        def moved(fd: int, views: list[memoryview], offset: int) -> int:
            left, some = most, []
            for view in views:
                some.append(view[:left])
                left -= len(some[-1])
                if not left:
                    break
            return call(fd, some, offset)

        return moved

    monkeypatch.setattr(os, "preadv", short(preadv))
    monkeypatch.setattr(os, "pwritev", short(pwritev))
    store = open_image(str(image))
    data = random.Random(3).randbytes(2048)
    store.writev(1024, _pieces(data, [3, 1000, 512]))
    back = _pieces(bytes(2048), [700, 1, 1, 900])
    store.readv(1024, back)
    assert b"".join(back) == data
    store.close()


@pytest.mark.parametrize("call", ["readv", "writev"])
def test_a_transfer_beyond_the_end_is_an_error_and_changes_nothing(call: str, store: Any) -> None:
    before = _read(store, SIZE - 512, 512)
    with pytest.raises(OSError):
        getattr(store, call)(SIZE - 512, [memoryview(bytearray(b"x" * 1024))])
    assert store.size == SIZE and _read(store, SIZE - 512, 512) == before
    with pytest.raises(OSError):
        store.write_zeroes(SIZE - 512, 1024, True)


@pytest.mark.parametrize("unmap", [True, False])
def test_zeroes_are_written_where_the_file_system_has_neither_holes_nor_zero_ranges(
    unmap: bool, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_fallocate", lambda *args: False)
    monkeypatch.setattr(store_module, "_ZEROES", bytes(1000))
    before = image.read_bytes()
    store = open_image(str(image))
    store.write_zeroes(1024, 4096, unmap)
    store.close()
    assert image.read_bytes() == before[:1024] + bytes(4096) + before[5120:]


def test_a_punched_hole_is_zeroes_and_takes_no_room(image: Path) -> None:
    before, blocks = image.read_bytes(), image.stat().st_blocks
    store = open_image(str(image))
    store.discard(64 << 10, 512 << 10)
    store.flush()
    store.close()
    assert image.read_bytes() == before[: 64 << 10] + bytes(512 << 10) + before[576 << 10 :]
    assert image.stat().st_size == SIZE
    if blocks >= SIZE >> 9:  # else this file system compresses or does not say
        assert image.stat().st_blocks <= blocks - (400 << 1)


@pytest.mark.parametrize("size", [512, SIZE // 2, SIZE * 3])
def test_a_resized_store_keeps_its_bytes_and_grows_by_zeroes(size: int, store: Any) -> None:
    store.writev(0, [memoryview(b"\xaa" * SIZE)])
    store.resize(size)
    assert store.size == size
    assert _read(store, 0, size) == (b"\xaa" * SIZE + bytes(size))[:size]
    with pytest.raises(OSError):
        store.writev(size, [memoryview(b"x" * 512)])


def test_a_read_only_image_is_not_written_or_resized(image: Path) -> None:
    before = image.read_bytes()
    store = open_image(str(image), read_only=True)
    for write in (lambda: store.writev(0, [memoryview(b"x" * 512)]), lambda: store.write_zeroes(0, 512, True)):
        with pytest.raises(OSError):
            write()
    with pytest.raises(vb.DiskError, match="open for reading only"):
        store.resize(512)
    assert _read(store, 0, SIZE) == before == image.read_bytes()
    store.close()
    store.close()


# -- under a run -------------------------------------------------------------------------------------------------------------------------


def _recipe(path: Path, rw: str = "randwrite", **options: Any) -> vb.Pipeline:
    return vb.Pipeline(
        app=vb.Fio(**({"rw": rw, "bs": 4096, "iodepth": 4, "number_ios": 64, "size": SIZE} | options)), disk=vb.ImageFile(str(path))
    )


MACHINES = [vb.SimMachine, lambda: vb.LiveMachine(device="thread")]
each_machine = pytest.mark.parametrize("machine", MACHINES, ids=["simulated", "live"])


@each_machine
@pytest.mark.parametrize(("code", "name"), [(errno.ENOSPC, "a full disk"), (errno.EIO, "a bad sector")])
def test_a_failed_write_of_the_host_fails_that_io_and_nothing_else(
    code: int, name: str, machine: Callable[[], Any], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwritev, failed = os.pwritev, []

    def sometimes(fd: int, views: list[memoryview], offset: int) -> int:
        if offset >= SIZE // 2:
            failed.append(offset)
            raise OSError(code, os.strerror(code))
        return pwritev(fd, views, offset)

    monkeypatch.setattr(os, "pwritev", sometimes)
    before = image.read_bytes()
    recipe = _recipe(image, "write", number_ios=256).replace(host_iostack=vb.IOStack(merge=False))
    run = recipe.run(machine())
    assert (run.ios, run.errors) == (256, 128), name
    assert sorted(failed) == list(range(SIZE // 2, SIZE, 4096))
    assert run.jobs[0].error == errno.EIO and run.jobs[0].write.errors == 128
    after = image.read_bytes()
    assert after[SIZE // 2 :] == before[SIZE // 2 :]
    assert all(after[at : at + 4096] != before[at : at + 4096] for at in range(0, SIZE // 2, 4096))


@each_machine
def test_an_image_truncated_in_mid_run_fails_the_reads_behind_its_end(machine: Callable[[], Any], image: Path) -> None:
    vm = _recipe(image, "read", number_ios=256).boot(machine())
    os.truncate(image, SIZE // 4)
    run = vm.run()
    assert (run.ios, run.errors) == (256, 192)


@each_machine
def test_a_failed_flush_fails_the_fsync_and_a_write_through_write(
    machine: Callable[[], Any], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fails)
    run = _recipe(image, fsync=8).run(machine())
    assert run.jobs[0].sync.errors == 8 and run.jobs[0].write.errors == 0
    through = _recipe(image).replace(device=vb.VirtioBlkDevice(write_cache=False)).run(machine())
    assert through.jobs[0].write.errors == 64, "it is not acknowledged before it is stable"


@each_machine
def test_a_read_only_image_serves_reads(machine: Callable[[], Any], image: Path) -> None:
    before = image.read_bytes()
    run = _recipe(image, "randread").replace(disk=vb.ImageFile(str(image), read_only=True)).run(machine())
    assert (run.ios, run.errors) == (64, 0) and image.read_bytes() == before


def test_a_limit_on_file_sizes_is_an_io_error_and_not_a_dead_process(image: Path) -> None:
    """The host's own 'no room': RLIMIT_FSIZE, in a process of its own, and on the live machine in the device's."""
    code = (
        "import resource, sys, vblklab as vb\n"
        "def limit():\n"
        f"    resource.setrlimit(resource.RLIMIT_FSIZE, ({SIZE // 2}, resource.RLIM_INFINITY))\n"
        "class Limited(vb.VirtioBlkDevice):\n"
        "    def attach(self, *args, **options):\n"
        "        super().attach(*args, **options)\n"
        "        limit()\n"
        f"app = vb.Fio(rw='write', bs=4096, iodepth=4, number_ios=256, size={SIZE})\n"
        "recipe = vb.Pipeline(app=app, disk=vb.ImageFile(sys.argv[1]), host_iostack=vb.IOStack(merge=False))\n"
        "live = recipe.replace(device=Limited).run(vb.LiveMachine())\n"
        "limit()\n"
        "simulated = recipe.run(vb.SimMachine())\n"
        "for run in (live, simulated):\n"
        "    print(run.ios, run.errors, run.jobs[0].error)\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(vb.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code, str(image)], env=env, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"256 128 {errno.EIO}"] * 2, done.stderr


def test_a_store_is_closed_once(image: Path) -> None:
    store = open_image(str(image))
    assert isinstance(store, FileStore) and store.fd >= 0
    store.close()
    store.close()
    assert store.fd == -1
    with pytest.raises(OSError):
        _read(store, 0, 512)
