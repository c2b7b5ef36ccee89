"""Every bug of the zoo is found, what the package has instead passes, and a half repair gets its own hint."""

from __future__ import annotations

from typing import Any

import pytest

import vblklab as vb
from vblklab.lab.zoo.specimens import SPECIMENS, NoFenceBeforeEvent, ThreeDescriptors, UsedLength
from vblklab.ring import SplitDevice

NAMES = [one.name for one in SPECIMENS]
SLOW = {one.name for one in SPECIMENS if one.judge == "schedules"}


def test_there_are_at_least_ten_and_each_tells_its_story() -> None:
    listed = str(vb.zoo())
    assert len(vb.zoo()) >= 10 and len(set(NAMES)) == len(NAMES)
    for one in vb.zoo():
        assert one.name in listed and one.name in vb.zoo()._repr_html_()
        assert len(one.story.split()) > 20 and one.reference and one.section
        assert one.source.startswith("class ") and '"""' not in one.source and "def " in one.source
        assert one.story.split(".")[0] in repr(one) and "<pre>" in one._repr_html_()


IN_SCHEDULES_TOO = {"no-fence-before-event", "no-fence-before-look"}  # tests/interleave removes the same fences


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long) if name in IN_SCHEDULES_TOO else name for name in NAMES])
def test_the_bug_is_found_and_what_shows_it_is_said(name: str) -> None:
    verdict = vb.check.repaired(name, vb.zoo(name).cls)
    assert verdict.state == "wrong" and len(verdict.text) > 40


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long) if name in SLOW else name for name in NAMES])
def test_the_packages_own_class_has_not_got_it(name: str) -> None:
    assert vb.check.repaired(name, vb.zoo(name).base).ok


def test_a_repair_of_ones_own_is_right() -> None:
    class Repaired(UsedLength):
        def used_length(self, request: Any) -> int:
            whole = request.written == sum(map(len, request.writable))
            return int(request.written + ((request.type == 0 and not request.status) or whole))

    assert vb.check.repaired("used-length", Repaired).ok


def test_a_half_repair_is_told_what_is_left() -> None:
    class Half(UsedLength):
        def used_length(self, request: Any) -> int:
            return int(request.written + (request.type == 0))

    verdict = vb.check.repaired("used-length", Half)
    assert verdict.state == "wrong" and "A write wrote 1 bytes" in verdict.text


@pytest.mark.parametrize(
    ("name", "cls", "hint"),
    [
        ("used-length", SplitDevice, "class Repaired(VirtioBlkDevice)"),
        ("used-length", 3, "class Repaired(VirtioBlkDevice)"),
        ("no-fence-before-event", ThreeDescriptors, "class Repaired(SplitDevice)"),
        ("used-lenght", UsedLength, "no bug"),
    ],
)
def test_what_cannot_be_judged_is_a_hint(name: str, cls: Any, hint: str) -> None:
    verdict = vb.check.repaired(name, cls)
    assert verdict.state == "wrong" and hint in verdict.text


def test_an_exception_and_an_endless_loop_are_hints() -> None:
    class Raises(NoFenceBeforeEvent):
        def should_notify(self) -> bool:
            raise KeyError("event")

    class Endless(NoFenceBeforeEvent):
        def should_notify(self) -> bool:
            while True:
                pass

    assert "KeyError" in vb.check.repaired("no-fence-before-event", Raises).text
    assert "does not come to an end" in vb.check.repaired("no-fence-before-event", Endless).text


def test_a_name_that_is_not_there_is_one_error() -> None:
    with pytest.raises(vb.ConfigError, match="did you mean 'used-length'"):
        vb.zoo("used-lenght")
