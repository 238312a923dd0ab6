"""How a learner's answers to the assignment `select` are called."""

from __future__ import annotations

import random

import torch
from torch import nn

from minipeft.course.drives.common import descend, flipped_layer, seeded
from minipeft.course.drives.promises import keeping


class RMSNorm(nn.Module):
    """A norm that is none of torch's, with a scale, and perhaps a bias."""

    def __init__(self, width: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if bias else None)


class NormedScale(RMSNorm):
    """A norm by the name of its class, though that does not end in Norm."""


class Gate(nn.Module):
    """Neither linear nor a norm, but it has a parameter called bias, and perhaps one called weight."""

    def __init__(self, width: int, weight: bool = False):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))
        if weight:
            self.weight = nn.Parameter(torch.ones(width))


class Denormalised(Gate):
    """No norm: capitals count."""


def network(kind: str, width: int, seed: int) -> nn.Module:
    """ "biases": linear, Conv1D and norms with biases, and decoys; "frozen": the same, frozen; "deep": more blocks, far
    down, with more kinds of norms, of which one is shared; "none": no bias."""
    rng = random.Random(seed)
    model = inner = nn.Module()
    if kind == "deep":
        model.shared = nn.LayerNorm(width)
        for name in "abcd":
            inner.add_module(name, nn.Module())
            inner = inner.get_submodule(name)
    for i in range(8 if kind == "deep" else rng.randint(2, 3)):
        block = nn.Module()
        if kind != "none":
            block.bias_proj = nn.Linear(width, 2 * width, bias=rng.random() < 0.5)
            block.c_fc = flipped_layer(width, 3)
            block.norm, block.end_norm = nn.LayerNorm(width), RMSNorm(width, bias=True)
            block.ln_1, block.tidy = NormedScale(width, bias=True), Denormalised(width, True)
            block.norm_gate, block.scale, block.patch = Gate(width), Gate(width, True), nn.Conv1d(width, 2, 1)
            block.relative_attention_bias = nn.Embedding(4, width)
            if kind == "deep":
                block.shared, block.cells = model.shared, nn.BatchNorm1d(width)
                block.groups, block.pictures = nn.GroupNorm(1, width), nn.InstanceNorm1d(width, affine=True)
        else:
            block.proj = nn.Linear(width, width, bias=False)
            block.norm = RMSNorm(width)
            block.gate = Gate(width)
        inner.add_module(f"block{i}", block)
    return model.requires_grad_(kind != "frozen")


def name_biases(function, kind: str, width: int, seed: int) -> list:
    with seeded(seed):
        model = network(kind, width, seed)
    return sorted(keeping(function, model))


class LanguageModel(nn.Module):
    def __init__(self, table: torch.Tensor, head: torch.Tensor | None):
        super().__init__()
        self.embed = nn.Embedding(*table.shape, dtype=table.dtype)
        self.embed.weight = nn.Parameter(table.clone())
        self.body = nn.Linear(table.shape[1], table.shape[1], dtype=table.dtype)
        self.head = nn.Linear(table.shape[1], table.shape[0], bias=False, dtype=table.dtype)
        self.head.weight = self.embed.weight if head is None else nn.Parameter(head.clone())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(ids)).tanh())


def tune_softmax(function, table, head, ids, seed: int, frozen: bool = False) -> dict:
    """Prepares the model, then trains one step of SGD on all that requires a gradient."""
    with seeded(seed):
        model = LanguageModel(table, head)
    model.requires_grad_(not frozen)
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    before = model.train(frozen)(ids).detach().clone()
    added = function(model)
    after = model(ids)
    seen = {"added": added, "trainable": sorted(n for n, p in model.named_parameters() if p.requires_grad)}
    seen["same output at first"] = torch.equal(before, after)
    seen["the head keeps its type"] = model.head.weight.dtype == table.dtype
    seen["the head is an nn.Parameter"] = isinstance(model.head.weight, nn.Parameter)
    seen["the model has the same parts"] = [n for n, _ in model.named_parameters(remove_duplicate=False)] == names
    body = model.body.weight.detach().clone()
    start = model.head.weight.detach().clone()
    if after.requires_grad:
        nn.functional.cross_entropy(after, ids).backward()
    descend(model, 1.0)
    seen["embedding kept"] = torch.equal(model.embed.weight.detach(), table)
    modes = {each.training for name, each in model.named_modules() if name != "head"}  # which may be a new layer
    seen["the mode (train or eval) is what it was"] = modes == {frozen}
    seen["body kept"] = torch.equal(model.body.weight.detach(), body)
    seen["head moved"] = not torch.equal(model.head.weight.detach(), start)
    seen["called again, it adds nothing"] = function(model) == 0
    return seen


def classifier(weights: list[torch.Tensor]) -> nn.Module:
    with seeded(0):
        first, second = (nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in weights)
    first.weight, second.weight = nn.Parameter(weights[0].clone()), nn.Parameter(weights[1].clone())
    return nn.Sequential(first, nn.Tanh(), second)


def importance(function, weights: list, inputs, labels) -> dict:
    """With gradients of an earlier batch on the parameters, which must not count."""
    model = classifier(weights).train(len(inputs) % 2 == 0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    found = dict(keeping(function, model, inputs, labels, gradients=False))
    return {"importance": found, "weights kept": not any(each.requires_grad for each in found.values())}


def optimise(cls, values: list, masks: list, gradients: list, settings: dict) -> list:
    """The parameters after each step."""
    parameters = [nn.Parameter(value.clone()) for value in values]
    optimizer = cls(parameters, masks, **settings)
    history = []
    for several in gradients:
        for parameter, gradient in zip(parameters, several, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        history.append([p.detach().clone() for p in parameters])
    return history
