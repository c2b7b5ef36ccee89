"""A driver made by hand and a machine of ten lines, for tests that look at one room without the others.

Everything here packs bytes by the specification's words and shares no code with ``vblklab.ring`` or ``vblklab.spec``: what
the package writes is judged by another reader, and what it reads may be as wrong as a test likes.
"""

from __future__ import annotations

import itertools
import signal
import struct
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from vblklab.device import VirtioBlkDevice
from vblklab.disk.drive import execute
from vblklab.disk.store import RamStore
from vblklab.engine import Simulated, Sync
from vblklab.events import WAIT
from vblklab.memory import GuestMemory, GuestPages
from vblklab.ring import SplitDevice, SplitDriver, SplitLayout
from vblklab.transport import MmioRegisters

__all__ = ["INDIRECT", "NEXT", "WRITE", "Board", "HandRing", "Held", "LoggedStore", "Trampoline", "deadline", "finish", "gpa_of", "pair"]

NEXT, WRITE, INDIRECT = 1, 2, 4
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
F_FLUSH, F_CONFIG_WCE, F_MQ, F_DISCARD, F_WRITE_ZEROES = 1 << 9, 1 << 11, 1 << 12, 1 << 13, 1 << 14
F_INDIRECT, F_EVENT_IDX, F_VERSION_1 = 1 << 28, 1 << 29, 1 << 32

Piece = tuple[int, int]
"""(gpa, length in bytes)."""


def gpa_of(memory: GuestMemory, view: memoryview) -> Piece:
    """Where a view of guest memory really lies, asked of the buffer and not of whoever made the view."""
    base = np.frombuffer(memory.bytes, np.uint8).__array_interface__["data"][0]
    at = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return at - base + memory.base, view.nbytes


def finish(steps: Generator[Any, int, Any], most: int = 100_000) -> Any:
    """Run the steps of a part to their end, as if it were alone; returns what they return."""
    try:
        ev = next(steps)
        for _ in range(most):
            assert ev is not WAIT, "waits for a notification, and nobody is there to notify"
            ev = steps.send(0)
    except StopIteration as end:
        return end.value
    raise AssertionError(f"not at its end after {most:,} trace points")


class Trampoline:
    """The smallest machine: one context, a level-like notifier, no time.  ``points`` keeps what was yielded."""

    def __init__(self, context: Generator[Any, int, Any]) -> None:
        self.points: list[tuple[Any, ...]] = []
        self._context = context
        self._notified = True
        self._started = False

    def notify(self) -> None:
        self._notified = True

    def run(self, most: int = 200_000) -> None:
        """Until the context idles."""
        for _ in range(most):
            if self.step() is WAIT:
                return
        raise AssertionError(f"still busy after {most:,} trace points: a hang")

    def step(self) -> Any:
        """To the next trace point; WAIT if the context idles."""
        while True:
            ev = self._context.send(0 if self._started else None)
            self._started = True
            if ev is not WAIT:
                self.points.append(ev)
                return ev
            if not self._notified:
                return WAIT
            self._notified = False


# -- rings -------------------------------------------------------------------------------------------------------------------


