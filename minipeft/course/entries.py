"""Which entries to train, and which directions training brings, measured once and shipped for lessons 02 and 07:

    python -m minipeft.course.entries --folder runs

Every learning rate of a mask is the best of a row, half a decade apart, on rows that are neither trained on nor
reported, with a seed of its own; the row grows until its best lies inside. A finished run has a small file in the
folder, so whoever kills the script starts it again and it goes on.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

from minipeft.course.notes import Notes, measure
from minipeft.learn.protocol import SEARCH_SEED, SEEDS, best_rate

FILE = Path(__file__).with_name("entries.json")
SHARE, STEPS, BATCH = 0.005, 60, 10
MASKS = ("largest", "smallest", "random", "gradient", "Fisher", "L1")
SIDES = {"full": (3e-4, 1e-3, 3e-3, 1e-2), "LoRA r=4": (1e-3, 3e-3, 1e-2, 3e-2), "LoRA r=16": (1e-3, 3e-3, 1e-2, 3e-2)}


def scores(model) -> dict:
    """What each mask chooses by: a name that `Masked` knows, or a score of every entry on training texts."""
    import minipeft as mp
    from minipeft.methods.masked import fisher, gradient, lasso

    task = mp.world.pirate()
    some = list(mp.batches(model, task, 4, size=8))
    return {
        "largest": "largest",
        "smallest": "smallest",
        "random": "random",
        "gradient": gradient(model, some),
        "Fisher": fisher(model, some),
        "L1": lasso(model, mp.batches(model, task, 12, size=8), penalty=0.9, lr=2e-3),
    }


def losses(tuned, validation: bool) -> float:
    """The loss on 100 rows of other texts than were trained on; those of the search are not those of the report."""
    import minipeft as mp

    return mp.evaluate(tuned, mp.world.pirate(10, 100, 91) if validation else mp.world.pirate(), n=100).loss


def masked(model, by: dict, name: str, lr: float, seed: int) -> dict:
    """One run of 60 steps in which one entry in 200 moves, those that `by[name]` scores highest."""
    import minipeft as mp

    tuned = mp.attach(model, mp.Masked(SHARE, by[name]), seed=seed)
    try:
        mp.fit(tuned, mp.world.pirate(), steps=STEPS, lr=lr, batch=BATCH, seed=seed, progress=False)
        return {"loss": losses(tuned, seed == SEARCH_SEED)}
    finally:
        tuned.detach()


def masks(notes: Notes) -> dict:
    """{mask: {"rate", "tried": {rate: validation loss}, "losses": one for each seed}}"""
    import minipeft as mp

    model, _ = mp.load("pocket")
    by, found = scores(model), {}
    for name in MASKS:

        def loss(lr: float, name=name) -> float:
            return notes.get(f"mask {name} rate {lr:g}", lambda: masked(model, by, name, lr, SEARCH_SEED))["loss"]

        rate, tried = best_rate(loss, (3e-2, 1e-1, 3e-1))
        runs = [
            notes.get(f"mask {name} seed {s}", lambda s=s, n=name, lr=rate: masked(model, by, n, lr, s)) for s in SEEDS
        ]
        found[name] = {"rate": rate, "tried": tried, "losses": [each["loss"] for each in runs]}
    return {"share": SHARE, "steps": STEPS, "untrained": losses(model, False), "masks": found}


def direction(name: str, lr: float, seed: int) -> dict:
    """One run of 60 steps: "intruders" among each linear layer's ten strongest directions, "norm" of the whole ΔW."""
    import minipeft as mp
    from minipeft.analyze.spectrum import base_weight, intruders, spectra

    method = mp.Full() if name == "full" else mp.LoRA(rank=int(name[7:]), gamma=2.0)
    tuned = mp.attach(mp.load("pocket")[0], method, seed=seed)
    mp.fit(tuned, mp.world.pirate(), steps=STEPS, lr=lr, batch=BATCH, seed=seed, progress=False)
    loss = losses(tuned, False)
    found = {path: each for path, each in spectra(tuned).items() if "layers" in path}
    new = sum(len(intruders(base_weight(tuned, path), each.matrix())) for path, each in found.items())
    norm = sum(float(each.sigma.square().sum()) for each in found.values()) ** 0.5
    return {"lr": lr, "seed": seed, "intruders": new, "norm": norm, "loss": loss, "matrices": len(found)}


def directions(notes: Notes) -> dict:
    """{side: [what `direction` found, for each rate and seed]}"""
    sides: dict[str, list[dict]] = {}
    for name, rates in SIDES.items():
        for lr, seed in product(rates, SEEDS):
            found = notes.get(f"{name} {lr:g} seed {seed}", lambda n=name, lr=lr, s=seed: direction(n, lr, s))
            sides.setdefault(name, []).append(found)
    return {"steps": STEPS, "sides": sides}


PARTS = {"directions": directions, "masks": masks}


def measured() -> dict:
    """The shipped figures, by part."""
    return json.loads(FILE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    measure(FILE, PARTS, __doc__.splitlines()[0])
