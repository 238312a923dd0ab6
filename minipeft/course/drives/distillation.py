"""How a learner's answers to the assignment `distillation` are called."""

from __future__ import annotations

import torch
from torch import nn

from minipeft.attach import attach
from minipeft.course.drives.common import seeded
from minipeft.methods.lora import LoRA


class Network(nn.Module):
    """Logits proj(drop(x)): dropout, so that it matters who reads in which mode."""

    def __init__(self, weight: torch.Tensor, share: float):
        super().__init__()
        self.drop = nn.Dropout(share)
        self.proj = nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
        self.proj.weight = nn.Parameter(weight.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.drop(x))


def teach_itself(function, weight, A, B, x, temperature: float, share: float, training: bool, seed: int) -> dict:
    """The loss of `function(tuned, x, temperature)`, the gradients of A and B, and how the model is afterwards."""
    with seeded(seed):
        tuned = attach(Network(weight, share), LoRA(rank=len(A), gamma=1.0, targets=["proj"]))
    [layer] = tuned.adapters["default"].values()
    layer.A.data, layer.B.data = A.clone(), B.clone()
    tuned.train(training)
    with seeded(seed):
        loss = function(tuned, x, temperature)
    if not isinstance(loss, torch.Tensor) or loss.ndim:
        return {"loss": loss}
    slopes = torch.autograd.grad(loss, [layer.A, layer.B], allow_unused=True) if loss.requires_grad else (None, None)
    with torch.no_grad():
        reads = tuned.eval().base(x)
        acts = not torch.equal(reads, torch.nn.functional.linear(x, weight))
    tuned.train(training)
    with seeded(seed):  # a second call, which must find everything as the first one did
        again = function(tuned, x, temperature)
    return {
        "loss": loss.detach(),
        "A": torch.zeros_like(A) if slopes[0] is None else slopes[0],
        "B": torch.zeros_like(B) if slopes[1] is None else slopes[1],
        "the adapter acts afterwards": acts,
        "the mode (train or eval) is what it was": tuned.training == training and tuned.base.drop.training == training,
        "a second call gives the same": torch.equal(again.detach(), loss.detach()),
        "the base keeps its weight": torch.equal(tuned.base.proj.weight.detach(), weight),
        "the base's weight stays frozen": not tuned.base.proj.weight.requires_grad,
    }


class Reader(nn.Module):
    """Logits of a text: the mean of tanh of its tokens' embeddings, through a head."""

    def __init__(self, table: torch.Tensor, head: torch.Tensor):
        super().__init__()
        self.embed = nn.Embedding(*table.shape, dtype=table.dtype)
        self.embed.weight = nn.Parameter(table.clone())
        self.head = nn.Linear(*head.shape[::-1], bias=False, dtype=head.dtype)
        self.head.weight = nn.Parameter(head.clone())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids).tanh().mean(1))


def shake(function, table, head, ids, labels, epsilon: float, earlier: float) -> dict:
    """The gradients after `function(model, ids, labels, epsilon)`; each held `earlier` before."""
    with seeded(0):
        model = Reader(table, head)
    owner = model.embed.weight
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, earlier) if earlier else None
    before, mode = model(ids).detach(), earlier > 0
    model.train(mode)
    function(model, ids, labels, epsilon)
    kept = model.embed.weight.detach()
    return {
        "embed": model.embed.weight.grad,
        "head": model.head.weight.grad,
        "the table is what it was, bit for bit": torch.equal(kept.view(torch.uint8), table.view(torch.uint8)),
        "the table is the same parameter": model.embed.weight is owner,
        "the head keeps its weight": torch.equal(model.head.weight.detach(), head),
        "the model gives the logits that it gave": torch.equal(model(ids).detach(), before),
        "the mode (train or eval) is what it was": {each.training for each in model.modules()} == {mode},
        "the model has the same parameters": [n for n, _ in model.named_parameters()]
        == ["embed.weight", "head.weight"],
        "both still train": all(p.requires_grad for p in model.parameters()),
    }
