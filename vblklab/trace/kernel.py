"""The host kernel's own records as trace points of a run: its exits, interrupts and block requests, on the run's clock.

A machine logs what Python can see.  Where the kernel says the same (an exit, an interrupt's injection, a system call) its record takes
the place of that log entry; where only the kernel can see something, its record is a point of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .ftrace import Record
from .run import IN_KERNEL

__all__ = ["KERNEL", "KVM_EVENTS", "READS", "WRITES", "Kernel", "KernelJoin", "join_kernel", "kernel_points", "leaves"]

LogEntry = tuple[int, int, Any]
KERNEL = 2000
"""The first context number of the kernel's: one for each thread that was in it."""
KVM_EVENTS = (
    *("kvm_exit", "kvm_entry", "kvm_mmio", "kvm_fast_mmio", "kvm_userspace_exit", "kvm_set_irq", "kvm_msi_set_irq"),
    *("kvm_apic_accept_irq", "kvm_vcpu_wakeup", "kvm_inj_virq", "kvm_eoi"),
)
READS, WRITES = ("preadv", "pread64", "preadv2"), ("pwritev", "pwrite64", "pwritev2")
_ENTER, _EXIT = "host:sys_enter_preadv64", "host:sys_exit_preadv64"
_STAND_INS = frozenset(["kvm_userspace_exit", "kvm_set_irq", "kvm_msi_set_irq"])
_DELIVERY = frozenset(["kvm_apic_accept_irq", "kvm_vcpu_wakeup", "kvm_inj_virq"])
_EXITS = frozenset(["kvm_exit", "kvm_mmio", "kvm_userspace_exit"])
_READ_MMIO, _WRITE_MMIO = 1, 2  # KVM_TRACE_MMIO_READ, KVM_TRACE_MMIO_WRITE
_EXIT_MMIO, _EXIT_INTR = 6, 10
_WORKERS = frozenset(["kvm_set_irq", "kvm_msi_set_irq", "kvm_apic_accept_irq"])
_INTERRUPTS = frozenset(["irq_handler_entry", "block_rq_complete", "block_bio_complete"])


_IN_INTERRUPT = "interrupt, CPU "
_LAST = frozenset(
    [
        *("kvm_userspace_exit", "kvm_entry", "kvm_apic_accept_irq", "kvm_set_irq", "kvm_msi_set_irq", "kvm_eoi"),
        *("host:sys_exit_preadv64", "host:block_rq_complete", "host:block_bio_complete"),
    ]
)


def leaves(key: str, context: str) -> bool:
    """Whether this is the last that the kernel reports for the run, so that it does something else until the context's next point."""
    in_kernel = context.endswith(IN_KERNEL) or context.startswith(_IN_INTERRUPT)
    return key in _LAST if in_kernel else key == "vcpu:irq_handler_entry"


@dataclass(frozen=True)
class Kernel:
    """What was recorded beside a run.

    ``base`` and ``end`` enclose the device's registers, whose accesses are shown by their offset.  ``gsi`` is the run's interrupt line.
    ``until_ns`` is how long the record is whole, ``error_ns`` how far the guest's clock may be off.  ``threads`` names threads,
    ``pids`` are all of the run's.  ``line_irqfd``: an irqfd sets the line.  A kernel worker does that, for every VM of the host,
    and does not say for which: it is taken to be the run's if the device has written the irqfd and no injection has followed yet.
    """

    records: Sequence[Record]
    events: frozenset[str]
    base: int = 0
    end: int = 0
    gsi: int | None = None
    until_ns: int | None = None
    error_ns: int = 0
    threads: Mapping[int, str] = field(default_factory=dict)
    pids: frozenset[int] = frozenset()
    line_irqfd: bool = False


@dataclass(frozen=True)
class KernelJoin:
    """The run's log with the kernel's points in it, the names of their contexts, and how many records belong to no request."""

    log: list[LogEntry]
    names: dict[int, str]
    unmatched: int


