"""Virtqueues, each with a driver half (Linux's words) and a device half (QEMU's words)."""

from .packed import PackedDevice, PackedDriver, PackedLayout
from .split import Chain, Inflight, SplitDevice, SplitDriver, SplitLayout, need_event

__all__ = ["Chain", "Inflight", "PackedDevice", "PackedDriver", "PackedLayout", "SplitDevice", "SplitDriver", "SplitLayout", "need_event"]
