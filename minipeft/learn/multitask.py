"""Several tasks and one base: one adapter for all (joint), one for each (separate), or the sum of those.

    joint:      ΔW from batches of all tasks in turn             separate:   ΔW_s from batches of task s alone
    summed:     ΔW = Σ_s ΔW_s                                    weighted:   ΔW = Σ_s α_s·ΔW_s   (task arithmetic,
                                                             Ilharco et al. 2023, "Editing Models with Task Arithmetic")

`separate` and `joint` see the same batches: `plan.steps` of each task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from minipeft.attach import Tuned, attach
from minipeft.layer import Method
from minipeft.learn.fit import History, _step, batches, evaluate, groups, training
from minipeft.learn.plan import Plan
from minipeft.world.tasks import Task


def named(tasks: Mapping[str, Task]) -> Mapping[str, Task]:
    """The tasks themselves. Raises ValueError for none, or one without training rows."""
    if not tasks:
        raise ValueError("There are no tasks; give {name: task}.")
    for name, task in tasks.items():
        if not len(task.data["train"]):
            raise ValueError(f"Task {name!r} has no rows to train on; leave it out.")
    return tasks


def separate(model: nn.Module, method: Method, tasks: Mapping[str, Task], plan: Plan) -> Tuned:
    """An adapter for each task, under the task's name, each trained alone as by `fit`; none is in use afterwards."""
    tuned = None
    for name, task in named(tasks).items():
        if tuned is None:
            tuned = attach(model, method, name=name, seed=plan.seed)
        else:
            tuned.add(name, method, seed=plan.seed)
        tuned.use(name)
        for _ in training(tuned, task, History(), plan):
            pass
    tuned.use()
    return tuned


def joint(model: nn.Module, method: Method, tasks: Mapping[str, Task], plan: Plan) -> Tuned:
    """One adapter, "joint", and one AdamW: `plan.steps` batches of every task in turn."""
    several = named(tasks)
    tuned = attach(model, method, name="joint", seed=plan.seed)
    streams = [batches(tuned, task, plan.steps, plan.batch, plan.seed) for task in several.values()]
    optimizer = torch.optim.AdamW(groups(tuned, plan.lr), lr=plan.lr, weight_decay=0.0)
    whole = replace(plan, steps=plan.steps * len(streams))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, whole.share)
    tuned.train()
    for step, inputs in enumerate(inputs for turn in zip(*streams, strict=True) for inputs in turn):
        with torch.random.fork_rng():
            torch.manual_seed(plan.seed * 1_000_003 + step)
            loss = _step(tuned, inputs, optimizer)
        if not math.isfinite(loss):
            raise ValueError(
                f"The loss became {loss} at step {step} with lr={plan.lr:g}; take a rate ten times smaller."
            )
        scheduler.step()
    tuned.eval()
    return tuned


def losses(model: nn.Module, tasks: Mapping[str, Task], n: int | None = None) -> dict[str, float]:
    """{task: loss on its first `n` test rows}, of the model as it is."""
    return {name: evaluate(model, task, n=n).loss for name, task in named(tasks).items()}
