"""The live machine when things go wrong, and what it leaves behind: nothing.

``test_live_runs.py`` looks at runs of the usual kind; here are the corners.  That no process, thread, file or socket stays is
checked after every test by the suite's own fixture.
"""

from __future__ import annotations

import gc
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

import vblklab as vb
from tests.support import deadline
from vblklab.events import WAIT, Spend, Wait
from vblklab.machine import loop as loop_module
from vblklab.machine.live import live_missing
from vblklab.machine.loop import LiveLoop

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the live machine needs Linux")
Steps = Generator[Any, int, Any]
POP = ("virtqueue_pop", 0)
each_half = pytest.mark.parametrize("half", ["process", "thread"])


def jobs(**options: Any) -> vb.Fio:
    return vb.Fio(**({"rw": "randread", "bs": 4096, "iodepth": 8, "number_ios": 100, "size": "1m"} | options))


def recipe(**parts: Any) -> vb.Pipeline:
    return vb.Pipeline(**({"app": jobs(), "disk": vb.Ram(1 << 20)} | parts))


def machine(half: str, **options: Any) -> vb.LiveMachine:
    return vb.LiveMachine(device=half, **options)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


# -- the learner's own device ----------------------------------------------------------------------------------------------------


@each_half
def test_a_class_defined_in_a_function_serves_in_the_other_half_with_what_it_closes_over(half: str, image: Path) -> None:
    mark = b"made by the learner's device"

    class Marks(vb.VirtioBlkDevice):
        def complete_batch(self, completed: Any) -> Steps:
            for op in completed:
                if op.op == 0:
                    op.segments[0][: len(mark)] = mark
            yield from super().complete_batch(completed)

    vm = recipe(device=Marks, disk=vb.ImageFile(str(image))).boot(machine(half))
    views = [slot.view for slot in vm.tasks[0]._free]
    run = vm.run()
    assert (run.ios, run.errors) == (100, 0)
    assert all(bytes(view[: len(mark)]) == mark for view in views), "every buffer was read into at least once"
    assert image.read_bytes() == bytes(1 << 20)


class TwoArguments(Exception):
    """Cannot be unpickled: pickle calls it with one argument."""

    def __init__(self, what: str, more: int) -> None:
        super().__init__(what)


def _raises(make: Callable[[], BaseException]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **options: Any) -> Any:
        raise make()

    return method


@each_half
@pytest.mark.parametrize("method", ["attach", "read_config", "start", "handle_request", "should_notify"])
def test_an_exception_anywhere_in_the_device_reaches_the_caller_at_once_with_its_traceback(method: str, half: str) -> None:
    mine = type("Mine", (vb.VirtioBlkDevice,), {method: _raises(lambda: ZeroDivisionError("a slip"))})
    with deadline(120), pytest.raises(vb.DeviceDied, match=r"the device raised ZeroDivisionError: a slip") as caught:
        recipe(device=mine).run(machine(half, stall_s=3600))  # nobody waits for an answer that cannot come
    assert "raise make()" in caught.value.traceback and "ZeroDivisionError: a slip" in caught.value.traceback
    shown = "\n".join(caught.value._render_traceback_())
    assert shown.startswith("DeviceDied: the device raised") and "in method" in shown


@each_half
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwoArguments("two", 2), "TwoArguments: two"),
        (lambda: SystemExit(3), "SystemExit: 3"),
        (lambda: KeyError("missing"), "KeyError: 'missing'"),
        (lambda: type("Local", (Exception,), {})("of a local class"), "Local: of a local class"),
    ],
    ids=["no pickle", "SystemExit", "KeyError", "local class"],
)
def test_an_exception_that_cannot_travel_still_says_what_it_was(make: Callable[[], BaseException], message: str, half: str) -> None:
    mine = type("Mine", (vb.VirtioBlkDevice,), {"should_notify": _raises(make)})
    with pytest.raises(vb.DeviceDied, match=message) as caught:
        recipe(device=mine).run(machine(half))
    assert "Traceback" in caught.value.traceback


@each_half
def test_an_error_of_vblklab_in_the_device_keeps_its_type(half: str) -> None:
    mine = type("Mine", (vb.VirtioBlkDevice,), {"should_notify": _raises(lambda: vb.ConfigError("this", "do that"))})
    with pytest.raises(vb.ConfigError, match="this: do that") as caught:
        recipe(device=mine).run(machine(half))
    assert (caught.value.what, caught.value.remedy) == ("this", "do that")


