"""Every driver half against every device half: formats, features, transports and paths, the same job, the same bytes.

A half is the package's ring class as a machine's path drives it: the plain parts, the simulator's fused guest and device (where they
take the recipe), the live machine's batch loop in Python or compiled.  The suite runs a set in which every pair of choices meets,
``--long`` all of them.  Split indices are moved to just before their wrap between boot and the first I/O; packed rings are small and go
around many times.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import vblklab as vb
from vblklab.engine.compiled import compiled_missing
from vblklab.machine.sim import SimVm
from vblklab.ring import SplitDevice, SplitDriver

START = 65500
PATHS = ["plain", "fused", "random", "live", "compiled"]
CHOICES: dict[str, list[Any]] = {
    "path": PATHS,
    "packed": [False, True],
    "indirect": [False, True],
    "event_idx": [False, True],
    "in_order": [False, True],
    "transport": ["mmio", "pci"],
    "shuffled": [False, True],
}
Combination = tuple[Any, ...]


def _pairs(combination: Combination) -> set[tuple[Any, ...]]:
    return {(i, combination[i], j, combination[j]) for i, j in itertools.combinations(range(len(combination)), 2)}


def pairwise(everything: Sequence[Combination]) -> list[Combination]:
    """Few combinations in which every two choices meet, greedily."""
    missing: set[tuple[Any, ...]] = set().union(*map(_pairs, everything))
    order = random.Random(3).sample(list(everything), len(everything))
    chosen = []
    while missing:
        best = max(order, key=lambda one: len(_pairs(one) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


EVERYTHING = list(itertools.product(*CHOICES.values()))
CHOSEN = pairwise(EVERYTHING)


class Shuffled(vb.Simulated):
    """Whatever ended together ends in another order."""

    def reap(self) -> list[Any]:
        found = list(super().reap())
        return [*found[1::2], *reversed(found[::2])]


def job(seed: int) -> vb.Fio:
    return vb.Fio(rw="randrw", bs=4096, iodepth=12, number_ios=300, verify="crc32", randseed=seed, size=1 << 20)


def recipe(seed: int, choice: dict[str, Any], disk: Any) -> vb.Pipeline:
    queue = (vb.Packed if choice["packed"] else vb.Split)(32, in_order=choice["in_order"])
    device = vb.VirtioBlkDevice(event_idx=choice["event_idx"], indirect=choice["indirect"], seg_max=6)
    transport = vb.Pci() if choice["transport"] == "pci" else vb.Mmio()
    live = choice["path"] in ("live", "compiled")
    engine = None if live or not choice["shuffled"] else Shuffled()
    return vb.Pipeline(app=job(seed), queue=queue, device=device, transport=transport, disk=disk, engine=engine)


def near_the_wrap(vm: Any) -> None:
    """Both halves of every split ring, and the words between them, as after 65,500 buffers."""
    for number, driver in enumerate(vm.driver.queues):
        if not isinstance(driver, SplitDriver):
            continue
        device = vm.device.queues[number]
        assert isinstance(device, SplitDevice)
        for half in (driver, device):
            for name in vars(half):
                if name.endswith("_idx") and name != "event_idx":
                    setattr(half, name, START)
        words, used = driver._avail, driver._used16
        words[1] = used[1] = START
        if driver.event_idx:
            words[driver._used_event_at] = used[driver._avail_event_at] = START


@cache
def expected(seed: int, folder: Path) -> bytes:
    """The disk after the job on the plain path of a split ring with every feature off."""
    plain = dict.fromkeys(CHOICES, False) | {"path": "plain", "transport": "mmio"}
    return played(seed, plain, folder / "expected.img")


def played(seed: int, choice: dict[str, Any], image: Path) -> bytes:
    """Run the job; nothing is lost, everything is verified; the bytes of the disk."""
    image.write_bytes(bytes(1 << 20))
    path = choice["path"]
    if path in ("live", "compiled"):
        machine: Any = vb.LiveMachine(trace=False, fast="off" if path == "live" else "auto")
    elif path == "random":
        machine = vb.SimMachine(seed=seed, interleave="random", fast="off")
    else:
        machine = vb.SimMachine(seed=seed, fast="off" if path == "plain" else "auto")
    vm = recipe(seed, choice, vb.ImageFile(str(image))).boot(machine)
    wanted = {28: choice["indirect"], 29: choice["event_idx"], 34: choice["packed"], 35: choice["in_order"]}
    assert all(bool(vm.driver.features >> bit & 1) == on for bit, on in wanted.items())
    ring = vm.driver.queues[0]
    if isinstance(vm, SimVm):
        near_the_wrap(vm)
    run = vm.run()
    assert (run.ios, run.errors, run.mismatches) == (300, 0, 0) and run.jobs[0].verified_ios
    assert vm.driver.queues[0] is ring and ring.num_free == ring.size
    if isinstance(vm, SimVm):
        assert vm.device.queues[0].in_flight == 0
        if not choice["packed"]:
            assert vm.device.queues[0].used_idx < START, "it has wrapped"
    return image.read_bytes()


def name(combination: Combination) -> str:
    words = [key if value is True else value for key, value in zip(CHOICES, combination, strict=True) if value is not False]
    return "-".join(words)


@pytest.mark.parametrize(
    "combination",
    [pytest.param(one, id=name(one), marks=[] if one in CHOSEN else [pytest.mark.long]) for one in EVERYTHING],
)
def test_the_same_bytes_whatever_stands_on_either_side(combination: Combination, tmp_path: Path) -> None:
    choice = dict(zip(CHOICES, combination, strict=True))
    if choice["path"] == "compiled" and (why := compiled_missing()):
        pytest.skip(why)
    seed = 1 + EVERYTHING.index(combination) % 3
    assert played(seed, choice, tmp_path / "disk.img") == expected(seed, tmp_path)


def test_every_two_choices_meet_in_the_suite() -> None:
    assert set().union(*map(_pairs, CHOSEN)) == set().union(*map(_pairs, EVERYTHING)) and len(CHOSEN) < 20
