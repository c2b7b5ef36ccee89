"""QEMU's virtio-blk-pci as judge: our driver on its device, and its registers' answers beside ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

import vblklab as vb
from tests.peer.qtest import QemuDevice
from tests.support import finish
from tests.transport.pci_board import (
    BAR0,
    CAPABILITIES,
    COMMAND,
    COMMON,
    CONFIG_VECTOR,
    DEVICE,
    DEVICE_STATUS,
    DFSELECT,
    GENERATION,
    GF,
    GFSELECT,
    ISR,
    MASTER,
    MEMORY,
    NO_VECTOR,
    NOTIFY,
    NUM_QUEUES,
    Q_ENABLE,
    Q_NOTIFY_OFF,
    Q_SELECT,
    Q_SIZE,
    Q_VECTOR,
    VNDR,
    WINDOW,
    WINDOWS,
    PciBoard,
)
from vblklab.iostack import Bio, IOStack, Op
from vblklab.memory import GuestPages
from vblklab.spec.virtio import Feature
from vblklab.transport import PciTransport

pytestmark = pytest.mark.qemu
LANDING = 0x1000000  # where messages are made to land: a message is a store, here to memory that the test reads
DATA = 0x1800000
PAGES = 0x100000  # above what a PC keeps for its firmware


@contextmanager
def qemu(folder: Path, options: str = "") -> Iterator[QemuDevice]:
    device = QemuDevice(folder, options)
    try:
        yield device
    finally:
        device.close()


def until(what: Callable[[], Any]) -> None:
    """Ask again until it is so; each question is a round trip to QEMU."""
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end, "it never happened"


class Driven:
    """Our driver on QEMU's device.  Messages are made to store their vector's number + 1 at ``LANDING``."""

    def __init__(self, device: QemuDevice, **driver: Any) -> None:
        self.device = device
        self.transport = PciTransport(device)
        self.stack = IOStack()
        self.driver = vb.VirtioBlkDriver(**driver)
        self.packed = False

    def probe(self, *, packed: bool = False) -> Driven:
        self.driver.attach(GuestPages(self.device.memory, PAGES), self.transport, self.stack, queue_size=64, packed=packed)
        finish(self.driver.probe())
        for vector in range(self.transport.vectors):
            self.device.store(self.entry(vector, 0), LANDING + 4 * vector)
            self.device.store(self.entry(vector, 2), vector + 1)
        return self

    def entry(self, vector: int, field: int) -> int:
        return self.transport._bars[1][0] + 16 * vector + 4 * field

    def landed(self, vector: int) -> bool:
        """Whether the vector's message came; it is taken."""
        if self.device.memory.read(LANDING + 4 * vector, 4) == bytes(4):
            return False
        assert self.device.memory.read(LANDING + 4 * vector, 4) == (vector + 1).to_bytes(4, "little")
        self.device.memory.write(LANDING + 4 * vector, bytes(4))
        return True

    def submit(self, op: Op, sector: int, length: int = 512) -> list[int]:
        """Hand an I/O to the driver; its status will be in the list."""
        ended: list[int] = []
        finish(
            self.stack.submit_bio(Bio(int(op), sector, length, [(DATA, length)], 1, 0, lambda one: ended.append(one.status)), None, _wake)
        )
        return ended

    def io(self, op: Op, sector: int, length: int = 512) -> int:
        """One I/O from submission to its interrupt and its end; the status."""
        ended = self.submit(op, sector, length)
        if self.transport.vectors:
            vector = self.transport._vector_of(0)
            until(lambda: self.landed(vector))
        else:
            until(lambda: self.device.peek(0x06, 2) & 8)
            vector = 0
        finish(self.driver.interrupt(vector))
        assert len(ended) == 1
        return ended[0]


def _wake() -> None:
    """The task that submitted is the test itself."""


@pytest.mark.parametrize(
    ("options", "vectors", "queues"),
    [
        ("", 2, 1),
        ("disable-legacy=on", 2, 1),
        ("packed=on", 2, 1),
        ("packed=on,event_idx=off,num-queues=2", 3, 2),
        ("indirect_desc=off,event_idx=off", 2, 1),
        ("num-queues=4", 5, 4),
        ("num-queues=4,vectors=3", 2, 4),
        ("vectors=0", 0, 1),
        ("packed=on,num-queues=3,vectors=1", 0, 3),
        ("page-per-vq=on,num-queues=4", 5, 4),
    ],
)
def test_our_driver_runs_qemus_device(tmp_path: Path, options: str, vectors: int, queues: int) -> None:
    with qemu(tmp_path, options) as device:
        driven = Driven(device).probe(packed="packed" in options)
        assert (driven.transport.vectors, driven.driver.num_queues) == (vectors, queues)
        assert bool(driven.driver.features & Feature.RING_PACKED) == ("packed" in options)
        assert driven.driver.capacity_sectors == 16384
        for round_ in range(80):  # more often than the ring has entries
            data = bytes((round_ + one) & 0xFF for one in range(512))
            device.memory.write(DATA, data)
            assert driven.io(Op.WRITE, round_ * 7) == 0
            device.memory.write(DATA, bytes(512))
            assert driven.io(Op.READ, round_ * 7) == 0
            assert device.memory.read(DATA, 512) == data
        assert driven.io(Op.FLUSH, 0, 0) == 0
        assert tmp_path.joinpath("disk.img").read_bytes()[7 * 512 : 8 * 512] == bytes((1 + one) & 0xFF for one in range(512))
        finish(driven.driver.restart())
        assert finish(driven.transport.status()) == 15


