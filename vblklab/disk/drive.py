"""The simulated drive: an NVMe command queue, dies that work in parallel and a service time; and its driver on the host."""

from __future__ import annotations

import errno
import random
from collections import deque
from collections.abc import Callable, Generator
from functools import lru_cache, partial
from typing import Any

from ..events import WAIT, Spend
from ..iostack import IOStack, Op, Request
from .store import Store

__all__ = ["BrdDriver", "Drive", "NvmeDriver", "ServiceTime", "execute"]

Steps = Generator[Any, int, Any]
_READ, _WRITE, _FLUSH, _DISCARD = int(Op.READ), int(Op.WRITE), int(Op.FLUSH), int(Op.DISCARD)
_SECURE_ERASE = int(Op.SECURE_ERASE)
_ERASE_BYTES = 1 << 20


@lru_cache(maxsize=16)
def _factors(seed: int, spread: float) -> tuple[float, ...]:
    """A lap of log-normal factors; kept, because the same seed boots again and again behind a slider."""
    rng = random.Random(seed)
    return tuple(rng.lognormvariate(0.0, spread) for _ in range(4093)) if spread else (1.0,)


class ServiceTime:
    """How long a command takes: its die works for a latency, then its bytes cross the drive's one link.  All in ns.

    A command goes to the die that its first 4 KiB stripe lives on, so two commands may wait for the same die although others
    are idle.  ``spread`` is the sigma of a log-normal factor with median 1; its random numbers come from the machine's seed.
    """

    def __init__(self, *, read_ns: int, write_ns: int, flush_ns: int, dies: int, bytes_per_us: int, spread: float, seed: int) -> None:
        self.read_ns = read_ns
        self.write_ns = write_ns
        self.flush_ns = flush_ns
        self.bytes_per_us = bytes_per_us
        self._dies = [0] * dies
        self._link_free = 0
        self._factors = _factors(seed, spread)
        self._next = 0

    def done(self, now: int, op: int, sector: int, length: int) -> int:
        """The time at which a command that is fetched now will be complete."""
        dies = self._dies
        self._next = at = (self._next + 1) % len(self._factors)
        die = (sector >> 3) * 0x9E3779B1 % 0xFFFFFFFB % len(dies)
        start = dies[die]
        if start < now:
            start = now
        if op == _READ:
            end = start + int(self.read_ns * self._factors[at])
        elif op == _WRITE:
            end = start + int(self.write_ns * self._factors[at])
        elif op == _FLUSH:  # behind everything that was accepted before it
            return max(now, self._link_free, *dies) + int(self.flush_ns * self._factors[at])
        else:
            length = 0
            end = start + int(self.write_ns * self._factors[at])
        dies[die] = end
        if self._link_free > end:
            end = self._link_free
        self._link_free = end = end + length * 1000 // self.bytes_per_us
        return end


def execute(store: Store, op: int, offset: int, length: int, views: list[memoryview], unmap: bool = True) -> int:
    """Do one operation on the store; returns 0 or the errno of the failure."""
    try:
        if op == _READ:
            store.readv(offset, views)
        elif op == _WRITE:
            store.writev(offset, views)
        elif op == _FLUSH:
            store.flush()
        elif op == _DISCARD:
            store.discard(offset, length)
        elif op == _SECURE_ERASE:
            _erase(store, offset, length)
        else:
            store.write_zeroes(offset, length, unmap)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _erase(store: Store, offset: int, length: int) -> None:
    """Overwrite with zeroes, whatever cheaper ways the store has to forget data, and make it stable."""
    zeroes = memoryview(bytes(min(length, _ERASE_BYTES)))
    for at in range(offset, offset + length, _ERASE_BYTES):
        store.writev(at, [zeroes[: min(_ERASE_BYTES, offset + length - at)]])
    store.flush()


class Drive:
    """The hardware: a command that is submitted ends at a time that ``at`` is asked to call back at.

    The bytes move when the command ends, as late as DMA may.  Ended commands wait in ``completion`` with their errno.  ``trace`` takes
    the drive's own trace points.
    """

    def __init__(
        self,
        store: Store,
        service: ServiceTime,
        at: Callable[[int, Callable[[int], None]], None],
        interrupt: Callable[[], None],
        trace: Callable[[tuple[str, int]], None],
    ) -> None:
        self.store = store
        self.service = service
        self.completion: deque[tuple[Request, int]] = deque()
        self._at = at
        self._interrupt = interrupt
        self._trace = trace

    def submit(self, rq: Request, now_ns: int) -> None:
        """The drive fetches a command at ``now_ns``."""

        self._trace(("nvme_fetch", rq.key))
        self._at(self.service.done(now_ns, rq.op, rq.sector, rq.length), partial(self._end, rq))

    def _end(self, rq: Request, now_ns: int) -> None:
        unmap = getattr(rq.bios[0], "unmap", True)
        error = execute(self.store, rq.op, rq.sector << 9, rq.length, rq.segments, unmap)
        self._trace(("nvme_cqe", rq.key))
        self.completion.append((rq, error))
        self._interrupt()


class NvmeDriver:
    """The host's block driver: ``nvme_queue_rq()`` down, ``nvme_irq()`` up.  ``depth`` commands fit its queue."""

    def __init__(self, drive: Drive, iostack: IOStack, depth: int) -> None:
        self.drive = drive
        self.iostack = iostack
        self.free = depth
        self._held: list[Request] = []

    def queue_rq(self, rq: Request, last: bool) -> Generator[Any, int, bool]:
        if not self.free:
            yield ("nvme_queue_rq", rq.key)
            return False
        self.free -= 1
        if not last:
            self._held.append(rq)
            yield ("nvme_queue_rq", rq.key)
            return True
        now = yield ("nvme_command", rq.key, rq.queue)
        if self._held:
            self._release(now)
        self.drive.submit(rq, now)
        return True

    def commit_rqs(self, queue: int) -> Steps:
        if self._held:
            self._release((yield ("nvme_commit_rqs", queue)))

    def _release(self, now_ns: int) -> None:
        held, self._held = self._held, []
        for rq in held:
            self.drive.submit(rq, now_ns)

    def interrupts(self) -> Steps:
        """The host's interrupt context: drain the completion queue, end the requests."""
        completion = self.drive.completion
        complete = self.iostack.complete
        hctx = self.iostack.queues[0]
        while True:
            if not completion:
                yield WAIT
                continue
            first = True
            while completion:
                rq, error = completion.popleft()
                self.free += 1
                if first:
                    yield ("nvme_interrupt", rq.key, 0)
                    first = False
                else:
                    yield ("nvme_irq", rq.key)
                yield from complete(rq, error)
            if hctx.dispatch or hctx.running:
                yield from self.iostack.run_hw_queue(0)


class BrdDriver:
    """The host's driver of a RAM disk: it copies in the caller's context and completes at once, without an interrupt."""

    def __init__(self, store: Store, iostack: IOStack, bytes_per_us: int) -> None:
        self.store = store
        self.iostack = iostack
        self._bytes_per_us = bytes_per_us

    def queue_rq(self, rq: Request, last: bool) -> Generator[Any, int, bool]:
        yield ("brd_submit_bio", rq.key)
        if rq.op <= _WRITE:
            yield Spend(rq.length * 1000 // self._bytes_per_us)
        unmap = getattr(rq.bios[0], "unmap", True)
        error = execute(self.store, rq.op, rq.sector << 9, rq.length, rq.segments, unmap)
        yield from self.iostack.complete(rq, error)
        return True

    def commit_rqs(self, queue: int) -> Steps:
        return
        yield
