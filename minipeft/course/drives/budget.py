"""How a learner's answers to the assignment `budget` are called."""

from __future__ import annotations

import torch
from torch import nn

from minipeft.course.drives.promises import keeping


def owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds what has this dotted name, made where it is missing, and the last part of the name."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    return root, last


def list_shapes(function, layers: list, targets: list) -> object:
    """`layers`: (dotted name, kind, d_in, d_out), on the meta device; the name of an earlier one as kind shares it."""
    from transformers.pytorch_utils import Conv1D

    make = {
        "linear": nn.Linear,
        "linear of torch's attention": nn.modules.linear.NonDynamicallyQuantizableLinear,
        "Conv1D": lambda d_in, d_out: Conv1D(d_out, d_in),
        "embedding": nn.Embedding,
        "norm": lambda d_in, _: nn.LayerNorm(d_in),
    }
    model = nn.Module()
    with torch.device("meta"):
        for name, kind, d_in, d_out in layers:
            module, last = owner(model, name)
            module.add_module(last, make[kind](d_in, d_out) if kind in make else model.get_submodule(kind))
    return keeping(function, model, targets)


def holding(parameters: list, ties: list, buffers: list) -> nn.Module:
    """A model of `parameters` (name, shape, type, part), `ties` (a second name, of what) and `buffers` (name, shape,
    type, whether it is saved). The part that a parameter plays is "frozen", "trains", "still", where it trains and its
    gradient is 0, or "idle", where it could train."""
    model = nn.Module()
    for name, shape, dtype, part in parameters:
        module, last = owner(model, name)
        value = torch.full(shape, float(part != "still"), dtype=getattr(torch, dtype))
        module.register_parameter(last, nn.Parameter(value, requires_grad=part != "frozen"))
    for name, shape, dtype, saved in buffers:
        module, last = owner(model, name)
        module.register_buffer(last, torch.ones(shape, dtype=getattr(torch, dtype)), persistent=saved)
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, other in ties:
        module, last = owner(model, name)
        put = module.register_parameter if isinstance(held[other], nn.Parameter) else module.register_buffer
        put(last, held[other])
    return model


def bytes_before_training(function, parameters: list, ties: list, buffers: list) -> object:
    return keeping(function, holding(parameters, ties, buffers))


def bytes_after_a_step(function, parameters: list, ties: list, buffers: list, optimizer: str, settings: dict) -> object:
    """One step of training on the sum of squares of all that is not idle; then the function is called. "Counting" is
    SGD that counts the steps of each parameter in a plain number."""
    model = holding(parameters, ties, buffers)
    used = [model.get_parameter(name) for name, _, _, part in parameters if part != "idle"]
    trained = [p for p in model.parameters() if p.requires_grad]
    steps = getattr(torch.optim, optimizer, torch.optim.SGD)(trained, **settings)
    sum(p.float().square().sum() for p in used).backward()
    steps.step()
    for parameter in trained if optimizer == "Counting" else ():
        steps.state[parameter]["steps"] = 1
    return keeping(function, model, steps)
