"""``vblk``: run fio jobs, list trace points and ask what this machine offers, in a terminal.

Exit status: 0 all went well, 1 I/Os failed or verify found other bytes, 2 a typed error or a wrong command line,
130 ended by Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from ._version import __version__
from .cli_calibrate import add_calibrate, add_costs, costs_of
from .cli_ring import add_ring
from .cli_serve import add_serve
from .errors import ConfigError, VblkError

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .trace.run import Run, TraceEvent

__all__ = ["main"]

OK, FAILED, WRONG, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141
_BAR_AFTER_S, _LINE_EVERY_S = 1.0, 10.0

_EPILOG = """\
an example job, to be saved as randread.fio (more in data/jobs):
  [randread]
  rw=randread
  bs=4k
  iodepth=8
  number_ios=10000

then:
  vblk run randread.fio                                 simulated
  vblk run randread.fio --set kvm.kick=mmio-exit        another kick
  vblk run randread.fio --machine live --html run.html  for real, with a report
  vblk run randread.fio --machine kvm                   the doorbell and the interrupt through a real VM
  vblk trace randread.fio --ios 1                       every trace point of one I/O
  vblk ring --queue packed:8 --play                     a virtqueue, frame by frame
  vblk serve disk.img --socket disk.sock                the image as a disk for QEMU
  vblk calibrate --predict randread.fio                 predict the job on this machine, run it, compare
  vblk doctor                                           what this machine offers
"""
_SETTINGS = """\
parts for --set (it may be given more than once):
  kvm.kick=mmio-exit       ioeventfd or mmio-exit
  kvm.call=intx            irqfd, intx, or msi with transport=pci
  transport=pci            mmio or pci; transport.vectors=2
  queue=128                entries of each virtqueue
  device.queues=2          virtqueues; device.write_cache, device.read_only, …
  driver.poll=true         poll for completions instead of interrupts
  iostack.max_sectors=64   the guest's block layer; host_iostack.… is the host's
  disk=ram                 nvme, ram or an image file; disk.model=P3700, disk.read_us=80, …
  engine=sync              simulated or sync

