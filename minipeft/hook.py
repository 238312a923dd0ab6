"""How a layer acts on a module of the base: a forward hook that changes the module's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from minipeft.layer import After


class State:
    """What all seats of one model look at when called. Plain attributes, so that `torch.compile` guards them."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.silent = False  # disabled or merged: the seats add nothing
        self.rows: dict[str, torch.Tensor] | None = None  # per-row choice: adapter name -> its rows of the batch
        self.batch = 0


class Seat:
    """The hook on one module of the base, and what the layers that sit there do to its output: {adapter name: …}."""

    def __init__(self, state: State):
        self.state = state
        self.layers: dict[str, list[After]] = {}

    def hook(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
        state = self.state
        if state.silent:
            return output
        x, plain = args[0] if args else next(iter(kwargs.values())), output
        if state.rows is None:
            for name in state.active:
                for after in self.layers.get(name, ()):
                    output = after(output, x, plain)
            return output
        if x.shape[0] != state.batch:
            raise ValueError(
                f"adapters= has {state.batch} entries, but a {type(module).__name__} got a batch of {x.shape[0]}; "
                "per-row choice works where dimension 0 of every adapted module's input is the batch."
            )
        for name, rows in state.rows.items():
            rows = rows.to(output.device)
            for after in self.layers.get(name, ()):
                output = output.index_copy(0, rows, after(output[rows], x[rows], plain[rows]))
        return output


def check_rows(adapters: Sequence[str | None], known: Mapping[str, nn.ModuleDict], args: tuple, kwargs: dict) -> None:
    """Whether `adapters` can choose an adapter for each row of the batch that a call with these arguments has."""
    if isinstance(adapters, str) or not all(name is None or isinstance(name, str) for name in adapters):
        raise TypeError(f"adapters={adapters!r} is not a list with one adapter name or None per row of the batch.")
    for name in known.keys() & set(adapters):
        layers = list(known[name].values())
        if any(layer.slots or layer.front for layer in layers):
            what = "replaces parameters of" if any(layer.slots for layer in layers) else "puts tokens in front of"
            raise ValueError(f"{name!r} {what} the base, so it cannot be chosen per row; use({name!r}).")
    tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim)
    batch = len(next(tensors, adapters))
    if batch != len(adapters):
        raise ValueError(
            f"adapters= has {len(adapters)} entries for a batch of {batch}; give one name or None per row."
        )


def remove_hooks(model: nn.Module, owners: Sequence[object]) -> None:
    """Takes every hook that is a method of one of `owners` off the model."""
    ours = {id(owner) for owner in owners}
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if id(getattr(hook, "__self__", None)) in ours]:
                del hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
