"""``vb.calibrate()``: what the simulator's costs are on this machine, measured now.

Two kinds of measurement, and neither runs a job that is predicted from it:

- **Single parts in a loop** (``micro``): system call, eventfd, context switch, preadv and, with KVM, exits and interrupts of a vCPU that
  runs KvmMachine's payload without rings.
- **Trace points of live runs** (``insitu``): what each costs on LiveMachine and on KvmMachine, which is mostly Python.  The runs are
  a job of their own: random reads and writes, mixed, of 3 KiB and of 24 KiB, at queue depth 1.

What stays published or modelled keeps its kind in the table, so that a figure says so.
"""

from __future__ import annotations

import copy
import datetime
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..disk import ImageFile, Ram
from ..errors import ConfigError, NotHere
from ..guest.fio import Fio
from ..kvm import Kvm
from ..kvm import host as kvm_host
from ..kvm.wiring import KICKS
from ..machine import micro
from ..machine.base import host_provenance
from ..machine.costs import Cost, CostTable
from ..machine.insitu import Points, cost_of
from ..machine.kvm import KvmMachine
from ..machine.like import STORES, Shape, shape_of
from ..machine.live import LiveMachine, live_missing
from ..pipeline import Pipeline

__all__ = ["Calibration", "bar", "calibrate", "kept_apart", "other_kick", "sizes_beside"]

Progress = Callable[[int, int | None], None]
_PART_IOS = 500
_SCRATCH_BYTES = 16 << 20


def calibrate(
    machine: Any = None, *, seconds: float = 20.0, folder: str | Path | None = None, progress: Progress | bool = True
) -> CostTable:
    """Measure this machine and return a CostTable for ``SimMachine(costs=table)`` and ``SimMachine(costs=table, like=machine)``.

    ``machine`` is a LiveMachine or KvmMachine whose rows are wanted; None measures both, where they work.  ``seconds`` is how long it
    may take, about: with less there are fewer samples, never other ones.  ``folder`` is where reads are measured (default: the
    temporary folder); the file is removed.  ``progress`` is a bar (True), nothing (False) or a function of (done, total).

    Every measured row is a median of ``n`` samples with its quartiles, in ns.  The process keeps to two CPUs meanwhile, one for
    each side, because a wake-up on the same CPU is another thing.  Without KVM its rows stay published, and ``about["kvm"]`` says
    what is missing.  Raises NotHere where not even the live machine works; Ctrl-C ends it cleanly.
    """
    missing = live_missing()
    if missing:
        raise NotHere(missing)
    if not seconds > 0:
        raise ConfigError(f"calibrate seconds={seconds!r}", "give a positive number")
    machines = _machines() if machine is None else [kept_apart(machine)]
    calibration = Calibration(folder)
    work = _plan(calibration, machines)
    end = time.monotonic() + seconds
    with bar(progress, len(work)) as tick:
        for number, part in enumerate(work):
            share = (end - time.monotonic()) / (len(work) - number)
            part(max(min(share / _PART_S, 1.0), _LEAST))
            tick(number + 1, len(work))
    return calibration.table()


_PART_S, _LEAST = 1.0, 0.1
"""What a part takes at its full number of samples, about; and the least share of it."""


def _machines() -> list[Any]:
    return [kept_apart(kind()) for kind in (LiveMachine, *([KvmMachine] if kvm_host.found()[0] else []))]


def kept_apart(machine: Any) -> Any:
    """The machine with its two sides on a CPU each, as it says or on two of this process's.

    Raises ConfigError for a machine that is not modelled or not traced, NotHere for one that this host does not have.
    """
    shape = shape_of(machine)
    missing = live_missing()
    works, why, gain = kvm_host.found() if shape.kvm else (True, "", "")
    if missing or not works:
        raise NotHere(missing or why, gain)
    if not machine.trace:
        raise ConfigError(f"{machine!r} with trace=False", "the steps of a run are its trace points: use trace=True")
    machine = copy.copy(machine)
    machine.cpus = machine.cpus or micro.two_cpus()
    return machine


def _plan(calibration: Calibration, machines: list[Any]) -> list[Callable[[float], None]]:
    """Every part of the whole work, as a function of the share of samples."""
    work: list[Callable[[float], None]] = [calibration.loops, calibration.reads]
    shapes = [(machine, shape_of(machine)) for machine in machines]
    if kvm_host.found()[0]:
        work.append(calibration.crossings)
    for machine, shape in shapes:
        for number, store in enumerate(STORES):
            kvm = Kvm(kick=KICKS[number % 2])
            for size in (8192, 24576) if store == "direct" else (3072, 24576):
                work.append(partial(calibration.live, machine, shape, store, kvm, size))
    return work


