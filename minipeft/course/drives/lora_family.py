"""How a learner's answers to the assignment `lora_family` are called."""

from __future__ import annotations

import torch

from minipeft.course.drives.common import descend, layer


def dora_layer(cls, weight, bias, x, rank: int, gamma: float, A, B, m, G, seed: int) -> dict:
    """A DoRA layer from birth to use: untrained, with given A, B and m, its gradients for ∂L/∂y = G, after a step."""
    torch.manual_seed(seed)
    linear = layer(weight, bias, conv1d=False)
    dora = cls(linear, rank, gamma)
    seen = {"at first": dora(x).detach().clone(), "A is random": bool(dora.A.detach().abs().sum() > 0)}
    seen |= {"shape of A": tuple(dora.A.shape), "shape of B": tuple(dora.B.shape), "numbers in m": dora.m.numel()}
    if (dora.A.shape, dora.B.shape, dora.m.numel()) != (A.shape, B.shape, m.numel()):
        return seen
    with torch.no_grad():
        for own, given in ((dora.A, A), (dora.B, B), (dora.m, m)):
            own.copy_(given.reshape(own.shape))
    dora.zero_grad()
    y = dora(x)
    seen["in use"] = y.detach().clone()
    (y * G).sum().backward()
    for name in ("A", "B", "m"):
        gradient = getattr(dora, name).grad
        seen[f"gradient of {name}"] = None if gradient is None else gradient.clone()
    descend(dora, 0.1)
    seen["weight after a step"] = linear.weight.detach().clone()
    seen["bias after a step"] = linear.bias.detach().clone()
    return seen
