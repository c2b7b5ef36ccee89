"""Disks: where the bytes are (stores) and how long a drive takes (models)."""

from .drive import BrdDriver, Drive, NvmeDriver, ServiceTime
from .model import Disk, ImageFile, Nvme, Ram
from .store import FileStore, RamStore, Store, open_image
from .volatile import VolatileCache

__all__ = [
    "BrdDriver",
    "Disk",
    "Drive",
    "FileStore",
    "ImageFile",
    "Nvme",
    "NvmeDriver",
    "Ram",
    "RamStore",
    "ServiceTime",
    "Store",
    "VolatileCache",
    "open_image",
]
