"""Guest memory: every access is inside it or a BadAddress, and nothing is touched that was not asked for."""

from __future__ import annotations

import mmap
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vblklab as vb
from vblklab.memory import GuestMemory, GuestPages
from vblklab.ring import SplitDriver

BASE, SIZE = 0x4000_0000, 4096


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory(bytearray(range(256)) * 16, BASE)


@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        (BASE - 1, 1),
        (BASE - 1, 2),
        (BASE + SIZE, 1),
        (BASE + SIZE - 1, 2),
        (BASE, SIZE + 1),
        (0, 1),
        (0, SIZE),
        (BASE + 16, -1),
        (BASE + 16, -16),
        (-1, 1),
        (-SIZE, SIZE),
        (2**64 - 16, 32),
        (2**64 - SIZE, SIZE),
        (2**64 + BASE, 1),
        (BASE, 2**64),
        (BASE, 2**32),
    ],
)
def test_a_range_outside_memory_is_a_bad_address(memory: GuestMemory, gpa: int, length: int) -> None:
    before = bytes(memory.bytes)
    for access in (memory.view, memory.read):
        with pytest.raises(vb.BadAddress) as error:
            access(gpa, length)
        assert (error.value.gpa, error.value.length) == (gpa, length)
    assert bytes(memory.bytes) == before


@pytest.mark.parametrize(("gpa", "length"), [(BASE, SIZE), (BASE, 0), (BASE + SIZE, 0), (BASE + SIZE - 1, 1), (BASE + 100, 8)])
def test_a_range_inside_memory_is_those_bytes(memory: GuestMemory, gpa: int, length: int) -> None:
    at = gpa - BASE
    assert memory.read(gpa, length) == bytes(memory.bytes)[at : at + length]
    assert len(memory.view(gpa, length)) == length


def test_a_bad_address_is_the_drivers_fault_and_says_where() -> None:
    assert issubclass(vb.BadAddress, vb.VirtioError)
    with pytest.raises(vb.VirtioError, match=r"0x7+\+0x10 is outside memory"):
        GuestMemory(bytearray(16)).view(0x7777, 16)


def test_a_view_is_the_memory_and_a_read_is_a_copy(memory: GuestMemory) -> None:
    view, copy = memory.view(BASE + 8, 4), memory.read(BASE + 8, 4)
    memory.write(BASE + 8, b"\xaa\xbb\xcc\xdd")
    assert bytes(view) == b"\xaa\xbb\xcc\xdd"
    assert copy == bytes([8, 9, 10, 11])
    view[0] = 0
    assert memory.read(BASE + 8, 1) == b"\0"


@given(at=st.integers(-8, SIZE + 8), data=st.binary(max_size=40))
def test_a_write_changes_its_own_bytes_or_none(at: int, data: bytes) -> None:
    memory = GuestMemory(bytearray(b"\x5a" * SIZE), BASE)
    expected = bytearray(b"\x5a" * SIZE)
    if at < 0 or at + len(data) > SIZE:
        with pytest.raises(vb.BadAddress):
            memory.write(BASE + at, data)
    else:
        memory.write(BASE + at, data)
        expected[at : at + len(data)] = data
    assert memory.bytes == expected


@pytest.mark.parametrize(
    "kind", [bytearray, lambda n: memoryview(bytearray(n)), lambda n: mmap.mmap(-1, n)], ids=["bytearray", "view", "mmap"]
)
def test_any_writable_buffer_will_do(kind: object) -> None:
    buffer = kind(4096)  # type: ignore[operator]
    memory = GuestMemory(buffer)
    memory.write(10, b"abc")
    assert bytes(buffer[10:13]) == b"abc"


def test_words_of_a_wider_view_are_counted_in_bytes() -> None:
    memory = GuestMemory(memoryview(bytearray(64)).cast("Q"))
    assert memory.size == 64
    memory.write(63, b"x")


def test_a_read_only_buffer_is_refused() -> None:
    with pytest.raises(vb.ConfigError, match="read-only"):
        GuestMemory(memoryview(bytes(64)))


def test_a_big_endian_host_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(vb.ConfigError, match="big-endian"):
        GuestMemory(bytearray(64))


def test_the_fence_is_the_machines() -> None:
    called = []
    GuestMemory(bytearray(16), fence=lambda: called.append(1)).fence()
    assert called == [1]
    assert GuestMemory(bytearray(16)).fence() is None


# -- the allocator -----------------------------------------------------------------------------------------------------------


@given(
    start=st.integers(0, 300),
    wishes=st.lists(st.tuples(st.integers(0, 700), st.sampled_from([1, 2, 4, 16, 64, 512])), max_size=20),
)
def test_ranges_handed_out_are_aligned_disjoint_and_memory(start: int, wishes: list[tuple[int, int]]) -> None:
    pages = GuestPages(GuestMemory(bytearray(SIZE), BASE), BASE + start)
    last = BASE + start
    for length, align in wishes:
        try:
            gpa = pages.alloc(length, align)
        except vb.ConfigError:
            assert last + align - 1 + length > BASE + SIZE, "there was room"
            continue
        assert gpa % align == 0
        assert gpa >= last
        pages.memory.view(gpa, length)
        last = gpa + length


def test_the_allocator_begins_with_memory() -> None:
    assert GuestPages(GuestMemory(bytearray(SIZE), BASE)).alloc(16, 16) == BASE


def test_memory_that_is_used_up_names_the_remedy() -> None:
    pages = GuestPages(GuestMemory(bytearray(SIZE)))
    assert pages.alloc(SIZE, 1) == 0
    with pytest.raises(vb.ConfigError, match=r"used up.*memory_bytes="):
        pages.alloc(1, 1)


@pytest.mark.parametrize("indirect", [0, 4])
def test_memory_may_begin_anywhere(indirect: int) -> None:
    ring = SplitDriver.alloc(GuestPages(GuestMemory(bytearray(1 << 16), BASE)), 8, indirect_segments=indirect)
    assert ring.add_sgs([(BASE, 16)], [(BASE + 16, 1)], "token") == 0
