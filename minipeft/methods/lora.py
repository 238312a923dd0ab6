"""LoRA: learn the change of a weight as a product of two thin matrices (Hu et al. 2021, "LoRA: Low-Rank Adaptation of
Large Language Models", §4.1).

                 ┌─────────── W (d_out, d_in), frozen ───────────┐
    x (…, d_in) ─┤                                               + ──▶ y (…, d_out)
                 └── A (r, d_in) ──▶ r numbers ──▶ B (d_out, r) ─┘ × γ

At d_out = d_in = 4096 and r = 8, A and B hold 8·(4096 + 4096) = 65,536 numbers; W holds 16,777,216.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import KW_ONLY, InitVar, dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.attach import Method, WeightLayer
from minipeft.targets import Target, Targets, resolve

INITS = ("kaiming", "gaussian", "orthogonal", "pissa")
FAULTS = ("both-random",)


@dataclass(frozen=True)
class LoRA(Method):
    """W' = W + γ·B·A with A (r, d_in) random, B (d_out, r) zero, W frozen.

    `rank`: r, from 1 to min(d_in, d_out) of every target (§7.2 asks how small it can be).
    `gamma`: γ, 2.0 if nothing is said. `alpha` is the papers' way to say it: γ = α/r (§4.1), or γ = α/√r with
        `rank_stabilized` (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", §3).
    `targets`: see `minipeft.targets.resolve`.
    `init` of A: "kaiming" U(−1/√d_in, 1/√d_in), as in the authors' code; "gaussian" N(0, 1/r²), as in PEFT;
        "orthogonal": orthonormal rows. "pissa": A and B from the largest singular directions of W, see `PiSSALayer`.
        "both-random" is a fault that is in circulation, A and B both N(0, 1): it is here to be shown, and warns.
    `dropout`: the probability that an input of A is dropped while training; embeddings have no such input.
    `lr_ratio`: B's learning rate as a multiple of A's (Hayou et al. 2024, "LoRA+", §5: about 16); `fit` obeys it. On an
        embedding, where B is the random one, it changes nothing.

    Raises ValueError for a rank below 1, γ that is not finite, γ and α both, dropout outside [0, 1), an unknown init;
    and, at `attach`, for a rank above min(d_in, d_out) and for targets that match nothing.
    """

    rank: int = 8
    gamma: float | None = None
    alpha: InitVar[float | None] = None
    _: KW_ONLY
    rank_stabilized: bool = False
    targets: Targets = "all-linear"
    init: str = "kaiming"
    dropout: float = 0.0
    lr_ratio: float = 1.0

    def __post_init__(self, alpha: float | None) -> None:
        check_rank(self.rank)
        if self.gamma is not None and alpha is not None:
            raise ValueError(f"gamma={self.gamma} and alpha={alpha} both set the scale γ; give one of them.")
        if self.rank_stabilized and self.gamma is None and alpha is None:
            raise ValueError("rank_stabilized=True says how alpha becomes γ = α/√r, so it needs alpha.")
        for name, value in (("gamma", self.gamma), ("alpha", alpha)):
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise ValueError(f"{name}={value!r} is not a number, such as 2.0.")
        gamma = 2.0 if self.gamma is None else self.gamma
        if alpha is not None:
            # γ = α/r,  or  γ = α/√r
            gamma = alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)
        if not math.isfinite(gamma):
            raise ValueError(f"The scale γ is {gamma}; it must be a finite number, such as 2.0.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} is outside [0, 1); 0.0 turns it off.")
        if self.init not in INITS + FAULTS:
            raise ValueError(f"init={self.init!r} is not one of {', '.join(INITS)}.")
        if not (math.isfinite(self.lr_ratio) and self.lr_ratio > 0):
            raise ValueError(f"lr_ratio={self.lr_ratio} is not a positive number, such as 16.0.")
        if self.init == "pissa" and gamma <= 0:
            raise ValueError(f'init="pissa" splits a part of W into γ·B·A, so γ must be positive, but is {gamma}.')
        object.__setattr__(self, "gamma", float(gamma))
        if isinstance(self.targets, list | set | frozenset):
            object.__setattr__(self, "targets", tuple(self.targets))

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], LoRALayer]]:
        targets = resolve(model, self.targets) if self.embeddings else linear_targets(model, self)
        for t in targets:
            if self.rank > min(t.d_in, t.d_out):
                raise ValueError(
                    f"rank={self.rank} is above min(d_in, d_out) of {t.key!r}, a {t.d_out}×{t.d_in} weight; "
                    f"use at most {min(t.d_in, t.d_out)}, or other targets."
                )
        if self.init in FAULTS:
            warnings.warn(f"init={self.init!r} changes the model before training begins: a fault, shown.", stacklevel=4)
        return {t.key: partial(self.layer, t, self) for t in targets}

    @property
    def layer(self) -> type[LoRALayer]:
        return PiSSALayer if self.init == "pissa" else LoRALayer

    @property
    def embeddings(self) -> bool:
        """Whether an embedding can be a target."""
        return self.init != "pissa"


def check_rank(rank: int, name: str = "rank") -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{name}={rank!r} is not a whole number of at least 1, such as 8.")


def linear_targets(model: nn.Module, method: Method) -> list[Target]:
    """The targets of a method that has no meaning on an embedding, whose input is not a vector."""
    return no_embedding(resolve(model, method.targets), method)


def no_embedding(targets: list[Target], method: Method) -> list[Target]:
    if embedding := next((t for t in targets if isinstance(t.module, nn.Embedding)), None):
        raise ValueError(f"{type(method).__name__} works on linear layers, but {embedding.key!r} is an embedding.")
    return targets


class LoRALayer(WeightLayer):
    """A (r, d_in) and B (d_out, r) of one target, on its device, in float32 (float64 over a float64 base)."""

    def __init__(self, target: Target, method: LoRA, generator: torch.Generator):
        super().__init__(target)
        self.rank, self.gamma, self.dropout = method.rank, method.gamma, method.dropout
        self.rank_stabilized = method.rank_stabilized  # already in γ; a checkpoint says it again
        self.lr_ratio = method.lr_ratio
        self.embedding = isinstance(target.module, nn.Embedding)
        weight = target.module.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.A = nn.Parameter(torch.zeros(method.rank, target.d_in, dtype=dtype, device=weight.device))
        self.B = nn.Parameter(torch.zeros(target.d_out, method.rank, dtype=dtype, device=weight.device))
        if weight.device.type != "meta":
            # The input of an embedding is one-hot: a random A would be one small random column per token. So the
            # authors' code swaps the roles there, A = 0 and B ~ N(0, 1), and so does this.
            if self.embedding:
                self.B.data.copy_(torch.empty(self.B.shape, dtype=dtype).normal_(generator=generator))
            else:
                self.A.data.copy_(draw(method.init, method.rank, target.d_in, dtype, generator))
            if method.init == "both-random":
                self.B.data.copy_(torch.empty(self.B.shape, dtype=dtype).normal_(generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """γ·B·A·x, (…, d_in) → (…, d_out); for an embedding γ·B·A[:, ids], (…) → (…, d_out)."""
        if self.embedding:
            low = F.embedding(x, self.A.T)
        else:
            low = F.linear(F.dropout(x.to(self.A.dtype), self.dropout, self.training), self.A)
        return F.linear(low, self.B) * self.gamma

    def delta(self) -> torch.Tensor:
        # ΔW = γ·B·A, of rank at most r
        return self.gamma * (self.B @ self.A)

    def rates(self) -> list[tuple[nn.Parameter, float]]:
        return [(self.B, self.lr_ratio)] if self.lr_ratio != 1 and not self.embedding else []

    def stored(self) -> dict[str, torch.Tensor]:
        name = "lora_embedding_{}" if self.embedding else "lora_{}.weight"
        return {name.format("A"): self.A, name.format("B"): self.B}


class PiSSALayer(LoRALayer):
    """Trains the r largest singular directions of W itself (Meng et al. 2024, "PiSSA", §3).

    W = U·S·Vᵀ;  γ·B₀·A₀ = U_r·S_r·V_rᵀ, of which A and B start as copies;  ΔW = γ·(B·A − B₀·A₀). The paper freezes
    W − γ·B₀·A₀ instead of W, which is the same model; here W stays as it is. ΔW has a rank of at most 2r, and is
    written as a LoRA of that rank: (B, −B₀) and (A; A₀), as PEFT converts it.
    """

    def __init__(self, target: Target, method: LoRA, generator: torch.Generator):
        super().__init__(target, method, generator)
        if not self.A.is_meta:
            U, S, Vh = torch.linalg.svd(self.weight.detach().to(self.A.dtype), full_matrices=False)
            root = (S[: self.rank] / self.gamma).sqrt()
            self.A.data.copy_(root[:, None] * Vh[: self.rank])
            self.B.data.copy_(U[:, : self.rank] * root)
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # γ·(B·A·x − B₀·A₀·x), exactly zero at the start
        return super().forward(x) - F.linear(F.linear(x.to(self.A0.dtype), self.A0), self.B0) * self.gamma

    def delta(self) -> torch.Tensor:
        # γ·(B·A − B₀·A₀) as a sum of small products: the difference of two large ones would lose digits
        return self.gamma * ((self.B - self.B0) @ self.A + self.B0 @ (self.A - self.A0))

    def stored(self) -> dict[str, torch.Tensor]:
        return {"lora_A.weight": torch.cat([self.A, self.A0]), "lora_B.weight": torch.cat([self.B, -self.B0], 1)}

    def restore(self, numbers: dict[str, torch.Tensor]) -> None:
        A, B, r = numbers["lora_A.weight"], numbers["lora_B.weight"], self.rank
        for mine, value in ((self.A, A[:r]), (self.A0, A[r:]), (self.B, B[:, :r]), (self.B0, -B[:, r:])):
            mine.data.copy_(value)


def draw(init: str, rank: int, d_in: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A fresh A (r, d_in), on the CPU."""
    A = torch.empty(rank, d_in, dtype=dtype)
    if init == "kaiming":
        # kaiming_uniform with a = √5:  U(±√(6 / ((1 + a²)·d_in))) = U(±1/√d_in)
        return A.uniform_(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=generator)
    if init in ("gaussian", "both-random"):
        return A.normal_(0, 1 / rank if init == "gaussian" else 1.0, generator=generator)
    if init == "pissa":
        return A.zero_()
    # A·Aᵀ = I:  the rows of Qᵀ in the QR decomposition of a random (d_in, r) matrix
    return torch.linalg.qr(A.normal_(generator=generator).T).Q.T
