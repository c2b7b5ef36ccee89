"""Chapter 06's checks: right answers, half-right ones with the hint for their mistake, and no answers."""

from __future__ import annotations

import statistics
import struct
from collections.abc import Iterator
from typing import Any

import pytest

import vblklab as vb
from vblklab.kvm import host

BASE = 0xE010_0000
READS = vb.Fio(rw="randread", bs=4096, iodepth=1, number_ios=40)
SLOW = vb.Pipeline(app=READS, disk=vb.Ram(16 << 20), kvm=vb.Kvm(kick="mmio-exit", call="intx"))


@pytest.fixture(params=["model", pytest.param("real", marks=pytest.mark.kvm)])
def trap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[vb.Trap]:
    if request.param == "model":
        monkeypatch.setattr(host, "found", lambda: (False, "there is no /dev/kvm", "load kvm_intel or kvm_amd"))
    machine = vb.Trap()
    assert machine.real == (request.param == "real")
    yield machine
    machine.close()


@pytest.fixture(scope="module")
def by_exit() -> vb.Run:
    return vb.recorded("kvm-mmio-exit-intx-d1")


@pytest.fixture(scope="module")
def by_fd() -> vb.Run:
    return vb.recorded("kvm-ioeventfd-irqfd-d1")


# -- one exit ------------------------------------------------------------------------------------------------------------------


def taken_apart(page: bytes, fmt: str = "<Q8sIB", at: int = 32) -> tuple[int, bytes, int, int]:
    found: tuple[int, bytes, int, int] = struct.unpack_from(fmt, page, at)
    return found


def decoded(page: bytes) -> Any:
    addr, data, size, write = taken_apart(page)
    return addr, int.from_bytes(data[:size], "little"), size, write


def with_leftovers(page: bytes) -> Any:
    addr, data, size, write = taken_apart(page)
    return addr, int.from_bytes(data, "little"), size, write


def big_endian(page: bytes) -> Any:
    addr, data, size, write = taken_apart(page)
    return addr, int.from_bytes(data[:size], "big"), size, write


def from_eight(page: bytes) -> Any:
    addr, data, size, write = taken_apart(page, at=8)
    return addr, int.from_bytes(data, "little"), size, write


def swapped(page: bytes) -> Any:
    addr, value, size, write = decoded(page)
    return addr, value, write, size


def test_a_page_is_taken_apart() -> None:
    assert vb.check.decode_exit(decoded).ok
    assert vb.check.decode_exit(lambda page: ...).state == "open"


@pytest.mark.parametrize(
    ("decode", "hint"),
    [
        (with_leftovers, "left from an exit before"),
        (big_endian, "the value is"),
        (from_eight, "It begins at offset 32"),
        (swapped, "`is_write` one at 52"),
        (lambda page: decoded(page)[:3], "four numbers with commas"),
        (lambda page: page[100], "IndexError"),
        (9, "Give the function itself"),
    ],
)
def test_a_page_taken_apart_half_right(decode: Any, hint: str) -> None:
    verdict = vb.check.decode_exit(decode)
    assert verdict.state == "wrong"
    assert hint in verdict.text


def test_rip_stands_at_a_load(trap: vb.Trap) -> None:
    trap.load(0)
    exit_ = trap.run()
    assert vb.check.predict_rip("at").reveal(exit_).ok
    assert "is not over" in vb.check.predict_rip("behind").reveal(exit_).text
    trap.store(0x50, 1)
    assert "Give the exit of a load" in vb.check.predict_rip("at").reveal(trap.run()).text
    assert "what `vm.run()` returned" in vb.check.predict_rip("at").reveal(3).text


# -- the monitor ---------------------------------------------------------------------------------------------------------------


def served(exit: Any, device: Any) -> Any:
    offset = exit.addr - BASE
    if exit.write:
        return device.write(offset, exit.value, exit.size)
    return device.read(offset, exit.size)


def test_exits_are_served(trap: vb.Trap) -> None:
    verdict = vb.check.exits_served(served, trap)
    assert verdict.ok, verdict.text
    assert ("of the model" in verdict.text) == (not trap.real)


def ignores_stores(exit: Any, device: Any) -> Any:
    return None if exit.write else served(exit, device)


def ignores_size(exit: Any, device: Any) -> Any:
    return 0xFF if exit.size == 1 else served(exit, device)


def without_base(exit: Any, device: Any) -> Any:
    return device.read(exit.addr & 0xF00, exit.size) if not exit.write else None


def dots(exit: Any, device: Any) -> Any: ...


@pytest.mark.parametrize(
    ("serve", "hint"),
    [
        (lambda exit, device: 7, "The exit has an address"),
        (without_base, "The exit has an address"),
        (ignores_stores, "Does a store reach the device?"),
        (ignores_size, "Its load has one byte"),
        (lambda exit, device: print(end=""), "Somebody waits for a value"),
        (lambda exit, device: "virt", "A load wants a number"),
        (lambda exit, device: exit.nothing, "AttributeError"),
        (3, "Give the function itself"),
    ],
)
def test_exits_half_served(trap: vb.Trap, serve: Any, hint: str) -> None:
    verdict = vb.check.exits_served(serve, trap)
    assert verdict.state == "wrong"
    assert hint in verdict.text
    assert vb.check.exits_served(served, trap).ok, "the next try begins anew"


def test_an_unwritten_monitor_is_open(trap: vb.Trap) -> None:
    assert vb.check.exits_served(dots, trap).state == "open"
    assert "Give the machine as well" in vb.check.exits_served(served, 3).text


