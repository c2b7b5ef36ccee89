"""``vb.calibrate()`` and ``vb.predict()``: what they measure, what they say, and what they leave behind (nothing)."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vblklab as vb
from tests.cost_tables import known_table
from vblklab.kvm import host, payload
from vblklab.kvm.guest import LINE_EDGE, PayloadVm
from vblklab.lab import calibrate as calibration
from vblklab.lab.predict import Prediction, StepError, _errors
from vblklab.machine import micro
from vblklab.machine.live import live_missing

pytestmark = pytest.mark.skipif(bool(live_missing()), reason="the live machine needs Linux")
KVM = host.found()[0]
GONE = (False, "there is no /dev/kvm", "load kvm_intel or kvm_amd")
SINGLE_PARTS = ("syscall", "eventfd:same-thread", "eventfd:other-thread", "eventfd:other-process", "context-switch", "preadv:cached")


@pytest.fixture(scope="module")
def machine() -> Any:
    return vb.KvmMachine() if KVM else vb.LiveMachine()


@pytest.fixture(scope="module")
def told() -> list[tuple[int, int | None]]:
    return []


@pytest.fixture(scope="module")
def table(machine: Any, told: list[tuple[int, int | None]]) -> vb.CostTable:
    """As quick as it can be: few samples, two of the three stores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "STORES", ("ram", "cached"))
        return vb.calibrate(machine, seconds=0.5, progress=lambda *now: told.append(now))


def test_everything_is_measured_and_says_how(table: vb.CostTable, told: list[tuple[int, int | None]]) -> None:
    kvm = ("mmio-exit", "ioeventfd", "irqfd", "msi", "kick:mmio-exit", "kick:ioeventfd") if KVM else ()
    for key in (*SINGLE_PARTS, *kvm):
        cost = table[key]
        assert cost.kind == "measured" and cost.n >= 30 and cost.source, key
        assert 0 <= cost.p25 <= cost.ns <= cost.p75, key
    assert told == [(number + 1, len(told)) for number in range(len(told))]
    assert {"cpu", "kernel", "python", "kvm", "date", "load"} <= table.about.keys()


def test_what_was_not_measured_stays_published(table: vb.CostTable) -> None:
    assert table["nvme_irq"] == vb.CostTable.load()["nvme_irq"] and table["nvme_irq"].kind == "published"
    assert (table["kvm_exit"].kind == "measured") is KVM
    assert table["wake:device"].ns == table["eventfd:other-process"].ns


def test_both_simulators_take_the_table(table: vb.CostTable, machine: Any) -> None:
    p = vb.Pipeline(app=vb.Fio(rw="randread", bs=4096, number_ios=20))
    plain = p.run(vb.SimMachine(costs=table))
    assert plain.costs is not None and plain.costs["virtio_notify_irqfd"] == table["virtio_notify_irqfd"]
    like = p.run(vb.SimMachine(costs=table, like=machine))
    steps = np.median(np.diff(like.rows, axis=1), axis=0)
    assert steps.sum() == np.median(like.rows[:, -1] - like.rows[:, 0]), "one number an I/O"


def test_a_prediction_adds_up_and_says_by_which_rule_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_PART_IOS", 60)
    before = os.sched_getaffinity(0)
    p = vb.Pipeline(app=vb.Fio(rw="randread", bs=4096, number_ios=60))
    report = vb.predict(p, vb.LiveMachine(), rounds=2, progress=False)
    *steps, total = report.steps
    assert [one.step for one in report.steps] == [*(step.name for step in vb.STEPS), "total"]
    assert sum(one.model_ns for one in steps) == total.model_ns > 0
    measured = report.measured.rows
    assert len(measured) == 120 == report.measured.ios
    assert total.measured_ns == statistics.median((measured[:, -1] - measured[:, 0]).tolist())
    assert report.met is (abs(total.error) <= 0.15 or total.p25_ns <= total.model_ns <= total.p75_ns)
    assert re.search(r"within 15 % of the median$|but inside the measured p25 to p75, [\d., to]+ µs$|missed: ", report.verdict)
    assert "randrw" in report.text() and "mmio-exit, ram, 3072 bytes" in report.text(), "another job, the other kick"
    assert report.verdict in report._repr_html_() and report.model.simulated and not report.measured.simulated
    figure = report.figure()
    assert any("as LiveMachine" in str(trace.name) for trace in figure.data)
    assert os.sched_getaffinity(0) == before