class HandRing:
    """The driver's side of a split virtqueue, written byte by byte.  Nothing is checked; ``used`` reads what came back."""

    def __init__(self, memory: GuestMemory, size: int = 8, *, at: int = 0x1000, start: int = 0) -> None:
        self.memory = memory
        self.size = size
        self.desc_at = at
        self.avail_at = at + 16 * size
        self.used_at = (self.avail_at + 6 + 2 * size + 3) & ~3
        self.end = self.used_at + 6 + 8 * size
        self.idx = self.seen = start
        memory.view(at, self.end - at)[:] = bytes(self.end - at)

    @property
    def layout(self) -> SplitLayout:
        return SplitLayout(self.size, self.desc_at, self.avail_at, self.used_at)

    def put(self, fmt: str, gpa: int, *values: int) -> None:
        self.memory.write(gpa, struct.pack("<" + fmt, *values))

    def get(self, fmt: str, gpa: int) -> Any:
        values = struct.unpack("<" + fmt, self.memory.read(gpa, struct.calcsize("<" + fmt)))
        return values[0] if len(values) == 1 else values

    def desc(self, slot: int, addr: int, length: int, flags: int = 0, link: int = 0) -> None:
        self.put("QIHH", self.desc_at + 16 * slot, addr, length, flags, link)

    def read_desc(self, slot: int) -> tuple[int, int, int, int]:
        return self.get("QIHH", self.desc_at + 16 * slot)

    def chain(self, pieces: Sequence[tuple[int, int, int]], slots: Sequence[int] | None = None) -> int:
        """Write (gpa, length, flags) as a chain through ``slots``; returns its head."""
        slots = range(len(pieces)) if slots is None else slots
        assert len(pieces) <= self.size, "the test's own chain does not fit its ring"
        for i, (addr, length, flags) in enumerate(pieces):
            more = i < len(pieces) - 1
            self.desc(slots[i], addr, length, flags | (NEXT if more else 0), slots[i + 1] if more else 0)
        return slots[0]

    def table(self, at: int, pieces: Sequence[tuple[int, int, int]]) -> Piece:
        """Write an indirect table; returns its (gpa, bytes)."""
        for i, (addr, length, flags) in enumerate(pieces):
            more = i < len(pieces) - 1
            self.put("QIHH", at + 16 * i, addr, length, flags | (NEXT if more else 0), i + 1 if more else 0)
        return at, 16 * len(pieces)

    def offer(self, *heads: int) -> None:
        """Put heads on the available ring and publish them with one idx."""
        for head in heads:
            self.put("H", self.avail_at + 4 + 2 * (self.idx % self.size), head)
            self.idx = (self.idx + 1) & 0xFFFF
        self.publish(self.idx)

    def publish(self, idx: int) -> None:
        self.put("H", self.avail_at + 2, idx)

    @property
    def avail_flags(self) -> int:
        return self.get("H", self.avail_at)

    @avail_flags.setter
    def avail_flags(self, value: int) -> None:
        self.put("H", self.avail_at, value)

    @property
    def avail_idx(self) -> int:
        return self.get("H", self.avail_at + 2)

    @property
    def used_event(self) -> int:
        return self.get("H", self.avail_at + 4 + 2 * self.size)

    @used_event.setter
    def used_event(self, value: int) -> None:
        self.put("H", self.avail_at + 4 + 2 * self.size, value)

    @property
    def used_flags(self) -> int:
        return self.get("H", self.used_at)

    @used_flags.setter
    def used_flags(self, value: int) -> None:
        self.put("H", self.used_at, value)

    @property
    def used_idx(self) -> int:
        return self.get("H", self.used_at + 2)

    @property
    def avail_event(self) -> int:
        return self.get("H", self.used_at + 4 + 8 * self.size)

    @avail_event.setter
    def avail_event(self, value: int) -> None:
        self.put("H", self.used_at + 4 + 8 * self.size, value)

    def used(self) -> list[Piece]:
        """(id, len) of everything used since the last call."""
        out = []
        while self.seen != self.used_idx:
            out.append(self.get("II", self.used_at + 4 + 8 * (self.seen % self.size)))
            self.seen = (self.seen + 1) & 0xFFFF
        return out

    @classmethod
    def over(cls, memory: GuestMemory, layout: SplitLayout) -> HandRing:
        """The same eyes and hands over a ring that somebody else made."""
        ring = cls.__new__(cls)
        ring.memory, ring.size = memory, layout.size
        ring.desc_at, ring.avail_at, ring.used_at = layout.desc, layout.avail, layout.used
        ring.end = layout.used + 6 + 8 * layout.size
        ring.idx, ring.seen = ring.avail_idx, ring.used_idx
        return ring


def pair(
    size: int = 8,
    *,
    event_idx: bool = True,
    in_order: bool = False,
    indirect: int = 0,
    start: int = 65530,
    number: int = 0,
    base: int = 0,
) -> tuple[SplitDriver, SplitDevice, HandRing]:
    """Both halves over one memory and a hand that can reach into it, with all indices at ``start`` so that they soon wrap."""
    memory = GuestMemory(bytearray(1 << 17), base)
    common: dict[str, Any] = dict(event_idx=event_idx, in_order=in_order)
    driver = SplitDriver.alloc(GuestPages(memory, base + 0x1000), size, **common, indirect_segments=indirect)
    device = SplitDevice(memory, driver.layout, number=number, **common, indirect=bool(indirect), chain_max=indirect)
    hand = HandRing.over(memory, driver.layout)
    hand.idx = hand.seen = start
    hand.put("H", hand.avail_at + 2, start)
    hand.put("H", hand.used_at + 2, start)
    if event_idx:
        hand.used_event = hand.avail_event = start
    for half in (driver, device):
        for name in vars(half):
            if name.endswith("_idx") and name != "event_idx":
                setattr(half, name, start)
    return driver, device, hand


# -- a device on a bench -----------------------------------------------------------------------------------------------------


