"""Engines whose operations end later: ``Threads`` and ``IoUring``.  An eventfd wakes the device's loop, which reaps.

On the simulator both are ``Simulated``: submission is asynchronous there anyway.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from ..device import IoOp
from ..disk import FileStore, Store
from ..disk.drive import execute
from ..errors import ConfigError, NotHere
from ..iostack import IOStack, Op
from .engines import Simulated
from .uring import Uring

__all__ = ["IoUring", "Threads"]

Steps = Generator[Any, int, Any]
_READ, _WRITE, _FLUSH = int(Op.READ), int(Op.WRITE), int(Op.FLUSH)


class Threads(Simulated):
    """A pool of ``n`` threads that call the store, as QEMU's aio=threads."""

    simulated_only = False

    def __init__(self, n: int = 4) -> None:
        if not isinstance(n, int) or not 1 <= n <= 64:
            raise ConfigError(f"engine Threads n={n!r}", "use 1 to 64 threads")
        self.n = n

    def __repr__(self) -> str:
        return f"Threads(n={self.n})"

    def attach(self, iostack: IOStack | None, store: Store, wake: Callable[[], None]) -> None:
        super().attach(iostack, store, wake)
        if iostack is not None:
            return
        self._ended: deque[IoOp] = deque()
        self._work: queue.SimpleQueue[IoOp | None] = queue.SimpleQueue()
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._threads = [threading.Thread(target=self._run, name=f"vblklab io {i}", daemon=True) for i in range(self.n)]
        for thread in self._threads:
            thread.start()

    def flush(self) -> Steps:
        if self._iostack is not None:
            yield from super().flush()
            return
        batch, self.batch = self.batch, []
        if batch:
            yield ("host:sys_enter_io_submit", batch[0].io)
            for op in batch:
                self._work.put(op)

    def reap(self) -> list[IoOp]:
        if self._iostack is None:
            ended = self._ended
            while ended:
                self._done.append(ended.popleft())
        return super().reap()

    def close(self) -> None:
        if self.event_fd is None:
            return
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()
        os.close(self.event_fd)
        self.event_fd = None

    def _run(self) -> None:
        work, store, ended, fd = self._work, self.store, self._ended, self.event_fd
        assert fd is not None
        while (op := work.get()) is not None:
            op.status = execute(store, op.op, op.sector << 9, op.length, op.segments, op.unmap)
            ended.append(op)
            os.eventfd_write(fd, 1)


class IoUring(Simulated):
    """Linux's io_uring with ``depth`` entries: a batch of reads, writes and flushes enters the kernel in one system call.

    Needs an ``ImageFile``; raises NotHere where the kernel has no io_uring or forbids it.  Other operations, and those that the
    kernel did in part, go through the store.
    """

    simulated_only = False

    def __init__(self, depth: int = 128) -> None:
        if not isinstance(depth, int) or not 1 <= depth <= 4096:
            raise ConfigError(f"engine IoUring depth={depth!r}", "use 1 to 4096")
        self.depth = depth

    def __repr__(self) -> str:
        return f"IoUring(depth={self.depth})"

    def attach(self, iostack: IOStack | None, store: Store, wake: Callable[[], None]) -> None:
        super().attach(iostack, store, wake)
        if iostack is not None:
            return
        if not isinstance(store, FileStore):
            raise ConfigError(f"engine IoUring over {type(store).__name__}", "use an ImageFile, or the engine Sync")
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._uring = Uring(self.depth, self.event_fd)
        except OSError as error:
            os.close(self.event_fd)
            self.event_fd = None
            raise NotHere(f"io_uring: {error.strerror} (kernel.io_uring_disabled, a container's seccomp filter or an old kernel)") from None
        self._fd = store.fd
        self._running: dict[int, IoOp] = {}
        self._next = 0

    def flush(self) -> Steps:
        if self._iostack is not None:
            yield from super().flush()
            return
        if self.batch:
            yield ("host:sys_enter_io_submit", self.batch[0].io)
            self._enter()

    def _enter(self) -> None:
        """Start what there is room for; the rest starts as others end."""
        uring, running = self._uring, self._running
        while self.batch and len(running) < uring.entries:
            op = self.batch.pop(0)
            number = self._next
            if op.op == _FLUSH and self.store.cache != "unsafe":  # type: ignore[attr-defined]
                uring.fdatasync(self._fd, number)
            elif op.op in (_READ, _WRITE) and op.length and len(op.segments) <= 1024:
                uring.move(op.op == _WRITE, self._fd, op.segments, op.sector << 9, number)
            else:
                self._through_the_store(op)
                continue
            self._next += 1
            running[number] = op
        uring.enter()

    def _through_the_store(self, op: IoOp) -> None:
        op.status = execute(self.store, op.op, op.sector << 9, op.length, op.segments, op.unmap)
        self._done.append(op)
        self._wake()

    def reap(self) -> list[IoOp]:
        if self._iostack is None:
            for number, result in self._uring.completions():
                op = self._running.pop(number)
                if result < 0 or (op.op != _FLUSH and result != op.length):
                    self._through_the_store(op)  # a part, or an error: the store goes on, or meets it again and says what it is
                else:
                    op.status = 0
                    self._done.append(op)
            if self.batch:
                self._enter()
        return super().reap()

    def close(self) -> None:
        if self.event_fd is not None:
            self._uring.close()
            os.close(self.event_fd)
            self.event_fd = None
