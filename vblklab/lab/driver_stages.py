"""Chapter 02's main exercise: the driver's half of the path from an empty class, in eight stages, and all of it under every schedule."""

from __future__ import annotations

import errno
import inspect
import random
import struct
from collections.abc import Callable
from typing import Any

from ..device import VirtioBlkDevice
from ..errors import QueueFull, VblkError
from ..guest.empty import EmptyDriver
from ..guest.fio import Fio
from ..interleave import schedules
from ..iostack import Op
from ..machine.sim import SimMachine
from ..pipeline import Pipeline, Split
from .careful import call, is_open
from .check import Verdict, Wrong, question, right, wrong
from .driver_bench import DriverBench

_IN, _OUT, _FLUSH = 0, 1, 4
_NO_LIMIT = 0
_STATES = 500


class _Open(Wrong):
    """This stage is not answered yet."""


def _bench(driver: Any, **options: Any) -> DriverBench:
    if not (isinstance(driver, type) and issubclass(driver, EmptyDriver)):
        raise Wrong("Give the class itself: `MyDriver`, which begins as `class MyDriver(vb.EmptyDriver)`.")
    bench: DriverBench = call(lambda: DriverBench(driver, **options))
    return bench


def _method(bench: DriverBench, name: str) -> Any:
    method = getattr(bench.driver, name)
    if is_open(method):
        raise _Open
    if getattr(type(bench.driver), name) is getattr(EmptyDriver, name):
        raise Wrong(f"Your driver has no method `{name}` of its own yet: run the cell that adds it to the class.")
    return method


def _run(bench: DriverBench, name: str, *arguments: Any) -> Any:
    method = _method(bench, name)
    if not inspect.isgeneratorfunction(getattr(method, "__func__", method)):
        raise Wrong(f"`{name}` has no `yield`, so it passes no trace point. The text above says where one must stand.")
    value = call(lambda: bench.run(method(*arguments), name))
    if value is ...:
        raise _Open
    return value


# -- what a request looks like -------------------------------------------------------------------------------------------------


def _header(driver: Any) -> str:
    bench = _bench(driver)
    header = _method(bench, "header")
    chance = random.Random(2)
    for kind in (_OUT, _IN, _FLUSH):
        sector = chance.getrandbits(40)
        got = call(header, kind, sector)
        if got is ...:
            raise _Open
        if not isinstance(got, (bytes, bytearray)):
            raise Wrong(f"A header is `bytes`; this is a {type(got).__name__}.")
        want = struct.pack("<IIQ", kind, 0, sector)
        if got == want:
            continue
        if got == struct.pack(">IIQ", kind, 0, sector):
            raise Wrong("The numbers are right, their bytes in the wrong order: virtio is little-endian everywhere.")
        if len(got) == 12:
            raise Wrong("There are 12 bytes: four unused ones stand between type and sector.")
        if len(got) != 16:
            raise Wrong(f"A header has 16 bytes; this one has {len(got)}.")
        if got[8:] == (sector * 512).to_bytes(8, "little"):
            raise Wrong("The sector is asked for as it is, not in bytes.")
        if got[:4] != want[:4]:
            raise Wrong(f"For type {kind} the first four bytes are `{got[:4].hex(' ')}`.")
        raise Wrong(f"The last eight bytes are `{got[8:].hex(' ')}`; for sector {sector:,} they should be `{want[8:].hex(' ')}`.")
    return "Sixteen bytes that the device will take apart as yours did in chapter 01."


def _scatter(driver: Any) -> str:
    bench = _bench(driver)
    scatter = _method(bench, "scatter")
    header, status = (0x1000, 16), (0x2000, 1)
    pieces = [(0x3000, 4096), (0x5000, 512)]
    for kind, data, what in ((_IN, pieces, "A read"), (_OUT, pieces, "A write"), (_FLUSH, [], "A flush")):
        got = call(scatter, kind, header, list(data), status)
        if got is ...:
            raise _Open
        if not isinstance(got, (tuple, list)) or len(got) != 2 or not all(isinstance(side, (list, tuple)) for side in got):
            raise Wrong("Return two lists: what the device may read, and what it may write.")
        readable, writable = (list(side) for side in got)
        _sides(readable, writable, header, data, status, kind, what)
    return "Header first, status last, and the data on the side of whoever writes it."


