"""MSI-X: a table of messages, a mask for each and for all, and the pending bits.  PCI Local Bus 3.0 §6.8.2."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..spec.pci import MSIX_ENTRY_BYTES, MSIX_MASKED, MSIX_VECTORS_MAX, MsixEntry, MsixFlags

__all__ = ["Message", "Msix"]


class Message(NamedTuple):
    """A message-signalled interrupt: ``data`` (32 bits) stored to ``address``, from entry ``vector`` of the table."""

    vector: int
    address: int
    data: int


class Msix:
    """The device side.  Table and pending bits lie in a region of their own; Message Control is told by ``control``.

    A message that is masked becomes pending and goes out, once, when its vector is unmasked: ``on_message`` gets it then.
    """

    def __init__(self, vectors: int) -> None:
        if not 1 <= vectors <= MSIX_VECTORS_MAX:
            raise ValueError(f"{vectors} MSI-X vectors, 1 to {MSIX_VECTORS_MAX} are possible")
        self.vectors = vectors
        self.table_bytes = vectors * MSIX_ENTRY_BYTES
        self.pba_offset = max(0x800, 1 << (self.table_bytes - 1).bit_length())
        self.region_bytes = 2 * self.pba_offset
        self.on_message: Callable[[Message], None] = lambda message: None
        self._table = bytearray(self.table_bytes)
        for vector in range(vectors):
            self._table[vector * MSIX_ENTRY_BYTES + MsixEntry.VECTOR_CTRL] = MSIX_MASKED
        self._pending = 0
        self._enabled = self._held = False

    @property
    def enabled(self) -> bool:
        """Whether messages are used in place of the line."""
        return self._enabled

    def masked(self, vector: int) -> bool:
        """Whether a message of this vector would have to wait."""
        return self._held or bool(self._table[vector * MSIX_ENTRY_BYTES + MsixEntry.VECTOR_CTRL] & MSIX_MASKED)

    def control(self, flags: int, *, master: bool) -> None:
        """Message Control has the value ``flags``; without ``master`` the function may not write to memory."""
        self._enabled = bool(flags & MsixFlags.ENABLE)
        self._held = bool(flags & MsixFlags.MASKALL) or not master
        self._release()

    def signal(self, vector: int) -> Message | None:
        """An event of this vector: the message to send now, None if it is pending behind a mask."""
        if self.masked(vector):
            self._pending |= 1 << vector
            return None
        start = vector * MSIX_ENTRY_BYTES
        return Message(
            vector,
            int.from_bytes(self._table[start : start + 8], "little"),
            int.from_bytes(self._table[start + MsixEntry.DATA : start + MsixEntry.DATA + 4], "little"),
        )

    def forget(self, vector: int | None = None) -> None:
        """No event uses this vector (None: any vector) any more: what was pending is dropped."""
        self._pending = 0 if vector is None else self._pending & ~(1 << vector)

    def _release(self) -> None:
        if not self._enabled or self._held or not self._pending:
            return
        for vector in range(self.vectors):
            if self._pending >> vector & 1 and not self.masked(vector):
                self._pending &= ~(1 << vector)
                message = self.signal(vector)
                if message is not None:
                    self.on_message(message)

    # -- the region: table, then pending bits ----------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """The table and the pending bits, in dwords or qwords' halves; reserved bytes read 0."""
        if size != 4 or offset % 4:
            return 0
        if offset < self.table_bytes:
            return int.from_bytes(self._table[offset : offset + 4], "little")
        if offset >= self.pba_offset:
            return self._pending >> 8 * (offset - self.pba_offset) & 0xFFFFFFFF
        return 0

    def write(self, offset: int, value: int, size: int) -> None:
        """The driver writes an entry; pending bits are read-only."""
        if size != 4 or offset % 4 or not 0 <= offset < self.table_bytes:
            return
        field = offset % MSIX_ENTRY_BYTES
        if field == MsixEntry.VECTOR_CTRL:
            value &= MSIX_MASKED
        elif field == MsixEntry.LOWER_ADDR:
            value &= ~3  # a message is a dword: §6.8.2.6
        self._table[offset : offset + 4] = value.to_bytes(4, "little")
        if field == MsixEntry.VECTOR_CTRL:
            self._release()
