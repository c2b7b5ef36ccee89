"""The questions of chapter 06, a real trap, judged from exits of the learner's own machine and from runs."""

from __future__ import annotations

import statistics
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import VblkError
from ..kvm.payload import REGISTERS_GPA
from ..pipeline import Pipeline
from ..trace.gaps import between
from ..trace.run import Run
from .answers import a_run, means, number, one_of, trend
from .bench import Bench
from .careful import call, is_open, said, tried
from .check import Verdict, Wrong, prediction, question, right, wrong
from .trap import Trap
from .trap_exit import PAGE_BYTES, TrapExit

_UNION = struct.Struct("<Q8sIB")
_WHERE = one_of(at="on before itself", behind="after past next")
_YES_NO = one_of(yes="y true leaves", no="n false stays")
_NOTIFY = REGISTERS_GPA + 0x50
_LESS = 0.05


# -- one exit ------------------------------------------------------------------------------------------------------------------


def _page(addr: int, data: bytes, size: int, write: bool) -> bytes:
    page = bytearray(PAGE_BYTES)
    struct.pack_into("<I", page, 8, 6)
    _UNION.pack_into(page, 32, addr, data, size, write)
    return bytes(page)


_PAGES = (
    (_page(_NOTIFY, b"\x03".ljust(8, b"\0"), 4, True), (_NOTIFY, 3, 4, 1)),
    (_page(REGISTERS_GPA + 0x70, b"\x0f\0\0\0\x10\0\0\0", 4, True), (REGISTERS_GPA + 0x70, 15, 4, 1)),
    (_page(0xE0001000, b"\x01\x02\xff\xff\xff\xff\xff\xff", 2, True), (0xE0001000, 0x201, 2, 1)),
    (_page(0x1_0000_0008, b"\x2a\x10\0\0\0\0\0\0", 1, True), (0x1_0000_0008, 0x2A, 1, 1)),
)


@question("06", "Which address, value, size and direction does the page of an exit hold?")
def decode_exit(decode: Any) -> Verdict:
    for page, truth in _PAGES:
        got = tried(decode, page)
        if got is ... or got is None:
            return Verdict("open", "Return four numbers, in the order: address, value, bytes, is_write.")
        if not (isinstance(got, tuple) and len(got) == 4 and all(isinstance(one, int) for one in got)):
            return wrong("Return four numbers with commas between them: address, value, bytes, is_write.")
        if tuple(map(int, got)) == truth:
            continue
        addr, data, size, write = _UNION.unpack_from(page, 32)
        if got[0] != addr:
            return wrong(f"The address is {addr:#x}, and you found {got[0]:#x}. It begins at offset 32, has 8 bytes and is little-endian.")
        if (got[2], got[3]) != (size, write):
            there = f"{size} and {write}, and you found {got[2]} and {got[3]}"
            return wrong(f"The length has 4 bytes at offset 48, `is_write` one at 52. They say {there}.")
        if got[1] == int.from_bytes(data, "little"):
            return wrong(
                f"The address is right. Of `data` only the first {size} of the 8 bytes are this store's, the others are left from an "
                f"exit before: {data.hex(' ')} means {truth[1]:#x}."
            )
        return wrong(f"For data = {data.hex(' ')} and {size} bytes the value is {truth[1]:#x}; you found {got[1]:#x}.")
    return right("That is all that a monitor knows of what happened: where, what, how much, which way.")


@prediction("06", "Where does rip stand when a load has left the guest: at the load or behind it?", read=_WHERE)
def predict_rip(guess: str, exit: Any) -> Verdict:
    seen = _an_exit(exit)
    if seen.write or seen.reason != "KVM_EXIT_MMIO":
        raise Wrong("Give the exit of a load.")
    marks = [mark for mark, *_ in seen.around() if mark]
    truth = "at" if marks == ["→*"] else "behind"
    why = f"{truth.capitalize()} it, at {seen.registers['rip']:#x}: the register that it loads into has no value yet, so it is not over."
    return (right if guess == truth else wrong)(f"{why} A store has nothing to wait for, and rip is already behind it.")


def _an_exit(given: Any) -> TrapExit:
    if not isinstance(given, TrapExit):
        raise Wrong("Give an exit: what `vm.run()` returned.")
    return given


# -- the monitor ---------------------------------------------------------------------------------------------------------------

_SERVED = (
    ("MagicValue", 0x000, None, 4),
    ("DeviceID", 0x008, None, 4),
    ("Status", 0x070, 1, 4),
    ("Status", 0x070, None, 4),
    ("the configuration's first byte", 0x100, None, 1),
)
_EXITS_MOST = 4


