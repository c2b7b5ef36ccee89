"""Chapter 04's two exercises: the handler of a line, and a device that interrupts less often.  Both are run, bounded and by seed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..device import VirtioBlkDevice
from ..guest.fio import Fio
from ..guest.virtio_blk import VirtioBlkDriver
from ..kvm import Kvm
from ..machine.sim import SimMachine
from ..pipeline import Pipeline
from ..trace.run import Run, TraceEvent
from ..transport import Pci
from .careful import call, is_open
from .check import Verdict, Wrong, question, right, wrong

_STATUS, _ACK = 0x60, 0x64
_POINTS = 20_000
_NO_LIMIT = 0
_SEEDS = range(4)


@question("04", "What does a handler of the line do?")
def line_handler(driver: Any) -> Verdict:
    if not (isinstance(driver, type) and issubclass(driver, VirtioBlkDriver)):
        return wrong("Give the class itself: `MyDriver`, which begins as `class MyDriver(vb.VirtioBlkDriver)`.")
    if driver.interrupt is VirtioBlkDriver.interrupt:
        return wrong("This driver has no `interrupt` of its own yet.")
    if is_open(driver.interrupt):
        return Verdict("open", "Write the handler in the place of the three dots, then run this cell again.")
    _one_by_one(driver)
    for seed in _SEEDS:
        _in_any_order(driver, seed)
    return right("It acknowledges what it saw, then looks. In this order a cause that comes in meanwhile raises the line again.")


def _line(driver: Any, depth: int, ios: int) -> Pipeline:
    return Pipeline(app=Fio(rw="randread", bs=4096, iodepth=depth, number_ios=ios), driver=driver, kvm=Kvm(call="intx"))


def _walk(vm: Any, points: int) -> list[TraceEvent]:
    """The trace points up to the end, at most so many."""
    seen: list[TraceEvent] = []
    while len(seen) < points and (event := vm.step()) is not None:
        seen.append(event)
    return seen


def _one_by_one(driver: Any) -> None:
    """Three reads, one after the other."""
    vm = call(lambda: _line(driver, 1, 3).boot(SimMachine()), lines=_NO_LIMIT)
    trace: list[TraceEvent] = []
    stalled = ""
    try:
        trace = call(lambda: _walk(vm, 500))
    except Wrong as hint:
        if "Stalled" not in str(hint):
            raise
        stalled, trace = str(hint), list(vm.result().trace or ())
    keys = Counter(event.key for event in trace)
    values = [event.args[2] for event in trace if event.key == "kvm_mmio" and event.args[0] == _ACK]
    reads = sum(event.key == "kvm_mmio" and event.args[0] == _STATUS for event in trace)
    if keys["virtio_notify"] and not keys["vm_interrupt"]:
        raise Wrong("The device interrupts, and your handler passes no trace point `vm_interrupt`. Is there a `yield` before it?")
    if not reads:
        raise Wrong("Your handler does not read InterruptStatus, `0x60`, so it cannot know what to acknowledge.")
    if keys["vm_interrupt"] > 3 * max(1, keys["virtio_notify"]):
        how = (
            "acknowledges nothing"
            if not values
            else f"writes {values[0]:#x} to InterruptACK, and the device waits for the bits of its cause"
        )
        raise Wrong(
            f"For {keys['virtio_notify']} used buffer the handler ran {keys['vm_interrupt']} times: it {how}. "
            "The line stays high, and the vCPU does nothing else any more."
        )
    if stalled or not keys["virtqueue_get_buf"]:
        raise Wrong("The interrupt is acknowledged, and nobody looks into the used ring. `virtblk_done` does that.")
    if any(value != 1 for value in values):
        raise Wrong(
            f"It acknowledges {next(v for v in values if v != 1):#x} where InterruptStatus had 0x1. "
            "A cause that you have not seen would be lost: write back what you read."
        )


def _in_any_order(driver: Any, seed: int) -> None:
    """Four at a time, in a random order of contexts: a cause that is acknowledged too late is lost."""
    vm = call(lambda: _line(driver, 4, 200).boot(SimMachine(seed=seed, interleave="random", trace=0)), lines=_NO_LIMIT)
    try:
        call(lambda: vm.step(_POINTS), lines=_NO_LIMIT)
    except Wrong as hint:
        if "Stalled" not in str(hint):
            raise
        raise Wrong(
            "With four I/Os in flight an interrupt is lost. A buffer was used after you had looked and before you acknowledged: "
            "the acknowledge then took a cause away that you had not served. Which of the two must come first?"
        ) from None
    if not vm.finished:
        raise Wrong(f"After {_POINTS:,} trace points 200 reads are not done: the handler runs again and again.")


# -- less often ----------------------------------------------------------------------------------------------------------------


@question("04", "A device that interrupts half as often, and never loses an I/O.")
def patient(device: Any) -> Verdict:
    if not (isinstance(device, type) and issubclass(device, VirtioBlkDevice)):
        return wrong("Give the class itself: `Patient`, which begins as `class Patient(vb.VirtioBlkDevice)`.")
    if device.should_notify is VirtioBlkDevice.should_notify:
        return wrong("This device has no `should_notify` of its own yet.")
    if is_open(device.should_notify):
        return Verdict("open", "Write the decision in the place of the three dots, then run this cell again.")
    for depth in (1, 3, 4):
        _patience(device, depth)
    usual, run = (_patience(one, 32) for one in (VirtioBlkDevice, device))
    was, now = (one.counters["interrupts"] for one in (usual, run))
    if now > 0.6 * was:
        return wrong(f"Nothing is lost, and with 32 in flight there are {now} interrupts for 600 I/Os. The usual device sends {was}.")
    clat = [one.clat.percentile(50) / 1000 for one in (usual, run)]
    return right(
        f"{was} interrupts became {now}, at a price: half of the I/Os take longer than {clat[1]:.1f} µs, where it was {clat[0]:.1f}."
    )


_ALONE = "With one I/O in flight it never ends: no other completion will come, and yours waits for one. What does `queue.in_flight` say?"
_STUCK = (
    "With {depth} I/Os in flight it comes to a halt: the driver asked to be told, and a later question gets a later answer. "
    "Is a yes of `super().should_notify(queue)` kept until you act on it, and sent when nothing else is in flight?"
)


def _patience(device: Any, depth: int) -> Run:
    """A run with this device; Wrong says why there is none."""
    app = Fio(rw="randread", bs=4096, iodepth=depth, number_ios=600 if depth == 32 else 20)
    recipe = Pipeline(app=app, device=device, transport=Pci())
    limit = {} if depth == 1 else {"lines": _NO_LIMIT}  # looked at once: it makes everything slow
    try:
        vm = call(lambda: recipe.boot(SimMachine(trace=0)), lines=_NO_LIMIT)
        run: Run = call(vm.run, **limit)
    except Wrong as hint:
        if "Stalled" not in str(hint):
            raise
        raise Wrong(_ALONE if depth == 1 else _STUCK.format(depth=depth)) from None
    return run
