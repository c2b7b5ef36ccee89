"""``vblk serve``: an image as a disk for QEMU, or for any vhost-user front-end."""

from __future__ import annotations

import argparse
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from .errors import ConfigError, NotHere

__all__ = ["add_serve"]

_ENGINES = ("sync", "threads", "mmap", "io_uring")
CACHES = ("writeback", "writethrough", "none", "directsync", "unsafe")
_EVERY_S = 1.0
_EPILOG = """\
It serves until Ctrl-C or SIGTERM, one guest after another: a guest may disconnect, reboot or reconnect at any time.
The line for QEMU that it prints is whole but for the guest's own disk and kernel.  Growing the image and sending SIGHUP
makes the new size known to the guest.
"""


def add_serve(commands: Any, raw: Any, count: Callable[[str], int]) -> None:
    """The command's arguments."""
    serve = commands.add_parser(
        "serve",
        help="an image as a disk for QEMU",
        description="Serve an image over vhost-user.",
        epilog=_EPILOG,
        formatter_class=raw,
    )
    serve.add_argument("image", metavar="IMAGE", help="a raw image file or block device")
    serve.add_argument("--socket", metavar="PATH", required=True, help="the unix socket to listen on")
    serve.add_argument("--queues", metavar="N", type=count, default=1, help="virtqueues (default 1); QEMU's num-queues may be as many")
    serve.add_argument("--queue-size", metavar="N", type=count, default=1024, help="largest virtqueue accepted (default 1024)")
    serve.add_argument("--read-only", action="store_true", help="the guest may not write")
    serve.add_argument("--cache", choices=CACHES, default="writeback", help="as QEMU's cache= (default writeback)")
    serve.add_argument("--engine", choices=_ENGINES, default="sync", help="how the image is read and written (default sync)")
    serve.add_argument("--path", choices=("auto", "plain", "batch"), default="auto", help="auto: the fastest there is")
    serve.add_argument("--poll-us", metavar="US", type=float, default=0.0, help="look for work so long before sleeping (default 0)")
    serve.add_argument("--discard", action=argparse.BooleanOptionalAction, default=True, help="offer DISCARD and WRITE_ZEROES")
    serve.add_argument("--serial", metavar="TEXT", default="vblklab", help="what GET_ID answers, up to 20 bytes")
    serve.add_argument("--block-size", metavar="BYTES", type=count, default=512, help="logical block size (default 512)")
    serve.add_argument("--quiet", action="store_true", help="print no counters and no connections")
    serve.set_defaults(command=_serve)


def _serve(args: argparse.Namespace) -> int:
    from .device import VirtioBlkDevice
    from .disk import ImageFile
    from .engine import ENGINES
    from .machine.live import live_missing
    from .machine.serve import qemu_arguments
    from .machine.vhost_server import VhostServer
    from .vhost.channel import listen

    missing = live_missing()
    if missing:
        raise NotHere(missing)
    if args.poll_us < 0:
        raise ConfigError(f"--poll-us {args.poll_us:g}", "give 0 or more microseconds")
    device = VirtioBlkDevice(
        queues=args.queues,
        queue_size_max=args.queue_size,
        read_only=args.read_only,
        serial=args.serial,
        block_size=args.block_size,
        discard=args.discard,
        write_cache=args.cache not in ("writethrough", "directsync"),
    )
    engine = ENGINES[args.engine]()
    store = ImageFile(args.image, read_only=args.read_only, cache=args.cache).open()
    try:
        if store.size % args.block_size:
            raise ConfigError(f"--block-size {args.block_size} on an image of {store.size:,} bytes", "the image must be whole blocks")
        listener = listen(args.socket)
    except BaseException:
        store.close()
        raise
    say = _Say(args.quiet)
    try:
        server = VhostServer(device, engine, store, listener, poll_us=args.poll_us, path=args.path, log=say.line)
    except BaseException:
        listener.close()
        Path(args.socket).unlink(missing_ok=True)
        store.close()
        raise
    try:
        with _Signals(server):  # before anything is said: whoever reads it may signal at once
            say.line(f"serving {args.image} ({store.size:,} bytes) at {args.socket}; {'; '.join(server.explain())}")
            line = " ".join(qemu_arguments(args.socket, queues=args.queues, queue_size=min(args.queue_size, 128)))
            say.line(f"attach it with: qemu-system-x86_64 {line}")
            say.begin(server.counters())
            while not server.stopped:
                server.turn(_EVERY_S)
                say.counters(server.counters)
        say.line("stopped")
        say.total(server.counters())
    finally:
        server.close()
        Path(args.socket).unlink(missing_ok=True)
    return 0


class _Signals:
    """SIGINT and SIGTERM end the loop, SIGHUP looks at the image's size again; a wake-up fd interrupts the loop's sleep."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._wake, self._wakes = socket.socketpair()
        for end in (self._wake, self._wakes):
            end.setblocking(False)

    def __enter__(self) -> None:
        server = self._server
        self._before = {
            signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: server.stop()),
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: server.stop()),
            signal.SIGHUP: signal.signal(signal.SIGHUP, lambda number, frame: server.look_at_size()),
        }
        self._fd = signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        server.loop.watch(self._wake.fileno(), lambda: self._wake.recv(64))

    def __exit__(self, *what: object) -> None:
        signal.set_wakeup_fd(self._fd)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._server.loop.unwatch(self._wake.fileno())
        self._wake.close()
        self._wakes.close()


class _Say:
    """Lines on standard error, and once a second the counters in place on a terminal."""

    def __init__(self, quiet: bool, out: TextIO | None = None) -> None:
        self._quiet = quiet
        self._out = out or sys.stderr
        self._live = not quiet and self._out.isatty()
        self._shown = False
        self._last: dict[str, int] = {}
        self._at = 0.0

    def line(self, text: str) -> None:
        if self._quiet:
            return
        if self._shown:
            self._out.write("\r\x1b[K")
            self._shown = False
        print(f"vblk: {text}", file=self._out, flush=True)

    def begin(self, counts: dict[str, int]) -> None:
        self._last, self._at = counts, time.monotonic()

    def counters(self, read: Callable[[], dict[str, int]]) -> None:
        """Requests, kicks and interrupts a second since the last line."""
        now = time.monotonic()
        if not self._live or now - self._at < _EVERY_S:
            return
        counts = read()
        rate = {name: (counts[name] - self._last[name]) / (now - self._at) for name in ("requests", "kicks", "notifies")}
        self._last, self._at = counts, now
        text = f"{rate['requests']:,.0f} requests/s  {rate['kicks']:,.0f} kicks/s  {rate['notifies']:,.0f} interrupts/s"
        self._out.write(f"\r\x1b[K{text}  (total {counts['requests']:,})")
        self._out.flush()
        self._shown = True

    def total(self, counts: dict[str, int]) -> None:
        self.line(", ".join(f"{name} {value:,}" for name, value in counts.items()))
