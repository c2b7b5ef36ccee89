"""LiveMachine: the same driver and device on measured time, over shared memory, eventfds and real file I/O.  Rung L2."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DeviceDied, NotHere, Stalled, VblkError
from ..guest.fio import FioTask
from ..kvm import NO_ROOM, check_wire, vectors_of
from ..memory import GuestMemory, GuestPages
from ..peer.process import wait_or_kill
from ..peer.tracefs import tracing_missing
from ..stats import JobStat
from ..trace.kernel import Kernel, join_kernel
from ..trace.run import Run
from ..transport import MmioTransport, Pci, PciTransport
from .base import Recipe, build_run, default_vcpus, deferred_interrupt, fresh, fresh_device, memory_bytes, not_simulated, real_engine
from .kernel_trace import RunTrace
from .live_bus import LiveBus, LivePciBus, SharedInterruptStatus, interrupts, messages
from .live_device import (
    Fds,
    Setup,
    device_died,
    device_main,
    fence,
    recv_message,
    send_message,
    shared,
    short_turns,
    start_child,
)
from .live_log import LiveLog, probe_cost_ns
from .live_recording import LiveRecording
from .loop import KEPT_FIRST, KEPT_MOST, LiveLoop, LogEntry

__all__ = ["LiveMachine", "LiveVm", "check_cpus", "live_missing"]

Steps = Generator[Any, int, Any]
_TICK_S = 0.2
_START_S = 60.0


def check_cpus(cpus: tuple[int, int]) -> None:
    """ConfigError unless these are two CPUs that this process may use; one may be named twice."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if not isinstance(cpus, tuple) or len(cpus) != 2 or not set(cpus) <= allowed:
        raise ConfigError(
            f"cpus={cpus!r}", f"give the driver's and the device's, of {', '.join(map(str, sorted(allowed))) or 'a Linux host'}"
        )


def live_missing() -> str:
    """What this machine lacks for the live rung, or nothing."""
    if sys.platform != "linux":
        return f"the live machine needs Linux (this is {sys.platform}); SimMachine, rung L0, works here"
    if not hasattr(os, "eventfd") or not hasattr(os, "memfd_create"):
        return "this Python was built without eventfd or memfd_create; SimMachine, rung L0, works here"
    return ""


class LiveMachine:
    """Runs recipes for real: driver and device in two processes (``device="process"``) or two threads (``"thread"``).

    ``poll_us`` lets the device look for work that long before it sleeps (QEMU: poll-max-ns); ``stall_s`` is how long no I/O may
    complete before the run is given up.  ``trace=False`` measures without logging trace points, and lets a device whose steps
    are as they were written take the batch path; ``fast`` "auto" compiles that path's loop if numba is there, "off" does not.
    ``cpus=(0, 1)`` keeps the driver's thread to the first CPU and the device's to the second while the machine lives.

    ``kernel_trace=True`` records the host kernel's own events of the run beside it, as root, in a trace instance of its own: the points
    of steps that are the kernel's then carry its clock.  It costs some 0.2 µs an event.
    """

    def __init__(
        self,
        *,
        device: str = "process",
        poll_us: float = 0,
        trace: bool = True,
        stall_s: float = 20.0,
        iolog: bool = False,
        fast: str = "auto",
        cpus: tuple[int, int] | None = None,
        kernel_trace: bool = False,
    ) -> None:
        if device not in ("process", "thread"):
            raise ConfigError(f"LiveMachine device={device!r}", "choose 'process' or 'thread'")
        if poll_us < 0 or stall_s <= 0:
            raise ConfigError(f"LiveMachine poll_us={poll_us}, stall_s={stall_s}", "poll_us is 0 or more, stall_s above 0")
        if fast not in ("auto", "off"):
            raise ConfigError(f"LiveMachine fast={fast!r}", "choose 'auto' or 'off'")
        if cpus is not None:
            check_cpus(cpus)
        if kernel_trace and not trace:
            raise ConfigError("kernel_trace=True, trace=False", "the kernel's points are put into the machine's trace: leave trace on")
        self.device = device
        self.cpus = cpus
        self.fast = fast
        self.kernel_trace = kernel_trace
        self.poll_us = poll_us
        self.trace = trace
        self.stall_s = stall_s
        self.iolog = iolog

    def __repr__(self) -> str:
        more = f", poll_us={self.poll_us:g}" if self.poll_us else ""
        more += f", cpus={self.cpus}" if self.cpus else ""
        more += ", kernel_trace=True" if self.kernel_trace else ""
        return f"LiveMachine(device={self.device!r}{more})"

    def boot(self, recipe: Recipe) -> LiveVm:
        """Start the device's half, let the driver probe it, and stand before the first I/O."""
        missing = live_missing()
        if missing:
            raise NotHere(missing)
        self.check_tracing()
        return LiveVm(self, recipe)

    def check_tracing(self) -> None:
        """NotHere, with the remedy, if the kernel is to be traced and cannot be."""
        what, remedy = tracing_missing() if self.kernel_trace else ("", "")
        if what:
            raise NotHere(what, f"{remedy}; the run works without kernel_trace")


