"""vhost-user: message numbers, protocol features and wire structures.

Source: QEMU's ``docs/interop/vhost-user.rst`` (section names in the comments are its own).  Everything is little-endian on
the hosts that vblklab supports; the protocol itself uses the host's byte order.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct

__all__ = [
    "BackendReq",
    "FrontendReq",
    "ProtocolFeature",
]

# -- Header ----------------------------------------------------------------------------------------------------------------

HEADER = Struct("<III")  # request, flags, payload bytes
HEADER_BYTES = 12
VERSION = 1
VERSION_MASK = 3
FLAG_REPLY = 1 << 2
FLAG_NEED_REPLY = 1 << 3

F_PROTOCOL_FEATURES = 1 << 30  # VHOST_USER_F_PROTOCOL_FEATURES, a feature bit of its own beside virtio's
MAX_REGIONS = 8  # of SET_MEM_TABLE
MAX_SLOTS = 509  # what GET_MAX_MEM_SLOTS answers, as vhost-kernel does
MAX_FDS = 16
MAX_PAYLOAD = 4096
MAX_CONFIG = 256
VRING_IDX_MASK = 0xFF
VRING_NO_FD = 1 << 8


class FrontendReq(IntEnum):
    """Front-end message types."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class BackendReq(IntEnum):
    """Back-end message types, on the back-end's own channel."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5


class ProtocolFeature(IntFlag):
    """Protocol features."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    NET_MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


# -- Payloads --------------------------------------------------------------------------------------------------------------

U64 = Struct("<Q")
VRING_STATE = Struct("<II")  # index, num
VRING_ADDR = Struct("<IIQQQQ")  # index, flags, descriptor table, used ring, available ring, log
MEM_TABLE_HEAD = Struct("<II")  # regions, padding
MEM_REGION = Struct("<QQQQ")  # guest address, size, user address, mmap offset
MEM_SINGLE_HEAD = Struct("<Q")  # padding
CONFIG_HEAD = Struct("<III")  # offset, size, flags
INFLIGHT = Struct("<QQHH4x")  # mmap size, mmap offset, queues, queue size; QEMU pads it, rust-vmm does not
INFLIGHT_PACKED = Struct("<QQHH")

# -- Inflight I/O tracking, split virtqueue --------------------------------------------------------------------------------

INFLIGHT_QUEUE_BYTES = 16  # u64 features, u16 version, desc_num, last_batch_head, used_idx
INFLIGHT_DESC_BYTES = 16  # u8 inflight, 5 bytes of padding, u16 next, u64 counter
INFLIGHT_VERSION = 1
