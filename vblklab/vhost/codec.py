"""The message codec of vhost-user: bytes and file descriptors in, messages out, and back.

A message's file descriptors are plain numbers here.  Who takes a message owns them; what nobody took is in ``discarded``,
for the owner of the socket to close.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import VhostUserError
from ..spec.vhost_user import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    HEADER,
    HEADER_BYTES,
    MAX_FDS,
    MAX_PAYLOAD,
    VERSION,
    VERSION_MASK,
    BackendReq,
    FrontendReq,
    ProtocolFeature,
)

__all__ = ["SPOKEN", "Decoder", "Message", "encode", "name_of"]

SPOKEN = int(
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
"""The protocol features that both ends have."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message: request number, payload, and the file descriptors that came with it."""

    request: int
    payload: bytes = b""
    fds: tuple[int, ...] = ()
    reply: bool = False
    need_reply: bool = False


def name_of(request: int, *, backend: bool = False) -> str:
    """The protocol's name for a request number, or the number."""
    try:
        return (BackendReq if backend else FrontendReq)(request).name
    except ValueError:
        return f"request {request}"


def encode(message: Message) -> bytes:
    """Header and payload; the file descriptors travel beside them."""
    flags = VERSION | FLAG_REPLY * message.reply | FLAG_NEED_REPLY * message.need_reply
    return HEADER.pack(message.request, flags, len(message.payload)) + message.payload


class Decoder:
    """Collects one direction of a connection.  After an error there is no next message.

    ``wanted`` is the number of bytes to read next: never beyond the end of a message, so that the file descriptors of the next
    one cannot be taken for this one's.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._head = bytearray()
        self._payload = bytearray()
        self._size = -1  # payload bytes of the message being read, -1 before its header is whole
        self._request = self._flags = 0
        self._fds: list[int] = []

    @property
    def wanted(self) -> int:
        """Bytes that are missing from the header or from the payload."""
        return HEADER_BYTES - len(self._head) if self._size < 0 else self._size - len(self._payload)

    @property
    def partial(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._head)

    def feed(self, data: bytes, fds: list[int]) -> Message | None:
        """Take at most ``wanted`` bytes; the message if it is whole now.  Raises VhostUserError and keeps the fds to discard."""
        self._fds += fds
        if len(self._fds) > MAX_FDS:
            raise VhostUserError(f"{len(self._fds)} file descriptors with one message, at most {MAX_FDS} are taken")
        if self._size < 0:
            self._head += data
            if len(self._head) < HEADER_BYTES:
                return None
            self._request, self._flags, self._size = HEADER.unpack(self._head)
            if self._flags & VERSION_MASK != VERSION:
                raise VhostUserError(f"{name_of(self._request)} has version {self._flags & VERSION_MASK}, not {VERSION}")
            if self._size > MAX_PAYLOAD:
                raise VhostUserError(f"{name_of(self._request)} announces {self._size:,} bytes, at most {MAX_PAYLOAD} are taken")
        else:
            self._payload += data
        if len(self._payload) < self._size:
            return None
        flags = self._flags
        message = Message(self._request, bytes(self._payload), tuple(self._fds), bool(flags & FLAG_REPLY), bool(flags & FLAG_NEED_REPLY))
        self._begin()
        return message

    def discard(self) -> list[int]:
        """The file descriptors of a message that will never be whole."""
        fds, self._fds = self._fds, []
        return fds
