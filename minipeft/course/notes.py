"""What scripts that measure for a lesson share: runs that are kept as they finish, rates that are chosen, and verdicts
over paired seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from minipeft.whole import write_whole


class Notes:
    """What is done already: {name: figures}, a file a run."""

    def __init__(self, folder: Path, report: Callable[[str], object] = print):
        self.folder, self.report = folder, report

    def get(self, name: str, run: Callable[[], dict]) -> dict:
        path = self.folder / f"{name.replace(' ', '_').replace('/', '-')}.json"
        if not path.exists():
            found = run()
            write_whole(path, json.dumps(found))
            self.report(f"{name}: {found}")
        return json.loads(path.read_text(encoding="utf-8"))

    def best_rate(self, name: str, loss: Callable[[float], float], rates: Sequence[float]) -> float:
        """The rate with the least loss; the row is widened while the best is at an end of it."""
        rates = list(rates)
        found = {lr: self.get(f"{name} rate {lr:g}", lambda lr=lr: {"loss": loss(lr)})["loss"] for lr in rates}
        while (best := min(rates, key=found.get)) in (rates[0], rates[-1]) and 1e-5 < best < 1:
            new = beside(best, down=best == rates[0])
            rates = sorted([*rates, new])
            found[new] = self.get(f"{name} rate {new:g}", lambda lr=new: {"loss": loss(lr)})["loss"]
        return best


def beside(rate: float, down: bool) -> float:
    """Half a decade further: 1e-2 → 3e-2 → 1e-1, or down."""
    mantissa, exponent = f"{rate:.0e}".split("e")
    return float(f"3e{int(exponent) - down}" if mantissa == "1" else f"1e{int(exponent) + 1 - down}")


def spread(values: list[float]) -> str:
    """The mean over the seeds with the least and the largest, for a table."""
    return f"{statistics.fmean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def paired(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """The mean of ours − theirs, seed by seed, and its 95 % interval (Student's t)."""
    from scipy.stats import t

    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, n = statistics.fmean(differences), len(differences)
    half = t.ppf(0.975, n - 1) * statistics.stdev(differences) / n**0.5
    return mean, mean - half, mean + half


def verdict(ours: list[float], theirs: list[float], least: float) -> str:
    """ "lower", "higher" or "no different" where the whole interval says so beyond `least`, the smallest difference
    that matters; else "cannot tell"."""
    _, low, high = paired(ours, theirs)
    if high < -least or low > least:
        return "lower" if high < -least else "higher"
    return "no different" if -least <= low and high <= least else "cannot tell"
