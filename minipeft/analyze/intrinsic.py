"""Intrinsic dimension: how many numbers a task needs when they move the weights through a random subspace
(Li et al. 2018, "Measuring the Intrinsic Dimension of Objective Landscapes", §2; Aghajanyan et al. 2020, "Intrinsic
Dimensionality Explains the Effectiveness of Language Model Fine-Tuning", §3).

    θ = θ₀ + P·z,   z (k,) trained and shared by all weights,   P (D, k) random and frozen

The smallest k that reaches 90 % of what full fine-tuning gains is called d₉₀.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.attach import Method, WeightLayer
from minipeft.targets import Target, Targets, resolve


@dataclass(frozen=True)
class Subspace(Method):
    """ΔW = reshape(P·z) for every target, with one z (k,) for all of them, zero at first.

    `dim`: k. `targets`: linear layers and Conv1D, see `minipeft.targets.resolve`; D is the number of their weights.
    `projection`: "dense", P ~ N(0, 1/D), which stores D·k numbers; or "fastfood", P = H·G·Π·H·S/√(L·D) in blocks of
    L = 2^⌈log₂ k⌉ rows (Le et al. 2013, "Fastfood"): H Hadamard, S signs, Π a permutation, G Gaussian. That one stores
    3·D numbers and multiplies by P in D·log₂ L steps. In both E‖P·z‖² = ‖z‖², so z's length is θ's way from θ₀.

    Each number moves every weight a little: learning rates of 0.01 to 1 are usual under Adam. P follows from `attach`'s
    seed and is not part of the state dict. Raises ValueError, at `attach`, for k above D and for embeddings.
    """

    dim: int = 64
    projection: str = "fastfood"
    targets: Targets = "all-linear"

    def __post_init__(self) -> None:
        if not isinstance(self.dim, int) or isinstance(self.dim, bool) or self.dim < 1:
            raise ValueError(f"dim={self.dim!r} is not a whole number of at least 1, such as 64.")
        if self.projection not in ("dense", "fastfood"):
            raise ValueError(f'projection={self.projection!r} is not "dense" or "fastfood".')
        if isinstance(self.targets, list | set | frozenset):
            object.__setattr__(self, "targets", tuple(self.targets))

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], SubspaceLayer]]:
        targets = resolve(model, self.targets)
        if embedding := next((t for t in targets if isinstance(t.module, nn.Embedding)), None):
            raise ValueError(f"{embedding.path!r} is an embedding; a random subspace here moves linear layers only.")
        D = sum(t.d_out * t.d_in for t in targets)
        if self.dim > D:
            raise ValueError(f"dim={self.dim} is above the {D} weights of the targets; use at most {D}.")
        weight = targets[0].module.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        z = nn.Parameter(torch.zeros(self.dim, dtype=dtype, device=weight.device))
        return {t.key: partial(SubspaceLayer, t, self, z, D, t is targets[0]) for t in targets}


class SubspaceLayer(WeightLayer):
    """This target's rows of P, as factors, and the z that all layers share."""

    def __init__(
        self, target: Target, method: Subspace, z: nn.Parameter, D: int, first: bool, generator: torch.Generator
    ):
        super().__init__(target)
        self.z, self.size, self.scale, self.first = z, (target.d_out, target.d_in), 1 / math.sqrt(D), first
        rows, dim = target.d_out * target.d_in, method.dim
        self.dense = method.projection == "dense"
        if self.dense:
            self._keep("P", z, (rows, dim), lambda size: torch.randn(size, generator=generator))
            return
        L = 1 << (dim - 1).bit_length()
        blocks = -(-rows // L)
        self._keep("signs", z, (blocks, L), lambda size: torch.randint(2, size, generator=generator) * 2.0 - 1)
        self._keep("order", z, (blocks, L), lambda size: torch.rand(size, generator=generator).argsort(1))
        self._keep("gauss", z, (blocks, L), lambda size: torch.randn(size, generator=generator))

    def _keep(self, name: str, z: torch.Tensor, size: tuple[int, int], draw: Callable[..., torch.Tensor]) -> None:
        value = torch.empty(size) if z.is_meta else draw(size)
        value = value.to(z.device, z.dtype if value.is_floating_point() else None)
        self.register_buffer(name, value, persistent=False)

    def added(self) -> int:
        """k at the first target, 0 at the others, which share its z."""
        return len(self.z) if self.first else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.z.dtype), self.delta())

    def delta(self) -> torch.Tensor:
        if self.dense:
            return (self.P @ self.z * self.scale).view(self.size)
        L = self.signs.shape[1]
        # H·G·Π·H·S·z / √(L·D), all blocks at once
        mixed = hadamard(self.signs * F.pad(self.z, (0, L - len(self.z))))
        mixed = hadamard(self.gauss * mixed.gather(1, self.order)) * (self.scale / math.sqrt(L))
        return mixed.flatten()[: self.size[0] * self.size[1]].view(self.size)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x (…, L) times the L × L Hadamard matrix (entries ±1), for L a power of two, in L·log₂ L steps."""
    L, half = x.shape[-1], 1
    while half < L:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x, half = torch.stack((a + b, a - b), -2).flatten(-3), 2 * half
    return x


def intrinsic_dimension(losses: Mapping[int, float], before: float, full: float, share: float = 0.9) -> int | None:
    """d₉₀: the least k whose loss recovers at least `share` of full fine-tuning's gain; None if no k tried does.

    (before − loss_k) / (before − full) ≥ share. Raises ValueError when full fine-tuning gained nothing.
    """
    if not full < before:
        raise ValueError(
            f"Full fine-tuning went from {before:g} to {full:g}, so there is no gain to recover a share of."
        )
    return next((k for k in sorted(losses) if before - losses[k] >= share * (before - full)), None)
