"""MiSS: one small block, repeated along all inputs (Kang and Yin 2024, "MiSS: Balancing LoRA Performance and Efficiency
with Simple Shard Sharing", §3; called Bone in its first versions).

    x (…, d_in) ──cut into pieces of r, the last one padded──▶ Σ of the pieces (…, r) ──▶ D (r, d_out) ──▶ + y

    ΔW = (Dᵀ Dᵀ Dᵀ …), cut to d_in columns: every r-th input has the same column

At d_out = d_in = 4096 and r = 64 it trains 64·4096 = 262,144 numbers; LoRA of rank 32 has as many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.files import NUMBER, OneMethodLayout, register
from minipeft.layer import Method, WeightLayer
from minipeft.methods.common import check_share, check_whole, fitting, freeze, linear_targets
from minipeft.targets import Target, Targets


class MiSSLayer(WeightLayer):
    """D (r, d_out), zero at first."""

    def __init__(self, target: Target, method: MiSS, _: torch.Generator):
        super().__init__(target)
        self.method, self.d_in = method, target.d_in
        self.D = nn.Parameter(torch.zeros(method.rank, target.d_out, **self.place(target)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(Σ pieces of x)·D, (…, d_in) → (…, d_out)"""
        r = self.method.rank
        x = F.dropout(F.pad(x.to(self.D.dtype), (0, -self.d_in % r)), self.method.dropout, self.training)
        return x.unflatten(-1, (-1, r)).sum(-2) @ self.D

    def delta(self) -> torch.Tensor:
        # ΔW = (Dᵀ Dᵀ …) of shape (d_out, d_in)
        return self.D.T.repeat(1, -(-self.d_in // self.method.rank))[:, : self.d_in]

    def stored(self) -> dict[str, torch.Tensor]:
        return {"miss_block": self.D}


@dataclass(frozen=True)
class MiSS(Method):
    """ΔW = (Dᵀ Dᵀ …): r·d_out numbers a target, of rank at most r.

    `rank`: r, from 1 to d_in of every target; with half of LoRA's numbers at the same r, it is usually twice as large.
    `dropout`: on the input, while training. `targets`: see `minipeft.targets.resolve`; linear layers only.

    Raises ValueError for a rank below 1, dropout outside [0, 1); at `attach`, for a rank above d_in.
    """

    rank: int = 16
    _: KW_ONLY
    targets: Targets = "all-linear"
    dropout: float = 0.0

    examples = ({"rank": 4}, {"rank": 5, "targets": "mlp"})
    formula = "rank * d_out"

    def __post_init__(self) -> None:
        check_whole("rank", self.rank)
        check_share("dropout", self.dropout)
        freeze(self)

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], MiSSLayer]]:
        targets = fitting(model, self, linear_targets(model, self), self.refusal)
        return {t.key: partial(MiSSLayer, t, self) for t in targets}

    def refusal(self, t: Target) -> str | None:
        wide = self.rank <= t.d_in
        return None if wide else f"rank={self.rank} is above the {t.d_in} inputs of {t.key!r}; use fewer."


@register
class MiSSLayout(OneMethodLayout):
    """miss_block (r, d_out). Its variants "bat" and "mini" compute something else and are refused."""

    peft_type, layer, method, conv1d = "MISS", MiSSLayer, MiSS, False
    ends, needs = "miss_block", "miss_block"
    options = {"r": "rank", "miss_dropout": "dropout"}
    kinds = {"r": (int,), "miss_dropout": (*NUMBER, type(None))}
    fixed = {"init_weights": (None, True, False)}
