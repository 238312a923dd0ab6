"""Assignment `rank`: what a ΔW looks like from inside, what two of them share, and which settings train alike."""

from __future__ import annotations

import math
from random import Random

import torch

from minipeft.course.exercises.draw import (
    assemble,
    falling,
    normal,
    orthonormal,
    orthonormalised,
    overlap_table,
    share_entropy,
    sizes,
)
from minipeft.course.exercises.rank_repair import repair_cases
from minipeft.course.verdict import Case, Exercise, differ


def truncate_cases(rng: Random):
    for dtype, wide, size in (
        (torch.float64, True, "few"),
        (torch.float32, False, "few"),
        (torch.float64, False, "none"),
        (torch.float64, True, "all"),
        (torch.float32, True, "one"),
    ):
        d_out, d_in = sorted(rng.sample(range(6, 16), 2), reverse=not wide)
        k = min(d_out, d_in)
        rank = {"few": rng.randint(2, k - 2), "none": 0, "all": k, "one": 1}[size]
        U, sigma, V = orthonormal(rng, d_out, k), falling(rng, k), orthonormal(rng, d_in, k)

        def terms(first, last, power=1, U=U, sigma=sigma, V=V, dtype=dtype):
            """The terms from `first` to before `last`, 0 the strongest, with σ to a power."""
            return assemble(U[:, first:last], sigma[first:last] ** power, V[:, first:last]).to(dtype)

        def block(M, rank=rank):
            """Only the first `rank` columns and rows stay."""
            kept = torch.zeros_like(M)
            kept[:rank, :rank] = M[:rank, :rank]
            return kept

        def large(M, rank=rank):
            """The largest entries stay, as many as U, σ and V have numbers."""
            count = min(M.numel(), rank * (sum(M.shape) + 1))
            return torch.where(M.abs() >= M.abs().flatten().sort(descending=True).values[count - 1], M, 0.0)

        M = terms(0, k)
        yield Case(
            f"be the best approximation of rank {rank} of a {d_out}×{d_in} matrix in {dtype}",
            (M, rank),
            terms(0, rank),
            wrong={
                "the weakest directions stay": lambda f=terms, k=k, r=rank: f(k - r, k),
                "what is cut off is returned, not what stays": lambda f=terms, k=k, r=rank: f(r, k),
                "one direction too many stays": lambda f=terms, r=rank: f(0, r + 1),
                "one direction too few stays": lambda f=terms, r=rank: f(0, max(0, r - 1)),
                "only the r-th direction stays": lambda f=terms, r=rank: f(max(0, r - 1), r),
                "σ is left out": lambda f=terms, r=rank: f(0, r, 0),
                "σ is squared": lambda f=terms, r=rank: f(0, r, 2),
                "nothing is cut": lambda M=M: M,
                "rows and columns are cut, not directions": lambda M=M, f=block: f(M),
                "entries are cut by size, not directions": lambda M=M, f=large: f(M),
                "it is transposed": lambda f=terms, r=rank: f(0, r).T,
            },
        )


