"""Which entries to train, and which directions training brings, measured once and shipped for lessons 02 and 07:

    python -m minipeft.course.entries --folder runs

Every learning rate of a mask is the best of a row, half a decade apart, on rows that are neither trained on nor
reported, with a seed of its own; the row grows until its best lies inside. A finished run has a small file in the
folder, so whoever kills the script starts it again and it goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from minipeft.course.notes import Notes
from minipeft.learn.protocol import SEARCH_SEED, SEEDS
from minipeft.whole import write_whole

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


def masks(notes: Notes) -> dict:
    """{mask: {"rate", "tried": {rate: validation loss}, "losses": one for each seed}}"""
    import minipeft as mp

    model, _ = mp.load("pocket")
    by = scores(model)

    def run(name: str, lr: float, seed: int) -> float:
        tuned = mp.attach(model, mp.Masked(SHARE, by[name]), seed=seed)
        try:
            mp.fit(tuned, mp.world.pirate(), steps=STEPS, lr=lr, batch=BATCH, seed=seed, progress=False)
            return losses(tuned, seed == SEARCH_SEED)
        finally:
            tuned.detach()

    found = {}
    for name in MASKS:
        lr = notes.best_rate(f"mask {name}", lambda lr, name=name: run(name, lr, SEARCH_SEED), (3e-2, 1e-1, 3e-1))
        kept = notes.folder.glob(f"mask_{name}_rate_*")
        tried = {float(path.stem.split("_")[-1]): json.loads(path.read_text())["loss"] for path in kept}
        runs = [
            notes.get(f"mask {name} seed {s}", lambda s=s, name=name, lr=lr: {"loss": run(name, lr, s)}) for s in SEEDS
        ]
        found[name] = {"rate": lr, "tried": dict(sorted(tried.items())), "losses": [each["loss"] for each in runs]}
    return {"share": SHARE, "steps": STEPS, "untrained": losses(model, False), "masks": found}


def directions(notes: Notes) -> dict:
    """{side: [{"lr", "seed", "intruders" among each linear layer's ten strongest, "norm" of ΔW, "loss"}]}"""
    import minipeft as mp
    from minipeft.analyze.spectrum import base_weight, intruders, spectra

    def run(name: str, lr: float, seed: int) -> dict:
        method = mp.Full() if name == "full" else mp.LoRA(rank=int(name[7:]), gamma=2.0)
        tuned = mp.attach(mp.load("pocket")[0], method, seed=seed)
        mp.fit(tuned, mp.world.pirate(), steps=STEPS, lr=lr, batch=BATCH, seed=seed, progress=False)
        loss = losses(tuned, False)
        found = {path: each for path, each in spectra(tuned).items() if "layers" in path}
        new = sum(len(intruders(base_weight(tuned, path), each.matrix())) for path, each in found.items())
        norm = sum(float(each.sigma.square().sum()) for each in found.values()) ** 0.5
        return {"lr": lr, "seed": seed, "intruders": new, "norm": norm, "loss": loss, "matrices": len(found)}

    sides = {
        name: [
            notes.get(f"{name} {lr:g} seed {s}", lambda n=name, lr=lr, s=s: run(n, lr, s))
            for lr in rates
            for s in SEEDS[:3]
        ]
        for name, rates in SIDES.items()
    }
    return {"steps": STEPS, "sides": sides}


PARTS = {"directions": directions, "masks": masks}


def measured() -> dict:
    """The shipped figures, by part."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def measure(notes: Notes, parts) -> Iterator[tuple[str, dict]]:
    import torch

    threads = torch.get_num_threads()
    on = f"CPU, {threads} thread{'s' * (threads > 1)} ({platform.machine()}), torch {torch.__version__}"
    for name in parts:
        yield name, PARTS[name](notes) | {"measured": f"{date.today()}, {on}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where each finished run is kept")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    options = parser.parse_args()
    for name, found in measure(Notes(options.folder, lambda text: print(text, flush=True)), options.parts):
        whole = measured() if FILE.exists() else {}
        write_whole(FILE, json.dumps(whole | {name: found}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
