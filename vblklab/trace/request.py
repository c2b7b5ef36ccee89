"""The trace points of one I/O, picked out of a trace by its numbers and by what caused what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from ..errors import ConfigError
from .run import TraceEvent

__all__ = ["points_of"]

_IO = frozenset(["block_bio_queue", "block_bio_complete"])
_ENTERS_RQ = frozenset(["block_getrq", "block_bio_backmerge", "block_bio_frontmerge"])
_RQ = frozenset(["virtio_queue_rq", "virtqueue_add_sgs", "virtqueue_get_buf", "block_rq_complete"])
_HEAD = frozenset(
    [
        *("virtqueue_pop", "virtio_blk_handle_read", "virtio_blk_handle_write", "virtio_blk_handle_other"),
        *("host:sys_enter_io_submit", "host:sys_enter_preadv64", "host:sys_exit_preadv64", "host:block_bio_queue"),
        *("host:block_bio_complete", "virtio_blk_rw_complete", "virtio_blk_req_complete", "virtqueue_fill"),
    ]
)
_HOST_ENTERS = frozenset(["host:block_getrq", "host:block_bio_backmerge", "host:block_bio_frontmerge"])
_HOST_RQ = frozenset(
    ["host:block_rq_issue", "nvme_queue_rq", "brd_submit_bio", "nvme_fetch", "nvme_cqe", "nvme_irq", "host:block_rq_complete"]
)
_DOORBELL, _TRAP = frozenset(["vm_notify", "vp_notify"]), ("kvm_exit", "kvm_mmio", "kvm_fast_mmio")
_CALL = frozenset(["virtio_notify", "virtio_notify_irqfd"])
_RAISED = frozenset(["kvm_set_irq", "kvm_msi_set_irq"])
_DELIVERED = ("kvm_apic_accept_irq", "kvm_vcpu_wakeup", "kvm_inj_virq", "guest:epoll_wait", "vcpu:irq_handler_entry", "kvm_eoi")
_HANDLED = frozenset(["vm_interrupt", "vp_interrupt", "guest:irq_handler_entry", "vp_vring_interrupt", "vring_interrupt", "virtblk_done"])


def points_of(trace: Sequence[TraceEvent], io: int) -> list[TraceEvent]:
    """From its submission to when the application has it: what names the I/O, its requests or its chain, and what they share with others.

    Shared are the doorbell with its trap, the device's wake-up, the drive's interrupt, the device's with its delivery, and the handler: of
    each the first that can be this I/O's.  ConfigError for an I/O that the trace does not hold from its beginning to its end.
    """
    submits = ((at, event.args) for at, event in enumerate(trace) if event.key == "sys_enter_io_submit")
    first = next((at for at, args in submits if args[0] <= io < args[0] + args[1]), len(trace))
    walk = _Walk(io)
    for event in islice(trace, first, None):
        walk.see(event)
        if walk.ended:
            return walk.found
    raise ConfigError(
        f"I/O {io} is not in the trace as a whole", "take one of run.trace, whose block_bio_complete and sys_exit_io_getevents are there"
    )


class _Walk:
    def __init__(self, io: int) -> None:
        self.io = io
        self.found: list[TraceEvent] = []
        self.ended = False
        self._completed = False
        self._rqs: set[int] = set()
        self._heads: set[int] = set()
        self._host_rqs: set[int] = set()
        self._once: dict[str, Callable[[TraceEvent], bool]] = {}

    def see(self, event: TraceEvent) -> None:
        if self._is_mine(event) or self._is_shared(event):
            self.found.append(event)

    def _is_mine(self, event: TraceEvent) -> bool:
        key, args = event.key, event.args
        if key == "sys_enter_io_submit":
            return args[0] <= self.io < args[0] + args[1]
        if key in _IO:
            mine = args[0] == self.io
            self._completed = self._completed or (mine and key == "block_bio_complete")
            return mine
        if key in _ENTERS_RQ:
            if args[0] == self.io:
                self._rqs.add(args[1])
            return args[0] == self.io
        if key in _RQ:
            return args[0] in self._rqs and self._follow(key, args)
        if key in _HEAD:
            return args[0] in self._heads and self._follow(key, args)
        if key in _HOST_ENTERS:
            if args[0] in self._heads:
                self._host_rqs.add(args[1])
            return args[0] in self._heads
        if key in _HOST_RQ:
            return args[0] in self._host_rqs and self._follow(key, args)
        if key == "sys_exit_io_getevents" and self._completed and args[0] >> 32 == self.io >> 32:
            self.ended = True
            return True
        return False

    def _follow(self, key: str, args: tuple[int, ...]) -> bool:
        """Which shared points may come next, now that this one of the I/O's own was seen."""
        if key == "virtqueue_add_sgs":
            self._heads.add(args[1])
            self._await("virtqueue_kick_prepare", *_DOORBELL)
        elif key == "virtqueue_pop":
            for name in ("virtqueue_kick_prepare", *_DOORBELL, *_TRAP, "kvm_userspace_exit", "device:epoll_wait", "virtio_queue_notify"):
                self._once.pop(name, None)
        elif key == "host:block_rq_issue":
            self._await("irq_handler_entry")
        elif key == "host:block_rq_complete":
            self._once.pop("irq_handler_entry", None)
        elif key == "virtqueue_fill":
            self._await("virtqueue_flush", *_CALL)
        elif key == "virtqueue_get_buf":
            self._once.clear()
        return True

    def _await(self, *names: str, test: Callable[[TraceEvent], bool] = lambda event: True) -> None:
        self._once |= dict.fromkeys(names, test)

    def _is_shared(self, event: TraceEvent) -> bool:
        key = event.key
        test = self._once.get(key)
        if test is None or not test(event):
            return False
        del self._once[key]
        if key in _DOORBELL:
            self._await(*_TRAP, test=lambda trapped: trapped.args[0] != 0)  # an exit for something else has no offset
            self._await("device:epoll_wait", "virtio_queue_notify")
        elif key in _TRAP:
            self._await("kvm_userspace_exit", test=lambda left: left.args[0] == event.args[0])
        elif key in _CALL:
            for raised in _RAISED:
                self._await(raised, test=lambda irq: irq.key != "kvm_set_irq" or bool(irq.args[1]))
            self._await(*_HANDLED)
        elif key in _RAISED:
            self._await(*(name for name in _DELIVERED if name != "kvm_eoi"))
        elif key == "vcpu:irq_handler_entry":
            for name in ("kvm_apic_accept_irq", "kvm_vcpu_wakeup", "kvm_inj_virq"):
                self._once.pop(name, None)
            self._await("kvm_eoi")
        return True
