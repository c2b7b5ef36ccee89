"""Transports: the driver's face and the device's register file."""

from .mmio import Bus, InterruptStatus, Mmio, MmioRegisters, MmioTransport, RegisterDevice

__all__ = ["Bus", "InterruptStatus", "Mmio", "MmioRegisters", "MmioTransport", "RegisterDevice"]
