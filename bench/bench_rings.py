"""What a virtqueue costs per I/O: one buffer from ``add_sgs`` to ``get_buf`` through both halves, split and packed.

    python bench/bench_rings.py                       this tree
    python bench/bench_rings.py --against FOLDER      beside another checkout: its cost, and the ratio, measured in turns

One round offers, kicks, serves and takes back a batch of requests of three segments, as virtio-blk's are, on a ring of 256 entries;
nothing of a device, an engine or a disk is in it.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BATCH, ROUNDS, TURNS = 32, 400, 15
KINDS = {
    "split, indirect": (False, 8, False),
    "split, three descriptors": (False, 0, False),
    "split, indirect, in order": (False, 8, True),
    "packed, indirect": (True, 8, False),
    "packed, three descriptors": (True, 0, False),
    "packed, indirect, in order": (True, 8, True),
}


def halves(packed: bool, segments: int, in_order: bool) -> tuple[Any, Any] | None:
    """Both halves over one memory; None where this package cannot do it."""
    from vblklab import ring
    from vblklab.memory import GuestMemory, GuestPages

    if packed and not hasattr(ring, "PackedDriver"):
        return None
    driver_half, device_half = (ring.PackedDriver, ring.PackedDevice) if packed else (ring.SplitDriver, ring.SplitDevice)
    if in_order and "in_order" not in inspect.signature(driver_half).parameters:
        return None
    more = {"in_order": True} if in_order else {}
    memory = GuestMemory(bytearray(1 << 20))
    driver = driver_half.alloc(GuestPages(memory, 0x1000), 256, indirect_segments=segments, **more)
    return driver, device_half(memory, driver.layout, indirect=bool(segments), chain_max=segments, **more)


def one_turn(kind: str) -> float | None:
    """Nanoseconds of processor time per I/O."""
    made = halves(*KINDS[kind])
    if made is None:
        return None
    driver, device = made
    head, data, tail = [(0x80000, 16)], (0x81000, 4096), (0x80010, 1)
    gc.collect()
    gc.disable()
    start = time.process_time_ns()
    for _ in range(ROUNDS):
        for _ in range(BATCH):
            driver.add_sgs(head, [data, tail], head)
            driver.publish()
        driver.kick_prepare()
        device.set_notification(False)
        while (chain := device.pop()) is not None:
            device.fill(chain, 4097)
        device.flush()
        device.should_notify()
        device.set_notification(True)
        device.recheck()
        driver.disable_cb()
        while driver.get_buf() is not None:
            pass
        driver.enable_cb()
        driver.enable_cb_check()
    took = time.process_time_ns() - start
    gc.enable()
    assert driver.num_free == 256 and device.in_flight == 0
    return took / ROUNDS / BATCH


def turn_in(folder: Path) -> dict[str, float | None]:
    """One turn of each kind in an interpreter of its own over the package in ``folder``."""
    command = [sys.executable, str(Path(__file__).resolve()), "--turn"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(folder)}, cwd=folder, capture_output=True, text=True, check=True)
    found: dict[str, float | None] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout of this project")
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.turn:
        print(json.dumps({kind: one_turn(kind) for kind in KINDS}))
        return
    here, other = Path(__file__).resolve().parents[1], given.against
    turns: list[tuple[dict[str, float | None], dict[str, float | None]]] = []
    for _ in range(TURNS):
        turns.append((turn_in(here), turn_in(other) if other else {}))
    print("| ring | ns per I/O, median (least … most) |" + (" before | ratio, median of the turns |" if other else ""))
    print("|---|---:|" + ("---:|---:|" if other else ""))
    for kind in KINDS:
        ours = [cost for turn, _ in turns if (cost := turn[kind]) is not None]
        row = f"| {kind} | {statistics.median(ours):,.0f} ({min(ours):,.0f} … {max(ours):,.0f}) |"
        if other:
            pairs = [(a, b) for mine, theirs in turns if (a := mine[kind]) is not None and (b := theirs[kind]) is not None]
            before = f"{statistics.median(b for _, b in pairs):,.0f}" if pairs else "-"
            row += f" {before} | {f'{statistics.median(a / b for a, b in pairs):.2f}' if pairs else '-'} |"
        print(row)


if __name__ == "__main__":
    main()