@each_half
def test_an_undeclared_trace_point_says_how_to_declare_it(half: str) -> None:
    class Mine(vb.VirtioBlkDevice):
        def handle_request(self, request: Any) -> Steps:
            yield ("test_live_nobody", 1)
            yield from super().handle_request(request)

    with pytest.raises(vb.ConfigError, match=r"'test_live_nobody', which is not declared: declare it: vb\.event"):
        recipe(device=Mine).run(machine(half))


def test_a_device_that_cannot_travel_is_refused_before_a_process_is_made() -> None:
    class Mine(vb.VirtioBlkDevice):
        lock = threading.Lock()

    with pytest.raises(vb.ConfigError, match=r"cannot travel to another process: .*lock.*LiveMachine\(device='thread'\)"):
        recipe(device=Mine).boot(machine("process"))
    assert recipe(device=Mine).run(machine("thread")).ios == 100


def test_a_device_that_cannot_be_rebuilt_over_there_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    class Mine(vb.VirtioBlkDevice):
        def __reduce__(self) -> Any:
            return (int, ("no number",))

    with pytest.raises(vb.DeviceDied, match="invalid literal for int"):
        recipe(device=Mine).boot(machine("process"))
    assert capfd.readouterr().err == "", "not a traceback in the terminal as well"


# -- the device's half goes away -------------------------------------------------------------------------------------------------


def _once(action: Callable[[], None], after: int = 50) -> Callable[[int, int | None], None]:
    done: list[int] = []

    def progress(completed: int, total: int | None) -> None:
        if completed > after and not done:
            done.append(completed)
            action()

    return progress


def test_a_device_process_killed_in_mid_run_is_one_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vblklab.machine.live._TICK_S", 0.0)
    vm = recipe(app=jobs(number_ios=1_000_000)).boot(machine("process", stall_s=60))
    child = vm._child
    assert child is not None
    with pytest.raises(vb.DeviceDied, match=r"gone \(killed by SIGKILL\): boot the recipe again"):
        vm.run(progress=_once(child.kill))
    assert child.returncode == -signal.SIGKILL
    vm.close()
    with pytest.raises(vb.VblkError, match="already run"):
        vm.run()


def test_a_device_process_that_exits_by_itself_is_one_typed_error() -> None:
    class Exits(vb.VirtioBlkDevice):
        def should_notify(self, queue: Any) -> bool:
            os._exit(7)

    with pytest.raises(vb.DeviceDied, match="exit status 7"):
        recipe(device=Exits).run(machine("process"))


def test_a_killed_device_process_during_a_register_access_is_one_typed_error() -> None:
    vm = recipe().boot(machine("process", stall_s=60))
    vm._child.kill()
    with pytest.raises(vb.DeviceDied, match="SIGKILL"):
        for _ in vm.transport.status():
            pass
    vm.close()


