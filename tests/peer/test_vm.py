"""How far a boot came that is given up."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from vblklab.errors import GuestTimeout
from vblklab.peer import GuestVm

HELD = ", or look at its disks: here one that does not answer holds the boot up"


class Silent:
    """QEMU with a guest that printed this much and stands still."""

    pid = 0
    errors = ""
    status = None

    def __init__(self, text: str) -> None:
        self.text = text

    def wait(self, timeout_s: float) -> bool:
        return False

    def end(self, grace_s: float = 3.0) -> None:
        pass


@pytest.mark.parametrize(
    ("console", "accel", "says"),
    [
        ("", "kvm", "(so far: QEMU runs): give a longer boot_timeout_s, or accel='tcg'" + HELD),
        ("[0.0] Linux version 6.1\n", "tcg", "(so far: the kernel starts): give a longer boot_timeout_s"),
        (
            "[0.0] Linux version 6.1\n[2.0] Run /init as init process\nvblklab: mounted\n",
            "tcg",
            "(so far: file systems are mounted): give a longer boot_timeout_s" + HELD,
        ),
    ],
    ids=["nothing", "early", "at the disks"],
)
def test_a_boot_that_takes_too_long_says_how_far_it_came(console: str, accel: str, says: str, tmp_path: Path) -> None:
    ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
    process: Any = Silent(console)
    with theirs[0], theirs[1], GuestVm(process, *ours, tmp_path / "gone", kernel="6.1", accel=accel) as vm:
        with pytest.raises(GuestTimeout) as caught:
            vm.wait_for_agent(0.01)
        assert str(caught.value) == f"the guest (Linux 6.1, {accel}) did not boot within 0.01 s {says}"
        assert caught.value.output == console.strip()
