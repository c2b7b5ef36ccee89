"""Does a class still have the bug?  Each scenario returns what is wrong, with what shows it, or nothing."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

from ...errors import VirtioError
from ...interleave import schedules
from ...interleave.system import System, Violation
from ...memory import GuestMemory, GuestPages
from ...pipeline import Packed, Split
from ...ring import PackedDevice, SplitDriver
from ..bench import Bench
from ..careful import call
from ..check import Verdict, Wrong, question, right, wrong
from .specimens import SPECIMENS, Specimen

__all__ = ["repaired", "trouble_of"]

_IN, _OUT = 0, 1


class _Open(Wrong):
    """There is no answer yet."""


def _queue(specimen: Specimen) -> Any:
    return Packed(2) if issubclass(specimen.cls, PackedDevice) else Split(2)


def _all_schedules(specimen: Specimen, cls: type[Any], buffers: int = 2) -> str:
    parts: dict[str, Any] = {specimen.part: cls}
    found = schedules(queue=_queue(specimen), buffers=buffers, **parts)
    if found.violation is None:
        return ""
    last = "\n".join(str(step) for step in found.schedule[-4:])
    return f"{found.violation}. The shortest schedule has {len(found.schedule)} steps and ends so:\n{last}"


def _one_buffer(specimen: Specimen, cls: type[Any]) -> str:
    return _all_schedules(specimen, cls, buffers=1)


def _laps(specimen: Specimen, cls: type[Any]) -> str:
    """Four buffers on two entries, in random order: two laps of the ring."""
    setup = schedules(queue=_queue(specimen), buffers=4, most_states=2).setup
    setup.__dict__[specimen.part] = cls
    for seed in range(4):
        choose, system = random.Random(seed), System(setup)
        lost: Violation | None = None
        try:
            while enabled := system.enabled():
                system.take(choose.choice(enabled))
            lost = system.lost()
        except Violation as violation:
            lost = violation
        if lost is not None:
            return f"Four buffers on a ring of two entries: {lost}."
    return ""


def _framing(specimen: Specimen, cls: type[Any]) -> str:
    bench = Bench(cls)
    bench.handshake()
    pattern = bytes(range(256)) * 8
    bench.disk.bytes[512 * 4 : 512 * 8] = pattern
    for pieces in (1, 2, 4):
        answer = bench.block(_IN, 4, len(pattern), pieces)
        if answer.status or b"".join(answer.parts[:-1]) != pattern:
            return f"A read of {len(pattern)} bytes in {pieces} pieces came back with status {answer.status} and other data."
        answer = bench.block(_OUT, 12, pattern, pieces)
        if answer.status or bytes(bench.disk.bytes[512 * 12 : 512 * 16]) != pattern:
            return f"A write of {len(pattern)} bytes in {pieces} pieces did not reach the disk whole."
    return ""


def _used_length(specimen: Specimen, cls: type[Any]) -> str:
    bench = Bench(cls)
    bench.handshake()
    for kind, data, wanted in ((_IN, 512, 513), (_IN, 4096, 4097), (_OUT, b"x" * 512, 1)):
        answer = bench.block(kind, 0, data)
        if answer.written != wanted:
            return f"{'A read' if kind == _IN else 'A write'} wrote {wanted} bytes, and the used length says {answer.written}."
    if (answer := bench.block(99, 0)).written != 1:
        return f"A request that is not known writes its status byte and nothing else: 1, and the used length says {answer.written}."
    return ""


def _ring_of(cls: type[Any], size: int = 4) -> tuple[SplitDriver, Any, GuestMemory, Any]:
    memory = GuestMemory(bytearray(1 << 14))
    driver = SplitDriver.alloc(GuestPages(memory), size)
    return driver, cls(memory, driver.layout), memory, driver.layout


def _flag(specimen: Specimen, cls: type[Any]) -> str:
    driver, device, memory, layout = _ring_of(cls)
    memory.view(layout.avail, 2).cast("H")[0] = 1
    driver.add_sgs([(0x3000, 16)], [(0x3100, 1)], token=1)
    driver.publish()
    device.fill(device.pop(), 1)
    device.flush()
    return "" if device.should_notify() else "avail.flags is 1, used_event asks for this entry, and the device sends no interrupt."


def _batch(specimen: Specimen, cls: type[Any]) -> str:
    """Two buffers used with one store of used.idx, for every entry that the driver may ask to be told of."""
    for event, wanted in ((0, True), (1, True), (2, False)):
        driver, device, memory, layout = _ring_of(cls)
        memory.view(layout.avail + 4 + 2 * layout.size, 2).cast("H")[0] = event
        for at in (0x3000, 0x3200):
            driver.add_sgs([(at, 16)], [(at + 0x100, 1)], token=at)
        driver.publish()
        device.should_notify()  # the first answer after a start is always yes
        for chain in [device.pop(), device.pop()]:
            device.fill(chain, 1)
        device.flush()
        asked = device.should_notify()
        if asked is ...:
            raise _Open
        if asked != wanted:
            moved = "used.idx goes from 0 to 2 at once, used_event is"
            return f"{moved} {event}, and {'no' if wanted else 'an'} interrupt is sent."
    return ""


def _flood(specimen: Specimen, cls: type[Any]) -> str:
    driver, device, memory, layout = _ring_of(cls)
    head = driver.add_sgs([(0x3000, 16)], [(0x3100, 1)], token=1)
    words = memory.view(layout.avail, 4 + 2 * layout.size).cast("H")
    for offered in range(1, 4 * layout.size):
        words[2 + (offered - 1) % layout.size] = head
        words[1] = offered
        try:
            device.pop()
        except VirtioError:
            return "" if offered == layout.size + 1 else f"A driver may have {layout.size} buffers in flight; the {offered}th is refused."
    return f"The same buffer was offered {offered} times on a ring of {layout.size}, and the device took it each time."


class _Changing:
    """A disk that grows from 2^32 - 1 to 2^32 sectors at one of a driver's accesses."""

    def __init__(self, at: int) -> None:
        self.left, self.capacity, self.generation = at, 0xFFFF_FFFF, 0

    def read(self, offset: int, size: int = 4) -> Any:
        if self.left == 0:
            self.capacity, self.generation = 0x1_0000_0000, 1
        self.left -= 1
        if offset == 0x0FC:
            return self.generation
        data = struct.pack("<Q", self.capacity)[offset - 0x100 :]
        return int.from_bytes(data[:size], "little")
        yield


