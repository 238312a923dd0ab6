"""Six ways to make one LoRA of several clients' (federated averaging).

Client k sends A_k (r, d_in) and B_k (d_out, r), trained on n_k rows; its weight is p_k = n_k / Σ n. What the clients learnt
together is the mean of their products, of rank up to K·r (γ is the same for all and left out):

    ΔW* = Σ_k p_k·B_k·A_k                                        (d_out, d_in)

| rule | the next round begins with | distance from ΔW* |
|---|---|---|
| `fedit` (Zhang et al. 2023, "Towards Building the Federated GPT", §3) | Ā = Σ p_k·A_k, B̄ = Σ p_k·B_k | cross terms p_j·p_k·B_j·A_k |
| `ffa` (Sun et al. 2024, "FFA-LoRA", §4) | A never trains; B̄ | none: Σ p_k·B_k·A = B̄·A |
| `rolora` (Chen et al. 2025, "RoLoRA", §4) | A and B train in turn; the mean of the one that did | none, for the same reason |
| `flexlora` (Bai et al. 2024, "FlexLoRA", §4) | the best rank-r approximation of ΔW*, by SVD | what the cut leaves out |
| `flora` (Wang et al. 2024, "FLoRA", §4) | W + γ·ΔW* and a fresh adapter; ΔW* = [p_1·B_1 … p_K·B_K]·[A_1; …; A_K] | none |
| `fedex` (Singhal et al. 2025, "FedEx-LoRA", §4) | Ā, B̄, and W + γ·(ΔW* − B̄·Ā) | none |

Sums are taken in float64, in the order of what is given.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

Pair = tuple[torch.Tensor, torch.Tensor]  # (A, B)


class Next(NamedTuple):
    """What the next round begins with: A and B, None for a fresh start; `moved`, of shape (d_out, d_in), is what goes
    into the base for good."""

    A: torch.Tensor | None
    B: torch.Tensor | None
    moved: torch.Tensor | None = None


def shares(rows: Sequence[int]) -> list[float]:
    """p_k = n_k / Σ n. Raises ValueError for a client without rows."""
    if not rows or min(rows) < 1:
        raise ValueError(f"Every client needs at least one row, but their rows are {list(rows)}.")
    return [n / sum(rows) for n in rows]


def mean(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Σ p_k·T_k in float64; ValueError where shapes differ."""
    if len({t.shape for t in tensors}) > 1:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f"Only factors of one shape can be averaged, and these are {shapes}.")
    return sum(p * t.double() for p, t in zip(weights, tensors, strict=True))


def mean_factors(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """(Ā, B̄) = (Σ p_k·A_k, Σ p_k·B_k), in float64."""
    return mean([A for A, _ in pairs], weights), mean([B for _, B in pairs], weights)


def stacked(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """([A_1; …; A_K], [p_1·B_1 … p_K·B_K]), in float64: a LoRA of rank Σ r_k whose product is ΔW*. Ranks may differ."""
    A = torch.cat([A.double() for A, _ in pairs], 0)
    return A, torch.cat([p * B.double() for p, (_, B) in zip(weights, pairs, strict=True)], 1)


def mean_product(pairs: Sequence[Pair], weights: Sequence[float]) -> torch.Tensor:
    """ΔW* = Σ p_k·B_k·A_k, (d_out, d_in), in float64. Ranks may differ."""
    A, B = stacked(pairs, weights)
    return B @ A


def cut(delta: torch.Tensor, rank: int) -> Pair:
    """The best rank-r approximation U·Σ·Vᵀ of (d_out, d_in), split evenly: A = √Σ·Vᵀ, B = U·√Σ. ValueError for a rank
    that is not from 1 to min(d_out, d_in)."""
    if not 1 <= rank <= min(delta.shape):
        raise ValueError(f"rank={rank} is not between 1 and {min(delta.shape)}, the least side of ΔW.")
    U, sigma, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    root = sigma[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def _factors(pairs: Sequence[Pair], weights: Sequence[float], rank: int) -> Next:
    return Next(*mean_factors(pairs, weights))


def _svd(pairs: Sequence[Pair], weights: Sequence[float], rank: int) -> Next:
    return Next(*cut(mean_product(pairs, weights), rank))


def _stack(pairs: Sequence[Pair], weights: Sequence[float], rank: int) -> Next:
    return Next(None, None, mean_product(pairs, weights))


def _residual(pairs: Sequence[Pair], weights: Sequence[float], rank: int) -> Next:
    A, B = mean_factors(pairs, weights)
    return Next(A, B, mean_product(pairs, weights) - B @ A)


@dataclass(frozen=True)
class Rule:
    """`combine(pairs, weights, rank)` makes the next round's start; `turns` says which factors train, round by round.

    `exact`: whether the next round's model adds exactly ΔW*. `widens`: whether what every client is sent grows with the
    number of clients.
    """

    name: str
    combine: Callable[[Sequence[Pair], Sequence[float], int], Next]
    exact: bool
    turns: tuple[str, ...] = ("AB",)
    widens: bool = False

    def trains(self, number: int) -> str:
        """The factors that train in round `number` (from 0): "AB", "B" or "A"."""
        return self.turns[number % len(self.turns)]

    def sent(self, shape: tuple[int, int], rank: int, clients: int, number: int) -> tuple[int, int]:
        """(numbers that a client sends, numbers that it is sent) for one target of `shape` (d_out, d_in) and round.

        What moves into the base is sent as a stack of K·r, or dense where that is less.
        """
        d_out, d_in = shape
        up = rank * ((d_in if "A" in self.trains(number) else 0) + (d_out if "B" in self.trains(number) else 0))
        dense = d_out * d_in + (up if self.name == "fedex" else 0)
        return up, min(clients * up, dense) if self.widens else up


RULES = {
    rule.name: rule
    for rule in (
        Rule("fedit", _factors, exact=False),
        Rule("ffa", _factors, exact=True, turns=("B",)),
        Rule("rolora", _factors, exact=True, turns=("B", "A")),
        Rule("flexlora", _svd, exact=False),
        Rule("flora", _stack, exact=True, widens=True),
        Rule("fedex", _residual, exact=True, widens=True),
    )
}


def rule_of(name: str) -> Rule:
    """The rule of that name. ValueError lists those that there are."""
    if name not in RULES:
        raise ValueError(f"There is no rule {name!r}; there is {', '.join(RULES)}.")
    return RULES[name]