class Calibration:
    """Measurements on their way into a table; each method adds samples, and may be called again."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder
        self.samples: dict[str, list[float]] = {}
        self.sources: dict[str, str] = {}
        self.points: dict[Shape, Points] = {}
        self.stores: dict[tuple[Shape, str], Points] = {}
        self.jobs: dict[Shape, dict[str, None]] = {}
        self.machines: dict[Shape, str] = {}
        self.remarks: list[str] = []
        self.load = os.getloadavg()[0]
        self.started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")

    def _add(self, key: str, samples: list[float], source: str) -> None:
        self.samples.setdefault(key, []).extend(samples)
        self.sources[key] = source

    # -- single parts ----------------------------------------------------------------------------------------------------------

    def loops(self, share: float = 1.0) -> None:
        """System call, eventfds, context switch, copying."""
        n = max(round(300 * share), 30)
        self._add("syscall", micro.syscalls(n), "getppid() in a loop")
        self._add("eventfd:same-thread", micro.eventfd_same_thread(n), "write and read of an eventfd in a loop")
        self._add(
            "eventfd:other-thread", micro.thread_wakes(n), "from the write until another Python thread is awake and has the global lock"
        )
        self._peer(n)
        self._add(
            "context-switch", micro.switches(n), "half an eventfd round trip of two processes on one CPU, with its write, read and poll"
        )
        self._add("copy:128k", micro.copies(n), "copying 128 KiB between two mappings")

    def _peer(self, n: int) -> None:
        cpus = micro.two_cpus()
        found = micro.peer_turns(cpus, n)
        where = "two processes, a CPU each" if cpus else "two processes on one CPU"
        self._add("eventfd:write", found["write"], f"{where}: an eventfd's write that wakes the other")
        self._add("eventfd:other-process", found["there"], f"{where}: from the write until the other is awake")

    def crossings(self, share: float = 1.0) -> None:
        """Exits and interrupts of a vCPU."""
        n = max(round(300 * share), 30)
        if "eventfd:other-process" not in self.samples:
            self._peer(n)
        what = f"a vCPU of {kvm_host.flavour()} with KvmMachine's payload, without rings"
        for key, samples in micro.crossings(micro.two_cpus(), n).items():
            self._add(key, samples, what)

    def reads(self, share: float = 1.0) -> None:
        """preadv of 4 KiB, behind the page cache and past it."""
        n = max(round(300 * share), 30)
        for store, direct in (("cached", False), ("direct", True)):
            try:
                self._add(f"preadv:{store}", micro.preads(self.folder, direct, n), "preadv of 4 KiB at random places of a file in a loop")
            except OSError as error:
                self._remark(f"preadv:{store} not measured: {error.strerror}")

    def _remark(self, text: str) -> None:
        if text not in self.remarks:
            self.remarks.append(text)

    # -- live runs -------------------------------------------------------------------------------------------------------------

    def live(self, machine: Any, shape: Shape, store: str, kvm: Kvm, size: int, share: float = 1.0, *, recipe: Any = None) -> None:
        """One run of the calibration's own job with this wiring, store and block size; ``recipe`` gives the other parts."""
        app = Fio(rw="randrw", bs=size, number_ios=max(round(_PART_IOS * share), 60), name="calibration")
        with ExitStack() as stack:
            try:
                disk = _scratch(stack, store, self.folder)
            except OSError as error:
                self._remark(f"store:{store} not measured: {error.strerror}")
                return
            vm = (recipe or Pipeline()).replace(app=app, kvm=kvm, disk=disk).boot(machine)
            if vm.run().interrupted:
                raise KeyboardInterrupt
            log = vm.log()
        for kept in (self.points.setdefault(shape, Points()), self.stores.setdefault((shape, store), Points())):
            kept.add(log)
        self.jobs.setdefault(shape, {})[f"{kvm.kick}, {store}, {size} bytes"] = None
        self.machines[shape] = repr(machine)

    def _job(self, shape: Shape) -> str:
        return f"{self.machines[shape]}, randrw at iodepth 1 ({'; '.join(self.jobs[shape])})"

    # -- the result ------------------------------------------------------------------------------------------------------------

    def table(self) -> CostTable:
        """Everything that was measured, over the published table."""
        costs = dict(CostTable.load())
        own = {key: cost_of(samples, self.sources[key]) for key, samples in self.samples.items()}
        for shape, points in self.points.items():
            mine = points.rows(self._job(shape), kvm=shape.kvm, crossed=_doorbell(own) if shape.kvm else {})
            costs |= {f"{shape.rows}/{key}": cost for key, cost in mine.items()}
        for (shape, store), points in self.stores.items():
            costs |= {f"{shape.rows}/store:{store}:{key}": cost for key, cost in points.store(self.machines[shape]).items()}
        return CostTable(f"measured on {platform.node() or 'this machine'}", costs | own | _simulators(own), self._about())

    def _about(self) -> dict[str, str]:
        host = host_provenance()
        works, why, gain = kvm_host.found()
        about = {name: host[name] for name in ("host", "cpu", "kernel", "python", "vblklab version")}
        about["kvm"] = why if works else f"{why}: its rows stay published; to gain it: {gain}"
        about["date"] = self.started
        about["load"] = f"load average {self.load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end"
        cpus = micro.two_cpus()
        about["CPUs"] = f"one side kept to CPU {cpus[0]}, the other to {cpus[1]}" if cpus else "one CPU for both sides"
        about |= {f"runs {shape.rows}": self._job(shape) for shape in self.jobs}
        if self.remarks:
            about["remarks"] = "; ".join(self.remarks)
        return about


