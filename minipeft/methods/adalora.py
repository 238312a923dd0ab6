"""AdaLoRA: give every layer a generous rank, and take away what turns out to matter least (Zhang et al. 2023, "AdaLoRA:
Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", §3).

    W' = W + γ·P·Λ·Q   P (d_out, r) and Q (r, d_in) kept close to orthonormal, Λ (r,) the singular values

A triplet (column of P, entry of Λ, row of Q) is pruned by zeroing its singular value. All layers share one budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.attach import Tuned
from minipeft.files import MAPPING, NUMBER, Tensors, WeightLayout, register
from minipeft.layer import Layer, Method, WeightLayer
from minipeft.methods.common import (
    check_choice,
    check_gamma,
    check_share,
    check_whole,
    fitting,
    freeze,
    is_number,
    linear_targets,
    too_small,
)
from minipeft.methods.lora import LoRALayout
from minipeft.targets import Target, Targets, exact, flipped, module_at


@dataclass(frozen=True)
class AdaLoRA(Method):
    """W' = W + γ·P·Λ·Q, with the ranks moved between the layers at each optimizer step, whosever loop takes it.

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

    formula = "initial_rank * (d_in + d_out + 1)"
    examples = ({"rank": 2, "initial_rank": 3},)

    def __post_init__(self, alpha: float | None) -> None:
        def default(name: str, value: object) -> None:
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        if (self.rank, self.initial_rank) != (0, 0):  # both zero: a place that a file says was pruned away
            check_whole("rank", self.rank)
            default("initial_rank", -(-3 * self.rank // 2))
            check_whole("initial_rank", self.initial_rank)
        if self.rank > self.initial_rank:
            raise ValueError(f"rank={self.rank} is above initial_rank={self.initial_rank}: ranks only shrink.")
        if self.gamma is not None and alpha is not None:
            raise ValueError(f"gamma={self.gamma} and alpha={alpha} both set the scale γ; give one of them.")
        if alpha is not None and not is_number(alpha):
            raise ValueError(f"alpha={alpha!r} is not a number, such as 2.0.")
        default("gamma", 2.0 if alpha is None else alpha / max(1, self.initial_rank))
        check_gamma(self.gamma, positive=True)
        for name in ("steps", "interval"):
            check_whole(name, getattr(self, name))
        default("warmup", self.steps // 10)
        default("final", self.steps // 3)
        for name in ("warmup", "final"):
            check_whole(name, getattr(self, name), least=0)
        if self.warmup >= self.steps - self.final:
            raise ValueError(
                f"warmup={self.warmup} and final={self.final} leave none of {self.steps} steps to prune in."
            )
        for name in ("beta1", "beta2"):
            if not (is_number(value := getattr(self, name)) and 0.0 < value < 1.0):
                raise ValueError(f"{name}={value!r} is outside (0, 1), such as 0.85.")
        if not is_number(self.orthogonality, 0):
            raise ValueError(f"orthogonality={self.orthogonality!r} is not a number of at least 0.")
        check_choice("penalty_form", self.penalty_form, ("paper", "peft"))
        check_share("dropout", self.dropout)
        freeze(self)

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], AdaLoRALayer]]:
        targets = fitting(model, self, linear_targets(model, self), too_small(self.initial_rank, "initial_rank"))
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
    def stepped(self, layers: Sequence[Layer]) -> None:
        mine, last = self.own(layers), self.steps - self.final
        for layer in mine:
            layer.taken += 1
        step = int(mine[0].taken)
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
        self.P = nn.Parameter(torch.zeros(target.d_out, r, **self.place(target)))
        self.lam = nn.Parameter(torch.zeros(r, 1, **self.place(target)))
        self.Q = nn.Parameter(torch.zeros(r, target.d_in, **self.place(target)))
        self.register_buffer(
            "taken", torch.zeros((), dtype=torch.long)
        )  # optimizer steps; another run goes on from here
        self.register_buffer("kept", torch.ones(r, dtype=torch.bool, device=self.P.device))
        for name, p in list(self.named_parameters()):
            self.register_buffer(f"sensitivity_{name}", torch.zeros_like(p))
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(p))
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
        """S = s(λ) + mean s(column of P) + mean s(row of Q) of each triplet, (r,), with s = Ī·Ū (Eq. 7, 11).

        Zero where the loss has never been: there, P and Q have the penalty's gradient alone, and λ none.
        """
        if not self.sensitivity_lam.any():
            return torch.zeros_like(self.lam.flatten())
        s = {n: getattr(self, f"sensitivity_{n}") * getattr(self, f"uncertainty_{n}") for n in ("P", "lam", "Q")}
        return s["lam"].flatten() + (s["Q"].mean(1) + s["P"].mean(0))

    def reached(self) -> bool:
        return self.lam.grad is not None  # the penalty's gradient comes to P and Q alone

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


