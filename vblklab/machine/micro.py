"""Single parts in a loop: what a system call, a wake-up, an exit, an interrupt and a read cost on this machine.

Every function returns its samples in ns; a sample is one passage, or the mean of a short batch where one is shorter than the clock's
own cost.  Nothing here runs a recipe: no ring, no driver, no device.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from mmap import mmap
from pathlib import Path

from ..errors import Stalled
from ..kvm import payload
from ..kvm.guest import FIRST_MSI_GSI, LINE_EDGE, PayloadVm
from ..kvm.vcpu import MmioExit
from ..peer.process import wait_or_kill
from .live_device import short_turns
from .micro_peer import STOP

__all__ = ["Peer", "copies", "crossings", "eventfd_same_thread", "peer_turns", "preads", "switches", "syscalls", "thread_wakes", "two_cpus"]

_clock = time.perf_counter_ns
_BATCH = 50
_BELL, _RAM = payload.REGISTERS_GPA + 0x50, 0x800
_STALL_S = 10.0
DEVICE_NS, DRIVER_NS = 90_000, 80_000
"""How long the two sides of a loop work between two wake-ups: about what our device and our driver do, because a CPU that has slept
longer wakes later."""


def two_cpus() -> tuple[int, int] | None:
    """Two CPUs of this process, on different cores if there are; None if it has only one."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cpus) < 2:
        return None
    first = cpus[0]
    return first, next((cpu for cpu in cpus[1:] if _core(cpu) != _core(first)), cpus[1])


