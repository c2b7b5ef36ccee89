"""What a virtio-blk device does besides reads and writes: ranges, SECURE_ERASE, GET_LIFETIME, TOPOLOGY; and the driver that asks."""

from __future__ import annotations

import struct
from typing import Any

import pytest

import vblklab as vb
from tests.support import DISCARD, OK, OUT, WRITE_ZEROES, Board
from vblklab.iostack import Bio, Op

IOERR, UNSUPP = 1, 2
GET_LIFETIME, SECURE_ERASE = 10, 14
F_LIFETIME, F_SECURE_ERASE, F_RO = 1 << 15, 1 << 16, 1 << 5


def ranges(*those: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<QII", *one) for one in those)


def content(board: Board, sector: int) -> bytes:
    data = bytearray(512)
    board.store.readv(sector << 9, [memoryview(data)])
    return bytes(data)


def filled(board: Board, sectors: int = 32) -> None:
    for sector in range(sectors):
        assert board.request(OUT, sector, data=bytes([sector + 1]) * 512)[0] == OK


@pytest.mark.clause("BLK-DEV-015")
@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES, SECURE_ERASE])
def test_5_2_6_several_ranges_in_one_request(kind: int) -> None:
    board = Board(vb.VirtioBlkDevice(max_discard_seg=3, secure_erase=True)).boot()
    filled(board)
    assert board.request(kind, data=ranges((2, 3, 0), (10, 1, 0), (20, 8, 0)))[:2] == (OK, 1)
    gone = {2, 3, 4, 10, *range(20, 28)}
    assert {sector for sector in range(32) if not any(content(board, sector))} == gone
    assert board.request(kind, data=ranges((0, 1, 0), (1, 1, 0), (5, 1, 0), (6, 1, 0)))[0] == UNSUPP, "more than max_…_seg"
    assert any(content(board, 0))


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES, SECURE_ERASE])
def test_a_bad_range_behind_good_ones_changes_nothing(kind: int) -> None:
    board = Board(vb.VirtioBlkDevice(max_discard_seg=3, secure_erase=True)).boot()
    filled(board)
    assert board.request(kind, data=ranges((2, 3, 0), (2047, 2, 0)))[0] == IOERR
    assert board.request(kind, data=ranges((2, 3, 0), (4, 1, 6)))[0] == UNSUPP
    assert all(any(content(board, sector)) for sector in range(32))


@pytest.mark.parametrize("length", [0, 15, 17, 24])
@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES, SECURE_ERASE])
def test_5_2_6_data_that_is_no_whole_segment_is_an_error(kind: int, length: int) -> None:
    board = Board(vb.VirtioBlkDevice(max_discard_seg=3, secure_erase=True)).boot()
    assert board.request(kind, data=bytes(length))[0] == IOERR


def test_a_table_of_ranges_sizes_nothing() -> None:
    board = Board(vb.VirtioBlkDevice(max_discard_seg=256), memory_bytes=1 << 20).boot()
    board.data_at = 0x20000
    assert board.request(DISCARD, data=bytes(16 * 257))[0] == UNSUPP
    assert board.request(DISCARD, data=ranges((0, 1, 0)) * 256)[0] == OK


@pytest.mark.clause("BLK-DEV-010")
@pytest.mark.parametrize("flags", [1, 2, 1 << 31, 3])
def test_5_2_6_2_secure_erase_knows_no_flag(flags: int) -> None:
    board = Board(vb.VirtioBlkDevice(secure_erase=True)).boot()
    filled(board, 1)
    assert board.request(SECURE_ERASE, data=ranges((0, 1, flags)))[0] == UNSUPP
    assert any(content(board, 0))


def test_secure_erase_overwrites_and_makes_stable() -> None:
    board = Board(vb.VirtioBlkDevice(secure_erase=True)).boot()
    filled(board, 4)
    before = len(board.store.log)
    assert board.request(SECURE_ERASE, data=ranges((1, 2, 0)))[0] == OK
    assert [entry[0] for entry in board.store.log[before:]] == ["writev", "flush"], "no hole punched, no unwritten extent"
    assert [any(content(board, sector)) for sector in range(4)] == [True, False, False, True]