def join_kernel(log: Iterable[LogEntry], kernel: Kernel) -> KernelJoin:
    """Put the kernel's points into ``log``, which is in the order of time and ends where the kernel's record does."""
    log = [entry for entry in log if kernel.until_ns is None or entry[0] <= kernel.until_ns]
    if not log:
        return KernelJoin([], {}, 0)
    join = _Join(kernel)
    first, last = log[0][0], log[-1][0]
    records = [record for record in kernel.records if first <= record.t_ns <= last]
    at = 0
    for entry in log:
        while at < len(records) and records[at].t_ns <= entry[0]:
            join.record(records[at])
            at += 1
        join.logged(entry)
    join.bound_handlers()
    entries = [(t, number, tuple(ev)) for t, number, ev in join.out if ev is not None]
    entries.sort(key=lambda entry: entry[0])
    return KernelJoin(entries, join.names, join.unmatched)


def kernel_points(records: Iterable[Record]) -> list[tuple[int, str, tuple[Any, ...]]]:
    """KVM's records of whatever ran: (ns, context, point).  An access is shown by its address."""
    join = _Join(Kernel((), frozenset()))
    for record in records:
        if record.name in KVM_EVENTS:
            join.record(record)
    return [(t, join.names[number], tuple(ev)) for t, number, ev in join.out]


