"""Two clocks joined by causality: the true offset lies in the stated error, whatever the delays; what contradicts itself is refused."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vblklab as vb
from vblklab.trace.clock import fit_clock

MS = 1_000_000


def recording(seed: int, offset: int, drift: float, ios: int, delay: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[int]]:
    """Pairs of a guest whose clock is ``host - offset`` and runs ``drift`` slow, with random delays; and guest times to ask for."""
    choose = random.Random(seed)

    def guest(host: int) -> int:
        return round((host - offset) / (1 + drift))

    before, after, asked = [], [], []
    now = offset + choose.randrange(10**10)
    for _ in range(ios):
        now += choose.randrange(1, 5 * MS)
        kick = guest(now)
        now += 1 + int(choose.expovariate(1 / delay))
        before.append((kick, now))
        now += choose.randrange(1, MS)
        ended = now
        now += 1 + int(choose.expovariate(1 / delay))
        after.append((guest(now), ended))
        asked += [kick, guest(now)]
    return before, after, asked


@given(
    seed=st.integers(0, 10**6),
    offset=st.integers(-(10**15), 10**15),
    drift=st.floats(-3e-4, 3e-4),
    ios=st.integers(1, 60),
    delay=st.sampled_from([100, 20_000, 500_000]),
)
def test_the_true_time_lies_within_the_stated_error(seed: int, offset: int, drift: float, ios: int, delay: int) -> None:
    before, after, asked = recording(seed, offset, drift, ios, delay)
    fit = fit_clock(before, after)
    for guest_ns in asked:
        true = guest_ns * (1 + drift) + offset
        assert abs(fit.host_ns(guest_ns) - true) <= fit.error_ns + 2
    for guest_ns, host_ns in before:
        assert fit.host_ns(guest_ns) <= host_ns + 1, "a cause after what it caused"
    for guest_ns, host_ns in after:
        assert fit.host_ns(guest_ns) >= host_ns - 1


def test_more_and_quicker_ios_make_it_tighter() -> None:
    errors = [fit_clock(*recording(3, 5 * 10**12, 2e-5, ios, 30_000)[:2]).error_ns for ios in (2, 20, 200)]
    assert errors[0] > errors[1] > errors[2]
    assert "620" in str(fit_clock(*recording(3, 0, 0, 310, 1000)[:2]))


def test_pairs_that_contradict_each_other_are_refused() -> None:
    before, after, _ = recording(1, 10**9, 0, 20, 10_000)
    with pytest.raises(vb.TraceError, match=r"contradict each other by \d"):
        fit_clock(before, [(guest, host + 50 * MS) for guest, host in after])


@pytest.mark.parametrize("side", [0, 1])
def test_a_side_without_a_bound_is_refused(side: int) -> None:
    pairs = recording(1, 0, 0, 3, 1000)[:2]
    with pytest.raises(vb.TraceError, match="no event"):
        fit_clock(*([] if number == side else pairs[number] for number in (0, 1)))
