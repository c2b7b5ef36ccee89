"""The zones of a zoned disk: their states, write pointers and resources.  VIRTIO 1.4 §5.2.6, pure logic without a disk.

States and limits are the specification's.  Where its text leaves a choice to the standards it names (ZBC, NVMe ZNS), the choice
stands in the docstring of the method.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from ..errors import ConfigError
from ..spec.virtio_blk import BlkStatus
from ..spec.virtio_blk_zoned import WP_UNDEFINED, ZONE_DESC, ZONE_REPORT, ZoneModel, ZoneState, ZoneType

__all__ = ["Zone", "Zones"]

MODELS = {"drive-managed": ZoneModel.NONE, "host-managed": ZoneModel.HM, "host-aware": ZoneModel.HA}
_ZONES_MOST = 1 << 17

_NOT_WP, _EMPTY, _IOPEN, _EOPEN = ZoneState.NOT_WP, ZoneState.EMPTY, ZoneState.IOPEN, ZoneState.EOPEN
_CLOSED, _RDONLY, _FULL, _OFFLINE = ZoneState.CLOSED, ZoneState.RDONLY, ZoneState.FULL, ZoneState.OFFLINE
_OPEN = frozenset({_IOPEN, _EOPEN})
_ACTIVE = frozenset({_IOPEN, _EOPEN, _CLOSED})
_WORN = frozenset({_RDONLY, _OFFLINE})

OK, UNSUPP = BlkStatus.OK, BlkStatus.UNSUPP
INVALID_CMD, UNALIGNED_WP = BlkStatus.ZONE_INVALID_CMD, BlkStatus.ZONE_UNALIGNED_WP
OPEN_RESOURCE, ACTIVE_RESOURCE = BlkStatus.ZONE_OPEN_RESOURCE, BlkStatus.ZONE_ACTIVE_RESOURCE


class Zone:
    """One zone; all positions in sectors of 512 bytes from the start of the disk.

    ``wp`` is the next sector to be written; it stays where it was when the zone becomes full, read-only or offline.  ``written``
    holds the ranges (first, end) that have been written since the zone was empty, in order and apart.
    """

    __slots__ = ("capacity", "sectors", "start", "state", "type", "wp", "written")

    def __init__(self, start: int, sectors: int, capacity: int, kind: ZoneType) -> None:
        self.start = start
        self.sectors = sectors
        self.capacity = capacity
        self.type = kind
        self.state = _NOT_WP if kind is ZoneType.CONV else _EMPTY
        self.wp = start
        self.written: list[tuple[int, int]] = []

    def __repr__(self) -> str:
        return f"Zone({self.start}, {self.type.name}, {self.state.name}, wp={self.wp}, capacity={self.capacity})"

    @property
    def limit(self) -> int:
        """The first sector that cannot be written."""
        return self.start + self.capacity

    def add(self, first: int, end: int) -> None:
        """Note that these sectors are written."""
        ranges = self.written
        low = bisect_left(ranges, first, key=lambda one: one[1])
        high = bisect_right(ranges, end, key=lambda one: one[0])
        if low < high:
            first, end = min(first, ranges[low][0]), max(end, ranges[high - 1][1])
        ranges[low:high] = [(first, end)]

    def descriptor(self) -> bytes:
        """``struct virtio_blk_zone_descriptor``."""
        moving = self.state is _EMPTY or self.state in _ACTIVE
        return ZONE_DESC.pack(self.capacity, self.start, self.wp if moving else WP_UNDEFINED, self.type, self.state)


class Zones:
    """A device's ``zones=``: makes its disk a zoned one (VIRTIO_BLK_F_ZONED).

    ``zone_sectors`` is the size of a zone and ``zone_capacity`` how much of it can be written (None: all), both in sectors; the last
    zone may be smaller.  The first ``conventional`` zones can be written anywhere.  ``model``: "host-managed" has zones that must be
    written at their write pointer (SWR); "host-aware" zones take writes anywhere (SWP), so they have no limits; "drive-managed" shows
    an ordinary disk.  ``max_open_zones`` and ``max_active_zones`` limit what their names say, 0 not at all.  ``max_append_sectors``
    is the largest ZONE_APPEND, 0 for none, None for a whole zone.  ``write_granularity`` in bytes aligns writes to sequential zones.

    A device reset leaves zones as they are; a new machine begins with empty ones.
    """

    def __init__(
        self,
        *,
        zone_sectors: int = 2048,
        zone_capacity: int | None = None,
        conventional: int = 0,
        model: str = "host-managed",
        max_open_zones: int = 0,
        max_active_zones: int = 0,
        max_append_sectors: int | None = None,
        write_granularity: int = 512,
    ) -> None:
        if model not in MODELS:
            raise ConfigError(f"zones model={model!r}", f"choose from {', '.join(map(repr, MODELS))}")
        if write_granularity < 512 or write_granularity & (write_granularity - 1):
            raise ConfigError(f"zones write_granularity={write_granularity}", "use a power of two of 512 or more bytes")
        grain = write_granularity >> 9
        if not grain <= zone_sectors < 1 << 32 or zone_sectors % grain:
            raise ConfigError(f"zones zone_sectors={zone_sectors}", f"use a multiple of write_granularity ({grain} sectors) below 2**32")
        capacity = zone_sectors if zone_capacity is None else zone_capacity
        if not grain <= capacity <= zone_sectors or capacity % grain:
            raise ConfigError(f"zones zone_capacity={capacity}", f"use a multiple of {grain} sectors up to zone_sectors ({zone_sectors})")
        for name, value in (("conventional", conventional), ("max_open_zones", max_open_zones), ("max_active_zones", max_active_zones)):
            if not 0 <= value < 1 << 32:
                raise ConfigError(f"zones {name}={value}", "use 0 or more")
        if max_active_zones and not max_open_zones <= max_active_zones:
            raise ConfigError(f"zones max_open_zones={max_open_zones}", f"an open zone is active: at most {max_active_zones}")
        if model == "host-aware" and (max_open_zones or max_active_zones):
            raise ConfigError("zones with limits that take writes anywhere", "leave max_open_zones and max_active_zones at 0")
        if model == "host-aware" and capacity != zone_sectors:
            raise ConfigError(f"zones zone_capacity={capacity}", "host-aware zones take writes anywhere: give None")
        if max_append_sectors is not None and not 0 <= max_append_sectors <= capacity:
            raise ConfigError(f"zones max_append_sectors={max_append_sectors}", f"use 0 to a zone's capacity ({capacity}), or None")
        if max_append_sectors and max_append_sectors < grain:
            raise ConfigError(f"zones max_append_sectors={max_append_sectors}", f"hold one write of {write_granularity} bytes, or give 0")
        self.model = MODELS[model]
        self.zone_sectors = zone_sectors
        self.zone_capacity = capacity
        self.conventional = conventional
        self.max_open_zones = max_open_zones
        self.max_active_zones = max_active_zones
        self.max_append_sectors = capacity if max_append_sectors is None else max_append_sectors
        self.write_granularity = write_granularity
        self.capacity_sectors = 0
        self._zones: list[Zone] = []
        self._clear()

    def _clear(self) -> None:
        self.open_zones = self.active_zones = 0
        self._implicit: dict[int, Zone] = {}  # implicitly open zones, the one opened first in front

    def __repr__(self) -> str:
        name = next(name for name, model in MODELS.items() if model is self.model)
        given = f"zone_sectors={self.zone_sectors}, zone_capacity={self.zone_capacity}, conventional={self.conventional}, model={name!r}"
        limits = f"max_open_zones={self.max_open_zones}, max_active_zones={self.max_active_zones}"
        return f"Zones({given}, {limits}, max_append_sectors={self.max_append_sectors}, write_granularity={self.write_granularity})"

    def __len__(self) -> int:
        return len(self._zones)

    def __iter__(self) -> Iterator[Zone]:
        return iter(self._zones)

    def __getitem__(self, number: int) -> Zone:
        return self._zones[number]

    def attach(self, capacity_sectors: int) -> None:
        """Lay zones over a disk of this size; zones that already lie over such a disk keep their state.  May raise ConfigError."""
        if capacity_sectors == self.capacity_sectors:
            return
        size = self.zone_sectors
        count = -(-capacity_sectors // size)
        last = capacity_sectors - (count - 1) * size
        if count > _ZONES_MOST:
            raise ConfigError(f"zone_sectors={size} on a disk of {capacity_sectors} sectors", f"use larger zones: at most {_ZONES_MOST:,}")
        if self.conventional > count:
            raise ConfigError(f"zones conventional={self.conventional}", f"the disk has {count} zones")
        if last % (self.write_granularity >> 9):
            raise ConfigError(f"a last zone of {last} sectors", f"the disk's size must be a multiple of {self.write_granularity} bytes")
        sequential = ZoneType.SWR if self.model is ZoneModel.HM else ZoneType.SWP
        self._zones = []
        for number in range(count):
            conventional = number < self.conventional
            sectors = last if number == count - 1 else size
            capacity = sectors if conventional else min(sectors, self.zone_capacity)
            self._zones.append(Zone(number * size, sectors, capacity, ZoneType.CONV if conventional else sequential))
        self.capacity_sectors = capacity_sectors
        self._clear()

    def at(self, sector: int) -> Zone | None:
        """The zone that a sector lies in; None behind the end of the disk."""
        number = sector // self.zone_sectors
        return self._zones[number] if number < len(self._zones) else None

    # -- requests: each returns the status byte, and does nothing unless it is 0 ------------------------------------------------

    def read(self, sector: int, sectors: int) -> int:
        """Whether a read may run: not in an offline zone, and not over the edge of an SWR zone."""
        pieces = list(self._pieces(sector, sectors))
        if any(zone.state is _OFFLINE for zone, _, _ in pieces) or self._crosses(pieces):
            return INVALID_CMD
        return OK

    def write(self, *ranges: tuple[int, int]) -> int:
        """A write of (sector, sectors), one or more: moves write pointers, opens zones implicitly, fills them.

        A write to an SWP zone that is full is an ordinary overwrite: the disk takes writes anywhere.
        """
        parts = [list(self._pieces(*one)) for one in ranges]
        if any(self._crosses(pieces) for pieces in parts):
            return INVALID_CMD
        status = next(filter(None, (self._writable(*piece) for pieces in parts for piece in pieces)), OK)
        if not status:
            for pieces in parts:
                for piece in pieces:
                    self._advance(*piece)
        return status

    def append(self, sector: int, sectors: int) -> tuple[int, int]:
        """ZONE_APPEND to the zone that starts at ``sector``: (status, first sector of the data)."""
        zone = self.at(sector)
        if not self.max_append_sectors:
            return UNSUPP, 0
        if zone is None or zone.type is not ZoneType.SWR or sector != zone.start or sectors > self.max_append_sectors:
            return INVALID_CMD, 0
        at = zone.wp
        status = self._writable(zone, at, at + sectors)
        if not status:
            self._advance(zone, at, at + sectors)
        return status, at

    def open(self, sector: int) -> int:
        """ZONE_OPEN: explicitly; from empty, closed or implicitly open, and once more without effect."""
        zone = self._target(sector)
        if zone is None or zone.state is _FULL:
            return INVALID_CMD
        status = self._lacks(zone)
        if not status:
            self._enter(zone, _EOPEN)
        return status

    def close(self, sector: int) -> int:
        """ZONE_CLOSE: from open, or closed without effect; an open zone that nothing was written to becomes empty."""
        zone = self._target(sector)
        if zone is None or zone.state not in _ACTIVE:
            return INVALID_CMD
        self._move(zone, _EMPTY if zone.wp == zone.start else _CLOSED)
        return OK

    def finish(self, sector: int) -> int:
        """ZONE_FINISH: to full.

        The specification lists this transition for open and full zones only, and leaves open what else can be performed.  Empty and
        closed zones are finished too, as in ZNS: a device closes zones by itself, so a driver cannot know which are still open.
        """
        zone = self._target(sector)
        if zone is None:
            return INVALID_CMD
        self._move(zone, _FULL)
        return OK

    def reset(self, sector: int) -> int:
        """ZONE_RESET: to empty, from every state in which the zone still works."""
        zone = self._target(sector)
        if zone is None:
            return INVALID_CMD
        self._empty(zone)
        return OK

    def reset_all(self) -> int:
        """ZONE_RESET_ALL: every sequential zone that still works becomes empty."""
        for zone in self._zones:
            if zone.type is not ZoneType.CONV and zone.state not in _WORN:
                self._empty(zone)
        return OK

    def report(self, sector: int, room: int) -> bytes | None:
        """ZONE_REPORT from the zone that ``sector`` lies in: as many descriptors as ``room`` bytes hold; None if it cannot be."""
        if room < ZONE_REPORT.size or self.at(sector) is None:
            return None
        first = sector // self.zone_sectors
        chosen = self._zones[first : first + (room - ZONE_REPORT.size) // ZONE_DESC.size]
        return ZONE_REPORT.pack(len(chosen)) + b"".join(zone.descriptor() for zone in chosen)

    def erase(self, ranges: list[tuple[int, int]]) -> int:
        """SECURE_ERASE of (sector, sectors): whole zones, each reset as ZONE_RESET does."""
        starts: list[int] = []
        for sector, sectors in ranges:
            whole = not sector % self.zone_sectors and (not sectors % self.zone_sectors or sector + sectors == self.capacity_sectors)
            if not whole:
                return INVALID_CMD
            starts += range(sector, sector + sectors, self.zone_sectors)
        if any(self._target(start) is None for start in starts):
            return INVALID_CMD
        for start in starts:
            self.reset(start)
        return OK

    # -- what else happens to zones ------------------------------------------------------------------------------------------

    def wear(self, sector: int, *, offline: bool = False) -> None:
        """The hardware fails: the zone at ``sector`` becomes read-only, or offline for good.  ConfigError if it cannot become that."""
        zone = self.at(sector)
        if zone is None or zone.type is ZoneType.CONV or zone.state is _OFFLINE:
            raise ConfigError(f"sector {sector}", "name a sequential zone that is not offline yet")
        self._move(zone, _OFFLINE if offline else _RDONLY)

    def written(self, sector: int, sectors: int) -> Iterator[tuple[int, int]]:
        """The parts (first, end) of a range that hold data; what lies between them is unwritten."""
        for zone, first, end in self._pieces(sector, sectors):
            if zone.type is ZoneType.CONV:
                yield first, end
                continue
            for low, high in zone.written:
                if low < end and high > first:
                    yield max(low, first), min(high, end)

    # -- rules ---------------------------------------------------------------------------------------------------------------

    def _pieces(self, sector: int, sectors: int) -> Iterator[tuple[Zone, int, int]]:
        """A range inside the disk, zone by zone: (zone, first, end).  A range without sectors lies in one zone."""
        size, end = self.zone_sectors, sector + sectors
        while True:
            zone = self._zones[min(sector // size, len(self._zones) - 1)]
            stop = min(end, zone.start + size)
            yield zone, sector, stop
            sector = stop
            if sector >= end:
                return

    def _crosses(self, pieces: list[tuple[Zone, int, int]]) -> bool:
        return len(pieces) > 1 and any(zone.type is ZoneType.SWR for zone, _, _ in pieces)

    def _target(self, sector: int) -> Zone | None:
        """The zone that a management request names by its first sector, if it can be managed."""
        zone = self.at(sector)
        usable = zone is not None and zone.start == sector and zone.type is not ZoneType.CONV and zone.state not in _WORN
        return zone if usable else None

    def _writable(self, zone: Zone, first: int, end: int) -> int:
        if zone.state in _WORN:
            return INVALID_CMD
        if zone.type is ZoneType.CONV:
            return OK
        if end > zone.limit:
            return INVALID_CMD
        if zone.type is ZoneType.SWP:
            return OK
        if zone.state is _FULL:
            return INVALID_CMD
        if first != zone.wp or (end << 9) % self.write_granularity:
            return UNALIGNED_WP
        return self._lacks(zone) if end > first else OK

    def _lacks(self, zone: Zone) -> int:
        """The status if a zone cannot be opened for want of resources; an implicitly open zone can be closed to make room."""
        if zone.state in _OPEN:
            return OK
        if zone.state is _EMPTY and self.max_active_zones and self.active_zones >= self.max_active_zones:
            return ACTIVE_RESOURCE
        if self.max_open_zones and self.open_zones >= self.max_open_zones and not self._implicit:
            return OPEN_RESOURCE
        return OK

    def _enter(self, zone: Zone, state: ZoneState) -> None:
        """Open a zone; at the limit the zone that has been implicitly open longest is closed."""
        if zone.state not in _OPEN and self.max_open_zones and self.open_zones >= self.max_open_zones:
            self._move(next(iter(self._implicit.values())), _CLOSED)
        self._move(zone, state)

    def _advance(self, zone: Zone, first: int, end: int) -> None:
        """The data of a write goes into a zone."""
        if zone.type is ZoneType.CONV or first == end:
            return
        if zone.state is _EMPTY or zone.state is _CLOSED:
            self._enter(zone, _IOPEN)
        zone.wp = max(zone.wp, end)
        zone.add(first, end)
        if zone.wp == zone.limit:
            self._move(zone, _FULL)

    def _empty(self, zone: Zone) -> None:
        self._move(zone, _EMPTY)
        zone.wp = zone.start
        zone.written = []

    def _move(self, zone: Zone, state: ZoneState) -> None:
        """The only place where a state changes: counts the resources."""
        self.open_zones += (state in _OPEN) - (zone.state in _OPEN)
        self.active_zones += (state in _ACTIVE) - (zone.state in _ACTIVE)
        self._implicit.pop(zone.start, None)
        if state is _IOPEN:
            self._implicit[zone.start] = zone
        zone.state = state
