"""A write cache that a power cut empties: what was flushed is there afterwards, nothing else need be."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vblklab as vb
from tests.machine.raw_front_end import RawFrontEnd
from tests.support import FLUSH, OUT, WRITE
from vblklab.machine.live import live_missing

SECTORS = 32
pieces = st.tuples(st.integers(0, SECTORS - 1), st.integers(1, 9)).map(lambda p: (p[0], min(p[1], SECTORS - p[0])))
actions = st.lists(st.tuples(st.sampled_from(["write", "write", "write", "zero", "read", "flush"]), pieces, st.integers(1, 255)))


@given(actions)
def test_it_reads_what_was_written_and_below_lies_what_was_flushed(done: list[tuple[str, tuple[int, int], int]]) -> None:
    below = vb.Ram(SECTORS * 512).open()
    store = vb.VolatileCache(type("Given", (), {"open": lambda self: below, "drive": None})()).open()
    now, stable = bytearray(SECTORS * 512), bytes(SECTORS * 512)
    for what, (sector, count), value in done:
        offset, length = sector * 512, count * 512
        if what == "write":
            now[offset : offset + length] = bytes([value]) * length
            store.writev(offset, [memoryview(now)[offset : offset + 100], memoryview(now)[offset + 100 : offset + length]])
        elif what == "zero":
            now[offset : offset + length] = bytes(length)
            store.write_zeroes(offset, length, True)
        elif what == "read":
            got = bytearray(length)
            store.readv(offset, [memoryview(got)[: value + 1], memoryview(got)[value + 1 :]])
            assert got == now[offset : offset + length]
        else:
            store.flush()
            stable = bytes(now)
        kept = bytearray(SECTORS * 512)
        below.readv(0, [memoryview(kept)])
        assert kept == stable
    store.close()
    assert below.bytes == now


class NoFlush(vb.VirtioBlkDevice):
    def submit(self, request):  # type: ignore[no-untyped-def]
        if request.type == FLUSH:
            yield from self.end(request, 0)
        else:
            yield from super().submit(request)


@pytest.mark.skipif(bool(live_missing()), reason="serving needs Linux")
@pytest.mark.parametrize(("device", "kept"), [(vb.VirtioBlkDevice, True), (NoFlush, False)], ids=["flush", "no flush"])
def test_a_killed_process_is_a_power_cut(device: type[vb.VirtioBlkDevice], kept: bool, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SECTORS * 512))
    with vb.serve(device, vb.VolatileCache(vb.ImageFile(image))) as served, RawFrontEnd(served, features=1 << 32 | 1 << 9) as front:
        front.connect()
        for number, kind in enumerate((OUT, FLUSH, OUT)):
            front.memory.write(0x8000, bytes([kind]) + bytes(7) + number.to_bytes(8, "little"))
            front.memory.write(0x9000, b"x" * 512)
            data = [(0x9000, 512, 0)] if kind == OUT else []
            front.ring.chain([(0x8000, 16, 0), *data, (0xA000, 1, WRITE)])
            front.ring.offer(0)
            front.kick()
            front.wait()
            while front.ring.get("H", front.ring.used_at + 2) != number + 1:
                served.counters()
            assert front.memory.read(0xA000, 1) == b"\0"
        served.kill()
    after = image.read_bytes()
    assert (after[:512] == b"x" * 512) == kept, "what was flushed"
    assert not any(after[2 * 512 :]), "what was not"
