"""A device on the workbench: its registers, some memory and a small disk.  There is no driver: whoever holds the bench is the driver."""

from __future__ import annotations

import errno
import struct
from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ..device import VirtioBlkDevice
from ..disk import RamStore
from ..engine import Sync
from ..errors import ConfigError, VblkError
from ..events import Wait
from ..memory import GuestMemory, GuestPages
from ..ring import SplitDriver
from ..spec.virtio import Feature, Status
from ..spec.virtio_mmio import Reg
from ..transport import MmioRegisters

__all__ = ["Answer", "Bench", "NeverEnds", "Registers", "registers"]

_NAMES = {"".join(word.capitalize() for word in reg.name.split("_")).replace("Id", "ID").replace("Ack", "ACK"): int(reg) for reg in Reg}
_STEPS = 5_000
_RING = 16


class NeverEnds(VblkError):
    """The device's loop does not come to rest."""


class Answer(NamedTuple):
    """What came back for a buffer: the length in the used element, and what now lies in the writable parts."""

    written: int
    parts: list[bytes]

    @property
    def status(self) -> int:
        """The last byte."""
        return self.parts[-1][-1]

    def __repr__(self) -> str:
        sizes = " + ".join(str(len(part)) for part in self.parts)
        return f"<used length {self.written}, status {self.status}, writable parts of {sizes} bytes>"


class BenchDisk(RamStore):
    """A disk that remembers what was asked of it, (name, offset, bytes), and fails at ``bad_sectors``."""

    def __init__(self, sectors: int) -> None:
        super().__init__(sectors << 9)
        self.calls: list[tuple[str, int, int]] = []
        self.bad_sectors: set[int] = set()

    def _note(self, name: str, offset: int, views: Sequence[memoryview]) -> None:
        length = sum(map(len, views))
        self.calls.append((name, offset, length))
        if any(offset >> 9 <= bad < (offset + length + 511) >> 9 for bad in self.bad_sectors):
            raise OSError(errno.EIO, "this sector cannot be read or written")
        self._end(offset, length)

    def readv(self, offset: int, views: Sequence[memoryview]) -> None:
        self._note("read", offset, views)
        super().readv(offset, views)

    def writev(self, offset: int, views: Sequence[memoryview]) -> None:
        self._note("write", offset, views)
        super().writev(offset, views)

    def flush(self) -> None:
        self.calls.append(("flush", 0, 0))


def offset_of(register: str | int) -> int:
    """A register's offset, given by its name in the specification or by the offset itself."""
    if isinstance(register, str):
        if register not in _NAMES:
            raise ConfigError(f"no register {register!r}", f"they are {', '.join(_NAMES)}, or give an offset such as 0x070")
        return _NAMES[register]
    return int(register)


def name_of(offset: int) -> str:
    """A register's name in the specification; configuration space by its offset in it."""
    if offset > Reg.CONFIG:
        return f"Config + {offset - Reg.CONFIG}"
    return {at: name for name, at in _NAMES.items()}.get(offset, f"{offset:#05x}")


