"""A device from an empty class, on the machines: same bytes as the package's own, whatever order things come in."""

from __future__ import annotations

import struct
from collections.abc import Generator
from typing import Any

import pytest

import vblklab as vb


class Serial(vb.EmptyDevice):
    device_id = 2

    def features(self) -> int:
        return 1 << 32 | 1 << 29 | 1 << 28 | 1 << 9

    def read_config(self) -> bytes:
        return self.capacity_sectors.to_bytes(8, "little")

    def serve(self, readable: list[memoryview], writable: list[memoryview]) -> Generator[Any, int, int]:
        kind, _, sector = struct.unpack("<IIQ", readable[0])
        if kind == 0:
            yield from self.disk_read(sector, writable[:-1])
        elif kind == 1:
            yield from self.disk_write(sector, readable[1:])
        else:
            yield from self.disk_flush()
        writable[-1][0] = 0
        return sum(map(len, writable))


JOB = vb.Fio(rw="randrw", bs=4096, iodepth=8, number_ios=300, size=4 << 20, verify="crc32", fsync=16)
RECIPES = {
    "ioeventfd": {},
    "mmio-exit": {"kvm": vb.Kvm(kick="mmio-exit", call="intx")},
    "two jobs, exits": {
        "app": vb.Fio(rw="randrw", bs=4096, iodepth=4, number_ios=200, numjobs=2, size=4 << 20, verify="crc32"),
        "kvm": vb.Kvm(kick="mmio-exit"),
    },
    "pci": {"transport": vb.Pci()},
    "blocking engine": {"engine": vb.Sync()},
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("interleave", ["cost", "random"])
def test_it_serves_the_simulator_with_the_right_bytes(name: str, interleave: str) -> None:
    recipe = vb.Pipeline(app=JOB, device=Serial).replace(**RECIPES[name])
    run = recipe.run(vb.SimMachine(interleave=interleave))
    assert (run.errors, run.mismatches) == (0, 0)
    assert run.ios


def test_it_serves_the_live_machine() -> None:
    run = vb.Pipeline(app=JOB, device=Serial).run(vb.LiveMachine())
    assert (run.errors, run.mismatches) == (0, 0)


def test_an_empty_class_is_no_device() -> None:
    with pytest.raises(vb.VblkError, match="DeviceID reads 0"):
        vb.Pipeline(device=vb.EmptyDevice).boot(vb.SimMachine())


def test_no_context_takes_a_path_that_would_pass_it_by() -> None:
    vm = vb.Pipeline(app=JOB, device=Serial).boot(vb.SimMachine())
    assert any(line.startswith("plain path: iothread") for line in vm.explain())


def test_a_reset_waits_for_the_disk_and_the_driver_can_begin_again() -> None:
    vm = vb.Pipeline(app=vb.Fio(rw="randread", bs=4096, iodepth=4, number_ios=50), device=Serial).boot(vb.SimMachine())
    vm.step_until("nvme_fetch")
    vm.registers.write(0x070, 0)
    assert vm.registers.read(0x070) == 15
    vm.task(vm.driver.restart())
    assert vm.registers.read(0x070) == 15
    vm.run()


def test_an_answer_that_is_no_length_is_an_error() -> None:
    class Forgets(Serial):
        def serve(self, readable: Any, writable: Any) -> Any:
            yield from super().serve(readable, writable)

    with pytest.raises(vb.ConfigError, match=r"serve\(\) returned None"):
        vb.Pipeline(app=JOB, device=Forgets).run(vb.SimMachine())