def _sides(readable: list[Any], writable: list[Any], header: Any, data: list[Any], status: Any, kind: int, what: str) -> None:
    reads = kind == _OUT
    want = ([header, *data], [status]) if reads else ([header], [*data, status])
    if (readable, writable) == want:
        return
    if header not in readable:
        raise Wrong(f"{what}: the header must be among what the device reads, or it cannot know what is wanted.")
    if status not in writable:
        raise Wrong(f"{what}: the status byte must be among what the device writes.")
    if any(isinstance(one, list) for one in (*readable, *writable)):
        raise Wrong(f"{what}: there is a list inside a list. `data` has several segments: put each in with `*data`.")
    if any(part in (writable if reads else readable) for part in data):
        side = "reads from memory" if reads else "writes into memory"
        raise Wrong(f"{what}: the device {side} here, and the data stands on the other side.")
    if sorted(map(str, readable + writable)) != sorted(map(str, want[0] + want[1])):
        raise Wrong(f"{what}: {len(readable) + len(writable)} segments, and {len(want[0]) + len(want[1])} are needed. Is all data there?")
    if readable[0] != header:
        raise Wrong(f"{what}: the header comes first.")
    if writable[-1] != status:
        raise Wrong(f"{what}: the status byte comes last.")
    raise Wrong(f"{what}: the data is not in its order.")


# -- down ----------------------------------------------------------------------------------------------------------------------


def _queue(driver: Any) -> str:
    bench = _bench(driver, size=16)
    for op, sector, pieces in ((Op.READ, 3, 1), (Op.WRITE, 9, 2)):
        rq = bench.request(op, sector, 2, pieces)
        bench.log.clear()
        taken = _run(bench, "queue_rq", rq, False)
        _published(bench)
        if taken is not True:
            raise Wrong(f"The request is on the ring, and `queue_rq` returned {taken!r}. Return `True`: it is taken.")
        chain = _popped(bench)
        kind, _, at = struct.unpack("<IIQ", bytes(chain.readable[0]))
        if (kind, at) != (_IN if op == Op.READ else _OUT, sector):
            raise Wrong(f"The device reads type {kind} and sector {at}. Did you call `self.prepare(rq)`?")
    return "Descriptors, ring entry, and then the index: before that, the request does not exist for the device."


def _published(bench: DriverBench) -> None:
    """Whether a request was put on the ring in the order that the specification fixes."""
    log = bench.log
    if "add_sgs" not in log:
        raise Wrong("Nothing was put on the ring: `head = ring.add_sgs(readable, writable, rq)`.")
    if "publish" not in log:
        raise Wrong("The request stands in the ring and the index does not count it: `ring.publish()`.")
    if log.index("publish") < log.index("add_sgs"):
        raise Wrong("You publish before the request stands in the ring: the device would read what was there before.")
    if "point virtqueue_add_sgs" not in log[log.index("add_sgs") : log.index("publish")]:
        raise Wrong("Between `add_sgs` and `publish` a trace point is missing: `yield self.on_ring(rq, head)`.")


def _popped(bench: DriverBench) -> Any:
    try:
        chain = bench.device.pop()
    except VblkError as error:
        raise Wrong(f"The device refuses what you put on the ring: {error}.") from None
    if chain is None:
        raise Wrong("The device looked into the ring and found nothing.")
    return chain


def _full(driver: Any) -> str:
    bench = _bench(driver, size=8)
    taken = []
    for number in range(3):
        rq = bench.request(sector=number)
        bench.log.clear()
        try:
            taken.append(_run(bench, "queue_rq", rq, False))
        except Wrong as hint:
            if QueueFull.__name__ in str(hint):
                raise Wrong(
                    "A ring of 8 is full after two requests of three descriptors, and `add_sgs` raised `QueueFull`. Catch it."
                ) from None
            raise
    if taken[-1] is not False:
        raise Wrong(f"The third request had no room, and `queue_rq` returned {taken[-1]!r}. `False` tells the block layer to keep it.")
    if "publish" in bench.log:
        raise Wrong("With no room you publish all the same. Return before that.")
    return "The block layer keeps what has no room. This is back-pressure, its first half."


def _kick(driver: Any) -> str:
    for event_idx in (True, False):
        bench = _bench(driver, size=16, event_idx=event_idx)
        _queued(bench)
        bench.log.clear()
        _run(bench, "commit_rqs", 0)
        _asked_first(bench)
        if "doorbell" not in bench.log:
            raise Wrong("The device sleeps and asked to be told, and nobody rang: `yield from self.doorbell(queue)`.")
        bench = _bench(driver, size=16, event_idx=event_idx)
        bench.device.set_notification(False)
        if event_idx:
            bench.device._used16[bench.device._avail_event_at] = 0x8000  # an index far away
        _queued(bench)
        _run(bench, "commit_rqs", 0)
        if "doorbell" in bench.log:
            raise Wrong("The device is awake and asked for no kick, and you rang. Only if `self.wants_kick(queue)` says so.")
    for last, want in ((False, 0), (True, 1)):
        bench = _bench(driver, size=16)
        _run(bench, "queue_rq", bench.request(), last)
        if bench.log.count("doorbell") != want:
            hint = "more follow at once, and one kick is enough for all" if not last else "nothing follows, so the device must be told now"
            raise Wrong(f"`queue_rq` with `last={last}`: {bench.log.count('doorbell')} kicks, and {want} is right: {hint}.")
        if last:
            _asked_first(bench)
    return "One kick for many requests, and none for a device that is awake."


