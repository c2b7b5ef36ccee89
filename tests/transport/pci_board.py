"""A device behind virtio-pci's registers, reached by the specification's offsets, and buses that write down what a driver does."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

import vblklab as vb
from tests.support import Board, HandRing
from vblklab.transport import Message, PciRegisters

Steps = Generator[Any, int, Any]

COMMAND, STATUS, BAR0, CAPABILITIES = 0x04, 0x06, 0x10, 0x34
MEMORY, MASTER, INTX_DISABLE = 0x2, 0x4, 0x400
COMMON, NOTIFY, ISR, DEVICE, WINDOW = 1, 2, 3, 4, 5
VNDR, MSIX = 0x09, 0x11
NO_VECTOR = 0xFFFF
# struct virtio_pci_common_cfg: offset, bytes
DFSELECT, DF, GFSELECT, GF = (0, 4), (4, 4), (8, 4), (12, 4)
CONFIG_VECTOR, NUM_QUEUES, DEVICE_STATUS, GENERATION = (16, 2), (18, 2), (20, 1), (21, 1)
Q_SELECT, Q_SIZE, Q_VECTOR, Q_ENABLE, Q_NOTIFY_OFF = (22, 2), (24, 2), (26, 2), (28, 2), (30, 2)
Q_DESC, Q_DRIVER, Q_DEVICE, Q_CONFIG_DATA = 32, 40, 48, (56, 2)
READ_ONLY = {DF, NUM_QUEUES, GENERATION, Q_NOTIFY_OFF, Q_CONFIG_DATA}
FIELDS = [DFSELECT, DF, GFSELECT, GF, CONFIG_VECTOR, NUM_QUEUES, DEVICE_STATUS, GENERATION]
FIELDS += [Q_SELECT, Q_SIZE, Q_VECTOR, Q_ENABLE, Q_NOTIFY_OFF, Q_CONFIG_DATA, (58, 2), (60, 2), (62, 2)]
FIELDS += [(at + half, 4) for at in (Q_DESC, Q_DRIVER, Q_DEVICE) for half in (0, 4)]
WINDOWS = {1: 0xC0000000, 4: 0x380000000000}


class Cap(NamedTuple):
    """A virtio structure as its capability describes it."""

    at: int
    length_of_cap: int
    kind: int
    bar: int
    offset: int
    length: int


def capabilities(regs: PciRegisters) -> list[tuple[int, int]]:
    """(offset, identifier) of the list, walked by hand."""
    found, at = [], regs.config_read(CAPABILITIES, 1)
    while at:
        assert at >= 0x40 and not at % 4 and (at, 0) not in found and len(found) < 48
        found.append((at, regs.config_read(at, 1)))
        at = regs.config_read(at + 1, 1)
    return found


def structures(regs: PciRegisters) -> list[Cap]:
    """The virtio structures, in the order of the list."""
    return [
        Cap(
            at,
            regs.config_read(at + 2, 1),
            regs.config_read(at + 3, 1),
            regs.config_read(at + 4, 1),
            regs.config_read(at + 8, 4),
            regs.config_read(at + 12, 4),
        )
        for at, identifier in capabilities(regs)
        if identifier == VNDR
    ]


def structure(regs: PciRegisters, kind: int) -> Cap:
    return next(cap for cap in structures(regs) if cap.kind == kind)


def msix_at(regs: PciRegisters) -> int:
    return next(at for at, identifier in capabilities(regs) if identifier == MSIX)


def place(regs: PciRegisters) -> None:
    """Give the regions their addresses and switch decoding and bus mastering on."""
    for bar, gpa in WINDOWS.items():
        regs.config_write(BAR0 + 4 * bar, gpa & 0xFFFFFFFF, 4)
        if bar == 4:
            regs.config_write(BAR0 + 4 * bar + 4, gpa >> 32, 4)
    regs.config_write(COMMAND, MEMORY | MASTER, 2)


class PciBoard(Board):
    """``Board`` behind virtio-pci.  Without ``enable_msix`` it uses the line."""

    regs: PciRegisters

    def __init__(self, device: vb.VirtioBlkDevice | None = None, *, options: dict[str, Any] | None = None, **rest: Any) -> None:
        self.options = options or {}
        self.messages: list[Message] = []
        super().__init__(device, **rest)
        self.regs.on_message = self.messages.append
        place(self.regs)
        self.gpa = {cap.kind: WINDOWS[cap.bar] + cap.offset for cap in structures(self.regs) if cap.kind != WINDOW}
        self.multiplier = self.regs.config_read(structure(self.regs, NOTIFY).at + 16, 4)

    def _registers(self) -> Any:
        return PciRegisters(self.memory, self.device, **self.options)

    def _notify(self, queue: int) -> Generator[Any, int, None]:
        message = self.regs.signal(queue)
        if message is not None:
            self.messages.append(message)
        self.notified.append(queue)
        yield ("virtio_notify", queue)

    def get(self, field: tuple[int, int]) -> int:
        return self.regs.read(self.gpa[COMMON] + field[0], field[1])

    def set(self, field: tuple[int, int], value: int) -> None:
        self.regs.write(self.gpa[COMMON] + field[0], value, field[1])

    def isr(self) -> int:
        return self.regs.read(self.gpa[ISR], 1)

    def pci_status(self) -> int:
        return self.regs.config_read(STATUS, 2)

    # the board's registers
    def status(self) -> int:
        return self.get(DEVICE_STATUS)

    def set_status(self, value: int) -> None:
        self.set(DEVICE_STATUS, value)

    def doorbell(self, queue: int, value: int | None = None, size: int = 2) -> None:
        self.set(Q_SELECT, queue)
        gpa = self.gpa[NOTIFY] + self.get(Q_NOTIFY_OFF) * self.multiplier
        self.regs.write(gpa, queue if value is None else value, size)

    def offered(self) -> int:
        bits = 0
        for sel in (0, 1):
            self.set(DFSELECT, sel)
            bits |= self.get(DF) << (32 * sel)
        return bits

    def accept(self, features: int) -> int:
        for sel in (0, 1):
            self.set(GFSELECT, sel)
            self.set(GF, features >> (32 * sel) & 0xFFFFFFFF)
        self.set_status(self.status() | 8)
        return self.status()

    def queue(self, number: int, ring: HandRing) -> None:
        self.set(Q_SELECT, number)
        self.set(Q_SIZE, ring.size)
        for low, gpa in ((Q_DESC, ring.desc_at), (Q_DRIVER, ring.avail_at), (Q_DEVICE, ring.used_at)):
            self.set((low, 4), gpa & 0xFFFFFFFF)
            self.set((low + 4, 4), gpa >> 32)
        self.set(Q_ENABLE, 1)

    # MSI-X
    def entry(self, vector: int, field: int) -> int:
        """The address of a dword of the MSI-X table: 0 and 1 the address, 2 the data, 3 the mask."""
        return WINDOWS[1] + 16 * vector + 4 * field

    def enable_msix(self, flags: int = 0x8000) -> None:
        """Write a message into every entry, unmask them, switch MSI-X on (0x4000: all masked)."""
        assert self.regs.msix is not None
        for vector in range(self.regs.msix.vectors):
            self.regs.write(self.entry(vector, 0), 0xFEE00000 | vector << 12)
            self.regs.write(self.entry(vector, 2), 0x40 + vector)
            self.mask(vector, False)
        self.regs.config_write(msix_at(self.regs) + 2, flags, 2)

    def mask(self, vector: int, masked: bool) -> None:
        self.regs.write(self.entry(vector, 3), int(masked))

    def pending(self) -> int:
        assert self.regs.msix is not None
        pba = self.regs.config_read(msix_at(self.regs) + 8, 4)
        return sum(self.regs.read(WINDOWS[1] + (pba & ~7) + 4 * half) << 32 * half for half in (0, 1))

    def map_queue(self, queue: int, vector: int) -> int:
        """Map a queue to a vector; what it reads afterwards."""
        self.set(Q_SELECT, queue)
        self.set(Q_VECTOR, vector)
        return self.get(Q_VECTOR)


class Access(NamedTuple):
    """One access of a driver: ``what`` is config or memory, ``write`` with its value."""

    what: str
    write: bool
    at: int
    value: int
    size: int


class RecordingBus:
    """The function's registers as calls, with what the driver did written down; ``kicks`` are answered by nobody."""

    def __init__(self, registers: PciRegisters) -> None:
        self.registers = registers
        self.log: list[Access] = []
        self.kicks: list[tuple[int, int, int]] = []

    def config_read(self, offset: int, size: int) -> Steps:
        value = self.registers.config_read(offset, size)
        self.log.append(Access("config", False, offset, value, size))
        return value
        yield

    def config_write(self, offset: int, value: int, size: int) -> Steps:
        self.log.append(Access("config", True, offset, value, size))
        self.registers.config_write(offset, value, size)
        return
        yield

    def read(self, gpa: int, size: int = 4) -> Steps:
        value = self.registers.read(gpa, size)
        self.log.append(Access("memory", False, gpa, value, size))
        return value
        yield

    def write(self, gpa: int, value: int, size: int = 4) -> Steps:
        self.log.append(Access("memory", True, gpa, value, size))
        self.registers.write(gpa, value, size)
        return
        yield

    def notify(self, queue: int, gpa: int, value: int) -> Steps:
        self.kicks.append((queue, gpa, value))
        self.registers.write(gpa, value, 2)
        return
        yield
