"""PiSSA: LoRA that starts from the largest singular directions of the weight itself (Meng et al. 2024, "PiSSA:
Principal Singular Values and Singular Vectors Adaptation of Large Language Models", §3).

    W = U·S·Vᵀ;   γ·B₀·A₀ = U_r·S_r·V_rᵀ, of which A and B start as copies;   ΔW = γ·(B·A − B₀·A₀)

The paper freezes W − γ·B₀·A₀ instead of W, which is the same model; here W stays as it is.
`LoRA(init="pissa")` makes it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.files import exactly, register
from minipeft.methods.lora import LoRA, LoRALayer, LoRALayout
from minipeft.targets import Target


class PiSSALayer(LoRALayer):
    """A, B, and the A₀, B₀ that they start from. ΔW has a rank of at most 2r, and is written as a LoRA of that rank:
    (B, −B₀) and (A; A₀), as PEFT converts it."""

    embeddings = False

    def __init__(self, target: Target, method: LoRA, generator: torch.Generator):
        super().__init__(target, method, generator)
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def start(self, init: str, generator: torch.Generator) -> None:
        U, S, Vh = torch.linalg.svd(self.weight.detach().to(self.A.dtype), full_matrices=False)
        root = (S[: self.rank] / self.gamma).sqrt()
        self.A.data.copy_(root[:, None] * Vh[: self.rank])
        self.B.data.copy_(U[:, : self.rank] * root)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # γ·((B − B₀)·A·x + B₀·(A − A₀)·x), exactly zero at the start, as a sum of small products: the difference of two
        # large ones, γ·(B·A·x − B₀·A₀·x), would lose digits
        x = x.to(self.A.dtype)
        start, low = F.linear(x, self.A - self.A0), F.linear(x, self.A)
        if self.training and self.dropout:  # only what A reads is dropped: B₀·A₀ is a part of the frozen W
            dropped = F.linear(F.dropout(x, self.dropout), self.A)
            start, low = start + dropped - low, dropped
        return (F.linear(low, self.B - self.B0) + F.linear(start, self.B0)) * self.gamma

    def delta(self) -> torch.Tensor:
        # γ·(B·A − B₀·A₀), summed in the same way
        return self.gamma * ((self.B - self.B0) @ self.A + self.B0 @ (self.A - self.A0))

    def stored(self) -> dict[str, torch.Tensor]:
        return {"lora_A.weight": torch.cat([self.A, self.A0]), "lora_B.weight": torch.cat([self.B, -self.B0], 1)}

    def restore(self, numbers: dict[str, torch.Tensor]) -> None:
        A, B, r = numbers["lora_A.weight"], numbers["lora_B.weight"], self.rank
        for mine, value in ((self.A, A[:r]), (self.A0, A[r:]), (self.B, B[:, :r]), (self.B0, -B[:, r:])):
            mine.data.copy_(value)


LoRA.layers["pissa"] = PiSSALayer


@register
class PiSSALayout(LoRALayout):
    """A LoRA of rank 2r: lora_A.weight (A; A₀), lora_B.weight (B, −B₀). PEFT loads it as one, here it stays PiSSA."""

    layer, flag = PiSSALayer, {"minipeft": "PiSSA"}

    def config(self, base: nn.Module, layers: list[PiSSALayer]) -> dict:
        config = super().config(base, layers)
        alphas = {exactly(x.key): x.gamma * 2 * x.rank for x in layers}  # γ = α/√r would change with the rank
        return config | {
            "r": 2 * config["r"],
            "use_rslora": False,
            "lora_alpha": alphas[exactly(layers[0].key)],
            "rank_pattern": {key: 2 * rank for key, rank in config["rank_pattern"].items()},
            "alpha_pattern": {key: alphas[key] for key in config["alpha_pattern"]},
        }

    def make(self, config: dict, rank: int, alpha: float, dropout: float, targets: list) -> LoRA:
        if rank % 2 or rank < 2:
            raise ValueError(f"rank={rank} is not twice the rank of a PiSSA.")
        return LoRA(rank=rank // 2, gamma=alpha / rank, dropout=dropout, targets=targets, init="pissa")