def _queued(bench: DriverBench) -> None:
    _run(bench, "queue_rq", bench.request(), False)
    if "doorbell" in bench.log:
        raise Wrong("`queue_rq` with `last=False` rang the doorbell: more follow at once, and one kick is enough for all.")


def _asked_first(bench: DriverBench) -> None:
    log = bench.log
    if "kick_prepare" not in log:
        if "doorbell" in log:
            raise Wrong("You ring without asking. `self.wants_kick(queue)` reads what the device wrote into the ring.")
        raise Wrong("Nobody asked whether the device wants a kick: `self.wants_kick(queue)`.")
    if "point virtqueue_kick_prepare" not in log[: log.index("kick_prepare")]:
        raise Wrong('Before the question a trace point is missing: `yield ("virtqueue_kick_prepare", queue)`.')


# -- up ------------------------------------------------------------------------------------------------------------------------


def _error(driver: Any) -> str:
    bench = _bench(driver)
    error_of = _method(bench, "error_of")
    for status, want, what in (
        (0, 0, "OK"),
        (1, errno.EIO, "IOERR"),
        (2, errno.EOPNOTSUPP, "UNSUPP"),
        (0xFF, errno.EIO, "never written by the device"),
        (7, errno.EIO, "not one of the specification's"),
    ):
        got = call(error_of, status)
        if got is ...:
            raise _Open
        if got != want or isinstance(got, bool):
            if got == -want and want:
                raise Wrong(f"Status {status}: {got} is negative, as in C. Here an error is the number itself.")
            names = {0: "0", errno.EIO: "errno.EIO", errno.EOPNOTSUPP: "errno.EOPNOTSUPP"}
            raise Wrong(f"Status {status} ({what}) became {got!r}, and `{names[want]}` is right.")
    return "Only a zero is good news, and a byte that nobody wrote is not."


def _done(driver: Any) -> str:
    bench = _bench(driver, size=16)
    requests = [bench.request(sector=number) for number in range(4)]
    chains = bench.queued(*requests)
    for chain in chains[:2]:
        bench.finish(chain)
    _run(bench, "virtblk_done", 0)
    _drained(bench, requests[:2])
    if "point virtqueue_enable_cb_prepare" not in bench.log[: bench.log.index("enable_cb")]:
        raise Wrong('Before `enable_cb` a trace point is missing: `yield ("virtqueue_enable_cb_prepare", queue)`.')
    _late(bench, chains[2], requests[2], "virtqueue_enable_cb_prepare", "the ring was found empty, before interrupts were on")
    if "point virtqueue_enable_cb" not in bench.log:
        raise Wrong('After `enable_cb` a trace point is missing: `yield ("virtqueue_enable_cb", queue)`.')
    if bench.log.count("disable_cb") < 2:
        raise Wrong("Something was found by the second look. Begin again with `disable_cb`, or each answer brings an interrupt.")
    return "Nothing is left behind, also if it comes at the worst moment."


def _explored(driver: Any, *modes: bool) -> str:
    """The start of every schedule of two requests: enough to meet every race that this driver half can have."""
    states = 0
    for event_idx in modes:
        found = call(lambda on=event_idx: schedules(queue=Split(2), driver=driver, event_idx=on, most_states=_STATES), lines=_NO_LIMIT)
        if found.violation is not None:
            how = f"With EVENT_IDX {'on' if event_idx else 'off'} one order of events goes wrong"
            raise Wrong(f"{how}: {found.violation}. The shortest has {len(found.schedule)} steps.")
        states += found.states
    return f"Driver and device were run in every order, up to {states:,} different situations, and nothing is lost."