def _core(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return str(cpu)


def _batches(call: Callable[[], object], n: int) -> list[float]:
    """The mean of short batches, less what the loop itself costs."""
    samples = []
    for _ in range(n):
        start = _clock()
        for _ in range(_BATCH):
            call()
        middle = _clock()
        for _ in range(_BATCH):
            _nothing()
        end = _clock()
        samples.append(max((2 * middle - start - end) / _BATCH, 0.0))
    return samples


_nothing = sys.getrecursionlimit  # a call of a C function that does nothing


def syscalls(n: int = 300) -> list[float]:
    """``getppid()``: into the kernel and back."""
    return _batches(os.getppid, n)


def eventfd_same_thread(n: int = 300) -> list[float]:
    """A write to an eventfd and the read that takes it, in one thread: two system calls, no wake-up."""
    with _eventfd() as fd:

        def both() -> None:
            os.eventfd_write(fd, 1)
            os.eventfd_read(fd)

        return _batches(both, n)


@contextmanager
def _eventfd(flags: int = 0) -> Iterator[int]:
    fd = os.eventfd(0, flags | os.EFD_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def thread_wakes(n: int = 200) -> list[float]:
    """From the write of an eventfd to the moment at which another thread of this interpreter is awake and has its lock."""
    woken: list[int] = []
    samples: list[float] = []
    with _eventfd() as kick, _eventfd() as call:

        def other() -> None:
            while os.eventfd_read(kick) < STOP:
                woken.append(_clock())
                os.eventfd_write(call, 1)

        thread = threading.Thread(target=other, name="vblklab calibration", daemon=True)
        end_short_turns = short_turns()
        thread.start()
        try:
            for _ in range(n):
                _work(DRIVER_NS)
                start = _clock()
                os.eventfd_write(kick, 1)
                os.eventfd_read(call)
                samples.append(woken[-1] - start)
        finally:
            os.eventfd_write(kick, STOP)
            thread.join()
            end_short_turns()
    return samples


def _work(ns: int) -> None:
    until = _clock() + ns
    while _clock() < until:
        pass


class Peer:
    """Another process that answers kicks; see micro_peer.  ``turns`` yields one turn's stamps after each kick."""

    def __init__(self, stack: ExitStack, *, cpu: int = -1, work_ns: int = DEVICE_NS) -> None:
        self.kick = stack.enter_context(_eventfd(os.EFD_NONBLOCK))
        self.call = stack.enter_context(_eventfd(os.EFD_NONBLOCK))
        memory = os.memfd_create("vblklab-calibration")
        stack.callback(os.close, memory)
        os.ftruncate(memory, 4096)
        page = stack.enter_context(mmap(memory, 4096))
        view = stack.enter_context(memoryview(page))
        self._words = stack.enter_context(view.cast("q"))
        self._turn = 0
        env = os.environ | {"PYTHONPATH": os.pathsep.join([_PARENT, *filter(None, [os.environ.get("PYTHONPATH")])])}
        numbers = map(str, (self.kick, self.call, memory, cpu, work_ns))
        command = [sys.executable, "-m", "vblklab.machine.micro_peer", *numbers]
        fds = (self.kick, self.call, memory)
        child = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL, start_new_session=True, env=env)
        stack.callback(wait_or_kill, child, 5)
        stack.callback(os.eventfd_write, self.kick, STOP)
        self.epoll = stack.enter_context(select.epoll())
        self.epoll.register(self.call, select.EPOLLIN)
        self.wait()

    def wait(self) -> int:
        """Sleep until the call; when this side was awake."""
        if not self.epoll.poll(_STALL_S):
            raise Stalled("the other process of the calibration does not answer", "calibrate again on a machine with less load")
        now = _clock()
        os.eventfd_read(self.call)
        return now

    def stamps(self) -> tuple[int, int, int]:
        """Of the last turn: awake, before the call's write, after it."""
        self._turn += 1
        deadline = _clock() + int(_STALL_S * 1e9)
        while self._words[3] < self._turn:
            if _clock() > deadline:
                raise Stalled("the other process of the calibration lost a kick", "calibrate again")
        return self._words[0], self._words[1], self._words[2]


_PARENT = str(Path(__file__).resolve().parent.parent.parent)


@contextmanager
def _kept_to(cpu: int | None) -> Iterator[None]:
    """This thread on one CPU, if one is given."""
    if cpu is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def peer_turns(cpus: tuple[int, int] | None, n: int = 300) -> dict[str, list[float]]:
    """Eventfds between two processes, each on a CPU of its own: ``write`` the call, ``there`` and ``back`` until the other is awake."""
    found: dict[str, list[float]] = {"write": [], "there": [], "back": []}
    with ExitStack() as stack:
        stack.enter_context(_kept_to(cpus[0] if cpus else None))
        peer = Peer(stack, cpu=cpus[1] if cpus else -1)
        for _ in range(n):
            _work(DRIVER_NS)
            start = _clock()
            os.eventfd_write(peer.kick, 1)
            written = _clock()
            back = peer.wait()
            awake, called, _ = peer.stamps()
            found["write"].append(written - start)
            found["there"].append(awake - start)
            found["back"].append(back - called)
    return found


def switches(n: int = 300) -> list[float]:
    """Half a round trip between two processes on one CPU: a switch, with an eventfd's write, its read and a poll around it."""
    cpu = min(os.sched_getaffinity(0))
    samples = []
    with ExitStack() as stack:
        stack.enter_context(_kept_to(cpu))
        peer = Peer(stack, cpu=cpu, work_ns=0)
        for _ in range(n):
            start = _clock()
            os.eventfd_write(peer.kick, 1)
            samples.append((peer.wait() - start) / 2)
            peer.stamps()
    return samples


def crossings(cpus: tuple[int, int] | None, n: int = 300) -> dict[str, list[float]]:
    """A real vCPU (the payload of KvmMachine, without rings), its thread on one CPU, and another process on the other.

    ``pio-exit`` a store to memory and an ``out`` that leaves to user space; ``mmio-exit`` and ``ioeventfd`` the same with a store that
    leaves to user space, or is answered in the kernel, less the first; ``kick:mmio-exit``, ``kick:ioeventfd`` from the driver's side of
    the doorbell until the other process is awake; ``ring:…`` until the driver's side goes on; ``irqfd`` from the end of the other
    process's write until the idle vCPU's thread is back from the guest; ``msi`` KVM_SIGNAL_MSI and the entry that takes it, less such
    an entry without one.
    """
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        stack.enter_context(_kept_to(cpus[0] if cpus else None))
        peer = Peer(stack, cpu=cpus[1] if cpus else -1)

        def serve(exit_: MmioExit) -> int:
            if exit_.addr == _BELL:
                os.eventfd_write(peer.kick, 1)
            return 0

        guest = PayloadVm(memoryview(mmap(-1, 4096)), memoryview(mmap(-1, 4096)), serve)
        stack.callback(guest.close)
        with guest.vcpu.owned():
            guest.set_up_apic(LINE_EDGE)
            found |= _stores(guest, n)
            found["msi"] = _messages(guest, n)
            guest.vm.irqfd(peer.call, FIRST_MSI_GSI)
            found |= _kicks(guest, peer, n, leaves=True)
            guest.vm.ioeventfd(peer.kick, _BELL, 4, datamatch=0)
            found |= _kicks(guest, peer, n, leaves=False)
    return found


def _stores(guest: PayloadVm, n: int) -> dict[str, list[float]]:
    """The same instructions of the payload with three targets: memory, an address that leaves, one that an ioeventfd answers."""
    with _eventfd() as fd:
        guest.vm.ioeventfd(fd, _BELL + 4, 4)
        times: dict[int, list[float]] = {_RAM: [], _BELL - 4: [], _BELL + 4: []}
        for _ in range(n):
            for addr, samples in times.items():
                start = _clock()
                guest.store(addr, 0)
                samples.append(_clock() - start)
        guest.vm.remove_ioeventfd(fd, _BELL + 4, 4)
    memory, leaving, answered = times.values()
    return {
        "pio-exit": memory,
        "mmio-exit": [max(b - a, 0.0) for a, b in zip(memory, leaving, strict=True)],
        "ioeventfd": [max(b - a, 0.0) for a, b in zip(memory, answered, strict=True)],
    }


def _messages(guest: PayloadVm, n: int) -> list[float]:
    samples = []
    for _ in range(n):
        start = _clock()
        guest.take_pending()
        middle = _clock()
        guest.vm.signal_msi(payload.MSI_VECTORS[0])
        guest.take_pending()
        samples.append(max(float(_clock() - middle - (middle - start)), 0.0))
    return samples


def _kicks(guest: PayloadVm, peer: Peer, n: int, *, leaves: bool) -> dict[str, list[float]]:
    name = "mmio-exit" if leaves else "ioeventfd"
    kicks: list[float] = []
    rings: list[float] = []
    wakes: list[float] = []
    for _ in range(n):
        _work(DRIVER_NS)
        start = _clock()
        guest.ring(_BELL, 0, leaves=leaves)
        rung = _clock()
        while not guest.idle():
            pass
        back = _clock()
        awake, _, called = peer.stamps()
        kicks.append(awake - start)
        rings.append(rung - start)
        wakes.append(max(back - called, 0))
    return {f"kick:{name}": kicks, f"ring:{name}": rings, "irqfd": wakes}


def preads(folder: str | Path | None, direct: bool, n: int = 300, length: int = 4096) -> list[float]:
    """``preadv`` of ``length`` bytes at random places of a file that was just written; raises OSError where the fs has no O_DIRECT."""
    size = 8 << 20
    with ExitStack() as stack:
        fd, name = tempfile.mkstemp(prefix="vblklab-calibration-", dir=folder)
        stack.callback(os.unlink, name)
        stack.callback(os.close, fd)
        os.write(fd, bytes(size))
        if direct:
            os.fsync(fd)
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            stack.callback(os.close, fd)
        page = stack.enter_context(mmap(-1, length))
        view = stack.enter_context(memoryview(page))
        samples: list[float] = []
        at = 0
        for _ in range(n):
            at = (at + 0x9E3779B1 * 4096) % (size - length) & -4096
            start = _clock()
            os.preadv(fd, [view], at)
            samples.append(_clock() - start)
    return samples


def copies(n: int = 300, length: int = 1 << 17) -> list[float]:
    """Copying ``length`` bytes between two mappings."""
    with mmap(-1, length) as source, mmap(-1, length) as target, memoryview(source) as a, memoryview(target) as b:
        a[:] = bytes(range(256)) * (length // 256)
        samples: list[float] = []
        for _ in range(n):
            start = _clock()
            b[:] = a
            samples.append(_clock() - start)
    return samples
