"""The codec and both state machines against each other, in memory; what breaks the protocol ends the connection with one reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vblklab as vb
from vblklab.spec.vhost_user import (
    CONFIG_HEAD,
    F_PROTOCOL_FEATURES,
    HEADER,
    INFLIGHT_PACKED,
    MAX_PAYLOAD,
    U64,
    VRING_STATE,
    FrontendReq,
    ProtocolFeature,
)
from vblklab.spec.virtio import Feature
from vblklab.vhost.back_end import BackEnd
from vblklab.vhost.codec import Decoder, Message, encode
from vblklab.vhost.effects import AnswerInflight, Region, SetMemory, StartRing, StopRing
from vblklab.vhost.front_end import FrontEnd

V1 = int(Feature.VERSION_1)
MEMORY = (Region(0, 1 << 20, 0x7000_0000_0000, 0, 7),)


class Disk:
    """What a connection asks of a device."""

    num_queues, queue_size_max = 2, 256

    def features(self) -> int:
        return V1 | int(Feature.EVENT_IDX)

    def accepts(self, features: int) -> bool:
        return True

    def read_config(self) -> bytes:
        return bytes(range(60))


class Wire:
    """A back-end whose effects all succeed, and what it was asked to carry out."""

    def __init__(self) -> None:
        self.back_end = BackEnd(Disk())
        self.effects: list[Any] = []

    def send(self, message: Message) -> Message | None:
        effect = self.back_end.take(message)
        while effect is not None:
            self.effects.append(effect)
            answer = {StopRing: 5, AnswerInflight: (9, 4096, 0)}.get(type(effect))
            effect = self.back_end.answer(answer)
        sent = self.back_end.outgoing
        assert len(sent) < 2
        return sent.pop() if sent else None

    def talk(self, front_end: FrontEnd, talk: Any) -> Any:
        try:
            message = next(talk)
            while True:
                reply = self.send(message)
                assert (reply is not None) == front_end.expects(message), message
                message = talk.send(reply)
        except StopIteration as end:
            return end.value


@pytest.fixture
def wire() -> Wire:
    return Wire()


def connected(wire: Wire, wanted: int | None = None) -> FrontEnd:
    front_end = FrontEnd() if wanted is None else FrontEnd(wanted)
    wire.talk(front_end, front_end.negotiate())
    wire.talk(front_end, front_end.set_features(V1))
    wire.talk(front_end, front_end.set_memory(MEMORY))
    return front_end


def start(wire: Wire, front_end: FrontEnd, ring: int = 0) -> None:
    base = MEMORY[0].user
    wire.talk(front_end, front_end.start_ring(ring, 128, 3, base, base + 4096, base + 8192, kick=1, call=2, err=3))


# -- the codec -----------------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 2**32 - 1), st.binary(max_size=300), st.booleans(), st.booleans(), st.lists(st.integers(3, 99), max_size=8), st.data()
)
def test_what_is_encoded_is_decoded_in_whatever_pieces_it_comes(
    request: int, payload: bytes, reply: bool, need: bool, fds: list[int], data: st.DataObject
) -> None:
    message = Message(request, payload, tuple(fds), reply, need)
    stream, decoder, got = encode(message), Decoder(), None
    while stream:
        assert got is None and decoder.wanted
        count = data.draw(st.integers(1, decoder.wanted))
        got = decoder.feed(stream[:count], fds)
        stream, fds = stream[count:], []
    if got is None and not decoder.wanted:
        got = decoder.feed(b"", [])
    assert got == message and not decoder.partial


@pytest.mark.parametrize(("flags", "size"), [(0, 0), (2, 0), (3, 8), (1, MAX_PAYLOAD + 1), (1, 2**32 - 1)])
def test_a_header_that_cannot_be_is_refused(flags: int, size: int) -> None:
    with pytest.raises(vb.VhostUserError, match="GET_FEATURES"):
        Decoder().feed(HEADER.pack(1, flags, size), [])


def test_the_fds_of_a_message_that_never_ends_are_given_back() -> None:
    decoder = Decoder()
    decoder.feed(b"\1", [5, 6])
    assert decoder.discard() == [5, 6] and decoder.discard() == []


# -- a front-end and a back-end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [0, int(ProtocolFeature.CONFIG), int(ProtocolFeature.REPLY_ACK | ProtocolFeature.MQ), None])
def test_rings_start_and_stop(wire: Wire, wanted: int | None) -> None:
    front_end = connected(wire, wanted)
    for ring in (0, 1):
        start(wire, front_end, ring)
    assert [effect.ring for effect in wire.effects if isinstance(effect, StartRing)] == [0, 1]
    vring = wire.back_end.vrings[0]
    assert (vring.size, vring.base, vring.desc, vring.running) == (128, 3, MEMORY[0].user, True)
    assert wire.talk(front_end, front_end.stop_ring(0)) == 5
    assert not vring.running and wire.back_end.vrings[1].running
    assert wire.talk(front_end, front_end.stop_ring(0)) == 5, "a ring that stands says where it stopped"


def test_a_second_driver_finds_the_device_as_the_first_one_did(wire: Wire) -> None:
    front_end = connected(wire)
    for features in (V1, V1 | int(Feature.EVENT_IDX)):  # the BIOS, then Linux
        wire.talk(front_end, front_end.set_features(features))
        start(wire, front_end)
        wire.talk(front_end, front_end.enable_ring(0, False))
        wire.talk(front_end, front_end.stop_ring(0))
        wire.talk(front_end, front_end.reset_device())
    assert sum(isinstance(effect, StartRing) for effect in wire.effects) == 2


def test_every_other_message(wire: Wire) -> None:
    front_end = connected(wire)
    do = lambda talk: wire.talk(front_end, talk)  # noqa: E731
    assert do(front_end.read_config(8, 4)) == bytes(range(8, 12))
    do(front_end.write_config(32, b"\1"))
    do(front_end.set_channel(4))
    assert do(front_end.get_inflight(2, 128)) == (9, 4096, 0)
    do(front_end.set_inflight(9, 4096, 0, 2, 128))
    assert do(front_end.max_mem_slots()) > 8
    more = Region(1 << 32, 4096, 0x10_0000, 0, 8)
    do(front_end.add_region(more))
    assert len(wire.back_end.regions) == 2
    do(front_end.remove_region(more))
    assert [effect.regions[0].fd for effect in wire.effects if isinstance(effect, SetMemory)] == [7, -1, -1]
    do(front_end.set_status(15))
    assert do(front_end.get_status()) == 15
    do(front_end.set_status(0))
    assert do(front_end.get_status()) == 0
    names = {FrontendReq(number).name for number in wire.back_end.seen}
    assert {"GET_CONFIG", "SET_CONFIG", "ADD_MEM_REG", "REM_MEM_REG", "GET_INFLIGHT_FD", "SET_BACKEND_REQ_FD", "SET_STATUS"} <= names


@pytest.mark.parametrize("payload", [b"", bytes(11), CONFIG_HEAD.pack(0, 257, 0) + bytes(257), CONFIG_HEAD.pack(250, 7, 0) + bytes(7)])
def test_a_configuration_that_is_not_there_is_answered_with_no_payload(payload: bytes, wire: Wire) -> None:
    front_end = connected(wire)
    reply = wire.send(Message(R.GET_CONFIG, payload))
    assert reply is not None and reply.payload == b""
    with pytest.raises(vb.VhostUserError, match="refuses GET_CONFIG"):
        wire.talk(front_end, front_end.read_config(250, 7))
    assert wire.talk(front_end, front_end.read_config(0, 256))[:60] == bytes(range(60))


def test_an_inflight_message_that_is_packed_is_answered_packed(wire: Wire) -> None:
    connected(wire)
    reply = wire.send(Message(FrontendReq.GET_INFLIGHT_FD, INFLIGHT_PACKED.pack(0, 0, 1, 128)))
    assert reply is not None and len(reply.payload) == INFLIGHT_PACKED.size and reply.fds == (9,)


def region_table(*regions: tuple[int, int, int, int]) -> bytes:
    from vblklab.spec.vhost_user import MEM_REGION, MEM_TABLE_HEAD

    return MEM_TABLE_HEAD.pack(len(regions), 0) + b"".join(MEM_REGION.pack(*region) for region in regions)


R = FrontendReq
WRONG: dict[str, Message] = {
    "no such message": Message(99),
    "a message of another device": Message(R.SEND_RARP, bytes(8)),
    "a reply from the front-end": Message(R.GET_FEATURES, reply=True),
    "features cut off": Message(R.SET_FEATURES, bytes(7)),
    "features that were not offered": Message(R.SET_FEATURES, U64.pack(1 << 60)),
    "protocol features that were not offered": Message(R.SET_PROTOCOL_FEATURES, U64.pack(1 << 14)),
    "fds where none belong": Message(R.SET_FEATURES, U64.pack(V1), (5,)),
    "a table without a region": Message(R.SET_MEM_TABLE, region_table()),
    "a table of nine": Message(R.SET_MEM_TABLE, region_table(*[(i << 20, 4096, i << 20, 0) for i in range(9)]), (4,) * 8),
    "fewer fds than regions": Message(R.SET_MEM_TABLE, region_table((0, 4096, 0, 0), (1 << 20, 4096, 1 << 20, 0)), (4,)),
    "a table cut off": Message(R.SET_MEM_TABLE, region_table((0, 4096, 0, 0))[:-1], (4,)),
    "an empty region": Message(R.SET_MEM_TABLE, region_table((0, 0, 0, 0)), (4,)),
    "a region that wraps": Message(R.SET_MEM_TABLE, region_table((2**64 - 4096, 8192, 0, 0)), (4,)),
    "an offset that wraps": Message(R.SET_MEM_TABLE, region_table((0, 8192, 0, 2**64 - 4096)), (4,)),
    "regions that overlap": Message(R.SET_MEM_TABLE, region_table((0, 8192, 0, 0), (4096, 8192, 1 << 20, 0)), (4, 5)),
    "user addresses that overlap": Message(R.SET_MEM_TABLE, region_table((0, 8192, 0, 0), (1 << 20, 8192, 4096, 0)), (4, 5)),
    "a ring that is not there": Message(R.SET_VRING_NUM, VRING_STATE.pack(2, 128)),
    "a size that is no power of two": Message(R.SET_VRING_NUM, VRING_STATE.pack(0, 100)),
    "a size of none": Message(R.SET_VRING_NUM, VRING_STATE.pack(0, 0)),
    "a ring too large": Message(R.SET_VRING_NUM, VRING_STATE.pack(0, 512)),
    "an index of 17 bits": Message(R.SET_VRING_BASE, VRING_STATE.pack(0, 0x10000)),
    "a kick without its fd": Message(R.SET_VRING_KICK, U64.pack(0)),
    "a call with an fd that it says is none": Message(R.SET_VRING_CALL, U64.pack(256), (4,)),
    "a kick before its ring": Message(R.SET_VRING_KICK, U64.pack(0), (4,)),
    "enabled by 2": Message(R.SET_VRING_ENABLE, VRING_STATE.pack(0, 2)),
    "a configuration beyond its end": Message(R.SET_CONFIG, CONFIG_HEAD.pack(250, 7, 0) + bytes(7)),
    "a configuration without its head": Message(R.SET_CONFIG, bytes(11)),
    "a region removed that is not there": Message(R.REM_MEM_REG, bytes(40)),
    "in-flight regions for too many rings": Message(R.GET_INFLIGHT_FD, INFLIGHT_PACKED.pack(0, 0, 3, 128)),
    "a status of 9 bits": Message(R.SET_STATUS, U64.pack(256)),
}


@pytest.mark.parametrize("message", WRONG.values(), ids=WRONG)
def test_a_message_that_breaks_the_protocol_is_refused_and_keeps_no_fd(message: Message, wire: Wire) -> None:
    wire_features = int(F_PROTOCOL_FEATURES | V1)
    connected(wire)
    wire.send(Message(R.SET_FEATURES, U64.pack(wire_features)))
    taken = len([effect for effect in wire.effects if effect])
    with pytest.raises(vb.VhostUserError):
        if message is WRONG["a kick before its ring"]:
            wire.send(Message(R.SET_VRING_ENABLE, VRING_STATE.pack(0, 1)))
        wire.send(message)
    new = wire.effects[taken:]
    handed = [effect.fd for effect in new if hasattr(effect, "fd") and effect.fd is not None]
    assert sorted([*wire.back_end.discarded, *handed]) == sorted(message.fds), "each fd is somebody's to close"


def test_messages_of_features_that_were_not_negotiated_are_refused(wire: Wire) -> None:
    for request, payload in ((R.GET_CONFIG, bytes(16)), (R.GET_QUEUE_NUM, b""), (R.RESET_DEVICE, b""), (R.GET_STATUS, b"")):
        with pytest.raises(vb.VhostUserError, match="without the protocol feature"):
            wire.send(Message(request, payload))


def test_what_cannot_be_moved_while_it_runs() -> None:
    for message in (
        Message(R.SET_VRING_NUM, VRING_STATE.pack(0, 64)),
        Message(R.SET_VRING_BASE, VRING_STATE.pack(0, 0)),
        Message(R.SET_FEATURES, U64.pack(V1 | F_PROTOCOL_FEATURES | int(Feature.EVENT_IDX))),
    ):
        wire = Wire()
        start(wire, connected(wire))
        with pytest.raises(vb.VhostUserError):
            wire.send(message)


def test_a_failure_is_told_to_who_waits_for_it(wire: Wire) -> None:
    connected(wire)
    reply = wire.send(Message(99, need_reply=True))
    assert reply is not None and U64.unpack(reply.payload) == (1,)


@given(st.lists(st.tuples(st.integers(0, 45), st.binary(max_size=48), st.integers(0, 3), st.booleans()), max_size=30))
def test_random_messages_are_carried_out_or_refused(messages: list[tuple[int, bytes, int, bool]]) -> None:
    wire = Wire()
    for request, payload, fds, need in messages:
        try:
            wire.send(Message(request, payload, tuple(range(10, 10 + fds)), need_reply=need))
        except vb.VhostUserError:
            break


# -- what a real front-end says --------------------------------------------------------------------------------------------------

QEMU_SAYS = [
    line.split() for line in (Path(__file__).parent / "qemu_7_2.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
]


def test_all_that_qemu_sent_is_understood(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Disk, "features", lambda self: 0x1_3000_7E44)  # what the device offered then
    running: set[int] = set()
    for fds, (name, payload, count, need_reply) in enumerate(QEMU_SAYS):
        data = bytes.fromhex(payload.strip("-"))
        wire.effects.clear()
        reply = wire.send(Message(R[name], data, tuple(range(10 * fds, 10 * fds + int(count))), need_reply=need_reply == "1"))
        assert (reply is not None) == (name.startswith("GET_") or need_reply == "1"), name
        assert not wire.back_end.discarded, name
        if need_reply == "1":
            assert reply is not None and reply.payload == U64.pack(0), name
        running |= {effect.ring for effect in wire.effects if isinstance(effect, StartRing)}
        running -= {effect.ring for effect in wire.effects if isinstance(effect, StopRing)}
        if name == "SET_STATUS" and data[0] == 0x0F:
            in_bios = wire.back_end.features & V1 and not wire.back_end.vrings[1].started
            assert running == ({0} if in_bios else {0, 1})
    assert running == set()
