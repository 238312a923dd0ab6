"""What a teacher gives, and what self-distillation keeps, measured once: `python -m minipeft.course.teaching`.

1. **Few labels.** LoRA learns `flip` from 64 labelled rows: from the labels, from labels that are smoothed, from a
   teacher's probabilities on the same rows at three temperatures, and from both. The teacher is the pocket model, fully
   tuned on all 2,000 rows. Every way trains at its own best rate.
2. **Forgetting.** Full fine-tuning, LoRA, and LoRA with self-distillation learn `pirate`; the loss on the task and on
   the base's own stories is looked at every ten steps, so the second can be read where the first is equal.

Rates are half a decade apart and chosen with seed 10 on validation rows, on a grid that grows until the best lies
inside; seeds 0 to 4 report on test rows.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path

import torch

from minipeft.attach import attach
from minipeft.front import IGNORE
from minipeft.layer import Method
from minipeft.learn.distill import Distil
from minipeft.learn.fit import batches, evaluate, fit
from minipeft.learn.protocol import best_rate
from minipeft.methods.lora import LoRA
from minipeft.methods.select import Full
from minipeft.whole import write_whole
from minipeft.world import tasks
from minipeft.world.base import load, write

FILE = Path(__file__).with_name("teaching.json")
SELECT, SEEDS = 10, (0, 1, 2, 3, 4)
LABELLED, STEPS, BATCH = 64, 40, 8  # of part 1
TARGET, MOST, EVERY, TEXTS = 1.4, 90, 10, 60  # of part 2: nats a token, steps, steps between looks, rows looked at
SMOOTHING = 0.1


def validated(task: tasks.Task, other: tasks.Task) -> tasks.Task:
    """The task with the test rows of `other`, drawn with another seed, as its validation rows."""
    task.data["validation"] = other.data["test"]
    return task


# 1 · few labels ------------------------------------------------------------------------------------------------------
@cache
def flip() -> tasks.Task:
    return validated(tasks.flip(), tasks.flip(seed=1))


@cache
def teacher():
    """The pocket model, fully tuned on all rows of `flip`."""
    tuned = attach(load("pocket")[0], Full())
    fit(tuned, flip(), steps=200, lr=1e-3, progress=False)
    return tuned


def few(seed: int) -> tasks.Task:
    """`flip` with 64 training rows, others for every seed."""
    rows = flip().data["train"].shuffle(seed=seed).select(range(LABELLED))
    data = type(flip().data)(train=rows, validation=flip().data["validation"], test=flip().data["test"])
    return replace(flip(), data=data)


def smoothed(model, inputs) -> torch.Tensor:
    """Cross-entropy with a tenth of the label spread over the vocabulary: softness without a teacher."""
    labels = inputs["labels"][:, 1:]
    kept = labels != IGNORE
    logits = model(**inputs).logits[:, :-1][kept]
    return torch.nn.functional.cross_entropy(logits, labels[kept], label_smoothing=SMOOTHING)


def ways() -> dict[str, Callable | None]:
    """{way: objective}"""
    return {
        "labels": None,
        "labels, smoothed": smoothed,
        "teacher, T=1": Distil(teacher(), 1.0, 1.0),
        "teacher, T=2": Distil(teacher(), 2.0, 1.0),
        "teacher, T=4": Distil(teacher(), 4.0, 1.0),
        "half and half, T=2": Distil(teacher(), 2.0, 0.5),
    }


def learn_few(objective, lr: float, seed: int, split: str = "test") -> dict:
    """Train once on few labels and score: {lr, seed, loss, accuracy}."""
    tuned = attach(load("pocket")[0], LoRA(rank=4), seed=seed)
    fit(tuned, few(seed), STEPS, lr, BATCH, seed, progress=False, objective=objective)
    score = evaluate(tuned, flip(), split)
    return {"lr": lr, "seed": seed, "loss": score.loss, "accuracy": score.accuracy}


# 2 · forgetting ------------------------------------------------------------------------------------------------------
@cache
def pirate() -> tasks.Task:
    return validated(tasks.pirate(), tasks.pirate(seed=1))


@cache
def stories() -> tasks.Task:
    return validated(tasks.plain(), tasks.plain(seed=1))


@cache
def own_writing(n: int = 20, size: int = 10) -> tuple:
    """Batches of stories that the base itself wrote (seed 0): no old data is needed for them."""
    model, tokenizer = load("pocket")
    return tuple(batches(model, write(model, tokenizer, n=n * size), n, size))


@dataclass(frozen=True)
class Side:
    """One side of the comparison of part 2: what is trained, and what is minimised."""

    method: Method
    objective: Callable[[], Distil | None] = lambda: None
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)


SIDES = {
    "full fine-tuning": Side(Full(), rates=(3e-4, 1e-3, 3e-3)),
    "LoRA r=8": Side(LoRA(rank=8)),
    "with the base on the task's texts, w=0.1": Side(LoRA(rank=8), lambda: Distil(weight=0.1)),
    "with the base on the task's texts, w=0.3": Side(LoRA(rank=8), lambda: Distil(weight=0.3)),
    "with the base on its own texts, w=0.5": Side(LoRA(rank=8), lambda: Distil(weight=0.5, rehearsal=own_writing())),
}


def learn_and_look(side: Side, lr: float, seed: int, split: str = "test") -> dict:
    """Train until the task's loss is at most TARGET, or MOST steps: {lr, seed, steps, task, old}, one look a row."""
    tuned = attach(load("pocket")[0], side.method, seed=seed)
    seen: dict[str, list] = {"steps": [], "task": [], "old": []}

    def look(step: int, history) -> bool:
        if (step + 1) % EVERY:
            return True
        scores = [evaluate(tuned, task(), split, n=TEXTS).loss for task in (pirate, stories)]
        for name, value in zip(seen, (step + 1, *scores), strict=True):
            seen[name].append(value)
        return scores[0] > TARGET

    fit(tuned, pirate(), MOST, lr, 10, seed, progress=False, callback=look, objective=side.objective())
    return {"lr": lr, "seed": seed} | seen


