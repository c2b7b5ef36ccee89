"""The fused path against the parts' own code: the same times, the same trace, the same bytes, whoever looks and whenever."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Generator
from functools import partial
from typing import Any

import pytest

import vblklab as vb
from vblklab.events import EVENTS
from vblklab.machine.costs import Cost, CostTable
from vblklab.machine.observe import Observer
from vblklab.machine.sched import Fused

from .test_sim import RECIPES as OTHERS

Steps = Generator[Any, int, Any]


def recipe(disk: Any = None, device: Any = None, kvm: Any = None, queue: int = 256, **options: Any) -> vb.Pipeline:
    app = vb.Fio(**(dict(rw="randrw", bs=4096, iodepth=8, number_ios=300, randseed=5) | options))
    return vb.Pipeline(
        app=app, disk=disk or vb.Nvme(size=1 << 20), device=device or vb.VirtioBlkDevice(), kvm=kvm or vb.Kvm(), queue=vb.Split(queue)
    )


RECIPES = {
    "reads, one at a time": lambda: recipe(rw="randread", iodepth=1),
    "reads and writes, one at a time": lambda: recipe(iodepth=1),
    "several sizes, one at a time": lambda: recipe(iodepth=1, bssplit="512/30:4k/30:64k/40"),
    "verify, one at a time": lambda: recipe(iodepth=1, rw="randwrite", verify="crc32", number_ios=120),
    "fsync, one at a time": lambda: recipe(iodepth=1, rw="randwrite", fsync=3),
    "two tasks, each one at a time": lambda: recipe(iodepth=1, numjobs=2, kvm=vb.Kvm(vcpus=2)),
    "reads and writes, 32 deep": lambda: recipe(iodepth=32, number_ios=800),
    "more in one plug than it holds": lambda: recipe(
        rw="randread", iodepth=64, numjobs=4, number_ios=400, kvm=vb.Kvm(vcpus=4), device=vb.VirtioBlkDevice(queues=1)
    ),
    "sequential, merged on the host": lambda: recipe(rw="read", iodepth=32, number_ios=800),
    "several sizes, some are split": lambda: recipe(bssplit="512/30:4k/30:64k/40", iodepth=16),
    "more than one block layer request": lambda: recipe(bs="512k", rw="randread", disk=vb.Nvme(size=8 << 20), number_ios=40),
    "one buffer of two segments": lambda: recipe(bs=8192).replace(
        app=vb.Fio(rw="randrw", bs=8192, iodepth=4, number_ios=200, segment_bytes=4096)
    ),
    "trims": lambda: recipe(rw="trim", iodepth=4),
    "with fsync": lambda: recipe(rw="randwrite", fsync=5),
    "verify": lambda: recipe(rw="randwrite", verify="crc32", number_ios=120),
    "overlap": lambda: recipe(serialize_overlap=1, size="64k", iodepth=16),
    "a runtime": lambda: recipe(number_ios=None, runtime="2ms"),
    "four tasks on two vCPUs": lambda: recipe(numjobs=4, kvm=vb.Kvm(vcpus=2)),
    "two tasks on one vCPU, each one at a time": lambda: recipe(iodepth=1, numjobs=2, kvm=vb.Kvm(vcpus=1)),
    "four tasks, one queue": lambda: recipe(numjobs=4, kvm=vb.Kvm(vcpus=4), device=vb.VirtioBlkDevice(queues=1)),
    "a queue of four": lambda: recipe(queue=4, iodepth=16, device=vb.VirtioBlkDevice(indirect=False)),
    "a queue of four, indirect": lambda: recipe(queue=4, iodepth=16),
    "a full drive": lambda: recipe(iodepth=32, disk=vb.Nvme(size=1 << 20, queue_depth=2)),
    "without event_idx": lambda: recipe(iodepth=16, device=vb.VirtioBlkDevice(event_idx=False)),
    "without indirect": lambda: recipe(iodepth=16, device=vb.VirtioBlkDevice(indirect=False)),
    "write-through": lambda: recipe(device=vb.VirtioBlkDevice(write_cache=False)),
    "a blocking engine": lambda: recipe().replace(engine=vb.Sync()),
    "a RAM disk": lambda: recipe(disk=vb.Ram(1 << 20)),
    "exits": lambda: recipe(kvm=vb.Kvm(kick="mmio-exit", call="intx"), iodepth=16),
    "intx with an iothread": lambda: recipe(kvm=vb.Kvm(call="intx"), iodepth=16),
    "polling": lambda: recipe(iodepth=4, number_ios=100).replace(driver=vb.VirtioBlkDriver(poll=True)),
    "batches": lambda: recipe(iodepth=16, iodepth_batch=4),
    "large blocks": lambda: recipe(device=vb.VirtioBlkDevice(block_size=4096)),
    "a slow drive": lambda: recipe(disk=vb.Nvme(size=1 << 20, read_us=90, write_us=20), iodepth=3),
    "pci, one at a time": lambda: recipe(iodepth=1).replace(transport=vb.Pci()),
    "pci, four tasks, four vectors": lambda: recipe(numjobs=4, kvm=vb.Kvm(vcpus=4), iodepth=16).replace(transport=vb.Pci()),
    "pci, four tasks, a shared vector": lambda: recipe(numjobs=4, kvm=vb.Kvm(vcpus=4, call="msi")).replace(transport=vb.Pci(vectors=2)),
    "pci, the main loop's messages": lambda: recipe(numjobs=2, kvm=vb.Kvm(vcpus=2, call="msi"), iodepth=16).replace(transport=vb.Pci()),
    "pci, the line": lambda: recipe(numjobs=2, kvm=vb.Kvm(vcpus=2, call="intx"), iodepth=16).replace(transport=vb.Pci()),
    "pci, without an iothread": lambda: recipe(kvm=vb.Kvm(call="msi", iothread=False), iodepth=16).replace(transport=vb.Pci()),
    "pci, polling": lambda: recipe(iodepth=4, number_ios=100).replace(driver=vb.VirtioBlkDriver(poll=True), transport=vb.Pci()),
    "pci, exits": lambda: recipe(kvm=vb.Kvm(kick="mmio-exit"), iodepth=16).replace(transport=vb.Pci()),
    "an instant drive": lambda: recipe(disk=vb.Nvme(size=1 << 20, read_us=0, write_us=0), iodepth=3),
}


RECIPES |= {name: lambda one=one: one for name, one in OTHERS.items()}


def ended(make: Any, fast: str, windows: Any = None, **options: Any) -> dict[str, Any]:
    """Everything that a run without errors leaves."""
    vm = make().boot(vb.SimMachine(fast=fast, iolog=True, **options))
    if windows is not None:
        before = Observer.before
        vm._observer.before = lambda completed: windows(vm, before, completed)
    run = vm.run()
    assert run.errors == 0
    return left(vm, run)


def left(vm: Any, run: Any) -> dict[str, Any]:
    """Everything that a run leaves."""
    fused = [one.name for one in vm.scheduler.contexts if isinstance(one, Fused)]
    assert bool(fused) == any(line.startswith("fused") for line in vm.explain())
    return {
        "now": vm.now_ns,
        "duration": run.duration_ns,
        "counters": run.counters,
        "iolog": run.iolog,
        "jobs": [
            (
                job.start_ns,
                job.end_ns,
                job.depths,
                [(d.ios, d.bytes, d.lat.bins(), d.slat.bins(), d.clat.bins()) for d in (job.read, job.write, job.trim, job.sync)],
            )
            for job in run.jobs
        ],
        "trace": run.trace,
        "memory": hashlib.sha256(vm.memory.bytes).hexdigest(),
        "disk": hashlib.sha256(vm.store.bytes).hexdigest(),
        "unmatched": vm.correlator.unmatched,
        "errors": run.errors,
        "device": (str(vm.device.broken), vm.device.broken_queue, vm.device.resetting, vm.device_status, sorted(vm.device._inside)),
        "device rings": [
            (q.last_avail_idx, q.used_idx, q.in_flight, q._signalled_idx, q._signalled_valid) for q in vm.device.queues.values()
        ],
        "rings": [(r.avail_idx, r.last_used_idx, r.callbacks, sorted(r._free)) for r in vm.driver.queues],
        "tags": [[hctx.tags for hctx in stack.queues] for stack in (vm.iostack, vm._host_stack)],
    }


def same(one: dict[str, Any], other: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    for name, value in one.items():
        if name not in but:
            assert value == other[name], name


@pytest.fixture(scope="module", params=RECIPES.values(), ids=RECIPES)
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def plain(make: Any) -> dict[str, Any]:
    """What the parts' own code leaves, traced as a whole."""
    return ended(make, "off", trace=True)


