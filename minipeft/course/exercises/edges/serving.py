"""The edges of the assignment `serving`."""

from __future__ import annotations

import math
from random import Random

import torch
from torch.nn import functional as F

from minipeft.course.exercises.draw import normal
from minipeft.course.verdict import Case, differ


def mixed_rows(x, A, B, gammas, own):
    rank = max(len(a) for a in A)
    A = torch.stack([F.pad(a, (0, 0, 0, rank - len(a))) for a in A])
    B = torch.stack([F.pad(g * b, (0, rank - b.shape[1])) for g, b in zip(gammas, B, strict=True)])
    index = torch.tensor([k or 0 for k in own], dtype=torch.long)
    none = torch.tensor([k is None for k in own], dtype=torch.bool)
    return torch.bmm(torch.bmm(x, A[index].mT), B[index].mT).masked_fill(none[:, None, None], 0)


def rows_edges(rng: Random):
    def drawn(ranks, own, t=2, d_in=3, d_out=4):
        A, B = [normal(rng, r, d_in) for r in ranks], [normal(rng, d_out, r) for r in ranks]
        return normal(rng, len(own), t, d_in), A, B, [1.5, -2.0, 0.5][: len(ranks)], own

    yield "serve a batch of one row", drawn((2, 1), [1])
    yield "serve a batch in which nobody chose an adapter", drawn((2, 1), [None, None])
    yield "serve one adapter to all rows", drawn((3,), [0, 0, 0])
    yield "take sizes of 1", drawn((1,), [0, None], 1, 1, 1)
    yield "serve a batch without a row", drawn((2, 1), [])
    for own in ([1, None], [1, None, 0, 1]):
        args = drawn((2, 1), own)
        args[1][0][1, 0] = math.nan
        yield spoiling(
            f"let adapter 0, which holds a NaN, spoil nothing but rows that chose it: {own}", mixed_rows, args
        )


def spoiling(claim: str, reference, args: tuple) -> Case:
    """Numbers as the reference has them, and NaN where it has NaN, whatever its bits."""

    want = reference(*args)

    def judge(got):
        if (lines := differ(got, want)) and not (isinstance(got, torch.Tensor) and got.shape == want.shape):
            return " ".join(lines)
        if (got.isnan() != want.isnan()).any():
            return "A NaN spreads: 0·NaN is NaN, so choose rows by index, or by `where`, instead of multiplying by 0."
        return " ".join(differ(got.nan_to_num(), want.nan_to_num())) or None

    return Case(claim, args, judge=judge, lenses=False)


def concatenated(A, B, gammas, weights):
    scales = [g * w for g, w in zip(gammas, weights, strict=True)]
    return torch.cat([s * b for s, b in zip(scales, B, strict=True)], dim=1), torch.cat(A)


def concatenation_edges(rng: Random):
    one = ([normal(rng, 1, 1)], [normal(rng, 1, 1)], [2.0], [-0.5])
    yield "take sizes of 1", one
    A, B = [normal(rng, r, 5) for r in (2, 3)], [normal(rng, 6, r) for r in (2, 3)]
    yield "take weights of 0 and 1", (A, B, [1.0, 1.0], [0.0, 1.0])
    yield "take negative γ and w", (A, B, [-1.0, 2.0], [-1.0, -3.0])


def elected(changes):
    sign = torch.where(changes.sum(0) >= 0, 1, -1)
    agree = changes.sign() == sign
    return (changes * agree).sum(0) / agree.sum(0).clamp(min=1)


def vote_edges(rng: Random):
    yield "give one change back as it is", (normal(rng, 1, 3, 2),)
    yield "give zeros for zeros", (torch.zeros(3, 2, 2),)
    yield "take single numbers", (torch.tensor([2.0, -1.0, 3.0]),)
    yield "elect the sign of a tiny sum, too", (torch.tensor([[-3e-9, 2.0], [1e-9, -2e-9]], dtype=torch.float64),)
    yield "elect + where the sum is 0, whoever comes first", (torch.tensor([[-1.5, 2.0], [1.5, -2.0], [0.0, 0.0]]),)
    yield "let one large entry outvote two small ones", (torch.tensor([[-5.0], [1.0], [2.0]]),)