def _drained(bench: DriverBench, requests: list[Any]) -> None:
    log = bench.log
    given = [rq for rq, _ in bench.completed]
    if "get_buf" not in log:
        raise Wrong("Nothing was taken from the used ring: `ring.get_buf()`.")
    if not given:
        raise Wrong("You take buffers back, and nobody hears of it: `yield from self.end(rq, written)`.")
    if len(given) < len(requests):
        raise Wrong(f"{len(requests)} requests had come back, and you ended {len(given)}. One interrupt may stand for many.")
    if given != requests:
        raise Wrong("Not each request was ended once.")
    if "enable_cb" not in log:
        raise Wrong("Interrupts stay as they are: nobody calls `enable_cb`, so the device need not tell you of the next request.")
    if "disable_cb" not in log or log.index("disable_cb") > log.index("get_buf"):
        raise Wrong("First switch interrupts off with `disable_cb`: while you look, nobody needs to tell you.")
    if log.index("enable_cb") < len(log) - 1 - log[::-1].index("get_buf") and "enable_cb_check" not in log:
        raise Wrong("`enable_cb` comes when the ring is empty, after the last `get_buf`.")


def _late(bench: DriverBench, chain: Any, rq: Any, point: str, when: str) -> None:
    """A request that comes back at the worst moment."""
    bench.log.clear()
    bench.at[point] = lambda: bench.finish(chain)
    _run(bench, "virtblk_done", 0)
    if rq not in [one for one, _ in bench.completed]:
        if "enable_cb_check" not in bench.log:
            raise Wrong(f"A request came back right after {when}. No interrupt tells of it, and you did not look again: `enable_cb_check`.")
        raise Wrong(f"A request came back right after {when}. `enable_cb_check` returned False, and you ended all the same.")


def _pressure(driver: Any) -> str:
    bench = _bench(driver, size=16)
    chains = bench.queued(bench.request())
    bench.finish(chains[0])
    _run(bench, "virtblk_done", 0)
    log = bench.log
    if "run_hw_queue" not in log:
        raise Wrong("There is room again, and nobody told the block layer: `yield from self.iostack.run_hw_queue(queue)`.")
    if log.index("run_hw_queue") < log.index("complete"):
        raise Wrong("You call the block layer before anything came back: there is no room yet.")
    recipe = Pipeline(
        app=Fio(rw="randrw", bs=4096, iodepth=16, number_ios=200, size=1 << 20, verify="crc32"),
        queue=Split(8),
        device=VirtioBlkDevice(indirect=False),
        driver=driver,
    )
    run = call(lambda: recipe.run(SimMachine()), lines=_NO_LIMIT)
    if run.errors or run.mismatches:
        raise Wrong(f"With a ring of 8 and 16 requests at a time there were {run.errors} errors and {run.mismatches} wrong blocks.")
    return f"16 requests at a time through a ring that holds two: {run.counters['requeues']:,} had to wait, and every byte is right."


def _whole(driver: Any) -> str:
    explored = _explored(driver, True, False)
    recipe = Pipeline(app=Fio(rw="randrw", bs=4096, iodepth=8, number_ios=300, size=1 << 20, verify="crc32", fsync=8), driver=driver)
    run = call(lambda: recipe.run(SimMachine(interleave="random")), lines=_NO_LIMIT)
    if run.errors or run.mismatches:
        raise Wrong(f"In a random order of contexts there were {run.errors} errors and {run.mismatches} wrong blocks.")
    return f"{explored} This is a virtio-blk driver."


_STAGES: tuple[Callable[[Any], str], ...] = (_header, _scatter, _queue, _full, _kick, _error, _done, _pressure, _whole)
_ASKS = (
    "What stands in a header?",
    "Which segments does the device read, and which does it write?",
    "How does a request get onto the ring?",
    "What if the ring is full?",
    "When is the doorbell rung?",
    "What does a status byte mean?",
    "What happens in an interrupt?",
    "Who tells the block layer that there is room again?",
    "Is the driver whole?",
)


def _judge(driver: Any, upto: int) -> Verdict:
    praise = ""
    for number, stage in enumerate(_STAGES[: upto + 1]):
        earlier = f"First an earlier stage. {_ASKS[number]} " if number < upto else ""
        try:
            praise = stage(driver)
            if number == upto and stage is _done:
                praise = _explored(driver, True)
        except _Open:
            return Verdict("open", f"{earlier or _ASKS[upto] + ' '}Put your code in the place of the three dots, then run the cell again.")
        except Wrong as hint:
            return wrong(f"{earlier}{hint}")
    return right(praise)


def _declare(number: int, name: str) -> None:
    def judge(driver: Any) -> Verdict:
        return _judge(driver, number)

    judge.__name__ = name
    question("02", _ASKS[number])(judge)


for _number, _name in enumerate(("header", "scatter", "queue", "full", "kick", "error", "done", "pressure")):
    _declare(_number, f"driver_{_name}")
_declare(8, "driver")
