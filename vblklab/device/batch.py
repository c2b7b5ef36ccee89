"""The batch path: a queue served by one plain function, without a trace point, while every step is as it was written.

A ``Drain`` does the usual work, reads and writes of whole blocks in one framing, and stops before anything else: that buffer is
taken, judged and ended by the device's own steps, whose rules are written nowhere twice.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import VirtioError
from ..ring import SplitDevice
from .steps import overridden

if TYPE_CHECKING:
    from .virtio_blk import VirtioBlkDevice

__all__ = ["CALL", "EMPTY", "LIMIT", "PLAIN", "BatchPath", "Drain"]

EMPTY, PLAIN, LIMIT = 0, 1, 2
"""Why a drain stopped: the ring is empty, the next buffer is one for the steps, as many were served as belong in one batch."""
CALL = 4
"""Set beside it: the driver is to be interrupted."""


_MOST = 1024
"""Requests of one queue before the rest of the device's world has its turn."""
_RING = {name: function for name, function in vars(SplitDevice).items() if callable(function) and not name.startswith("__")}


class Drain(Protocol):
    """What an engine offers for the batch path.  ``name`` says how it works: "python, preadv"."""

    name: str

    def bind(self, device: VirtioBlkDevice, queue: SplitDevice) -> Callable[[int], int]:
        """A function that serves this ring and says why it stopped; it may look ``spins`` times more before it says EMPTY.

        Each request ends as in the plain path: data, status byte, used element, used.idx.  It asks for no kicks, and after each
        batch it decides as ``should_notify`` does, counted in ``notify_decisions``.  It leaves the ring's indices as they are in
        memory.
        """

    def close(self) -> None:
        """Give back what it took for itself; no ring is served any more."""


class BatchPath:
    """Serves a device's queues; ``call(queue)`` is a plain function that interrupts the guest.  For the device's thread only."""

    def __init__(self, device: VirtioBlkDevice, drain: Drain, call: Callable[[int], None]) -> None:
        self.device = device
        self.drain = drain
        self.requests = 0
        self._call = call
        self._bound: dict[int, tuple[SplitDevice, Callable[[int], int]]] = {}
        self._polling = False

    def forget(self) -> None:
        """The disk below has changed: look at it again."""
        self._bound.clear()

    def serve(self, number: int, spins: int = 0) -> int:
        """Serve a queue until it is empty; returns how many requests were.

        A queue that does not come to an end is left after 1,024 requests and counts as kicked.
        """
        device = self.device
        queue = device.queues.get(number)
        if queue is None or device.broken is not None or not device.enter(number):
            return 0
        start = self.requests
        try:
            while device.queues.get(number) is queue:
                if queue.notification:
                    queue.set_notification(False)
                if not self._until_empty(number, queue, spins):
                    device.kick(number)
                    break
                if self._polling or device.queues.get(number) is not queue:
                    break
                queue.set_notification(True)
                if queue.recheck():
                    break
        except VirtioError as error:
            device.failed(number, error)
        finally:
            device.leave(number)
        return self.requests - start

    def _until_empty(self, number: int, queue: SplitDevice, spins: int) -> bool:
        """False if it does not come to an end."""
        device = self.device
        enough = self.requests + _MOST
        bound = self._bound.get(number)
        if bound is None or bound[0] is not queue:
            bound = self._bound[number] = (queue, _steps_only if overridden(queue, _RING, "ring") else self.drain.bind(device, queue))
        drain = bound[1]
        while device.queues.get(number) is queue:
            before = queue.used_idx
            stopped = PLAIN if device.resubmits(number) else drain(spins)
            self.requests += (queue.used_idx - before) & 0xFFFF
            if stopped & CALL:
                self._call(number)
            stopped &= ~CALL
            if stopped == EMPTY:
                break
            if stopped == PLAIN:
                if not _through(device.serve_one(queue)):
                    break
                self.requests += 1
            if self.requests >= enough:
                return False
        return True

    # -- polling -----------------------------------------------------------------------------------------------------------------

    def poll_begin(self) -> None:
        """Kicks are not needed from here on, somebody looks."""
        self._polling = True
        for queue in self.device.queues.values():
            queue.set_notification(False)

    def poll(self, spins: int = 0) -> bool:
        """Look at every queue and serve it; whether there was anything."""
        queues = self.device.queues
        if len(queues) > 1:
            spins = 0
        found = False
        for number in tuple(queues):
            found |= self.serve(number, spins) > 0
        return found

    def poll_end(self) -> bool:
        """Nobody looks any more: ask for kicks.  True if a buffer slipped in; its queue is then marked as kicked."""
        self._polling = False
        found = False
        for number, queue in self.device.queues.items():
            queue.set_notification(True)
            if not queue.recheck():
                self.device.kick(number)
                found = True
        return found


def _steps_only(spins: int) -> int:
    """The drain of a ring of somebody's own."""
    return PLAIN


def _through(steps: Generator[Any, int, Any]) -> Any:
    """Run a step to its end; its trace points are nobody's."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        return end.value
