"""How a benchmark measures: all sides run in turn, round after round, in one process; a figure is the median of the
rounds' ratios, so that a change of the machine's speed cancels, and it stands with the middle half of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclasses.dataclass(frozen=True)
class Figure:
    what: str  # "LoRA r = 8, a step"
    of: str  # "ours / PEFT's"
    median: float
    low: float
    high: float
    asked: str = ""  # "≤ 0.82"; empty where nothing is promised

    def kept(self) -> bool | None:
        """Whether the median is as it was asked."""
        if not self.asked:
            return None
        sign, bound = self.asked.split()
        return self.median <= float(bound) if sign == "≤" else self.median >= float(bound)


def in_turn(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """{name: seconds of each round}, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(-2, rounds):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if round_ >= 0:
                times[name].append(time.perf_counter() - started)
    return times


def figure(what: str, of: str, above: Sequence[float], below: Sequence[float], asked: str = "") -> Figure:
    """The median of above / below, round by round."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(above, below, strict=True)], n=4)
    return Figure(what, of, median, low, high, asked)


def line(found: Figure) -> str:
    said = {None: "", True: "kept", False: "missed"}[found.kept()]
    spread = f"{found.median:6.2f} ({found.low:.2f}–{found.high:.2f})"
    return f"{found.what:52} {found.of:28} {spread:22} {found.asked:8} {said}".rstrip()


def main(figures: Callable[[bool], Iterable[Figure]], about: str | None) -> None:
    """What a benchmark does when it is called: prints its figures as they come, or as lines of JSON."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="little work, to see that all of it runs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.json:
        print(f"torch {torch.__version__}, {DEVICE}, {options.threads} threads")
    for found in figures(options.quick):
        print(json.dumps(dataclasses.asdict(found)) if options.json else line(found), flush=True)


def read(text: str) -> Iterator[Figure]:
    """The figures of such lines of JSON."""
    return (Figure(**json.loads(each)) for each in text.splitlines() if each.startswith("{"))
