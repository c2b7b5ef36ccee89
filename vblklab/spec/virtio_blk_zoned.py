"""Zoned block devices: VIRTIO 1.4 §5.2.6, with VIRTIO_BLK_F_ZONED."""

from enum import IntEnum
from struct import Struct


class ZoneModel(IntEnum):
    """``virtio_blk_zoned_characteristics.model``, §5.2.4."""

    NONE = 0  # VIRTIO_BLK_Z_NONE: drive-managed, or not zoned
    HM = 1  # VIRTIO_BLK_Z_HM: host-managed
    HA = 2  # VIRTIO_BLK_Z_HA: host-aware


class ZoneType(IntEnum):
    """``virtio_blk_zone_descriptor.z_type``."""

    CONV = 1  # VIRTIO_BLK_ZT_CONV: conventional
    SWR = 2  # VIRTIO_BLK_ZT_SWR: sequential write required
    SWP = 3  # VIRTIO_BLK_ZT_SWP: sequential write preferred


class ZoneState(IntEnum):
    """``virtio_blk_zone_descriptor.z_state``."""

    NOT_WP = 0  # VIRTIO_BLK_ZS_NOT_WP: a conventional zone has no write pointer
    EMPTY = 1  # VIRTIO_BLK_ZS_EMPTY
    IOPEN = 2  # VIRTIO_BLK_ZS_IOPEN: implicitly open
    EOPEN = 3  # VIRTIO_BLK_ZS_EOPEN: explicitly open
    CLOSED = 4  # VIRTIO_BLK_ZS_CLOSED
    RDONLY = 13  # VIRTIO_BLK_ZS_RDONLY
    FULL = 14  # VIRTIO_BLK_ZS_FULL
    OFFLINE = 15  # VIRTIO_BLK_ZS_OFFLINE


ZONE_REPORT = Struct("<Q56x")
"""The header of ``struct virtio_blk_zone_report``: nr_zones."""
ZONE_DESC = Struct("<QQQBB38x")
"""``struct virtio_blk_zone_descriptor``: z_cap, z_start, z_wp (all in sectors), z_type, z_state."""
APPEND_SECTOR = Struct("<Q")
"""What a ZONE_APPEND returns before its status byte: append_sector of ``struct virtio_blk_req_za``."""
WP_UNDEFINED = 0xFFFFFFFFFFFFFFFF
"""What z_wp holds here where the specification leaves it undefined, as NVMe ZNS has it."""
