"""A stock Linux on our device, served over vhost-user: file systems, fio, resize, a device that raises, and one that is killed.

Booting takes longest, so one guest has all the disks that can live together.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import vblklab as vb
from vblklab.errors import GuestTimeout
from vblklab.machine.serve import Served
from vblklab.peer import GuestVm, LinuxGuest, VhostUserDisk
from vblklab.peer.kernels import find_kernel

pytestmark = pytest.mark.guest

SIZE = 64 << 20
JOB = vb.Fio(
    rw="randrw",
    bssplit="512/20:4k/50:64k/20:1M/10",
    verify="crc32",
    iodepth=32,
    numjobs=4,
    number_ios=400,
    size=16 << 20,
    offset_increment=16 << 20,
)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return empty_image(tmp_path_factory.mktemp("guest") / "disk.img")


@pytest.fixture(scope="module")
def served(image: Path) -> Iterator[Served]:
    with vb.serve(vb.VirtioBlkDevice(queues=4, serial="real-guest"), vb.ImageFile(image)) as served:
        yield served


class Broken(vb.VirtioBlkDevice):
    """A learner's device that raises for one sector."""

    def check(self, request: Any) -> int:
        if request.sector <= 2048 < request.sector + request.length // 512:
            raise ZeroDivisionError("a slip")
        return super().check(request)


@pytest.fixture(scope="module")
def broken() -> Iterator[Served]:
    with vb.serve(Broken, vb.Ram(16 << 20), show=lambda text: None) as served:
        yield served


@pytest.fixture(scope="module")
def read_only_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guest") / "ro.img"
    path.write_bytes(b"only to be read!" * 65536)
    return path


@pytest.fixture(scope="module")
def packed_images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [empty_image(tmp_path_factory.mktemp("guest") / "packed.img") for _ in range(2)]


