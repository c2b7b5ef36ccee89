"""The block device: VIRTIO 1.4 §5.2."""

from enum import IntEnum, IntFlag
from struct import Struct


class BlkFeature(IntFlag):
    """Feature bits, §5.2.3."""

    SIZE_MAX = 1 << 1  # VIRTIO_BLK_F_SIZE_MAX
    SEG_MAX = 1 << 2  # VIRTIO_BLK_F_SEG_MAX
    GEOMETRY = 1 << 4  # VIRTIO_BLK_F_GEOMETRY
    RO = 1 << 5  # VIRTIO_BLK_F_RO
    BLK_SIZE = 1 << 6  # VIRTIO_BLK_F_BLK_SIZE
    FLUSH = 1 << 9  # VIRTIO_BLK_F_FLUSH
    TOPOLOGY = 1 << 10  # VIRTIO_BLK_F_TOPOLOGY
    CONFIG_WCE = 1 << 11  # VIRTIO_BLK_F_CONFIG_WCE
    MQ = 1 << 12  # VIRTIO_BLK_F_MQ
    DISCARD = 1 << 13  # VIRTIO_BLK_F_DISCARD
    WRITE_ZEROES = 1 << 14  # VIRTIO_BLK_F_WRITE_ZEROES
    LIFETIME = 1 << 15  # VIRTIO_BLK_F_LIFETIME
    SECURE_ERASE = 1 << 16  # VIRTIO_BLK_F_SECURE_ERASE
    ZONED = 1 << 17  # VIRTIO_BLK_F_ZONED


class ReqType(IntEnum):
    """``virtio_blk_req.type``, §5.2.6."""

    IN = 0  # VIRTIO_BLK_T_IN
    OUT = 1  # VIRTIO_BLK_T_OUT
    FLUSH = 4  # VIRTIO_BLK_T_FLUSH
    GET_ID = 8  # VIRTIO_BLK_T_GET_ID
    GET_LIFETIME = 10  # VIRTIO_BLK_T_GET_LIFETIME
    DISCARD = 11  # VIRTIO_BLK_T_DISCARD
    WRITE_ZEROES = 13  # VIRTIO_BLK_T_WRITE_ZEROES
    SECURE_ERASE = 14  # VIRTIO_BLK_T_SECURE_ERASE
    ZONE_APPEND = 15  # VIRTIO_BLK_T_ZONE_APPEND
    ZONE_REPORT = 16  # VIRTIO_BLK_T_ZONE_REPORT
    ZONE_OPEN = 18  # VIRTIO_BLK_T_ZONE_OPEN
    ZONE_CLOSE = 20  # VIRTIO_BLK_T_ZONE_CLOSE
    ZONE_FINISH = 22  # VIRTIO_BLK_T_ZONE_FINISH
    ZONE_RESET = 24  # VIRTIO_BLK_T_ZONE_RESET
    ZONE_RESET_ALL = 26  # VIRTIO_BLK_T_ZONE_RESET_ALL


class BlkStatus(IntEnum):
    """The status byte, §5.2.6."""

    OK = 0  # VIRTIO_BLK_S_OK
    IOERR = 1  # VIRTIO_BLK_S_IOERR
    UNSUPP = 2  # VIRTIO_BLK_S_UNSUPP
    ZONE_INVALID_CMD = 3  # VIRTIO_BLK_S_ZONE_INVALID_CMD
    ZONE_UNALIGNED_WP = 4  # VIRTIO_BLK_S_ZONE_UNALIGNED_WP
    ZONE_OPEN_RESOURCE = 5  # VIRTIO_BLK_S_ZONE_OPEN_RESOURCE
    ZONE_ACTIVE_RESOURCE = 6  # VIRTIO_BLK_S_ZONE_ACTIVE_RESOURCE


REQ_HEADER = Struct("<IIQ")
"""type, reserved (Linux: ioprio), sector."""
REQ_HEADER_BYTES = 16
DISCARD_SEG = Struct("<QII")
"""``struct virtio_blk_discard_write_zeroes``: sector, num_sectors, flags."""
DISCARD_SEG_BYTES = 16
WRITE_ZEROES_UNMAP = 1  # VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, bit 0 of flags
ID_BYTES = 20  # VIRTIO_BLK_ID_BYTES
LIFETIME = Struct("<HHH")
"""``struct virtio_blk_lifetime``: pre_eol_info, device_lifetime_est_typ_a, device_lifetime_est_typ_b."""
PRE_EOL_MAX, LIFETIME_EST_MAX = 3, 11
"""The largest values that are not reserved (§5.2.6): urgent; exceeded."""

CONFIG_OFFSETS = {
    "capacity": 0,
    "size_max": 8,
    "seg_max": 12,
    "geometry": 16,
    "blk_size": 20,
    "physical_block_exp": 24,
    "alignment_offset": 25,
    "min_io_size": 26,
    "opt_io_size": 28,
    "writeback": 32,
    "num_queues": 34,
    "max_discard_sectors": 36,
    "max_discard_seg": 40,
    "discard_sector_alignment": 44,
    "max_write_zeroes_sectors": 48,
    "max_write_zeroes_seg": 52,
    "write_zeroes_may_unmap": 56,
    "max_secure_erase_sectors": 60,
    "max_secure_erase_seg": 64,
    "secure_erase_sector_alignment": 68,
    "zone_sectors": 72,
    "max_open_zones": 76,
    "max_active_zones": 80,
    "max_append_sectors": 84,
    "write_granularity": 88,
    "model": 92,
}
CONFIG_BYTES = 60
"""Bytes of the configuration space through write_zeroes_may_unmap and its padding (§5.2.4)."""
CONFIG_BYTES_SECURE_ERASE = 72
"""The same with the fields of SECURE_ERASE, which only a device that offers it has."""
CONFIG_BYTES_ZONED = 96
"""The same with the fields of ZONED, ``struct virtio_blk_zoned_characteristics``, and their padding."""