class LiveVm:
    """A booted live recipe.  ``run()`` runs it to its end."""

    RUNG = "L2 live"

    def __init__(self, machine: LiveMachine, recipe: Recipe) -> None:
        self.machine = machine
        self.recipe = recipe
        self.notes: list[str] = []
        self._closers: list[Callable[[], None]] = []
        self._closed = False
        self._child: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._result: tuple[list[LogEntry] | None, dict[str, int]] | None = None
        self._kernel_trace: RunTrace | None = None
        self._kernel: Kernel | None = None
        self._run: Run | None = None
        try:
            self._keep_to_cpus()
            self._build()
            self._boot()
        except BaseException:
            self.close()
            raise

    def explain(self) -> list[str]:
        """The path that the device's requests take; for the plain path each reason for it."""
        return list(self._explanation)

    # -- building --------------------------------------------------------------------------------------------------------

    def _keep_to_cpus(self) -> None:
        """This thread, and the threads that it starts, to the first of the machine's CPUs."""
        if self.machine.cpus is not None:
            before = os.sched_getaffinity(0)
            self._closers.append(lambda: os.sched_setaffinity(0, before))
            os.sched_setaffinity(0, {self.machine.cpus[0]})

    def _build(self) -> None:
        recipe, machine = self.recipe, self.machine
        kvm = recipe.kvm
        vcpus = default_vcpus(recipe)
        device = fresh_device(recipe, vcpus)
        engine = real_engine(recipe)
        check_wire(kvm, recipe.transport)
        if device.notification_data:
            raise ConfigError(f"device notification_data=True on {machine!r}", NO_ROOM)
        self._take_over(kvm, vcpus)
        size = memory_bytes(recipe, device.num_queues, device.seg_max, recipe.queue.size)
        fds, mmio, self._control = self._open_fds(size, device.num_queues, self._messages(device.num_queues))
        self._words = shared(fds.words, 4096)
        self._build_guest(fds.memory, size)
        setup = Setup(
            device,
            engine,
            recipe.disk,
            size,
            fds,
            machine.trace,
            int(machine.poll_us * 1000),
            machine.fast,
            not hasattr(recipe.disk, "path"),
            recipe.transport,
            vectors_of(kvm, recipe.transport),
            self._irqfd(),
        )
        self._start_device(setup)
        self._connect(mmio, fds, SharedInterruptStatus(self._words.cast("I")))
        self.driver.attach(self.pages, self.transport, self.iostack, queue_size=recipe.queue.size, packed=recipe.queue.packed)
        self.loop.watch(self._control.fileno(), self._from_device)

    def _irqfd(self) -> bool:
        """Whether the eventfds that the device writes are the interrupt itself, or somebody's who raises it."""
        return True

    def _make_loop(self) -> LiveLoop:
        return LiveLoop("guest:epoll_wait", trace=self.machine.trace)

    def _messages(self, queues: int) -> int:
        """How many MSI-X vectors the driver can use at most."""
        if not isinstance(self.recipe.transport, Pci):
            return 0
        vectors = vectors_of(self.recipe.kvm, self.recipe.transport)
        return queues + 1 if vectors is None else min(vectors, queues + 1)

    def _connect(self, mmio: socket.socket, fds: Fds, status: SharedInterruptStatus) -> None:
        """The driver's transport, and its interrupt contexts: one for the line and one for each vector."""
        self.bus: LiveBus | LivePciBus
        self.transport: MmioTransport | PciTransport
        if isinstance(self.recipe.transport, Pci):
            self.bus = LivePciBus(mmio, fds.kicks, self._dead)
            self.transport = PciTransport(self.bus)
            self._watch("guest irq", fds.calls[0], messages(self.driver.interrupt))
            for vector, call in enumerate(fds.calls[1:]):
                self._watch(f"guest irq {vector}", call, messages(partial(self.driver.interrupt, vector)))
        else:
            self.bus = LiveBus(mmio, fds.kicks, status, self._dead)
            self.transport = MmioTransport(self.bus)
            self._watch("guest irq", fds.calls[0], interrupts(self.driver.interrupt, status))

    def _watch(self, name: str, fd: int, context: Steps) -> None:
        self.loop.watch_eventfd(fd, self.loop.add(name, context).notify)

    def _build_guest(self, memory_fd: int, size: int) -> None:
        """Our guest but for its transport: memory, a loop, driver and block layer."""
        self.memory = GuestMemory(shared(memory_fd, size), fence=fence)
        self.pages = GuestPages(self.memory, 0x1000)
        self.loop = self._make_loop()
        self._closers.append(self.loop.close)
        self.driver = fresh(self.recipe.driver)
        self.iostack = fresh(self.recipe.iostack)

    def _take_over(self, kvm: Any, vcpus: int) -> None:
        """Say what a live machine does in its own way; refuse nothing silently."""
        notes = self.notes
        kick = "a doorbell exit" if kvm.kick == "mmio-exit" else "an ioeventfd"
        notes.append(f"kick: the driver writes an eventfd in place of {kick}; this machine has no trap")
        pci = isinstance(self.recipe.transport, Pci)
        what = {"intx": "the line", "irqfd": "the irqfd", "msi": "the main loop's message"}[kvm.call]
        each = ", one for each vector" if pci and kvm.call != "intx" else ""
        notes.append(f"call: the device writes an eventfd{each} in place of {what}; nothing is injected")
        kept = "" if pci else "; InterruptStatus lies in shared memory"
        notes.append(f"registers: accesses travel over a socket{kept}")
        if vcpus > 1:
            notes.append(f"vCPUs: the tasks of {vcpus} vCPUs share one thread; an interrupt is taken when the tasks wait")
        notes += not_simulated(self.recipe)
        if self.machine.device == "thread":
            notes.append("threads: kick and call include the hand-over of Python's global lock; use device='process' for wake-up times")

    def _open_fds(self, size: int, queues: int, messages: int) -> tuple[Fds, socket.socket, socket.socket]:
        def own(fd: int) -> int:
            self._closers.append(lambda: os.close(fd))
            return fd

        memory = own(os.memfd_create("vblklab-guest"))
        os.ftruncate(memory, size)
        words = own(os.memfd_create("vblklab-words"))
        os.ftruncate(words, 4096)
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        kicks = tuple(own(os.eventfd(0, flags)) for _ in range(queues))
        calls = tuple(own(os.eventfd(0, flags)) for _ in range(1 + messages))
        mmio, mmio_device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control, control_device = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        mmio.settimeout(self.machine.stall_s)
        self._closers += [mmio.close, control.close]
        self._device_ends = [mmio_device, control_device]
        self._closers.append(self._close_device_ends)
        return Fds(memory, words, kicks, calls, mmio_device.fileno(), control_device.fileno()), mmio, control

    def _close_device_ends(self) -> None:
        for end in self._device_ends:
            end.close()
        self._device_ends = []

    def _start_device(self, setup: Setup) -> None:
        if self.machine.device == "thread":
            self._closers.append(short_turns())
            self._thread = threading.Thread(target=device_main, args=(setup,), name="vblklab device", daemon=True)
            self._thread.start()
            number = self._thread.native_id
        else:
            self._start_process(setup)
            number = self._child.pid if self._child is not None else None
        if self.machine.cpus is not None and number is not None:
            os.sched_setaffinity(number, {self.machine.cpus[1]})
        self._control.settimeout(max(_START_S, self.machine.stall_s))
        message = self._receive()
        self._control.settimeout(self.machine.stall_s)
        if message[0] != "ready":
            raise VblkError(f"the device's half answered {message[0]!r}")
        self._explanation: list[str] = message[3]

    def _start_process(self, setup: Setup) -> None:
        fds = setup.fds
        self._child = start_child(
            "vblklab.machine.live_device",
            self._control,
            fds.control,
            setup,
            fds.all(),
            what="the device's half",
            remedy="make such objects in the device's attach(), or use LiveMachine(device='thread')",
        )
        self._close_device_ends()

    def _boot(self) -> None:
        probe = self.loop.add("guest boot", self.driver.probe(), task=True)
        self._turn_until(lambda: probe.done, "the driver's probe")
        if not self.driver.queues:
            raise ConfigError("there is no device: DeviceID reads 0", "a block device's device_id is 2")
        self.iolog: list[tuple[int, int, int, int, int]] | None = [] if self.machine.iolog else None
        self._start_app()
        if self.loop.log is not None:
            self.loop.log.clear()
        self._booted_ns = time.perf_counter_ns()
        self.driver.interrupts = 0
        for task in self.tasks:
            task.wake = self.loop.add(f"guest {task.job.name}.{task.number}", task.run(), task=True).notify

    def _start_app(self) -> None:
        """Put the application on the disk that the driver has found."""
        vcpus = default_vcpus(self.recipe)
        self.tasks: list[FioTask] = self.recipe.app.start(
            self.pages,
            self.iostack,
            disk_bytes=self.driver.capacity_sectors << 9,
            queue_of=lambda task: task % vcpus % self.driver.num_queues,
            poll=self.driver.poll_queue if self.driver.poll else None,
            log=self.iolog,
        )

    # -- running ---------------------------------------------------------------------------------------------------------

    def _turn_until(self, done: Callable[[], bool], what: str, tick: Callable[[], None] = lambda: None) -> None:
        loop = self.loop
        seen, since = -1, time.monotonic()
        while not done():
            loop.turn(0.25)
            if self._error is not None:
                raise self._error
            completed = self._completed()
            if completed != seen:
                seen, since = completed, time.monotonic()
                tick()
            elif time.monotonic() - since > self.machine.stall_s:
                in_flight = sum(task.in_flight for task in getattr(self, "tasks", []))
                raise Stalled(
                    f"{what}: nothing completed for {self.machine.stall_s:g} s, {in_flight} I/Os are in flight",
                    "a kick, an interrupt or a buffer was lost, or the disk hangs; run the recipe on SimMachine and step()",
                )

    def _completed(self) -> int:
        tasks: list[FioTask] = getattr(self, "tasks", [])
        return tasks[0]._shared.completed if tasks else 0

    def run(self, *, progress: Callable[[int, int | None], None] | None = None) -> Run:
        """Run to the end; Ctrl-C stops submitting, reaps what is in flight and returns what was measured so far."""
        self._check_open()
        counts = [task.job.number_ios for task in self.tasks]
        total = None if any(count is None for count in counts) else sum(count or 0 for count in counts)
        interrupted = False
        last = time.monotonic()

        def tick() -> None:
            nonlocal last
            if progress is not None and time.monotonic() - last > _TICK_S:
                last = time.monotonic()
                progress(self._completed(), total)

        def running() -> bool:
            check_interrupt()
            return bool(self.loop.tasks_left)

        try:
            self._trace_kernel()
            try:
                with deferred_interrupt() as check_interrupt:
                    self._turn_until(lambda: not running(), "the run", tick)
            except KeyboardInterrupt:
                interrupted = True
                for task in self.tasks:
                    task.stop()
                self._turn_until(lambda: not self.loop.tasks_left, "after Ctrl-C")
            if progress is not None:
                progress(self._completed(), total)
            self._finish_device()
            return self._run_of(interrupted)
        finally:
            self.close()

    def save(self, path: str | Path) -> None:
        """Write the run that has ended to a file that ``vb.recorded(path)`` reads; VblkError before that."""
        if self._run is None:
            raise VblkError("this machine has not run to its end yet", "run() it first, then save() it")
        LiveRecording.of(self._run, self._log).save(path)

    def _trace_kernel(self) -> None:
        if self.machine.kernel_trace:
            processes = [os.getpid()] if self._child is None else [os.getpid(), self._child.pid]
            trace = RunTrace(processes=processes, image=getattr(self.recipe.disk, "path", None), kvm=self._traced())
            self._closers.append(trace.close)
            trace.start()
            self._kernel_trace = trace

    def _traced(self) -> Kernel | None:
        """What of KVM belongs to this run, or None."""
        return None

    def _clock_error_ns(self) -> int:
        return 0

    def _check_open(self) -> None:
        if self._closed:
            raise VblkError("this machine has already run", "boot the recipe again: pipeline.boot(machine)")

    def resize(self, size: int) -> None:
        """Give the disk another size in bytes; the device tells the driver."""
        if not isinstance(size, int) or size % 512 or size <= 0:
            raise ConfigError(f"size={size!r}", "give a positive multiple of 512 bytes")
        self._check_open()
        self._resize_device(size)

    def _resize_device(self, size: int) -> None:
        send_message(self._control, ("resize", size))
        if self._receive()[0] != "ok":
            raise VblkError("the device's half did not resize its disk")

    # -- the device's half -----------------------------------------------------------------------------------------------

    def _receive(self) -> Any:
        try:
            message = recv_message(self._control)
        except (EOFError, OSError):
            raise self._dead() from None
        if message[0] == "error":
            raise self._from_error(message)
        return message

    def _from_device(self) -> None:
        """The control socket is readable although nothing was asked: an error, or the end of the device's half."""
        try:
            message = recv_message(self._control)
        except (EOFError, OSError):
            self._error = self._dead()
            return
        if message[0] == "error":
            self._error = self._from_error(message)

    def _from_error(self, message: Any) -> VblkError:
        error: BaseException = message[1]
        told = error if isinstance(error, VblkError) else device_died(error)
        if isinstance(told, DeviceDied):
            told.traceback = message[2]
        return told

    def _dead(self) -> VblkError:
        if self._error is not None and isinstance(self._error, VblkError):
            return self._error
        how = "its thread ended"
        if self._child is not None:
            try:
                code = self._child.wait(2)
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            except subprocess.TimeoutExpired:
                how = "it does not answer"
        try:  # it may have said why before it went
            self._control.settimeout(0.5)
            message = recv_message(self._control)
            if message[0] == "error":
                return self._from_error(message)
        except (EOFError, OSError):
            pass
        return DeviceDied(f"the device's half is gone ({how})", "boot the recipe again")

    def _finish_device(self) -> None:
        send_message(self._control, ("stop",))
        message = self._receive()
        self._stop_kernel_trace()
        self._result = (message[1], message[2])

    def close(self) -> None:
        """End the device's half and give everything back; runs end here by themselves."""
        if self._closed:
            return
        self._closed = True
        control = getattr(self, "_control", None)
        if control is not None:
            try:
                control.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        if self._thread is not None:
            self._thread.join(10)
        if self._child is not None:
            wait_or_kill(self._child, 5)
        for closer in reversed(self._closers):
            closer()

    def __del__(self) -> None:
        """A machine that was booted and dropped, as a notebook's cell does that runs twice."""
        with suppress(Exception):
            self.close()

    # -- the result ------------------------------------------------------------------------------------------------------

    @property
    def _threads(self) -> bool:
        return self.machine.device == "thread"

    def _title(self) -> str:
        return f"LiveMachine (live) · {'two threads' if self._threads else 'two processes'}"

    def _peers(self) -> dict[str, str]:
        """What else a figure must say about who was at the other end."""
        return {}

    def _more_counters(self) -> dict[str, int]:
        return {}

    def _stop_kernel_trace(self) -> None:
        if self._kernel_trace is not None:
            self._kernel = self._kernel_trace.stop(error_ns=self._clock_error_ns())

    def _with_kernel(self, log: list[LogEntry], kernel: Kernel, names: dict[int, str]) -> list[LogEntry]:
        """Both joined, for as long as both are whole; the kernel's contexts go into ``names``."""
        ends = [end for end in (self._whole_ns(), kernel.until_ns) if end is not None]
        joined = join_kernel(log, replace(kernel, until_ns=min(ends, default=None), threads=self._thread_names()))
        names |= joined.names
        self.notes.append(
            "kernel trace: points of the kernel carry its clock, in place of what Python would have logged for them"
            + (f"; {joined.unmatched:,} of its block events are no request's" if joined.unmatched else "")
        )
        return joined.log

    def _halves(self) -> list[list[LogEntry]]:
        return [self.loop.log or [], (self._result[0] if self._result is not None else None) or []]

    def _whole_ns(self) -> int | None:
        """Until when both halves' logs have every point; None: to their ends."""
        return min((log[KEPT_FIRST - 1][0] for log in self._halves() if len(log) >= KEPT_FIRST), default=None)

    def _thread_names(self) -> dict[int, str]:
        """Who is who in the kernel's record."""
        return {threading.get_native_id(): "vCPU's thread"} | ({self._child.pid: "device"} if self._child is not None else {})

    def _jobs(self) -> list[JobStat]:
        return [task.stat for task in self.tasks]

    def log(self) -> list[LogEntry]:
        """Of a machine that has run: the trace points of both halves as they were yielded, in the order of time, without the boot."""
        device_log = self._result[0] if self._result is not None else None
        log = sorted([*(self.loop.log or ()), *(device_log or ())], key=lambda entry: entry[0])
        return [entry for entry in log if entry[0] >= self._booted_ns]  # the device's half logged its own boot

    def _run_of(self, interrupted: bool) -> Run:
        assert self._result is not None
        device_counters = self._result[1]
        log = self.log()
        tracing = f"{len(log):,} log entries"
        names = {context.number: context.name for context in self.loop.contexts} | {1000: "iothread"}
        full_ns = min((half[-1][0] for half in self._halves() if len(half) >= KEPT_MOST), default=None)
        if self._kernel is not None:
            log = self._with_kernel(log, self._kernel, names)
        elif full_ns is not None:
            log = [entry for entry in log if entry[0] <= full_ns]
        live_log = self._log = LiveLog(log, names, self._threads, self._kernel is not None, self._whole_ns())
        correlator = live_log.correlate()
        timed = f"step times of {correlator.matched:,} I/Os" + (f", {correlator.cut:,} more are cut by its gaps" if correlator.cut else "")
        self._run = build_run(
            title=f"{self._title()}{' · kernel trace' if self._kernel is not None else ''} · iodepth {self.recipe.app.depth}",
            rung=self.RUNG,
            simulated=False,
            provenance={
                "machine": repr(self.machine),
                "rung": self.RUNG,
                "kvm": "not used: kick and call are eventfds",
                **self._peers(),
                "cost table": "none: times are measured",
                "seed": "none",
                "tracing": f"{tracing}, {timed}" if self.machine.trace else "off",
                **({"kernel trace": self._kernel_trace.words()} if self._kernel_trace is not None else {}),
                "probe cost": f"about {probe_cost_ns():.0f} ns a trace point" if self.machine.trace else "none",
                "granularity": "an interrupt is taken when the guest waits, a kick when the device's loop turns; counts depend on it",
            },
            recipe=self.recipe,
            notes=self.notes,
            jobs=self._jobs(),
            correlator=correlator,
            counters={
                "kicks": self.driver.kicks,
                "kicks_suppressed": self.driver.kick_decisions - self.driver.kicks,
                "interrupts": self.driver.interrupts,
                "polls": self.driver.polls,
                **device_counters,
                **self._more_counters(),
                **(self._kernel_trace.counters if self._kernel_trace is not None else {}),
                **self.iostack.counts,
            },
            trace=live_log.trace(),
            split=live_log.split(correlator),
            interrupted=interrupted,
            iolog=self.iolog,
        )
        return self._run
