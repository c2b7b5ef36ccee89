"""The questions of chapter 00.  Nothing is judged from a stored solution: the truth is read from events.py or from the runs given."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..events import EVENTS
from ..trace.run import Run
from .answers import TREND, a_run, change, in_order, means, moved, number, steps_in, trend
from .check import Verdict, Wrong, prediction, question, right, wrong


@question("00", "To which step does the trace point `virtqueue_pop` belong?")
def step_of_pop(step: Any) -> Verdict:
    names = steps_in(step)
    truth = EVENTS["virtqueue_pop"].step
    if names == {truth}:
        return right("The device takes the chain from the ring: its own work begins here, and the waiting in the ring ends.")
    if len(names) != 1:
        return wrong("It is exactly one step.")
    (name,) = names
    if name[0] == "U":
        return wrong(f"{name} is on the way up. The device pops a request before any work on it is done.")
    if name == f"D{int(truth[1]) - 1}":
        return wrong(f"Very near: during {name} the request still lies in the ring, and the pop ends that.")
    return wrong('Not that one. `vb.words("D2")` shows the trace points of D2; ask the same of the steps that touch the device.')


def _used_len(run: Run) -> int:
    for event in run.trace or ():
        if event.key == "virtqueue_fill":
            return event.args[1]
    raise Wrong("This run shows no used element yet: go on until `virtqueue_fill`, with tracing on.")


@prediction("00", "How many bytes does the used element of a 4 KiB read count?", read=number)
def predict_used_len(guess: float, run: Any) -> Verdict:
    truth = _used_len(a_run(run, "what `vm.result()` returns", least_ios=0))
    why = f"The element says {truth:,}: all that the device wrote, which is {truth - 1:,} bytes of data and 1 status byte."
    if guess == truth:
        return right(why)
    if guess == truth - 1:
        return wrong(f"Almost. {why}")
    if guess == truth + 16:
        return wrong(f"{why} The 16 bytes of the header were only read.")
    return wrong(why)


@question("00", "How many percent of the time of a live I/O are Python's own?")
def python_share(percent: Any, run: Any) -> Verdict:
    answer = number(percent, "percent")
    run = a_run(run, "the live run")
    if run.simulated:
        return wrong("This run is simulated: none of its time was measured. The question needs the live machine.")
    hard, soft = (sum(part[i] for part in run.split.values()) for i in (0, 1))
    truth = 100 * soft / (hard + soft)
    if abs(answer - truth) <= 3:
        return right(f"{truth:.0f} %. The total says little about a real device; the part of kernel and hardware is worth reading.")
    if abs(100 * answer - truth) <= 3:
        return wrong("That is the fraction. Give it in percent.")
    if abs(100 - answer - truth) <= 3:
        return wrong("That is the other part, the one of kernel and hardware.")
    return wrong(f"The share is {'smaller' if answer > truth else 'larger'}. The small print under the figure has both numbers.")


# -- the kick ----------------------------------------------------------------------------------------------------------------


def _two_kicks(before: Any, after: Any) -> tuple[Run, Run]:
    """The ioeventfd run and the mmio-exit run, whichever order they came in."""
    runs = [a_run(before, "both runs"), a_run(after, "both runs")]
    kicks = ["mmio-exit" if "mmio-exit" in run.recipe["kvm"] else "ioeventfd" for run in runs]
    if kicks[0] == kicks[1]:
        raise Wrong(f"Both runs have kick={kicks[0]!r}. Give the run before the swap and the one after it.")
    return (runs[0], runs[1]) if kicks[0] == "ioeventfd" else (runs[1], runs[0])


@prediction("00", "Which bars move when the kick becomes an exit to QEMU?", read=steps_in)
def predict_bars(guess: frozenset[str], before: Any, after: Any) -> Verdict:
    fast, slow = _two_kicks(before, after)
    bars = moved(fast, slow)
    old, new = means(fast), means(slow)
    if bars:
        said = "These bars moved: " + "; ".join(f"`{name}` {change}" for name, change in bars.items()) + "."
    else:
        whole = change(sum(old.values()), sum(new.values()))
        said = f"No bar moved: the whole I/O takes {whole}, step D4 {change(old['D4'], new['D4'])}."
    why = "One way pays for the exit to QEMU, the other for a short exit and for waking another thread."
    if guess == frozenset(bars):
        return right(f"{said} {why}")
    missing, extra = frozenset(bars) - guess, guess - frozenset(bars)
    parts = [f"You did not expect {in_order(missing)}."] * bool(missing) + [f"{in_order(extra)} stayed."] * bool(extra)
    return wrong(f"{said} {' '.join(parts)} {why}")


@prediction("00", "More, fewer or the same number of IOPS?", read=TREND)
def predict_iops(guess: str, before: Any, after: Any) -> Verdict:
    fast, slow = _two_kicks(before, after)
    truth = trend(fast.iops, slow.iops)
    said = f"{truth.capitalize()}: {fast.iops:,.0f} IOPS with ioeventfd, {slow.iops:,.0f} with the exit."
    kicks = f"The guest kicked {fast.counters['kicks']:,} times, then {slow.counters['kicks']:,} times."
    return (right if guess == truth else wrong)(f"{said} {kicks} The lanes below show why.")


@question("00", "On which lane does `virtqueue_pop` run?")
def who_pops(lane: Any, run: Any) -> Verdict:
    run = a_run(run, "the run of the lanes")
    lanes = Counter(event.lane for event in run.trace or () if event.key == "virtqueue_pop")
    if not lanes:
        return wrong("This run kept no trace, so it has no lanes.")
    if not isinstance(lane, str):
        return wrong('Give the name at the left edge of the figure, as text: `"disk"` for example.')
    said, truth = " ".join(lane.lower().split()), lanes.most_common(1)[0][0].lower()
    if said == truth or said.replace(" ", "") == truth.replace(" ", ""):
        if truth.startswith("vcpu"):
            return right("While this CPU works for the device, it cannot submit the next request. So the requests go one by one.")
        return right("The device has a thread of its own. The vCPU goes on meanwhile, and later requests need no kick at all.")
    every = {event.lane.lower() for event in run.trace or ()}
    if said in truth:
        return wrong("Say it in full, with its number.")
    if said not in every:
        return wrong("There is no such lane in this figure. The names stand at its left edge.")
    return wrong("Look for the bars in the colour of the virtio device, or hold the pointer over them.")


# -- the device --------------------------------------------------------------------------------------------------------------


@prediction("00", "More, fewer or the same number of interrupts?", read=TREND)
def predict_interrupts(guess: str, before: Any, after: Any) -> Verdict:
    runs = a_run(before, "both runs"), a_run(after, "both runs")
    asked, taken = ([run.counters[name] / run.ios * 1000 for run in runs] for name in ("notifies", "interrupts"))
    truth = trend(*taken)
    said = f"{truth.capitalize()}: for 1,000 I/Os the guest took {taken[0]:,.0f} and then {taken[1]:,.0f} interrupts."
    why = f"The device asked for one {asked[0]:,.0f} and then {asked[1]:,.0f} times."
    if truth == "same" and trend(*asked) == "more":
        why += " Most of the new ones came while the handler was still busy: an interrupt that is pending cannot become more pending."
    return (right if guess == truth else wrong)(f"{said} {why}")


@question("00", "What is the smallest iodepth that gives five times the IOPS of iodepth 1?")
def five_times(iodepth: Any, recipe: Any) -> Verdict:
    answer = number(iodepth)
    if answer != int(answer) or not 1 <= answer <= 64:
        return wrong("An iodepth here is a whole number from 1 to 64.")
    if not callable(recipe):
        return wrong("Give the function behind the slider as well, the one that takes an iodepth and returns a run.")
    depth = int(answer)
    one, here = (a_run(recipe(iodepth=at), "a function that returns a run").iops for at in (1, depth))
    if here < 5 * one:
        return wrong(f"At {depth} it is {here / one:.1f} times. Five times needs more I/Os in flight, and the right kick.")
    if depth > 1 and a_run(recipe(iodepth=depth - 1), "a function that returns a run").iops >= 5 * one:
        return wrong(f"{depth} is enough ({here / one:.1f} times), but it is not the smallest.")
    return right(f"{depth}: {here:,.0f} IOPS after {one:,.0f}. Many I/Os share one kick, one wake-up and one interrupt.")


_BECAUSE_OF_THE_GUEST = ("D2", "D3", "D4", "D5", "U3", "U4", "U5", "U6")


@question("00", "How many percent of the time of an I/O are there only because of the virtual machine?")
def virtualization(percent: Any, run: Any) -> Verdict:
    answer = number(percent, "percent")
    mean = means(a_run(run, "the run with the other drive"))
    whole = sum(mean.values())

    def share(*names: str) -> float:
        return 100 * sum(mean[name] for name in names) / whole

    def near(value: float) -> bool:
        return abs(answer - value) <= 1.5

    truth = share(*_BECAUSE_OF_THE_GUEST)
    if near(truth):
        return right(
            f"{truth:.0f} % of {whole / 1e3:.1f} µs. The way costs the same with any drive: the slower the drive, the smaller the share."
        )
    if near(100 * truth) or (answer and abs(100 * answer - truth) <= 1.5):
        return wrong("The digits are right. Give it in percent.")
    if near(100 - truth):
        return wrong("That is what a program on the host would pay as well. The question asks for the rest.")
    if near(share("HW")):
        return wrong("That is the drive alone.")
    if near(share("D2", "D3", "D4", "D5")) or near(share("U3", "U4", "U5", "U6")):
        return wrong("That is one direction only. An I/O comes back, too.")
    if near(share("D3", "D4", "D5", "U3", "U4", "U5")):
        return wrong("Close. The guest also has an I/O stack and an interrupt handler of its own, on top of the host's.")
    return wrong(f"It is {'less' if answer > truth else 'more'}. Add up the mean times of the eight steps and divide by the sum of all.")
