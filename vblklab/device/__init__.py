"""QEMU's role: the virtio-blk device."""

from .engine_api import Engine, IoOp
from .virtio_blk import BlkRequest, VirtioBlkDevice

__all__ = ["BlkRequest", "Engine", "IoOp", "VirtioBlkDevice"]
