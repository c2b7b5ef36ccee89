"""Every check: the right answer, the wrong ones by kind, and answers that are none at all."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vblklab as vb
from vblklab.lab.check import Checks, NoSuchQuestion, Prediction, Verdict
from vblklab.trace.run import Run, TraceEvent

STEPS = [step.name for step in vb.STEPS]


class Hostile:
    """Raises whatever is done to it."""

    def _no(self, *_: Any) -> Any:
        raise RuntimeError("no")

    __repr__ = __str__ = __eq__ = __hash__ = __bool__ = __len__ = __iter__ = __float__ = __int__ = __call__ = __lt__ = __contains__ = _no

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class HostileText(str):
    __slots__ = ()

    def strip(self, *_: Any) -> Any:
        raise RuntimeError("no")

    lower = split = strip


def one_run(iodepth: int = 1, ios: int = 300, **parts: Any) -> Run:
    app = vb.Fio(rw="randread", bs=4096, iodepth=iodepth, number_ios=ios)
    return vb.Pipeline(app=app, **parts).run(vb.SimMachine())


class Chatty(vb.VirtioBlkDevice):
    def should_notify(self, queue: Any) -> bool:
        return True


@pytest.fixture(scope="module")
def fast() -> Run:
    return one_run()


@pytest.fixture(scope="module")
def exits() -> Run:
    return one_run(kvm=vb.Kvm(kick="mmio-exit"))


@pytest.fixture(scope="module")
def live(fast: Run) -> Run:
    """A measured run: of every step three quarters are Python's."""
    split = {stat.step: (stat.mean_ns / 4, 3 * stat.mean_ns / 4) for stat in fast.steps}
    return dataclasses.replace(fast, simulated=False, split=split)


def slower(run: Run, **factors: float) -> Run:
    """The run with some of its steps made slower."""
    rows = np.array(run.rows)
    lengths = np.diff(rows, axis=1)
    for name, factor in factors.items():
        lengths[:, STEPS.index(name)] = (lengths[:, STEPS.index(name)] * factor).astype(np.int64)
    durations = []
    for number in range(len(STEPS)):
        histogram = type(run.durations[0])()
        histogram.extend(lengths[:, number])
        durations.append(histogram)
    return dataclasses.replace(run, durations=durations)


# --- the mechanism ---


def test_a_verdict_shows_itself_as_text_and_html() -> None:
    verdict = Verdict("wrong", "use `a < b` & more")
    assert (str(verdict), repr(verdict)) == ("✗ use a < b & more",) * 2
    assert "<code>a &lt; b</code> &amp; more" in verdict._repr_html_()
    assert [Verdict(state, "").ok for state in ("right", "wrong", "open")] == [True, False, False]
    assert not Verdict("noted", "").ok


def test_an_unknown_question_is_one_line_that_names_the_nearest() -> None:
    with pytest.raises(NoSuchQuestion, match=r"no question 'step_of_pip': did you mean vb.check.step_of_pop") as caught:
        _ = vb.check.step_of_pip
    assert isinstance(caught.value, vb.VblkError)
    assert isinstance(caught.value, AttributeError)
    assert not hasattr(vb.check, "_ipython_display_")


def test_the_checks_list_their_questions() -> None:
    assert "five_times" in dir(vb.check)
    assert len(repr(vb.check).splitlines()) == len(dir(vb.check)) == vb.check._repr_html_().count("<tr>")
    assert repr(vb.check.step_of_pop) == "vb.check.step_of_pop: To which step does the trace point virtqueue_pop belong?"


def test_three_dots_are_no_answer_yet(fast: Run) -> None:
    for verdict in (vb.check.step_of_pop(...), vb.check.step_of_pop(step=...), vb.check.virtualization(..., fast)):
        assert verdict.state == "open"
        assert "three dots" in verdict.text


def test_a_prediction_is_noted_and_judged_later(fast: Run, exits: Run) -> None:
    guess = vb.check.predict_bars("d4 and u5")
    assert isinstance(guess, Prediction)
    assert guess.ok
    assert str(guess) == repr(guess) == "✎ Noted: 'd4 and u5'. Run on to see what happens."
    assert "Noted" in guess._repr_html_()
    assert guess.reveal(fast, exits).state == "wrong"


@pytest.mark.parametrize("answer", [..., "D9", 4, None])
def test_without_a_guess_nothing_is_revealed(answer: Any, fast: Run, exits: Run) -> None:
    guess = vb.check.predict_bars(answer)
    assert not guess.ok
    assert guess.reveal(fast, exits).text.startswith("There is no guess yet.")


