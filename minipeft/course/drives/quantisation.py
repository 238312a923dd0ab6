"""How a learner's answers to the assignment `quantisation` are called."""

from __future__ import annotations

import torch

from minipeft.course.drives.common import layer


def quantise(function, weight, code, block: int) -> dict:
    before = weight.clone(), code.clone()
    indices, scales = function(weight, code, block)
    kept = torch.equal(weight, before[0]) and torch.equal(code, before[1])
    return {"indices": indices, "scales": scales, "arguments kept": kept}


def held_bytes(value, seen: set) -> int:
    """The bytes of all tensors that an object holds, through attributes, lists and dictionaries; each storage once."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        key, size, inside = ("storage", storage.data_ptr()), storage.nbytes(), []
    else:
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
        if not inside and hasattr(value, "__dict__") and not isinstance(value, type) and not hasattr(value, "__code__"):
            inside = vars(value).values()
        key, size = id(value), 0
    if key in seen:
        return 0
    seen.add(key)
    return size + sum(held_bytes(each, seen) for each in inside)


def quantised_layer(cls, weight, bias, code, block: int, x, g) -> dict:
    """A quantised layer: what it holds, its output, and the gradient of x when that of the output is g."""
    made = cls(layer(weight, bias, conv1d=False), code, block)
    seen = {"bytes": held_bytes(made, set())}
    x = x.clone().requires_grad_()
    y = made(x)
    seen["output"] = y.detach().clone()
    if y.requires_grad:
        y.backward(g)
    return seen | {"gradient": x.grad}
