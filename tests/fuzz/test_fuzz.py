"""Mutated rings, used elements and register sequences: some in the suite, a million with ``--long``."""

from __future__ import annotations

import random
import subprocess
import sys
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.fuzz.targets import DISK, MEMORY, TARGETS, Bench, Hang, Tape, allowed_cpu
from vblklab.engine.compiled import compiled_missing, loops
from vblklab.ring import SplitDevice

MOST = MEMORY + DISK + (1 << 17)
"""Bytes that one input may make the package allocate: its requests may name all of memory, and the disk is small."""
LONG = {"ring": 300_000, "batch": 150_000, "used": 250_000, "registers": 250_000, "compiled": 50_000}
SLICE = 25_000


def inputs(seed: int, count: int) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(rng.randrange(4, 120)) for _ in range(count)]


def play(name: str, data: bytes) -> None:
    try:
        with allowed_cpu():
            TARGETS[name](data)
    except BaseException as error:
        error.add_note(f"TARGETS[{name!r}](bytes.fromhex({data.hex()!r}))")
        raise


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "compiled"])
def test_what_a_peer_gone_mad_leaves_is_refused_or_served_and_sizes_no_allocation(name: str) -> None:
    play(name, b"")
    tracemalloc.start()
    try:
        for data in inputs(0, 100):
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            play(name, data)
            assert tracemalloc.get_traced_memory()[1] - before < MOST, data.hex()
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def compiled() -> None:
    """The loop is compiled before the time of an input counts."""
    if not compiled_missing():
        loops()


@pytest.mark.numba
@pytest.mark.usefixtures("compiled")
def test_the_compiled_loop_stays_inside_guest_memory() -> None:
    for data in inputs(1, 100):
        play("compiled", data)


@pytest.mark.long
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("name", "part"), [(name, part) for name in TARGETS for part in range(LONG[name] // SLICE)])
def test_a_million_of_them(name: str, part: int) -> None:
    for data in inputs(f"{name} {part}", SLICE):  # type: ignore[arg-type]
        play(name, data)


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_coverage_guided(name: str, tmp_path: Path) -> None:
    if find_spec("atheris") is None:
        pytest.skip("atheris is not installed: pip install atheris into .venv, where it has a wheel")
    options = ["-runs=20000", "-max_len=160", "-len_control=0", "-seed=1", str(tmp_path)]
    command = [sys.executable, "-m", "tests.fuzz.guided", name, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]


# -- the fuzzer itself sees what it is there to see -----------------------------------------------------------------------------


def test_an_endless_loop_is_a_hang() -> None:
    with pytest.raises(Hang), allowed_cpu(0.01):
        while True:
            pass


def test_random_bytes_reach_requests_that_end_well_and_errors_of_many_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    said: set[str] = set()
    ended: list[int] = []
    fill = SplitDevice.fill

    def count(self: SplitDevice, chain: object, written: int) -> None:
        ended.append(written)
        fill(self, chain, written)  # type: ignore[arg-type]

    monkeypatch.setattr(SplitDevice, "fill", count)
    for data in inputs(2, 300):
        bench = Bench(tape := Tape(data))
        bench.play(tape)
        if bench.device.broken is not None:
            said.add(bench.device.broken.section)
    assert len(ended) > 50 and max(ended) > 512
    assert len(said) >= 6, said
