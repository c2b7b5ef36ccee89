"""The virtio-blk device on a bench: every request type, every way to be wrong, every framing, and what a store's failure becomes."""

from __future__ import annotations

import errno
import itertools
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vblklab as vb
from tests.support import (
    DISCARD,
    DRIVER_OK,
    F_CONFIG_WCE,
    F_DISCARD,
    F_EVENT_IDX,
    F_FLUSH,
    F_INDIRECT,
    F_WRITE_ZEROES,
    FLUSH,
    GET_ID,
    IN,
    INDIRECT,
    IOERR,
    NEEDS_RESET,
    OK,
    OUT,
    UNSUPP,
    WRITE,
    WRITE_ZEROES,
    Board,
    Held,
    LoggedStore,
)
from vblklab.disk.store import open_image
from vblklab.memory import GuestPages
from vblklab.ring import PackedDevice, PackedDriver

SECTORS = 2048
WRITEBACK = 0x100 + 32


def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes of which no two sectors are alike."""
    return b"".join(struct.pack("<IIII", seed, i, i * 2654435761 & 0xFFFFFFFF, ~i & 0xFFFFFFFF) for i in range(-(-length // 16)))[:length]


def ranges(*each: tuple[int, int, int]) -> bytes:
    """struct virtio_blk_discard_write_zeroes."""
    return b"".join(struct.pack("<QII", *one) for one in each)


def content(board: Board, sector: int, sectors: int = 1) -> bytes:
    return bytes(board.store.bytes[sector << 9 : sector + sectors << 9])


@pytest.fixture
def board() -> Board:
    board = Board(sectors=SECTORS).boot()
    board.store.bytes[:] = pattern(SECTORS << 9, 7)
    return board


def log(board: Board, *names: str) -> list[str]:
    return [entry[0] for entry in board.store.log if not names or entry[0] in names]


# -- read and write ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sectors", [1, 2, 3, 8, 15])
@pytest.mark.parametrize("sector", [0, 1, 77, SECTORS - 15])
def test_5_2_6_in_delivers_the_sectors_and_out_stores_them(board: Board, sector: int, sectors: int) -> None:
    length = sectors << 9
    assert board.request(IN, sector, room=length) == (OK, length + 1, content(board, sector, sectors))
    before = bytes(board.store.bytes)
    data = pattern(length, 99)
    assert board.request(OUT, sector, data=data) == (OK, 1, b"")
    start = sector << 9
    assert bytes(board.store.bytes) == before[:start] + data + before[start + length :]
    assert board.request(IN, sector, room=length)[2] == data


def test_the_header_s_reserved_word_has_no_meaning(board: Board) -> None:
    assert board.request(IN, 3, room=512, reserved=0xFFFFFFFF) == (OK, 513, content(board, 3))


def test_a_request_without_data_moves_none(board: Board) -> None:
    before = bytes(board.store.bytes)
    assert board.request(IN, 3) == (OK, 1, b"")
    assert board.request(OUT, 3) == (OK, 1, b"")
    assert bytes(board.store.bytes) == before


@pytest.mark.parametrize("kind", [IN, OUT])
@pytest.mark.parametrize(
    ("sector", "sectors", "status"),
    [
        (SECTORS - 1, 1, OK),
        (SECTORS - 2, 2, OK),
        (SECTORS, 1, IOERR),
        (SECTORS - 1, 2, IOERR),
        (SECTORS + 5, 1, IOERR),
        (2**32, 1, IOERR),
        (2**55, 1, IOERR),
        (2**55 - 1, 2, IOERR),
        (2**63, 1, IOERR),
        (2**64 - 1, 1, IOERR),
        (2**64 - 1, 2, IOERR),
    ],
)
def test_5_2_6_capacity_is_an_edge(board: Board, kind: int, sector: int, sectors: int, status: int) -> None:
    before = bytes(board.store.bytes)
    length = sectors << 9
    framing: dict[str, Any] = {"room": length} if kind == IN else {"data": pattern(length)}
    got, used, data = board.request(kind, sector, **framing)
    assert got == status
    if status == IOERR:
        assert bytes(board.store.bytes) == before
        assert set(data) <= {0, 0xFF, 0xEE} and used <= 1
        assert log(board) == []
    assert board.status() & NEEDS_RESET == 0
    assert board.works()


@pytest.mark.parametrize("kind", [IN, OUT])
@pytest.mark.parametrize("length", [1, 511, 513, 1023, 1025])
def test_5_2_6_1_a_length_that_is_no_whole_sector_is_an_error(board: Board, kind: int, length: int) -> None:
    framing: dict[str, Any] = {"room": length} if kind == IN else {"data": pattern(length)}
    assert board.request(kind, 3, **framing)[0] == IOERR
    assert log(board) == []


@pytest.mark.parametrize("kind", [IN, OUT])
@pytest.mark.parametrize(
    ("sector", "sectors", "status"), [(0, 8, OK), (8, 16, OK), (1, 8, IOERR), (4, 8, IOERR), (0, 1, IOERR), (0, 12, IOERR)]
)
def test_5_2_4_a_request_that_is_no_whole_block_is_an_error(kind: int, sector: int, sectors: int, status: int) -> None:
    board = Board(vb.VirtioBlkDevice(block_size=4096), sectors=SECTORS).boot()
    framing: dict[str, Any] = {"room": sectors << 9} if kind == IN else {"data": pattern(sectors << 9)}
    assert board.request(kind, sector, **framing)[0] == status
    assert len(log(board, "readv", "writev")) == (status == OK)


@pytest.mark.clause("BLK-DEV-007", "BLK-DEV-008")
def test_5_2_6_2_a_read_only_device_reads_and_refuses_every_change() -> None:
    board = Board(vb.VirtioBlkDevice(read_only=True), sectors=SECTORS).boot()
    board.store.bytes[:] = before = pattern(SECTORS << 9)
    assert board.offered() & 1 << 5 and not board.offered() & (F_DISCARD | F_WRITE_ZEROES)
    assert board.request(IN, 5, room=512) == (OK, 513, before[5 << 9 : 6 << 9])
    assert board.request(OUT, 5, data=bytes(512)) == (IOERR, 1, b"")
    assert board.request(OUT, 5, data=bytes(100))[0] == IOERR
    for kind in (DISCARD, WRITE_ZEROES):
        assert board.request(kind, data=ranges((5, 1, 0)))[0] in (IOERR, UNSUPP)
    assert board.request(FLUSH)[0] == OK
    assert bytes(board.store.bytes) == before


def test_a_device_over_a_read_only_store_is_read_only() -> None:
    store = LoggedStore(1 << 20)
    store.read_only = True
    board = Board(store=store).boot()
    assert board.offered() & 1 << 5
    assert board.request(OUT, 0, data=bytes(512))[0] == IOERR
    assert log(board, "writev") == []


# -- the other requests --------------------------------------------------------------------------------------------------------


def test_5_2_6_flush_reaches_the_store(board: Board) -> None:
    board.request(OUT, 0, data=pattern(512))
    assert log(board) == ["writev"]
    assert board.request(FLUSH) == (OK, 1, b"")
    assert log(board) == ["writev", "flush"]


@pytest.mark.parametrize(
    ("serial", "id_bytes"),
    [("", bytes(20)), ("vblk", b"vblk" + bytes(16)), ("x" * 19, b"x" * 19 + b"\0"), ("0123456789abcdefghij",) * 2],
    ids=len,
)
def test_5_2_6_get_id_is_20_bytes_padded_with_nul(serial: str, id_bytes: bytes | str) -> None:
    expected = id_bytes if isinstance(id_bytes, bytes) else id_bytes.encode()
    board = Board(vb.VirtioBlkDevice(serial=serial), size=16).boot()
    assert board.request(GET_ID, room=20) == (OK, 21, expected)
    assert board.request(GET_ID, room=20, cuts=[7, 1, 3]) == (OK, 21, expected)


def test_a_serial_of_21_bytes_is_refused() -> None:
    with pytest.raises(vb.ConfigError, match="at most 20 bytes"):
        vb.VirtioBlkDevice(serial="é" * 11)


@pytest.mark.parametrize(("room", "status", "used"), [(0, IOERR, 1), (19, IOERR, 20), (20, OK, 21), (64, OK, 20)])
def test_get_id_into_another_size_stays_inside_it_and_says_how_much(room: int, status: int, used: int) -> None:
    board = Board(vb.VirtioBlkDevice(serial="0123456789abcdefghij")).boot()
    got = board.request(GET_ID, room=room, cuts=[11])
    assert got[:2] == (status, used)
    assert got[2][:20] == b"0123456789abcdefghij"[:room]
    assert got[2][20:] == b"\xee" * max(room - 20, 0)


@pytest.mark.parametrize("kind", [2, 3, 5, 6, 7, 9, 10, 12, 14, 16, 0x80000000, 0xFFFFFFFF])
def test_5_2_6_an_unknown_type_is_unsupported(board: Board, kind: int) -> None:
    before = bytes(board.store.bytes)
    assert board.request(kind, 1, data=bytes(512))[:2] == (UNSUPP, 1)
    assert board.request(kind, 1, room=512)[0] == UNSUPP
    assert bytes(board.store.bytes) == before
    assert board.works()


@pytest.mark.clause("BLK-DEV-013")
@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
def test_5_2_6_discard_and_write_zeroes_clear_their_range_and_nothing_else(board: Board, kind: int) -> None:
    before = bytes(board.store.bytes)
    assert board.request(kind, data=ranges((10, 5, 0))) == (OK, 1, b"")
    assert bytes(board.store.bytes) == before[: 10 << 9] + bytes(5 << 9) + before[15 << 9 :]
    assert board.request(IN, 10, room=5 << 9)[2] == bytes(5 << 9)


@pytest.mark.clause("BLK-DEV-014", "BLK-DEV-015", "BLK-DEV-016")
@pytest.mark.parametrize("flags", [0, 1])
def test_5_2_6_write_zeroes_hands_the_unmap_flag_down_and_reads_zero_either_way(board: Board, flags: int) -> None:
    assert board.request(WRITE_ZEROES, data=ranges((10, 5, flags)))[0] == OK
    assert board.store.log == [("write_zeroes", 10 << 9, 5 << 9, bool(flags))]
    assert content(board, 10, 5) == bytes(5 << 9)


@pytest.mark.clause("BLK-DEV-009", "BLK-DEV-011", "BLK-DEV-012")
@pytest.mark.parametrize(
    ("kind", "flags"), [(DISCARD, 1), *itertools.product((DISCARD, WRITE_ZEROES), (2, 3, 1 << 16, 1 << 31, 0xFFFFFFFF))]
)
def test_5_2_6_2_an_unknown_flag_and_unmap_of_a_discard_are_unsupported(board: Board, kind: int, flags: int) -> None:
    assert board.request(kind, data=ranges((10, 5, flags)))[0] == UNSUPP
    assert log(board) == []


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (ranges((SECTORS - 1, 1, 0)), OK),
        (ranges((0, SECTORS, 0)), OK),
        (ranges((0, 0, 0)), OK),
        (ranges((SECTORS, 1, 0)), IOERR),
        (ranges((SECTORS - 1, 2, 0)), IOERR),
        (ranges((2**64 - 1, 2, 0)), IOERR),
        (ranges((2**63, 0xFFFFFFFF, 0)), IOERR),
        (ranges((0, 0xFFFFFFFF, 0)), IOERR),
        (b"", IOERR),
        (ranges((0, 1, 0))[:15], IOERR),
        (ranges((0, 1, 0)) + b"\0", IOERR),
        (ranges((0, 1, 0), (1, 1, 0)), UNSUPP),
    ],
)
def test_5_2_6_a_range_is_inside_the_disk_and_there_is_one(board: Board, kind: int, data: bytes, status: int) -> None:
    before = bytes(board.store.bytes)
    assert board.request(kind, data=data)[0] == status
    if status != OK:
        assert bytes(board.store.bytes) == before
    assert board.works()


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
def test_5_2_6_a_range_longer_than_the_maximum_is_an_error(kind: int) -> None:
    board = Board(vb.VirtioBlkDevice(max_discard_sectors=100), sectors=SECTORS).boot()
    assert board.request(kind, data=ranges((0, 100, 0)))[0] == OK
    assert board.request(kind, data=ranges((0, 101, 0)))[0] == IOERR


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize(("sector", "sectors", "status"), [(8, 16, OK), (1, 8, IOERR), (8, 1, IOERR)])
def test_a_range_is_whole_blocks(kind: int, sector: int, sectors: int, status: int) -> None:
    board = Board(vb.VirtioBlkDevice(block_size=4096), sectors=SECTORS).boot()
    assert board.request(kind, data=ranges((sector, sectors, 0)))[0] == status


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
def test_a_device_without_discard_says_so(kind: int) -> None:
    board = Board(vb.VirtioBlkDevice(discard=False)).boot()
    assert not board.offered() & (F_DISCARD | F_WRITE_ZEROES)
    assert board.request(kind, data=ranges((0, 1, 0)))[0] == UNSUPP


# -- the used element ----------------------------------------------------------------------------------------------------------


def test_5_2_6_the_status_byte_and_the_data_lie_in_memory_before_used_idx_moves(board: Board) -> None:
    """Watched at every trace point, as a peer on another CPU could."""
    pieces = board.pieces(IN, 9, room=512)
    ring = board.rings[0]
    board.send(pieces, kick=False)
    board.regs.write(0x050, 0)
    seen = []
    while board.machine.step() is not vb.WAIT:
        answered = board.writable(pieces)
        seen.append((ring.used_idx, answered[-1] == OK, answered[:-1] == content(board, 9)))
        if ring.used_idx:
            assert seen[-1] == (1, True, True)
            assert ring.get("II", ring.used_at + 4) == (0, 513)
    assert seen[0] == (0, False, False) and seen[-1] == (1, True, True)
    assert (0, True, True) in seen, "between the status byte and used.idx lies a trace point"


@pytest.mark.clause("SPLIT-DEV-016")
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("kind", [IN, OUT, GET_ID, 77], ids=["IN", "OUT", "GET_ID", "unknown"])
def test_2_7_8_2_data_and_status_stand_in_memory_when_the_used_element_is_published(kind: int, packed: bool) -> None:
    """Looked at in the moment of the store that shows it: afterwards the order can no longer be seen."""
    engine = Held()
    board = Board(vb.VirtioBlkDevice(), engine=engine).boot()
    board.store.bytes[:512] = b"d" * 512
    queue = board.device.queues[0]
    if packed:
        driver = PackedDriver.alloc(GuestPages(board.memory, 0x8000), 8)
        queue = board.device.queues[0] = PackedDevice(board.memory, driver.layout)
    room = {IN: 512, GET_ID: 20}.get(kind, 0)
    pieces = board.pieces(kind, 0, room=room, data=b"w" * 512 if kind == OUT else b"")
    seen: list[bytes] = []
    flush = queue.flush

    def look() -> int:
        seen.append(board.writable(pieces))
        return flush()

    queue.flush = look  # type: ignore[method-assign]
    if packed:
        driver.add_sgs([p[:2] for p in pieces if not p[2]], [p[:2] for p in pieces if p[2]], "token")
        driver.publish()
        board.kick()
    else:
        board.send(pieces)
    while engine.started:
        engine.end()
    board.machine.run()
    data = {IN: b"d" * 512, GET_ID: b"vblklab".ljust(20, b"\0")}.get(kind, b"")
    assert seen == [data + bytes((UNSUPP if kind == 77 else OK,))]


@pytest.mark.clause("SPLIT-DEV-016", "SPLIT-DEV-017")
@pytest.mark.parametrize(
    ("kind", "framing", "status", "used"),
    [
        (IN, dict(room=1024), OK, 1025),
        (IN, dict(room=511), IOERR, 0),
        (IN, dict(), OK, 1),
        (OUT, dict(data=bytes(512)), OK, 1),
        (OUT, dict(data=bytes(511)), IOERR, 1),
        (OUT, dict(data=bytes(512), room=100), OK, 0),
        (FLUSH, dict(), OK, 1),
        (FLUSH, dict(room=16), OK, 0),
        (99, dict(room=16), UNSUPP, 0),
        (GET_ID, dict(room=20), OK, 21),
    ],
)
def test_2_7_8_2_the_used_length_is_what_was_written_without_a_gap_from_the_first_writable_byte(
    board: Board, kind: int, framing: dict[str, Any], status: int, used: int
) -> None:
    """The device must have written at least so many bytes, beginning at the first writable one: a hole ends the count."""
    board.store.bytes[:1024] = bytes(1024)
    got, length, data = board.request(kind, 0, cuts=[4096], **framing)  # what can be written holds 0xee before
    assert (got, length) == (status, used)
    assert 0xEE not in (data + bytes([got]))[:length]


@pytest.mark.clause("SPLIT-DEV-016", "SPLIT-DEV-017")
def test_2_7_8_2_a_failed_read_claims_no_data() -> None:
    board = Board().boot()
    board.store.fail["readv"] = errno.EIO
    assert board.request(IN, 0, room=4096)[:2] == (IOERR, 0)


@pytest.mark.clause("PACKED-DEV-004", "SPLIT-DEV-003")
def test_2_7_5_1_device_readable_memory_is_never_written(board: Board) -> None:
    for kind, sector, data in ((OUT, 4, pattern(1024)), (DISCARD, 0, ranges((1, 1, 0))), (99, 0, pattern(64)), (FLUSH, 0, pattern(64))):
        pieces = board.pieces(kind, sector, data=data, cuts=[300])
        before = [board.memory.read(at, length) for at, length, flags in pieces if not flags & WRITE]
        board.send(pieces)
        assert [board.memory.read(at, length) for at, length, flags in pieces if not flags & WRITE] == before
        board.rings[0].used()


# -- framing -------------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("SPLIT-DEV-001")
@pytest.mark.parametrize("cuts", [[1], [5, 6], [5, 5, 6, 512], [16, 512, 1], [15, 2], [529], [3, 700], [17, 4096]], ids=str)
@pytest.mark.parametrize("indirect", [False, True])
def test_2_7_4_1_any_framing_gives_the_same_result(cuts: list[int], indirect: bool) -> None:
    """Header split over three, data and status in one, one byte a descriptor: no layout is presumed."""
    board = Board(vb.VirtioBlkDevice(seg_max=2000), size=1024, memory_bytes=1 << 19).boot()
    data = pattern(512, 5)

    def send(pieces: Sequence[tuple[int, int, int]]) -> tuple[int, bytes]:
        ring = board.rings[0]
        if indirect:
            ring.desc(0, *ring.table(0x60000, pieces), INDIRECT)
            ring.offer(0)
            board.kick()
        else:
            board.send(pieces)
        (used,) = ring.used()
        return used[1], board.writable(pieces)

    assert send(board.pieces(OUT, 2, data=data, cuts=cuts)) == (1, b"\0")
    assert content(board, 2) == data
    assert send(board.pieces(IN, 2, room=512, cuts=cuts)) == (513, data + b"\0")
    assert send(board.pieces(GET_ID, room=20, cuts=cuts)) == (21, b"vblklab".ljust(20, b"\0") + b"\0")
    assert send(board.pieces(DISCARD, data=ranges((2, 1, 0)), cuts=cuts)) == (1, b"\0")
    assert content(board, 2) == bytes(512)
    assert send(board.pieces(77, data=bytes(9), room=9, cuts=cuts))[1][-1] == UNSUPP


@pytest.mark.clause("SPLIT-DEV-001")
@given(
    kind=st.sampled_from([IN, OUT, GET_ID, WRITE_ZEROES, FLUSH]),
    sectors=st.integers(1, 3),
    sector=st.integers(0, 40),
    cuts=st.lists(st.integers(1, 700), min_size=1, max_size=6),
    features=st.sampled_from([0, F_INDIRECT, F_EVENT_IDX, F_INDIRECT | F_EVENT_IDX]),
)
def test_2_7_4_1_a_cut_anywhere_changes_nothing(kind: int, sectors: int, sector: int, cuts: list[int], features: int) -> None:
    store = LoggedStore(64 << 9)
    store.bytes[:] = before = pattern(64 << 9, 3)
    board = Board(vb.VirtioBlkDevice(seg_max=3000), store=store, size=256).boot(features | F_FLUSH)
    length, start = sectors << 9, sector << 9
    framing: dict[str, Any] = {IN: dict(room=length), OUT: dict(data=pattern(length, 8)), GET_ID: dict(room=20), FLUSH: dict()}.get(
        kind, dict(data=ranges((sector, sectors, 0)))
    )
    if (16 + len(framing.get("data", b""))) // min(cuts) + framing.get("room", 0) // min(cuts) > 250:
        cuts = [max(cut, 16) for cut in cuts]
    status, used, data = board.request(kind, sector, cuts=cuts, **framing)
    assert (status, used) == (OK, framing.get("room", 0) + 1)
    after = {OUT: framing.get("data", b""), WRITE_ZEROES: bytes(length)}.get(kind, before[start : start + length])
    assert bytes(store.bytes) == before[:start] + after + before[start + length :]
    if kind == IN:
        assert data == before[start : start + length]


# -- write cache ---------------------------------------------------------------------------------------------------------------


def completion_and_flush(board: Board, kind: int = OUT, data: bytes = bytes(512)) -> list[str]:
    """The order of store operations and completion of one write."""
    board.store.log.clear()
    pieces = board.pieces(kind, 0, data=data)
    ring = board.rings[0]
    before = ring.used_idx
    board.send(pieces, kick=False)
    board.regs.write(0x050, 0)
    out: list[str] = []
    while board.machine.step() is not vb.WAIT:
        out += log(board)[len([name for name in out if name != "used"]) :]
        if ring.used_idx != before and "used" not in out:
            out.append("used")
    ring.used()
    return out


@pytest.mark.clause("BLK-DEV-019", "BLK-DEV-020")
@pytest.mark.parametrize(
    ("write_cache", "features", "through"),
    [
        (True, F_FLUSH | F_CONFIG_WCE, False),
        (True, F_FLUSH, False),
        (True, 0, True),
        (False, F_FLUSH | F_CONFIG_WCE, True),
        (False, F_FLUSH, True),
        (False, 0, True),
    ],
)
@pytest.mark.parametrize(
    ("kind", "name", "data"), [(OUT, "writev", bytes(512)), (WRITE_ZEROES, "write_zeroes", ranges((0, 1, 0)))], ids=["out", "zeroes"]
)
def test_5_2_6_2_a_write_without_a_cache_is_stable_before_it_is_completed(
    write_cache: bool, features: int, through: bool, kind: int, name: str, data: bytes
) -> None:
    board = Board(vb.VirtioBlkDevice(write_cache=write_cache)).boot(features)
    assert completion_and_flush(board, kind, data) == ([name, "flush", "used"] if through else [name, "used"])


def test_5_2_6_2_a_failed_flush_behind_a_write_through_write_is_an_error() -> None:
    board = Board(vb.VirtioBlkDevice(write_cache=False)).boot()
    board.store.fail["flush"] = errno.EIO
    assert board.request(OUT, 0, data=bytes(512))[0] == IOERR
    board.store.fail.clear()
    assert board.works()


def test_5_2_6_2_a_failed_write_is_not_flushed() -> None:
    board = Board(vb.VirtioBlkDevice(write_cache=False)).boot()
    board.store.fail["writev"] = errno.EIO
    assert board.request(OUT, 0, data=bytes(512))[0] == IOERR
    assert log(board) == ["writev"]


def test_5_2_5_the_driver_switches_the_cache_and_a_reset_switches_it_back() -> None:
    board = Board().boot(F_FLUSH | F_CONFIG_WCE)
    assert board.regs.read(WRITEBACK, 1) == 1
    for value in (0, 1, 0):
        board.regs.write(WRITEBACK, value, 1)
        assert board.regs.read(WRITEBACK, 1) == value
        assert ("flush" in completion_and_flush(board)) == (not value)
    board.boot(F_FLUSH | F_CONFIG_WCE)
    assert board.regs.read(WRITEBACK, 1) == 1
    assert completion_and_flush(board) == ["writev", "used"]


def test_5_2_5_the_cache_may_be_switched_from_features_ok_on() -> None:
    board = Board().boot(F_FLUSH | F_CONFIG_WCE, ok=False)
    board.regs.write(WRITEBACK, 0, 1)
    assert board.regs.read(WRITEBACK, 1) == 0
    board.regs.write(0x070, board.status() | DRIVER_OK)
    board.machine.run()
    assert board.regs.read(WRITEBACK, 1) == 0
    assert completion_and_flush(board) == ["writev", "flush", "used"]


def test_5_2_5_the_cache_is_not_switched_without_config_wce_nor_before_features_ok() -> None:
    board = Board()
    board.reset()
    board.regs.write(WRITEBACK, 0, 1)
    board.boot(F_FLUSH)
    board.regs.write(WRITEBACK, 0, 1)
    assert board.regs.read(WRITEBACK, 1) == 1
    assert completion_and_flush(board) == ["writev", "used"]


@pytest.mark.parametrize("value", [2, 128, 255])
def test_a_cache_mode_that_does_not_exist_is_ignored(value: int) -> None:
    board = Board().boot()
    for mode in (0, 1):
        board.regs.write(WRITEBACK, mode, 1)
        board.regs.write(WRITEBACK, value, 1)
        assert board.regs.read(WRITEBACK, 1) == mode


@pytest.mark.clause("BLK-DEV-021")
def test_5_2_6_2_a_flush_behind_writes_that_were_completed_finds_them_in_the_store() -> None:
    engine = Held()
    board = Board(engine=engine).boot()
    for i in range(2):
        board.send(board.pieces(OUT, i, data=pattern(512, i), slot=i), slots=[3 * i, 3 * i + 1, 3 * i + 2])
        engine.end()
        board.machine.run()
    board.send(board.pieces(FLUSH, slot=2), slots=[6, 7])
    engine.end()
    board.machine.run()
    assert log(board) == ["writev", "writev", "flush"]
    assert len(board.rings[0].used()) == 3


# -- a store that fails --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize(
    ("name", "kind", "framing"),
    [
        ("readv", IN, dict(room=512)),
        ("writev", OUT, dict(data=bytes(512))),
        ("flush", FLUSH, dict()),
        ("discard", DISCARD, dict(data=ranges((0, 1, 0)))),
        ("write_zeroes", WRITE_ZEROES, dict(data=ranges((0, 1, 0)))),
    ],
)
def test_an_error_of_the_host_is_ioerr_for_that_request_and_for_no_other(
    board: Board, name: str, kind: int, framing: dict[str, Any], error: int
) -> None:
    board.store.fail[name] = error
    assert board.request(kind, 0, **framing)[0] == IOERR
    board.store.fail.clear()
    assert board.status() & NEEDS_RESET == 0
    assert board.request(kind, 0, **framing)[0] == OK
    assert board.works()


def test_one_failing_request_in_a_batch_leaves_the_others_alone() -> None:
    engine = Held()
    board = Board(engine=engine, size=16).boot()
    for i in range(4):
        board.send(board.pieces(OUT, i, data=pattern(512, i), slot=i), slots=[3 * i, 3 * i + 1, 3 * i + 2], kick=i == 3)
    for i in range(4):
        board.store.fail = {"writev": errno.ENOSPC} if i == 2 else {}
        engine.end()
    board.machine.run()
    assert board.rings[0].used() == [(0, 1), (3, 1), (6, 1), (9, 1)]
    statuses = [board.memory.read(board.data_at + i * 0x2000 + 0x20, 1)[0] for i in range(4)]
    assert statuses == [OK, OK, IOERR, OK]


def test_a_truncated_image_is_an_error_of_its_requests_only(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(64 << 9))
    store = open_image(str(path))
    try:
        board = Board(store=store).boot()  # type: ignore[arg-type]
        os.truncate(path, 10 << 9)
        assert board.request(IN, 9, room=512)[:2] == (OK, 513)
        assert board.request(IN, 10, room=512)[0] == IOERR
        assert board.request(IN, 9, room=1024)[0] == IOERR
        assert board.works()
    finally:
        store.close()


@pytest.mark.parametrize("pieces", [1024, 1025, 2048])
def test_more_pieces_than_the_kernel_takes_at_once_are_no_error(tmp_path: Path, pieces: int) -> None:
    """IOV_MAX is 1024; a request in one-byte descriptors has more."""
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(64 << 9))
    store = open_image(str(path))
    try:
        length = -(-pieces // 512) * 512
        cut = [memoryview(bytearray(1)) for _ in range(pieces - 1)] + [memoryview(bytearray(length - pieces + 1))]
        store.readv(512, cut)
        assert b"".join(cut) == pattern(64 << 9)[512 : 512 + length]
        store.writev(0, cut)
        assert path.read_bytes() == pattern(64 << 9)[512 : 512 + length] + pattern(64 << 9)[length:]
    finally:
        store.close()


# -- several requests and queues -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_completions_in_any_order_reach_their_own_buffers(order: tuple[int, ...]) -> None:
    engine = Held()
    board = Board(engine=engine, size=16).boot()
    board.store.bytes[:] = pattern(len(board.store.bytes))
    framed = [board.pieces(IN, 10 * i, room=512, slot=i) for i in range(3)]
    for i, pieces in enumerate(framed):
        board.send(pieces, slots=[3 * i, 3 * i + 1, 3 * i + 2], kick=i == 2)
    ops = list(engine.started)
    for i in order:
        engine.end(ops[i])
        board.machine.run()
    assert board.rings[0].used() == [(3 * i, 513) for i in order]
    for i, pieces in enumerate(framed):
        assert board.writable(pieces) == content(board, 10 * i) + b"\0"


def test_several_queues_are_served_and_told_apart() -> None:
    board = Board(queues=4).boot()
    board.store.bytes[:] = pattern(len(board.store.bytes))
    for queue in (2, 0, 3, 1):
        assert board.request(IN, queue, queue=queue, room=512)[2] == content(board, queue)
        assert board.notified[-1] == queue
        assert all(not ring.used() for ring in board.rings)
    assert len(board.notified) == 4


def test_one_kick_serves_a_whole_ring() -> None:
    board = Board(size=8).boot()
    for i in range(4):
        board.send(board.pieces(FLUSH, slot=i), slots=[2 * i, 2 * i + 1], kick=i == 3)
    assert sorted(board.rings[0].used()) == [(0, 1), (2, 1), (4, 1), (6, 1)]


def test_a_full_turn_of_the_ring_many_times(board: Board) -> None:
    for i in range(40):
        assert board.request(IN, i, room=512) == (OK, 513, content(board, i))


def test_2_7_7_the_device_notifies_as_the_driver_asks() -> None:
    board = Board().boot(F_FLUSH)
    board.request(FLUSH)
    board.rings[0].avail_flags = 1
    board.request(FLUSH)
    assert board.notified == [0]
    board = Board().boot(F_FLUSH | F_EVENT_IDX)
    ring = board.rings[0]
    for i in range(6):
        ring.used_event = i if i % 2 else i + 100
        board.request(FLUSH)
    assert len(board.notified) == 4, "the first one, and those whose event was passed"


# -- capacity ------------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("BLK-DEV-005", "BLK-DEV-006")
def test_5_2_6_2_a_new_capacity_is_told_and_is_the_new_edge(board: Board) -> None:
    board.device.resize(100)
    assert board.regs.read(0x100) == 100
    assert board.regs.read(0x060) & 2 and board.config_interrupts == 1
    assert board.request(IN, 99, room=512)[0] == OK
    assert board.request(IN, 100, room=512)[0] == IOERR
    assert board.request(DISCARD, data=ranges((99, 2, 0)))[0] == IOERR


# -- parts ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(queues=0),
        dict(queues=1025),
        dict(queue_size_max=0),
        dict(queue_size_max=100),
        dict(queue_size_max=65536),
        dict(block_size=100),
        dict(block_size=256),
        dict(block_size=65536),
        dict(seg_max=0),
        dict(seg_max=65535),
        dict(size_max=511),
        dict(max_discard_sectors=0),
    ],
    ids=str,
)
def test_a_device_that_cannot_be_is_refused(options: dict[str, int]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(vb.ConfigError, match=f"{name}={value}"):
        vb.VirtioBlkDevice(**options)  # type: ignore[arg-type]


def test_a_device_says_how_it_was_made() -> None:
    assert repr(vb.VirtioBlkDevice()) == "VirtioBlkDevice()"
    made = vb.VirtioBlkDevice(queues=3, read_only=True, serial="x")
    assert repr(made) == "VirtioBlkDevice(queues=3, read_only=True, serial='x')"
