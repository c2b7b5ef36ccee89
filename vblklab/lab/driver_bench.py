"""A driver on the workbench: a small ring, and above and below it whatever a check wants to happen."""

from __future__ import annotations

from collections.abc import Callable, Generator
from types import SimpleNamespace
from typing import Any

from ..events import Wait, expand
from ..iostack import Op, Request
from ..memory import GuestMemory, GuestPages
from ..ring import Chain, SplitDevice, SplitDriver
from ..spec.virtio_blk import REQ_HEADER_BYTES
from ..spec.virtio_mmio import Reg
from ..transport import MmioTransport
from .bench import Bench, name_of
from .check import Wrong

__all__ = ["DriverBench", "LoggedRing", "ProbeLog", "probe_log"]

_POINTS = 2000
_SECTOR = 512


class LoggedRing(SplitDriver):
    """The driver's half of a ring that writes down what is called."""

    log: list[str]

    def add_sgs(self, readable: Any, writable: Any, token: object) -> int:
        head = super().add_sgs(readable, writable, token)
        self.log.append("add_sgs")
        return head

    def publish(self) -> None:
        self.log.append("publish")
        super().publish()

    def kick_prepare(self) -> bool:
        self.log.append("kick_prepare")
        return super().kick_prepare()

    def get_buf(self) -> tuple[object, int] | None:
        self.log.append("get_buf")
        return super().get_buf()

    def disable_cb(self) -> None:
        self.log.append("disable_cb")
        super().disable_cb()

    def enable_cb(self) -> None:
        self.log.append("enable_cb")
        super().enable_cb()

    def enable_cb_check(self) -> bool:
        self.log.append("enable_cb_check")
        return super().enable_cb_check()


class DriverBench:
    """``run`` a method of the driver; ``log`` is what it did, ``completed`` what it gave back, ``device`` the other half of the ring.

    ``at[key]`` is called when the trace point ``key`` is passed: the moment for the device to act.
    """

    def __init__(self, driver: Any, *, size: int = 8, event_idx: bool = True) -> None:
        self.memory = GuestMemory(bytearray(1 << 16))
        self.pages = GuestPages(self.memory, 0x100)
        self.log: list[str] = []
        self.completed: list[tuple[Request, int]] = []
        self.at: dict[str, Callable[[], None]] = {}
        self.driver = driver()
        hctx = SimpleNamespace(dispatch=[], running=0, requests=[])
        stack: Any = SimpleNamespace(complete=self._complete, run_hw_queue=self._run_hw_queue, queues=[hctx], poll=None)
        wire: Any = SimpleNamespace(notify=self._notify, features=0)
        self.driver.attach(self.pages, wire, stack, queue_size=size)
        self.ring = LoggedRing.alloc(self.pages, size, event_idx=event_idx)
        self.ring.log = self.log  # type: ignore[attr-defined]
        self.driver.queues = [self.ring]
        self.device = SplitDevice(self.memory, self.ring.layout, event_idx=event_idx, indirect=False)
        self.made = 0

    def _complete(self, rq: Request, error: int) -> Generator[Any, int, None]:
        self.log.append("complete")
        self.completed.append((rq, error))
        return
        yield

    def _run_hw_queue(self, queue: int) -> Generator[Any, int, None]:
        self.log.append("run_hw_queue")
        return
        yield

    def _notify(self, queue: int) -> Generator[Any, int, None]:
        self.log.append("doorbell")
        return
        yield

    def request(self, op: Op = Op.READ, sector: int = 3, sectors: int = 1, pieces: int = 1) -> Request:
        """A request as the block layer hands it down."""
        rq = Request(0, self.made)
        self.made += 1
        header, status = self.pages.alloc(REQ_HEADER_BYTES, 16), self.pages.alloc(1, 1)
        rq.pdu = header, status, [(header, REQ_HEADER_BYTES)], [(status, 1)]
        rq.op, rq.sector, rq.length = int(op), sector, sectors * _SECTOR
        part = rq.length // pieces
        rq.segments = [(self.pages.alloc(part, 16), part) for _ in range(pieces)] if rq.length else []
        return rq

    def run(self, steps: Any, what: str) -> Any:
        """Run one of the driver's generators to its end, and return what it returns; raises Wrong where that cannot be."""
        if not hasattr(steps, "send"):
            raise Wrong(f"`{what}` is not a generator: it passes no trace point. Without a `yield` in it nobody can look on.")
        try:
            event = next(steps)
            for _ in range(_POINTS):
                if isinstance(event, Wait):
                    raise Wrong(f"`{what}` waits. It has to return, and is called again when there is something to do.")
                if not isinstance(event, tuple):
                    raise Wrong(f"`{what}` yields {event!r:.40}: a trace point is a tuple, such as `self.on_ring(rq, head)`.")
                for key, *_ in expand(event):
                    self.log.append(f"point {key}")
                    if key in self.at:
                        self.at.pop(key)()
                event = steps.send(0)
        except StopIteration as end:
            return end.value
        raise Wrong(f"`{what}` does not come to an end: stopped after {_POINTS:,} trace points.")

    def queued(self, *requests: Request) -> list[Chain]:
        """Put requests on the ring in the right way and let the device take them."""
        for rq in requests:
            _, _, head, tail = rq.pdu
            self.ring.add_sgs(head, [*rq.segments, *tail], rq)
        self.ring.publish()
        self.ring.kick_prepare()
        self.log.clear()
        return [chain for _ in requests if (chain := self.device.pop()) is not None]

    def finish(self, chain: Chain, status: int = 0) -> None:
        """The device's part: status byte, used element, index."""
        chain.writable[-1][-1] = status
        self.device.fill(chain, sum(map(len, chain.writable)))
        self.device.flush()


# -- the probe, access by access -----------------------------------------------------------------------------------------------


class ProbeLog(list[tuple[str, str, int, int]]):
    """Accesses of a probe: (read or write, register, value, bytes)."""

    def __str__(self) -> str:
        return "\n".join(f"{at:3}  {way:5}  {name:20} {value:#x}" for at, (way, name, value, _) in enumerate(self, 1))

    __repr__ = __str__


class _LoggingBus:
    def __init__(self, bench: Bench, log: ProbeLog) -> None:
        self.bench, self.log = bench, log

    def read(self, offset: int, size: int = 4) -> Generator[Any, int, int]:
        value = self.bench.read(offset, size)
        self.log.append(("read", name_of(offset), value, size))
        return value
        yield

    def write(self, offset: int, value: int, size: int = 4) -> Generator[Any, int, None]:
        self.log.append(("write", name_of(offset), value, size))
        self.bench.write(offset, value, size)
        return
        yield

    def notify(self, queue: int, data: int | None = None) -> Generator[Any, int, None]:
        return self.write(int(Reg.QUEUE_NOTIFY), queue if data is None else data)


def probe_log(driver: Any, device: Any) -> ProbeLog:
    """Let ``driver`` probe ``device`` and write down each access to a register."""
    from ..iostack import IOStack

    bench, log = Bench(device), ProbeLog()
    probing = driver()
    probing.attach(bench.pages, MmioTransport(_LoggingBus(bench, log)), IOStack(), queue_size=16)
    for _ in probing.probe():
        pass
    return log
