"""What a machine returns: counts, times per step and per request, the trace, and what it all was measured on."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ..events import EVENTS, STEPS
from ..spec.kvm_exit import reason_name
from ..stats import Histogram, JobStat

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["IN_KERNEL", "Run", "StepStat", "TraceEvent"]

IN_KERNEL = ", in the kernel"
"""How the name of a context ends that was seen by the host's kernel."""
_CONTEXT = 22


class TraceEvent(NamedTuple):
    """One recorded point: when, which context on which lane, its key and its ints.  Key ``wait``: the context goes idle.

    Printed it is one line of aligned columns, in which a long name of a context is cut.
    """

    t_ns: int
    context: str
    lane: str
    key: str
    args: tuple[int, ...]

    def __str__(self) -> str:
        event = EVENTS.get(self.key)
        names = event.args if event else ()
        args = " ".join(f"{name}={_number(name, value)}" for name, value in zip(names, self.args, strict=False))
        step = event.step if event else ""
        context = self.context.replace(IN_KERNEL, ", kernel")
        if len(context) > _CONTEXT:
            context = f"{context[: _CONTEXT - 1]}…"
        return f"{self.t_ns / 1000:12.3f} µs  {step:2}  {context:<{_CONTEXT}}  {self.key:<30} {args}".rstrip()


def _number(name: str, value: int) -> str:
    """Composite numbers as their two halves: queue:head, job:number."""
    if name in ("rq", "vq_head"):
        return f"{value >> 16}:{value & 0xFFFF}"
    if name == "io" and value >> 32:
        return f"{value >> 32}:{value & 0xFFFFFFFF}"
    if name == "reason":
        return reason_name(value)
    return hex(value) if name in ("offset", "address") else str(value)


@dataclass(frozen=True)
class StepStat:
    """Times of one step over all I/Os, in ns.  ``kind`` as in ``Run.kinds``."""

    step: str
    mean_ns: float
    p50_ns: int
    p90_ns: int
    p99_ns: int
    count: int
    kind: str