# effective rank ------------------------------------------------------------------------------------------------------
def effective_cases(rng: Random):
    k = rng.randint(5, 12)
    drawn = falling(rng, k).tolist()
    for what, sigma in {
        "of 2, 1, 1 (√8)": [2.0, 1.0, 1.0],
        "of σ_k = 2⁻ᵏ (published: 4.000)": [2.0**-i for i in range(1, 60)],
        "of σ_k = 1/k for k ≤ 100 (published: 39.677)": [1 / i for i in range(1, 101)],
        f"of {k} values that fall": drawn,
        "of the same values a thousand times larger": [1000 * s for s in drawn],
        f"of {k} equal values": [drawn[0]] * k,
    }.items():
        total, length = sum(sigma), math.hypot(*sigma)

        def entropy(divisor, sigma=sigma):
            return -sum(s / divisor * math.log(s / divisor) for s in sigma)

        yield Case(
            f"be the effective rank {what}",
            (torch.tensor(sigma, dtype=torch.float64),),
            math.exp(entropy(total)),
            wrong={
                "p is a share of the energy, σ²/Σσ²: take σ/Σσ": lambda s=sigma: math.exp(share_entropy(s, 2)),
                "this is the entropy: take exp of it": lambda h=entropy, t=total: h(t),
                "the entropy is in bits and exp in nats: use one logarithm for both": lambda h=entropy, t=total: (
                    math.exp(h(t) / math.log(2))
                ),
                "the entropy is in nats, and 2ᴴ wants bits": lambda h=entropy, t=total: 2 ** h(t),
                "the minus sign of the entropy is missing": lambda h=entropy, t=total: math.exp(-h(t)),
                "(σ/Σσ)² is no distribution: take σ/Σσ": lambda t=total, s=sigma: math.exp(
                    -sum((v / t) ** 2 * math.log((v / t) ** 2) for v in s)
                ),
                "σ is not divided by its sum": lambda h=entropy: math.exp(h(1.0)),
                "σ is divided by the largest, not by the sum": lambda h=entropy, s=sigma: math.exp(h(s[0])),
                "σ is divided by √Σσ², not by the sum": lambda h=entropy, n=length: math.exp(h(n)),
                "values are counted: that is the exact rank": lambda s=sigma: len(s),
                "it is the stable rank Σσ²/σ₁²": lambda s=sigma, n=length: n**2 / s[0] ** 2,
            },
        )
    for sigma in ([*drawn, 0.0, 0.0], [drawn[0], *[0.0] * k]):
        want = math.exp(share_entropy(sigma))

        def ignores(got, want=want):
            if math.isnan(float(got)):
                return "It is NaN: 0·ln 0 is NaN for a computer, and it counts as 0 in an entropy."
            return " ".join(differ(got, want)) or None

        count = sum(s > 0 for s in sigma)
        yield Case(
            f"ignore zeros: {count} nonzero value{'s' * (count > 1)} of {len(sigma)}",
            (torch.tensor(sigma, dtype=torch.float64),),
            judge=ignores,
        )
    yield zero_case((torch.zeros(k, dtype=torch.float64),))


def zero_case(args: tuple) -> Case:
    def judge(got):
        if value := float(got):
            return f"It is {value:g}, but zeros have no direction at all. Look whether you divide by 0."

    return Case("be 0 for zeros", args, judge=judge)


# stable rank ---------------------------------------------------------------------------------------------------------
def stable_cases(rng: Random):
    k = rng.randint(4, 8)
    spectra = {
        f"of a matrix of rank {k}": falling(rng, k),
        "of a matrix of rank 1": falling(rng, 1),
        "of a spectrum 2⁻ᵏ (published: 1.3333)": torch.tensor([2.0**-i for i in range(1, 41)]).double(),
        "of a spectrum 1/k for k ≤ 100 (published: 1.63498)": 1 / torch.arange(1, 101).double(),
        f"of {k} equal σ": torch.full((k,), rng.uniform(0.5, 2.0)).double(),
    }
    for i, (what, sigma) in enumerate(spectra.items()):
        short, long = len(sigma) + rng.randint(1, 3), len(sigma) + rng.randint(5, 9)
        d_out, d_in = (short, long) if i % 2 else (long, short)
        M = assemble(orthonormal(rng, d_out, len(sigma)), sigma, orthonormal(rng, d_in, len(sigma)))
        values = sigma.tolist()
        squares = sum(s * s for s in values)
        columns, rows = M.abs().sum(0).max().item(), M.abs().sum(1).max().item()
        yield Case(
            f"be the stable rank {what}, {d_out}×{d_in}",
            (M,),
            squares / values[0] ** 2,
            wrong={
                "both norms are Frobenius': M.norm(2) is, torch.linalg.matrix_norm(M, 2) is not": lambda: 1.0,
                "σ is summed, not σ²": lambda v=values: sum(v) / v[0] ** 2,
                "the norms are not squared": lambda s=squares, v=values: math.sqrt(s) / v[0],
                "σ₁ is not squared": lambda s=squares, v=values: s / v[0],
                "‖·‖_F is not squared": lambda s=squares, v=values: math.sqrt(s) / v[0] ** 2,
                "Σσ/σ₁ is taken instead of Σσ²/σ₁²": lambda v=values: sum(v) / v[0],
                "(Σσ)²/σ₁² is taken instead of Σσ²/σ₁²": lambda v=values: (sum(v) / v[0]) ** 2,
                "(Σσ)²/Σσ² is taken: divide by σ₁²": lambda s=squares, v=values: sum(v) ** 2 / s,
                "the largest |entry| stands for σ₁": lambda s=squares, M=M: s / M.abs().max().item() ** 2,
                "the largest sum of a column stands for σ₁": lambda s=squares, c=columns: s / c**2,
                "the largest sum of a row stands for σ₁": lambda s=squares, r=rows: s / r**2,
                "the fraction is upside down": lambda s=squares, v=values: v[0] ** 2 / s,
                "it divides by the smallest σ": lambda s=squares, v=values: s / v[-1] ** 2,
                "it is the exact rank": lambda v=values: len(v),
            },
        )
    yield zero_case((torch.zeros(5, k, dtype=torch.float64),))