def test_when_the_drivers_process_is_killed_the_device_process_ends_too() -> None:
    code = (
        "import os, vblklab as vb\n"
        "vm = vb.Pipeline(disk=vb.Ram(1 << 20), app=vb.Fio(size='1m', number_ios=10)).boot(vb.LiveMachine())\n"
        "print(vm._child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(vb.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    with pytest.raises((ProcessLookupError, ChildProcessError)):  # an orphan comes to this process; wait for its own end
        os.waitpid(pid, 0)
        os.kill(pid, 0)


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------------------


def _raise() -> None:
    raise KeyboardInterrupt


@each_half
@pytest.mark.parametrize("action", [_raise, lambda: signal.raise_signal(signal.SIGINT)], ids=["raised", "signal"])
def test_ctrl_c_reaps_what_is_in_flight_and_returns_a_partial_run(
    action: Callable[[], None], half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vblklab.machine.live._TICK_S", 0.0)
    before = signal.getsignal(signal.SIGINT)
    vm = recipe(app=jobs(number_ios=1_000_000, numjobs=2), kvm=vb.Kvm(vcpus=2)).boot(machine(half))
    run = vm.run(progress=_once(action))
    assert run.interrupted and 50 < run.ios < 1_000_000 and run.errors == 0
    assert all(task.in_flight == 0 for task in vm.tasks)
    assert run.rung == "L2 live" and "interrupted" in run.summary() and run.iops > 0
    assert signal.getsignal(signal.SIGINT) is before


def test_a_ctrl_c_of_the_terminal_ends_both_halves_and_leaves_the_numbers() -> None:
    code = (
        "import os, signal, vblklab as vb\n"
        "def now(done, total):\n"
        "    if not pressed and done > 50: pressed.append(os.killpg(0, signal.SIGINT))\n"
        "pressed = []\n"
        "vm = vb.Pipeline(disk=vb.Ram(1 << 20), app=vb.Fio(rw='randread', size='1m', iodepth=4, number_ios=10**6)).boot(vb.LiveMachine())\n"
        "run = vm.run(progress=now)\n"
        "print(run.interrupted, run.errors, run.ios > 50, vm._child.returncode)\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(vb.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, start_new_session=True)
    assert done.stdout.split() == ["True", "0", "True", "0"], done.stderr
    assert done.stderr == ""


# -- disks -----------------------------------------------------------------------------------------------------------------------


@each_half
def test_a_read_only_image_is_read_and_never_written(half: str, image: Path) -> None:
    disk = vb.ImageFile(str(image), read_only=True)
    assert recipe(disk=disk).run(machine(half)).errors == 0
    with pytest.raises(vb.JobError, match="on a read-only disk"):
        recipe(disk=disk, app=jobs(rw="randwrite")).boot(machine(half))
    vm = recipe(disk=disk).boot(machine(half))
    with pytest.raises(vb.DiskError, match="open for reading only"):
        vm.resize(2 << 20)
    assert vm.run().ios == 100, "and the machine is as it was"


@each_half
def test_an_image_truncated_in_mid_run_fails_the_ios_behind_its_end_and_no_other(half: str, image: Path) -> None:
    vm = recipe(disk=vb.ImageFile(str(image)), app=jobs(rw="read", iodepth=1, number_ios=256)).boot(machine(half, iolog=True))
    os.truncate(image, 512 << 10)
    run = vm.run()
    assert (run.ios, run.errors) == (256, 128)


@each_half
def test_a_resize_of_an_image_changes_the_file_and_the_capacity(half: str, image: Path) -> None:
    vm = recipe(disk=vb.ImageFile(str(image))).boot(machine(half))
    vm.resize(3 << 20)
    assert image.stat().st_size == 3 << 20
    vm.run()
    assert (vm.driver.capacity_sectors, vm.driver.capacity_changes) == (3 << 11, 1)


@each_half
@pytest.mark.parametrize("size", [0, -512, 513, "4k", 4096.0])
def test_a_size_that_cannot_be_is_refused(size: Any, half: str) -> None:
    vm = recipe().boot(machine(half))
    with pytest.raises(vb.ConfigError, match="positive multiple of 512"):
        vm.resize(size)
    assert vm.run().errors == 0, "and the machine is as it was"


def test_after_its_run_a_machine_says_that_it_is_over() -> None:
    vm = recipe().boot(machine("thread"))
    vm.run()
    vm.close()
    for use in (vm.run, lambda: vm.resize(1 << 20)):
        with pytest.raises(vb.VblkError, match="already run: boot the recipe again"):
            use()


# -- nothing is left ---------------------------------------------------------------------------------------------------------------


@each_half
@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ({"disk": vb.ImageFile("/nowhere/at/all.img")}, vb.DiskError),
        ({"app": jobs(size="1g")}, vb.JobError),
        ({"queue": vb.Split(2), "device": vb.VirtioBlkDevice(indirect=False)}, vb.ConfigError),
        ({"device": type("Refuses", (vb.VirtioBlkDevice,), {"accepts": lambda self, features: False})}, vb.VirtioError),
    ],
    ids=["no image", "job too large", "queue too small", "features refused"],
)
def test_a_boot_that_fails_leaves_nothing_running(parts: dict[str, Any], error: type, half: str) -> None:
    with pytest.raises(error):
        recipe(**parts).boot(machine(half))


@each_half
def test_a_machine_that_is_booted_and_closed_leaves_nothing(half: str) -> None:
    vm = recipe().boot(machine(half))
    vm.close()
    vm.close()


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _resident_kib() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 10


def test_thirty_boots_leave_no_file_no_thread_and_no_memory() -> None:
    app = jobs(number_ios=20, iodepth=64, bs="64k")  # 4 MiB of guest memory a boot, at least
    for number in range(30):
        recipe(app=app).run(machine("thread"))
        if number == 4:
            gc.collect()
            files, threads, memory = _open_files(), threading.active_count(), _resident_kib()
    gc.collect()
    assert (_open_files(), threading.active_count()) == (files, threads)
    assert _resident_kib() - memory < 25 * 4096 // 4, "25 boots kept their guest memory"


# -- what it says ----------------------------------------------------------------------------------------------------------------


def test_without_tracing_there_are_numbers_but_no_steps() -> None:
    run = recipe().run(machine("thread", trace=False))
    assert run.ios == 100 and run.clat.count == 100
    assert len(run.rows) == 0 and not run.trace and run.provenance["tracing"] == "off" and run.provenance["probe cost"] == "none"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"device": "core"}, "choose 'process' or 'thread'"), ({"poll_us": -1}, "poll_us=-1"), ({"stall_s": 0}, "stall_s=0")],
)
def test_an_option_that_makes_no_sense_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vb.ConfigError, match=message):
        vb.LiveMachine(**options)


