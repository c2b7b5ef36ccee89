"""The payload's bytes are what an assembler makes of its listing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from vblklab.kvm import payload
from vblklab.kvm.payload import Op


@pytest.mark.skipif(shutil.which("as") is None or shutil.which("ld") is None, reason="no as and ld here; on Debian: apt install binutils")
def test_the_listing_reassembles_to_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "payload.s").write_text(f".global start\n{payload.source()}\n")
    subprocess.run(["as", "--32", "-msyntax=intel", "-mnaked-reg", "-o", "payload.o", "payload.s"], cwd=tmp_path, check=True)
    link = ["ld", "-m", "elf_i386", "-Ttext", hex(payload.BASE), "-e", "start", "--oformat", "binary", "-o", "payload.bin", "payload.o"]
    subprocess.run(link, cwd=tmp_path, check=True)
    assert (tmp_path / "payload.bin").read_bytes() == payload.CODE


def test_every_line_of_the_listing_stands_at_its_offset() -> None:
    at = 0
    for line in payload.LISTING.splitlines():
        assert int(line[:3], 16) == at
        at += len(bytes.fromhex(line.split()[1]))
    assert at == len(payload.CODE) < payload.TABLES_AT


def test_the_table_of_ops_is_in_the_order_of_their_numbers() -> None:
    table = payload.offset_of("ops")
    for op in Op:
        entry = int.from_bytes(payload.CODE[table + 4 * op : table + 4 * op + 4], "little")
        assert entry == payload.BASE + payload.offset_of(op.name.lower())
