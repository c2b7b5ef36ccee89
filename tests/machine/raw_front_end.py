"""A vhost-user front-end by hand: shared memory, rings written byte by byte, messages that need not make sense."""

from __future__ import annotations

import mmap
import os
import random
import select
import struct
from collections.abc import Callable
from typing import Any

import vblklab as vb
from tests.support import DISCARD, IN, OUT, WRITE, HandRing
from vblklab.machine.serve import Served
from vblklab.memory import GuestMemory
from vblklab.spec.vhost_user import (
    CONFIG_HEAD,
    INFLIGHT,
    MEM_REGION,
    MEM_SINGLE_HEAD,
    MEM_TABLE_HEAD,
    U64,
    VRING_ADDR,
    VRING_STATE,
    FrontendReq,
)
from vblklab.vhost.channel import Channel, connect, drive
from vblklab.vhost.codec import Message, encode
from vblklab.vhost.effects import Region
from vblklab.vhost.front_end import FrontEnd

__all__ = ["MEMORY", "USER", "RawFrontEnd", "is_served", "random_message", "scribble"]

MEMORY = 1 << 18
USER = 0x7000_0000_0000
PATIENCE_MS = 60_000


class RawFrontEnd:
    """One connection with its memory, a ring of 8 and its three eventfds."""

    def __init__(self, served: Served, *, start: int = 0, features: int = 1 << 32 | 1 << 28) -> None:
        self.sock = connect(served.socket, PATIENCE_MS / 1000)
        self.channel, self.front_end = Channel(self.sock), FrontEnd()
        self.fd = os.memfd_create("raw front-end")
        os.ftruncate(self.fd, MEMORY)
        self._mapping = mmap.mmap(self.fd, MEMORY)
        self.memory = GuestMemory(memoryview(self._mapping))
        self.ring = HandRing(self.memory, 8, start=start)
        self.ring.publish(start)
        self.ring.put("H", self.ring.used_at + 2, start)
        self.start, self.features, self.shrunk = start, features, False
        self.kick_fd, self.call_fd, self.err_fd = (os.eventfd(0) for _ in range(3))

    def __enter__(self) -> RawFrontEnd:
        return self

    def __exit__(self, *what: object) -> None:
        self.sock.close()
        for fd in (self.kick_fd, self.call_fd, self.err_fd, self.fd):
            os.close(fd)

    def talk(self, steps: Any) -> Any:
        return drive(self.channel, self.front_end, steps)

    def connect(self) -> None:
        """Everything up to a running ring."""
        self.talk(self.front_end.negotiate())
        self.talk(self.front_end.set_features(self.features))
        self.talk(self.front_end.set_memory((Region(0, MEMORY, USER, 0, self.fd),)))
        self.start_ring()

    def start_ring(self) -> None:
        ring, fds = self.ring, {"kick": self.kick_fd, "call": self.call_fd, "err": self.err_fd}
        places = (USER + ring.desc_at, USER + ring.avail_at, USER + ring.used_at)
        self.talk(self.front_end.start_ring(0, ring.size, self.start, *places, **fds))

    def kick(self) -> None:
        os.eventfd_write(self.kick_fd, 1)

    def shrink(self, size: int) -> None:
        """Cut the memory's file; from here on this process does not look into it."""
        self.shrunk = True
        os.ftruncate(self.fd, size)

    def wait(self) -> set[str]:
        """What answered: the call or error eventfd, or the socket (which means the end)."""
        poll = select.poll()
        names = {self.call_fd: "call", self.err_fd: "err", self.sock.fileno(): "socket"}
        for fd in names:
            poll.register(fd, select.POLLIN)
        answered = {names[fd] for fd, _ in poll.poll(PATIENCE_MS)}
        assert answered, "the back-end hangs"
        return answered

    def ended(self) -> bool:
        """Whether the back-end hangs up after what it was sent, whatever it still answers."""
        while True:
            if not self.sock.recv(4096):
                return True


def is_served(served: Served) -> None:
    """A new front-end is served at once, and completely."""
    job = vb.Fio(rw="randread", bs=4096, iodepth=4, number_ios=20)
    run = vb.Pipeline(app=job, host=vb.VhostUserBackend(served.socket)).run(vb.VhostUserMachine(trace=False, stall_s=60))
    assert run.ios == 20 and not run.errors


# -- messages without sense ----------------------------------------------------------------------------------------------------

Choose = random.Random
_FDS: tuple[Callable[[], int], ...] = (
    lambda: os.eventfd(0),
    lambda: os.open(os.devnull, os.O_RDWR),
    lambda: os.open("/", os.O_RDONLY),
    lambda: os.memfd_create("fuzz"),
)


def some_fd(choose: Choose, front: RawFrontEnd) -> int:
    return os.dup(front.fd) if choose.random() < 0.5 else choose.choice(_FDS)()


