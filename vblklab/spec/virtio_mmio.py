"""The virtio-mmio register file, version 2 (not legacy): VIRTIO 1.4 §4.2.2."""

from enum import IntEnum, IntFlag


class Reg(IntEnum):
    """Byte offsets of the control registers, each 32 bits wide."""

    MAGIC_VALUE = 0x000  # VIRTIO_MMIO_MAGIC_VALUE
    VERSION = 0x004
    DEVICE_ID = 0x008
    VENDOR_ID = 0x00C
    DEVICE_FEATURES = 0x010
    DEVICE_FEATURES_SEL = 0x014
    DRIVER_FEATURES = 0x020
    DRIVER_FEATURES_SEL = 0x024
    QUEUE_SEL = 0x030
    QUEUE_SIZE_MAX = 0x034  # Linux: VIRTIO_MMIO_QUEUE_NUM_MAX
    QUEUE_SIZE = 0x038  # Linux: VIRTIO_MMIO_QUEUE_NUM
    QUEUE_READY = 0x044
    QUEUE_NOTIFY = 0x050
    INTERRUPT_STATUS = 0x060
    INTERRUPT_ACK = 0x064
    STATUS = 0x070
    QUEUE_DESC_LOW = 0x080
    QUEUE_DESC_HIGH = 0x084
    QUEUE_DRIVER_LOW = 0x090  # Linux: VIRTIO_MMIO_QUEUE_AVAIL_LOW
    QUEUE_DRIVER_HIGH = 0x094
    QUEUE_DEVICE_LOW = 0x0A0  # Linux: VIRTIO_MMIO_QUEUE_USED_LOW
    QUEUE_DEVICE_HIGH = 0x0A4
    SHM_SEL = 0x0AC
    SHM_LEN_LOW = 0x0B0
    SHM_LEN_HIGH = 0x0B4
    SHM_BASE_LOW = 0x0B8
    SHM_BASE_HIGH = 0x0BC
    QUEUE_RESET = 0x0C0
    CONFIG_GENERATION = 0x0FC
    CONFIG = 0x100


class Interrupt(IntFlag):
    """InterruptStatus bits."""

    VRING = 1  # VIRTIO_MMIO_INT_VRING: a used buffer notification
    CONFIG = 2  # VIRTIO_MMIO_INT_CONFIG: a configuration change notification


MAGIC = 0x74726976  # "virt", little-endian
VERSION_2 = 2
VENDOR = 0x6B6C6276  # "vblk", little-endian
