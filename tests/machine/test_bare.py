"""A bare guest on a real vCPU: machine code runs the whole loop, finds every wrong sector, and every notification is accounted for."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vblklab as vb
from tests.test_acceptance import replay
from vblklab import cli
from vblklab.disk import RamStore
from vblklab.kvm import bare_payload
from vblklab.kvm.payload import Mail
from vblklab.spec.virtio import Feature

from .kvm_account import account, nothing_left_of_kvm  # noqa: F401

real = pytest.mark.kvm
ALL = vb.VirtioBlkDriver.FEATURES
SIZE = 1 << 20
IDLE = bare_payload.BASE + bare_payload.offset_of("idle") + 1
"""Where an idle vCPU stands: behind its hlt."""


def recipe(job: dict[str, Any] | None = None, **parts: Any) -> vb.Pipeline:
    app = vb.Fio(**({"rw": "randread", "bs": 4096, "iodepth": 4, "number_ios": 100, "size": "1m"} | (job or {})))
    return vb.Pipeline(**({"app": app, "disk": vb.Ram(SIZE), "guest": vb.BareGuest()} | parts))


def thread(**options: Any) -> vb.KvmMachine:
    """Without a process for the device and without compiled code, which are what takes time to start."""
    return vb.KvmMachine(device="thread", trace=False, fast="off", **options)


def combinations(ios: int) -> list[Any]:
    found = []
    for number, (kick, call, event_idx, indirect) in enumerate(product(("mmio-exit", "ioeventfd"), ("irqfd", "intx"), (1, 0), (1, 0))):
        depth = (1, 32, 7, 16)[(number + number // 4) % 4]
        name = f"{kick}-{call}-{'event_idx' * event_idx or 'flags'}-{'indirect' * indirect or 'direct'}-depth{depth}"
        found.append(pytest.param(vb.Kvm(kick=kick, call=call), event_idx, indirect, depth, ios, id=name))
    return found


LONG = [pytest.param(*case.values, id=f"{case.id}-long", marks=pytest.mark.long) for case in combinations(20_000)]


@real
@pytest.mark.parametrize(("kvm", "event_idx", "indirect", "depth", "ios"), combinations(320) + LONG)
def test_every_combination_verifies_and_accounts_for_all(kvm: Any, event_idx: int, indirect: int, depth: int, ios: int) -> None:
    without = (0 if event_idx else Feature.EVENT_IDX) | (0 if indirect else Feature.INDIRECT_DESC)
    job = dict(rw="randrw", bs=512, iodepth=depth, number_ios=ios, verify="crc32", randseed=depth)
    run = recipe(job, kvm=kvm, queue=vb.Split(128), driver=vb.VirtioBlkDriver(features=ALL & ~without)).run(thread())
    assert (run.ios, run.errors, run.mismatches) == (ios, 0, 0), run.jobs[0].mismatches
    assert run.jobs[0].verified_ios > min(ios // 4, 1000)
    account(run.counters, kvm.kick)


@real
@pytest.mark.parametrize("ios", [500, pytest.param(100_000, marks=pytest.mark.long)])
def test_the_image_is_that_of_an_independent_replay(tmp_path: Path, ios: int) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    job = dict(rw="randrw", bssplit="512/70:1k/25:4k/5", iodepth=8, iodepth_batch=3, number_ios=ios, verify="crc32", randseed=7)
    vm = recipe(job, disk=vb.ImageFile(str(path))).boot(vb.KvmMachine(iolog=True))
    run = vm.run()
    assert (run.ios, run.errors, run.mismatches) == (ios, 0, 0)
    assert np.array_equal(np.frombuffer(path.read_bytes(), np.uint8), replay(run.iolog, SIZE, 7, verify=True))
    assert run.counters["kicks"] + run.counters["kicks_suppressed"] < run.ios + run.jobs[0].verified_ios, "batches have one decision each"
    times = np.array([vm.bare.table()[name] for name in ("start", "published", "issued", "taken")])
    assert times.all() and (times[1:] > times[:-1]).all()


@real
def test_overlapping_requests_wait_for_each_other_and_others_end_in_any_order() -> None:
    job = dict(rw="randrw", bssplit="512/80:4k/20", size="32k", iodepth=16, number_ios=400, verify="sha1", randseed=3)
    vm = recipe(job, engine=vb.Threads()).boot(thread())
    run = vm.run()
    table, first = vm.bare.table(), vm.bare.list_gpa
    assert (run.ios, run.errors, run.mismatches) == (400, 0, 0)
    waits = (table["wait"].astype(int) - first) // table.itemsize
    waiting = np.flatnonzero(table["wait"][: vm.requests.main])
    assert len(waiting) > 200
    assert all(table["taken"][: waits[number]].max() < table["start"][number] for number in waiting)
    assert (table["taken"][: vm.requests.main].max() < table["start"][vm.requests.main :]).all(), "the second phase follows the first"


class Spoilt(RamStore):
    """Reads sector 5 with a wrong byte at ``at``, or with what ``other`` holds."""

    at: int | None = None
    other: int | None = None

    def readv(self, offset: int, views: Sequence[memoryview]) -> None:
        super().readv(self.other << 9 if self.other is not None and offset == 5 << 9 else offset, views)
        if self.at is not None and offset == 5 << 9:
            views[0][self.at] ^= 1


class OldWrites(RamStore):
    """Loses the second write to sector 5."""

    writes = 0

    def writev(self, offset: int, views: Sequence[memoryview]) -> None:
        self.writes += offset == 5 << 9
        if offset != 5 << 9 or self.writes < 2:
            super().writev(offset, views)


class Slow(RamStore):
    """A guest that waits for it idles."""

    def readv(self, offset: int, views: Sequence[memoryview]) -> None:
        time.sleep(0.01)
        super().readv(offset, views)

    def writev(self, offset: int, views: Sequence[memoryview]) -> None:
        time.sleep(0.01)
        super().writev(offset, views)


class Disk(vb.Ram):
    def __init__(self, store: type[RamStore], **more: Any) -> None:
        super().__init__(SIZE)
        self.store, self.more = store, more

    def open(self) -> RamStore:
        store = self.store(SIZE)
        vars(store).update(self.more)
        return store


@real
@pytest.mark.parametrize("wrong", [*({"at": at} for at in (0, 4, 8, 15, 24, 96, 511)), {"other": 6}, OldWrites, {}], ids=str)
def test_the_machine_code_finds_a_wrong_sector(wrong: Any) -> None:
    disk = Disk(OldWrites) if wrong is OldWrites else Disk(Spoilt, **wrong)
    run = recipe(dict(rw="write", bs=512, size="5k", number_ios=20, verify="md5"), disk=disk).run(thread())
    assert run.mismatches == (1 if wrong else 0)
    assert run.jobs[0].mismatches == ["offset 2560: not what was written there last (1 such sectors of the read at 2560)"] * bool(wrong)
    assert run.jobs[0].error == (errno.EILSEQ if wrong else 0)


@real
@pytest.mark.parametrize("idle", ["hlt", "poll"])
def test_the_vcpu_idles_in_the_kernel_or_in_the_guest(idle: str) -> None:
    run = recipe(dict(iodepth=1, number_ios=20), disk=Disk(Slow)).run(thread(idle=idle))
    assert (run.ios, run.errors) == (20, 0) and run.counters["interrupts"] > 0
    if "vcpu_halt_exits" in run.counters:
        assert (run.counters["vcpu_halt_exits"] > 0) == (idle == "hlt")
    account(run.counters, "ioeventfd")


@real
@pytest.mark.parametrize("features", [ALL, ALL & ~Feature.EVENT_IDX], ids=["event_idx", "flags"])
def test_a_polled_queue_needs_no_interrupt(features: int) -> None:
    run = recipe(driver=vb.VirtioBlkDriver(poll=True, features=features)).run(thread())
    assert run.ios == 100 and run.counters["interrupts"] <= run.counters["notifies"] <= 1
    assert run.counters["kicks"] == run.counters["doorbell_stores"] == run.counters["eventfd_kicks"] > 0
    assert "polls the used ring" in run.provenance["vCPU"]


@real
@pytest.mark.parametrize(("event_idx", "word", "value"), [(True, 2 + 4 * 256, 1000), (False, 0, 1)], ids=["avail_event", "NO_NOTIFY"])
def test_no_kick_that_the_device_does_not_want(event_idx: bool, word: int, value: int) -> None:
    driver = vb.VirtioBlkDriver(features=ALL if event_idx else ALL & ~Feature.EVENT_IDX)
    vm = recipe(driver=driver).boot(thread(stall_s=0.2))
    used = vm.memory.view(vm.driver.queues[0].layout.used, 4 + 8 * 256 + 2).cast("H")
    used[word] = value
    ends(vm, vb.Stalled, "nothing completed for 0.2 s, 4 I/Os are in flight")
    assert (vm.guest.mail[Mail.RUNG], vm.bare.ctl[bare_payload.Ctl.DECISIONS]) == (0, 4)


@real
def test_a_kick_at_the_entry_that_avail_event_names() -> None:
    vm = recipe().boot(thread())
    vm.memory.view(vm.driver.queues[0].layout.used, 4 + 8 * 256 + 2).cast("H")[2 + 4 * 256] = 2
    assert vm.run().ios == 100
    assert vm.bare.table()["rang"][:3].tolist() == [0, 0, 1]


@real
def test_stamps_become_latencies_steps_and_trace_points_on_the_hosts_clock() -> None:
    job = dict(rw="write", fsync=10, iodepth=1, number_ios=20)
    run = recipe(job, kvm=vb.Kvm(kick="mmio-exit"), disk=Disk(Slow)).run(vb.KvmMachine())
    assert (run.rung, run.simulated, run.ios, run.clat.count, run.jobs[0].sync.ios) == ("L4 real KVM", False, 20, 20, 2)
    assert "causal bounds" in run.provenance["guest clock"] and "error at most" in run.provenance["guest clock"]
    assert len(run.rows) == 22 and (run.rows[:, 1:] >= run.rows[:, :-1]).all()
    assert run.trace is not None
    assert all(early.t_ns <= late.t_ns for early, late in zip(run.trace, run.trace[1:], strict=False))
    keys = [event.key for event in run.trace]
    wanted = ["sys_enter_io_submit", "virtqueue_add_sgs", "vm_notify", "kvm_userspace_exit", "virtqueue_pop", "virtqueue_fill"]
    wanted += ["virtio_notify_irqfd", "vcpu:irq_handler_entry", "virtqueue_get_buf", "sys_exit_io_getevents"]
    first = [key for key in keys[: keys.index("sys_exit_io_getevents") + 1] if key in wanted]
    if "vcpu:irq_handler_entry" not in first:  # it was slow itself and found the used element before it idled
        wanted.remove("vcpu:irq_handler_entry")
    assert first == wanted and "vcpu:irq_handler_entry" in keys
    assert {run.kinds[step] for step in ("D3", "U6")} <= {"emulated", "kernel/hardware"}
    assert any("without Python" in note for note in run.notes)
    assert run.jobs[0].depths == {1: 22}


@real
def test_a_learners_device_serves_a_bare_guest() -> None:
    class Chatty(vb.VirtioBlkDevice):
        def should_notify(self, queue: object) -> bool:
            return True

    quiet, chatty = (recipe(dict(iodepth=16, number_ios=300), device=device).run(thread()) for device in (vb.VirtioBlkDevice, Chatty))
    assert quiet.ios == chatty.ios == 300
    assert chatty.counters["interrupts_sent"] >= chatty.counters["notifies"] > 0
    assert chatty.counters["interrupts_suppressed"] == 0
    account(chatty.counters, "ioeventfd")


@real
def test_failed_requests_are_counted_and_what_they_held_is_not_checked() -> None:
    class Moody(RamStore):
        def writev(self, offset: int, views: Sequence[memoryview]) -> None:
            if offset == 5 << 9:
                raise OSError(errno.EIO, "a bad sector")
            super().writev(offset, views)

    run = recipe(dict(rw="write", bs=512, size="5k", number_ios=20, verify="md5"), disk=Disk(Moody)).run(thread())
    assert (run.ios, run.errors, run.mismatches, run.jobs[0].error) == (20, 2, 0, errno.EIO)


@real
def test_runtime_and_ctrl_c_end_with_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    short = recipe(dict(number_ios=60_000, runtime=0.2)).run(thread())
    assert 0 < short.ios < 60_000 and not short.interrupted and short.errors == 0
    account(short.counters, "ioeventfd")
    monkeypatch.setattr("vblklab.machine.bare._TICK_S", 0.01)
    fired: list[int] = []

    def interrupt(done: int, total: int | None) -> None:
        if done and not fired:
            fired.append(done)
            os.kill(os.getpid(), signal.SIGINT)

    run = recipe(dict(number_ios=60_000)).run(thread(), progress=interrupt)
    assert run.interrupted and 0 < run.ios < 60_000 and run.errors == 0
    account(run.counters, "ioeventfd")


# -- what goes wrong ------------------------------------------------------------------------------------------------------------------


def ends(vm: Any, error: type[vb.VblkError], match: str) -> Any:
    with pytest.raises(error, match=match) as caught:
        vm.run()
    return caught.value


@real
def test_a_lost_interrupt_is_reported_with_registers_and_the_bytes_at_rip() -> None:
    class Silent(vb.VirtioBlkDevice):
        def should_notify(self, queue: object) -> bool:
            return False

    vm = recipe(device=Silent, disk=Disk(Slow)).boot(thread(stall_s=0.3))
    ends(vm, vb.Stalled, rf"nothing completed for 0.3 s, [1-4] I/Os are in flight; .*rip={IDLE:#x}.*bytes at rip: fa")


@real
def test_a_triple_fault_shows_the_registers() -> None:
    vm = recipe().boot(thread())
    vm.bare.ctl[bare_payload.Ctl.BELL] = 8  # memory: nobody hears it, so the guest idles
    vm.guest.vm.signal_msi(0x90)  # a vector without a gate
    error = ends(vm, vb.KvmExit, rf"triple fault.*rip={IDLE:#x}.*bytes at rip: [0-9a-f]{{2}}")
    assert error.registers["rsp"] and error.code


@real
def test_an_access_where_nothing_is_names_the_address() -> None:
    vm = recipe().boot(thread())
    vm.bare.ctl[bare_payload.Ctl.BELL] = 0xD000_0000
    ends(vm, vb.KvmExit, r"KVM_EXIT_MMIO at 0xd0000000, where nothing is.*rip=0xe0008")


@real
@pytest.mark.parametrize("head", [3, 127, 128, 1 << 31])
def test_a_used_element_of_nobodys_request_is_the_devices_error(head: int) -> None:
    class Liar(vb.VirtioBlkDevice):
        def complete(self, request: Any, status: int) -> Any:
            request.status_view[0] = status
            request.chain.head = head
            request.queue.fill(request.chain, 0)
            request.ended = True
            yield ("completion_to_ring", request.key, 0, status, 0)

    vm = recipe(dict(iodepth=1), device=Liar, queue=vb.Split(128)).boot(thread())
    ends(vm, vb.VirtioError, rf"names descriptor {head}, which is not the head of a buffer in flight.*2\.7\.8")


@real
@pytest.mark.parametrize("half", ["process", "thread"])
def test_an_exception_in_the_learners_device_arrives_with_its_traceback(half: str) -> None:
    class Broken(vb.VirtioBlkDevice):
        def handle_request(self, request):  # type: ignore[no-untyped-def]
            raise ZeroDivisionError("a learner's slip")
            yield

    vm = recipe(device=Broken).boot(vb.KvmMachine(device=half))
    assert "handle_request" in ends(vm, vb.DeviceDied, "a learner's slip").traceback


@real
def test_a_killed_device_is_one_typed_error() -> None:
    vm = recipe(dict(number_ios=5_000)).boot(vb.KvmMachine(trace=False))
    os.kill(vm._child.pid, signal.SIGKILL)
    ends(vm, vb.DeviceDied, "SIGKILL")
    with pytest.raises(vb.VblkError, match="already run"):
        vm.run()


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"transport": vb.Pci()}, r"transport=Pci\(.*use transport=vb.Mmio\(\)"),
    ({}, {"queue": vb.Packed(64)}, r"queue=Packed.*use queue=vb.Split\(\)"),
    ({}, {"queue": vb.Split(64, in_order=True)}, r"in_order=True.*use queue=vb.Split\(\)"),
    ({"numjobs": 2}, {}, "2 tasks with BareGuest.*numjobs=1"),
    ({"rw": "randtrim"}, {}, "rw=randtrim with BareGuest.*use another rw"),
    ({"iodepth": 33}, {}, "iodepth=33 with BareGuest: use 1 to 32"),
    ({"iodepth": 32}, {"queue": vb.Split(64), "device": vb.VirtioBlkDevice(indirect=False)}, r"needs 96 descriptors of a queue of 64.*128"),
    ({"iodepth": 8}, {"queue": vb.Split(4)}, r"needs 8 descriptors of a queue of 4: use queue=vb.Split\(8\)"),
    ({"rw": "write", "bs": "2m", "size": "4m", "verify": "md5"}, {"disk": vb.Ram(8 << 20)}, "blocks of 2,097,152 bytes with BareGuest"),
    ({}, {"device": vb.VirtioBlkDevice(size_max=2048)}, "blocks of 4,096 bytes with BareGuest on a device whose size_max is 2,048"),
    ({"rw": "randwrite"}, {"disk": vb.Ram(SIZE), "device": vb.VirtioBlkDevice(read_only=True)}, "read-only disk"),
    ({}, {"guest": vb.LinuxGuest()}, r"guest=LinuxGuest\(\) on KvmMachine.*vb.VhostUserMachine\(\)"),
    ({}, {"host": vb.StorageDaemon("disk.img")}, r"a real host needs vb.VhostUserMachine\(\)"),
    ({}, {"kvm": vb.Kvm(call="msi")}, "call='msi'"),
]


@real
@pytest.mark.parametrize(("job", "parts", "match"), REFUSED, ids=[match[:30] for _, _, match in REFUSED])
def test_what_it_cannot_do_is_refused_with_the_remedy(job: dict[str, Any], parts: dict[str, Any], match: str) -> None:
    with pytest.raises(vb.ConfigError, match=match):
        recipe(job, **parts).boot(thread())


@real
def test_other_queues_are_named_and_a_resize_is_refused() -> None:
    vm = recipe(dict(number_ios=20), device=vb.VirtioBlkDevice(queues=3)).boot(thread())
    with pytest.raises(vb.ConfigError, match="resize to 2097152 bytes with BareGuest, whose list is made at boot"):
        vm.resize(2 << 20)
    run = vm.run()
    assert run.ios == 20 and "queues: the first of 3 is used" in run.notes


@real
def test_a_long_log_with_gaps_gives_the_steps_of_the_first_ios() -> None:
    run = recipe(dict(iodepth=16, number_ios=400)).run(vb.KvmMachine(device="thread"))
    assert len(run.rows) == 400
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vblklab.machine.bare.KEPT_FIRST", 1_000)
        run = recipe(dict(iodepth=16, number_ios=400)).run(vb.KvmMachine(device="thread"))
    assert run.ios == run.clat.count == 400 and 20 < len(run.rows) < 300
    assert (run.rows[:, 1:] >= run.rows[:, :-1]).all()


@real
def test_vblk_run_with_a_bare_guest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.fio"
    file.write_text("[j]\nrw=randread\nbs=4k\nnumber_ios=20\nsize=1m\n")
    assert cli.main(["run", str(file), "--machine", "kvm", "--set", "guest=bare"]) == 0
    assert capsys.readouterr().out.startswith("KvmMachine (real KVM), bare guest · ioeventfd + irqfd")


@real
def test_buffers_in_pieces_are_refused() -> None:
    app = vb.Fio(rw="read", bs=4096, number_ios=1, size="1m", segment_bytes=512)
    with pytest.raises(vb.ConfigError, match="segment_bytes=512 with BareGuest: a request has one data segment"):
        recipe(app=app).boot(thread())


@pytest.mark.parametrize("machine", [vb.SimMachine(), vb.LiveMachine(), vb.VhostUserMachine()], ids=repr)
def test_other_machines_name_the_one_that_runs_it(machine: Any) -> None:
    with pytest.raises(vb.ConfigError, match=r"guest=BareGuest\(\) on .*a real bare guest needs vb.KvmMachine\(\)"):
        recipe().boot(machine)
