"""What a stock Linux makes of the device's configuration: topology, limits, the cache mode; and of zones, which its QEMU does not know."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import vblklab as vb
from vblklab.peer import GuestVm, LinuxGuest, VhostUserDisk

pytestmark = pytest.mark.guest

SIZE = 32 << 20
DEVICE = vb.VirtioBlkDevice(
    physical_block_size=4096,
    alignment_offset=1024,
    min_io_size=8192,
    opt_io_size=65536,
    size_max=65536,
    seg_max=30,
    max_discard_sectors=4096,
    max_discard_seg=8,
    secure_erase=True,
    lifetime=(1, 2, 3),
    zones=vb.Zones(model="host-aware", zone_sectors=2048),
)
QUEUE = {
    "queue/logical_block_size": 512,
    "queue/physical_block_size": 4096,
    "queue/minimum_io_size": 8192,
    "queue/optimal_io_size": 65536,
    "queue/max_segments": 30,
    "queue/max_segment_size": 65536,
    "queue/discard_granularity": 512,
    "queue/discard_max_hw_bytes": 4096 * 512,
    "queue/max_discard_segments": 8,
    "queue/write_zeroes_max_bytes": 4096 * 512,
    "alignment_offset": 1024,
}
"""What Linux shows under /sys/block/vda."""
F_SECURE_ERASE, F_LIFETIME, F_ZONED, F_TOPOLOGY, F_CONFIG_WCE, F_SIZE_MAX = 16, 15, 17, 10, 11, 1


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guest") / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture(scope="module")
def guest(image: Path) -> Iterator[GuestVm]:
    with vb.serve(DEVICE, vb.ImageFile(image)) as served, LinuxGuest().boot([VhostUserDisk(served.socket)]) as guest:
        yield guest


def test_linux_shows_the_topology_and_the_limits(guest: GuestVm) -> None:
    said = guest.run(f"cd /sys/block/vda && for f in {' '.join(QUEUE)}; do echo $f $(cat $f); done").output
    assert dict(line.split() for line in said.strip().splitlines()) == {name: str(value) for name, value in QUEUE.items()}


def test_what_qemu_7_2_does_not_pass_on_is_not_negotiated(guest: GuestVm) -> None:
    """SECURE_ERASE, LIFETIME and ZONED are offered to QEMU and end there, so the host-aware disk is an ordinary one."""
    bits = guest.run("cat /sys/block/vda/device/features").output.strip()
    assert [bits[bit] for bit in (F_SIZE_MAX, F_TOPOLOGY, F_CONFIG_WCE)] == ["1"] * 3
    assert [bits[bit] for bit in (F_SECURE_ERASE, F_LIFETIME, F_ZONED)] == ["0"] * 3
    assert guest.run("cat /sys/block/vda/queue/zoned").output.strip() == "none"
    assert guest.run("/bin/blkdiscard -s -l 1048576 /dev/vda", check=False).status != 0


@pytest.mark.parametrize("mode", ["write through", "write back", "write through", "write back"])
def test_linux_switches_the_cache_mode(guest: GuestVm, mode: str) -> None:
    said = guest.run(f"cd /sys/block/vda && echo '{mode}' > cache_type && cat cache_type queue/write_cache").output
    assert said.strip().splitlines() == [mode, mode]
    guest.run("dd if=/dev/urandom of=/dev/vda bs=64k count=4 oflag=direct conv=fsync")


def test_linux_writes_anywhere_on_a_host_aware_disk(guest: GuestVm, image: Path) -> None:
    for where in (31, 7, 8, 2):
        guest.run(f"dd if=/dev/urandom of=/dev/vda bs=1M count=1 seek={where} oflag=direct")
    guest.run("/bin/blkdiscard -z -o 7340032 -l 1048576 /dev/vda && blockdev --flushbufs /dev/vda")
    assert guest.run("md5sum /dev/vda").output.split()[0] == hashlib.md5(image.read_bytes()).hexdigest()
