"""SimMachine: the whole path in simulated time, deterministic by seed.  Rung L0."""

from __future__ import annotations

import gc
import mmap
import random
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

from ..disk import BrdDriver, Drive, NvmeDriver, ServiceTime
from ..engine import Simulated
from ..errors import ConfigError, Stalled, VblkError
from ..events import EVENTS
from ..guest.fio import FioTask
from ..iostack import IOStack, Limits
from ..memory import GuestMemory, GuestPages
from ..ring.dump import RingView
from ..spec.virtio import Status
from ..trace.correlate import Correlator
from ..trace.run import Run, TraceEvent
from .base import Recipe, build_run, default_vcpus, deferred_interrupt, fresh, fresh_device, memory_bytes
from .costs import CostTable
from .like import NO_HOST, shape_of
from .observe import MainLoop, Observer, Seen, trace_event
from .paths import Choice, choose, fuse, lead
from .sched import Context, Cpu, Scheduler
from .where import Where, where
from .wire import wire

__all__ = ["SimMachine", "SimVm"]

_CHUNK = 20_000
_STALL_CHUNKS = 250
_HOST_TAGS = 1023


class SimMachine:
    """Runs recipes in simulated time.

    ``seed`` decides the drive's spread and, with ``interleave="random"``, a random but repeatable order of contexts.
    ``costs`` is a CostTable (default: published figures); ``trace`` records the first so many trace points (``True``: all);
    ``iolog=True`` keeps the list of I/Os in the order of issue.  ``fast`` "auto" runs contexts whose parts nobody has changed in a
    fused form, with the same times, bytes and trace; "off" never does.  ``like=vb.KvmMachine()`` or ``vb.LiveMachine()`` simulates
    that machine instead of QEMU, with the rows of ``costs`` that ``vb.calibrate()`` measured on it.
    """

    def __init__(
        self,
        seed: int = 1,
        *,
        costs: CostTable | None = None,
        interleave: str = "cost",
        trace: int | bool = 4000,
        iolog: bool = False,
        fast: str = "auto",
        like: Any = None,
    ) -> None:
        if interleave not in ("cost", "random"):
            raise ConfigError(f"interleave={interleave!r}", "choose 'cost' or 'random'")
        if fast not in ("auto", "off"):
            raise ConfigError(f"SimMachine fast={fast!r}", "choose 'auto' or 'off'")
        if not isinstance(seed, int):
            raise ConfigError(f"seed={seed!r}", "give a whole number")
        self.seed = seed
        self.costs = costs or CostTable.load()
        self.interleave = interleave
        self.trace = trace
        self.iolog = iolog
        self.fast = fast
        self.like = like
        self.shape = None if like is None else shape_of(like)
        if self.shape is not None:
            self.costs = self.shape.costs(self.costs)

    def __repr__(self) -> str:
        more = ", interleave='random'" if self.interleave == "random" else ""
        more += f", like={self.like!r}" if self.like is not None else ""
        return f"SimMachine(seed={self.seed}{more})"

    def boot(self, recipe: Recipe) -> SimVm:
        """Build everything fresh, let the driver probe the device, and stand before the first I/O."""
        return SimVm(self, recipe)


