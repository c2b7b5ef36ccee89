"""The machine to take apart: what an exit shows, the model that stands in for it, and the model against the real one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

import vblklab as vb
from vblklab.kvm import host
from vblklab.kvm.payload import BASE, PORT_DONE, REGISTERS_GPA, offset_of
from vblklab.lab.trap_exit import TrapExit, instructions

SHOWN = ("rip", "rax", "rcx", "rdx", "rbx", "rsi", "rdi", "rbp", "rsp", "rflags")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[vb.Trap]:
    monkeypatch.setattr(host, "found", lambda: (False, "there is no /dev/kvm", "load kvm_intel or kvm_amd"))
    monkeypatch.setattr(vb.Trap, "_said", "")
    trap = vb.Trap()
    assert "there is no /dev/kvm: load kvm_intel or kvm_amd\nA model of the payload plays the exits." in capsys.readouterr().out
    yield trap
    trap.close()


@pytest.fixture
def real() -> Iterator[vb.Trap]:
    trap = vb.Trap()
    yield trap
    trap.close()


def test_the_listing_is_read_whole() -> None:
    lines = instructions()
    ends = [at + len(bytes.fromhex(code)) for at, code, _ in lines]
    assert [at for at, _, _ in lines[1:]] == ends[:-1]
    assert all(source for _, _, source in lines)


def test_a_store_leaves_with_its_value_and_stands_behind_it(model: vb.Trap) -> None:
    model.store(0x50, 0x1234, 2)
    seen = model.run()
    assert (seen.reason, seen.addr, seen.size, seen.write, seen.value) == ("KVM_EXIT_MMIO", REGISTERS_GPA + 0x50, 2, True, 0x1234)
    marked = {mark: source for mark, _, _, source in seen.around() if mark}
    assert marked == {"*": "        mov  [ecx], ax", "→": "        jmp  tell"}
    assert ("40", "mmio.data", "34 12 00 00 00 00 00 00", "0x1234: was stored") in seen.fields()
    done = model.run()
    assert (done.reason, done.addr, done.write) == ("KVM_EXIT_IO", PORT_DONE, True)


@pytest.mark.parametrize(("size", "seen"), [(1, 0x76), (2, 0x6976), (4, 0x74726976)])
def test_a_load_stands_at_itself_until_it_is_answered(model: vb.Trap, size: int, seen: int) -> None:
    model.load(0x000, size)
    first = model.run()
    assert not first.write and first.registers["rip"] == BASE + offset_of(f"load{size}")
    assert [mark for mark, *_ in first.around() if mark] == ["→*"]
    assert "wanted: the answer goes here" in str(first)
    model.answer(0x1_74726976)
    assert model.run().registers["rax"] == seen


def test_an_ioeventfd_takes_the_stores_that_match(model: vb.Trap) -> None:
    model.ioeventfd(0x50, 3)
    model.store(0x50, 3)
    assert (model.run().reason, model.kicks(), model.kicks()) == ("KVM_EXIT_IO", 1, 0)
    model.store(0x50, 4)
    assert (model.run().reason, model.kicks()) == ("KVM_EXIT_MMIO", 0)
    model.store(0x50, 3, 2)
    assert model.run().reason == "KVM_EXIT_MMIO", "another size does not match"


def test_without_kvm_the_times_are_recorded_ones(model: vb.Trap) -> None:
    slow = model.ring(2000)
    assert len(slow) == 2000 and model.kicks() == 0
    assert model.provenance.startswith("recorded: KVM: kvm_pvm") and "load" in model.provenance
    model.ioeventfd(0x50)
    fast = model.ring(5000)
    assert len(fast) == 2000 == model.kicks()
    assert sorted(fast)[1000] < sorted(slow)[1000]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda trap: trap.store(0x50, 0, 8), "an access of 8 bytes: choose 1, 2 or 4"),
        (lambda trap: trap.store(0x1000, 0), "register 4096: give an offset"),
        (lambda trap: trap.load("0x50"), "register '0x50'"),
        (lambda trap: trap.store(0x50, 256, 1), "a store of 256 with 1 bytes"),
        (lambda trap: trap.answer(-1), r"answer\(-1\)"),
        (lambda trap: trap.ioeventfd(-1), "register -1"),
    ],
)
def test_what_cannot_be_asked_is_refused(model: vb.Trap, call: Any, message: str) -> None:
    with pytest.raises(vb.ConfigError, match=message):
        call(model)


def test_an_exit_is_a_table_in_a_notebook(model: vb.Trap) -> None:
    model.store(0x50, 1)
    page = model.run()._repr_html_()
    assert page.count("<table") == 3 and "mmio.phys_addr" in page and "mov  [ecx], eax" in page


def seen(exit_: TrapExit) -> dict[str, Any]:
    """All but the bytes of ``mmio.data`` that this exit did not write: they are what was in the page before."""
    fields = [row if row[1] != "mmio.data" else (*row[:2], row[2][: 3 * exit_.size * exit_.write], row[3]) for row in exit_.fields()]
    return {
        "fields": fields,
        "registers": {name: exit_.registers[name] for name in SHOWN},
        "value": exit_.value if exit_.write else 0,
        "around": exit_.around(),
    }


@pytest.mark.kvm
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_model_plays_what_the_real_one_does(real: vb.Trap, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def session(trap: vb.Trap) -> list[Any]:
        found: list[Any] = []
        trap.store(0x50, 7, size)
        found += [seen(trap.run()) for _ in range(3)]
        trap.load(0x100, size)  # in the middle of a store: the payload ends that first
        found.append(seen(trap.run()))
        trap.answer(0x8877665544332211)
        found.append(seen(trap.run()))
        trap.ioeventfd(0x50, 7, size)
        trap.store(0x50, 7, size)
        found += [seen(trap.run()), trap.kicks()]
        trap.store(0x50, 8, size)
        found += [seen(trap.run()), trap.kicks()]
        return found

    assert real.real
    there = session(real)
    monkeypatch.setattr(host, "found", lambda: (False, "no", "get it"))
    here = vb.Trap()
    try:
        assert not here.real
        assert session(here) == there
    finally:
        here.close()


@pytest.mark.kvm
def test_rings_are_timed_and_nothing_stays_open(real: vb.Trap) -> None:
    assert len(real.ring(20)) == 20 and min(real.ring(20)) > 0
    real.ioeventfd(0x50, 0)
    real.ring(30)
    assert real.kicks() == 30
    threads = threading.active_count()
    another = vb.Trap()
    assert real._eventfd == -1, "the next one ends this one"
    another.close()
    assert threading.active_count() == threads
