"""Assignment `lora_family`: DoRA's weight, VeRA's change, AdaLoRA's budget and pruning, and a DoRA layer to repair."""

from __future__ import annotations

from fractions import Fraction
from random import Random

import torch

from minipeft.course.drives.promises import weights
from minipeft.course.exercises.draw import holds, normal, sizes
from minipeft.course.verdict import Case, Exercise


# DoRA ----------------------------------------------------------------------------------------------------------------
def row_norms(V: torch.Tensor) -> torch.Tensor:
    """‖·‖ of each row, (d_out,)."""
    return torch.stack([(row * row).sum().sqrt() for row in V])


def dora_cases(rng: Random):
    for dtype in (torch.float32, torch.float64, torch.float64):
        d_out, d_in, rank = sizes(rng)
        W, A, B = (normal(rng, *s, dtype=dtype) for s in ((d_out, d_in), (rank, d_in), (d_out, rank)))
        m, gamma = normal(rng, d_out, dtype=dtype).abs() + 0.5, round(rng.uniform(0.3, 0.9), 3)

        def dora(V, length, m=m):
            # one row at a time: w'_i = m_i · v_i / ‖v_i‖
            return torch.stack([m_i * v_i / n_i for m_i, v_i, n_i in zip(m, V, length, strict=True)])

        change = sum(torch.outer(B[:, k], A[k]) for k in range(rank))
        V = W + gamma * change
        yield Case(
            f"scale every row of W + γ·B·A to the length that m gives, for a {d_out}×{d_in} weight in {dtype}",
            (W, A, B, m, gamma),
            dora(V, row_norms(V)),
            wrong={
                "the norm is taken over the columns": lambda V=V, m=m: m[:, None] * V / row_norms(V.T),
                "the norm is that of W alone, without γ·B·A": lambda V=V, W=W, f=dora: f(V, row_norms(W)),
                "the norm is that of the change alone": lambda V=V, W=W, f=dora: f(V, row_norms(V - W)),
                "one norm is taken of the whole matrix": lambda V=V, m=m: m[:, None] * V / V.square().sum().sqrt(),
                "the norm is squared: take the root": lambda V=V, f=dora: f(V, row_norms(V) ** 2),
                "the largest |entry| of a row stands for its norm": lambda V=V, f=dora: f(V, V.abs().max(1).values),
                "the rows are not divided by their norm": lambda V=V, m=m: m[:, None] * V,
                "m is left out": lambda V=V: V / row_norms(V)[:, None],
                "γ was left out": lambda W=W, c=change, f=dora: f(W + c, row_norms(W + c)),
                "only the change is returned, W' − W": lambda V=V, W=W, f=dora: f(V, row_norms(V)) - W,
                "W is normalised before γ·B·A is added": lambda V=V, W=W, f=dora: f(W, row_norms(W)) + (V - W),
            },
        )
    yield Case("give W back while B = 0 and m = ‖W‖", (W, A, torch.zeros_like(B), row_norms(W), gamma), W)


# VeRA ----------------------------------------------------------------------------------------------------------------
def vera_cases(rng: Random):
    for dtype, wide in ((torch.float32, False), (torch.float64, True), (torch.float64, False)):
        d_out, d_in, rank = sizes(rng)
        rank = rank + max(d_out, d_in) if wide else rank
        A, B = normal(rng, rank, d_in, dtype=dtype), normal(rng, d_out, rank, dtype=dtype)
        d, b = normal(rng, rank, dtype=dtype), normal(rng, d_out, dtype=dtype)

        def change(d, b, A=A, B=B):
            # ΔW = Σ_k d_k · (b ⊙ column k of B) · (row k of A)
            return sum(d[k] * torch.outer(b * B[:, k], A[k]) for k in range(len(d)))

        one, many = torch.ones_like(d), torch.ones_like(b)
        yield Case(
            f"be diag(b)·B·diag(d)·A for d_out={d_out}, d_in={d_in} and rank {rank}",
            (A, B, d, b),
            change(d, b),
            wrong={
                "d is left out": lambda b=b, one=one, f=change: f(one, b),
                "b is left out": lambda d=d, many=many, f=change: f(d, many),
                "both vectors are left out": lambda one=one, many=many, f=change: f(one, many),
                "it is transposed": lambda d=d, b=b, f=change: f(d, b).T,
                "d is applied twice": lambda d=d, b=b, f=change: f(d * d, b),
                "b is applied twice": lambda d=d, b=b, f=change: f(d, b * b),
                "it is divided by the rank: VeRA has no γ": lambda d=d, b=b, f=change: f(d, b) / len(d),
            },
        )
    yield Case(
        "be zero while b is zero, so that the model starts unchanged",
        (A, B, d, torch.zeros_like(b)),
        torch.zeros_like(change(d, b)),
    )


