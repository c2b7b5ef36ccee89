"""Front-ends that mean no good: the connection or the queue ends with one reason, nothing leaks, and the next one is served at once."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import vblklab as vb
from tests.ring.test_hostile_rings import HOSTILE
from tests.support import IN, WRITE
from vblklab.machine import vhost_server
from vblklab.machine.serve import Served
from vblklab.spec.vhost_user import HEADER, MEM_REGION, MEM_TABLE_HEAD, U64, FrontendReq
from vblklab.vhost.channel import connect
from vblklab.vhost.codec import Message, encode
from vblklab.vhost.effects import Region

from .raw_front_end import MEMORY, USER, RawFrontEnd, is_served, random_message, scribble

F_EVENT_IDX = 1 << 29
SIZE = 1 << 20


@pytest.fixture(scope="module", params=["plain", "batch"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with vb.serve(vb.VirtioBlkDevice(), vb.Ram(SIZE), trace=request.param == "plain") as served:
        yield served


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


@pytest.fixture
def unharmed(served: Served) -> Iterator[Served]:
    """The server, which after the test has nothing left of it and serves the next front-end."""
    is_served(served)
    ended, before = settled(served), fds_of(served.pid)
    lines = len(served.lines)
    yield served
    mine = settled(served)
    is_served(served)
    assert settled(served) == mine + 1
    assert mine == ended or sum("ended" in line for line in served.lines[lines:]) == mine + 1 - ended, "one reason a connection"
    assert fds_of(served.pid) == before
    assert not served.exceptions
    served.take_log()


# -- messages ------------------------------------------------------------------------------------------------------------------


def pipe_end() -> int:
    read, write = os.pipe()
    os.close(write)
    return read


def small_file() -> int:
    fd = os.memfd_create("small")
    os.ftruncate(fd, 4096)
    return fd


def read_only_file() -> int:
    fd = os.memfd_create("read-only")
    os.ftruncate(fd, SIZE)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


def table(*regions: tuple[int, int, int, int]) -> bytes:
    payload = MEM_TABLE_HEAD.pack(len(regions), 0) + b"".join(MEM_REGION.pack(*region) for region in regions)
    return encode(Message(FrontendReq.SET_MEM_TABLE, payload))


def whole_file() -> int:
    fd = os.memfd_create("whole")
    os.ftruncate(fd, SIZE)
    return fd


ONE = (0, SIZE, USER, 0)
BAD: dict[str, tuple[bytes, tuple[Callable[[], int], ...]]] = {
    "nothing": (b"", ()),
    "half a header": (b"\1\0\0", ()),
    "another version": (HEADER.pack(1, 2, 0), ()),
    "4 GiB announced": (HEADER.pack(2, 1, 0xFFFFFFFF), ()),
    "half a payload": (HEADER.pack(2, 1, 8) + b"\0\0", ()),
    "a reply": (encode(Message(FrontendReq.GET_FEATURES, bytes(8), reply=True)), ()),
    "no such request": (HEADER.pack(77, 1, 0), ()),
    "features never offered": (encode(Message(FrontendReq.SET_FEATURES, U64.pack(1 << 60))), ()),
    "a ring started before it is described": (encode(Message(FrontendReq.SET_VRING_KICK, U64.pack(0))), (lambda: os.eventfd(0),)),
    "a ring that the device has not": (encode(Message(FrontendReq.SET_VRING_CALL, U64.pack(200))), (lambda: os.eventfd(0),)),
    "a pipe for memory": (table(ONE), (pipe_end,)),
    "read-only memory": (table(ONE), (read_only_file,)),
    "memory that lies about its size": (table(ONE), (small_file,)),
    "memory without an fd": (table(ONE), ()),
    "memory with an fd too many": (table(ONE), (whole_file, whole_file)),
    "memory that overlaps itself": (table(ONE, (SIZE // 2, SIZE, USER + SIZE, 0)), (whole_file, whole_file)),
    "memory that overlaps in the front-end": (table(ONE, (SIZE, SIZE, USER + 4096, 0)), (whole_file, whole_file)),
    "memory that wraps": (table(((1 << 64) - 4096, SIZE, USER, 0)), (whole_file,)),
    "memory whose user address wraps": (table((0, SIZE, (1 << 64) - 4096, 0)), (whole_file,)),
    "memory whose offset wraps": (table((0, SIZE, USER, (1 << 64) - 4096)), (whole_file,)),
    "memory of no size": (table((0, 0, USER, 0)), (whole_file,)),
    "memory of a whole address space": (table((0, (1 << 64) - 1, 0, 0)), (whole_file,)),
    "a folder for a kick": (encode(Message(FrontendReq.SET_VRING_KICK, U64.pack(0))), (lambda: os.open("/", os.O_RDONLY),)),
    "a pipe for the channel": (encode(Message(FrontendReq.SET_BACKEND_REQ_FD)), (pipe_end,)),
}
UNFINISHED = ("nothing", "half a header", "half a payload")


@pytest.mark.parametrize("what", BAD)
def test_a_hostile_front_end_ends_its_own_connection_only(what: str, unharmed: Served) -> None:
    data, makers = BAD[what]
    with connect(unharmed.socket, 10) as sock:
        fds = [make() for make in makers]
        if fds:
            socket.send_fds(sock, [data], fds)
        elif data:
            sock.sendall(data)
        for fd in fds:
            os.close(fd)
        if what in UNFINISHED:
            sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b"", "the back-end hangs up"


@pytest.mark.parametrize("step", range(12))
def test_a_front_end_that_leaves_at_any_message(step: int, unharmed: Served) -> None:
    with RawFrontEnd(unharmed) as front:
        count = 0

        def counted(message: Message, **more: object) -> None:
            nonlocal count
            count += 1
            if count > step:
                raise ConnectionAbortedError
            send(message)

        send = front.channel.send
        front.channel.send = counted  # type: ignore[method-assign, assignment]
        with pytest.raises(ConnectionAbortedError):
            front.connect()


def test_a_front_end_that_stops_reading_is_waited_for_no_longer_than_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vhost_server, "_PATIENCE_S", 0.05)
    with vb.serve(disk=vb.Ram(SIZE), where="thread") as served:
        with connect(served.socket, 10) as sock:
            ask = encode(Message(FrontendReq.GET_FEATURES)) * 100
            with pytest.raises(ConnectionError):
                while True:  # until nobody takes any more, and then until the back-end has had enough
                    sock.sendall(ask)
        is_served(served)
        assert any("left a message half read" in line for line in served.lines), served.lines


def test_half_a_message_is_waited_for_no_longer_than_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vhost_server, "_PATIENCE_S", 0.05)
    with vb.serve(disk=vb.Ram(SIZE), where="thread") as served:
        with connect(served.socket, 10) as sock:
            sock.sendall(b"\1\0\0")
            assert sock.recv(1) == b""
        is_served(served)
        assert any("left a message half sent" in line for line in served.lines)


# -- memory and eventfds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 4096, 0x8000])
def test_memory_that_shrinks_under_its_mapping_ends_the_connection_only(size: int, unharmed: Served) -> None:
    """To nothing, to less than the rings, to less than the data."""
    with RawFrontEnd(unharmed) as front:
        front.connect()
        front.memory.write(0x8000, struct.pack("<IIQ", IN, 0, 0))
        front.ring.chain([(0x8000, 16, 0), (0x9000, 512, WRITE), (0xA000, 1, WRITE)])
        front.ring.offer(0)
        os.ftruncate(front.fd, size)
        front.kick()
        assert front.ended()
    settled(unharmed)
    assert "memory file shrank" in unharmed.lines[-1]


def test_an_in_flight_region_that_shrinks_ends_the_connection_only(unharmed: Served) -> None:
    with RawFrontEnd(unharmed) as front:
        talk, front_end = front.talk, front.front_end
        talk(front_end.negotiate())
        fd, length, offset = talk(front_end.get_inflight(1, 8))
        talk(front_end.set_inflight(fd, length, offset, 1, 8))
        talk(front_end.set_features(front.features))
        talk(front_end.set_memory((Region(0, MEMORY, USER, 0, front.fd),)))
        os.ftruncate(fd, 0)
        os.close(fd)
        try:
            front.start_ring()
            a_read(front)
        except vb.VhostUserError:
            pass  # the back-end may notice before we kick
        assert front.ended()
    settled(unharmed)
    assert "in-flight file shrank" in unharmed.lines[-1]


def a_read(front: RawFrontEnd, sector: int = 0) -> None:
    front.memory.write(0x8000, struct.pack("<IIQ", IN, 0, sector))
    front.memory.write(0xA000, b"\xff")
    front.ring.chain([(0x8000, 16, 0), (0x9000, 512, WRITE), (0xA000, 1, WRITE)])
    front.ring.offer(0)
    front.kick()


def test_a_call_eventfd_that_is_full_and_blocks_stops_nobody(unharmed: Served) -> None:
    with RawFrontEnd(unharmed) as front:
        front.connect()
        os.eventfd_write(front.call_fd, (1 << 64) - 2)
        for number in range(3):
            a_read(front)
            while front.ring.get("H", front.ring.used_at + 2) != number + 1:
                unharmed.counters()
    assert front.memory.read(0xA000, 1) == b"\0"


def test_a_flood_of_kicks_and_a_front_end_that_leaves_with_work_undone(unharmed: Served) -> None:
    with RawFrontEnd(unharmed, features=1 << 32 | F_EVENT_IDX) as front:
        front.connect()
        for _ in range(200):
            a_read(front)


# -- rings -------------------------------------------------------------------------------------------------------------------------


def in_turn() -> list[Any]:
    """Each kind at one of two places of the ring, the second of them just before its indices wrap; at both if the run is long."""
    pairs = [(name, start, (at + (start > 0)) % 2) for at, name in enumerate(HOSTILE) for start in (0, 65533)]
    return [pytest.param(name, start, marks=[pytest.mark.long] if other else []) for name, start, other in pairs]


@pytest.mark.parametrize(("name", "start"), in_turn())
def test_a_ring_malformed_in_any_way_stops_its_queue(name: str, start: int, unharmed: Served) -> None:
    errors, said = unharmed.counters()["queue errors"], len(unharmed.lines)
    with RawFrontEnd(unharmed, start=start) as front:
        front.connect()
        HOSTILE[name].build(front.ring, MEMORY)
        front.kick()
        assert front.wait() == {"err"}
        assert unharmed.counters()["queue errors"] == errors + 1
        stopped = [line for line in unharmed.lines[said:] if "stops its queues" in line]
        assert len(stopped) == 1 and HOSTILE[name].says in stopped[0], unharmed.lines[said:]
        assert front.talk(front.front_end.get_status()) & 0x40, "DEVICE_NEEDS_RESET"
        assert front.talk(front.front_end.stop_ring(0)) == start
        assert front.ring.get("H", front.ring.used_at + 2) == start
        front.talk(front.front_end.set_status(0))  # and after a reset the same front-end is served
        front.talk(front.front_end.set_features(front.features))
        front.start = front.ring.idx = 0
        front.ring.publish(0)
        front.ring.put("H", front.ring.used_at + 2, 0)
        os.eventfd_read(front.err_fd)
        front.start_ring()
        a_read(front)
        assert front.wait() == {"call"} and front.memory.read(0xA000, 1) == b"\0"


# -- anything ----------------------------------------------------------------------------------------------------------------------


def fuzz(served: Served, seeds: range) -> None:
    for seed in seeds:
        choose = random.Random(seed)
        with RawFrontEnd(served) as front:
            try:
                if choose.random() < 0.7:
                    front.connect()
                for _ in range(choose.randrange(1, 12)):
                    if choose.random() < 0.3:
                        scribble(choose, front)
                    elif choose.random() < 0.03:
                        front.shrink(choose.choice([0, 4096, MEMORY]))
                    else:
                        data, fds = random_message(choose, front)
                        try:
                            socket.send_fds(front.sock, [data], fds)
                        finally:
                            for fd in fds:
                                os.close(fd)
                front.sock.shutdown(socket.SHUT_WR)
                assert front.ended(), f"seed {seed}"
            except (ConnectionError, vb.VhostUserError):
                pass  # the back-end has had enough
            except OSError as error:
                assert error.errno in (errno.EPIPE, errno.ENOTCONN), f"seed {seed}: {error}"


def test_random_messages(unharmed: Served) -> None:
    fuzz(unharmed, range(300))


@pytest.mark.long
def test_very_many_random_messages(unharmed: Served) -> None:
    for begin in range(1000, 31_000, 1000):
        fuzz(unharmed, range(begin, begin + 1000))
        unharmed.take_log()


class TakesNothing(vb.VirtioBlkDevice):
    def pop(self, queue):  # type: ignore[no-untyped-def]
        return None


def test_a_process_whose_device_does_not_come_back_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forever(vb.VirtioBlkDevice):
        def check(self, request: Any) -> int:
            while True:
                pass

    monkeypatch.setattr("vblklab.machine.serve._END_S", 0.2)
    with vb.serve(Forever, vb.Ram(SIZE)) as served, RawFrontEnd(served) as front:
        front.connect()
        a_read(front)
        child = served._child
        served.close()
    assert child is not None and child.returncode == -signal.SIGKILL
    assert not os.path.exists(served.socket)


def test_a_server_that_is_not_ready_is_one_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(vb.VirtioBlkDevice):
        def attach(self, *args: Any, **more: Any) -> None:
            threading.Event().wait()

    monkeypatch.setattr("vblklab.machine.serve._START_S", 0.2)
    monkeypatch.setattr("vblklab.machine.serve._END_S", 0.2)
    with pytest.raises(vb.DeviceDied, match=r"not ready within 0\.2 s"):
        vb.serve(Slow, vb.Ram(SIZE))


@pytest.mark.parametrize("where", ["process", "thread"])
def test_a_device_that_takes_no_buffer_still_answers_and_can_be_closed(where: str) -> None:
    with vb.serve(TakesNothing(), vb.Ram(SIZE), where=where) as served, RawFrontEnd(served) as front:
        front.connect()
        a_read(front)
        while not served.counters()["kicks"]:
            pass
        assert served.counters()["requests"] == 0
