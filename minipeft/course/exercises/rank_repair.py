"""The last exercise of the assignment `rank`: find the bug."""

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
)
from minipeft.course.verdict import Case, differ


def repair_cases(rng: Random):
    for wide in (True, False, True):
        d_out, d_in = sorted(rng.sample(range(8, 16), 2), reverse=not wide)
        k = rng.randint(2, 4)
        n = min(d_out, d_in)
        U, s, V = orthonormal(rng, d_out, n), falling(rng, n), orthonormal(rng, d_in, n)
        # the second writes nearly what the first does, and reads something else
        other, reads = orthonormalised(U + 0.4 * normal(rng, d_out, n, dtype=torch.float64)), orthonormal(rng, d_in, n)
        args, values = (assemble(U, s, V), assemble(other, falling(rng, n), reads), k), s.tolist()
        squares = [v * v for v in values]
        phi, phi_read = (overlap_table(X[:, :k], Y[:, :k])[-1, -1].item() for X, Y in ((U, other), (V, reads)))
        right = {
            "effective rank": math.exp(share_entropy(values)),
            "energy": sum(squares[:k]) / sum(squares),
            "shared": phi,
            "chance": k / d_out,
        }
        known = {
            "effective rank": {
                "p is σ²/Σσ²; the effective rank has σ/Σσ": math.exp(share_entropy(values, 2)),
                "this is the entropy, without exp": share_entropy(values),
            },
            "energy": {
                "σ is added up; energy is σ²": sum(values[:k]) / sum(values),
                "the root is taken: that is the share of the norm": math.sqrt(sum(squares[:k]) / sum(squares)),
                "this is what is cut off": 1 - sum(squares[:k]) / sum(squares),
            },
            "shared": {
                "right singular vectors are compared: they say what is read": phi_read,
                "it is not divided by k": k * phi,
                "it is divided by k twice": phi / k,
                "the norm is not squared": math.sqrt(k * phi) / k,
            },
            "chance": {
                "this is chance for what is read, in d_in dimensions": k / d_in,
                "two random subspaces share max(k, k)/d, without a square": (k / d_out) ** 2,
                "chance for one direction is 1/d, for k it is k/d": 1 / d_out,
            },
        }

        def keys(got, right=right):
            if not isinstance(got, dict) or set(got) != set(right):
                return f"Return a dictionary with the keys {', '.join(right)}."

        yield Case("return the four numbers by name", args, judge=keys)
        for name, meaning in (
            ("effective rank", "say how many directions share M"),
            ("energy", f"say which share of ‖M‖²_F the best rank-{k} approximation holds"),
            ("shared", f"compare the {k} strongest directions that M and N write, by φ"),
            ("chance", f"say what φ({k}, {k}) random directions have on average in {d_out} dimensions"),
        ):

            def judge(got, name=name, want=right[name], known=known[name]):
                if lines := differ(got[name], want):
                    said = [f"It looks as if {text}." for text, value in known.items() if not differ(got[name], value)]
                    return " ".join([*said[:1], *lines])

            yield Case(f"{meaning} (“{name}”, for {d_out}×{d_in} matrices)", args, judge=judge)
