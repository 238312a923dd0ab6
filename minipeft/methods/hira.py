"""HiRA: a low-rank pattern that scales the weight itself, number by number (Huang et al. 2025, "HiRA:
Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", §3).

    W' = W + W ⊙ (B·A)        A (r, d_in) random, B (d_out, r) zero at first

⊙ multiplies entry by entry, so ΔW can have full rank although it is written with r·(d_in + d_out) numbers, as LoRA's
is. What is zero in W stays zero.
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
from minipeft.methods.common import check_share, check_whole, fitting, freeze, linear_targets, too_small
from minipeft.methods.lora import draw
from minipeft.targets import Target, Targets


class HiRALayer(WeightLayer):
    """A (r, d_in) and B (d_out, r)."""

    def __init__(self, target: Target, method: HiRA, generator: torch.Generator):
        super().__init__(target)
        self.method = method
        self.A = nn.Parameter(torch.zeros(method.rank, target.d_in, **self.place(target)))
        self.B = nn.Parameter(torch.zeros(target.d_out, method.rank, **self.place(target)))
        if not self.A.is_meta:
            self.A.data.copy_(draw("kaiming", *self.A.shape, self.A.dtype, generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(W ⊙ (B·A))·x, (…, d_in) → (…, d_out). Unlike LoRA's, this takes a product of W's size."""
        return F.linear(F.dropout(x.to(self.A.dtype), self.method.dropout, self.training), self.delta())

    def delta(self) -> torch.Tensor:
        # ΔW = W ⊙ (B·A)
        return self.weight.to(self.A.dtype) * (self.B @ self.A)

    def stored(self) -> dict[str, torch.Tensor]:
        return {"hira_A": self.A, "hira_B": self.B}


@dataclass(frozen=True)
class HiRA(Method):
    """W' = W ⊙ (1 + B·A): r·(d_in + d_out) numbers a target.

    `rank`: r, from 1 to min(d_in, d_out) of every target. `dropout`: on the input, while training.
    `targets`: see `minipeft.targets.resolve`; linear layers only.

    Raises ValueError for a rank below 1, dropout outside [0, 1); at `attach`, for a rank that no target can have.
    """

    rank: int = 8
    _: KW_ONLY
    targets: Targets = "all-linear"
    dropout: float = 0.0

    examples = ({"rank": 2},)
    formula = "rank * (d_in + d_out)"

    def __post_init__(self) -> None:
        check_whole("rank", self.rank)
        check_share("dropout", self.dropout)
        freeze(self)

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], HiRALayer]]:
        targets = fitting(model, self, linear_targets(model, self), too_small(self.rank))
        return {t.key: partial(HiRALayer, t, self) for t in targets}


@register
class HiRALayout(OneMethodLayout):
    """hira_A (r, d_in), hira_B (d_out, r)"""

    peft_type, layer, method = "HIRA", HiRALayer, HiRA
    ends, needs = r"hira_[AB]", "hira_A and hira_B"
    options = {"r": "rank", "hira_dropout": "dropout"}
    kinds = {"r": (int,), "hira_dropout": (*NUMBER, type(None))}
    fixed = {"rank_pattern": (None, {})}
