"""A trace that another tool saved, as a Run: the block layer's steps for each I/O, and how long each exit kept a vCPU out of its guest.

Read are ftrace's text and ``trace-cmd report``, ``perf script``, and ``blkparse``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, TraceError
from ..events import EVENTS
from ..stats import Histogram, JobStat
from .blkparse import BLKPARSE_LINE, read_blkparse
from .blocks import Bio, Blocks
from .correlate import COLUMNS, Correlator
from .ftrace import Record, read_ftrace
from .kernel import kernel_points
from .perf_script import PERF_LINE, read_perf_script
from .run import Run, TraceEvent

__all__ = ["read_records", "read_trace"]

_TRACE_KEPT = 50_000
_SIDES = {"host": (5, 6, 9), "guest": (1, 2, 13)}
"""Where in a row (the numbers of STEPS) a bio is queued, its request issued, and completed."""
_LANES = {"kvm": "KVM", "guest-stack": "vCPU", "host-stack": "host", "host-driver": "host"}


def read_records(text: str) -> tuple[str, list[Record], int]:
    """Which tool wrote this, its records in the order of time, and how many it says were lost; TraceError names the line that is wrong."""
    lost = 0
    first = next((line for line in text.splitlines() if line.strip() and not line.startswith(("#", "cpus=", "version ="))), "")
    if BLKPARSE_LINE.match(first):
        kind, records = "blkparse", read_blkparse(text)
    elif PERF_LINE.match(first):
        kind, records = "perf script", read_perf_script(text)
    else:
        kind = "trace-cmd report" if text.lstrip().startswith(("cpus=", "version =")) else "ftrace"
        records, lost = read_ftrace(text)
    return kind, sorted(records, key=lambda record: record.t_ns), lost


def read_trace(path: str | Path, *, side: str = "host") -> Run:
    """A Run from a trace that was saved elsewhere: ftrace's text or ``trace-cmd report``, ``perf script``, or ``blkparse``.

    Each bio is an I/O: D6 is its time to the driver (blktrace's Q2D), D7 its time in driver and drive (D2C), and its latency Q2C. With
    ``side="guest"`` (recorded inside a guest) these are D2 and D3. ``run.exits`` has the time from each ``kvm_exit`` to ``kvm_entry``
    by reason, ``run.lanes()`` shows all points. Needed are ``block_rq_issue`` and ``block_rq_complete``, or kvm events. TraceError
    names the line that is no entry; ConfigError for another side.

    >>> run = vb.read_trace("trace.txt")                                                              # doctest: +SKIP
    >>> print(run.step_table(), run.exit_table())                                                     # doctest: +SKIP
    """
    if side not in _SIDES:
        raise ConfigError(f"side={side!r}", "a trace is from the 'host' or from a 'guest'")
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise TraceError(f"trace {str(path)!r} cannot be read: {error.strerror}", "give the path of a text file") from None
    kind, records, lost = read_records(text)
    blocks = Blocks(side == "guest")
    for record in records:
        blocks.read(record)
    done = [bio for bio in blocks.bios if bio.done]
    points = kernel_points(records)
    if not done and not points:
        raise TraceError(
            f"trace {str(path)!r} has {len(records):,} entries, but no whole block request and no event of KVM",
            "record block:block_rq_issue and block:block_rq_complete, or kvm:*",
        )
    correlator = Correlator()
    correlator.take([_row(bio, *_SIDES[side]) for bio in done])
    jobs = _jobs(done)
    counters: dict[str, int] = {}
    for record in records:
        counters[record.name] = counters.get(record.name, 0) + 1
    times = [record.t_ns for record in records]
    return Run(
        title=f"{Path(path).name} ({kind})",
        rung="L1 recorded",
        simulated=False,
        provenance={
            "machine": f"none: a saved trace of a {side}",
            "rung": "L1 recorded",
            "kvm": "as the trace says; its flavour is not in it",
            "tracing": f"{len(records):,} entries of {kind}, {lost:,} lost; {len(done):,} I/Os, "
            f"{blocks.unmatched:,} block events of no I/O",
            "host": "not in the trace",
        },
        recipe={},
        notes=_notes(done, side, len(blocks.bios) - len(done)),
        jobs=jobs,
        counters=counters,
        rows=correlator.rows,
        durations=[h if number in _SIDES[side][:2] else Histogram() for number, h in enumerate(correlator.durations)],
        duration_ns=times[-1] - times[0],
        trace=_trace(blocks, points),
        step_kinds=dict.fromkeys(
            ("D1", "D2", "D3", "D4", "D5", "D6", "D7", "HW", "U1", "U2", "U3", "U4", "U5", "U6", "U7"), "kernel/hardware"
        ),
    )


def _row(bio: Bio, queue: int, issue: int, complete: int) -> list[int]:
    row = [0] * COLUMNS
    row[0] = row[queue] = bio.queued or bio.issued
    row[issue], row[complete] = bio.issued, bio.done
    row[-1] = bio.done
    return row


def _jobs(done: Sequence[Bio]) -> list[JobStat]:
    """A job for each disk."""
    jobs: dict[str, JobStat] = {}
    for bio in done:
        job = jobs.setdefault(bio.dev, JobStat(f"disk {bio.dev}", len(jobs), {}))
        direction = {"R": job.read, "W": job.write}.get(bio.op, job.trim)
        begin = bio.queued or bio.issued
        direction.add(bio.count << 9, begin, begin, bio.done)
        job.start_ns = min(job.start_ns or begin, begin)
        job.end_ns = max(job.end_ns, bio.done)
    for job in jobs.values():
        for direction in (job.read, job.write, job.trim):
            direction.fold()
    return list(jobs.values())


def _notes(done: Sequence[Bio], side: str, left: int) -> list[str]:
    notes = []
    if done:
        first, second = ("D6", "D7") if side == "host" else ("D2", "D3")
        notes.append(
            f"{first} is Q2D, a bio's time to the driver; {second} is D2C, all of driver and drive; the trace says no more of them"
        )
    if any(not bio.queued for bio in done):
        notes.append("some I/Os begin with block_rq_issue: block_bio_queue was not recorded for them")
    if left:
        notes.append(f"{left:,} bios that the trace does not see complete are left out")
    return notes


def _trace(blocks: Blocks, points: Sequence[tuple[int, str, tuple[Any, ...]]]) -> list[TraceEvent]:
    events = [TraceEvent(t, context, "KVM", key, tuple(args)) for t, context, (key, *args) in points]
    events += [TraceEvent(t, f"CPU {cpu}", _LANES.get(EVENTS[key].room, "host"), key, numbers) for t, cpu, key, numbers in blocks.points]
    events.sort(key=lambda event: event.t_ns)
    return events[:_TRACE_KEPT]
