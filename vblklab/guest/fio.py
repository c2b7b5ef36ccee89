"""The guest's application: what fio does with a job file, sans-I/O.  Steps D1 and U7."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np

from ..errors import JobError
from ..events import WAIT, Wait
from ..iostack import Bio, IOStack, Op, Plug
from ..memory import GuestPages, Segment
from ..stats import JobStat
from .job import Job, job, load_jobs, parse_jobs
from .verify import Shadow, fill
from .workload import Workload

__all__ = ["Fio", "FioTask", "IoLogEntry"]

Steps = Generator[Any, int, Any]
_READ, _WRITE, _TRIM, _SYNC = 0, 1, 2, 3
_OPS = (int(Op.READ), int(Op.WRITE), int(Op.DISCARD), int(Op.FLUSH))
_MISMATCHES_KEPT = 20

IoLogEntry = tuple[int, int, int, int, int]
"""(stamp or 0, op, offset, length, task) in the order of issue; op is 0 read, 1 write, 2 trim."""


class Fio:
    """A recipe's ``app``: ``Fio(rw="randread", bs=4096, iodepth=32, number_ios=10_000)``, ``Fio.load("job.fio")``.

    Options are fio's, as numbers or as fio writes them (``bs="4k"``); guest.job lists them.  ``segment_bytes`` hands each buffer
    to the block layer in segments of at most so many bytes, like a buffer scattered over pages.
    """

    def __init__(self, *, segment_bytes: int | None = None, **options: Any) -> None:
        self.jobs: tuple[Job, ...] = (job(**options),)
        self.segment_bytes = segment_bytes
        if segment_bytes is not None and segment_bytes < 1:
            raise JobError(f"segment_bytes={segment_bytes}", "give 1 or more bytes")

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, segment_bytes: int | None = None) -> Fio:
        """The jobs of a fio job file; raises JobError naming file, line and key."""
        return cls._of(load_jobs(path), segment_bytes)

    @classmethod
    def parse(cls, text: str, *, segment_bytes: int | None = None) -> Fio:
        """The jobs of a job file's text."""
        return cls._of(parse_jobs(text), segment_bytes)

    @classmethod
    def _of(cls, jobs: tuple[Job, ...], segment_bytes: int | None) -> Fio:
        fio = cls(segment_bytes=segment_bytes)
        fio.jobs = jobs
        return fio

    def __repr__(self) -> str:
        parts = [", ".join(f"{k}={v}" for k, v in one.options().items()) for one in self.jobs]
        return f"Fio({'; '.join(parts)})"

    @property
    def clones(self) -> int:
        """How many tasks the jobs ask for: the sum of numjobs."""
        return sum(one.numjobs for one in self.jobs)

    @property
    def depth(self) -> int:
        """The largest iodepth of all jobs."""
        return max(one.iodepth for one in self.jobs)

    def buffer_bytes(self) -> int:
        """Guest memory that the jobs' buffers take."""
        return sum(one.numjobs * one.iodepth * (one.max_bs + 4096) for one in self.jobs)

    def start(
        self,
        pages: GuestPages,
        iostack: IOStack,
        *,
        disk_bytes: int,
        queue_of: Callable[[int], int],
        poll: Callable[[int], Steps] | None,
        log: list[IoLogEntry] | None = None,
    ) -> list[FioTask]:
        """The tasks, ready to run; ``queue_of(task)`` is its hardware queue.  Raises JobError if the disk cannot serve a job."""
        shared = _Shared(self.jobs, disk_bytes, log)
        tasks: list[FioTask] = []
        for one in self.jobs:
            self.check(one, iostack)
            for clone in range(one.numjobs):
                number = len(tasks)
                tasks.append(FioTask(one, clone, number, shared, pages, iostack, queue_of(number), poll, self.segment_bytes, disk_bytes))
        return tasks

    @staticmethod
    def check(one: Job, iostack: IOStack) -> None:
        """Raise JobError if the disk behind ``iostack`` cannot serve the job."""
        limits = iostack.limits
        if limits.read_only and one.writes:
            raise JobError(f"job {one.name!r}: rw={one.rw} on a read-only disk", "use rw=read or randread, or a writable disk")
        if one.trims and not limits.max_discard_sectors:
            raise JobError(f"job {one.name!r}: rw={one.rw}, but the disk does not discard", "use a device with discard=True")
        for bs in one.block_sizes:
            if bs % limits.logical_block_bytes:
                raise JobError(
                    f"job {one.name!r}: a block size of {bs} bytes on a disk of {limits.logical_block_bytes}-byte blocks",
                    f"use multiples of {limits.logical_block_bytes}",
                )


class _Shared:
    """What the tasks of one run share: who wrote which sector, what is in flight, the numbering of writes."""

    def __init__(self, jobs: tuple[Job, ...], disk_bytes: int, log: list[IoLogEntry] | None) -> None:
        verify = any(one.verify for one in jobs)
        self.shadow = Shadow(disk_bytes) if verify else None
        self.guard = _OverlapGuard(disk_bytes) if verify or any(one.serialize_overlap for one in jobs) else None
        self.seed = jobs[0].randseed
        self.stamp = 0
        self.log = log
        self.completed = 0


