"""The questions of chapter 04, interrupts, judged from runs and walks; ``interrupt_stages`` has the two classes that are built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ConfigError, VblkError
from ..machine.sim import SimMachine
from ..pipeline import Pipeline
from ..spec.pci import MSI_ADDRESS
from ..trace.run import Run, TraceEvent
from .answers import TREND, a_run, change, in_order, means, moved, number, one_of, steps_in, trend
from .careful import said, tried
from .check import Verdict, Wrong, prediction, question, right, wrong

_STATUS, _ACK = 0x60, 0x64
_SEEN = one_of(data="answer yes", error="an eio ioerror", nothing="none never hangs")
_REGISTER = one_of(InterruptStatus="interruptstatus status 0x60 read", InterruptACK="interruptack ack 0x64 write")
_WAY = one_of(line="intx wire mmio", message="messages msi msix msi-x pci")


# -- the line ------------------------------------------------------------------------------------------------------------------


@prediction("04", "How often does the vCPU leave the guest for one interrupt on the line?", read=number)
def predict_line_exits(guess: float, run: Any) -> Verdict:
    run = a_run(run, "the run with the line")
    truth = run.counters["mmio_exits"] / max(1, run.counters["interrupts"])
    why = f"{truth:.0f}: the handler reads InterruptStatus and writes InterruptACK, and neither register is there."
    return right(why) if guess == round(truth) else wrong(why)


@question("04", "Which access lets the line go down: that of InterruptStatus or that of InterruptACK?")
def line_goes_down(register: Any, trace: Any) -> Verdict:
    answer = _REGISTER(register)
    last = None
    for event in _events(trace):
        if event.key == "kvm_mmio":
            last = event.args[0]
        elif event.key == "kvm_set_irq" and not event.args[1]:
            truth = {_STATUS: "InterruptStatus", _ACK: "InterruptACK"}.get(last or 0, "")
            if answer == truth:
                return right("The device still had a cause until then. Reading it changes nothing; saying that it was seen does.")
            return wrong("Look for `kvm_set_irq` with `level=0`, and for the last `offset` before it.")
    return wrong("In this walk the line never goes down. Walk on until `sys_exit_io_getevents`.")


def _events(trace: Any) -> list[TraceEvent]:
    found = list(trace) if isinstance(trace, Iterable) else []
    if not found or not all(isinstance(event, TraceEvent) for event in found):
        raise Wrong("Give the list of trace points that the cell above made.")
    return found


@prediction("04", "What does the application see of its first read if nobody acknowledges?", read=_SEEN)
def predict_no_ack(guess: str, trace: Any) -> Verdict:
    keys = Counter(event.key for event in _events(trace))
    if not keys["vm_interrupt"]:
        raise Wrong("There is no interrupt in this walk: make it longer.")
    back = keys["sys_exit_io_getevents"]
    why = (
        f"The device notified {_times(keys['virtio_notify'])}, and the vCPU took {keys['kvm_inj_virq']:,} interrupts. "
        f"The read itself has ended; the application's call came back {_times(back)}."
    )
    return (right if (guess == "data") == bool(back) and guess != "error" else wrong)(why)


def _times(count: int) -> str:
    return {0: "never", 1: "once"}.get(count, f"{count:,} times")


# -- messages ------------------------------------------------------------------------------------------------------------------


@question("04", "Which CPU and which vector does a message name?")
def message(target: Any) -> Verdict:
    for cpu, vector in ((0, 0x31), (2, 0x32), (5, 0x41), (255, 0xFE)):
        address, data = MSI_ADDRESS | cpu << 12, vector
        got = tried(target, address, data)
        if got is ... or got is None:
            return Verdict("open", "Return two numbers, the CPU and the vector, in the place of the three dots.")
        if not (isinstance(got, tuple) and len(got) == 2):
            return wrong("Return two numbers with a comma between them: the CPU, then the vector.")
        if got == (cpu, vector):
            continue
        of = f"For the address {address:#x} and the data {data:#x}"
        if got == (vector, cpu):
            return wrong(f"{of} both numbers are right, in the wrong order: first the CPU.")
        if got[1] == vector and got[0] == address >> 12:
            return wrong(f"{of} you got {got[0]:#x}: the upper bits only say that this is a message. The CPU's number has 8 bits.")
        if got[1] == vector:
            return wrong(f"{of} the vector is right, and the CPU is {got[0]!r}. It stands above the lowest 12 bits.")
        return wrong(f"{of} you got {got!r}.")
    return right("So a table row can send a queue's interrupts to any CPU, and the driver moves them by writing another address.")


@prediction("04", "On how many of the four vCPUs will interrupts of the line arrive?", read=number)
def predict_vcpus(guess: float, run: Any) -> Verdict:
    where = taken_by(a_run(run, "the run with the line"))
    why = f"On {len(where)}: {', '.join(sorted(where))}. A wire ends at one place, and whose queue it is about must be found out there."
    return right(why) if guess == len(where) else wrong(why)


def taken_by(run: Run) -> Counter[str]:
    """Interrupt context → how many interrupts it took, as far as the trace was kept."""
    return Counter(event.context for event in run.trace or () if event.key == "kvm_inj_virq")


@question("04", "How small can the table be so that each queue interrupts its own vCPU?")
def vectors(answer: Any, spread: Any) -> Verdict:
    size = number(answer, "vectors")
    if size != int(size) or not 2 <= size <= 64:
        return wrong("A table here has 2 to 64 rows.")
    if not callable(spread):
        return wrong("Give the function as well, the one that takes a size and returns a run.")
    here, below = (len(taken_by(a_run(spread(at), "a function that returns a run"))) for at in (int(size), max(2, int(size) - 1)))
    if here < 4:
        why = "One for each queue, and none is left for a change of the configuration." if size == 4 else "The queues share one."
        return wrong(f"With {int(size)} rows interrupts arrive on {here} vCPU. {why}")
    if below == here:
        return wrong(f"{int(size)} rows are enough, and {int(size) - 1} are, too.")
    return right("One for each queue and one for the configuration. With fewer, Linux's `vp_find_vqs()` shares one among all queues.")


# -- who raises it -------------------------------------------------------------------------------------------------------------


@prediction("04", "Which bars move when the kernel raises the interrupt in the main loop's place?", read=steps_in)
def predict_irqfd_bars(guess: frozenset[str], before: Any, after: Any) -> Verdict:
    runs = a_run(before, "both runs"), a_run(after, "both runs")
    bars = moved(*runs)
    told = "; ".join(f"`{name}` {text}" for name, text in bars.items()) or "none"
    whole = change(*(sum(means(run).values()) for run in runs))
    said_ = f"What moved: {told}. The whole I/O: {whole}."
    if guess == frozenset(bars):
        return right(f"{said_} A thread less has to wake up.")
    missing, extra = frozenset(bars) - guess, guess - frozenset(bars)
    parts = [f"You did not expect {in_order(missing)}."] * bool(missing) + [f"{in_order(extra)} stayed."] * bool(extra)
    return wrong(f"{said_} {' '.join(parts)}")


# -- less often ----------------------------------------------------------------------------------------------------------------


@prediction("04", "With 32 I/Os in flight, how many completions will an interrupt bring, on average?", read=number)
def predict_per_interrupt(guess: float, run: Any) -> Verdict:
    run = a_run(run, "the run with 32 I/Os in flight")
    truth = run.ios / max(1, run.counters["interrupts"])
    why = (
        f"{truth:.1f}: {run.ios:,} I/Os took {run.counters['interrupts']:,} interrupts. While the handler drains the ring, "
        "it asks for no more of them, and takes what comes in."
    )
    return (right if 0.6 * truth <= guess <= 1.6 * truth else wrong)(why)


@question("04", "At iodepth 4, which way takes fewer interrupts: the line or the message?")
def fewer_interrupts(way: Any, line: Any, message: Any) -> Verdict:
    answer = _WAY(way)
    counts, iops = {}, {}
    for name, runs in (("line", line), ("message", message)):
        if not isinstance(runs, Mapping) or not isinstance(runs.get(4), Run):
            return wrong("Give the runs as well: two dictionaries from iodepth to a run, first those of the line.")
        counts[name], iops[name] = runs[4].counters["interrupts"], runs[4].iops
    fewer = min(counts, key=counts.__getitem__)
    both = f"{counts['line']:,} with the line, {counts['message']:,} with messages"
    if answer != fewer:
        return wrong(f"Look at the figure again, above the 4. It was {both}.")
    quick = max(iops, key=iops.__getitem__)
    return right(
        f"{both}. A handler that takes longer finds more when it looks. Fewer is not faster: "
        f"the IOPS were {iops['line']:,.0f} and {iops['message']:,.0f}, and the {quick} won."
    )


@prediction("04", "For how many of the three iodepths will the run come to its end?", read=number)
def predict_every_fourth(guess: float, ends: Any) -> Verdict:
    if not isinstance(ends, Mapping) or not ends:
        raise Wrong("Give what the cell above collected: a dictionary from iodepth to a run, or to what went wrong.")
    done = [depth for depth, end in ends.items() if isinstance(end, Run)]
    why = (
        f"{len(done) or 'None'}. Who waits for a fourth completion waits for an I/O that the application only sends when it has seen the "
        "first. With many in flight that goes well for long, and the last I/Os of the job have nobody left to wait for."
    )
    return right(why) if guess == len(done) else wrong(why)


@prediction("04", "More, fewer or the same number of IOPS if the driver polls in place of messages?", read=TREND)
def predict_polled(guess: str, message: Any, polling: Any) -> Verdict:
    before, after = a_run(message, "both runs"), a_run(polling, "both runs")
    truth = trend(before.iops, after.iops)
    price = f"For it the vCPU looked {after.counters['polls'] / after.ios:,.0f} times for each I/O."
    why = f"{truth.capitalize()}: {before.iops:,.0f} IOPS with messages by irqfd, {after.iops:,.0f} with polling. {price}"
    return (right if guess == truth else wrong)(why)


# -- measured ------------------------------------------------------------------------------------------------------------------


@question("04", "How many MMIO exits did one interrupt of the line cost, as measured?")
def exits_each(answer: Any, line: Any, polling: Any) -> Verdict:
    got = number(answer, "exits an interrupt")
    line, polling = a_run(line, "the run with the line"), a_run(polling, "the run that polls")
    if polling.counters["interrupts"] > 1:
        return wrong("The second run must be the one that polls: it has the probe's exits and no others.")
    taken = line.counters["interrupts"]
    truth = (line.counters["mmio_exits"] - polling.counters["mmio_exits"]) / taken
    spurious = line.counters.get("interrupts_spurious", 0)
    if abs(got - truth) <= 0.1:
        if spurious > 0.1 * taken:
            return right(
                f"{truth:.1f}, and not the model's 2: besides {taken:,} interrupts the vCPU took {spurious:,} that found no cause. "
                "This KVM looks at the line again before the handler has lowered it, and each of those reads InterruptStatus."
            )
        return right(
            f"{truth:.1f}: one read and one write, {'as the model says' if not line.simulated else 'and this is the model itself'}."
        )
    if abs(got - line.counters["mmio_exits"] / taken) <= 0.1:
        return wrong("The probe's exits are in there. The run that polls has just those: take them off first.")
    return wrong("Subtract the exits of the run that polls, and divide by the interrupts taken.")


# -- the last question ---------------------------------------------------------------------------------------------------------


@question("04", "Replace one part, so that interrupts stay and no exit to user space is left.")
def no_exits(mine: Any, start: Any) -> Verdict:
    if not isinstance(mine, Pipeline) or not isinstance(start, Pipeline):
        return wrong("Give two recipes: yours, made with `start.replace(…)`, and `start`.")
    old, new = start.describe(), mine.describe()
    changed = [name for name in old if old[name] != new[name]]
    if len(changed) != 1:
        return wrong(f"You replaced {', '.join(f'`{name}`' for name in changed) or 'nothing'}. One part is enough.")
    try:
        run: Run = mine.run(SimMachine(trace=0))
    except ConfigError as refused:
        return wrong(f"This recipe is refused: {refused}")
    except VblkError as error:
        return wrong(said(error))
    exits, interrupts = run.counters["mmio_exits"], run.counters["interrupts"]
    if interrupts < run.ios / 2:
        return wrong(f"{interrupts:,} interrupts for {run.ios:,} I/Os: the interrupts are gone, and a CPU does nothing but look.")
    if exits:
        return wrong(f"There are still {exits:,} exits, {exits / run.ios:.0f} for each I/O. Who makes them, and what does it want to know?")
    before = start.run(SimMachine(trace=0))
    gain = change(*(sum(means(one).values()) for one in (before, run)))
    return right(f"No exit is left: {gain} an I/O. The message says all that the handler asked the registers for.")
