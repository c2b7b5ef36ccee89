"""Remove one re-check or one publish-before-look and some schedule loses a notification; the unbroken code loses none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import vblklab as vb
from vblklab.ring import SplitDevice, SplitDriver

SEEDS = range(400)


def _stalls(patch: Callable[[pytest.MonkeyPatch], None], *, event_idx: bool) -> int:
    """1 if one of the seeds ends in Stalled, else 0."""
    stalled = 0
    for seed in SEEDS:
        app = vb.Fio(rw="randread", bs=4096, iodepth=2 + seed % 3, number_ios=4)
        recipe = vb.Pipeline(app=app, device=vb.VirtioBlkDevice(event_idx=event_idx), disk=vb.Nvme(size=1 << 20, read_us=seed % 7))
        with pytest.MonkeyPatch.context() as monkey:
            patch(monkey)
            try:
                run = recipe.run(vb.SimMachine(seed=seed, interleave="random", trace=0))
                assert run.ios == 4 and not run.errors
            except vb.Stalled:
                return 1
    return stalled


def _nothing(monkey: pytest.MonkeyPatch) -> None:
    """The code as it is."""


def _device_does_not_look_again(monkey: pytest.MonkeyPatch) -> None:
    monkey.setattr(SplitDevice, "recheck", lambda self: True)


def _driver_does_not_look_again(monkey: pytest.MonkeyPatch) -> None:
    monkey.setattr(SplitDriver, "enable_cb_check", lambda self: True)


@pytest.mark.parametrize("event_idx", [True, False])
def test_no_schedule_loses_a_notification(event_idx: bool) -> None:
    assert _stalls(_nothing, event_idx=event_idx) == 0


@pytest.mark.parametrize("event_idx", [True, False])
@pytest.mark.parametrize("broken", [_device_does_not_look_again, _driver_does_not_look_again])
def test_without_the_second_look_some_schedule_hangs(broken: Any, event_idx: bool) -> None:
    assert _stalls(broken, event_idx=event_idx) > 0