def test_too_few_or_too_many_answers_say_what_is_wanted(fast: Run) -> None:
    assert "This one takes 1 in the brackets: step." in vb.check.step_of_pop().text
    assert "This one takes 2 in the brackets: percent, run." in vb.check.virtualization(16).text
    assert "This one takes 2 in the brackets: before, after." in vb.check.predict_bars("D4").reveal(fast).text
    assert not vb.check.predict_bars().ok
    assert not vb.check.predict_bars("D4", "D5").ok


def test_a_question_that_fails_itself_is_a_verdict_too() -> None:
    assert vb.check.five_times(8, lambda iodepth: 1 / 0).text.startswith("I could not use `8` and `<function")


# --- answers that are none ---

GARBAGE: list[Any] = [
    *(None, True, -1, 0, 10**400, 1e308, math.nan, math.inf, 1j, Decimal(3), "", " ", "banana", "D", "D0", "`<b>", "%", "1" * 10_000),
    *(b"D5", [], (), {}, set(), [[]], [None], ["D5", 5], {"D5": 1}, frozenset({1}), object(), object, len, lambda: 1 / 0),
    *(Hostile(), HostileText("D5"), [Hostile()], HostileText, itertools.count(), iter([]), np.zeros(3), np.float64(2), np.int8(5)),
    *(NotImplemented, Exception("x"), vb, vb.check, vb.SimMachine()),
]


def names() -> list[str]:
    return dir(Checks())


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("other", ["run", "garbage"])
def test_garbage_never_raises(name: str, other: str, fast: Run) -> None:
    question = getattr(vb.check, name)
    for answer in GARBAGE:
        rest = fast if other == "run" else answer
        for arguments in ((answer,), (answer, rest), (answer, rest, rest)):
            result = question(*arguments)
            assert isinstance(result, Verdict | Prediction)
            assert str(result)
            assert result._repr_html_()
            if isinstance(result, Prediction):
                for runs in ((), (rest,), (rest, answer), (answer, rest)):
                    assert isinstance(result.reveal(*runs), Verdict)


VALID = {"five_times": 8, "predict_interrupts": "same", "predict_iops": "more", "step_of_pop": "D5", "who_pops": "iothread"}


@pytest.mark.parametrize("name", names())
def test_a_good_answer_with_a_garbage_run_never_raises(name: str) -> None:
    question = getattr(vb.check, name)
    answer = VALID.get(name, "D4" if name == "predict_bars" else 42)
    for garbage in GARBAGE:
        result = question(answer)
        shown = result.reveal(garbage, garbage) if isinstance(result, Prediction) else question(answer, garbage)
        assert shown.state in ("wrong", "open")
        assert shown._repr_html_()


@pytest.mark.parametrize("name", names())
@settings(max_examples=settings.default.max_examples // 4)  # type: ignore[union-attr]
@given(
    answer=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.sampled_from(STEPS) | st.binary(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=5,
    )
)
def test_no_generated_answer_raises(name: str, answer: Any) -> None:
    question = getattr(vb.check, name)
    assert str(question(answer))
    result = question(answer, answer)
    assert "\n" not in str(result)
    if isinstance(result, Prediction):
        assert isinstance(result.reveal(answer, answer), Verdict)


def test_html_of_an_answer_is_escaped() -> None:
    guess = vb.check.predict_bars("none")
    guess.guess = "<script>"
    assert "<script>" not in guess.reveal(1, 2)._repr_html_()
    assert "<b>" not in vb.check.step_of_pop("<b>x</b>")._repr_html_().replace('<b style="', "")


# --- step_of_pop ---


@pytest.mark.parametrize("answer", ["D5", "d5", " D5 ", ["D5"], ("d5",), {"D5"}])
def test_step_of_pop_takes_the_step_as_it_is_written(answer: Any) -> None:
    assert vb.check.step_of_pop(answer).ok


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        ("U3", "on the way up"),
        ("D4", "Very near"),
        ("D1", 'vb.words("D2")'),
        ("HW", 'vb.words("D2")'),
        ("D5, D6", "exactly one step"),
        ("none", "exactly one step"),
        ("D8", "no step `D8`"),
        ("virtqueue_pop", "the question is about the steps"),
        (5, "names of steps"),
    ],
)
def test_step_of_pop_helps_with_each_kind_of_mistake(answer: Any, hint: str) -> None:
    verdict = vb.check.step_of_pop(answer)
    assert verdict.state == "wrong"
    assert hint in verdict.text


def test_step_of_pop_never_gives_the_step_away() -> None:
    assert not [name for name in STEPS if name != "D5" and "D5" in vb.check.step_of_pop(name).text]


# --- predict_used_len ---


