"""A real guest's I/O, from its own ftrace and from the trace of the device below it: one row of stamps for each I/O.

Nothing in the two recordings names the same thing, so they are joined by what was asked for: direction, first sector and length, in order.
The guest's clock is then joined to the host's by causality, from the same requests (``trace.clock``).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import TraceError
from ..events import expand
from .clock import ClockFit, fit_clock
from .correlate import COLUMNS
from .ftrace import Record
from .qemu_log import QemuRecord
from .run import TraceEvent

__all__ = ["GuestIo", "GuestSide", "Joined", "Served", "device_side", "guest_side", "join", "qemu_side"]

_GUEST_SLACK_NS = 1000
"""ftrace prints whole µs, rounded."""
_Points = list[tuple[int, int, tuple[Any, ...]]]


@dataclass(slots=True)
class GuestIo:
    """A bio of the application, in the guest's time; 0 is not seen."""

    pid: int
    op: str
    sector: int
    left: int
    submit: int
    queue: int
    first: GuestRequest | None = None
    last: GuestRequest | None = None
    done: int = 0
    reaped: int = 0


@dataclass(slots=True)
class GuestRequest:
    """A block request of the guest, and who served it."""

    op: str
    sector: int
    count: int
    ios: list[GuestIo]
    taken: int = 0
    issued: int = 0
    added: int = 0
    kicked: int = 0
    interrupted: int = 0
    ended: int = 0
    vq: int = 0
    served: Served | None = None

    @property
    def asks(self) -> tuple[str, int, int]:
        return self.op, self.sector, self.count


@dataclass(slots=True)
class Served:
    """A request as the device saw it, in the host's time; 0 is not seen."""

    popped: int
    op: str = ""
    sector: int = 0
    count: int = 0
    submitted: int = 0
    returned: int = 0
    completed: int = 0
    filled: int = 0
    notified: int = 0
    signalled: int = 0


@dataclass
class GuestSide:
    """What the guest's recording holds: I/Os, requests in the order in which they were put on a ring, and trace points."""

    ios: list[GuestIo] = field(default_factory=list)
    requests: list[GuestRequest] = field(default_factory=list)
    points: _Points = field(default_factory=list)


@dataclass(frozen=True)
class Joined:
    """Rows (n, 16) in host ns, the trace on the host's clock, and what could not be joined."""

    rows: list[list[int]]
    events: list[TraceEvent]
    clock: ClockFit
    ios: int
    unmatched: int


# -- the guest -----------------------------------------------------------------------------------------------------------------


