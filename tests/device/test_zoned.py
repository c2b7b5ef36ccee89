"""Zoned disks on a bench: each clause of blk-zoned that binds the device, and random requests against a model written from the text."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import vblklab as vb
from tests.support import ACKNOWLEDGE, DRIVER, FEATURES_OK, IN, IOERR, OK, OUT, UNSUPP, Board
from vblklab.device import Zone

APPEND, REPORT, OPEN, CLOSE, FINISH, RESET, RESET_ALL = 15, 16, 18, 20, 22, 24, 26
SECURE_ERASE, WRITE_ZEROES, DISCARD = 14, 13, 11
INVALID_CMD, UNALIGNED_WP, OPEN_RESOURCE, ACTIVE_RESOURCE = 3, 4, 5, 6
NOT_WP, EMPTY, IOPEN, EOPEN, CLOSED, RDONLY, FULL, OFFLINE = 0, 1, 2, 3, 4, 13, 14, 15
CONV, SWR, SWP = 1, 2, 3
F_ZONED, F_DISCARD, F_WRITE_ZEROES, F_SECURE_ERASE, F_VERSION_1 = 1 << 17, 1 << 13, 1 << 14, 1 << 16, 1 << 32
SIZE, CAP = 32, 24
"""Sectors of a zone here, and how many of them can be written."""
SECTORS = 8 * SIZE
KINDS = [APPEND, REPORT, OPEN, CLOSE, FINISH, RESET, RESET_ALL]


def zoned(boot: bool = True, *, device: dict[str, Any] | None = None, sectors: int = SECTORS, **options: Any) -> Board:
    """A disk of eight zones of which the first is conventional."""
    capacity = SIZE if options.get("model") == "host-aware" else CAP
    given: dict[str, Any] = {"zone_sectors": SIZE, "zone_capacity": capacity, "conventional": 1} | options
    board = Board(vb.VirtioBlkDevice(zones=vb.Zones(**given), **(device or {})), sectors=sectors)
    return board.boot() if boot else board


def write(board: Board, sector: int, sectors: int = 1, fill: int = 0x5A) -> int:
    return board.request(OUT, sector, data=bytes([fill]) * (sectors << 9))[0]


def read(board: Board, sector: int, sectors: int = 1) -> tuple[int, bytes]:
    status, used, data = board.request(IN, sector, room=sectors << 9)
    assert used == ((sectors << 9) + 1 if not status else 0)
    return status, data


def append(board: Board, sector: int, sectors: int = 1, fill: int = 0xA5) -> tuple[int, int]:
    status, used, data = board.request(APPEND, sector, data=bytes([fill]) * (sectors << 9), room=8)
    assert status or used == 9
    return status, struct.unpack("<Q", data)[0]


def manage(board: Board, kind: int, sector: int = 0) -> int:
    return board.request(kind, sector)[0]


def report(board: Board, sector: int = 0, room: int = 64 * 20) -> list[tuple[int, int, int, int, int]]:
    """(z_cap, z_start, z_wp, z_type, z_state) of each zone in a report."""
    status, used, data = board.request(REPORT, sector, room=room)
    assert status == OK
    count = struct.unpack_from("<Q", data)[0]
    assert not any(data[8:64])
    assert used == 64 + 64 * count + (room == 64 + 64 * count)
    rows = [struct.unpack_from("<QQQBB", data, 64 + 64 * i) for i in range(count)]
    assert not any(any(data[64 * i + 90 : 64 * i + 128]) for i in range(count))
    return rows


def state(board: Board, zone: int) -> tuple[int, int]:
    """(state, write pointer counted from the zone's start) as the device reports it."""
    row = report(board, zone * SIZE)[0]
    return row[4], row[2] - row[1]


def at(zone: int) -> int:
    return zone * SIZE


def in_state(board: Board, zone: int, wanted: int) -> None:
    """Bring an empty zone into a state."""
    start = at(zone)
    if wanted in (IOPEN, CLOSED):
        assert write(board, start, 2) == OK
    if wanted == EOPEN:
        assert manage(board, OPEN, start) == OK
    if wanted == CLOSED:
        assert manage(board, CLOSE, start) == OK
    if wanted == FULL:
        assert manage(board, FINISH, start) == OK
    if wanted in (RDONLY, OFFLINE):
        assert board.device.zones is not None
        board.device.zones.wear(start, offline=wanted == OFFLINE)


# -- features and configuration ---------------------------------------------------------------------------------------------------


def config(board: Board) -> tuple[int, ...]:
    return struct.unpack("<5IB3s", board.device.read_config()[72:96])


@pytest.mark.clause("BLKZ-DEV-001")
def test_an_ordinary_disk_does_not_offer_zoned() -> None:
    assert not Board().offered() & F_ZONED
    assert len(Board().device.read_config()) <= 72


@pytest.mark.clause("BLKZ-DEV-005", "BLKZ-DEV-007", "BLKZ-DEV-009", "BLKZ-DEV-010", "BLKZ-DEV-011", "BLKZ-DEV-014", "BLKZ-DEV-015")
def test_the_configuration_of_a_host_managed_disk() -> None:
    board = zoned(max_open_zones=3, max_active_zones=5, max_append_sectors=16, write_granularity=2048)
    assert board.features & F_ZONED
    assert not board.features & (F_DISCARD | F_WRITE_ZEROES)
    assert config(board) == (SIZE, 3, 5, 16, 2048, 1, bytes(3))


@pytest.mark.clause("BLKZ-DEV-006", "BLKZ-DEV-009", "BLKZ-DEV-010")
def test_the_configuration_of_a_host_aware_disk() -> None:
    board = zoned(model="host-aware")
    assert board.features & F_ZONED
    assert board.features & F_DISCARD
    assert config(board) == (SIZE, 0, 0, SIZE, 512, 2, bytes(3))


@pytest.mark.clause("BLKZ-DEV-004")
def test_a_drive_managed_disk_is_an_ordinary_one() -> None:
    board = zoned(model="drive-managed")
    assert board.features & F_ZONED
    assert config(board) == (0, 0, 0, 0, 0, 0, bytes(3))
    assert write(board, 77) == OK
    assert read(board, 77) == (OK, b"\x5a" * 512)
    assert [manage(board, kind, SIZE) for kind in KINDS] == [UNSUPP] * len(KINDS)


@pytest.mark.clause("BLKZ-DEV-002", "BLKZ-DEV-016", "BLKZ-DRV-005")
def test_a_host_aware_disk_without_zoned_is_an_ordinary_one_with_zeros_for_zones() -> None:
    board = zoned(False, model="host-aware")
    board.boot(board.offered() & ~F_ZONED)
    assert not any(board.device.read_config()[72:96])
    assert write(board, at(2) - 2, 4) == OK
    assert read(board, at(2) - 3, 6) == (OK, bytes(512) + b"\x5a" * 2048 + bytes(512))
    for kind in KINDS:
        assert board.request(kind, SIZE, room=8 if kind == APPEND else 0)[0] == UNSUPP


@pytest.mark.clause("BLKZ-DEV-003", "BLKZ-DRV-004")
def test_a_host_managed_disk_refuses_a_driver_without_zoned() -> None:
    board = zoned(False)
    board.reset()
    board.set_status(ACKNOWLEDGE)
    board.set_status(ACKNOWLEDGE | DRIVER)
    assert not board.accept(board.offered() & ~F_ZONED) & FEATURES_OK
    assert board.accept(board.offered()) & FEATURES_OK


def test_zone_requests_to_an_ordinary_disk_are_unsupported() -> None:
    board = Board().boot()
    assert [manage(board, kind) for kind in KINDS] == [UNSUPP] * len(KINDS)


@pytest.mark.clause("BLKZ-DEV-008", "BLKZ-DEV-007")
def test_the_last_zone_may_be_smaller() -> None:
    board = zoned(sectors=5 * SIZE + 10)
    assert [row[:2] for row in report(board)][-2:] == [(CAP, at(4)), (10, at(5))]
    assert write(board, at(5), 10) == OK
    assert state(board, 5)[0] == FULL


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"model": "host"}, "model"),
        ({"zone_sectors": 0}, "zone_sectors"),
        ({"zone_sectors": 33, "write_granularity": 1024}, "zone_sectors"),
        ({"zone_sectors": 1 << 32}, "zone_sectors"),
        ({"zone_capacity": 0}, "zone_capacity"),
        ({"zone_capacity": SIZE + 1}, "zone_capacity"),
        ({"conventional": -1}, "conventional"),
        ({"max_open_zones": -1}, "max_open_zones"),
        ({"max_open_zones": 4, "max_active_zones": 3}, "max_open_zones"),
        ({"model": "host-aware", "max_open_zones": 1}, "limits"),
        ({"model": "host-aware", "zone_capacity": CAP}, "zone_capacity"),
        ({"max_append_sectors": CAP + 1}, "max_append_sectors"),
        ({"max_append_sectors": 1, "write_granularity": 2048}, "max_append_sectors"),
        ({"write_granularity": 256}, "write_granularity"),
        ({"write_granularity": 1536}, "write_granularity"),
    ],
)
def test_zones_that_cannot_be_say_so(options: dict[str, Any], word: str) -> None:
    with pytest.raises(vb.ConfigError, match=word):
        zoned(**options)


