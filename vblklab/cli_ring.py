"""``vblk ring``: a virtqueue as text, frame by frame, while a job runs in the simulator."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .trace.film import Film

__all__ = ["add_ring"]

_CLEAR = "\x1b[H\x1b[2J"
_EPILOG = """\
Without --frame and --play it lists the frames: one for each trace point at which the ring's memory changed.

  vblk ring                                         a small random read on a split ring of 8 entries
  vblk ring --queue packed:8 --play                 the same on a packed ring, played
  vblk ring randread.fio --queue split:16 --frame 3
  vblk ring --set device.event_idx=false            without event words; --set as in vblk run
"""


def add_ring(commands: Any, raw: Any, recipe: Callable[[argparse.Namespace], Pipeline]) -> None:
    """The command's arguments; ``recipe`` makes a Pipeline of those that all commands share."""
    ring = commands.add_parser(
        "ring",
        help="a virtqueue as text, frame by frame",
        description="Show a virtqueue as text, frame by frame, while a job runs in the simulator.",
        epilog=_EPILOG,
        formatter_class=raw,
    )
    ring.add_argument("job", metavar="JOB.fio", nargs="?", help="a fio job file; default: 8 random reads of 4 KiB, 2 at a time")
    ring.add_argument("--queue", metavar="KIND:SIZE", help="split:8 or packed:8; default split:8, with a job its recipe's queue")
    ring.add_argument("--virtqueue", metavar="N", type=int, default=0, help="which of the device's virtqueues (default 0)")
    ring.add_argument("--steps", metavar="N", type=int, default=400, help="film so many trace points (default 400)")
    what = ring.add_mutually_exclusive_group()
    what.add_argument("--frame", metavar="N", type=int, help="print this frame; -1 is the last")
    what.add_argument("--play", action="store_true", help="print all frames, on a terminal one after another in place")
    ring.add_argument("--rate", metavar="N", type=float, default=2.0, help="with --play: frames a second on a terminal (default 2)")
    ring.add_argument("--disk", metavar="IMAGE", help="a raw image file or block device; default: a modelled NVMe drive, all zeroes")
    ring.add_argument("--set", metavar="PART=VALUE", action="append", default=[], dest="settings", help="exchange a part, as in vblk run")
    ring.set_defaults(command=lambda args: _ring(args, recipe(args)))


def queue_of(text: str) -> Any:
    """The ``queue`` part that ``split:8`` or ``packed:8`` names; ConfigError for anything else."""
    from .pipeline import Packed, Split

    kind, _, size = text.partition(":")
    if kind not in ("split", "packed") or not size.isascii() or not size.isdigit():
        raise ConfigError(f"--queue {text!r}", "give split:8 or packed:8")
    return (Packed if kind == "packed" else Split)(int(size))


def _ring(args: argparse.Namespace, recipe: Pipeline) -> int:
    from .machine.sim import SimMachine
    from .trace.film import film

    if not 0 < args.rate <= 1000:
        raise ConfigError(f"--rate {args.rate:g}", "give frames a second, more than 0 and at most 1000")
    if args.queue is not None or args.job is None:
        recipe = recipe.replace(queue=queue_of(args.queue or "split:8"))
    with contextlib.closing(recipe.boot(SimMachine())) as vm:
        taken = film(vm, queue=args.virtqueue, steps=args.steps)
    if args.play:
        _play(taken, 1 / args.rate)
    elif args.frame is not None:
        print(taken.text(args.frame))
    else:
        print(taken)
    return 0


def _play(taken: Film, pause_s: float) -> None:
    terminal = sys.stdout.isatty()
    for number in range(len(taken)):
        if terminal:
            print(f"{_CLEAR}{taken.text(number)}", flush=True)
            time.sleep(pause_s)
        else:
            print(taken.text(number), end="\n\n")
