"""Block requests followed through a saved trace: when each bio was queued, when its request was issued, when it completed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from .ftrace import Record

__all__ = ["Bio", "Blocks"]


@dataclass(slots=True)
class Bio:
    """A bio; times in ns, 0 is not seen."""

    op: str
    dev: str
    sector: int
    count: int
    io: int
    queued: int = 0
    issued: int = 0
    done: int = 0


@dataclass(slots=True)
class _Request:
    sector: int
    count: int
    number: int
    bios: list[Bio]
    issued: int = 0


@dataclass
class Blocks:
    """Follows the requests of all disks through the records; ``points`` are (ns, CPU, key, numbers).

    ``guest``: the trace is a guest's, whose keys have no ``host:`` before them.
    """

    guest: bool
    bios: list[Bio] = field(default_factory=list)
    points: list[tuple[int, int, str, tuple[int, ...]]] = field(default_factory=list)
    unmatched: int = 0
    _waiting: dict[tuple[str, str, int], deque[Bio]] = field(default_factory=dict)
    _requests: dict[tuple[str, str, int], deque[_Request]] = field(default_factory=dict)
    _number: int = 0

    def read(self, record: Record) -> None:
        """The next record, in the order of time."""
        args = record.args
        op = _op(str(args.get("rwbs", "")))
        if record.name not in _HANDLERS or not op or "sector" not in args:
            return
        found = _HANDLERS[record.name](self, record, op, str(args["dev"]), int(args["sector"]), int(args.get("nr_sector", 0)))
        if found is None:
            self.unmatched += 1
        else:
            key, numbers = found
            if self.guest and key == "block_rq_issue":
                numbers = int(args["sector"]), int(args.get("nr_sector", 0))
            self.points.append((record.t_ns, record.cpu, key if self.guest else f"host:{key}", numbers))

    def queue(self, record: Record, op: str, dev: str, sector: int, count: int) -> Any:
        bio = Bio(op, dev, sector, count, len(self.bios), record.t_ns)
        self.bios.append(bio)
        self._waiting.setdefault((dev, op, sector), deque()).append(bio)
        return "block_bio_queue", (bio.io, sector, count)

    def split(self, record: Record, op: str, dev: str, sector: int, count: int) -> Any:
        """The front goes on by itself; the rest waits to become requests of its own, as old as the whole."""
        waiting = self._waiting.get((dev, op, sector))
        new = record.args.get("new_sector")
        if not waiting or not isinstance(new, int):
            return None
        whole = waiting[-1]
        rest = Bio(op, dev, new, whole.sector + whole.count - new, len(self.bios), whole.queued)
        whole.count = new - sector
        self.bios.append(rest)
        self._waiting.setdefault((dev, op, new), deque()).append(rest)
        return "block_split", (whole.io, new)

    def _take(self, dev: str, op: str, sector: int) -> Bio | None:
        waiting = self._waiting.get((dev, op, sector))
        return waiting.popleft() if waiting else None

    def getrq(self, record: Record, op: str, dev: str, sector: int, count: int) -> Any:
        bio = self._take(dev, op, sector)
        if bio is None:
            return None
        request = self._new(dev, op, sector, count, [bio])
        return "block_getrq", (bio.io, request.number)

    def _new(self, dev: str, op: str, sector: int, count: int, bios: list[Bio]) -> _Request:
        self._number += 1
        request = _Request(sector, count, self._number, bios)
        self._requests.setdefault((dev, op, sector), deque()).append(request)
        return request

    def backmerge(self, record: Record, op: str, dev: str, sector: int, count: int) -> Any:
        return self._merge("block_bio_backmerge", op, dev, sector, count, front=False)

    def frontmerge(self, record: Record, op: str, dev: str, sector: int, count: int) -> Any:
        return self._merge("block_bio_frontmerge", op, dev, sector, count, front=True)

    def _merge(self, key: str, op: str, dev: str, sector: int, count: int, *, front: bool) -> Any:
        bio = self._take(dev, op, sector)
        for (its_dev, its_op, start), requests in list(self._requests.items()):
            for request in requests:
                if (its_dev, its_op) != (dev, op) or request.issued or bio is None:
                    continue
                if sector == (start - count if front else start + request.count):
                    if front:
                        requests.remove(request)
                        request.sector = sector
                        self._requests.setdefault((dev, op, sector), deque()).append(request)
                    request.count += count
                    request.bios.append(bio)
                    return key, (bio.io, request.number)
        return None

    def issue(self, record: Record, op: str, dev: str, sector: int, count: int) -> Any:
        requests = self._requests.get((dev, op, sector))
        request = next((one for one in requests or () if not one.issued), None)
        if request is None:  # how it came about was not recorded
            bio = self._take(dev, op, sector) or Bio(op, dev, sector, count, len(self.bios))
            if bio.io == len(self.bios):
                self.bios.append(bio)
            request = self._new(dev, op, sector, count, [bio])
        request.issued = record.t_ns
        request.count = count
        for bio in request.bios:
            bio.issued = record.t_ns
        return "block_rq_issue", (request.number,)

    def requeue(self, record: Record, op: str, dev: str, sector: int, count: int) -> Any:
        request = next((one for one in self._requests.get((dev, op, sector), ()) if one.issued), None)
        if request is None:
            return None
        request.issued = 0
        return "block_rq_requeue", (request.number,)

    def complete(self, record: Record, op: str, dev: str, sector: int, count: int) -> Any:
        requests = self._requests.get((dev, op, sector))
        request = next((one for one in requests or () if one.issued), None)
        if requests is None or request is None:
            return None
        requests.remove(request)
        if 0 < count < request.count:  # the rest ends later
            request.sector, request.count = sector + count, request.count - count
            self._requests.setdefault((dev, op, request.sector), deque()).appendleft(request)
        else:
            for bio in request.bios:
                bio.done = record.t_ns
        return "block_rq_complete", (request.number,)


_HANDLERS: dict[str, Any] = {
    "block_bio_queue": Blocks.queue,
    "block_split": Blocks.split,
    "block_getrq": Blocks.getrq,
    "block_bio_backmerge": Blocks.backmerge,
    "block_bio_frontmerge": Blocks.frontmerge,
    "block_rq_issue": Blocks.issue,
    "block_rq_requeue": Blocks.requeue,
    "block_rq_complete": Blocks.complete,
}


def _op(rwbs: str) -> str:
    """R, W or D(iscard); a flush that moves nothing is none."""
    letters = rwbs.lstrip("F")
    return next((letter for letter in letters if letter in "RWD"), "")
