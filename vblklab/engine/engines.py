"""Engines: ``Simulated`` submits asynchronously to the simulated host, ``Sync`` blocks in preadv and pwritev.

``Sync`` on the simulator blocks its context until the simulated host is done; on the other machines it calls the store for
real, and what lies between its two trace points is kernel and hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from ..device import IoOp
from ..device.batch import Drain
from ..device.steps import overridden
from ..disk import Store
from ..disk.drive import execute
from ..events import WAIT
from ..iostack import IOStack, Plug
from .compiled import drain_of
from .inline import image_of

__all__ = ["Simulated", "Sync"]

Steps = Generator[Any, int, Any]


class _Engine:
    """What engines share: operations that wait for ``flush``, operations that are done.

    ``store`` is where the bytes are.  ``event_fd``, if there is one, becomes readable when an operation ended in another thread;
    ``close`` gives back what ``attach`` took.
    """

    event_fd: int | None = None

    def attach(self, iostack: IOStack | None, store: Store, wake: Callable[[], None]) -> None:
        """Stand on the simulated host's block layer, or on ``store`` alone; ``wake`` notifies whoever may wait for an operation here."""
        self._iostack = iostack
        self.store = store
        self._wake = wake
        self.batch: list[IoOp] = []
        self._done: list[IoOp] = []
        self.in_flight = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def submit(self, op: IoOp) -> None:
        """Take an operation."""
        self.batch.append(op)
        self.in_flight += 1

    def reap(self) -> list[IoOp]:
        """The operations that have ended since the last call."""
        done = self._done
        if done:
            self._done = []
            self.in_flight -= len(done)
        return done

    def drain(self, fast: str) -> Drain | str:
        """No batch path: an operation is not over when it was submitted."""
        return f"engine {type(self).__name__}: its operations end later"

    def close(self) -> None:
        """Nothing to give back."""

    def end_io(self, op: IoOp) -> None:
        """The host's block layer has ended the operation, in a context of the host's."""
        self._done.append(op)
        self._wake()


class Simulated(_Engine):
    """Asynchronous, like libaio or io_uring: a batch of operations enters the host in one system call."""

    simulated_only = True
    batched = True

    def flush(self) -> Steps:
        batch = self.batch
        if not batch:
            return
        assert self._iostack is not None
        self.batch = []
        yield ("host:sys_enter_io_submit", batch[0].io)
        if len(batch) == 1:
            yield from self._iostack.submit_bio(batch[0], None, self._wake)
            return
        plug = Plug()
        for op in batch:
            yield from self._iostack.submit_bio(op, plug, self._wake)
        yield from self._iostack.flush_plug(plug)


class Sync(_Engine):
    """Blocking: one operation at a time, in the device's own context."""

    simulated_only = False
    batched = False
    _drain: Drain | None = None

    def flush(self) -> Steps:
        while self.batch:
            op = self.batch.pop(0)
            yield ("host:sys_enter_preadv64", op.io)
            if self._iostack is None:
                op.status = execute(self.store, op.op, op.sector << 9, op.length, op.segments, op.unmap)
                self._done.append(op)
            else:
                op.end_io = self._returned
                yield from self._iostack.submit_bio(op, None, self._wake)
                while op.remaining:
                    yield WAIT
                self._done.append(op)  # only now: the device's loop must not reap what a vCPU's thread still waits for
            yield ("host:sys_exit_preadv64", op.io)
        self._wake()

    def drain(self, fast: str) -> Drain | str:
        """Reads and writes of the batch path block too."""
        reasons = overridden(self, WRITTEN, "engine")
        if reasons:
            return f"engine {reasons[0]}"
        image = image_of(self.store)
        return image if isinstance(image, str) else self._takes(drain_of(*image, fast))

    def _takes(self, drain: Drain) -> Drain:
        """Own the drain, which may have a thread beside this one."""
        Sync.close(self)
        self._drain = drain
        return drain

    def close(self) -> None:
        drain, self._drain = self._drain, None
        if drain is not None:
            drain.close()

    def _returned(self, op: IoOp) -> None:
        """Wake the thread that is blocked in the call."""
        self._wake()


WRITTEN = {name: getattr(Sync, name) for name in ("submit", "flush", "reap", "drain")}
