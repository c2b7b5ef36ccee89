"""A PCI function's configuration space: header, capability list, base address registers.  PCI Local Bus 3.0 §6."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..spec.pci import (
    BAR_FLAGS,
    CONFIG_BYTES,
    HEADER_BYTES,
    BarBits,
    CapId,
    Cfg,
    Command,
    PciStatus,
)

__all__ = ["Bar", "BarAccess", "PciConfig", "all_ones"]

_COMMAND, _STATUS = int(Cfg.COMMAND), int(Cfg.STATUS)


def all_ones(size: int) -> int:
    """What a read that nobody answers gives."""
    return (1 << 8 * size) - 1


class BarAccess(Protocol):
    """What lies behind a base address register; ``offset`` counts from its start."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, value: int, size: int) -> None: ...


@dataclass(frozen=True)
class Bar:
    """A memory region of ``size`` bytes, a power of two; ``wide`` takes two registers and may lie above 4 GiB."""

    number: int
    size: int
    access: BarAccess
    wide: bool = False


class PciConfig:
    """256 bytes, of which a mask says what the driver may change; accesses are 1, 2 or 4 bytes, aligned.

    Others read all ones and write nothing, as on a bus that cannot carry them.
    """

    def __init__(self, *, vendor: int, device: int, class_device: int, revision: int, subsystem_vendor: int, subsystem: int) -> None:
        self._bytes = bytearray(CONFIG_BYTES)
        self._mask = bytearray(CONFIG_BYTES)
        self.bars: dict[int, Bar] = {}
        self._decoded: list[tuple[int, int, Bar]] = []
        self._next = HEADER_BYTES  # where the next capability goes
        self._link = int(Cfg.CAPABILITY_LIST)  # the byte that will point to it
        for offset, value, size in (
            (Cfg.VENDOR_ID, vendor, 2),
            (Cfg.DEVICE_ID, device, 2),
            (Cfg.REVISION_ID, revision, 1),
            (Cfg.CLASS_DEVICE, class_device, 2),
            (Cfg.SUBSYSTEM_VENDOR_ID, subsystem_vendor, 2),
            (Cfg.SUBSYSTEM_ID, subsystem, 2),
            (Cfg.INTERRUPT_PIN, 1, 1),  # INTA#
        ):
            self.put(offset, value, size)
        self._allow(Cfg.COMMAND, int(Command.MEMORY | Command.MASTER | Command.INTX_DISABLE), 2)
        self._allow(Cfg.CACHE_LINE_SIZE, 0xFF, 1)
        self._allow(Cfg.INTERRUPT_LINE, 0xFF, 1)

    # -- building --------------------------------------------------------------------------------------------------------

    def put(self, offset: int, value: int, size: int) -> None:
        """Device side: these bytes read so from now on."""
        self._bytes[offset : offset + size] = value.to_bytes(size, "little")

    def _allow(self, offset: int, mask: int, size: int) -> None:
        self._mask[offset : offset + size] = mask.to_bytes(size, "little")

    def add_bar(self, bar: Bar) -> None:
        """Decode a memory region; its register reads back the size after all ones were written."""
        self.bars[bar.number] = bar
        at, size = Cfg.BASE_ADDRESS_0 + 4 * bar.number, 8 if bar.wide else 4
        self.put(at, int(BarBits.MEM_TYPE_64 | BarBits.MEM_PREFETCH) if bar.wide else 0, 4)
        self._allow(at, (1 << 8 * size) - bar.size & ~BAR_FLAGS, size)

    def add_capability(self, identifier: CapId, body: bytes, writable: bytes = b"") -> int:
        """Append a capability: ``body`` follows the identifier and the next pointer.  Returns its offset.

        ``writable`` masks the bits of ``body`` that the driver may change.
        """
        at = self._next
        data = bytes((identifier, 0)) + body
        self._bytes[at : at + len(data)] = data
        self._mask[at + 2 : at + 2 + len(writable)] = writable
        self._bytes[self._link] = at
        self._link, self._next = at + 1, (at + len(data) + 3) & ~3
        self._bytes[_STATUS] |= PciStatus.CAP_LIST
        return at

    # -- the driver's accesses -------------------------------------------------------------------------------------------

    def fits(self, offset: int, size: int) -> bool:
        """Whether the bus can carry such an access."""
        return size in (1, 2, 4) and not offset % size and 0 <= offset <= CONFIG_BYTES - size

    def read(self, offset: int, size: int) -> int:
        """What the driver sees."""
        return int.from_bytes(self._bytes[offset : offset + size], "little") if self.fits(offset, size) else all_ones(size)

    def write(self, offset: int, value: int, size: int) -> None:
        """The driver stores; bits that are not writable keep their value."""
        if self.fits(offset, size):
            for at, byte in enumerate(value.to_bytes(size, "little"), offset):
                mask = self._mask[at]
                self._bytes[at] = self._bytes[at] & ~mask | byte & mask
            if offset < HEADER_BYTES:
                self._decode()

    # -- what the registers mean -----------------------------------------------------------------------------------------

    @property
    def command(self) -> int:
        """The Command register."""
        return self._bytes[_COMMAND] | self._bytes[_COMMAND + 1] << 8

    def address(self, number: int) -> int:
        """Where the driver put a region."""
        at, size = Cfg.BASE_ADDRESS_0 + 4 * number, 8 if self.bars[number].wide else 4
        return int.from_bytes(self._bytes[at : at + size], "little") & ~BAR_FLAGS

    def _decode(self) -> None:
        """Which addresses the function answers: none while memory decoding is off."""
        on = self.command & Command.MEMORY
        self._decoded = [(self.address(n), self.address(n) + bar.size, bar) for n, bar in self.bars.items()] if on else []

    def find(self, gpa: int, size: int) -> tuple[Bar, int] | None:
        """The region and the offset in it that an access to memory reaches."""
        for start, end, bar in self._decoded:
            if start <= gpa and gpa + size <= end:
                return bar, gpa - start
        return None

    def show_interrupt(self, pending: bool) -> None:
        """The Interrupt Status bit."""
        bit = int(PciStatus.INTERRUPT)
        self._bytes[_STATUS] = self._bytes[_STATUS] & ~bit | (bit if pending else 0)