def test_a_prediction_of_many_ios_in_flight_says_that_the_model_is_not_made_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_PART_IOS", 60)
    report = vb.predict(vb.Pipeline(app=vb.Fio(bs=4096, iodepth=4, number_ios=60)), vb.LiveMachine(), rounds=2, progress=False)
    assert report.verdict.endswith("; the model is made for one I/O in flight, not for 4")
    assert report.notes[0].startswith("4 I/Os in flight: the model is made for one.") and report.notes[0].endswith("off by half")
    figures = [report.figure(), report.model.waterfall()]
    said = "model made for one I/O in flight, times with 4 may be off by half"
    assert all(said in " ".join(figure.layout.meta["caption"].split()) for figure in figures)
    assert f"shape: {said.removeprefix('model ')}" in report.model.notes
    assert "with more it misses badly" in " ".join((vb.predict.__doc__ or "").split())


def test_a_model_of_one_io_in_flight_has_no_such_words() -> None:
    one = vb.Pipeline(app=vb.Fio(bs=4096, number_ios=10)).run(vb.SimMachine(costs=known_table("live"), like=vb.LiveMachine()))
    assert "model" not in one.provenance and not any("in flight" in note for note in one.notes)
    two = vb.Pipeline(app=vb.Fio(bs=4096, numjobs=2, number_ios=10), kvm=vb.Kvm(vcpus=1))
    assert "with 2" in two.run(vb.SimMachine(costs=known_table("live"), like=vb.LiveMachine())).provenance["model"]
    assert "model" not in two.replace(kvm=vb.Kvm()).run(vb.SimMachine()).provenance


def _prediction(model_us: float, measured_us: list[float]) -> Prediction:
    def rows(totals: list[float]) -> Any:
        stamps = np.zeros((len(totals), len(vb.STEPS) + 1), dtype=np.int64)
        stamps[:, 4:] = np.array(totals, dtype=np.int64)[:, None] * 1000
        return stamps

    return Prediction(None, None, known_table("kvm"), _errors(rows([model_us] * 3), rows(measured_us)), ())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model_us", "measured_us", "met", "words"),
    [
        (110, [90, 100, 120], True, r"predicted 110.0 µs an I/O, measured 100.0 µs \(median\): \+10.0 %, within 15 % of the median$"),
        (85, [100, 100, 100], True, "-15.0 %, within 15 %"),
        (
            70,
            [20, 40, 100, 160, 300],
            True,
            r"-30.0 %, not within 15 % of the median, but inside the measured p25 to p75, 40.0 to 160.0 µs$",
        ),
        (30, [20, 40, 100, 160, 300], False, r"-70.0 %, missed: neither"),
        (84, [100, 100, 100], False, "-16.0 %, missed"),
    ],
)
def test_the_verdict(model_us: float, measured_us: list[float], met: bool, words: str) -> None:
    report = _prediction(model_us, measured_us)
    assert report.met is met and re.search(words, report.verdict), report.verdict
    assert report.total == StepError("total", model_us * 1e3, *(np.percentile(measured_us, q) * 1e3 for q in (50, 25, 75)))
    assert [one.step for one in report.steps if one.measured_ns] == ["D4", "total"]


# -- what is not there ---------------------------------------------------------------------------------------------------------------


def test_without_kvm_it_says_so_and_its_rows_stay_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "found", lambda *_: GONE)
    monkeypatch.setattr(calibration.Calibration, "live", lambda *_, **__: None)
    found = vb.calibrate(seconds=0.2, progress=False)
    assert found.about["kvm"] == "there is no /dev/kvm: its rows stay published; to gain it: load kvm_intel or kvm_amd"
    assert found["kvm_exit"] == vb.CostTable.load()["kvm_exit"] and found["syscall"].n
    assert "there is no /dev/kvm" in str(found) and "mmio-exit" not in found


