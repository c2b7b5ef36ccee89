"""What writes carry, and whether reads find it: seeded contents, and a shadow of who wrote which sector last.

With a verify method every 512-byte sector of a write is

    0 magic "vblk"   4 stamp   8 sector number   16 seed   20 method   24 checksum of the body (4 to 64 bytes)   96 body (416 bytes)

little-endian, the rest zero.  fio's verify headers are per block and laid out otherwise: the names of methods are fio's, the bytes are not.
Stamps number the writes of a run in issue order from 1.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError

__all__ = ["METHODS", "POOL_SECTORS", "SECTOR", "SPREAD", "Mismatch", "Shadow", "fill", "pool_of"]

SECTOR = 512
POOL_SECTORS = 2053
"""Sectors in a pool: 1 MiB and a bit.  A prime: data that went astray by a power of two differs."""
_POOL = POOL_SECTORS * SECTOR
_MAGIC = int.from_bytes(b"vblk", "little")
_DIGEST_AT, _BODY_AT = 24, 96
_STAMP_LIMIT = 1 << 32
_SEED_MASK = 0xFFFFFFFF
SPREAD = 2654435761
"""Knuth's multiplicative hash: neighbouring stamps start far apart in the pool."""

_SUMS: dict[str, Callable[[bytes], bytes]] = {
    "crc32": lambda body: zlib.crc32(body).to_bytes(4, "little"),
    "md5": lambda body: hashlib.md5(body, usedforsecurity=False).digest(),
    "sha1": lambda body: hashlib.sha1(body, usedforsecurity=False).digest(),
    "sha256": lambda body: hashlib.sha256(body).digest(),
    "sha512": lambda body: hashlib.sha512(body).digest(),
}
METHODS = tuple(_SUMS)
"""The verify methods, by fio's names."""


