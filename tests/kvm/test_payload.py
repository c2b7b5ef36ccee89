"""The payload's bytes are what an assembler makes of its listing."""

from __future__ import annotations

from pathlib import Path

import pytest

from vblklab.kvm import payload
from vblklab.kvm.payload import Op

from .listing import listing, no_assembler


@pytest.mark.skipif(no_assembler(), reason="no as and ld here; on Debian: apt install binutils")
def test_the_listing_reassembles_to_the_same_bytes(tmp_path: Path) -> None:
    assert listing(payload, tmp_path) == payload.LISTING


def test_the_code_fits_its_page() -> None:
    assert len(payload.CODE) < payload.TABLES_AT


def test_the_table_of_ops_is_in_the_order_of_their_numbers() -> None:
    table = payload.offset_of("ops")
    for op in Op:
        entry = int.from_bytes(payload.CODE[table + 4 * op : table + 4 * op + 4], "little")
        assert entry == payload.BASE + payload.offset_of(op.name.lower())
