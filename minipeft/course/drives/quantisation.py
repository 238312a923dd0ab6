"""How a learner's answers to the assignment `quantisation` are called."""

from __future__ import annotations

import array
import gc
import sys
import types

import torch

from minipeft.course.drives.common import layer, leaf
from minipeft.course.drives.promises import NotKept, same


def quantise(function, weight, code, block: int) -> dict:
    before = weight.clone(), code.clone()
    indices, scales = function(weight, code, block)
    kept = torch.equal(weight, before[0]) and torch.equal(code, before[1])
    return {"indices": indices, "scales": scales, "arguments kept": kept}


def held_bytes(value) -> int:
    """The bytes of the numbers that an object holds in tensors, arrays, texts and lists, each storage once.

    They are found as Python's own garbage collector finds them, through attributes, closures, partials and whatever
    else, and in autograd's graph.
    """
    seen, total, waiting = set(), 0, [value]
    while waiting:
        each = waiting.pop()
        key = id(each)
        if isinstance(each, torch.Tensor):
            key = each.untyped_storage().data_ptr()
        if key in seen or isinstance(each, PASSED):
            continue
        seen.add(key)
        if isinstance(each, torch.Tensor):
            total += each.untyped_storage().nbytes()
            waiting.append(each.grad_fn)
        elif type(each).__module__ == "numpy" and hasattr(each, "nbytes"):
            total += each.nbytes
            waiting.append(getattr(each, "base", None))
        elif isinstance(each, float | bytes | bytearray | memoryview | array.array):
            total += 8 if isinstance(each, float) else sys.getsizeof(each)
        if isinstance(each, torch.autograd.graph.Node):
            waiting += [getattr(each, name) for name in dir(each) if name.startswith("_saved_")]
            waiting += [getattr(each, "variable", None), *(deeper for deeper, _ in each.next_functions)]
        elif isinstance(each, types.FunctionType):
            waiting += [*(each.__closure__ or ()), *(each.__defaults__ or ()), each.__dict__]
        elif not isinstance(each, str | int | bytes):
            waiting += gc.get_referents(each)
    return total


PASSED = (type, types.ModuleType, types.BuiltinFunctionType, types.CodeType, types.FrameType)


def quantised_layer(cls, weight, bias, code, block: int, x, g) -> dict:
    """A quantised layer: what it holds, its output, and the gradient of x when that of the output is g."""
    linear = layer(weight, bias)
    made = cls(linear, code, block)
    if any(p.requires_grad and not (bias is not None and same(p.detach(), bias)) for p in made.parameters()):
        raise NotKept("Something trains beside the bias: codes and scales stay as they are.")
    x = leaf(x)
    bytes_before = held_bytes(made)
    y = made(x)
    seen = {"bytes": max(bytes_before, held_bytes(made)), "output": y}
    seen["the layer that was given keeps its numbers"] = torch.equal(linear.weight.detach(), weight) and (
        bias is None or torch.equal(linear.bias.detach(), bias)
    )
    slope = torch.autograd.grad(y, x, g, allow_unused=True, retain_graph=True)[0] if y.requires_grad else None
    return seen | {"gradient": slope, "a second call gives the same": torch.equal(made(x), y)}
