"""From a stream of trace points to a row of stamps per I/O: when did each of its steps begin?

``handlers`` maps a trace point's key to a function of (now_ns, event tuple).  A machine calls them as points are hit, or
replays a recorded log through them.  Memory is bounded: finished rows are folded into histograms by the thousand.

The boundaries, where one I/O shares work with others: D3 ends when its descriptors are published, for the one that rings the
doorbell at the doorbell; D4 contains the wait in the available ring, U4 the wait in the used ring; U6 begins with the interrupt
that serves the I/O.  An I/O that was split begins each step down with its first part and each step up with its last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..events import EVENTS, STEPS
from ..stats import Histogram

__all__ = ["COLUMNS", "Correlator"]

Handler = Callable[[int, Any], None]
COLUMNS = len(STEPS) + 1
_D1, _D2, _D3, _D4, _D5, _D6, _D7, _HW, _U1, _U2, _U3, _U4, _U5, _U6, _U7, _END = range(COLUMNS)
_FOLD = 2048
_KEEP = 8192


class Correlator:
    """Feeds on trace points, gives per-step histograms and a sample of rows.

    ``kernel``: the host kernel's own points are among them.  Then D4 begins where the kernel sees the doorbell's trap.
    ``cut`` counts the I/Os that were submitted and then forgotten.
    """

    def __init__(self, *, kernel: bool = False) -> None:
        self._kernel = kernel
        self.durations = [Histogram() for _ in STEPS]
        self.unmatched = 0
        self.cut = 0
        self.hard_ns = [0] * len(STEPS)  # live: of each step's total, what kernel and hardware took
        self._finished: list[list[int]] = []
        self._kept: list[Any] = []
        self._kept_rows = 0
        self._stride = 1
        self._seen = 0
        self._open: dict[int, list[int]] = {}
        self.handlers = self._make_handlers()

    @property
    def matched(self) -> int:
        """I/Os whose row is complete."""
        return self._seen + len(self._finished)

    def feed(self, now: int, ev: Any) -> None:
        """One trace point; one that fits nothing seen before is counted in ``unmatched`` and dropped."""
        handler = self.handlers.get(ev[0])
        if handler is not None:
            try:
                handler(now, ev)
            except KeyError:
                self.unmatched += 1
            except IndexError:
                raise ConfigError(f"trace point {ev!r} lacks arguments", f"it takes {', '.join(EVENTS[ev[0]].args)}") from None

    def take(self, rows: list[list[int]]) -> None:
        """Rows that somebody else has put together, in ns; 0 is a boundary that was not seen."""
        for start in range(0, len(rows), _FOLD):
            self._finished.extend(rows[start : start + _FOLD])
            self.fold()

    def forget(self) -> None:
        """Drop what is half matched: points were skipped."""
        self.fold()
        self.cut += len(self._open)
        self.handlers = self._make_handlers()

    def _make_handlers(self) -> dict[str, Handler]:
        zero = [0] * COLUMNS
        ios = self._open = {}
        by_rq: dict[int, list[int]] = {}
        by_head: dict[int, list[int]] = {}
        by_host_rq: dict[int, list[int]] = {}
        joined: dict[int, list[list[int]]] = {}
        reaping: dict[int, list[list[int]]] = {}
        finished = self._finished
        added = filled = kicked = trapped = zero[:]
        interrupt_ns = device_wake_ns = guest_wake_ns = host_irq_ns = 0
        message_ns: dict[int, int] = {}  # queue → when the handler of its own vector ran
        hard_ns = self.hard_ns

        def submit(now: int, ev: Any) -> None:
            for io in range(ev[1], ev[1] + ev[2]):
                row = zero[:]
                row[_D1] = now
                ios[io] = row

        def bio_queue(now: int, ev: Any) -> None:
            row = ios[ev[1]]
            if not row[_D2]:
                row[_D2] = now

        def getrq(now: int, ev: Any) -> None:
            by_rq[ev[2]] = ios[ev[1]]

        def merge(now: int, ev: Any) -> None:
            joined.setdefault(ev[2], []).append(ios[ev[1]])

        def queue_rq(now: int, ev: Any) -> None:
            row = by_rq[ev[1]]
            if not row[_D3]:
                row[_D3] = now

        def add_sgs(now: int, ev: Any) -> None:
            nonlocal added
            added = by_head[ev[2]] = row = by_rq[ev[1]]
            if not row[_D4]:
                row[_D4] = now

        def vm_notify(now: int, ev: Any) -> None:
            nonlocal kicked
            if not added[_D5]:
                added[_D4] = now
                kicked = added

        def pop(now: int, ev: Any) -> None:
            row = by_head[ev[1]]
            if not row[_D5]:
                row[_D5] = now
                if row is kicked and device_wake_ns > row[_D4]:
                    hard_ns[_D4] += device_wake_ns - row[_D4]

        def device_wake(now: int, ev: Any) -> None:
            nonlocal device_wake_ns
            device_wake_ns = now

        def guest_wake(now: int, ev: Any) -> None:
            nonlocal guest_wake_ns
            guest_wake_ns = now

        def trap(now: int, ev: Any) -> None:
            nonlocal trapped
            if ev[1] and kicked is not trapped and not kicked[_D5]:  # an exit for something else has no offset
                trapped = kicked
                kicked[_D4] = now

        def host_exit(now: int, ev: Any) -> None:
            row = by_head[ev[1]]
            step, since = _D6, row[_D6]
            for later in range(_D7, _U3):
                if row[later]:
                    hard_ns[step] += row[later] - since
                    step, since = later, row[later]
            hard_ns[step] += now - since

        def host_enter(now: int, ev: Any) -> None:
            row = by_head[ev[1]]
            if not row[_D6]:
                row[_D6] = now

        def host_getrq(now: int, ev: Any) -> None:
            by_host_rq[ev[2]] = by_head[ev[1]]

        def nvme_queue_rq(now: int, ev: Any) -> None:
            row = by_host_rq[ev[1]]
            if not row[_D7]:
                row[_D7] = now

        def nvme_fetch(now: int, ev: Any) -> None:
            row = by_host_rq[ev[1]]
            if not row[_HW]:
                row[_HW] = now

        def nvme_cqe(now: int, ev: Any) -> None:
            by_host_rq[ev[1]][_U1] = now

        def host_irq(now: int, ev: Any) -> None:
            nonlocal host_irq_ns
            host_irq_ns = now

        def host_rq_complete(now: int, ev: Any) -> None:
            row = by_host_rq[ev[1]]
            row[_U2] = now
            if row[_U1] < row[_D7] < host_irq_ns:
                row[_U1] = host_irq_ns

        def rw_complete(now: int, ev: Any) -> None:
            by_head[ev[1]][_U3] = now

        def fill(now: int, ev: Any) -> None:
            nonlocal filled
            filled = row = by_head[ev[1]]
            row[_U4] = now

        def notify(now: int, ev: Any) -> None:
            filled[_U4] = now

        def set_irq(now: int, ev: Any) -> None:
            if ev[2] and not filled[_U6]:
                filled[_U5] = now
                hard_ns[_U4] += now - filled[_U4]

        def msi_set_irq(now: int, ev: Any) -> None:
            if not filled[_U6]:
                filled[_U5] = now
                hard_ns[_U4] += now - filled[_U4]

        def message(now: int, ev: Any) -> None:
            message_ns[ev[2]] = now

        def interrupt(now: int, ev: Any) -> None:
            nonlocal interrupt_ns
            interrupt_ns = now

        def get_buf(now: int, ev: Any) -> None:
            row = by_rq[ev[1]]
            handler_ns = message_ns.get(ev[1] >> 16, interrupt_ns)
            row[_U6] = handler_ns if handler_ns >= row[_U4] else now
            if guest_wake_ns > row[_U5] > 0:
                hard_ns[_U5] += guest_wake_ns - row[_U5]
            if ev[1] in joined:
                for other in joined.pop(ev[1]):
                    other[_D3:_U7] = row[_D3:_U7]

        def bio_complete(now: int, ev: Any) -> None:
            row = ios.pop(ev[1])
            row[_U7] = now
            job = ev[1] >> 32
            if job in reaping:
                reaping[job].append(row)
            else:
                reaping[job] = [row]

        def getevents(now: int, ev: Any) -> None:
            rows = reaping[ev[1] >> 32]
            for row in rows:
                row[_END] = now
            finished.extend(rows)
            rows.clear()
            if len(finished) >= _FOLD:
                self.fold()

        kernel: dict[str, Handler] = {"kvm_exit": trap, "kvm_mmio": trap, "kvm_fast_mmio": trap, "irq_handler_entry": host_irq}
        return (kernel if self._kernel else {}) | {
            "sys_enter_io_submit": submit,
            "block_bio_queue": bio_queue,
            "block_getrq": getrq,
            "block_bio_backmerge": merge,
            "block_bio_frontmerge": merge,
            "virtio_queue_rq": queue_rq,
            "virtqueue_add_sgs": add_sgs,
            "vm_notify": vm_notify,
            "vp_notify": vm_notify,
            "virtqueue_pop": pop,
            "host:sys_enter_preadv64": host_enter,
            "host:sys_exit_preadv64": host_exit,
            "device:epoll_wait": device_wake,
            "guest:epoll_wait": guest_wake,
            "vcpu:irq_handler_entry": guest_wake,
            "host:block_bio_queue": host_enter,
            "host:block_getrq": host_getrq,
            "nvme_queue_rq": nvme_queue_rq,
            "brd_submit_bio": nvme_queue_rq,
            "host:block_rq_issue": nvme_queue_rq,
            "nvme_fetch": nvme_fetch,
            "nvme_cqe": nvme_cqe,
            "host:block_rq_complete": host_rq_complete,
            "virtio_blk_rw_complete": rw_complete,
            "virtqueue_fill": fill,
            "virtio_notify": notify,
            "virtio_notify_irqfd": notify,
            "kvm_set_irq": set_irq,
            "kvm_msi_set_irq": msi_set_irq,
            "vm_interrupt": interrupt,
            "vp_interrupt": interrupt,
            "vp_vring_interrupt": interrupt,
            "guest:irq_handler_entry": message,
            "virtqueue_get_buf": get_buf,
            "block_bio_complete": bio_complete,
            "sys_exit_io_getevents": getevents,
        }

    def fold(self) -> None:
        """Turn finished rows into statistics; a machine calls it once more at the end."""
        if not self._finished:
            return
        table = np.array(self._finished, dtype=np.int64)
        self._finished.clear()
        for column in range(COLUMNS - 2, 0, -1):  # a boundary that was not seen lies where the next one does
            missing = table[:, column] == 0
            table[missing, column] = table[missing, column + 1]
        np.maximum.accumulate(table, axis=1, out=table)
        steps = np.diff(table, axis=1)
        for number, histogram in enumerate(self.durations):
            histogram.extend(steps[:, number])
        first = -self._seen % self._stride
        self._seen += len(table)
        part = table[first :: self._stride]
        self._kept.append(part)
        self._kept_rows += len(part)
        while self._kept_rows > _KEEP:  # thin the sample evenly: every second row goes
            whole = np.concatenate(self._kept)[::2]
            self._kept, self._kept_rows = [whole], len(whole)
            self._stride *= 2

    @property
    def rows(self) -> Any:
        """An even sample of up to 8,192 rows, in order: int64 (n, 16), ns."""
        self.fold()
        return np.concatenate(self._kept) if self._kept else np.zeros((0, COLUMNS), dtype=np.int64)
