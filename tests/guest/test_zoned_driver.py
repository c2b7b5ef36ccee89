"""The driver's half of zoned disks: what it negotiates, what its requests carry, what it makes of reports; and whole machines."""

from __future__ import annotations

import struct
import sys
from typing import Any, ClassVar

import pytest

import vblklab as vb
from tests.guest.test_virtio_blk_driver import Board, Quiet
from tests.support import finish
from vblklab.guest.zoned import BlkZone
from vblklab.iostack import Bio, Op, Plug
from vblklab.spec.virtio import Feature
from vblklab.spec.virtio_blk import BlkFeature
from vblklab.spec.virtio_blk_zoned import ZoneModel, ZoneState, ZoneType
from vblklab.transport import MmioTransport

APPEND, REPORT, OPEN, CLOSE, FINISH, RESET, RESET_ALL = 15, 16, 18, 20, 22, 24, 26
FAILED = 128
Z = 128
"""Sectors of a zone here."""


def bench(*, offers: int = 0, config: dict[int, bytes] | None = None, device: dict[str, Any] | None = None, **zones: Any) -> Board:
    """A driver before its probe; the device's features and configuration may be spoilt."""

    class Spoilt(Quiet):
        extra: ClassVar[int] = offers

        def features(self) -> int:
            return super().features() | self.extra

    Spoilt.config = config or {}
    return Board(Spoilt(zones=vb.Zones(**({"zone_sectors": Z} | zones)), **(device or {})))


# -- probe ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("BLKZ-DRV-002")
def test_discard_is_not_accepted_from_a_host_managed_disk() -> None:
    board = bench(offers=int(BlkFeature.DISCARD)).probe()
    assert board.registers.driver_features & BlkFeature.ZONED
    assert not board.registers.driver_features & BlkFeature.DISCARD
    assert board.registers.driver_features & Feature.VERSION_1
    assert board.driver.limits.max_discard_sectors == 0


@pytest.mark.clause("BLKZ-DRV-003")
def test_discard_of_a_host_aware_disk_stays() -> None:
    board = bench(model="host-aware").probe()
    assert board.registers.driver_features & BlkFeature.DISCARD
    assert board.driver.zoned is not None
    assert board.driver.zoned.model is ZoneModel.HA
    assert board.driver.limits.chunk_sectors == 0


@pytest.mark.clause("BLKZ-DRV-001", "BLKZ-DRV-004")
def test_a_driver_without_zoned_gives_a_host_managed_disk_up() -> None:
    board = bench()
    board.driver = driver = vb.VirtioBlkDriver(features=int(vb.VirtioBlkDriver.FEATURES & ~BlkFeature.ZONED))
    old = Board()
    driver.attach(old.driver.pages, MmioTransport(board.bus), old.stack, queue_size=8)
    with pytest.raises(vb.VirtioError, match="FEATURES_OK"):
        finish(driver.probe())
    assert board.status & FAILED
    assert not board.registers.driver_features & BlkFeature.ZONED


@pytest.mark.clause("BLKZ-DRV-005", "BLKZ-DRV-006")
def test_a_host_aware_disk_is_an_ordinary_one_for_a_driver_without_zoned() -> None:
    device = Quiet(zones=vb.Zones(model="host-aware", zone_sectors=3))
    board = Board(device, features=int(vb.VirtioBlkDriver.FEATURES & ~BlkFeature.ZONED)).probe()
    assert board.driver.zoned is None
    assert board.driver.limits.chunk_sectors == 0


def test_what_the_device_says_of_its_zones() -> None:
    board = bench(zone_capacity=96, max_open_zones=3, max_active_zones=5, max_append_sectors=64, write_granularity=4096).probe()
    zoned, limits = board.driver.zoned, board.driver.limits
    assert zoned is not None
    assert (zoned.zone_sectors, zoned.nr_zones, zoned.max_open_zones, zoned.max_active_zones) == (Z, 16, 3, 5)
    assert (zoned.max_append_sectors, zoned.write_granularity, zoned.model) == (64, 4096, ZoneModel.HM)
    assert (limits.chunk_sectors, limits.physical_block_bytes, limits.io_min, limits.logical_block_bytes) == (Z, 4096, 4096, 4096)
    assert bench(model="drive-managed").probe().driver.zoned is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({92: b"\3"}, "zone model 3"),
        ({72: bytes(4)}, "zone_sectors 0"),
        ({72: b"\x60\0\0\0"}, "powers of two"),
        ({88: bytes(4)}, "write_granularity 0"),
        ({88: b"\0\3\0\0"}, "write_granularity 768"),
        ({84: b"\1\0\0\0", 88: b"\0\4\0\0"}, "max_append_sectors 1"),
    ],
)
def test_characteristics_that_cannot_be_end_the_probe(config: dict[int, bytes], message: str) -> None:
    board = bench(config=config)
    with pytest.raises(vb.VirtioError, match=message):
        board.probe()
    assert board.status & FAILED


