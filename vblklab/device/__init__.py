"""QEMU's role: the virtio-blk device."""

from .empty import EmptyDevice
from .engine_api import Engine, IoOp
from .request import BlkRequest
from .steps import Step
from .virtio_blk import VirtioBlkDevice
from .zones import Zone, Zones

__all__ = ["BlkRequest", "EmptyDevice", "Engine", "IoOp", "Step", "VirtioBlkDevice", "Zone", "Zones"]
