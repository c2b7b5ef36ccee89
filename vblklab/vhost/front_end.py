"""The front-end's half of a vhost-user connection, without a socket.

Each method is a talk: a generator that yields a message to send and is sent the reply, or None where the message has none.
``expects`` says whether to wait for one.  A reply that breaks the protocol raises VhostUserError.
"""

from __future__ import annotations

from collections.abc import Generator
from struct import Struct
from typing import Any

from ..errors import VhostUserError
from ..spec.vhost_user import (
    CONFIG_HEAD,
    F_PROTOCOL_FEATURES,
    INFLIGHT,
    INFLIGHT_PACKED,
    MEM_REGION,
    MEM_SINGLE_HEAD,
    MEM_TABLE_HEAD,
    U64,
    VRING_ADDR,
    VRING_NO_FD,
    VRING_STATE,
    BackendReq,
    FrontendReq,
    ProtocolFeature,
)
from .codec import SPOKEN, Message, name_of
from .effects import Region

__all__ = ["FrontEnd", "Talk"]

Talk = Generator[Message, "Message | None", Any]
_ANSWERED = frozenset(
    (
        FrontendReq.GET_FEATURES,
        FrontendReq.GET_PROTOCOL_FEATURES,
        FrontendReq.GET_QUEUE_NUM,
        FrontendReq.GET_VRING_BASE,
        FrontendReq.GET_CONFIG,
        FrontendReq.GET_INFLIGHT_FD,
        FrontendReq.GET_MAX_MEM_SLOTS,
        FrontendReq.GET_STATUS,
    )
)


