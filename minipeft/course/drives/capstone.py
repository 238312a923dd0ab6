"""How a learner's answers to the assignment `capstone` are called: a recipe is trained here, on real pictures.

The base reads scikit-learn's 8×8 digits as they are. The task is to read them under an uneven light, which adds four
smooth patterns to each picture, each as strong as chance has it. A recipe is plain data (a method's name, settings, a
learning rate, a number of steps), so no code of the learner's sees a row: it cannot answer with a constant, nor with
labels. The labels of the hidden rows are not here at all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from minipeft.attach import attach
from minipeft.learn.plan import Plan
from minipeft.methods import METHODS

READ = 1000  # pictures that the base was trained on; the others are for the task
STEPS, BATCH = 120, 32  # the most steps that a recipe may ask for, each on so many pictures
KEYS = {"method", "settings", "lr", "steps"}


def network(weights: dict[str, torch.Tensor] | None = None) -> nn.Sequential:
    """Three linear layers, 64 → 64 → 64 → 10; with `weights` or fresh ones."""
    layers = {"lower": nn.Linear(64, 64), "fold": nn.ReLU(), "upper": nn.Linear(64, 64), "bend": nn.ReLU()}
    model = nn.Sequential(OrderedDict(layers | {"head": nn.Linear(64, 10)}))
    if weights is not None:
        model.load_state_dict(weights)
    return model


def lit(pictures: torch.Tensor, seed: int) -> torch.Tensor:
    """The pictures (n, 64) under an uneven light: + Σ s_k·p_k, with s ~ N(0, 6²) and the p_k constant, falling to the
    right, falling downwards and crosswise, each of length 1."""
    slope = torch.linspace(-1, 1, 8)
    down, right = torch.meshgrid(slope, slope, indexing="ij")
    patterns = torch.stack([torch.ones(8, 8), right, down, right * down]).flatten(1)
    strengths = 6 * torch.randn(len(pictures), 4, generator=torch.Generator().manual_seed(seed))
    return pictures + strengths @ (patterns / patterns.norm(dim=1, keepdim=True))


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's digits: pictures (1797, 64) from 0 to 1, and their classes (1797,).

    They are read from its file, as `sklearn.datasets.load_digits` does, for its import takes longer than all of this.
    """
    import numpy

    folder = Path(find_spec("sklearn").origin).parent
    table = torch.from_numpy(numpy.loadtxt(folder / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype="f4"))
    return table[:, :-1] / 16, table[:, -1].long()


@cache
def base() -> dict[str, torch.Tensor]:
    """The weights of the network that reads the first 1,000 digits in an even light."""
    x, y = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network()
    train(model, model.parameters(), x[:READ], y[:READ], Plan(150, 1e-2, 64, 0, "linear"))
    return {name: value.detach() for name, value in model.state_dict().items()}


def train(model: nn.Module, parameters: Iterable[nn.Parameter], x: torch.Tensor, y: torch.Tensor, plan: Plan) -> None:
    """`plan.steps` of Adam (β = 0.9, 0.999) on random batches of pictures x (n, 64) with labels y (n,).

    It is written out because torch's optimizers import the compiler at their first step: longer than all of this takes.
    """
    moving = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    generator = torch.Generator().manual_seed(plan.seed)
    for step in range(plan.steps):
        rows = torch.randint(len(x), (plan.batch,), generator=generator)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        model.zero_grad()
        loss.backward()
        lr = plan.lr * plan.share(step)
        with torch.no_grad():
            for p, m, v in moving:
                if p.grad is not None:
                    m.lerp_(p.grad, 0.1)
                    v.lerp_(p.grad.square(), 0.001)
                    p -= lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)


def checked(recipe) -> tuple[object, Plan]:
    """(the method, the plan) of a recipe; ValueError says what is wrong with it."""
    if not isinstance(recipe, dict) or set(recipe) != KEYS:
        raise ValueError(f"A recipe is a dictionary with the keys {', '.join(sorted(KEYS))}.")
    name, settings, steps = recipe["method"], recipe["settings"], recipe["steps"]
    if not isinstance(name, str) or name not in METHODS or not isinstance(settings, dict):
        raise ValueError('"method" is the name of a method, such as "LoRA", and "settings" its arguments by name.')
    if not isinstance(steps, int) or not 1 <= steps <= STEPS:
        raise ValueError(f'"steps" is a whole number from 1 to {STEPS}.')
    return METHODS[name](**settings), Plan(steps, recipe["lr"], BATCH, 0, "linear")


def adapt(
    recipe: Callable,
    shapes: dict[str, tuple[int, int]],
    budget: int,
    weights: dict[str, torch.Tensor],
    x: torch.Tensor,
    y: torch.Tensor,
    hidden: torch.Tensor,
) -> dict:
    """What the learner's recipe for these shapes and this budget trains, and what the networks that it trained on each
    of the k sets of pictures x (k, n, 64) with labels y (k, n) call the hidden ones: {"trains": numbers,
    "classes": [k][m]}."""
    method, plan = checked(recipe(dict(shapes), budget))
    classes = []
    for pictures, labels, others in zip(x, y, hidden, strict=True):
        tuned = attach(network(weights), method)
        train(tuned, [p for p in tuned.parameters() if p.requires_grad], pictures, labels, plan)
        with torch.no_grad():
            classes.append(tuned(others).argmax(-1).tolist())
    return {"trains": tuned.count().trainable, "classes": classes}
