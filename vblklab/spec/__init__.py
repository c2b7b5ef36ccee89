"""Numbers and wire structures, one file per chapter of the specification; nothing here does anything."""

VERSION = "1.4"
"""The VIRTIO version that every section number in this package refers to (tag v1.4-cs01)."""

SECTOR_BYTES = 512
"""The unit of virtio-blk's ``sector`` and of every quantity named ``_sectors``, whatever the block size."""
