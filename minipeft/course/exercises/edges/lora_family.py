"""The edges of the assignment `lora_family`."""

from __future__ import annotations

from random import Random

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.course.exercises.draw import normal
from minipeft.course.exercises.edges.lora import LAYER, layer_inputs
from minipeft.course.verdict import Case

SIZES = ((5, 7, 1), (6, 6, 2), (4, 4, 4), (1, 5, 1), (5, 1, 1), (1, 1, 1))  # d_out, d_in, rank


def dora_weight(W, A, B, m, gamma):
    V = W + gamma * (B @ A)
    return (m / V.square().sum(1).sqrt())[:, None] * V


def dora_edges(rng: Random):
    for d_out, d_in, rank in SIZES:
        W, A, B, m = (normal(rng, *s) for s in ((d_out, d_in), (rank, d_in), (d_out, rank), (d_out,)))
        yield f"hold for a {d_out}×{d_in} weight at rank {rank}, for every sign of m", (W + 0.5, A, B, m, -0.5)
    yield "give zeros where m is zero", (W + 1, A, B, 0 * m, 0.5)
    W, A, B, m = (normal(rng, *s) for s in ((5, 7), (2, 7), (5, 2), (5,)))
    tiny = (1e-6 * W, A, 1e-6 * B, m, 0.5)  # no lenses: gradients are a million times as large as their rounding
    yield Case("give rows their length where W and the change are tiny", tiny, dora_weight(*tiny), lenses=False)
    yield "be m ⊙ W/‖W‖ where γ is 0", (normal(rng, 3, 4), normal(rng, 2, 4), normal(rng, 3, 2), normal(rng, 3), 0.0)


def vera_delta(A, B, d, b):
    return b[:, None] * (B @ (d[:, None] * A))


def vera_edges(rng: Random):
    for d_out, d_in, rank in SIZES:
        A, B, d, b = (normal(rng, *s) for s in ((rank, d_in), (d_out, rank), (rank,), (d_out,)))
        yield f"hold for a {d_out}×{d_in} change at rank {rank}", (A, B, d, b)
    some = torch.tensor([1.0, 0.0, -2.0])
    yield "take vectors in which some numbers are 0", (normal(rng, 3, 4), normal(rng, 3, 3), some.flip(0), some)


def adalora_budget(step, total, start, final, first, target):
    if step <= start:
        return float(first)
    if step >= total - final:
        return float(target)
    return target + (first - target) * (1 - (step - start) / (total - final - start)) ** 3


def budget_edges(rng: Random):
    for args in (
        (0, 10, 0, 0, 9, 3),
        (1, 10, 0, 0, 9, 3),
        (9, 10, 0, 0, 9, 3),
        (10, 10, 0, 0, 9, 3),
        (5, 10, 4, 5, 9, 3),
        (12, 10, 2, 3, 9, 3),
        (5, 10, 2, 3, 7, 7),
        (5, 10, 2, 3, 3, 9),
        (5, 10, 2, 3, 9, 0),
    ):
        yield "give b(step) for (step, total, start, final, first, target) = " + str(args), args


def adalora_keep(sensitivity, budget):
    scores = [lam + P.mean(0) + Q.mean(1) for P, lam, Q in sensitivity.values()]
    together = torch.cat(scores)
    kept = torch.zeros(len(together), dtype=torch.bool)
    kept[together.topk(min(budget, len(together))).indices] = True
    return dict(zip(sensitivity, kept.split([len(score) for score in scores]), strict=True))


def keep_edges(rng: Random):
    def layer(d_out, d_in, rank):
        return tuple(normal(rng, *s, dtype=torch.float64).abs() for s in ((d_out, rank), (rank,), (rank, d_in)))

    layers = {"z.up": layer(4, 6, 3), "a": layer(5, 5, 5), "m.down": layer(1, 7, 1)}
    for budget in (0, 1, 4, 8, 9, 50):
        yield f"keep {budget} of 9 triplets of layers whose names are in no order", (layers, budget)
    yield "keep the only triplet of the only layer", ({"x": layer(3, 4, 1)}, 1)
    flat = torch.zeros(2, 4, dtype=torch.float64)
    later = torch.tensor([1.0, 1.0, 1.0, 1.0 + 1e-6], dtype=torch.float64)
    yield "keep what is larger by very little, wherever it stands", ({"b": (flat, later, flat.T)}, 1)
    zero, one = (torch.full((4,), value, dtype=torch.float64) for value in (0.0, 1.0))
    flat = torch.zeros(3, 4, dtype=torch.float64)
    equal = {"b": (flat, one, flat.T), "a": (flat, torch.cat([2 * one[:2], zero[:2]]), flat.T)}
    for budget in (1, 3, 5, 7):

        def judge(masks, budget=budget):
            mask = torch.cat([masks[name] for name in equal])
            score = torch.cat([lam for _, lam, _ in equal.values()])
            if mask.dtype != torch.bool or len(mask) != 8:
                return "The masks should be of torch.bool, one number for each triplet."
            if int(mask.sum()) != budget:
                return (
                    f"It keeps {int(mask.sum())} triplets instead of {budget}: equal scores are triplets of their own."
                )
            if score[mask].sum() != score.topk(budget).values.sum():
                return "It keeps triplets that are not the most important."

        yield Case(
            f"keep exactly {budget} of 8 where scores are equal, whichever", (equal, budget), judge=judge, lenses=False
        )


class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        self.linear, self.gamma = linear.requires_grad_(False), gamma
        self.A = nn.Parameter(torch.randn(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.m = nn.Parameter(linear.weight.detach().norm(dim=1))

    def forward(self, x):
        V = self.linear.weight + self.gamma * (self.B @ self.A)
        return F.linear(x, self.m[:, None] * V / V.detach().norm(dim=1, keepdim=True), self.linear.bias)


def repair_edges(rng: Random):
    for what, W, b, x, rank in layer_inputs(rng):
        A, B, m = normal(rng, rank, W.shape[1]), normal(rng, len(W), rank), normal(rng, len(W))
        yield f"serve {what}", (W, b, x, rank, 0.7, A, B, m, rng.randrange(10**6))


EDGES = {
    "dora_weight": {"reference": (dora_weight,), "edges": dora_edges},
    "vera_delta": {"reference": (vera_delta,), "edges": vera_edges},
    "adalora_budget": {
        "reference": (adalora_budget,),
        "edges": budget_edges,
        "positive": ("step", "total", "start", "final"),
    },
    "adalora_keep": {
        "reference": (adalora_keep,),
        "edges": keep_edges,
        "without": {
            "types": "rounded to 16 bits, scores become equal, and either may be kept",
            "gradient": "a mask has none",
        },
    },
    "RepairedDoRA": {"reference": (RepairedDoRA,), "edges": repair_edges, "without": LAYER},
}
