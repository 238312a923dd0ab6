"""Assignment `serving`: many adapters over one base, in one batch, in one file, in little memory."""

from __future__ import annotations

from random import Random

import torch

from minipeft.course.exercises.draw import normal
from minipeft.course.verdict import Case, Exercise, Raises


# rows ----------------------------------------------------------------------------------------------------------------
def one_by_one(x, A, B, gammas, own) -> torch.Tensor:
    """Row by row: γ·B·A·x_i, zero for None."""
    out = torch.zeros(*x.shape[:2], len(B[0]), dtype=x.dtype)
    for i, k in enumerate(own):
        if k is not None:
            out[i] = gammas[k] * (x[i] @ A[k].T @ B[k].T)
    return out


def rows_cases(rng: Random):
    for ranks, own in (
        ((3, 3, 3), [2, 0, 1, 0]),
        ((1, 4, 2), [1, 1, 0, 2, 0]),
        ((2, 5), [None, 1, None, 0]),
        ((4, 1, 3), [2, None, 2, 2, 0, 1]),
    ):
        d_out, d_in = rng.sample(range(5, 12), 2)
        x = normal(rng, len(own), rng.randint(2, 4), d_in)
        A, B = [normal(rng, r, d_in) for r in ranks], [normal(rng, d_out, r) for r in ranks]
        gammas = [round(rng.uniform(0.5, 3.0), 2) for _ in ranks]
        args = (x, A, B, gammas, own)
        named = [0 if k is None else k for k in own]
        last = [len(A) - 1 if k is None else k for k in own]
        yield Case(
            f"send each row through its own adapter; ranks {ranks}, choices {own}",
            args,
            one_by_one(*args),
            wrong={
                "γ is left out": lambda a=args: one_by_one(*a[:3], [1.0] * len(a[3]), a[4]),
                "every row gets the γ of the first adapter": lambda a=args: one_by_one(
                    *a[:3], [a[3][0]] * len(a[3]), a[4]
                ),
                "every row gets the first adapter": lambda a=args: one_by_one(*a[:4], [0] * len(a[4])),
                "adapter 0 is taken for none: 0 and None are both false, so ask `is None`": lambda a=args: one_by_one(
                    *a[:4], [k or None for k in a[4]]
                ),
                "adapter 0 and None both choose the last: `k or -1` is −1 for 0": lambda a=args: one_by_one(
                    *a[:4], [k or len(a[1]) - 1 for k in a[4]]
                ),
                "None chooses the first adapter": lambda a=args, n=named: one_by_one(*a[:4], n),
                "None chooses the last adapter": lambda a=args, n=last: one_by_one(*a[:4], n),
            },
        )


# concatenation -------------------------------------------------------------------------------------------------------
def joined(A, B, scales) -> list:
    return [torch.cat([s * b for s, b in zip(scales, B, strict=True)], dim=1), torch.cat(A)]


def concatenation_cases(rng: Random):
    for ranks in ((2, 2), (1, 4, 3), (3,)):
        d_out, d_in = rng.sample(range(8, 16), 2)
        A, B = [normal(rng, r, d_in) for r in ranks], [normal(rng, d_out, r) for r in ranks]
        gammas = [round(rng.uniform(0.5, 3.0), 2) for _ in ranks]
        weights = [round(rng.uniform(-1.5, 1.5), 2) or 0.5 for _ in ranks]
        scales = [g * w for g, w in zip(gammas, weights, strict=True)]
        yield Case(
            f"have B·A = Σ w·γ·B_k·A_k, of rank {sum(ranks)}, with w·γ in B",
            (A, B, gammas, weights),
            joined(A, B, scales),
            wrong={
                "γ is left out": lambda a=A, b=B, w=weights: joined(a, b, w),
                "w is left out": lambda a=A, b=B, g=gammas: joined(a, b, g),
                "|w| is taken: a negative weight takes a task away": lambda a=A, b=B, s=scales: joined(
                    a, b, list(map(abs, s))
                ),
                "they are joined along the wrong dimension: B·A must stay (d_out, d_in), and the rank grows": (
                    lambda a=A, b=B, s=scales: [
                        torch.cat([v * x for v, x in zip(s, b, strict=True)])[:, : min(map(len, a))],
                        torch.cat([x[: min(map(len, a))] for x in a], 1),
                    ]
                ),
                "they are added up, which brings products that nobody trained": lambda a=A, b=B, s=scales: [
                    sum(v * x[:, : min(map(len, a))] for v, x in zip(s, b, strict=True)),
                    sum(x[: min(map(len, a))] for x in a),
                ],
                "A comes first: return B, then A": lambda a=A, b=B, s=scales: joined(a, b, s)[::-1],
            },
        )


