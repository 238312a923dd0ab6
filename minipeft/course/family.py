"""The LoRA family on equal terms, measured once and shipped: `python -m minipeft.course.family`.

Every method trains the pocket model on the same 60 batches of the pirate task. Its learning rate is the best of a row,
half a decade apart, that is widened with seed 0 until the best is not at its end; seeds 1 and 2 follow at that rate.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

from minipeft.attach import attach
from minipeft.layer import Method
from minipeft.learn.fit import evaluate, fit
from minipeft.methods.adalora import AdaLoRA, ranks
from minipeft.methods.dora import DoRA
from minipeft.methods.ia3 import IA3
from minipeft.methods.lora import LoRA
from minipeft.methods.projected import ProjectedLoRA
from minipeft.methods.select import BitFit, Full
from minipeft.methods.vera import VeRA

FILE = Path(__file__).with_name("family.json")
STEPS, SEEDS, ROWS = 60, (0, 1, 2), 200
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
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
    """Train once and score: {lr, seed, loss, trainable}; loss in nats a held-out token, None if it diverged."""
    from minipeft.world import load, pirate

    task = pirate()
    tuned = attach(load("pocket")[0], method, seed=seed)

    def callback(step, history):
        if watch is not None:
            watch(step, tuned)

    history = fit(tuned, task, steps=STEPS, lr=lr, seed=seed, callback=callback, progress=False)
    loss = evaluate(tuned, task, n=ROWS).loss if history.stopped == "finished" else None
    return {"lr": lr, "seed": seed, "loss": loss, "trainable": tuned.count().trainable}


def at_best_rate(method: Method) -> list[dict]:
    """The runs of a sweep: seed 0 over the grid, widened while the best is at an end, then the other seeds."""
    rates = list(RATES)
    runs = {lr: run(method, lr, 0) for lr in rates}

    def score(lr: float) -> float:
        return float("inf") if runs[lr]["loss"] is None else runs[lr]["loss"]

    while (best := min(rates, key=score)) in (rates[0], rates[-1]) and 1e-5 < best < 10:
        lower = best == rates[0]
        mantissa, exponent = f"{best:.0e}".split("e")  # 1 or 3 times a power of ten: half a decade down or up
        new = float(f"3e{int(exponent) - lower}" if mantissa == "1" else f"1e{int(exponent) + 1 - lower}")
        rates.insert(0, new) if lower else rates.append(new)
        runs[new] = run(method, new, 0)
    return [runs[lr] for lr in rates] + [run(method, best, seed) for seed in SEEDS[1:]]


def best_of(runs: list[dict]) -> list[dict]:
    """The runs at the best rate, one for each seed."""
    finished = [each for each in runs if each["loss"] is not None and each["seed"] == 0]
    lr = min(finished, key=lambda each: each["loss"])["lr"]
    return [each for each in runs if each["lr"] == lr]


def watch_ranks(budget: int, lr: float) -> dict:
    """AdaLoRA's rank of every layer after every fifth step, for one budget."""
    seen: dict[int, list[int]] = {}

    def watch(step, tuned):
        if step % 5 == 4 or step == 0:
            seen[step + 1] = list(ranks(tuned).values())

    result = run(AdaLoRA(rank=budget, steps=STEPS, penalty_form="peft"), lr, 0, watch)
    return result | {"steps": list(seen), "ranks": list(seen.values())}


def measure(report: Callable[[str], object] = print) -> dict:
    import torch

    from minipeft.world import load, pirate

    torch.set_num_threads(1)
    model, _ = load("pocket")
    task, started, sweeps = pirate(), time.perf_counter(), {}
    for name, method in METHODS.items():
        sweeps[name] = at_best_rate(method)
        best = best_of(sweeps[name])
        report(f"{name}: lr {best[0]['lr']:g}, {[each['loss'] for each in best]}")
    lr = best_of(sweeps["AdaLoRA 12→8"])[0]["lr"]
    layers = list(ranks(attach(load("pocket")[0], AdaLoRA(rank=1))))
    return {
        "task": f"pirate: {STEPS} steps of 16 texts, test loss over {ROWS} texts in nats a token",
        "floor": task.floor,
        "before": evaluate(model, task, n=ROWS).loss,
        "sweeps": sweeps,
        "layers": layers,
        "budgets": {str(budget): watch_ranks(budget, lr) for budget in BUDGETS},
        "measured": {
            "device": "CPU, 1 thread",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": date.today().isoformat(),
            "wall time in seconds": round(time.perf_counter() - started),
        },
    }


def measured() -> dict:
    """What `measure` found when the course was made."""
    return json.loads(FILE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    FILE.write_text(json.dumps(measure(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
