"""How many numbers does a reward need? Measured once and shipped: `python -m minipeft.course.one_bit --folder runs`.

A story that is worth 0 or 1 tells the model at most one bit. A run of STEPS steps of BATCH stories tells it at most
STEPS·BATCH bits, which is fewer than LoRA of rank 1 has numbers. Every method of METHODS learns happy endings by policy
gradient under that budget: LoRA on every linear layer, and HANDFUL numbers that move the attention's v and o matrices
along random directions. Each has its own learning rate: the one whose fresh stories, written with a seed that reports
nothing, are worth most, reward less β times the KL to the base.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from minipeft.attach import attach
from minipeft.course.feedback import BATCH, STEPS, look
from minipeft.course.notes import Notes, verdict
from minipeft.course.notes import measure as measure_parts
from minipeft.learn.plan import Plan
from minipeft.learn.policy import improve
from minipeft.learn.protocol import SEARCH_SEED, SEEDS, best_rate
from minipeft.methods.lora import LoRA
from minipeft.methods.subspace import Subspace
from minipeft.world import load, rewards

FILE = Path(__file__).with_name("one_bit.json")
BETA, HANDFUL, MATTERS = 0.1, 13, 0.05
METHODS = {  # {name: (method, the first rates that are tried)}
    f"{HANDFUL} numbers": (Subspace(dim=HANDFUL, projection="dense", targets=["v_proj", "o_proj"]), (1.0, 3.0)),
    "LoRA r=1": (LoRA(rank=1), (1e-2,)),
    "LoRA r=8": (LoRA(rank=8), (3e-3, 1e-2)),
    "LoRA r=64": (LoRA(rank=64), (1e-3, 3e-3)),
}


def learn(name: str, lr: float, seed: int) -> dict:
    """One run: what fresh stories are worth after it, how many numbers trained, and the mean reward of each step."""
    tuned = attach(load("pocket")[0], METHODS[name][0], seed=seed)
    trail = improve(tuned, rewards.each(rewards.happy), plan=Plan(STEPS, lr, BATCH, seed), beta=BETA, progress=False)
    try:
        found = look(tuned, seed)
    except ValueError:  # probabilities that are no numbers
        found = dict.fromkeys(("happy", "true happy", "parses", "kl"))
    return {
        "trainable": tuned.count().trainable,
        "stopped": trail.stopped,
        "rewards": [round(value, 4) for value in trail.rewards],
        "happy": found["happy"], "true": found["true happy"], "parses": found["parses"], "kl": found["kl"],
    }  # fmt: skip


def worth(found: dict) -> float:
    """What the run was to make large, on fresh stories: E[R] − β·KL; −∞ for a run that diverged."""
    return -math.inf if found["kl"] is None else found["happy"] - BETA * found["kl"]


def measure(notes: Notes) -> dict:
    rates, searched, runs = {}, {}, []
    for name, (_, grid) in METHODS.items():

        def loss(lr: float, name: str = name) -> float:
            return -worth(notes.get(f"{name} rate {lr:g}", lambda: learn(name, lr, SEARCH_SEED)))

        rates[name], tried = best_rate(loss, grid)
        searched[name] = {f"{lr:g}": None if math.isinf(value) else round(-value, 4) for lr, value in tried.items()}
    for seed in SEEDS:
        for name, lr in rates.items():
            found = notes.get(f"{name} {seed}", lambda n=name, lr=lr, s=seed: learn(n, lr, s))
            runs.append({"method": name, "lr": lr, "seed": seed} | found)
    return {"rates": rates, "searched": searched, "runs": runs}


def against(found: dict, one: str, other: str) -> tuple[list[float], list[float], str]:
    """(what each seed's run is worth for one method, for the other, the verdict on "one is worth more")."""
    ours, theirs = ([worth(run) for run in found["runs"] if run["method"] == name] for name in (one, other))
    return ours, theirs, verdict(ours, theirs, MATTERS)


def measured() -> dict:
    """What `measure` found when the course was made."""
    return json.loads(FILE.read_text(encoding="utf-8"))["one bit"]


if __name__ == "__main__":
    measure_parts(FILE, {"one bit": measure}, __doc__.splitlines()[0])
