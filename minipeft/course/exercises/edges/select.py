"""The edges of the assignment `select`."""

from __future__ import annotations

from random import Random

import torch
from torch import nn

from minipeft.course.exercises.draw import normal
from minipeft.course.verdict import Case
from minipeft.targets import is_matrix


def bitfit_names(model):
    suits = [n for n, m in model.named_modules() if (is_matrix(m) or "Norm" in type(m).__name__) and has_bias(m)]
    if not suits:
        raise ValueError("There is no such bias.")
    return [f"{n}.bias" for n in suits]


def has_bias(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is not None


def tune_softmax(model):
    added = 0
    if model.head.weight is model.embed.weight:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        added = model.head.weight.numel()
    model.requires_grad_(False)
    model.head.weight.requires_grad_(True)
    return added


def softmax_edges(rng: Random):
    table = normal(rng, 9, 4).bfloat16()
    yield "untie a head in bfloat16, which stays in it", (table, None, torch.tensor([1, 8, 3]), 5, False)


def magnitude_mask(weights, share):
    flat = torch.cat([w.abs().flatten() for w in weights.values()])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.topk(round(share * len(flat))).indices] = True
    parts = chosen.split([w.numel() for w in weights.values()])
    return {name: part.reshape(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)}


def mask_edges(rng: Random):
    def drawn(*shapes):
        names = rng.sample(["z.weight", "a.weight", "m.bias", "b"], len(shapes))
        return {name: normal(rng, *shape) for name, shape in zip(names, shapes, strict=True)}

    for shapes in (((7,),), ((5,),), ((3, 5), (2, 2, 3), (4,)), ((1,), (1, 1)), ((6, 6),)):
        for share in (0.5, 0.37, 0.64, 0.01):
            total = sum(torch.Size(s).numel() for s in shapes)
            which = f"{round(share * total)} entries of tensors {', '.join(map(str, shapes))}"
            yield f"mark round({share}·{total}) = {which}", (drawn(*shapes), share)
    step = 1 + 1e-4 * torch.arange(8.0)
    close = {"z": step[[3, 6, 0, 5]].view(2, 2), "a": -step[[7, 1, 4, 2]]}
    yield "tell |w| apart that differ by a ten thousandth", (close, 0.375)
    yield "tell the smallest |w| apart too", ({name: 1e-9 * each for name, each in close.items()}, 0.625)
    few = {"b": torch.tensor([[1.0, -2.0, 2.0, 2.0]]), "a": torch.tensor([2.0, -1.0, 0.0, -2.0])}
    all_alike = {"z": torch.ones(6, 7), "a": -torch.ones(6)}
    for equal, share, count in ((few, 0.25, 2), (few, 0.375, 3), (few, 0.75, 6), (few, 0.875, 7), (all_alike, 0.5, 24)):

        def judge(masks, count=count, equal=equal):
            flat = torch.cat([equal[name].flatten().abs() for name in equal])
            mask = torch.cat([masks[name].flatten() for name in equal])
            if mask.dtype != torch.bool or [masks[n].shape for n in equal] != [w.shape for w in equal.values()]:
                return "The masks should be of torch.bool, each in the shape of its tensor."
            if int(mask.sum()) != count:
                return f"It marks {int(mask.sum())} entries instead of {count}: ≥ lets all equals in."
            if flat[mask].sum() != flat.topk(count).values.sum():
                return "It marks entries that are not the largest."

        claim = f"mark exactly {count} of {8 if equal is few else 48} where |w| are equal, whichever"
        yield Case(claim, (equal, share), judge=judge, lenses=False)


def fisher_importance(model, inputs, labels):
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in zip(inputs, labels, strict=True):
        slopes = torch.autograd.grad(model(x).log_softmax(-1)[y], list(model.parameters()))
        for each, slope in zip(total.values(), slopes, strict=True):
            each += slope.square() / len(inputs)
    return {name: each.detach() for name, each in total.items()}


def fisher_edges(rng: Random):
    for dtype in (torch.float64, torch.float32):
        for rows in (1, 2):
            weights = [normal(rng, 3, 3, dtype=dtype), normal(rng, 3, 3, dtype=dtype)]
            inputs, labels = normal(rng, rows, 3, dtype=dtype), torch.tensor([2] * rows)
            yield f"hold for {rows} example{'s' * (rows > 1)} of one label, in {dtype}", (weights, inputs, labels)