def test_qemus_line_is_high_until_the_isr_status_is_read(tmp_path: Path) -> None:
    with qemu(tmp_path, "vectors=0") as device:
        driven = Driven(device).probe()
        ended = driven.submit(Op.WRITE, 0)
        until(lambda: device.peek(0x06, 2) & 8)
        config, served = finish(driven.transport.interrupt())
        assert (config, list(served)) == (False, [0])
        assert not device.peek(0x06, 2) & 8
        assert ended == []


def test_a_masked_message_of_qemus_is_pending_and_comes_once(tmp_path: Path) -> None:
    with qemu(tmp_path) as device:
        driven = Driven(device).probe()
        ring = driven.driver.queues[0]
        pending = driven.transport._bars[1][0] + 0x800
        device.store(driven.entry(1, 3), 1)
        driven.submit(Op.WRITE, 0)
        until(ring.more_used)
        until(lambda: device.load(pending))
        assert device.load(pending) == 1 << 1
        assert not driven.landed(1)
        device.store(driven.entry(1, 3), 0)
        assert driven.landed(1) and device.load(pending) == 0
        device.store(driven.entry(1, 3), 1)
        device.store(driven.entry(1, 3), 0)
        assert not driven.landed(1)


# -- the same questions to both functions --------------------------------------------------------------------------------------


class Function(Protocol):
    """Configuration space and memory of one function."""

    def peek(self, offset: int, size: int) -> int: ...

    def poke(self, offset: int, value: int, size: int) -> None: ...

    def load(self, gpa: int, size: int = 4) -> int: ...

    def store(self, gpa: int, value: int, size: int = 4) -> None: ...


class Ours:
    """Our function with the face of QEMU's."""

    def __init__(self) -> None:
        self.board = PciBoard(queues=2)
        regs = self.board.regs
        self.peek, self.poke, self.load = regs.config_read, regs.config_write, regs.read

    def store(self, gpa: int, value: int, size: int = 4) -> None:
        self.board.regs.write(gpa, value, size)
        self.board.machine.run()


class Asked:
    """A function with its regions placed, and its structures found."""

    def __init__(self, function: Function) -> None:
        self.fn = function
        function.poke(COMMAND, 0, 2)
        for bar, gpa in WINDOWS.items():
            function.poke(BAR0 + 4 * bar, gpa & 0xFFFFFFFF, 4)
        function.poke(BAR0 + 20, WINDOWS[4] >> 32, 4)
        function.poke(COMMAND, MEMORY | MASTER, 2)
        self.caps: dict[int, int] = {}
        self.msix = 0
        at = function.peek(CAPABILITIES, 1)
        while at:
            if function.peek(at, 1) == VNDR:
                self.caps[function.peek(at + 3, 1)] = at
            elif function.peek(at, 1) == 0x11:
                self.msix = at
            at = function.peek(at + 1, 1)

    def where(self, kind: int) -> int:
        at = self.caps[kind]
        return WINDOWS[self.fn.peek(at + 4, 1)] + self.fn.peek(at + 8, 4)

    def get(self, field: tuple[int, int]) -> int:
        return self.fn.load(self.where(COMMON) + field[0], field[1])

    def set(self, field: tuple[int, int], value: int) -> None:
        self.fn.store(self.where(COMMON) + field[0], value, field[1])


def capabilities(asked: Asked) -> Any:
    fn, notify = asked.fn, asked.caps[NOTIFY]
    lengths = {kind: fn.peek(at + 2, 1) for kind, at in asked.caps.items()}
    offsets = {kind: asked.where(kind) for kind in (COMMON, NOTIFY, ISR, DEVICE)}
    return lengths, offsets, fn.peek(notify + 16, 4), fn.peek(0x06, 2) & 0x18, fn.peek(0x0A, 2), fn.peek(0x3D, 1)


