"""A recipe whose guest side is machine code on a real vCPU: from the first request to the last no Python runs on the guest's side.

The driver's probe is done by the first payload's loads and stores, as on every KvmMachine.  Then the ring is handed over: the vCPU is
put to the bare payload's first instruction, and this thread serves its exits until the payload says that the list is done.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from ..errors import ConfigError, Stalled, VirtioError
from ..events import WAIT
from ..guest.verify import POOL_SECTORS, SECTOR
from ..kvm import bare_payload
from ..kvm import host as kvm_host
from ..kvm.bare import DEPTH_MOST, BareGuest, Requests
from ..kvm.bare_memory import BareMemory
from ..kvm.bare_payload import REQUEST, Ctl
from ..kvm.payload import PORT_DONE, REGISTERS_GPA, Mail
from ..kvm.vcpu import IoExit, MmioExit
from ..spec.virtio import Feature
from ..spec.virtio_blk import BlkFeature
from ..spec.virtio_mmio import Reg
from ..stats import JobStat
from ..trace.bare import fill_stat, fit_stamps, guest_points, host_times
from ..trace.run import Run
from ..transport import Mmio
from .base import Recipe, deferred_interrupt
from .kvm import KvmMachine, KvmVm
from .loop import KEPT_FIRST

__all__ = ["BareVm"]

_TICK_S = 0.1
_NOT_TAKEN = Feature.IN_ORDER | BlkFeature.ZONED
_SYNC = 3
_TAIL_NS = 1_000_000_000
_GUEST_STEPS = ("D1", "D2", "D3", "U6", "U7")


def _check(recipe: Recipe, machine: KvmMachine) -> None:
    """Refuse what the machine code cannot honour."""

    def refuse(what: str, remedy: str) -> None:
        raise ConfigError(f"{what} with BareGuest", remedy)

    if not isinstance(recipe.guest, BareGuest):
        raise ConfigError(f"guest={recipe.guest!r} on {machine!r}", "use guest=vb.BareGuest()")
    if not isinstance(recipe.transport, Mmio):
        refuse(f"transport={recipe.transport!r}", "its machine code drives virtio-mmio: use transport=vb.Mmio()")
    if recipe.queue.packed or getattr(recipe.queue, "in_order", False):
        refuse(f"queue={recipe.queue!r}", "its machine code has a split ring, used out of order: use queue=vb.Split()")
    jobs = getattr(recipe.app, "jobs", None)
    if jobs is None:
        refuse(f"app={recipe.app!r}", "give a job: app=vb.Fio(…)")
        return
    job = jobs[0]
    if recipe.app.clones != 1:
        refuse(f"{recipe.app.clones} tasks", "it runs one: give one job with numjobs=1")
    if job.trims:
        refuse(f"rw={job.rw}", "its machine code reads, writes and flushes: use another rw")
    if job.iodepth > DEPTH_MOST:
        refuse(f"iodepth={job.iodepth}", f"use 1 to {DEPTH_MOST}")
    if job.verify and job.max_bs > POOL_SECTORS * SECTOR:
        refuse(f"verify={job.verify} with blocks of {job.max_bs:,} bytes", f"use at most {POOL_SECTORS * SECTOR:,}")
    if recipe.app.segment_bytes is not None and recipe.app.segment_bytes < job.max_bs:
        refuse(f"segment_bytes={recipe.app.segment_bytes}", "a request has one data segment: leave it out")


def _nothing() -> Generator[Any, int, Any]:
    yield WAIT


class BareVm(KvmVm):
    """A booted recipe with a bare guest.  ``run()`` runs its list of requests to the end; ``requests`` is that list."""

    def __init__(self, machine: KvmMachine, recipe: Recipe) -> None:
        _check(recipe, machine)
        super().__init__(machine, recipe)

    def _take_over(self, kvm: Any, vcpus: int) -> None:
        super()._take_over(kvm, 1)
        notes = [note for note in self.notes if not note.startswith(("driver:", "interrupt:"))]
        self.notes[:] = [
            "guest: our driver's probe, by loads and stores of the vCPU; from the first request on machine code, without Python",
            "application, block layer, driver: one list of requests made from the job; none is merged, split or tried again",
            "interrupt: the machine code reads InterruptStatus and writes InterruptACK, each an exit to user space",
            *notes,
        ]

    def _build_guest(self, memory_fd: int, size: int) -> None:
        super()._build_guest(memory_fd, size)
        if not hasattr(self.driver, "allowed"):
            remedy = "its probe and features are used: derive it from vb.VirtioBlkDriver"
            raise ConfigError(f"driver={self.recipe.driver!r} with BareGuest", remedy)
        self.driver.allowed &= ~_NOT_TAKEN
        self.driver.max_queues = 1

    def _start_app(self) -> None:
        """Make the list, and hand the ring over to the machine code."""
        app, driver = self.recipe.app, self.driver
        job = app.jobs[0]
        app.check(job, self.iostack)
        if job.max_bs > (most := driver.limits.max_segment_bytes):
            remedy = "use a smaller bs: the bare guest splits nothing"
            raise ConfigError(f"blocks of {job.max_bs:,} bytes with BareGuest on a device whose size_max is {most:,}", remedy)
        self.requests = Requests(job, driver.capacity_sectors << 9)
        has, poll = driver.features, bool(driver.poll)
        indirect = bool(has & Feature.INDIRECT_DESC)
        self.bare = BareMemory(self.guest.vm.map_memory, self.pages, driver.queues[0].layout, self.requests, indirect=indirect)
        ctl = self.bare.ctl
        ctl[Ctl.EVENT_IDX] = int(bool(has & Feature.EVENT_IDX))
        ctl[Ctl.POLL], ctl[Ctl.SPIN] = int(poll), int(self._machine.idle == "poll")
        ctl[Ctl.BELL] = REGISTERS_GPA + Reg.QUEUE_NOTIFY
        self.stat = JobStat(job.name, 0, job.options())
        self.tasks = []
        self._lane = self.loop.add("bare guest", _nothing()).number  # its trace points have a name; nothing schedules it

        if (queues := len(self._fds.kicks)) > 1:
            self.notes.append(f"queues: the first of {queues} is used")

    def resize(self, size: int) -> None:
        """Refused: the list was made from the disk's size at boot."""
        raise ConfigError(f"resize to {size} bytes with BareGuest, whose list is made at boot", "give the disk that size in the recipe")

    @property
    def _machine(self) -> KvmMachine:
        assert isinstance(self.machine, KvmMachine)
        return self.machine

    # -- running -----------------------------------------------------------------------------------------------------------------

    def run(self, *, progress: Callable[[int, int | None], None] | None = None) -> Run:
        """Run to the end; Ctrl-C stops submitting, reaps what is in flight and returns what was measured so far."""
        self._check_open()
        try:
            self._trace_kernel()
            with self.guest.vcpu.owned():
                with deferred_interrupt() as check_interrupt:
                    interrupted = self._drive(check_interrupt, progress)
                self.guest.restart()
                self._finish_device()
            return self._bare_run(interrupted)
        finally:
            self.close()

    def _drive(self, check_interrupt: Callable[[], None], progress: Callable[[int, int | None], None] | None) -> bool:
        """Serve the vCPU's exits until the list is done; whether Ctrl-C cut it short."""
        vcpu, ctl, serve = self.guest.vcpu, self.bare.ctl, self.bus.serve
        limit_ns = self.requests.job.runtime_ns
        start = since = time.monotonic()
        end = start + limit_ns / 1e9 if limit_ns is not None else None
        interrupted, seen = False, 0
        bare_payload.start(vcpu)
        while True:
            self._main_loop.arm(_TICK_S if end is None else max(min(_TICK_S, end - time.monotonic()), 0.001))
            while (exit_ := vcpu.run()).__class__ is MmioExit:
                value = serve(exit_)
                if not exit_.write:
                    vcpu.answer(value)
            if exit_.__class__ is IoExit:
                if exit_.port == PORT_DONE:
                    break
                named = f"a used element names descriptor {ctl[Ctl.BROKEN]}"
                raise VirtioError(f"{named}, which is not the head of a buffer in flight", "2.7.8")
            try:
                check_interrupt()
            except KeyboardInterrupt:
                interrupted = True
                ctl[Ctl.STOP] = 1
            now, completed = time.monotonic(), ctl[Ctl.COMPLETED]
            if end is not None and now >= end:
                ctl[Ctl.STOP], end = 1, None
            if completed != seen:
                seen, since = completed, now
                if progress is not None:
                    progress(min(completed, self.requests.main), self.requests.main)
            self._look_after(now - since)
        if progress is not None:
            progress(min(ctl[Ctl.COMPLETED], self.requests.main), self.requests.main)
        return interrupted

    def _look_after(self, idle_s: float) -> None:
        """The vCPU was kicked: has the device's half something to say, or does the guest hang?"""
        while self._error is None and select.select([self._control], [], [], 0)[0]:
            self._from_device()
        if self._error is not None:
            raise self._error
        if idle_s > self.machine.stall_s:
            ctl = self.bare.ctl
            stopped = self.guest.vcpu.stopped("KVM_EXIT_INTR, kicked")
            hangs = f"nothing completed for {self.machine.stall_s:g} s, {ctl[Ctl.IN_FLIGHT]} I/Os are in flight"
            raise Stalled(
                f"the bare guest: {hangs}; {stopped.what}",
                "a kick, an interrupt or a buffer was lost, or the disk hangs; run the recipe on SimMachine and step()",
            )

    # -- the result --------------------------------------------------------------------------------------------------------------

    def _bare_run(self, interrupted: bool) -> Run:
        """The Run, out of the list as the guest left it and the device's log."""
        requests, ctl, driver = self.requests, self.bare.ctl, self.driver
        assert self._result is not None
        device_log, counters = self._result
        issued = (ctl[Ctl.NEXT] - self.bare.list_gpa) // REQUEST.itemsize
        table, ops, main = self.bare.table()[:issued], requests.ops[:issued], min(issued, requests.main)
        fit = self._fit = fit_stamps(table, self._clock, self._later, (device_log or [])[:KEPT_FIRST])
        times = host_times(table, self._clock, fit)
        fill_stat(self.stat, ops, table, times, main)
        if device_log and self.loop.log is not None:
            last_ns = device_log[KEPT_FIRST - 1][0] if len(device_log) > KEPT_FIRST else device_log[-1][0] + _TAIL_NS  # behind it are gaps
            seen = int(np.searchsorted(times["start"], last_ns))
            self.loop.log += guest_points(table[:seen], {name: at[:seen] for name, at in times.items()}, self._lane)
            self.loop.log = [entry for entry in self.loop.log if entry[0] <= last_ns]
            self._result = [entry for entry in device_log if entry[0] <= last_ns], counters
        if self.iolog is not None:
            log = zip(table["stamp"].tolist(), ops[:main].tolist(), strict=False)
            self.iolog += [(stamp, op, offset, length, 0) for stamp, (op, offset, length) in log if op < _SYNC]
        driver.kicks, driver.kick_decisions = int(table["rang"].sum()), ctl[Ctl.DECISIONS]
        driver.interrupts = self.guest.mail[Mail.TAKEN]
        run = self._run_of(interrupted)
        run.step_kinds = dict.fromkeys(_GUEST_STEPS, "emulated" if kvm_host.emulates() else "kernel/hardware")
        return run

    def _whole_ns(self) -> int | None:
        return None  # the log was cut where the device's is no longer whole

    def _jobs(self) -> list[JobStat]:
        return [self.stat]

    def _title(self) -> str:
        return super()._title().replace(" · ", ", bare guest · ", 1)

    def _idles(self) -> str:
        return "polls the used ring" if self.driver.poll else super()._idles()

    def _peers(self) -> dict[str, str]:
        return super()._peers() | {"guest clock": f"TSC of {self._clock.khz} kHz, {self._fit}"}