@pytest.mark.parametrize(
    ("device", "options", "sectors", "word"),
    [
        ({"block_size": 4096}, {}, SECTORS, "write_granularity"),
        ({"seg_max": 2, "size_max": 512}, {}, SECTORS, "max_append_sectors"),
        ({}, {"conventional": 9}, SECTORS, "8 zones"),
        ({}, {"write_granularity": 2048}, SECTORS + 2, "last zone"),
        ({}, {"zone_sectors": 1, "zone_capacity": 1}, (1 << 17) + 1, "larger zones"),
    ],
)
def test_zones_that_do_not_fit_the_device_or_the_disk_say_so(
    device: dict[str, Any], options: dict[str, Any], sectors: int, word: str
) -> None:
    with pytest.raises(vb.ConfigError, match=word):
        zoned(device=device, sectors=sectors, **options)


@pytest.mark.clause("BLKZ-DEV-012", "BLKZ-DEV-013")
def test_the_largest_append_fits_a_request() -> None:
    board = zoned(device={"seg_max": 3, "size_max": 1024}, max_append_sectors=6)
    assert config(board)[3] == 6
    assert config(zoned(max_append_sectors=0))[3] == 0


def test_a_zoned_disk_keeps_its_size() -> None:
    board = zoned()
    with pytest.raises(vb.ConfigError, match="another size"):
        board.device.resize(SECTORS * 2)
    assert board.device.capacity_sectors == SECTORS