def message_control(asked: Asked) -> Any:
    fn, at = asked.fn, asked.msix
    seen = [fn.peek(at + 2, 2), fn.peek(at + 4, 4), fn.peek(at + 8, 4)]
    for value in (0xFFFF, 0x8000, 0x4000, 0):
        fn.poke(at + 2, value, 2)
        seen.append(fn.peek(at + 2, 2))
    table = WINDOWS[1]
    seen += [fn.load(table + 16 * vector + 12) for vector in range(3)]
    for field in range(3):
        fn.store(table + 4 * field, 0xFFFFFFF0)
        seen.append(fn.load(table + 4 * field))
    return seen


def sizing(asked: Asked) -> Any:
    fn, seen = asked.fn, []
    for bar in (1, 4, 5):
        fn.poke(BAR0 + 4 * bar, 0xFFFFFFFF, 4)
        seen.append(fn.peek(BAR0 + 4 * bar, 4))
    return seen


def first_values(asked: Asked) -> Any:
    seen = [asked.get(field) for field in (DFSELECT, GFSELECT, GF, CONFIG_VECTOR, NUM_QUEUES, DEVICE_STATUS, GENERATION, Q_SELECT)]
    for queue in (0, 1):
        asked.set(Q_SELECT, queue)
        seen += [asked.get(field) for field in (Q_VECTOR, Q_ENABLE, Q_NOTIFY_OFF, (32, 4), (36, 4), (40, 4), (48, 4))]
    asked.set(Q_SELECT, 5)
    return [*seen, asked.get(Q_SIZE), asked.get(Q_ENABLE), asked.get(Q_VECTOR)]


def features(asked: Asked) -> Any:
    seen = []
    asked.set(DEVICE_STATUS, 3)
    for sel in (0, 1, 2, 0xFFFFFFFF):
        asked.set(DFSELECT, sel)
        if sel > 1:
            seen.append(asked.get((4, 4)))
        asked.set(GFSELECT, sel)
        asked.set(GF, {0: 0, 1: 1}.get(sel, 0xFFFFFFFF))
        seen += [asked.get(GFSELECT), asked.get(GF)]
    asked.set(DEVICE_STATUS, 11)
    return [*seen, asked.get(DEVICE_STATUS)]


def status(asked: Asked) -> Any:
    seen = []
    for value in (1, 3, 0, 1, 3, 0x83, 0):
        asked.set(DEVICE_STATUS, value)
        seen.append(asked.get(DEVICE_STATUS))
    return seen


def vectors(asked: Asked) -> Any:
    seen = []
    for queue in (0, 1):
        asked.set(Q_SELECT, queue)
        for vector in (0, 1, 2, 3, 100, 0xFFFE, NO_VECTOR, 1):
            asked.set(Q_VECTOR, vector)
            asked.set(CONFIG_VECTOR, vector)
            seen += [asked.get(Q_VECTOR), asked.get(CONFIG_VECTOR)]
    asked.set(DEVICE_STATUS, 0)
    return [*seen, asked.get(Q_VECTOR), asked.get(CONFIG_VECTOR)]


def queue_fields(asked: Asked) -> Any:
    asked.set(Q_SELECT, 1)
    seen = []
    for value in (8, 256, 16):
        asked.set(Q_SIZE, value)
        seen.append(asked.get(Q_SIZE))
    for at in (32, 36, 40, 44, 48, 52):
        asked.set((at, 4), 0x1000 + at)
        seen.append(asked.get((at, 4)))
    return seen


def window(asked: Asked) -> Any:
    fn, at, common = asked.fn, asked.caps[WINDOW], asked.caps[COMMON]
    asked.set(Q_SELECT, 1)
    seen = []
    for offset, length in ((22, 2), (18, 2), (20, 1), (8, 4)):
        fn.poke(at + 4, fn.peek(common + 4, 1), 1)
        fn.poke(at + 8, fn.peek(common + 8, 4) + offset, 4)
        fn.poke(at + 12, length, 4)
        seen.append(fn.peek(at + 16, length))
        fn.poke(at + 16, 1, length)
        seen.append(fn.peek(at + 16, length))
    return [*seen, asked.get(DEVICE_STATUS), asked.get(Q_SELECT), asked.get(GFSELECT)]


def isr(asked: Asked) -> Any:
    return [asked.fn.load(asked.where(ISR), 1), asked.fn.peek(0x06, 2) & 8]


def decoding(asked: Asked) -> Any:
    asked.fn.poke(COMMAND, MASTER, 2)
    off = asked.get(NUM_QUEUES)
    asked.fn.poke(COMMAND, MEMORY | MASTER, 2)
    return off == 2, asked.get(NUM_QUEUES)


QUESTIONS = [capabilities, message_control, sizing, first_values, features, status, vectors, queue_fields, window, isr, decoding]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.__name__)
def test_our_function_answers_as_qemus_does(tmp_path: Path, question: Callable[[Asked], Any]) -> None:
    with qemu(tmp_path, "disable-legacy=on,num-queues=2") as device:
        theirs = question(Asked(device))
    assert question(Asked(Ours())) == theirs