@pytest.mark.parametrize("answer", [4097, "4097", "4,097", "4097 bytes", 4097.0, np.int64(4097)])
def test_used_len_counts_data_and_status(answer: Any, fast: Run) -> None:
    assert vb.check.predict_used_len(answer).reveal(fast).ok


@pytest.mark.parametrize(("answer", "hint"), [(4096, "Almost"), (4113, "only read"), (1, "4,097"), (0, "4,097")])
def test_used_len_explains_a_wrong_guess(answer: Any, hint: str, fast: Run) -> None:
    verdict = vb.check.predict_used_len(answer).reveal(fast)
    assert verdict.state == "wrong"
    assert hint in verdict.text


def test_used_len_is_read_from_the_run(fast: Run) -> None:
    """A device that lies about the length is believed: the check looks at what happened."""
    lies = dataclasses.replace(fast, trace=[TraceEvent(1, "iothread", "iothread", "virtqueue_fill", (0, 513))])
    assert vb.check.predict_used_len(513).reveal(lies).ok
    assert "no used element" in vb.check.predict_used_len(513).reveal(dataclasses.replace(fast, trace=None)).text


# --- python_share ---


@pytest.mark.parametrize("answer", [75, 73, 77.5, "75 %", "about 75"])
def test_python_share_is_that_of_the_split(answer: Any, live: Run) -> None:
    assert vb.check.python_share(answer, live).ok


@pytest.mark.parametrize(
    ("answer", "hint"), [(0.75, "in percent"), (25, "other part"), (50, "larger"), (99, "smaller"), ("much", "number")]
)
def test_python_share_helps_with_each_kind_of_mistake(answer: Any, hint: str, live: Run) -> None:
    verdict = vb.check.python_share(answer, live)
    assert verdict.state == "wrong"
    assert hint in verdict.text
    assert "75" not in verdict.text


def test_python_share_of_a_simulated_run_has_no_answer(fast: Run) -> None:
    assert "simulated" in vb.check.python_share(0, fast).text


# --- predict_bars and predict_iops ---


def test_predict_bars_is_judged_from_both_runs(fast: Run, exits: Run) -> None:
    assert vb.check.predict_bars("none").reveal(fast, exits).ok
    changed = slower(exits, D4=2, U6=1.5)
    assert vb.check.predict_bars(["U6", "D4"]).reveal(fast, changed).ok
    guess = vb.check.predict_bars("D4, U6")
    assert str(guess.reveal(changed, fast)) == str(guess.reveal(fast, changed)), "the order of the runs does not matter"
    verdict = vb.check.predict_bars("D4, D5").reveal(fast, changed)
    assert verdict.state == "wrong"
    assert "You did not expect `U6`. `D5` stayed." in verdict.text
    assert "`D4` 3." in verdict.text


def test_predict_bars_wants_both_kicks(fast: Run, exits: Run) -> None:
    for kick, runs in (("ioeventfd", (fast, fast)), ("mmio-exit", (exits, exits))):
        assert f"Both runs have kick='{kick}'" in vb.check.predict_bars("none").reveal(*runs).text


