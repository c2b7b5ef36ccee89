"""The socket's end of the codec: pieces, file descriptors through SCM_RIGHTS, a reader that does not read."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import vblklab as vb
from vblklab.spec.vhost_user import HEADER, INFLIGHT, MAX_FDS, FrontendReq
from vblklab.vhost.channel import Channel, Closed, connect, drive, listen
from vblklab.vhost.codec import Message, encode
from vblklab.vhost.front_end import FrontEnd

R = FrontendReq


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    """Our non-blocking end, and the other one by hand."""
    ours, other = socket.socketpair()
    ours.setblocking(False)
    channel = Channel(ours)
    with other:
        yield channel, other
        channel.close()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def files(count: int) -> list[int]:
    return [os.open(os.devnull, os.O_RDONLY) for _ in range(count)]


def give(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    """Send file descriptors and keep none."""
    socket.send_fds(sock, [data], fds)
    for fd in fds:
        os.close(fd)


def test_messages_in_pieces_keep_their_own_file_descriptors(ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    choose = random.Random(1)
    for _ in range(200):
        messages = [Message(choose.randrange(1, 40), choose.randbytes(choose.randrange(40))) for _ in range(3)]
        counts = [choose.randrange(4) for _ in messages]
        before, got = open_fds(), []
        for message, count in zip(messages, counts, strict=True):
            data = encode(message)
            cut = choose.randrange(1, len(data))
            give(other, data[:cut], files(count)) if count else other.sendall(data[:cut])
            if choose.random() < 0.3 and (message_now := channel.receive()) is not None:
                got.append(message_now)
            other.sendall(data[cut:])
        while (message_now := channel.receive()) is not None:
            got.append(message_now)
        assert [(m.request, m.payload, len(m.fds)) for m in got] == [
            (m.request, m.payload, count) for m, count in zip(messages, counts, strict=True)
        ]
        for message in got:
            for fd in message.fds:
                assert not os.get_inheritable(fd)
                os.close(fd)
        assert open_fds() == before


@pytest.mark.parametrize("pieces", [[MAX_FDS + 1], [10, 7], [60]], ids=str)
def test_too_many_file_descriptors_are_refused_and_none_is_kept(pieces: list[int], ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    before = open_fds()
    data = encode(Message(R.SET_MEM_TABLE, bytes(8)))
    for i, count in enumerate(pieces):
        give(other, data[i : i + 1], files(count))
    other.sendall(data[len(pieces) :])
    with pytest.raises(vb.VhostUserError, match="file descriptors"):
        channel.receive()
    channel.close()
    assert open_fds() == before - 1


@pytest.mark.parametrize("cut", [0, 1, 11, 12, 15])
def test_an_end_in_the_middle_of_a_message_says_so(cut: int, ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    data = encode(Message(R.SET_FEATURES, bytes(8)))[:cut]
    before = open_fds()
    if data:
        give(other, data, files(2))
    other.shutdown(socket.SHUT_WR)
    with pytest.raises(Closed, match="in the middle" if cut else "closed the connection$"):
        channel.receive()
    channel.close()
    assert open_fds() == before - 1


def test_what_the_other_end_does_not_read_waits_with_its_file_descriptors(ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    before = open_fds()
    sent = 0
    while not channel.unsent:
        channel.send(Message(1, bytes(4000), tuple(files(1)), reply=True), close=True)
        sent += 1
    channel.send(Message(2, b"last", tuple(files(2)), reply=True), close=True)
    assert not channel.flush() and open_fds() >= before + 2, "kept until they are sent"
    other.setblocking(False)
    reader, got = Channel(other), []
    while len(got) < sent + 1:
        channel.flush()
        if (message := reader.receive()) is not None:
            got.append(message)
    assert channel.flush() and not channel.unsent
    assert [len(message.fds) for message in got] == [1] * sent + [2] and got[-1].payload == b"last"
    for message in got:
        for fd in message.fds:
            os.close(fd)
    assert open_fds() == before


def test_what_was_never_sent_is_closed_with_the_channel(ends: tuple[Channel, socket.socket]) -> None:
    channel, _ = ends
    before = open_fds()
    while not channel.unsent:
        channel.send(Message(1, bytes(4000)))
    channel.send(Message(2, b"", tuple(files(3))), close=True)
    channel.close()
    assert open_fds() == before - 1


def test_a_socket_made_blocking_by_who_gave_it_does_not_block(ends: tuple[Channel, socket.socket]) -> None:
    channel, _ = ends
    os.set_blocking(channel.fileno(), True)  # O_NONBLOCK belongs to the open file, which a giver may share
    assert channel.receive() is None
    while not channel.unsent:
        channel.send(Message(1, bytes(4000)))


def test_a_peer_that_is_gone_is_closed_and_no_signal(ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    other.close()
    with pytest.raises(Closed):
        channel.send(Message(1))


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (Message(R.GET_FEATURES, bytes(8), reply=False), "no reply"),
        (Message(R.GET_QUEUE_NUM, bytes(8), reply=True), "GET_QUEUE_NUM"),
        (Message(R.GET_FEATURES, bytes(4), reply=True), "4 bytes, not 8"),
        (Message(R.GET_FEATURES, bytes(8), reply=True), "2 file descriptors, not 0"),
    ],
)
def test_a_front_end_refuses_a_wrong_answer_and_keeps_none_of_its_fds(reply: Message, says: str) -> None:
    ours, other = socket.socketpair()
    before = open_fds()
    front_end = FrontEnd()
    give(other, encode(reply), files(2))
    ours.settimeout(5)
    with pytest.raises(vb.VhostUserError, match=says):
        drive(Channel(ours), front_end, front_end.negotiate())
    assert open_fds() == before
    ours.close()
    other.close()


def test_a_front_end_takes_the_region_it_asked_for() -> None:
    ours, other = socket.socketpair()
    front_end = FrontEnd()
    give(other, encode(Message(R.GET_INFLIGHT_FD, INFLIGHT.pack(4096, 0, 1, 128), reply=True)), files(1))
    ours.settimeout(5)
    fd, length, offset = drive(Channel(ours), front_end, front_end.get_inflight(1, 128))
    assert (length, offset) == (4096, 0)
    os.close(fd)
    other.close()
    with pytest.raises(Closed):
        drive(Channel(ours), front_end, front_end.set_status(1))
    ours.close()


def test_a_back_end_that_does_not_answer_is_waited_for_no_longer_than_said() -> None:
    ours, other = socket.socketpair()
    ours.settimeout(0.01)
    front_end = FrontEnd()
    with ours, other, pytest.raises(vb.VhostUserError, match="does not answer"):
        drive(Channel(ours), front_end, front_end.negotiate())


def test_an_announced_size_is_not_waited_for(ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    other.sendall(HEADER.pack(R.SET_MEM_TABLE, 1, 0x7FFFFFFF) + bytes(100))
    with pytest.raises(vb.VhostUserError, match="announces 2,147,483,647 bytes"):
        channel.receive()


# -- paths -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 108, "/nowhere/at/all"])
def test_a_path_that_cannot_be_is_refused(path: str) -> None:
    with pytest.raises(vb.ConfigError, match="socket"):
        listen(path)


def test_a_symbolic_link_and_a_folder_are_no_sockets(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path / "link", tmp_path):
        with pytest.raises(vb.ConfigError, match="no socket"):
            listen(str(path))


def test_a_dead_socket_is_replaced_a_live_one_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listen(path).close()
    with listen(path):
        with pytest.raises(vb.ConfigError, match="in use"):
            listen(path)
        connect(path, 1).close()
    for wrong in (path, str(tmp_path / "none"), "x" * 300):
        with pytest.raises(vb.ConfigError, match="vblk serve"):
            connect(wrong, 1)
