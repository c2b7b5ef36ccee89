"""The real systems that a recipe's side can be replaced by: a stock Linux guest under QEMU, and QEMU's own device."""

from .disks import GuestDisk, QemuDisk, VhostUserDisk
from .linux_guest import LinuxGuest
from .vm import Completed, GuestVm

__all__ = ["Completed", "GuestDisk", "GuestVm", "LinuxGuest", "QemuDisk", "VhostUserDisk"]
