"""What virtio-pci needs of PCI: the configuration header, the capability list, MSI-X.  PCI Local Bus 3.0 §6; Linux: linux/pci_regs.h."""

from enum import IntEnum, IntFlag


class Cfg(IntEnum):
    """Byte offsets in the configuration header of an ordinary function (type 0)."""

    VENDOR_ID = 0x00  # PCI_VENDOR_ID
    DEVICE_ID = 0x02
    COMMAND = 0x04
    STATUS = 0x06
    REVISION_ID = 0x08
    CLASS_PROG = 0x09
    CLASS_DEVICE = 0x0A
    CACHE_LINE_SIZE = 0x0C
    HEADER_TYPE = 0x0E
    BASE_ADDRESS_0 = 0x10
    SUBSYSTEM_VENDOR_ID = 0x2C
    SUBSYSTEM_ID = 0x2E
    CAPABILITY_LIST = 0x34
    INTERRUPT_LINE = 0x3C
    INTERRUPT_PIN = 0x3D


HEADER_BYTES = 0x40  # PCI_STD_HEADER_SIZEOF
CONFIG_BYTES = 0x100  # PCI_CFG_SPACE_SIZE
NUM_BARS = 6  # PCI_STD_NUM_BARS


class Command(IntFlag):
    """The Command register."""

    MEMORY = 0x2  # PCI_COMMAND_MEMORY: the function answers in memory space
    MASTER = 0x4  # PCI_COMMAND_MASTER: it may write to memory, which a message-signalled interrupt is
    INTX_DISABLE = 0x400  # PCI_COMMAND_INTX_DISABLE


class PciStatus(IntFlag):
    """The Status register."""

    INTERRUPT = 0x08  # PCI_STATUS_INTERRUPT
    CAP_LIST = 0x10  # PCI_STATUS_CAP_LIST


class BarBits(IntFlag):
    """The low bits of a base address register."""

    SPACE_IO = 0x01  # PCI_BASE_ADDRESS_SPACE_IO
    MEM_TYPE_64 = 0x04  # PCI_BASE_ADDRESS_MEM_TYPE_64: the next register holds the upper half
    MEM_PREFETCH = 0x08  # PCI_BASE_ADDRESS_MEM_PREFETCH


MEM_TYPE_MASK = 0x06  # PCI_BASE_ADDRESS_MEM_TYPE_MASK
BAR_FLAGS = 0x0F  # the complement of PCI_BASE_ADDRESS_MEM_MASK
CLASS_STORAGE_SCSI = 0x0100  # PCI_CLASS_STORAGE_SCSI, in linux/pci_ids.h; what QEMU gives virtio-blk


class CapId(IntEnum):
    """Capability identifiers."""

    VNDR = 0x09  # PCI_CAP_ID_VNDR
    MSIX = 0x11  # PCI_CAP_ID_MSIX


CAP_LIST_ID = 0  # PCI_CAP_LIST_ID
CAP_LIST_NEXT = 1  # PCI_CAP_LIST_NEXT


class MsixCap(IntEnum):
    """Byte offsets in the MSI-X capability."""

    FLAGS = 2  # PCI_MSIX_FLAGS
    TABLE = 4  # PCI_MSIX_TABLE
    PBA = 8  # PCI_MSIX_PBA


MSIX_CAP_BYTES = 12  # PCI_CAP_MSIX_SIZEOF
MSIX_BIR = 0x07  # PCI_MSIX_TABLE_BIR: which BAR
MSIX_VECTORS_MAX = 2048


class MsixFlags(IntFlag):
    """Message Control."""

    QSIZE = 0x07FF  # PCI_MSIX_FLAGS_QSIZE: vectors less one
    MASKALL = 0x4000  # PCI_MSIX_FLAGS_MASKALL
    ENABLE = 0x8000  # PCI_MSIX_FLAGS_ENABLE


class MsixEntry(IntEnum):
    """Byte offsets in an entry of the MSI-X table."""

    LOWER_ADDR = 0x0  # PCI_MSIX_ENTRY_LOWER_ADDR
    UPPER_ADDR = 0x4
    DATA = 0x8
    VECTOR_CTRL = 0xC


MSIX_ENTRY_BYTES = 16  # PCI_MSIX_ENTRY_SIZE
MSIX_MASKED = 1  # PCI_MSIX_ENTRY_CTRL_MASKBIT

MSI_ADDRESS = 0xFEE00000
"""Where an x86 processor's local APICs take messages; bits 12 to 19 name the target.  Intel SDM volume 3 §11.11."""
MSI_DEST_SHIFT = 12