class _OverlapGuard:
    """No two overlapping I/Os with a write among them are in flight: ``serialize_overlap``, across jobs."""

    def __init__(self, disk_bytes: int) -> None:
        self._readers = np.zeros(disk_bytes >> 9, dtype=np.uint16)
        self._writers = np.zeros(disk_bytes >> 9, dtype=np.bool_)
        self.waiters: list[Callable[[], None]] = []

    def enter(self, op: int, offset: int, length: int) -> bool:
        """Take the range, or False if something in flight forbids it."""
        first, last = offset >> 9, (offset + length) >> 9
        if self._writers[first:last].any():
            return False
        if op == _READ:
            self._readers[first:last] += 1
            return True
        if self._readers[first:last].any():
            return False
        self._writers[first:last] = True
        return True

    def leave(self, op: int, offset: int, length: int) -> None:
        """Give the range back and wake who waits for one."""
        first, last = offset >> 9, (offset + length) >> 9
        if op == _READ:
            self._readers[first:last] -= 1
        else:
            self._writers[first:last] = False
        if self.waiters:
            waiters, self.waiters = self.waiters, []
            for wake in waiters:
                wake()


class _Slot:
    """One of iodepth buffers, and the I/O that uses it now."""

    __slots__ = ("bio", "expected", "gpa", "issue_ns", "length", "offset", "op", "segments", "stamp", "start_ns", "view")

    def __init__(self, gpa: int, view: memoryview, segments: list[Segment]) -> None:
        self.gpa = gpa
        self.view = view
        self.segments = segments
        self.op = self.offset = self.length = self.start_ns = self.issue_ns = self.stamp = 0
        self.expected: Any = None
        self.bio: Bio | None = None  # kept by a machine that uses one bio a slot again and again


