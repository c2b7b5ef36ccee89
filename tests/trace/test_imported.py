"""Traces that other tools saved: real samples of them, one recording seen by two tools, and lines that are none."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

import vblklab as vb
from vblklab.trace.imported import read_records

SAMPLES = Path(__file__).parent / "samples"


def sample(name: str) -> str:
    return (SAMPLES / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "kind"), [("trace-cmd", "trace-cmd report"), ("perf-script", "perf script"), ("blkparse", "blkparse")])
def test_the_format_is_recognised(name: str, kind: str) -> None:
    found, records, lost = read_records(sample(name))
    assert found == kind and len(records) >= 150 and not lost
    assert [record.t_ns for record in records] == sorted(record.t_ns for record in records)


def test_two_tools_that_saw_the_same_give_the_same_points() -> None:
    ours, theirs = (vb.read_trace(SAMPLES / f"{name}.txt") for name in ("trace-cmd", "perf-script"))
    assert ours.trace and theirs.trace and len(ours.trace) == len(theirs.trace) > 100
    for one, other in zip(ours.trace, theirs.trace, strict=True):
        assert (one.key, one.args, one.context, one.lane) == (other.key, other.args, other.context, other.lane)
        assert abs(one.t_ns - other.t_ns) < 20_000  # two probes, one after the other
    assert ours.counters == theirs.counters and ours.ios == theirs.ios == 5
    assert {"kvm_mmio", "kvm_userspace_exit", "kvm_set_irq", "kvm_apic_accept_irq", "kvm_eoi"} <= ours.counters.keys()


@pytest.mark.parametrize("name", ["trace-cmd", "perf-script"])
def test_records_have_the_same_arguments_as_in_the_other_tool(name: str) -> None:
    _, records, _ = read_records(sample(name))
    mmio = next(record for record in records if record.name == "kvm_mmio")
    assert mmio.args == {"type": 0, "len": 4, "gpa": 0xE0100060, "val": 0}
    left = next(record for record in records if record.name == "kvm_userspace_exit")
    assert left.args == {"reason": 6, "errno": 0}


def test_d6_and_d7_are_q2d_and_d2c() -> None:
    """Judged by a reading of its own: Q, D and C of a sector, where no request was merged or split."""
    times: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    line = re.compile(r"254,0 +\d+ +\d+ +(\d+)\.(\d{9}) +\d+ +([QDC]) +([RW])\w* (\d+) \+ 8 ")
    for text in sample("blkparse").splitlines():
        if found := line.match(text):
            times[found[4], found[5]].setdefault(found[3], int(found[1] + found[2]))
    wanted = {(t["Q"], t["D"], t["C"]) for t in times.values() if t.keys() == {"Q", "D", "C"}}
    run = vb.read_trace(SAMPLES / "blkparse.txt")
    rows = {(int(row[5]), int(row[6]), int(row[9])) for row in run.rows}
    assert len(wanted) >= 16 and wanted <= rows and len(rows) <= run.ios
    steps = {stat.step: stat for stat in run.steps}
    assert steps["D6"].count == steps["D7"].count == run.ios and not steps["D3"].count
    assert steps["D6"].kind == "kernel/hardware"
    assert abs(run.clat.mean_ns - steps["D6"].mean_ns - steps["D7"].mean_ns) < 1
    guest = vb.read_trace(SAMPLES / "blkparse.txt", side="guest")
    assert [stat.step for stat in guest.steps if stat.count] == ["D2", "D3"] and guest.clat.mean_ns == run.clat.mean_ns


def test_a_trace_is_shown_in_the_usual_pictures() -> None:
    run = vb.read_trace(SAMPLES / "trace-cmd.txt")
    for figure in (run.lanes(), run.waterfall(percentiles=(50,)), run.latency(), run.path_map()):
        assert figure.data or figure.layout.shapes
    assert "D7" in run.step_table() and "trace-cmd report" in run.summary()


EXITS = """\
# tracer: nop
       CPU 0/KVM-4242    [002] d..1.   100.000010: kvm_exit: vcpu 0 reason EPT_MISCONFIG rip 0xffffffff81a info1 0x0 info2 0x0 intr_info 0x0
       CPU 0/KVM-4242    [002] .....   100.000011: kvm_fast_mmio: fast mmio at gpa 0xfebd5004
       CPU 0/KVM-4242    [002] d..1.   100.000014: kvm_entry: vcpu 0, rip 0xffffffff81a
       CPU 0/KVM-4242    [003] d..1.   100.000020: kvm_exit: reason HLT rip 0xffffffff81b info 0 0
       CPU 0/KVM-4242    [003] .....   100.000022: kvm_msi_set_irq: dst 1 vec 36 (Fixed|physical|edge)
       CPU 0/KVM-4242    [003] .....   100.000023: kvm_inj_virq: IRQ 0x24
       CPU 0/KVM-4242    [003] .....   100.000024: kvm_userspace_exit: reason restart (4)
       CPU 0/KVM-4242    [003] d..1.   100.000030: kvm_entry: vcpu 0
       CPU 0/KVM-4242    [003] d..1.   100.000040: kvm_exit: vcpu 0 reason npf rip 0x1 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0
       CPU 0/KVM-4242    [003] d..1.   100.000047: kvm_entry: vcpu 0
       CPU 0/KVM-4242    [003] d..1.   100.000050: kvm_exit: vcpu 0 reason 0x77 rip 0x1 info1 0x0
