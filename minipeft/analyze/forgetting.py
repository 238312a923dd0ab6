"""What a model unlearns while it learns a task: the base's own stories and questions, before and after.

Methods are compared at *matched task loss*: each trains until its loss on the task is the same. Otherwise the method
that learnt least would look as if it forgot least.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from torch import nn

from minipeft.attach import attach
from minipeft.learn.fit import History, evaluate, training
from minipeft.learn.plan import Plan
from minipeft.world import corpus, tasks
from minipeft.world.tasks import Task


@cache
def old_questions(test: int = 300, seed: int = 0) -> Task:
    """What the base could answer before: who spoke, what it was, where, and how it felt, asked after a story."""
    from datasets import Dataset, DatasetDict

    grammar = corpus.stories().replace("QUESTION = question : ask~ASK QUESTION.$ask\nASK = who | what | where | mood")
    rows = []
    for text in grammar.texts(test, 2 * seed + 1):
        *prompt, word, stop = text.text.split()
        rows.append({"prompt": " ".join(prompt), "completion": f"{word} {stop}", "log_p": 0.0, "text": text.text})
    data = DatasetDict(train=Dataset.from_list(rows[:1]), test=Dataset.from_list(rows))
    return Task("old questions", "answer", data, None, "accuracy", 1.0)


@dataclass(frozen=True)
class Forgetting:
    """One method at the target: `steps` taken, `task_loss` there (nats a token), whether the target was `reached`;
    loss on the base's stories and accuracy of its old answers, before and after."""

    method: str
    reached: bool
    steps: int
    task_loss: float
    plain_before: float
    plain_after: float
    answers_before: float
    answers_after: float
    trainable: int

    @property
    def forgot(self) -> float:
        """Rise of the loss on the base's own stories, in nats a token."""
        return self.plain_after - self.plain_before


def forgetting(
    model: nn.Module,
    methods: Mapping[str, tuple],
    task: Task,
    target: float,
    steps: int = 200,
    every: int = 5,
    batch: int = 10,
    seed: int = 0,
    n: int = 100,
) -> list[Forgetting]:
    """Trains each of `methods` until the loss on `n` test rows of `task` is at most `target`, looked at `every` few
    steps, or for `steps` at most; then asks what is left of the base.

    `methods`: {name: (method, learning rate)}, or with an objective for `fit` as a third.

    The model is given back as it was. Raises ValueError for a target that the base meets already, or below the floor.
    """
    stories, questions = tasks.plain(), old_questions()
    start = evaluate(model, task, n=n).loss
    if not target < start:
        raise ValueError(f"The base's loss on {task.name!r} is {start:.3f} already; a target must be below that.")
    if task.floor is not None and target < task.floor:
        raise ValueError(f"target={target:g} is below the floor of {task.name!r}, {task.floor:.3f}; choose one above.")
    before = evaluate(model, stories, n=n).loss, evaluate(model, questions, n=n).accuracy
    found = []
    for name, (method, lr, *objective) in methods.items():
        tuned, history, loss = attach(model, method, seed=seed), History(), math.inf
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a diverged run shows as a target that was not reached
                run = training(tuned, task, history, Plan(steps, lr, batch, seed), None, *objective)
                for step in run:
                    if (step + 1) % every == 0 or step == steps - 1:
                        loss = evaluate(tuned, task, n=n).loss
                        tuned.train()
                        if loss <= target:
                            break
                run.close()
            tuned.eval()
            after = evaluate(tuned, stories, n=n).loss, evaluate(tuned, questions, n=n).accuracy
            taken, trainable = len(history.losses), tuned.count().trainable
        finally:
            tuned.detach()
        found.append(Forgetting(name, loss <= target, taken, loss, before[0], after[0], before[1], after[1], trainable))
    return found
