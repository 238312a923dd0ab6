"""Early stopping: a callback of `fit` that looks at validation rows, and keeps the best numbers seen.

    early = EarlyStop(tuned, task, every=10, patience=3)
    fit(tuned, task, steps=600, lr=1e-3, callback=early)
    early.restore()                                        # the trained numbers of the best look, not of the last

After every `every` steps the validation loss is taken. After `patience` looks in a row that are no better than the best
one, training stops. The validation rows have then chosen a number of steps: test rows report, and choose nothing.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from minipeft.learn.fit import History, evaluate
from minipeft.learn.rows import as_task


class EarlyStop:
    """`losses`: {step: validation loss in nats a token}; `best`: the step with the least, 0 before training.

    Raises ValueError at once for a task without validation rows, and for `every` or `patience` below 1.
    """

    def __init__(
        self, model: nn.Module, task, every: int = 10, patience: int = 3, n: int | None = None, tokenizer=None
    ):
        for name, value in {"every": every, "patience": patience}.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, but is {value!r}.")
        self.model, self.task, self.every, self.patience = model, as_task(task), every, patience
        self.n, self.tokenizer = n, tokenizer
        self.losses: dict[int, float] = {}
        self.look(0)

    @property
    def best(self) -> int:
        return min(self.losses, key=self.losses.__getitem__)

    def look(self, step: int) -> None:
        """Takes the validation loss, and a copy of what trains where it is the least so far."""
        loss = evaluate(self.model, self.task, "validation", self.n, self.tokenizer).loss
        self.losses[step] = loss if math.isfinite(loss) else math.inf
        if self.best == step:
            self.kept = [p.detach().clone() for p in self.model.parameters() if p.requires_grad]

    def __call__(self, step: int, history: History) -> bool:
        """False where training should stop: `fit` calls this after each step, counted from 0."""
        done = step + 1
        if done % self.every:
            return True
        self.look(done)
        return done - self.best < self.patience * self.every

    @torch.no_grad()
    def restore(self) -> int:
        """Puts the numbers of the best look back, and returns its step."""
        moving = [p for p in self.model.parameters() if p.requires_grad]
        for parameter, value in zip(moving, self.kept, strict=True):
            parameter.copy_(value)
        return self.best