# -- requests on the ring -----------------------------------------------------------------------------------------------------------


def sent(board: Board, op: Op, sector: int, segments: list[tuple[int, int]] | None = None, token: Any = None) -> Any:
    """The header and the pieces of one request as they lie in guest memory: (type, reserved, sector), [(gpa, length, flags)]."""
    finish(
        board.stack.submit_bio(
            Bio(op, sector, sum(n for _, n in segments or []), segments or [], 1, 0, lambda _: None, token), None, lambda: None
        )
    )
    ring = board.ring()
    chain = board.chain(ring.get("H", ring.avail_at + 4 + 2 * ((ring.avail_idx - 1) % ring.size)))
    return struct.unpack("<IIQ", board.memory.read(chain[0][0], 16)), chain


@pytest.mark.clause("BLKZ-DRV-007", "BLKZ-DRV-010")
@pytest.mark.parametrize(("op", "kind"), [(Op.ZONE_OPEN, OPEN), (Op.ZONE_CLOSE, CLOSE), (Op.ZONE_FINISH, FINISH), (Op.ZONE_RESET, RESET)])
def test_a_management_request_carries_the_zones_first_sector_and_no_data(op: Op, kind: int) -> None:
    header, chain = sent(bench().probe(), op, 3 * Z)
    assert header == (kind, 0, 3 * Z)
    assert [(length, flags) for _, length, flags in chain] == [(16, 0), (1, 2)]


@pytest.mark.clause("BLKZ-DRV-011")
def test_reset_all_carries_sector_0() -> None:
    board = bench().probe()
    assert board.driver.zoned is not None
    steps, ring = board.driver.zoned.reset_all(), board.ring()
    while not ring.avail_idx:
        next(steps)
    chain = board.chain(ring.get("H", ring.avail_at + 4))
    assert struct.unpack("<IIQ", board.memory.read(chain[0][0], 16)) == (RESET_ALL, 0, 0)
    assert len(chain) == 2


@pytest.mark.clause("BLKZ-DRV-012", "BLKZ-DRV-015")
def test_an_append_is_header_data_append_sector_and_status() -> None:
    board = bench().probe()
    header, chain = sent(board, Op.ZONE_APPEND, 2 * Z, [(0x300000, 4096), (0x302000, 512)])
    assert header == (APPEND, 0, 2 * Z)
    assert [(length, flags) for _, length, flags in chain] == [(16, 0), (4096, 0), (512, 0), (8, 2), (1, 2)]


@pytest.mark.clause("BLKZ-DRV-008")
def test_a_report_carries_its_sector() -> None:
    header, chain = sent(bench().probe(), Op.DRV_IN, 5 * Z + 3, [(0x300000, 4096)], REPORT)
    assert header == (REPORT, 0, 5 * Z + 3)
    assert [(length, flags) for _, length, flags in chain] == [(16, 0), (4096, 2), (1, 2)]


@pytest.mark.clause("BLKZ-DRV-010", "BLKZ-DRV-012", "BLKZ-DRV-013", "BLKZ-DRV-014")
def test_what_the_specification_forbids_is_not_sent() -> None:
    board = bench(max_append_sectors=16, write_granularity=1024).probe()
    zoned = board.driver.zoned
    assert zoned is not None
    for steps in (zoned.open(1), zoned.close(Z + 1), zoned.finish(-Z), zoned.reset(2048), zoned.append(Z + 2, bytes(1024))):
        with pytest.raises(vb.ConfigError, match="first sector"):
            finish(steps)
    for data in (b"", bytes(512), bytes(1025), bytes(1536)):
        with pytest.raises(vb.ConfigError, match="write_granularity"):
            finish(zoned.append(Z, data))
    with pytest.raises(vb.ConfigError, match="at most 16 sectors"):
        finish(zoned.append(Z, bytes(17 << 10)))
    assert board.ring().avail_idx == 0
    board = bench(device={"seg_max": 100, "size_max": 512}, max_append_sectors=100).probe()
    assert board.driver.zoned is not None
    with pytest.raises(vb.ConfigError, match="5 segments"):
        finish(board.driver.zoned.append(Z, bytes(3072)))


