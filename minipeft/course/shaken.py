"""Real reviews under small changes, measured once and shipped: `python -m minipeft.course.shaken`.

MiniLM with LoRA r=8 and a new classifier learns 192 film snippets of at most 16 words: as they are, with a copy of
each whose words are Roget's neighbours, with a copy said another way by rule, or with FGM. Then 100 test snippets are
asked as they are and under three attacks: synonyms for every replaceable word, FGM, and PGD of five steps. A random
shift as long as theirs is the control. All trainings have one learning rate, chosen for the plain one with seed 10 on
validation rows from a grid, half a decade apart, that grows. Seeds 0 to 4 draw rows, their order and initial values.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from datetime import date
from functools import cache, partial
from pathlib import Path

import torch

from minipeft.attach import attach
from minipeft.course.teaching import SEEDS, SELECT, best_rate
from minipeft.learn.fit import evaluate, fit
from minipeft.learn.robust import Adversarial, under_attack
from minipeft.methods.lora import LoRA
from minipeft.methods.select import Softmax
from minipeft.whole import write_whole
from minipeft.world.base import load
from minipeft.world.real import reviews
from minipeft.world.tasks import Task
from minipeft.world.words import augmented, paraphrase, synonyms

FILE = Path(__file__).with_name("shaken.json")
ROWS, HELD_OUT, WORDS, STEPS, BATCH = 192, 100, 16, 48, 8
EPSILON = 0.1  # the length of a text's shift; a token's embedding has length 1.07 in the mean
TRAININGS = ("plain", "synonyms", "rules", "FGM")


@cache
def snippets(seed: int) -> Task:
    """Film snippets of at most WORDS words; `seed` draws the training rows, the others are always the same."""
    data = reviews("films", seed=seed).filter(lambda row: len(row["text"].split()) <= WORDS)
    for name in data:
        data[name] = data[name].select(range(ROWS if name == "train" else HELD_OUT))
    return Task("film snippets", "class", data, metric="accuracy", classes=("negative", "positive"))


@cache
def known() -> frozenset[str]:
    """The encoder's own words: a synonym that it reads in pieces would be another kind of attack."""
    return frozenset(word for word in load("minilm", labels=2)[1].get_vocab() if word.isalpha())


def learn(training: str, lr: float, seed: int):
    """The encoder, tuned in one of the TRAININGS."""
    rows = snippets(seed).data["train"]
    if training == "synonyms":
        rows = augmented(rows, partial(synonyms, share=0.5, known=known()), seed=seed)
    elif training == "rules":
        rows = augmented(rows, paraphrase, seed=seed)
    tuned = attach(load("minilm", labels=2)[0], [LoRA(rank=8), Softmax()], seed=seed)
    objective = Adversarial(EPSILON) if training == "FGM" else None
    fit(tuned, rows, STEPS, lr, BATCH, seed, progress=False, objective=objective)
    return tuned


def ask(tuned, seed: int) -> dict[str, float]:
    """{attack: accuracy} on the test rows."""
    task = snippets(seed)
    swapped = task.data["test"].map(lambda row: {"text": synonyms(row["text"], 1.0, 0, known())})
    return {
        "none": evaluate(tuned, task).accuracy,
        "synonyms": evaluate(tuned, swapped).accuracy,
        "random": under_attack(tuned, task, EPSILON, random=True).accuracy,
        "FGM": under_attack(tuned, task, EPSILON).accuracy,
        "PGD": under_attack(tuned, task, EPSILON, steps=5).accuracy,
    }


def measure(report: Callable[[str], object] = print) -> dict:
    from datasets import disable_progress_bars

    disable_progress_bars()
    torch.set_num_threads(1)
    started = time.process_time()
    lr, grid = best_rate(
        lambda lr: evaluate(learn("plain", lr, SELECT), snippets(SELECT), "validation").loss, (1e-3, 3e-3, 1e-2)
    )
    report(f"{grid} {time.process_time() - started:.0f} s")
    runs = []
    for seed in SEEDS:
        for training in TRAININGS:
            runs.append({"training": training, "seed": seed, "lr": lr} | ask(learn(training, lr, seed), seed))
            report(f"{runs[-1]} {time.process_time() - started:.0f} s")
    return {
        "grid": list(grid.items()),
        "runs": runs,
        "epsilon": EPSILON,
        "measured": {
            "device": "CPU, 1 thread",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": date.today().isoformat(),
            "CPU seconds": round(time.process_time() - started),
        },
    }


def measured() -> dict:
    """What `measure` found when the course was made."""
    return json.loads(FILE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    write_whole(FILE, json.dumps(measure(), indent=1) + "\n")