exit status: 0 all went well, 1 I/O errors or verify mismatches, 2 an error in what was asked for, 130 ended by Ctrl-C
(with what was measured so far).
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal without UTF-8 shows ? for µ
    try:
        args = _parser().parse_args(argv)
        status: int = args.command(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except SystemExit as end:  # --help, --version or a wrong command line
        return end.code if isinstance(end.code, int) else WRONG
    except VblkError as error:
        _say(" ".join(str(error).split()))
        return WRONG
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return PIPE_CLOSED
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _discard_stdout()
        _say("the output could not be written: no space is left")
        return WRONG
    return status


def _say(text: str) -> None:
    print(f"vblk: {text}", file=sys.stderr)


def _discard_stdout() -> None:
    """Nobody takes our output any more (``| head``): let the rest go nowhere, also at the interpreter's end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


# -- the command line --------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _say(f"{message} (try {self.prog} --help)")
        raise SystemExit(WRONG)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="vblk", description="The path of one virtio-blk I/O through a virtual machine.", epilog=_EPILOG, formatter_class=raw
    )
    parser.add_argument("--version", action="version", version=f"vblklab {__version__}")
    parser.set_defaults(command=lambda _: _usage(parser))
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", parser_class=_Parser)

    run = commands.add_parser("run", help="run a fio job file", description="Run a fio job file.", epilog=_SETTINGS, formatter_class=raw)
    _add_job(run)
    run.add_argument("--json", metavar="FILE", help="write the result as fio's JSON; - is stdout, and then nothing else is printed there")
    run.add_argument("--html", metavar="FILE", help="write a report with figures that needs no network")
    run.add_argument("--quiet", action="store_true", help="print no progress and no result")
    run.set_defaults(command=_run)

    trace = commands.add_parser(
        "trace", help="a line for each trace point", description="Print a line for each trace point.", epilog=_SETTINGS, formatter_class=raw
    )
    _add_job(trace)
    trace.add_argument("--ios", metavar="N", type=_count, default=3, help="until the first N I/Os are done (default 3)")
    trace.set_defaults(command=_trace)

    add_calibrate(commands, raw, _recipe)
    add_ring(commands, raw, _recipe)
    add_serve(commands, raw, _count)

    doctor = commands.add_parser(
        "doctor", help="what this machine offers", description="Say which rungs of the ladder this machine offers."
    )
    doctor.set_defaults(command=_doctor)
    return parser


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB.fio", help="a fio job file")
    parser.add_argument("--disk", metavar="IMAGE", help="a raw image file or block device; default: a modelled NVMe drive, all zeroes")
    parser.add_argument(
        "--machine", choices=("sim", "live", "kvm"), default="sim", help="simulated (default), live on this host, or live through a real VM"
    )
    parser.add_argument("--set", metavar="PART=VALUE", action="append", default=[], dest="settings", help="exchange a part, see below")
    parser.add_argument("--seed", metavar="N", type=int, help="sim: another seed (default 1)")
    add_costs(parser)
    parser.add_argument("--thread", action="store_true", help="live: the device in a thread instead of a process of its own")
    parser.add_argument("--kernel-trace", action="store_true", help="live and kvm: record the host kernel's events beside the run, as root")
    parser.add_argument(
        "--trace", metavar="N", type=_count, help="sim: keep the first N trace points (default 4000); live: 0 switches tracing off"
    )


def _count(text: str) -> int:
    try:
        number = int(text.replace("_", "").replace(",", ""))
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return number


def _usage(parser: argparse.ArgumentParser) -> int:
    parser.print_help(sys.stderr)
    return WRONG


def _recipe(args: argparse.Namespace) -> Pipeline:
    from .disk import ImageFile
    from .guest.fio import Fio
    from .pipeline import Pipeline

    app = Fio.load(args.job) if args.job is not None else Fio(rw="randread", bs=4096, iodepth=2, number_ios=8)
    pipeline = Pipeline(app=app)
    if args.disk is not None:
        pipeline = pipeline.replace(disk=ImageFile(args.disk))
    for setting in args.settings:
        pipeline = pipeline.set(setting)
    return pipeline


def _machine(args: argparse.Namespace) -> Any:
    costs = costs_of(args)
    if args.machine == "sim":
        if args.kernel_trace:
            raise ConfigError("--kernel-trace is for the live machines", "add --machine live or --machine kvm")
        if args.thread:
            raise ConfigError("--thread is for the live machines", "add --machine live or --machine kvm")
        from .machine.sim import SimMachine

        return SimMachine(1 if args.seed is None else args.seed, trace=4000 if args.trace is None else args.trace, **costs)
    if args.seed is not None:
        raise ConfigError(
            "--seed is for the simulator", "leave it out: live times are measured; randseed= in the job chooses other offsets"
        )
    from .machine.kvm import KvmMachine
    from .machine.live import LiveMachine

    machine = KvmMachine if args.machine == "kvm" else LiveMachine
    return machine(device="thread" if args.thread else "process", trace=args.trace != 0, kernel_trace=args.kernel_trace)


# -- vblk run ----------------------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    _check_outputs(args, getattr(recipe.disk, "path", None))
    with contextlib.closing(recipe.boot(_machine(args))) as vm, _Progress(args.quiet) as progress:
        run: Run = vm.run(progress=progress)
    out = sys.stderr if args.json == "-" else sys.stdout
    if not args.quiet:
        print(run.summary(), file=out)
        if run.ios:
            print(f"\n{run.step_table()}", file=out)
    if args.json:
        _write(args.json, _json(run), out, args.quiet)
    if args.html:
        from .view.report import report

        _write(args.html, report(run), out, args.quiet)
    if run.interrupted:
        _say("interrupted; this is what was measured so far")
        return INTERRUPTED
    if run.errors or run.mismatches:
        _say(f"{run.errors:,} I/O errors, {run.mismatches:,} sectors differ from what was written")
        return FAILED
    return OK


def _json(run: Run) -> str:
    import json

    return json.dumps(run.fio_json(), indent=2, allow_nan=False) + "\n"


def _check_outputs(args: argparse.Namespace, image: str | None) -> None:
    """Find out before the run what could not be written after it, and protect what the run reads."""
    given = [(name, value) for name in ("json", "html") if (value := getattr(args, name)) is not None and (name, value) != ("json", "-")]
    for name, value in given:
        path = Path(value)
        if not value or path.is_dir():
            raise ConfigError(f"--{name} {value!r} is no file name", f"for example --{name} result.{name}")
        if not path.parent.is_dir():
            raise ConfigError(f"--{name} {value}: there is no folder {str(path.parent)!r}", "make it first")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError(f"--{name} {value} cannot be written", "choose another folder or change its permissions")
        for other in (args.job, image, *(v for n, v in given if n != name)):
            if other is not None and _same(path, Path(other)):
                raise ConfigError(f"--{name} {value} would overwrite {other}", "choose another name")


def _same(path: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.samefile(other)
    return path.absolute() == other.absolute()


def _write(target: str, text: str, out: TextIO, quiet: bool) -> None:
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{target} could not be written: {error.strerror}", "choose another folder") from None
    if not quiet:
        print(f"wrote {target}", file=out)


class _Progress:
    """Called as ``progress(done, total)`` by a machine: a bar on a terminal once the run is a second old, else a line now and then."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._terminal = sys.stderr.isatty()
        self._line_at = time.monotonic() + _LINE_EVERY_S

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int | None) -> None:
        if self._quiet:
            return
        if not self._terminal:
            if time.monotonic() >= self._line_at:
                self._line_at = time.monotonic() + _LINE_EVERY_S
                _say(f"{done:,}{f' of {total:,}' if total else ''} I/Os")
            return
        if self._bar is None:
            from tqdm import tqdm

            counted = "{percentage:3.0f} % |{bar}| {n:,} of {total:,} I/Os, {remaining} left" if total else "{n:,} I/Os, {elapsed}"
            columns = min(shutil.get_terminal_size().columns - 4, 100)  # room for the ^C that a terminal echoes
            self._bar = tqdm(total=total, bar_format=counted, ncols=columns, delay=_BAR_AFTER_S, leave=False, file=sys.stderr)
        self._bar.update(done - self._bar.n)


