"""Our driver and our device over vhost-user, our driver on QEMU's device, and front-ends that mean no good."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import vblklab as vb
from vblklab.machine.serve import Served
from vblklab.peer.storage_daemon import StorageDaemon
from vblklab.spec.vhost_user import F_PROTOCOL_FEATURES, HEADER, MEM_REGION, MEM_TABLE_HEAD, U64, FrontendReq
from vblklab.spec.virtio import Feature
from vblklab.vhost.channel import Channel, connect, drive
from vblklab.vhost.codec import Message, encode
from vblklab.vhost.front_end import FrontEnd

VERIFY_JOB = {
    "rw": "randrw",
    "bssplit": "512/40:1k/20:4k/30:64k/6:256k/4",
    "iodepth": 64,
    "numjobs": 4,
    "size": 16 << 20,
    "verify": "crc32",
}


def recipe(ios: int, **parts: object) -> vb.Pipeline:
    return vb.Pipeline(app=vb.Fio(**VERIFY_JOB, number_ios=ios), device=vb.VirtioBlkDevice(queues=4)).replace(**parts)


@pytest.mark.parametrize("trace", [True, False], ids=["plain", "batch"])
@pytest.mark.parametrize("engine", [vb.Sync, vb.Threads], ids=["sync", "threads"])
def test_a_verify_job_on_our_device(trace: bool, engine: type, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    run = recipe(1000, disk=vb.ImageFile(image), engine=engine).run(vb.VhostUserMachine(trace=trace))
    assert run.ios >= 4000 and not run.errors and not run.mismatches


def test_the_same_recipe_on_three_machines() -> None:
    same = recipe(100, disk=vb.Ram(64 << 20))
    runs = [same.run(machine) for machine in (vb.SimMachine(), vb.LiveMachine(), vb.VhostUserMachine())]
    assert len({(run.ios, run.bytes) for run in runs}) == 1 and not any(run.errors or run.mismatches for run in runs)


def test_a_real_side_needs_this_machine() -> None:
    with pytest.raises(vb.ConfigError, match="VhostUserMachine"):
        recipe(1, host=StorageDaemon("disk.img")).run(vb.SimMachine())


def test_a_broken_step_costs_its_request_and_shows_its_traceback() -> None:
    shown: list[str] = []

    class Broken(vb.VirtioBlkDevice):
        def check(self, request):  # type: ignore[no-untyped-def]
            if request.sector == 8:
                raise ZeroDivisionError("a slip")
            return super().check(request)

    with vb.serve(Broken, vb.Ram(1 << 20), show=shown.append) as served:
        job = vb.Fio(rw="read", bs=4096, size=65536, number_ios=16)
        run = vb.Pipeline(app=job, host=vb.VhostUserBackend(served.socket)).run(vb.VhostUserMachine())
    assert run.errors == 1
    assert len(shown) == 1 and "ZeroDivisionError: a slip" in shown[0]


# -- QEMU's device -------------------------------------------------------------------------------------------------------------


def on_the_daemon(image: Path, ios: int) -> None:
    with image.open("wb") as file:
        file.truncate(64 << 20)
    run = recipe(ios, host=StorageDaemon(str(image), queues=4)).run(vb.VhostUserMachine(trace=False, iolog=False))
    assert run.ios >= 4 * ios and not run.errors and not run.mismatches
    assert any(image.read_bytes())


@pytest.mark.qemu
def test_our_driver_on_the_storage_daemon(tmp_path: Path) -> None:
    on_the_daemon(tmp_path / "disk.img", 1250)


@pytest.mark.qemu
@pytest.mark.long
def test_our_driver_on_the_storage_daemon_with_a_hundred_thousand(tmp_path: Path) -> None:
    on_the_daemon(tmp_path / "disk.img", 25_000)


@pytest.mark.qemu
def test_a_daemon_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(vb.DiskError, match="does not exist"):
        StorageDaemon(str(tmp_path / "none.img")).start()
    with pytest.raises(vb.VblkError, match="ended with status"):
        StorageDaemon(str(tmp_path)).start()


# -- front-ends that mean no good ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with vb.serve(vb.VirtioBlkDevice(), vb.Ram(1 << 20)) as served:
        yield served


def is_served(served: Served) -> None:
    """A new front-end is served at once, and completely."""
    job = vb.Fio(rw="randread", bs=4096, iodepth=4, number_ios=20)
    run = vb.Pipeline(app=job, host=vb.VhostUserBackend(served.socket)).run(vb.VhostUserMachine(trace=False, stall_s=10))
    assert run.ios == 20 and not run.errors


def settled(served: Served) -> int:
    """How many connections there were, all of them over."""
    while True:
        served.counters()  # a turn of its loop
        begun, ended = (sum(word in line for line in served.lines) for word in ("connected", "ended"))
        if begun == ended:
            served.counters()  # and the turn in which it closed the last one's descriptors
            return ended


def fds_of(pid: int | None) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def pipe_end() -> int:
    read, write = os.pipe()
    os.close(write)
    return read


def small_file() -> int:
    fd = os.memfd_create("small")
    os.ftruncate(fd, 4096)
    return fd


TABLE = MEM_TABLE_HEAD.pack(1, 0) + MEM_REGION.pack(0, 1 << 20, 0, 0)
BAD: dict[str, tuple[bytes, object]] = {
    "nothing": (b"", None),
    "half a header": (b"\1\0\0", None),
    "another version": (HEADER.pack(1, 2, 0), None),
    "4 GiB announced": (HEADER.pack(2, 1, 0xFFFFFFFF), None),
    "half a payload": (HEADER.pack(2, 1, 8) + b"\0\0", None),
    "no such request": (HEADER.pack(77, 1, 0), None),
    "a pipe for memory": (encode(Message(FrontendReq.SET_MEM_TABLE, TABLE)), pipe_end),
    "memory that lies about its size": (encode(Message(FrontendReq.SET_MEM_TABLE, TABLE)), small_file),
    "memory without an fd": (encode(Message(FrontendReq.SET_MEM_TABLE, TABLE)), None),
    "a folder for a kick": (encode(Message(FrontendReq.SET_VRING_KICK, U64.pack(0))), lambda: os.open("/", os.O_RDONLY)),
    "a pipe for the channel": (encode(Message(FrontendReq.SET_BACKEND_REQ_FD)), pipe_end),
}


@pytest.mark.parametrize("what", BAD)
def test_a_hostile_front_end_ends_its_own_connection_only(what: str, served: Served) -> None:
    data, make = BAD[what]
    is_served(served)
    lines, before = settled(served), fds_of(served.pid)
    with connect(served.socket, 10) as sock:
        if make is not None:
            fd = make()  # type: ignore[operator]
            socket.send_fds(sock, [data], [fd])
            os.close(fd)
        elif data:
            sock.sendall(data)
        if what in ("nothing", "half a header", "half a payload"):
            sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b"", "the back-end hangs up"
    is_served(served)
    assert settled(served) == lines + 2, "one reason for each connection"
    assert fds_of(served.pid) == before


def test_memory_that_shrinks_under_its_mapping_ends_the_connection_only(served: Served) -> None:
    size = 1 << 20
    memory = os.memfd_create("shrinks")
    os.ftruncate(memory, size)
    front_end, kick = FrontEnd(), os.eventfd(0)
    with connect(served.socket, 10) as sock:
        channel = Channel(sock)
        talk = lambda steps: drive(channel, front_end, steps)  # noqa: E731
        talk(front_end.negotiate())
        talk(front_end.set_features(int(Feature.VERSION_1)))
        table = MEM_TABLE_HEAD.pack(1, 0) + MEM_REGION.pack(0, size, 0, 0)
        channel.send(Message(FrontendReq.SET_MEM_TABLE, table, (memory,)))
        talk(front_end.start_ring(0, 128, 0, 0x8000, 0x9000, 0xA000, kick=kick, call=None, err=None))
        os.ftruncate(memory, 0)
        os.eventfd_write(kick, 1)
        assert sock.recv(1) == b""
    os.close(kick)
    os.close(memory)
    assert F_PROTOCOL_FEATURES & front_end.offered
    is_served(served)
    assert any("shrank" in line for line in served.lines)
    assert not served.exceptions


# -- the socket ----------------------------------------------------------------------------------------------------------------


def test_socket_paths_that_cannot_be(tmp_path: Path, served: Served) -> None:
    (tmp_path / "file").touch()
    for path, said in (
        ("x" * 200, "at most 107"),
        (str(tmp_path / "file"), "no socket"),
        (served.socket, "in use"),
        ("/nowhere/s", "folder"),
    ):
        with pytest.raises(vb.ConfigError, match=said):
            vb.serve(disk=vb.Ram(1 << 20), socket=path)


def test_a_dead_socket_is_replaced_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "disk.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with vb.serve(disk=vb.Ram(1 << 20), socket=str(path), where="thread") as served:
        is_served(served)
    assert not path.exists()
