"""``vb.predict()``: simulate a recipe as a real machine would run it, then run it there, and say by how much the model is off."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, VblkError
from ..events import STEPS
from ..kvm import host as kvm_host
from ..machine.costs import CostTable
from ..machine.like import Shape, in_flight, shape_of, store_of
from ..machine.sim import SimMachine
from ..stats import Histogram
from ..trace.run import Run
from .calibrate import Calibration, bar, kept_apart, other_kick, sizes_beside

__all__ = ["GOAL", "Prediction", "StepError", "predict"]

GOAL = 0.15
"""How far the predicted total may be from the measured median; a noisier machine's p25 to p75 counts too."""
_TOTAL = "total"
_LEFT, _RIGHT = 'style="text-align:left"', 'style="text-align:right"'


@dataclass(frozen=True)
class StepError:
    """One step, or ``total``: the model's time, and the median and quartiles of the measured ones, in ns."""

    step: str
    model_ns: float
    measured_ns: float
    p25_ns: float
    p75_ns: float

    @property
    def error_ns(self) -> float:
        """The model's time less the measured median."""
        return self.model_ns - self.measured_ns

    @property
    def error(self) -> float:
        """The same as a share of the measured median; 0 where both are 0."""
        return self.error_ns / self.measured_ns if self.measured_ns else 0.0 if not self.model_ns else float("inf")

    @property
    def inside(self) -> bool:
        """Whether the model's time lies between the measured quartiles."""
        return self.p25_ns <= self.model_ns <= self.p75_ns


@dataclass(frozen=True)
class Prediction:
    """A model and a measurement of one recipe.  ``table`` is the cost table of the model; ``steps`` end with the total.

    ``in_flight`` is how many I/Os the recipe keeps in flight; the model is made for one, and the verdict says so for more.
    """

    model: Run
    measured: Run
    table: CostTable
    steps: tuple[StepError, ...]
    notes: tuple[str, ...]
    in_flight: int = 1

    @property
    def total(self) -> StepError:
        """From the submission to the application's wake-up."""
        return self.steps[-1]

    @property
    def met(self) -> bool:
        """Whether the total is within 15 % of the measured median or, on a noisier machine, inside its p25 to p75."""
        return abs(self.total.error) <= GOAL or self.total.inside

    @property
    def verdict(self) -> str:
        """One line: predicted, measured, the error, and by which rule the prediction holds, or that it missed."""
        return self._compared + (f"; the model is made for one I/O in flight, not for {self.in_flight}" if self.in_flight > 1 else "")

    @property
    def _compared(self) -> str:
        one = self.total
        said = f"predicted {one.model_ns / 1e3:.1f} µs an I/O, measured {one.measured_ns / 1e3:.1f} µs (median): {_percent(one.error, 1)}"
        quartiles = f"p25 to p75, {one.p25_ns / 1e3:.1f} to {one.p75_ns / 1e3:.1f} µs"
        if abs(one.error) <= GOAL:
            return f"{said}, within {GOAL * 100:.0f} % of the median"
        if one.inside:
            return f"{said}, not within {GOAL * 100:.0f} % of the median, but inside the measured {quartiles}"
        return f"{said}, missed: neither within {GOAL * 100:.0f} % of the median nor inside the measured {quartiles}"

    def figure(self, **options: Any) -> Any:
        """Model and measurement step by step on one axis, by their medians: ``view.compare``."""
        return self.model.compare(self.measured, **({"statistic": "median"} | options))

    def text(self) -> str:
        """The verdict, a line a step, and what the prediction rests on."""
        head = f"  {'':6} {'model µs':>9} {'measured':>9} {'p25':>9} {'p75':>9} {'error':>9} {'':>7}"
        lines = [
            f"  {one.step:6} {_us(one.model_ns)} {_us(one.measured_ns)} {_us(one.p25_ns)} {_us(one.p75_ns)} {_error(one)}"
            for one in self._shown
        ]
        return "\n".join([self.measured.title, self.verdict, "", head, *lines, "", *(f"  note: {note}" for note in self.notes)])

    @property
    def _shown(self) -> list[StepError]:
        """A real machine does not see every step; those it does not are part of the one before."""
        return [one for one in self.steps if one.model_ns or one.measured_ns]

    __str__ = text

    def __repr__(self) -> str:
        return f"<Prediction: {self.verdict}>"

    def _repr_html_(self) -> str:
        names = ("", "model µs", "measured µs", "p25", "p75", "error µs", "error")
        head = "".join(f"<th {_RIGHT}>{name}</th>" for name in names)
        rows = []
        for one in self._shown:
            times = (one.model_ns, one.measured_ns, one.p25_ns, one.p75_ns, one.error_ns)
            cells = "".join(f"<td {_RIGHT}>{ns / 1e3:,.1f}</td>" for ns in times)
            rows.append(f"<tr><td {_LEFT}><b>{one.step}</b></td>{cells}<td {_RIGHT}>{_percent(one.error)}</td></tr>")
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return f"<div><b>{html.escape(self.verdict)}</b><table><tr>{head}</tr>{''.join(rows)}</table><ul>{notes}</ul></div>"


def _percent(share: float, digits: int = 0) -> str:
    return f"{share * 100:+.{digits}f} %"


def _us(ns: float) -> str:
    return f"{ns / 1e3:9.1f}"


def _error(one: StepError) -> str:
    return f"{one.error_ns / 1e3:+9.1f} {_percent(one.error):>7}"


