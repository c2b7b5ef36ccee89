"""The words of a ring by name, for people who read what a step stored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..spec.virtio_ring import DESC_BYTES, PACKED_DESC

__all__ = ["Words"]


class Words:
    """Names for the addresses of one system's memory."""

    def __init__(self, layout: Any, packed: bool, requests: Iterable[Any], tables: int, table_bytes: int) -> None:
        self._places: list[tuple[int, int, str]] = []  # address, bytes, name
        (self._packed if packed else self._split)(layout)
        for rq in requests:
            header, status, _, _ = rq.pdu
            data, length = rq.segments[0]
            self._add(header, 16, f"header of request {rq.tag}")
            self._add(status, 1, f"status of request {rq.tag}")
            self._add(data, length, f"data of request {rq.tag}")
        if table_bytes:
            for slot in range(layout.size):
                self._add(tables + slot * table_bytes, table_bytes, f"indirect table {slot}")

    def _add(self, at: int, length: int, name: str) -> None:
        self._places.append((at, length, name))

    def _split(self, layout: Any) -> None:
        size = layout.size
        for slot in range(size):
            self._add(layout.desc + slot * DESC_BYTES, DESC_BYTES, f"descriptor {slot}")
            self._add(layout.avail + 4 + 2 * slot, 2, f"avail.ring[{slot}]")
            self._add(layout.used + 4 + 8 * slot, 8, f"used.ring[{slot}]")
        for at, name in ((layout.avail, "avail.flags"), (layout.avail + 2, "avail.idx"), (layout.avail + 4 + 2 * size, "used_event")):
            self._add(at, 2, name)
        for at, name in ((layout.used, "used.flags"), (layout.used + 2, "used.idx"), (layout.used + 4 + 8 * size, "avail_event")):
            self._add(at, 2, name)

    def _packed(self, layout: Any) -> None:
        flags = PACKED_DESC.size - 2
        for slot in range(layout.size):
            self._add(layout.desc + slot * DESC_BYTES, flags, f"descriptor {slot}")
            self._add(layout.desc + slot * DESC_BYTES + flags, 2, f"flags of descriptor {slot}")
        for at, who in ((layout.avail, "driver's"), (layout.used, "device's")):
            self._add(at, 2, f"{who} event offset")
            self._add(at + 2, 2, f"{who} event flags")

    def say(self, runs: Iterable[tuple[int, bytes]], memory: bytes | bytearray) -> list[str]:
        """What these stores changed, as ``avail.idx = 1``; larger things by name alone."""
        said: dict[str, str] = {}
        for at, data in runs:
            for place, length, name in self._places:
                if place < at + len(data) and at < place + length:
                    value = int.from_bytes(memory[place : place + length], "little")
                    said[name] = f"{name} = {value:#x}" if "flags" in name else f"{name} = {value}" if length == 2 else name
        return list(said.values())