@question("06", "Serve an exit as QEMU does: give the access to the device, and return what a load reads.")
def exits_served(serve: Any, vm: Any) -> Verdict:
    if not callable(serve):
        return wrong("Give the function itself: its name without brackets behind it.")
    if not isinstance(vm, Trap):
        return wrong("Give the machine as well, what `vb.Trap()` returned.")
    if is_open(serve):
        return Verdict("open", "Write what a monitor does in the place of the three dots, then run this cell again.")
    device, twin = Bench(), Bench()
    for name, register, value, size in _SERVED:
        if value is None:
            got, truth = _load(vm, serve, device, register, size), twin.read(register, size)
            if got != truth:
                return wrong(_wrong_load(name, got, truth, register))
        else:
            vm.store(register, value, size)
            _until_done(vm, serve, device)
            twin.write(register, value, size)
    whose = "" if vm.real else " of the model"
    return right(f"{len(_SERVED)} accesses, each of them an exit{whose}. This loop is QEMU's `kvm_cpu_exec()`.")


def _load(vm: Trap, serve: Any, device: Bench, register: int, size: int) -> int:
    vm.load(register, size)
    return _until_done(vm, serve, device)


def _until_done(vm: Trap, serve: Any, device: Bench) -> int:
    """What stands in eax when the payload says that it is done."""
    for _ in range(_EXITS_MOST):
        seen = vm.run()
        if seen.reason != "KVM_EXIT_MMIO":
            return seen.registers["rax"]
        answer = call(serve, seen, device)
        if seen.write:
            continue
        if answer is None:
            raise Wrong(f"A load of {seen.addr - REGISTERS_GPA:#05x} left, and your function returned nothing. Somebody waits for a value.")
        if not isinstance(answer, int) or not 0 <= answer < 1 << 64:
            raise Wrong(f"A load wants a number; your function returned `{answer!r}`.")
        vm.answer(answer)
    raise Wrong("The payload does not come to an end: run the cell with `vb.Trap()` again.")


def _wrong_load(name: str, got: int, truth: int, register: int) -> str:
    if name == "Status":
        return f"After a store of 1 to Status, at 0x70, it reads {got:#x}. Does a store reach the device?"
    if name.startswith("the"):
        return f"{name.capitalize()}, at 0x100, reads {got:#x} and not {truth:#x}. Its load has one byte: `exit.size`."
    more = "The exit has an address; the device counts from its first register."
    return f"{name}, at {register:#05x}, reads {got:#x} and not {truth:#x}. {more}"


# -- ioeventfd -----------------------------------------------------------------------------------------------------------------


@prediction("06", "Will a store of another value than the datamatch leave to user space?", read=_YES_NO)
def predict_datamatch(guess: str, exit: Any) -> Verdict:
    seen = _an_exit(exit)
    left = seen.reason == "KVM_EXIT_MMIO"
    why = "It stays: this store matched. Store another value than the datamatch."
    if left:
        why = "It leaves: this eventfd is not for it. So one address can be the doorbell of many queues, with an eventfd each."
    return (right if (guess == "yes") == left else wrong)(why)


@question("06", "How many µs does an ioeventfd save, in the middle?")
def saved_us(answer: Any, slow: Any, fast: Any) -> Verdict:
    got = number(answer, "µs")
    before, after = (_median_us(samples) for samples in (slow, fast))
    truth = before - after
    if abs(got - truth) <= max(0.1 * abs(truth), 0.05):
        return right(f"{before:.1f} − {after:.1f} = {truth:.1f} µs. What both have in common drops out of the difference.")
    if abs(got + truth) <= max(0.1 * abs(truth), 0.05):
        return wrong("The other way round: what it took to leave, less what it took to stay.")
    if abs(got - 1000 * truth) <= 100 * abs(truth):
        return wrong("Those are nanoseconds.")
    if min(abs(got - before), abs(got - after)) <= 0.05 * before:
        return wrong("That is one of the two medians. What is the difference?")
    return wrong("Take the median of each: it stands in the figure's legend.")


def _median_us(samples: Any) -> float:
    if isinstance(samples, (np.ndarray, Sequence)) and len(samples) > 1 and not isinstance(samples, str):
        return statistics.median(float(one) for one in samples) / 1000
    raise Wrong("Give both sets of samples, first that of the exits.")


# -- what the kernel saw -------------------------------------------------------------------------------------------------------


