"""KVM: the wires between guest and device."""

from .bare import BareGuest
from .pci_wiring import NO_ROOM, PciInterrupt, PciKvmBus, check_wire, vectors_of
from .wiring import Kvm, KvmBus, KvmInterrupt

__all__ = ["NO_ROOM", "BareGuest", "Kvm", "KvmBus", "KvmInterrupt", "PciInterrupt", "PciKvmBus", "check_wire", "vectors_of"]