# -- vblk trace --------------------------------------------------------------------------------------------------------------


def _trace(args: argparse.Namespace) -> int:
    if args.trace == 0:
        raise ConfigError("vblk trace --trace 0", "leave --trace out")
    status = OK
    with contextlib.closing(_recipe(args).boot(_machine(args))) as vm:
        events: Iterable[TraceEvent]
        if args.machine != "sim":
            run = _run_some(vm, args.ios)
            status = INTERRUPTED if run.interrupted else OK
            kept = [event for event in run.trace or () if event.key != "wait"]
            start = next((event.t_ns for event in kept if event.key == _FIRST), 0)
            events = [event._replace(t_ns=event.t_ns - start) for event in kept]  # the host's clock has no zero of its own
        else:
            events = iter(vm.step, None)
        for event in _of_first_ios(events, args.ios):
            print(event)
    return status


def _run_some(vm: Any, ios: int) -> Run:
    """Run for real until so many I/Os are done; what was submitted meanwhile is done too."""

    def enough(done: int, _: int | None) -> None:
        if done >= ios:
            for task in vm.tasks:
                task.stop()

    run: Run = vm.run(progress=enough)
    return run


_FIRST = "sys_enter_io_submit"


def _of_first_ios(events: Iterable[TraceEvent], ios: int) -> Iterator[TraceEvent]:
    """The trace points from the first submission until the application has reaped the first so many I/Os."""
    if not ios:
        return
    begun, open_ios = 0, set()
    for event in events:
        if event.key == _FIRST and begun < ios:
            begun += 1
            open_ios.add(event.args[0])
        if not begun:
            continue
        yield event
        if event.key == "block_bio_complete":
            open_ios.discard(event.args[0])
        elif event.key == "sys_exit_io_getevents" and begun == ios and not open_ios:
            return


# -- vblk doctor -------------------------------------------------------------------------------------------------------------


def _doctor(_: argparse.Namespace) -> int:
    from .lab.doctor import capabilities

    print(capabilities().text(min(shutil.get_terminal_size((110, 24)).columns, 120)))
    return OK
