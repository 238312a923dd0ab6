"""How a learner's answers to the assignment `lora` are called."""

from __future__ import annotations

import torch
from torch import nn

from minipeft.course.drives.common import descend, layer


def initialise(function, d_out: int, d_in: int, rank: int, seed: int) -> dict:
    """Draws three times: with a seed, with the same one, with another."""
    draws = []
    before = torch.random.get_rng_state()
    for each in (seed, seed, seed + 1):
        A, B = function(d_out, d_in, rank, torch.Generator().manual_seed(each))
        draws.append((A.detach().clone(), B.detach().clone()))
    untouched = torch.equal(before, torch.random.get_rng_state())
    return {"A": draws[0][0], "B": draws[0][1], "again": draws[1][0], "other": draws[2][0], "global": untouched}


def merge(function, weight, bias, A, B, gamma: float, conv1d: bool) -> dict:
    linear = layer(weight, bias, conv1d)
    old = linear.weight
    function(linear, A, B, gamma)
    return {"merged": linear.weight.detach().clone(), "old weight": old.detach().clone()}


def unmerge(merge, unmerge, weight, bias, A, B, gamma: float, conv1d: bool) -> dict:
    """Twice there and back, as someone does who compares two adapters."""
    linear = layer(weight, bias, conv1d)
    seen = {}
    for i in (1, 2):
        receipt = merge(linear, A, B, gamma)
        seen[f"merged {i}"] = linear.weight.detach().clone()
        unmerge(linear, receipt)
        seen[f"restored {i}"] = linear.weight.detach().clone()
    return seen


def tree(names: list[str], tied: tuple[str, str] | None = None) -> nn.Module:
    """A model whose parameters have these dotted names, each of one number of its own size."""
    root = nn.Module()
    for i, name in enumerate(names):
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(torch.full((i + 1,), float(i))))
    return root


def freeze(function, names: list[str], trainable: list[bool]) -> dict:
    model = tree(names)
    for parameter, flag in zip(model.parameters(), trainable, strict=True):
        parameter.requires_grad_(flag)
    returned = function(model)
    return {
        "returned": returned,
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "values kept": all(bool((p == p.detach().flatten()[0]).all()) for p in model.parameters()),
    }


def adapted_layer(cls, weight, bias, x, rank: int, alpha: float, A, B, seed: int) -> dict:
    """A LoRA layer from birth to use: untrained, with given A and B, and after a step of SGD."""
    torch.manual_seed(seed)
    linear = layer(weight, bias, conv1d=False)
    lora = cls(linear, rank, alpha)
    seen = {"at first": lora(x).detach().clone(), "shape of A": tuple(lora.A.shape), "shape of B": tuple(lora.B.shape)}
    seen["A is random"] = bool(lora.A.detach().abs().sum() > 0)
    with torch.no_grad():
        lora.A.copy_(A)
        lora.B.copy_(B)
    seen["in use"] = lora(x).detach().clone()
    trained = [p for p in lora.trainable()]
    seen["numbers trained"] = sum(p.numel() for p in trained)
    seen["A and B train"] = {id(p) for p in trained} == {id(lora.A), id(lora.B)}
    loss = lora(x).square().mean()
    loss.backward()
    descend(lora, 0.1)
    seen["base after a step"] = linear.weight.detach().clone()
    return seen
