"""Chapter 02's checks: the right driver, half-right ones with the hint for their mistake, and the questions about runs."""

from __future__ import annotations

import errno
import struct
from collections.abc import Generator
from typing import Any

import pytest

import vblklab as vb
from vblklab.lab.check import Verdict

Steps = Generator[Any, int, Any]


class Right(vb.EmptyDriver):
    def header(self, kind: int, sector: int) -> bytes:
        return struct.pack("<IIQ", kind, 0, sector)

    def scatter(self, kind: int, header: Any, data: Any, status: Any) -> Any:
        if kind == 1:
            return [header, *data], [status]
        return [header], [*data, status]

    def queue_rq(self, rq: Any, last: bool) -> Steps:
        ring = self.queues[rq.queue]
        readable, writable = self.prepare(rq)
        try:
            head = ring.add_sgs(readable, writable, rq)
        except vb.QueueFull:
            return False
        yield self.on_ring(rq, head)
        ring.publish()
        if last:
            yield from self.commit_rqs(rq.queue)
        return True

    def commit_rqs(self, queue: int) -> Steps:
        yield ("virtqueue_kick_prepare", queue)
        if self.wants_kick(queue):
            yield from self.doorbell(queue)

    def error_of(self, status: int) -> int:
        return {0: 0, 2: errno.EOPNOTSUPP}.get(status, errno.EIO)

    def virtblk_done(self, queue: int) -> Steps:
        ring = self.queues[queue]
        while True:
            ring.disable_cb()
            while got := ring.get_buf():
                yield from self.end(*got)  # type: ignore[arg-type]
            yield ("virtqueue_enable_cb_prepare", queue)
            ring.enable_cb()
            yield ("virtqueue_enable_cb", queue)
            if ring.enable_cb_check():
                break
        yield from self.iostack.run_hw_queue(queue)


NAMES = [f"driver_{stage}" for stage in ("header", "scatter", "queue", "full", "kick", "error", "done", "pressure")] + ["driver"]


def judged(name: str, **changed: Any) -> Verdict:
    verdict: Verdict = getattr(vb.check, name)(type("MyDriver", (Right,), changed))
    return verdict


@pytest.mark.parametrize("name", NAMES)
def test_the_right_driver_passes_every_stage(name: str) -> None:
    assert judged(name).ok, judged(name).text


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_empty_driver_is_refused(name: str) -> None:
    assert "Give the class itself" in getattr(vb.check, name)(vb.VirtioBlkDriver).text
    assert "Give the class itself" in getattr(vb.check, name)(3).text


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_class_is_told_what_comes_first(name: str) -> None:
    verdict = getattr(vb.check, name)(vb.EmptyDriver)
    assert verdict.state == "wrong"
    assert "no method `header` of its own yet" in verdict.text


def dots(self: Any, *_: Any) -> Any: ...


def nothing(self: Any, *_: Any) -> Any:
    return ...


OPEN = {
    "driver_header": ("header", nothing),
    "driver_scatter": ("scatter", dots),
    "driver_queue": ("queue_rq", dots),
    "driver_kick": ("commit_rqs", dots),
    "driver_error": ("error_of", dots),
    "driver_done": ("virtblk_done", dots),
}


@pytest.mark.parametrize("name", OPEN)
def test_three_dots_are_open_and_not_wrong(name: str) -> None:
    method, body = OPEN[name]
    assert judged(name, **{method: body}).state == "open"
    assert judged("driver", **{method: body}).state == "open"


# -- half-right drivers --------------------------------------------------------------------------------------------------------


def scatter(sides: Any) -> Any:
    return lambda self, kind, header, data, status: sides(kind, header, data, status)


def queue(*steps: str, returns: Any = True, catch: bool = False, dont_prepare: bool = False) -> Any:
    """A ``queue_rq`` of these steps, in this order."""

    def queue_rq(self: Any, rq: Any, last: bool) -> Steps:
        ring, head = self.queues[rq.queue], 0
        sides = self.prepare(rq) if not dont_prepare else (rq.pdu[2], [*rq.segments, *rq.pdu[3]])
        for step in steps:
            if step == "add":
                try:
                    head = ring.add_sgs(*sides, rq)
                except vb.QueueFull:
                    if not catch:
                        raise
                    return "full"
            elif step == "point":
                yield self.on_ring(rq, head)
            elif step == "publish":
                ring.publish()
            elif step == "ring":
                yield from self.doorbell(rq.queue)
            elif step == "wait":
                yield vb.WAIT
            elif step == "commit":
                yield from self.commit_rqs(rq.queue)
        return returns

    return queue_rq


