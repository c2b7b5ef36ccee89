"""Live: 128 KiB sequential reads at iodepth 8 from a warm image, driver and device in two processes, against plain preadv.

Both read the same file into buffers of the same size, in alternating pairs.  `python bench/bench_live.py`
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time

import vblklab as vb

SIZE, BLOCK, DEPTH = 512 << 20, 128 << 10, 8


def plain(path: str) -> float:
    """Bytes per second of preadv into eight buffers in turn, in shared memory as the guest's are."""
    fd = os.open(path, os.O_RDONLY)
    buffer = os.memfd_create("bench")
    os.ftruncate(buffer, BLOCK * DEPTH)
    views = memoryview(mmap.mmap(buffer, BLOCK * DEPTH))
    slots = [[views[i * BLOCK : (i + 1) * BLOCK]] for i in range(DEPTH)]
    for slot in slots:
        os.preadv(fd, slot, 0)
    start = time.perf_counter()
    for number in range(SIZE // BLOCK):
        os.preadv(fd, slots[number % DEPTH], number * BLOCK)
    seconds = time.perf_counter() - start
    os.close(fd)
    os.close(buffer)
    return SIZE / seconds


def live(path: str, batch: int, trace: bool, poll: bool = True) -> vb.Run:
    """The same reads through driver, ring and device."""
    app = vb.Fio(rw="read", bs=BLOCK, iodepth=DEPTH, iodepth_batch=batch, size=SIZE)
    recipe = vb.Pipeline(app=app, driver=vb.VirtioBlkDriver(poll=poll), disk=vb.ImageFile(path, read_only=True))
    return recipe.run(vb.LiveMachine(poll_us=50, trace=trace))


def main() -> None:
    with tempfile.NamedTemporaryFile(dir=".", suffix=".img") as image:
        block = os.urandom(1 << 20)
        for _ in range(SIZE >> 20):
            image.write(block)
        image.flush()
        plain(image.name)
        for batch in (1, 4):
            ratios = []
            for _ in range(5):
                run = live(image.name, batch, trace=False)
                ratios.append(run.bytes * 1e9 / run.duration_ns / plain(image.name))
            print(f"iodepth {DEPTH}, iodepth_batch {batch}: {statistics.median(ratios):.2f} of plain preadv (five pairs: "
                  f"{', '.join(f'{ratio:.2f}' for ratio in sorted(ratios))}; goal 0.7)")  # fmt: skip
        run = live(image.name, 1, trace=True)
        hard = sum(one for one, _ in run.split.values())
        soft = sum(one for _, one in run.split.values())
        print(f"with tracing: {run.duration_ns / run.ios / 1e3:.1f} µs an I/O; of its latency {hard / 1e3:.1f} µs kernel and hardware, "
              f"{soft / 1e3:.1f} µs python (waiting for others included)")  # fmt: skip


if __name__ == "__main__":
    main()
