"""512-byte random reads through a real vCPU: the driver in Python, the bare guest's machine code, and that with a device in C.

ioeventfd and irqfd, EVENT_IDX, indirect descriptors, a disk in memory; alternating turns.  `python bench/bench_bare.py`
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import vblklab as vb
from vblklab.guest.job import job
from vblklab.kvm import bare_payload, host, payload
from vblklab.kvm.bare import Requests
from vblklab.kvm.bare_memory import BareMemory
from vblklab.kvm.bare_payload import REQUEST, Ctl
from vblklab.memory import GuestMemory, GuestPages
from vblklab.ring import SplitLayout

COUNT, TURNS, SIZE = 2_000, 5, 1 << 20
RING = 256


def options(depth: int) -> dict[str, Any]:
    return dict(rw="randread", bs=512, iodepth=depth, number_ios=COUNT, size=SIZE)


def per_io_us(table: Any, khz: int) -> tuple[float, float]:
    """µs an I/O, and the median of one I/O's latency in µs, by the guest's stamps."""
    start, taken = (table[name].astype(np.int64) for name in ("start", "taken"))
    return float(taken.max() - start[0]) / khz * 1e3 / len(table), float(np.median(taken - start)) / khz * 1e3


def ours(depth: int, guest: Any) -> tuple[float, float, int]:
    """With the guest's driver in Python (None) or in machine code; also the rate of the counter, or 0."""
    recipe = vb.Pipeline(app=vb.Fio(**options(depth)), disk=vb.Ram(SIZE), queue=vb.Split(RING), guest=guest)
    vm = recipe.boot(vb.KvmMachine(trace=False))
    khz = vm.guest.vcpu.tsc_khz()
    run = vm.run()
    if guest is not None:
        return *per_io_us(vm.bare.table(), khz), khz
    return run.duration_ns / run.ios / 1e3, run.jobs[0].read.lat.percentile(50) / 1e3, khz


def in_c(program: Path, folder: Path, depth: int, khz: int) -> tuple[float, float]:
    memory = memoryview(bytearray(SIZE))
    pages = GuestPages(GuestMemory(memory), 0x1000)
    layout = SplitLayout.alloc(pages, RING)
    regions: dict[int, memoryview] = {0: memory}
    bare = BareMemory(regions.__setitem__, pages, layout, Requests(job(**options(depth)), SIZE), indirect=True)
    bare.ctl[Ctl.EVENT_IDX], bare.ctl[Ctl.BELL] = 1, payload.REGISTERS_GPA + 0x50
    arguments = []
    for gpa, view in regions.items():
        (folder / hex(gpa)).write_bytes(view)
        arguments.append(f"{gpa:#x}={folder / hex(gpa)}")
    ring = map(str, (layout.desc, layout.avail, layout.used, layout.size))
    subprocess.run([program, folder / "payload", hex(bare_payload.BASE), *ring, *arguments], check=True)
    table = np.frombuffer((folder / hex(bare.list_gpa)).read_bytes()[: COUNT * REQUEST.itemsize], REQUEST)
    if not (table["done"] == 1).all():
        raise SystemExit("the loop in C left requests undone")
    return per_io_us(table, khz)


def main() -> None:
    works, why, gain = host.found()
    if not works:
        print(f"no KVM here: {why}; {gain}")
        return
    compiler = shutil.which("cc") or shutil.which("gcc")
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "payload").write_bytes(payload.image())
        if compiler is not None:
            source = Path(__file__).with_name("bare_loop.c")
            subprocess.run([compiler, "-O2", "-Wall", "-pthread", "-o", folder / "bare_loop", source], check=True)
        for _ in range(TURNS):
            for depth in (1, 32):
                *python, khz = ours(depth, None)
                *machine, khz = ours(depth, vb.BareGuest())
                found.setdefault(("driver in Python", depth), []).append((python[0], python[1]))
                found.setdefault(("bare guest", depth), []).append((machine[0], machine[1]))
                if compiler is not None:
                    found.setdefault(("bare guest, device in C", depth), []).append(in_c(folder / "bare_loop", folder, depth, khz))
    print(f"{host.flavour()}, Python {sys.version.split()[0]}, load average {os.getloadavg()[0]:.1f}; {TURNS} turns of {COUNT:,} I/Os")
    for (who, depth), times in found.items():
        each, latency = (sorted(column) for column in zip(*times, strict=True))
        spread = f"{statistics.median(each):6.0f} µs an I/O ({each[0]:.0f} … {each[-1]:.0f})"
        middle = f"latency p50 {statistics.median(latency):6.0f} µs ({latency[0]:.0f} … {latency[-1]:.0f})"
        print(f"iodepth {depth:2} {who:24} {spread:36} {middle}")


if __name__ == "__main__":
    main()
