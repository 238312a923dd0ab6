"""OFT: rotate the inputs of a layer, in blocks, and change nothing else (Qiu et al. 2023, "Controlling Text-to-Image
Diffusion by Orthogonal Finetuning", §3; the series: Qiu et al. 2025, "Orthogonal Finetuning Made Scalable", §4.2).

    y = W·Rᵀx + bias,   R = diag(R₁, …, R_n),   each R_i of size b × b made from a skew-symmetric Q_i = −Q_iᵀ

    "neumann":  R = I + 2·(Q + Q² + Q³) + Q⁴        the first terms of (I + Q)·(I − Q)⁻¹; orthogonal while Q is small
    "exact":    R = (I − Q)·(I + Q)⁻¹               Cayley's transform; orthogonal always, and it turns the other way

Angles between rows of W stay as they were. A block has b·(b − 1)/2 numbers, the triangle above Q's diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.files import OneMethodLayout, register
from minipeft.layer import Method, WeightLayer
from minipeft.methods.common import check_choice, check_whole, freeze, linear_targets
from minipeft.targets import Target, Targets


class OFTLayer(WeightLayer):
    """q (n, b·(b − 1)/2): the triangles of the n = d_in/b blocks, zero at first."""

    def __init__(self, target: Target, method: OFT, _: torch.Generator):
        super().__init__(target)
        self.method = method
        divisors = [b for b in range(1, target.d_in + 1) if target.d_in % b == 0]
        self.b = min(divisors, key=lambda b: (abs(b - method.block), b))
        numbers = self.b * (self.b - 1) // 2
        self.q = nn.Parameter(torch.zeros(target.d_in // self.b, numbers, **self.place(target)))

    def turn(self) -> torch.Tensor:
        """R − I of each block, (n, b, b), exactly zero at first."""
        i, j = torch.triu_indices(self.b, self.b, 1, device=self.q.device)
        Q = self.q.new_zeros(len(self.q), self.b, self.b)
        Q[:, i, j] = self.q
        Q = Q - Q.mT
        if self.method.transform == "exact":
            # (I − Q)·(I + Q)⁻¹ − I = −2Q·(I + Q)⁻¹
            return torch.linalg.solve(torch.eye(self.b).to(Q) + Q, -2 * Q, left=False)
        Q2 = Q @ Q
        return 2 * (Q + Q2 + Q2 @ Q) + Q2 @ Q2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """W·(Rᵀ − I)·x, (…, d_in) → (…, d_out)"""
        blocks = x.to(self.q.dtype).unflatten(-1, (-1, self.b))
        turned = torch.einsum("...nb,nbc->...nc", blocks, self.turn()).flatten(-2)
        return F.linear(turned, self.weight.to(self.q.dtype))

    def delta(self) -> torch.Tensor:
        # ΔW = W·(Rᵀ − I)
        blocks = self.weight.to(self.q.dtype).unflatten(-1, (-1, self.b))
        return torch.einsum("...nc,nbc->...nb", blocks, self.turn()).flatten(-2)

    def stored(self) -> dict[str, torch.Tensor]:
        return {"oft_R.weight": self.q}


@dataclass(frozen=True)
class OFT(Method):
    """W' = W·Rᵀ with R block-diagonal and orthogonal: d_in·(b − 1)/2 numbers a target, whatever its d_out.

    `block`: b; a target whose d_in it does not divide takes the divisor of d_in that is nearest.
    `transform`: how R comes from Q, "neumann" or "exact", see above.
    `targets`: see `minipeft.targets.resolve`; linear layers only.

    Raises ValueError for a block below 2 and an unknown transform.
    """

    block: int = 32
    _: KW_ONLY
    transform: str = "neumann"
    targets: Targets = "all-linear"

    formula = "d_in * (block - 1) // 2"
    examples = ({"block": 4}, {"block": 8, "transform": "exact"})

    def __post_init__(self) -> None:
        check_whole("block", self.block, least=2)
        check_choice("transform", self.transform, ("neumann", "exact"))
        freeze(self)

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], OFTLayer]]:
        return {t.key: partial(OFTLayer, t, self) for t in linear_targets(model, self)}


@register
class OFTLayout(OneMethodLayout):
    """oft_R.weight (n, b·(b − 1)/2)"""

    peft_type, layer, method, conv1d = "OFT", OFTLayer, OFT, False
    ends, needs = r"oft_R\.weight", "oft_R"
    options, kinds = {"oft_block_size": "block"}, {"oft_block_size": (int,), "use_cayley_neumann": (bool, type(None))}
    fixed = dict.fromkeys(("coft", "block_share", "module_dropout", "r"), (None, 0)) | {
        "num_cayley_neumann_terms": (None, 5)
    }

    def config(self, base: nn.Module, layers: list[OFTLayer]) -> dict:
        own = {"use_cayley_neumann": layers[0].method.transform == "neumann", "peft_version": "0.18.0"}  # its series
        return super().config(base, layers) | own

    def given(self, config: dict) -> dict:
        return super().given(config) | {"transform": "neumann" if config.get("use_cayley_neumann") else "exact"}
