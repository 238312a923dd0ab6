"""How a learner's answers to the assignment `lora` are called."""

from __future__ import annotations

import torch
from torch import nn

from minipeft.course.drives.common import draws, layer, life, seeded


def initialise(function, d_out: int, d_in: int, rank: int, seed: int) -> dict:
    return draws(function, (d_out, d_in, rank), seed)


def merge(function, weight, bias, A, B, gamma: float, conv1d: bool) -> dict:
    linear = layer(weight, bias, conv1d)
    old, kept, mode = linear.weight, linear.bias, len(weight) % 2 == 0
    linear.train(mode)
    function(linear, A, B, gamma)
    return {
        "merged": linear.weight.detach().clone(),
        "old weight": old.detach().clone(),
        "the bias stays as it was": linear.bias is kept and (bias is None or torch.equal(kept.detach(), bias)),
        "the new weight is an nn.Parameter of its own": isinstance(linear.weight, nn.Parameter)
        and linear.weight is not old,
        "the layer has the same parameters and buffers": set(linear.state_dict())
        == ({"weight"} if bias is None else {"weight", "bias"}),
        "the bias trains as before": bias is None or linear.bias.requires_grad,
        "the layer's mode (train or eval) is what it was": linear.training == mode,
    }


def unmerge(merge, unmerge, weight, bias, A, B, gamma: float, conv1d: bool) -> dict:
    """Twice there and back, as someone does who compares two adapters; then two layers, and two adapters on one."""
    linear, frozen = layer(weight, bias, conv1d), layer(weight.flip(0), bias, conv1d).requires_grad_(False)
    seen = {}
    for i in (1, 2):
        receipt = merge(linear, A, B, gamma)
        seen[f"merged {i}"] = linear.weight.detach().clone()
        unmerge(linear, receipt)
        seen[f"restored {i}"] = linear.weight.detach().clone()
    receipts = [merge(each, A, B, gamma) for each in (linear, frozen)]
    for each, receipt in zip((linear, frozen), receipts, strict=True):
        unmerge(each, receipt)
    seen["two layers that are merged side by side get back their own weights"] = torch.equal(
        linear.weight.detach(), weight
    ) and torch.equal(frozen.weight.detach(), weight.flip(0))
    receipts = [merge(linear, A, B, scale) for scale in (gamma, 2 * gamma)]
    unmerge(linear, receipts[1])
    unmerge(linear, receipts[0])
    seen["two adapters on one layer come off again, the last one first"] = torch.equal(linear.weight.detach(), weight)
    seen["a weight that trained before trains again, and a frozen one stays frozen"] = (
        linear.weight.requires_grad and not frozen.weight.requires_grad
    )
    seen["a bias that trained trains, and a frozen one stays frozen"] = (
        linear.bias.requires_grad and not frozen.bias.requires_grad
    )
    seen["the weight is an nn.Parameter again"] = isinstance(linear.weight, nn.Parameter)
    seen["the bias stays as it was"] = linear.bias is not None and torch.equal(linear.bias.detach(), bias)
    return seen


def tree(names: list[str]) -> nn.Module:
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
    before = {name: id(p) for name, p in model.named_parameters()}
    model.train(trainable[0])
    returned = function(model)
    return {
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "returned": returned,
        "values kept": all(bool((p == p.detach().flatten()[0]).all()) for p in model.parameters()),
        "the parameters are the same objects": {name: id(p) for name, p in model.named_parameters()} == before,
        "the mode (train or eval) is what it was": {each.training for each in model.modules()} == {trainable[0]},
    }


def adapted_layer(cls, weight, bias, x, rank: int, alpha: float, A, B, seed: int) -> dict:
    """A LoRA layer from birth to use: untrained, with given A and B, and after a step of SGD."""
    linear = layer(weight, bias)
    with seeded(seed):
        lora = cls(linear, rank, alpha)
    seen: dict = {"shape of A": tuple(lora.A.shape), "shape of B": tuple(lora.B.shape)}
    if seen["shape of A"] != tuple(A.shape) or seen["shape of B"] != tuple(B.shape):
        return seen
    trained = list(lora.trainable())
    seen["numbers trained"] = sum(p.numel() for p in trained)
    seen["A and B train"] = {id(p) for p in trained} == {id(lora.A), id(lora.B)}
    return seen | life(lambda: cls(linear, rank, alpha), linear, {"A": A, "B": B}, "A", x, seed)
