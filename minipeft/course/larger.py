"""Does it hold on a base seven times as large? LoRA and full fine-tuning on the desk base, in the form of the atlas.

    runs = atlas.load(larger.PATH)          # the columns of the atlas, and its functions

The kit of `tools/gpu` measured it; `python -m minipeft.course.larger --folder runs --workers 2` does on CPUs, in hours.
The protocol is the atlas's: SEARCH_SEED chooses a rate on validation rows, half a decade apart, from a row that grows
until its best lies inside, and SEEDS run that rate.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

from minipeft.learn.protocol import SEARCH_SEED, SEEDS, best_rate
from minipeft.learn.sweep import Point, collect, point, sweep

PATH = Path(__file__).with_name("larger.parquet")
TASKS = ("pirate", "cipher", "flip", "facts(64)")
RATES = {"Full": (1e-4, 3e-4, 1e-3, 3e-3), "LoRA": (1e-3, 3e-3, 1e-2, 3e-2)}  # where the search begins
SETTINGS = (("Full", {}), *(("LoRA", {"rank": rank, "gamma": 2.0}) for rank in (1, 4, 16, 64)))


class OutOfTime(Exception):
    """Fewer runs than were asked for; those that are done stay in the folder."""


class Missing(Exception):
    """A run that a search needs."""


def measure(
    folder: Path,
    out: Path,
    model: str = "desk",
    device: str = "cpu",
    executor: Executor | None = None,
    seconds: float = math.inf,
    tasks: Sequence[str] = TASKS,
    settings: Sequence[tuple[str, dict]] = SETTINGS,
    named: str | None = None,
) -> int:
    """Runs what is not in `folder` yet, and writes what is there to `out`; returns how many runs that are.

    All settings are searched side by side, so that an executor has work. `model`: the base as `mp.load` takes it;
    `named`: the device as the provenance says it. Raises OutOfTime when `seconds` are over before the end.
    """
    until, done = time.monotonic() + seconds, {}

    def run(points: Iterable[Point]) -> None:
        points = list(points)
        left = None if math.isinf(seconds) else max(0.0, until - time.monotonic())
        if sweep(points, folder, executor, left, device, model):
            raise OutOfTime(f"There was no time for the last of {len(set(points) | set(done))} runs.")
        done.update({each: json.loads((folder / f"{each.key}.json").read_bytes()) for each in points})

    def best(task: str, method: str, settings: dict) -> float:
        """By the protocol's search over what is done; Missing says which run it needs next."""

        def loss(lr: float) -> float:
            each = point(method, task, lr, SEARCH_SEED, **settings)
            if each not in done:
                raise Missing(each)
            return score(done[each])

        return best_rate(loss, RATES[method])[0]

    which = [(task, *setting) for task in tasks for setting in settings]
    wanted = [point(method, task, lr, SEARCH_SEED, **s) for task, method, s in which for lr in RATES[method]]
    rates: dict[int, float] = {}
    try:
        while wanted:
            run(wanted)
            wanted = []
            for i, each in enumerate(which):
                try:
                    rates[i] = best(*each)
                except Missing as missing:
                    wanted += missing.args
        run(
            point(method, task, rates[i], seed, **settings)
            for i, (task, method, settings) in enumerate(which)
            for seed in SEEDS
        )
    finally:
        if done:
            collect(done, folder, out, named, "desk")
    return len(done)


def score(row: dict) -> float:
    """What chooses: the loss on validation rows, or on the facts themselves, which are learnt by heart."""
    if row["stopped"] != "finished":
        return math.inf
    return row["loss"] if row["valid_loss"] is None else row["valid_loss"]


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
