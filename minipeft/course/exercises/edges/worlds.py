"""The edges of the assignment `worlds`."""

from __future__ import annotations

import math
from random import Random

import torch

from minipeft.course.exercises.draw import assemble, normal, orthonormal

DOUBLE = torch.float64


def average_factors(pairs, rows):
    shares = [n / sum(rows) for n in rows]
    return tuple(sum(p * pair[i] for p, pair in zip(shares, pairs, strict=True)) for i in (0, 1))


def average_product(pairs, rows):
    return sum(n / sum(rows) * (B @ A) for (A, B), n in zip(pairs, rows, strict=True))


def pair(rng: Random, r: int, d_out: int, d_in: int):
    return normal(rng, r, d_in, dtype=DOUBLE), normal(rng, d_out, r, dtype=DOUBLE)


def pair_edges(rng: Random):
    yield "hold at rank 1 and sizes of 1", ([pair(rng, 1, 1, 1), pair(rng, 1, 1, 1)], [3, 4])
    yield "hold for a single client", ([pair(rng, 2, 4, 3)], [7])
    yield "count a client without a row for nothing", ([pair(rng, 2, 3, 4), pair(rng, 2, 3, 4)], [3, 0])
    yield "count a first client without a row for nothing", ([pair(rng, 2, 3, 4), pair(rng, 2, 3, 4)], [0, 5])
    yield "hold where one client has nearly all rows", ([pair(rng, 2, 3, 4), pair(rng, 2, 3, 4)], [1, 10**6])
    yield "hold for square factors", ([pair(rng, 3, 3, 3), pair(rng, 3, 3, 3)], [2, 3])
    yield "hold for square changes", ([pair(rng, 2, 4, 4), pair(rng, 2, 4, 4)], [2, 3])
    same = pair(rng, 2, 5, 3)
    yield "give back what all clients share", ([same, tuple(t.clone() for t in same)], [5, 9])


def product_edges(rng: Random):
    yield from pair_edges(rng)
    yield "average clients of different ranks", ([pair(rng, 1, 3, 4), pair(rng, 3, 3, 4)], [2, 6])


