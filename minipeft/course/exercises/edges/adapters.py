"""The edges of the assignment `adapters`."""

from __future__ import annotations

import math
from random import Random

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.course.exercises.draw import normal
from minipeft.course.exercises.edges.lora import DRAWN, LAYER, layer_inputs
from minipeft.course.verdict import Case


def bottleneck(x, down_w, down_b, up_w, up_b):
    return x + F.linear(F.relu(F.linear(x, down_w, down_b)), up_w, up_b)


def bottleneck_edges(rng: Random):
    for what, batch, d, m in (
        ("a bottleneck of 1", (3,), 6, 1),
        ("a width of 1", (3,), 1, 1),
        ("a bottleneck as wide as x", (3,), 5, 5),
        ("a bottleneck wider than x", (3,), 4, 7),
        ("one row", (1,), 6, 2),
        ("four dimensions", (2, 1, 3), 6, 2),
    ):
        parts = tuple(normal(rng, *s) for s in ((m, d), (m,), (d, m), (d,)))
        yield f"hold for {what}", (normal(rng, *batch, d), *parts)
        yield (
            f"hold for {what}, where ReLU lets nothing through",
            (normal(rng, *batch, d), 0 * parts[0], -parts[1].abs(), *parts[2:]),
        )


def count_adapters(layers, width, bottleneck, per_block, share=1):
    return per_block * math.ceil(layers / share) * (2 * width * bottleneck + bottleneck + width)


def count_edges(rng: Random):
    for args in (
        (201, 5, 1, 1, 200),
        (95, 12287, 12286, 1, 1),
        (1, 5, 1, 1, 1),
        (3, 1, 1, 2, 3),
        (3, 8, 2, 1, 5),
        (4, 8, 2, 2, 4),
        (6, 8, 2, 1, 6),
        (9, 7, 3, 2, 2),
    ):
        layers, width, m, per_block, share = args
        yield f"count for {layers} blocks, {per_block} places each, shared by {share}, d = {width} and m = {m}", args


def init_adapter(width, bottleneck, generator):
    bound = 1 / math.sqrt(width)
    down_w = torch.empty(bottleneck, width).uniform_(-bound, bound, generator=generator)
    return down_w, torch.zeros(bottleneck), torch.zeros(width, bottleneck), torch.zeros(width)


def route(logits, k):
    best, who = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, who, best.softmax(-1))


def route_edges(rng: Random):
    yield "choose the only expert", (torch.tensor([[0.3], [-2.0]]), 1)
    yield "give all experts their share when k is their number", (normal(rng, 3, 4), 4)
    yield "hold for four dimensions", (normal(rng, 2, 1, 3, 5), 2)
    yield "hold for one token", (normal(rng, 5), 1)
    far = 40.0 * torch.tensor([[4.0, -3.0, 0.0, 2.0, -5.0, 1.0]])
    for shift in (-(10.0**5), -300.0, 10.0**5):
        yield f"hold where logits are about {shift:g} and far apart", (far + shift, 2)
    apart = torch.tensor([[1.0, 2.0, 0.0], [3e3, 2e3, 3e3 + 1], [-5e3, -5e3 - 1, -6e3]])
    yield "take each row by itself, however far rows are apart", (apart, 2)
    yield "choose what is larger before the first of equals", (torch.tensor([[1.0, 1.0, 5.0, 1.0, 4.0]]), 2)
    for at, k in (([1.0, 1.0, 5.0], 1), ([1.0, 2.0, 5.0, 1.0], 2)):
        yield f"choose the {k} largest of {at}, where smaller ones are equal", (torch.tensor([at, at[::-1]]), k)
    tied = torch.tensor([[1.0, 1.0, 5.0], [2.0, 2.0, 2.0]])

    def judge(got):
        if got.shape != tied.shape or got.count_nonzero(-1).tolist() != [2, 2] or not got[0, 2] > 0.98:
            return f"The gates of {tied.tolist()} are {got.tolist()}: expected are the 5 and one 1, and two of the 2s."

    yield Case("choose exactly 2 where the second place is shared", (tied, 2), judge=judge, lenses=False)
    for dtype in (torch.float16, torch.bfloat16):
        yield f"keep {dtype} for a single choice", (torch.tensor([[3.0, 1.0, -2.0], [0.0, 8.0, 4.0]], dtype=dtype), 1)


class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.out_features, bottleneck)
        self.up = nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        h = self.linear(x)
        return h + self.up(F.relu(self.down(h)))

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


def repair_edges(rng: Random):
    for what, W, b, x, m in layer_inputs(rng):
        d = len(W)
        halves = [normal(rng, *s) for s in ((m, d), (m,), (d, m), (d,))]
        yield f"serve {what.replace('rank', 'a bottleneck of')}", (W, b, x, m, halves, rng.randrange(10**6))


EDGES = {
    "bottleneck": {"reference": (bottleneck,), "edges": bottleneck_edges},
    "count_adapters": {"positive": ("share",), "reference": (count_adapters,), "edges": count_edges},
    "init_adapter": {"reference": (init_adapter,), "without": DRAWN},
    "route": {
        "reference": (route,),
        "edges": route_edges,
        "without": {"types": "rounded to 16 bits, logits become equal, and either may be chosen; edges have 16 bits"},
    },
    "RepairedAdapter": {"reference": (RepairedAdapter,), "edges": repair_edges, "without": LAYER},
}