# the spectrum of two factors -----------------------------------------------------------------------------------------
# times nine rows: B·A would need 291 TB, more than the 281 that 48 bits can address, so asking for it fails at once
HUGE = 670_000


def factor_cases(rng: Random):
    for dtype in (torch.float64, torch.float32, torch.float64):
        d_out, d_in, rank = sizes(rng)
        B, A = normal(rng, d_out, rank, dtype=dtype), normal(rng, rank, d_in, dtype=dtype)

        def values(M, rank=rank, dtype=dtype):
            return torch.linalg.svdvals(M.double())[:rank].to(dtype)

        right = values(B.double() @ A.double())
        R_B, R_A = (torch.linalg.qr(M.double()).R for M in (B, A.T))
        diagonals = (R_B.diag() * R_A.diag()).abs().sort(descending=True).values
        known = {
            "the singular values of B and A are multiplied, as if their directions agreed": values(B) * values(A),
            "these are B's singular values": values(B),
            "these are A's singular values": values(A),
            "R_A is not transposed: B·A = Q_B·(R_B·R_Aᵀ)·Q_Aᵀ": values(R_B @ R_A),
            "only the diagonals of R_B and R_A are used": diagonals.to(dtype),
            "the smallest come first": right.flip(0),
            "these are the squares σ²: take the root": right**2,
        }
        yield Case(
            f"be the {rank} singular values of B·A, the largest first, for d_out={d_out}, d_in={d_in} in {dtype}",
            (B, A, 1),
            right,
            wrong={text: lambda v=v: v for text, v in known.items()},
        )
    # U·D·C times Cᵀ·Vᵀ has the spectrum D
    sigma = torch.tensor([rng.uniform(2, 4), rng.uniform(0.5, 1), 1e-3, 1e-9], dtype=torch.float64)
    C = orthonormal(rng, 4, 4)
    B = orthonormal(rng, rng.randint(8, 12), 4) * sigma @ C
    A = C.T @ orthonormal(rng, rng.randint(13, 16), 4).T

    def precise(got, sigma=sigma):
        if got.shape != sigma.shape or not (error := (got - sigma).abs().max().item()) <= 1e-12:
            off = f"It is off by {error:.1g}. " if got.shape == sigma.shape else ""
            return (
                f"{off}Half of the digits go where BᵀB or A·Aᵀ is formed, which squares σ: {sigma[-1]:.0e} becomes "
                f"{sigma[-1] ** 2:.0e}, below the rounding of {sigma[0] ** 2:.1f}. Decompose R_B·R_Aᵀ itself."
            )

    yield Case("find a σ some 10⁹ times smaller than the largest", (B, A, 1), judge=precise)
    small = normal(rng, 9, 1, dtype=torch.float64), normal(rng, 1, 9, dtype=torch.float64)
    # repeating the rows of B and the columns of A multiplies BᵀB and A·Aᵀ by HUGE, and so every σ of B·A
    right = HUGE * torch.linalg.svdvals(small[0] @ small[1])[:1]

    def huge(got, right=right):
        if isinstance(got, str):
            return (
                "It asked for more memory than any machine has: somewhere a d × d matrix is made. B @ A is one; so is "
                'the Q of qr(…, mode="complete"), and the U of svd(…) without full_matrices=False.'
            )
        if got.shape != right.shape or not (got - right).abs().max().item() <= 1e-9 * right[0].item():
            return (
                f"Expected one value, {right.item():,.1f}; got {got.flatten()[:1].tolist()}, shape {tuple(got.shape)}."
            )

    d = f"{9 * HUGE:,}"
    yield Case(f"manage d_out = d_in = {d} and r = 1 without ever forming B·A", (*small, HUGE), judge=huge)