def test_secure_erase_is_offered_when_asked_for_and_only_then() -> None:
    assert not Board().offered() & F_SECURE_ERASE
    assert Board().boot().request(SECURE_ERASE, data=ranges((0, 1, 0)))[0] == UNSUPP
    board = Board(vb.VirtioBlkDevice(secure_erase=True, max_discard_seg=4, block_size=4096, max_discard_sectors=1000))
    assert board.offered() & F_SECURE_ERASE
    assert struct.unpack_from("<III", board.device.read_config(), 60) == (1000, 4, 8)
    assert len(Board().device.read_config()) == 60, "fields of what is not offered are not there"
    read_only = Board(vb.VirtioBlkDevice(secure_erase=True, read_only=True))
    assert read_only.offered() & (F_SECURE_ERASE | F_RO) == F_RO


@pytest.mark.clause("BLK-DEV-025", "BLK-DEV-023")
@pytest.mark.parametrize("lifetime", [(0, 0, 0), (1, 3, 11), (3, 11, 0)])
def test_5_2_6_get_lifetime(lifetime: tuple[int, int, int]) -> None:
    board = Board(vb.VirtioBlkDevice(lifetime=lifetime)).boot()
    assert board.offered() & F_LIFETIME
    assert board.request(GET_LIFETIME, room=6) == (OK, 7, struct.pack("<HHH", *lifetime))
    assert board.request(GET_LIFETIME, room=6, cuts=[7, 1, 3])[2] == struct.pack("<HHH", *lifetime)
    assert board.request(GET_LIFETIME, room=4)[0] == IOERR


@pytest.mark.clause("BLK-DEV-024", "BLK-DEV-025")
def test_without_metrics_lifetime_is_not_offered_and_reserved_values_are_refused() -> None:
    board = Board().boot()
    assert not board.offered() & F_LIFETIME
    assert board.request(GET_LIFETIME, room=6)[0] == UNSUPP
    for reserved in ((4, 0, 0), (0, 12, 0), (0, 0, 12), (-1, 0, 0), (0, 0), "abc", (0, 0, "1")):
        with pytest.raises(vb.ConfigError, match="lifetime="):
            vb.VirtioBlkDevice(lifetime=reserved)  # type: ignore[arg-type]


def test_5_2_4_topology() -> None:
    device = vb.VirtioBlkDevice(physical_block_size=4096, alignment_offset=1024, min_io_size=4096, opt_io_size=1 << 20)
    config = Board(device).device.read_config()
    assert struct.unpack_from("<BBHI", config, 24) == (3, 2, 8, 2048)
    assert "physical_block_size=4096" in repr(device)


@pytest.mark.parametrize(
    "options",
    [
        {"physical_block_size": 256},
        {"physical_block_size": 512 * 3},
        {"block_size": 4096, "physical_block_size": 512},
        {"alignment_offset": 100},
        {"alignment_offset": 512 * 256},
        {"min_io_size": 512 * 65536},
        {"opt_io_size": -512},
        {"max_discard_seg": 0},
        {"max_discard_seg": 257},
        {"max_discard_sectors": 0},
        {"max_discard_sectors": 1 << 32},
        {"size_max": 1 << 32},
    ],
)
def test_a_topology_that_cannot_be_said_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(vb.ConfigError, match=list(options)[-1]):
        vb.VirtioBlkDevice(**options)  # type: ignore[arg-type]


# -- the driver --------------------------------------------------------------------------------------------------------------------


def machine(**options: Any) -> Any:
    app = vb.Fio(rw="randread", bs=4096, number_ios=1)
    return vb.Pipeline(app=app, device=vb.VirtioBlkDevice(**options)).boot(vb.SimMachine())


def test_the_driver_takes_its_limits_from_topology() -> None:
    vm = machine(physical_block_size=4096, alignment_offset=1024, min_io_size=8192, opt_io_size=65536)
    limits = vm.driver.limits
    assert (limits.physical_block_bytes, limits.alignment_offset, limits.io_min, limits.io_opt) == (4096, 1024, 8192, 65536)


