"""A payload's listing, made again from its source: `python -m tests.kvm.listing bare_payload` prints it.

Change the source's column of LISTING (a new line needs any offset and byte before it), then put what this prints in its place.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

__all__ = ["listing", "no_assembler"]


def no_assembler() -> bool:
    """Whether this machine has no ``as`` and ``ld``."""
    return shutil.which("as") is None or shutil.which("ld") is None


def listing(payload: ModuleType, folder: Path) -> str:
    """Offset, bytes and source of every line, by binutils; raises CalledProcessError for what they refuse."""
    source = payload.source()
    lines = [line[payload.SOURCE_COLUMN :] for line in payload.LISTING.splitlines()]
    names = source.removesuffix("\n".join(lines))
    marked = [text for number, line in enumerate(lines) for text in (f"line_{number}:", line)]
    (folder / "p.s").write_text("\n".join([names, ".global start", *marked, f"line_{len(lines)}:", ""]))
    link = ["ld", "-m", "elf_i386", "-Ttext", hex(payload.BASE), "-e", "start", "--oformat", "binary", "-o", "p.bin", "p.o"]
    for command in (["as", "--32", "-msyntax=intel", "-mnaked-reg", "-o", "p.o", "p.s"], link):
        subprocess.run(command, cwd=folder, check=True)
    symbols = subprocess.run(["nm", "p.o"], cwd=folder, check=True, capture_output=True, text=True).stdout.split()
    at = {name: int(value, 16) for value, _, name in zip(*[iter(symbols)] * 3, strict=True)}
    code = (folder / "p.bin").read_bytes()
    ends = [at[f"line_{number}"] for number in range(len(lines) + 1)]
    rows = zip(ends, ends[1:], lines, strict=False)
    return "".join(f"{start:03x}  {code[start:end].hex():<{payload.SOURCE_COLUMN - 6}} {line}\n" for start, end, line in rows)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(listing(importlib.import_module(f"vblklab.kvm.{sys.argv[1]}"), Path(name)), end="")
