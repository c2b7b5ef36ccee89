"""Contents of writes are a pure function of their arguments, and no wrong sector goes unnoticed."""

from __future__ import annotations

import hashlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vblklab.errors import ConfigError
from vblklab.guest.verify import METHODS, SECTOR, Mismatch, Shadow, fill

SEED = 137
METHOD = pytest.mark.parametrize("method", METHODS)


def contents(length: int, offset: int, stamp: int, method: str | None, seed: int = SEED) -> bytearray:
    data = bytearray(length)
    fill(memoryview(data), offset, stamp, seed, method)
    return data


class Disk:
    """Bytes and their shadow."""

    def __init__(self, sectors: int = 64, method: str = "crc32") -> None:
        self.bytes = bytearray(sectors * SECTOR)
        self.shadow = Shadow(len(self.bytes))
        self.method = method

    def write(self, offset: int, length: int, stamp: int) -> None:
        fill(memoryview(self.bytes)[offset : offset + length], offset, stamp, SEED, self.method)
        self.shadow.write(offset, length, stamp)

    def check(self, offset: int = 0, length: int | None = None) -> list[Mismatch]:
        length = len(self.bytes) - offset if length is None else length
        view = memoryview(self.bytes)[offset : offset + length]
        return self.shadow.check(view, offset, self.shadow.expect(offset, length), self.method, SEED)


@METHOD
def test_a_sector_is_header_checksum_and_body(method: str) -> None:
    data = contents(3 * SECTOR, 5 * SECTOR, 0x01020304, method)
    sums = {"crc32": lambda body: struct.pack("<I", zlib.crc32(body))}
    for at in range(3):
        sector = data[at * SECTOR : (at + 1) * SECTOR]
        magic, stamp, number, seed, which = struct.unpack_from("<4sIQII", sector)
        assert (magic, stamp, number, seed, METHODS[which]) == (b"vblk", 0x01020304, 5 + at, SEED, method)
        body = bytes(sector[96:])
        digest = sums[method](body) if method in sums else hashlib.new(method, body).digest()
        assert bytes(sector[24:96]) == digest.ljust(72, b"\0")
        assert len(set(body)) > 100


@pytest.mark.parametrize("method", [None, *METHODS])
def test_contents_depend_on_every_argument_and_on_nothing_else(method: str | None) -> None:
    base = contents(4096, 8192, 7, method)
    assert contents(4096, 8192, 7, method) == base
    assert contents(8192, 8192, 7, method)[:4096] == base
    others = [contents(4096, 12288, 7, method), contents(4096, 8192, 8, method), contents(4096, 8192, 7, method, seed=SEED + 1)]
    assert base not in others
    assert contents(4096, 8192, 7, "md5" if method != "md5" else "sha1") != base


def test_contents_are_fixed_across_versions() -> None:
    assert [zlib.crc32(contents(4096, 4096, 9, method)) for method in (None, "md5")] == FIXED


FIXED = [2835101943, 1957283504]


@pytest.mark.parametrize("method", [None, "crc32"])
def test_any_length_can_be_filled(method: str | None) -> None:
    long = contents(3 << 20, 512, 3, method)
    for length in (0, 512, 1 << 20, (1 << 20) + 512, 2053 * 512, 2054 * 512):
        assert contents(length, 512, 3, method) == long[:length]


def test_without_method_any_length_and_offset_is_filled() -> None:
    assert len(set(contents(1001, 77, 1, None))) > 200


def test_neighbouring_stamps_write_different_noise() -> None:
    assert len({bytes(contents(512, 0, stamp, None)) for stamp in range(1, 2000)}) == 1999
    assert len({bytes(contents(512, 512 << at, 5, None)) for at in range(20)}) == 20


@pytest.mark.parametrize("stamp", [0, -1, 1 << 32])
def test_stamps_out_of_range_are_refused(stamp: int) -> None:
    with pytest.raises(ConfigError, match="stamp"):
        contents(512, 0, stamp, None)


@pytest.mark.parametrize(("length", "offset"), [(100, 0), (512, 100)])
def test_headers_need_whole_sectors(length: int, offset: int) -> None:
    with pytest.raises(ConfigError, match="whole sectors"):
        contents(length, offset, 1, "md5")


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match="verify=crc7"):
        contents(512, 0, 1, "crc7")


@METHOD
def test_what_was_written_checks(method: str) -> None:
    disk = Disk(method=method)
    disk.write(4096, 8192, 1)
    disk.write(6144, 512, 2)
    disk.write(0, 512, 3)
    assert disk.check() == []
    assert disk.check(4096, 2048) == []
    assert disk.check(6144, 512) == []


def test_sectors_that_nobody_wrote_are_not_checked() -> None:
    disk = Disk()
    disk.bytes[:] = b"\xaa" * len(disk.bytes)
    assert disk.check() == []
    disk.write(1024, 512, 1)
    assert disk.check() == []
    disk.shadow.write(1024, 512, 0)
    disk.bytes[1024] ^= 1
    assert disk.check() == []