# -- reports ----------------------------------------------------------------------------------------------------------------------


def test_a_report_names_every_zone() -> None:
    board = zoned()
    rows = report(board)
    assert [(row[1], row[3], row[4]) for row in rows] == [(0, CONV, NOT_WP)] + [(at(i), SWR, EMPTY) for i in range(1, 8)]
    assert [row[0] for row in rows] == [SIZE] + [CAP] * 7
    assert [row[2] for row in rows][1:] == [at(i) for i in range(1, 8)]
    assert {row[3] for row in report(zoned(model="host-aware"))} == {CONV, SWP}


@pytest.mark.clause("BLKZ-DRV-009")
@pytest.mark.parametrize("offset", [0, 1, SIZE - 1])
def test_a_report_begins_with_the_zone_of_its_sector(offset: int) -> None:
    assert [row[1] for row in report(zoned(), at(3) + offset)] == [at(i) for i in range(3, 8)]


@pytest.mark.parametrize(("room", "count"), [(64, 0), (127, 0), (128, 1), (191, 1), (256, 3), (64 * 9, 8), (64 * 20, 8)])
def test_a_report_has_as_many_zones_as_there_is_room(room: int, count: int) -> None:
    assert len(report(zoned(), room=room)) == count


@pytest.mark.parametrize(("sector", "room"), [(0, 0), (0, 63), (SECTORS, 256), (2**64 - 1, 256)])
def test_a_report_without_room_or_zone_is_invalid(sector: int, room: int) -> None:
    assert zoned().request(REPORT, sector, room=room)[0] == INVALID_CMD


@pytest.mark.parametrize("cut", [1, 7, 64, 100])
def test_a_report_and_an_append_take_any_framing(cut: int) -> None:
    board = Board(vb.VirtioBlkDevice(zones=vb.Zones(zone_sectors=SIZE)), sectors=SECTORS, size=256).boot()
    assert board.request(APPEND, at(1), data=b"\x77" * 1024, room=8, cuts=[cut * 8])[0] == OK
    status, _, data = board.request(APPEND, at(1), data=b"\x78" * 512, room=8, cuts=[max(cut, 5)])
    assert (status, struct.unpack("<Q", data)[0]) == (OK, at(1) + 2)
    status, _, data = board.request(REPORT, at(1), room=128, cuts=[cut])
    assert (status, struct.unpack_from("<QQQBB", data, 64)) == (OK, (SIZE, at(1), at(1) + 3, SWR, IOPEN))


@pytest.mark.parametrize("room", [0, 7, 9])
def test_an_append_without_place_for_its_sector_is_an_error(room: int) -> None:
    board = zoned()
    assert board.request(APPEND, at(1), data=bytes(512), room=room)[0] == IOERR
    assert state(board, 1) == (EMPTY, 0)


# -- states -----------------------------------------------------------------------------------------------------------------------

MOVES = {
    OPEN: {EMPTY: EOPEN, IOPEN: EOPEN, EOPEN: EOPEN, CLOSED: EOPEN},
    CLOSE: {IOPEN: CLOSED, EOPEN: EMPTY, CLOSED: CLOSED},
    FINISH: {EMPTY: FULL, IOPEN: FULL, EOPEN: FULL, CLOSED: FULL, FULL: FULL},
    RESET: {EMPTY: EMPTY, IOPEN: EMPTY, EOPEN: EMPTY, CLOSED: EMPTY, FULL: EMPTY},
}
"""Where a request takes a zone; from every other state it cannot."""


@pytest.mark.clause("BLKZ-DEV-019", "BLKZ-DEV-021", "BLKZ-DEV-022", "BLKZ-DEV-023", "BLKZ-DEV-035")
@pytest.mark.parametrize("before", [EMPTY, IOPEN, EOPEN, CLOSED, FULL, RDONLY, OFFLINE])
@pytest.mark.parametrize("kind", MOVES)
def test_where_a_management_request_takes_a_zone(kind: int, before: int) -> None:
    board = zoned()
    in_state(board, 2, before)
    old = state(board, 2)
    after = MOVES[kind].get(before)
    assert manage(board, kind, at(2)) == (INVALID_CMD if after is None else OK)
    assert state(board, 2)[0] == (before if after is None else after)
    if after is None:
        assert state(board, 2) == old
    assert [state(board, zone)[0] for zone in (1, 3)] == [EMPTY, EMPTY]