def fill(view: memoryview, offset: int, stamp: int, seed: int, method: str | None) -> None:
    """Fill ``view`` with the contents of write number ``stamp`` at byte ``offset``; a pure function of all its arguments.

    Without ``method`` any length is one copy of noise; with one, ``offset`` and the length are whole sectors, each with its header.
    Raises ConfigError for what is not.

    >>> data = bytearray(512)
    >>> fill(memoryview(data), 4096, 1, 137, "crc32")
    >>> data[:4], int.from_bytes(data[8:16], "little")
    (bytearray(b'vblk'), 8)
    """
    if not 0 < stamp < _STAMP_LIMIT:
        raise ConfigError(f"stamp {stamp}", "number writes from 1 to 2**32 - 1")
    length = len(view)
    if method is None:
        pool = _noise(seed)
        at = (stamp * SPREAD ^ offset >> 9) % (_POOL >> 3) << 3
    else:
        if offset % SECTOR or length % SECTOR:
            raise ConfigError(f"{length} bytes at offset {offset}", "verify works on whole sectors of 512 bytes")
        pool = pool_of(seed, method)
        at = _slot(offset // SECTOR, stamp) * SECTOR
    if length <= _POOL:
        view[:] = pool[at : at + length]
    else:
        for done in range(0, length, _POOL):
            part = min(_POOL, length - done)
            view[done : done + part] = pool[at : at + part]
    if method is not None and length:
        words = np.frombuffer(view, np.uint32).reshape(-1, SECTOR // 4)
        words[:, 1] = stamp
        first = offset // SECTOR
        numbers = np.frombuffer(view, np.uint64).reshape(-1, SECTOR // 8)
        numbers[:, 1] = np.arange(first, first + len(numbers), dtype=np.uint64)


def _slot(sector: Any, stamp: Any) -> Any:
    """The place of a sector's contents in the pool: neighbours of one write are neighbours there.  Ints or uint64 arrays."""
    return (sector + (stamp * SPREAD & 0xFFFFFFFF)) % POOL_SECTORS


@lru_cache(maxsize=8)
def _noise(seed: int) -> memoryview:
    """Two laps of a pool of random bytes, so that a slice of one lap may start anywhere in the first."""
    words = np.random.PCG64(seed).random_raw(_POOL >> 3)
    return memoryview(words.tobytes() * 2).toreadonly()


@lru_cache(maxsize=8)
def pool_of(seed: int, method: str) -> memoryview:
    """Two laps of the pool as sectors with header and checksum; stamp and sector number are zero."""
    if method not in _SUMS:
        raise ConfigError(f"verify={method}", f"use one of {', '.join(METHODS)}")
    sectors = np.frombuffer(bytearray(_noise(seed)[:_POOL]), np.uint8).reshape(POOL_SECTORS, SECTOR)
    sectors[:, :_BODY_AT] = 0
    words = sectors.view(np.uint32)
    words[:, 0] = _MAGIC
    words[:, 4] = seed & _SEED_MASK
    words[:, 5] = METHODS.index(method)
    checksum = _SUMS[method]
    for sector in sectors:
        digest = checksum(sector[_BODY_AT:].tobytes())
        sector[_DIGEST_AT : _DIGEST_AT + len(digest)] = np.frombuffer(digest, np.uint8)
    return memoryview(sectors.tobytes() * 2).toreadonly()


class Mismatch(NamedTuple):
    """A sector that does not hold what it should: its byte offset, and what is wrong."""

    offset: int
    what: str


class Shadow:
    """Which write each sector of a disk holds: one uint32 stamp per sector, 0 where this run did not write (not checked).

    Whoever writes without a header, trims or fails to write records stamp 0.  ``expect`` is asked when a read is issued, ``check`` when
    it is done; between the two nobody may write there.  Offsets and lengths are bytes, whole sectors; others raise ConfigError.
    """

    def __init__(self, disk_bytes: int) -> None:
        self._stamps = np.zeros(disk_bytes // SECTOR, dtype=np.uint32)
        self._bytes = len(self._stamps) * SECTOR

    def _range(self, offset: int, length: int) -> slice:
        if offset < 0 or length < 0 or offset + length > self._bytes or (offset | length) % SECTOR:
            raise ConfigError(f"{length} bytes at offset {offset}", f"give whole sectors of a disk of {self._bytes} bytes")
        return slice(offset // SECTOR, (offset + length) // SECTOR)

    def write(self, offset: int, length: int, stamp: int) -> None:
        """The range now belongs to write ``stamp``; 0 means nobody knows what it holds."""
        if not 0 <= stamp < _STAMP_LIMIT:
            raise ConfigError(f"stamp {stamp}", "number writes from 1 to 2**32 - 1")
        self._stamps[self._range(offset, length)] = stamp

    def expect(self, offset: int, length: int) -> Any:
        """The stamps of the range's sectors now: a uint32 array of (length / 512,), a copy."""
        return self._stamps[self._range(offset, length)].copy()

    def check(self, view: memoryview, offset: int, expected: Any, method: str | None, seed: int) -> list[Mismatch]:
        """Every sector of ``view``, read at byte ``offset``, that is not what write ``expected`` put there.  Nothing without ``method``."""
        if method is None or not len(expected):
            return []
        if len(view) != len(expected) * SECTOR or offset % SECTOR:
            raise ConfigError(f"{len(view)} bytes at offset {offset}", f"{len(expected)} whole sectors are expected")
        stamp = int(expected[0])
        if stamp and (len(expected) == 1 or not (expected != stamp).any()):
            want = bytearray(len(view))
            fill(memoryview(want), offset, stamp, seed, method)
            if want == view:
                return []
        return _compare(np.frombuffer(view, np.uint8).reshape(-1, SECTOR), offset, expected, method, seed)


def _compare(found: Any, offset: int, expected: Any, method: str, seed: int) -> list[Mismatch]:
    """Sector by sector where the stamps differ from each other or something is wrong."""
    live = np.flatnonzero(expected)
    numbers = live.astype(np.uint64) + np.uint64(offset // SECTOR)
    stamps = expected[live]
    pool = np.frombuffer(pool_of(seed, method), np.uint8).reshape(-1, SECTOR)
    want = pool[_slot(numbers, stamps.astype(np.uint64)).astype(np.int64)]
    want.view(np.uint32)[:, 1] = stamps
    want.view(np.uint64)[:, 1] = numbers
    wrong = np.flatnonzero((found[live] != want).any(axis=1))
    return [Mismatch(offset + int(live[at]) * SECTOR, _reason(found[live[at]].tobytes(), want[at].tobytes(), method)) for at in wrong]


def _reason(found: bytes, want: bytes, method: str) -> str:
    """What is wrong with one sector, in one phrase."""

    def number(data: bytes, at: int, size: int = 4) -> int:
        return int.from_bytes(data[at : at + size], "little")

    expected = number(want, 4)
    if not any(found):
        return f"zeros, expected write {expected}"
    if found[:4] != want[:4]:
        return f"header: no magic, expected write {expected}"
    if found[20:24] != want[20:24]:
        known = dict(enumerate(METHODS)).get(number(found, 20), "an unknown method")
        return f"header: holds {known}, expected {method}"
    if found[16:20] != want[16:20]:
        return f"header: from a run with another seed, expected write {expected}"
    digest = _SUMS[method](found[_BODY_AT:])
    if found[_DIGEST_AT:_BODY_AT] != digest.ljust(_BODY_AT - _DIGEST_AT, b"\0"):
        return f"checksum: {method} of the body differs from the header's, expected write {expected}"
    if found[8:16] != want[8:16]:
        return f"header: holds sector {number(found, 8, 8)}, expected sector {number(want, 8, 8)}"
    holds = number(found, 4)
    if holds < expected:
        return f"stale data: holds write {holds}, expected {expected}"
    if holds > expected:
        return f"newer data: holds write {holds}, expected {expected}"
    return f"body: another body with its own {method}, expected write {expected}"