@pytest.mark.clause("BLKZ-DRV-019")
def test_a_secure_erase_is_cut_at_the_edges_of_zones() -> None:
    board = bench(device={"secure_erase": True, "max_discard_sectors": 5 * Z + 7}).probe()
    assert board.driver.limits.max_secure_erase_sectors == 5 * Z
    board.submit(int(Op.SECURE_ERASE), 0, [], length=12 * Z << 9)
    ring, found = board.ring(), []
    for i in range(ring.avail_idx):
        chain = board.chain(ring.get("H", ring.avail_at + 4 + 2 * i))
        found.append(struct.unpack("<QII", board.memory.read(chain[1][0], 16)))
    assert found == [(0, 5 * Z, 0), (5 * Z, 5 * Z, 0), (10 * Z, 2 * Z, 0)]


@pytest.mark.clause("BLKZ-DRV-016", "BLKZ-DRV-017")
def test_reads_and_writes_are_cut_at_the_edges_of_zones_and_never_merged_over_them() -> None:
    board = bench().probe()
    plug = Plug()
    for number, (sector, sectors) in enumerate([(Z - 24, 8), (Z - 16, 8), (Z - 8, 16), (Z + 8, 8)]):
        bio = Bio(1, sector, sectors << 9, [(0x300000, sectors << 9)], number, 0, lambda _: None)
        finish(board.stack.submit_bio(bio, plug, lambda: None))
    finish(board.stack.flush_plug(plug))
    ring, found = board.ring(), []
    for i in range(ring.avail_idx):
        chain = board.chain(ring.get("H", ring.avail_at + 4 + 2 * i))
        found.append((struct.unpack("<IIQ", board.memory.read(chain[0][0], 16))[2], sum(length for _, length, _ in chain[1:-1]) >> 9))
    assert found == [(Z - 24, 24), (Z, 16)]


def test_jobs_that_a_host_managed_disk_cannot_take_say_so() -> None:
    zones = vb.Zones(zone_sectors=Z, write_granularity=4096)
    with pytest.raises(vb.JobError, match="4096-byte blocks"):
        recipe(zones, bs=512).boot(vb.SimMachine())
    with pytest.raises(vb.JobError, match="does not discard"):
        recipe(zones, rw="randtrim").boot(vb.SimMachine())


# -- reports ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (64 + 8, struct.pack("<Q", 7), "starts at 7"),
        (64 + 24, b"\0", "type 0"),
        (64 + 24, b"\1", "type 1 and state"),
        (64 + 25, b"\5", "state 5"),
        (64 + 25, b"\0", "state 0"),
        (64, struct.pack("<Q", Z + 1), "capacity"),
        (64, struct.pack("<Q", 0), "capacity"),
        (64 + 16, struct.pack("<Q", Z + 1), "write pointer"),
        (0, struct.pack("<Q", 0), "without zones"),
    ],
)
def test_a_report_that_cannot_be_true_is_refused(at: int, value: bytes, message: str) -> None:
    vm = recipe(vb.Zones(zone_sectors=Z)).boot(vb.SimMachine())
    told = vm.device.zones.report

    def lies(sector: int, room: int) -> bytes:
        data = bytearray(told(sector, room))
        data[at : at + len(value)] = value
        return bytes(data)

    vm.device.zones.report = lies
    with pytest.raises(vb.VirtioError, match=message):
        vm.task(vm.driver.zoned.report())


def test_a_report_that_claims_more_zones_than_it_holds_is_bounded() -> None:
    vm = recipe(vb.Zones(zone_sectors=2), size=1 << 20).boot(vb.SimMachine())
    told = vm.device.zones.report
    vm.device.zones.report = lambda sector, room: b"\xff" * 8 + told(sector, room)[8:]
    assert len(vm.task(vm.driver.zoned.report())) == 1024


# -- whole machines -------------------------------------------------------------------------------------------------------------------


def recipe(
    zones: vb.Zones | None, *, size: int = 1 << 20, queue: Any = None, device: dict[str, Any] | None = None, **job: Any
) -> vb.Pipeline:
    given: dict[str, Any] = {"rw": "write", "bs": 4096, "iodepth": 4, "size": Z << 9} | job
    parts: dict[str, Any] = {"queue": queue} if queue is not None else {}
    return vb.Pipeline(app=vb.Fio(**given), device=vb.VirtioBlkDevice(zones=zones, **(device or {})), disk=vb.Ram(size), **parts)


