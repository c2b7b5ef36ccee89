"""The trap: a doorbell exit's round trip, and ioeventfd + irqfd with the device in another process, against the same loops in C.

Both run the same payload on a vCPU of the same KVM, in alternating turns.  `python bench/bench_kvm.py`
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from mmap import mmap
from pathlib import Path

from vblklab.kvm import host, payload
from vblklab.kvm.guest import FIRST_MSI_GSI, LINE_EDGE, PayloadVm

BELL = payload.REGISTERS_GPA + 0x50
COUNT, PAIRS = 5_000, 5
STOP = 1_000_000


def median_ns(turn: Callable[[], object]) -> int:
    times = []
    for _ in range(COUNT):
        start = time.perf_counter_ns()
        turn()
        times.append(time.perf_counter_ns() - start)
    return int(statistics.median(times))


def device(kick: int, call: int) -> int:
    """The device's process: every kick is answered by a call."""
    child = os.fork()
    if not child:
        while os.eventfd_read(kick) < STOP:
            os.eventfd_write(call, 1)
        os._exit(0)
    return child


def ours() -> tuple[int, int]:
    """ns of a doorbell exit, and of ioeventfd + irqfd."""
    guest = PayloadVm(memoryview(mmap(-1, 4096)), memoryview(mmap(-1, 4096)), lambda exit_: 0)
    kick, call = os.eventfd(0), os.eventfd(0)
    with guest.vcpu.owned():
        guest.set_up_apic(LINE_EDGE)
        left = median_ns(lambda: guest.ring(BELL, 0, leaves=True))
        guest.vm.ioeventfd(kick, BELL, 4, datamatch=0)
        guest.vm.irqfd(call, FIRST_MSI_GSI)
        child = device(kick, call)

        def turn() -> None:
            guest.ring(BELL, 0, leaves=False)
            guest.idle()

        there_and_back = median_ns(turn)
        os.eventfd_write(kick, STOP)
        os.waitpid(child, 0)
    guest.close()
    os.close(kick)
    os.close(call)
    return left, there_and_back


def in_c(program: Path, image: Path) -> tuple[int, int]:
    command = [program, image, str(COUNT), hex(payload.MSI_VECTORS[0])]
    first, second = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(first), int(second)


def main() -> None:
    works, why, gain = host.found()
    if not works:
        print(f"no KVM here: {why}; {gain}")
        return
    compiler = shutil.which("cc") or shutil.which("gcc")
    with tempfile.TemporaryDirectory() as folder:
        program, image = Path(folder, "kvm_loop"), Path(folder, "payload")
        image.write_bytes(payload.image())
        if compiler is not None:
            source = Path(__file__).with_name("kvm_loop.c")
            subprocess.run([compiler, "-O2", "-Wall", "-pthread", "-o", program, source], check=True)
        mine, peer = [], []
        for _ in range(PAIRS):
            mine.append(ours())
            if compiler is not None:
                peer.append(in_c(program, image))
    load = os.getloadavg()[0]
    print(f"{host.flavour()}, Python {sys.version.split()[0]}, load average {load:.1f}; medians of {PAIRS} turns of {COUNT:,} round trips")
    for number, name in enumerate(("doorbell exit", "ioeventfd + irqfd")):
        us = statistics.median(one[number] for one in mine) / 1e3
        if not peer:
            print(f"{name}: {us:.1f} µs; no C compiler here to compare with")
            continue
        c_us = statistics.median(one[number] for one in peer) / 1e3
        ratios = sorted(a[number] / b[number] for a, b in zip(mine, peer, strict=True))
        said = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{name}: {us:.1f} µs, C {c_us:.1f} µs, ratio {statistics.median(ratios):.2f} (turns: {said}; goal 2.5)")


if __name__ == "__main__":
    main()