def test_elsewhere_than_on_linux_it_says_which_rung_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert live_missing() == ""
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(vb.NotHere, match=r"needs Linux \(this is darwin\); SimMachine, rung L0, works here"):
        recipe().boot(vb.LiveMachine())


def test_without_eventfd_it_says_which_rung_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "eventfd")
    with pytest.raises(vb.NotHere, match="without eventfd or memfd_create; SimMachine, rung L0, works here"):
        recipe().boot(vb.LiveMachine())


def test_the_same_job_does_the_same_ios_on_both_machines_and_both_halves() -> None:
    app = jobs(rw="randrw", bssplit="512/50:4k/50", numjobs=3, number_ios=60)
    logs = []
    for one in (vb.SimMachine(iolog=True), machine("thread", iolog=True), machine("process", iolog=True)):
        run = recipe(app=app).run(one)
        tasks: dict[int, list[tuple[int, int, int]]] = {}
        for _, op, offset, length, task in run.iolog:
            tasks.setdefault(task, []).append((op, offset, length))
        logs.append(tasks)
    assert logs[0] == logs[1] == logs[2] and sorted(logs[0]) == [0, 1, 2]


# -- the loop --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def loop() -> Generator[LiveLoop, None, None]:
    made = LiveLoop("device:epoll_wait", trace=True)
    yield made
    made.close()


def _turns(loop: LiveLoop, count: int = 200) -> None:
    for _ in range(count):
        loop.turn(0.0)


def test_a_notification_before_the_wait_is_not_lost(loop: LiveLoop) -> None:
    seen: list[str] = []

    def steps() -> Steps:
        seen.append("start")
        yield POP
        context.notify()
        context.notify()
        yield WAIT
        seen.append("woken")
        yield WAIT
        seen.append("woken again")

    context = loop.add("a", steps())
    _turns(loop)
    assert seen == ["start", "woken"]
    context.notify()
    _turns(loop)
    assert seen[-1] == "woken again" and context.done


def test_a_context_that_gives_way_lets_the_other_run_and_goes_on(loop: LiveLoop) -> None:
    seen: list[str] = []

    def steps(name: str) -> Steps:
        for _ in range(3):
            seen.append(name)
            yield Wait(0)

    for name in "ab":
        loop.add(name, steps(name), task=True)
    _turns(loop)
    assert seen == ["a", "b"] * 3 and loop.tasks_left == 0


def test_a_deadline_wakes_a_context(loop: LiveLoop) -> None:
    def steps() -> Steps:
        now = yield POP
        woken = yield Wait(now + 3_000_000)
        times.append(woken - now)

    times: list[int] = []
    loop.add("a", steps(), task=True)
    with deadline(120):
        while loop.tasks_left:
            loop.turn(3600.0)
    assert times[0] >= 3_000_000


def test_an_eventfd_is_emptied_and_calls(loop: LiveLoop) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        calls: list[int] = []
        loop.watch_eventfd(fd, lambda: calls.append(1))
        os.eventfd_write(fd, 5)
        _turns(loop, 3)
        assert calls == [1]
    finally:
        os.close(fd)


def test_polling_looks_for_work_before_it_sleeps(loop: LiveLoop) -> None:
    looks: list[int] = []
    loop.spin = lambda: looks.append(1) is None and len(looks) == 20
    loop.spin_ns = 10**12
    with deadline(120):
        loop.turn(0.0)
    assert len(looks) >= 20, "and goes on for a moment where it served by itself"