@pytest.mark.parametrize("queue", [vb.Split(64), vb.Packed(64)], ids=["split", "packed"])
def test_a_day_in_the_life_of_a_zone(queue: Any) -> None:
    zones = vb.Zones(zone_sectors=Z, zone_capacity=96, conventional=1, max_open_zones=2, max_active_zones=3)
    vm = recipe(zones, queue=queue).boot(vb.SimMachine())
    zoned = vm.driver.zoned
    found = vm.task(zoned.report())
    assert found[0] == BlkZone(0, Z, Z, None, ZoneType.CONV, ZoneState.NOT_WP)
    assert found[1:] == [BlkZone(i * Z, Z, 96, i * Z, ZoneType.SWR, ZoneState.EMPTY) for i in range(1, 16)]
    assert vm.task(zoned.append(Z, b"a" * 4096)) == Z
    assert vm.task(zoned.append(Z, b"b" * 512)) == Z + 8
    assert vm.task(zoned.report(Z + 5, 1)) == [BlkZone(Z, Z, 96, Z + 9, ZoneType.SWR, ZoneState.IOPEN)]
    vm.task(zoned.open(2 * Z))
    vm.task(zoned.open(3 * Z))
    assert [zone.state.name for zone in vm.task(zoned.report(Z, 3))] == ["CLOSED", "EOPEN", "EOPEN"]
    with pytest.raises(OSError, match="ZONE_ACTIVE_RESOURCE"):
        vm.task(zoned.open(4 * Z))
    vm.task(zoned.finish(Z))
    with pytest.raises(OSError, match="ZONE_OPEN_RESOURCE"):
        vm.task(zoned.append(4 * Z, bytes(512)))
    vm.task(zoned.close(2 * Z))
    assert vm.task(zoned.append(4 * Z, bytes(512))) == 4 * Z
    with pytest.raises(OSError, match="ZONE_INVALID_CMD"):
        vm.task(zoned.append(Z, bytes(512)))
    with pytest.raises(OSError, match="ZONE_INVALID_CMD"):
        vm.task(zoned.close(0))
    vm.task(zoned.reset(Z))
    vm.task(zoned.reset_all())
    assert {zone.state.name for zone in vm.task(zoned.report())[1:]} == {"EMPTY"}
    assert bytes(vm.store.bytes[Z << 9 : (Z + 9) << 9]) == b"a" * 4096 + b"b" * 512


def test_a_restarted_driver_finds_the_zones_as_it_left_them() -> None:
    vm = recipe(vb.Zones(zone_sectors=Z, conventional=1)).boot(vb.SimMachine())
    vm.task(vm.driver.zoned.append(Z, bytes(4096)))
    vm.task(vm.driver.zoned.open(2 * Z))
    before = vm.task(vm.driver.zoned.report())
    vm.task(vm.driver.restart())
    assert vm.task(vm.driver.zoned.report()) == before


REASON = "a zoned disk: its zones are asked about every request"


@pytest.mark.parametrize("job", [{"rw": "randrw", "size": 1 << 20}, {"rw": "write", "size": 1 << 20}, {"rw": "randread", "iodepth": 1}])
def test_zones_that_take_writes_anywhere_change_nothing_but_the_path(job: dict[str, Any]) -> None:
    """Conventional zones against no zones: the same bytes; an ordinary disk takes the fast paths, this one none."""
    outcome = []
    for zones in (None, vb.Zones(zone_sectors=Z, conventional=16), vb.Zones(zone_sectors=Z, model="host-aware")):
        vm = recipe(zones, number_ios=400, **job).boot(vb.SimMachine())
        paths = vm.explain()
        assert (zones is None) == (not any(REASON in path for path in paths)) == any("fused" in path for path in paths), paths
        run = vm.run()
        outcome.append((run.ios, run.errors, bytes(vm.store.bytes)))
    assert outcome[0] == outcome[1] == outcome[2]


@pytest.mark.skipif(sys.platform != "linux", reason="vhost-user needs Linux")
def test_over_vhost_user_our_driver_finds_the_zones_and_a_real_guest_is_told_that_it_cannot() -> None:
    vm = recipe(vb.Zones(zone_sectors=Z)).boot(vb.VhostUserMachine())
    try:
        assert vm.driver.zoned is not None
        assert vm.driver.zoned.nr_zones == 16
        run = vm.run()
        assert (run.ios, run.errors) == (Z // 8, 0)
    finally:
        vm.close()
    with pytest.raises(vb.ConfigError, match="host-aware"):
        recipe(vb.Zones(zone_sectors=Z)).replace(guest=vb.LinuxGuest()).boot(vb.VhostUserMachine())


@pytest.mark.skipif(sys.platform != "linux", reason="the live machine needs Linux")
@pytest.mark.parametrize("where", ["thread", "process"])
def test_a_live_machine_takes_the_plain_path_to_a_zoned_disk(where: Any) -> None:
    for zones in (None, vb.Zones(zone_sectors=Z, max_open_zones=1)):
        vm = recipe(zones).boot(vb.LiveMachine(device=where, trace=False))
        try:
            run = vm.run()
            told = vm.explain()
        finally:
            vm.close()
        assert (run.ios, run.errors) == (Z // 8, 0)
        assert any(REASON in line for line in told) == (zones is not None), told
        assert any("batch path" in line for line in told) == (zones is None), told
