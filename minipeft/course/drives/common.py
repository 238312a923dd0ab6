"""What several drives build and look at, and the plain call."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import nn

from minipeft.course.drives.promises import OVERWRITTEN, SHARED, NotKept, listed, overlap, same, weights


def call(function, *args, **keywords):
    return function(*args, **keywords)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global random numbers start at `seed`, and go on afterwards where they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class Conv1D(nn.Module):
    """GPT-2's linear layer: y = x·W + b with W of shape (d_in, d_out)."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))
        self.nf = nf

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Projection(nn.Linear):
    """A linear layer of a class of its own, as torch's attention has one."""


def flipped_layer(d_in: int, d_out: int) -> nn.Module:
    """transformers' own Conv1D where an answer has imported it, so that `isinstance` finds it."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return getattr(loaded, "Conv1D", Conv1D)(d_out, d_in)


def layer(weight: torch.Tensor, bias: torch.Tensor | None, conv1d: bool = False) -> nn.Module:
    with seeded(0):
        linear = Projection if bias is None else nn.Linear
        made = flipped_layer(*weight.shape) if conv1d else linear(*weight.shape[::-1], bias=bias is not None)
    made.weight = nn.Parameter(weight.clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.clone())
    return made


@torch.no_grad()
def descend(model: nn.Module, lr: float) -> None:
    """One step of gradient descent on all that trains."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is not None:
            parameter -= lr * parameter.grad


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a gradient of its own, unless it has one already."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def gradient(loss: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """∂loss/∂tensor; zeros where nothing reaches it."""
    found = torch.autograd.grad(loss, tensor, allow_unused=True, retain_graph=True)[0] if loss.requires_grad else None
    return torch.zeros_like(tensor) if found is None else found


def draws(function: Callable, sizes: tuple, seed: int) -> dict:
    """What `function(*sizes, generator)` draws: with a seed, again, with another, later from the same generator, and
    from one that has been used by somebody else."""

    def generator(number: int, used: int = 0) -> torch.Generator:
        found = torch.Generator().manual_seed(number)
        torch.rand(used, generator=found)
        return found

    before = torch.random.get_rng_state()
    one = generator(seed)
    plans = {
        "first": one,
        "later": one,
        "again": generator(seed),
        "other": generator(seed + 1),
        "used": generator(seed, 3),
    }
    seen: dict = {}
    every: list[torch.Tensor] = []
    for name, each in plans.items():
        made = listed(function(*sizes, each))
        made = [made] if isinstance(made, torch.Tensor) else made
        seen[name] = [tensor.detach().clone() for tensor in made]
        if overlap(made):
            raise NotKept(SHARED)
        every += made
    if overlap(every):
        raise NotKept(OVERWRITTEN)
    if [each.initial_seed() for each in plans.values()] != [seed, seed, seed, seed + 1, seed]:
        raise NotKept("It sets the seed of `generator`, which is somebody else's: draw from it, and no more.")
    return seen | {"global": torch.equal(before, torch.random.get_rng_state())}


def life(
    make: Callable[[], nn.Module], linear: nn.Module, parts: dict[str, torch.Tensor], drawn: str, x, seed: int
) -> dict:
    """A layer over `linear` from birth to use: what holds of it, its output with these `parts`, and all gradients.

    `parts`: {attribute: the value that it gets}; `drawn` is the one that starts at random.
    """
    alone = linear(x).detach()
    with seeded(seed):
        made, second, third = make(), make(), make()
    own = {name: attrgetter(name)(made) for name in parts}
    base = {name: p for name, p in linear.named_parameters() if p is not None}
    kept = {name: p.detach().clone() for name, p in base.items()}
    seen: dict = {"at first": made(x).detach().clone()}
    start = own[drawn].detach()
    seen[f"{drawn} starts at random: its rows and columns differ"] = bool(start.unique().numel() > 0.9 * start.numel())
    for one, other in ((made, second), (second, third)):
        if same(*(attrgetter(drawn)(each).detach() for each in (one, other))):
            raise NotKept(f"{drawn} of two layers starts with the same numbers: a layer sets no seed of its own.")
    seen["two layers share no parameter"] = not {id(p) for p in own.values()} & {id(p) for p in second.parameters()}
    stored = list(made.state_dict().values())
    seen["the base's weight is in the state_dict"] = any(same(v, kept["weight"]) for v in stored)
    for name, p in own.items():
        seen[f"{name} is an nn.Parameter that requires a gradient"] = isinstance(p, nn.Parameter) and p.requires_grad
        seen[f"{name} is in the state_dict"] = any(v.data_ptr() == p.data_ptr() for v in stored if v.numel())
    train = {id(p) for p in made.parameters() if p.requires_grad}
    seen["nothing trains but what the text lists"] = train <= {id(p) for p in own.values()}
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(parts[name].reshape(p.shape))
    x = leaf(x)

    def slopes(y: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = (y * weights(y).to(y.dtype)).sum()
        return {"x": gradient(loss, x)} | {
            name: gradient(loss, p).reshape(parts[name].shape) if p.requires_grad else torch.zeros_like(parts[name])
            for name, p in own.items()
        }

    y = made(x)
    seen["in use"] = y.detach().clone()
    seen["gradients"] = slopes(y)
    seen["in eval() the same gradients flow as in train()"] = same(slopes(made.eval()(x)), slopes(made.train()(x)))
    with torch.no_grad():
        seen["under torch.no_grad() it gives the same"] = same(made(x), seen["in use"])
    seen["a copy of the layer gives the same"] = same(copy.deepcopy(made)(x).detach(), seen["in use"])
    seen["eval() and train() give the same"] = same(made.eval()(x).detach(), made.train()(x).detach())
    if y.requires_grad:
        made(x).square().sum().backward()
    descend(made, 0.1)
    seen["after a step of training eval() gives what train() gives, and nothing of an earlier call"] = same(
        made.eval()(x).detach(), made.train()(x).detach()
    )
    seen["the base by itself gives what it gave"] = same(linear(x).detach(), alone)
    for name, p in base.items():
        seen[f"the base's {name} stays as it is through a step of training"] = torch.equal(p.detach(), kept[name])
    return seen