class _Reader:
    """Follows the bios of one disk through the records."""

    def __init__(self, dev: str) -> None:
        self.dev = dev
        self.side = GuestSide()
        self._submitting: dict[int, int] = {}
        self._waiting: list[GuestIo] = []
        self._fresh: list[GuestRequest] = []
        self._issued: dict[int, deque[GuestRequest]] = defaultdict(deque)
        self._taken: dict[int, int] = {}
        self._flying: dict[tuple[str, int], deque[GuestRequest]] = defaultdict(deque)
        self._newest: dict[int, GuestRequest] = {}
        self._interrupt: dict[int, int] = {}
        self._ended: dict[int, deque[GuestIo]] = defaultdict(deque)
        self._numbers: dict[int, int] = {}

    def read(self, record: Record) -> None:
        if record.name == "sched_switch":
            self.side.points.append((record.t_ns, record.cpu, ("wait",)))  # whoever goes on has its own points
            return
        handler = _HANDLERS.get(record.name)
        if handler is None or record.args.get("dev", self.dev) != self.dev:
            return
        vq = record.args.get("vq")
        if vq is not None and record.name != "virtqueue_add_sgs" and vq not in self._newest:
            return  # another device's queue
        if handler(self, record) is not False:
            self._point(record)

    def _point(self, record: Record) -> None:
        key, names = _KEYS[record.name]
        values = [record.args.get(name, 0) for name in names]
        self.side.points.append((record.t_ns, record.cpu, (key, *map(self._small, names, values))))

    def _small(self, name: str, value: Any) -> int:
        """A pointer as a number of its own, in the order of appearance."""
        return self._numbers.setdefault(int(value), len(self._numbers)) if name in ("vq", "data", "rq", "first") else int(value)

    # each returns False for a record that is not the disk's

    def submit(self, record: Record) -> None:
        self._submitting[record.pid] = record.t_ns

    def submitted(self, record: Record) -> None:
        self._submitting.pop(record.pid, None)

    def bio(self, record: Record) -> None:
        op = _op(record)
        if op:
            io = GuestIo(record.pid, op, _int(record, "sector"), _int(record, "nr_sector"), 0, record.t_ns)
            io.submit = self._submitting.get(record.pid, record.t_ns)
            self._waiting.append(io)
            self.side.ios.append(io)

    def _covering(self, op: str, sector: int) -> GuestIo | None:
        for io in reversed(self._waiting):
            if io.op == op and io.sector <= sector < io.sector + io.left:
                return io
        return None

    def getrq(self, record: Record) -> None:
        op, sector, count = _op(record), _int(record, "sector"), _int(record, "nr_sector")
        io = self._covering(op, sector)
        if io is not None:
            self._fresh.append(GuestRequest(op, sector, count, [io]))

    def merge(self, record: Record) -> None:
        op, sector, count = _op(record), _int(record, "sector"), _int(record, "nr_sector")
        io = self._covering(op, sector)
        for request in reversed(self._fresh):
            if request.op == op and io is not None and sector in (request.sector + request.count, request.sector - count):
                request.sector = min(request.sector, sector)
                request.count += count
                request.ios.append(io)
                return

    def take(self, record: Record) -> None:
        self._taken[record.cpu] = record.t_ns

    def issue(self, record: Record) -> None:
        op, sector, count = _op(record), _int(record, "sector"), _int(record, "nr_sector")
        for at in range(len(self._fresh) - 1, -1, -1):
            request = self._fresh[at]
            if request.op == op and request.sector == sector:
                del self._fresh[at]
                request.count = count
                request.issued = record.t_ns
                request.taken = self._taken.get(record.cpu, record.t_ns)
                self._issued[record.cpu].append(request)
                self._flying[op, sector].append(request)
                self.side.requests.append(request)
                for io in request.ios:
                    io.first = io.first or request
                return

    def add(self, record: Record) -> bool:
        queue = self._issued[record.cpu]
        if not queue:
            return False
        request = queue.popleft()
        request.added, request.vq = record.t_ns, _int(record, "vq")
        self._newest[request.vq] = request
        return True

    def kick(self, record: Record) -> None:
        request = self._newest[_int(record, "vq")]
        request.kicked = request.kicked or record.t_ns

    def interrupt(self, record: Record) -> None:
        self._interrupt[_int(record, "vq")] = record.t_ns

    def nothing(self, record: Record) -> None: ...

    def complete(self, record: Record) -> None:
        op, sector, count = _op(record), _int(record, "sector"), _int(record, "nr_sector")
        flying = self._flying.get((op, sector))
        if not flying:
            return
        request = flying.popleft()
        request.ended = record.t_ns
        seen = self._interrupt.get(request.vq, 0)
        request.interrupted = seen if seen >= request.added else 0
        for io in request.ios:
            low, high = max(io.sector, sector), min(io.sector + io.left, sector + count)
            if low == io.sector:
                io.sector, io.left = high, io.left - (high - low)  # parts end from the front, or all at once
            else:
                io.left -= high - low
            io.last = request
            if not io.left:
                io.done = record.t_ns
                self._waiting.remove(io)
                self._ended[io.pid].append(io)

    def reap(self, record: Record) -> None:
        ended = self._ended[record.pid]
        for _ in range(min(_int(record, "ret"), len(ended))):
            ended.popleft().reaped = record.t_ns


_HANDLERS: dict[str, Callable[[_Reader, Record], bool | None]] = {
    "sys_enter_io_submit": _Reader.submit,
    "sys_exit_io_submit": _Reader.submitted,
    "block_bio_queue": _Reader.bio,
    "block_getrq": _Reader.getrq,
    "block_bio_backmerge": _Reader.merge,
    "block_bio_frontmerge": _Reader.merge,
    "virtio_queue_rq": _Reader.take,
    "virtio_queue_rqs": _Reader.take,
    "block_rq_issue": _Reader.issue,
    "virtqueue_add_sgs": _Reader.add,
    "virtqueue_kick_prepare": _Reader.nothing,
    "vp_notify": _Reader.kick,
    "vring_interrupt": _Reader.interrupt,
    "virtblk_done": _Reader.nothing,
    "block_rq_complete": _Reader.complete,
    "sys_exit_io_getevents": _Reader.reap,
    "sys_exit_io_pgetevents": _Reader.reap,
}
# The trace point of ours that each record is, and its arguments in the record.
_KEYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sys_enter_io_submit": ("guest:sys_enter_io_submit", ("nr",)),
    "sys_exit_io_submit": ("guest:sys_exit_io_submit", ("ret",)),
    "block_bio_queue": ("guest:block_bio_queue", ("sector", "nr_sector")),
    "block_getrq": ("guest:block_getrq", ("sector", "nr_sector")),
    "block_bio_backmerge": ("guest:block_bio_backmerge", ("sector", "nr_sector")),
    "block_bio_frontmerge": ("guest:block_bio_frontmerge", ("sector", "nr_sector")),
    "virtio_queue_rq": ("guest:virtio_queue_rq", ("rq",)),
    "virtio_queue_rqs": ("virtio_queue_rqs", ("first",)),
    "block_rq_issue": ("block_rq_issue", ("sector", "nr_sector")),
    "virtqueue_add_sgs": ("guest:virtqueue_add_sgs", ("vq", "data")),
    "virtqueue_kick_prepare": ("virtqueue_kick_prepare", ("vq",)),
    "vp_notify": ("vp_notify", ("vq",)),
    "vring_interrupt": ("vring_interrupt", ("vq",)),
    "virtblk_done": ("virtblk_done", ("vq",)),
    "block_rq_complete": ("guest:block_rq_complete", ("sector", "nr_sector")),
    "sys_exit_io_getevents": ("guest:sys_exit_io_getevents", ("ret",)),
    "sys_exit_io_pgetevents": ("guest:sys_exit_io_getevents", ("ret",)),
}


