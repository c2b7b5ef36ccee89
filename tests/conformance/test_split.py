"""Clauses of the split virtqueue (VIRTIO 1.4 §2.7) that the tests of the rings do not show on their own."""

from __future__ import annotations

import errno

import pytest

import vblklab as vb
from tests.guest.test_virtio_blk_driver import READ, WRITE, Board, Quiet
from tests.support import INDIRECT, NEXT, pair

DATA = 0x300000


def tables_and_chains(board: Board) -> list[list[tuple[int, int, int]]]:
    """Every chain that the driver has offered, indirect tables followed."""
    ring = board.ring()
    return [board.chain(ring.get("H", ring.avail_at + 4 + 2 * slot)) for slot in range(ring.avail_idx)]


@pytest.mark.clause("SPLIT-DRV-008")
def test_no_descriptor_is_indirect_unless_it_was_negotiated() -> None:
    for indirect in (True, False):
        board = Board(Quiet(indirect=indirect)).probe()
        board.submit(READ, segments=[(DATA, 512), (DATA + 4096, 512)])
        ring = board.ring()
        flags = [ring.read_desc(slot)[2] for slot in range(ring.size)]
        assert any(each & INDIRECT for each in flags) is indirect


@pytest.mark.clause("SPLIT-DRV-010")
@pytest.mark.parametrize("indirect", [True, False], ids=["indirect", "direct"])
@pytest.mark.parametrize(("size", "most", "segments"), [(8, 1024, 12), (16, 4, 6), (4, 1024, 5)])
def test_no_chain_is_longer_than_the_queue_in_a_table_or_not(indirect: bool, size: int, most: int, segments: int) -> None:
    """``size`` is the driver's wish, ``most`` the device's limit."""
    board = Board(Quiet(indirect=indirect, seg_max=126, queue_size_max=most), size=size).probe()
    board.submit(READ, segments=[(DATA + 8192 * i, 512) for i in range(segments)])
    chains = tables_and_chains(board)
    assert max(map(len, chains)) == min(size, most) == board.ring().size


@pytest.mark.clause("SPLIT-DRV-006")
def test_a_chain_is_far_below_4_gib_and_every_descriptor_is_new() -> None:
    board = Board(Quiet(seg_max=126), size=128).probe()
    board.submit(WRITE, sector=0, segments=[(DATA, 1 << 20)] * 64)
    chains = tables_and_chains(board)
    assert len(chains) > 1
    assert max(sum(length for _, length, _ in chain) for chain in chains) < 1 << 22
    driver, _, ring = pair(size=8)
    at = driver.add_sgs([(DATA, 4)] * 4, [(DATA, 4)] * 4, "token")
    seen = [at]
    while (link := ring.read_desc(at))[2] & NEXT and len(seen) < 9:
        at = link[3]
        seen.append(at)
    assert sorted(seen) == list(range(8)), "no loop"


@pytest.mark.clause("SPLIT-DRV-019", "SPLIT-DRV-020")
@pytest.mark.parametrize(("used", "error"), [(4097, 0), (4096, 0), (4095, errno.EIO), (1, errno.EIO), (0, errno.EIO)])
def test_data_behind_the_used_length_is_not_taken_for_read(used: int, error: int) -> None:
    board = Board().probe()
    board.submit(READ)
    board.use(board.ring().get("H", board.ring().avail_at + 4), used)
    assert board.ended == [(1, error)]


@pytest.mark.clause("SPLIT-DRV-019")
def test_a_status_byte_that_nobody_wrote_is_no_success() -> None:
    board = Board().probe()
    board.submit(WRITE)
    head = board.ring().get("H", board.ring().avail_at + 4)
    status = board.memory.read(board.chain(head)[-1][0], 1)[0]
    board.use(head, 0, status)
    assert board.ended == [(1, errno.EIO)]


def test_a_queue_that_holds_no_request_is_refused() -> None:
    with pytest.raises(vb.ConfigError, match="a request needs 3 descriptors"):
        Board(Quiet(), size=2).probe()
