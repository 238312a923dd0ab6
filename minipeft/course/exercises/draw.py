"""What the cases of several assignments draw."""

from __future__ import annotations

import math
from random import Random

import torch


def normal(rng: Random, *shape: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def sizes(rng: Random) -> tuple[int, int, int]:
    """d_out, d_in and a rank below both; never square."""
    d_out, d_in = rng.sample(range(5, 24), 2)
    return d_out, d_in, rng.randint(2, min(d_out, d_in) - 1)


# judges of what several drives see ----------------------------------------------------------------------------------
def holds(seen: dict) -> str | None:
    """The first sentence of a drive's that does not hold."""
    return next(
        (f"This does not hold: {words}." for words, value in seen.items() if " " in words and value is False), None
    )


def uniform(name: str, bound: float, seen: dict) -> str | None:
    """Whether the first tensor of `drives.common.draws` looks drawn from U(−bound, bound), each number by itself."""
    A = seen["first"][0].double()
    largest, spread, wanted = A.abs().max().item(), A.std(correction=0).item(), bound / math.sqrt(3)
    if other := {str(t.dtype) for t in seen["first"]} - {"torch.float32"}:
        return f"The numbers are {', '.join(sorted(other))}; they should be torch.float32."
    if A.any() and A.unique().numel() < 0.99 * A.numel():
        different = f"{A.unique().numel()} different ones of {A.numel()}"
        return f"Numbers of {name} repeat, {different}: rows that are equal stay equal."
    if A.any() and (repeated := A.abs().unique().numel()) < 0.99 * A.numel():
        return f"|{name}| has {repeated} different numbers of {A.numel()}: some are others with the sign turned."
    if len(A) > 30 and not ((A < 0).any(0) & (A > 0).any(0)).all():
        return f"A column of {name} has one sign only: each number is drawn by itself, from −bound to bound."
    if largest > bound * (1 + 1e-6) or not A.any():
        return f"The largest |{name}| is {largest:.4f}; the bound 1/√d_in is {bound:.4f} here."
    if A.numel() > 1000:
        if largest < 0.97 * bound:
            return f"The largest |{name}| is {largest:.4f}; the bound 1/√d_in is {bound:.4f} here."
        if abs(A.mean().item()) > 0.1 * bound or abs(spread / wanted - 1) > 0.05:
            return f"The mean is {A.mean().item():.4f} and the spread {spread:.4f}; uniform has 0 and {wanted:.4f}."


def stream(name: str, seen: dict) -> str | None:
    """Whether the random numbers of `drives.common.draws` come from the generator's stream and from nowhere else."""
    first, later, again, other, used = (seen[each][0] for each in ("first", "later", "again", "other", "used"))
    if not torch.equal(first, again):
        return f"The same seed gave two different {name}: draw from `generator`, not from the global one."
    if torch.equal(first, other):
        return f"Two different seeds gave the same {name}: draw from `generator`."
    if torch.equal(first, later) or torch.equal(first, used):
        return f"Two calls with one generator gave the same {name}: draw from `generator` itself, not from its seed."
    if not seen["global"]:
        return "It moves the global generator of random numbers: draw from `generator` only."


def orthonormal(rng: Random, d: int, k: int, dtype=torch.float64) -> torch.Tensor:
    """k random orthonormal columns (d, k), by Gram and Schmidt."""
    found: list[torch.Tensor] = []
    for v in normal(rng, k, d, dtype=torch.float64):
        for _ in range(2):  # twice is enough for orthogonality to the last digit
            for u in found:
                v = v - (u @ v) * u
        found.append(v / (v @ v).sqrt())
    return torch.stack(found, 1).to(dtype)


def falling(rng: Random, k: int) -> torch.Tensor:
    """k singular values that are well apart, the largest first."""
    values = [rng.uniform(2.0, 4.0)]
    while len(values) < k:
        values.append(values[-1] * rng.uniform(0.5, 0.8))
    return torch.tensor(values, dtype=torch.float64)


def assemble(U: torch.Tensor, sigma: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """Σᵢ σᵢ·uᵢ·vᵢᵀ, term by term."""
    return sum((s * torch.outer(u, v) for s, u, v in zip(sigma, U.T, V.T, strict=True)), U.new_zeros(len(U), len(V)))


# truncate ------------------------------------------------------------------------------------------------------------


def share_entropy(sigma: list[float], power: int = 1) -> float:
    """H(p) = −Σ p·ln p for p = σᵖᵒʷᵉʳ/Σσᵖᵒʷᵉʳ; what is zero adds nothing."""
    total = sum(s**power for s in sigma)
    return -sum(s**power / total * math.log(s**power / total) for s in sigma if s)


def overlap_table(X: torch.Tensor, Y: torch.Tensor, below=min, power: int = 2, root: bool = False) -> torch.Tensor:
    """φ(i, j) = Σ_{a≤i} Σ_{b≤j} (x_a·y_b)² / min(i, j), (m, n), a number at a time."""
    cosines = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in Y.T.tolist()] for x in X.T.tolist()]
    table = torch.zeros(X.shape[1], Y.shape[1], dtype=torch.float64)
    for i in range(1, X.shape[1] + 1):
        for j in range(1, Y.shape[1] + 1):
            total = sum(c**power for row in cosines[:i] for c in row[:j])
            table[i - 1, j - 1] = (math.sqrt(total) if root else total) / below(i, j)
    return table.to(X.dtype)


def orthonormalised(M: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns of which the first i span what the first i of M span, for every i."""
    Q, R = torch.linalg.qr(M)
    return Q * R.diag().sign()


def whole(rng: Random, *shape: int) -> torch.Tensor:
    """Small whole numbers as weights of a sum, whose gradients are exact in bfloat16 too."""
    return (2 * normal(rng, *shape, dtype=torch.float64)).round()


def padded(rng: Random, rows: int, side: str) -> torch.Tensor:
    """A mask (rows, T) of texts of unequal length, padded on this side; all ones for "no"."""
    length = rng.randint(4, 6)
    if side == "no":
        return torch.ones(rows, length, dtype=torch.int64)
    real = rng.sample(range(1, length), rows - 1) + [length]
    ones = torch.tensor([[int(i < m) for i in range(length)] for m in real])
    return ones if side == "right" else ones.flip(1)


def many(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def padding(side: str) -> str:
    return "no padding" if side == "no" else f"padding on the {side}"
