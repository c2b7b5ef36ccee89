"""Our driver and our device over vhost-user, our driver on QEMU's device, and front-ends that mean no good."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vblklab as vb
from vblklab.machine.serve import Served
from vblklab.peer.storage_daemon import StorageDaemon

from .raw_front_end import is_served

VERIFY_JOB = {
    "rw": "randrw",
    "bssplit": "512/40:1k/20:4k/30:64k/6:256k/4",
    "iodepth": 64,
    "numjobs": 4,
    "size": 16 << 20,
    "verify": "crc32",
}


def recipe(ios: int, **parts: object) -> vb.Pipeline:
    return vb.Pipeline(app=vb.Fio(**VERIFY_JOB, number_ios=ios), device=vb.VirtioBlkDevice(queues=4)).replace(**parts)


@pytest.mark.parametrize("trace", [True, False], ids=["plain", "batch"])
@pytest.mark.parametrize("engine", [vb.Sync, vb.Threads], ids=["sync", "threads"])
def test_a_verify_job_on_our_device(trace: bool, engine: type, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    run = recipe(1000, disk=vb.ImageFile(image), engine=engine).run(vb.VhostUserMachine(trace=trace))
    assert run.ios >= 4000 and not run.errors and not run.mismatches


def test_the_same_recipe_on_three_machines() -> None:
    same = recipe(100, disk=vb.Ram(64 << 20))
    runs = [same.run(machine) for machine in (vb.SimMachine(), vb.LiveMachine(), vb.VhostUserMachine())]
    assert len({(run.ios, run.bytes) for run in runs}) == 1 and not any(run.errors or run.mismatches for run in runs)


def test_what_a_connection_cannot_carry_is_said() -> None:
    device = vb.VirtioBlkDevice(ring_reset=True, notification_data=True)
    run = recipe(1, device=device, disk=vb.Ram(64 << 20)).run(vb.VhostUserMachine())
    said = " ".join(run.notes)
    assert "RING_RESET is not offered" in said and "NOTIFICATION_DATA is not offered" in said
    assert "not offered" not in " ".join(recipe(1, disk=vb.Ram(64 << 20)).run(vb.VhostUserMachine()).notes)


def test_a_real_side_needs_this_machine() -> None:
    with pytest.raises(vb.ConfigError, match="VhostUserMachine"):
        recipe(1, host=StorageDaemon("disk.img")).run(vb.SimMachine())


def test_qemus_own_disk_needs_a_real_guest() -> None:
    with pytest.raises(vb.ConfigError, match=r"without a real guest.*vb\.StorageDaemon"):
        recipe(1, host=vb.QemuDisk("disk.img")).run(vb.VhostUserMachine())


def test_a_vm_explains_its_path() -> None:
    class Mine(vb.VirtioBlkDevice):
        def check(self, request):  # type: ignore[no-untyped-def]
            return super().check(request)

    for device, machine, said in (
        (vb.VirtioBlkDevice, vb.VhostUserMachine(trace=False), "batch path"),
        (Mine, vb.VhostUserMachine(trace=False), "replaced by Mine.check"),
        (vb.VirtioBlkDevice, vb.VhostUserMachine(), "trace points are recorded"),
    ):
        vm = recipe(1, device=device).boot(machine)
        assert said in " ".join(vm.explain())
        vm.close()
    with vb.serve(disk=vb.Ram(1 << 20)) as served:
        vm = vb.Pipeline(host=vb.VhostUserBackend(served.socket)).boot(vb.VhostUserMachine())
        assert "is its own" in vm.explain()[0]
        vm.close()


def test_serving_where_there_is_no_live_machine_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vblklab.machine.serve.live_missing", lambda: "the live machine needs Linux")
    with pytest.raises(vb.NotHere, match="needs Linux"):
        vb.serve()


def test_a_broken_step_costs_its_request_and_shows_its_traceback() -> None:
    shown: list[str] = []

    class Broken(vb.VirtioBlkDevice):
        def check(self, request):  # type: ignore[no-untyped-def]
            if request.sector == 8:
                raise ZeroDivisionError("a slip")
            return super().check(request)

    with vb.serve(Broken, vb.Ram(1 << 20), show=shown.append) as served:
        job = vb.Fio(rw="read", bs=4096, size=65536, number_ios=16)
        run = vb.Pipeline(app=job, host=vb.VhostUserBackend(served.socket)).run(vb.VhostUserMachine())
    assert run.errors == 1
    assert len(shown) == 1 and "ZeroDivisionError: a slip" in shown[0]


# -- QEMU's device -------------------------------------------------------------------------------------------------------------


@pytest.mark.qemu
def test_a_daemon_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(vb.DiskError, match="does not exist"):
        StorageDaemon(str(tmp_path / "none.img")).start()
    with pytest.raises(vb.VblkError, match="ended with status"):
        StorageDaemon(str(tmp_path)).start()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with vb.serve(vb.VirtioBlkDevice(), vb.Ram(1 << 20)) as served:
        yield served


# -- the socket ----------------------------------------------------------------------------------------------------------------


def test_socket_paths_that_cannot_be(tmp_path: Path, served: Served) -> None:
    (tmp_path / "file").touch()
    for path, said in (
        ("x" * 200, "at most 107"),
        (str(tmp_path / "file"), "no socket"),
        (served.socket, "in use"),
        ("/nowhere/s", "folder"),
    ):
        with pytest.raises(vb.ConfigError, match=said):
            vb.serve(disk=vb.Ram(1 << 20), socket=path)


def test_a_dead_socket_is_replaced_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "disk.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with vb.serve(disk=vb.Ram(1 << 20), socket=str(path), where="thread") as served:
        is_served(served)
    assert not path.exists()


@pytest.mark.parametrize("size", [7, 64])
@pytest.mark.parametrize("options", [{}, {"event_idx": False}, {"indirect": False, "seg_max": 4}], ids=repr)
def test_packed_rings_go_over_a_connection(size: int, options: dict[str, Any]) -> None:
    app = vb.Fio(rw="randrw", bs=4096, iodepth=16, number_ios=400, verify="crc32")
    recipe = vb.Pipeline(app=app, queue=vb.Packed(size), device=vb.VirtioBlkDevice(**options), disk=vb.Ram(16 << 20))
    vm = recipe.boot(vb.VhostUserMachine())
    run = vm.run()
    assert (run.ios, run.errors, run.mismatches) == (400, 0, 0)
    assert vm.driver.features >> 34 & 1 and vm.driver.queues[0].num_free == size


@pytest.mark.qemu
def test_qemu_storage_daemon_offers_no_packed_rings(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    recipe = vb.Pipeline(app=vb.Fio(number_ios=1), queue=vb.Packed(64), host=vb.StorageDaemon(str(image)))
    with pytest.raises(vb.VirtioError, match="does not offer RING_PACKED"):
        recipe.boot(vb.VhostUserMachine())