class MaskedAdamW:
    def __init__(self, params, masks, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.params, self.masks = params, masks
        self.entries = [nn.Parameter(p.detach()[m].clone()) for p, m in zip(params, masks, strict=True)]
        self.inner = torch.optim.AdamW(self.entries, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self):
        for parameter, mask, entries in zip(self.params, self.masks, self.entries, strict=True):
            entries.grad = parameter.grad[mask]
        self.inner.step()
        for parameter, mask, entries in zip(self.params, self.masks, self.entries, strict=True):
            parameter[mask] = entries


def adam_edges(rng: Random):
    def drawn(*shapes):
        return [normal(rng, *s, dtype=torch.float64) for s in shapes]

    shapes = (3, 4), (5,), (1,)
    ones, none = ([torch.full(s, flag) for s in shapes] for flag in (True, False))
    some = [torch.rand(s, generator=torch.Generator().manual_seed(rng.getrandbits(30))) < 0.5 for s in shapes]
    steps = [drawn(*shapes) for _ in range(4)]
    yield "take the stub's defaults but for lr", (drawn(*shapes), some, steps, {"lr": 0.02})
    yield "take betas and eps", (drawn(*shapes), some, steps, {"lr": 0.02, "betas": (0.5, 0.7), "eps": 0.1})
    yield "decay what is marked", (drawn(*shapes), some, steps, {"lr": 0.02, "weight_decay": 0.3})
    yield "be AdamW where everything is marked", (drawn(*shapes), ones, steps, {"lr": 0.02})
    yield "do nothing where nothing is marked", (drawn(*shapes), none, steps, {"lr": 0.02})


def layer_range(names, first, last):
    def number(name):
        return next((int(part) for part in name.split(".") if part.isdigit()), -1)

    found = [name for name in names if first <= number(name) <= last]
    if not found:
        raise ValueError(f"No parameter belongs to layers {first} to {last}.")
    return found


def range_edges(rng: Random):
    for style in ("transformer.blocks", "encoder.block", "stages", "bert.encoder.layer", "h"):
        names = [f"{style}.{i}.{p}" for i in (11, 0, 1, 2, 10) for p in ("mlp.3.weight", "norm2.bias")]
        names = [*names[3:], "embed_2.weight", *names[:3], "lm_head2.weight"]
        for first, last in ((1, 2), (0, 0), (2, 10), (0, 11)):
            yield f"find layers {first} to {last} of a model that calls them {style}", (names, first, last)
        yield f"raise a ValueError for layers 3 to 9, which a model of {style} has not", (names, 3, 9)
    long = ["h.100.w", "h.7.w", "h.99.w", "h.1000.w", "h.7.w"]
    yield "take numbers of any length for numbers, and each name as often as it comes", (long, 7, 100)
    ends = ["3.weight", "Blocks.12.Gate", "scales.4", "Top.2.Bias", "tail.5"]
    yield "find a number at either end of a name, and leave capitals as they are", (ends, 2, 4)
    yield "raise a ValueError for a model without layers", (["embed.weight", "head2.bias"], 0, 5)
    yield "raise a ValueError for no name at all", ([], 0, 5)
    yield "raise a ValueError when first is above last", (["h.1.w", "h.2.w"], 2, 1)


MODEL = "the model is built from plain tensors in the drive"
EDGES = {
    "bitfit_names": {"reference": (bitfit_names,), "without": {"memory": "it returns names"}},
    "tune_softmax": {
        "reference": (tune_softmax,),
        "edges": softmax_edges,
        "without": {
            "strided": MODEL,
            "types": "its numbers are compared bit for bit",
            "gradient": "its drive trains it",
            "others": "a second call finds nothing to untie",
        },
    },
    "magnitude_mask": {
        "positive": ("share",),
        "reference": (magnitude_mask,),
        "edges": mask_edges,
        "without": {
            "types": "rounded to 16 bits, |w| become equal, and either may be marked",
            "gradient": "masks have none",
        },
    },
    "fisher_importance": {
        "reference": (fisher_importance,),
        "edges": fisher_edges,
        "without": {
            "strided": MODEL,
            "order": "the drive's lists are one model's weights, which fit together in one order only",
            "gradient": "importance is a measurement, without a gradient of its own",
        },
    },
    "MaskedAdamW": {
        "reference": (MaskedAdamW,),
        "edges": adam_edges,
        "without": {
            "strided": "parameters are contiguous",
            "types": "AdamW's own rounding in 16 bits is not asked for",
            "gradient": "an optimizer has none",
            "order": "its lists are parallel",
        },
    },
    "layer_range": {"reference": (layer_range,), "edges": range_edges},
}