def some_number(choose: Choose) -> int:
    near = choose.choice([0, 1, 2, 8, 128, 255, 256, 4096, MEMORY, USER, 1 << 16, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1])
    return max(0, min((1 << 64) - 1, near + choose.choice([-1, 0, 0, 0, 1])))


def _region(choose: Choose) -> bytes:
    good = (0, MEMORY, USER, 0)
    return MEM_REGION.pack(*(value if choose.random() < 0.8 else some_number(choose) for value in good))


def _u32(choose: Choose) -> int:
    return some_number(choose) & 0xFFFFFFFF


def _payload(request: FrontendReq, choose: Choose, ring: HandRing) -> bytes:
    index = choose.choice([0, 0, 0, 0, 1, 77])
    match request:
        case FrontendReq.SET_MEM_TABLE:
            count = choose.choice([1, 1, 1, 0, 2, 8, 9])
            return MEM_TABLE_HEAD.pack(count, 0) + b"".join(_region(choose) for _ in range(count))
        case FrontendReq.ADD_MEM_REG | FrontendReq.REM_MEM_REG:
            return MEM_SINGLE_HEAD.pack(0) + _region(choose)
        case FrontendReq.SET_VRING_NUM | FrontendReq.SET_VRING_BASE | FrontendReq.SET_VRING_ENABLE | FrontendReq.GET_VRING_BASE:
            value = choose.choice([8, 1, 0, _u32(choose)])
            return VRING_STATE.pack(index, value)
        case FrontendReq.SET_VRING_ADDR:
            places = [USER + ring.desc_at, USER + ring.used_at, USER + ring.avail_at]
            return VRING_ADDR.pack(index, 0, *(p if choose.random() < 0.9 else some_number(choose) for p in places), 0)
        case FrontendReq.GET_CONFIG | FrontendReq.SET_CONFIG:
            offset, size = choose.choice([(0, 60), (32, 1), (250, 10), (_u32(choose), _u32(choose))])
            return CONFIG_HEAD.pack(offset, size, 0) + bytes(min(size, 300))
        case FrontendReq.GET_INFLIGHT_FD | FrontendReq.SET_INFLIGHT_FD:
            return INFLIGHT.pack(choose.choice([4096, some_number(choose)]), 0, choose.choice([1, 1, 9]), choose.choice([8, 128, 0]))
        case FrontendReq.SET_VRING_KICK | FrontendReq.SET_VRING_CALL | FrontendReq.SET_VRING_ERR:
            return U64.pack(index | choose.choice([0, 0, 0, 256]))
        case FrontendReq.SET_FEATURES:
            return U64.pack(choose.choice([1 << 32, 1 << 32 | 1 << 30, 1 << 32 | 1 << 28 | 1 << 29 | 1 << 30, some_number(choose)]))
        case FrontendReq.SET_PROTOCOL_FEATURES:
            return U64.pack(choose.choice([0x1B229, 0x1B229, some_number(choose)]))
        case FrontendReq.SET_STATUS:
            return U64.pack(choose.choice([0, 1, 3, 11, 15, some_number(choose)]))
        case _:
            return b""


_WITH_FD = {
    FrontendReq.SET_MEM_TABLE,
    FrontendReq.ADD_MEM_REG,
    FrontendReq.SET_VRING_KICK,
    FrontendReq.SET_VRING_CALL,
    FrontendReq.SET_VRING_ERR,
    FrontendReq.SET_INFLIGHT_FD,
    FrontendReq.SET_BACKEND_REQ_FD,
}


def random_message(choose: Choose, front: RawFrontEnd) -> tuple[bytes, list[int]]:
    """One message, mostly well-formed, and the file descriptors that go with it (the caller's to close)."""
    request = choose.choice(list(FrontendReq))
    payload = _payload(request, choose, front.ring)
    count = int(request in _WITH_FD)
    if choose.random() < 0.05:
        payload = payload[: choose.randrange(len(payload) + 1)]
    if choose.random() < 0.05:
        count = choose.choice([0, 1, 2, 9])
    data = bytearray(encode(Message(int(request), payload, need_reply=choose.random() < 0.3)))
    if choose.random() < 0.05:
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    return bytes(data), [some_fd(choose, front) for _ in range(count)]


def scribble(choose: Choose, front: RawFrontEnd) -> None:
    """Requests good and bad, or noise, in the rings; then a kick."""
    ring = front.ring
    if front.shrunk:
        pass
    elif choose.random() < 0.3:
        at = choose.randrange(ring.desc_at, ring.end - 8)
        front.memory.write(at, choose.randbytes(8))
    else:
        front.memory.write(0x8000, struct.pack("<IIQ", choose.choice([IN, OUT, DISCARD, 99]), 0, choose.choice([0, 8, 1 << 40])))
        ring.chain([(0x8000, 16, 0), (choose.choice([0x9000, MEMORY - 1, 1 << 60]), 512, choose.choice([0, WRITE])), (0xA000, 1, WRITE)])
        ring.offer(*[0] * choose.choice([1, 1, 8, 40]))
    front.kick()
