"""What several methods check, in the same words, and how they draw PyTorch's own initial values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from minipeft.layer import Method
from minipeft.targets import Target, resolve


def check_whole(name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} is not a whole number of at least {least}, such as 8.")


def check_share(name: str, value: float) -> None:
    """For dropout: a share of at least 0 and below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name}={value!r} is outside [0, 1); 0.0 turns it off.")


def check_gamma(gamma: float, positive: bool = False) -> None:
    number = isinstance(gamma, int | float) and not isinstance(gamma, bool) and abs(gamma) <= torch.finfo().max
    if not number or (positive and gamma <= 0):
        kind = "positive" if positive else "finite"
        raise ValueError(f"The scale γ is {gamma}; it must be a {kind} number of float32, such as 2.0.")


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}.")


def freeze(method: Method, *names: str) -> None:
    """Lists and sets among the settings of a frozen method become tuples, so that nobody changes them afterwards."""
    for name in names or ("targets",):
        if isinstance(value := getattr(method, name), list | set | frozenset):
            object.__setattr__(method, name, tuple(value))


def check_fits(rank: int, targets: Sequence[Target], name: str = "rank") -> None:
    for t in targets:
        if rank > min(t.d_in, t.d_out):
            raise ValueError(
                f"{name}={rank} is above min(d_in, d_out) of {t.key!r}, a {t.d_out}×{t.d_in} weight; "
                f"use at most {min(t.d_in, t.d_out)}, or other targets."
            )


def linear_targets(model: nn.Module, method: Method) -> list[Target]:
    """The targets of a method that has no meaning on an embedding, whose input is not a vector."""
    return no_embedding(resolve(model, method.targets), method)


def no_embedding(targets: list[Target], method: Method) -> list[Target]:
    if embedding := next((t for t in targets if isinstance(t.module, nn.Embedding)), None):
        raise ValueError(f"{type(method).__name__} works on linear layers, but {embedding.key!r} is an embedding.")
    return targets


class like:
    """`with like(weight, generator):` — what is built has PyTorch's own initial values, drawn on the CPU from
    `generator` and moved to the weight's device; on the meta device nothing is drawn."""

    def __init__(self, weight: torch.Tensor, generator: torch.Generator):
        self.meta = weight.device.type == "meta"
        self.device = torch.device(weight.device)
        self.seed = None if self.meta else torch.randint(2**31, (), generator=generator).item()

    def __enter__(self) -> None:
        self.fork = torch.random.fork_rng(devices=[])
        self.fork.__enter__()
        if not self.meta:
            torch.manual_seed(self.seed)
        self.device.__enter__()

    def __exit__(self, *error) -> None:
        self.device.__exit__(*error)
        self.fork.__exit__(*error)
