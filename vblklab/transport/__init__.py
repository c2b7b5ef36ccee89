"""Transports: the driver's face and the device's register file."""

from .device_side import DeviceSide, InterruptStatus, RegisterDevice
from .face import DriverSide, Transport
from .mmio import Bus, Mmio, MmioRegisters, MmioTransport
from .msix import Message, Msix
from .pci import Pci, PciBus, PciTransport
from .pci_config import PciConfig
from .pci_device import PciRegisters

__all__ = [
    "Bus",
    "DeviceSide",
    "DriverSide",
    "InterruptStatus",
    "Message",
    "Mmio",
    "MmioRegisters",
    "MmioTransport",
    "Msix",
    "Pci",
    "PciBus",
    "PciConfig",
    "PciRegisters",
    "PciTransport",
    "RegisterDevice",
    "Transport",
]