@dataclass
class Run:
    """One finished (or interrupted) run of a recipe on a machine.  Times are ns unless named otherwise.

    ``rows`` is int64 (n, 16): for a sample of I/Os the time at which each of ``STEPS`` begins, and the end.  ``split`` gives for
    live steps (kernel or hardware, python) mean ns; where it is known otherwise whose time a step is, ``step_kinds`` says it.  Counts
    depend on how many trace points a part has: ``provenance`` says so.
    """

    title: str
    rung: str
    simulated: bool
    provenance: dict[str, str]
    recipe: dict[str, str]
    notes: list[str]
    jobs: list[JobStat]
    counters: dict[str, int]
    rows: Any
    durations: list[Histogram]
    duration_ns: int
    trace: list[TraceEvent] | None = None
    split: dict[str, tuple[float, float]] = field(default_factory=dict)
    step_kinds: Mapping[str, str] = field(default_factory=dict)
    costs: Mapping[str, Any] | None = None
    interrupted: bool = False
    iolog: list[tuple[int, int, int, int, int]] | None = None

    @property
    def ios(self) -> int:
        """Reads, writes and trims that were completed."""
        return sum(one.ios for job in self.jobs for one in (job.read, job.write, job.trim))

    @property
    def bytes(self) -> int:
        """Bytes read, written and trimmed."""
        return sum(one.bytes for job in self.jobs for one in (job.read, job.write, job.trim))

    @property
    def iops(self) -> float:
        """Completed I/Os per second of machine time."""
        return self.ios * 1e9 / self.duration_ns if self.duration_ns else 0.0

    @property
    def errors(self) -> int:
        """I/Os that ended with an error."""
        return sum(one.errors for job in self.jobs for one in (job.read, job.write, job.trim, job.sync))

    @property
    def mismatches(self) -> int:
        """Sectors in which ``verify`` found other bytes than were written."""
        return sum(job.mismatch_count for job in self.jobs)

    @property
    def clat(self) -> Histogram:
        """Completion latency of all reads, writes and trims."""
        total = Histogram()
        for job in self.jobs:
            for one in (job.read, job.write, job.trim):
                total.merge(one.clat)
        return total

    @property
    def kinds(self) -> dict[str, str]:
        """What each step's time is: simulated, python, kernel/hardware or mixed; qemu (its own code); emulated (a guest whose CPU is)."""
        if self.simulated:
            return {step.name: "simulated" for step in STEPS}
        kinds = {}
        for step in STEPS:
            hard, soft = self.split.get(step.name, (0.0, 1.0))
            kinds[step.name] = "kernel/hardware" if not soft else "python" if not hard else "mixed"
        return kinds | dict(self.step_kinds)

    @property
    def steps(self) -> list[StepStat]:
        """Statistics per step, in the order of the path."""
        kinds = self.kinds
        return [
            StepStat(step.name, h.mean_ns, h.percentile(50), h.percentile(90), h.percentile(99), h.count, kinds[step.name])
            for step, h in zip(STEPS, self.durations, strict=True)
        ]

    @property
    def exits(self) -> dict[str, Histogram]:
        """From the kernel's own points in the trace: the time from ``kvm_exit`` to the same thread's ``kvm_entry``, by reason."""
        left: dict[str, TraceEvent] = {}
        found: dict[str, Histogram] = {}
        for event in self.trace or ():
            if event.key == "kvm_exit" and len(event.args) > 1:
                left[event.context] = event
            elif event.key == "kvm_entry" and (exit_ := left.pop(event.context, None)) is not None:
                found.setdefault(reason_name(exit_.args[1]), Histogram()).add(event.t_ns - exit_.t_ns)
        return dict(sorted(found.items(), key=lambda item: -item[1].count))

    def request(self, io: int) -> list[TraceEvent]:
        """The trace points of one I/O, from its submission to when the application has it; ``for point in run.request(7): print(point)``.

        The doorbell, the interrupt and what belongs to them are shared with other I/Os.  ConfigError if the trace does not hold it whole.
        """
        from .request import points_of

        return points_of(self.trace or (), io)

    # -- pictures (plotly is imported when one is asked for) -------------------------------------------------------------

    def path_map(self, *others: Run, **options: Any) -> Any:
        """The seven rooms, down and up, each arrow with its time."""
        from ..view import path_map

        return path_map(self, *others, **options)

    def waterfall(self, *others: Run, **options: Any) -> Any:
        """The steps of one request (``request=7``) or of percentiles, as bars on a time axis."""
        from ..view import waterfall

        return waterfall(self, *others, **options)

    def lanes(self, **options: Any) -> Any:
        """Swim lanes over time: vCPU, KVM, iothread, main loop, host, disk."""
        from ..view import lanes

        return lanes(self, **options)

    def latency(self, *others: Run, **options: Any) -> Any:
        """The distribution of completion latency."""
        from ..view import latency

        return latency(self, *others, **options)

    def compare(self, *others: Run, **options: Any) -> Any:
        """This run and others step by step on one axis: two recipes, or model and measurement."""
        from ..view import compare

        return compare(self, *others, **options)

    def export(self, figure: Any, path: str | Path) -> Any:
        """Write a figure of this run with its data and caption."""
        from ..view import export

        return export(figure, path, run=self)

    def fio_json(self) -> dict[str, Any]:
        """The results in the layout of ``fio --output-format=json+``."""
        from .fio_json import fio_json

        return fio_json(self)

    # -- text ------------------------------------------------------------------------------------------------------------

    def summary(self) -> str:
        """A few lines for a terminal."""
        clat = self.clat
        state = ", interrupted" if self.interrupted else ""
        lines = [
            f"{self.title} [{self.rung}{state}]",
            f"  {self.ios:,} I/Os, {self.bytes / 2**20:,.1f} MiB in {self.duration_ns / 1e6:,.3f} "
            f"{'simulated ' if self.simulated else ''}ms = {self.iops:,.0f} IOPS",
            f"  completion latency µs: mean {clat.mean_ns / 1e3:.2f}  p50 {clat.percentile(50) / 1e3:.2f}  "
            f"p99 {clat.percentile(99) / 1e3:.2f}  max {clat.max_ns / 1e3:.2f}",
            *([f"  {words}"] if (words := _counters_line(self.counters)) else []),
        ]
        if self.errors or self.mismatches:
            lines.append(f"  {self.errors} I/O errors, {self.mismatches} sectors differ from what was written")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def step_table(self) -> str:
        """The steps with their times, for a terminal."""
        lines = [f"{'step':4}  {'mean µs':>9}  {'p50':>9}  {'p99':>9}  from → to"]
        for stat, step in zip(self.steps, STEPS, strict=True):
            if stat.count:
                lines.append(
                    f"{step.name:4}  {stat.mean_ns / 1e3:9.2f}  {stat.p50_ns / 1e3:9.2f}  {stat.p99_ns / 1e3:9.2f}  "
                    f"{step.source} → {step.target}  [{stat.kind}]"
                )
        return "\n".join(lines)

    def exit_table(self) -> str:
        """How long each reason kept a vCPU out of its guest, for a terminal; says so where the trace has no kvm_exit."""
        exits = self.exits
        if not exits:
            return "no kvm_exit with its kvm_entry in the trace"
        lines = [f"{'exit reason':24}  {'count':>7}  {'mean µs':>9}  {'p50':>9}  {'p99':>9}"]
        for reason, h in exits.items():
            times = f"{h.mean_ns / 1e3:9.2f}  {h.percentile(50) / 1e3:9.2f}  {h.percentile(99) / 1e3:9.2f}"
            lines.append(f"{reason:24}  {h.count:7,}  {times}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.summary())}</pre>"


def _counters_line(counters: Mapping[str, int]) -> str:
    names = (
        "kicks",
        "kicks_suppressed",
        "mmio_exits",
        "interrupts",
        "interrupts_suppressed",
        "backmerges",
        "frontmerges",
        "splits",
        "requeues",
    )
    return ", ".join(
        f"{name.replace('_', ' ')} {counters[name]:,}"
        for name in names
        if name in counters and (counters[name] or name in ("kicks", "interrupts"))
    )