def _op(record: Record) -> str:
    """R or W; anything else moves no data that a device would name by sector and length."""
    letters = str(record.args.get("rwbs", ""))
    return next((letter for letter in letters if letter in "RWD"), "").replace("D", "")


def _int(record: Record, name: str) -> int:
    value = record.args.get(name, 0)
    return value if isinstance(value, int) else 0


def guest_side(records: Iterable[Record], dev: str) -> GuestSide:
    """Follow the disk ``dev`` (``254,0``) through a guest's records."""
    reader = _Reader(dev)
    for record in records:
        reader.read(record)
    return reader.side


# -- the device ----------------------------------------------------------------------------------------------------------------


class _Device:
    """Collects what a device reports of its requests, whichever device it is."""

    def __init__(self) -> None:
        self.served: list[Served] = []
        self._now: dict[int, Served] = {}
        self._last: Served | None = None

    def pop(self, t: int, key: int) -> None:
        self._now[key] = one = Served(t)
        self.served.append(one)

    def accept(self, t: int, key: int, op: str, sector: int, count: int) -> None:
        one = self._now.get(key)
        if one is None or one.op:
            self.pop(t, key)
            one = self._now[key]
        one.op, one.sector, one.count = op, sector, count

    def mark(self, t: int, key: int, what: str) -> None:
        one = self._now.get(key)
        if one is not None and not getattr(one, what):
            setattr(one, what, t)
            if what == "filled":
                self._last = one

    def notify(self, t: int, what: str) -> None:
        if self._last is not None and not getattr(self._last, what):
            setattr(self._last, what, t)


_OURS = {
    "host:sys_enter_preadv64": "submitted",
    "host:sys_exit_preadv64": "returned",
    "virtio_blk_rw_complete": "completed",
    "virtqueue_fill": "filled",
}


def device_side(log: Iterable[tuple[int, int, tuple[Any, ...]]]) -> tuple[list[Served], _Points]:
    """The requests in the log of a device of ours, and its single points; both in host ns."""
    device = _Device()
    points: _Points = []
    for t, number, ev in log:
        for one in expand(ev):
            key = one[0]
            points.append((t, number, one))
            if key == "virtqueue_pop":
                device.pop(t, one[1])
            elif key in ("virtio_blk_handle_read", "virtio_blk_handle_write"):
                device.accept(t, one[1], "R" if key.endswith("read") else "W", one[2], one[3])
            elif key in _OURS:
                device.mark(t, one[1], _OURS[key])
            elif key in ("virtio_notify", "virtio_notify_irqfd"):
                device.notify(t, "notified")
            elif key == "kvm_set_irq":
                device.notify(t, "signalled")
    return device.served, points