class FrontEnd:
    """One connection to a vhost-user device."""

    def __init__(self, wanted: int = SPOKEN) -> None:
        self.wanted = wanted
        self.offered = 0
        self.protocol = 0
        self.queues = 1
        self.discarded: list[int] = []  # file descriptors that came with answers and are nobody's

    def expects(self, message: Message) -> bool:
        """Whether the back-end answers this message."""
        return message.request in _ANSWERED or message.need_reply

    def has(self, feature: ProtocolFeature) -> bool:
        """Whether a protocol feature was negotiated."""
        return bool(self.protocol & feature)

    # -- messages with and without an answer -----------------------------------------------------------------------------------

    def _ask(self, request: FrontendReq, payload: bytes = b"", sizes: tuple[int, ...] = (U64.size,), fds: int = 0) -> Talk:
        message = Message(request, payload)
        reply = yield message
        assert reply is not None
        self._check(message, reply, sizes, fds)
        return reply

    def _number(self, request: FrontendReq) -> Talk:
        reply = yield from self._ask(request)
        return U64.unpack(reply.payload)[0]

    def _tell(self, request: FrontendReq, payload: bytes = b"", fds: tuple[int, ...] = ()) -> Talk:
        """A message without an answer of its own; with REPLY_ACK the back-end says whether it worked."""
        message = Message(request, payload, fds, need_reply=self.has(ProtocolFeature.REPLY_ACK))
        reply = yield message
        if reply is not None:
            self._check(message, reply, (U64.size,), 0)
            (failed,) = U64.unpack(reply.payload)
            if failed:
                raise VhostUserError(f"the back-end refuses {name_of(request)}")

    def _check(self, message: Message, reply: Message, sizes: tuple[int, ...], fds: int) -> None:
        name = name_of(message.request)
        if not reply.reply or reply.request != message.request:
            wrong = f"with {name_of(reply.request)}{'' if reply.reply else ', no reply'}"
        elif len(reply.payload) not in sizes:
            wrong = f"with {len(reply.payload)} bytes, not {' or '.join(map(str, sizes))}"
        elif len(reply.fds) != fds:
            wrong = f"with {len(reply.fds)} file descriptors, not {fds}"
        else:
            return
        self.discarded += reply.fds
        raise VhostUserError(f"the back-end answers {name} {wrong}")

    def _pack(self, form: Struct, request: FrontendReq, *values: int, fds: tuple[int, ...] = ()) -> Talk:
        yield from self._tell(request, form.pack(*values), fds)

    # -- the connection --------------------------------------------------------------------------------------------------------

    def negotiate(self) -> Talk:
        """Features offered and protocol features, as QEMU begins; returns the virtio features offered."""
        self.offered = yield from self._number(FrontendReq.GET_FEATURES)
        if self.offered & F_PROTOCOL_FEATURES:
            offered = yield from self._number(FrontendReq.GET_PROTOCOL_FEATURES)
            protocol = offered & self.wanted
            yield from self._pack(U64, FrontendReq.SET_PROTOCOL_FEATURES, protocol)
            self.protocol = protocol
            if self.has(ProtocolFeature.MQ):
                self.queues = yield from self._number(FrontendReq.GET_QUEUE_NUM)
        yield from self._tell(FrontendReq.SET_OWNER)
        return self.offered & ~F_PROTOCOL_FEATURES

    def set_features(self, features: int) -> Talk:
        """The driver's features, with the protocol's own bit where the back-end offered it."""
        yield from self._pack(U64, FrontendReq.SET_FEATURES, features | self.offered & F_PROTOCOL_FEATURES)

    def set_memory(self, regions: tuple[Region, ...]) -> Talk:
        """The whole memory table."""
        table = b"".join(MEM_REGION.pack(r.gpa, r.size, r.user, r.offset) for r in regions)
        payload = MEM_TABLE_HEAD.pack(len(regions), 0) + table
        yield from self._tell(FrontendReq.SET_MEM_TABLE, payload, tuple(r.fd for r in regions))

    def add_region(self, region: Region) -> Talk:
        """One more region (CONFIGURE_MEM_SLOTS)."""
        payload = MEM_SINGLE_HEAD.pack(0) + MEM_REGION.pack(region.gpa, region.size, region.user, region.offset)
        yield from self._tell(FrontendReq.ADD_MEM_REG, payload, (region.fd,))

    def remove_region(self, region: Region) -> Talk:
        """One region less (CONFIGURE_MEM_SLOTS)."""
        payload = MEM_SINGLE_HEAD.pack(0) + MEM_REGION.pack(region.gpa, region.size, region.user, region.offset)
        yield from self._tell(FrontendReq.REM_MEM_REG, payload)

    def max_mem_slots(self) -> Talk:
        """How many regions the back-end takes."""
        return (yield from self._number(FrontendReq.GET_MAX_MEM_SLOTS))

    def start_ring(
        self, ring: int, size: int, base: int, desc: int, avail: int, used: int, *, kick: int | None, call: int | None, err: int | None
    ) -> Talk:
        """Describe a ring (addresses are the front-end's own), give its eventfds (None: polled) and enable it."""
        yield from self._pack(VRING_STATE, FrontendReq.SET_VRING_NUM, ring, size)
        yield from self._pack(VRING_STATE, FrontendReq.SET_VRING_BASE, ring, base)
        yield from self._pack(VRING_ADDR, FrontendReq.SET_VRING_ADDR, ring, 0, desc, used, avail, 0)
        if err is not None:
            yield from self._notifier(FrontendReq.SET_VRING_ERR, ring, err)
        yield from self._notifier(FrontendReq.SET_VRING_CALL, ring, call)
        yield from self._notifier(FrontendReq.SET_VRING_KICK, ring, kick)
        if self.offered & F_PROTOCOL_FEATURES:
            yield from self.enable_ring(ring, True)

    def _notifier(self, request: FrontendReq, ring: int, fd: int | None) -> Talk:
        yield from self._pack(U64, request, ring | VRING_NO_FD * (fd is None), fds=() if fd is None else (fd,))

    def enable_ring(self, ring: int, on: bool) -> Talk:
        """SET_VRING_ENABLE."""
        yield from self._pack(VRING_STATE, FrontendReq.SET_VRING_ENABLE, ring, int(on))

    def stop_ring(self, ring: int) -> Talk:
        """Stop a ring; returns the next available index."""
        reply = yield from self._ask(FrontendReq.GET_VRING_BASE, VRING_STATE.pack(ring, 0), (VRING_STATE.size,))
        number, base = VRING_STATE.unpack(reply.payload)
        if number != ring or base > 0xFFFF:
            raise VhostUserError(f"the back-end answers GET_VRING_BASE of ring {ring} with ring {number}, index {base:#x}")
        return base

    def read_config(self, offset: int, length: int) -> Talk:
        """``length`` bytes of configuration space."""
        payload = CONFIG_HEAD.pack(offset, length, 0) + bytes(length)
        reply = yield from self._ask(FrontendReq.GET_CONFIG, payload, (len(payload), 0))
        if not reply.payload:
            raise VhostUserError(f"the back-end refuses GET_CONFIG of {length} bytes at {offset}")
        return reply.payload[CONFIG_HEAD.size :]

    def write_config(self, offset: int, data: bytes) -> Talk:
        """Store bytes in configuration space."""
        yield from self._tell(FrontendReq.SET_CONFIG, CONFIG_HEAD.pack(offset, len(data), 0) + data)

    def set_channel(self, fd: int) -> Talk:
        """Give the back-end its own channel."""
        yield from self._tell(FrontendReq.SET_BACKEND_REQ_FD, b"", (fd,))

    def get_inflight(self, queues: int, size: int) -> Talk:
        """Ask for an in-flight region; returns (fd, bytes, offset), the fd is the caller's."""
        sizes = INFLIGHT.size, INFLIGHT_PACKED.size
        reply = yield from self._ask(FrontendReq.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, queues, size), sizes, fds=1)
        length, offset, _, _ = INFLIGHT_PACKED.unpack_from(reply.payload)
        return reply.fds[0], length, offset

    def set_inflight(self, fd: int, length: int, offset: int, queues: int, size: int) -> Talk:
        """Give the back-end an in-flight region."""
        yield from self._pack(INFLIGHT, FrontendReq.SET_INFLIGHT_FD, length, offset, queues, size, fds=(fd,))

    def reset_device(self) -> Talk:
        """RESET_DEVICE."""
        yield from self._tell(FrontendReq.RESET_DEVICE)

    def set_status(self, status: int) -> Talk:
        """SET_STATUS."""
        yield from self._pack(U64, FrontendReq.SET_STATUS, status)

    def get_status(self) -> Talk:
        """GET_STATUS."""
        return (yield from self._number(FrontendReq.GET_STATUS))

    def backend_said(self, message: Message) -> tuple[str, Message | None]:
        """A message on the back-end's own channel: its name, and the answer if it wants one."""
        name = name_of(message.request, backend=True)
        known = message.request == BackendReq.CONFIG_CHANGE_MSG
        wants = message.need_reply and self.has(ProtocolFeature.REPLY_ACK)
        return name, Message(message.request, U64.pack(int(not known)), reply=True) if wants else None
