"""Which of the host kernel's events are a live run's own, and how they come into its log."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..peer.tracefs import KernelTrace
from ..trace.kernel import KVM_EVENTS, READS, WRITES, Kernel
from ..trace.ring_buffer import read_pages

__all__ = ["RunTrace"]

_ELSEWHERE = ("kvm_set_irq", "kvm_msi_set_irq", "kvm_apic_accept_irq")
"""What a kernel worker does too, for an irqfd that may not be injected where its eventfd was written."""
_COUNTED = ("kvm_exit", "kvm_userspace_exit", "kvm_inj_virq")
_BLOCK_EVENTS = ("block_bio_queue", "block_getrq", "block_rq_issue", "block_rq_complete", "block_bio_complete")


class RunTrace:
    """The kernel's side of one run: recorded between ``start`` and ``stop``; ``close`` removes all of it, at any time.

    ``kvm`` says what of KVM is the run's, as a Kernel without records; None for no KVM at all.
    """

    def __init__(self, *, processes: Sequence[int], image: str | None, kvm: Kernel | None) -> None:
        self._kernel = kvm or Kernel((), frozenset())
        threads = self._threads = sorted({int(tid) for pid in processes for tid in os.listdir(f"/proc/{pid}/task")})
        self._trace = KernelTrace(_events(threads, _block_device(image) if image else None, kvm is not None))
        self._running = False
        self.lost = self.dropped = self.count = 0
        self.counters: dict[str, int] = {}

    def start(self) -> None:
        """NotHere, with the remedy, where this cannot be."""
        self._trace.__enter__()
        self._running = True

    def close(self) -> None:
        """Remove the instance."""
        if self._running:
            self._running = False
            self._trace.close()

    def stop(self, *, error_ns: int = 0) -> Kernel:
        """End the recording and read it; ``error_ns`` is that of the guest's clock."""
        captured = self._trace.stop()
        self.close()
        records, lost = read_pages(captured.header_page, captured.formats, captured.pages)
        self.lost, self.dropped, self.count = lost + captured.overrun, sum(captured.dropped.values()), len(records)
        counts = Counter(record.name for record in records if record.pid in self._threads)
        self.counters = {f"traced_{name}": counts[name] for name in _COUNTED if name in counts}
        ends = [
            max((record.t_ns for record in records if record.cpu == cpu), default=0) for cpu, dropped in captured.dropped.items() if dropped
        ]
        names = {text.partition("name: ")[2].split("\n", 1)[0] for text in captured.formats}
        until = min(ends, default=None)
        pids = frozenset(self._threads)
        return replace(self._kernel, records=records, events=frozenset(names), until_ns=until, error_ns=error_ns, pids=pids)

    def words(self) -> str:
        """For a run's provenance: how much there is, and what is missing of it."""
        text = f"{self.count:,} events, clock mono, {self.lost:,} lost"
        if self.dropped:
            text += f"; then the buffer was full: {self.dropped:,} later ones were dropped, and step times end there"
        return text


def _events(threads: Sequence[int], dev: int | None, kvm: bool) -> dict[str, str]:
    """The events and their filters, so that nobody else's work gets into the buffer."""
    ours = " || ".join(f"common_pid == {tid}" for tid in threads)
    events = {}
    for name in KVM_EVENTS if kvm else ():
        events[f"kvm:{name}"] = f'{ours} || COMM ~ "kworker*"' if name in _ELSEWHERE else ours
    if dev is not None:
        for name in (*READS, *WRITES):
            events |= {f"syscalls:sys_enter_{name}": ours, f"syscalls:sys_exit_{name}": ours}
        events |= {f"block:{name}": f"dev == {dev}" for name in _BLOCK_EVENTS}
        if irqs := _interrupts(dev):
            events["irq:irq_handler_entry"] = " || ".join(f"irq == {irq}" for irq in irqs)
    return events


def _interrupts(dev: int) -> list[int]:
    """The interrupts of that disk's driver, whose handlers are named after its device: virtio1-req.0, nvme0q1."""
    name = Path(f"/sys/dev/block/{dev >> 20}:{dev & 0xFFFFF}/device").resolve().name
    actions = Path("/sys/kernel/irq").glob("*/actions")
    try:
        found = [(int(path.parent.name), path.read_text(encoding="ascii").strip()) for path in actions]
    except OSError:
        return []
    return sorted(irq for irq, words in found if re.match(rf"{re.escape(name)}\D", words))


def _block_device(image: str) -> int:
    """The number (dev_t as the kernel counts) of the block device below an image, as block events name it: of the whole disk."""
    status = os.stat(image)
    number = status.st_rdev if status.st_rdev else status.st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    try:
        if (device / "partition").exists():
            major, minor = (device.resolve().parent / "dev").read_text(encoding="ascii").split(":")
            return int(major) << 20 | int(minor)
    except OSError:
        pass
    return os.major(number) << 20 | os.minor(number)
