"""The protocol: rates that lie inside, seeds that are paired, verdicts from intervals."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from minipeft.learn.protocol import (
    LOWEST,
    Interval,
    best_rate,
    bottom,
    half_decade,
    interval,
    paired,
    quarter_decade,
    verdict,
)

GRID = [float(f"{m}e{e}") for e in range(-6, 2) for m in (1, 3)]


@given(st.sampled_from(GRID))
def test_half_decades_go_up_and_down(rate):
    assert half_decade(half_decade(rate, True), False) == rate == half_decade(half_decade(rate, False), True)
    assert half_decade(rate, True) == min(each for each in [*GRID, 100.0] if each > rate)
    middle = quarter_decade(rate, True)
    assert middle == quarter_decade(half_decade(rate, True), False)
    assert middle**2 == pytest.approx(rate * half_decade(rate, True), rel=0.1), "half-way, to two digits"


@pytest.mark.parametrize("rate", (0.02, 0.0101, 5.0, 0, -0.01, math.nan, math.inf, True, "0.01", None))
def test_a_rate_off_the_grid_is_refused(rate):
    with pytest.raises(ValueError, match="half decades"):
        half_decade(rate, True)
    with pytest.raises(ValueError, match="half decades"):
        best_rate(lambda rate: pytest.fail("a run was begun"), [0.01, rate])


@given(st.sampled_from(GRID), st.lists(st.sampled_from(GRID), min_size=1, max_size=4, unique=True), st.booleans())
def test_the_best_rate_lies_inside_wherever_the_search_begins(true, rates, diverges):
    def loss(rate):  # a valley; far above it, runs diverge
        return None if diverges and rate > 10 * true else abs(math.log(rate / true))

    best, seen = best_rate(loss, rates)
    assert best == true and min(seen) < best < max(seen)
    assert list(seen) == sorted(seen) and seen[best] == 0


@given(st.sampled_from(GRID), st.floats(-0.2, 0.2), st.floats(0.01, 10), st.booleans())
def test_the_bottom_of_a_parabola_is_read_between_the_rates(best, beside, steep, wide):
    step = half_decade if wide else quarter_decade
    rates = [step(best, False), best, step(best, True)]
    true = best * 10 ** (beside if wide else beside / 2)
    losses = [1 + steep * math.log(rate / true) ** 2 for rate in rates]
    assert bottom(dict(zip(rates, losses, strict=True))) == pytest.approx(true, rel=1e-6)
    square, linear, _ = np.polyfit(np.log(rates), losses, 2)
    assert bottom(dict(zip(rates, losses, strict=True))) == pytest.approx(math.exp(-linear / square / 2), rel=1e-3)
    for diverged in ({best: 1.0}, {best: 1.0, rates[0]: 2.0}, {best: 1.0, rates[0]: 2.0, rates[2]: math.inf}):
        assert bottom(diverged) == best, "nothing to read a parabola from"
    assert bottom(dict.fromkeys(rates, 1.0)) in rates, "three equal losses"


def test_a_search_that_finds_nothing_says_so():
    with pytest.raises(ValueError, match="no learning rate to try"):
        best_rate(lambda rate: rate, [])
    with pytest.raises(ValueError, match="beyond"):
        best_rate(lambda rate: math.nan, [1e-3])
    with pytest.raises(ValueError, match="beyond"):
        best_rate(lambda rate: rate, [1e-3])  # the smaller the better
    assert LOWEST < 1e-6


def test_intervals_are_students():
    values = [0.3, 0.1, 0.4, 0.15, 0.9]
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert interval(values) == pytest.approx((statistics.fmean(values), low, high))
    other = [0.1, 0.2, 0.1, 0.0, 0.5]
    t = stats.ttest_rel(values, other).confidence_interval(0.95)
    assert paired(values, other)[1:] == pytest.approx((t.low, t.high))


@pytest.mark.parametrize("values", ([], [1.0], [1.0, math.nan], [1.0, math.inf]))
def test_an_interval_of_too_little_is_refused(values):
    with pytest.raises(ValueError, match="two figures"):
        interval(values)


def test_sides_with_unequal_seeds_are_refused():
    with pytest.raises(ValueError):
        paired([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("found", "said"),
    ((Interval(2, 1.1, 3), "holds"), (Interval(0, -1, 1), "wrong"), (Interval(1, 0.9, 1.1), "cannot tell")),
)
def test_each_verdict_can_come_out(found, said):
    assert verdict(found, smallest=1.0) == said


def test_an_interval_does_without_an_import_of_a_second():
    """An explorer's first picture waits for what its intervals import."""
    code = "import sys; from minipeft.learn.protocol import interval; from minipeft.course.monitor import rate; "
    code += "interval([1, 2]); rate(1, 9); sys.exit('scipy.stats' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
