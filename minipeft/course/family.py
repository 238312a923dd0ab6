"""The LoRA family on equal terms, measured once and shipped:

    python -m minipeft.course.family --folder runs

Every method trains the pocket model on 60 batches of 16 texts of the pirate task. Its learning rate is the best of a
row, half a decade apart, on validation rows and with a seed that reports nothing; the row grows until the best lies
inside. Five other seeds report at that rate. Seed 0 runs all rates of the row besides, to be looked at: it chooses
nothing. A finished run has a small file in the folder, so whoever kills the script starts it again and it goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path

from minipeft.attach import attach
from minipeft.course.notes import Notes
from minipeft.layer import Method
from minipeft.learn.fit import evaluate, fit
from minipeft.learn.protocol import SEARCH_SEED, SEEDS, best_rate
from minipeft.methods.adalora import AdaLoRA, ranks
from minipeft.methods.dora import DoRA
from minipeft.methods.ia3 import IA3
from minipeft.methods.lora import LoRA
from minipeft.methods.projected import ProjectedLoRA
from minipeft.methods.select import BitFit, Full
from minipeft.methods.vera import VeRA
from minipeft.whole import write_whole

FILE = Path(__file__).with_name("family.json")
STEPS, ROWS = 60, 200
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # of the picture; the search begins with the three in the middle
METHODS: dict[str, Method] = {
    "full fine-tuning": Full(),
    "LoRA r=8": LoRA(rank=8),
    "LoRA r=8, gaussian A": LoRA(rank=8, init="gaussian"),
    "LoRA r=8, orthogonal A": LoRA(rank=8, init="orthogonal"),
    "PiSSA r=8": LoRA(rank=8, init="pissa"),
    "LoRA+ r=8, ratio 16": LoRA(rank=8, lr_ratio=16.0),
    "DoRA r=8": DoRA(rank=8),
    "AdaLoRA 12→8": AdaLoRA(rank=8, initial_rank=12, steps=STEPS, penalty_form="peft"),
    "AdaLoRA 12→8, penalty squared": AdaLoRA(rank=8, initial_rank=12, steps=STEPS),
    "VeRA r=256": VeRA(rank=256),
    "projected k=8, random": ProjectedLoRA(rank=8),
    "projected k=8, top": ProjectedLoRA(rank=8, basis="top"),
    "projected k=8, bottom": ProjectedLoRA(rank=8, basis="bottom"),
    "IA3": IA3(),
    "BitFit": BitFit(),
}
BUDGETS = (1, 2, 4, 8)  # AdaLoRA's average rank in the end; it starts at half as much again


def run(method: Method, lr: float, seed: int, watch: Callable | None = None) -> dict:
    """Train once and score: {lr, seed, trainable, loss}, the loss in nats a token of 200 test texts, None if it
    diverged. `SEARCH_SEED` is scored on 200 validation texts instead, under "valid"."""
    from minipeft.learn.sweep import validated
    from minipeft.world import load, pirate

    task = pirate()
    tuned = attach(load("pocket")[0], method, seed=seed)

    def callback(step, history):
        if watch is not None:
            watch(step, tuned)

    history = fit(tuned, task, steps=STEPS, lr=lr, seed=seed, callback=callback, progress=False)
    about, finished = {"lr": lr, "seed": seed, "trainable": tuned.count().trainable}, history.stopped == "finished"
    if seed == SEARCH_SEED:
        return about | {"valid": validated(tuned, "pirate") if finished else None}
    return about | {"loss": evaluate(tuned, task, n=ROWS).loss if finished else None}


def at_best_rate(name: str, notes: Notes) -> list[dict]:
    """The runs of a sweep: `SEARCH_SEED` until its best rate lies inside, seed 0 at all, the others at the best."""

    def once(lr: float, seed: int) -> dict:
        return notes.get(f"{name} rate {lr:g} seed {seed}", lambda: run(METHODS[name], lr, seed))

    best, tried = best_rate(lambda lr: once(lr, SEARCH_SEED)["valid"], RATES[1:-1])
    row = [once(lr, SEEDS[0]) for lr in sorted({*RATES, *tried})]
    return [once(lr, SEARCH_SEED) for lr in tried] + row + [once(best, seed) for seed in SEEDS[1:]]


def best_of(runs: list[dict]) -> list[dict]:
    """The runs that report at the best rate, in the order of their seeds."""
    tried = {each["lr"]: each["valid"] for each in runs if each["seed"] == SEARCH_SEED and each["valid"] is not None}
    lr = min(tried, key=tried.get)
    reported = (each for each in runs if each["lr"] == lr and each["seed"] != SEARCH_SEED)
    return sorted(reported, key=lambda each: each["seed"])


def watch_ranks(budget: int, lr: float) -> dict:
    """AdaLoRA's rank of every layer after every fifth step, for one budget."""
    seen: dict[int, list[int]] = {}

    def watch(step, tuned):
        if step % 5 == 4 or step == 0:
            seen[step + 1] = list(ranks(tuned).values())

    result = run(AdaLoRA(rank=budget, steps=STEPS, penalty_form="peft"), lr, 0, watch)
    return result | {"steps": list(seen), "ranks": list(seen.values())}


def measure(notes: Notes) -> dict:
    import torch

    from minipeft.world import load, pirate

    torch.set_num_threads(1)
    task = pirate()
    sweeps = {name: at_best_rate(name, notes) for name in METHODS}
    lr = best_of(sweeps["AdaLoRA 12→8"])[0]["lr"]
    pruned = {str(n): notes.get(f"budget {n} rate {lr:g}", lambda n=n: watch_ranks(n, lr)) for n in BUDGETS}
    before = evaluate(load("pocket")[0], task, n=ROWS).loss
    return {
        "task": f"pirate: {STEPS} steps of 16 texts, test loss over {ROWS} texts in nats a token",
        "floor": task.floor,
        "before": before,
        "sweeps": sweeps,
        "layers": list(ranks(attach(load("pocket")[0], AdaLoRA(rank=1)))),
        "budgets": pruned,
        "measured": {
            "device": "CPU, 1 thread",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": date.today().isoformat(),
        },
    }


def measured() -> dict:
    """What `measure` found when the course was made."""
    return json.loads(FILE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where each finished run is kept")
    notes = Notes(parser.parse_args().folder, lambda text: print(text, flush=True))
    write_whole(FILE, json.dumps(measure(notes), indent=1, ensure_ascii=False) + "\n")
