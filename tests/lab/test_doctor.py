"""The capability probe tells the truth about the machine it runs on, and about machines that lack something."""

from __future__ import annotations

import errno
import os
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import vblklab as vb
from tests.peers import chromium, why_not
from vblklab.errors import KvmError
from vblklab.kvm.ioctl import Ioctl
from vblklab.lab import doctor
from vblklab.lab.doctor import Capabilities, Finding, Rung, capabilities
from vblklab.machine.live import live_missing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def here() -> Capabilities:
    return capabilities()


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty PATH; returns its folder."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def program(folder: Path, name: str, says: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)


# -- this machine ------------------------------------------------------------------------------------------------------------


def test_the_ladder_has_five_rungs_in_order(here: Capabilities) -> None:
    assert [rung.name for rung in here] == ["L0", "L1", "L2", "L3", "L4"]


def test_the_simulator_is_always_there(here: Capabilities) -> None:
    assert here[0].available
    assert not here[0].gain


def test_the_live_rung_is_there_where_the_machine_boots(here: Capabilities) -> None:
    assert here[2].available == (not live_missing())


def test_the_recordings_it_names_are_there(here: Capabilities) -> None:
    names = re.findall(r"[\w-]+", here[1].why.partition(":")[2])
    assert here[1].available and names
    for name in names:
        assert vb.recorded(name).rung == "L1 recorded"


def test_what_is_not_available_says_why(here: Capabilities) -> None:
    for finding in [*here, *here.tools]:
        assert finding.why
        assert "\n" not in finding.line


def test_programs_are_found_where_the_peers_are(here: Capabilities) -> None:
    pictures, fio, _ = here.tools
    assert fio.available == (not why_not("fio"))
    if chromium():
        assert pictures.available
    if not why_not("qemu"):
        assert re.search(r"qemu-system-x86_64 \d+\.\d+.*, qemu-storage-daemon \d+\.\d+", here[3].why)
        assert here[3].available == (not why_not("guest"))
        assert bool(here[3].gain) != here[3].available


@pytest.mark.kvm
def test_a_usable_kvm_is_called_usable(here: Capabilities) -> None:
    assert here[4].available
    assert "/dev/kvm works (API version 12, kvm" in here[4].why
    assert not here[4].gain


def test_the_packages_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(doctor.PACKAGES) == sorted(Requirement(text).name for text in project["dependencies"])


def test_the_system_line_names_python_and_packages(here: Capabilities) -> None:
    import platform

    import numpy as np

    assert platform.python_version() in here.system
    assert f"numpy {np.__version__}" in here.system


# -- machines that lack something --------------------------------------------------------------------------------------------


def test_without_linux_the_simulator_and_the_recordings_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "live_missing", lambda: "the live machine needs Linux (this is plan9); SimMachine, rung L0, works here")
    rungs = capabilities()
    assert [rung.name for rung in rungs if rung.available] == ["L0", "L1"]
    assert rungs[2].line.startswith("the live machine needs Linux (this is plan9); SimMachine, rung L0, works here. To gain it: Linux")
    assert rungs.verdict.startswith("This machine offers L0 (simulated) and L1 (recorded traces). ")


@pytest.mark.skipif(bool(live_missing()), reason="needs eventfd")
def test_a_kernel_that_refuses_eventfd_is_no_live_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EPERM, "")

    monkeypatch.setattr(os, "eventfd", refuse)
    rung = doctor._live()
    assert not rung.available
    assert "refuses" in rung.why
    assert "seccomp" in rung.gain


@pytest.mark.skipif(bool(live_missing()), reason="needs eventfd")
def test_without_cloudpickle_threads_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda _: "")
    rung = doctor._live()
    assert rung.available
    assert "device='thread'" in rung.why
    assert "cloudpickle" in rung.gain


def test_missing_programs_are_named_with_their_package(no_programs: Path) -> None:
    assert doctor._guest().line == (
        "qemu-system-x86_64 is missing, qemu-storage-daemon is missing. To gain it: apt install qemu-system-x86"
    )
    assert doctor._fio() == Finding("fio", False, "not here; only the tests ask it, jobs run without it", "apt install fio")


def test_versions_are_what_programs_say(no_programs: Path) -> None:
    program(no_programs, "qemu-system-x86_64", "QEMU emulator version 9.1.2 (Debian 1:9)")
    program(no_programs, "fio", "fio-3.33")
    assert "qemu-system-x86_64 9.1.2, qemu-storage-daemon is missing" in doctor._guest().why
    assert doctor._fio().why.startswith("3.33;")