def test_the_whole_trace_is_the_same(make: Any, plain: dict[str, Any]) -> None:
    same(ended(make, "auto", trace=True), plain)


def in_turn() -> list[Any]:
    """Each recipe with one of two other schedules; with both if the run is long."""
    found = []
    for turn, (name, make) in enumerate(RECIPES.items()):
        for number, (also, options) in enumerate({"random": {"interleave": "random", "seed": 7}, "seed 3": {"seed": 3}}.items()):
            found.append(pytest.param(make, options, id=f"{name}-{also}", marks=[pytest.mark.long] if (turn + number) % 2 else []))
    return found


@pytest.mark.parametrize(("make", "options"), in_turn())
def test_the_whole_trace_is_the_same_in_another_schedule(make: Any, options: dict[str, Any]) -> None:
    same(ended(make, "auto", trace=True, **options), ended(make, "off", trace=True, **options))


def test_unobserved_it_ends_in_the_same_bytes_at_the_same_times(make: Any, plain: dict[str, Any]) -> None:
    def nobody(vm: Any, before: Any, completed: int) -> None:
        vm.scheduler.observe = None

    same(ended(make, "auto", trace=0, windows=nobody), plain, but=("trace", "unmatched"))


@pytest.mark.parametrize("seed", range(40))
def test_a_drawn_recipe_ends_in_the_same_bytes_at_the_same_times(seed: int) -> None:
    """Unobserved, a context switches only where another is due before it: many sizes, depths and queues."""
    draw = random.Random(seed).choice
    app = dict(rw=draw(["randread", "randwrite", "randrw", "read", "write"]), bs=draw([512, 4096, 4096, 16384]), randseed=seed)
    app |= dict(iodepth=draw([1, 2, 3, 8, 16, 32, 64]), number_ios=draw([200, 600]), numjobs=draw([1, 1, 1, 2, 3]), fsync=draw([0, 0, 7]))
    disk = vb.Nvme(size=4 << 20, queue_depth=draw([2, 8, 64, 1023]))
    device = vb.VirtioBlkDevice(event_idx=draw([True, True, False]), indirect=draw([True, True, False]))
    kvm, queue = vb.Kvm(vcpus=draw([1, 1, 2])), draw([8, 64, 256])

    def make() -> vb.Pipeline:
        return recipe(disk=disk, device=device, kvm=kvm, queue=queue, **app)

    def nobody(vm: Any, before: Any, completed: int) -> None:
        vm.scheduler.observe = None

    fused, plain = (ended(make, fast, trace=0, windows=nobody, seed=seed) for fast in ("auto", "off"))
    same(fused, plain, but=("trace", "unmatched"))


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(6, 200))])
def test_who_goes_ahead_of_what_is_due_changes_nothing(seed: int) -> None:
    """One vCPU and many I/Os in flight: contexts pass points before what is due earlier has happened, and all times stay the same."""
    rng = random.Random(seed)
    app = dict(rw=rng.choice(["randread", "randrw"]), bs=rng.choice([512, 4096]), iodepth=rng.randrange(2, 40), randseed=seed)
    disk = vb.Nvme(size=4 << 20, read_us=rng.uniform(1, 80), write_us=rng.uniform(1, 20), queue_depth=rng.choice([4, 1023]))
    event_idx, numjobs = rng.random() < 0.8, rng.choice([1, 1, 2])
    table = dict(CostTable.load())
    if seed % 2:
        table |= {key: Cost(table[key].ns * rng.choice([0.1, 1, 1, 5]), "drawn", "measured") for key in EVENTS if key in table}
    costs = CostTable("drawn for a test", table, {"cpu": "none", "date": "today"})

    def make() -> vb.Pipeline:
        return recipe(
            disk=disk, device=vb.VirtioBlkDevice(event_idx=event_idx), kvm=vb.Kvm(vcpus=1), **app, numjobs=numjobs, number_ios=4000
        )

    machines = [make().boot(vb.SimMachine(fast=fast, trace=0, seed=seed, costs=costs)) for fast in ("auto", "off")]
    for vm in machines:
        vm._observer.before = lambda completed, vm=vm: setattr(vm.scheduler, "observe", None)
    fused, plain = (left(vm, vm.run()) for vm in machines)
    assert not machines[0].scheduler.together, "nobody went ahead"
    same(fused, plain, but=("trace", "unmatched"))