def empty_image(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture(scope="module")
def guest(served: Served, broken: Served, read_only_image: Path, packed_images: list[Path]) -> Iterator[GuestVm]:
    """/dev/vda is ``served``, vdb raises, vdc is read-only, vdd and vde have packed rings with and without EVENT_IDX."""
    with ExitStack() as stack:
        disks = [VhostUserDisk(served.socket, queues=4), VhostUserDisk(broken.socket)]
        refuses = stack.enter_context(vb.serve(vb.VirtioBlkDevice(), vb.ImageFile(read_only_image, read_only=True)))
        disks.append(VhostUserDisk(refuses.socket))
        for image, event_idx in zip(packed_images, (True, False), strict=True):
            device = vb.VirtioBlkDevice(queues=4, packed=True, event_idx=event_idx)
            served = stack.enter_context(vb.serve(device, vb.ImageFile(image)))
            disks.append(VhostUserDisk(served.socket, queues=4, packed=True))
        yield stack.enter_context(LinuxGuest(smp=4).boot(disks))


def digest(image: Path) -> str:
    return hashlib.md5(image.read_bytes()).hexdigest()


def guest_digest(guest: GuestVm, disk: str = "vda") -> str:
    return guest.run(f"blockdev --flushbufs /dev/{disk}; md5sum /dev/{disk}").output.split()[0]


def test_the_driver_finds_what_the_device_says(guest: GuestVm) -> None:
    assert guest.capacity("vda") == SIZE
    assert guest.run("cat /sys/block/vda/serial").output.strip() == "real-guest"
    assert guest.run("ls /sys/block/vda/mq | wc -l").output.strip() == "4"


def test_a_file_system_lives_on_it(guest: GuestVm, image: Path) -> None:
    guest.run("mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount /dev/vda /mnt")
    guest.run("for i in 1 2 3 4 5 6 7 8; do mkdir -p /mnt/d$i; dd if=/dev/urandom of=/mnt/d$i/f bs=100k count=$i 2>/dev/null; done; sync")
    sums = guest.run("cd /mnt && md5sum */f").output
    guest.run("umount /mnt && e2fsck -fn /dev/vda", timeout_s=120)
    guest.run("echo 3 > /proc/sys/vm/drop_caches; mount -o ro /dev/vda /mnt")
    assert guest.run("cd /mnt && md5sum */f").output == sums
    guest.run("umount /mnt")
    assert guest_digest(guest) == digest(image)


def test_fio_verifies_what_it_wrote(guest: GuestVm, image: Path) -> None:
    result = guest.fio(JOB, timeout_s=300)
    assert [job["error"] for job in result["jobs"]] == [0] * 4
    assert sum(job["read"]["total_ios"] for job in result["jobs"]) >= 1600
    assert guest_digest(guest) == digest(image)


def test_discarded_and_zeroed_blocks_read_as_zeroes(guest: GuestVm) -> None:
    guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=4 oflag=direct 2>/dev/null")
    guest.run("/bin/blkdiscard -o 0 -l 1048576 /dev/vda && /bin/blkdiscard -z -o 1048576 -l 1048576 /dev/vda")
    assert guest.run("dd if=/dev/vda bs=1M count=2 iflag=direct 2>/dev/null | tr -d '\\000' | wc -c").output.strip() == "0"
    assert guest.run("dd if=/dev/vda bs=1M skip=2 count=2 iflag=direct 2>/dev/null | tr -d '\\000' | wc -c").output.strip() != "0"


@pytest.mark.parametrize(("number", "event_idx"), [(0, True), (1, False)], ids=["event_idx", "flags"])
def test_linux_drives_packed_rings(guest: GuestVm, packed_images: list[Path], number: int, event_idx: bool) -> None:
    """QEMU with packed=on: what Linux takes for a packed virtqueue is what our device half does; SeaBIOS drives a split one before."""
    disk = f"vd{'de'[number]}"
    job = vb.Fio(**{**JOB.jobs[0].options(), "number_ios": 100})
    features = guest.run(f"cat /sys/block/{disk}/device/features").output
    assert (features[34], features[29]) == ("1", str(int(event_idx)))
    result = guest.fio(job, filename=f"/dev/{disk}", timeout_s=300)
    assert [one["error"] for one in result["jobs"]] == [0] * len(result["jobs"])
    assert guest_digest(guest, disk) == digest(packed_images[number])
    assert f"I/O error, dev {disk}" not in guest.run("dmesg").output


def kill_while_fio_runs(guest: GuestVm, served: Served, job: vb.Fio, kills: int) -> list[Any]:
    """fio's results; the back-end is killed and started again while it runs, and it runs again until all kills are done."""
    results: list[Any] = []
    enough = threading.Event()

    def run() -> None:
        try:
            while not enough.is_set():
                results.append(guest.fio(job, timeout_s=300))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(kills):
            before = served.counters()["requests"]
            while served.counters()["requests"] < before + 50 and thread.is_alive():
                thread.join(0.02)
            served.kill()
            served.start()
    finally:
        enough.set()
        thread.join()
    if isinstance(results[-1], BaseException):
        raise results[-1]
    return results


def _killed(image: Path, kills: int, ios: int) -> None:
    """A guest and a server of its own, because the processes that are started again must end with the test."""
    job = vb.Fio(**{**JOB.jobs[0].options(), "number_ios": ios})
    with (
        vb.serve(vb.VirtioBlkDevice(queues=4), vb.ImageFile(image)) as served,
        LinuxGuest(smp=4).boot([VhostUserDisk(served.socket, queues=4)]) as guest,
    ):
        for result in kill_while_fio_runs(guest, served, job, kills):
            assert [one["error"] for one in result["jobs"]] == [0] * 4
        assert "I/O error" not in guest.run("dmesg").output
        assert guest_digest(guest) == digest(image)


@pytest.fixture
def own_image(tmp_path: Path) -> Path:
    return empty_image(tmp_path / "own.img")


def test_a_back_end_that_is_killed_loses_nothing(own_image: Path) -> None:
    _killed(own_image, 3, 600)


@pytest.mark.long
def test_a_back_end_that_is_killed_twenty_times_loses_nothing(own_image: Path) -> None:
    _killed(own_image, 20, 6000)


def test_a_new_size_is_seen_by_the_guest(guest: GuestVm, served: Served, image: Path) -> None:
    served.resize(SIZE + (1 << 20))
    sectors = (SIZE >> 9) + 2048
    script = f"for i in $(seq 2500); do [ $(cat /sys/block/vda/size) = {sectors} ] && exit 0; usleep 20000; done; exit 1"
    guest.run(script, timeout_s=120)
    guest.run(f"dd if=/dev/zero of=/dev/vda bs=1M seek={SIZE >> 20} count=1 oflag=direct 2>/dev/null")
    assert os.path.getsize(image) == SIZE + (1 << 20)


def test_a_device_that_raises_costs_one_request(guest: GuestVm, broken: Served) -> None:
    bad = guest.run("dd if=/dev/vdb of=/dev/null bs=4k skip=256 count=1 iflag=direct 2>&1", check=False)
    good = guest.run("dd if=/dev/vdb of=/dev/null bs=4k count=256 iflag=direct 2>&1", check=False)
    assert bad.status != 0 and "Input/output error" in bad.output
    assert good.status == 0
    broken.counters()  # what it said before is here too
    assert broken.exceptions and all("ZeroDivisionError: a slip" in text for text in broken.exceptions)


def test_a_read_only_disk_refuses_and_keeps_its_bytes(guest: GuestVm, read_only_image: Path) -> None:
    assert guest.run("cat /sys/block/vdc/ro").output.strip() == "1"
    assert guest.run("dd if=/dev/zero of=/dev/vdc bs=512 count=1 oflag=direct", check=False).status != 0
    assert guest_digest(guest, "vdc") == digest(read_only_image)


@pytest.mark.long
@pytest.mark.parametrize("flavour", ["cloud", "generic"])
def test_every_kernel_that_debian_offers(flavour: str, tmp_path: Path) -> None:
    """A file system, a verify job with its steps, and a device that dies, on each of Debian's two kernels."""
    try:
        find_kernel(flavour)
    except vb.NotHere as missing:
        pytest.skip(f"{missing}; make guest GUEST_ARGS=--all brings both")
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    job = vb.Fio(rw="randrw", bs=4096, iodepth=8, number_ios=300, size=16 << 20, offset=32 << 20, verify="crc32")
    recipe = vb.Pipeline(app=job, guest=LinuxGuest(kernel=flavour), disk=vb.ImageFile(path))
    with recipe.boot(vb.VhostUserMachine()) as vm:
        assert ("cloud" in vm.guest.kernel) == (flavour == "cloud")
        test_a_file_system_lives_on_it(vm.guest, path)
        run = vm.run()
        assert not run.errors and run.ios >= 300 and len(run.rows) >= 0.99 * run.ios, run.provenance["tracing"]
        vm.served.kill()
        vm.served.start()
        assert vm.run().ios == run.ios
        assert guest_digest(vm.guest) == digest(path)


def test_a_boot_that_takes_too_long_says_how_far_it_came() -> None:
    with pytest.raises(GuestTimeout, match=r"did not boot within 0\.5 s \(so far: .*\): give a longer boot_timeout_s") as caught:
        LinuxGuest(accel="tcg", boot_timeout_s=0.5).boot()
    assert "accel='tcg'" not in str(caught.value), "it has that already"