def test_an_open_zone_that_was_written_to_becomes_closed_not_empty() -> None:
    board = zoned()
    in_state(board, 2, EOPEN)
    assert write(board, at(2), 3) == OK
    assert state(board, 2) == (EOPEN, 3)
    assert manage(board, CLOSE, at(2)) == OK
    assert state(board, 2) == (CLOSED, 3)


@pytest.mark.clause("BLKZ-DEV-017")
@pytest.mark.parametrize("kind", MOVES)
def test_a_conventional_zone_is_not_managed(kind: int) -> None:
    board = zoned()
    assert manage(board, kind, 0) == INVALID_CMD
    assert report(board)[0][3:] == (CONV, NOT_WP)


@pytest.mark.parametrize("sector", [at(2) + 1, at(3) - 1, SECTORS, 2**64 - SIZE])
@pytest.mark.parametrize("kind", MOVES)
def test_a_zone_is_named_by_its_first_sector(kind: int, sector: int) -> None:
    board = zoned()
    assert manage(board, kind, sector) == INVALID_CMD
    assert {row[4] for row in report(board)} == {NOT_WP, EMPTY}


@pytest.mark.clause("BLKZ-DEV-024")
def test_reset_all_empties_what_still_works() -> None:
    board = zoned()
    for zone, each in enumerate([IOPEN, EOPEN, CLOSED, FULL, RDONLY, OFFLINE], 1):
        in_state(board, zone, each)
    assert manage(board, RESET_ALL) == OK
    assert [row[4] for row in report(board)] == [NOT_WP, EMPTY, EMPTY, EMPTY, EMPTY, RDONLY, OFFLINE, EMPTY]
    assert read(board, at(1), 2) == (OK, bytes(1024))


def test_a_device_reset_leaves_zones_as_they_are() -> None:
    board = zoned()
    for zone, each in enumerate([IOPEN, EOPEN, CLOSED, FULL, RDONLY, OFFLINE], 1):
        in_state(board, zone, each)
    before = report(board)
    board.boot()
    assert report(board) == before
    assert read(board, at(1), 2) == (OK, b"\x5a" * 1024)


@pytest.mark.clause("BLK-DEV-007")
def test_a_read_only_disk_refuses_what_changes_zones() -> None:
    board = zoned(device={"read_only": True})
    assert [manage(board, kind, at(1)) for kind in (*MOVES, RESET_ALL)] == [IOERR] * 5
    assert append(board, at(1))[0] == write(board, at(1)) == IOERR
    assert state(board, 1) == (EMPTY, 0)


# -- writes and appends -----------------------------------------------------------------------------------------------------------


@pytest.mark.clause("BLKZ-DEV-032")
@pytest.mark.parametrize("offset", [0, 1, 3, 10])
def test_a_write_beside_the_write_pointer_is_unaligned(offset: int) -> None:
    board = zoned()
    assert write(board, at(1), 2) == OK
    assert write(board, at(1) + offset, 1, 0x11) == UNALIGNED_WP
    assert state(board, 1) == (IOPEN, 2)
    assert read(board, at(1), 12) == (OK, b"\x5a" * 1024 + bytes(5120))


@pytest.mark.clause("BLKZ-DEV-014", "BLKZ-DRV-016", "BLKZ-DRV-017")
def test_a_write_that_ends_beside_the_granularity_is_unaligned() -> None:
    board = zoned(write_granularity=2048)
    assert write(board, at(1), 4) == OK
    assert write(board, at(1) + 4, 3) == UNALIGNED_WP
    assert append(board, at(1), 5)[0] == UNALIGNED_WP
    assert state(board, 1) == (IOPEN, 4)
    assert write(board, 1, 1) == OK, "a conventional zone"


@pytest.mark.clause("BLKZ-DEV-028")
def test_an_append_says_where_its_data_lies() -> None:
    board = zoned()
    assert append(board, at(2), 3, 1) == (OK, at(2))
    assert append(board, at(2), 2, 2) == (OK, at(2) + 3)
    assert write(board, at(2) + 5, 1, 3) == OK
    assert append(board, at(2), 1, 4) == (OK, at(2) + 6)
    assert read(board, at(2), 8)[1] == b"\1" * 1536 + b"\2" * 1024 + b"\3" * 512 + b"\4" * 512 + bytes(512)
    assert state(board, 2) == (IOPEN, 7)


@pytest.mark.clause("BLKZ-DEV-026")
@pytest.mark.parametrize("offset", [1, 2, CAP, SIZE - 1])
def test_an_append_names_the_zone_by_its_first_sector(offset: int) -> None:
    board = zoned()
    assert write(board, at(1), 2) == OK
    assert append(board, at(1) + offset)[0] == INVALID_CMD
    assert append(board, SECTORS)[0] == INVALID_CMD
    assert state(board, 1) == (IOPEN, 2)


