"""VeRA: one random pair A, B for the whole model, frozen; each layer learns two vectors that scale it (Kopiczko et al.
2024, "VeRA: Vector-based Random Matrix Adaptation", §3).

Layers of any width cut their part out of the pair. At d_out = 4096 and r = 256 a layer trains 4096 + 256 = 4,352
numbers; LoRA of rank 1 would train 8,192.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.attach import Method, WeightLayer
from minipeft.methods.lora import check_rank, linear_targets
from minipeft.targets import Target, Targets


@dataclass(frozen=True)
class VeRA(Method):
    """W' = W + Λ_b·B·Λ_d·A, with b (d_out,) zero and d (r,) constant at first; A and B are shared, random and frozen.

    `rank`: r; it costs r numbers a layer, so it may be far above LoRA's, and above d_in and d_out.
    `d_initial`: where d starts (§3.2; 0.1 was best, appendix). `dropout`: on the input, while training.
    `projection_seed`: draws A and B, on the CPU, as PEFT's `projection_prng_key` does; `attach`'s seed does not matter.
    `targets`: see `minipeft.targets.resolve`; linear layers only.

    Raises ValueError for a rank below 1, d_initial that is not finite, dropout outside [0, 1), a seed that is no whole
    number from 0 to 2⁶³ − 1.
    """

    rank: int = 256
    _: KW_ONLY
    targets: Targets = "all-linear"
    d_initial: float = 0.1
    dropout: float = 0.0
    projection_seed: int = 0

    def __post_init__(self) -> None:
        check_rank(self.rank)
        if not math.isfinite(self.d_initial):
            raise ValueError(f"d_initial={self.d_initial} is not a finite number, such as 0.1.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} is outside [0, 1); 0.0 turns it off.")
        seed = self.projection_seed
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise ValueError(f"projection_seed={seed!r} is not a whole number from 0 to 2⁶³ − 1.")
        if isinstance(self.targets, list | set | frozenset):
            object.__setattr__(self, "targets", tuple(self.targets))

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], VeRALayer]]:
        targets = linear_targets(model, self)
        pair = Pair(targets, self)
        return {t.key: partial(VeRALayer, t, self, pair) for t in targets}


class Pair(nn.Module):
    """A (r, largest d_in) and B (largest d_out, r), U(±√(6/d_in)) and U(±√(6/r)); every layer holds this one module.

    No `state_dict` has them: the seed and the shapes give them again. An adapter's file does, as PEFT's.
    """

    def __init__(self, targets: list[Target], method: VeRA):
        super().__init__()
        weight, r = targets[0].module.weight, method.rank
        dtype = torch.promote_types(weight.dtype, torch.float32)
        generator = torch.Generator().manual_seed(method.projection_seed)
        for name, shape in (("A", (r, max(t.d_in for t in targets))), ("B", (max(t.d_out for t in targets), r))):
            value = torch.empty(shape, device="meta" if weight.is_meta else "cpu")
            if not weight.is_meta:
                bound = math.sqrt(6 / shape[1])  # kaiming_uniform for a ReLU
                value.uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, value.to(weight.device, dtype), persistent=False)


class VeRALayer(WeightLayer):
    """b (d_out,) and d (r,) of one target."""

    def __init__(self, target: Target, method: VeRA, pair: Pair, _: torch.Generator):
        super().__init__(target)
        self.method, self.pair, self.shape = method, pair, (target.d_out, target.d_in)
        weight = target.module.weight
        place = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        self.b = nn.Parameter(torch.zeros(target.d_out, **place))
        self.d = nn.Parameter(torch.full((method.rank,), method.d_initial, **place))

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This target's A (r, d_in) and B (d_out, r)."""
        d_out, d_in = self.shape
        return self.pair.A[:, :d_in].to(self.d.device), self.pair.B[:d_out].to(self.d.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """b ⊙ (B·(d ⊙ (A·x))), (…, d_in) → (…, d_out)."""
        A, B = self.parts
        x = F.dropout(x.to(self.d.dtype), self.method.dropout, self.training)
        return self.b * F.linear(self.d * F.linear(x, A), B)

    def delta(self) -> torch.Tensor:
        # ΔW = Λ_b·B·Λ_d·A
        A, B = self.parts
        return self.b[:, None] * B @ (self.d[:, None] * A)

    def stored(self) -> dict[str, torch.Tensor]:
        return {"vera_lambda_b": self.b, "vera_lambda_d": self.d}