def published_when_full(self: Any, rq: Any, last: bool) -> Steps:
    ring = self.queues[rq.queue]
    try:
        head = ring.add_sgs(*self.prepare(rq), rq)
        yield self.on_ring(rq, head)
        return True
    except vb.QueueFull:
        return False
    finally:
        ring.publish()


def commit(*steps: str) -> Any:
    def commit_rqs(self: Any, queue: int) -> Steps:
        wanted = True
        for step in steps:
            if step == "point":
                yield ("virtqueue_kick_prepare", queue)
            elif step == "ask":
                wanted = self.wants_kick(queue)
            elif step == "ask, forget":
                self.wants_kick(queue)
            elif step == "ring" and wanted:
                yield from self.doorbell(queue)

    return commit_rqs


def done(*, off: bool = True, drain: str = "all", end: bool = True, on: bool = True, check: str = "loop", points: bool = True) -> Any:
    def virtblk_done(self: Any, queue: int) -> Steps:
        ring = self.queues[queue]
        first = True
        while first or (check == "loop, off once" and not ring.enable_cb_check()):
            if off and (first or check != "loop, off once"):
                ring.disable_cb()
            first = False
            while got := ring.get_buf():
                if end:
                    yield from self.end(*got)
                if drain == "one":
                    break
            if points:
                yield ("virtqueue_enable_cb_prepare", queue)
            if on:
                ring.enable_cb()
            yield ("virtqueue_enable_cb", queue)
            if check == "loop" and not ring.enable_cb_check():
                first = True
            elif check == "ignored":
                ring.enable_cb_check()
        yield from self.iostack.run_hw_queue(queue)

    return virtblk_done


def without_room(self: Any, queue: int) -> Steps:
    with_room = self.iostack
    self.iostack = type(
        "Deaf", (), {"run_hw_queue": lambda self, queue: iter(()), "complete": with_room.complete, "queues": with_room.queues}
    )()
    try:
        yield from Right.virtblk_done(self, queue)
    finally:
        self.iostack = with_room


def room_first(self: Any, queue: int) -> Steps:
    yield from self.iostack.run_hw_queue(queue)
    yield from Right.virtblk_done(self, queue)