# subspace similarity -------------------------------------------------------------------------------------------------
def spectral_table(X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """The same with the spectral norm instead of Frobenius'."""
    table = torch.zeros(X.shape[1], Y.shape[1], dtype=torch.float64)
    for i in range(1, X.shape[1] + 1):
        for j in range(1, Y.shape[1] + 1):
            table[i - 1, j - 1] = torch.linalg.svdvals((X[:, :i].T @ Y[:, :j]).double())[0] ** 2 / min(i, j)
    return table.to(X.dtype)


def similarity_cases(rng: Random):
    for dtype, shared in ((torch.float64, False), (torch.float32, True), (torch.float64, True)):
        d = rng.randint(11, 15)
        k, more = rng.randint(2, 4), rng.randint(1, 3)
        X = orthonormal(rng, d, k)
        # shared: the first k directions of Y span what X spans, along other axes
        front = X @ orthonormal(rng, k, k) if shared else orthonormal(rng, d, k)
        Y = orthonormalised(torch.cat([front, normal(rng, d, more, dtype=torch.float64)], 1))
        X, Y = (each.to(dtype) for each in rng.sample([X, Y], 2))
        m, n = X.shape[1], Y.shape[1]
        yield Case(
            f"give φ(i, j) for i ≤ {m} and j ≤ {n} in {dtype}" + f", which is 1 at ({k}, {k})" * shared,
            (X, Y),
            overlap_table(X, Y),
            wrong={
                "it divides by max(i, j)": lambda X=X, Y=Y: overlap_table(X, Y, max),
                "it divides by i": lambda X=X, Y=Y: overlap_table(X, Y, lambda i, j: i),
                "it divides by j": lambda X=X, Y=Y: overlap_table(X, Y, lambda i, j: j),
                "it divides by i·j": lambda X=X, Y=Y: overlap_table(X, Y, lambda i, j: i * j),
                "it divides by d": lambda X=X, Y=Y: overlap_table(X, Y, lambda i, j: len(X)),
                "it is not divided by min(i, j)": lambda X=X, Y=Y: overlap_table(X, Y, lambda i, j: 1),
                "i and j are counted from 0, and 1 must be added": lambda X=X, Y=Y: overlap_table(
                    X, Y, lambda i, j: max(1, min(i, j) - 1)
                ),
                "the norm is not squared": lambda X=X, Y=Y: overlap_table(X, Y, root=True),
                "the norm is the spectral one, not Frobenius'": lambda X=X, Y=Y: spectral_table(X, Y),
                "cosines are added up, not their squares": lambda X=X, Y=Y: overlap_table(X, Y, power=1),
                "only the i-th and the j-th direction are compared, not the first i and j": lambda X=X, Y=Y: (
                    X.T @ Y
                ).square(),
                "these are cosines: square and add them up": lambda X=X, Y=Y: X.T @ Y,
                "X and Y changed places": lambda X=X, Y=Y: overlap_table(Y, X),
            },
        )
    yield Case("be the transposed table when X and Y change places", (Y, X), overlap_table(X, Y).T)
    yield Case("be 1 where i = j for X with itself", (X, X), overlap_table(X, X))


# settings that train alike -------------------------------------------------------------------------------------------
STEPS = 15


def train(gamma: float, A, B, lr_A: float, lr_B: float, optimizer: str, W, x, y) -> torch.Tensor:
    """The outputs (STEPS + 1, rows, d_out) of x·(W + γ·B·A)ᵀ while A and B fit y; Adam has ε = 0."""
    gamma, factors, rates = float(gamma), [A.to(x), B.to(x)], [float(lr_A), float(lr_B)]
    first, second, seen = [0.0, 0.0], [0.0, 0.0], []
    for step in range(1, STEPS + 2):
        A, B = factors
        seen.append(x @ (W + gamma * B @ A).T)
        # L = mean (out − y)²:  ∂L/∂W' = 2·(out − y)ᵀ·x/numel,  ∂L/∂A = γ·Bᵀ·∂L/∂W',  ∂L/∂B = γ·∂L/∂W'·Aᵀ
        G = 2 * (seen[-1] - y).T @ x / y.numel()
        for i, g in enumerate((gamma * B.T @ G, gamma * G @ A.T)):
            if optimizer == "adam":
                first[i], second[i] = 0.9 * first[i] + 0.1 * g, 0.999 * second[i] + 0.001 * g**2
                size = (second[i] / (1 - 0.999**step)).sqrt()
                g = torch.where(size > 0, first[i] / (1 - 0.9**step) / size, 0.0)
            factors[i] = factors[i] - rates[i] * g
    return torch.stack(seen)


def equivalent_cases(rng: Random):
    for optimizer, fresh in (("adam", True), ("adam", False), ("sgd", True), ("sgd", False)):
        d_out, d_in, rank = sizes(rng)
        W, A, B = (normal(rng, *s, dtype=torch.float64) for s in ((d_out, d_in), (rank, d_in), (d_out, rank)))
        W, A, B = W / math.sqrt(d_in), A / math.sqrt(d_in), 0.0 * B if fresh else 0.1 * B
        data = W, normal(rng, 12, d_in, dtype=torch.float64), normal(rng, 12, d_out, dtype=torch.float64)
        gamma, lr_A, lr_B = (round(rng.uniform(*ends), 4) for ends in ((0.5, 2.0), (0.01, 0.05), (0.01, 0.05)))
        p, q = rng.choice([2.5, 3.0, 6.0]), rng.choice([0.3, 0.4, 0.7])
        args = (gamma, A, B, lr_A, lr_B, p, q, optimizer)
        # Adam: p·lr_A and q·lr_B;  SGD: p²·lr_A and q²·lr_B
        power, rule = (1, "SGD's") if optimizer == "adam" else (2, "Adam's")
        a, b, scale = p**power * lr_A, q**power * lr_B, gamma / (p * q)
        right = (scale, p * A, q * B, a, b)
        known = {
            f"the learning rates follow {rule} rule": (*right[:3], p ** (3 - power) * lr_A, q ** (3 - power) * lr_B),
            "the learning rates stayed as they were": (*right[:3], lr_A, lr_B),
            "lr_A stayed as it was": (*right[:3], lr_A, b),
            "lr_B stayed as it was": (*right[:3], a, lr_B),
            "the learning rates are divided, not multiplied": (*right[:3], lr_A / p**power, lr_B / q**power),
            "p and q changed places in the learning rates": (*right[:3], q**power * lr_A, p**power * lr_B),
            "γ stayed as it was": (gamma, *right[1:]),
            "γ is multiplied by p·q": (gamma * p * q, *right[1:]),
            "γ is divided by p only": (gamma / p, *right[1:]),
            "γ is divided by q only": (gamma / q, *right[1:]),
            "A stayed as it was": (scale, A, *right[2:]),
            "B stayed as it was": (scale, p * A, B, a, b),
        }

        def alike(got, args=args, right=right, known=known, data=data, optimizer=optimizer):
            if not isinstance(got, tuple | list) or len(got) != 5:
                return "Return five things: γ', A', B', lr_A' and lr_B'."
            for name, factor, wanted in zip(("A'", "B'"), got[1:3], right[1:3], strict=True):
                if not isinstance(factor, torch.Tensor) or factor.shape != wanted.shape:
                    return f"{name} should be a tensor of shape {tuple(wanted.shape)}."
            gap = (train(*args[:5], optimizer, *data) - train(*got, optimizer, *data)).abs().amax((1, 2)).tolist()
            apart = next((step for step, each in enumerate(gap) if not each <= 1e-8), None)
            if apart is None:
                if differ(got, right):
                    return f"The two train alike for {STEPS} steps, but A' should be p·A, B' q·B, and γ' γ/(p·q)."
                return None
            said = [f"It looks as if {text}. " for text, value in known.items() if not differ(got, value)][:1]
            if apart == 0:
                how = f"The outputs are {gap[0]:.2g} apart before the first step: γ'·B'·A' is not γ·B·A."
            else:
                how = f"The outputs agree before the first step; after step {apart} they are {gap[apart]:.2g} apart."
            return "".join(said) + how

        start = "B = 0" if fresh else "B trained before"
        yield Case(f"train like the old settings under {optimizer}, from {start}", args, judge=alike)
        yield Case("be (γ', p·A, q·B, lr_A', lr_B'), and leave A and B themselves alone", args, right)


# find the bug --------------------------------------------------------------------------------------------------------
EXERCISES = (
    Exercise(
        "truncate", "The best approximation", truncate_cases,
        (
            "`U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)`: the third is Vᵀ already, so its *rows* are v.",
            "Σ σᵢ·uᵢ·vᵢᵀ is U with scaled columns, times Vᵀ. Which part of each of the three belongs to the first r "
            "terms?",
        ),
        ("truncate",),
    ),
    Exercise(
        "effective_rank", "Effective rank", effective_cases,
        (
            "p = σ/Σσ is a probability distribution: its entropy is −Σ p·ln p, and 0·ln 0 counts as 0.",
            "`torch.special.entr` is −p·ln p, and 0 at 0. Ask first whether there is anything to divide by.",
        ),
        ("effective_rank",),
    ),
    Exercise(
        "stable_rank", "Stable rank", stable_cases,
        (
            "σ₁ is the largest of torch.linalg.svdvals(M), and ‖M‖²_F is the sum of the squares of all of them.",
            "diag(4, 3) gives 25/16. Zeros have nothing to divide by: ask first, and add no small number.",
        ),
        ("stable_rank",),
    ),
    Exercise(
        "factor_spectrum", "The spectrum of two factors", factor_cases,
        (
            "Q with orthonormal columns changes no singular value: so B·A has those of R_B·R_Aᵀ, an r × r matrix.",
            "`torch.linalg.qr` gives the triangle as `.R`, for a *thin* matrix. A is wide: what do you decompose "
            "instead?",
        ),
        ("factor_spectrum",), "rank.factor_values",
    ),
    Exercise(
        "subspace_similarity", "What two updates share", similarity_cases,
        (
            "Entry (a, b) of XᵀY is x_a·y_b. ‖Xᵢᵀ·Yⱼ‖²_F is the sum of the squares of its first i rows and j columns.",
            "Sums over the first i rows and j columns, for all i and j: `cumsum` in one dimension, then the other. "
            "min(i, j) is a table too.",
        ),
        ("subspace_similarity",),
    ),
    Exercise(
        "equivalent_settings", "Settings that train alike", equivalent_cases,
        (
            "γ'·B'·A' must stay γ·B·A. The gradient of p·A is 1/p of A's. How far does each optimizer move A' then?",
            "A' must move p times as far. Its gradient is 1/p of A's: SGD follows that, Adam's step does not. Which "
            "rate makes up for it?",
        ),
        ("equivalent_settings",),
    ),
    Exercise(
        "repaired_comparison", "Find the bug", repair_cases,
        (
            "There are four faults, one in each number. What is σ, what is σ²; what does U say, and what V?",
            "Effective rank: shares of σ. Energy: of σ². What an update writes is in U: in which dimension do these "
            "directions live?",
        ),
        ("repaired_comparison",),
    ),
)  # fmt: skip