# -- ioeventfd -----------------------------------------------------------------------------------------------------------------


def test_a_value_that_does_not_match_leaves(trap: vb.Trap) -> None:
    trap.ioeventfd(0x50, 3)
    trap.store(0x50, 4)
    left = trap.run()
    assert vb.check.predict_datamatch("yes").reveal(left).ok
    assert not vb.check.predict_datamatch("no").reveal(left).ok
    trap.store(0x50, 3)
    assert "Store another value" in vb.check.predict_datamatch("yes").reveal(trap.run()).text


def test_what_an_ioeventfd_saves() -> None:
    slow, fast = [26_000, 26_500, 40_000], [17_000, 17_500, 30_000]
    assert vb.check.saved_us(9, slow, fast).ok
    assert "The other way round" in vb.check.saved_us(-9, slow, fast).text
    assert "nanoseconds" in vb.check.saved_us(9000, slow, fast).text
    assert "one of the two medians" in vb.check.saved_us(26.5, slow, fast).text
    assert "Take the median of each" in vb.check.saved_us(3, slow, fast).text
    assert "both sets of samples" in vb.check.saved_us(3, slow, 7).text


# -- what the kernel saw -------------------------------------------------------------------------------------------------------


def test_the_way_out_is_gone(by_exit: vb.Run, by_fd: vb.Run) -> None:
    assert vb.check.gone("kvm_userspace_exit", by_exit, by_fd).ok
    assert "in both" in vb.check.gone("kvm_mmio", by_exit, by_fd).text
    assert "`offset=0x50`" in vb.check.gone("vm_notify", by_exit, by_fd).text
    assert "with quotes" in vb.check.gone(50, by_exit, by_fd).text
    assert "no trace point of the kernel" in vb.check.gone("kvm_mmio", SLOW.run(vb.LiveMachine()), by_fd).text


def test_the_time_of_an_injection(by_fd: vb.Run) -> None:
    gaps = vb.between(by_fd, "kvm_set_irq", "vcpu:irq_handler_entry")
    assert len(gaps) > 50 and min(gaps) > 0
    truth = statistics.median(gaps) / 1000
    assert vb.check.injection_us(truth, by_fd).ok
    assert "nanoseconds" in vb.check.injection_us(1000 * truth, by_fd).text
    assert "It is less" in vb.check.injection_us(2 * truth, by_fd).text
    assert "It is more" in vb.check.injection_us(truth / 2, by_fd).text
    assert "not traced by the kernel" in vb.check.injection_us(truth, SLOW.run(vb.SimMachine())).text


def test_gaps_are_counted_anew_after_each_end() -> None:
    run = SLOW.replace(app=vb.Fio(rw="randread", bs=4096, iodepth=1, number_ios=3)).run(vb.SimMachine())
    assert len(vb.between(run, "vm_notify", "virtqueue_pop")) == 3
    assert len(vb.between(run, "virtqueue_pop", "virtqueue_pop")) == 2
    assert vb.between(run, "virtqueue_pop", "kvm_msi_set_irq") == []
    assert len(vb.between(run, "kvm_mmio", "kvm_userspace_exit", at=0x50)) == 3
    assert vb.between(run, "kvm_mmio", "kvm_userspace_exit", at=0x51) == []
    with pytest.raises(vb.ConfigError, match="no trace point 'kvm_nothing'"):
        vb.between(run, "kvm_nothing", "virtqueue_pop")
    run.trace = None
    with pytest.raises(vb.ConfigError, match="kept no trace"):
        vb.between(run, "vm_notify", "virtqueue_pop")


# -- the bare guest, and the last question -------------------------------------------------------------------------------------


def test_without_a_bare_guest_the_guess_stays_open() -> None:
    assert vb.check.predict_bare("guest").reveal(None).state == "open"


def test_the_larger_half_is_named() -> None:
    run = SLOW.replace(disk=vb.Nvme()).run(vb.SimMachine())
    verdicts = {guess: vb.check.predict_bare(guess).reveal(run) for guess in ("guest", "device")}
    assert verdicts["device"].ok and not verdicts["guest"].ok
    assert "what lies between" in verdicts["guest"].text


def test_one_part_makes_it_quicker() -> None:
    model = vb.SimMachine()
    assert vb.check.quicker(SLOW.replace(transport=vb.Pci()), SLOW, model).ok
    hints = {
        "You replaced nothing": SLOW,
        "You replaced `transport`, `kvm`": SLOW.replace(transport=vb.Pci(), kvm=vb.Kvm()),
        "`app` is another job": SLOW.replace(app=vb.Fio(rw="randread", bs=512, number_ios=5)),
        "That is too little": SLOW.replace(queue=vb.Packed(64)),
        "The model refuses": SLOW.replace(kvm=vb.Kvm(call="msi")),
    }
    for hint, recipe in hints.items():
        verdict = vb.check.quicker(recipe, SLOW, model)
        assert verdict.state == "wrong"
        assert hint in verdict.text
    assert "Give two recipes" in vb.check.quicker(3, SLOW, model).text


@pytest.mark.parametrize("name", ["decode_exit", "exits_served", "saved_us", "gone", "injection_us", "quicker"])
def test_three_dots_are_open(name: str) -> None:
    assert getattr(vb.check, name)(...).state == "open"


@pytest.mark.parametrize("name", ["predict_rip", "predict_datamatch", "predict_bare"])
def test_a_guess_that_is_none_is_told_what_to_choose(name: str) -> None:
    assert "Choose one of" in str(getattr(vb.check, name)(17))
