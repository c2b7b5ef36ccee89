"""The layouts of split (VIRTIO 1.4 §2.7) and packed virtqueues (§2.8).  All fields are little-endian."""

from enum import IntFlag
from struct import Struct


class DescFlag(IntFlag):
    """Flags of one descriptor, §2.7.5."""

    NEXT = 1  # VIRTQ_DESC_F_NEXT
    WRITE = 2  # VIRTQ_DESC_F_WRITE: the device writes, the driver reads
    INDIRECT = 4  # VIRTQ_DESC_F_INDIRECT


AVAIL_NO_INTERRUPT = 1  # VIRTQ_AVAIL_F_NO_INTERRUPT
USED_NO_NOTIFY = 1  # VIRTQ_USED_F_NO_NOTIFY

DESC = Struct("<QIHH")
"""``struct virtq_desc``: addr, len, flags, next."""
DESC_BYTES = 16
DESC_TABLE_OF_THREE = Struct("<QIHHQIHHQIHH")
"""An indirect table of three descriptors, the one that Linux sends for a request with one data segment."""
USED_ELEM = Struct("<II")
"""``struct virtq_used_elem``: id, len."""

MAX_SIZE = 32768
"""Largest queue size, a power of two: §2.7."""

DESC_ALIGN, AVAIL_ALIGN, USED_ALIGN = 16, 2, 4


def desc_table_bytes(size: int) -> int:
    """Bytes of the descriptor table of ``size`` entries."""
    return 16 * size


def avail_ring_bytes(size: int) -> int:
    """Bytes of the available ring: flags, idx, ring[size], used_event."""
    return 6 + 2 * size


def used_ring_bytes(size: int) -> int:
    """Bytes of the used ring: flags, idx, ring[size], avail_event."""
    return 6 + 8 * size


# -- packed ------------------------------------------------------------------------------------------------------------------------

PACKED_AVAIL, PACKED_USED = 1 << 7, 1 << 15  # VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED as bits of a descriptor's flags
PACKED_DESC = Struct("<QIHH")
"""``struct pvirtq_desc``: addr, len, id, flags."""
PACKED_EVENT = Struct("<HH")
"""``struct pvirtq_event_suppress``: offset (15 bits) and wrap counter, flags."""
EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC = 0, 1, 2  # RING_EVENT_FLAGS_ENABLE, _DISABLE, _DESC
EVENT_ALIGN = 4