@register
class AdaLoRALayout(WeightLayout):
    """lora_A Q (rank, d_in), lora_B P (d_out, rank), lora_E Λ (rank, 1), without the pruned triplets.

    lora_alpha = γ·(init_r + 10⁻⁵): PEFT divides by that sum. rank_pattern: for each lora_E which of init_r are left.
    """

    peft_type, layer = "ADALORA", AdaLoRALayer
    ends, needs = r"lora_[ABE]", "lora_A, lora_B and lora_E"
    numbers = {
        "target_r": "rank", "total_step": "steps", "tinit": "warmup", "tfinal": "final", "deltaT": "interval",
        "beta1": "beta1", "beta2": "beta2", "orth_reg_weight": "orthogonality", "lora_dropout": "dropout",
    }  # fmt: skip
    kinds = {
        "init_r": (int,), "lora_alpha": NUMBER, "rank_pattern": MAPPING,
        **{name: (*NUMBER, type(None)) for name in numbers},
    }  # fmt: skip
    foreign = LoRALayout.foreign

    def config(self, base: nn.Module, layers: list[AdaLoRALayer]) -> dict:
        first, width = layers[0], max(len(layer.kept) for layer in layers)
        if any(layer.gamma != first.gamma for layer in layers):
            raise ValueError("These AdaLoRA layers differ in γ, and a file has one; save them under separate names.")
        alive = {f"{x.key}.lora_E": x.alive().tolist() + [False] * (width - len(x.kept)) for x in layers}
        return super().config(base, layers) | {
            "init_r": width,
            "lora_alpha": first.gamma * (width + 1e-5),
            **{name: getattr(first.method, ours) for name, ours in self.numbers.items()},
            "fan_in_fan_out": any(flipped(module_at(base, layer.path)) for layer in layers),
            "bias": "none",
            "rank_pattern": None if all(map(all, alive.values())) else alive,
        }

    def build(self, config: dict, places: list[str], tensors: Tensors) -> list[AdaLoRA]:
        """One method for each rank that is left. What was pruned stays pruned, and nothing more will be."""
        pattern, width = config.get("rank_pattern") or {}, config["init_r"]
        groups: dict[int, list[tuple[str, int, int]]] = {}
        for place in places:
            left = pattern.get(f"{place}.lora_E", [True] * min(width, 10**6))
            if not isinstance(left, list) or len(left) != width or not all(isinstance(each, bool) for each in left):
                raise ValueError(f"rank_pattern must hold {width} times true or false for {place!r}.")
            groups.setdefault(sum(left), []).append(exact(place))
        given = {ours: config[name] for name, ours in self.numbers.items() if config.get(name) is not None}
        gamma = config["lora_alpha"] / (width + 1e-5)
        return [
            AdaLoRA(gamma=gamma, initial_rank=rank, targets=targets, **(given | {"rank": rank}))
            for rank, targets in groups.items()
        ]
