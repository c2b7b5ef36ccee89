"""What every run through a real vCPU must add up to, and what it may leave open."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from vblklab.kvm import host

__all__ = ["account", "nothing_left_of_kvm", "open_of_kvm"]


@pytest.fixture(autouse=True)
def nothing_left_of_kvm() -> Iterator[None]:
    """After every test of a module that imports this: no vCPU, VM, eventfd, socket or thread more than before, daemons too."""
    before = threading.active_count(), open_of_kvm()
    yield
    assert (threading.active_count(), open_of_kvm()) == before


def open_of_kvm() -> list[str]:
    """What this process has open of KVM and of eventfds; the tests' own fixture looks for everything else."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            pass  # the listing's own
    return sorted(link for link in links if "kvm" in link or "event" in link or link.startswith("socket"))


def account(counters: dict[str, int], kick: str) -> None:
    """No kick and no interrupt is lost: each has an equal at the other end of the wire."""
    assert counters["kicks"] == counters["doorbell_stores"] == counters["eventfd_kicks"] > 0
    assert counters["doorbell_exits"] == (counters["kicks"] if kick == "mmio-exit" else 0)
    assert counters.get("vcpu_mmio_exits", counters["mmio_exits"]) == counters["mmio_exits"]
    assert counters["interrupts_sent"] == counters["interrupts_seen"]
    assert counters["interrupts_sent"] == counters["interrupts_taken"] + counters["interrupts_coalesced"] >= counters["notifies"]
    assert counters["interrupts_coalesced"] >= 0
    if "vcpu_irq_injections" in counters and not host.apicv():
        handled = counters["interrupts_taken"] + counters["interrupts_spurious"]
        assert handled <= counters["vcpu_irq_injections"], "an entry that is cancelled is injected and counted again, as often as it is"