# TIES ----------------------------------------------------------------------------------------------------------------
def voted(changes: torch.Tensor, count_all: bool = False, heads: bool = False, total: bool = False) -> torch.Tensor:
    """Entry by entry. `count_all`: divide by all; `heads`: the sign that most have; `total`: a sum, not a mean."""
    flat = changes.reshape(len(changes), -1)
    out = torch.zeros(flat.shape[1], dtype=changes.dtype)
    for j, column in enumerate(flat.T):
        size = column.sign().sum() if heads else column.sum()
        mine = [v for v in column if (v > 0 if size >= 0 else v < 0)]
        out[j] = sum(mine) / (1 if total else len(flat) if count_all else len(mine)) if mine else 0
    return out.reshape(changes.shape[1:])


def vote_cases(rng: Random):
    for k, shape in ((3, (4, 5)), (5, (3, 2)), (2, (6,)), (4, (2, 3, 4))):
        changes = normal(rng, k, *shape, dtype=torch.float64)
        changes = changes * (normal(rng, k, *shape) > -0.4)  # what was trimmed is zero
        yield Case(
            f"elect signs among {k} trimmed changes of shape {shape}, and take the mean of those that agree",
            (changes,),
            voted(changes),
            wrong={
                "the mean is taken over all changes: those that were outvoted do not count": lambda c=changes: voted(
                    c, count_all=True
                ),
                "heads are counted: the vote is by size, the sign of the sum": lambda c=changes: voted(c, heads=True),
                "the sum is taken, not the mean": lambda c=changes: voted(c, total=True),
                "nothing was elected: this is the plain mean": lambda c=changes: c.mean(0),
            },
        )
    even = torch.tensor([[1.5, 0.0, 0.0], [-1.5, 0.0, -2.0]], dtype=torch.float64)
    yield Case("elect + where the sum is zero, and give 0 where all are zero", (even,), voted(even))


# cache ---------------------------------------------------------------------------------------------------------------
def kept(requests, limit, touch: bool = True, newest: bool = False) -> list:
    """By lists. `touch`: a use makes young again; `newest`: the youngest goes first."""
    held: list[tuple[str, int]] = []
    loads = 0
    for name, size in requests:
        if (name, size) in held:
            if touch:
                held.remove((name, size))
                held.append((name, size))
            continue
        loads += 1
        while sum(s for _, s in held) + size > limit:
            held.pop(-1 if newest else 0)
        held.append((name, size))
    return [[name for name, _ in held], loads]


def cache_cases(rng: Random):
    for _ in range(4):
        sizes = {name: rng.randint(20, 60) for name in rng.sample(["q", "ab", "m", "x1", "c"], 5)}
        asked = [rng.choice(list(sizes)) for _ in range(rng.randint(10, 16))]
        first, second, third = list(sizes)[:3]
        asked += [first, second, first, third]
        requests, limit = [(name, sizes[name]) for name in asked], rng.randint(120, 150)
        yield Case(
            f"keep at most {limit} bytes, put out what was used least recently, and count the loads",
            (requests, limit),
            kept(requests, limit),
            wrong={
                "a name that is asked for again stays as old as it was": lambda r=requests, n=limit: kept(r, n, False),
                "the youngest is put out first": lambda r=requests, n=limit: kept(r, n, newest=True),
                "every request counts as a load": lambda r=requests, n=limit: [kept(r, n)[0], len(r)],
                "the youngest comes first in the list": lambda r=requests, n=limit: [
                    kept(r, n)[0][::-1],
                    kept(r, n)[1],
                ],
            },
        )
    yield Case(
        "raise a ValueError that names an adapter which is larger than all of the memory",
        ([("small", 10), ("enormous", 101)], 100),
        Raises("ValueError", ("enormous",)),
    )


