"""A verify job over a real image ends without a mismatch, and the image equals a replay that shares no code with the package."""

from __future__ import annotations

import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

import vblklab as vb

SIZE = 16 << 20
_SECTORS = 2053  # of the pool of contents, as guest/verify.py documents them


def _noise(seed: int) -> bytes:
    return np.random.PCG64(seed).random_raw(_SECTORS * 64).tobytes()


def _verify_sector(noise: bytes, sector: int, stamp: int, seed: int) -> bytes:
    """One sector of write number ``stamp`` with verify=crc32."""
    place = (sector + (stamp * 2654435761 & 0xFFFFFFFF)) % _SECTORS * 512
    body = noise[place + 96 : place + 512]
    header = np.zeros(96, np.uint8)
    words = header.view("<u4")
    words[0], words[1], words[2], words[4], words[5] = int.from_bytes(b"vblk", "little"), stamp, sector, seed, 0
    words[6] = zlib.crc32(body)
    return header.tobytes() + body


def _plain(noise: bytes, offset: int, length: int, stamp: int) -> bytes:
    """A whole write without verify."""
    at = (stamp * 2654435761 ^ offset >> 9) % (len(noise) >> 3) << 3
    return (noise * 2)[at : at + length]


def replay(iolog: list[tuple[int, int, int, int, int]], size: int, seed: int, *, verify: bool) -> np.ndarray:
    """The image that the writes of ``iolog`` leave, in the order of issue, on a file of zeroes."""
    noise = _noise(seed)
    image = np.zeros(size, np.uint8)
    last: dict[int, int] = {}
    for stamp, op, offset, length, _ in iolog:
        if op != 1:
            continue
        if not verify:
            image[offset : offset + length] = np.frombuffer(_plain(noise, offset, length, stamp), np.uint8)
        for sector in range(offset >> 9, (offset + length) >> 9):
            last[sector] = stamp
    if verify:
        for sector, stamp in last.items():
            image[sector << 9 : (sector + 1) << 9] = np.frombuffer(_verify_sector(noise, sector, stamp, seed), np.uint8)
    return image


def _image(folder: Path) -> Path:
    path = folder / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def _recipe(path: Path, number_ios: int, **more: object) -> vb.Pipeline:
    options: dict[str, object] = dict(
        rw="randrw", bssplit="512/40:1k/20:4k/30:64k/6:256k/4", iodepth=64, numjobs=4, number_ios=number_ios, size=SIZE, randseed=7
    )
    return vb.Pipeline(
        app=vb.Fio(segment_bytes=1531, **(options | more)),
        iostack=vb.IOStack(max_segments=33),
        device=vb.VirtioBlkDevice(queues=4),
        kvm=vb.Kvm(vcpus=4),
        disk=vb.ImageFile(str(path)),
    )


MACHINES = {
    "simulated": lambda: vb.SimMachine(iolog=True, trace=0),
    "random interleaving": lambda: vb.SimMachine(seed=3, interleave="random", iolog=True, trace=0),
    "two processes": lambda: vb.LiveMachine(iolog=True),
    "two threads": lambda: vb.LiveMachine(device="thread", iolog=True),
    "vhost-user": lambda: vb.VhostUserMachine(trace=False, iolog=True),
    "QEMU's storage daemon": lambda: vb.VhostUserMachine(trace=False, iolog=True),
}
WHOLE = ("simulated", "two processes", "QEMU's storage daemon")
EVERYWHERE = [pytest.param(name, marks=[pytest.mark.qemu] if "QEMU" in name else []) for name in MACHINES]


def _check(machine: str, folder: Path, ios_a_job: int) -> dict[int, list[tuple[int, int, int]]]:
    path = _image(folder)
    recipe = _recipe(path, ios_a_job, verify="crc32")
    if "QEMU" in machine:
        recipe = recipe.replace(host=vb.StorageDaemon(str(path), queues=4))
    run = recipe.run(MACHINES[machine]())
    assert (run.ios, run.errors, run.mismatches) == (4 * ios_a_job, 0, 0), [job.mismatches for job in run.jobs]
    assert sum(job.verified_ios for job in run.jobs) > ios_a_job, "the second phase read back what was written"
    image = np.frombuffer(path.read_bytes(), np.uint8)
    assert np.array_equal(image, replay(run.iolog, SIZE, 7, verify=True))
    ios: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for _, op, offset, length, task in run.iolog:
        ios[task].append((op, offset, length))
    return ios


@pytest.mark.parametrize("machine", EVERYWHERE)
def test_a_verify_job_of_20_000_ios_leaves_the_image_of_an_independent_replay(machine: str, tmp_path: Path) -> None:
    _check(machine, tmp_path, 5000 if machine in WHOLE else 1000)


@pytest.mark.long
@pytest.mark.parametrize("machine", EVERYWHERE)
def test_a_verify_job_of_100_000_ios_leaves_the_image_of_an_independent_replay(machine: str, tmp_path: Path) -> None:
    _check(machine, tmp_path, 25_000)


def test_the_live_run_performs_the_same_ios_as_the_simulated_one(tmp_path: Path) -> None:
    simulated = _check("simulated", tmp_path, 300)
    live = _check("two processes", tmp_path, 300)
    # the order of reading back depends on time; the job itself does not
    assert {task: ios[:300] for task, ios in simulated.items()} == {task: ios[:300] for task, ios in live.items()}


@pytest.mark.parametrize("machine", ["simulated", "two processes"])
def test_serialize_overlap_alone_makes_the_replay_defined(machine: str, tmp_path: Path) -> None:
    path = _image(tmp_path)
    run = _recipe(path, 800, serialize_overlap=1, size=1 << 20).run(MACHINES[machine]())
    assert not run.errors
    image = np.frombuffer(path.read_bytes(), np.uint8)
    assert np.array_equal(image, replay(run.iolog, SIZE, 7, verify=False))


class BitFlip(vb.VirtioBlkDevice):
    """Delivers every tenth read with one bit changed."""

    reads = 0

    def complete_batch(self, completed):  # type: ignore[no-untyped-def]
        for op in completed:
            self.reads += op.op == 0
            if op.op == 0 and not self.reads % 10:
                op.segments[-1][-1] ^= 1
        yield from super().complete_batch(completed)


@pytest.mark.parametrize("machine", ["simulated", "two threads"])
def test_verify_finds_a_flipped_bit(machine: str, tmp_path: Path) -> None:
    recipe = _recipe(_image(tmp_path), 300, verify="crc32", bs=4096, bssplit=None, size=1 << 20)
    run = recipe.replace(device=BitFlip(queues=4)).run(MACHINES[machine]())
    assert run.mismatches and not run.errors
    assert any("checksum" in text for job in run.jobs for text in job.mismatches)