class LoggedStore(RamStore):
    """A RAM disk that writes down what was asked of it and fails where it is told to: ``fail["readv"] = errno.EIO``."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.log: list[tuple[Any, ...]] = []
        self.fail: dict[str, int] = {}

    def _note(self, name: str, *args: Any) -> None:
        self.log.append((name, *args))
        if name in self.fail:
            raise OSError(self.fail[name], "told to fail")

    def readv(self, offset: int, views: Sequence[memoryview]) -> None:
        self._note("readv", offset, sum(map(len, views)))
        super().readv(offset, views)

    def writev(self, offset: int, views: Sequence[memoryview]) -> None:
        self._note("writev", offset, sum(map(len, views)))
        super().writev(offset, views)

    def flush(self) -> None:
        self._note("flush")

    def discard(self, offset: int, length: int) -> None:
        self._note("discard", offset, length)
        RamStore.write_zeroes(self, offset, length, True)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._note("write_zeroes", offset, length, unmap)
        super().write_zeroes(offset, length, unmap)


class Held(Simulated):
    """An asynchronous engine whose operations end when, and in the order in which, the test says."""

    def attach(self, iostack: Any, store: Any, wake: Callable[[], None]) -> None:
        super().attach(iostack, store, wake)
        self.started: list[Any] = []

    def flush(self) -> Generator[Any, int, None]:
        if self.batch:
            yield ("host:sys_enter_io_submit", self.batch[0].io)
            self.started += self.batch
            self.batch = []

    def end(self, op: Any = None) -> None:
        """End one operation, the oldest if none is named."""
        op = self.started[0] if op is None else op
        self.started.remove(op)
        op.status = execute(self.store, op.op, op.sector << 9, op.length, op.segments, op.unmap)
        self.end_io(op)


class Board:
    """A virtio-blk device behind its register file, over a store, driven by hand.  No machine, no driver.

    ``boot()`` is the handshake of §3.1.1; ``request()`` builds a chain of any framing, kicks, and says what came back.
    """

    def __init__(
        self,
        device: VirtioBlkDevice | None = None,
        *,
        store: RamStore | None = None,
        engine: Any = None,
        queues: int = 1,
        size: int = 8,
        memory_bytes: int = 1 << 18,
        memory: GuestMemory | None = None,
        sectors: int = 2048,
    ) -> None:
        self.memory = GuestMemory(bytearray(memory_bytes)) if memory is None else memory
        self.device = VirtioBlkDevice() if device is None else device
        self.device.num_queues = queues
        self.store = LoggedStore(sectors << 9) if store is None else store
        self.engine = Sync() if engine is None else engine
        self.size = size
        self.notified: list[int] = []
        self.config_interrupts = 0
        self.regs = self._registers()
        self.machine = Trampoline(self._context())
        self.engine.attach(None, self.store, self.machine.notify)
        self.device.attach(self.engine, self.store.size >> 9, read_only=self.store.read_only, notify=self._notify, wake=self.machine.notify)
        self.device.on_reset_done = self.regs.reset_done
        self.device.on_needs_reset = self.regs.needs_reset
        self.device.on_config_changed = self.regs.config_changed
        self.regs.on_notify = self.device.kick
        self.regs.on_interrupt = self._interrupt
        self.rings: list[HandRing] = []
        self.data_at = 0x10000

    def _context(self) -> Generator[Any, int, Any]:
        yield from self.device.run()

    def _notify(self, queue: int) -> Generator[Any, int, None]:
        self.regs.interrupt.set(1)
        self.notified.append(queue)
        yield ("virtio_notify", queue)

    def _interrupt(self) -> None:
        self.config_interrupts += 1

    def _registers(self) -> Any:
        return MmioRegisters(self.memory, self.device)

    # registers by their offsets in the specification's table
    def status(self) -> int:
        return int(self.regs.read(0x070))

    def set_status(self, value: int) -> None:
        self.regs.write(0x070, value)

    def doorbell(self, queue: int) -> None:
        self.regs.write(0x050, queue)

    def reset(self) -> None:
        self.set_status(0)
        self.machine.run()
        assert self.status() == 0

    def offered(self) -> int:
        bits = 0
        for sel in (0, 1):
            self.regs.write(0x014, sel)
            bits |= self.regs.read(0x010) << (32 * sel)
        return bits

    def accept(self, features: int) -> int:
        """Write the accepted features and FEATURES_OK; returns the status read back."""
        for sel in (0, 1):
            self.regs.write(0x024, sel)
            self.regs.write(0x020, features >> (32 * sel) & 0xFFFFFFFF)
        self.set_status(self.status() | FEATURES_OK)
        return self.status()

    def queue(self, number: int, ring: HandRing) -> None:
        """Tell the device where a ring lies."""
        self.regs.write(0x030, number)
        self.regs.write(0x038, ring.size)
        for low, gpa in ((0x080, ring.desc_at), (0x090, ring.avail_at), (0x0A0, ring.used_at)):
            self.regs.write(low, gpa & 0xFFFFFFFF)
            self.regs.write(low + 4, gpa >> 32)
        self.regs.write(0x044, 1)

    def boot(self, features: int | None = None, *, ok: bool = True) -> Board:
        """Reset, negotiate (all that is offered if nothing is named), set up every queue, DRIVER_OK."""
        self.reset()
        self.set_status(ACKNOWLEDGE)
        self.set_status(ACKNOWLEDGE | DRIVER)
        self.features = self.offered() if features is None else features | F_VERSION_1
        assert self.accept(self.features) & FEATURES_OK
        at = 0x1000
        self.rings = []
        for number in range(self.device.num_queues):
            ring = HandRing(self.memory, self.size, at=at)
            at = (ring.end + 15) & ~15
            self.queue(number, ring)
            self.rings.append(ring)
        assert at <= 0x9000, "the rings reach into the tables"
        if ok:
            self.set_status(self.status() | DRIVER_OK)
            self.machine.run()
        return self

    def kick(self, queue: int = 0) -> None:
        """QueueNotify, then the device runs until it idles."""
        self.doorbell(queue)
        self.machine.run()

    # requests
    def pieces(
        self,
        kind: int,
        sector: int = 0,
        *,
        data: bytes = b"",
        room: int = 0,
        cuts: Iterable[int] | None = None,
        slot: int = 0,
        reserved: int = 0,
    ) -> list[tuple[int, int, int]]:
        """(gpa, length, flags) of a request: header and ``data`` for the device to read, ``room`` bytes and the status to write.

        Without ``cuts`` it is header, data, status, each one piece; with them every readable and every writable byte lies in
        pieces of these lengths, repeated, whatever field they belong to.
        """
        base = self.data_at + slot * 0x2000
        head = struct.pack("<IIQ", kind, reserved, sector)
        if cuts is None:
            out = [(base, 16, 0)]
            self.memory.write(base, head)
            if data:
                self.memory.write(base + 0x100, data)
                out.append((base + 0x100, len(data), 0))
            if room:
                out.append((base + 0x100 + len(data), room, WRITE))
            self.memory.write(base + 0x20, b"\xff")
            return [*out, (base + 0x20, 1, WRITE)]
        out, at = [], base
        cut = itertools.cycle(cuts)
        for content, flags in ((head + data, 0), (b"\xee" * room + b"\xff", WRITE)):
            done = 0
            while done < len(content):
                piece = content[done : done + next(cut)]
                self.memory.write(at, piece)
                out.append((at, len(piece), flags))
                done += len(piece)
                at += len(piece) + 3  # apart, so that no two touch
        return out

    def send(self, pieces: Sequence[tuple[int, int, int]], *, queue: int = 0, slots: Sequence[int] | None = None, kick: bool = True) -> int:
        ring = self.rings[queue]
        head = ring.chain(pieces, slots)
        ring.offer(head)
        if kick:
            self.kick(queue)
        return head

    def writable(self, pieces: Sequence[tuple[int, int, int]]) -> bytes:
        """What the device-writable pieces hold now, joined: data, then the status byte."""
        return b"".join(self.memory.read(at, length) for at, length, flags in pieces if flags & WRITE)

    def request(self, kind: int, sector: int = 0, *, queue: int = 0, **framing: Any) -> tuple[int, int, bytes]:
        """One request from building to completion: (status, used length, data read)."""
        pieces = self.pieces(kind, sector, **framing)
        head = self.send(pieces, queue=queue)
        used = self.rings[queue].used()
        assert [each[0] for each in used] == [head], f"used {used}, sent {head}, device error {self.device.broken}"
        content = self.writable(pieces)
        return content[-1], used[0][1], content[:-1]

    def works(self, queue: int = 0) -> bool:
        """Whether a write and a read of it go through."""
        data = bytes(range(256)) * 2
        written = self.request(OUT, 1, data=data, queue=queue)[0]
        return (written, self.request(IN, 1, room=512, queue=queue)) == (OK, (OK, 513, data))


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Fail instead of hanging, where the host has timers; a loop without a trace point is caught too."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def late(*_: Any) -> None:
        raise AssertionError(f"still at it after {seconds:g} s: a hang")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
