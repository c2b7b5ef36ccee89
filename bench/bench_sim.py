"""Simulated I/Os per second of the whole path against SimPy; cost per I/O and memory from 10 k to 1 M I/Os.

Medians of five alternating pairs in one process.  `python bench/bench_sim.py [--million]`
"""

from __future__ import annotations

import resource
import statistics
import sys
import time

from simpy_path import simpy_ios_per_second

import vblklab as vb


def ours(iodepth: int, ios: int) -> float:
    """Simulated I/Os per second of CPU time: real rings, real data bytes, statistics on."""
    recipe = vb.Pipeline(app=vb.Fio(rw="randread", bs=4096, iodepth=iodepth, number_ios=ios), disk=vb.Nvme(size=4 << 20))
    vm = recipe.boot(vb.SimMachine(trace=0))
    start = time.process_time()
    run = vm.run()
    seconds = time.process_time() - start
    assert run.ios == ios and not run.errors
    return ios / seconds


def main() -> None:
    print(f"Python {sys.version.split()[0]}")
    for iodepth, goal in ((1, 4), (32, 3)):
        pairs = [(ours(iodepth, 30_000), simpy_ios_per_second(iodepth, 10_000)) for _ in range(5)]
        mine, theirs = (statistics.median(one) for one in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"iodepth {iodepth:2}: vblklab {mine:9,.0f} I/O/s   SimPy {theirs:9,.0f} I/O/s   ratio {ratio:.2f} (goal {goal})")
    base = 0.0
    for ios in (10_000, 100_000, *((1_000_000,) if "--million" in sys.argv else ())):
        rate = statistics.median(ours(8, ios) for _ in range(3 if ios < 1_000_000 else 1))
        base = base or rate
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{ios:9,} I/Os: {1e6 / rate:6.2f} µs an I/O ({base / rate - 1:+.0%} against 10,000), peak memory {peak:.0f} MiB")


if __name__ == "__main__":
    main()
