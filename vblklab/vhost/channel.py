"""The one file that owns vhost-user sockets: bytes and file descriptors through SCM_RIGHTS."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections import deque
from typing import Any

from ..errors import ConfigError, VhostUserError
from ..spec.vhost_user import MAX_FDS
from .codec import Decoder, Message, encode
from .front_end import FrontEnd, Talk

__all__ = ["Channel", "Closed", "connect", "drive", "listen"]

_CTRUNC = socket.MSG_CTRUNC
_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_PATH_MOST = 107  # sun_path without its NUL


class Closed(VhostUserError):
    """The other end closed the connection."""


class Channel:
    """One end of a connection.  With a non-blocking socket, what cannot be sent now is kept and sent by ``flush``."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.decoder = Decoder()
        self._out: deque[tuple[bytes, tuple[int, ...], bool]] = deque()  # bytes, their fds, whether those are closed then

    def fileno(self) -> int:
        return self.sock.fileno()

    def receive(self) -> Message | None:
        """The next message, or None if the socket has no more now.  Raises Closed, or VhostUserError for what is no message."""
        decoder = self.decoder
        while True:
            wanted = decoder.wanted
            try:
                data, fds, flags, _ = socket.recv_fds(self.sock, wanted, MAX_FDS, _CLOEXEC) if wanted else (b"", [], 0, None)
            except (BlockingIOError, InterruptedError):
                return None
            except TimeoutError:
                raise VhostUserError("the other end does not answer") from None
            except OSError as error:
                raise Closed(f"the connection broke: {error.strerror}") from None
            if wanted and not data:
                for fd in fds:
                    os.close(fd)
                raise Closed("the other end closed the connection" + (" in the middle of a message" if decoder.partial else ""))
            message = decoder.feed(data, list(fds))
            if flags & _CTRUNC:
                self._drop(message)
                raise VhostUserError(f"more than {MAX_FDS} file descriptors with one message")
            if message is not None:
                return message

    @staticmethod
    def _drop(message: Message | None) -> None:
        for fd in message.fds if message is not None else ():
            os.close(fd)

    def send(self, message: Message, *, close: bool = False) -> None:
        """Queue a message and send what can be sent; ``close`` its file descriptors when they have gone."""
        self._out.append((encode(message), message.fds, close))
        self.flush()

    def flush(self) -> bool:
        """Send what waits; True if nothing is left.  The file descriptors of a message go with its first byte."""
        out = self._out
        while out:
            data, fds, close = out[0]
            try:
                sent = socket.send_fds(self.sock, [data], list(fds)) if fds else self.sock.send(data)
            except (BlockingIOError, InterruptedError):
                return False
            except TimeoutError:
                raise VhostUserError("the other end does not read") from None
            except OSError as error:
                raise Closed(f"the connection broke: {error.strerror}") from None
            for fd in fds if close else ():
                os.close(fd)
            if sent == len(data):
                out.popleft()
            else:
                out[0] = data[sent:], (), False
        return True

    @property
    def unsent(self) -> bool:
        """Whether something waits for the other end to read."""
        return bool(self._out)

    def close(self) -> None:
        for fd in (*self.decoder.discard(), *(fd for _, fds, close in self._out if close for fd in fds)):
            os.close(fd)
        self._out.clear()
        self.sock.close()


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


def listen(path: str) -> socket.socket:
    """A listening socket at ``path``; a dead socket file in its place is replaced, anything else is a ConfigError."""
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
            f"vhost-user socket {path!r}: {error.strerror}", "start the back-end first: vblk serve IMAGE --socket PATH"
        ) from None
    return sock
