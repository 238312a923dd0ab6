"""Several adapters into one, by arithmetic on what they do to the weights: ΔW = Σ w_k·ΔW_k.

    concatenate     B = [w_1·γ_1·B_1 | w_2·γ_2·B_2 | …],  A = [A_1; A_2; …]     exact; the ranks add up
    combine         ΔW by a rule below, then its best approximation of rank r (SVD), B = U·√Σ, A = √Σ·Vᵀ
      linear        Σ w_k·ΔW_k              task arithmetic; a negative weight takes a task away (Ilharco et al. 2023)
      prune         the same, after only the largest |entries| of each ΔW_k were kept
      ties          trim, elect a sign, merge what agrees with it (Yadav et al. 2023, "TIES-Merging", §3, algorithm 1)
      dare          drop entries at random, scale up the rest (Yu et al. 2024, "Language Models are Super Mario", §3)
      dare_ties     the same, then TIES's vote

Adding A to A and B to B is not on the list. (ΣB_k)·(ΣA_k) holds B_1·A_2 as well, a product that nobody trained; PEFT's
`add_weighted_adapter` does it under the name "linear". `error` says how far an adapter is from Σ w_k·ΔW_k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from minipeft.attach import Tuned
from minipeft.layer import WeightLayer
from minipeft.methods.lora import LoRA, LoRALayer
from minipeft.targets import exact

Rule = Callable[..., torch.Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# Rules: changes (k, …) of one weight and k weights w → one change
# ---------------------------------------------------------------------------------------------------------------------
def linear(changes: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    # Σ w_k·ΔW_k
    return torch.tensordot(w, changes, dims=1)


def trim(change: torch.Tensor, density: float) -> torch.Tensor:
    """Zeros but for the int(density·N) entries of largest |value|."""
    kept = change.abs().flatten().topk(int(density * change.numel())).indices
    return torch.zeros_like(change).flatten().index_copy(0, kept, change.flatten()[kept]).view_as(change)


def elect(changes: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """TIES's second and third step: each entry's sign is that of Σ ΔW_k (+ for 0), and the mean of w_k·ΔW_k over those
    k that have this sign is kept."""
    sign = torch.where(changes.sum(0) >= 0, 1, -1)
    agree = changes.sign() == sign
    return linear(changes * agree, w) / agree.sum(0).clamp(min=1)


def prune(changes: torch.Tensor, w: torch.Tensor, density: float = 0.2) -> torch.Tensor:
    return linear(torch.stack([trim(change, density) for change in changes]), w)


def ties(changes: torch.Tensor, w: torch.Tensor, density: float = 0.2) -> torch.Tensor:
    return elect(torch.stack([trim(change, density) for change in changes]), w)


def drop(changes: torch.Tensor, density: float, generator: torch.Generator | None) -> torch.Tensor:
    """Each entry is kept with probability `density`, as itself divided by `density`: the expectation stays. Drawn on
    the CPU, one change after another."""
    draws = [torch.bernoulli(torch.full(change.shape, density), generator=generator) for change in changes]
    return changes * torch.stack(draws).to(changes) / density


def dare(
    changes: torch.Tensor, w: torch.Tensor, density: float = 0.5, generator: torch.Generator | None = None
) -> torch.Tensor:
    return linear(drop(changes, density, generator), w)


def dare_ties(
    changes: torch.Tensor, w: torch.Tensor, density: float = 0.5, generator: torch.Generator | None = None
) -> torch.Tensor:
    return elect(drop(changes, density, generator), w)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def combine(
    tuned: Tuned, weights: Mapping[str, float], name: str, rule: Rule = linear, rank: int | None = None, **settings
) -> None:
    """Adds the adapter `name`, a LoRA with γ = 1, to `tuned`, inactive: `rule` on each weight that any of them changes.

    `weights`: {adapter: w}. `rank`: of the result, where the weight has so many directions; None keeps all that there
    are. `settings` are the rule's: `density` for all but linear; `seed` for dare and dare_ties, 0 if nothing is said.
    Where an adapter does not change a weight, it has no vote there, as in PEFT.
    Raises ValueError, before anything changes, for an unknown or taken name, weights that are not finite, a density
    outside (0, 1], and an adapter that is more than changes of weights.
    """
    places = changes(tuned, weights)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank={rank!r} is not a whole number of at least 1, such as 8.")
    if not 0 < settings.get("density", 1) <= 1:
        raise ValueError(f"density={settings['density']!r} is outside (0, 1]; 0.2 keeps a fifth of the entries.")
    if rule in (dare, dare_ties):
        settings["generator"] = torch.Generator().manual_seed(settings.pop("seed", 0))
    factors = {}
    for key, own in places.items():
        stack = torch.stack(list(own.values()))
        w = torch.tensor([weights[each] for each in own], dtype=stack.dtype, device=stack.device)
        factors[key] = compressed(rule(stack, w, **settings), rank)
    add(tuned, name, factors)


@torch.no_grad()
def concatenate(tuned: Tuned, weights: Mapping[str, float], name: str) -> None:
    """Adds the adapter `name`, a LoRA with γ = 1, to `tuned`, inactive: exactly Σ w_k·γ_k·B_k·A_k, of rank Σ r_k.

    Where Σ r_k is above min(d_out, d_in), that many directions hold it exactly. Raises like `combine`, and for an
    adapter that is not LoRA.
    """
    check(tuned, weights)
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for each, w in weights.items():
        for layer in tuned.adapters[each].values():
            if type(layer) is not LoRALayer:
                raise ValueError(f"{each!r} holds a {type(layer).__name__}, which has no A and B alone; use combine().")
            parts.setdefault(layer.key, []).append((w * layer.gamma * layer.B, layer.A))
    factors = {}
    for key, own in parts.items():
        B, A = torch.cat([B for B, _ in own], dim=1), torch.cat([A for _, A in own])
        factors[key] = (B, A) if B.shape[1] <= min(B.shape[0], A.shape[1]) else compressed(B @ A, None)
    add(tuned, name, factors)


@torch.no_grad()
def error(tuned: Tuned, name: str, weights: Mapping[str, float]) -> float:
    """‖ΔW_name − Σ w_k·ΔW_k‖ / ‖Σ w_k·ΔW_k‖, Frobenius, over all weights together."""
    check(tuned, weights)
    got = {key: change[name] for key, change in changes(tuned, {name: 1.0}).items()}
    wanted = {key: sum(weights[each] * d for each, d in own.items()) for key, own in changes(tuned, weights).items()}
    size = math.sqrt(sum(d.double().square().sum().item() for d in wanted.values()))
    if not size:
        raise ValueError("The weighted changes add up to nothing, so no relative error can be given.")
    apart = ((got.get(key, 0.0) - wanted.get(key, 0.0)) for key in got.keys() | wanted.keys())
    return math.sqrt(sum(d.double().square().sum().item() for d in apart)) / size


def changes(tuned: Tuned, names: Sequence[str] | Mapping[str, float]) -> dict[str, dict[str, torch.Tensor]]:
    """{place: {adapter: ΔW (d_out, d_in)}} for the adapters that change the weight there; see `Target.key`."""
    check(tuned, names)
    found: dict[str, dict[str, torch.Tensor]] = {}
    with tuned.disabled():
        for each in names:
            for layer in tuned.adapters[each].values():
                if not isinstance(layer, WeightLayer) or layer.changes().keys() != {"weight"}:
                    raise ValueError(
                        f"{each!r} holds a {type(layer).__name__}, which is more than a change of weights."
                    )
                found.setdefault(layer.key, {})[each] = layer.delta()
    return found


def compressed(delta: torch.Tensor, rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """B (d_out, r) and A (r, d_in), whose product is the best approximation of ΔW of rank r (Eckart and Young 1936)."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    if rank is None:
        noise = S[0] * max(delta.shape) * torch.finfo(S.dtype).eps
        rank = max(1, int((S > noise).sum()))
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


def add(tuned: Tuned, name: str, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """A LoRA of these {place: (B, A)}, with a rank of its own at each place."""
    by_rank: dict[int, list[tuple[str, int, int]]] = {}
    for key, (B, _) in factors.items():
        by_rank.setdefault(B.shape[1], []).append(exact(key))
    tuned.add(name, [LoRA(rank=rank, gamma=1.0, targets=targets) for rank, targets in by_rank.items()])
    for layer in tuned.adapters[name].values():
        B, A = factors[layer.key]
        layer.B.data.copy_(B)
        layer.A.data.copy_(A)


def check(tuned: Tuned, names: Sequence[str] | Mapping[str, float]) -> None:
    if not names:
        raise ValueError("There is nothing to combine; name adapters, such as {'a': 0.5, 'b': 0.5}.")
    for each in names:
        if each not in tuned.adapters:
            raise ValueError(f"There is no adapter {each!r}; this model carries {list(tuned.adapters)}.")
        w = names[each] if isinstance(names, Mapping) else 1.0
        if isinstance(w, bool) or not isinstance(w, int | float) or not math.isfinite(w):
            raise ValueError(f"The weight of {each!r} is {w!r}, which is not a finite number.")