def test_nothing_is_checked_without_a_method() -> None:
    shadow = Shadow(4096)
    shadow.write(0, 4096, 1)
    assert shadow.check(memoryview(bytearray(4096)), 0, shadow.expect(0, 4096), None, SEED) == []


@METHOD
@pytest.mark.parametrize("at", [0, 3, 4, 7, 8, 15, 16, 19, 20, 23, 24, 90, 95, 96, 300, 511])
def test_one_flipped_bit_anywhere_is_found(method: str, at: int) -> None:
    disk = Disk(method=method)
    disk.write(0, 4096, 5)
    for neighbours in (False, True):
        if neighbours:
            disk.write(4096, 512, 6)
        disk.bytes[2048 + at] ^= 0x10
        (found,) = disk.check()
        assert found.offset == 2048
        assert found.what.startswith("checksum" if at >= 24 else ("stale", "newer") if 4 <= at < 8 else "header"), found
        disk.bytes[2048 + at] ^= 0x10


def test_stale_data_names_both_writes() -> None:
    disk = Disk()
    disk.write(0, 4096, 17)
    disk.shadow.write(1024, 1024, 23)
    assert disk.check() == [(1024, "stale data: holds write 17, expected 23"), (1536, "stale data: holds write 17, expected 23")]
    disk.shadow.write(0, 4096, 9)
    assert disk.check(0, 512) == [(0, "newer data: holds write 17, expected 9")]


def test_what_went_wrong_is_named() -> None:
    disk = Disk()
    disk.write(0, 4096, 5)
    fill(memoryview(disk.bytes)[0:512], 8192, 5, SEED, "crc32")
    fill(memoryview(disk.bytes)[512:1024], 512, 5, SEED + 1, "crc32")
    fill(memoryview(disk.bytes)[1024:1536], 1024, 5, SEED, "sha256")
    disk.bytes[1536:2048] = bytes(512)
    disk.bytes[2048:2560] = b"x" * 512
    disk.bytes[2560 + 20] = 99
    assert [found.what for found in disk.check()] == [
        "header: holds sector 16, expected sector 0",
        "header: from a run with another seed, expected write 5",
        "header: holds sha256, expected crc32",
        "zeros, expected write 5",
        "header: no magic, expected write 5",
        "header: holds an unknown method, expected crc32",
    ]


def test_another_body_with_its_own_checksum_is_found() -> None:
    disk = Disk()
    disk.write(0, 512, 5)
    disk.bytes[96:] = bytes(len(disk.bytes) - 96)
    disk.bytes[24:28] = struct.pack("<I", zlib.crc32(bytes(416)))
    assert disk.check(0, 512) == [(0, "body: another body with its own crc32, expected write 5")]


def test_a_lost_large_write_is_found_in_every_sector() -> None:
    disk = Disk(sectors=512)
    disk.write(0, 512 * SECTOR, 1)
    disk.shadow.write(0, 512 * SECTOR, 2)
    assert [found.offset for found in disk.check()] == list(range(0, 512 * SECTOR, SECTOR))


def test_expect_is_a_copy() -> None:
    shadow = Shadow(8192)
    shadow.write(512, 1024, 3)
    before = shadow.expect(0, 4096)
    assert before.dtype == np.uint32
    shadow.write(0, 4096, 4)
    assert before.tolist() == [0, 3, 3, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("offset", "length"), [(-512, 512), (0, 8704), (8192, 512), (100, 512), (0, 100)])
def test_ranges_off_the_disk_or_off_sectors_are_refused(offset: int, length: int) -> None:
    shadow = Shadow(8192)
    with pytest.raises(ConfigError):
        shadow.write(offset, length, 1)
    with pytest.raises(ConfigError):
        shadow.expect(offset, length)


def test_a_view_of_another_length_is_refused() -> None:
    shadow = Shadow(8192)
    with pytest.raises(ConfigError):
        shadow.check(memoryview(bytearray(512)), 0, shadow.expect(0, 1024), "md5", SEED)


_WRITES = st.lists(st.tuples(st.integers(0, 63), st.integers(1, 32), st.booleans()), min_size=1, max_size=30)


@given(_WRITES, st.sampled_from(METHODS))
def test_lost_writes_are_found_and_no_others(writes: list[tuple[int, int, bool]], method: str) -> None:
    disk = Disk(method=method)
    holds = [0] * 64
    for stamp, (first, most, lost) in enumerate(writes, 1):
        count = min(most, 64 - first)
        if lost:
            disk.shadow.write(first * SECTOR, count * SECTOR, stamp)
        else:
            disk.write(first * SECTOR, count * SECTOR, stamp)
            holds[first : first + count] = [stamp] * count
    expected = disk.shadow.expect(0, 64 * SECTOR).tolist()
    assert [found.offset // SECTOR for found in disk.check()] == [at for at in range(64) if expected[at] != holds[at]]
