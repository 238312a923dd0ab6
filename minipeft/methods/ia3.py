"""(IA)³: rescale keys, values and the feed-forward's inner activations, one number each (Liu et al. 2022, "Few-Shot
Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", §3.3).

    k' = l_k ⊙ k,   v' = l_v ⊙ v,   y = W_down·(l_ff ⊙ h);   every l starts at one
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from minipeft.attach import Method, WeightLayer
from minipeft.methods.lora import no_embedding
from minipeft.targets import Target, Targets, resolve


@dataclass(frozen=True)
class IA3(Method):
    """y' = l ⊙ (W·x + b) on `targets`, y' = W·(l ⊙ x) + b on `feedforward`: d_out and d_in numbers a layer.

    `targets`: the layers whose outputs are scaled, keys and values in the paper; the names are Llama's.
    `feedforward`: the layers whose inputs are scaled, the second of the feed-forward; () for none.

    Raises ValueError, at `attach`, when a pattern matches nothing, and for a layer in both.
    """

    targets: Targets = ("k_proj", "v_proj")
    feedforward: Targets = ("down_proj",)

    def __post_init__(self) -> None:
        for name in ("targets", "feedforward"):
            if isinstance(value := getattr(self, name), list | set | frozenset):
                object.__setattr__(self, name, tuple(value))
        if self.targets == () and self.feedforward == ():
            raise ValueError("targets and feedforward are both empty, so IA3 would train nothing; name some layers.")

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], IA3Layer]]:
        outputs, inputs = (
            {t.key: t for t in resolve(model, which)} if which != () else {}
            for which in (self.targets, self.feedforward)
        )
        if both := outputs.keys() & inputs.keys():
            raise ValueError(f"{min(both)!r} is in targets and in feedforward; scale its output or its input.")
        no_embedding([*outputs.values(), *inputs.values()], self)
        return {t.key: partial(IA3Layer, t, t.key in inputs) for t in (outputs | inputs).values()}


class IA3Layer(WeightLayer):
    """l: (d_out, 1), or (1, d_in) if it scales the input."""

    def __init__(self, target: Target, feedforward: bool, _: torch.Generator):
        super().__init__(target)
        self.feedforward = feedforward
        weight = target.module.weight
        shape = (1, target.d_in) if feedforward else (target.d_out, 1)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.l = nn.Parameter(torch.ones(shape, dtype=dtype, device=weight.device))

    def extra(self, x: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """W·(l ⊙ x) + b less the plain output, or (l − 1) ⊙ the plain output."""
        l = self.l.flatten()  # noqa: E741
        if self.feedforward:
            return (self.owner[0].forward((l * x).to(x.dtype)) - plain)[..., self.rows]
        return (l - 1) * plain[..., self.rows]

    def delta(self) -> torch.Tensor:
        # ΔW = (l − 1) ⊙ W, by rows or by columns
        return (self.l - 1) * self.weight.to(self.l.dtype)

    def changes(self) -> dict[str, torch.Tensor]:
        bias = getattr(self.owner[0], "bias", None)
        if self.feedforward or bias is None:
            return super().changes()
        change = torch.zeros(bias.shape, dtype=self.l.dtype, device=bias.device)
        change[self.rows] = (self.l.flatten() - 1) * bias[self.rows]  # an output's scale takes the bias along
        return super().changes() | {"bias": change}

    def stored(self) -> dict[str, torch.Tensor]:
        return {"ia3_l": self.l}
