"""The in-flight region: shared memory that outlives a back-end and says which buffers it had taken and not returned.

Source: docs/interop/vhost-user.rst, "Inflight I/O tracking", split virtqueue.
"""

from __future__ import annotations

from ..errors import VhostUserError
from ..spec.vhost_user import INFLIGHT_DESC_BYTES, INFLIGHT_QUEUE_BYTES, INFLIGHT_VERSION

__all__ = ["InflightQueue", "region_bytes"]

_ALIGN = 64
# Places of the fields, in units of their own size.
_VERSION, _DESC_NUM, _LAST_BATCH_HEAD, _USED_IDX = 4, 5, 6, 7  # 16-bit words of the head
_NEXT, _COUNTER = 3, 1  # of a descriptor: 16-bit word, 64-bit word
_COUNTER_MOST = 1 << 62  # more than a device can count to, and so that counting on from there does not overflow


def queue_bytes(size: int) -> int:
    """Bytes of one queue's part for ``size`` descriptors."""
    return (INFLIGHT_QUEUE_BYTES + INFLIGHT_DESC_BYTES * size + _ALIGN - 1) & -_ALIGN


def region_bytes(queues: int, size: int) -> int:
    """Bytes of a region for ``queues`` queues of ``size`` descriptors each."""
    return queues * queue_bytes(size)


class InflightQueue:
    """One queue's part of the region.  Every word is stored whole, so that a back-end killed anywhere leaves a usable state.

    ``view`` is the whole region, ``queue`` and ``size`` say which part of it; a region whose version is 0 is new.
    """

    def __init__(self, view: memoryview, queue: int, size: int) -> None:
        start, length = queue * queue_bytes(size), queue_bytes(size)
        if start + length > len(view):
            raise VhostUserError(f"the in-flight region of {len(view)} bytes has no room for queue {queue} of {size} entries")
        self.view = part = view[start : start + length]
        self.size = size
        self._words = part.cast("H")
        self._longs = part.cast("Q")
        self._bytes = part
        self.counter = 0
        self._batch: list[int] = []
        version = self._words[_VERSION]
        if version == 0:
            part[:] = bytes(length)
            self._words[_DESC_NUM] = size
            self._words[_VERSION] = INFLIGHT_VERSION
        elif version != INFLIGHT_VERSION or self._words[_DESC_NUM] != size:
            raise VhostUserError(
                f"the in-flight region has version {version} and {self._words[_DESC_NUM]} entries for queue {queue}, not 1 and {size}"
            )

    def recover(self, used_idx: int) -> list[int]:
        """Heads that were taken and never returned, in the order they were taken; ``used_idx`` is what the used ring says now."""
        words = self._words
        missed = (used_idx - words[_USED_IDX]) & 0xFFFF
        if missed > self.size:
            if self._marked():
                raise VhostUserError(f"the in-flight region stands at used index {words[_USED_IDX]}, the ring at {used_idx}")
            words[_USED_IDX] = used_idx  # another ring than before, begun with nothing in flight
        elif missed:  # the last batch was published and not yet crossed off
            head = words[_LAST_BATCH_HEAD]
            for _ in range(missed):
                if head >= self.size:
                    raise VhostUserError(f"the in-flight region's last batch names descriptor {head}, there are {self.size}")
                self._bytes[self._at(head)] = 0
                head = words[self._at(head) // 2 + _NEXT]
            words[_USED_IDX] = used_idx
        taken = sorted((self._longs[self._at(head) // 8 + _COUNTER], head) for head in self._marked())
        if taken:
            last = taken[-1][0]
            if last > _COUNTER_MOST:
                raise VhostUserError(f"the in-flight region's counter stands at {last:#x}, which no device reaches")
            self.counter = last + 1
        return [head for _, head in taken]

    def _marked(self) -> list[int]:
        return [head for head in range(self.size) if self._bytes[self._at(head)] == 1]

    @staticmethod
    def _at(head: int) -> int:
        return INFLIGHT_QUEUE_BYTES + INFLIGHT_DESC_BYTES * head

    def popped(self, head: int) -> None:
        """The chain of ``head`` was taken from the available ring."""
        at = self._at(head)
        self._longs[at // 8 + _COUNTER] = self.counter
        self.counter += 1
        self._bytes[at] = 1

    def filled(self, head: int) -> None:
        """Its used element is written and not yet published."""
        self._words[self._at(head) // 2 + _NEXT] = self._words[_LAST_BATCH_HEAD]
        self._words[_LAST_BATCH_HEAD] = head
        self._batch.append(head)

    def flushed(self, used_idx: int) -> None:
        """``used.idx`` was published: what was filled is the driver's again."""
        for head in self._batch:
            self._bytes[self._at(head)] = 0
        self._batch.clear()
        self._words[_USED_IDX] = used_idx