@pytest.mark.clause("BLKZ-DEV-018")
def test_only_swr_zones_take_appends() -> None:
    assert append(zoned(), 0)[0] == INVALID_CMD
    board = zoned(model="host-aware")
    assert append(board, at(1))[0] == append(board, 0)[0] == INVALID_CMD
    assert state(board, 1) == (EMPTY, 0)


@pytest.mark.clause("BLKZ-DEV-029", "BLKZ-DEV-030", "BLKZ-DEV-011")
def test_an_append_that_is_too_large() -> None:
    board = zoned(max_append_sectors=4)
    assert append(board, at(1), 5)[0] == INVALID_CMD
    assert append(board, at(1), 4) == (OK, at(1))
    assert append(zoned(max_append_sectors=0), at(1), 1)[0] == UNSUPP


@pytest.mark.clause("BLKZ-DEV-027")
@pytest.mark.parametrize("how", [OUT, APPEND])
def test_nothing_is_written_behind_the_capacity(how: int) -> None:
    board = zoned()
    assert write(board, at(1), CAP - 2) == OK
    status = write(board, at(1) + CAP - 2, 3) if how == OUT else append(board, at(1), 3)[0]
    assert status == INVALID_CMD
    assert state(board, 1) == (IOPEN, CAP - 2)
    status = write(board, at(1) + CAP - 2, 2) if how == OUT else append(board, at(1), 2)[0]
    assert status == OK
    assert state(board, 1)[0] == FULL
    assert write(board, at(1) + CAP, 1) == append(board, at(1))[0] == write(board, at(1)) == INVALID_CMD


@pytest.mark.clause("BLKZ-DEV-031")
@pytest.mark.parametrize("kind", [IN, OUT, APPEND])
def test_no_request_crosses_the_edge_of_an_swr_zone(kind: int) -> None:
    board = zoned(zone_capacity=SIZE, max_append_sectors=SIZE)
    assert write(board, at(1), SIZE - 1) == OK
    data = {"room": 1024} if kind == IN else {"data": bytes(1024)} | ({"room": 8} if kind == APPEND else {})
    assert board.request(kind, at(1) if kind == APPEND else at(2) - 1, **data)[0] == INVALID_CMD
    if kind != APPEND:
        assert board.request(kind, at(1) - 1, **data)[0] == INVALID_CMD, "out of a conventional one"
    assert state(board, 1) == (IOPEN, SIZE - 1)
    assert state(board, 2) == (EMPTY, 0)


@pytest.mark.clause("BLKZ-DEV-034", "BLKZ-DEV-035")
@pytest.mark.parametrize("worn", [RDONLY, OFFLINE])
def test_a_worn_zone_takes_no_data_and_an_offline_one_gives_none(worn: int) -> None:
    board = zoned()
    assert write(board, at(1), 2) == OK
    in_state(board, 1, worn)
    assert write(board, at(1) + 2) == append(board, at(1))[0] == INVALID_CMD
    if worn == OFFLINE:
        assert read(board, at(1), 4)[0] == INVALID_CMD
    else:
        assert read(board, at(1), 4) == (OK, b"\x5a" * 1024 + bytes(1024))
    assert board.device.zones is not None
    with pytest.raises(vb.ConfigError):
        board.device.zones.wear(0)


@pytest.mark.clause("BLKZ-DEV-036", "BLKZ-DEV-037", "BLKZ-DEV-038")
def test_what_was_not_written_since_the_reset_reads_as_zeros() -> None:
    board = zoned()
    assert write(board, at(1), CAP) == OK
    assert manage(board, RESET, at(1)) == OK
    assert read(board, at(1), SIZE) == (OK, bytes(SIZE << 9))
    assert write(board, at(1), 3, 0x33) == OK
    assert read(board, at(1) + 1, 4) == (OK, b"\x33" * 1024 + bytes(1024))
    assert manage(board, FINISH, at(1)) == OK
    assert read(board, at(1), SIZE) == (OK, b"\x33" * 1536 + bytes((SIZE - 3) << 9))
    assert board.request(IN, at(1) + 2, room=1024, cuts=[17, 500, 300])[2] == b"\x33" * 512 + bytes(512)


def test_a_write_without_data_opens_nothing() -> None:
    board = zoned()
    assert board.request(OUT, at(1))[0] == OK
    assert state(board, 1) == (EMPTY, 0)
    assert board.request(IN, SECTORS)[0] == OK


class FailingStore:
    """A store of which one sector cannot be read or written."""

    def __init__(self, board: Board, sector: int) -> None:
        self.readv, self.writev, self.bad = board.store.readv, board.store.writev, sector << 9
        board.store.readv = self._read  # type: ignore[method-assign]
        board.store.writev = self._write  # type: ignore[method-assign]

    def _check(self, offset: int, views: Any) -> None:
        if offset <= self.bad < offset + sum(map(len, views)):
            raise OSError(5, "bad sector")

    def _read(self, offset: int, views: Any) -> None:
        self._check(offset, views)
        self.readv(offset, views)

    def _write(self, offset: int, views: Any) -> None:
        self._check(offset, views)
        self.writev(offset, views)


