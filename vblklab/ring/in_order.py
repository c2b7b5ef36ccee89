"""VIRTIO_F_IN_ORDER, what both formats share: the order of buffers, and batches of used ones.  VIRTIO 1.4 §2.7.9, §2.8.9.

Buffers are used in the order in which they were made available.  So one used element may stand for a batch: it names the batch's last
buffer and lies where the first one's would.  The buffers that it skips count as used completely, all their writable bytes written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

__all__ = ["Offered", "Taken"]


class Offered:
    """The driver's memory of the order: ids of buffers in flight, oldest first, and how many of a batch are still to be returned."""

    def __init__(self) -> None:
        self.ids: deque[int] = deque()
        self.left = 0
        self._written = 0

    def batch(self, last: int, written: int) -> int:
        """A used element names ``last``: how many buffers it stands for, 0 if ``last`` is not in flight."""
        if last not in self.ids:
            return 0
        self.left = self.ids.index(last) + 1
        self._written = written
        return self.left

    def next(self, writable: Sequence[int]) -> tuple[int, int]:
        """(id, bytes written) of the next buffer of the batch; ``writable`` says how many bytes a skipped one has."""
        self.left -= 1
        number = self.ids.popleft()
        return number, writable[number] if self.left else self._written


class Taken:
    """The device's memory of the order: who ended before its turn waits."""

    def __init__(self) -> None:
        self._ids: deque[int] = deque()
        self._ended: dict[int, list[tuple[int, bool]]] = {}
        self.waiting = 0

    def popped(self, number: int) -> None:
        """This buffer is the next in order."""
        self._ids.append(number)

    def detach(self, number: int) -> None:
        """This buffer, taken last of its id, will not be used."""
        self._ids.reverse()
        self._ids.remove(number)
        self._ids.reverse()

    def ended(self, number: int, written: int, whole: bool) -> Iterator[tuple[int, int, bool]]:
        """A buffer is ready to be used: (id, bytes written, all of them) of each whose turn it is now.

        A batch may go on behind a buffer only if all its writable bytes were written: nothing else is said of one that is skipped.
        """
        self._ended.setdefault(number, []).append((written, whole))
        self.waiting += 1
        while self._ids and (ended := self._ended.get(self._ids[0])):
            first = self._ids.popleft()
            written, whole = ended.pop(0)
            if not ended:
                del self._ended[first]
            self.waiting -= 1
            yield first, written, whole
