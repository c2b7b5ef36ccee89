"""A guest that is not up in time is one that this machine does not have: one line says so, and a recording answers where there is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import vblklab as vb
from vblklab.errors import GuestTimeout
from vblklab.lab.chapter_08 import LinuxOn
from vblklab.machine.live import live_missing
from vblklab.peer import LinuxGuest

pytestmark = pytest.mark.skipif(bool(live_missing()), reason="vhost-user needs Linux")

LABS = Path(__file__).parents[2] / "labs"
SLOW = GuestTimeout("the guest (Linux 6.1, tcg) did not boot within 120 s", "give a longer boot_timeout_s", "a line of its console\n" * 25)


@pytest.fixture(autouse=True)
def boots(monkeypatch: pytest.MonkeyPatch) -> list[LinuxGuest]:
    """Every boot takes too long; the guests that were to be booted."""
    asked: list[LinuxGuest] = []

    def boot(self: LinuxGuest, disks: Any = (), *, console: Any = None, progress: Any = None) -> Any:
        asked.append(self)
        if progress is not None:
            progress(0.55, "the kernel unpacks the initramfs")
        raise SLOW

    monkeypatch.setattr(LinuxGuest, "boot", boot)
    monkeypatch.setattr(LinuxOn, "_said_missing", "")
    return asked


def cell(lab: str, name: str) -> str:
    cells = json.loads((LABS / f"{lab}.ipynb").read_text(encoding="utf-8"))["cells"]
    return "".join(next(each["source"] for each in cells if each["id"] == name))


def test_the_cell_of_lab_01_says_it_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    class MyDevice(vb.VirtioBlkDevice):
        pass

    exec(cell("01_the_device", "run-linux"), {"vb": vb, "device": MyDevice})
    lines = capsys.readouterr().out.replace("\r", "").splitlines()
    assert lines == [
        "boot  55% the kernel unpacks the initramfs",
        "the guest (Linux 6.1, tcg) did not boot within 120 s: give a longer boot_timeout_s; "
        "run the cell again when this machine has less to do",
    ]


def test_where_there_is_a_recording_it_answers(capsys: pytest.CaptureFixture[str]) -> None:
    linux = vb.linux_on(vb.VirtioBlkDevice, vb.Ram(8 << 20))
    try:
        assert not linux.real and linux.run("uname -r").strip()
    finally:
        linux.close()
    said = capsys.readouterr().out
    assert "did not boot within 120 s: give a longer boot_timeout_s; run the cell again" in said
    assert "\nA recording answers. recorded: " in said


def test_a_recipe_is_answered_by_its_recorded_run(capsys: pytest.CaptureFixture[str]) -> None:
    run = vb.linux_run(vb.Pipeline(guest=LinuxGuest(), disk=vb.Ram(8 << 20)), "linux-ours-d1")
    assert run.ios and "recorded" in run.provenance["rung"]
    assert "did not boot within 120 s" in capsys.readouterr().out


def test_a_recipe_that_takes_too_long_after_its_boot_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Booted:
        def __enter__(self) -> Booted:
            return self

        def __exit__(self, *what: object) -> None:
            pass

        def run(self) -> Any:
            raise GuestTimeout("fio took over 600 s and was killed", "give it a longer timeout_s")

    class Recipe:
        def boot(self, machine: Any) -> Booted:
            return Booted()

    with pytest.raises(GuestTimeout, match="fio took over 600 s"):
        vb.linux_run(Recipe(), "linux-ours-d1")


def test_the_remedy_can_be_taken(boots: list[LinuxGuest]) -> None:
    vb.linux_on(vb.VirtioBlkDevice, vb.Ram(8 << 20), boot_timeout_s=900).close()
    assert boots == [LinuxGuest(boot_timeout_s=900)]