def test_a_medium_error_is_an_ioerr_and_nothing_is_said_of_the_data() -> None:
    board = zoned(model="host-aware")
    assert write(board, at(1), 2) == write(board, at(1) + 4, 2) == OK
    FailingStore(board, at(1) + 1)
    assert board.request(IN, at(1), room=8 << 9)[:2] == (IOERR, 0)
    FailingStore(board, at(1) + 5)
    assert board.request(IN, at(1) + 2, room=4 << 9)[:2] == (IOERR, 0)


# -- resources --------------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("BLKZ-DEV-020")
@pytest.mark.parametrize(("limits", "status"), [((2, 0), OPEN_RESOURCE), ((0, 2), ACTIVE_RESOURCE), ((2, 2), ACTIVE_RESOURCE)])
def test_explicitly_open_zones_are_not_closed_for_another(limits: tuple[int, int], status: int) -> None:
    board = zoned(max_open_zones=limits[0], max_active_zones=limits[1])
    assert manage(board, OPEN, at(1)) == manage(board, OPEN, at(2)) == OK
    assert manage(board, OPEN, at(3)) == status
    assert write(board, at(3)) == append(board, at(3))[0] == status
    assert state(board, 3) == (EMPTY, 0)
    assert manage(board, OPEN, at(1)) == OK
    assert write(board, at(1)) == OK


@pytest.mark.clause("BLKZ-DEV-025")
def test_a_closed_zone_needs_an_open_resource_only() -> None:
    board = zoned(max_open_zones=1, max_active_zones=2)
    in_state(board, 1, CLOSED)
    in_state(board, 2, EOPEN)
    assert write(board, at(1) + 2) == append(board, at(1))[0] == manage(board, OPEN, at(1)) == OPEN_RESOURCE
    assert state(board, 1) == (CLOSED, 2)
    assert write(board, at(3)) == ACTIVE_RESOURCE
    assert manage(board, CLOSE, at(2)) == OK
    assert write(board, at(1) + 2) == OK


@pytest.mark.clause("BLKZ-DEV-033")
def test_the_zone_implicitly_open_longest_is_closed_for_another() -> None:
    board = zoned(max_open_zones=2)
    for zone in (1, 2, 3):
        assert write(board, at(zone)) == OK
    assert [state(board, zone)[0] for zone in (1, 2, 3)] == [CLOSED, IOPEN, IOPEN]
    assert manage(board, OPEN, at(4)) == OK
    assert write(board, at(1) + 1) == OK
    assert [state(board, zone)[0] for zone in (1, 2, 3, 4)] == [IOPEN, CLOSED, CLOSED, EOPEN]


@pytest.mark.clause("BLKZ-DEV-025")
def test_active_zones_come_free_by_finish_reset_and_filling() -> None:
    board = zoned(max_active_zones=1)
    for free in (lambda: manage(board, FINISH, at(1)), lambda: manage(board, RESET, at(1)), lambda: write(board, at(1) + 1, CAP - 1)):
        assert write(board, at(1)) == OK
        assert write(board, at(2)) == ACTIVE_RESOURCE
        assert free() == OK
        assert write(board, at(2)) == OK
        assert manage(board, RESET_ALL) == OK


# -- host-aware disks, and what zones have to do with other requests --------------------------------------------------------------


def test_a_host_aware_disk_takes_writes_anywhere() -> None:
    board = zoned(model="host-aware")
    assert write(board, at(2) + 10, 4, 1) == OK
    assert state(board, 2) == (IOPEN, 14)
    assert write(board, at(2) + 2, 2, 2) == OK
    assert state(board, 2) == (IOPEN, 14)
    assert read(board, at(2), 16)[1] == bytes(1024) + b"\2" * 1024 + bytes(3072) + b"\1" * 2048 + bytes(1024)
    assert write(board, at(3) - 2, 4, 3) == OK
    assert state(board, 2)[0] == FULL
    assert state(board, 3) == (IOPEN, 2)
    assert write(board, at(2), 1, 4) == OK, "a full zone is overwritten"
    assert manage(board, RESET, at(2)) == OK
    assert read(board, at(2), SIZE) == (OK, bytes(SIZE << 9))
    assert write(board, at(2) + 12, 1, 5) == OK
    assert read(board, at(2), SIZE)[1] == bytes(12 << 9) + b"\5" * 512 + bytes((SIZE - 13) << 9)


def test_a_write_zeroes_that_one_zone_refuses_changes_no_other() -> None:
    """What was not written must go on reading as zeros: the disk below may still hold what a reset zone had."""
    board = zoned(device={"max_discard_seg": 2}, model="host-aware")
    assert write(board, at(1), 4) == OK and manage(board, RESET, at(1)) == OK
    in_state(board, 2, RDONLY)
    ranges = struct.pack("<QIIQII", at(1), 4, 0, at(2), 4, 0)
    assert board.request(WRITE_ZEROES, data=ranges)[0] == INVALID_CMD
    assert state(board, 1) == (EMPTY, 0)
    assert read(board, at(1), 4) == (OK, bytes(2048))


