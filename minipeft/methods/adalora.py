"""AdaLoRA: give every layer a generous rank, and take away what turns out to matter least (Zhang et al. 2023, "AdaLoRA:
Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", §3).

    W' = W + γ·P·Λ·Q   P (d_out, r) and Q (r, d_in) kept close to orthonormal, Λ (r,) the singular values

A triplet (column of P, entry of Λ, row of Q) is pruned by zeroing its singular value. All layers share one budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.attach import Layer, Method, Tuned, WeightLayer
from minipeft.methods.lora import check_rank, linear_targets
from minipeft.targets import Target, Targets


@dataclass(frozen=True)
class AdaLoRA(Method):
    """W' = W + γ·P·Λ·Q, with the ranks moved between the layers while it trains: `fit` does so; see `Tuned.stepped`.

    `rank`: the average rank in the end. `initial_rank`: every layer's at first, half as much again if nothing is said.
    `gamma`: γ, 2.0 if nothing is said; `alpha` sets γ = α/initial_rank. It must be positive.
    `steps`: T, how many optimizer steps the schedule spans. For the first `warmup` of them nothing is pruned; for the
        last `final` the ranks stay (a tenth and a third of `steps` if nothing is said); between, at every
        `interval`-th step, b(t) = b_T + (b_0 − b_T)·(1 − (t − warmup)/(T − warmup − final))³ triplets stay (Eq. 12).
    `beta1`, `beta2`: the smoothing of sensitivity and of its uncertainty (Eq. 9, 10).
    `orthogonality`: the weight of the penalty, Σ ‖PᵀP − I‖²_F + ‖QQᵀ − I‖²_F (Eq. 4), or with penalty_form="peft" the
        mean of the unsquared norms, which the authors' code and PEFT take.

    Raises ValueError for ranks that do not fit, a schedule without time to prune, and values out of range.
    """

    rank: int = 8
    gamma: float | None = None
    alpha: InitVar[float | None] = None
    _: KW_ONLY
    initial_rank: int | None = None
    steps: int = 60
    warmup: int | None = None
    final: int | None = None
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5
    penalty_form: str = "paper"
    dropout: float = 0.0
    targets: Targets = "all-linear"

    def __post_init__(self, alpha: float | None) -> None:
        def default(name: str, value: object) -> None:
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        if (self.rank, self.initial_rank) != (0, 0):  # both zero: a place that a file says was pruned away
            check_rank(self.rank)
            default("initial_rank", math.ceil(1.5 * self.rank))
            check_rank(self.initial_rank, "initial_rank")
        if self.rank > self.initial_rank:
            raise ValueError(f"rank={self.rank} is above initial_rank={self.initial_rank}: ranks only shrink.")
        if self.gamma is not None and alpha is not None:
            raise ValueError(f"gamma={self.gamma} and alpha={alpha} both set the scale γ; give one of them.")
        default("gamma", 2.0 if alpha is None else alpha / max(1, self.initial_rank))
        if not (math.isfinite(self.gamma) and self.gamma > 0):
            raise ValueError(f"The scale γ is {self.gamma}; it must be a positive number, such as 2.0.")
        for name in ("steps", "interval"):
            check_rank(getattr(self, name), name)
        default("warmup", self.steps // 10)
        default("final", self.steps // 3)
        if not (self.warmup >= 0 and self.final >= 0 and self.warmup < self.steps - self.final):
            raise ValueError(
                f"warmup={self.warmup} and final={self.final} leave none of {self.steps} steps to prune in."
            )
        for name in ("beta1", "beta2"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is outside (0, 1), such as 0.85.")
        if not (math.isfinite(self.orthogonality) and self.orthogonality >= 0):
            raise ValueError(f"orthogonality={self.orthogonality} is not a number of at least 0.")
        if self.penalty_form not in ("paper", "peft"):
            raise ValueError(f'penalty_form={self.penalty_form!r} is not "paper" or "peft".')
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} is outside [0, 1); 0.0 turns it off.")
        if isinstance(self.targets, list | set | frozenset):
            object.__setattr__(self, "targets", tuple(self.targets))

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], AdaLoRALayer]]:
        targets = linear_targets(model, self)
        for t in targets:
            if self.initial_rank > min(t.d_in, t.d_out):
                raise ValueError(
                    f"initial_rank={self.initial_rank} is above min(d_in, d_out) of {t.key!r}, a {t.d_out}×{t.d_in} "
                    f"weight; use at most {min(t.d_in, t.d_out)}, or other targets."
                )
        return {t.key: partial(AdaLoRALayer, t, self) for t in targets}

    def penalty(self, layers: Sequence[Layer]) -> torch.Tensor | float:
        """orthogonality · Σ ‖PᵀP − I‖²_F + ‖QQᵀ − I‖²_F, or the mean of the unsquared norms."""
        grams = [gram for layer in self.own(layers) for gram in (layer.P.T @ layer.P, layer.Q @ layer.Q.T)]
        gaps = [gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device) for gram in grams]
        if not gaps or not self.orthogonality:
            return 0.0
        if self.penalty_form == "paper":
            return self.orthogonality * sum(gap.square().sum() for gap in gaps)
        return self.orthogonality * sum(torch.linalg.norm(gap) for gap in gaps) / len(gaps)

    def budget(self, step: int, layers: int) -> int:
        """How many triplets of all `layers` are kept after `step` steps (Eq. 12)."""
        first, last = layers * self.initial_rank, layers * self.rank
        if step <= self.warmup:
            return first
        share = 1 - (step - self.warmup) / (self.steps - self.final - self.warmup)
        return int(last + (first - last) * max(0.0, share) ** 3)

    @torch.no_grad()
    def stepped(self, layers: Sequence[Layer], step: int) -> None:
        mine, last = self.own(layers), self.steps - self.final
        if step < last:
            for layer in mine:
                layer.observe()
        if step == last or (self.warmup < step < last and step % self.interval == 0):
            self.allocate(mine, self.budget(step, len(mine)))
        elif step > last:
            for layer in mine:
                layer.prune()

    def allocate(self, layers: list[AdaLoRALayer], budget: int) -> None:
        """Keeps the `budget` most important triplets of all layers together (Algorithm 1)."""
        scores = [layer.importance() for layer in layers]
        surplus = sum(map(len, scores)) - budget
        if surplus > 0:
            threshold = torch.cat([score.cpu() for score in scores]).kthvalue(surplus).values
            for layer, score in zip(layers, scores, strict=True):
                layer.kept.copy_(score > threshold.to(score.device))
                layer.prune()

    def own(self, layers: Sequence[Layer]) -> list[AdaLoRALayer]:
        return [layer for layer in layers if isinstance(layer, AdaLoRALayer) and layer.method == self]


class AdaLoRALayer(WeightLayer):
    """P (d_out, r), lam (r, 1), Q (r, d_in), and which of the r triplets are kept."""

    def __init__(self, target: Target, method: AdaLoRA, generator: torch.Generator):
        super().__init__(target)
        self.method, self.gamma, r = method, float(method.gamma), method.initial_rank
        weight = target.module.weight
        place = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        self.P = nn.Parameter(torch.zeros(target.d_out, r, **place))
        self.lam = nn.Parameter(torch.zeros(r, 1, **place))
        self.Q = nn.Parameter(torch.zeros(r, target.d_in, **place))
        self.register_buffer("kept", torch.ones(r, dtype=torch.bool, device=weight.device))
        for name, p in list(self.named_parameters()):
            self.register_buffer(f"sensitivity_{name}", torch.zeros_like(p), persistent=False)
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(p), persistent=False)
            if name != "lam" and not p.is_meta:
                p.data.copy_(torch.empty(p.shape, dtype=p.dtype).normal_(0, 0.02, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """γ·P·Λ·Q·x, (…, d_in) → (…, d_out)."""
        x = F.dropout(x.to(self.Q.dtype), self.method.dropout, self.training)
        return F.linear(F.linear(x, self.lam * self.Q), self.P) * self.gamma

    def delta(self) -> torch.Tensor:
        # ΔW = γ·P·Λ·Q
        return self.gamma * (self.P @ (self.lam * self.Q))

    def observe(self) -> None:
        """I = |w·∂L/∂w|, smoothed: Ī ← β₁Ī + (1 − β₁)I;  Ū ← β₂Ū + (1 − β₂)|I − Ī| (Eq. 8 to 10)."""
        for name, p in self.named_parameters():
            if p.grad is not None:
                smooth, spread = getattr(self, f"sensitivity_{name}"), getattr(self, f"uncertainty_{name}")
                now, b1, b2 = (p * p.grad).abs(), self.method.beta1, self.method.beta2
                smooth.copy_(b1 * smooth + (1 - b1) * now)
                spread.copy_(b2 * spread + (1 - b2) * (now - smooth).abs())

    def importance(self) -> torch.Tensor:
        """S = s(λ) + mean s(column of P) + mean s(row of Q) of each triplet, (r,), with s = Ī·Ū (Eq. 7, 11)."""
        s = {n: getattr(self, f"sensitivity_{n}") * getattr(self, f"uncertainty_{n}") for n in ("P", "lam", "Q")}
        return s["lam"].flatten() + (s["Q"].mean(1) + s["P"].mean(0))

    def prune(self) -> None:
        self.lam.data[~self.kept] = 0.0

    def alive(self) -> torch.Tensor:
        """Which triplets a file must hold: those that are kept, and those that gradients have woken since."""
        return self.kept | (self.lam.detach() != 0).flatten()

    def stored(self) -> dict[str, torch.Tensor]:
        alive = self.alive()
        if alive.all():
            return {"lora_A": self.Q, "lora_B": self.P, "lora_E": self.lam}
        return {"lora_A": self.Q[alive], "lora_B": self.P[:, alive], "lora_E": self.lam[alive]}


def ranks(tuned: Tuned) -> dict[str, int]:
    """{path: how many triplets are kept} of the active adapters' AdaLoRA layers, in the model's order."""
    layers = (layer for name in tuned.active for layer in tuned.adapters[name].values())
    return {layer.key: int(layer.kept.sum()) for layer in layers if isinstance(layer, AdaLoRALayer)}