def least_recent(requests, limit):
    held, loads = {}, 0
    for name, size in requests:
        if size > limit:
            raise ValueError(f"{name!r} takes {size} bytes, and there are {limit} in all.")
        if name in held:
            held.pop(name)
        else:
            loads += 1
            while sum(held.values()) + size > limit:
                held.pop(next(iter(held)))
        held[name] = size
    return list(held), loads


def cache_edges(rng: Random):
    yield "do nothing without a request", ([], 100)
    yield "fill the memory to the last byte", ([("z", 60), ("a", 40), ("z", 60)], 100)
    yield "put several out for a large one", ([("z", 30), ("a", 30), ("m", 30), ("big", 100)], 100)
    yield "put out no more than is needed", ([("z", 30), ("a", 30), ("m", 30), ("b", 40)], 100)
    yield "load again what was put out", ([("z", 60), ("a", 60), ("z", 60)], 100)
    yield "take an adapter of no bytes", ([("z", 100), ("empty", 0)], 100)
    yield "find an adapter of no bytes in memory", ([("empty", 0), ("z", 60), ("empty", 0), ("a", 60)], 100)
    large = [("z", 3 * 10**9), ("a", 10**9), ("m", 4 * 10**9), ("b", 10**9)]
    yield "put out by age, not by size", (large, 8 * 10**9)
    yield "take adapters of no bytes where there is no memory", ([("z", 0), ("a", 0)], 0)
    yield "raise a ValueError for one byte where there is no memory", ([("z", 0), ("a", 1)], 0)
    yield "raise a ValueError for one byte too many", ([("z", 101)], 100)
    yield "raise a ValueError for one that is too large, among others", ([("z", 60), ("big", 101), ("m", 10)], 100)
    yield "tell names apart by capitals and spaces", ([("z", 30), ("Z", 30), ("z ", 30), ("z", 30)], 100)


def repaired_rows(x, A, B, own, beams):
    own = own.repeat_interleave(beams)
    low = torch.bmm(A[own], x[:, :, None])
    return torch.bmm(B[own], low)[:, :, 0].masked_fill((own < 0)[:, None], 0)


def beam_edges(rng: Random):
    def drawn(own, beams, r=2, d_in=3, d_out=4):
        x = normal(rng, len(own) * beams, d_in)
        return x, normal(rng, 3, r, d_in), normal(rng, 3, d_out, r), torch.tensor(own), beams

    yield "serve one row with four beams", drawn([2], 4)
    yield "serve a batch in which nobody chose an adapter", drawn([-1, -1], 2)
    yield "take sizes of 1", drawn([0, 1], 1, 1, 1, 1)
    args = drawn([-1, 1, 2], 2, r=1)
    args[0].abs_()  # so that what it would spoil is ∞ and no ∞ − ∞
    args[1][0] = math.inf
    yield spoiling("let adapter 0, which holds ∞, spoil nothing while nobody chose it", repaired_rows, args)
    for own in ([0, -1], [2, 0, -1]):
        args = drawn(own, 2)
        args[1][2, 0, 0] = math.nan
        yield spoiling(
            f"let adapter 2, which holds a NaN, spoil nothing but rows that chose it: {own}", repaired_rows, args
        )


EDGES = {
    "mixed_rows": {"reference": (mixed_rows,), "edges": rows_edges},
    "concatenated": {"reference": (concatenated,), "edges": concatenation_edges},
    "elected": {
        "reference": (elected,),
        "edges": vote_edges,
        "without": {
            "types": "where the vote is close, rounding to 16 bits turns it",
            "gradient": "adapters are combined after training",
        },
    },
    "least_recent": {"reference": (least_recent,), "edges": cache_edges},
    "repaired_rows": {"reference": (repaired_rows,), "edges": beam_edges},
}
