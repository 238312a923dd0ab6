"""Small changes that should not matter: to a word's vector, and to a word (for words, see `world/synonyms.py`).

    FGM    r_i = ε · g_i / ‖g_i‖₂                               g_i = ∂L/∂e_i at r = 0       (Miyato et al. 2017, §3)
    PGD    r ← Π(r + α · g / ‖g‖₂), k times, α = 1.5 ε / k       Π cuts ‖r_i‖₂ back to ε      (Madry et al. 2018, §2.1)

e_i (length, d) are the token embeddings of text i, r_i what is added to them, L the loss. One step from r = 0 is FGM.
Training on both (`Adversarial`) minimises (1 − w)·L(e) + w·L(e + r).

    mp.fit(tuned, reviews, objective=mp.Adversarial(epsilon=1.0))
    under_attack(tuned, reviews, epsilon=1.0, steps=5)          # a Score, beside evaluate's

Nothing is written into the embedding table and no parameter's gradient is touched: r enters through a hook.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from minipeft.learn.fit import Score, own_loss
from minipeft.learn.rows import as_task, collate, padding, read
from minipeft.reading import is_pair


@contextlib.contextmanager
def shifted(model: nn.Module, shift: torch.Tensor):
    """Within it, the model's token embeddings are e + shift, of shape (batch, length, d); what a prompt method puts
    before them is not shifted."""
    if is_pair(model):
        raise ValueError(
            "An encoder–decoder embeds two texts with one table; only models that read one can be shifted."
        )

    def hook(module, args, output):
        return output + nn.functional.pad(shift, (0, 0, output.shape[1] - shift.shape[1], 0))

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def unit(gradient: torch.Tensor) -> torch.Tensor:
    """g_i / ‖g_i‖₂ for each text of (batch, length, d), over length and d together; 0 where the gradient is 0."""
    norm = gradient.flatten(1).norm(dim=1).view(-1, 1, 1)
    return gradient / norm.where(norm > 0, torch.ones_like(norm))


def worst_shift(model: nn.Module, inputs: Mapping[str, torch.Tensor], epsilon: float, steps: int = 1) -> torch.Tensor:
    """r (batch, length, d) with ‖r_i‖₂ ≤ epsilon that raises the loss of a batch: FGM for one step, PGD for more.

    Padding is not shifted. The model, its gradients and its embedding table stay as they were; the model must give a
    `loss`, so `inputs` need labels.

    Raises ValueError for an epsilon that is not positive, for no steps, and for a gradient that is no number.
    """
    _check(epsilon, steps)
    ids = inputs["input_ids"]
    table = model.get_input_embeddings().weight
    real = inputs.get("attention_mask", torch.ones_like(ids)).unsqueeze(-1).to(table.dtype)
    shift = torch.zeros(*ids.shape, table.shape[1], dtype=table.dtype, device=ids.device)
    length = epsilon if steps == 1 else 1.5 * epsilon / steps
    for _ in range(steps):
        shift.requires_grad_(True)
        with torch.enable_grad(), shifted(model, shift):
            (gradient,) = torch.autograd.grad(own_loss(model, inputs), shift)
        if not torch.isfinite(gradient).all():
            raise ValueError(
                "The gradient at the embeddings is no number: the model diverged; train it at a lower rate."
            )
        shift = shift.detach() + length * unit(gradient * real)
        norm = shift.flatten(1).norm(dim=1).view(-1, 1, 1)
        shift = shift * (epsilon / norm.clamp_min(epsilon)) if steps > 1 else shift
    return shift


@dataclass(frozen=True)
class Adversarial:
    """An objective for `fit`: (1 − weight)·L(e) + weight·L(e + r), with r from `worst_shift` for each batch.

    `epsilon` is the length of r over all of a text's embeddings together, in their own units; `steps` is 1 for FGM and
    more for PGD, each of which costs a forward and a backward pass more.
    """

    epsilon: float = 1.0
    steps: int = 1
    weight: float = 0.5

    def __post_init__(self) -> None:
        _check(self.epsilon, self.steps)
        if not (isinstance(self.weight, int | float) and 0 <= self.weight <= 1):
            raise ValueError(f"weight is the shifted texts' share of the loss, from 0 to 1, but is {self.weight!r}.")

    def __call__(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        clean = own_loss(model, inputs)
        with shifted(model, worst_shift(model, inputs, self.epsilon, self.steps)):
            return (1 - self.weight) * clean + self.weight * own_loss(model, inputs)


def under_attack(
    model: nn.Module,
    task,
    epsilon: float,
    steps: int = 1,
    random: bool = False,
    split: str = "test",
    n: int | None = None,
    seed: int = 0,
    tokenizer=None,
) -> Score:
    """The score of a classifier on (the first `n` rows of) a split whose embeddings are shifted by ‖r_i‖ = `epsilon`.

    Each text is attacked for its own label: FGM for one step, PGD for more. `random` takes a direction drawn from
    `seed` in place of the worst: what a shift of this length does by itself. The model is left as it was.
    """
    task, tokenizer = as_task(task), tokenizer if tokenizer is not None else model.tokenizer
    if task.kind != "class":
        raise ValueError(f"Task {task.name!r} asks for words; an attack here changes the class of a text.")
    _check(epsilon, steps)
    rows = task.data[split]
    rows = rows if n is None else rows.select(range(min(n, len(rows))))
    encoded = read(model, task, rows, tokenizer)
    generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    was_training, predictions, total = model.training, [0] * len(encoded), 0.0
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    model.eval()
    try:
        for start in range(0, len(encoded), 32):
            chosen = by_length[start : start + 32]
            inputs = collate("class", [encoded[i] for i in chosen], tokenizer, device, padding(model, tokenizer))
            if random:
                width = model.get_input_embeddings().weight.shape[1]
                shift = torch.randn(*inputs["input_ids"].shape, width, generator=generator).to(device)
                shift = epsilon * unit(shift * inputs["attention_mask"].unsqueeze(-1))
            else:
                shift = worst_shift(model, inputs, epsilon, steps)
            with torch.no_grad(), shifted(model, shift):
                output = model(**inputs)
            total += output.loss.item() * len(chosen)
            for i, guess in zip(chosen, output.logits.argmax(-1).tolist(), strict=True):
                predictions[i] = guess
    finally:
        model.train(was_training)
    truth = tuple(rows["label"])
    right = sum(guess == label for guess, label in zip(predictions, truth, strict=True))
    return Score(total / len(encoded), len(encoded), right / len(encoded), tuple(predictions), truth)


def _check(epsilon: float, steps: int) -> None:
    if not (isinstance(epsilon, int | float) and math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon is the length of the shift, a positive number, but is {epsilon!r}.")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps is 1 for FGM and a larger whole number for PGD, but is {steps!r}.")