class SimVm:
    """A booted recipe.  ``run()`` runs it to its end, ``step()`` to the next trace point, ``where()`` says where it stands."""

    def __init__(self, machine: SimMachine, recipe: Recipe) -> None:
        self.machine = machine
        self.recipe = recipe
        self.notes: list[str] = []
        self._last: Seen | None = None
        self._costs = machine.costs
        self._closed = False
        self._choices: list[Choice] = []  # what run() has chosen
        rng = random.Random(machine.seed)
        self.correlator = Correlator()
        interleave = random.Random(rng.getrandbits(64)) if machine.interleave == "random" else None
        self.scheduler = Scheduler(self._costs, interleave=interleave)
        self.store = recipe.disk.open()
        try:
            self._build(rng)
            self._boot()
        except BaseException:
            self.close()
            raise

    # -- building --------------------------------------------------------------------------------------------------------

    def _build(self, rng: random.Random) -> None:
        recipe, sched, shape = self.recipe, self.scheduler, self.machine.shape
        kvm = recipe.kvm
        if shape is not None:
            shape.check(recipe)
            self.notes += shape.notes(recipe)
        vcpus = default_vcpus(recipe)
        self.vcpus = [Cpu(f"vCPU {i}") for i in range(vcpus)]
        self.device = fresh_device(recipe, vcpus)
        need = memory_bytes(recipe, self.device.num_queues, self.device.seg_max, recipe.queue.size)
        self.memory = GuestMemory(memoryview(mmap.mmap(-1, need)))  # pages, as the disk's: copies are slow where only one side is aligned
        self.pages = GuestPages(self.memory, 0x1000)
        make = wire if shape is None else shape.wire
        self._wire = make(recipe, self.memory, self.device, sched, vcpus, self._wake_vcpu, self._wake_main_loop)
        self.registers, self._bus, self.transport, self._interrupt = self._wire[:4]

        own_thread = kvm.has_iothread or shape is not None
        thread = "iothread" if own_thread else "main loop"
        device_cpu = Cpu(thread)
        main_cpu = MainLoop("main loop") if own_thread else device_cpu
        self._device_context = sched.add(thread, device_cpu, self._start_device(), wake_ns=self._ns("wake:device"))
        wake_device = self._device_context.notify

        if self._wire.main_loop:
            wake_ns = self._ns("wake:main-loop" if "wake:main-loop" in self._costs else "wake:device")
            self._main_loop = sched.add("main loop", main_cpu, self._interrupt.main_loop(), wake_ns=wake_ns)

        engine = self.engine = self._attached_engine(rng, wake_device)
        self.device.attach(engine, self.store.size >> 9, read_only=self.store.read_only, notify=self._interrupt.notify, wake=wake_device)
        self.device.on_reset_done = self.registers.reset_done
        self.device.on_needs_reset = self.registers.needs_reset
        self.device.on_config_changed = self.registers.config_changed

        self.driver = fresh(recipe.driver)
        self.iostack = fresh(recipe.iostack)
        self.driver.attach(self.pages, self.transport, self.iostack, queue_size=recipe.queue.size, packed=recipe.queue.packed)
        self._irq_contexts = [
            sched.add(
                f"{cpu.name} irq",
                cpu,
                interrupts(self.driver),
                wake_ns=self._ns("wake:vcpu-idle"),
                interrupt_ns=self._ns("wake:vcpu-busy"),
            )
            for cpu, interrupts in zip(self.vcpus, self._wire.handlers, strict=False)
        ]

    def _attached_engine(self, rng: random.Random, wake_device: Callable[[], None]) -> Any:
        """The engine over the host's block layer; in the shape of a live machine over the store alone."""
        recipe, shape = self.recipe, self.machine.shape
        if shape is not None:
            self._host_stack: Any = NO_HOST
            timed = shape.engine(recipe, self._costs)
            timed.attach(None, self.store, self._wake_engine)
            return timed
        self._host_stack = self._host_side(rng, wake_device)
        engine = fresh(recipe.engine) if recipe.engine is not None else Simulated()
        engine.attach(self._host_stack, self.store, self._wake_engine)
        return engine

    def _start_device(self) -> Any:
        """The device's context begins with its first notification, when everything is attached."""
        shape = self.machine.shape
        yield from self.device.run() if shape is None else shape.device(self.device.run())

    def _ns(self, key: str) -> float:
        return self._costs.number(key)

    def _wake_engine(self) -> None:
        """An operation has ended: wake the device's loop, and a vCPU's thread that waits for it inside QEMU."""
        self._device_context.notify()
        for cpu in self.vcpus:
            if cpu.masked and cpu.current is not None:
                cpu.current.notify()

    def _wake_main_loop(self) -> None:
        self._main_loop.notify()

    def _hardware(self, context: Context, ev: tuple[str, int]) -> None:
        if self.scheduler.observe is not None:
            self.scheduler.observe(self.scheduler.now, context, ev)

    def _wake_host_irq(self) -> None:
        self._host_irq.notify()

    def _wake_vcpu(self, vcpu: int) -> None:
        self._irq_contexts[vcpu].notify()

    def _host_side(self, rng: random.Random, wake_device: Callable[[], None]) -> IOStack:
        """The host's block layer over a drive model, or over a RAM disk."""
        recipe, sched = self.recipe, self.scheduler
        stack: IOStack = fresh(recipe.host_iostack)
        limits = Limits(max_segments=127, max_discard_sectors=0x3FFFFF, max_write_zeroes_sectors=0x3FFFFF)
        disk = recipe.disk
        if disk.drive is None:
            stack.attach(BrdDriver(self.store, stack, round(self._ns("ram:bytes_per_us"))), limits, queues=1, tags=_HOST_TAGS, host=True)
            return stack
        self._costs = _with_disk(self._costs, disk)
        name = f"drive:{disk.drive}:"
        service = ServiceTime(
            read_ns=round(self._ns(name + "read_ns")),
            write_ns=round(self._ns(name + "write_ns")),
            flush_ns=round(self._ns(name + "flush_ns")),
            dies=round(self._ns(name + "dies")),
            bytes_per_us=round(self._ns(name + "bytes_per_us")),
            spread=self._ns(name + "spread"),
            seed=rng.getrandbits(64),
        )
        hardware = sched.add("drive", Cpu("disk"), _never())  # never runs; its trace points are the drive's
        drive = Drive(self.store, service, sched.clockwork, self._wake_host_irq, partial(self._hardware, hardware))
        driver = NvmeDriver(drive, stack, getattr(disk, "queue_depth", _HOST_TAGS))
        stack.attach(driver, limits, queues=1, tags=_HOST_TAGS, host=True)
        self._host_irq = sched.add("host irq", Cpu("host"), driver.interrupts(), wake_ns=self._ns("wake:host"))
        return stack

    def _boot(self) -> None:
        """The driver's probe on vCPU 0; then the application's tasks stand ready."""
        sched = self.scheduler
        probe = sched.add("vCPU 0 boot", self.vcpus[0], self.driver.probe(), task=True)
        for context in sched.contexts:
            if context.name != "drive":
                context.notify()
        while sched.run(_CHUNK) and sched.tasks_left:
            pass
        if not probe.done:
            raise Stalled("the driver's probe never ended", "the device lost a register access or never finished a reset")
        if not self.driver.queues:
            raise ConfigError("there is no device: DeviceID reads 0", "a block device's device_id is 2")
        self.iolog: list[tuple[int, int, int, int, int]] | None = [] if self.machine.iolog else None
        self.tasks: list[FioTask] = self.recipe.app.start(
            self.pages,
            self.iostack,
            disk_bytes=self.driver.capacity_sectors << 9,
            queue_of=lambda task: task % len(self.vcpus) % self.driver.num_queues,
            poll=self.driver.poll_queue if self.driver.poll else None,
            log=self.iolog,
        )
        self.driver.interrupts = self._bus.exits = 0
        self._observer = Observer(sched, self.correlator, self.machine.trace)
        self.task_contexts: list[Context] = []
        for number, task in enumerate(self.tasks):
            cpu = self.vcpus[number % len(self.vcpus)]
            context = sched.add(f"{cpu.name} {task.job.name}", cpu, task.run(), wake_ns=self._ns("wake:task"), task=True)
            task.wake = context.notify
            self.task_contexts.append(context)
            context.notify()

    # -- running ---------------------------------------------------------------------------------------------------------

    @property
    def now_ns(self) -> int:
        """Simulated time."""
        return self.scheduler.now

    @property
    def finished(self) -> bool:
        """Whether every task has ended."""
        return not self.scheduler.tasks_left

    def _advance(self, points: int) -> bool:
        sched = self.scheduler
        self._observer.before(self.tasks[0]._shared.completed)
        if sched.fused and sched.observe is not None:
            points = max(points >> 4, 1)  # a fused context that is observed goes over several points a turn
        left = sched.run(points)
        if not left and sched.tasks_left:
            self._stalled()
        return bool(sched.tasks_left)

    def _stalled(self) -> None:
        in_flight = sum(task.in_flight for task in self.tasks)
        if self.driver.failed is not None and not in_flight:
            return
        why = f"; the device stopped: {self.device.broken}" if self.device.broken is not None else ""
        raise Stalled(
            f"after {self.now_ns / 1000:.1f} simulated µs {in_flight} I/Os are in flight and nothing can complete them{why}",
            "a kick, an interrupt or a buffer was lost: step() through the end of the trace",
        )

    def step(self, points: int = 1) -> TraceEvent | None:
        """Go on to the next trace point (or over so many) and return it; None when every task has ended."""
        event: TraceEvent | None = None
        sched, observer = self.scheduler, self._observer
        if sched.tasks_left:
            self._check_open()
        sched.refresh()
        observer.stepping()
        for _ in range(points):
            while (seen := observer.next_seen()) is None:
                if not sched.tasks_left:
                    return event
                if not sched.run(1) and sched.tasks_left:
                    self._stalled()
            self._last = seen
            event = trace_event(seen)
        return event

    def step_until(self, key: str) -> TraceEvent | None:
        """Go on until this trace point is hit; raises ConfigError for an unknown key, returns None if it never comes."""
        if key not in EVENTS:
            raise ConfigError(f"no trace point {key!r}", "vb.EVENTS lists them")
        while (event := self.step()) is not None and event.key != key:
            pass
        return event

    def where(self) -> Where:
        """Where the machine stands after the last step: room, step, functions and source line."""
        return where(self._last, self.scheduler.now)

    def explain(self) -> list[str]:
        """For each context whether ``run`` takes the fused path; for the plain path the reason."""
        choices = self._choices or choose(self)
        return [f"{'plain' if one.why else 'fused'} path: {one.context.name}{': ' if one.why else ''}{one.why or ''}" for one in choices]

    def ring(self, queue: int = 0) -> RingView:
        """The bytes of a virtqueue as they lie in memory now: descriptor table, available ring, used ring.

        ``before = vm.ring(); vm.step_until("virtqueue_kick_prepare"); vm.ring().diff(before)`` marks what changed.
        """
        queues = self.driver.queues
        if not isinstance(queue, int) or not 0 <= queue < len(queues):
            raise ConfigError(f"no queue {queue!r}", f"this machine's queues are 0 to {len(queues) - 1}")
        if self.recipe.queue.packed:
            raise ConfigError(
                f"queue={self.recipe.queue!r}",
                "the ring view draws split rings: vb.film(vm) shows packed ones, or replace(queue=vb.Split())",
            )
        return RingView(self.memory, queues[queue].layout, queue)

    def run(self, *, progress: Callable[[int, int | None], None] | None = None) -> Run:
        """Run to the end; Ctrl-C ends early with what was measured so far.  ``progress(done, total)`` is called now and then."""
        self._check_open()
        interrupted = False
        total = _planned(self.tasks)
        shared = self.tasks[0]._shared
        self.scheduler.refresh()
        idle, seen = 0, -1
        collecting = gc.isenabled()
        gc.disable()  # the path makes no cycles: what is young is looked at between chunks, in a tenth of the time
        try:
            with deferred_interrupt() as check_interrupt:
                self._fuse()
                while self._advance(_CHUNK):
                    check_interrupt()
                    gc.collect(0)
                    done = shared.completed
                    idle = idle + 1 if done == seen else 0
                    seen = done
                    if idle > _STALL_CHUNKS:
                        raise Stalled(
                            f"{idle * _CHUNK:,} trace points without a completed I/O", "a poll loop waits for a buffer that was lost"
                        )
                    if progress is not None:
                        progress(done, total)
        except KeyboardInterrupt:
            interrupted = True
        except BaseException:
            self.close()
            raise
        finally:
            if collecting:
                gc.enable()
        if progress is not None:
            progress(shared.completed, total)
        run = self.result(interrupted=interrupted)
        self.close()
        return run

    def _fuse(self) -> None:
        """Change to the fused path; a context that is busy changes when it idles."""
        self._choices = list(choose(self))
        busy = fuse(self._choices)
        for _ in range(_CHUNK):
            if not busy or not self._advance(1):
                break
            busy = fuse(busy)
        if ahead_ns := lead(self, self._choices):
            self.scheduler.run_ahead(ahead_ns)

    def result(self, *, interrupted: bool = False) -> Run:
        """The Run so far; of use after stepping."""
        for task in self.tasks:
            if not task.stat.end_ns and task.stat.start_ns:
                task.stat.end_ns = self.scheduler.now
        kvm = self.recipe.kvm
        costs = {key: self._costs.of_event(key) for key in EVENTS}
        return build_run(
            title=f"SimMachine (simulated{self._as()}) · {kvm.kick}/{kvm.call} · iodepth {self.recipe.app.depth}",
            rung="L0 simulated",
            simulated=True,
            provenance={
                "machine": repr(self.machine),
                "rung": "L0 simulated",
                "kvm": "none: KVM is simulated",
                "cost table": self._costs.origin,
                "seed": str(self.machine.seed),
                "tracing": f"first {len(self._observer.recorded):,} trace points kept; step times of {self.correlator.matched:,} I/Os",
                "probe cost": "none: tracing takes no simulated time",
                "granularity": f"{len(EVENTS)} trace points; others run only between two of them, so the counts depend on it",
                **self._limit(),
            },
            recipe=self.recipe,
            notes=self.notes,
            jobs=[task.stat for task in self.tasks],
            correlator=self.correlator,
            counters={
                "kicks": self.driver.kicks,
                "kicks_suppressed": self.driver.kick_decisions - self.driver.kicks,
                "fast_mmio": self._bus.fast_mmio,
                "mmio_exits": self._bus.exits,
                "interrupts": self.driver.interrupts,
                "notifies": self._interrupt.notifies,
                "interrupts_suppressed": self.device.notify_decisions - self._interrupt.notifies,
                "polls": self.driver.polls,
                **self.iostack.counts,
                **{f"host_{name}": count for name, count in self._host_stack.counts.items()},
            },
            trace=self._observer.trace(),
            costs=costs,
            interrupted=interrupted,
            iolog=self.iolog,
        )

    def _limit(self) -> dict[str, str]:
        shape = self.machine.shape
        limit = "" if shape is None else shape.limit(self.recipe)
        return {"model": limit} if limit else {}

    def _as(self) -> str:
        shape = self.machine.shape
        return "" if shape is None else f" as {shape.name}"

    def _check_open(self) -> None:
        if self._closed:
            raise VblkError("this machine has already run", "boot the recipe again: pipeline.boot(machine)")

    def close(self) -> None:
        """Let go of the disk; runs end here by themselves."""
        if not self._closed:
            self._closed = True
            self.store.close()

    # -- things to do to a standing machine ------------------------------------------------------------------------------

    def task(self, generator: Any, name: str = "task") -> Any:
        """Run a generator of your own as a guest task on vCPU 0 until it ends, for example ``vm.task(vm.driver.restart())``.

        Returns what it returns and raises what it raises: ``vm.task(vm.driver.serial())``.
        """
        self._check_open()
        sched = self.scheduler
        returned: list[Any] = []
        raised: list[Exception] = []

        def kept() -> Any:
            try:
                returned.append((yield from generator))
            except Exception as error:  # raised here when the vCPU has let go of the task
                raised.append(error)

        context = sched.add(f"vCPU 0 {name}", self.vcpus[0], kept(), wake_ns=self._ns("wake:task"), task=True)
        context.notify()
        while not context.done:
            if not sched.run(1) and not context.done:
                raise Stalled(f"the task {name!r} waits for something that never comes", "step() through the trace")
        if raised:
            raise raised[0]
        return returned[0]

    def resize(self, size: int) -> None:
        """Give the disk another size in bytes; the device tells the driver."""
        if not isinstance(size, int) or size % 512 or size <= 0:
            raise ConfigError(f"size={size!r}", "give a positive multiple of 512 bytes")
        self._check_open()
        self.device.check_resize()
        self.store.resize(size)
        self.device.resize(size >> 9)

    @property
    def device_status(self) -> Status:
        """The device status register."""
        return Status(self.registers.status)


def _never() -> Generator[Any, int, None]:
    return
    yield


def _planned(tasks: list[FioTask]) -> int | None:
    """How many I/Os the jobs will do, if they say."""
    counts = [task.job.number_ios for task in tasks]
    return None if any(count is None for count in counts) else sum(count or 0 for count in counts)


def _with_disk(costs: CostTable, disk: Any) -> CostTable:
    """The table with the latencies that a disk part states itself."""
    stated = {}
    for name in ("read", "write"):
        value = getattr(disk, f"{name}_us", None)
        if value is not None:
            stated[f"drive__{disk.drive}__{name}_ns"] = value * 1000
    return costs.replace(**stated) if stated else costs
