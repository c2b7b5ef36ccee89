"""The driver's half of zoned disks: Linux drivers/block/virtio_blk.c, ``virtblk_read_zoned_limits()`` and ``virtblk_report_zones()``.

A host-managed disk takes writes at its write pointers alone.  The driver keeps no lock for a zone: writes stay in the order in which
they were submitted to one queue.  Its I/O is never cut or merged over the edge of a zone.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, VirtioError
from ..iostack import Bio, Limits, Op
from ..spec import SECTOR_BYTES
from ..spec.virtio_blk import CONFIG_OFFSETS, BlkFeature, BlkStatus, ReqType
from ..spec.virtio_blk_zoned import ZONE_DESC, ZONE_REPORT, ZoneModel, ZoneState, ZoneType

if TYPE_CHECKING:
    from .virtio_blk import VirtioBlkDriver

__all__ = ["BlkZone", "ZonedDisk", "probe_zoned"]

Steps = Generator[Any, int, Any]
_REPORT_BYTES = 4096
_MOVING = {ZoneState.EMPTY, ZoneState.IOPEN, ZoneState.EOPEN, ZoneState.CLOSED}


@dataclass(frozen=True, slots=True)
class BlkZone:
    """One zone as the device reports it, ``struct blk_zone``; in sectors.  ``wp`` is None where it has no meaning."""

    start: int
    len: int
    capacity: int
    wp: int | None
    type: ZoneType
    state: ZoneState


def probe_zoned(driver: VirtioBlkDriver, limits: Limits) -> Generator[Any, int, tuple[ZonedDisk | None, Limits]]:
    """Read the zoned characteristics, if they were negotiated and the disk is not drive-managed; raises VirtioError if they are wrong."""
    if not driver.features & BlkFeature.ZONED:
        return None, limits
    values = {}
    for name, size in (("model", 1), ("zone_sectors", 4), ("max_open_zones", 4), ("max_active_zones", 4)):
        values[name] = yield from _field(driver, name, size)
    for name in ("max_append_sectors", "write_granularity"):
        values[name] = yield from _field(driver, name, 4)
    if values["model"] == ZoneModel.NONE:
        return None, limits
    if values["model"] not in (ZoneModel.HM, ZoneModel.HA):
        raise VirtioError(f"zone model {values['model']}", "5.2.4")
    size, grain, append = values["zone_sectors"], values["write_granularity"], values["max_append_sectors"]
    if not size or size & (size - 1):
        raise VirtioError(f"zone_sectors {size}: this driver, as Linux', takes powers of two", "5.2.4")
    if not grain or grain % SECTOR_BYTES:
        raise VirtioError(f"write_granularity {grain}", "5.2.4")
    if append and append * SECTOR_BYTES < grain:
        raise VirtioError(f"max_append_sectors {append} holds no write of {grain} bytes", "5.2.4")
    disk = ZonedDisk(driver, ZoneModel(values.pop("model")), **values)
    return disk, disk.restrict(limits)


def _field(driver: VirtioBlkDriver, name: str, size: int) -> Generator[Any, int, int]:
    return int.from_bytes((yield from driver.transport.read_config(CONFIG_OFFSETS[name], size)), "little")


def _appended(bio: Bio) -> int:
    """What stands in append_sector of a request that has ended; OSError with the status if it failed."""
    if not bio.status:
        return int(bio.token[1])
    status = bio.token[0] if bio.token else BlkStatus.IOERR
    name = BlkStatus(status).name if status in set(BlkStatus) else f"status {status}"
    raise OSError(bio.status, f"{Op(bio.op).name} of sector {bio.sector}: {name}")


class ZonedDisk:
    """``driver.zoned``: what the device says of its zones, and the requests that only zoned disks take.

    Each request is a walk for ``vm.task()``: ``vm.task(vm.driver.zoned.report())``.  A request that the device refuses raises OSError
    with the status in its text.
    """

    def __init__(
        self,
        driver: VirtioBlkDriver,
        model: ZoneModel,
        *,
        zone_sectors: int,
        max_open_zones: int,
        max_active_zones: int,
        max_append_sectors: int,
        write_granularity: int,
    ) -> None:
        self._driver = driver
        self.model = model
        self.zone_sectors = zone_sectors
        self.max_open_zones = max_open_zones
        self.max_active_zones = max_active_zones
        self.max_append_sectors = max_append_sectors
        self.write_granularity = write_granularity
        self._buffers: dict[int, list[int]] = {}

    @property
    def nr_zones(self) -> int:
        """Zones of the disk; the last may be smaller (§5.2.5.2)."""
        return -(-self._driver.capacity_sectors // self.zone_sectors)

    def restrict(self, limits: Limits) -> Limits:
        """The limits of a disk with these zones."""
        grain = self.write_granularity
        limits = replace(limits, physical_block_bytes=max(grain, limits.physical_block_bytes), io_min=max(grain, limits.io_min))
        erase = limits.max_secure_erase_sectors
        limits = replace(limits, max_secure_erase_sectors=erase - erase % self.zone_sectors)
        if self.model is ZoneModel.HM:
            blocks = max(grain, limits.logical_block_bytes)
            limits = replace(limits, chunk_sectors=self.zone_sectors, max_discard_sectors=0, logical_block_bytes=blocks)
        return limits

    # -- requests --------------------------------------------------------------------------------------------------------------

    def report(self, sector: int = 0, count: int | None = None) -> Generator[Any, int, list[BlkZone]]:
        """ZONE_REPORT from the zone that holds ``sector``, as often as it takes: at most ``count`` zones, None for all.

        Raises VirtioError if a descriptor cannot be true.
        """
        driver = self._driver
        most = self.nr_zones if count is None else count
        zones: list[BlkZone] = []
        while len(zones) < most and sector < driver.capacity_sectors:
            gpa = self._take(_REPORT_BYTES)
            driver.memory.write(gpa, bytes(_REPORT_BYTES))
            bio = yield from driver.execute(Op.DRV_IN, sector, [(gpa, _REPORT_BYTES)], int(ReqType.ZONE_REPORT))
            data = bytes(driver.memory.read(gpa, _REPORT_BYTES))
            self._give_back(_REPORT_BYTES, gpa)
            if bio.status:
                raise OSError(bio.status, f"the device refuses ZONE_REPORT of sector {sector}")
            found = self._parse(data, sector)
            if not found:
                raise VirtioError(f"a report from sector {sector} without zones", "5.2.6")
            zones += found
            sector = found[-1].start + self.zone_sectors
        return zones[:most]

    def open(self, sector: int) -> Steps:
        """ZONE_OPEN of the zone that starts at ``sector``."""
        yield from self._manage(Op.ZONE_OPEN, sector)

    def close(self, sector: int) -> Steps:
        """ZONE_CLOSE of the zone that starts at ``sector``."""
        yield from self._manage(Op.ZONE_CLOSE, sector)

    def finish(self, sector: int) -> Steps:
        """ZONE_FINISH of the zone that starts at ``sector``: full from now on."""
        yield from self._manage(Op.ZONE_FINISH, sector)

    def reset(self, sector: int) -> Steps:
        """ZONE_RESET of the zone that starts at ``sector``: empty again."""
        yield from self._manage(Op.ZONE_RESET, sector)

    def reset_all(self) -> Steps:
        """ZONE_RESET_ALL."""
        _appended((yield from self._driver.execute(Op.ZONE_RESET_ALL, 0, [])))

    def append(self, sector: int, data: bytes) -> Generator[Any, int, int]:
        """ZONE_APPEND of ``data`` to the zone that starts at ``sector``; returns the sector where it lies now."""
        self._check_start(sector)
        if not data or len(data) % self.write_granularity:
            raise ConfigError(f"an append of {len(data)} bytes", f"use a multiple of write_granularity ({self.write_granularity})")
        if len(data) > self.max_append_sectors * SECTOR_BYTES:
            raise ConfigError(f"an append of {len(data)} bytes", f"the device takes at most {self.max_append_sectors} sectors")
        driver = self._driver
        most, room = driver.limits.max_segment_bytes, driver.limits.max_segments
        if len(data) > most * room:
            raise ConfigError(f"an append of {len(data)} bytes", f"a request here holds {room} segments of {most} bytes")
        gpa = self._take(len(data))
        driver.memory.write(gpa, data)
        segments = [(gpa + at, min(most, len(data) - at)) for at in range(0, len(data), most)]
        bio = yield from driver.execute(Op.ZONE_APPEND, sector, segments)
        self._give_back(len(data), gpa)
        return _appended(bio)

    def _manage(self, op: Op, sector: int) -> Steps:
        self._check_start(sector)
        _appended((yield from self._driver.execute(op, sector, [])))

    def _check_start(self, sector: int) -> None:
        if sector % self.zone_sectors or not 0 <= sector < self._driver.capacity_sectors:
            raise ConfigError(f"sector {sector}", f"name a zone by its first sector, a multiple of {self.zone_sectors} inside the disk")

    # -- what comes back -------------------------------------------------------------------------------------------------------

    def _parse(self, data: bytes, sector: int) -> list[BlkZone]:
        """``virtblk_parse_zone()`` for each descriptor of a report that begins with the zone of ``sector``."""
        count = min(ZONE_REPORT.unpack_from(data)[0], (len(data) - ZONE_REPORT.size) // ZONE_DESC.size)
        expected = sector - sector % self.zone_sectors
        zones = []
        for number in range(count):
            if expected >= self._driver.capacity_sectors:
                break
            capacity, start, wp, kind, state = ZONE_DESC.unpack_from(data, ZONE_REPORT.size + number * ZONE_DESC.size)
            length = min(self.zone_sectors, self._driver.capacity_sectors - start)
            if start != expected or length <= 0:
                raise VirtioError(f"zone {number} of a report starts at {start}, {expected} was to come", "5.2.6")
            if kind not in set(ZoneType) or state not in set(ZoneState) or (state == ZoneState.NOT_WP) != (kind == ZoneType.CONV):
                raise VirtioError(f"the zone at {start} has type {kind} and state {state}", "5.2.6")
            if not 0 < capacity <= length:
                raise VirtioError(f"the zone at {start} has a capacity of {capacity} in {length} sectors", "5.2.6")
            if state in _MOVING and not start <= wp <= start + capacity:
                raise VirtioError(f"the zone at {start} has its write pointer at {wp}", "5.2.6")
            zones.append(BlkZone(start, length, capacity, wp if state in _MOVING else None, ZoneType(kind), ZoneState(state)))
            expected = start + self.zone_sectors
        return zones

    # -- guest memory for requests of its own ------------------------------------------------------------------------------------

    def _take(self, length: int) -> int:
        free = self._buffers.setdefault(length, [])
        return free.pop() if free else self._driver.pages.alloc(length, SECTOR_BYTES)

    def _give_back(self, length: int, gpa: int) -> None:
        self._buffers[length].append(gpa)