@question("06", "Which of the kernel's trace points of the doorbell is missing with an ioeventfd?")
def gone(key: Any, by_exit: Any, by_ioeventfd: Any) -> Verdict:
    if not isinstance(key, str):
        return wrong("Give the trace point's name, with quotes.")
    counts = [_doorbell(a_run(run, "both runs, first that with exits")) for run in (by_exit, by_ioeventfd)]
    if not counts[0]:
        return wrong("The first run has no trace point of the kernel at the doorbell, `offset=0x50`.")
    missing = {name for name in counts[0] if name not in counts[1]}
    name = key.strip().split()[0] if key.strip() else ""
    if name in missing:
        return right(
            f"{counts[0][name]:,} times in one run and never in the other. The store still traps; "
            "then the kernel signals the eventfd and lets the vCPU go on."
        )
    if name in counts[1]:
        return wrong("That one is in both: the store traps either way. Which one says that the vCPU came out of the kernel?")
    return wrong("Look at the lines with `offset=0x50`, in both lists.")


def _doorbell(run: Run) -> dict[str, int]:
    found: dict[str, int] = {}
    for event in run.trace or ():
        if event.key.startswith("kvm_") and event.args[:1] == (0x50,):
            found[event.key] = found.get(event.key, 0) + 1
    return found


@question("06", "How many µs from the line's change in the kernel to the handler's first instruction, in the middle?")
def injection_us(answer: Any, run: Any) -> Verdict:
    got = number(answer, "µs")
    gaps = between(a_run(run, "the traced run"), "kvm_set_irq", "vcpu:irq_handler_entry")
    if not gaps:
        return wrong("This run has no such pair of trace points: it was not traced by the kernel.")
    truth = statistics.median(gaps) / 1000
    if abs(got - truth) <= 0.1 * truth:
        return right(f"{truth:.1f} µs: the local APIC takes it, the vCPU's thread wakes from HLT, and enters the guest again.")
    if abs(got - 1000 * truth) <= 100 * truth:
        return wrong("Those are nanoseconds.")
    return wrong(f"It is {'less' if got > truth else 'more'}. Take the median of all {len(gaps):,} pairs, not of the first alone.")


# -- a guest without Python ----------------------------------------------------------------------------------------------------


@prediction("06", "Which half has more of an I/O's time when the guest is machine code: the guest or the device?", read=one_of(
    guest="driver", device="host"
))  # fmt: skip
def predict_bare(guess: str, bare: Any) -> Verdict:
    if bare is None:
        return Verdict("open", "A bare guest needs a real vCPU, and this machine has none: nothing can be compared.")
    run = a_run(bare, "the run of the bare guest")
    median = {stat.step: stat.p50_ns / 1000 for stat in run.steps}
    halves = {"guest": sum(median[step] for step in ("D1", "D2", "D3", "U6", "U7"))}
    halves["device"] = sum(median[step] for step in ("D5", "D6", "D7", "HW", "U1", "U2", "U3"))
    truth = max(halves, key=halves.__getitem__)
    between_ = sum(median[step] for step in ("D4", "U4", "U5"))
    why = f"The guest's own steps take {halves['guest']:.0f} µs, the device's {halves['device']:.0f}, and what lies between {between_:.0f}."
    if run.kinds["D3"] == "emulated":
        why += " Each of the guest's instructions is emulated here, so its machine code is not quick."
    return (right if guess == truth else wrong)(why)


# -- the last question ---------------------------------------------------------------------------------------------------------


@question("06", "Replace one part, so that by the model an I/O becomes a twentieth quicker.")
def quicker(mine: Any, slow: Any, model: Any) -> Verdict:
    if not isinstance(mine, Pipeline) or not isinstance(slow, Pipeline):
        return wrong("Give two recipes: yours, made with `slow.replace(…)`, and `slow`.")
    old, new = slow.describe(), mine.describe()
    changed = [name for name in old if old[name] != new.get(name)]
    if len(changed) != 1:
        return wrong(f"You replaced {', '.join(f'`{name}`' for name in changed) or 'nothing'}. One part is enough.")
    if changed[0] in ("app", "disk", "engine"):
        return wrong(f"`{changed[0]}` is another job or another disk. What lies between them can be quicker, too.")
    try:
        before, after = (sum(means(recipe.run(model)).values()) / 1000 for recipe in (slow, mine))
    except VblkError as error:
        return wrong(f"The model refuses: {said(error)}")
    told = f"By the model an I/O takes {before:.1f} µs, and with your `{changed[0]}` {after:.1f}"
    if after <= (1 - _LESS) * before:
        return right(f"{told}. Whether that is true, a measurement says.")
    if trend(before, after) == "more":
        return wrong(f"{told}: that is slower. Which steps does your part touch?")
    return wrong(f"{told}. That is too little. Where does the time of D4, U4 and U5 go?")
