"""The protocol: how two things are compared, in code.

    rate      the best on *validation* rows of a grid of half decades, which grows until the best lies inside
    seeds     five others, the same for both sides; they vary the start, the order of rows and dropout
    interval  mean ± t(0.975, n − 1) · s / √n over seeds, of the *differences* where two sides share their seeds
    verdict   where that interval lies, against the smallest effect that matters, which is named before the run

No seed both selects and reports, and no test row chooses anything.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

SEARCH_SEED = 100  # chooses a rate, and reports nothing
VOTERS = (101, 102, 103, 104, 105)  # each chooses one where the rate itself is what is asked for; they report no loss
CHOOSERS = (SEARCH_SEED, *VOTERS)
SEEDS = (0, 1, 2, 3, 4)  # report, and choose nothing
LOWEST, HIGHEST = 1e-7, 100.0  # beyond which no rate is tried


class Interval(NamedTuple):
    """The mean over seeds, and the 95 % interval that it lies in."""

    mean: float
    low: float
    high: float


def half_decade(rate: float, up: bool) -> float:
    """The next rate of 1, 3, 10, 30 …: `half_decade(0.01, True)` is 0.03. ValueError unless it is 1 or 3 times 10ⁿ."""
    number = isinstance(rate, int | float) and not isinstance(rate, bool) and math.isfinite(rate)
    mantissa, exponent = f"{rate:.0e}".split("e") if number else ("none", "0")
    if mantissa not in "13" or not math.isclose(rate, float(f"{mantissa}e{exponent}"), rel_tol=1e-6):
        raise ValueError(f"{rate!r} is not on the grid of half decades (0.01, 0.03, 0.1 …).")
    power = int(exponent) + (up if mantissa == "3" else not up and -1)
    return float(f"{'1' if mantissa == '3' else '3'}e{power}")


def on_grid(rates: Sequence[float]) -> list[float]:
    """The rates; ValueError where there is none, or one is not on the grid of half decades."""
    if not len(rates):
        raise ValueError("There is no learning rate to try; give one or more, such as 0.01.")
    for rate in rates:
        half_decade(rate, True)
    return [float(rate) for rate in rates]


def best_rate(loss: Callable[[float], float | None], rates: Sequence[float]) -> tuple[float, dict[float, float]]:
    """(the rate of least validation loss, {rate: loss}); `loss(rate)` is None, infinite or NaN for a run that diverged.

    `rates` are on the grid of half decades. Those beside the best are tried too, until it is better than both.
    ValueError for others, before any is tried, and if every rate diverges down to 1e-7, or the best lies beyond 1e-7
    or 100.
    """
    found: dict[float, float] = {}

    def score(rate: float) -> float:
        if rate not in found:
            value = loss(rate)
            found[rate] = math.inf if value is None or math.isnan(value) else value
        return found[rate]

    for rate in on_grid(rates):
        score(rate)
    while True:
        best = min(sorted(found), key=score)
        if math.isfinite(score(best)):
            beside = [half_decade(best, up) for up in (False, True)]
        else:  # all diverge: only a smaller one can help
            best = min(found)
            beside = [half_decade(best, False)]
        if all(rate in found for rate in beside):
            return best, dict(sorted(found.items()))
        if not all(LOWEST <= rate <= HIGHEST for rate in beside):
            raise ValueError(f"The best rate lies beyond {best:g}, where no rate is worth a run.")
        for rate in beside:
            score(rate)


def quarter_decade(rate: float, up: bool) -> float:
    """Half-way to the next half decade, by the logarithm and to two digits: `quarter_decade(0.01, True)` is 0.017.
    ValueError as for `half_decade`."""
    return float(f"{math.sqrt(rate * half_decade(rate, up)):.1e}")


def bottom(found: dict[float, float]) -> float:
    """Where {rate: loss} is least, read between the rates: the bottom of the parabola, over log rate, through the least
    loss and those of the rates beside it. The best rate itself where one of them is missing or infinite."""
    best = min(found, key=found.__getitem__)
    low, high = max((r for r in found if r < best), default=0), min((r for r in found if r > best), default=0)
    left, right = (found.get(rate, math.inf) - found[best] for rate in (low, high))  # how far it rises on either side
    if not 0 < left + right < math.inf:
        return best
    below, above = math.log(best / low), math.log(high / best)
    return best * math.exp((above**2 * left - below**2 * right) / (above * left + below * right) / 2)


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of figures, one a seed (Student's t). ValueError for fewer than two, or no number."""
    from scipy.special import stdtrit  # scipy.stats has the same, and takes a second to import

    n = len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        raise ValueError(f"An interval needs two figures or more, all of them numbers, not {list(values)}.")
    mean = statistics.fmean(values)
    half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def paired(one: Sequence[float], other: Sequence[float]) -> Interval:
    """The interval of one − other over seeds that both sides share. ValueError for sides of unequal length."""
    return interval([a - b for a, b in zip(one, other, strict=True)])


def verdict(found: Interval, smallest: float) -> str:
    """What an interval says of the claim "the effect is larger than `smallest`": holds, wrong, or cannot tell."""
    if found.low > smallest:
        return "holds"
    return "wrong" if found.high <= smallest else "cannot tell"
