"""What the atlas holds: methods, sizes, tasks, learning rates and seeds.

    points = grid()     # for `sweep.sweep`, seed by seed
    searched()          # what stands under the protocol, and the rates that were tried
"""

from __future__ import annotations

from minipeft.learn.protocol import SEARCH_SEED, SEEDS
from minipeft.learn.sweep import Point, point

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
LANGUAGE, FACTS = ("pirate", "flip", "cipher"), "facts(64)"
ALL = (*LANGUAGE, FACTS)
FRONT = ("pirate", "flip", "forecast")  # for what stands before the text
MONDAY = [328, 406, 378, 11]  # "late on monday ,"


def _lora(rank: int, **settings) -> tuple[str, dict]:
    return "LoRA", {"rank": rank, "gamma": 2.0, **settings}


# (method, settings), tasks, least and largest learning rate: chosen so that the best is not the least or the largest
SLIDERS = (
    *((_lora(r), ALL, 1e-3, 1e-1) for r in (1, 2, 4, 8, 16, 32, 64)),
    (_lora(1), ("forecast",), 3e-3, 1e-1),
    (("Full", {}), (*ALL, "forecast", "answer"), 3e-4, 3e-2),
    (("DoRA", {"rank": 8, "gamma": 2.0}), ALL, 1e-3, 3e-2),
    (("BitFit", {}), (*ALL, "answer"), 3e-3, 3.0),
    (("Softmax", {}), (*ALL, "answer"), 1e-3, 1e-1),
    (("IA3", {}), ALL, 1e-2, 3.0),
    (("VeRA", {}), ("pirate", FACTS), 1e-2, 3e-1),
    *((("Subspace", {"dim": k}), ("flip",), 1e-1, 3.0) for k in (4, 16, 64, 256)),
    *((("Adapter", {"bottleneck": m}), LANGUAGE, 3e-3 if m <= 4 else 1e-3, 1e-1) for m in (1, 2, 4, 8, 16, 32, 64)),
    *((("Adapter", {"bottleneck": m}), (FACTS,), 1e-3, 1e-1) for m in (1, 4, 16, 64)),
    # where an adapter sits, and how many places share one
    *(
        (("Adapter", {"bottleneck": m, **settings}), ("pirate",), 3e-3, 3e-1)
        for m, settings in (
            (16, {"placement": "pfeiffer"}),
            (16, {"placement": "parallel"}),
            (8, {"share_within": True}),
            (8, {"share": 4, "share_within": True}),
            (64, {"share": 4, "share_within": True}),
        )
    ),
    *((("PromptTuning", {"length": n}), FRONT, 1e-2, 1.0) for n in (1, 4, 8, 16)),
    *((("PrefixTuning", {"length": n}), FRONT, 3e-2, 3.0) for n in (1, 4, 8, 16)),
    # what they begin from, and what writes them
    (("PromptTuning", {"length": 8, "init": "random"}), ("forecast",), 3e-2, 1.0),
    (("PTuning", {"length": 8}), FRONT, 1e-3, 3e-1),
    (("PTuning", {"length": 8, "generator": "lstm"}), ("forecast",), 1e-3, 1e-1),
    (("PrefixTuning", {"length": 8, "init": MONDAY}), ("pirate",), 3e-2, 3.0),
    (("PrefixTuning", {"length": 8, "hidden": 64}), ("pirate",), 3e-3, 3e-1),
    # equal numbers in attention and in the MLPs, many and few
    *(
        (_lora(r, targets=where), ("pirate", FACTS), 1e-3, 1e-1)
        for where, r in (("attention", 24), ("mlp", 16), ("attention", 3), ("mlp", 2))
    ),
)
BATCHES = ((120, 5), (15, 40))  # 600 texts in other batches than 10
CAPACITY = (64, 128, 256, 512)  # facts to learn by heart


