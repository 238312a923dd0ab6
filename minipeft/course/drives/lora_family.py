"""How a learner's answers to the assignment `lora_family` are called."""

from __future__ import annotations

from minipeft.course.drives.common import layer, life, seeded


def dora_layer(cls, weight, bias, x, rank: int, gamma: float, A, B, m, seed: int) -> dict:
    """A DoRA layer from birth to use: untrained, with given A, B and m, its gradients, and after a step of SGD."""
    linear = layer(weight, bias)
    with seeded(seed):
        dora = cls(linear, rank, gamma)
    seen: dict = {"shape of A": tuple(dora.A.shape), "shape of B": tuple(dora.B.shape), "numbers in m": dora.m.numel()}
    if (dora.A.shape, dora.B.shape, dora.m.numel()) != (A.shape, B.shape, m.numel()):
        return seen
    return seen | life(lambda: cls(linear, rank, gamma), linear, {"A": A, "B": B, "m": m}, "A", x, seed)
