"""How many numbers does a reward need? Measured once and shipped: `python -m minipeft.course.one_bit --folder runs`.

A story that is worth 0 or 1 tells the model at most one bit, so a whole run tells it fewer bits than LoRA r=1 has
numbers. Three methods learn `happy` by policy gradient with β = 0.1, STEPS steps of BATCH stories: LoRA r=64, LoRA r=1,
and 13 numbers that move the attention's v and o matrices along random directions. Each has its own learning rate: the
one whose FRESH stories, written after training with a seed that reports nothing, have the largest reward less β times
the KL.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date
from pathlib import Path

import torch

from minipeft.attach import attach
from minipeft.course.feedback import look
from minipeft.course.notes import Notes
from minipeft.learn.plan import Plan
from minipeft.learn.policy import improve
from minipeft.learn.protocol import SEARCH_SEED, SEEDS
from minipeft.methods.lora import LoRA
from minipeft.methods.subspace import Subspace
from minipeft.whole import write_whole
from minipeft.world import load, rewards

FILE = Path(__file__).with_name("one_bit.json")
BETA, HANDFUL, STEPS, BATCH, FRESH = 0.1, 13, 12, 16, 64
METHODS = {  # {name: (method, the first rates that are tried)}
    "LoRA r=64": (LoRA(rank=64), (1e-3,)),
    "LoRA r=1": (LoRA(rank=1), (1e-2,)),
    f"{HANDFUL} numbers": (Subspace(dim=HANDFUL, projection="dense", targets=["v_proj", "o_proj"]), (1.0,)),
}


def learn(name: str, lr: float, seed: int) -> dict:
    """One run: what fresh stories are worth after it, how many numbers trained, and the mean reward of each step."""
    tuned = attach(load("pocket")[0], METHODS[name][0], seed=seed)
    trail = improve(tuned, rewards.each(rewards.happy), plan=Plan(STEPS, lr, BATCH, seed), beta=BETA, progress=False)
    found = look(tuned, seed, FRESH)
    return {
        "trainable": tuned.count().trainable,
        "stopped": trail.stopped,
        "rewards": [round(value, 4) for value in trail.rewards],
        "happy": found["happy"], "true": found["true happy"], "parses": found["parses"], "kl": found["kl"],
    }  # fmt: skip


def lost(found: dict) -> float:
    """What the run was to make small, on fresh stories: β·KL − E[R]."""
    return BETA * found["kl"] - found["happy"]


def measure(notes: Notes) -> dict:
    torch.set_num_threads(1)
    rates = {}
    for name, (_, grid) in METHODS.items():
        rates[name] = notes.best_rate(f"one bit {name}", lambda lr, name=name: lost(learn(name, lr, SEARCH_SEED)), grid)
    runs = []
    for seed in SEEDS:
        for name, lr in rates.items():
            found = notes.get(f"one bit {name} {seed}", lambda n=name, lr=lr, s=seed: learn(n, lr, s))
            runs.append({"method": name, "lr": lr, "seed": seed} | found)
    where = {"device": "CPU, 1 thread", "torch": torch.__version__, "python": platform.python_version()}
    return {"rates": rates, "runs": runs, "measured": where | {"date": date.today().isoformat()}}


def measured() -> dict:
    """What `measure` found when the course was made."""
    return json.loads(FILE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where each finished run is kept")
    folder = parser.parse_args().folder
    write_whole(FILE, json.dumps(measure(Notes(folder, lambda text: print(text, flush=True))), indent=1) + "\n")
