"""What a device needs of an engine, the way it reaches the host's kernel."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Protocol

from ..iostack import Bio
from .batch import Drain

__all__ = ["Engine", "IoOp"]


class IoOp(Bio):
    """One operation on the disk: a bio of the host's, with the request it belongs to.

    ``segments`` are views of guest memory; ``status`` is 0 or an errno once the operation is reaped.
    """

    __slots__ = ("epoch", "request", "unmap")

    def __init__(
        self,
        op: int,
        offset: int,
        length: int,
        views: list[memoryview],
        key: int,
        request: Any,
        epoch: int,
        end_io: Callable[[Any], None],
        unmap: bool,
    ) -> None:
        self.op = op
        self.sector = offset >> 9
        self.length = length
        self.segments = views
        self.io = key
        self.queue = 0
        self.end_io = end_io
        self.remaining = 1
        self.status = 0
        self.request = request
        self.epoch = epoch
        self.unmap = unmap


class Engine(Protocol):
    """``submit`` takes an operation, ``flush`` starts all that were taken; nothing calls back, the device collects with ``reap``."""

    in_flight: int
    batch: list[IoOp]  # taken, not yet started
    batched: bool  # False: flush after every request, since an operation is over when flush returns

    def submit(self, op: IoOp) -> None: ...

    def flush(self) -> Generator[Any, int, None]: ...

    def reap(self) -> list[IoOp]: ...

    def end_io(self, op: IoOp) -> None: ...

    def drain(self, fast: str) -> Drain | str:
        """How this engine serves whole batches by itself, or why it does not, as one sentence."""
