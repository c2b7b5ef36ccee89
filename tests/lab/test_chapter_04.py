"""Chapter 04's checks: right answers, half-right ones with the hint for their mistake, and no answers."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

import vblklab as vb
from vblklab.lab.check import Verdict

Steps = Generator[Any, int, Any]
LINE = vb.Pipeline(app=vb.Fio(rw="randread", bs=4096, iodepth=1, number_ios=40), kvm=vb.Kvm(call="intx"))
MESSAGE = LINE.replace(transport=vb.Pci(), kvm=vb.Kvm(call="msi"))
IRQFD = MESSAGE.replace(kvm=vb.Kvm(call="irqfd"))
POLLED = LINE.replace(driver=vb.VirtioBlkDriver(poll=True))
STATUS, ACK = 0x60, 0x64


def run(recipe: vb.Pipeline, **options: Any) -> vb.Run:
    done: vb.Run = recipe.run(vb.SimMachine(**options))
    return done


# -- the handler ---------------------------------------------------------------------------------------------------------------


def handler(*steps: str, ack: Any = None) -> type[vb.VirtioBlkDriver]:
    """A driver whose handler does these steps in this order."""

    class Handled(vb.VirtioBlkDriver):
        def interrupt(self, vector: int = 0) -> Steps:
            self.interrupts += 1
            causes = 1
            for step in steps:
                if step == "point":
                    yield ("vm_interrupt",)
                elif step == "read":
                    causes = yield from self.transport.bus.read(STATUS)  # type: ignore[attr-defined]
                elif step == "ack":
                    yield from self.transport.bus.write(ACK, causes if ack is None else ack)  # type: ignore[attr-defined]
                elif step == "look" and causes & 1:
                    yield from self.virtblk_done(0)
                elif step == "raise":
                    raise ZeroDivisionError("a slip")
                elif step == "loop":
                    while True:
                        pass

    return Handled


def test_a_handler_that_acknowledges_and_then_looks_is_right() -> None:
    verdict = vb.check.line_handler(handler("point", "read", "ack", "look"))
    assert verdict.ok, verdict.text


@pytest.mark.parametrize(
    ("driver", "hint"),
    [
        (handler("point", "read", "look"), "it acknowledges nothing"),
        (handler("point", "read", "ack", "look", ack=2), "writes 0x2 to InterruptACK"),
        (handler("point", "read", "ack", "look", ack=3), "It acknowledges 0x3 where InterruptStatus had 0x1"),
        (handler("point", "look"), "does not read InterruptStatus"),
        (handler("read", "ack", "look"), "passes no trace point `vm_interrupt`"),
        (handler("point", "read", "ack"), "nobody looks into the used ring"),
        (handler("point", "read", "look", "ack"), "Which of the two must come first?"),
        (handler("point", "raise"), "ZeroDivisionError: a slip"),
        (handler("point", "loop"), "It does not come to an end"),
        (vb.VirtioBlkDriver, "no `interrupt` of its own"),
        (vb.VirtioBlkDriver(), "Give the class itself"),
        (3, "Give the class itself"),
    ],
)
def test_a_half_right_handler_is_told_what_is_missing(driver: Any, hint: str) -> None:
    verdict = vb.check.line_handler(driver)
    assert verdict.state == "wrong"
    assert hint in verdict.text


class Dots(vb.VirtioBlkDriver):
    def interrupt(self, vector: int = 0) -> Any: ...


class DotsDevice(vb.VirtioBlkDevice):
    def should_notify(self, queue: Any) -> Any: ...


def test_three_dots_are_open() -> None:
    assert vb.check.line_handler(Dots).state == "open"
    assert vb.check.patient(DotsDevice).state == "open"
    assert vb.check.message(lambda address, data: ...).state == "open"
    for name in ("line_goes_down", "vectors", "fewer_interrupts", "exits_each", "no_exits"):
        assert getattr(vb.check, name)(...).state == "open"


# -- the device ----------------------------------------------------------------------------------------------------------------


def patient(decide: Any) -> type[vb.VirtioBlkDevice]:
    class Patient(vb.VirtioBlkDevice):
        owed = False
        completed = 0

        def should_notify(self, queue: Any) -> bool:
            self.completed += 1
            return bool(decide(self, super().should_notify(queue), queue))

    return Patient


def keeps(self: Any, asked: bool, queue: Any) -> bool:
    self.owed = asked or self.owed
    if self.owed and (queue.in_flight == 0 or self.completed % 4 == 0):
        self.owed = False
        return True
    return False


def only_fourth(self: Any, asked: bool, queue: Any) -> bool:
    return asked and self.completed % 4 == 0


def forgets(self: Any, asked: bool, queue: Any) -> bool:
    return asked and (queue.in_flight == 0 or self.completed % 4 == 0)


def test_a_patient_device_that_keeps_its_debts_is_right() -> None:
    verdict = vb.check.patient(patient(keeps))
    assert verdict.ok, verdict.text
    assert "at a price" in verdict.text


@pytest.mark.parametrize(
    ("device", "hint"),
    [
        (patient(only_fourth), "With one I/O in flight it never ends"),
        (patient(forgets), "I/Os in flight it comes to a halt"),
        (patient(lambda self, asked, queue: asked), "Nothing is lost, and with 32 in flight"),
        (patient(lambda self, asked, queue: queue.nothing), "AttributeError"),
        (vb.VirtioBlkDevice, "no `should_notify` of its own"),
        (None, "Give the class itself"),
    ],
)
def test_a_half_right_device_is_told_what_is_missing(device: Any, hint: str) -> None:
    verdict = vb.check.patient(device)
    assert verdict.state == "wrong"
    assert hint in verdict.text


# -- the line and the message --------------------------------------------------------------------------------------------------


def walked(recipe: vb.Pipeline, points: int = 80) -> list[Any]:
    vm = recipe.boot(vb.SimMachine())
    return [vm.step() for _ in range(points)]


def test_the_acknowledge_lets_the_line_go() -> None:
    walk = walked(LINE)
    assert vb.check.line_goes_down("InterruptACK", walk).ok
    assert vb.check.line_goes_down("0x64", walk).ok
    assert "last `offset` before it" in vb.check.line_goes_down("InterruptStatus", walk).text
    assert "Choose one of" in vb.check.line_goes_down("kvm_exit", walk).text
    assert "never goes down" in vb.check.line_goes_down("InterruptACK", walk[:5]).text
    assert "Give the list" in vb.check.line_goes_down("InterruptACK", 3).text


def test_exits_of_the_line_are_predicted() -> None:
    done = run(LINE)
    assert vb.check.predict_line_exits(2).reveal(done).ok
    assert "reads InterruptStatus and writes" in vb.check.predict_line_exits(1).reveal(done).text


def test_a_read_without_acknowledge_never_comes_back() -> None:
    walk = walked(LINE.replace(driver=handler("point", "read", "look")), 400)
    assert vb.check.predict_no_ack("nothing").reveal(walk).ok
    assert not vb.check.predict_no_ack("data").reveal(walk).ok
    assert not vb.check.predict_no_ack("error").reveal(walk).ok
    assert "make it longer" in vb.check.predict_no_ack("data").reveal(walk[:3]).text
    assert vb.check.predict_no_ack("data").reveal(walked(LINE)).ok, "with an acknowledge it comes back"


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        (lambda address, data: (data, address >> 12 & 0xFF), "in the wrong order"),
        (lambda address, data: (address >> 12, data), "only say that this is a message"),
        (lambda address, data: (address & 0xFF, data), "above the lowest 12 bits"),
        (lambda address, data: (address >> 12 & 0xFF, 0), "you got"),
        (lambda address, data: data, "two numbers with a comma"),
        (lambda address, data: data / 0, "ZeroDivisionError"),
        (7, "Give the function itself"),
    ],
)
def test_a_half_right_reading_of_a_message(target: Any, hint: str) -> None:
    verdict = vb.check.message(target)
    assert verdict.state == "wrong"
    assert hint in verdict.text


def test_a_message_is_read() -> None:
    assert vb.check.message(lambda address, data: (address >> 12 & 0xFF, data & 0xFF)).ok


MANY = LINE.replace(
    app=vb.Fio(rw="randread", bs=4096, iodepth=2, numjobs=4, number_ios=10),
    device=vb.VirtioBlkDevice(queues=4),
    kvm=vb.Kvm(vcpus=4, call="intx"),
)


def with_vectors(rows: int) -> vb.Run:
    return run(MANY.replace(transport=vb.Pci(vectors=rows), kvm=vb.Kvm(vcpus=4)), trace=20_000)


def test_a_vector_for_each_queue_and_one_more() -> None:
    assert vb.check.vectors(5, with_vectors).ok
    assert "none is left for a change of the configuration" in vb.check.vectors(4, with_vectors).text
    assert "The queues share one" in vb.check.vectors(2, with_vectors).text
    assert "6 rows are enough, and 5 are, too" in vb.check.vectors(6, with_vectors).text
    assert "2 to 64 rows" in vb.check.vectors(1, with_vectors).text
    assert "Give the function as well" in vb.check.vectors(5, 5).text


def test_the_line_ends_at_one_vcpu() -> None:
    done = run(MANY, trace=20_000)
    assert vb.check.predict_vcpus(1).reveal(done).ok
    assert not vb.check.predict_vcpus(4).reveal(done).ok


# -- guesses about runs --------------------------------------------------------------------------------------------------------


def test_only_the_call_moves_with_an_irqfd() -> None:
    runs = run(MESSAGE), run(IRQFD)
    assert vb.check.predict_irqfd_bars("U4").reveal(*runs).ok
    text = vb.check.predict_irqfd_bars("D4, U5").reveal(*runs).text
    assert "You did not expect `U4`" in text and "`D4`, `U5` stayed" in text


def test_completions_of_an_interrupt() -> None:
    busy = run(IRQFD.replace(app=vb.Fio(rw="randread", bs=4096, iodepth=32, number_ios=300)))
    truth = busy.ios / busy.counters["interrupts"]
    assert vb.check.predict_per_interrupt(truth).reveal(busy).ok
    assert not vb.check.predict_per_interrupt(1).reveal(busy).ok
    assert not vb.check.predict_per_interrupt(32).reveal(busy).ok


def test_the_slower_handler_is_interrupted_less() -> None:
    app = vb.Fio(rw="randread", bs=4096, iodepth=4, number_ios=200)
    line, message = ({4: run(recipe.replace(app=app))} for recipe in (LINE, IRQFD))
    assert vb.check.fewer_interrupts("line", line, message).ok
    assert "above the 4" in vb.check.fewer_interrupts("message", line, message).text
    assert "two dictionaries" in vb.check.fewer_interrupts("line", line, 3).text


def test_every_fourth_completion_is_not_enough() -> None:
    ends = {1: vb.Stalled("it stands", "step"), 4: vb.Stalled("it stands", "step"), 32: run(LINE)}
    assert vb.check.predict_every_fourth(1).reveal(ends).ok
    assert not vb.check.predict_every_fourth(3).reveal(ends).ok
    assert vb.check.predict_every_fourth(0).reveal({1: ends[1]}).ok
    assert "Give what the cell above collected" in vb.check.predict_every_fourth(3).reveal([]).text


def test_polling_beats_messages() -> None:
    runs = run(IRQFD), run(IRQFD.replace(driver=vb.VirtioBlkDriver(poll=True)))
    assert vb.check.predict_polled("more").reveal(*runs).ok
    assert not vb.check.predict_polled("same").reveal(*runs).ok


# -- measured ------------------------------------------------------------------------------------------------------------------


def measured(exits: int, interrupts: int, spurious: int = 0) -> vb.Run:
    done = run(LINE.replace(app=vb.Fio(rw="randread", bs=4096, iodepth=1, number_ios=1)))
    done.counters |= {"mmio_exits": exits, "interrupts": interrupts, "interrupts_spurious": spurious}
    return done


def test_exits_are_counted_without_the_probe() -> None:
    line, polled = measured(460, 200), measured(60, 0)
    assert vb.check.exits_each(2, line, polled).ok
    assert "take them off first" in vb.check.exits_each(2.3, line, polled).text
    assert "Subtract" in vb.check.exits_each(7, line, polled).text
    assert "must be the one that polls" in vb.check.exits_each(2, line, line).text
    verdict = vb.check.exits_each(3, measured(660, 200, 200), polled)
    assert verdict.ok and "found no cause" in verdict.text


def test_one_part_takes_all_exits_away() -> None:
    start = LINE.replace(kvm=vb.Kvm(call="irqfd"))
    assert vb.check.no_exits(start.replace(transport=vb.Pci()), start).ok
    hints = {
        "2 for each I/O": start.replace(queue=vb.Packed(64)),
        "the interrupts are gone": start.replace(driver=vb.VirtioBlkDriver(poll=True)),
        "You replaced nothing": start,
        "You replaced `transport`, `kvm`": MESSAGE,
        "This recipe is refused": start.replace(kvm=vb.Kvm(call="msi")),
        "Stalled": start.replace(device=patient(lambda self, asked, queue: False)),
    }
    for hint, recipe in hints.items():
        verdict: Verdict = vb.check.no_exits(recipe, start)
        assert verdict.state == "wrong"
        assert hint in verdict.text
    assert "Give two recipes" in vb.check.no_exits("pci", start).text


# -- the run on KVM ------------------------------------------------------------------------------------------------------------


def test_without_kvm_a_run_is_simulated_and_says_so_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from vblklab.kvm import host
    from vblklab.lab import kvm_run as module

    monkeypatch.setattr(host, "found", lambda: (False, "there is no /dev/kvm", "load kvm_intel or kvm_amd"))
    monkeypatch.setattr(module, "_said", set())
    assert vb.kvm_run(LINE).simulated and vb.kvm_run(LINE).simulated
    said = capsys.readouterr().out
    assert said.count("there is no /dev/kvm: load kvm_intel or kvm_amd") == said.count("The simulator stands in.") == 1


@pytest.mark.kvm
@pytest.mark.parametrize("idle", ["hlt", "poll"])
def test_with_kvm_it_is_measured(idle: str) -> None:
    line, polled = (vb.kvm_run(recipe, idle=idle) for recipe in (LINE, POLLED))
    assert line.rung == "L4 real KVM" and line.ios == 40
    exits = (line.counters["mmio_exits"] - polled.counters["mmio_exits"]) / line.counters["interrupts"]
    assert vb.check.exits_each(exits, line, polled).ok
