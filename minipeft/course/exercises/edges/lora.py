"""The edges of the assignment `lora`."""

from __future__ import annotations

import math
from random import Random

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.course.exercises.draw import normal
from minipeft.course.verdict import Case, Raises


def lora_scale(alpha, rank, rank_stabilized=False):
    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank


def scale_edges(rng: Random):
    for alpha, rank in ((1, 1), (1, 3), (0.25, 64), (7, 2)):
        for stable in (False, True):
            yield f"give the scale of α = {alpha} at rank {rank}", (alpha, rank, stable)
    yield "give the scale of a negative α", (-6, 4, False)
    yield "give the scale of α = 5 at a rank that came before", (5, 64, False)


def init_lora(d_out, d_in, rank, generator):
    bound = 1 / math.sqrt(d_in)
    return torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator), torch.zeros(d_out, rank)


def lora_forward(x, W, b, A, B, gamma):
    return F.linear(x, W, b) + gamma * (x @ A.T @ B.T)


def forward_edges(rng: Random):
    W, A, B = normal(rng, 30, 40), normal(rng, 9, 40), normal(rng, 30, 9)
    few = W.numel() + A.numel() + B.numel()  # multiply-adds for one x; B·A alone takes 9 times those of W

    def judge(count, few=few):
        if count > 2 * few:
            return f"It takes {count:,} multiply-adds for a single x, where W, A and B have {few:,} numbers."

    args = normal(rng, 1, 40), W, None, A, B, 2.0
    claim = "never form the large matrix B·A"
    yield Case(claim, args, judge=judge, promises=("products",), lenses=False)
    for what, batch, d_out, d_in, rank in (
        ("rank 1", (3,), 5, 7, 1),
        ("a square W", (3,), 6, 6, 2),
        ("a square W, and a rank as large", (3,), 4, 4, 4),
        ("one row", (1,), 5, 7, 2),
        ("one output", (3,), 1, 4, 1),
        ("one input", (3,), 4, 1, 1),
        ("four dimensions", (2, 1, 3), 5, 7, 2),
    ):
        W, b, A, B = (normal(rng, *s) for s in ((d_out, d_in), (d_out,), (rank, d_in), (d_out, rank)))
        for bias in (b, None):
            yield f"hold for {what}{'' if bias is not None else ', without a bias'}", (
                normal(rng, *batch, d_in), W, bias, A, B, rng.choice([0.5, 2.0, -1.5]),
            )  # fmt: skip


def lora_delta(A, B, gamma):
    return gamma * (B @ A)


def delta_edges(rng: Random):
    for d_out, d_in, rank in ((5, 7, 1), (6, 6, 2), (3, 3, 3), (1, 4, 1), (4, 1, 1), (1, 1, 1)):
        yield (
            f"hold for a {d_out}×{d_in} weight at rank {rank}",
            (normal(rng, rank, d_in), normal(rng, d_out, rank), -0.5),
        )
    yield "be a matrix of zeros where γ is 0", (normal(rng, 2, 7), normal(rng, 5, 2), 0.0)


def count_lora(shapes, rank):
    return sum(rank * (d_out + d_in) for d_out, d_in in shapes)


def count_edges(rng: Random):
    yield "be 0 for no matrix at all", ([], 4)
    yield "count matrices that are alike each by itself", ([(3, 5), (3, 5), (5, 3)], 1)
    yield "hold for a rank above the smaller side, as the formula says", ([(2, 9)], 4)
    yield "hold for one row and one column", ([(1, 9), (9, 1), (1, 1)], 1)
    yield "count to the last number in a large model", ([(12288, 49152)] * 96 + [(50257, 12288)], 3)


def merge(layer, A, B, gamma):
    old, delta = layer.weight, gamma * (B @ A)
    delta = delta.T if type(layer).__name__ == "Conv1D" else delta
    layer.weight = nn.Parameter((old.to(A.dtype) + delta).to(old.dtype), requires_grad=False)
    return old


def merge_edges(rng: Random):
    W, A, B = normal(rng, 6, 6), normal(rng, 2, 6), normal(rng, 6, 2)
    yield "take a square layer without a bias, of a class of its own", (W, None, A, B, 0.5, False)


def unmerge(layer, receipt):
    layer.weight = receipt


def freeze(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[-1] in ("lora_A", "lora_B"))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def freeze_edges(rng: Random):
    yield "free an adapter that was frozen, and nothing else", (["a.lora_A", "a.weight"], [False, True])
    yield "return 0 where nothing is LoRA's", (["a.weight", "b.lora_C"], [True, False])
    yield (
        "take whole last parts of names, capitals as they are",
        (["x.lora_a", "lora_A.weight", "y.lora_AB"], [True] * 3),
    )
    yield "free all where all is LoRA's", (["lora_A", "b.lora_B"], [False, False])


