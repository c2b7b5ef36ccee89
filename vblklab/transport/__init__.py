"""Transports: the driver's face and the device's register file."""

from .device_side import DeviceSide, InterruptStatus, RegisterDevice
from .face import Transport
from .mmio import Bus, Mmio, MmioRegisters, MmioTransport

__all__ = ["Bus", "DeviceSide", "InterruptStatus", "Mmio", "MmioRegisters", "MmioTransport", "RegisterDevice", "Transport"]
