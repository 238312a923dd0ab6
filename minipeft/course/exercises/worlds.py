"""Assignment `worlds`: clients whose updates become one, and a detector that says when the world has changed."""

from __future__ import annotations

from random import Random

import torch

from minipeft.course.exercises.draw import assemble, falling, normal, orthonormal, sizes
from minipeft.course.verdict import Case, Exercise, Raises

DOUBLE = torch.float64


def clients(rng: Random, k: int, dtype=DOUBLE, ranks=None) -> tuple[list[tuple], list[int]]:
    """[(A_k, B_k)] of one rank, or of `ranks`, and their rows, which all differ."""
    d_out, d_in, r = sizes(rng)
    each = ranks or [r] * k
    pairs = [(normal(rng, r, d_in, dtype=dtype), normal(rng, d_out, r, dtype=dtype)) for r in each]
    return pairs, rng.sample(range(3, 90), k)


def weighted(tensors: list, rows: list[int], total: float | None = None) -> torch.Tensor:
    """Σ n_k·T_k / Σ n, one after the other."""
    result = torch.zeros_like(tensors[0])
    for n, tensor in zip(rows, tensors, strict=True):
        result = result + n * tensor / (sum(rows) if total is None else total)
    return result


# factors and products ------------------------------------------------------------------------------------------------
def factor_cases(rng: Random):
    for k, dtype in ((2, DOUBLE), (3, torch.float32), (5, DOUBLE), (1, DOUBLE)):
        pairs, rows = clients(rng, k, dtype)

        def both(weights, total=None, pairs=pairs):
            return tuple(weighted([pair[i] for pair in pairs], weights, total) for i in (0, 1))

        yield Case(
            f"average A and B of {k} client{'s' * (k > 1)} by rows",
            (pairs, rows),
            both(rows),
            wrong={
                "all clients count alike: weight them by their rows": lambda b=both, k=k: b([1] * k),
                "it adds up without dividing": lambda b=both, r=rows: b(r, 1.0),
                "it divides by the number of clients instead of the rows": lambda b=both, r=rows, k=k: b(r, k),
                "A and B are exchanged: return (A, B)": lambda b=both, r=rows: b(r)[::-1],
            }
            if k > 1
            else {},
        )


def product_cases(rng: Random):
    for k, dtype, ranks in ((2, DOUBLE, None), (3, DOUBLE, None), (4, torch.float32, None), (3, DOUBLE, [1, 3, 2])):
        pairs, rows = clients(rng, k, dtype, ranks)
        products = [B @ A for A, B in pairs]

        def crossed(pairs=pairs, rows=rows):
            A, B = (weighted([pair[i] for pair in pairs], rows) for i in (0, 1))
            return B @ A

        wrong = {
            "all clients count alike": lambda p=products: weighted(p, [1] * len(p)),
            "it adds up without dividing": lambda p=products, r=rows: weighted(p, r, 1.0),
        }
        if ranks is None:
            wrong |= {
                "the product of the means is taken, which has cross terms; take the mean of the products": crossed
            }
        claim = f"average the products of {k} clients" + (f" of ranks {', '.join(map(str, ranks))}" if ranks else "")
        yield Case(claim, (pairs, rows), weighted(products, rows), wrong=wrong)


