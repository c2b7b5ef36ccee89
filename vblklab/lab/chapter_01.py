"""The questions of chapter 01 about registers, handshake, configuration space, requests and reset; ``device_stages`` has the device's."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from itertools import combinations
from typing import Any

from ..spec.virtio_mmio import MAGIC, Reg
from ..trace.run import Run
from .answers import a_run, number, steps_in
from .bench import Bench, offset_of
from .careful import call, is_open
from .check import Verdict, Wrong, prediction, question, right, wrong

__all__ = ["TornRegisters"]

_FEATURES_OK = 8


@question("01", "Which four letters does MagicValue spell?")
def magic(letters: Any) -> Verdict:
    truth = MAGIC.to_bytes(4, "little").decode()
    if letters == truth or letters == truth.encode():
        return right("Little-endian: the lowest byte of the number is the first letter.")
    if isinstance(letters, str) and letters.lower() == truth[::-1]:
        return wrong("Those are the letters, from the wrong end: the lowest byte comes first.")
    return wrong("Take the number's four bytes, lowest first, and look each one up as a character: `chr(0x76)`.")


@prediction("01", "What will Status read after a feature was asked for that was never offered?", read=number)
def predict_status(guess: float, bench: Any) -> Verdict:
    if not isinstance(bench, Bench):
        raise Wrong("Give the bench on which you wrote the features.")
    truth = bench.read("Status")
    if truth & _FEATURES_OK:
        raise Wrong(
            f"On this bench Status reads {truth}: these features were accepted. Run the cells of the refusal again, in their order."
        )
    said = f"Status reads {truth}. You wrote {truth | _FEATURES_OK}, and the device left out the bit FEATURES_OK."
    why = "That is how it says no, so a driver that does not read Status again never hears it."
    return (right if guess == truth else wrong)(f"{said} {why}")


# -- configuration space -------------------------------------------------------------------------------------------------------


class _Enough(Exception):
    """The registers were read more often than any driver would."""


class TornRegisters:
    """A device whose capacity changes in the middle of being read.

    ``read(name_or_offset)`` reads 32 bits.  The capacity takes the values ``capacities`` one after the other: the next one right
    after each of the accesses that ``when`` numbers.
    """

    def __init__(self, capacities: list[int], when: set[int]) -> None:
        self.bench = Bench(sectors=8)
        self.values = list(capacities)
        self.seen = self.values[:1]
        self.when = when
        self.reads: list[int] = []
        self.bench.device.capacity_sectors = self.values.pop(0)

    def read(self, register: str | int, size: int = 4) -> int:
        """32 bits of a register, as a driver sees them."""
        value = self.bench.read(register, size)
        self.reads.append(offset_of(register))
        if len(self.reads) > 1000:
            raise _Enough
        if len(self.reads) in self.when and self.values:
            self.bench.resize(self.values.pop(0))
            self.seen.append(self.bench.device.capacity_sectors)
        return value


_SMALL, _LARGE = 0xFFFFFFFF, 0x1_0000_0000


@question("01", "How does a driver read 64 bits, 32 at a time, while they may change?")
def read_capacity(function: Any) -> Verdict:
    if not callable(function) or isinstance(function, type):
        return wrong("Give the function itself, without calling it: `read_capacity`.")
    if is_open(function):
        return Verdict("open", "Put the body of the function in the place of the three dots, then run this cell again.")
    still = _capacity_of(function, TornRegisters([2048], set()))
    if still is ...:
        return Verdict("open", "Put your code in the place of the three dots, then run this cell again.")
    if still != 2048:
        return wrong(f"A disk of 2,048 sectors that does not change: your function says {_told(still)}.")
    if (large := _capacity_of(function, TornRegisters([(3 << 32) + 5], set()))) != (3 << 32) + 5:
        return wrong(f"A disk of {(3 << 32) + 5:,} sectors: your function says {_told(large)}. Are both halves in their places?")
    for first, then in ((_SMALL, _LARGE), (_LARGE, _SMALL)):
        for at in range(1, 9):
            if verdict := _torn(function, [first, then], {at}):
                return verdict
    for when in combinations(range(1, 10), 2):
        if verdict := _torn(function, [_SMALL, _LARGE, _SMALL], set(when)):
            return verdict
    return right("Whatever happens in between, it returns a size that the disk really had.")


def _capacity_of(function: Callable[[Any], Any], registers: TornRegisters) -> Any:
    def careful() -> Any:
        try:
            return function(registers)
        except _Enough:
            raise Wrong("It reads on and on. When both generations are the same, the value is good: return it.") from None

    return call(careful)


def _torn(function: Callable[[Any], Any], capacities: list[int], when: set[int]) -> Verdict | None:
    registers = TornRegisters(capacities, when)
    got = _capacity_of(function, registers)
    if got in registers.seen:
        return None
    generations = registers.reads.count(int(Reg.CONFIG_GENERATION))
    said = f"The disk changed from {capacities[0]:,} to {capacities[1]:,} sectors, and your function says {_told(got)}: half of each."
    if not generations:
        return wrong(f"{said} Read ConfigGeneration before and after.")
    if generations == 1:
        return wrong(f"{said} You read the generation once. Only a second look, after both halves, shows a change.")
    if len(when) > 1:
        return wrong("One change is noticed, but the disk changed again while you read again. Repeat until nothing changed.")
    return wrong(f"{said} The first look at the generation must come before both halves, the second after both.")


def _told(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "something that is no whole number"


# -- requests and reset --------------------------------------------------------------------------------------------------------


@question("01", "What stands in the header of a request?")
def parse_header(function: Any) -> Verdict:
    if not callable(function) or isinstance(function, type):
        return wrong("Give the function itself, without calling it: `parse_header`.")
    if is_open(function):
        return Verdict("open", "Put the body of the function in the place of the three dots, then run this cell again.")
    chance = random.Random(3)
    for _ in range(20):
        kind, priority, sector = chance.choice((0, 1, 4, 8)), chance.getrandbits(32), chance.getrandbits(64)
        header = struct.pack("<IIQ", kind, priority, sector)
        got = call(function, memoryview(bytearray(header)))
        if got is ...:
            return Verdict("open", "Put your code in the place of the three dots, then run this cell again.")
        if hint := _misread(got, kind, priority, sector, header):
            return wrong(hint)
    return right("Type and sector, whatever stands in the four bytes between them.")


def _misread(got: Any, kind: int, priority: int, sector: int, header: bytes) -> str:
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        extra = " Leave the four bytes in the middle out." if isinstance(got, (tuple, list)) and len(got) == 3 else ""
        return f"Return two numbers, the type and the sector.{extra}"
    if tuple(got) == (kind, sector):
        return ""
    if tuple(got) == (sector, kind):
        return "Both numbers are right, in the other order: type first, then sector."
    big_kind, big_sector = struct.unpack(">I4xQ", header)
    if tuple(got) in ((big_kind, big_sector), (big_kind, sector), (kind, big_sector)):
        return "The bytes are in the wrong order: virtio is little-endian everywhere."
    if got[1] == int.from_bytes(header[4:12], "little"):
        return "Between type and sector lie four bytes (ioprio, or reserved): the sector begins at byte 8."
    if got[1] == sector & 0xFFFFFFFF:
        return "The sector has 64 bits; you read 32 of them."
    if got[1] == sector * 512:
        return "The sector is asked for as it stands there, not in bytes."
    wrong_one = "type" if got[0] != kind else "sector"
    return f"For the header `{header.hex(' ')}` the {wrong_one} is not right."


@prediction("01", "What does Status read right after a reset with a read at the drive: 0, or something else?", read=number)
def predict_reset(guess: float, status: Any) -> Verdict:
    truth = number(status)
    if truth == 0:
        raise Wrong("Status reads 0 already: nothing was in flight. Boot the machine again and stop it while the drive works.")
    why = "The drive is about to write 4 KiB into the guest's memory. As long as it may, the device must not say that it is over."
    if guess == truth:
        return right(f"It still reads {truth:.0f}. {why}")
    if guess == 0:
        return wrong(f"It reads {truth:.0f}. {why} So a driver writes 0 and then waits until it reads 0.")
    return wrong(f"It reads {truth:.0f}, as before. {why}")


# -- one buffer at a time ------------------------------------------------------------------------------------------------------


@prediction("01", "How many times the IOPS of iodepth 1 will a device that serves one buffer at a time do at iodepth 32?", read=number)
def predict_one_at_a_time(guess: float, one: Any, many: Any) -> Verdict:
    runs: tuple[Run, Run] = a_run(one, "both runs"), a_run(many, "both runs")
    truth = runs[1].iops / runs[0].iops
    said = f"{truth:.1f} times: {runs[0].iops:,.0f} and {runs[1].iops:,.0f} IOPS."
    if truth > 8:
        return (right if abs(guess - truth) <= 0.3 * truth else wrong)(f"{said} This device keeps many requests at the drive.")
    why = "Kicks and interrupts overlap with the work now, but the drive never has more than one request, whatever waits in the ring."
    return (right if abs(guess - truth) <= 1 else wrong)(f"{said} {why}")


@question("01", "In which step does a request spend most of its time when only one is served at a time?")
def where_it_waits(step: Any, run: Any) -> Verdict:
    names = steps_in(step)
    mean = {stat.step: stat.mean_ns for stat in a_run(run, "the run with many requests in flight").steps}
    truth = max(mean, key=lambda name: mean[name])
    if names == {truth}:
        share = 100 * mean[truth] / sum(mean.values())
        return right(f"{share:.0f} % of the time lies in {truth}: published in the ring, and the device has not come to it yet.")
    if len(names) != 1:
        return wrong("Name the one step with the longest bar.")
    (name,) = names
    return wrong(f"In {name} it spends {mean[name] / 1e3:.1f} µs. Another bar is much longer.")