def _scratch(stack: ExitStack, store: str, folder: str | Path | None) -> Any:
    if store == "ram":
        return Ram(_SCRATCH_BYTES)
    fd, name = tempfile.mkstemp(prefix="vblklab-calibration-", suffix=".img", dir=folder)
    stack.callback(os.unlink, name)
    with open(fd, "wb") as file:
        file.write(bytes(_SCRATCH_BYTES))
        os.fsync(file.fileno())
    if store == "direct":
        os.close(os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))
    return ImageFile(name, cache="none" if store == "direct" else "writeback")


def _doorbell(own: dict[str, Cost]) -> dict[str, Cost]:
    """The doorbell of KvmMachine up to the moment at which the device's thread is woken, out of loops."""
    wake = own["eventfd:other-process"].ns
    fast, left = (max(own[f"kick:{name}"].ns - wake, 0.0) for name in ("ioeventfd", "mmio-exit"))
    common = min(fast, left)
    n = own["kick:ioeventfd"].n

    def row(ns: float, source: str) -> Cost:
        return Cost(ns, source, "measured", ns, ns, n)

    after = max(own["ring:ioeventfd"].ns - fast, 0.0)
    return {
        "kvm_exit": row(common, "kick:… less eventfd:other-process: from the driver's call into the payload to the signal"),
        "kvm_fast_mmio": row(fast - common, "what the ioeventfd takes longer than the exit to user space"),
        "kvm_mmio": _in("kvm_userspace_exit"),
        "kvm_userspace_exit": row(left - common, "what the exit to user space takes longer than the ioeventfd"),
        "kvm_entry": row(after, "ring:ioeventfd less the way to the signal: until the driver goes on"),
    }


def _in(key: str) -> Cost:
    return Cost(0.0, f"in {key}", "model")


def _simulators(own: dict[str, Cost]) -> dict[str, Cost]:
    """The simulator's own rows, of QEMU's shape, as far as they were measured: kernel and hardware, no Python of this package."""
    rows: dict[str, Cost] = {}

    def put(key: str, name: str, words: str, share: float = 1.0, less: str | None = None) -> None:
        if name in own:
            one, other = own[name], own[less].ns if less is not None else 0.0
            values = [max(ns * share - other, 0.0) for ns in (one.ns, one.p25, one.p75)]
            rows[key] = Cost(values[0], f"{words}: {one.source}", "measured", values[1], values[2], one.n)

    put("virtio_queue_notify", "eventfd:same-thread", "half the row eventfd:same-thread, the read", 0.5)
    put("virtio_notify_irqfd", "eventfd:same-thread", "half the row eventfd:same-thread, the write", 0.5)
    put("virtio_notify", "eventfd:same-thread", "half the row eventfd:same-thread, the write", 0.5)
    put("wake:device", "eventfd:other-process", "the row eventfd:other-process")
    put("wake:task", "context-switch", "the row context-switch")
    put("kvm_exit", "ioeventfd", "half the row ioeventfd, an exit that the kernel answers", 0.5)
    put("kvm_entry", "ioeventfd", "the other half", 0.5)
    put("kvm_userspace_exit", "mmio-exit", "the row mmio-exit less the row ioeventfd", less="ioeventfd")
    put("wake:vcpu-idle", "irqfd", "the row irqfd")
    if "ioeventfd" in own:
        rows["kvm_fast_mmio"] = Cost(0.0, "in kvm_exit and kvm_entry", "model")
        rows["kvm_mmio"] = _in("kvm_userspace_exit")
    if "copy:128k" in own:
        one = own["copy:128k"]
        speed, low, high = ((1 << 17) * 1e3 / ns for ns in (one.ns, one.p75, one.p25))
        rows["ram:bytes_per_us"] = Cost(speed, f"the row copy:128k: {one.source}", "measured", low, high, one.n)
    return rows


@contextmanager
def bar(progress: Progress | bool, total: int) -> Iterator[Progress]:
    """``progress`` as a function: a bar, nothing, or what was given."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda done, total: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="calibrating", bar_format="{desc} |{bar}| {n_fmt} of {total_fmt} parts", leave=False, delay=0.5) as shown:
        yield lambda done, total: shown.update(done - shown.n)


def sizes_beside(app: Any, store: str) -> tuple[int, int]:
    """Two block sizes around a job's own, none of which is one of them."""
    sizes = {size for job in app.jobs for size in job.block_sizes}
    unit = 4096 if store == "direct" else 512
    short = max(min(sizes) * 3 // 4 // unit * unit, unit)
    long = (max(sizes) * 3 // 2 // unit + 1) * unit
    while short in sizes:
        short += unit
    while long in sizes or long <= short:
        long += unit
    return short, long


def other_kick(kvm: Kvm) -> Kvm:
    """The same wiring with the other kick."""
    return Kvm(kick=next(kick for kick in KICKS if kick != kvm.kick), call=kvm.call, vcpus=kvm.vcpus)
