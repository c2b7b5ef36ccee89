"""virtio over PCI, modern: VIRTIO 1.4 §4.1."""

from enum import IntEnum

VENDOR = 0x1AF4
DEVICE_ID_BASE = 0x1040  # plus the virtio device id: §4.1.2
DEVICE_ID_LAST = 0x107F
TRANSITIONAL_FIRST = 0x1000
TRANSITIONAL_BLOCK = 0x1001
NO_VECTOR = 0xFFFF  # VIRTIO_MSI_NO_VECTOR


class CapType(IntEnum):
    """``cfg_type`` of a vendor capability, §4.1.4."""

    COMMON_CFG = 1  # VIRTIO_PCI_CAP_COMMON_CFG
    NOTIFY_CFG = 2
    ISR_CFG = 3
    DEVICE_CFG = 4
    PCI_CFG = 5
    SHARED_MEMORY_CFG = 8


class Cap(IntEnum):
    """Byte offsets in ``struct virtio_pci_cap``."""

    VNDR = 0  # VIRTIO_PCI_CAP_VNDR
    NEXT = 1
    LEN = 2
    CFG_TYPE = 3
    BAR = 4
    OFFSET = 8
    LENGTH = 12


CAP_BYTES = 16
NOTIFY_CAP_MULT = 16  # VIRTIO_PCI_NOTIFY_CAP_MULT
NOTIFY_CAP_BYTES = 20
PCI_CFG_DATA = 16  # offsetof(struct virtio_pci_cfg_cap, pci_cfg_data)
PCI_CFG_CAP_BYTES = 20


class Common(IntEnum):
    """Byte offsets in ``struct virtio_pci_common_cfg``, §4.1.4.3."""

    DEVICE_FEATURE_SELECT = 0  # VIRTIO_PCI_COMMON_DFSELECT
    DEVICE_FEATURE = 4
    DRIVER_FEATURE_SELECT = 8
    DRIVER_FEATURE = 12
    CONFIG_MSIX_VECTOR = 16
    NUM_QUEUES = 18
    DEVICE_STATUS = 20
    CONFIG_GENERATION = 21
    QUEUE_SELECT = 22
    QUEUE_SIZE = 24
    QUEUE_MSIX_VECTOR = 26
    QUEUE_ENABLE = 28
    QUEUE_NOTIFY_OFF = 30
    QUEUE_DESC_LO = 32
    QUEUE_DESC_HI = 36
    QUEUE_DRIVER_LO = 40
    QUEUE_DRIVER_HI = 44
    QUEUE_DEVICE_LO = 48
    QUEUE_DEVICE_HI = 52
    QUEUE_NOTIF_CONFIG_DATA = 56
    QUEUE_RESET = 58
    ADMIN_QUEUE_INDEX = 60
    ADMIN_QUEUE_NUM = 62


COMMON_BYTES = 64
COMMON_1_0_BYTES = 56
"""The structure of VIRTIO 1.0, which a driver accepts: what follows belongs to features."""

COMMON_WIDTH = {
    field: 1 if field in (Common.DEVICE_STATUS, Common.CONFIG_GENERATION) else 4 if field <= 12 or 32 <= field <= 52 else 2
    for field in Common
}
"""Bytes of each field of the common configuration."""
