"""The bare guest's bytes are what an assembler makes of its listing, and its list is the job's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vblklab as vb
from vblklab.guest.job import job
from vblklab.guest.workload import Workload
from vblklab.kvm import bare_payload, payload
from vblklab.kvm.bare import Requests
from vblklab.kvm.bare_payload import REQUEST, SLOT, Ctl

from .listing import listing, no_assembler


@pytest.mark.skipif(no_assembler(), reason="no as and ld here; on Debian: apt install binutils")
def test_the_listing_reassembles_to_the_same_bytes(tmp_path: Path) -> None:
    assert listing(bare_payload, tmp_path) == bare_payload.LISTING


def test_nothing_of_the_two_payloads_overlaps() -> None:
    assert len(bare_payload.CODE) < bare_payload.TABLE_AT
    assert payload.WORDS_GPA + 4096 <= bare_payload.BASE
    assert bare_payload.BASE + bare_payload.IMAGE_BYTES <= payload.REGISTERS_GPA
    assert 4 * (max(Ctl) + 1) <= bare_payload.IMAGE_BYTES - bare_payload.CONTROL_AT
    assert (REQUEST.itemsize % 8, SLOT.itemsize, SLOT.fields["header"][1] % 16) == (0, 64, 0)


def listed(disk_bytes: int = 1 << 20, **options: Any) -> Requests:
    return Requests(job(**options), disk_bytes)


@pytest.mark.parametrize("rw", ["read", "randread", "write", "randwrite", "randrw"])
def test_the_list_is_the_workload_in_order(rw: str) -> None:
    options = dict(rw=rw, bssplit="512/50:4k/50", number_ios=500, size="512k", offset="64k", randseed=5)
    requests = listed(**options)
    wanted = list(Workload(job(**options), 0, 1 << 20))
    assert [tuple(op) for op in requests.ops.tolist()] == wanted
    table = requests.table
    assert (table["sector"] * 512 == [offset for _, offset, _ in wanted]).all()
    assert (table["type"] == [op for op, _, _ in wanted]).all()
    assert (table["bytes"] == [length for _, _, length in wanted]).all()
    assert not table["wait"].any() and not table["stamp"].any() and requests.main == 500


def test_a_flush_follows_every_so_many_writes() -> None:
    requests = listed(rw="write", bs=512, number_ios=7, size="64k", fsync=3)
    assert requests.table["type"].tolist() == [1, 1, 1, 4, 1, 1, 1, 4, 1]
    assert requests.table["bytes"].tolist() == [512, 512, 512, 0, 512, 512, 512, 0, 512]


def test_verify_waits_for_what_overlaps_and_reads_back_what_was_written() -> None:
    requests = listed(rw="randrw", bssplit="512/50:4k/50", number_ios=400, size="64k", verify="crc32", randseed=9)
    table, ops, main = requests.table, requests.ops, requests.main
    first = table["sector"][:main].astype(int)
    last = first + table["bytes"][:main].astype(int) // 512
    writes = ops[:main, 0] == 1
    for number in range(main):
        overlaps = (first[:number] < last[number]) & (last[:number] > first[number]) & (writes[:number] | writes[number])
        assert table["wait"][number] == (np.flatnonzero(overlaps)[-1] + 1 if overlaps.any() else 0)
    assert (table["wait"][main:] == main).all() and not ops[main:, 0].any()
    assert {tuple(op) for op in ops[main:, 1:].tolist()} == {tuple(op) for op in ops[:main][writes, 1:].tolist()}
    assert table["stamp"][:main][writes].tolist() == list(range(1, writes.sum() + 1))


def test_a_list_without_an_end_is_refused() -> None:
    with pytest.raises(vb.ConfigError, match=r"536,870,912 I/Os with BareGuest, whose list holds 4,000,000: give number_ios="):
        listed(disk_bytes=1 << 38, rw="read", bs=512)
