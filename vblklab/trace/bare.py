"""A bare guest's stamps: joined to the host's clock, as a job's statistics, and as trace points."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..events import expand
from ..kvm.bare_payload import TIMES
from ..kvm.guest import GSI, GuestClock
from ..stats import JobStat
from .clock import ClockFit, fit_clock

__all__ = ["fill_stat", "fit_stamps", "guest_points", "host_times"]

LogEntry = tuple[int, int, Any]
_MISMATCHES_KEPT = 20


def fit_stamps(table: Any, clock: GuestClock, later: GuestClock, log: Iterable[LogEntry]) -> ClockFit:
    """Join the guest's stamps to the host's clock by what must lie before what.

    ``clock`` and ``later`` were measured before and after the run.  In ``log``, the device's without gaps, a chain is popped after the
    guest published it and filled before the guest took it.  ``table`` has the requests in the order of issue.
    """
    popped, filled = _device_times(table["head"].tolist(), log)
    before = list(zip(_of(clock, table["published"][: len(popped)]).tolist(), popped, strict=True))
    taken = _of(clock, table["taken"])
    after = [(int(taken[number]), fill_ns) for number, fill_ns in filled.items()]
    for tsc, early_ns, late_ns in (clock.bracket(), later.bracket()):
        after.append((clock.ns(tsc), early_ns))
        before.append((clock.ns(tsc), late_ns))
    return fit_clock(before, after)


def _of(clock: GuestClock, stamps: Any) -> Any:
    return clock.ns(stamps.astype(np.int64))


def _device_times(heads: Sequence[int], log: Iterable[LogEntry]) -> tuple[list[int], dict[int, int]]:
    """When the first requests were popped, in order, and when each was filled: number → ns."""
    popped: list[int] = []
    filled: dict[int, int] = {}
    held: dict[int, int] = {}  # head → the request that was popped with it
    for now, _, ev in log:
        for one in expand(ev):
            if one[0] == "virtqueue_pop" and len(popped) < len(heads):
                held[heads[len(popped)]] = len(popped)
                popped.append(now)
            elif one[0] == "virtqueue_fill" and one[1] & 0xFFFF in held:
                filled[held.pop(one[1] & 0xFFFF)] = now
    return popped, filled


def host_times(table: Any, clock: GuestClock, fit: ClockFit) -> dict[str, Any]:
    """Every kind of stamp as ns of the host's clock, an int64 array each; 0 where the guest wrote none."""
    times = {}
    for name in TIMES:
        guest_ns = _of(clock, table[name])
        host_ns = guest_ns + np.rint(fit.offset_ns + fit.drift * (guest_ns - fit.origin_ns)).astype(np.int64)
        times[name] = np.where(table[name] > 0, host_ns, 0)
    return times


def fill_stat(stat: JobStat, ops: Any, table: Any, times: dict[str, Any], main: int) -> None:
    """What fio would say of the first ``main`` requests; the others read back what was written.  ``ops`` is (operation, offset, bytes)."""
    measured, good = slice(0, main), table["done"] == 1
    start, issued, taken = (times[name][measured] for name in ("start", "issued", "taken"))
    for number, one in enumerate((stat.read, stat.write, stat.trim, stat.sync)):
        chosen = ops[measured, 0] == number
        one.ios, one.bytes = int(chosen.sum()), int(ops[measured, 2][chosen].sum())
        one.errors = int(((ops[:, 0] == number) & ~good).sum())
        one.slat.extend((issued - start)[chosen])
        one.clat.extend((taken - issued)[chosen])
        one.lat.extend((taken - start)[chosen])
    if len(start):
        stat.start_ns, stat.end_ns = int(start[0]), int(taken.max())
        in_flight = np.arange(1, len(start) + 1) - np.searchsorted(np.sort(taken), start)
        stat.depths = {int(depth): int(count) for depth, count in zip(*np.unique(in_flight, return_counts=True), strict=True)}
    stat.verified_ios = len(table) - len(start)
    stat.mismatch_count = int(table["wrong"].sum())
    for number in np.flatnonzero(table["wrong"])[:_MISMATCHES_KEPT].tolist():
        wrong, where = int(table["wrong"][number]), int(table["where"][number])
        stat.mismatches.append(
            f"offset {where << 9}: not what was written there last ({wrong} such sectors of the read at {ops[number, 1]})"
        )
    if not good.all():
        stat.error = errno.EIO
    elif stat.mismatch_count:
        stat.error = errno.EILSEQ


def guest_points(table: Any, times: dict[str, Any], context: int) -> list[LogEntry]:
    """The stamps as trace points of ``context``, by time.  A slot is what a tag is elsewhere: ``rq`` is the head of the chain."""
    points: list[LogEntry] = []
    heads, rang = table["head"].tolist(), table["rang"].tolist()
    rows = zip(*(times[name].tolist() for name in TIMES), heads, rang, strict=True)
    handled = 0
    for io, (start, published, issued, irq, taken, rq, kicked) in enumerate(rows, 1):
        points += [(start, context, (key, *args)) for key, *args in (("sys_enter_io_submit", io, 1), ("block_getrq", io, rq))]
        points += [(start, context, ("virtio_queue_rq", rq)), (published, context, ("virtqueue_add_sgs", rq, rq))]
        if kicked:
            points.append((published, context, ("vm_notify", 0)))
        points.append((issued, context, ("sys_exit_io_submit", io)))
        if irq > handled:
            handled = irq
            points += [(irq, context, ("vcpu:irq_handler_entry", GSI)), (irq, context, ("vm_interrupt",))]
        points += [(taken, context, ("virtqueue_get_buf", rq)), (taken, context, ("block_rq_complete", rq))]
        points += [(taken, context, ("block_bio_complete", io)), (taken, context, ("sys_exit_io_getevents", io, 1))]
    points.sort(key=lambda point: point[0])
    idle = [number for number, point in enumerate(points) if number and point[2][0] == "vcpu:irq_handler_entry"]
    for number in reversed(idle):  # it had nothing else to do since the point before
        points.insert(number, (points[number - 1][0], context, ("wait",)))
    return points