# cut back ------------------------------------------------------------------------------------------------------------
def cut_cases(rng: Random):
    for wide in (False, True, False):
        d_out, d_in = sorted(rng.sample(range(5, 14), 2), reverse=not wide)
        n = min(d_out, d_in)
        U, s, V = orthonormal(rng, d_out, n), falling(rng, n), orthonormal(rng, d_in, n)
        for rank in (1, rng.randint(2, n - 1), n):

            def seen(which, scale=lambda s: s, rank=rank, U=U, s=s, V=V):
                part = list(which)
                product = assemble(U[:, part], scale(s[part]), V[:, part])
                shapes = {"A": ((rank, len(V)), str(DOUBLE)), "B": ((len(U), rank), str(DOUBLE))}
                return shapes | {"B·A": product, "√σ is in each of the two factors": True}

            yield Case(
                f"give the best rank-{rank} approximation of a {d_out}×{d_in} matrix",
                (assemble(U, s, V), rank),
                seen(range(rank)),
                wrong={
                    "the smallest singular values are kept": lambda f=seen, n=n, r=rank: f(range(n - r, n)),
                    "Σ is lost": lambda f=seen, r=rank: f(range(r), torch.ones_like),
                    "Σ is in both factors whole, so it counts twice: take the root": lambda f=seen, r=rank: f(
                        range(r), torch.square
                    ),
                    "√Σ is in one factor only": lambda f=seen, r=rank: f(range(r), torch.sqrt),
                },
            )
        for rank in (0, n + 1):
            yield Case(
                f"raise a ValueError for rank {rank} of {d_out}×{d_in}", (assemble(U, s, V), rank), Raises("ValueError")
            )


# stacking ------------------------------------------------------------------------------------------------------------
def stack_cases(rng: Random):
    for k, ranks in ((2, None), (3, None), (3, [2, 1, 4]), (1, None)):
        pairs, rows = clients(rng, k, DOUBLE, ranks)
        total = sum(len(A) for A, _ in pairs)

        def seen(weights, divide=None, pairs=pairs, total=total):
            product = weighted([B @ A for A, B in pairs], weights, divide)
            shapes = {"A": ((total, pairs[0][0].shape[1]), str(DOUBLE)), "B": ((len(pairs[0][1]), total), str(DOUBLE))}
            return shapes | {"B·A": product}

        squared, all_rows = [n * n / sum(rows) for n in rows], sum(rows)
        yield Case(
            f"stack {k} client{'s' * (k > 1)} into one LoRA of rank {total}",
            (pairs, rows),
            seen(rows),
            wrong={
                "the weights are left out": lambda f=seen, k=k: f([1] * k, 1.0),
                "all clients count alike": lambda f=seen, k=k: f([1] * k),
                "the weight is on A and on B, so it counts twice": lambda f=seen, q=squared, t=all_rows: f(q, t),
            }
            if k > 1
            else {},
        )


# Page and Hinkley ----------------------------------------------------------------------------------------------------
def alarms(values, delta, threshold, least, fresh=True, mean_before=False, total=False, down=False) -> list[int]:
    """The alarms, by looking back over all values since the last one."""
    found, start = [], 0
    for t in range(len(values)):
        seen = values[start : t + 1]
        sums, m = [], 0.0
        for i, x in enumerate(seen):
            before = seen[:i] if mean_before and i else seen[: i + 1]
            m += (-1 if down else 1) * (x - sum(before) / len(before)) - delta
            sums.append(m)
        if len(seen) >= least and m - (0.0 if total else min(sums)) > threshold:
            found.append(t)
            start = t + 1 if fresh else start
    return found