def test_a_program_that_does_not_start_is_missing(no_programs: Path) -> None:
    (no_programs / "fio").write_bytes(b"\x7fELF broken")
    (no_programs / "fio").chmod(0o755)
    assert not doctor._fio().available


def test_without_a_browser_export_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_browser", lambda: "")
    pictures = doctor._pictures()
    assert not pictures.available
    assert pictures.line == "not here: export() writes only HTML and CSV. To gain it: apt install chromium"


def test_a_browser_named_but_absent_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert doctor._browser() == ""


linux_only = pytest.mark.skipif(not Path("/proc/self").exists(), reason="KVM and tracefs are parts of Linux")


@linux_only
def test_no_kvm_device_is_said_with_the_remedy(tmp_path: Path) -> None:
    rung = doctor._kvm(str(tmp_path / "kvm"), str(tmp_path))
    assert "there is no" in rung.why
    assert "nested virtualization" in rung.gain


@linux_only
def test_a_file_that_is_no_kvm_makes_no_machine(tmp_path: Path) -> None:
    (tmp_path / "kvm").touch()
    assert "opens, but makes no virtual machine" in doctor._kvm(str(tmp_path / "kvm"), str(tmp_path)).why


@linux_only
def test_a_kvm_that_makes_no_machine_does_not_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_machine(_: int, request: Ioctl) -> int:
        if request == Ioctl.GET_API_VERSION:
            return 12
        raise KvmError("KVM_CREATE_VM", errno.ENODEV, "")

    (tmp_path / "kvm").touch()
    monkeypatch.setattr(doctor.kvm_host, "ioctl", no_machine)
    assert "opens, but makes no virtual machine" in doctor._kvm(str(tmp_path / "kvm"), str(tmp_path)).why


@linux_only
def test_a_closed_kvm_device_asks_for_the_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "")

    (tmp_path / "kvm_intel").mkdir()
    monkeypatch.setattr(os, "open", refuse)
    rung = doctor._kvm("/dev/kvm", str(tmp_path))
    assert rung.why == "/dev/kvm (kvm_intel) is there, but not for you"
    assert "usermod -aG kvm" in rung.gain


@linux_only
@pytest.mark.parametrize(
    ("version", "modules", "words"),
    [
        (12, ("kvm", "kvm_amd"), "works (API version 12, kvm_amd)"),
        (12, ("kvm", "kvm_pvm"), "works (API version 12, kvm_pvm, which emulates a guest's kernel code)"),
        (12, (), "works (API version 12, no kvm_intel, kvm_amd or kvm_pvm module)"),
        (11, ("kvm_intel",), "has API version 11, not 12"),
    ],
)
def test_kvm_is_named_with_its_flavour(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: int, modules: tuple[str, ...], words: str
) -> None:
    for name in modules:
        (tmp_path / name).mkdir()
    (tmp_path / "device").touch()
    monkeypatch.setattr(doctor.kvm_host, "ioctl", lambda fd, request: version if request == Ioctl.GET_API_VERSION else os.dup(fd))
    assert words in doctor._kvm(str(tmp_path / "device"), str(tmp_path)).why


@linux_only
def test_the_kernel_trace_needs_root_or_a_tracefs_that_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("proc /proc proc rw 0 0\n")
    monkeypatch.setattr(doctor.os, "geteuid", lambda: 1000)
    finding = doctor._tracefs(str(mounts))
    assert not finding.available and "needs root (this is uid 1000)" in finding.why and "sudo" in finding.gain
    (tmp_path / "instances").mkdir()
    mounts.write_text(f"tracefs {tmp_path} tracefs rw 0 0\n")
    assert doctor._tracefs(str(mounts)).available


# -- how it looks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_text_keeps_to_the_terminal(here: Capabilities, columns: int) -> None:
    assert max(map(len, here.text(columns).splitlines())) <= columns


def test_text_marks_what_is_available(here: Capabilities) -> None:
    lines = str(here).splitlines()
    for rung in here:
        (line,) = [line for line in lines if line[4:6] == rung.name]
        assert line.startswith("  ✓ " if rung.available else "  – ")


def test_html_escapes_and_says_the_same() -> None:
    rungs = Capabilities([Rung("L0", True, "a <b> & c", title="simulated")], [Finding("fio", False, "gone", "get <it>")], "Python & Co")
    page = rungs._repr_html_()
    assert "a &lt;b&gt; &amp; c" in page
    assert "To gain it: get &lt;it&gt;" in page
    assert "Python &amp; Co" in page
    assert "This machine offers L0 (simulated)." in page