# AdaLoRA's budget ----------------------------------------------------------------------------------------------------
def cubic(step: int, total: int, start: int, final: int, first: int, target: int, power: int = 3) -> float:
    """b(t) in exact fractions, rounded once."""
    if step <= start:
        return float(first)
    if step >= total - final:
        return float(target)
    left = 1 - Fraction(step - start, total - final - start)
    return float(target + (first - target) * left**power)


def budget_cases(rng: Random):
    settings = [(100, 10, 30, 96, 64, 25)]  # the example, a quarter of the way: its half does not tell x from 1 − x
    for start, final in ((rng.randint(3, 9), rng.randint(11, 29)), (0, 0), (rng.randint(11, 20), 5)):
        total, target = start + final + rng.randint(30, 90), rng.randint(8, 60)
        middle = rng.choice([t for t in range(start + 5, total - final - 7) if t != start + final])
        settings.append((total, start, final, target + rng.randint(5, 60), target, middle))
    for total, start, final, first, target, middle in settings:
        last = total - final
        for step in dict.fromkeys((middle, start, start + 1, last - 1, last, start // 2, last + final // 2, total)):
            args = (step, total, start, final, first, target)
            phase = "before the pruning" if step <= start else "in the final phase" if step >= last else "between"

            def unclamped(a=args):
                left = 1 - Fraction(a[0] - a[2], a[1] - a[3] - a[2])
                return float(a[5] + (a[4] - a[5]) * left**3)

            yield Case(
                f"give b({step}) for total={total}, start={start}, final={final} ({phase})",
                args,
                cubic(*args),
                wrong={
                    "it falls in a straight line: the third power is missing": lambda a=args: cubic(*a, power=1),
                    "the power is 2": lambda a=args: cubic(*a, power=2),
                    "it is not held in the first or the final phase": unclamped,
                    "first and target changed places": lambda a=args: cubic(*a[:4], a[5], a[4]),
                    "the first phase is ignored": lambda a=args: cubic(a[0], a[1], 0, a[3], a[4], a[5]),
                    "the final phase is ignored": lambda a=args: cubic(a[0], a[1], a[2], 0, a[4], a[5]),
                    "both phases are ignored": lambda a=args: cubic(a[0], a[1], 0, 0, a[4], a[5]),
                    "target is not added: at the end target triplets stay": lambda a=args: cubic(*a) - a[5],
                    "it is rounded: return the number as it is": lambda a=args: int(cubic(*a)),
                    "it is rounded to the nearest: return the number as it is": lambda a=args: round(cubic(*a)),
                    "it rises with x³: the number that is left falls with (1 − x)³": lambda a=args: (
                        a[5] + (a[4] - a[5]) * ((a[0] - a[2]) / (a[1] - a[3] - a[2])) ** 3
                    ),
                    "x is a share of all steps: it goes from 0 at `start` to 1 at `total − final`": lambda a=args: (
                        a[5] + (a[4] - a[5]) * (1 - (a[0] - a[2]) / a[1]) ** 3
                    ),
                    "it falls as 1 − x³ instead of (1 − x)³": lambda a=args: (
                        a[5] + (a[4] - a[5]) * (1 - min(1, max(0, (a[0] - a[2]) / (a[1] - a[3] - a[2]))) ** 3)
                    ),
                    "x is a whole number: divide with /": lambda a=args: float(a[4] if a[0] < a[1] - a[3] else a[5]),
                    "final stands in the numerator, too": lambda a=args: (
                        a[5] + (a[4] - a[5]) * (1 - (a[0] - a[2] - a[3]) / (a[1] - a[3] - a[2])) ** 3
                    ),
                },
            )


# AdaLoRA's pruning ---------------------------------------------------------------------------------------------------
def importances(layers: dict, mean: bool = True) -> list[tuple[float, str, int]]:
    """(S, layer, triplet) of every triplet, the most important first; S = s(λ) + mean s(P column) + mean s(Q row)."""
    found = []
    for name, (P, lam, Q) in layers.items():
        for k, own in enumerate(lam.tolist()):
            column, row = P[:, k].tolist(), Q[k].tolist()
            left, right = (len(column), len(row)) if mean else (1, 1)
            found.append((own + sum(column) / left + sum(row) / right, name, k))
    return sorted(found, reverse=True)


def marks(layers: dict, chosen: list[tuple[float, str, int]]) -> dict[str, torch.Tensor]:
    masks = {name: torch.zeros(len(lam), dtype=torch.bool) for name, (_, lam, _) in layers.items()}
    for _, name, k in chosen:
        masks[name][k] = True
    return masks


def layers_to_prune(rng: Random) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Sensitivities of layers that differ in width, rank and size, so that a share for each is something else."""
    found = {}
    for i in range(rng.randint(3, 5)):
        d_out, d_in, rank = rng.randint(5, 60), rng.randint(5, 60), rng.randint(3, 8)
        size = 1 + 0.4 * i
        found[f"layer{i}"] = tuple(
            size * normal(rng, *shape, dtype=torch.float64).abs() * normal(rng, *one, dtype=torch.float64).abs()
            for shape, one in (((d_out, rank), (1, rank)), ((rank,), (rank,)), ((rank, d_in), (rank, 1)))
        )
    return found


def keep_cases(rng: Random):
    for share in (0.5, 0.25, 0.7, 0.0, 1.0, 1.5):
        layers = layers_to_prune(rng)
        order = importances(layers)
        budget = round(share * len(order))
        while 0 < budget < len(order) and order[budget - 1][0] - order[budget][0] < 1e-6:  # no ties at the threshold
            layers = layers_to_prune(rng)
            order = importances(layers)
            budget = round(share * len(order))

        def each(layers=layers, order=order, share=share):
            chosen = []
            for name in layers:
                mine = [one for one in order if one[1] == name]
                chosen += mine[: round(share * len(mine))]
            return marks(layers, chosen)

        def alone(i, layers=layers, budget=budget):
            """Pruned by one of P, λ and Q alone."""
            zero = {n: [t if j == i else torch.zeros_like(t) for j, t in enumerate(ts)] for n, ts in layers.items()}
            return marks(layers, importances(zero)[:budget])

        def no_lam(layers=layers, budget=budget):
            zero = {n: (P, torch.zeros_like(lam), Q) for n, (P, lam, Q) in layers.items()}
            return marks(layers, importances(zero)[:budget])

        yield Case(
            f"keep the {min(budget, len(order))} most important of {len(order)} triplets, over all layers together"
            + (" (the budget is above what there is)" if budget > len(order) else ""),
            (layers, budget),
            marks(layers, order[:budget]),
            wrong={
                "each layer gets its own share of the budget": each,
                "the sensitivities of P and Q are added up: take means, or wide layers win": (
                    lambda x=layers, k=budget: marks(x, importances(x, mean=False)[:k])
                ),
                "only λ counts": lambda f=alone: f(1),
                "λ does not count": no_lam,
                "only P counts": lambda f=alone: f(0),
                "only Q counts": lambda f=alone: f(2),
                "the least important stay": lambda x=layers, o=order, k=budget: marks(x, o[::-1][:k]),
                "the masks are inverted: True means kept": lambda x=layers, o=order, k=budget: marks(x, o[k:]),
                "one too many stays": lambda x=layers, o=order, k=budget: marks(x, o[: k + 1]),
                "one too few stays": lambda x=layers, o=order, k=budget: marks(x, o[: max(0, k - 1)]),
            },
        )


# find the bug --------------------------------------------------------------------------------------------------------
def repair_cases(rng: Random):
    for _ in range(3):
        d_out, d_in, rank = sizes(rng)
        gamma = round(rng.uniform(0.4, 2.0), 2)
        W, b, m = normal(rng, d_out, d_in), normal(rng, d_out), normal(rng, d_out).abs() + 0.5
        A, B = normal(rng, rank, d_in), normal(rng, d_out, rank)
        x = normal(rng, 4, d_in)
        G = weights(torch.empty(4, d_out)).float()  # ∂L/∂y, as `drives.common.life` has it
        args = (W, b, x, rank, gamma, A, B, m, rng.randrange(10**6))
        V = W + gamma * B @ A
        length = row_norms(V)

        def shapes(seen, A=A, B=B, m=m):
            found = (seen["shape of A"], seen["shape of B"])
            if found != (tuple(A.shape), tuple(B.shape)):
                return f"A and B have the shapes {found[0]} and {found[1]}, not {tuple(A.shape)} and {tuple(B.shape)}."
            if seen["numbers in m"] != len(m):
                return f"m has {seen['numbers in m']} numbers; the layer has {len(m)} outputs."

        def start(seen, x=x, W=W, b=b):
            if seen["at first"].shape != (len(x), len(b)):
                return f"The output has shape {tuple(seen['at first'].shape)} instead of {(len(x), len(b))}."
            if not near(seen["at first"], x @ W.T + b):
                largest = (seen["at first"] - x @ W.T - b).abs().max().item()
                return f"Before any training the output is off by {largest:.2g}: which m gives W back?"

        def use(seen, x=x, W=W, b=b, m=m, V=V, length=length):
            right = x @ (m[:, None] * V / length[:, None]).T + b
            if near(seen["in use"], right):
                return None
            known = {
                "the norm is taken over the columns": x @ (m[:, None] * V / row_norms(V.T)).T + b,
                "the norm is that of W alone, without γ·B·A": x @ (m[:, None] * V / row_norms(W)[:, None]).T + b,
                "the bias is scaled as well": (x @ V.T + b) * (m / length),
                "the bias is left out": right - b,
            }
            said = [f"It looks as if {text}." for text, value in known.items() if near(seen["in use"], value)]
            if seen["in use"].shape != right.shape:
                return f"The output has shape {tuple(seen['in use'].shape)} instead of {tuple(right.shape)}."
            largest = (seen["in use"] - right).abs().max().item()
            return f"{' '.join(said)} The largest difference from W'·x + b is {largest:.3g}.".strip()

        # W' = s ⊙ V with s = m/‖V‖, and ‖V‖ a constant:  ∂L/∂V = s ⊙ ∂L/∂W',  ∂L/∂B = γ·∂L/∂V·Aᵀ,  ∂L/∂A = γ·Bᵀ·∂L/∂V
        outer = G.T @ x
        toward = outer * (m / length)[:, None]
        # with ‖V‖ as a function of V:  ∂L/∂V loses its part along v_i/‖v_i‖
        units = V / length[:, None]
        along = (outer * units).sum(1)  # ∂L/∂m
        across = toward - units * (toward * units).sum(1, keepdim=True)

        def gradients(seen, A=A, B=B, g=gamma, toward=toward, across=across, along=along):
            for name in ("A", "B", "m"):
                if not seen["gradients"][name].any():
                    return f"{name} gets no gradient: is it an nn.Parameter that the output depends on?"
            for name, value in {"A": lambda D: g * B.T @ D, "B": lambda D: g * D @ A.T}.items():
                got = seen["gradients"][name]
                if not near(got, value(toward)):
                    if near(got, value(across)):
                        return (
                            "The gradient flows through the norm, too; §4.3 of the paper takes the norm as a constant."
                        )
                    return f"The gradient of {name} is not that of W' with a constant norm."
            if not near(seen["gradients"]["m"], along):
                return "The gradient of m is not Σ_j ∂L/∂W'_ij · V_ij / ‖V_i‖."

        yield Case("have A (rank, d_in), B (d_out, rank) and m with d_out numbers", args, judge=shapes)
        yield Case("leave the layer's output as it was before training", args, judge=start)
        yield Case("give m ⊙ (W + γ·B·A)/‖W + γ·B·A‖ · x + b, with the norm of each row", args, judge=use)
        yield Case("let A, B and m learn, with the norm as a constant", args, judge=gradients)
        yield Case("train A, B and m from a random A, and keep the base frozen, its bias too", args, judge=holds)


def near(got, want: torch.Tensor) -> bool:
    return got.shape == want.shape and bool(((got - want).abs() <= 1e-4 * max(1.0, want.abs().max().item())).all())


EXERCISES = (
    Exercise(
        "dora_weight", "DoRA's weight", dora_cases,
        (
            "First V = W + γ·B·A, then the norm of each of its rows, (d_out,), then m divided by that norm.",
            "The norm of (3, 4) sums over d_in. Numbers of shape (d_out,) scale rows only as a column, (d_out, 1).",
        ),
        ("dora_weight",),
    ),
    Exercise(
        "vera_delta", "VeRA's change", vera_cases,
        (
            "A diagonal matrix on the left scales rows: you need not build it.",
            "`v[:, None]` makes a column of a vector. Go from right to left: A's rows, then the product with B, then "
            "its rows.",
        ),
        ("vera_delta",),
    ),
    Exercise(
        "adalora_budget", "AdaLoRA's budget", budget_cases,
        (
            "Two ifs for the two phases in which nothing changes, and a formula between them.",
            "x is the share of the middle that has passed: 0 at `start`, 1 at `total − final`, and ½ at step 40 of "
            "the example.",
        ),
        ("adalora_budget",),
    ),
    Exercise(
        "adalora_keep", "AdaLoRA's pruning", keep_cases,
        (
            "One score for each triplet, all scores in one vector; its `budget` largest say which stay.",
            "Means, not sums: over which axis, if columns of P and rows of Q are the triplets? One `topk` for all; "
            "`split` goes by the ranks.",
        ),
        ("adalora_keep",),
    ),
    Exercise(
        "RepairedDoRA", "Find the bug", repair_cases,
        (
            "There are three faults: where m starts, what the norm runs over, and what the gradient flows through.",
            "While B is 0, which m gives W' = W? One output is one row. And the norm, but not V, is a constant for "
            "the gradient.",
        ),
        ("RepairedDoRA",), "lora_family.dora_layer",
    ),
)  # fmt: skip
