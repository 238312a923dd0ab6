"""Does it hold on a base seven times as large? LoRA and full fine-tuning on the desk base, in the form of the atlas.

    runs = atlas.load(larger.PATH)          # the columns of the atlas, and its functions

The kit of `tools/gpu` measured it; `python -m minipeft.course.larger --folder runs --workers 2` does on CPUs, in hours.
The protocol is the atlas's: SEARCH_SEED chooses a rate on validation rows, half a decade apart, from a row that
grows until its best lies inside; SEEDS run that rate; for VOTED each of VOTERS chooses too, down to quarter decades.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

from minipeft.learn.protocol import SEARCH_SEED, SEEDS, VOTERS, half_decade, quarter_decade
from minipeft.learn.sweep import Point, collect, point, sweep

PATH = Path(__file__).with_name("larger.parquet")
TASKS = ("pirate", "cipher", "flip", "facts(64)")
FULL = ("Full", {})
LORA = {rank: ("LoRA", {"rank": rank, "gamma": 2.0}) for rank in (1, 4, 16, 64)}
VOTED = (FULL, LORA[16])
RATES = {"Full": (1e-4, 3e-4, 1e-3, 3e-3), "LoRA": (1e-3, 3e-3, 1e-2, 3e-2)}  # where the search begins

Setting = tuple[str, dict]


class OutOfTime(Exception):
    """Fewer runs than were asked for; those that are done stay in the folder."""


def search(
    run: Callable[[Iterable[Point]], dict[Point, dict]], asked: Sequence[tuple[Setting, str, int, Sequence[float]]]
) -> list[float]:
    """The best rate of each (setting, task, seed, first rates), all searched side by side: those beside a best one are
    run too, until every best one is better than both."""
    rates = [set(first) for *_, first in asked]
    while True:
        points = [
            {lr: point(method, task, lr, seed, **settings) for lr in sorted(each)}
            for ((method, settings), task, seed, _), each in zip(asked, rates, strict=True)
        ]
        rows = run(p for each in points for p in each.values())
        best = [min(each, key=lambda lr, each=each: score(rows[each[lr]])) for each in points]
        beside = [{half_decade(lr, up) for up in (False, True)} for lr in best]
        if all(near <= each for near, each in zip(beside, rates, strict=True)):
            return best
        rates = [each | near for near, each in zip(beside, rates, strict=True)]


def score(row: dict) -> float:
    """What chooses: the loss on validation rows, or on the facts themselves, which are learnt by heart."""
    if row["stopped"] != "finished":
        return math.inf
    return row["loss"] if row["valid_loss"] is None else row["valid_loss"]


def measure(
    folder: Path,
    out: Path,
    model: str = "desk",
    device: str = "cpu",
    executor: Executor | None = None,
    seconds: float = math.inf,
    tasks: Sequence[str] = TASKS,
    settings: Sequence[Setting] = (FULL, *LORA.values()),
    voted: Sequence[Setting] = VOTED,
    named: str | None = None,
) -> int:
    """Runs what is not in `folder` yet, and writes what is there to `out`; returns how many runs that are.

    `model`: the base as `mp.load` takes it; `named`: the device as the provenance says it. Raises OutOfTime when
    `seconds` are over before the end.
    """
    until, done = time.monotonic() + seconds, {}

    def run(points: Iterable[Point]) -> dict[Point, dict]:
        points = list(dict.fromkeys(points))
        left = None if math.isinf(seconds) else max(0.0, until - time.monotonic())
        if sweep(points, folder, executor, left, device, model):
            raise OutOfTime(f"There was no time for the last of {len(done) + len(points)} runs.")
        done.update({each: json.loads((folder / f"{each.key}.json").read_bytes()) for each in points})
        return done

    try:
        which = [(setting, task) for task in tasks for setting in settings]
        best = search(run, [(setting, task, SEARCH_SEED, RATES[setting[0]]) for setting, task in which])
        run(
            point(method, task, lr, seed, **settings)
            for ((method, settings), task), lr in zip(which, best, strict=True)
            for seed in SEEDS
        )
        asked = [
            (setting, task, seed, [half_decade(lr, False), lr, half_decade(lr, True)])
            for (setting, task), lr in zip(which, best, strict=True)
            if setting in voted
            for seed in VOTERS
        ]
        run(
            point(method, task, quarter_decade(lr, up), seed, **settings)
            for ((method, settings), task, seed, _), lr in zip(asked, search(run, asked), strict=True)
            for up in (False, True)
        )
    finally:
        if done:
            collect(done, folder, out, named, "desk")
    return len(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where each finished run is kept")
    parser.add_argument("--out", type=Path, default=PATH)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    options = parser.parse_args()
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as executor:
        print(measure(options.folder, options.out, device=options.device, executor=executor), "runs")


if __name__ == "__main__":
    main()
