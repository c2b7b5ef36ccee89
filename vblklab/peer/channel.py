"""The way to the guest's agent (agent.sh): one script at a time, its input and its output as bytes, and a way to end it."""

from __future__ import annotations

import select
import socket
import threading
import time
from typing import NamedTuple

__all__ = ["LOST", "Answer", "Channel"]

LOST = -1
"""The status of a command that was ended and whose process still waits for a disk."""
_KILL_GRACE_S = 1
_ANSWER_S = 15.0
_PIECE = 1 << 18


class Answer(NamedTuple):
    """What the agent says about a command: its ``status``, LOST for one beyond killing, and all that it printed."""

    status: int
    output: bytes


class Channel:
    """The host's ends of the two ports.  Calls from several threads take turns.

    An exception between two bytes, such as KeyboardInterrupt, loses nothing: what is left to send is sent first the next time, and
    answers to commands that nobody waits for any more are passed over.
    """

    def __init__(self, agent: socket.socket, killer: socket.socket) -> None:
        self._agent = agent
        self._killer = killer
        self._lock = threading.RLock()
        self._sent = 0
        self._to_send = bytearray()
        self._received = bytearray()
        agent.setblocking(False)

    def close(self) -> None:
        """Close both; the agent then powers the guest off."""
        self._agent.close()
        self._killer.close()

    def greeting(self, timeout_s: float) -> None:
        """Wait for the agent; raises TimeoutError, or EOFError if the guest ends before."""
        with self._lock:
            self._answer(0, time.monotonic() + timeout_s)

    def run(self, script: bytes, data: bytes, timeout_s: float | None) -> Answer:
        """Run a shell script with ``data`` as its input.

        Raises TimeoutError with the Answer as its argument (None if the agent is silent) after it ended the command, EOFError if the
        guest has ended.
        """
        with self._lock:
            number = self._ask(b"run", b"%d %d" % (len(script), len(data)), script, data)
            try:
                return self._answer(number, None if timeout_s is None else time.monotonic() + timeout_s)
            except TimeoutError:
                raise TimeoutError(self._end(number)) from None
            except KeyboardInterrupt:
                self._end(number)
                raise

    def mark(self, timeout_s: float) -> tuple[int, int, int]:
        """(number, host ns before, host ns after) of one line ``vblk NUMBER`` in the guest's trace_marker, host ns by perf_counter."""
        with self._lock:
            before = time.perf_counter_ns()
            number = self._ask(b"mark")
            self._answer(number, time.monotonic() + timeout_s)
            return number, before, time.perf_counter_ns()

    def _ask(self, verb: bytes, *more: bytes) -> int:
        self._sent += 1
        head, bodies = more[:1], more[1:]
        self._to_send += b" ".join([verb, b"%d" % self._sent, *head]) + b"\n" + b"".join(bodies)
        return self._sent

    def _end(self, number: int) -> Answer | None:
        try:
            self._killer.send(b"%d %d\n" % (number, _KILL_GRACE_S), socket.MSG_DONTWAIT)
            return self._answer(number, time.monotonic() + _ANSWER_S)
        except (TimeoutError, BlockingIOError):
            return None
        except BrokenPipeError:
            raise EOFError from None

    def _answer(self, number: int, deadline: float | None) -> Answer:
        """The answer to ``number``; answers to earlier ones, given up meanwhile, are dropped."""
        while True:
            line_end = self._received.find(b"\n")
            if line_end >= 0:
                words = bytes(self._received[:line_end]).split()
                answered, size = int(words[0]), int(words[2])
                if len(self._received) > line_end + size:
                    status = LOST if words[1] == b"lost" else int(words[1])
                    answer = Answer(status, bytes(self._received[line_end + 1 : line_end + 1 + size]))
                    del self._received[: line_end + 1 + size]
                    if answered == number:
                        return answer
                    continue
            self._move(deadline)

    def _move(self, deadline: float | None) -> None:
        """Send and receive what can be now; waits until ``deadline`` for either."""
        left_s = None if deadline is None else deadline - time.monotonic()
        if left_s is not None and left_s <= 0:
            raise TimeoutError
        poll = select.poll()
        poll.register(self._agent, select.POLLIN | (select.POLLOUT if self._to_send else 0))
        now = dict(poll.poll(None if left_s is None else left_s * 1000)).get(self._agent.fileno(), 0)
        try:
            if now & select.POLLOUT:
                del self._to_send[: self._agent.send(memoryview(self._to_send)[:_PIECE])]
            if now & ~select.POLLOUT:
                data = self._agent.recv(_PIECE)
                if not data:
                    raise EOFError
                self._received += data
        except (BrokenPipeError, ConnectionResetError):
            raise EOFError from None
