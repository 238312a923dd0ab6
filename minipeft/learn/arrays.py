"""Training and scoring where a row is no text but an array: a picture, or the frames of a sound.

history = fit_arrays(tuned, x, y, Plan(steps=40, lr=1e-3))     # x (n, …) floats, y (n,) classes from 0
score = evaluate_arrays(tuned, x, y)                           # loss in nats a row, and accuracy

The loss is the cross-entropy of the logits, which are the model's output or its `.logits`. The step is `fit`'s own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.attach import Tuned
from minipeft.learn.fit import History, Score, loop
from minipeft.learn.plan import Plan
from minipeft.learn.rows import order


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(n, classes), of rows that may lie on another device than the model."""
    output = model(x.to(next(model.parameters()).device))
    return getattr(output, "logits", output)


def cross_entropy(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """−mean log p(y | x), p = softmax(logits)"""
    found = logits(model, inputs["x"])
    return F.cross_entropy(found, inputs["y"].to(found.device))


def fit_arrays(model: nn.Module, x: torch.Tensor, y: torch.Tensor, plan: Plan) -> History:
    """Trains whatever of `model` requires a gradient, as `fit` does: AdamW without weight decay, by `plan`.

    Running statistics of a tuned base's norms stay as they are; see `Tuned.train`.

    Raises ValueError for rows that do not fit together, or where nothing trains; nothing has changed then.
    """
    history = History()
    for _ in training_arrays(model, x, y, plan, history):
        pass
    return history


def training_arrays(model: nn.Module, x: torch.Tensor, y: torch.Tensor, plan: Plan, history: History) -> Iterator[int]:
    """The loop inside `fit_arrays` as a generator: it yields after each step, so a widget can draw, or stop it."""
    if isinstance(model, Tuned):
        model.check_acting("fit_arrays")
    check(model, x, y)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("No parameter of the model requires a gradient: attach a method first, e.g. mp.LoRA(rank=8).")
    rows = order([1] * len(x), plan.batch, plan.seed)
    return loop(model, ({"x": x[chosen], "y": y[chosen]} for chosen in rows), history, plan, cross_entropy)


@torch.no_grad()
def evaluate_arrays(model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch: int = 50) -> Score:
    """Mean cross-entropy in nats a row and accuracy; the model's mode is put back afterwards. Raises ValueError as
    `fit_arrays` does."""
    check(model, x, y)
    was_training = model.training
    model.eval()
    found = torch.cat([logits(model, part) for part in x.split(batch)]).float().to(y.device)
    model.train(was_training)
    guess = found.argmax(-1)
    loss, right = F.cross_entropy(found, y).item(), (guess == y).float().mean().item()
    return Score(loss, len(x), right, tuple(guess.tolist()), tuple(y.tolist()))


def check(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Raises ValueError, naming the first row that cannot be learnt from."""
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(f"There are {len(x)} rows and {len(y)} classes: give at least one row, and one class a row.")
    if y.is_floating_point() or y.ndim != 1:
        raise ValueError(f"The classes are {y.dtype} numbers of shape {tuple(y.shape)}: give whole numbers, one a row.")
    if not (fine := torch.isfinite(x.flatten(1)).all(1)).all():
        raise ValueError(f"Row {int((~fine).nonzero()[0])} holds numbers that are not finite: mend it or drop it.")
    was_training = model.training
    model.eval()
    with torch.no_grad():
        classes = logits(model, x[:1]).shape[-1]
    model.train(was_training)
    if not (0 <= int(y.min()) and int(y.max()) < classes):
        row = int(((y < 0) | (y >= classes)).nonzero()[0])
        raise ValueError(f"Row {row} has the class {int(y[row])}, but the model knows classes 0 to {classes - 1}.")
