"""The edges of the assignment `prefixes`."""

from __future__ import annotations

from random import Random

import torch
from torch.nn import functional as F

from minipeft.course.exercises.draw import normal, whole
from minipeft.course.exercises.prefixes_repair import decoder


def count_prefix(n, layers, width, heads, kv_heads):
    return n * layers * 2 * kv_heads * (width // heads)


def count_edges(rng: Random):
    for args in (
        (1, 1, 8, 1, 1),
        (1, 3, 6, 6, 1),
        (5, 1, 6, 2, 2),
        (0, 3, 8, 2, 1),
        (3, 2, 12, 4, 2),
        (999, 97, 12288, 96, 32),
    ):
        yield "count for (n, layers, width, heads, kv_heads) = " + str(args), args


def split_prefix(flat, layers, kv_heads, rows):
    states = flat.reshape(len(flat), layers, 2, kv_heads, -1).permute(1, 2, 3, 0, 4)
    return [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]


def split_edges(rng: Random):
    for what, n, layers, kv_heads, width, rows in (
        ("one place", 1, 2, 3, 4, 2),
        ("one head", 3, 2, 1, 4, 2),
        ("heads of one number", 3, 2, 4, 1, 2),
        ("one text", 3, 2, 4, 2, 1),
        ("one of everything", 1, 1, 1, 1, 1),
        ("as many of everything", 2, 2, 2, 2, 2),
        ("as many places as heads as numbers", 3, 2, 3, 3, 2),
    ):
        weights = whole(rng, layers, 2, rows, kv_heads, n, width)
        named = {f"{'KV'[i]} of layer {j}": w for j, pair in enumerate(weights) for i, w in enumerate(pair)}
        yield f"hold for {what}", (normal(rng, n, layers * 2 * kv_heads * width), layers, kv_heads, rows, named)


def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, heads, length, w), n = q.shape, prefix_k.shape[2]
    K, V = (torch.cat(pair, 2).repeat_interleave(heads // k.shape[1], 1) for pair in ((prefix_k, k), (prefix_v, v)))
    causal = torch.ones(length, n + length, dtype=torch.bool).tril(n)
    real = torch.cat([torch.ones(rows, n, dtype=torch.bool), mask.bool()], 1)
    scores = (q @ K.transpose(-1, -2) / w**0.5).masked_fill(~(causal & real[:, None, None]), torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ V


def attend_edges(rng: Random):
    for what, rows, heads, kv_heads, n, length, w, padded in (
        ("no prefix before texts that are padded on the left", 2, 2, 1, 0, 4, 3, 2),
        ("one place", 2, 2, 1, 1, 4, 3, 0),
        ("one token", 2, 2, 2, 3, 1, 3, 0),
        ("one text, and one head", 1, 1, 1, 2, 3, 3, 1),
        ("heads of one number", 2, 2, 1, 2, 3, 1, 0),
        ("as many of everything", 3, 3, 3, 3, 3, 3, 0),
        ("as many texts as tokens, padded on the left", 3, 2, 1, 2, 3, 4, 2),
    ):
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[0, :padded] = 0
        for kind in (torch.int64, torch.bool):
            q = normal(rng, rows, heads, length, w)
            k, v, prefix_k, prefix_v = (normal(rng, rows, kv_heads, m, w) for m in (length, length, n, n))
            args = q, k, v, prefix_k, prefix_v, mask.to(kind), whole(rng, *q.shape)
            yield f"hold for {what}, with a mask in {kind}", args
    q, k, v = (normal(rng, 2, 1, 3, 4, dtype=torch.float64) for _ in range(3))
    k, mask = k.abs() + 1, torch.tensor([[0, 1, 1], [1, 1, 0]])
    prefix = (k[:, :, :1] + 1, v[:, :, :1].clone())
    args = (-6e3 * (q.abs() + 1), k, v, *prefix, mask, whole(rng, *q.shape))
    yield "hide padding where every score is far below −10,000", args


def prefix_share(attention, n, mask):
    return attention[..., :n].sum(-1).transpose(1, 2)[mask.bool()].mean(0)


def share_edges(rng: Random):
    for what, rows, heads, length, n in (
        ("one place", 2, 3, 4, 1),
        ("no place at all", 2, 3, 4, 0),
        ("one text of one token", 1, 2, 1, 2),
        ("one head", 2, 1, 3, 2),
        ("as many of everything", 3, 3, 3, 3),
    ):
        attention = normal(rng, rows, heads, length, n + length, dtype=torch.float64).softmax(-1)
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[0, 1:] = 0
        if rows == 3:
            mask[1] = 0  # a text of padding alone
        for kind in (torch.int64, torch.bool):
            yield f"average for {what}, with a mask in {kind}", (attention, n, mask.to(kind))


def fold_prefix(E, W1, b1, W2, b2):
    return {"prompt_embeddings": F.linear(F.linear(E, W1, b1).tanh(), W2, b2).detach()}


def fold_edges(rng: Random):
    for n, width, hidden, out in ((1, 3, 2, 4), (3, 1, 1, 1), (4, 4, 4, 4), (1, 1, 1, 1)):
        shapes = (n, width), (hidden, width), (hidden,), (out, hidden), (out,)
        yield f"fold {n} places of {width} numbers, {hidden} inside, into {out}", tuple(normal(rng, *s) for s in shapes)


def repaired_prefix(model, prefix, ids, mask, positions):
    (rows, length), n = ids.shape, len(prefix)
    past = split_prefix(prefix, model.layers, model.kv_heads, rows)
    causal = torch.ones(length, n + length, dtype=torch.bool).tril(n)
    real = torch.cat([torch.ones(rows, n, dtype=torch.bool), mask.bool()], 1)
    return model(ids, positions + n, causal & real[:, None], past)


def repair_edges(rng: Random):
    for what, layers, n, rows, length in (
        ("one place", 2, 1, 2, 3),
        ("one text", 2, 2, 1, 3),
        ("texts of one token", 2, 2, 2, 1),
        ("as many of everything", 2, 2, 2, 2),
    ):
        words, kv_heads, head_dim = 5, 2, 2
        model = decoder(rng, layers, 4, kv_heads, head_dim, words, n + length)
        ids = torch.tensor([[rng.randrange(words) for _ in range(length)] for _ in range(rows)])
        mask, positions = torch.ones(rows, length, dtype=torch.int64), torch.arange(length).expand(rows, -1).clone()
        prefix = normal(rng, n, layers * 2 * kv_heads * head_dim, dtype=torch.float64)
        tensors = prefix, ids, mask, positions, whole(rng, rows, length, words)
        yield f"hold for {what}", (model.embed, model.places, model.maps, head_dim, *tensors)


EDGES = {
    "count_prefix": {"positive": ("width", "heads", "kv_heads"), "reference": (count_prefix,), "edges": count_edges},
    "split_prefix": {
        "reference": (split_prefix,),
        "edges": split_edges,
        "without": {
            "memory": "K and V are views of the prefix, which trains",
            "order": "names belong to their weights",
        },
    },
    "attend": {
        "reference": (attend,),
        "edges": attend_edges,
        "without": {
            "types": "16 bits round scores and shares more than once; its cases have two types",
            "sizes": "between scores that lie far apart, gradients are their rounding",
        },
    },
    "prefix_share": {
        "reference": (prefix_share,),
        "edges": share_edges,
        "without": {
            "gradient": "a share is a measurement: nothing trains through it",
            "sizes": "shares lie between 0 and 1",
        },
    },
    "fold_prefix": {
        "reference": (fold_prefix,),
        "edges": fold_edges,
        "without": {"gradient": "what goes to a file has none, which its drive looks at"},
    },
    "repaired_prefix": {
        "reference": (repaired_prefix,),
        "edges": repair_edges,
        "without": {
            "types": "all arguments come from one model in one type",
            "order": "the drive's lists are one model's weights",
        },
    },
}