class FioTask:
    """One clone of a job: a guest task that keeps ``iodepth`` I/Os in flight."""

    def __init__(
        self,
        job: Job,
        clone: int,
        number: int,
        shared: _Shared,
        pages: GuestPages,
        iostack: IOStack,
        queue: int,
        poll: Callable[[int], Steps] | None,
        segment_bytes: int | None,
        disk_bytes: int,
    ) -> None:
        self.job = job
        self.number = number
        self.queue = queue
        self.iostack = iostack
        self.stat = JobStat(job.name, clone, job.options())
        self.wake: Callable[[], None] = lambda: None
        self.stopping = False
        self._dirs = (self.stat.read, self.stat.write, self.stat.trim, self.stat.sync)
        self._workload = Workload(job, clone, disk_bytes)
        self._shared = shared
        self._poll = poll
        self._guard = shared.guard
        self._shadow = shared.shadow if job.verify else None
        self._io = number << 32
        self._done: deque[Bio] = deque()
        self._writes_since_sync = 0
        self._written: list[tuple[int, int]] = []
        size = job.max_bs
        self._size = size
        self._free: list[_Slot] = []
        for _ in range(job.iodepth):
            gpa = pages.alloc(size, 4096)
            step = segment_bytes or size
            segments = [(gpa + at, min(step, size - at)) for at in range(0, size, step)]
            self._free.append(_Slot(gpa, pages.memory.view(gpa, size), segments))
        self._depth = job.iodepth

    @property
    def in_flight(self) -> int:
        """I/Os submitted and not yet reaped."""
        return self._depth - len(self._free)

    def stop(self) -> None:
        """Submit nothing more; what is in flight is still reaped."""
        self.stopping = True

    def run(self) -> Steps:
        """The task: the job, and with ``verify`` a second phase that reads back what was written."""
        job_phase = self._phase(self._main_ios(), measured=True)
        if self._shadow is None:
            return job_phase
        return self._then_verify(job_phase)

    def _then_verify(self, job_phase: Steps) -> Steps:
        yield from job_phase
        if self._written and not self.stopping:
            yield from self._phase(self._verify_ios(), measured=False)

    def _main_ios(self) -> Iterator[tuple[int, int, int]]:
        every = self.job.fsync
        if not every:
            yield from self._workload
            return
        for unit in self._workload:
            yield unit
            if every and unit[0] == _WRITE:
                self._writes_since_sync += 1
                if self._writes_since_sync >= every:
                    self._writes_since_sync = 0
                    yield (_SYNC, 0, 0)

    def _verify_ios(self) -> Iterator[tuple[int, int, int]]:
        for offset, length in dict.fromkeys(self._written):
            yield (_READ, offset, length)

    def _phase(self, units: Iterator[tuple[int, int, int]], *, measured: bool) -> Steps:
        free, done, guard, stat = self._free, self._done, self._guard, self.stat
        batch_size = self.job.iodepth_batch
        runtime_ns = self.job.runtime_ns if measured else None
        pending: tuple[int, int, int] | None = None
        exhausted = False
        started = False
        now = 0
        while True:
            while free and not exhausted:
                taken: list[_Slot] = []
                while free and len(taken) < batch_size:
                    unit = pending or next(units, None)
                    if unit is None or self.stopping or (runtime_ns is not None and started and now - stat.start_ns >= runtime_ns):
                        exhausted = True
                        break
                    if guard is not None and unit[0] != _SYNC and not guard.enter(*unit):
                        pending = unit
                        guard.waiters.append(self.wake)
                        break
                    pending = None
                    slot = free.pop()
                    self._prepare(slot, unit)
                    taken.append(slot)
                if not taken:
                    break
                started_ns = now = yield from self._submit(taken)
                if not started:
                    started = True
                    if measured:
                        stat.start_ns = started_ns
                now = taken[-1].issue_ns
                depth = self._depth - len(free)
                stat.depths[depth] = stat.depths.get(depth, 0) + len(taken)
                if pending is not None:
                    break
            if not done:
                if exhausted and len(free) == self._depth:
                    break
                if self._poll is None:
                    yield WAIT
                else:
                    yield from self._poll(self.queue)
                    if not done:
                        yield Wait(0)  # let another task of this vCPU run, then poll again
                continue
            now = yield ("sys_exit_io_getevents", done[-1].io, len(done))
            while done:
                self._reap(done.popleft(), now, measured)
        if measured:
            stat.end_ns = now

    def _submit(self, slots: list[_Slot]) -> Generator[Any, int, int]:
        """One io_submit() of all ``slots``, plugged if there are several; returns when the call began."""
        io = self._io + 1
        self._io += len(slots)
        start_ns = yield ("sys_enter_io_submit", io, len(slots))
        submit_bio = self.iostack.submit_bio
        if len(slots) == 1:
            slot = slots[0]
            yield from submit_bio(self._bio(slot, io), None, self.wake)
        else:
            plug = Plug()
            for number, slot in enumerate(slots, io):
                yield from submit_bio(self._bio(slot, number), plug, self.wake)
            yield from self.iostack.flush_plug(plug)
        end_ns = yield ("sys_exit_io_submit", io)
        for slot in slots:
            slot.start_ns = start_ns
            slot.issue_ns = end_ns
        return start_ns

    def _bio(self, slot: _Slot, io: int) -> Bio:
        length = slot.length
        segments = slot.segments if length == self._size else self._segments(slot, length)
        return Bio(_OPS[slot.op], slot.offset >> 9, length, segments, io, self.queue, self._end_io, slot)

    def _segments(self, slot: _Slot, length: int) -> list[Segment]:
        segments = []
        for gpa, size in slot.segments:
            if length <= 0:
                break
            segments.append((gpa, min(size, length)))
            length -= size
        return segments

    def _prepare(self, slot: _Slot, unit: tuple[int, int, int]) -> None:
        """Fill a write's buffer, note what a read must find, log the I/O in issue order."""
        op, offset, length = unit
        slot.op, slot.offset, slot.length = unit
        shared = self._shared
        if op == _WRITE:
            shared.stamp += 1
            slot.stamp = shared.stamp
            fill(slot.view[:length], offset, shared.stamp, shared.seed, self.job.verify)
            if shared.shadow is not None:
                shared.shadow.write(offset, length, shared.stamp if self._shadow is not None else 0)
            if self._shadow is not None:
                self._written.append((offset, length))
        elif op == _TRIM and shared.shadow is not None:
            shared.shadow.write(offset, length, 0)
        elif op == _READ and self._shadow is not None:
            slot.expected = self._shadow.expect(offset, length)
        if shared.log is not None and op != _SYNC:
            shared.log.append((slot.stamp if op == _WRITE else 0, op, offset, length, self.number))

    def _end_io(self, bio: Bio) -> None:
        self._done.append(bio)
        self.wake()

    def _reap(self, bio: Bio, now: int, measured: bool) -> None:
        slot: _Slot = bio.token
        op = slot.op
        self._shared.completed += 1
        if bio.status:
            self._failed(slot, bio.status)
        elif op == _READ and self._shadow is not None:
            self._check(slot)
        if measured:
            self._dirs[op].add(slot.length, slot.start_ns, slot.issue_ns, now)
        else:
            self.stat.verified_ios += 1
        if self._guard is not None and op != _SYNC:
            self._guard.leave(op, slot.offset, slot.length)
        self._free.append(slot)

    def _failed(self, slot: _Slot, status: int) -> None:
        self._dirs[slot.op].errors += 1
        if not self.stat.error:
            self.stat.error = status
        if slot.op != _READ and self._shared.shadow is not None:
            self._shared.shadow.write(slot.offset, slot.length, 0)  # nobody knows what the sectors hold now

    def _check(self, slot: _Slot) -> None:
        assert self._shadow is not None
        wrong = self._shadow.check(slot.view[: slot.length], slot.offset, slot.expected, self.job.verify, self._shared.seed)
        if wrong:
            stat = self.stat
            stat.mismatch_count += len(wrong)
            stat.mismatches.extend(f"offset {one.offset}: {one.what}" for one in wrong[: _MISMATCHES_KEPT - len(stat.mismatches)])
            stat.error = stat.error or errno.EILSEQ