def qemu_side(records: Iterable[QemuRecord], realtime_minus_host_ns: int) -> tuple[list[Served], _Points]:
    """The requests in the log of QEMU's own device; times are moved from CLOCK_REALTIME to the host's clock."""
    records = list(records)
    disks = [record.args.get("vdev") for record in records if record.name in ("virtio_blk_handle_read", "virtio_blk_handle_write")]
    if not disks:
        raise TraceError("QEMU's log has no request of a disk", "enable the trace events virtio_blk_*")
    device = _Device()
    points: _Points = []
    numbers: dict[int, int] = {}
    engine: dict[int, int] = {}
    for record in records:
        args, name = record.args, record.name
        t = record.t_ns - realtime_minus_host_ns
        if name in ("blk_co_preadv", "blk_co_pwritev"):
            for key, one in device._now.items():
                offset = one.sector << 9
                if not one.submitted and args.get("offset", -1) <= offset < args.get("offset", -1) + args.get("bytes", 0):
                    device.mark(t, key, "submitted")
                    points.append((t, record.thread, (name, numbers.get(key, 0))))
            continue
        if args.get("vdev") != disks[0]:
            continue
        key = args.get("req", 0)
        if name in ("virtio_blk_handle_read", "virtio_blk_handle_write"):
            device.accept(t, key, "R" if name.endswith("read") else "W", args.get("sector", 0), args.get("nsectors", 0))
        elif name == "virtio_blk_rw_complete":
            device.mark(t, key, "completed")
        elif name == "virtio_blk_req_complete":
            device.mark(t, key, "filled")
        elif name in ("virtio_notify", "virtio_notify_irqfd"):
            device.notify(t, "notified")
        if name in _QEMU_KEYS:
            number = numbers.setdefault(key, len(numbers)) if key else engine.setdefault(args.get("vq", 0), len(engine))
            rest = [args[each] for each in _QEMU_KEYS[name] if each in args]
            points.append((t, record.thread, (name, number, *rest)))
    return device.served, points


_QEMU_KEYS = {
    "virtio_queue_notify": (),
    "virtio_blk_handle_read": ("sector", "nsectors"),
    "virtio_blk_handle_write": ("sector", "nsectors"),
    "virtio_blk_rw_complete": ("ret",),
    "virtio_blk_req_complete": ("status",),
    "virtio_notify": (),
    "virtio_notify_irqfd": (),
}


# -- both ----------------------------------------------------------------------------------------------------------------------


def join(
    guest: GuestSide,
    served: Sequence[Served],
    points: _Points,
    *,
    pairs: Iterable[tuple[int, int, int]] = (),
    host_slack_ns: int = 0,
) -> Joined:
    """One row for each I/O of the guest whose requests the device reports.

    ``pairs`` are (host ns before, guest ns, host ns after) of marks that were asked for from the host: more bounds for the clock.
    ``host_slack_ns`` is how coarse the device's times are.
    """
    by_asks: dict[tuple[str, int, int], deque[Served]] = defaultdict(deque)
    for one in served:
        if one.op:
            by_asks[one.op, one.sector, one.count].append(one)
    before, after = [], []
    slack = _GUEST_SLACK_NS + host_slack_ns
    for request in guest.requests:
        answers = by_asks.get(request.asks)
        if not request.ended or not answers:
            continue
        request.served = answer = answers.popleft()
        before.append((request.added or request.issued, answer.popped + slack))
        if answer.filled:
            after.append((request.ended, answer.filled - slack))
    for first, mark, last in pairs:
        before.append((mark, last + _GUEST_SLACK_NS))
        after.append((mark, first - _GUEST_SLACK_NS))
    if not any(request.served for request in guest.requests):
        raise TraceError("no request of the guest is in the device's trace", "record both sides of one run, of the same disk")
    times = [request.ended for request in guest.requests if request.served] + [io.submit for io in guest.ios if io.done]
    clock = fit_clock(before, after, (min(times), max(times)))
    done = [io for io in guest.ios if io.done]
    rows = [row for io in done if (row := _row(io, clock)) is not None]
    return Joined(rows, _events(guest, points, clock), clock, len(done), len(done) - len(rows))


def _row(io: GuestIo, clock: ClockFit) -> list[int] | None:
    first, last = io.first, io.last
    if first is None or last is None or first.served is None or last.served is None:
        return None

    def host(guest_ns: int) -> int:
        return clock.host_ns(guest_ns) if guest_ns else 0

    down, up = first.served, last.served
    ring = host(first.kicked)
    row = [0] * COLUMNS
    row[0:3] = [host(io.submit), host(io.queue), host(first.taken)]
    row[3] = ring if ring and ring <= down.popped else host(first.added or first.issued)
    row[4], row[5] = down.popped, down.submitted
    row[10] = up.completed
    ended, interrupted = host(last.ended), host(last.interrupted)
    row[11] = up.notified if 0 < up.notified <= ended else up.filled
    row[13] = interrupted if interrupted >= row[11] else ended
    row[12] = min(up.signalled, row[13])  # the guest may be quicker than who writes down that it was told
    row[14], row[15] = host(io.done), host(io.reaped or io.done)
    return row


def _events(guest: GuestSide, points: _Points, clock: ClockFit) -> list[TraceEvent]:
    events = []
    for t, cpu, (key, *args) in guest.points:
        events.append(TraceEvent(clock.host_ns(t), f"guest CPU {cpu}", f"vCPU {cpu}", key, tuple(args)))
    for t, _, (key, *args) in points:
        events.append(TraceEvent(t, "device", "iothread", key, tuple(args)))
    events.sort()
    return events