def cut_back(delta, rank):
    if not 1 <= rank <= min(delta.shape):
        raise ValueError(f"rank={rank} is not between 1 and {min(delta.shape)}.")
    U, sigma, Vh = torch.linalg.svd(delta, full_matrices=False)
    root = sigma[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def cut_edges(rng: Random):
    yield "hold for a matrix of one number", (normal(rng, 1, 1, dtype=DOUBLE), 1)
    yield "hold for a single row", (normal(rng, 1, 5, dtype=DOUBLE), 1)
    yield "hold for a single column", (normal(rng, 6, 1, dtype=DOUBLE), 1)
    yield "hold for a square matrix", (normal(rng, 4, 4, dtype=DOUBLE), 2)
    steep = assemble(orthonormal(rng, 5, 3), torch.tensor([1.0, 1e-4, 1e-7], dtype=DOUBLE), orthonormal(rng, 4, 3))
    yield "keep what is weak among the strongest", (steep, 3)
    yield "hold for zeros", (torch.zeros(3, 4, dtype=DOUBLE), 2)
    yield "hold for a matrix of rank 1 cut to 2", (normal(rng, 4, 1, dtype=DOUBLE) @ normal(rng, 1, 3, dtype=DOUBLE), 2)
    yield "raise a ValueError for a rank below 0", (normal(rng, 3, 4, dtype=DOUBLE), -1)


def stack(pairs, rows):
    A = torch.cat([A for A, _ in pairs], 0)
    return A, torch.cat([n / sum(rows) * B for (_, B), n in zip(pairs, rows, strict=True)], 1)


def page_hinkley(values, delta=0.05, threshold=1.0, least=5):
    found, count, mean, m, lowest = [], 0, 0.0, 0.0, math.inf
    for i, x in enumerate(values):
        count += 1
        mean += (x - mean) / count
        m += x - mean - delta
        lowest = min(lowest, m)
        if count >= least and m - lowest > threshold:
            found.append(i)
            count, mean, m, lowest = 0, 0.0, 0.0, math.inf
    return found


def hinkley_edges(rng: Random):
    yield "hold for no values", ([], 0.1, 1.0, 3)
    yield "hold for one value", ([9.0], 0.1, 1.0, 1)
    yield "not take a fall for a rise", ([4.0] * 20 + [0.0] * 20, 0.05, 1.0, 5)
    yield "find a single step", ([0.0] * 20 + [2.0] * 10, 0.05, 1.0, 5)
    yield "begin anew, so that two steps are two alarms", ([0.0] * 10 + [2.0] * 10 + [4.0] * 10, 0.05, 1.0, 5)
    yield "ring at value number `least`, no later", ([0.0, 5.0, 5.0, 5.0, 5.0], 0.0, 1.0, 2)
    yield "wait for `least` values, however high they are", ([0.0] + [5.0] * 5, 0.0, 1.0, 4)
    yield "not ring where the rise is λ itself", ([0.0, 2.0], 0.0, 1.0, 1)
    yield "wait for five values where nothing is said", ([0.0] + [5.0] * 6,)
    yield "ring above λ = 1 where nothing is said", ([0.0] * 5 + [1.266] + [0.0] * 3,)
    yield "take off δ = 0.05 where nothing is said", ([0.0] * 5 + [1.26024] + [0.0] * 3,)
    yield "not count the value of an alarm again", ([0.0, 3.0, 6.0, 6.0], 0.0, 1.0, 2)
    yield "take off nothing where δ is 0", ([0.0] * 5 + [1.22] + [0.0] * 3, 0.0, 1.0, 5)
    yield "keep the lowest of the sums themselves, which a negative δ lifts above 0", ([0.0] * 4 + [0.5], -0.5, 1.4, 1)
    yield "hold for negative values", ([-8.0] * 8 + [-5.0] * 8, 0.1, 1.0, 3)


def robust_average(updates, rows):
    refused = sorted(name for name, t in updates.items() if not t.isfinite().all())
    left = [name for name in updates if name not in refused]
    if not left:
        raise ValueError(f"Every client sent NaN or infinite numbers: {', '.join(refused)}.")
    total = sum(rows[name] for name in left)
    return sum(rows[name] / total * updates[name] for name in left), refused


def robust_edges(rng: Random):
    def updates(*names):
        return {name: normal(rng, 2, 3, dtype=DOUBLE) for name in names}

    one = updates("only")
    yield "hold for one client", (one, {"only": 4})
    last = updates("c", "b", "a")
    last["a"][1, 2] = math.inf
    yield "find infinity in the last entry of the last client", (last, {"a": 1, "b": 2, "c": 3})
    first = updates("b", "a")
    first["b"][0, 0] = -math.inf
    yield "find minus infinity in the first entry of the first client", (first, {"a": 1, "b": 2})
    big = updates("a", "b")
    big["a"] *= 1e200
    yield "not refuse what is large and finite", (big, {"a": 1, "b": 1})
    edge = updates("a", "b")
    edge["a"] = torch.full_like(edge["a"], 1.5e308)
    yield "not refuse finite numbers whose sum is not", (edge, {"a": 1, "b": 1})
    within = updates("ab", "a", "abc")
    within["abc"][0, 0] = math.nan
    yield "take names as wholes", (within, {"a": 1, "ab": 2, "abc": 3})
    named = updates("b", "B", "a", "Z")
    for name in ("b", "B", "Z"):
        named[name][1, 1] = math.nan
    yield "sort names as Python does, capitals first", (named, {"a": 1, "b": 2, "B": 3, "Z": 4})
    yield "look rows up by name", (updates("a", "b"), {"b": 50, "a": 1})


PARALLEL = {"order": "its lists are parallel"}
EDGES = {
    "average_factors": {"reference": (average_factors,), "edges": pair_edges, "without": PARALLEL},
    "average_product": {"reference": (average_product,), "edges": product_edges, "without": PARALLEL},
    "cut_back": {
        "reference": (cut_back,),
        "edges": cut_edges,
        "without": {
            "gradient": "singular vectors have none where singular values are equal",
            "types": "torch has no SVD in 16 bits",
        },
    },
    "stack": {"reference": (stack,), "edges": product_edges, "without": PARALLEL},
    "page_hinkley": {"positive": ("threshold",), "reference": (page_hinkley,), "edges": hinkley_edges},
    "robust_average": {
        "reference": (robust_average,),
        "edges": robust_edges,
        "without": {
            "gradient": "a client that is refused has none, and the judge of gradients asks for finite numbers"
        },
    },
}