def test_a_look_now_and_then_sees_what_the_whole_trace_says(make: Any, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 40 yields, every other one observed: what they record is a part of the whole trace, in its order."""
    monkeypatch.setattr("vblklab.machine.sim._CHUNK", 40)
    monkeypatch.setattr("vblklab.machine.sim._STALL_CHUNKS", 10_000)
    monkeypatch.setattr("vblklab.machine.fused._ALONE_MOST", 3)
    looks = []

    def now_and_then(vm: Any, before: Any, completed: int) -> None:
        looks.append(completed)
        observer = vm._observer
        observer._correlating = False
        vm.scheduler.observe = observer._observe if len(looks) % 2 else None

    part = ended(make, "auto", trace=True, windows=now_and_then)
    same(part, plain, but=("trace", "unmatched"))
    whole = dict.fromkeys(plain["trace"])
    assert 0 < len(part["trace"]) <= len(plain["trace"])
    assert [event for event in part["trace"] if event.key != "wait" and event not in whole] == []


class Poking(vb.VirtioBlkDriver):
    """Publishes a request, and before the kick of the 20th pokes into what the device is about to read."""

    def __init__(self, poke: Any, **options: Any) -> None:
        super().__init__(**options)
        self.poke = poke
        self.published = 0

    def queue_rq(self, rq: Any, last: bool) -> Steps:
        taken = yield from super().queue_rq(rq, False)
        if taken:
            self.published += 1
            if self.published == 20:
                self.poke(self, rq, self.queues[rq.queue])
            if last:
                yield from self.commit_rqs(rq.queue)
        return taken


def _entry(ring: Any) -> int:
    return int(2 + (ring.avail_idx - 1 & ring._mask))


def _names_no_descriptor(driver: Any, rq: Any, ring: Any) -> None:
    ring._avail[_entry(ring)] = 999


def _publishes_too_many(driver: Any, rq: Any, ring: Any) -> None:
    ring._avail[1] = ring._avail[1] + 1000 & 0xFFFF


def _offers_a_head_twice(driver: Any, rq: Any, ring: Any) -> None:
    ring._avail[2 + (ring.avail_idx & ring._mask)] = ring._avail[_entry(ring)]
    ring._avail[1] = ring._avail[1] + 1 & 0xFFFF


def _asks_for_an_unknown_type(driver: Any, rq: Any, ring: Any) -> None:
    driver.memory.bytes[rq.pdu[0]] = 99


def _reads_past_the_end(driver: Any, rq: Any, ring: Any) -> None:
    driver.memory.bytes[rq.pdu[0] + 8 : rq.pdu[0] + 16] = (1 << 40).to_bytes(8, "little")


def _turns_a_read_into_a_write(driver: Any, rq: Any, ring: Any) -> None:
    driver.memory.bytes[rq.pdu[0]] ^= 1


POKES = [
    _names_no_descriptor,
    _publishes_too_many,
    _offers_a_head_twice,
    _asks_for_an_unknown_type,
    _reads_past_the_end,
    _turns_a_read_into_a_write,
]


def disturbed(make: Any, fast: str, disturb: Any, **options: Any) -> dict[str, Any]:
    """What a run leaves that may fail or stall."""
    vm = make().boot(vb.SimMachine(fast=fast, iolog=True, trace=True, **options))
    disturb(vm)
    said = ""
    try:
        vm.run()
    except vb.VblkError as error:
        said = str(error)
    return left(vm, vm.result()) | {"said": said}


@pytest.mark.parametrize("options", [{}, {"interleave": "random", "seed": 11}], ids=["cost", "random"])
@pytest.mark.parametrize("poke", POKES, ids=lambda poke: poke.__name__.strip("_"))
@pytest.mark.parametrize("rw", ["randread", "randwrite"])
def test_the_device_takes_a_bad_driver_alike(rw: str, poke: Any, options: dict[str, Any]) -> None:
    def make() -> vb.Pipeline:
        return recipe(rw=rw, iodepth=1, number_ios=40).replace(driver=Poking(poke))

    fused, plain = (disturbed(make, fast, lambda vm: None, **options) for fast in ("auto", "off"))
    same(fused, plain)
    honest = disturbed(lambda: make().replace(driver=Poking(lambda *_: None)), "off", lambda vm: None, **options)
    assert plain["trace"] != honest["trace"], "the device never saw it"


def _at(vm: Any, call: Any, after_ns: int = 70_000) -> None:
    vm.scheduler.at(vm.now_ns + after_ns, lambda now: call(vm))


def _shrink(vm: Any) -> None:
    vm.device.capacity_sectors = 512


def _make_read_only(vm: Any) -> None:
    vm.device.read_only = True


def _stop_and_start(vm: Any) -> None:
    if 0 in vm.device.queues:
        ring = vm.device.queues[0]
        vm.device.stop_queue(0, lambda: vm.device.start_queue(0, ring))


def _write_through(vm: Any) -> None:
    vm.device.writeback = False


def _break_the_disk(vm: Any) -> None:
    vm.store.resize(256 << 10)


DISTURBANCES = [_shrink, _make_read_only, _stop_and_start, _write_through, _break_the_disk, lambda vm: vm.resize(1 << 19)]


@pytest.mark.parametrize("options", [{}, {"interleave": "random", "seed": 11}], ids=["cost", "random"])
@pytest.mark.parametrize("iodepth", [1, 8])
@pytest.mark.parametrize("disturb", DISTURBANCES, ids=["shrink", "read-only", "stop", "write-through", "disk", "resize"])
def test_what_changes_in_the_middle_of_a_run_changes_it_alike(disturb: Any, iodepth: int, options: dict[str, Any]) -> None:
    def make() -> vb.Pipeline:
        return recipe(iodepth=iodepth, number_ios=120)

    fused, plain = (disturbed(make, fast, lambda vm: _at(vm, disturb), **options) for fast in ("auto", "off"))
    same(fused, plain)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_changes_at_any_time_changes_it_alike(seed: int) -> None:
    rng = random.Random(seed)
    disturb, iodepth, rw = rng.choice(DISTURBANCES), rng.choice((1, 8, 32)), rng.choice(("randread", "randwrite", "randrw"))
    times = [rng.randrange(20_000, 400_000) for _ in range(3)]

    def several(vm: Any) -> None:
        for time_ns in times:
            _at(vm, disturb, time_ns)

    fused, plain = (disturbed(lambda: recipe(iodepth=iodepth, rw=rw, number_ios=80), fast, several, seed=seed) for fast in ("auto", "off"))
    same(fused, plain)


@pytest.mark.parametrize("iodepth", [1, 32])
@pytest.mark.parametrize("disturb", DISTURBANCES, ids=["shrink", "read-only", "stop", "write-through", "disk", "resize"])
def test_nobody_looks_and_something_changes(disturb: Any, iodepth: int) -> None:
    """The same without an observer: an I/O alone goes its way without a switch."""

    def make() -> vb.Pipeline:
        return recipe(iodepth=iodepth, number_ios=64)

    for after_ns in range(5_000, 45_000, 3001):

        def at(vm: Any, after_ns: int = after_ns) -> None:
            _at(vm, disturb, after_ns)

        def unobserved(vm: Any, at: Any = at) -> None:
            vm._observer.before = lambda completed: setattr(vm.scheduler, "observe", None)
            at(vm)

        same(disturbed(make, "auto", unobserved), disturbed(make, "off", at), but=("trace", "unmatched"))


@pytest.mark.parametrize("options", [{}, {"interleave": "random", "seed": 11}], ids=["cost", "random"])
def test_a_driver_that_restarts_in_the_middle_of_a_run(options: dict[str, Any]) -> None:
    def disturb(vm: Any) -> None:
        def restart() -> Steps:
            yield vb.Wait(vm.now_ns + 70_000)
            yield from vm.driver.restart()

        vm.scheduler.add("vCPU 0 restart", vm.vcpus[0], restart(), task=True).notify()

    fused, plain = (disturbed(lambda: recipe(number_ios=120), fast, disturb, **options) for fast in ("auto", "off"))
    same(fused, plain)


@pytest.mark.parametrize("points", [1, 7, 40, 333])
def test_a_run_that_was_stepped_into_goes_on_alike(points: int) -> None:
    def stepped(vm: Any) -> None:
        seen.append([vm.step() for _ in range(points)])

    seen: list[Any] = []
    fused, plain = (disturbed(lambda: recipe(iodepth=4, number_ios=60), fast, stepped) for fast in ("auto", "off"))
    same(fused, plain)
    assert seen[0] == seen[1]


def test_a_ring_without_indirect_descriptors_refuses_them() -> None:
    said: list[str] = []

    def disturb(vm: Any) -> None:
        vm.device.queues[0].indirect = vm.device.queues[0]._threes = False  # as if it had not been negotiated
        needs_reset = vm.device.on_needs_reset
        vm.device.on_needs_reset = lambda error: (said.append(str(error)), needs_reset(error))

    fused, plain = (disturbed(recipe, fast, disturb) for fast in ("auto", "off"))
    same(fused, plain)
    assert ["INDIRECT_DESC" in error for error in said] == [True, True]


@pytest.mark.parametrize("seed", range(20))
def test_any_recipe_with_any_schedule(seed: int) -> None:
    rng = random.Random(seed)
    make = rng.choice(list(RECIPES.values()))
    options = {"seed": rng.randrange(1 << 30), "interleave": "random"}
    same(ended(make, "auto", trace=True, **options), ended(make, "off", trace=True, **options))


def test_what_is_replaced_is_honoured_and_named() -> None:
    class Quiet(vb.VirtioBlkDevice):
        """Never interrupts less than it must."""

        def should_notify(self, queue: Any) -> bool:
            asked.append(queue)
            return super().should_notify(queue)

    asked: list[Any] = []
    vm = recipe(device=Quiet()).boot(vb.SimMachine())
    assert vm.explain()[0] == "fused path: vCPU 0 job"
    assert [line for line in vm.explain() if line.startswith("plain")] == [
        f"plain path: iothread: VirtioBlkDevice.should_notify is replaced by {Quiet.__qualname__}.should_notify"
    ]
    vm.run()
    assert asked
    vm = recipe().boot(vb.SimMachine())
    vm.iostack._free = lambda hctx, rq: None  # a static method
    assert "plain path: vCPU 0 job: IOStack._free is set on this instance" in vm.explain()
    vm = recipe().boot(vb.SimMachine())
    vm.driver.queue_rq = recipe().boot(vb.SimMachine()).driver.queue_rq  # the method as it was written, of another driver
    assert "plain path: vCPU 0 job: VirtioBlkDriver.queue_rq is set on this instance" in vm.explain()
    vm = recipe().boot(vb.SimMachine())
    vm.driver.queue_rq = partial(vm.driver.queue_rq)
    assert "plain path: vCPU 0 job: VirtioBlkDriver.queue_rq is set on this instance" in vm.explain()
    vm.step()
    assert {line.split(": ", 2)[2] for line in vm.explain()} == {"the application was stepped into"}
    vm.close()


@pytest.mark.parametrize("part", ["driver", "iostack", "device", "engine", "host_iostack"])
def test_a_subclass_of_any_part_sees_every_call(part: str) -> None:
    calls: list[str] = []
    base, method = {
        "driver": (vb.VirtioBlkDriver, "queue_rq"),
        "iostack": (vb.IOStack, "submit_bio"),
        "device": (vb.VirtioBlkDevice, "handle_request"),
        "engine": (vb.Simulated, "submit"),
        "host_iostack": (vb.IOStack, "complete"),
    }[part]

    def watched(self: Any, *args: Any, **more: Any) -> Any:
        calls.append(method)
        return getattr(base, method)(self, *args, **more)

    mine = type("Mine", (base,), {method: watched})
    run = recipe(iodepth=4, number_ios=50).replace(**{part: mine()}).run(vb.SimMachine())
    assert run.ios == 50 and len(calls) == 50


def test_stepping_shows_the_parts_own_functions() -> None:
    vm = recipe().boot(vb.SimMachine())
    vm.step_until("virtqueue_add_sgs")
    assert any("VirtioBlkDriver.queue_rq" in name for name in vm.where().functions)
    run = vm.run()
    assert run.ios == 300
    assert not any(isinstance(one, Fused) for one in vm.scheduler.contexts)


@pytest.mark.parametrize("options", [{"iodepth": 1}, {"iodepth": 8}], ids=["alone", "deep"])
def test_a_patched_store_is_honoured(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "broken")

    monkeypatch.setattr("vblklab.disk.store.RamStore.readv", fail)
    run = recipe(rw="randread", number_ios=60, **options).run(vb.SimMachine())
    assert run.errors == 60
