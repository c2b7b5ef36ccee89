"""KVM: the wires between guest and device."""

from .wiring import Kvm, KvmBus, KvmInterrupt

__all__ = ["Kvm", "KvmBus", "KvmInterrupt"]
