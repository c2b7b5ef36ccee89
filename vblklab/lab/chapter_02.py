"""The questions of chapter 02 about the probe, kicks, ring size and polling; ``driver_stages`` has the driver's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..trace.run import Run
from .answers import TREND, a_run, number, trend
from .check import Verdict, Wrong, prediction, question, right, wrong
from .driver_bench import ProbeLog


@prediction("02", "How many accesses to registers does a probe take?", read=number)
def predict_accesses(guess: float, log: Any) -> Verdict:
    if not isinstance(log, ProbeLog):
        raise Wrong("Give what `vb.probe_log(…)` returned.")
    truth = len(log)
    said = f"{truth} accesses, {sum(way == 'read' for way, *_ in log)} of them reads. Each leaves the guest, and the device answers it."
    if abs(guess - truth) <= 0.25 * truth:
        return right(said)
    return wrong(f"{said} A driver is careful: it reads back what it wrote, and the generation before and after each field.")


@question("02", "At which number in the log does the driver find out whether its features were accepted?")
def reads_back(line: Any, log: Any) -> Verdict:
    answer = number(line)
    if not isinstance(log, ProbeLog):
        return wrong("Give the log as well, what `vb.probe_log(…)` returned.")
    wrote = next((at for at, (way, name, value, _) in enumerate(log, 1) if way == "write" and name == "Status" and value & 8), None)
    if wrote is None:
        return wrong("In this log no driver sets FEATURES_OK.")
    truth = next((at for at, (way, name, *_) in enumerate(log, 1) if at > wrote and way == "read" and name == "Status"), None)
    if answer == truth:
        return right("It wrote FEATURES_OK just before, and reads Status again. If the bit were gone, it would give up.")
    if answer == wrote:
        return wrong("There it sets FEATURES_OK. A write says nothing about what the device thinks of it.")
    if not 1 <= answer <= len(log):
        return wrong(f"The log has the numbers 1 to {len(log)}.")
    return wrong("Look for the write of a Status with the bit 8 in it, and for what comes after it.")


@prediction("02", "With 32 requests in flight, how many kicks will 1,000 I/Os take?", read=number)
def predict_kicks_of_many(guess: float, run: Any) -> Verdict:
    run = a_run(run, "the run with 32 requests in flight")
    truth = 1000 * run.counters["kicks"] / run.ios
    said = f"{truth:,.0f}: the device stays awake as long as the ring has something, and asks for no kick meanwhile."
    if truth / 2 <= guess <= truth * 2:
        return right(said)
    if guess >= 900:
        return wrong(f"{said} One kick each is what it takes with one request in flight.")
    return wrong(said)


@question("02", "Which iodepth_batch gives the fewest kicks, and which the most IOPS?")
def batches(fewest_kicks: Any, most_iops: Any, runs: Any) -> Verdict:
    kicks, iops = number(fewest_kicks), number(most_iops)
    if not isinstance(runs, Mapping) or not runs or not all(isinstance(run, Run) and run.ios for run in runs.values()):
        return wrong("Give the runs as well: a dictionary from iodepth_batch to a run.")
    least = min(run.counters["kicks"] / run.ios for run in runs.values())
    most = max(run.iops for run in runs.values())
    for answer in (kicks, iops):
        if answer not in runs:
            return wrong(f"There is no run with {answer:g}. They are {', '.join(f'{at:g}' for at in runs)}.")
    if runs[kicks].counters["kicks"] / runs[kicks].ios > 1.02 * least:
        return wrong(
            f"With {kicks:g} there are {runs[kicks].counters['kicks'] / runs[kicks].ios:.3f} kicks an I/O. Another batch needs fewer."
        )
    if runs[iops].iops < 0.98 * most:
        return wrong(f"With {iops:g} there are {runs[iops].iops:,.0f} IOPS. Another batch does more.")
    return right("A larger batch saves kicks, and the first request in it waits for the last. Fewest kicks is not fastest.")


@question("02", "Which is the smallest ring with nine tenths of the IOPS of the largest?")
def ring_size(size: Any, runs: Any) -> Verdict:
    answer = number(size)
    if not isinstance(runs, Mapping) or not runs or not all(isinstance(run, Run) and run.ios for run in runs.values()):
        return wrong("Give the runs as well: a dictionary from ring size to a run.")
    if answer not in runs:
        return wrong(f"There is no run with {answer:g} entries. They are {', '.join(f'{at:g}' for at in runs)}.")
    enough = 0.9 * runs[max(runs)].iops
    if runs[answer].iops < enough:
        return wrong(f"With {answer:g} entries there are {runs[answer].iops:,.0f} IOPS, and {enough:,.0f} are nine tenths.")
    if any(run.iops >= enough and at < answer for at, run in runs.items()):
        return wrong(f"{answer:g} entries are enough, and a smaller ring is, too.")
    return right(f"{answer:g} entries: {runs[answer].iops:,.0f} IOPS. A ring larger than what is in flight is only memory.")


@prediction("02", "More, fewer or the same number of IOPS if the driver polls?", read=TREND)
def predict_polling(guess: str, interrupts: Any, polling: Any) -> Verdict:
    before, after = a_run(interrupts, "both runs"), a_run(polling, "both runs")
    if not after.counters.get("polls"):
        raise Wrong("The second run does not poll: give the run with interrupts first, then the one with `poll=True`.")
    truth = trend(before.iops, after.iops)
    said = f"{truth.capitalize()}: {before.iops:,.0f} IOPS with interrupts, {after.iops:,.0f} with polling."
    price = f"The price: the vCPU looked {after.counters['polls'] / after.ios:,.0f} times for each I/O, and did nothing else."
    return (right if guess == truth else wrong)(f"{said} {price}")
