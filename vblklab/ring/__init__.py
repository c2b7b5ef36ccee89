"""Virtqueues, each with a driver half (Linux's words) and a device half (QEMU's words)."""

from .split import Chain, Inflight, SplitDevice, SplitDriver, SplitLayout, need_event

__all__ = ["Chain", "Inflight", "SplitDevice", "SplitDriver", "SplitLayout", "need_event"]
