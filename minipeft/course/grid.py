"""The runs of the atlas: every method and size of the lessons' sliders, and what the ledger compares.

    python -m minipeft.course.grid --folder runs --out minipeft/course/atlas.parquet --workers 2   # some hours

Where a curve over the rate is shown, three seeds run every rate from a least to a largest one. Under the protocol
(`minipeft.learn.protocol`) SEARCH_SEED runs the best rate and those beside it, validation rows chose among them, and
SEEDS run the best. Where the rate itself is what is asked for, each of VOTERS chooses one, a quarter of a decade apart.
The best rates below are what `best_rate` found; a test asks the shipped runs whether it is so.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor

from minipeft.learn.protocol import SEARCH_SEED, SEEDS, VOTERS, half_decade, quarter_decade
from minipeft.learn.sweep import Point, collect, point, sweep

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0)
LANGUAGE, FACTS = ("pirate", "flip", "cipher"), "facts(64)"
ALL = (*LANGUAGE, FACTS)
FRONT = ("pirate", "flip", "forecast")  # for what stands before the text
MONDAY = [328, 406, 378, 11]  # "late on monday ,"


def _lora(rank: int, **settings) -> tuple[str, dict]:
    return "LoRA", {"rank": rank, "gamma": 2.0, **settings}


# (method, settings), tasks, the best rate for each, least and largest rate of the curves
SLIDERS = (
    *(
        (_lora(r), ALL, best, 1e-3, 1e-1)
        for r, *best in (
            (1, 3e-2, 1e-2, 3e-2, 1e-2), (2, 3e-2, 1e-2, 3e-2, 1e-2), (4, 3e-2, 1e-2, 1e-2, 1e-2),
            (8, 1e-2, 1e-2, 1e-2, 3e-3), (16, 1e-2, 3e-3, 3e-2, 3e-3), (32, 1e-2, 3e-3, 1e-2, 3e-3),
            (64, 3e-3, 3e-3, 3e-3, 1e-3),
        )
    ),
    (_lora(1), ("forecast",), (3e-2,), 3e-3, 1e-1),
    (("Full", {}), (*ALL, "forecast", "answer"), (3e-3, 3e-3, 3e-3, 1e-3, 3e-3, 1e-3), 3e-4, 3e-2),
    (("DoRA", {"rank": 8, "gamma": 2.0}), ALL, (1e-2, 1e-2, 1e-2, 1e-2), 1e-3, 3e-2),
    (("BitFit", {}), (*ALL, "answer"), (3e-2, 1e-1, 1.0, 3e-2, 3e-2), 3e-3, 3.0),
    (("Softmax", {}), (*ALL, "answer"), (1e-2, 1e-2, 3e-2, 3e-3, 1e-2), 1e-3, 1e-1),
    (("IA3", {}), ALL, (3e-1, 3e-2, 1.0, 3e-1), 1e-2, 3.0),
    (("VeRA", {}), ("pirate", FACTS), (1e-1, 1e-1), 1e-2, 3e-1),
    *(
        (("Subspace", {"dim": k}), ("flip",), best, 1e-1, 3.0)
        for k, *best in (
            (4, 1.0), (16, 10.0), (64, 3.0), (256, 1.0),
        )
    ),
    *(
        (("Adapter", {"bottleneck": m}), LANGUAGE, best, 3e-3 if m <= 4 else 1e-3, 1e-1)
        for m, *best in (
            (1, 3e-2, 3e-2, 1e-1), (2, 3e-2, 1e-2, 1e-1), (4, 3e-2, 1e-2, 1e-1), (8, 3e-2, 1e-2, 1e-1),
            (16, 1e-2, 3e-3, 1e-1), (32, 1e-2, 3e-3, 3e-2), (64, 1e-2, 3e-3, 1e-2),
        )
    ),
    *(
        (("Adapter", {"bottleneck": m}), (FACTS,), best, 1e-3, 1e-1)
        for m, *best in (
            (1, 1e-2), (4, 1e-2), (16, 1e-2), (64, 3e-3),
        )
    ),
    # where an adapter sits, and how many places share one
    (("Adapter", {"bottleneck": 16, "placement": "pfeiffer"}), ("pirate",), (3e-2,), 3e-3, 3e-1),
    (("Adapter", {"bottleneck": 16, "placement": "parallel"}), ("pirate",), (1e-1,), 3e-3, 3e-1),
    (("Adapter", {"bottleneck": 8, "share_within": True}), ("pirate",), (3e-2,), 3e-3, 3e-1),
    (("Adapter", {"bottleneck": 8, "share": 4, "share_within": True}), ("pirate",), (3e-2,), 3e-3, 3e-1),
    (("Adapter", {"bottleneck": 64, "share": 4, "share_within": True}), ("pirate",), (1e-2,), 3e-3, 3e-1),
    # what stands before the text
    *(
        (("PromptTuning", {"length": n}), FRONT, best, 1e-2, 1.0)
        for n, *best in (
            (1, 1e-1, 3e-1, 3e-1), (4, 1e-1, 3e-1, 1e-1), (8, 1e-1, 1e-2, 3e-2), (16, 3e-2, 3e-2, 3e-2),
        )
    ),
    *(
        (("PrefixTuning", {"length": n}), FRONT, best, 3e-2, 3.0)
        for n, *best in (
            (1, 1.0, 3e-1, 3e-1), (4, 3e-1, 3e-1, 3e-1), (8, 3e-1, 1.0, 3e-1), (16, 3e-1, 3e-1, 3e-1),
        )
    ),
    (("PromptTuning", {"length": 8, "init": "random"}), ("forecast",), (3e-1,), 3e-2, 1.0),
    (("PTuning", {"length": 8}), FRONT, (1e-2, 3e-3, 3e-3), 1e-3, 3e-1),
    (("PTuning", {"length": 8, "generator": "lstm"}), ("forecast",), (3e-3,), 1e-3, 1e-1),
    (("PrefixTuning", {"length": 8, "init": MONDAY}), ("pirate",), (3e-1,), 3e-2, 3.0),
    (("PrefixTuning", {"length": 8, "hidden": 64}), ("pirate",), (1e-2,), 3e-3, 3e-1),
    # equal numbers in attention and in the MLPs, many and few
    (_lora(24, targets="attention"), ("pirate", FACTS), (1e-2, 3e-3), 1e-3, 1e-1),
    (_lora(16, targets="mlp"), ("pirate", FACTS), (1e-2, 3e-3), 1e-3, 1e-1),
    (_lora(3, targets="attention"), ("pirate", FACTS), (3e-2, 1e-2), 1e-3, 1e-1),
    (_lora(2, targets="mlp"), ("pirate", FACTS), (3e-2, 1e-2), 1e-3, 1e-1),
)  # fmt: skip
USUAL = (Point.steps, Point.batch)
BATCHES = ((120, 5), (15, 40))  # 600 texts of pirate in other batches than 10: (steps, texts)
BATCHED = (  # (method, settings), the best rate for each of BATCHES, the least of five
    (_lora(16), (1e-2, 1e-2), 1e-3),
    (("Full", {}), (3e-3, 1e-2), 3e-4),
)
LENGTHS = {  # LoRA r=16 and Full on pirate for other steps than 60: the best rate of each
    15: (1e-2, 1e-2), 30: (1e-2, 1e-2), 120: (1e-2, 3e-3), 240: (3e-3, 1e-3),
}  # fmt: skip
GAMMAS = {  # LoRA: {task: {rank: {γ: the best rate}}}
    "pirate": {
        1: {1/8: 1e-1, 1/4: 1e-1, 1/2: 3e-2, 1.0: 3e-2, 2.0: 3e-2, 4.0: 3e-2, 8.0: 1e-2, 16.0: 1e-2},
        2: {1/8: 1e-1, 1/4: 1e-1, 1/2: 3e-2, 1.0: 3e-2, 2.0: 3e-2, 4.0: 1e-2, 8.0: 1e-2, 16.0: 1e-2},
        4: {1/8: 1e-1, 1/4: 3e-2, 1/2: 3e-2, 1.0: 3e-2, 2.0: 3e-2, 4.0: 1e-2, 8.0: 1e-2, 16.0: 1e-2},
        8: {1/8: 3e-2, 1/4: 3e-2, 1/2: 3e-2, 1.0: 3e-2, 2.0: 1e-2, 4.0: 1e-2, 8.0: 1e-2, 16.0: 3e-3},
        16: {1/8: 3e-2, 1/4: 3e-2, 1/2: 3e-2, 1.0: 1e-2, 2.0: 1e-2, 4.0: 1e-2, 8.0: 3e-3, 16.0: 3e-3},
        32: {1/8: 3e-2, 1/4: 3e-2, 1/2: 1e-2, 1.0: 1e-2, 2.0: 1e-2, 4.0: 3e-3, 8.0: 3e-3, 16.0: 3e-3},
        64: {1/8: 3e-2, 1/4: 1e-2, 1/2: 1e-2, 1.0: 1e-2, 2.0: 3e-3, 4.0: 3e-3, 8.0: 3e-3, 16.0: 1e-3},
    },
    "flip": {
        1: {1/8: 3e-2, 1/2: 3e-2, 2.0: 1e-2, 8.0: 1e-2, 16.0: 3e-3},
        4: {1/8: 3e-2, 1/2: 1e-2, 2.0: 1e-2, 8.0: 3e-3, 16.0: 3e-3},
        16: {1/8: 1e-2, 1/2: 1e-2, 2.0: 3e-3, 8.0: 3e-3, 16.0: 1e-3},
        64: {1/8: 1e-2, 1/2: 3e-3, 2.0: 3e-3, 8.0: 1e-3, 16.0: 3e-4},
    },
    "cipher": {
        1: {1/8: 1e-1, 1/2: 3e-2, 2.0: 3e-2, 8.0: 1e-2, 16.0: 1e-2},
        4: {1/8: 3e-1, 1/2: 1e-1, 2.0: 1e-2, 8.0: 3e-2, 16.0: 1e-2},
        16: {1/8: 3e-2, 1/2: 3e-2, 2.0: 3e-2, 8.0: 1e-2, 16.0: 3e-3},
        64: {1/8: 1e-1, 1/2: 1e-2, 2.0: 3e-3, 8.0: 1e-3, 16.0: 1e-3},
    },
    FACTS: {
        1: {1/8: 1e-1, 1/2: 3e-2, 2.0: 1e-2, 8.0: 1e-2, 16.0: 3e-3},
        4: {1/8: 3e-2, 1/2: 1e-2, 2.0: 1e-2, 8.0: 3e-3, 16.0: 3e-3},
        16: {1/8: 1e-2, 1/2: 1e-2, 2.0: 3e-3, 8.0: 1e-3, 16.0: 1e-3},
        64: {1/8: 1e-2, 1/2: 3e-3, 2.0: 1e-3, 8.0: 3e-4, 16.0: 3e-4},
    },
}  # fmt: skip
VOTES = (  # ((method, settings), task, (steps, texts a step), the half decade that each of VOTERS chose)
    (("Full", {}), "pirate", (15, 10), (1e-2, 1e-2, 1e-2, 3e-3, 1e-2)),
    (_lora(16), "pirate", (15, 10), (1e-2, 1e-2, 1e-2, 1e-2, 1e-2)),
    (("Full", {}), "pirate", (30, 10), (3e-3, 1e-2, 1e-2, 3e-3, 3e-3)),
    (_lora(16), "pirate", (30, 10), (1e-2, 1e-2, 1e-2, 1e-2, 1e-2)),
    (("Full", {}), "pirate", USUAL, (3e-3, 3e-3, 3e-3, 3e-3, 3e-3)),
    (_lora(4), "pirate", USUAL, (3e-2, 1e-2, 1e-2, 1e-2, 1e-2)),
    (_lora(4, gamma=8.0), "pirate", USUAL, (1e-2, 1e-2, 1e-2, 1e-2, 1e-2)),
    (_lora(16, gamma=1/2), "pirate", USUAL, (3e-2, 3e-2, 3e-2, 3e-2, 3e-2)),
    (_lora(16), "pirate", USUAL, (1e-2, 1e-2, 1e-2, 1e-2, 1e-2)),
    (_lora(16, gamma=8.0), "pirate", USUAL, (3e-3, 3e-3, 3e-3, 3e-3, 3e-3)),
    (_lora(64, gamma=1/8), "pirate", USUAL, (3e-2, 3e-2, 3e-2, 3e-2, 3e-2)),
    (_lora(64, gamma=1/2), "pirate", USUAL, (1e-2, 1e-2, 1e-2, 1e-2, 1e-2)),
    (_lora(64), "pirate", USUAL, (3e-3, 3e-3, 3e-3, 3e-3, 3e-3)),
    (("Full", {}), "pirate", (120, 10), (3e-3, 3e-3, 3e-3, 3e-3, 3e-3)),
    (_lora(16), "pirate", (120, 10), (1e-2, 1e-2, 1e-2, 1e-2, 1e-2)),
    (("Full", {}), "flip", USUAL, (1e-3, 3e-3, 1e-3, 3e-3, 1e-3)),
    (_lora(16), "flip", USUAL, (1e-2, 3e-3, 3e-3, 3e-3, 3e-3)),
    (("Full", {}), "cipher", USUAL, (3e-3, 1e-2, 3e-3, 3e-2, 3e-3)),
    (_lora(16), "cipher", USUAL, (3e-2, 3e-2, 1e-2, 1e-2, 1e-2)),
    (("Full", {}), FACTS, USUAL, (3e-3, 1e-3, 1e-3, 3e-3, 1e-3)),
    (_lora(16), FACTS, USUAL, (3e-3, 3e-3, 3e-3, 3e-3, 3e-3)),
)  # fmt: skip
EQUAL = ((_lora(5, targets="attention"), 1e-2), (_lora(20, targets="attention"), 3e-3))  # on facts, for the ledger
ALPHA, FIXED = 8, 1e-2  # γ = α/r at one rate, which every γ is run at too
CAPACITY = (64, 128, 256, 512)  # facts to learn by heart, each shown 500 times


def searched() -> list[tuple[str, dict, str, tuple[int, int], float]]:
    """(method, settings, task, (steps, texts a step), the best rate) of all that is measured under the protocol."""
    found = [(which, t, USUAL, lr) for which, names, best, *_ in SLIDERS for t, lr in zip(names, best, strict=True)]
    found += [(which, "pirate", each, lr) for which, best, _ in BATCHED for each, lr in zip(BATCHES, best, strict=True)]
    found += [
        (which, "pirate", (steps, Point.batch), lr)
        for steps, best in LENGTHS.items()
        for (which, *_), lr in zip(BATCHED, best, strict=True)
    ]
    found += [
        (("LoRA", {"rank": rank, "gamma": gamma}), task, USUAL, lr)
        for task, ranks in GAMMAS.items()
        for rank, each in ranks.items()
        for gamma, lr in each.items()
    ]
    found += [(which, FACTS, USUAL, lr) for which, lr in EQUAL]
    return [(*which, *rest) for which, *rest in found]


def beside(best: float, settings: dict) -> list[float]:
    """The rates that SEARCH_SEED runs: the best and those beside it; for LoRA from one more below, lest the search end
    among rates that are all unsteady, to FIXED or beyond."""
    least, largest = (half_decade(best, up) for up in (False, True))
    if "gamma" in settings:
        least, largest = min(half_decade(least, False), FIXED), max(largest, FIXED)
    return [lr for lr in RATES if least <= lr <= largest]


def grid(seeds: int = 3) -> list[Point]:
    """The curves seed by seed, so that every prefix is of use; the long runs of LoRA in the MLPs' last layers, which
    show every fact 500 times and fill a small rank; and what is measured under the protocol."""
    points = []
    for seed in range(seeds):
        for (method, settings), names, _, least, largest in SLIDERS:
            rates = [lr for lr in RATES if least <= lr <= largest]
            points += [point(method, task, lr, seed, **settings) for task in names for lr in rates]
        for (method, settings), _, least in BATCHED:
            rates = RATES[RATES.index(least) :][:5]
            points += [point(method, "pirate", lr, seed, *shape, **settings) for shape in BATCHES for lr in rates]
    for method, settings, task, shape, best in searched():
        points += [point(method, task, lr, SEARCH_SEED, *shape, **settings) for lr in beside(best, settings)]
        points += [point(method, task, best, seed, *shape, **settings) for seed in SEEDS]
    for (method, settings), task, shape, votes in VOTES:
        for seed, best in zip(VOTERS, votes, strict=True):
            near = [step(best, up) for step in (half_decade, quarter_decade) for up in (False, True)]
            points += [point(method, task, lr, seed, *shape, **settings) for lr in (best, *near)]
    for seed in SEEDS:
        points += [point("LoRA", "pirate", FIXED, seed, rank=rank, gamma=ALPHA / rank) for rank in GAMMAS["pirate"]]
        for rank in (1, 4) if seed < 2 else (1,):
            name, settings = _lora(rank, targets=["down_proj"])
            points += [point(name, f"facts({n})", 3e-2, seed, 2000, n // 4, "linear", **settings) for n in CAPACITY]
    return list(dict.fromkeys(points))


def _end_with_parent() -> None:
    """In a worker: a sweep that is killed leaves no process behind, which would wait for work for ever."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, help="where each finished run is kept")
    parser.add_argument("--out", help="the Parquet file to write when all runs are there")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--seconds", type=float, help="begin no new run after this long")
    options = parser.parse_args()
    points = grid(options.seeds)
    if options.workers > 1:
        context = multiprocessing.get_context("spawn")  # a fork of a process that ran torch's threads can hang
        with ProcessPoolExecutor(options.workers, context, _end_with_parent) as executor:
            missing = sweep(points, options.folder, executor, options.seconds)
    else:
        missing = sweep(points, options.folder, seconds=options.seconds)
    print(f"{len(points) - missing} of {len(points)} runs are in {options.folder}")
    if options.out and not missing:
        print(f"{options.out}: {collect(points, options.folder, options.out):,} bytes")


if __name__ == "__main__":
    main()
