"""Projected LoRA: the update confined to a fixed k-dimensional subspace of the inputs.

One of the documents that this course examines calls this LoRA and writes the change of a weight as L Uᵀ, with U a fixed
matrix of orthonormal columns. It is LoRA with a frozen, orthonormal A = Uᵀ, published as LoRA-FA (Zhang et al. 2023,
"LoRA-FA: Memory-efficient Low-rank Adaptation", §3): inputs that are orthogonal to U are passed on as before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.files import register
from minipeft.layer import Method, WeightLayer
from minipeft.methods.common import check_choice, check_gamma, check_whole, freeze, linear_targets
from minipeft.methods.lora import LoRALayout, draw
from minipeft.targets import Target, Targets

BASES = ("random", "top", "bottom")


@dataclass(frozen=True)
class ProjectedLoRA(Method):
    """W' = W + γ·L·Uᵀ with U (d_in, k) orthonormal and frozen, L (d_out, k) zero at first and trained.

    `rank`: k, from 1 to d_in of every target. `gamma`: γ. `targets`: see `minipeft.targets.resolve`.
    `basis`: how U is chosen, which nothing can mend later: "random" (uniform among all subspaces), "top" or "bottom"
        (the right singular vectors of W with the largest or the smallest singular values).

    Raises ValueError for a rank below 1, γ that is not finite, an unknown basis; at `attach`, for a rank above d_in.
    """

    rank: int = 8
    gamma: float = 2.0
    _: KW_ONLY
    targets: Targets = "all-linear"
    basis: str = "random"

    formula = "rank * d_out"
    examples = ({"rank": 3}, {"rank": 3, "basis": "top"})

    def __post_init__(self) -> None:
        check_whole("rank", self.rank)
        check_gamma(self.gamma)
        check_choice("basis", self.basis, BASES)
        freeze(self)

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], ProjectedLayer]]:
        targets = linear_targets(model, self)
        for t in targets:
            if self.rank > t.d_in:
                raise ValueError(f"rank={self.rank} is above d_in of {t.key!r}, a {t.d_out}×{t.d_in} weight.")
        return {t.key: partial(ProjectedLayer, t, self) for t in targets}


class ProjectedLayer(WeightLayer):
    """L (d_out, k), trained, and U (d_in, k), a buffer that is saved with it."""

    rank_stabilized, dropout, embedding = False, 0.0, False  # it is written as a LoRA without these

    def __init__(self, target: Target, method: ProjectedLoRA, generator: torch.Generator):
        super().__init__(target)
        self.rank, self.gamma = method.rank, float(method.gamma)
        self.L = nn.Parameter(torch.zeros(target.d_out, method.rank, **self.place(target)))
        self.register_buffer("U", torch.zeros(target.d_in, method.rank, **self.place(target)))
        if not self.L.is_meta:
            self.U.copy_(self.subspace(method.basis, generator))

    def subspace(self, basis: str, generator: torch.Generator) -> torch.Tensor:
        """U (d_in, k) with UᵀU = I."""
        d_in, k = self.U.shape
        if basis == "random":
            return draw("orthogonal", k, d_in, self.U.dtype, generator).T
        Vh = torch.linalg.svd(self.weight.detach().to(self.U.dtype), full_matrices=True).Vh  # (d_in, d_in)
        return (Vh[:k] if basis == "top" else Vh[-k:]).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """γ·L·Uᵀ·x, (…, d_in) → (…, d_out)."""
        return F.linear(F.linear(x.to(self.U.dtype), self.U.T), self.L) * self.gamma

    def delta(self) -> torch.Tensor:
        # ΔW = γ·L·Uᵀ, zero on everything orthogonal to U
        return self.gamma * (self.L @ self.U.T)

    def stored(self) -> dict[str, torch.Tensor]:
        return {"lora_A.weight": self.U.T, "lora_B.weight": self.L}


@register
class ProjectedLayout(LoRALayout):
    """A LoRA with lora_A.weight Uᵀ and lora_B.weight L. PEFT loads it as one, here U stays frozen."""

    layer, flag = ProjectedLayer, {"minipeft": "ProjectedLoRA"}

    def make(self, config: dict, rank: int, alpha: float, dropout: float, targets: list) -> ProjectedLoRA:
        return ProjectedLoRA(rank=rank, gamma=alpha / rank, targets=targets)
