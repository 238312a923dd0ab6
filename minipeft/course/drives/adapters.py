"""How a learner's answers to the assignment `adapters` are called."""

from __future__ import annotations

from minipeft.course.drives.common import draws, layer, life, seeded


def start_adapter(function, width: int, bottleneck: int, seed: int) -> dict:
    return draws(function, (width, bottleneck), seed)


HALVES = ("down.weight", "down.bias", "up.weight", "up.bias")


def adapter_after(cls, weight, bias, x, bottleneck: int, halves: list, seed: int) -> dict:
    """A layer with an adapter behind it: untrained, with given weights, and after a step of SGD."""
    linear = layer(weight, bias)
    with seeded(seed):
        adapter = cls(linear, bottleneck)
    parts = [adapter.down.weight, adapter.down.bias, adapter.up.weight, adapter.up.bias]
    seen: dict = {"shapes": [tuple(part.shape) for part in parts]}
    if seen["shapes"] != [tuple(half.shape) for half in halves]:
        return seen
    trained = list(adapter.trainable())
    seen["numbers trained"] = sum(p.numel() for p in trained)
    seen["the halves train"] = {id(p) for p in trained} == {id(p) for p in parts}
    values = dict(zip(HALVES, halves, strict=True))
    return seen | life(lambda: cls(linear, bottleneck), linear, values, "down.weight", x, seed)
