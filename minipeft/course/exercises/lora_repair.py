"""The last exercise of the assignment `lora`: find the bug."""

from __future__ import annotations

from random import Random

import torch

from minipeft.course.exercises.draw import holds, normal, sizes
from minipeft.course.verdict import Case


def repair_cases(rng: Random):
    for _ in range(3):
        d_out, d_in, rank = sizes(rng)
        alpha = round(rng.uniform(3.0, 40.0), 2)
        W, b = normal(rng, d_out, d_in), normal(rng, d_out)
        A, B, x = normal(rng, rank, d_in), normal(rng, d_out, rank), normal(rng, 3, d_in)
        base = x @ W.T + b
        args = (W, b, x, rank, alpha, A, B, rng.randrange(10**6))

        def start(seen, base=base):
            if not torch.allclose(seen["at first"], base, atol=1e-5):
                return (
                    f"Before any training the output is off by {(seen['at first'] - base).abs().max():.2g}: is B zero?"
                )

        def shapes(seen, A=A, B=B):
            if seen["shape of A"] != tuple(A.shape) or seen["shape of B"] != tuple(B.shape):
                found, right = (seen["shape of A"], seen["shape of B"]), (tuple(A.shape), tuple(B.shape))
                return f"A and B have the shapes {found[0]} and {found[1]} instead of {right[0]} and {right[1]}."

        def use(seen, base=base, change=x @ A.T @ B.T, alpha=alpha, rank=rank):
            right = base + alpha / rank * change
            if not torch.allclose(seen["in use"], right, rtol=1e-4, atol=1e-4):
                known = {
                    "α scales it": alpha, "α/√r scales it": alpha / rank**0.5, "`//` drops a part": alpha // rank,
                    "B·A·x is not scaled": 1.0, "B·A·x is left out": 0.0,
                }  # fmt: skip
                near = [
                    why for why, g in known.items()
                    if torch.allclose(seen["in use"], base + g * change, rtol=1e-3, atol=1e-3)
                ]  # fmt: skip
                largest = (seen["in use"] - right).abs().max().item()
                said = f"The largest difference from W·x + b + (α/r)·B·A·x is {largest:.3g}."
                return f"{near[0]}, instead of α/r. {said}" if near else said

        def train(seen, rank=rank, size=d_out + d_in):
            if not seen["A and B train"] or seen["numbers trained"] != rank * size:
                return f"trainable() gives {seen['numbers trained']} numbers; A and B have {rank * size}."

        yield Case("have A of shape (rank, d_in) and B of shape (d_out, rank)", args, judge=shapes)
        yield Case("leave the layer's output as it was before training", args, judge=start)
        yield Case("add (α/r)·B·A·x", args, judge=use)
        yield Case("give A and B from trainable(), and nothing else", args, judge=train)
        yield Case("train A and B from a random A, and keep the base frozen, its bias too", args, judge=holds)
