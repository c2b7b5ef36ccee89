"""KvmMachine: the same recipes through a real vCPU; every kick and every interrupt is accounted for, and every end is clean."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import vblklab as vb
from vblklab import cli
from vblklab.kvm import host
from vblklab.kvm.guest import GSI
from vblklab.kvm.ioctl import Ioctl, ioctl, kvm_regs
from vblklab.kvm.payload import Mail
from vblklab.machine import kvm as machine_kvm
from vblklab.spec.virtio import Feature

from .kvm_account import account, nothing_left_of_kvm, open_of_kvm  # noqa: F401

EVENT_IDX = vb.VirtioBlkDriver.FEATURES
NO_EVENT_IDX = EVENT_IDX & ~Feature.EVENT_IDX
real = pytest.mark.kvm
WIRINGS = [
    {"transport": transport, "kvm": vb.Kvm(kick=kick, call=call)}
    for transport, calls in ((vb.Mmio(), ("irqfd", "intx")), (vb.Pci(), ("irqfd", "msi", "intx")))
    for kick in ("mmio-exit", "ioeventfd")
    for call in calls
]
each_wiring = pytest.mark.parametrize(
    "wiring", WIRINGS, ids=[f"{type(one['transport']).__name__}-{one['kvm'].kick}-{one['kvm'].call}" for one in WIRINGS]
)


def recipe(**parts: Any) -> vb.Pipeline:
    app = vb.Fio(rw="randread", bs=4096, iodepth=4, number_ios=200, size="1m")
    return vb.Pipeline(**({"app": app, "disk": vb.Ram(1 << 20)} | parts))


def how_many() -> list[Any]:
    """Every wiring with every ring: 20,000 I/Os where the turn falls on it, 1,000 elsewhere; with --long also 100,000 and 20,000."""
    found = []
    for number, wiring in enumerate(WIRINGS):
        for turn, (ring, event_idx) in enumerate(((vb.Split, True), (vb.Packed, False), (vb.Packed, True), (vb.Split, False))):
            name = f"{type(wiring['transport']).__name__}-{wiring['kvm'].kick}-{wiring['kvm'].call}-{ring.__name__}-{event_idx}"
            few, many = (20_000, 100_000) if turn == number % 4 else (1_000, 20_000)
            found.append(pytest.param(wiring, ring, event_idx, few, id=f"{name}-{few}"))
            found.append(pytest.param(wiring, ring, event_idx, many, id=f"{name}-{many}", marks=pytest.mark.long))
    return found


@real
@pytest.mark.parametrize(("wiring", "ring", "event_idx", "ios"), how_many())
def test_all_ios_arrive_and_every_notification_is_accounted_for(wiring: dict[str, Any], ring: Any, event_idx: bool, ios: int) -> None:
    app = vb.Fio(rw="randrw", bs=512, iodepth=16, number_ios=ios, size="4m", verify="crc32")
    driver = vb.VirtioBlkDriver(features=EVENT_IDX if event_idx else NO_EVENT_IDX)
    run = recipe(app=app, disk=vb.Ram(4 << 20), driver=driver, queue=ring(64), **wiring).run(vb.KvmMachine(trace=False))
    assert (run.ios, run.errors, run.mismatches) == (ios, 0, 0)
    account(run.counters, wiring["kvm"].kick)
    assert run.counters["notifies"] > 0


@real
@pytest.mark.parametrize("half", ["process", "thread"])
@pytest.mark.parametrize("kick", ["mmio-exit", "ioeventfd"])
def test_a_run_names_its_rung_its_kvm_and_what_it_took_over(kick: str, half: str) -> None:
    run = recipe(kvm=vb.Kvm(kick=kick)).run(vb.KvmMachine(device=half))
    assert (run.ios, run.errors, run.rung, run.simulated) == (200, 0, "L4 real KVM", False)
    assert run.provenance["kvm"].startswith(host.flavour())
    assert "joined to CLOCK_MONOTONIC within" in run.provenance["guest clock"]
    assert any(note.startswith("interrupt: the payload's handler") for note in run.notes)
    assert any("device's own thread serves the queue" in note for note in run.notes) == (kick == "mmio-exit")
    assert (run.rows[:, 1:] >= run.rows[:, :-1]).all()
    assert run.split["U5"][0] > 0 or half == "thread"
    account(run.counters, kick)


@real
@each_wiring
def test_the_trace_points_of_one_io_come_in_the_order_of_the_steps(wiring: dict[str, Any]) -> None:
    app = vb.Fio(rw="randread", bs=4096, iodepth=1, number_ios=3, size="1m")
    run = recipe(app=app, **wiring).run(vb.KvmMachine())
    assert run.trace is not None
    keys = [event.key for event in run.trace]
    first = keys[: keys.index("sys_exit_io_getevents")]
    kvm, pci = wiring["kvm"], isinstance(wiring["transport"], vb.Pci)
    left = ["kvm_userspace_exit"] if kvm.kick == "mmio-exit" else []
    notified = "virtio_notify_irqfd" if kvm.call == "irqfd" else "virtio_notify"
    handler = "vm_interrupt" if not pci else "vp_interrupt" if kvm.call == "intx" else "guest:irq_handler_entry"
    # The vCPU may take the interrupt before the device's process has come back from the write that sent it.
    wanted = ["virtqueue_add_sgs", "vp_notify" if pci else "vm_notify", *left, "virtqueue_pop", "virtqueue_fill", notified]
    wanted += ["vcpu:irq_handler_entry", handler, "virtqueue_get_buf", "block_rq_complete"]
    assert [key for key in first if key in wanted] == wanted


@real
@pytest.mark.parametrize("idle", ["hlt", "poll"])
def test_the_vcpu_idles_in_the_kernel_or_in_the_guest(idle: str) -> None:
    run = recipe().run(vb.KvmMachine(idle=idle))
    assert (run.ios, run.errors) == (200, 0)
    if "vcpu_halt_exits" in run.counters:
        assert (run.counters["vcpu_halt_exits"] > 0) == (idle == "hlt")


@real
@pytest.mark.parametrize("transport", [vb.Mmio(), vb.Pci(), vb.Pci(notif_config_data=True), vb.Pci(vectors=2)], ids=repr)
@pytest.mark.parametrize("kick", ["mmio-exit", "ioeventfd"])
def test_several_queues_have_a_doorbell_each(transport: Any, kick: str) -> None:
    app = vb.Fio(rw="randrw", bs=1024, iodepth=4, numjobs=3, number_ios=300, size="1m", verify="md5")
    parts = dict(app=app, disk=vb.Ram(4 << 20), device=vb.VirtioBlkDevice(queues=3), kvm=vb.Kvm(kick=kick, vcpus=3), transport=transport)
    vm = recipe(**parts).boot(vb.KvmMachine(trace=False))
    run = vm.run()
    assert (run.ios, run.errors, run.mismatches) == (900, 0, 0)
    account(run.counters, kick)


@real
@pytest.mark.parametrize("call", ["irqfd", "msi"])
def test_each_queue_has_a_vector_of_its_own(call: str) -> None:
    app = vb.Fio(rw="randread", bs=1024, iodepth=2, numjobs=3, number_ios=100, size="1m")
    kvm = vb.Kvm(call=call, vcpus=3)
    vm = recipe(app=app, disk=vb.Ram(4 << 20), device=vb.VirtioBlkDevice(queues=3), kvm=kvm, transport=vb.Pci()).boot(vb.KvmMachine())
    mail = vm.guest.mail
    counted: list[int] = []
    count = vm._count

    def keep() -> dict[str, int]:
        counted.extend(vm.guest.by_message())
        return count()

    vm._count = keep
    run = vm.run()
    assert mail[Mail.TAKEN] == sum(counted) == run.counters["interrupts_taken"]
    assert counted[0] == 0 and all(counted[1:4]) and not any(counted[4:])


@real
def test_more_vectors_than_the_payload_has_are_refused() -> None:
    parts = dict(device=vb.VirtioBlkDevice(queues=16), transport=vb.Pci(), kvm=vb.Kvm(vcpus=1))
    with pytest.raises(vb.ConfigError, match="17 MSI-X vectors on KvmMachine, whose payload takes 16"):
        recipe(**parts).boot(vb.KvmMachine())


@real
def test_polled_queues_need_no_interrupt() -> None:
    polled = recipe(driver=vb.VirtioBlkDriver(poll=True)).run(vb.KvmMachine(trace=False))
    assert polled.ios == 200 and polled.counters["interrupts"] <= 1


@real
@each_wiring
def test_a_resize_interrupts_the_guest(wiring: dict[str, Any]) -> None:
    vm = recipe(**wiring).boot(vb.KvmMachine())
    vm.resize(2 << 20)
    vm.run()
    assert vm.driver.capacity_sectors == 2 << 11


@real
@pytest.mark.parametrize("half", ["process", "thread"])
def test_an_exception_in_the_learners_device_arrives_with_its_traceback(half: str) -> None:
    class Broken(vb.VirtioBlkDevice):
        def handle_request(self, request):  # type: ignore[no-untyped-def]
            raise ZeroDivisionError("a learner's slip")
            yield

    with pytest.raises(vb.DeviceDied, match="a learner's slip") as caught:
        recipe(device=Broken).run(vb.KvmMachine(device=half))
    assert "handle_request" in caught.value.traceback


@real
def test_a_killed_device_is_one_typed_error() -> None:
    vm = recipe(app=vb.Fio(rw="randread", bs=4096, iodepth=8, number_ios=1_000_000, size="1m")).boot(vb.KvmMachine())
    assert vm._child is not None
    os.kill(vm._child.pid, signal.SIGKILL)
    with pytest.raises(vb.DeviceDied, match="SIGKILL"):
        vm.run()


@real
def test_a_lost_interrupt_is_reported_and_the_idle_vcpu_is_woken_for_it() -> None:
    class Silent(vb.VirtioBlkDevice):
        def should_notify(self, queue: object) -> bool:
            return False

    vm = recipe(device=Silent).boot(vb.KvmMachine())
    vm.machine.stall_s = 0.5
    with pytest.raises(vb.Stalled, match="in flight"):
        vm.run()


@real
def test_a_triple_fault_in_the_run_shows_the_registers_and_leaves_nothing() -> None:
    threads, fds = threading.active_count(), open_of_kvm()
    vm = recipe().boot(vb.KvmMachine())
    vm.guest.vm.signal_msi(0x90)  # a vector that the payload has no gate for
    with pytest.raises(vb.KvmExit, match=r"triple fault.*rip=0xe00000.*bytes at rip") as caught:
        vm.run()
    assert caught.value.registers["rsp"] and caught.value.code
    assert (threading.active_count(), open_of_kvm()) == (threads, fds)


@real
def test_a_jump_to_where_no_memory_is_ends_the_run_with_the_registers() -> None:
    vm = recipe().boot(vb.KvmMachine(device="thread"))
    ioctl(vm.guest.vcpu.fd, Ioctl.SET_REGS, kvm_regs(rip=0xD000_0000, rsp=0xE000_3000, rflags=2))
    with pytest.raises(vb.KvmExit, match=r"KVM_EXIT_.*rip=0xd0000000.*bytes at rip: none") as caught:
        vm.run()
    assert caught.value.registers["rip"] == 0xD000_0000


@real
def test_an_exit_that_this_package_does_not_know_ends_the_run_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    vm = recipe().boot(vb.KvmMachine(device="thread"))

    def left_for_another_reason(fd: int, request: Ioctl, argument: Any = 0) -> int:
        answer = ioctl(fd, request, argument)
        if request == Ioctl.RUN:
            vm.guest.vcpu.shared[8:12] = (77).to_bytes(4, "little")
        return answer

    monkeypatch.setattr("vblklab.kvm.vcpu.ioctl", left_for_another_reason)
    with pytest.raises(vb.KvmExit, match=r"the vCPU stopped: exit 77, which is not known here, rip=0xe00000.*bytes at rip: [0-9a-f]{2}"):
        vm.run()


@real
@pytest.mark.parametrize("guest", [None, vb.BareGuest()], ids=["python", "bare"])
def test_a_killed_run_leaves_no_device_behind(guest: Any) -> None:
    """The whole process is killed in the middle of a run: the device's process, which is then an orphan, ends by itself."""
    job = 'rw="randread", bs=512, iodepth=4, number_ios=30_000, size="1m"'
    code = f"""
import vblklab as vb
vm = vb.Pipeline(app=vb.Fio({job}), disk=vb.Ram(1 << 20), guest={f"vb.{guest!r}" if guest else None}).boot(vb.KvmMachine(trace=False))
vm.run(progress=lambda done, total: print(vm._child.pid, flush=True))
"""
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    with run.stdout:
        orphan = int(run.stdout.readline())
        run.kill()
    assert run.wait() == -signal.SIGKILL
    assert os.waitpid(orphan, 0)[0] == orphan  # it came to us: tests/leaks.py adopts orphans


