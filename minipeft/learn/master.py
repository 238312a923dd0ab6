"""AdamW for parameters in bfloat16: it works on float32 copies, the masters, which are rounded to the parameters.

    M ← AdamW(M, ∇),   W = M rounded to bfloat16

bfloat16 keeps 8 bits: a step below a 256th of W would be rounded away, and at a rate of 1e-5 nearly every step is. With
masters the steps add up until W moves (Micikevicius et al. 2018, "Mixed Precision Training", §3.1).
"""

from __future__ import annotations

import torch
from torch import nn


def adamw(parameters: list[dict] | list[nn.Parameter], **settings) -> torch.optim.AdamW:
    """torch's AdamW, with masters where a parameter is narrower than float32."""
    groups = parameters if parameters and isinstance(parameters[0], dict) else [{"params": list(parameters)}]
    narrow = any(torch.finfo(p.dtype).bits < 32 for group in groups for p in group["params"])
    return (MasterAdamW if narrow else torch.optim.AdamW)(groups, **settings)


class MasterAdamW(torch.optim.AdamW):
    """`masters`: {parameter: its float32 copy}, for those that are narrower."""

    def __init__(self, groups: list[dict], **settings):
        self.masters: dict[nn.Parameter, nn.Parameter] = {}
        for group in groups:
            for p in group["params"]:
                if torch.finfo(p.dtype).bits < 32:
                    self.masters[p] = nn.Parameter(p.detach().float())
        super().__init__([g | {"params": [self.masters.get(p, p) for p in g["params"]]} for g in groups], **settings)

    @torch.no_grad()
    def step(self, closure=None):
        for p, master in self.masters.items():
            master.grad = None if p.grad is None else p.grad.float()
        loss = super().step(closure)
        for p, master in self.masters.items():
            p.copy_(master)
            master.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for p in self.masters:
            p.grad = None
