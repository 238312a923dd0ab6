"""What scripts that measure for a lesson share: runs that are kept as they finish, rates that are chosen, and verdicts
over paired seeds."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import date
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


def measure(file: Path, parts: Mapping[str, Callable[[Notes], dict]], title: str) -> None:
    """The command line of such a script: each part is measured on one thread and put into `file`; others stay."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--folder", type=Path, required=True, help="where each finished run is kept")
    parser.add_argument("--parts", nargs="*", default=list(parts), choices=list(parts))
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    notes = Notes(options.folder, lambda text: print(text, flush=True))
    where = {"device": "CPU, 1 thread", "torch": torch.__version__, "python": platform.python_version()}
    for name in options.parts:
        found = parts[name](notes) | {"measured": where | {"date": date.today().isoformat()}}
        whole = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        write_whole(file, json.dumps(whole | {name: found}, indent=1, ensure_ascii=False) + "\n")


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
