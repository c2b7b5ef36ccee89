"""``vblk calibrate``: measure this machine's costs, and say how well they predict a job."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from .pipeline import Pipeline

__all__ = ["add_calibrate", "add_costs", "costs_of"]

_MISSED = 1
_EPILOG = """\
  vblk calibrate --out mine.csv                                measure, about 20 s
  vblk run randread.fio --costs mine.csv                       simulate with this machine's exits and wake-ups
  vblk run randread.fio --costs mine.csv --like kvm            simulate what --machine kvm would do here
  vblk calibrate --predict randread.fio --machine kvm          predict the job, run it, print the error of each step
  vblk calibrate --predict randread.fio --set kvm.kick=mmio-exit

exit status: 0, or with --predict 1 if the prediction is neither within 15 % of the measured median nor inside its p25 to p75.
"""


def add_calibrate(commands: Any, raw: Any, recipe: Callable[[argparse.Namespace], Pipeline]) -> None:
    """The command's arguments; ``recipe`` makes a Pipeline of those that all commands share."""
    one = commands.add_parser(
        "calibrate",
        help="measure this machine's costs, predict a job with them",
        description="Measure what the simulator's costs are on this machine: system calls, wake-ups, exits, and our own Python.",
        epilog=_EPILOG,
        formatter_class=raw,
    )
    one.add_argument("--out", metavar="FILE.csv", help="write the cost table")
    one.add_argument("--predict", metavar="JOB.fio", dest="job", help="predict this job, run it for real in between, print the error")
    one.add_argument(
        "--machine",
        choices=("live", "kvm"),
        help="measure this machine's rows only; with --predict, where the job runs (default: kvm if it works)",
    )
    one.add_argument("--seconds", metavar="S", type=float, default=20.0, help="without --predict: take about so long (default 20)")
    one.add_argument("--rounds", metavar="N", type=int, default=4, help="with --predict: turns of calibration and job (default 4)")
    one.add_argument("--folder", metavar="DIR", help="measure reads of a scratch file here (default: the temporary folder, or the image's)")
    one.add_argument("--disk", metavar="IMAGE", help="with --predict: a raw image file or block device; default: memory")
    one.add_argument("--set", metavar="PART=VALUE", action="append", default=[], dest="settings", help="with --predict: as in vblk run")
    one.add_argument("--html", metavar="FILE", help="with --predict: write the figure, model and measurement on one axis")
    one.add_argument("--quiet", action="store_true", help="print no progress")
    one.set_defaults(command=lambda args: _calibrate(args, recipe))


def _calibrate(args: argparse.Namespace, recipe: Callable[[argparse.Namespace], Pipeline]) -> int:
    from .kvm import host
    from .lab.calibrate import calibrate

    _check(args)
    progress = sys.stderr.isatty() and not args.quiet
    works, why, gain = host.found()
    if not works and not args.quiet:
        print(f"vblk: without KVM: {why}. To gain it: {gain}", file=sys.stderr)
    if args.job is not None:
        return _predict(args, recipe(args), progress, works)
    table = calibrate(_machine(args.machine), seconds=args.seconds, folder=args.folder, progress=progress)
    print(table)
    _save(table, args.out)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Find out before the measurement what could not be done after it."""
    if args.job is None and (args.settings or args.disk or args.html):
        raise ConfigError("--set, --disk and --html belong to --predict", "add --predict JOB.fio")
    for name in ("out", "html"):
        value = getattr(args, name)
        if value is not None and (Path(value).is_dir() or not Path(value).parent.is_dir()):
            raise ConfigError(f"--{name} {value!r} is no file in a folder that is there", "choose another name")


def _machine(name: str | None) -> Any:
    from .machine.kvm import KvmMachine
    from .machine.live import LiveMachine

    if name is None:
        return None
    return KvmMachine() if name == "kvm" else LiveMachine()


def _predict(args: argparse.Namespace, recipe: Pipeline, progress: bool, kvm_works: bool) -> int:
    from .lab.predict import predict

    machine = _machine(args.machine or ("kvm" if kvm_works else "live"))
    report = predict(recipe, machine, rounds=args.rounds, folder=args.folder, progress=progress)
    print(report)
    _save(report.table, args.out)
    if args.html:
        report.figure().write_html(args.html, include_plotlyjs=True)
        print(f"wrote {args.html}")
    return 0 if report.met else _MISSED


def _save(table: Any, path: str | None) -> None:
    if path is not None:
        print(f"wrote {table.save(path)}")


# -- a table in vblk run -----------------------------------------------------------------------------------------------------------


def add_costs(parser: argparse.ArgumentParser) -> None:
    """``--costs`` and ``--like`` of the commands that simulate."""
    parser.add_argument("--costs", metavar="FILE.csv", help="sim: the cost table, as vblk calibrate --out writes it")
    parser.add_argument("--like", choices=("live", "kvm"), help="sim: simulate that machine; --costs has its rows")


def costs_of(args: argparse.Namespace) -> dict[str, Any]:
    """Options for SimMachine; ConfigError if another machine was chosen."""
    if args.machine != "sim" and (args.costs or args.like):
        raise ConfigError("--costs and --like are for the simulator", "leave out --machine, or leave them out")
    from .machine.costs import CostTable

    return {"costs": CostTable.load(args.costs) if args.costs is not None else None, "like": _machine(args.like)}