HALF_RIGHT: list[tuple[str, dict[str, Any], str]] = [
    ("driver_header", {"header": lambda self, kind, sector: (kind, sector)}, "this is a tuple"),
    ("driver_header", {"header": lambda self, kind, sector: struct.pack(">IIQ", kind, 0, sector)}, "wrong order"),
    ("driver_header", {"header": lambda self, kind, sector: struct.pack("<IQ", kind, sector)}, "12 bytes"),
    ("driver_header", {"header": lambda self, kind, sector: struct.pack("<QQ", kind, 512 * sector)}, "not in bytes"),
    ("driver_header", {"header": lambda self, kind, sector: struct.pack("<IIQ", 0, 0, sector)}, "For type 1"),
    ("driver_header", {"header": lambda self, kind, sector: struct.pack("<IIQQ", kind, 0, sector, 0)}, "this one has 24"),
    ("driver_header", {"header": lambda self, kind, sector: struct.pack("<II", kind, sector)}, "It raised `error"),
    ("driver_scatter", {"scatter": scatter(lambda k, h, d, s: [h, *d, s])}, "Return two lists"),
    ("driver_scatter", {"scatter": scatter(lambda k, h, d, s: ([h], [*d, s]))}, "A write: the device reads from memory"),
    ("driver_scatter", {"scatter": scatter(lambda k, h, d, s: ([h, *d], [s]))}, "A read: the device writes into memory"),
    ("driver_scatter", {"scatter": scatter(lambda k, h, d, s: ([h], [s, *d]))}, "status byte comes last"),
    ("driver_scatter", {"scatter": scatter(lambda k, h, d, s: ([h], [d, s]))}, "list inside a list"),
    ("driver_scatter", {"scatter": scatter(lambda k, h, d, s: ([h], [*d[:1], s]))}, "Is all data there?"),
    ("driver_scatter", {"scatter": scatter(lambda k, h, d, s: ([], [h, *d, s]))}, "header must be among what the device reads"),
    ("driver_scatter", {"scatter": scatter(lambda k, h, d, s: ([h, s], [*d]))}, "status byte must be among"),
    ("driver_scatter", {"scatter": scatter(lambda k, h, d, s: ([h], [*d[::-1], s]))}, "not in its order"),
    ("driver_queue", {"queue_rq": lambda self, rq, last: True}, "passes no trace point"),
    ("driver_queue", {"queue_rq": queue("point")}, "Nothing was put on the ring"),
    ("driver_queue", {"queue_rq": queue("add", "point")}, "index does not count it"),
    ("driver_queue", {"queue_rq": queue("publish", "add", "point")}, "publish before"),
    ("driver_queue", {"queue_rq": queue("add", "publish", "point")}, "a trace point is missing"),
    ("driver_queue", {"queue_rq": queue("add", "point", "publish", returns=None)}, "returned None"),
    ("driver_queue", {"queue_rq": queue("add", "point", "publish", dont_prepare=True)}, "self.prepare(rq)"),
    ("driver_queue", {"queue_rq": queue("add", "point", "publish", "wait")}, "`queue_rq` waits"),
    ("driver_full", {"queue_rq": queue("add", "point", "publish")}, "raised `QueueFull`. Catch it"),
    ("driver_full", {"queue_rq": queue("add", "point", "publish", catch=True)}, "returned 'full'"),
    ("driver_full", {"queue_rq": published_when_full}, "you publish all the same"),
    ("driver_kick", {"commit_rqs": commit("point")}, "Nobody asked"),
    ("driver_kick", {"commit_rqs": commit("point", "ring")}, "ring without asking"),
    ("driver_kick", {"commit_rqs": commit("ask", "point", "ring")}, "Before the question a trace point"),
    ("driver_kick", {"commit_rqs": commit("point", "ask")}, "nobody rang"),
    ("driver_kick", {"commit_rqs": commit("point", "ask, forget", "ring")}, "asked for no kick, and you rang"),
    ("driver_error", {"error_of": lambda self, status: status}, "`errno.EIO` is right"),
    ("driver_error", {"error_of": lambda self, status: errno.EIO if status else 0}, "`errno.EOPNOTSUPP` is right"),
    ("driver_error", {"error_of": lambda self, status: -errno.EIO if status else 0}, "is negative, as in C"),
    ("driver_error", {"error_of": lambda self, status: {0: 0, 1: errno.EIO, 2: errno.EOPNOTSUPP}[status]}, "KeyError"),
    ("driver_error", {"error_of": lambda self, status: {1: errno.EIO, 2: errno.EOPNOTSUPP}.get(status, 0)}, "never written"),
    ("driver_done", {"virtblk_done": done(end=False)}, "nobody hears of it"),
    ("driver_done", {"virtblk_done": done(drain="one", check="none")}, "One interrupt may stand for many"),
    ("driver_done", {"virtblk_done": done(on=False, check="none")}, "nobody calls `enable_cb`"),
    ("driver_done", {"virtblk_done": done(off=False, check="none")}, "First switch interrupts off"),
    ("driver_done", {"virtblk_done": done(points=False)}, "Before `enable_cb` a trace point is missing"),
    ("driver_done", {"virtblk_done": done(check="none")}, "you did not look again"),
    ("driver_done", {"virtblk_done": done(check="ignored")}, "returned False, and you ended"),
    ("driver_done", {"virtblk_done": done(check="loop, off once")}, "Begin again with `disable_cb`"),
    ("driver_pressure", {"virtblk_done": without_room}, "nobody told the block layer"),
    ("driver_pressure", {"virtblk_done": room_first}, "before anything came back"),
]


@pytest.mark.parametrize(("name", "changed", "hint"), HALF_RIGHT)
def test_a_half_right_driver_gets_the_hint_for_its_mistake(name: str, changed: dict[str, Any], hint: str) -> None:
    verdict = judged(name, **changed)
    assert verdict.state == "wrong"
    assert hint in verdict.text
    assert "\n" not in str(verdict)


def forever(self: Any, *_: Any) -> Any:
    while True:
        pass


def points_forever(self: Any, *_: Any) -> Steps:
    while True:
        yield ("virtqueue_enable_cb", 0)


@pytest.mark.parametrize("method", ["header", "scatter", "error_of"])
def test_an_endless_loop_is_a_hint(method: str) -> None:
    assert "does not come to an end" in judged("driver", **{method: forever}).text


@pytest.mark.parametrize("method", ["queue_rq", "commit_rqs", "virtblk_done"])
def test_endless_trace_points_are_a_hint(method: str) -> None:
    assert "does not come to an end" in judged("driver", **{method: points_forever}).text