def test_polling_that_wakes_a_context_ends_at_once(loop: LiveLoop) -> None:
    looks: list[int] = []
    ends: list[int] = []
    idle = loop.add("idle", iter_waits())
    _turns(loop, 2)

    def spin() -> bool:
        looks.append(1)
        idle.notified = len(looks) == 20
        return idle.notified

    loop.spin, loop.spin_ns = spin, 10**12
    loop.spin_begin, loop.spin_end = lambda: ends.append(0), lambda: bool(ends.append(1))
    with deadline(120):
        loop.turn(0.0)
    assert (len(looks), ends) == (20, [0]), "whoever notifies is told again only before the loop sleeps"
    loop.spin = None
    _turns(loop, 3)
    assert ends == [0, 1]


def iter_waits() -> Steps:
    while True:
        yield WAIT


@pytest.mark.parametrize("ev", [None, 5, "virtqueue_pop", Wait])
def test_a_yield_that_is_no_event_is_named_with_its_context(ev: Any, loop: LiveLoop) -> None:
    def steps() -> Steps:
        yield ev

    loop.add("mine", steps())
    with pytest.raises(vb.ConfigError, match="mine yielded"):
        loop.turn(0.0)


def test_the_log_keeps_the_beginning_and_then_one_window_in_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "KEPT_FIRST", 1000)
    monkeypatch.setattr(loop_module, "KEPT_MOST", 3000)
    now = 0

    def clock() -> int:
        nonlocal now
        now += 1 << 20  # 64 readings a window
        return now

    monkeypatch.setattr(loop_module, "clock", clock)
    loop = LiveLoop("device:epoll_wait", trace=True, first_number=1000)

    def steps() -> Steps:
        for _ in range(3000):
            for _ in range(5):
                yield POP
            yield Spend(10)
            yield Wait(0)

    loop.add("a", steps(), task=True)
    while loop.tasks_left:
        loop.turn(0.0)
    log = loop.log
    assert log is not None
    loop.close()
    assert {number for _, number, _ in log} == {1000}
    assert 2000 < len(log) <= 3000 + 64
    assert [entry[0] for entry in log] == sorted(entry[0] for entry in log)
    windows = sorted({entry[0] >> 26 for entry in log[1000:]})
    late = [window for window in windows if window & 7]
    assert len(late) <= len(windows) // 2, "a batch that began in an open window may reach into the next"
    assert len({window >> 3 for window in windows}) > 10, "spread over the run"


def test_the_log_says_when_a_context_goes_idle(loop: LiveLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry for each wait that idles, and none where the context only looks again or gives way."""
    monkeypatch.setattr(loop_module, "clock", itertools.count().__next__)

    def steps() -> Steps:
        now = yield POP
        context.notify()
        yield WAIT  # notified meanwhile: goes on
        yield POP
        yield Wait(0)  # gives way: goes on
        yield POP
        yield Wait(now + 100)  # idle until then
        yield POP
        yield WAIT  # idle until it is notified
        yield POP

    context = loop.add("a", steps(), task=True)
    _turns(loop)
    assert not context.done
    context.notify()
    _turns(loop)
    assert context.done and loop.log is not None
    assert [ev for _, _, ev in loop.log] == [POP, POP, POP, ("wait",), POP, ("wait",), POP]


def test_each_side_of_a_run_goes_idle_where_its_work_ends() -> None:
    """One I/O at a time: the job waits once for each I/O; how often the device does is the scheduler's affair, but not where."""
    run = vb.Pipeline(app=vb.Fio(rw="randread", bs=4096, iodepth=1, number_ios=100)).run(vb.LiveMachine())
    before: dict[str, list[str]] = {"guest job.0": [], "iothread": []}
    for context, keys in before.items():
        own = [event.key for event in run.trace or () if event.context == context]
        keys += [own[at - 1] for at, key in enumerate(own) if key == "wait" and at]
    assert before["guest job.0"] == ["sys_exit_io_submit"] * 100
    assert set(before["iothread"]) <= {"virtio_queue_set_notification", "wait"}


def test_without_tracing_nothing_is_logged() -> None:
    loop = LiveLoop("device:epoll_wait", trace=False)

    def steps() -> Steps:
        for _ in range(100):
            yield POP

    loop.add("a", steps(), task=True)
    _turns(loop, 5)
    assert loop.log is None and loop.tasks_left == 0
    loop.close()