@pytest.mark.parametrize("ask", [vb.calibrate, lambda m: vb.predict(vb.Pipeline(), m)], ids=["calibrate", "predict"])
def test_a_machine_that_is_not_here_is_refused_at_once(ask: Callable[[Any], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "found", lambda *_: GONE)
    with pytest.raises(vb.NotHere, match="there is no /dev/kvm: load kvm_intel"):
        ask(vb.KvmMachine())


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: vb.calibrate(seconds=0), "seconds=0"),
        (lambda: vb.calibrate(vb.SimMachine()), "give a vb.KvmMachine"),
        (lambda: vb.calibrate(vb.LiveMachine(trace=False)), "use trace=True"),
        (lambda: vb.predict(vb.Pipeline(), vb.LiveMachine(), rounds=1), "use 2 or more"),
        (lambda: vb.predict(vb.Pipeline(engine=vb.Threads()), vb.LiveMachine()), "only Sync"),
        (lambda: vb.LiveMachine(cpus=(0, 1 << 20)), "cpus="),
    ],
)
def test_what_cannot_be_is_refused(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(vb.ConfigError, match=message):
        ask()


def test_ctrl_c_ends_it_and_leaves_nothing() -> None:
    before = os.sched_getaffinity(0)

    def pressed(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vb.calibrate(vb.LiveMachine(), seconds=0.1, progress=pressed)
    assert os.sched_getaffinity(0) == before


def test_an_error_beside_another_process_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: micro.Peer) -> Any:
        raise vb.Stalled("made for this test")

    monkeypatch.setattr(micro.Peer, "stamps", fails)
    with pytest.raises(vb.Stalled):
        micro.peer_turns(micro.two_cpus(), 3)


def test_the_two_sides_keep_to_their_cpus() -> None:
    cpu = max(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    vm = vb.Pipeline(app=vb.Fio(number_ios=5)).boot(vb.LiveMachine(cpus=(cpu, min(before))))
    assert os.sched_getaffinity(0) == {cpu} and os.sched_getaffinity(vm._child.pid) == {min(before)}
    assert f"cpus=({cpu}, {min(before)})" in vm.run().provenance["machine"]
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("sizes", "store"), [([512], "ram"), ([4096], "ram"), ([4096], "direct"), ([512, 131072], "cached"), ([8192], "direct")]
)
def test_no_block_size_of_the_job_is_calibrated(sizes: list[int], store: str) -> None:
    app = vb.Fio(rw="randread", bssplit=":".join(f"{size}/{100 // len(sizes)}" for size in sizes))
    short, long = calibration.sizes_beside(app, store)
    unit = 4096 if store == "direct" else 512
    assert short < long and not {short, long} & set(sizes) and not short % unit and not long % unit and long > max(sizes)


# -- other judges --------------------------------------------------------------------------------------------------------------------

_IN_C = r"""
#include <stdint.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1e9 + t.tv_nsec; }
int main(void)
{
    int fd = eventfd(0, 0), n = 20000;
    double least[2] = {1e18, 1e18};
    for (int turn = 0; turn < 20; turn++) {
        uint64_t one = 1;
        double a = now();
        for (int i = 0; i < n; i++) syscall(SYS_getppid);
        double b = now();
        for (int i = 0; i < n; i++) if (write(fd, &one, 8) != 8 || read(fd, &one, 8) != 8) return 1;
        double c = now();
        if (b - a < least[0]) least[0] = b - a;
        if (c - b < least[1]) least[1] = c - b;
    }
    printf("%f %f\n", least[0] / n, least[1] / n);
}
"""


@pytest.mark.cc
def test_system_calls_cost_what_a_c_program_finds(tmp_path: Path) -> None:
    """Within a factor of 15: the least of long turns against the median of short ones, on a machine that others use."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None
    source, program = tmp_path / "calls.c", tmp_path / "calls"
    source.write_text(_IN_C)
    subprocess.run([compiler, "-O1", "-o", program, source], check=True)
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    for in_c, ours in zip(map(float, said), map(statistics.median, (micro.syscalls(100), micro.eventfd_same_thread(100))), strict=True):
        assert in_c / 15 < ours < in_c * 15


@pytest.mark.kvm
def test_only_the_store_that_should_comes_to_user_space() -> None:
    left = []
    guest = PayloadVm(memoryview(mmap(-1, 4096)), memoryview(mmap(-1, 4096)), lambda exit_: left.append(exit_.addr) or 0)
    with guest.vcpu.owned():
        guest.set_up_apic(LINE_EDGE)
        found = micro._stores(guest, 15)
        taken = guest.mail[payload.Mail.TAKEN]
        messages = micro._messages(guest, 15)
        assert guest.mail[payload.Mail.TAKEN] - taken == 15 == len(messages)
    guest.close()
    assert left == [micro._BELL - 4] * 15
    assert set(map(len, found.values())) == {15}