# Under the protocol: SEARCH_SEED runs all rates from the first to the last, and validation rows chose the one between,
# which SEEDS run. 0.01 is among all rates, to compare at.
GAMMAS = {  # LoRA on pirate: {rank: {γ: (least, best, largest rate)}}
    1: {1/8: (1e-2, 1e-1, 3e-1), 1/2: (1e-2, 3e-2, 1e-1), 2.0: (1e-2, 3e-2, 1e-1), 8.0: (3e-3, 1e-2, 3e-2),
        16.0: (3e-3, 1e-2, 3e-2)},
    4: {1/8: (1e-2, 1e-1, 3e-1), 1/2: (1e-2, 3e-2, 1e-1), 2.0: (3e-3, 3e-2, 1e-1), 8.0: (1e-3, 1e-2, 3e-2),
        16.0: (1e-3, 1e-2, 3e-2)},
    16: {1/8: (1e-2, 3e-2, 1e-1), 1/2: (1e-2, 3e-2, 1e-1), 2.0: (3e-3, 1e-2, 3e-2), 8.0: (1e-3, 3e-3, 1e-2),
         16.0: (3e-4, 3e-3, 1e-2)},
    64: {1/8: (1e-2, 3e-2, 1e-1), 1/2: (3e-3, 1e-2, 3e-2), 2.0: (1e-3, 3e-3, 1e-2), 8.0: (3e-4, 3e-3, 1e-2),
         16.0: (3e-4, 1e-3, 1e-2)},
}  # fmt: skip
CHECKED = (  # what the ledger compares as well: (method, settings), {task: (least, best, largest rate)}
    (("Full", {}), {"pirate": (1e-3, 3e-3, 1e-2)}),
    (_lora(2), {FACTS: (3e-3, 1e-2, 3e-2)}),
    (_lora(8), {FACTS: (1e-3, 3e-3, 1e-2)}),
    (_lora(5, targets="attention"), {FACTS: (3e-3, 1e-2, 3e-2)}),
    (_lora(20, targets="attention"), {FACTS: (1e-3, 3e-3, 1e-2)}),
)
ALPHA, FIXED = 8, 1e-2  # γ = α/r at one rate


def searched() -> list[tuple[str, dict, str, tuple[float, float, float]]]:
    """(method, settings, task, (least, best, largest rate)) of all that was measured under the protocol."""
    gammas = [("LoRA", {"rank": r, "gamma": g}, "pirate", rates) for r in GAMMAS for g, rates in GAMMAS[r].items()]
    return gammas + [(*which, task, rates) for which, each in CHECKED for task, rates in each.items()]


def grid(seeds: int = 3) -> list[Point]:
    """The runs of the atlas, seed by seed: every method and size of the lessons' sliders, 60 steps of 10 texts, at
    learning rates a factor of three apart; pirate in other batches; for the first two seeds, long runs of LoRA in
    the MLPs' last layers, which show every fact 500 times and fill a small rank; and what is measured under the
    protocol."""
    points = []
    for seed in range(seeds):
        for (method, settings), names, least, largest in SLIDERS:
            rates = [lr for lr in RATES if least <= lr <= largest]
            points += [point(method, task, lr, seed, **settings) for task in names for lr in rates]
        for (method, settings), least in ((_lora(16), 1e-3), (("Full", {}), 3e-4)):
            rates = RATES[RATES.index(least) :][:5]
            points += [point(method, "pirate", lr, seed, *shape, **settings) for shape in BATCHES for lr in rates]
        if seed < 2:
            for rank in (1, 4):
                name, settings = _lora(rank, targets=["down_proj"])
                points += [point(name, f"facts({n})", 3e-2, seed, 2000, n // 4, "linear", **settings) for n in CAPACITY]
    for method, settings, task, (least, best, largest) in searched():
        tried = [lr for lr in RATES if least <= lr <= largest]
        points += [point(method, task, lr, SEARCH_SEED, **settings) for lr in tried]
        points += [point(method, task, best, seed, **settings) for seed in SEEDS]
    for seed in SEEDS:
        points += [point("LoRA", "pirate", FIXED, seed, rank=rank, gamma=ALPHA / rank) for rank in GAMMAS]
    return list(dict.fromkeys(points))