@real
def test_an_access_where_nothing_is_names_the_address() -> None:
    vm = recipe().boot(vb.KvmMachine())
    with vm.guest.vcpu.owned(), pytest.raises(vb.KvmExit, match=r"KVM_EXIT_MMIO at 0xd0000000, where nothing is.*rip="):
        vm.guest.load(0xD000_0000)
    vm.close()


@real
def test_an_interrupt_that_nobody_sent_is_counted_as_spurious() -> None:
    vm = recipe(kvm=vb.Kvm(call="intx")).boot(vb.KvmMachine())
    vm.guest.vm.irq_line(GSI, True)
    with vm.guest.vcpu.owned():
        assert not vm.guest.take_pending(), "no cause is pending, so it is not the device's"
    assert vm.guest.mail[Mail.SPURIOUS] > 0
    run = vm.run()
    assert run.ios == 200
    account(run.counters, "ioeventfd")


@real
@pytest.mark.parametrize("transport", [vb.Mmio(), vb.Pci()], ids=repr)
def test_the_line_goes_down_with_every_acknowledge(transport: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = recipe(kvm=vb.Kvm(call="intx"), transport=transport).boot(vb.KvmMachine())
    levels: list[bool] = []
    irq_line = vm.guest.vm.irq_line

    def recorded(gsi: int, level: bool) -> bool:
        levels.append(level)
        return irq_line(gsi, level)

    monkeypatch.setattr(vm.guest.vm, "irq_line", recorded)
    run = vm.run()
    assert levels.count(True) > 0 < run.counters["interrupts_taken"]
    assert levels.count(False) >= run.counters["interrupts_taken"]
    assert levels[-1] is False


@real
def test_ctrl_c_ends_with_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vblklab.machine.live._TICK_S", 0.0)
    fired: list[int] = []

    def interrupt(done: int, total: int | None) -> None:
        if done > 50 and not fired:
            fired.append(done)
            os.kill(os.getpid(), signal.SIGINT)

    app = vb.Fio(rw="randread", bs=4096, iodepth=4, number_ios=100_000, size="1m")
    run = recipe(app=app).run(vb.KvmMachine(trace=False), progress=interrupt)
    assert run.interrupted and 50 < run.ios < 100_000 and run.errors == 0


@real
def test_a_payload_that_loses_a_doorbell_is_found_out() -> None:
    vm = recipe().boot(vb.KvmMachine(trace=False))
    vm.guest.mail[Mail.RUNG] += 1
    with pytest.raises(AssertionError):
        account(vm.run().counters, "ioeventfd")


@pytest.mark.parametrize(("module", "parameter"), [("kvm_intel", "enable_apicv"), ("kvm_amd", "avic")])
def test_the_mode_of_interrupt_delivery_is_read_from_the_module(tmp_path: Path, module: str, parameter: str) -> None:
    assert not host.apicv(str(tmp_path))
    folder = tmp_path / module / "parameters"
    folder.mkdir(parents=True)
    for text, mode in (("N\n", False), ("Y\n", True), ("1\n", True)):
        (folder / parameter).write_text(text)
        assert host.apicv(str(tmp_path)) is mode


def test_without_kvm_one_typed_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_kvm.kvm_host, "found", lambda: (False, "there is no /dev/kvm", "load kvm_intel or kvm_amd"))
    with pytest.raises(vb.NotHere, match=r"there is no /dev/kvm: load kvm_intel or kvm_amd; SimMachine"):
        recipe().run(vb.KvmMachine())


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(vb.ConfigError, match="idle='doze'"):
        vb.KvmMachine(idle="doze")


@real
def test_vblk_run_machine_kvm(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "job.fio"
    job.write_text("[j]\nrw=randread\nbs=4k\nnumber_ios=50\nsize=1m\n")
    assert cli.main(["run", str(job), "--machine", "kvm", "--set", "kvm.kick=mmio-exit"]) == 0
    assert capsys.readouterr().out.startswith("KvmMachine (real KVM) · mmio-exit + irqfd")