def find_targets(names, patterns):
    def matches(name, pattern):
        return ("." + name).endswith("." + pattern)

    missed = [p for p in patterns if not any(matches(n, p) for n in names)]
    if missed or not patterns:
        raise ValueError(f"No module matches {', '.join(missed) or 'nothing'}.")
    return [n for n in names if any(matches(n, p) for p in patterns)]


def target_edges(rng: Random):
    yield "find a name that is the pattern itself", (["proj", "a.proj", "proj.a"], ["proj"])
    yield "take a dot for a dot", (["a.q_proj", "a.b.q_proj", "a.bxq_proj"], ["b.q_proj"])
    yield (
        "take characters as they are, not as a regular expression",
        (["x.w+q", "x.wwq", "y.(0)", "y.0", "z.[0]", "z.k?", "z.kv"], ["w+q", "(0)", "[0]", "k?"]),
    )
    yield "take a pattern that is listed twice", (["a.q", "b.k"], ["q", "q"])
    yield "list a name once that two patterns match", (["z.q", "a.q", "m.k"], ["q", "a.q", "k"])
    yield "take capitals as they are", (["z.Q", "a.q"], ["q"])
    yield "let two patterns match the same name, and nothing else", (["b.a.q", "k"], ["q", "a.q", "b.a.q"])
    for names, patterns, missed in (
        (["a.q_proj"], ["qxproj"], ("qxproj",)),
        (["a.qxproj"], ["q.proj"], ("q.proj",)),
        (["a.q", "b.k"], ["never", "q", "nowhere"], ("never", "nowhere")),
        ([], ["q"], ("q",)),
        (["q"], ["a.q"], ("a.q",)),
        (["a.q", "b.k"], ["q", "k "], ("k ",)),
    ):
        claim = f"raise a ValueError that names {' and '.join(missed)}, with the names {names}"
        yield Case(claim, (names, patterns), Raises("ValueError", missed))
    yield "raise a ValueError where there is nothing to find, and nothing to look for", ([], [])


class RepairedLoRA(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) * 0.01)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return self.linear(x) + self.scale * (x @ self.A.T @ self.B.T)

    def trainable(self):
        return [self.A, self.B]


def layer_inputs(rng: Random):
    """(what, weight, bias, x, rank) of layers and inputs where something breaks."""
    for what, (d_out, d_in), rank, batch, bias in (
        ("the gradients of the formula, down to x", (5, 7), 3, (4,), True),
        ("no bias", (5, 7), 2, (3,), False),
        ("rank 1", (5, 7), 1, (3,), True),
        ("a square weight", (6, 6), 2, (3,), True),
        ("a single vector", (5, 7), 2, (), True),
        ("batches of sequences", (5, 7), 2, (2, 1, 3), True),
    ):
        yield what, normal(rng, d_out, d_in), normal(rng, d_out) if bias else None, normal(rng, *batch, d_in), rank
    yield "a small weight", 1e-3 * normal(rng, 5, 7), normal(rng, 5), normal(rng, 3, 7), 2


def repair_edges(rng: Random):
    for what, W, b, x, rank in layer_inputs(rng):
        A, B = normal(rng, rank, W.shape[1]), normal(rng, W.shape[0], rank)
        yield f"serve {what}", (W, b, x, rank, 6.0, A, B, rng.randrange(10**6))


LAYER = {
    "strided": "the layer's own weights are contiguous, and x goes into a linear layer",
    "types": "a new layer has float32 parameters",
    "gradient": "its drive looks at every gradient itself",
    "order": "it takes no list",
}
DRAWN = {each: "it takes no tensor" for each in ("strided", "types", "gradient")}
EDGES = {
    "lora_scale": {"reference": (lora_scale,), "edges": scale_edges},
    "init_lora": {"reference": (init_lora,), "without": DRAWN},
    "lora_forward": {"reference": (lora_forward,), "edges": forward_edges},
    "lora_delta": {
        "reference": (lora_delta,),
        "edges": delta_edges,
        "without": {"gradient": "merging is not training: the text says that numbers are enough"},
    },
    "count_lora": {"reference": (count_lora,), "edges": count_edges},
    "merge": {
        "reference": (merge,),
        "edges": merge_edges,
        "without": {
            "strided": "a layer's weight is contiguous",
            "types": "its own cases have every type",
            "gradient": "merging is not training",
        },
    },
    "unmerge": {
        "reference": (merge, unmerge),
        "without": {
            "strided": "a layer's weight is contiguous",
            "types": "its own cases have every type",
            "gradient": "merging is not training",
            "others": "a second call takes a layer that is not merged any more",
        },
    },
    "freeze": {
        "reference": (freeze,),
        "edges": freeze_edges,
        "without": {"order": "the flags belong to the names", "memory": "it returns a number"},
    },
    "find_targets": {"reference": (find_targets,), "edges": target_edges},
    "RepairedLoRA": {"reference": (RepairedLoRA,), "edges": repair_edges, "without": LAYER},
}
