"""The one file that owns vhost-user sockets: bytes and file descriptors through SCM_RIGHTS."""

from __future__ import annotations

import errno
import os
import socket
import stat
from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, VhostUserError
from ..spec.vhost_user import MAX_FDS
from .codec import Decoder, Message, encode
from .front_end import FrontEnd, Talk

__all__ = ["Channel", "Closed", "close_all", "connect", "drive", "listen"]

_CTRUNC = socket.MSG_CTRUNC
_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_NOSIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
_PATH_MOST = 107  # sun_path without its NUL


class Closed(VhostUserError):
    """The other end closed the connection."""


@dataclass(slots=True)
class _Waiting:
    """A message to send, or the rest of one; its file descriptors go with its first byte."""

    data: bytes
    fds: tuple[int, ...]
    close: bool


class Channel:
    """One end of a connection.  With a non-blocking socket, what cannot be sent now is kept and sent by ``flush``."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.decoder = Decoder()
        self._out: deque[_Waiting] = deque()
        # Each call asks for it: who gave us this socket may have kept it and can clear O_NONBLOCK, which both share.
        self._flags = socket.MSG_DONTWAIT if sock.gettimeout() == 0 else 0

    def fileno(self) -> int:
        return self.sock.fileno()

    def receive(self) -> Message | None:
        """The next message, or None if the socket has no more now.  Raises Closed, or VhostUserError for what is no message."""
        decoder = self.decoder
        while True:
            wanted = decoder.wanted
            try:
                data, fds, flags = _receive(self.sock, wanted, self._flags | _CLOEXEC)
            except (BlockingIOError, InterruptedError):
                return None
            except TimeoutError:
                raise VhostUserError("the other end does not answer") from None
            except OSError as error:
                raise Closed(f"the connection broke: {error.strerror}") from None
            if not data:
                raise Closed("the other end closed the connection" + (" in the middle of a message" if decoder.partial else ""))
            message = decoder.feed(data, fds)
            if flags & _CTRUNC:
                close_all(message.fds if message is not None else ())
                raise VhostUserError(f"more file descriptors with one message than {MAX_FDS}, or than this process may open")
            if message is not None:
                return message

    def send(self, message: Message, *, close: bool = False) -> None:
        """Queue a message and send what can be sent; ``close`` its file descriptors when they have gone."""
        self._out.append(_Waiting(encode(message), message.fds, close))
        self.flush()

    def flush(self) -> bool:
        """Send what waits; True if nothing is left."""
        out, flags = self._out, self._flags | _NOSIGNAL
        while out:
            first = out[0]
            try:
                sent = _send(self.sock, first.data, first.fds, flags)
            except (BlockingIOError, InterruptedError):
                return False
            except TimeoutError:
                raise VhostUserError("the other end does not read") from None
            except OSError as error:
                raise Closed(f"the connection broke: {error.strerror}") from None
            if first.close:
                close_all(first.fds)
            first.data, first.fds = first.data[sent:], ()
            if not first.data:
                out.popleft()
        return True

    @property
    def unsent(self) -> bool:
        """Whether something waits for the other end to read."""
        return bool(self._out)

    def close(self) -> None:
        close_all(self.decoder.discard())
        for waiting in self._out:
            if waiting.close:
                close_all(waiting.fds)
        self._out.clear()
        self.sock.close()


# socket.recv_fds and socket.send_fds do not hand their flags on to the kernel (CPython 3.11 to 3.14).


def _receive(sock: socket.socket, count: int, flags: int) -> tuple[bytes, list[int], int]:
    fds = array("i")
    data, ancillary, answer, _ = sock.recvmsg(count, socket.CMSG_LEN(MAX_FDS * fds.itemsize), flags)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds), answer


def _send(sock: socket.socket, data: bytes, fds: tuple[int, ...], flags: int) -> int:
    return sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else [], flags)


def close_all(fds: Iterable[int]) -> None:
    """Close file descriptors that came with a message and are nobody's."""
    for fd in fds:
        os.close(fd)


def drive(channel: Channel, front_end: FrontEnd, talk: Talk) -> Any:
    """Hold one talk of a front-end over a blocking channel; returns what the talk returns."""
    try:
        message = next(talk)
        while True:
            channel.send(message)
            reply = None
            if front_end.expects(message):
                while reply is None:
                    reply = channel.receive()
            message = talk.send(reply)
    except StopIteration as end:
        return end.value
    finally:
        close_all(front_end.discarded)
        front_end.discarded.clear()


def listen(path: str) -> socket.socket:
    """A listening socket at ``path``; a dead socket file in its place is replaced, anything else is a ConfigError."""
    if not path or "\0" in path:
        raise ConfigError(f"socket path {path!r}", "give the path of a file")
    if len(os.fsencode(path)) > _PATH_MOST:
        raise ConfigError(f"socket path of {len(os.fsencode(path))} bytes", f"a unix socket's path has at most {_PATH_MOST}: {path!r}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear(path)
        sock.bind(path)
        sock.listen(16)
    except OSError as error:
        sock.close()
        raise ConfigError(f"socket {path!r}: {error.strerror}", "give a path in a folder that exists and can be written") from None
    except ConfigError:
        sock.close()
        raise
    return sock


def _clear(path: str) -> None:
    """Remove a socket file that nobody listens on."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"socket {path!r} exists and is no socket", "give another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(path)
    if code in (0, errno.EAGAIN):
        raise ConfigError(f"socket {path!r} is in use", "give another path, or end the program that listens there")
    os.unlink(path)


def connect(path: str, timeout_s: float) -> socket.socket:
    """A blocking connection to a back-end's socket; ``timeout_s`` bounds every later answer."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"vhost-user socket {path!r}: {error.strerror or error}", "start the back-end first: vblk serve IMAGE --socket PATH"
        ) from None
    return sock