def _torn_config(specimen: Specimen, cls: type[Any]) -> str:
    for at in range(8):
        walk = cls(_Changing(at)).read_config(0, 8)
        try:
            for _ in range(100):
                next(walk)
            return "read_config does not come to an end."
        except StopIteration as end:
            value = int.from_bytes(end.value, "little")
        if value not in (0xFFFF_FFFF, 0x1_0000_0000):
            return f"The disk grew from {0xFFFF_FFFF:,} to {0x1_0000_0000:,} sectors, and the driver read {value:,}."
    return ""


_JUDGES: dict[str, Callable[[Specimen, type[Any]], str]] = {
    "schedules": _one_buffer,
    "one buffer": _one_buffer,
    "laps": _laps,
    "framing": _framing,
    "used length": _used_length,
    "batch": _batch,
    "flag": _flag,
    "flood": _flood,
    "torn config": _torn_config,
}


def trouble_of(specimen: Specimen, cls: type[Any]) -> str:
    """What this class still does wrong, "" if nothing; raises Wrong with a hint if it raises or never ends."""
    said = call(lambda: _JUDGES[specimen.judge](specimen, cls))
    if not said and specimen.judge == "schedules":  # one buffer showed that it comes to an end: now every order of two
        said = call(lambda: _all_schedules(specimen, cls), lines=0)
    return str(said)


@question("05", "Which class repairs this bug of the zoo? `vb.check.repaired(name, MyClass)`.")
def repaired(name: str, cls: type[Any]) -> Verdict:
    specimen = next((one for one in SPECIMENS if one.name == name), None)
    if specimen is None:
        raise Wrong(f"There is no bug `{name}`; `vb.zoo()` lists them.")
    base = specimen.cls.__mro__[1]
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise Wrong(f"Give a class that is a `{base.__name__}`: `class Repaired({base.__name__})`, or begin with the source of the bug.")
    try:
        trouble = trouble_of(specimen, cls)
    except _Open:
        return Verdict("open", "Put your answer in the place of the three dots, then run this cell again.")
    if trouble:
        return wrong(trouble)
    if cls is base:
        return right(f"`{base.__name__}` itself has not got this bug. Now write the method yourself.")
    return right(f"Repaired. §{specimen.section} is kept, whatever the order of events.")
