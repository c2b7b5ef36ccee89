"""Believable runs to draw without a machine: real ``Run`` objects with made-up times and a fixed seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from vblklab.events import EVENTS, STEPS
from vblklab.stats import DirStat, Histogram, JobStat
from vblklab.trace.run import Run, TraceEvent

NAMES = [step.name for step in STEPS]
SIM_NS = dict(zip(NAMES, (650, 2100, 1500, 2900, 1900, 2300, 800, 72_000, 900, 1300, 1800, 700, 1600, 2100, 1900), strict=True))
LIVE_NS = dict(zip(NAMES, (4200, 9800, 11_500, 62_000, 14_200, 3100, 1900, 21_000, 1500, 2600, 12_900, 5100, 58_000, 13_300, 8200),
                   strict=True))
# The kernel's and the hardware's part of a live step; the rest is Python.
KERNEL = {"D3": 0.15, "D4": 0.93, "D6": 0.9, "D7": 0.95, "HW": 1.0, "U1": 1.0, "U2": 0.9, "U4": 0.4, "U5": 0.92}
COST_TABLE = "published-2019 (Xeon Gold 6128)"

_PATH = (
    "sys_enter_io_submit", "block_bio_queue", "block_getrq", "virtio_queue_rq", "virtqueue_add_sgs", "virtqueue_kick_prepare", "vm_notify",
    "kvm_fast_mmio", "virtio_queue_notify", "virtqueue_pop", "virtio_blk_handle_read", "host:sys_enter_io_submit",
    "host:block_bio_queue", "host:block_getrq", "nvme_queue_rq", "nvme_fetch", "nvme_cqe", "irq_handler_entry", "nvme_irq",
    "host:block_rq_complete", "host:block_bio_complete", "virtio_blk_rw_complete", "virtio_blk_req_complete", "virtqueue_fill",
    "virtqueue_flush", "virtio_notify_irqfd", "kvm_set_irq", "kvm_inj_virq", "vring_interrupt", "virtblk_done", "virtqueue_get_buf",
    "block_rq_complete", "block_bio_complete", "sys_exit_io_getevents",
)
_THEN_IDLE = {"kvm_fast_mmio", "nvme_queue_rq", "nvme_cqe", "host:block_bio_complete", "virtio_notify_irqfd", "block_bio_complete"}


def make_trace(count: int, iodepth: int = 1, origin_ns: int = 0, disk_ns: int = 72_000, seed: int = 1) -> list[TraceEvent]:
    """``count`` I/Os along the whole path, on a vCPU with its interrupt handler, one iothread and one drive."""
    rng = random.Random(seed)
    out: list[TraceEvent] = []
    for io in range(count):
        t = origin_ns + (io // iodepth) * (disk_ns + 24_000) + (io % iodepth) * 9_000
        for key in _PATH:
            event = EVENTS[key]
            lane, context = _place(event.room, event.step, io % iodepth)
            out.append(TraceEvent(t, context, lane, key, tuple(io if a in ("io", "vq_head", "rq") else 1 for a in event.args)))
            t += disk_ns if key == "nvme_fetch" else rng.randint(350, 1400)
            if key in _THEN_IDLE:
                out.append(TraceEvent(t, context, lane, "wait", ()))
        out.append(TraceEvent(t, "vcpu0", "vCPU 0", "wait", ()))
    out.sort(key=lambda event: event.t_ns)
    return out


def _place(room: str, step: str, slot: int) -> tuple[str, str]:
    if room == "disk":
        return "disk", f"nvme0 command {slot}"
    if room in ("host-stack", "host-driver", "device"):
        return ("iothread" if room == "device" else "host"), "iothread0"
    lane = "KVM" if room == "kvm" else "vCPU 0"
    return lane, "vcpu0 interrupt" if step[0] == "U" and room != "app" else "vcpu0"


def _times(times: Mapping[str, float], seed: int, spread: float, tail: float, count: int) -> tuple[Any, Any]:
    """(rows, durations): ``count`` I/Os whose steps scatter around ``times``; a share ``tail`` of the steps takes much longer."""
    rng = np.random.default_rng(seed)
    noise = rng.lognormal(0, spread, (count, 15))
    noise *= np.where(rng.random((count, 15)) < tail, rng.lognormal(1.2, 0.6, (count, 15)), 1)
    durations = np.maximum(1, (np.array([times[name] for name in NAMES]) * noise).astype(np.int64))
    rows = np.zeros((count, 16), dtype=np.int64)
    rows[:, 0] = np.cumsum(rng.integers(1000, 200_000, count))
    rows[:, 1:] = rows[:, :1] + np.cumsum(durations, axis=1)
    return rows, durations


def _histogram(values: Any) -> Histogram:
    histogram = Histogram()
    histogram.extend(values)
    return histogram


def _run(rows: Any, durations: Any, **rest: Any) -> Run:
    read = DirStat(ios=len(rows), bytes=4096 * len(rows), clat=_histogram(rows[:, 15] - rows[:, 1]))
    return Run(jobs=[JobStat("job", 0, {"rw": "randread"}, read=read)], rows=rows[:8192], durations=[_histogram(d) for d in durations.T],
               counters={"kicks": 9812, "kicks_suppressed": 188, "interrupts": 9640}, duration_ns=int(rows[-1, 15] - rows[0, 0]), **rest)


def sim_run(title: str = "SimMachine (simulated) · ioeventfd/irqfd · iodepth 1", seed: int = 1, ios: int = 10_000,
            scale: Mapping[str, float] | None = None, trace: list[TraceEvent] | None = None) -> Run:
    """A simulated run; ``scale`` makes single steps slower or faster."""
    rows, durations = _times({name: ns * (scale or {}).get(name, 1) for name, ns in SIM_NS.items()}, seed, 0.08, 0.01, ios)
    return _run(
        rows, durations, title=title, rung="L0 simulated", simulated=True, notes=[],
        provenance={"machine": f"SimMachine(seed={seed})", "rung": "L0 simulated", "kvm": "none: KVM is simulated",
                    "cost table": COST_TABLE, "seed": str(seed), "tracing": "first 20,000 trace points kept",
                    "granularity": "71 trace points declared", "host": "Linux x86_64, 2 CPUs", "python": "CPython 3.11.9"},
        recipe={"app": "Fio(rw='randread', bs=4096, iodepth=1)", "queue": "Split(256)", "kvm": "Kvm(kick='ioeventfd', call='irqfd')"},
        trace=make_trace(12) if trace is None else trace)


def live_run(title: str = "LiveMachine · eventfd · two processes", seed: int = 2, ios: int = 4000) -> Run:
    """A live run on a machine whose clock does not start at zero."""
    rows, durations = _times(LIVE_NS, seed, 0.25, 0.03, ios)
    means = dict(zip(NAMES, durations.mean(axis=0), strict=True))
    origin = 81_234_567_890_123
    return _run(
        rows + origin, durations, title=title, rung="L2 live", simulated=False,
        notes=["kick: an eventfd; this machine has no trap", "call: an eventfd; no interrupt is injected"],
        provenance={"machine": "LiveMachine(processes=2)", "rung": "L2 live", "host": "Linux x86_64, 2 CPUs", "cpu": "AMD EPYC 7B13",
                    "kernel": "6.1.0-28-amd64", "python": "CPython 3.11.9", "kvm": "not used", "tracing": "on", "probe cost": "180 ns"},
        recipe={"app": "Fio(rw='randread', bs=4096, iodepth=1)", "queue": "Split(256)", "disk": "ImageFile('disk.img')"},
        split={name: (mean * KERNEL.get(name, 0.0), mean * (1 - KERNEL.get(name, 0.0))) for name, mean in means.items()},
        trace=make_trace(12, origin_ns=origin, disk_ns=31_000))
