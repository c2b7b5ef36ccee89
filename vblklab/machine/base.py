"""What machines have in common: the recipe they read, building a Run, provenance."""

from __future__ import annotations

import copy
import datetime
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from .._version import __version__
from ..disk import Nvme
from ..engine import Sync
from ..errors import ConfigError
from ..stats import JobStat
from ..trace.correlate import Correlator
from ..trace.run import Run, TraceEvent

__all__ = [
    "Recipe",
    "build_run",
    "default_vcpus",
    "deferred_interrupt",
    "fresh",
    "fresh_device",
    "host_provenance",
    "memory_bytes",
    "not_simulated",
    "real_engine",
]


_MEMORY_MOST = 8 << 30


class Recipe(Protocol):
    """The parts that a machine reads; ``Pipeline`` is one."""

    app: Any
    iostack: Any
    driver: Any
    queue: Any
    transport: Any
    kvm: Any
    device: Any
    engine: Any
    host_iostack: Any
    disk: Any
    guest: Any
    host: Any

    def describe(self) -> dict[str, str]: ...


def fresh(part: Any) -> Any:
    """A part of one's own: a class is called, an instance is copied, so that nothing leaks between two boots."""
    return part() if isinstance(part, type) else copy.deepcopy(part)


def fresh_device(recipe: Recipe, queues: int) -> Any:
    """The recipe's device, with ``queues`` queues if it does not say how many, offering what the recipe's queue asks for."""
    device = fresh(recipe.device)
    device.num_queues = device.num_queues or queues
    device.packed = device.packed or recipe.queue.packed
    device.in_order = device.in_order or getattr(recipe.queue, "in_order", False)
    return device


def real_engine(recipe: Recipe) -> Any:
    """The recipe's engine where time is real: ``Sync`` for none, and in place of one that needs simulated time."""
    engine = fresh(recipe.engine) if recipe.engine is not None else Sync()
    return Sync() if engine.simulated_only else engine


def not_simulated(recipe: Recipe) -> list[str]:
    """Notes on the parts of the host side that need simulated time."""
    notes = []
    if getattr(recipe.engine, "simulated_only", False):
        notes.append("engine: Sync in place of Simulated, which needs simulated time")
    if isinstance(recipe.disk, Nvme):
        notes.append(f"disk: the {recipe.disk.model} model needs simulated time; its bytes live in the device's memory")
    return notes


def default_vcpus(recipe: Recipe) -> int:
    """vCPUs of a recipe that does not say: one per task of the application, at most 4."""
    return int(recipe.kvm.vcpus or min(recipe.app.clones, 4))


def memory_bytes(recipe: Recipe, queues: int, seg_max: int, queue_size: int) -> int:
    """Guest memory that holds the rings, the request slots and the application's buffers, in whole MiB."""
    rings = queues * queue_size * (16 + 10 + (seg_max + 2) * 16 + 64) + queues * 16384
    total = rings + int(recipe.app.buffer_bytes()) + (1 << 20)
    if total > _MEMORY_MOST:
        raise ConfigError(
            f"this recipe needs {total >> 30} GiB of guest memory, more than {_MEMORY_MOST >> 30}",
            "lower iodepth, numjobs, the block size, the number or size of queues, or seg_max",
        )
    return (total + (1 << 20) - 1) & -(1 << 20)


def host_provenance() -> dict[str, str]:
    """What a figure must say about the machine it was made on."""
    return {
        "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "cpu": _cpu_model(),
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "vblklab version": __version__,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def build_run(
    *,
    title: str,
    rung: str,
    simulated: bool,
    provenance: dict[str, str],
    recipe: Recipe,
    notes: list[str],
    jobs: list[JobStat],
    correlator: Correlator,
    counters: dict[str, int],
    trace: list[TraceEvent] | None,
    **rest: Any,
) -> Run:
    """Put a Run together from what a machine collected."""
    for job in jobs:
        for one in (job.read, job.write, job.trim, job.sync):
            one.fold()
    rows = correlator.rows
    started = [job.start_ns for job in jobs if job.end_ns]
    duration = max((job.end_ns for job in jobs), default=0) - min(started, default=0)
    return Run(
        title=title,
        rung=rung,
        simulated=simulated,
        provenance=provenance | host_provenance(),
        recipe=recipe.describe(),
        notes=notes,
        jobs=jobs,
        counters=counters,
        rows=rows,
        durations=correlator.durations,
        duration_ns=max(duration, 0),
        trace=trace,
        **rest,
    )


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], None]]:
    """Ctrl-C raised where the machine is whole: inside, the signal is only noted, and the function yielded raises it.

    An exception in the middle of a context would end that context.  A second Ctrl-C is not held back.  Elsewhere than in the
    main thread signals do not arrive, and nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    pressed = 0
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            raise KeyboardInterrupt

    def check() -> None:
        nonlocal pressed
        if pressed:
            pressed = 0
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
