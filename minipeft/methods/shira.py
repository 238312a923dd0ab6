"""SHiRA: train a few entries of each weight, drawn at random and fixed (Bhardwaj et al. 2024, "Sparse High Rank
Adapters", §3).

    W' = W + S,   S = 0 but at k = r·(d_in + d_out) random places, as many numbers as a LoRA of rank r has

S is sparse, and of high rank: nearly every row and column has an entry of its own. Two such adapters hardly overlap, so
they can be added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial

import torch
from torch import nn

from minipeft.files import OneMethodLayout, register
from minipeft.layer import Method
from minipeft.methods.common import check_whole, fitting, freeze, linear_targets
from minipeft.methods.masked import MaskedLayer, drawn
from minipeft.targets import Target, Targets


class SHiRALayer(MaskedLayer):
    """`value` (k,), 0 at first, and `index` (k,), its places in the flattened ΔW."""

    def __init__(self, target: Target, method: SHiRA, generator: torch.Generator):
        numbers = target.d_out * target.d_in, method.rank * (target.d_in + target.d_out)
        super().__init__(target, partial(drawn, *numbers), generator)
        self.method = method

    def stored(self) -> dict[str, torch.Tensor]:
        columns = self.shape[1]
        return {
            "shira_weight": self.value,
            "shira_indices": torch.stack([self.index // columns, self.index % columns]).int(),
        }

    def restore(self, numbers: dict[str, torch.Tensor]) -> None:
        rows, columns = numbers["shira_indices"].long()
        inside = (rows >= 0) & (rows < self.shape[0]) & (columns >= 0) & (columns < self.shape[1])
        index = rows * self.shape[1] + columns
        if not inside.all() or len(index.unique()) != len(index):
            raise ValueError(f"the places in shira_indices of {self.key!r} are not different entries of its weight.")
        self.index.copy_(index)
        self.value.data.copy_(numbers["shira_weight"])


@dataclass(frozen=True)
class SHiRA(Method):
    """W' = W + S with r·(d_in + d_out) entries of S trained, at places that `attach`'s seed draws.

    `rank`: r, which counts the entries in LoRA's terms; the rank of S is not limited by it.
    `targets`: see `minipeft.targets.resolve`; linear layers only. `Masked` trains entries chosen in other ways.

    Raises ValueError for a rank below 1; at `attach`, where a target has fewer than r·(d_in + d_out) entries.
    """

    rank: int = 8
    _: KW_ONLY
    targets: Targets = "all-linear"

    examples = ({"rank": 2},)
    formula = "rank * (d_in + d_out)"

    def __post_init__(self) -> None:
        check_whole("rank", self.rank)
        freeze(self)

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], SHiRALayer]]:
        targets = fitting(model, self, linear_targets(model, self), self.refusal)
        return {t.key: partial(SHiRALayer, t, self) for t in targets}

    def refusal(self, t: Target) -> str | None:
        if self.rank <= (most := t.d_in * t.d_out // (t.d_in + t.d_out)):
            return None
        return (
            f"rank={self.rank} asks for {self.rank * (t.d_in + t.d_out):,} entries of {t.key!r}, a "
            f"{t.d_out}×{t.d_in} weight; use at most {most}, or other targets."
        )


@register
class SHiRALayout(OneMethodLayout):
    """shira_weight (k,), the values, and shira_indices (2, k), their rows and columns"""

    peft_type, layer, method, conv1d = "SHIRA", SHiRALayer, SHiRA, False
    ends, needs = "shira_(?:weight|indices)", "shira_weight and shira_indices"
    options, kinds = {"r": "rank"}, {"r": (int,)}
