"""What scripts that measure for a lesson share: runs that are kept as they finish, rates that are chosen, and verdicts
over paired seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from minipeft.learn.protocol import best_rate, paired
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
        """The rate with the least loss; see `protocol.best_rate`."""
        return best_rate(lambda lr: self.get(f"{name} rate {lr:g}", lambda: {"loss": loss(lr)})["loss"], rates)[0]


def spread(values: list[float]) -> str:
    """The mean over the seeds with the least and the largest, for a table."""
    return f"{statistics.fmean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def verdict(ours: list[float], theirs: list[float], least: float) -> str:
    """ "lower", "higher" or "no different" where the whole interval says so beyond `least`, the smallest difference
    that matters; else "cannot tell"."""
    _, low, high = paired(ours, theirs)
    if high < -least or low > least:
        return "lower" if high < -least else "higher"
    return "no different" if -least <= low and high <= least else "cannot tell"