def at_target(run: dict, before: tuple[float, float], target: float = TARGET) -> float:
    """The loss on the base's stories where the task's loss was `target`, on a line between the two looks around it;
    infinite where it never was. `before` is (task's, stories') loss of the base."""
    task, old = [before[0], *run["task"]], [before[1], *run["old"]]
    for i in range(1, len(task)):
        if task[i] <= target < task[i - 1]:
            share = (task[i - 1] - target) / (task[i - 1] - task[i])
            return old[i - 1] + share * (old[i] - old[i - 1])
    return math.inf


def measure(report: Callable[[str], object] = print) -> dict:
    torch.set_num_threads(1)
    started = time.process_time()
    model, _ = load("pocket")
    result = {"floor": flip().floor, "ceiling": flip().ceiling, "ways": {}, "sides": {}}
    result["teacher"] = {"loss": (score := evaluate(teacher(), flip())).loss, "accuracy": score.accuracy}
    result["base"] = {"loss": (score := evaluate(model, flip())).loss, "accuracy": score.accuracy}
    result["rows"] = -sum(flip().data["test"]["log_p"]) / (3 * len(flip().data["test"]))  # the source on these rows
    for name, objective in ways().items():
        lr, grid = best_rate(lambda lr, o=objective: learn_few(o, lr, SELECT, "validation")["loss"], (1e-3, 3e-3, 1e-2))
        runs = [learn_few(objective, lr, seed) for seed in SEEDS]
        result["ways"][name] = {"grid": list(grid.items()), "runs": runs}
        report(f"{name}: {lr:g} {[round(run['loss'], 3) for run in runs]} {time.process_time() - started:.0f} s")
    teacher().detach()
    for split in ("validation", "test"):
        result[f"before, {split}"] = [evaluate(model, task(), split, n=TEXTS).loss for task in (pirate, stories)]
    result["pirate floor"] = pirate().floor
    for name, side in SIDES.items():
        before = result["before, validation"]
        lr, grid = best_rate(
            lambda lr, s=side, b=before: at_target(learn_and_look(s, lr, SELECT, "validation"), b), side.rates
        )
        runs = [learn_and_look(side, lr, seed) for seed in SEEDS]
        result["sides"][name] = {"grid": [[r, v if v < math.inf else None] for r, v in grid.items()], "runs": runs}
        old = [round(at_target(run, result["before, test"]), 3) for run in runs]
        report(f"{name}: {lr:g} {old} {time.process_time() - started:.0f} s")
    return result | {
        "measured": {
            "device": "CPU, 1 thread",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": date.today().isoformat(),
            "CPU seconds": round(time.process_time() - started),
        }
    }


def measured() -> dict:
    """What `measure` found when the course was made."""
    return json.loads(FILE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    write_whole(FILE, json.dumps(measure(), indent=1, ensure_ascii=False) + "\n")
