"""The simulated drive and the host's driver of it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

import pytest

from tests.support import LoggedStore, finish
from vblklab.disk.drive import Drive, NvmeDriver, ServiceTime
from vblklab.events import WAIT
from vblklab.iostack import Bio, IOStack, Limits, Op

READ, WRITE, FLUSH = int(Op.READ), int(Op.WRITE), int(Op.FLUSH)


class Host:
    """A host stack on a drive; ``tick`` lets the drive end its next command."""

    def __init__(self, depth: int = 8, tags: int = 64) -> None:
        self.store = LoggedStore(1 << 20)
        self.now = 0
        self._due: list[tuple[int, int, Callable[[int], None]]] = []
        self.interrupts_raised = 0
        self.points: list[tuple[str, int]] = []
        service = ServiceTime(read_ns=10_000, write_ns=2_000, flush_ns=500, dies=4, bytes_per_us=2000, spread=0.0, seed=1)
        self.stack = IOStack(merge=False)
        self.drive = Drive(self.store, service, self._at, self._raise, self.points.append)
        self.driver = NvmeDriver(self.drive, self.stack, depth)
        self.stack.attach(self.driver, Limits(max_segments=127), queues=1, tags=tags, host=True)
        self.irq = self.driver.interrupts()
        self._drain(next(self.irq))
        self.ended: list[tuple[int, int]] = []

    def _at(self, when: int, call: Callable[[int], None]) -> None:
        heappush(self._due, (when, len(self.points) + len(self._due), call))

    def _raise(self) -> None:
        self.interrupts_raised += 1

    def _drain(self, ev: Any) -> None:
        while ev is not WAIT:
            ev = self.irq.send(self.now)

    def bio(self, io: int, op: int = READ, sector: int = 0, data: bytes | int = 4096) -> Bio:
        view = memoryview(bytearray(data))
        return Bio(op, sector, len(view), [view] if view else [], io, 0, lambda one: self.ended.append((one.io, one.status)))  # type: ignore[arg-type]

    def submit(self, bio: Bio) -> Bio:
        finish(self.stack.submit_bio(bio, None, lambda: None))
        return bio

    def tick(self, *, interrupt: bool = True) -> None:
        self.now, _, call = heappop(self._due)
        call(self.now)
        if interrupt:
            self._drain(self.irq.send(self.now))


def test_the_bytes_move_when_the_command_ends_and_not_before() -> None:
    host = Host()
    write = host.submit(host.bio(1, WRITE, 8, b"x" * 512))
    write.segments[0][:3] = b"abc"
    assert bytes(host.store.bytes[4096:4099]) == bytes(3)
    host.tick()
    assert bytes(host.store.bytes[4096:4100]) == b"abcx" and host.ended == [(1, 0)]


def test_an_error_of_the_store_ends_that_command_only() -> None:
    host = Host()
    host.submit(host.bio(1))
    host.submit(host.bio(2, WRITE, 800, 512))
    host.store.fail["writev"] = errno.ENOSPC
    host.tick()
    host.tick()
    assert sorted(host.ended) == [(1, 0), (2, errno.ENOSPC)]


def test_a_drive_of_depth_2_works_on_two_commands_and_then_on_the_others_in_order() -> None:
    host = Host(depth=2)
    for io in range(1, 8):
        host.submit(host.bio(io, sector=io * 8))
    assert len(host._due) == 2 and host.stack.counts["requeues"] == 5
    while host._due:
        host.tick()
        assert len(host._due) <= 2
    assert sorted(host.ended) == [(io, 0) for io in range(1, 8)]


def test_room_made_while_the_waiting_request_is_in_another_contexts_hand_is_not_missed() -> None:
    host = Host(depth=1)
    host.submit(host.bio(1))
    host.submit(host.bio(2, sector=8))
    retry = host.stack.run_hw_queue(0)
    assert next(retry)[0] == "nvme_queue_rq", "refused, and not back on the list yet"
    host.tick()
    assert host.ended == [(1, 0)]
    finish(retry)
    assert len(host._due) == 1, "nobody else will ever try again"
    host.tick()
    assert host.ended == [(1, 0), (2, 0)]


def test_a_flush_ends_behind_every_command_that_was_accepted_before_it() -> None:
    service = ServiceTime(read_ns=10_000, write_ns=2_000, flush_ns=500, dies=4, bytes_per_us=2000, spread=0.0, seed=1)
    ends = [service.done(0, WRITE, sector, 4096) for sector in (0, 8, 16, 24, 32)]
    assert service.done(100, FLUSH, 0, 0) >= max(ends)


def test_commands_for_one_die_wait_for_each_other() -> None:
    service = ServiceTime(read_ns=10_000, write_ns=2_000, flush_ns=500, dies=64, bytes_per_us=10**9, spread=0.0, seed=1)
    assert [service.done(0, READ, 0, 512), service.done(0, READ, 0, 512)] == [10_000, 20_000]


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_service_times_repeat_by_seed(spread: float) -> None:
    def times(seed: int) -> list[int]:
        service = ServiceTime(read_ns=10_000, write_ns=2_000, flush_ns=500, dies=4, bytes_per_us=2000, spread=spread, seed=seed)
        return [service.done(now, READ, now, 4096) for now in range(0, 100_000, 1000)]

    assert times(5) == times(5)
    assert (times(5) == times(6)) == (spread == 0.0)
