"""The in-flight region, cut off after any store: the next process finds exactly what was taken and not returned."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vblklab as vb
from vblklab.vhost.inflight import InflightQueue, region_bytes

SIZE = 8


def queue(buffer: bytearray, number: int = 0) -> InflightQueue:
    return InflightQueue(memoryview(buffer), number, SIZE)


def test_a_new_region_has_nothing_in_flight() -> None:
    buffer = bytearray(region_bytes(2, SIZE))
    assert queue(buffer).recover(0) == [] and queue(buffer, 1).recover(0) == []


@given(st.lists(st.integers(0, SIZE - 1), unique=True), st.data())
def test_what_is_taken_and_not_returned_is_found_in_its_order(heads: list[int], data: st.DataObject) -> None:
    buffer = bytearray(region_bytes(1, SIZE))
    one, used = queue(buffer), 0
    one.recover(0)
    left = []
    for head in heads:
        one.popped(head)
        left.append(head)
    batch = data.draw(st.lists(st.sampled_from(heads), unique=True)) if heads else []
    for head in batch:
        one.filled(head)
        left.remove(head)
    published = data.draw(st.booleans())
    if published:
        used += len(batch)  # used.idx is stored, and the process dies before it is crossed off
    else:
        left = list(heads)
    assert queue(buffer).recover(used) == left
    assert queue(buffer).recover(used) == left, "a second look finds the same"


def test_what_is_taken_up_again_stays_in_order_behind_what_was_there() -> None:
    buffer = bytearray(region_bytes(1, SIZE))
    one = queue(buffer)
    one.recover(0)
    for head in (5, 2, 7):
        one.popped(head)
    two = queue(buffer)
    assert two.recover(0) == [5, 2, 7]
    two.popped(1)
    assert queue(buffer).recover(0) == [5, 2, 7, 1]


def test_a_region_that_lies_is_refused() -> None:
    buffer = bytearray(region_bytes(1, SIZE))
    queue(buffer).popped(0)
    with pytest.raises(vb.VhostUserError, match="stands at used index"):
        queue(buffer).recover(SIZE + 1)
    memoryview(buffer).cast("H")[6] = 999
    with pytest.raises(vb.VhostUserError, match="names descriptor 999"):
        queue(buffer).recover(1)
    with pytest.raises(vb.VhostUserError, match="has no room"):
        InflightQueue(memoryview(buffer), 1, SIZE)
    with pytest.raises(vb.VhostUserError, match="not 1 and 16"):
        InflightQueue(memoryview(buffer + bytearray(512)), 0, 2 * SIZE)