class _Join:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.out: list[list[Any]] = []
        self.unmatched = 0
        self.names: dict[int, str] = {}
        self._numbers: dict[str, int] = {}
        self._written = False  # the irqfd, and no worker has injected it yet
        self._workers: set[int] = set()  # who is injecting one of ours
        self._stand_ins = _STAND_INS & kernel.events
        self._exit: dict[int, list[Any]] = {}  # thread → its last kvm_exit, which the access after it explains
        self._offset: dict[int, int] = {}
        self._asked: dict[int, bool] = defaultdict(bool)
        self._open: dict[int, list[Any]] = {}  # io → our entry of its system call
        self._sector: dict[int, int] = {}
        self._calling: dict[int, int] = {}  # thread → the io of the system call it is in
        self._rq = 0
        self._fresh: dict[int, deque[int]] = defaultdict(deque)  # sector → requests that were made there
        self._issued: dict[int, deque[int]] = defaultdict(deque)
        self._io_of: dict[int, int] = {}
        self._bios: dict[int, deque[int]] = defaultdict(deque)

    # -- what the machine logged -----------------------------------------------------------------------------------------------

    def logged(self, entry: LogEntry) -> None:
        t, number, ev = entry
        key = ev[0]
        if key in self._stand_ins:
            return
        self._written = self._written or (key == "virtio_notify_irqfd" and self.kernel.line_irqfd)
        kept = [t, number, ev]
        if key in ("pop_read", "pop_write", "virtio_blk_handle_read", "virtio_blk_handle_write"):
            self._sector[ev[1]] = ev[2]
        elif key == _ENTER:
            self._open[ev[1]] = kept
        elif key == _EXIT:
            mine = self._open.pop(ev[1], None)
            if mine is not None and mine[2] is None:
                return  # the kernel has said so
        self.out.append(kept)

    def bound_handlers(self) -> None:
        """A handler that the guest's clock has stamped began after its interrupt came, and before it first left the guest."""
        mine = [entry for entry in self.out if entry[1] >= KERNEL]
        delivered = sorted(entry[0] for entry in mine if entry[2][0] in _DELIVERY)
        exits = sorted(entry[0] for entry in mine if entry[2][0] in _EXITS)
        for entry in self.out:
            if entry[2] is None or entry[2][0] != "vcpu:irq_handler_entry":
                continue
            at = bisect_right(delivered, entry[0] + self.kernel.error_ns) - 1
            if at >= 0:
                left = bisect_right(exits, delivered[at])
                latest = exits[left] - 1 if left < len(exits) else entry[0]
                entry[0] = max(min(entry[0], latest), delivered[at])

    # -- what the kernel recorded ----------------------------------------------------------------------------------------------

    def record(self, record: Record) -> None:
        if (handler := _HANDLERS.get(record.name)) is not None:
            if record.name not in _WORKERS or self._is_ours(record):
                handler(self, record)
        elif record.name.startswith("sys_enter_"):
            self._enter(record)
        elif record.name.startswith("sys_exit_"):
            self._leave(record)

    def _is_ours(self, record: Record) -> bool:
        pids, pid = self.kernel.pids, record.pid
        if not pids or pid in pids:
            return True
        if record.name == "kvm_set_irq" and _int(record, "gsi") == self.kernel.gsi:
            if _int(record, "level") and self._written:
                self._written = False  # one injection stands for all that was written before it
                self._workers.add(pid)
                return True
            if pid in self._workers:
                self._workers.remove(pid)
                return True
        return record.name == "kvm_apic_accept_irq" and pid in self._workers

    def _point(self, record: Record, *ev: Any) -> list[Any]:
        point = [record.t_ns, self._context(record), list(ev)]
        self.out.append(point)
        return point

    def _context(self, record: Record) -> int:
        """Who was in the kernel: a thread, or whatever CPU took the drive's interrupt."""
        if record.name in _INTERRUPTS:
            name = f"{_IN_INTERRUPT}{record.cpu}"
        else:
            unknown = record.task or ("worker" if self.kernel.pids and record.pid not in self.kernel.pids else "thread")
            who = self.kernel.threads.get(record.pid) or f"{unknown} {record.pid}"
            name = f"{who}{IN_KERNEL}"
        number = self._numbers.setdefault(name, KERNEL + len(self._numbers))
        self.names[number] = name
        return number

    def _where(self, gpa: int) -> int:
        kernel = self.kernel
        return gpa - kernel.base if kernel.base <= gpa < kernel.end else gpa

    def exit(self, record: Record) -> None:
        self._exit[record.pid] = self._point(record, "kvm_exit", 0, _int(record, "isa") << 32 | _int(record, "exit_reason") & 0xFFFFFFFF)

    def entry(self, record: Record) -> None:
        self._exit.pop(record.pid, None)
        self._point(record, "kvm_entry")

    def mmio(self, record: Record) -> None:
        kind, pid, offset = _int(record, "type"), record.pid, self._where(_int(record, "gpa"))
        answered, self._asked[pid] = self._asked[pid], kind not in (_READ_MMIO, _WRITE_MMIO)
        if kind == _READ_MMIO and answered:
            return  # the answer to a read that went to user space
        self._offset[pid] = offset
        self._explain(pid, offset)
        self._point(record, "kvm_mmio", offset, int(kind == _WRITE_MMIO), _int(record, "val"))

    def fast_mmio(self, record: Record) -> None:
        offset = self._where(_int(record, "gpa", "fast_mmio"))
        self._explain(record.pid, offset)
        self._point(record, "kvm_fast_mmio", offset)

    def _explain(self, pid: int, offset: int) -> None:
        if (exit_ := self._exit.pop(pid, None)) is not None:
            exit_[2][1] = offset

    def userspace(self, record: Record) -> None:
        reason = _int(record, "reason") if _int(record, "errno") >= 0 else _EXIT_INTR  # a signal ended KVM_RUN
        self._point(record, "kvm_userspace_exit", self._offset.get(record.pid, 0) if reason == _EXIT_MMIO else 0, reason)

    def set_irq(self, record: Record) -> None:
        gsi = _int(record, "gsi")
        if self.kernel.gsi in (None, gsi):  # a kernel worker's may be another machine's
            self._point(record, "kvm_set_irq", gsi, _int(record, "level"))

    def msi(self, record: Record) -> None:
        self._point(record, "kvm_msi_set_irq", _int(record, "address"), _int(record, "data"))

    def accept(self, record: Record) -> None:
        self._point(record, "kvm_apic_accept_irq", _int(record, "apicid"), _int(record, "vec"))

    def wakeup(self, record: Record) -> None:
        self._point(record, "kvm_vcpu_wakeup", _int(record, "ns"))

    def inject(self, record: Record) -> None:
        self._point(record, "kvm_inj_virq", _int(record, "vector", "vec", "irq"))

    def eoi(self, record: Record) -> None:
        self._point(record, "kvm_eoi", _int(record, "apicid"), _int(record, "vector"))

    # -- the host's I/O ----------------------------------------------------------------------------------------------------------

    def _enter(self, record: Record) -> None:
        io = self._io_at(_int(record, "pos_l", "pos"))
        if io is None:
            return
        self._calling[record.pid] = io
        self._open[io][2] = None
        self._point(record, _ENTER, io)

    def _io_at(self, position: int) -> int | None:
        """The request whose system call this is: the one at this place of the disk, which the device has begun and not ended."""
        for io, entry in self._open.items():
            if entry[2] is not None and self._sector.get(io, -1) << 9 == position:
                return io
        return None

    def _leave(self, record: Record) -> None:
        io = self._calling.pop(record.pid, None)
        if io is not None:
            self._point(record, _EXIT, io)

    def bio_queue(self, record: Record) -> None:
        io = self._calling.get(record.pid)
        if io is None:
            self.unmatched += 1
            return
        self._bios[_int(record, "sector")].append(io)
        self._point(record, "host:block_bio_queue", io, _int(record, "sector"), _int(record, "nr_sector"))

    def getrq(self, record: Record) -> None:
        sector = _int(record, "sector")
        if self._bios[sector]:
            self._rq += 1
            self._io_of[self._rq] = io = self._bios[sector][-1]
            self._fresh[sector].append(self._rq)
            self._point(record, "host:block_getrq", io, self._rq)

    def issue(self, record: Record) -> None:
        sector = _int(record, "sector")
        if self._fresh[sector]:
            rq = self._fresh[sector].popleft()
            self._issued[sector].append(rq)
            self._point(record, "host:block_rq_issue", rq)

    def complete(self, record: Record) -> None:
        sector = _int(record, "sector")
        if self._issued[sector]:
            self._point(record, "host:block_rq_complete", self._issued[sector].popleft())

    def bio_complete(self, record: Record) -> None:
        if self._bios[_int(record, "sector")]:
            self._point(record, "host:block_bio_complete", self._bios[_int(record, "sector")].popleft())

    def irq_entry(self, record: Record) -> None:
        if any(self._issued.values()):
            self._point(record, "irq_handler_entry", _int(record, "irq"))


_HANDLERS: dict[str, Callable[[_Join, Record], None]] = {
    "kvm_exit": _Join.exit,
    "kvm_entry": _Join.entry,
    "kvm_mmio": _Join.mmio,
    "kvm_fast_mmio": _Join.fast_mmio,
    "kvm_userspace_exit": _Join.userspace,
    "kvm_set_irq": _Join.set_irq,
    "kvm_msi_set_irq": _Join.msi,
    "kvm_apic_accept_irq": _Join.accept,
    "kvm_vcpu_wakeup": _Join.wakeup,
    "kvm_inj_virq": _Join.inject,
    "kvm_eoi": _Join.eoi,
    "block_bio_queue": _Join.bio_queue,
    "block_getrq": _Join.getrq,
    "block_rq_issue": _Join.issue,
    "block_rq_complete": _Join.complete,
    "block_bio_complete": _Join.bio_complete,
    "irq_handler_entry": _Join.irq_entry,
}


def _int(record: Record, *names: str) -> int:
    """The first of these arguments that the record has: kernels name some in two ways."""
    for name in names:
        value = record.args.get(name)
        if isinstance(value, int):
            return value
    return 0
