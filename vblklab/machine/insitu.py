"""What a live run's own trace points cost: from each to the next one of the same thread, out of the log of a machine that has run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from ..events import EVENTS, GROUPS
from .costs import Cost
from .loop import LogEntry

__all__ = ["Points", "cost_of"]

_DRIVER, _DEVICE, _MAIN = range(3)
_KICKS = ("vm_notify", "vp_notify")
_INTERRUPTS = ("vm_interrupt", "vp_interrupt", "guest:irq_handler_entry", "vp_vring_interrupt")
_AWAKE = ("guest:epoll_wait", "vcpu:irq_handler_entry")
_SENT = ("kvm_set_irq", "kvm_msi_set_irq")
_AWAKE_FOR = {"device:epoll_wait": ("virtio_queue_notify",)} | dict.fromkeys(_AWAKE, _INTERRUPTS)
"""What a thread that is awake goes on with, if it was a kick or an interrupt; a register access wakes the device too."""
_BYTES_PER_US = 1e6  # of a store whose time does not depend on the length


def cost_of(samples: Iterable[float], source: str) -> Cost:
    """The median with its quartiles, in ns."""
    values = np.asarray(list(samples), dtype=np.float64)
    if not len(values):
        raise ValueError("no samples")
    low, middle, high = np.percentile(values, (25, 50, 75))
    return Cost(float(middle), source, "measured", float(low), float(high), len(values))


class Points:
    """Samples out of any number of logs, by what they are; ``rows`` makes costs of them."""

    def __init__(self) -> None:
        self.by_key: dict[str, list[int]] = defaultdict(list)
        self.spans: dict[str, list[int]] = defaultdict(list)  # from a thread to another: kick, call, main loop; and a task's turn
        self.calls: dict[tuple[str, int], list[int]] = defaultdict(list)  # (read or write, bytes) → the engine's call

    def add(self, log: list[LogEntry]) -> None:
        """Take in one run, at queue depth 1 and in the order of time."""
        before: dict[int, tuple[int, str]] = {}
        kicked = exited = notified = sent = entered = 0
        operation = ("read", 0)
        for now, number, ev in log:
            key = ev[0]
            if key == "wait" and number == -1:
                continue  # the end of a sleep, which has a point of its own
            side = _DEVICE if number >= 1000 or key == "device:epoll_wait" else _MAIN if number == -1 and key in _SENT else _DRIVER
            last = before.get(side)
            before[side] = (now, key)
            if last is not None and last[1] != "wait" and key in _AWAKE_FOR.get(last[1], (key,)):
                self.by_key[last[1]].append(now - last[0])
            if key in _KICKS:
                kicked = exited = now
            elif key == "kvm_userspace_exit":
                exited = now
            elif key == "device:epoll_wait":
                if kicked:
                    self.spans["kick" if exited == kicked else "kick after an exit"].append(now - exited)
                kicked = 0
            elif key in ("virtio_notify", "virtio_notify_irqfd"):
                notified, sent = now, 0
            elif key in _SENT:
                if side == _MAIN and notified:
                    self.spans["main loop"].append(now - notified)
                sent = now
            elif key in _INTERRUPTS:
                if notified:
                    self.spans["call"].append(now - (sent or notified))
                notified = 0
            elif key == "sys_exit_io_getevents" and last is not None and last[1] == "wait":
                self.spans["task"].append(now - last[0])
            elif key in ("pop_read", "pop_write"):
                operation = (key.removeprefix("pop_"), ev[3] << 9)
            elif key == "host:sys_enter_preadv64":
                entered = now
            elif key == "host:sys_exit_preadv64" and entered:
                self.calls[operation].append(now - entered)
                entered = 0

    def rows(self, source: str, *, kvm: bool, crossed: dict[str, Cost]) -> dict[str, Cost]:
        """A cost for every trace point, and the wake-ups.  ``crossed`` is what the doorbell of a vCPU costs, from ``micro``."""
        rows = self._own_points(source)
        notify = "vm_notify" if "vm_notify" in self.by_key else "vp_notify"
        rows |= crossed if kvm else dict.fromkeys(("kvm_exit", "kvm_mmio", "kvm_fast_mmio", "kvm_userspace_exit", "kvm_entry"), _NO_TRAP)
        if kvm:
            rows[notify] = _zero("the doorbell's Python is in kvm_exit")
        signal_ns = rows["kvm_exit"].ns + rows["kvm_fast_mmio"].ns if kvm else rows[notify].ns
        woken = [*self.spans["kick after an exit"], *(max(ns - signal_ns, 0.0) for ns in self.spans["kick"])]
        rows["wake:device"] = cost_of(woken, f"{source}: from the signal until its thread is awake")
        awake = next((key for key in _AWAKE if key in rows and rows[key].n), _AWAKE[0])
        rows["wake:vcpu-idle"] = self._less("call", rows[awake].ns, f"{source}: from the call until the driver's thread is awake")
        rows["wake:task"] = cost_of(self.spans["task"], f"{source}: from the end of the interrupt's context to the task's next point")
        rows["wake:vcpu-busy"] = _zero("a driver at work takes an interrupt at its next trace point")
        if self.spans["main loop"]:
            rows["wake:main-loop"] = self._less("main loop", rows["virtio_notify"].ns, f"{source}: until the main loop's thread is awake")
        for key in ("kvm_set_irq", "kvm_msi_set_irq", "kvm_inj_virq"):
            rows[key] = _zero("in wake:vcpu-idle")
        return rows | self._defaults(rows, source)

    def _less(self, span: str, ns: float, source: str) -> Cost:
        """A span without a part of it that has a row of its own."""
        return cost_of([max(sample - ns, 0.0) for sample in self.spans[span]], source)

    def _own_points(self, source: str) -> dict[str, Cost]:
        """Points that were yielded together are measured together: the last one has it all."""
        rows = {}
        for key, samples in self.by_key.items():
            *together, last = [member for member, _ in GROUPS.get(key, ((key, None),))]
            for member in together:
                rows[member] = _zero(f"yielded together with {last}, which has the time of both")
            rows[last] = cost_of([*samples, *self.by_key.get(last, ())] if last != key else samples, source)
        rows["host:sys_enter_preadv64"] = _zero("the call's time is in store:…")
        return {key: rows[key] for key in EVENTS if key in rows}

    def _defaults(self, rows: dict[str, Cost], source: str) -> dict[str, Cost]:
        """For points that these runs did not pass: the median of those that they did, marked so.  Nothing published stays among them."""
        passed = [cost.ns for cost in rows.values() if cost.n]
        default = Cost(float(np.median(passed)), f"not on the way of {source}: the median of the points that are", "room default")
        return {key: default for key in EVENTS if key not in rows}

    def store(self, source: str) -> dict[str, Cost]:
        """``read_ns``, ``read_bytes_per_us`` and the same of writes: the straight line through the medians of two lengths."""
        rows = {}
        for word in ("read", "write"):
            lengths = sorted(length for op, length in self.calls if op == word)
            short, long = lengths[0], lengths[-1]
            first, last = (cost_of(self.calls[word, length], "") for length in (short, long))
            slope = (long - short) * 1e3 / (last.ns - first.ns) if last.ns > first.ns else _BYTES_PER_US
            base = max(first.ns - short * 1e3 / slope, 0.0)
            low, high = (max(base + quartile - first.ns, 0.0) for quartile in (first.p25, first.p75))
            rows[f"{word}_ns"] = Cost(base, f"{source}: a call of {short} bytes, without the bytes", "measured", low, high, first.n)
            words = f"{source}: calls of {short} and of {long} bytes"
            rows[f"{word}_bytes_per_us"] = Cost(slope, words, "measured", slope, slope, first.n + last.n)
        return rows


def _zero(why: str) -> Cost:
    return Cost(0.0, why, "model")


_NO_TRAP = _zero("this machine has no trap")