"""
"""As the kernel's print formats say (arch/x86/kvm/trace.h); this project's own KVM has no such exits."""


def test_the_time_out_of_the_guest_is_told_by_reason(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(EXITS)
    run = vb.read_trace(path)
    assert {reason: (h.count, h.max_ns) for reason, h in run.exits.items()} == {
        "EPT_MISCONFIG": (1, 4000),
        "HLT": (1, 10_000),
        "npf": (1, 7000),
    }
    assert "EPT_MISCONFIG" in run.exit_table() and not run.ios
    assert run.trace is not None
    points = {event.key: event for event in run.trace}
    assert points["kvm_fast_mmio"].args == (0xFEBD5004,) and "0xfebd5004" in str(points["kvm_fast_mmio"])
    assert points["kvm_msi_set_irq"].args == (0xFEE01000, 36) and points["kvm_inj_virq"].args == (0x24,)
    assert str(points["kvm_userspace_exit"]).endswith("reason=INTR")
    first = next(event for event in run.trace if event.key == "kvm_exit")
    assert first.args[0] == 0xFEBD5004 and str(first).endswith("reason=EPT_MISCONFIG")
    assert vb.read_trace(SAMPLES / "blkparse.txt").exit_table() == "no kvm_exit with its kvm_entry in the trace"


BLK = """\
  8,0    0        1     0.000001000    50  Q  WS 100 + 16 [fio]
  8,0    0        2     0.000002000    50  X  WS 100 / 108 [fio]
  8,0    0        3     0.000003000    50  G  WS 100 + 8 [fio]
  8,0    0        4     0.000004000    50  G  WS 108 + 8 [fio]
  8,0    0        5     0.000005000    50  Q   W 116 + 8 [fio]
  8,0    0        6     0.000005500    50  M  WS 116 + 8 [fio]
  8,0    0        7     0.000006000    50  D  WS 100 + 8 [fio]
  8,0    0        8     0.000007000    50  D  WS 108 + 16 [fio]
  8,0    0        9     0.000007500    50  R  WS 108 + 16 [0]
  8,0    0       10     0.000008000    50  D  WS 108 + 16 [fio]
  8,0    1       11     0.000010000     0  C  WS 100 + 8 [0]
  8,0    1       12     0.000011000     0  C  WS 108 + 8 [0]
  8,0    1       13     0.000012000     0  C  WS 116 + 8 [0]
  8,0    1       14     0.000013000    51  D   R 900 + 8 [dd]
  8,0    1       15     0.000014000     0  C   R 900 + 8 [0]
  8,0    1       16     0.000015000    51  Q FWS [dd]
  8,0    1       17     0.000016000    51  m   N cfq workload slice:100
CPU0 (8,0):
 Reads Queued:           0,        0KiB	 Writes Queued:           2,       12KiB
Total (8,0):
 Reads Queued:           0,        0KiB	 Writes Queued:           2,       12KiB

Throughput (R/W): 0KiB/s / 0KiB/s
Events (8,0): 17 entries
Skips: 0 forward (0 -   0.0%)
"""


def test_splits_merges_requeues_and_parts_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "sda.txt"
    path.write_text(BLK)
    run = vb.read_trace(path)
    assert sorted((int(row[5]), int(row[6]), int(row[9])) for row in run.rows) == [
        (1000, 6000, 10_000),
        (1000, 8000, 12_000),
        (5000, 8000, 12_000),
        (13_000, 13_000, 14_000),
    ]
    (job,) = run.jobs
    assert (job.name, job.write.ios, job.read.ios, job.write.bytes) == ("disk 8,0", 3, 1, 24 * 512)
    assert any("block_bio_queue was not recorded" in note for note in run.notes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (sample("blkparse").split("\n", 1)[0] + "\nhello\n", "line 2 is no entry of blkparse: 'hello'"),
        (BLK.split("\n", 1)[0] + "\n" + BLK.split("\n", 1)[0].replace("  Q  WS 100 + 16", "  Q  WS") + "\n", "line 2"),
        (BLK.split("\n", 1)[0].replace("  Q  ", "  ?? ") + "\n", "no ftrace entry"),
        (sample("perf-script").split("\n", 1)[0] + "\nhello\n", "line 2 is no entry of perf script: 'hello'"),
        (EXITS + EXITS.splitlines()[1].replace("EPT_MISCONFIG", "NONSENSE") + "\n", "line 13 of the trace is no ftrace entry"),
        ("", "no entry"),
        (EXITS.splitlines()[1].replace("kvm_exit: vcpu 0 reason EPT_MISCONFIG", "sched_wakeup: pid=1") + "\n", "no whole block request"),
    ],
    ids=["blkparse", "no sector", "no action", "perf", "no reason", "empty", "nothing of ours"],
)
def test_what_is_no_trace_is_refused_with_its_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(text)
    with pytest.raises(vb.TraceError, match=re.escape(says)):
        vb.read_trace(path)


def test_a_file_that_is_not_there_and_a_side_that_is_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(vb.TraceError, match="cannot be read: No such file"):
        vb.read_trace(tmp_path / "nothing.txt")
    with pytest.raises(vb.ConfigError, match="'host' or from a 'guest'"):
        vb.read_trace(SAMPLES / "blkparse.txt", side="top")