def test_predict_iops_is_judged_from_both_runs(fast: Run, exits: Run) -> None:
    many = one_run(32), one_run(32, kvm=vb.Kvm(kick="mmio-exit"))
    assert vb.check.predict_iops("fewer").reveal(*many).ok
    assert vb.check.predict_iops("LESS").reveal(*many).ok
    assert vb.check.predict_iops("same").reveal(fast, exits).ok
    assert vb.check.predict_iops("more").reveal(fast, dataclasses.replace(exits, duration_ns=exits.duration_ns // 2)).ok
    verdict = vb.check.predict_iops("more").reveal(*many)
    assert verdict.state == "wrong"
    assert f"{many[0].iops:,.0f} IOPS" in verdict.text
    assert "Choose one of" in str(vb.check.predict_iops("a lot"))


# --- who_pops ---


@pytest.mark.parametrize("answer", ["vCPU 0", "vcpu 0", "VCPU0", " vCPU  0 "])
def test_who_pops_is_the_vcpu_after_an_exit(answer: str, exits: Run) -> None:
    assert vb.check.who_pops(answer, exits).ok


def test_who_pops_reads_the_lane_from_the_trace(fast: Run) -> None:
    assert vb.check.who_pops("iothread", fast).ok
    assert not vb.check.who_pops("vCPU 0", fast).ok


@pytest.mark.parametrize(
    ("answer", "hint"), [("vCPU", "in full"), ("disk", "colour"), ("iothread", "no such lane"), ("QEMU", "no such lane"), (0, "as text")]
)
def test_who_pops_helps_with_each_kind_of_mistake(answer: Any, hint: str, exits: Run) -> None:
    verdict = vb.check.who_pops(answer, exits)
    assert verdict.state == "wrong"
    assert hint in verdict.text
    assert "vCPU 0" not in verdict.text


def test_who_pops_needs_a_trace(exits: Run) -> None:
    assert "kept no trace" in vb.check.who_pops("vCPU 0", dataclasses.replace(exits, trace=None)).text


# --- predict_interrupts ---


def test_predict_interrupts_is_judged_from_both_runs() -> None:
    quiet, chatty = one_run(32, 1000), one_run(32, 1000, device=Chatty)
    verdict = vb.check.predict_interrupts("same").reveal(quiet, chatty)
    assert verdict.ok
    assert "pending" in verdict.text
    doubled = dataclasses.replace(quiet, counters=quiet.counters | {"interrupts": 2 * quiet.counters["interrupts"]})
    assert vb.check.predict_interrupts("more").reveal(quiet, doubled).ok
    assert vb.check.predict_interrupts("fewer").reveal(doubled, quiet).ok
    assert not vb.check.predict_interrupts("same").reveal(quiet, doubled).ok


# --- five_times ---


@pytest.fixture(scope="module")
def linear(fast: Run) -> Callable[[int], Run]:
    """A machine whose rate grows with the square root of the iodepth: five times at 25."""
    return lambda iodepth: dataclasses.replace(fast, duration_ns=int(fast.duration_ns / math.sqrt(iodepth)))


@pytest.mark.parametrize("answer", [25, 25.0, "25"])
def test_five_times_runs_the_learners_own_function(answer: Any, linear: Callable[[int], Run]) -> None:
    assert vb.check.five_times(answer, linear).ok


@pytest.mark.parametrize(
    ("answer", "hint"),
    [(24, "4.9 times"), (1, "1.0 times"), (26, "not the smallest"), (64, "not the smallest"), (2.5, "whole number"), (65, "1 to 64")],
)
def test_five_times_helps_with_each_kind_of_mistake(answer: Any, hint: str, linear: Callable[[int], Run]) -> None:
    verdict = vb.check.five_times(answer, linear)
    assert verdict.state == "wrong"
    assert hint in verdict.text
    assert "25" not in verdict.text


def test_five_times_wants_the_function(fast: Run) -> None:
    assert "function behind the slider" in vb.check.five_times(8, fast).text
    assert "Give a function that returns a run" in vb.check.five_times(8, lambda iodepth: None).text


# --- virtualization ---


def shares(run: Run, *steps: str) -> float:
    mean = {stat.step: stat.mean_ns for stat in run.steps}
    return 100 * sum(mean[step] for step in steps) / sum(mean.values())


@pytest.fixture(scope="module")
def flash() -> Run:
    return one_run(disk=vb.Nvme(model="P3700"))


DOWN, UP = ("D2", "D3", "D4", "D5"), ("U3", "U4", "U5", "U6")


def test_virtualization_is_the_share_of_eight_steps(flash: Run, fast: Run) -> None:
    for run in (flash, fast):
        share = shares(run, *DOWN, *UP)
        assert vb.check.virtualization(share, run).ok
        assert vb.check.virtualization(round(share), run).ok
        assert vb.check.virtualization(f"{share:.0f} %", run).ok
    assert not vb.check.virtualization(shares(fast, *DOWN, *UP), flash).ok


@pytest.mark.parametrize(
    ("steps", "scale", "hint"),
    [
        ((*DOWN, *UP), 0.01, "in percent"),
        (("D1", "D6", "D7", "HW", "U1", "U2", "U7"), 1, "would pay as well"),
        (("HW",), 1, "drive alone"),
        (DOWN, 1, "one direction"),
        (UP, 1, "one direction"),
        (("D3", "D4", "D5", "U3", "U4", "U5"), 1, "Close"),
        (STEPS, 1, "less"),
        ((), 1, "more"),
    ],
)
def test_virtualization_helps_with_each_kind_of_mistake(steps: tuple[str, ...], scale: float, hint: str, fast: Run) -> None:
    verdict = vb.check.virtualization(scale * shares(fast, *steps), fast)
    assert verdict.state == "wrong"
    assert hint in verdict.text
    assert f"{shares(fast, *DOWN, *UP):.0f}" not in verdict.text


def test_two_chapters_cannot_have_a_question_of_one_name() -> None:
    from vblklab.lab.check import question, right

    def step_of_pop(answer: Any) -> Verdict:
        return right("")

    assert vb.check.step_of_pop("D5").ok
    with pytest.raises(vb.ConfigError, match="two chapters have a question 'step_of_pop'"):
        question("99", "Which?")(step_of_pop)