def predict(
    recipe: Any,
    machine: Any,
    *,
    rounds: int = 4,
    folder: str | Path | None = None,
    progress: Callable[[int, int | None], None] | bool = True,
) -> Prediction:
    """Predict what ``recipe`` takes on ``machine``, a LiveMachine or KvmMachine, measure it there, and report the error.

    The model never sees the job that it predicts.  What it is made of, each measured in ``rounds`` turns with the real runs between
    them, because machines drift:

    - the points of Python and the wake-ups, on the same machine with the recipe's own driver, device, queue, transport and call, but
      another job (random reads and writes, mixed, of two block sizes beside the recipe's, at queue depth 1), another disk of the
      same kind (memory; a scratch file in ``folder``, by default the image's) and the other kick;
    - the length of preadv and pwritev, out of these runs: the straight line through the two block sizes;
    - with KVM the way of the doorbell, by ioeventfd and by an exit, out of loops over a vCPU without rings.

    The model is then ``SimMachine(costs=table, like=machine)``: one number an I/O.  It is made for one I/O in flight: with more it misses
    badly, often by half, because how long driver and device keep each other waiting is not in any of these parts; the verdict, the
    notes and the figure say so.  Wake-ups differ by where threads run, so driver and
    device keep to a CPU each (``cpus`` of the machine, by default two of this process's), in all of these runs.
    """
    if not isinstance(rounds, int) or rounds < 2:
        raise ConfigError(f"predict rounds={rounds!r}", "use 2 or more: each of the two block sizes needs one")
    shape = shape_of(machine)
    shape.check(recipe)
    machine = kept_apart(machine)
    store = store_of(recipe.disk)
    calibration = Calibration(folder or (Path(recipe.disk.path).absolute().parent if store != "ram" else None))
    runs: list[Run] = []
    work = _plan(calibration, recipe, machine, shape, store, rounds, runs)
    with bar(progress, len(work)) as tick:
        for number, part in enumerate(work):
            part()
            tick(number + 1, len(work))
    return _report(recipe, machine, shape, calibration.table(), runs)


def _plan(
    calibration: Calibration, recipe: Any, machine: Any, shape: Shape, store: str, rounds: int, runs: list[Run]
) -> list[Callable[[], object]]:
    kvm = other_kick(recipe.kvm)
    work: list[Callable[[], object]] = []
    for number in range(rounds):
        size = sizes_beside(recipe.app, store)[number % 2]
        work.append(partial(calibration.live, machine, shape, store, kvm, size, recipe=recipe))
        if shape.kvm:
            work.append(calibration.crossings)
        work.append(lambda: runs.append(_measured(recipe, machine)))
    return work


def _measured(recipe: Any, machine: Any) -> Run:
    run: Run = recipe.run(machine)
    if run.interrupted:
        raise KeyboardInterrupt
    if not len(run.rows):
        raise VblkError("the measured run finished no I/O", "give the job at least one read or write")
    return run


def _report(recipe: Any, machine: Any, shape: Shape, table: CostTable, runs: list[Run]) -> Prediction:
    model: Run = recipe.run(SimMachine(costs=table, like=machine))
    measured, about = _pooled(runs), table.about
    steps = _errors(model.rows, measured.rows)
    notes = [
        f"measured: {len(measured.rows):,} I/Os in {len(runs)} turns, between the calibration's; {about['load']}; {about['CPUs']}",
        f"calibrated on {about[f'runs {shape.rows}']}",
    ]
    if shape.kvm:
        notes.append(f"the doorbell's way out of loops over a vCPU; {kvm_host.flavour()}{', which emulates ring 0' * kvm_host.emulates()}")
    added_ns, model_ns = sum(one.measured_ns for one in steps[:-1]), steps[-1].model_ns
    notes.append(
        f"a median of a sum is not the sum of medians: the measured ones of the steps add up to {added_ns / 1e3:.1f} µs "
        f"(the model {_percent(model_ns / added_ns - 1, 1)}), and the more the machine is disturbed, the further the total is above that"
    )
    most = in_flight(recipe)
    if most > 1:
        notes.insert(
            0,
            f"{most} I/Os in flight: the model is made for one. It is calibrated at iodepth 1, and how long driver and device keep each "
            "other waiting, with batches and late interrupts, is not in it: expect it to be off by half",
        )
    return Prediction(model, measured, table, steps, tuple(notes), most)


def _pooled(runs: list[Run]) -> Run:
    """Several runs of one recipe as one."""
    durations = []
    for step in range(len(STEPS)):
        total = Histogram()
        for run in runs:
            total.merge(run.durations[step])
        durations.append(total)
    counters = {key: sum(run.counters.get(key, 0) for run in runs) for key in runs[0].counters}
    split = {key: tuple(float(np.mean([run.split[key][part] for run in runs])) for part in (0, 1)) for key in runs[0].split}
    return replace(
        runs[-1],
        rows=np.concatenate([run.rows for run in runs]),
        durations=durations,
        jobs=[job for run in runs for job in run.jobs],
        counters=counters,
        split=split,  # type: ignore[arg-type]
        duration_ns=sum(run.duration_ns for run in runs),
        notes=[*runs[-1].notes, f"{len(runs)} runs as one"],
    )


def _errors(model: Any, measured: Any) -> tuple[StepError, ...]:
    """Both are int64 (n, 16) of stamps in ns."""
    columns = [(step.name, np.diff(model, axis=1)[:, at], np.diff(measured, axis=1)[:, at]) for at, step in enumerate(STEPS)]
    columns.append((_TOTAL, model[:, -1] - model[:, 0], measured[:, -1] - measured[:, 0]))
    errors = []
    for name, mine, real in columns:
        low, middle, high = np.percentile(real, (25, 50, 75))
        errors.append(StepError(name, float(np.median(mine)), float(middle), float(low), float(high)))
    return tuple(errors)
