"""A random subspace: few numbers move all weights at once (Li et al. 2018, "Measuring the Intrinsic Dimension of
Objective Landscapes", §2; Aghajanyan et al. 2020, "Intrinsic Dimensionality Explains the Effectiveness of Language
Model Fine-Tuning", §3).

    θ = θ₀ + P·z,   z (k,) trained and shared by all weights,   P (D, k) random and frozen

The smallest k that reaches 90 % of what full fine-tuning gains is called d₉₀; see `analyze/intrinsic.py`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.layer import Method, WeightLayer
from minipeft.methods.common import check_choice, check_whole, freeze, linear_targets
from minipeft.targets import Target, Targets


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

    examples = ({"dim": 16}, {"dim": 16, "projection": "dense"})

    def __post_init__(self) -> None:
        check_whole("dim", self.dim)
        check_choice("projection", self.projection, ("dense", "fastfood"))
        freeze(self)

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], SubspaceLayer]]:
        targets = linear_targets(model, self)
        D = sum(t.d_out * t.d_in for t in targets)
        if self.dim > D:
            raise ValueError(f"dim={self.dim} is above the {D} weights of the targets; use at most {D}.")
        z = nn.Parameter(torch.zeros(self.dim, **WeightLayer.place(targets[0])))
        return {t.key: partial(SubspaceLayer, t, self, z, D, t is targets[0]) for t in targets}


class SubspaceLayer(WeightLayer):
    """This target's rows of P, as factors, and the z that all layers share."""

    def __init__(
        self, target: Target, method: Subspace, z: nn.Parameter, D: int, first: bool, generator: torch.Generator
    ):
        super().__init__(target)
        self.size, self.scale, self.first = (target.d_out, target.d_in), 1 / math.sqrt(D), first
        self.shared = (z,)  # in a tuple, so that it is the first layer's parameter, and stands once in a state
        if first:
            self.z = z
        rows, dim = target.d_out * target.d_in, method.dim
        self.dense = method.projection == "dense"
        given = None if z.is_meta else generator  # on the meta device nothing is drawn
        if self.dense:
            self._keep("P", z, (rows, dim), lambda size: torch.randn(size, generator=given))
            return
        L = 1 << (dim - 1).bit_length()
        blocks = -(-rows // L)
        self._keep("signs", z, (blocks, L), lambda size: torch.randint(2, size, generator=given) * 2.0 - 1)
        self._keep("order", z, (blocks, L), lambda size: torch.rand(size, generator=given).argsort(1))
        self._keep("gauss", z, (blocks, L), lambda size: torch.randn(size, generator=given))

    def _keep(self, name: str, z: torch.Tensor, size: tuple[int, int], draw: Callable[..., torch.Tensor]) -> None:
        with torch.device("meta") if z.is_meta else contextlib.nullcontext():
            value = draw(size)
        value = value.to(z.device, z.dtype if value.is_floating_point() else None)
        self.register_buffer(name, value, persistent=False)

    def added(self) -> int:
        """k at the first target, 0 at the others, which share its z."""
        return len(self.shared[0]) if self.first else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.shared[0].dtype), self.delta())

    def delta(self) -> torch.Tensor:
        if self.dense:
            return (self.P @ self.shared[0] * self.scale).view(self.size)
        z, L = self.shared[0], self.signs.shape[1]
        # H·G·Π·H·S·z / √(L·D), all blocks at once
        mixed = hadamard(self.signs * F.pad(z, (0, L - len(z))))
        mixed = hadamard(self.gauss * mixed.gather(1, self.order)) * (self.scale / math.sqrt(L))
        return mixed.flatten()[: self.size[0] * self.size[1]].view(self.size)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x (…, L) times the L × L Hadamard matrix (entries ±1), for L a power of two, in L·log₂ L steps."""
    L, half = x.shape[-1], 1
    while half < L:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x, half = torch.stack((a + b, a - b), -2).flatten(-3), 2 * half
    return x
