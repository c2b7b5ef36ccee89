"""Every trace point, declared once: its real name, the step it belongs to, who hits it, its arguments and its meaning.

A part hits a point with ``now_ns = yield (key, *ints)``.  The machine records it, charges its cost and lets others run.
Kinds: ``t`` kernel tracepoint, ``f`` kernel function (kprobe), ``q`` QEMU trace event, ``m`` a point of this package's
own models that no real system reports under that name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["EVENTS", "GROUPS", "STEPS", "WAIT", "Event", "Spend", "Step", "Wait", "event", "expand"]


class Wait:
    """Yielded by a context to idle until it is notified or, if ``until_ns`` is given, until that machine time."""

    __slots__ = ("until_ns",)

    def __init__(self, until_ns: int | None = None) -> None:
        self.until_ns = until_ns


class Spend:
    """Yielded by a context that works for ``ns`` more, where the time depends on an amount; free where time is measured."""

    __slots__ = ("ns",)

    def __init__(self, ns: int) -> None:
        self.ns = ns


WAIT = Wait()
"""The wait without a deadline; one shared object, because contexts idle often."""


@dataclass(frozen=True, slots=True)
class Step:
    """One arrow of the path: ``D1`` … ``D7`` down, ``HW`` the drive itself, ``U1`` … ``U7`` up."""

    name: str
    source: str
    target: str
    meaning: str


STEPS: tuple[Step, ...] = (
    Step("D1", "guest application", "guest I/O stack", "the application issues the I/O"),
    Step("D2", "guest I/O stack", "virtio-blk driver", "bio and request: merge, split, tag"),
    Step("D3", "virtio-blk driver", "KVM", "descriptors on the virtqueue, doorbell written"),
    Step("D4", "KVM", "virtio device", "exit or ioeventfd; the request waits in the ring until it is popped"),
    Step("D5", "virtio device", "host I/O stack", "pop, parse, check, submit"),
    Step("D6", "host I/O stack", "host block driver", "the same work as D2, on the host"),
    Step("D7", "host block driver", "hardware", "command queued, drive doorbell"),
    Step("HW", "hardware", "hardware", "the drive works: its own queue and the media"),
    Step("U1", "hardware", "host block driver", "the drive's interrupt"),
    Step("U2", "host block driver", "host I/O stack", "the completion travels the host's stack"),
    Step("U3", "host I/O stack", "virtio device", "the completion reaches the device; used ring filled"),
    Step("U4", "virtio device", "KVM", "virtio_notify(): interrupt line, message or irqfd"),
    Step("U5", "KVM", "guest", "the interrupt is injected into the vCPU"),
    Step("U6", "virtio-blk driver", "guest I/O stack", "used ring drained, requests ended"),
    Step("U7", "guest I/O stack", "guest application", "bios ended, the caller wakes"),
)


@dataclass(frozen=True, slots=True)
class Event:
    """A declared trace point.

    ``key`` is what parts yield; ``name`` is the real system's name (two keys share a name where the same code runs in
    guest and host).  ``room`` gives the lane it is drawn in and the default cost.  ``args`` names the ints behind the key.
    """

    key: str
    name: str
    kind: str
    step: str
    room: str
    args: tuple[str, ...]
    meaning: str
    section: str = ""
    cost_ns: int | None = None


EVENTS: dict[str, Event] = {}
GROUPS: dict[str, tuple[tuple[str, tuple[int, ...]], ...]] = {}
"""Points that are hit one after the other with only private work between them may be yielded as one: group → its members,
each with the positions of its arguments in the group's tuple.  A machine expands a group when it records or charges it."""
_STEP_NAMES = frozenset(step.name for step in STEPS)


def _declare(step: str, room: str, kind: str, key: str, args: str, meaning: str, section: str = "") -> None:
    name = key.partition(":")[2] or key
    EVENTS[key] = Event(key, name, kind, step, room, tuple(args.split()), meaning, section)


def _group(name: str, *members: tuple[str, tuple[int, ...]]) -> None:
    GROUPS[name] = members