def segment(*those: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<QII", *one) for one in those)


def test_write_zeroes_of_a_host_aware_disk_is_a_write() -> None:
    board = zoned(model="host-aware")
    assert board.request(WRITE_ZEROES, data=segment((at(1) + 3, 2, 0)))[0] == OK
    assert state(board, 1) == (IOPEN, 5)
    assert board.request(DISCARD, data=segment((at(1), 5, 0)))[0] == OK
    assert state(board, 1) == (IOPEN, 5)


def test_a_host_managed_disk_neither_discards_nor_writes_zeroes() -> None:
    board = zoned()
    assert board.request(DISCARD, data=segment((at(1), 5, 0)))[0] == board.request(WRITE_ZEROES, data=segment((at(1), 5, 0)))[0] == UNSUPP


@pytest.mark.clause("BLKZ-DEV-039", "BLKZ-DEV-040")
def test_secure_erase_is_a_reset_of_whole_zones() -> None:
    board = zoned(device={"secure_erase": True})
    assert board.features & F_SECURE_ERASE
    assert struct.unpack_from("<I", board.device.read_config(), 68)[0] % SIZE == 0
    for zone in (1, 2, 3):
        assert write(board, at(zone), 4) == OK
    for bad in ((at(1), SIZE - 1, 0), (at(1) + 1, SIZE, 0), (0, 2 * SIZE, 0)):
        assert board.request(SECURE_ERASE, data=segment(bad))[0] == INVALID_CMD
    assert state(board, 1) == (IOPEN, 4)
    assert board.request(SECURE_ERASE, data=segment((at(1), 2 * SIZE, 0)))[0] == OK
    assert [state(board, zone) for zone in (1, 2, 3)] == [(EMPTY, 0), (EMPTY, 0), (IOPEN, 4)]
    assert not any(board.store.bytes[at(1) << 9 : at(3) << 9])
    assert read(board, at(1), 4) == (OK, bytes(2048))
    in_state(board, 2, RDONLY)
    assert board.request(SECURE_ERASE, data=segment((at(2), 2 * SIZE, 0)))[0] == INVALID_CMD
    assert state(board, 3) == (IOPEN, 4)


# -- a model -----------------------------------------------------------------------------------------------------------------------


class Model:
    """Zones as the text of §5.2.6 has them, without an index, a counter or a range: everything is looked for when it is needed."""

    def __init__(self, max_open: int, max_active: int, max_append: int, grain: int) -> None:
        self.max_open, self.max_active, self.max_append, self.grain = max_open, max_active, max_append, grain
        self.states = [NOT_WP] + [EMPTY] * 7
        self.wps = [0] * 8  # from the start of the zone
        self.disk: list[bytes] = [bytes(512)] * SECTORS
        self.opened: list[int] = []  # zones in the order in which they became implicitly open

    def count(self, *those: int) -> int:
        return sum(one in those for one in self.states)

    def go(self, zone: int, after: int) -> None:
        if zone in self.opened:
            self.opened.remove(zone)
        if after == IOPEN:
            self.opened.append(zone)
        self.states[zone] = after

    def try_open(self, zone: int, after: int) -> int:
        if self.states[zone] not in (IOPEN, EOPEN):
            if self.states[zone] == EMPTY and self.max_active and self.count(IOPEN, EOPEN, CLOSED) == self.max_active:
                return ACTIVE_RESOURCE
            if self.max_open and self.count(IOPEN, EOPEN) == self.max_open:
                if not self.opened:
                    return OPEN_RESOURCE
                self.go(self.opened[0], CLOSED)
            self.go(zone, after)
        return OK

    def put(self, zone: int, offset: int, data: list[bytes]) -> int:
        if zone == 0:
            if offset + len(data) > SIZE:
                return INVALID_CMD
        else:
            if self.states[zone] in (RDONLY, OFFLINE, FULL) or offset + len(data) > CAP:
                return INVALID_CMD
            if offset != self.wps[zone] or (offset + len(data)) % self.grain:
                return UNALIGNED_WP
            if status := self.try_open(zone, IOPEN):
                return status
            self.wps[zone] += len(data)
            if self.wps[zone] == CAP:
                self.go(zone, FULL)
        self.disk[at(zone) + offset : at(zone) + offset + len(data)] = data
        return OK

    def append(self, zone: int, data: list[bytes]) -> tuple[int, int]:
        if zone == 0 or len(data) > self.max_append:
            return INVALID_CMD, 0
        where = self.wps[zone]
        return self.put(zone, where, data), at(zone) + where

    def get(self, zone: int, offset: int, sectors: int) -> bytes | None:
        if self.states[zone] == OFFLINE or offset + sectors > SIZE:
            return None
        return b"".join(self.disk[at(zone) + offset : at(zone) + offset + sectors])

    def manage(self, kind: int, zone: int) -> int:
        if kind == RESET_ALL:
            for each in range(1, 8):
                self.manage(RESET, each)
            return OK
        before = self.states[zone]
        after = MOVES[kind].get(before)
        if zone == 0 or after is None:
            return INVALID_CMD
        if kind == OPEN and (status := self.try_open(zone, EOPEN)):
            return status
        if kind == CLOSE and before == EOPEN and self.wps[zone]:
            after = CLOSED
        if kind == RESET:
            self.wps[zone] = 0
            self.disk[at(zone) : at(zone + 1)] = [bytes(512)] * SIZE
        self.go(zone, after)
        return OK


WEAR = 1000
"""Added to the state that a failing zone takes; not a request."""
OFFSETS = st.sampled_from([0, 1, 2, 3, 4, 6, CAP - 2, CAP - 1, CAP, SIZE - 1]) | st.none()
STEPS = st.one_of(
    st.tuples(st.just(OUT), st.integers(0, 7), OFFSETS, st.sampled_from([1, 2, 2, 4, 6, CAP])),
    st.tuples(st.just(IN), st.integers(0, 7), OFFSETS, st.sampled_from([1, 4, CAP, SIZE])),
    st.tuples(st.just(APPEND), st.integers(0, 7), st.none(), st.sampled_from([1, 2, 4, 8, 9])),
    st.tuples(st.sampled_from([*MOVES, RESET]), st.integers(0, 7), st.none(), st.just(0)),
    st.tuples(st.sampled_from([RESET_ALL, WEAR + RDONLY, WEAR + OFFLINE]), st.integers(1, 7), st.none(), st.just(0)),
)
LIMITS = st.sampled_from([(0, 0, 8, 1), (2, 0, 8, 1), (2, 3, 8, 1), (1, 1, 8, 2), (0, 2, 4, 4), (3, 4, 8, 2)])


@given(limits=LIMITS, steps=st.lists(STEPS, max_size=40))
@example(limits=(2, 3, 8, 1), steps=[(OUT, zone, None, 1) for zone in (1, 2, 3, 4, 1, 1)])
@settings(deadline=None, max_examples=60)
def test_random_requests_do_what_the_model_does(limits: tuple[int, int, int, int], steps: list[tuple[int, int, int | None, int]]) -> None:
    max_open, max_active, max_append, grain = limits
    board = zoned(max_open_zones=max_open, max_active_zones=max_active, max_append_sectors=max_append, write_granularity=grain * 512)
    model = Model(*limits)
    zones = board.device.zones
    assert zones is not None
    for number, (kind, zone, offset, sectors) in enumerate(steps):
        data = [bytes([number + 1, i]) * 256 for i in range(sectors)]
        where = model.wps[zone] if offset is None else offset
        if kind == OUT and at(zone) + where + sectors <= SECTORS:
            assert board.request(OUT, at(zone) + where, data=b"".join(data))[0] == model.put(zone, where, data)
        elif kind == IN and at(zone) + where + sectors <= SECTORS:
            expected = model.get(zone, where, sectors)
            status, content = read(board, at(zone) + where, sectors)
            assert (status, content) == ((OK, expected) if expected is not None else (INVALID_CMD, content))
        elif kind == APPEND:
            status, used, content = board.request(APPEND, at(zone), data=b"".join(data), room=8)
            expected_status, first = model.append(zone, data)
            assert status == expected_status
            assert status or (used, struct.unpack("<Q", content)[0]) == (9, first)
        elif kind > WEAR:
            if model.states[zone] not in (RDONLY, OFFLINE):
                zones.wear(at(zone), offline=kind == WEAR + OFFLINE)
                model.go(zone, kind - WEAR)
        elif kind in (*MOVES, RESET_ALL):
            assert manage(board, kind, 0 if kind == RESET_ALL else at(zone)) == model.manage(kind, zone)
        rows = report(board)
        assert [row[4] for row in rows] == model.states
        moving = [i for i in range(8) if model.states[i] in (EMPTY, IOPEN, EOPEN, CLOSED)]
        assert [rows[i][2] - rows[i][1] for i in moving] == [model.wps[i] for i in moving]
        assert (zones.open_zones, zones.active_zones) == (model.count(IOPEN, EOPEN), model.count(IOPEN, EOPEN, CLOSED))


@given(st.lists(st.tuples(st.integers(0, 39), st.integers(1, 12)), max_size=30))
def test_written_ranges_stay_in_order_and_apart(ranges: list[tuple[int, int]]) -> None:
    zone, seen = Zone(0, 64, 64, 3), set()  # type: ignore[arg-type]
    for first, length in ranges:
        zone.add(first, first + length)
        seen |= set(range(first, first + length))
        assert {sector for low, high in zone.written for sector in range(low, high)} == seen
        assert all(a[1] < b[0] for a, b in zip(zone.written, zone.written[1:], strict=False))