# find the bug --------------------------------------------------------------------------------------------------------
def beams_one_by_one(x, A, B, own, beams) -> torch.Tensor:
    out = torch.zeros(len(x), B.shape[1], dtype=x.dtype)
    for i, row in enumerate(x):
        if own[i // beams] >= 0:
            out[i] = B[own[i // beams]] @ (A[own[i // beams]] @ row)
    return out


def beam_cases(rng: Random):
    for beams, own, poisoned in (
        (1, [1, 0, 2], False), (3, [1, 0, 2], False), (1, [-1, 2, 0, -1], False), (2, [0, -1, 1], True),
    ):  # fmt: skip
        d_out, d_in = rng.sample(range(4, 9), 2)
        A, B = normal(rng, 4, 2, d_in), normal(rng, 4, d_out, 2)
        if poisoned:  # an adapter that no row chose may hold anything
            A[3, 0, 0] = float("nan")
        args = (normal(rng, len(own) * beams, d_in), A, B, torch.tensor(own), beams)
        yield Case(
            f"serve choices {own} with {beams} beam{'s' * (beams > 1)} each"
            + (", while an adapter that nobody chose holds a NaN" if poisoned else ""),
            args,
            beams_one_by_one(*args),
            wrong={
                "the choices are repeated as a whole; a row's beams lie together": lambda a=args: beams_one_by_one(
                    *a[:3], a[3].repeat(a[4]), 1
                ),
                "−1 chooses the first adapter": lambda a=args: beams_one_by_one(*a[:3], a[3].clamp(min=0), a[4]),
                "−1 chooses the last adapter": lambda a=args: beams_one_by_one(*a[:3], a[3] % len(a[1]), a[4]),
            },
            lenses=not poisoned,
        )


EXERCISES = (
    Exercise(
        "mixed_rows", "Each row its own adapter", rows_cases,
        (
            "Fill all A and all B up to the largest rank with zeros and stack them; A[index] then has one A a row.",
            "Zeros below A and right of B change no product. Any adapter may stand in for None if its result is "
            "hidden afterwards.",
        ),
        ("mixed_rows",),
    ),
    Exercise(
        "concatenated", "Two adapters in one file", concatenation_cases,
        (
            "[B₁ | B₂]·[A₁; A₂] = B₁·A₁ + B₂·A₂: no product of one's B with the other's A.",
            "For ranks 2 and 3, B is (d_out, 5) and A is (5, d_in): along which dimension does each grow?",
        ),
        ("concatenated",),
    ),
    Exercise(
        "elected", "TIES: a vote on the sign", vote_cases,
        (
            "The sign of an entry is that of the sum over the adapters; a zero sum counts as +.",
            "`sign()` gives −1, 0 or 1, so a 0 agrees with neither sign. Divide by how many agree; where nobody "
            "does, by 1.",
        ),
        ("elected",),
    ),
    Exercise(
        "least_recent", "A cache by bytes", cache_cases,
        (
            "A dict keeps the order in which names came in: pop a name and put it in again to make it the youngest.",
            "`next(iter(held))` is the oldest name. Put out until the *new* one fits as well. A hit is no load, and "
            "yet makes young.",
        ),
        ("least_recent",),
    ),
    Exercise(
        "repaired_rows", "Find the bug", beam_cases,
        (
            "Try two beams, then a row without an adapter, then an adapter full of NaN that nobody chose.",
            "Copies of a row lie together: which repeat is that? 0·NaN is NaN, so choose by index. What did −1 "
            "choose?",
        ),
        ("repaired_rows",),
    ),
)  # fmt: skip