def expand(ev: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The single trace points of what a part yielded: itself, or the members of a group."""
    members = GROUPS.get(ev[0])
    return [ev] if members is None else [(key, *[ev[at] for at in places]) for key, places in members]


def event(
    key: str,
    *,
    step: str | None = None,
    cost_ns: int | None = None,
    args: Sequence[str] = (),
    meaning: str = "declared by the learner",
) -> str:
    """Declare a trace point of your own and return its key: ``CHECK = vb.event("my_check", step="D5", cost_ns=300)``.

    ``step`` and ``cost_ns`` must be given.  The cost is yours, so figures say "stated by you".  ``args`` names the ints behind the
    key: ``args=("vq_head",)`` for ``yield (CHECK, request.key)``.  A key may be declared again (a cell runs twice); the names this
    package declares cannot be taken.
    """
    from .errors import ConfigError

    if not isinstance(key, str) or not re.fullmatch(r"\w+(:\w+)*", key):
        raise ConfigError(f"event {key!r} is no name", 'give letters, digits and _, such as "my_check"')
    old = EVENTS.get(key)
    if (old is not None and old.cost_ns is None) or key in GROUPS or key == "wait":
        raise ConfigError(f"event {key!r} is one of vblklab's own trace points", "choose another name")
    steps = f"one of {', '.join(s.name for s in STEPS)}"
    if step is None:
        raise ConfigError(f"event {key!r} has no step", f'say to which it belongs, such as step="D5": {steps}')
    if not isinstance(step, str) or step not in _STEP_NAMES:
        raise ConfigError(f"event {key!r}: no step {step!r}", f"use {steps}")
    if cost_ns is None:
        raise ConfigError(f"event {key!r} has no cost_ns", "say how long it takes on the simulator, in ns: cost_ns=300, or cost_ns=0")
    if not isinstance(cost_ns, int) or isinstance(cost_ns, bool) or cost_ns < 0:
        raise ConfigError(f"event {key!r}: cost_ns={cost_ns!r}", "give whole nanoseconds, 0 or more")
    if isinstance(args, str) or not isinstance(args, Sequence) or not all(isinstance(name, str) for name in args):
        raise ConfigError(f"event {key!r}: args={args!r}", 'give a tuple of names, such as args=("vq_head",)')
    if not isinstance(meaning, str):
        raise ConfigError(f"event {key!r}: meaning={meaning!r}", "give a text")
    room = {
        "D1": "app",
        "D2": "guest-stack",
        "D3": "driver",
        "D4": "kvm",
        "D5": "device",
        "D6": "host-stack",
        "D7": "host-driver",
        "HW": "disk",
        "U1": "host-driver",
        "U2": "host-stack",
        "U3": "device",
        "U4": "device",
        "U5": "kvm",
        "U6": "driver",
        "U7": "guest-stack",
    }[step]
    EVENTS[key] = Event(key, key, "m", step, room, tuple(args), meaning, "", cost_ns)
    return key


# Arguments: io = number of the application's I/O; rq = queue << 16 | tag of a block request; vq_head = queue << 16 | head of
# a descriptor chain.  On the host side "io" is the device's vq_head and "rq" the host stack's own request.
_D, _R = _declare, "VIRTIO 1.4 "
_D("D1", "app", "t", "sys_enter_io_submit", "io nr", "the application hands nr I/Os to the kernel, the first is io")
_D("D1", "app", "t", "sys_exit_io_submit", "io", "the call returns; the application may submit more")
_D("D2", "guest-stack", "t", "block_bio_queue", "io sector nr_sector", "a bio enters the block layer")
_D("D2", "guest-stack", "t", "block_split", "io sector", "a bio too large for the device's limits is cut at sector")
_D("D2", "guest-stack", "t", "block_getrq", "io rq", "a tag is taken and the bio becomes a request")
_D("D2", "guest-stack", "t", "block_bio_backmerge", "io rq", "the bio is joined behind a plugged request")
_D("D2", "guest-stack", "t", "block_bio_frontmerge", "io rq", "the bio is joined before a plugged request")
_D("D2", "guest-stack", "t", "block_unplug", "queue nr", "the plugged requests go to the driver")
_D("D2", "guest-stack", "t", "block_rq_requeue", "rq", "the driver was busy; the request waits for a completion")
_D("D3", "driver", "f", "virtio_queue_rq", "rq", "the driver takes the request")
_D(
    "D3",
    "driver",
    "f",
    "virtqueue_add_sgs",
    "rq vq_head",
    "header, data and status descriptors and the ring entry are written; next avail.idx",
    _R + "§2.7.13",
)
_D("D3", "driver", "f", "virtqueue_kick_prepare", "queue", "avail.idx is published; next the event word is read", _R + "§2.7.13.4")
_D("D3", "driver", "f", "vm_notify", "queue", "the doorbell: a store to QueueNotify", _R + "§4.2.2")
_D("D3", "driver", "f", "vp_notify", "queue", "the doorbell of virtio-pci: a store to the queue's notify address", _R + "§4.1.5.2")
_D("D4", "kvm", "t", "kvm_exit", "offset reason", "the vCPU leaves guest mode")
_D("D4", "kvm", "t", "kvm_mmio", "offset write value", "the access is decoded")
_D("D4", "kvm", "t", "kvm_fast_mmio", "offset", "the store matches an ioeventfd and is answered in the kernel")
_D("D4", "kvm", "t", "kvm_userspace_exit", "offset reason", "KVM_RUN returns to QEMU, for a store with KVM_EXIT_MMIO")
_D("D4", "kvm", "t", "kvm_entry", "", "the vCPU enters guest mode again")
_D("D4", "kvm", "f", "device:epoll_wait", "", "live: the device's thread was asleep and wakes")
_D("D5", "device", "q", "virtio_queue_notify", "queue", "the device's event loop or the vCPU thread looks at the queue")
_D("D5", "device", "f", "virtio_queue_empty", "queue", "the available ring is seen empty; next kicks are switched on")
_D(
    "D5",
    "device",
    "q",
    "virtio_queue_set_notification",
    "queue enable",
    "kicks are switched on or off, then the ring is checked again",
    _R + "§2.7.7",
)
_D("D5", "device", "f", "virtqueue_pop", "vq_head", "a chain is taken from the available ring", _R + "§2.7.13")
_D("D5", "device", "q", "virtio_blk_handle_read", "vq_head sector nr_sector", "a VIRTIO_BLK_T_IN is accepted", _R + "§5.2.6")
_D("D5", "device", "q", "virtio_blk_handle_write", "vq_head sector nr_sector", "a VIRTIO_BLK_T_OUT is accepted", _R + "§5.2.6")
_D("D5", "device", "q", "virtio_blk_handle_other", "vq_head type", "a request that moves no disk data is accepted", _R + "§5.2.6")
_D("D6", "host-stack", "t", "host:sys_enter_io_submit", "io", "the engine hands the I/O to the host kernel, asynchronously")
_D("D6", "host-stack", "t", "host:sys_enter_preadv64", "io", "the engine calls preadv or pwritev and blocks")
_D("D6", "host-stack", "t", "host:block_bio_queue", "io sector nr_sector", "a bio enters the host's block layer")
_D("D6", "host-stack", "t", "host:block_split", "io sector", "a bio too large for the drive is cut")
_D("D6", "host-stack", "t", "host:block_getrq", "io rq", "a host tag is taken")
_D("D6", "host-stack", "t", "host:block_bio_backmerge", "io rq", "joined behind a plugged host request")
_D("D6", "host-stack", "t", "host:block_bio_frontmerge", "io rq", "joined before a plugged host request")
_D("D6", "host-stack", "t", "host:block_unplug", "queue nr", "plugged host requests go to the drive's driver")
_D("D6", "host-stack", "t", "host:block_rq_requeue", "rq", "the drive's queue was full")
_D("D7", "host-driver", "t", "host:block_rq_issue", "rq", "the drive's driver has taken the request")
_D("D7", "host-driver", "f", "nvme_queue_rq", "rq", "the command is built and written to the submission queue")
_D("D7", "host-driver", "f", "nvme_commit_rqs", "queue", "the drive's doorbell is written")
_D("D7", "host-driver", "f", "brd_submit_bio", "rq", "a RAM disk copies the bytes in the caller's context")
_D("HW", "disk", "m", "nvme_fetch", "rq", "the drive fetches the command")
_D("U1", "disk", "m", "nvme_cqe", "rq", "the drive has moved the data and posts the completion")
_D("U1", "host-driver", "t", "irq_handler_entry", "irq", "the host takes the drive's interrupt")
_D("U1", "host-driver", "f", "nvme_irq", "rq", "one completion queue entry is read")
_D("U2", "host-stack", "t", "host:block_rq_complete", "rq", "the host's request ends")
_D("U2", "host-stack", "t", "host:block_bio_complete", "io", "the host's bio ends")
_D("U2", "host-stack", "t", "host:sys_exit_preadv64", "io", "the blocking call returns")
_D("U3", "device", "q", "virtio_blk_rw_complete", "vq_head ret", "the engine's completion reaches the device")
_D("U3", "device", "q", "virtio_blk_req_complete", "vq_head status", "the status byte is written", _R + "§5.2.6.2")
_D("U3", "device", "q", "virtqueue_fill", "vq_head len", "a used element is written; next used.idx", _R + "§2.7.14")
_D("U3", "device", "q", "virtqueue_flush", "queue nr", "used.idx is published; next the event word is read", _R + "§2.7.7.2")
_D("U4", "device", "q", "virtio_notify", "queue", "the device wants the interrupt line set")
_D("U4", "device", "q", "virtio_notify_irqfd", "queue", "the device writes the irqfd")
_D("U4", "device", "q", "virtio_notify_config", "", "the device tells of a configuration change", _R + "§2.3")
_D("U5", "kvm", "t", "kvm_set_irq", "gsi level", "KVM's interrupt controller takes the line")
_D("U5", "kvm", "t", "kvm_msi_set_irq", "address data", "KVM takes a message: a store of data to address")
_D("U5", "kvm", "t", "kvm_apic_accept_irq", "apicid vector", "the vCPU's local APIC takes it")
_D("U5", "kvm", "t", "kvm_vcpu_wakeup", "ns", "the thread of an idle vCPU runs again, after so many ns of HLT")
_D("U5", "kvm", "t", "kvm_inj_virq", "irq", "the interrupt enters the vCPU (not reported with APICv)")
_D("U5", "kvm", "f", "guest:epoll_wait", "", "live: the guest's thread was asleep and wakes")
_D("U5", "kvm", "t", "vcpu:irq_handler_entry", "irq", "the vCPU has taken the interrupt: the first instruction of its handler")
_D("U5", "kvm", "t", "kvm_eoi", "apicid vector", "the handler tells its local APIC that it is done")
_D("U6", "driver", "f", "vm_interrupt", "", "the handler runs: InterruptStatus is read and acknowledged", _R + "§4.2.2")
_D("U6", "driver", "f", "vp_interrupt", "", "virtio-pci's line: the handler reads the ISR status, which lowers it", _R + "§4.1.5.3")
_D("U6", "driver", "t", "guest:irq_handler_entry", "vector queue", "MSI-X, a vector a queue: its handler runs and reads no register")
_D("U6", "driver", "f", "vp_vring_interrupt", "", "MSI-X, one vector for all queues: the handler looks at each of them")
_D("U6", "driver", "f", "vp_config_changed", "", "MSI-X: the configuration's vector", _R + "§4.1.5.4")
_D("U6", "driver", "f", "vring_interrupt", "queue", "one queue's callback is called")
_D("U6", "driver", "f", "virtblk_done", "queue", "the used ring is drained with callbacks off")
_D("U6", "driver", "f", "virtqueue_get_buf", "rq", "a used element is taken", _R + "§2.7.14")
_D("U6", "driver", "f", "virtqueue_enable_cb_prepare", "queue", "the used ring is seen empty; next callbacks are switched on")
_D("U6", "driver", "f", "virtqueue_enable_cb", "queue", "callbacks are on; next the used ring is checked once more", _R + "§2.7.14")
_D("U6", "driver", "f", "virtblk_poll", "queue", "the used ring is polled, without an interrupt")
_D("U6", "guest-stack", "t", "block_rq_complete", "rq", "the request ends")
_D("U7", "guest-stack", "t", "block_bio_complete", "io", "the bio ends")
_D("U7", "app", "t", "sys_exit_io_getevents", "io nr", "the application has reaped nr I/Os, the last is io")

# A real guest's own records: they name sectors and pointers where our parts name I/Os, requests and chains.
_D("D1", "app", "t", "guest:sys_enter_io_submit", "nr", "the application hands nr I/Os to the guest's kernel")
_D("D1", "app", "t", "guest:sys_exit_io_submit", "ret", "the call returns")
_D("D2", "guest-stack", "t", "guest:block_bio_queue", "sector nr_sector", "a bio enters the guest's block layer")
_D("D2", "guest-stack", "t", "guest:block_getrq", "sector nr_sector", "a tag is taken and the bio becomes a request")
_D("D2", "guest-stack", "t", "guest:block_bio_backmerge", "sector nr_sector", "the bio is joined behind a request")
_D("D2", "guest-stack", "t", "guest:block_bio_frontmerge", "sector nr_sector", "the bio is joined before a request")
_D("D3", "driver", "f", "guest:virtio_queue_rq", "request", "the driver takes the request")
_D("D3", "driver", "f", "virtio_queue_rqs", "request", "the driver takes a list of plugged requests, of which this is the first")
_D("D3", "guest-stack", "t", "block_rq_issue", "sector nr_sector", "the driver has started the request")
_D("D3", "driver", "f", "guest:virtqueue_add_sgs", "queue token", "descriptors and the ring entry are written", _R + "§2.7.13")
_D("U6", "guest-stack", "t", "guest:block_rq_complete", "sector nr_sector", "the request and its bios end")
_D("U7", "app", "t", "guest:sys_exit_io_getevents", "ret", "the application has reaped this many I/Os")
_D("D6", "host-stack", "q", "blk_co_preadv", "request", "QEMU's block layer takes the read")
_D("D6", "host-stack", "q", "blk_co_pwritev", "request", "QEMU's block layer takes the write")

_group("bio_to_request", ("block_bio_queue", (1, 2, 3)), ("block_getrq", (1, 4)))
_group("host:bio_to_request", ("host:block_bio_queue", (1, 2, 3)), ("host:block_getrq", (1, 4)))
_group("bio_to_backmerge", ("block_bio_queue", (1, 2, 3)), ("block_bio_backmerge", (1, 4)))
_group("bio_to_frontmerge", ("block_bio_queue", (1, 2, 3)), ("block_bio_frontmerge", (1, 4)))
_group("host:bio_to_backmerge", ("host:block_bio_queue", (1, 2, 3)), ("host:block_bio_backmerge", (1, 4)))
_group("host:bio_to_frontmerge", ("host:block_bio_queue", (1, 2, 3)), ("host:block_bio_frontmerge", (1, 4)))
_group("request_to_ring", ("virtio_queue_rq", (1,)), ("virtqueue_add_sgs", (1, 2)))
_group("doorbell_fast", ("vm_notify", (2,)), ("kvm_exit", (1,)), ("kvm_fast_mmio", (1,)))
_group("doorbell_exit", ("vm_notify", (2,)), ("kvm_exit", (1,)), ("kvm_mmio", (1, 3, 2)), ("kvm_userspace_exit", (1,)))
_group("vp_doorbell_fast", ("vp_notify", (2,)), ("kvm_exit", (1,)), ("kvm_fast_mmio", (1,)))
_group("vp_doorbell_exit", ("vp_notify", (2,)), ("kvm_exit", (1,)), ("kvm_mmio", (1, 3, 4)), ("kvm_userspace_exit", (1,)))
_group("mmio_read", ("kvm_exit", (1,)), ("kvm_mmio", (1, 2, 3)), ("kvm_userspace_exit", (1,)), ("kvm_entry", ()))
_group("mmio_write", ("kvm_exit", (1,)), ("kvm_mmio", (1, 2, 3)), ("kvm_userspace_exit", (1,)), ("kvm_entry", ()))
_group("pop_read", ("virtqueue_pop", (1,)), ("virtio_blk_handle_read", (1, 2, 3)))
_group("pop_write", ("virtqueue_pop", (1,)), ("virtio_blk_handle_write", (1, 2, 3)))
_group("pop_other", ("virtqueue_pop", (1,)), ("virtio_blk_handle_other", (1, 2)))
_group("nvme_command", ("nvme_queue_rq", (1,)), ("nvme_commit_rqs", (2,)))
_group("nvme_interrupt", ("irq_handler_entry", (2,)), ("nvme_irq", (1,)))
_group("request_done", ("block_rq_complete", (1,)), ("block_bio_complete", (2,)))
_group("host:request_done", ("host:block_rq_complete", (1,)), ("host:block_bio_complete", (2,)))
_group("completion_to_ring", ("virtio_blk_rw_complete", (1, 2)), ("virtio_blk_req_complete", (1, 3)), ("virtqueue_fill", (1, 4)))
_group("irqfd", ("virtio_notify_irqfd", (1,)), ("kvm_set_irq", (2, 3)))
_group("irqfd_msi", ("virtio_notify_irqfd", (1,)), ("kvm_msi_set_irq", (2, 3)))
_group("signal_msi", ("virtio_notify", (1,)), ("kvm_msi_set_irq", (2, 3)))
_group("irq_line", ("virtio_notify", (1,)), ("kvm_set_irq", (2, 3)))
_group("virtblk_interrupt", ("vring_interrupt", (1,)), ("virtblk_done", (1,)))