@pytest.mark.clause("BLK-DRV-012")
def test_the_driver_asks_for_serial_and_lifetime() -> None:
    lengths: list[int] = []

    class Listens(vb.VirtioBlkDevice):
        def check(self, request: Any) -> int:
            lengths.append(request.length)
            return super().check(request)

    device = Listens(serial="12345678901234567890", lifetime=(2, 4, 5))
    vm = vb.Pipeline(app=vb.Fio(rw="randread", bs=4096, number_ios=1), device=device).boot(vb.SimMachine())
    assert vm.task(vm.driver.serial()) == "12345678901234567890"
    assert vm.task(vm.driver.lifetime()) == (2, 4, 5)
    assert vm.run().ios == 1 and sorted(lengths) == [6, 20, 4096]


def test_a_driver_without_the_feature_does_not_ask() -> None:
    vm = machine()
    with pytest.raises(vb.ConfigError, match="VIRTIO_BLK_F_LIFETIME"):
        vm.task(vm.driver.lifetime())


class NoName(vb.VirtioBlkDevice):
    def check(self, request: Any) -> int:
        return UNSUPP


def test_a_device_that_refuses_is_an_error_with_its_name() -> None:
    vm = vb.Pipeline(app=vb.Fio(rw="randread", bs=4096, number_ios=1), device=NoName).boot(vb.SimMachine())
    with pytest.raises(OSError, match="refuses GET_ID"):
        vm.task(vm.driver.serial())


@pytest.mark.clause("BLK-DRV-013", "BLK-DRV-014", "BLK-DRV-015")
@pytest.mark.parametrize("op", [Op.DISCARD, Op.WRITE_ZEROES, Op.SECURE_ERASE])
def test_a_range_is_cut_to_what_the_device_takes_at_once(op: Op) -> None:
    vm = machine(secure_erase=True, max_discard_sectors=64)
    for sector in (0, 99, 100):
        vm.store.writev(sector << 9, [memoryview(b"x" * 512)])
    ended: list[Any] = []

    def erase() -> Any:
        yield from vm.iostack.submit_bio(Bio(int(op), 0, 100 << 9, [], 1 << 40, 0, ended.append), None, lambda: None)
        while not ended:
            yield vb.Wait((yield ("virtblk_poll", 0)) + 1000)

    vm.task(erase())
    assert ended[0].status == 0
    data = bytearray(101 << 9)
    vm.store.readv(0, [memoryview(data)])
    assert not any(data[: 100 << 9]) and any(data[100 << 9 :])


# -- what is always true of features and configuration --------------------------------------------------------------------------------


@pytest.mark.clause("BLK-DEV-001", "BLK-DEV-002")
@pytest.mark.parametrize("options", [{}, {"write_cache": False}, {"read_only": True}, {"discard": False}])
def test_5_2_5_flush_is_offered_with_every_device_and_so_is_what_config_wce_needs(options: dict[str, bool]) -> None:
    offered = Board(vb.VirtioBlkDevice(**options)).offered()  # type: ignore[arg-type]
    assert offered & 1 << 9 and offered & 1 << 11


@pytest.mark.clause("BLK-DEV-002", "BLK-DEV-003")
def test_5_2_5_config_wce_without_flush_is_refused_and_without_flush_writeback_reads_0() -> None:
    board = Board()
    board.reset()
    assert not board.accept(1 << 11 | 1 << 32) & 8, "FEATURES_OK does not stay"
    board.boot(0)
    assert board.device.read_config()[32] == 0


@pytest.mark.clause("BLK-DEV-004")
def test_5_2_5_padding_reads_zero() -> None:
    config = Board(vb.VirtioBlkDevice(secure_erase=True, physical_block_size=4096)).device.read_config()
    assert config[33] == 0 and config[57:60] == bytes(3)


@pytest.mark.clause("BLK-DRV-007")
def test_5_2_6_1_the_driver_accepts_that_a_disk_is_read_only() -> None:
    vm = machine(read_only=True)
    assert vm.driver.features & F_RO and vm.driver.limits.read_only


@pytest.mark.clause("BLK-DRV-001", "BLK-DRV-003")
def test_5_2_5_a_driver_without_flush_gets_a_disk_that_writes_through() -> None:
    driver = vb.VirtioBlkDriver(features=1 << 28)
    vm = vb.Pipeline(app=vb.Fio(rw="randwrite", bs=4096, number_ios=4), driver=driver).boot(vb.SimMachine())
    assert not vm.driver.features & 1 << 9 and not vm.driver.limits.flush and not vm.device.writeback
    assert vm.run().ios == 4
    assert machine().driver.limits.flush
