"""What a simulated machine promises: repeatable to the byte, the same whether looked at or not, and clear about what went wrong.

``test_sim_runs.py`` looks at runs of the usual kind; here are the corners.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

import vblklab as vb
from vblklab.machine import sim
from vblklab.machine.costs import CostTable

Steps = Generator[Any, int, Any]


def jobs(**options: Any) -> vb.Fio:
    return vb.Fio(
        **({"rw": "randrw", "bssplit": "4k/60:512/20:64k/20", "iodepth": 8, "numjobs": 3, "number_ios": 24, "size": "2m"} | options)
    )


DISK = vb.Nvme(size=2 << 20)
RECIPES: dict[str, vb.Pipeline] = {
    "plain": vb.Pipeline(app=jobs(), disk=DISK),
    "depth 1": vb.Pipeline(app=jobs(iodepth=1, numjobs=1), disk=DISK),
    "verify, small ring": vb.Pipeline(
        app=jobs(verify="crc32"), disk=DISK, queue=vb.Split(4), device=vb.VirtioBlkDevice(indirect=False, seg_max=2)
    ),
    "mmio-exit, intx, shared vCPU": vb.Pipeline(app=jobs(), disk=DISK, kvm=vb.Kvm(kick="mmio-exit", call="intx", vcpus=1)),
    "intx with an iothread": vb.Pipeline(app=jobs(), disk=DISK, kvm=vb.Kvm(call="intx")),
    "sync engine, RAM": vb.Pipeline(app=jobs(), disk=vb.Ram(2 << 20), engine=vb.Sync()),
    "sync engine, vCPU thread": vb.Pipeline(app=jobs(), disk=DISK, engine=vb.Sync(), kvm=vb.Kvm(kick="mmio-exit")),
    "polling": vb.Pipeline(app=jobs(iodepth=4, number_ios=8), disk=DISK, driver=vb.VirtioBlkDriver(poll=True)),
    "batches, merges, splits": vb.Pipeline(
        app=jobs(rw="rw", iodepth_batch=8), disk=vb.Nvme(size=2 << 20, queue_depth=3), iostack=vb.IOStack(max_sectors=16)
    ),
    "write-through, flushes, host tags": vb.Pipeline(
        app=jobs(fsync=3), disk=DISK, device=vb.VirtioBlkDevice(write_cache=False), host_iostack=vb.IOStack(nr_requests=2)
    ),
    "trims": vb.Pipeline(app=jobs(rw="randtrim", bs=65536, bssplit=None), disk=DISK),
}
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
each_interleave = pytest.mark.parametrize("interleave", ["cost", "random"])


def machine(seed: int = 3, **options: Any) -> vb.SimMachine:
    return vb.SimMachine(**({"seed": seed, "trace": True, "iolog": True} | options))


def outcome(run: vb.Run) -> dict[str, Any]:
    """Everything simulated about a run: no trace, no rows, which depend on how closely it was looked at."""
    directions = [
        (job.name, job.number, name, one.ios, one.bytes, one.errors, one.slat.bins(), one.clat.bins(), one.lat.bins(), one.lat.mean_ns)
        for job in run.jobs
        for name, one in (("read", job.read), ("write", job.write), ("trim", job.trim), ("sync", job.sync))
    ]
    depths = [(job.start_ns, job.end_ns, sorted(job.depths.items()), job.verified_ios) for job in run.jobs]
    return {"dirs": directions, "depths": depths, "counters": run.counters, "duration": run.duration_ns, "iolog": run.iolog}


def trace_text(run: vb.Run) -> str:
    assert run.trace is not None
    return "\n".join(map(str, run.trace))


# -- repeatable ------------------------------------------------------------------------------------------------------------------


@each_interleave
@each_recipe
def test_the_same_seed_gives_the_same_trace_byte_for_byte_and_another_seed_another(recipe: vb.Pipeline, interleave: str) -> None:
    first, second, other = (recipe.run(machine(seed, interleave=interleave)) for seed in (3, 3, 4))
    assert trace_text(first) == trace_text(second)
    assert outcome(first) == outcome(second)
    assert (first.rows == second.rows).all()
    if interleave == "random" or recipe.disk.drive is not None:  # a RAM disk has no spread: nothing is left to chance
        assert trace_text(first) != trace_text(other)
    assert first.errors == 0 and first.ios == sum(job.number_ios * job.numjobs for job in recipe.app.jobs)


def test_the_seed_of_pythons_hashes_does_not_show() -> None:
    code = (
        "import hashlib, vblklab as vb\n"
        "app = vb.Fio(rw='randrw', bs=4096, iodepth=16, numjobs=4, number_ios=60, size='2m', verify='crc32')\n"
        "p = vb.Pipeline(app=app, disk=vb.Nvme(size=2 << 20), kvm=vb.Kvm(vcpus=2))\n"
        "run = p.run(vb.SimMachine(seed=9, interleave='random', trace=True))\n"
        "print(hashlib.sha256('\\n'.join(map(str, run.trace)).encode()).hexdigest())\n"
    )
    digests = set()
    for hash_seed in ("0", "12345"):
        env = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(vb.__file__).parents[1])}
        digests.add(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout)
    assert len(digests) == 1 and len(digests.pop().strip()) == 64


def test_a_machine_may_boot_many_times_and_every_boot_is_the_first() -> None:
    one = machine()
    texts = {hashlib.sha256(trace_text(RECIPES["plain"].run(one)).encode()).hexdigest() for _ in range(3)}
    assert len(texts) == 1


# -- looking changes nothing -----------------------------------------------------------------------------------------------------


@each_interleave
@each_recipe
def test_what_is_simulated_does_not_depend_on_how_much_is_observed(recipe: vb.Pipeline, interleave: str) -> None:
    outcomes = [outcome(recipe.run(machine(interleave=interleave, trace=trace))) for trace in (0, 700, True)]
    assert outcomes[1:] == outcomes[:1] * 2


def test_long_runs_are_observed_in_part_and_simulated_the_same(tmp_path: Path) -> None:
    app = jobs(number_ios=2000, numjobs=2, bssplit=None, bs=4096)
    recipe = vb.Pipeline(app=app, disk=DISK)
    plain = recipe.run(machine(trace=0))
    vm = recipe.boot(machine(trace=0))
    vm.step()  # from now on everything is followed
    watched = vm.run()
    assert outcome(plain) == outcome(watched)
    assert len(plain.rows) < len(watched.rows) == 4000
    for few, all_ in zip(plain.steps, watched.steps, strict=True):
        assert few.mean_ns == pytest.approx(all_.mean_ns, rel=0.25, abs=100), "a sample of the same thing"


@each_interleave
@each_recipe
def test_stepping_goes_over_exactly_the_trace_of_the_run(recipe: vb.Pipeline, interleave: str) -> None:
    whole = recipe.run(machine(interleave=interleave))
    vm = recipe.boot(machine(interleave=interleave))
    stepped = []
    while (event := vm.step()) is not None:
        stepped.append(event)
    assert vm.finished
    assert stepped == [event for event in whole.trace or () if event.key != "wait"]
    assert outcome(vm.result()) == outcome(whole)
    assert [event.t_ns for event in stepped] == sorted(event.t_ns for event in stepped)


@pytest.mark.parametrize("at", [1, 17, 400])
def test_a_run_that_was_stepped_into_ends_as_if_it_had_not_been(at: int) -> None:
    recipe = RECIPES["plain"]
    vm = recipe.boot(machine())
    vm.step(at)
    vm.where()
    vm.ring()
    vm.result()
    assert outcome(vm.run()) == outcome(recipe.run(machine()))


def test_step_over_many_points_is_step_that_often() -> None:
    one, many = (RECIPES["plain"].boot(machine()) for _ in range(2))
    for _ in range(40):
        event = one.step()
    assert many.step(40) == event
    assert one.step() == many.step()


@each_recipe
def test_where_knows_the_function_and_the_line_of_every_point(recipe: vb.Pipeline) -> None:
    vm = recipe.boot(machine())
    seen: dict[str, str] = {}
    for _ in range(1200):
        if (event := vm.step()) is None:
            break
        where = vm.where()
        assert (where.key, where.context) == (event.key, event.context)
        if event.lane != "disk":
            assert where.functions and "yield" in where.line, where
            assert where.name in str(where) and where.line in str(where)
        seen[event.key] = where.line
    assert set(seen) <= set(vb.EVENTS)
    assert {"sys_enter_io_submit", "virtqueue_add_sgs", "virtqueue_pop", "virtqueue_fill", "virtqueue_get_buf"} <= set(seen)


def test_step_until_stops_at_the_point_or_at_the_end() -> None:
    vm = RECIPES["depth 1"].boot(machine())
    event = vm.step_until("virtqueue_fill")
    assert event is not None and event.key == vm.where().key == "virtqueue_fill"
    assert vm.step_until("virtblk_poll") is None and vm.finished
    with pytest.raises(vb.ConfigError, match="no trace point 'virtqueue_pup'"):
        vm.step_until("virtqueue_pup")


# -- times add up ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["depth 1", "sync engine, RAM", "mmio-exit, intx, shared vCPU"])
def test_the_steps_of_an_io_fill_the_time_between_its_submission_and_its_end(name: str) -> None:
    app = jobs(numjobs=1, iodepth=1, bssplit=None, bs=4096, number_ios=50)
    run = RECIPES[name].replace(app=app).run(machine())
    assert run.rows.shape == (50, 16) and (run.rows[:, 1:] >= run.rows[:, :-1]).all()
    lat = sum(one.lat.mean_ns * one.ios for job in run.jobs for one in (job.read, job.write)) / run.ios
    assert sum(step.mean_ns for step in run.steps) == pytest.approx(lat, rel=1e-9)


def test_a_vcpu_that_three_tasks_share_is_slower_than_three_vcpus() -> None:
    costs = CostTable.load().replace(sys_enter_io_submit=100_000)  # work of the vCPU that nothing else overlaps
    recipe = vb.Pipeline(app=jobs(bssplit=None, bs=4096, iodepth=1), disk=vb.Ram(2 << 20))
    fast, slow = (recipe.replace(kvm=vb.Kvm(vcpus=n)).run(machine(trace=0, costs=costs)) for n in (3, 1))
    assert slow.duration_ns > 2.5 * fast.duration_ns


def test_a_doorbell_is_counted_once_on_whichever_way_it_goes() -> None:
    app = jobs()
    fast = vb.Pipeline(app=app, disk=DISK).run(machine()).counters
    assert fast["fast_mmio"] == fast["kicks"] and fast["mmio_exits"] == 2 * fast["interrupts"], "InterruptStatus and InterruptACK"
    slow = vb.Pipeline(app=app, disk=DISK, kvm=vb.Kvm(kick="mmio-exit")).run(machine()).counters
    assert slow["fast_mmio"] == 0 and slow["mmio_exits"] == slow["kicks"] + 2 * slow["interrupts"]


# -- what is lost is reported ----------------------------------------------------------------------------------------------------


class DeafDevice(vb.VirtioBlkDevice):
    """Does not hear the kicks of a driver that is up."""

    def kick(self, queue: int) -> None:
        pass


class DumbDevice(vb.VirtioBlkDevice):
    """Interrupts only for its first three completions."""

    left = 3

    def should_notify(self, queue: Any) -> bool:
        self.left -= 1
        return self.left >= 0 and super().should_notify(queue)


class LosingDevice(vb.VirtioBlkDevice):
    """Every seventh buffer is never returned."""

    count = 0

    def complete(self, request: Any, status: int) -> Steps:
        self.count += 1
        if self.count % 7:
            yield from super().complete(request, status)


class LazyDriver(vb.VirtioBlkDriver):
    """Kicks every second time that it should."""

    count = 0

    def commit_rqs(self, queue: int) -> Steps:
        return
        yield

    def queue_rq(self, rq: Any, last: bool) -> Generator[Any, int, bool]:
        self.count += 1
        return (yield from super().queue_rq(rq, last and self.count % 2 == 1))


@each_interleave
@pytest.mark.parametrize("kick", ["ioeventfd", "mmio-exit"])
@pytest.mark.parametrize(
    ("part", "iodepth"),
    [({"device": DumbDevice}, 4), ({"device": LosingDevice}, 4), ({"driver": LazyDriver}, 1)],
    ids=lambda v: str(v)[:30],
)
def test_a_lost_interrupt_buffer_or_kick_is_stalled_with_the_number_in_flight(
    part: dict[str, Any], iodepth: int, kick: str, interleave: str
) -> None:
    app = jobs(iodepth=iodepth, numjobs=1)
    recipe = vb.Pipeline(app=app, disk=DISK, kvm=vb.Kvm(kick=kick), **part)
    with pytest.raises(vb.Stalled, match=r"after \d+\.\d simulated µs [1-4] I/Os are in flight"):
        recipe.run(machine(interleave=interleave))


def test_a_kick_that_the_device_does_not_hear_is_stalled() -> None:
    with pytest.raises(vb.Stalled, match="are in flight"):
        vb.Pipeline(app=jobs(), disk=DISK, device=DeafDevice).run(machine())


def test_stepping_into_a_stall_says_so_too() -> None:
    vm = vb.Pipeline(app=jobs(), disk=DISK, device=DumbDevice).boot(machine())
    with pytest.raises(vb.Stalled):
        while vm.step() is not None:
            pass


def test_polling_for_a_buffer_that_never_comes_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim, "_STALL_CHUNKS", 3)
    recipe = vb.Pipeline(app=jobs(iodepth=2), disk=DISK, device=LosingDevice, driver=vb.VirtioBlkDriver(poll=True))
    with pytest.raises(vb.Stalled, match="trace points without a completed I/O"):
        recipe.run(machine(trace=0))


def test_a_stalled_run_lets_go_of_its_image(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(2 << 20))
    vm = vb.Pipeline(app=jobs(), device=DumbDevice, disk=vb.ImageFile(str(path))).boot(machine())
    with pytest.raises(vb.Stalled):
        vm.run()
    assert vm.store.fd == -1


# -- the learner's own code -----------------------------------------------------------------------------------------------------


def test_an_exception_of_the_learners_class_comes_out_as_it_is_with_its_line() -> None:
    class Mine(vb.VirtioBlkDevice):
        def should_notify(self, queue: Any) -> bool:
            raise RuntimeError("my own mistake")

    with pytest.raises(RuntimeError, match="my own mistake") as caught:
        vb.Pipeline(app=jobs(), disk=DISK, device=Mine).run(machine())
    assert caught.traceback[-1].name == "should_notify"


def test_a_trace_point_without_its_arguments_is_named() -> None:
    class Mine(vb.VirtioBlkDevice):
        def handle_request(self, request: Any) -> Steps:
            yield ("virtqueue_pop",)
            yield from super().handle_request(request)

    with pytest.raises(vb.ConfigError, match=r"'virtqueue_pop',\) lacks arguments: it takes vq_head"):
        vb.Pipeline(app=jobs(), disk=DISK, device=Mine).run(machine())


def test_a_trace_point_of_the_learners_own_is_charged_and_traced_and_said_to_be_theirs() -> None:
    check = vb.event("test_sim_check", step="D5", cost_ns=5000, args=("vq_head",))

    class Mine(vb.VirtioBlkDevice):
        def handle_request(self, request: Any) -> Steps:
            yield (check, request.key)
            yield from super().handle_request(request)

    try:
        app = jobs(iodepth=1, numjobs=1)
        plain = vb.Pipeline(app=app, disk=vb.Ram(2 << 20)).run(machine())
        mine = vb.Pipeline(app=app, disk=vb.Ram(2 << 20), device=Mine).run(machine())
        assert mine.duration_ns - plain.duration_ns == 5000 * 24
        assert sum(event.key == check for event in mine.trace or ()) == 24
        assert mine.costs is not None and mine.costs[check].kind == "stated by you"
        place = [step.name for step in vb.STEPS].index("D5")
        assert mine.steps[place].mean_ns - plain.steps[place].mean_ns == pytest.approx(5000)
    finally:
        del vb.EVENTS[check]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": "D5", "cost_ns": -1}, "cost_ns=-1"),
        ({"step": "D5", "cost_ns": 1.5}, r"cost_ns=1\.5"),
        ({"step": "D5", "cost_ns": True}, r"cost_ns=True"),
        ({"step": "D5"}, r"has no cost_ns: say how long it takes on the simulator, in ns: cost_ns=300"),
        ({"step": "D8", "cost_ns": 1}, "no step 'D8': use one of D1, "),
        ({"step": ["D5"], "cost_ns": 1}, r"no step \['D5'\]: use one of D1, "),
        ({"cost_ns": 1}, r'has no step: say to which it belongs, such as step="D5": one of D1, '),
        ({"step": "D5", "cost_ns": 1, "args": "vq_head"}, r"args='vq_head': give a tuple of names"),
        ({"step": "D5", "cost_ns": 1, "args": (1,)}, r"args=\(1,\): give a tuple of names"),
        ({"step": "D5", "cost_ns": 1, "args": 1}, r"args=1: give a tuple of names"),
        ({"step": "D5", "cost_ns": 1, "meaning": 1}, "meaning=1: give a text"),
    ],
)
def test_a_trace_point_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vb.ConfigError, match=message):
        vb.event("test_sim_bad", **options)
    assert "test_sim_bad" not in vb.EVENTS


@pytest.mark.parametrize("key", ["virtqueue_pop", "pop_read", "irqfd", "wait"])
def test_the_name_of_an_own_trace_point_or_group_cannot_be_taken(key: str) -> None:
    before = vb.EVENTS.get(key)
    with pytest.raises(vb.ConfigError, match="one of vblklab's own trace points: choose another name"):
        vb.event(key, step="D5", cost_ns=1)
    assert vb.EVENTS.get(key) is before


@pytest.mark.parametrize("key", ["", "my check", "my,check", 5, None, ["my_check"], "line\nend"])
def test_a_name_that_is_none_is_refused(key: Any) -> None:
    with pytest.raises(vb.ConfigError, match='is no name: give letters, digits and _, such as "my_check"'):
        vb.event(key, step="D5", cost_ns=1)


def test_a_trace_point_may_be_declared_again_with_other_values() -> None:
    vb.event("test_sim_again", step="D5", cost_ns=1)
    assert vb.event("test_sim_again", step="U3", cost_ns=0, args=["vq_head"]) == "test_sim_again"
    assert vb.EVENTS["test_sim_again"].step == "U3" and vb.EVENTS["test_sim_again"].args == ("vq_head",)


def test_a_typed_error_is_one_line_in_a_notebook() -> None:
    error = vb.ConfigError("this", "do that")
    assert error._render_traceback_() == ["ConfigError: this: do that"]


# -- ends ------------------------------------------------------------------------------------------------------------------------


def test_a_closed_machine_says_so_and_keeps_its_result() -> None:
    vm = RECIPES["plain"].boot(machine())
    run = vm.run()
    assert outcome(vm.result()) == outcome(run)
    assert vm.step() is None and vm.finished
    vm.close()
    for use in (vm.run, lambda: vm.resize(4 << 20), lambda: vm.task(vm.driver.restart())):
        with pytest.raises(vb.VblkError, match="already run: boot the recipe again"):
            use()


def test_a_machine_that_was_closed_early_does_not_go_on() -> None:
    vm = RECIPES["plain"].boot(machine())
    vm.step(100)
    vm.close()
    for use in (vm.run, vm.step):
        with pytest.raises(vb.VblkError, match="boot the recipe again"):
            use()
    assert vm.result().ios < 150


def _once(action: Callable[[], None]) -> Callable[[int, int | None], None]:
    done: list[int] = []

    def progress(completed: int, total: int | None) -> None:
        if completed > 600 and not done:
            done.append(completed)
            action()

    return progress


def _raise() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("action", [_raise, lambda: signal.raise_signal(signal.SIGINT)], ids=["raised", "signal"])
def test_ctrl_c_gives_a_partial_run_in_good_order(action: Callable[[], None], tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(2 << 20))
    before = signal.getsignal(signal.SIGINT)
    vm = vb.Pipeline(app=jobs(number_ios=100_000, bssplit=None, bs=4096), disk=vb.ImageFile(str(path))).boot(machine(trace=0))
    run = vm.run(progress=_once(action))
    assert run.interrupted and 600 < run.ios < 10_000
    assert run.duration_ns > 0 and run.iops > 1000 and "interrupted" in run.summary()
    assert signal.getsignal(signal.SIGINT) is before and vm.store.fd == -1
    with pytest.raises(vb.VblkError, match="boot the recipe again"):
        vm.run()


def test_a_machine_runs_in_a_thread_that_gets_no_signals() -> None:
    runs: list[vb.Run] = []
    thread = threading.Thread(target=lambda: runs.append(RECIPES["plain"].run(machine())))
    thread.start()
    thread.join()
    assert outcome(runs[0]) == outcome(RECIPES["plain"].run(machine()))


def test_progress_tells_how_much_of_how_much_is_done() -> None:
    seen: list[tuple[int, int | None]] = []
    vb.Pipeline(app=jobs(number_ios=1200, bssplit=None, bs=4096), disk=DISK).run(machine(trace=0), progress=lambda *now: seen.append(now))
    assert seen == sorted(seen) and seen[-1] == (3600, 3600) and len(seen) > 3
    vb.Pipeline(app=jobs(number_ios=None, size="256k"), disk=DISK).run(machine(trace=0), progress=lambda *now: seen.append(now))
    assert seen[-1][1] is None, "nobody knows"


# -- costs -----------------------------------------------------------------------------------------------------------------------


def test_replace_states_costs_and_leaves_the_table_alone() -> None:
    table = CostTable.load()
    before = dict(table)
    mine = table.replace(kvm_exit=500, wake__device=0)
    assert (mine["kvm_exit"].ns, mine["wake:device"].ns) == (500, 0)
    assert mine["kvm_exit"].kind == mine["kvm_exit"].source == "stated by you"
    assert dict(table) == before and mine.name == f"{table.name}, changed by you"
    assert mine["kvm_entry"] == table["kvm_entry"]
    run = RECIPES["depth 1"].run(machine(costs=mine))
    assert run.costs is not None and run.costs["kvm_exit"].ns == 500
    assert "changed by you" in run.provenance["cost table"]


@pytest.mark.parametrize(
    ("cost", "message"), [({"kvm_exitt": 5}, "no trace point or cost 'kvm_exitt'"), ({"kvm_exit": -1}, "0 or more ns")]
)
def test_a_cost_that_cannot_be_is_refused(cost: dict[str, float], message: str) -> None:
    with pytest.raises(vb.ConfigError, match=message):
        CostTable.load().replace(**cost)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("kvm_exit,abc,,1,,model,why", "line 2: could not convert string to float"),
        ("kvm_exit,,,1,,model,why", "line 2: neither value nor terms"),
        ("kvm_exit,,+99999,1,,published,why", "line 2: 99999"),
        ("kvm_exit,,+270,1,,published,why", "published row 270 counts cycles"),
    ],
)
def test_a_cost_table_with_a_wrong_row_names_the_line(row: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(f"key,value,terms,share,ghz,kind,why\n{row}\n")
    with pytest.raises(vb.ConfigError, match=message):
        CostTable.load(path)


def test_a_cost_table_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(vb.ConfigError, match="No such file"):
        CostTable.load(tmp_path / "none.csv")


def test_a_drives_latency_stated_by_the_recipe_is_used_and_said() -> None:
    app = jobs(rw="randread", iodepth=1, numjobs=1, bssplit=None, bs=4096)
    slow, fast = (vb.Pipeline(app=app, disk=vb.Nvme(size=2 << 20, read_us=us)).run(machine(costs=_no_spread())) for us in (100, 10))
    place = [step.name for step in vb.STEPS].index("HW")
    assert slow.steps[place].mean_ns - fast.steps[place].mean_ns == pytest.approx(90_000, rel=0.001)
    assert "stated" in slow.provenance["cost table"] or "changed by you" in slow.provenance["cost table"]


def _no_spread() -> CostTable:
    return CostTable.load().replace(drive__P4800X__spread=0)


# -- options ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interleave": "chaos"}, "interleave='chaos': choose 'cost' or 'random'"),
        ({"seed": "x"}, "seed='x'"),
        ({"seed": 1.5}, r"seed=1\.5"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vb.ConfigError, match=message):
        vb.SimMachine(**options)


def test_ring_shows_a_queue_that_is_there() -> None:
    vm = RECIPES["plain"].boot(machine())
    for queue in (99, -1, "0", None):
        with pytest.raises(vb.ConfigError, match="no queue"):
            vm.ring(queue)