class Bench:
    """``read`` and ``write`` registers, ``handshake()``, then ``request(readable, sizes)``; ``disk`` is what lies below."""

    def __init__(self, device: Any = VirtioBlkDevice, *, sectors: int = 2048) -> None:
        self.memory = GuestMemory(bytearray(1 << 18))
        self.pages = GuestPages(self.memory, 0x1000)
        self.disk = BenchDisk(sectors)
        self.device = device() if isinstance(device, type) else device
        self.device.num_queues, self.device.packed = 1, False
        self.registers = MmioRegisters(self.memory, self.device)
        self.interrupts = 0
        self._notified = False
        engine = Sync()
        engine.attach(None, self.disk, self._wake)
        self.device.attach(engine, sectors, read_only=False, notify=self._notify, wake=self._wake)
        self.device.on_reset_done = self.registers.reset_done
        self.device.on_needs_reset = self.registers.needs_reset
        self.device.on_config_changed = self.registers.config_changed
        self.registers.on_notify = self.device.kick
        self._loop = self.device.run()
        self.ring: SplitDriver | None = None
        self._rest()

    def _wake(self) -> None:
        self._notified = True

    def _notify(self, queue: int) -> Generator[Any, int, None]:
        self.interrupts += 1
        return
        yield

    def _rest(self) -> None:
        """Run the device until it waits and nobody has notified it."""
        for _ in range(_STEPS):
            event = next(self._loop)
            if isinstance(event, Wait):
                if not self._notified:
                    return
                self._notified = False
        raise NeverEnds(f"the device passed {_STEPS:,} trace points and still works", "which loop in it waits for what never comes?")

    # -- the driver's hands ------------------------------------------------------------------------------------------------------

    def read(self, register: str | int, size: int = 4) -> int:
        """What a register holds: ``bench.read("Status")`` or ``bench.read(0x070)``."""
        return self.registers.read(offset_of(register), size)

    def write(self, register: str | int, value: int, size: int = 4) -> None:
        """Store into a register, and let the device work."""
        self.registers.write(offset_of(register), value, size)
        self._rest()

    def resize(self, sectors: int) -> None:
        """The disk has another size now; the device notices at once."""
        self.device.resize(sectors)

    def offered(self) -> int:
        """All 64 feature bits."""
        bits = 0
        for half in (0, 1):
            self.write("DeviceFeaturesSel", half)
            bits |= self.read("DeviceFeatures") << 32 * half
        return bits

    def handshake(self, features: int | None = None) -> int:
        """All steps of §3.1.1 with one queue, accepting what is offered of ``features``; returns the Status at the end."""
        self.write("Status", 0)
        for bit in (Status.ACKNOWLEDGE, Status.DRIVER):
            self.write("Status", self.read("Status") | bit)
        understood = Feature.VERSION_1 | Feature.EVENT_IDX | Feature.INDIRECT_DESC | 0xFFFFFF
        accepted = self.offered() & int(understood if features is None else features)
        for half in (0, 1):
            self.write("DriverFeaturesSel", half)
            self.write("DriverFeatures", accepted >> 32 * half & 0xFFFFFFFF)
        self.write("Status", self.read("Status") | Status.FEATURES_OK)
        if not self.read("Status") & Status.FEATURES_OK:
            return self.read("Status")
        self._set_queue_up(accepted)
        self.write("Status", self.read("Status") | Status.DRIVER_OK)
        return self.read("Status")

    def _set_queue_up(self, features: int) -> None:
        ring = SplitDriver.alloc(self.pages, _RING, event_idx=bool(features & Feature.EVENT_IDX))
        self.write("QueueSel", 0)
        self.write("QueueSize", ring.size)
        for name, gpa in (("Desc", ring.layout.desc), ("Driver", ring.layout.avail), ("Device", ring.layout.used)):
            self.write(f"Queue{name}Low", gpa)
            self.write(f"Queue{name}High", 0)
        self.write("QueueReady", 1)
        self.ring = ring
        self._scratch = self.pages.alloc(1 << 16)

    def request(self, readable: Sequence[bytes], writable: Sequence[int]) -> Answer:
        """Put one buffer on the ring: parts for the device to read, and places of so many bytes for it to write (filled with 0xAA)."""
        ring = self.ring
        if ring is None:
            raise ConfigError("this device has no queue yet", "call handshake() first")
        at, sides = self._scratch, ([], [])  # type: tuple[int, tuple[list[tuple[int, int]], list[tuple[int, int]]]]
        for side, data in [(0, part) for part in readable] + [(1, b"\xaa" * size) for size in writable]:
            self.memory.write(at, data)
            sides[side].append((at, len(data)))
            at += len(data)
        ring.add_sgs(*sides, token=True)
        ring.publish()
        ring.kick_prepare()
        self.write("QueueNotify", 0)
        got = ring.get_buf()
        if got is None:
            raise ConfigError(f"the buffer did not come back{self._trouble()}", "the device must fill the used ring")
        return Answer(got[1], [self.memory.read(gpa, length) for gpa, length in sides[1]])

    def block(self, kind: int, sector: int, data: bytes | int = 0, pieces: int = 1) -> Answer:
        """A virtio-blk request: header, ``data`` to write or a number of bytes to read, in so many pieces, status byte."""
        header = struct.pack("<IIQ", kind, 0, sector)
        length = data if isinstance(data, int) else len(data)
        cuts = [length * i // pieces for i in range(pieces + 1)] if length else []
        if isinstance(data, int):
            return self.request([header], [*(end - start for start, end in pairwise(cuts)), 1])
        return self.request([header, *(data[start:end] for start, end in pairwise(cuts))], [1])

    def _trouble(self) -> str:
        return f": {self.registers.error}" if self.registers.error is not None else ""


# -- the register file as a table ------------------------------------------------------------------------------------------------

_BITS = {
    Reg.STATUS: {int(bit): str(bit.name) for bit in Status},
    Reg.INTERRUPT_STATUS: {1: "used buffer", 2: "configuration change"},
}
_SHOWN = (
    *(Reg.MAGIC_VALUE, Reg.VERSION, Reg.DEVICE_ID, Reg.VENDOR_ID, Reg.DEVICE_FEATURES, Reg.QUEUE_SIZE_MAX, Reg.QUEUE_READY),
    *(Reg.INTERRUPT_STATUS, Reg.STATUS, Reg.CONFIG_GENERATION, Reg.CONFIG),
)


class Registers(NamedTuple):
    """What the registers of a device hold, as (offset, name, value, meaning)."""

    rows: tuple[tuple[int, str, int, str], ...]

    def __str__(self) -> str:
        return "\n".join(f"{offset:#05x}  {name:17} {value:#010x}  {meaning}".rstrip() for offset, name, value, meaning in self.rows)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        left = "text-align:left;padding:3px 14px 3px 4px"
        head = "".join(f'<th style="{left}">{name}</th>' for name in ("offset", "register", "value", "read as"))
        rows = "".join(
            f'<tr><td style="{left}"><code>{offset:#05x}</code></td><td style="{left}">{name}</td>'
            f'<td style="{left}"><code>{value:#010x}</code></td><td style="{left}">{meaning}</td></tr>'
            for offset, name, value, meaning in self.rows
        )
        return f'<table style="margin:4px 0"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def registers(machine: Any) -> Registers:
    """The registers of a booted machine or of a Bench that can be read without changing anything."""
    file = machine.registers
    if not isinstance(file, MmioRegisters):
        raise ConfigError(f"{type(file).__name__} has no fixed register file", "boot a recipe with transport=vb.Mmio()")
    names = {offset: name for name, offset in _NAMES.items()}
    return Registers(tuple((int(reg), names[int(reg)], value := file.read(int(reg)), _meaning(reg, value)) for reg in _SHOWN))


def _meaning(reg: Reg, value: int) -> str:
    if reg in _BITS:
        return " + ".join(name for bit, name in _BITS[reg].items() if value & bit) or "none"
    match reg:
        case Reg.MAGIC_VALUE | Reg.VENDOR_ID:
            return f'"{value.to_bytes(4, "little").decode("ascii", "replace")}"'
        case Reg.DEVICE_ID:
            return {0: "no device", 2: "block device"}.get(value, "another kind of device")
        case Reg.DEVICE_FEATURES:
            return "the half of the features that DeviceFeaturesSel names"
        case Reg.CONFIG:
            return f"capacity, its low half: {value:,} sectors"
    return f"{value:,}"
