"""What several methods check, in the same words, and how they draw PyTorch's own initial values."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import torch
from torch import nn

from minipeft.calls import unheard
from minipeft.layer import Method
from minipeft.targets import Target, resolve


def check_whole(name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} is not a whole number of at least {least}, such as 8.")


def is_number(value: object, low: float = -math.inf) -> bool:
    """Whether it is a finite number of at least `low`, which a bool is not."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and low <= value
        and abs(value) <= sys.float_info.max
    )


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is neither True nor False.")


def check_share(name: str, value: float) -> None:
    """For dropout: a share of at least 0 and below 1."""
    if not (is_number(value) and 0.0 <= value < 1.0):
        raise ValueError(f"{name}={value!r} is outside [0, 1); 0.0 turns it off.")


def check_gamma(gamma: float, positive: bool = False) -> None:
    if not (is_number(gamma) and abs(gamma) <= torch.finfo().max) or (positive and gamma <= 0):
        kind = "positive" if positive else "finite"
        raise ValueError(f"The scale γ is {gamma}; it must be a {kind} number of float32, such as 2.0.")


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}.")


def freeze(method: Method, *names: str) -> None:
    """Lists and sets among the settings of a frozen method become tuples, so that nobody changes them afterwards."""
    for name in names or ("targets",):
        if isinstance(value := getattr(method, name), list | set | frozenset):
            object.__setattr__(method, name, tuple(value))


def fitting(
    model: nn.Module, method: Method, targets: Sequence[Target], refusal: Callable[[Target], str | None]
) -> list[Target]:
    """The targets. Where `refusal` says why one cannot be, that is raised, but for those that a shorthand such as
    "all-linear" leaves out all the same, because the model never calls them."""
    refused = {t.key: (t.path, why) for t in targets if (why := refusal(t))}
    shorthand = refused and isinstance(method.targets, str)
    silent = unheard(model, [path for path, _ in refused.values()]) if shorthand else {}
    left = [t for t in targets if t.path not in silent]
    if why := next((why for path, why in refused.values() if path not in silent or not left), None):
        raise ValueError(why)
    return left


def too_small(rank: int, name: str = "rank") -> Callable[[Target], str | None]:
    """For `fitting`: why a product of this rank is no ΔW of a target."""

    def refusal(t: Target) -> str | None:
        if rank <= (least := min(t.d_in, t.d_out)):
            return None
        return (
            f"{name}={rank} is above min(d_in, d_out) of {t.key!r}, a {t.d_out}×{t.d_in} weight; "
            f"use at most {least}, or other targets."
        )

    return refusal


def linear_targets(model: nn.Module, method: Method) -> list[Target]:
    """The targets of a method that has no meaning on an embedding, whose input is not a vector."""
    return no_embedding(resolve(model, method.targets), method)


def no_embedding(targets: list[Target], method: Method) -> list[Target]:
    if embedding := next((t for t in targets if isinstance(t.module, nn.Embedding)), None):
        raise ValueError(f"{type(method).__name__} works on linear layers, but {embedding.key!r} is an embedding.")
    return targets


class like:
    """`with like(weight, generator):` — what is built has PyTorch's own initial values, drawn on the CPU from
    `generator`, and is yet to be moved to the weight's device; on the meta device nothing is drawn."""

    def __init__(self, weight: torch.Tensor, generator: torch.Generator):
        self.meta = weight.device.type == "meta"
        self.device = torch.device("meta" if self.meta else "cpu")
        self.seed = None if self.meta else torch.randint(2**31, (), generator=generator).item()

    def __enter__(self) -> None:
        self.fork = torch.random.fork_rng(devices=[])
        self.fork.__enter__()
        if not self.meta:
            torch.default_generator.manual_seed(self.seed)  # the CPU's alone
        self.device.__enter__()

    def __exit__(self, *error) -> None:
        self.device.__exit__(*error)
        self.fork.__exit__(*error)