def test_what_only_a_schedule_shows_is_shown_by_the_explorer() -> None:
    """Each test by itself goes well: the request is published at last, only too late for the kick."""

    def queue_rq(self: Any, rq: Any, last: bool) -> Steps:
        taken = yield from Right.queue_rq(self, rq, False)
        if last and rq.tag == 0:
            yield from self.commit_rqs(rq.queue)
        return taken

    verdict = judged("driver_done", queue_rq=queue_rq)
    assert verdict.state == "wrong"


# -- questions about runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def log() -> Any:
    return vb.probe_log(vb.VirtioBlkDriver, vb.VirtioBlkDevice)


def test_the_probe_is_counted(log: Any) -> None:
    assert vb.check.predict_accesses(len(log)).reveal(log).ok
    assert "reads back" in vb.check.predict_accesses(3).reveal(log).text
    assert "vb.probe_log" in vb.check.predict_accesses(3).reveal(3).text


def test_status_is_read_after_features_ok(log: Any) -> None:
    truth = next(at for at, entry in enumerate(log, 1) if entry[:2] == ("write", "Status") and entry[2] & 8) + 1
    assert vb.check.reads_back(truth, log).ok
    assert "what the device thinks" in vb.check.reads_back(truth - 1, log).text
    assert "bit 8" in vb.check.reads_back(5, log).text
    assert "numbers 1 to" in vb.check.reads_back(1000, log).text
    assert str(truth) not in vb.check.reads_back(5, log).text


def run(depth: int, **more: Any) -> Any:
    parts = {name: more.pop(name) for name in ("queue", "driver", "device") if name in more}
    return vb.Pipeline(app=vb.Fio(rw="randread", bs=4096, iodepth=depth, number_ios=300, **more), **parts).run(vb.SimMachine())


def test_kicks_batches_and_rings_are_judged_from_the_runs() -> None:
    many = run(32)
    truth = 1000 * many.counters["kicks"] / many.ios
    assert vb.check.predict_kicks_of_many(truth).reveal(many).ok
    assert "with one request in flight" in vb.check.predict_kicks_of_many(1000).reveal(many).text
    assert not vb.check.predict_kicks_of_many(truth / 9).reveal(many).ok

    runs = {batch: run(32, iodepth_batch=batch) for batch in (1, 2, 32)}
    fewest = min(runs, key=lambda batch: runs[batch].counters["kicks"])
    most = max(runs, key=lambda batch: runs[batch].iops)
    assert fewest != most
    assert vb.check.batches(fewest, most, runs=runs).ok
    assert "needs fewer" in vb.check.batches(1, most, runs=runs).text
    assert "does more" in vb.check.batches(fewest, fewest, runs=runs).text
    assert "no run with 5" in vb.check.batches(5, most, runs=runs).text
    assert "takes 3" in vb.check.batches(fewest, runs).text

    rings = {size: run(16, queue=vb.Split(size)) for size in (4, 16, 64)}
    assert vb.check.ring_size(16, rings).ok
    assert "nine tenths" in vb.check.ring_size(4, rings).text
    assert "a smaller ring is, too" in vb.check.ring_size(64, rings).text
    assert "no run with 5" in vb.check.ring_size(5, rings).text


def test_polling_is_judged_from_the_runs() -> None:
    one, polling = run(1), run(1, driver=vb.VirtioBlkDriver(poll=True))
    assert vb.check.predict_polling("more").reveal(one, polling).ok
    assert "times for each I/O" in vb.check.predict_polling("fewer").reveal(one, polling).text
    assert "does not poll" in vb.check.predict_polling("more").reveal(polling, one).text


def test_a_sweep_draws_each_run_once() -> None:
    runs = {depth: run(depth) for depth in (1, 4)}
    figure = vb.sweep({"a": runs, "b": {4: runs[4]}}, lambda one: float(one.ios), x="iodepth", y="I/Os", title="t")
    assert [list(trace.x) for trace in figure.data] == [[1, 4], [4]]
    assert [list(trace.y) for trace in figure.data] == [[300, 300], [300]]
    for wrong in ({}, {"a": {}}, {"a": {0: runs[1]}}, {str(name): runs for name in range(9)}):
        with pytest.raises(vb.ConfigError):
            vb.sweep(wrong, lambda one: 1.0, x="x", y="y", title="t")
