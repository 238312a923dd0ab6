"""How a learner's answers to the assignment `adapters` are called."""

from __future__ import annotations

import torch

from minipeft.course.drives.common import descend, layer


def start_adapter(function, width: int, bottleneck: int, seed: int) -> dict:
    """Draws three times: with a seed, with the same one, with another."""
    before = torch.random.get_rng_state()
    draws = []
    for each in (seed, seed, seed + 1):
        down_w, down_b, up_w, up_b = function(width, bottleneck, torch.Generator().manual_seed(each))
        draws.append([tensor.detach().clone() for tensor in (down_w, down_b, up_w, up_b)])
    untouched = torch.equal(before, torch.random.get_rng_state())
    return {"first": draws[0], "again": draws[1][0], "other": draws[2][0], "global": untouched}


def adapter_after(cls, weight, bias, x, bottleneck: int, halves: list, seed: int) -> dict:
    """A layer with an adapter behind it: untrained, with given weights, and after a step of SGD."""
    torch.manual_seed(seed)
    linear = layer(weight, bias, conv1d=False)
    adapter = cls(linear, bottleneck)
    parts = [adapter.down.weight, adapter.down.bias, adapter.up.weight, adapter.up.bias]
    seen = {"at first": adapter(x).detach().clone(), "shapes": [tuple(part.shape) for part in parts]}
    seen["down is random"] = bool(parts[0].detach().std() > 0)
    with torch.no_grad():
        for part, value in zip(parts, halves, strict=True):
            part.copy_(value)
    seen["in use"] = adapter(x).detach().clone()
    trained = list(adapter.trainable())
    seen["numbers trained"] = sum(p.numel() for p in trained)
    seen["the halves train"] = {id(p) for p in trained} == {id(p) for p in parts}
    seen["gradients on"] = all(p.requires_grad for p in trained)
    x = x.clone().requires_grad_(True)
    adapter(x).square().mean().backward()
    descend(adapter, 0.1)
    seen["gradient below"] = x.grad is not None and bool(x.grad.any())
    seen["base after a step"] = [linear.weight.detach().clone(), linear.bias.detach().clone()]
    return seen
