"""What a virtio-blk device says of itself: its options, the features it offers and its configuration space (VIRTIO 1.4 §5.2.3, §5.2.4)."""

from __future__ import annotations

import struct

from ..errors import ConfigError
from ..spec.virtio import DEVICE_ID_BLOCK, Feature
from ..spec.virtio_blk import (
    CONFIG_BYTES,
    CONFIG_BYTES_SECURE_ERASE,
    CONFIG_BYTES_ZONED,
    CONFIG_OFFSETS,
    ID_BYTES,
    LIFETIME_EST_MAX,
    PRE_EOL_MAX,
    BlkFeature,
)
from ..spec.virtio_blk_zoned import ZoneModel
from .zones import Zones

__all__ = ["BlkConfig"]


class BlkConfig:
    """The options of a device and the registers that follow from them."""

    device_id = DEVICE_ID_BLOCK
    capacity_sectors = 0
    driver_features = 0
    writeback = True

    def __init__(
        self,
        *,
        queues: int | None = None,
        queue_size_max: int = 1024,
        read_only: bool = False,
        serial: str = "vblklab",
        block_size: int = 512,
        seg_max: int = 126,
        size_max: int = 0,
        write_cache: bool = True,
        discard: bool = True,
        max_discard_sectors: int = 0x3FFFFF,
        event_idx: bool = True,
        indirect: bool = True,
        packed: bool = False,
        in_order: bool = False,
        ring_reset: bool = False,
        notification_data: bool = False,
        max_discard_seg: int = 1,
        secure_erase: bool = False,
        physical_block_size: int | None = None,
        alignment_offset: int = 0,
        min_io_size: int = 0,
        opt_io_size: int = 0,
        lifetime: tuple[int, int, int] | None = None,
        zones: Zones | None = None,
    ) -> None:
        if queues is not None and not 1 <= queues <= 1024:
            raise ConfigError(f"device queues={queues}", "use 1 to 1024")
        if queue_size_max < 1 or queue_size_max > 32768 or queue_size_max & (queue_size_max - 1):
            raise ConfigError(f"device queue_size_max={queue_size_max}", "use a power of two up to 32768")
        if block_size < 512 or block_size > 32768 or block_size & (block_size - 1):
            raise ConfigError(f"device block_size={block_size}", "use a power of two from 512 to 32768")
        if not 1 <= seg_max <= 65534:
            raise ConfigError(f"device seg_max={seg_max}", "use 1 to 65534")
        if size_max and not 512 <= size_max < 1 << 32:
            raise ConfigError(f"device size_max={size_max}", "use 512 or more bytes a segment, below 2**32, or 0 for no limit")
        if not 1 <= max_discard_sectors < 1 << 32:
            raise ConfigError(f"device max_discard_sectors={max_discard_sectors}", "use 1 or more, below 2**32")
        if not 1 <= max_discard_seg <= 256:
            raise ConfigError(f"device max_discard_seg={max_discard_seg}", "use 1 to 256")
        _check_topology(block_size, physical_block_size, alignment_offset, min_io_size, opt_io_size)
        if lifetime is not None and not _is_lifetime(lifetime):
            what = f"(pre_eol_info 0 to {PRE_EOL_MAX}, typ_a 0 to {LIFETIME_EST_MAX}, typ_b 0 to {LIFETIME_EST_MAX})"
            raise ConfigError(f"device lifetime={lifetime!r}", f"give {what}, or None")
        if zones is not None:
            _check_zones(zones, block_size, seg_max * size_max >> 9)
        if len(serial.encode()) > ID_BYTES:
            raise ConfigError(f"device serial={serial!r}", f"at most {ID_BYTES} bytes")
        self.num_queues = queues or 0
        self.queue_size_max = queue_size_max
        self.read_only = read_only
        self.serial = serial
        self.block_size = block_size
        self.seg_max = seg_max
        self.size_max = size_max
        self.write_cache = write_cache
        self.discard = discard and not (zones is not None and zones.model is ZoneModel.HM)
        self.max_discard_sectors = max_discard_sectors
        self.event_idx = event_idx
        self.indirect = indirect
        self.packed = packed
        self.in_order = in_order
        self.ring_reset = ring_reset
        self.notification_data = notification_data
        self.max_discard_seg = max_discard_seg
        self.secure_erase = secure_erase
        self.physical_block_size = physical_block_size
        self.alignment_offset = alignment_offset
        self.min_io_size = min_io_size
        self.opt_io_size = opt_io_size
        self.lifetime = lifetime
        self.zones = zones

    def __repr__(self) -> str:
        plain = BlkConfig().__dict__
        changed = {k: v for k, v in self.__dict__.items() if k in plain and plain[k] != v}
        names = {"num_queues": "queues"}
        return f"{type(self).__name__}({', '.join(f'{names.get(k, k)}={v!r}' for k, v in changed.items())})"

    def features(self) -> int:
        """The feature bits offered."""
        bits = Feature.VERSION_1 | BlkFeature.SEG_MAX | BlkFeature.BLK_SIZE | BlkFeature.FLUSH | BlkFeature.CONFIG_WCE | BlkFeature.TOPOLOGY
        if self.num_queues > 1:
            bits |= BlkFeature.MQ
        if self.event_idx:
            bits |= Feature.EVENT_IDX
        if self.indirect:
            bits |= Feature.INDIRECT_DESC
        if self.packed:
            bits |= Feature.RING_PACKED
        if self.in_order:
            bits |= Feature.IN_ORDER
        if self.ring_reset:
            bits |= Feature.RING_RESET
        if self.notification_data:
            bits |= Feature.NOTIFICATION_DATA
        if self.size_max:
            bits |= BlkFeature.SIZE_MAX
        if self.read_only:
            bits |= BlkFeature.RO
        else:
            if self.discard:
                bits |= BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES
            if self.secure_erase:
                bits |= BlkFeature.SECURE_ERASE
        if self.lifetime is not None:
            bits |= BlkFeature.LIFETIME
        if self.zones is not None:
            bits |= BlkFeature.ZONED
        return int(bits)

    def accepts(self, features: int) -> bool:
        """Whether this subset of the offered features works; False makes FEATURES_OK read back as 0."""
        if self.zones is not None and self.zones.model is ZoneModel.HM and not features & BlkFeature.ZONED:
            return False  # who takes it for an ordinary disk cannot write to it: §5.2.5.2
        return not (features & BlkFeature.CONFIG_WCE and not features & BlkFeature.FLUSH)

    def read_config(self) -> bytes:
        """The configuration space, §5.2.4."""
        erases = self.secure_erase and not self.read_only
        data = bytearray(CONFIG_BYTES_ZONED)

        def put(name: str, code: str, value: int) -> None:
            struct.pack_into("<" + code, data, CONFIG_OFFSETS[name], value)

        put("capacity", "Q", self.capacity_sectors)
        put("size_max", "I", self.size_max)
        put("seg_max", "I", self.seg_max)
        put("blk_size", "I", self.block_size)
        put("physical_block_exp", "B", ((self.physical_block_size or self.block_size) // self.block_size).bit_length() - 1)
        put("alignment_offset", "B", self.alignment_offset // self.block_size)
        put("min_io_size", "H", self.min_io_size // self.block_size)
        put("opt_io_size", "I", self.opt_io_size // self.block_size)
        put("writeback", "B", self.writeback)
        put("num_queues", "H", self.num_queues)
        if self.discard and not self.read_only:
            put("max_discard_sectors", "I", self.max_discard_sectors)
            put("max_discard_seg", "I", self.max_discard_seg)
            put("discard_sector_alignment", "I", self.block_size >> 9)
            put("max_write_zeroes_sectors", "I", self.max_discard_sectors)
            put("max_write_zeroes_seg", "I", self.max_discard_seg)
            put("write_zeroes_may_unmap", "B", 1)
        if erases:
            put("max_secure_erase_sectors", "I", self.max_discard_sectors)
            put("max_secure_erase_seg", "I", self.max_discard_seg)
            put("secure_erase_sector_alignment", "I", self.zones.zone_sectors if self.zones else self.block_size >> 9)
        if self.zones is not None:
            if self.zones.model and not (self.driver_features and not self.driver_features & BlkFeature.ZONED):
                for name in ("zone_sectors", "max_open_zones", "max_active_zones", "max_append_sectors", "write_granularity"):
                    put(name, "I", getattr(self.zones, name))
                put("model", "B", self.zones.model)
            return bytes(data)
        return bytes(data[: CONFIG_BYTES_SECURE_ERASE if erases else CONFIG_BYTES])

    def write_config(self, offset: int, data: bytes) -> None:
        """Only ``writeback`` can be written, and only with CONFIG_WCE negotiated (§5.2.5)."""
        if offset == CONFIG_OFFSETS["writeback"] and len(data) == 1 and self.driver_features & BlkFeature.CONFIG_WCE and data[0] <= 1:
            self.writeback = bool(data[0])


def _check_topology(block: int, physical: int | None, offset: int, least: int, best: int) -> None:
    """ConfigError unless these sizes in bytes can be said in TOPOLOGY's fields (§5.2.4)."""
    if physical is not None and (physical % block or physical & (physical - 1) or physical < block):
        raise ConfigError(f"device physical_block_size={physical}", f"use block_size ({block}) times a power of two")
    for name, value, most in (("alignment_offset", offset, 0xFF), ("min_io_size", least, 0xFFFF), ("opt_io_size", best, 0xFFFFFFFF)):
        if value < 0 or value % block or value // block > most:
            raise ConfigError(f"device {name}={value}", f"use a multiple of block_size ({block}) of at most {most:,} blocks")


def _check_zones(zones: Zones, block: int, most: int) -> None:
    """ConfigError unless these zones fit a device with such blocks, whose requests hold ``most`` sectors (0: as many as they like)."""
    if zones.write_granularity < block:
        raise ConfigError(f"zones write_granularity={zones.write_granularity}", f"use block_size ({block}) or more")
    if most and zones.max_append_sectors > most:
        raise ConfigError(
            f"zones max_append_sectors={zones.max_append_sectors}", f"seg_max * size_max is {most} sectors: give at most that"
        )


def _is_lifetime(value: object) -> bool:
    """Whether this is what a device may report: no reserved value (§5.2.6)."""
    limits = PRE_EOL_MAX, LIFETIME_EST_MAX, LIFETIME_EST_MAX
    if not isinstance(value, tuple) or len(value) != len(limits):
        return False
    return all(isinstance(one, int) and 0 <= one <= most for one, most in zip(value, limits, strict=True))