def hinkley_cases(rng: Random):
    for length, delta, threshold, least in (
        (40, 0.1, 1.5, 3),
        (60, 0.05, 1.0, 5),
        (50, 0.0, 2.0, 8),
        (30, 0.3, 0.7, 1),
    ):
        level, values = 0.0, []
        for t in range(length):
            level = rng.uniform(-3, 3) if t % (length // 3) == 0 else level
            values.append(round(level + rng.gauss(0, 0.2), 3))
        args = (values, delta, threshold, least)
        yield Case(
            f"find the rises in {length} values (δ = {delta:g}, λ = {threshold:g}, at least {least} values)",
            args,
            alarms(*args),
            wrong={
                "it does not begin anew after an alarm": lambda a=args: alarms(*a, fresh=False),
                "the mean is that of the values before, without the present one": lambda a=args: alarms(
                    *a, mean_before=True
                ),
                "the sum is compared with λ itself, not with its lowest point": lambda a=args: alarms(*a, total=True),
                "it finds falls instead of rises": lambda a=args: alarms(*a, down=True),
                "the number of values is not asked for": lambda a=args: alarms(*a[:3], 1),
            },
        )


# find the bug --------------------------------------------------------------------------------------------------------
def robust_cases(rng: Random):
    for k, bad in ((3, 1), (5, 2), (2, 0), (4, 3)):
        names = rng.sample(["zoë", "site 10", "site 2", "b", "Amt"], k)
        updates = {name: normal(rng, 3, 4, dtype=DOUBLE) for name in names}
        rows = {name: rng.randint(2, 60) for name in rng.sample(names, k)}
        refused = sorted(rng.sample(names, bad))
        for name in refused:
            updates[name][rng.randrange(3), rng.randrange(4)] = rng.choice([float("nan"), float("inf"), -float("inf")])
        left = [name for name in names if name not in refused]

        def mean(names, weights, total=None, updates=updates):
            return weighted([updates[n].nan_to_num(0.0, 0.0, 0.0) for n in names], weights, total)

        right = mean(left, [rows[n] for n in left])
        yield Case(
            f"leave out {bad} of {k} clients, and name them",
            (updates, rows),
            (right, refused),
            wrong={
                "what was refused still counts in the weights": lambda m=mean, n=left, r=rows, f=refused: (
                    m(n, [r[x] for x in n], sum(r.values())),
                    f,
                ),
                "NaN is replaced by zeros instead of refused": lambda m=mean, n=names, r=rows, f=refused: (
                    m(n, [r[x] for x in n]),
                    f,
                ),
                "rows are taken in their own order, not by name": lambda m=mean, n=left, r=rows, f=refused: (
                    m(n, list(r.values())[: len(n)]),
                    f,
                ),
                "all clients count alike": lambda m=mean, n=left, f=refused: (m(n, [1] * len(n)), f),
            },
        )
    broken = {name: torch.full((2, 2), float("nan")) for name in ("a", "b")}
    yield Case("raise a ValueError that names them when nobody is left", (broken, {"a": 1, "b": 2}),
               Raises("ValueError", ("a", "b")))  # fmt: skip


EXERCISES = (
    Exercise(
        "average_factors", "The average of A and B", factor_cases,
        (
            "The weight of a client is its rows divided by all rows.",
            "Clients with 30 and 10 rows weigh ¾ and ¼. The same weights for all A and for all B.",
        ),
        ("average_factors",),
    ),
    Exercise(
        "average_product", "The average of B·A", product_cases,
        (
            "Multiply first, average then: the mean of products is not the product of means.",
            "B·A is (d_out, d_in) whatever the rank, so changes can be added where factors cannot. The weights are "
            "those of exercise 1.",
        ),
        ("average_product",),
    ),
    Exercise(
        "cut_back", "Back to rank r", cut_cases,
        (
            "torch.linalg.svd(delta, full_matrices=False) gives U, σ and Vᵀ, the largest σ first.",
            "σ = √σ·√σ: one root scales the columns of U, the other the rows of Vᵀ. How many of each are kept?",
        ),
        ("cut_back",), "worlds.halves",
    ),
    Exercise(
        "stack", "Stacking", stack_cases,
        (
            "[B_1 B_2]·[A_1; A_2] = B_1·A_1 + B_2·A_2.",
            "`torch.cat` along the dimension that counts ranks: which is that in A, and which in B? Weigh one of the "
            "two.",
        ),
        ("stack",), "worlds.product",
    ),
    Exercise(
        "page_hinkley", "Page and Hinkley's test", hinkley_cases,
        (
            "Keep four numbers: how many values since the last alarm, their mean, the sum m, and the lowest m.",
            "A mean moves by (x − mean)/count. Go in the order of the text: count, mean, m, lowest, alarm. What "
            "begins anew after one?",
        ),
        ("page_hinkley",),
    ),
    Exercise(
        "robust_average", "Find the bug", robust_cases,
        (
            "One NaN makes the whole sum NaN, and 0·NaN is NaN: such a client must not be in the sum at all.",
            "`isfinite` knows NaN and ∞. Decide who is left before you count rows, and look rows up by name, not by "
            "place.",
        ),
        ("robust_average",),
    ),
)  # fmt: skip
