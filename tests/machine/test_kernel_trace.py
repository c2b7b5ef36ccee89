"""The kernel's own points in a run: in the declared order, on one clock with Python's, and nothing left behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import vblklab as vb
from tests.peer.test_tracefs import root, traced
from vblklab.events import EVENTS
from vblklab.trace import ring_buffer
from vblklab.trace.kernel import Kernel, join_kernel
from vblklab.trace.run import Run, TraceEvent

__all__ = ["root"]

ORDER = {key: number for number, key in enumerate(EVENTS)}
RECORDED = ("kvm-ioeventfd-irqfd-d1", "kvm-mmio-exit-intx-d1")
IOS = 15


def recipe(transport: Any, kick: str, call: str, **parts: Any) -> vb.Pipeline:
    app = vb.Fio(rw="randread", bs=4096, iodepth=1, number_ios=IOS, size="1m")
    return vb.Pipeline(**({"app": app, "disk": vb.Ram(1 << 20), "transport": transport, "kvm": vb.Kvm(kick=kick, call=call)} | parts))


def in_declared_order(points: Sequence[TraceEvent]) -> None:
    assert [point.t_ns for point in points] == sorted(point.t_ns for point in points)
    numbers = [ORDER[point.key] for point in points]
    assert numbers == sorted(numbers), [str(point) for point in points]


def kernels(points: Sequence[TraceEvent]) -> set[str]:
    return {point.key for point in points if "kernel" in point.context or "interrupt," in point.context}


def whole(run: Run) -> dict[int, list[TraceEvent]]:
    """The points of each I/O whose ends are both in the trace."""
    found = {}
    for io in sorted({event.args[0] for event in run.trace or () if event.key == "sys_enter_io_submit"}):
        try:
            found[io] = run.request(io)
        except vb.ConfigError:
            continue
    return found


@traced
@pytest.mark.kvm
@pytest.mark.parametrize(
    ("transport", "kick", "call"),
    [
        (vb.Mmio(), "ioeventfd", "irqfd"),
        (vb.Mmio(), "mmio-exit", "intx"),
        (vb.Pci(), "ioeventfd", "irqfd"),
        (vb.Pci(), "mmio-exit", "msi"),
    ],
    ids=["mmio-ioeventfd-irqfd", "mmio-exit-intx", "pci-ioeventfd-irqfd", "pci-exit-msi"],
)
def test_a_request_passes_its_points_in_the_declared_order(transport: Any, kick: str, call: str, root: Path) -> None:
    run = recipe(transport, kick, call).run(vb.KvmMachine(kernel_trace=True))
    requests = whole(run)
    assert len(requests) == IOS and "kernel trace" in run.title and " 0 lost" in run.provenance["kernel trace"]
    for points in requests.values():
        in_declared_order(points)
        mine = kernels(points)
        rung = {"vm_notify", "vp_notify"} & {point.key for point in points}
        assert bool(rung) == bool(mine & {"kvm_mmio", "kvm_fast_mmio"})
        assert ("kvm_userspace_exit" in mine) == (bool(rung) and kick == "mmio-exit")
    every = set.union(*map(kernels, requests.values()))
    assert ("kvm_msi_set_irq" if call == "msi" or (call == "irqfd" and isinstance(transport, vb.Pci)) else "kvm_set_irq") in every
    assert {"kvm_apic_accept_irq", "kvm_eoi"} <= every
    assert run.counters["traced_kvm_userspace_exit"] >= run.counters["doorbell_exits"]
    pulled = {e.context for e in run.trace or () if e.key in ("kvm_set_irq", "kvm_msi_set_irq") and e.args[1]}
    who = "main loop, " if call != "irqfd" else "device, " if isinstance(transport, vb.Pci) else "worker "  # a message needs no worker
    assert pulled and all(context.startswith(who) for context in pulled), pulled
    stand_ins = [
        e for e in run.trace or () if e.key in ("kvm_set_irq", "kvm_msi_set_irq", "kvm_userspace_exit") and "kernel" not in e.context
    ]
    assert not stand_ins


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_request_passes_its_points_in_the_declared_order(name: str) -> None:
    run = vb.recorded(name)
    requests = whole(run)
    assert len(requests) > 250 and len(run.rows) == run.ios == 300
    seen = set.union(*map(kernels, requests.values()))
    for points in requests.values():
        in_declared_order(points)
    assert {"kvm_mmio", "kvm_set_irq", "kvm_apic_accept_irq", "kvm_vcpu_wakeup", "kvm_eoi", "host:block_rq_issue"} <= seen
    assert run.rung == "L1 recorded" and "kvm_pvm" in run.provenance["kvm"] and run.provenance["rung"].endswith("L4 real KVM")
    kinds = run.kinds
    assert kinds["D6"] == kinds["D7"] == kinds["U1"] == "kernel/hardware" and kinds["D4"] == kinds["U5"] == "mixed"


@pytest.mark.parametrize("kick", ["ioeventfd", "mmio-exit"])
def test_a_simulated_request_passes_its_points_in_the_declared_order(kick: str) -> None:
    run = recipe(vb.Mmio(), kick, "irqfd", disk=vb.Nvme()).run(vb.SimMachine())
    requests = whole(run)
    assert len(requests) == IOS
    for points in requests.values():
        in_declared_order(points)


def test_a_request_that_is_not_in_the_trace_is_refused() -> None:
    run = recipe(vb.Mmio(), "ioeventfd", "irqfd", disk=vb.Nvme()).run(vb.SimMachine())
    with pytest.raises(vb.ConfigError, match="I/O 99 is not in the trace as a whole"):
        run.request(99)


@traced
def test_the_hosts_block_layer_is_in_a_live_run(root: Path) -> None:
    image = Path.cwd() / f"kernel-trace-{os.getpid()}.img"  # a temporary folder may be in memory
    image.write_bytes(os.urandom(1 << 20))
    os.sync()  # a direct read writes what is dirty first
    try:
        disk = vb.ImageFile(str(image), cache="none")
        run = recipe(vb.Mmio(), "ioeventfd", "irqfd", disk=disk).run(vb.LiveMachine(kernel_trace=True))
    finally:
        image.unlink()
    seen = kernels(run.trace or ())
    assert {"host:sys_enter_preadv64", "host:sys_exit_preadv64"} <= seen
    if "host:block_rq_issue" in seen:  # a file system without a block device has none
        assert {"host:block_bio_queue", "host:block_getrq", "host:block_rq_complete"} <= seen
        assert run.kinds["D7"] == "kernel/hardware"
    for points in whole(run).values():
        in_declared_order(points)
    assert run.ios == IOS and not run.errors


@traced
@pytest.mark.kvm
def test_a_bare_guests_run_has_the_kernels_points_too(root: Path) -> None:
    run = recipe(vb.Mmio(), "mmio-exit", "intx", guest=vb.BareGuest()).run(vb.KvmMachine(kernel_trace=True))
    assert run.ios == IOS and {"kvm_mmio", "kvm_userspace_exit", "kvm_set_irq"} <= kernels(run.trace or ())
    assert run.counters["traced_kvm_userspace_exit"] >= run.counters["doorbell_exits"] > 0


@traced
@pytest.mark.kvm
def test_a_saved_run_is_the_run(root: Path, tmp_path: Path) -> None:
    vm = recipe(vb.Mmio(), "ioeventfd", "irqfd").boot(vb.KvmMachine(kernel_trace=True))
    with pytest.raises(vb.VblkError, match="not run to its end"):
        vm.save(tmp_path / "x.run.gz")
    run = vm.run()
    vm.save(tmp_path / "x.run.gz")
    again = vb.recorded(tmp_path / "x.run.gz")
    assert again.step_table() == run.step_table() and again.trace == run.trace and again.counters == run.counters
    assert again.clat.bins() == run.clat.bins() and again.duration_ns == run.duration_ns and again.rung == "L1 recorded"


class _Broken(vb.VirtioBlkDevice):
    def check(self, request: Any) -> Any:
        raise ValueError("a learner's slip")


@traced
@pytest.mark.kvm
def test_a_broken_device_leaves_no_instance(root: Path) -> None:
    with pytest.raises(vb.VblkError):
        recipe(vb.Mmio(), "ioeventfd", "irqfd", device=_Broken).run(vb.KvmMachine(kernel_trace=True))


@traced
def test_ctrl_c_leaves_no_instance_and_gives_the_run_so_far(root: Path) -> None:
    app = vb.Fio(rw="randread", bs=4096, iodepth=1, number_ios=1_000_000, size="1m")
    vm = recipe(vb.Mmio(), "ioeventfd", "irqfd", app=app).boot(vb.LiveMachine(kernel_trace=True))
    main = threading.main_thread().ident
    assert main is not None
    pressed = False

    def press(done: int, total: int | None) -> None:
        nonlocal pressed
        if not pressed:
            pressed = True
            signal.pthread_kill(main, signal.SIGINT)

    run = vm.run(progress=press)
    assert run.interrupted and run.ios


def test_without_root_or_trace_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "vblklab.machine.live.tracing_missing", lambda: ("tracing the kernel needs root (this is uid 1000)", "run it as root")
    )
    with pytest.raises(vb.NotHere, match=r"needs root .*: run it as root; the run works without kernel_trace"):
        recipe(vb.Mmio(), "ioeventfd", "irqfd").boot(vb.LiveMachine(kernel_trace=True))
    with pytest.raises(vb.ConfigError, match="leave trace on"):
        vb.LiveMachine(kernel_trace=True, trace=False)


# -- the join, by hand -------------------------------------------------------------------------------------------------------------


def record(t: int, name: str, pid: int = 7, cpu: int = 0, **args: int | str) -> ring_buffer.Record:
    return ring_buffer.Record(t, cpu, "", pid, name, args)


def test_an_exit_is_explained_by_the_access_after_it_and_an_answer_is_no_access() -> None:
    log = [(0, 0, ("vm_notify", 0)), (100, 0, ("wait",))]
    records = [
        record(10, "kvm_exit", exit_reason=49, isa=1),
        record(11, "kvm_fast_mmio", gpa=0x1050),
        record(12, "kvm_entry", vcpu_id=0),
        record(20, "kvm_exit", exit_reason=12, isa=1),
        record(21, "kvm_entry", vcpu_id=0),
        record(30, "kvm_mmio", type=0, len=4, gpa=0x1060, val=0),
        record(31, "kvm_userspace_exit", reason=6, errno=0),
        record(32, "kvm_mmio", type=1, len=4, gpa=0x1060, val=1),
        record(40, "kvm_userspace_exit", reason=6, errno=-4),
        record(50, "kvm_set_irq", pid=9, gsi=6, level=1),
        record(51, "kvm_set_irq", pid=9, gsi=5, level=1),
    ]
    joined = join_kernel(log, Kernel(records, frozenset(), 0x1000, 0x2000, 5))
    assert [(t, ev) for t, number, ev in joined.log if number >= 2000] == [
        (10, ("kvm_exit", 0x50, 1 << 32 | 49)),
        (11, ("kvm_fast_mmio", 0x50)),
        (12, ("kvm_entry",)),
        (20, ("kvm_exit", 0, 1 << 32 | 12)),
        (21, ("kvm_entry",)),
        (30, ("kvm_mmio", 0x60, 0, 0)),
        (31, ("kvm_userspace_exit", 0x60, 6)),
        (40, ("kvm_userspace_exit", 0, 10)),
        (51, ("kvm_set_irq", 5, 1)),
    ]


def test_a_workers_injection_is_ours_only_after_our_irqfd_was_written() -> None:
    log = [(0, 0, ("vm_notify", 0)), (20, 1000, ("virtio_notify_irqfd", 0)), (100, 0, ("wait",))]
    injection = [("kvm_set_irq", {"gsi": 5, "level": 1}), ("kvm_apic_accept_irq", {"vec": 48}), ("kvm_set_irq", {"gsi": 5, "level": 0})]
    records = [record(t + at, name, pid=9, **args) for t in (10, 30, 50) for at, (name, args) in enumerate(injection)]
    joined = join_kernel(log, Kernel(records, frozenset(), gsi=5, pids=frozenset([7]), line_irqfd=True))
    assert [t for t, number, _ in joined.log if number >= 2000] == [30, 31, 32]


def test_the_handlers_time_is_bounded_by_what_the_kernel_saw() -> None:
    records = [record(100, "kvm_apic_accept_irq", apicid=0, vec=48), record(120, "kvm_mmio", type=2, len=4, gpa=1, val=0)]
    for told, taken in ((90, 100), (110, 110), (130, 119)):
        log = [(0, 0, ("vm_notify", 0)), (told, -1, ("vcpu:irq_handler_entry", 5)), (200, 0, ("wait",))]
        joined = join_kernel(log, Kernel(records, frozenset(), error_ns=15))
        assert [t for t, _, ev in joined.log if ev[0] == "vcpu:irq_handler_entry"] == [taken]


def test_a_log_ends_where_the_kernels_record_is_no_longer_whole() -> None:
    log = [(t, 0, ("vm_notify", 0)) for t in range(0, 100, 10)]
    joined = join_kernel(log, Kernel([record(15, "kvm_entry"), record(55, "kvm_entry")], frozenset(), until_ns=40))
    assert [t for t, *_ in joined.log] == [0, 10, 15, 20, 30, 40]


def test_a_page_is_read_with_its_extends_padding_and_losses() -> None:
    header = "\n".join(
        f"\tfield: {name};\toffset:{at};\tsize:{size};\tsigned:{signed};"
        for name, at, size, signed in (("u64 timestamp", 0, 8, 0), ("local_t commit", 8, 8, 1), ("char data", 16, 4080, 0))
    )
    text = "name: tick\nID: 5\nformat:\n\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n"
    text += "\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\tfield:int n;\toffset:8;\tsize:4;\tsigned:1;\n"

    def word(kind: int, delta: int) -> bytes:
        return (delta << 5 | kind).to_bytes(4, "little")

    def event(delta: int, n: int, *, long: bool = False) -> bytes:
        data = (5).to_bytes(4, "little") + (77).to_bytes(4, "little") + n.to_bytes(4, "little", signed=True)
        return (word(0, delta) + (16).to_bytes(4, "little") if long else word(3, delta)) + data

    data = event(1, -3) + word(30, 2) + (1).to_bytes(4, "little") + event(3, 4, long=True)
    data += word(29, 5) + (8).to_bytes(4, "little") + bytes(4) + event(7, 6) + word(29, 0)
    page = (1000).to_bytes(8, "little") + (len(data) | 1 << 31 | 1 << 30).to_bytes(8, "little") + data + (9).to_bytes(8, "little")
    records, lost = ring_buffer.read_pages(header, [text], {1: [page]})
    stamps = [1001, 1003 + (1 << 27) + 3, 1003 + (1 << 27) + 3 + 5 + 7]
    assert [(r.t_ns, r.cpu, r.pid, r.name, r.args) for r in records] == [
        (t, 1, 77, "tick", {"n": n}) for t, n in zip(stamps, (-3, 4, 6), strict=True)
    ]
    assert lost == 9
    with pytest.raises(vb.TraceError, match="ends in the middle"):
        ring_buffer.read_pages(header, [text], {1: [page[:40]]})
    with pytest.raises(vb.TraceError, match="no layout of a page"):
        ring_buffer.read_pages("", [text], {})
    with pytest.raises(vb.TraceError, match="no event's format"):
        ring_buffer.read_pages(header, ["hello"], {})
