"""The edges of the assignment `budget`."""

from __future__ import annotations

from random import Random

import torch
from torch import nn

from minipeft.course.verdict import Case, Raises


def target_shapes(model, targets):
    found = []
    for name, layer in model.named_modules():
        if name.split(".")[-1] in targets and isinstance(layer, nn.Linear):
            found.append((layer.in_features, layer.out_features))
        elif name.split(".")[-1] in targets and type(layer).__name__ == "Conv1D":
            found.append(tuple(layer.weight.shape))
    return found


def shape_edges(rng: Random):
    layers = [("a.q", "linear", 3, 5), ("b.q", "Conv1D", 4, 4), ("b.Q", "linear", 7, 2), ("q.norm", "norm", 6, 6)]
    yield "list nothing where no name fits", (layers, ["k"])
    yield "list nothing for no target at all", (layers, [])
    yield "take capitals as they are", (layers, ["q"])
    yield "take capitals as they are among the targets", (layers, ["Q"])
    parts = [("a.q_proj", "linear", 3, 5), ("a.proj", "linear", 2, 6), ("b.q", "Conv1D", 4, 7)]
    yield "take whole names, not parts of them", (parts, ["q_proj", "k"])
    yield "take digits for letters like any other", ([("a.q2", "linear", 3, 5), ("a.q", "linear", 2, 6)], ["q"])
    yield "list layers of one input or one output", ([("x.q", "linear", 1, 5), ("y.q", "Conv1D", 5, 1)], ["q"])
    yield "list a layer of the model's own", ([("q", "linear", 3, 4), ("q.q", "linear", 4, 2)], ["q"])


def count_trainable(method, shapes, size):
    one = {
        "lora": lambda d_in, d_out: size * (d_in + d_out),
        "adalora": lambda d_in, d_out: size * (d_in + d_out + 1),
        "dora": lambda d_in, d_out: size * (d_in + d_out) + d_out,
        "vera": lambda d_in, d_out: d_out + size,
        "adapter": lambda d_in, d_out: 2 * d_out * size + size + d_out,
    }
    if method not in one:
        raise ValueError(f"There is no method {method!r}.")
    return sum(one[method](*shape) for shape in shapes)


def count_edges(rng: Random):
    for method in ("lora", "adalora", "dora", "vera", "adapter"):
        yield f"be 0 where {method!r} has no layer", (method, [], 4)
        yield f"count {method!r} of size 1 on a layer of one input and one of one output", (method, [(1, 6), (6, 1)], 1)
        yield f"count {method!r} on equal and on square layers", (method, [(5, 5), (5, 5), (3, 4), (3, 4)], 2)
        yield f"count {method!r} of a size above the sides, as the table says", (method, [(2, 3), (4, 1)], 9)
        yield f"count {method!r} in a large model to the last number", (method, [(12288, 49151)] * 97, 1001)
    for method in ("LoRA", "", "lora "):
        yield Case(
            f"raise a ValueError for the method {method!r}", (method, [(3, 4)], 2), Raises("ValueError", (method,))
        )


def training_bytes(base, own, added, width, moments=2):
    return {
        "weights": width * base + 4 * added,
        "master": 4 * own if width < 4 else 0,
        "gradients": width * own + 4 * added,
        "moments": 4 * moments * (own + added),
    }


def bytes_edges(rng: Random):
    for width in (1, 2, 3, 4, 8):
        for moments in (0, 1, 2, 3):
            yield (
                f"count for numbers of {width} byte{'s' * (width > 1)} and {moments} moments",
                (1000, 10, 3, width, moments),
            )
    yield "count where all of the base and nothing else trains", (7, 7, 0, 2, 2)
    yield "count for no base at all", (0, 0, 5, 2, 2)
    yield "count for nothing", (0, 0, 0, 4, 2)


def step_multiply_adds(shapes, rank, tokens):
    if rank is None:
        return tokens * sum(3 * d_in * d_out for d_in, d_out in shapes)
    return tokens * sum(2 * d_in * d_out + 3 * rank * (d_in + d_out) for d_in, d_out in shapes)


def step_edges(rng: Random):
    for rank in (None, 0, 1, 3):
        yield f"be 0 for no layer, at rank {rank}", ([], rank, 7)
        yield (
            f"count for equal layers, and for one input or output, at rank {rank}",
            ([(3, 5), (3, 5), (1, 4), (4, 1)], rank, 1),
        )


def largest_rank(base, shapes, memory, width=2):
    S, P = sum(a + b for a, b in shapes), sum(a * b for a, b in shapes)
    rank = min((memory - width * base) // (16 * S), (P - 1) // (3 * S)) if shapes else 0
    if rank < 1:
        raise ValueError("No rank is possible.")
    return rank


def rank_edges(rng: Random):
    shapes = [(40, 60), (30, 50)]
    S = 180
    for width in (1, 2, 4):
        for spare, what in ((16 * S, "exactly rank 1"), (32 * S - 1, "almost rank 2"), (16 * S - 1, "almost rank 1")):
            yield (
                f"take memory for {what} over a base of {width} bytes a number",
                (1000, shapes, 1000 * width + spare, width),
            )
    yield "take layers of which rank 1 is just cheaper", (10, [(6, 8)], 10**6, 2)
    yield "take layers of which rank 1 saves a single multiply-add", (10, [(5, 8)], 10**6, 2)
    yield "take layers of which rank 1 costs the same", (10, [(6, 6)], 10**6, 2)
    yield "find a rank of six digits", (10**6, [(10**6, 10**6)], 10**14, 2)
    yield "look beyond the smallest side, for a larger layer pays for it", (10, [(2, 3), (300, 300)], 10**7, 2)
    yield "find a rank of some thousands", (10, [(20_000, 20_000)], 10**10, 2)
    large = [(4096, 4096), (4096, 11_008)] * 32
    room = 2 * 6_738_415_616 + 16 * 37 * sum(map(sum, large))
    yield "take exactly rank 37 over LLaMA-7B", (6_738_415_616, large, room, 2)
    yield "take almost rank 37 over LLaMA-7B", (6_738_415_616, large, room - 1, 2)
    yield "take a base of no number", (0, shapes, 16 * S * 2, 2)
    yield "raise a ValueError where there is no layer", (1000, [], 10**6, 2)
    yield "raise a ValueError where memory is 0", (1000, shapes, 0, 2)


def kept_bytes(model, optimizer):
    state = [value for each in optimizer.state.values() for value in each.values()]
    return {
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(value.nbytes for value in state if isinstance(value, torch.Tensor)),
    }


def small(base: str, adapter: str, tied: bool) -> tuple[list, list, list]:
    parameters = [
        ("embed.weight", (7, 3), base, "frozen"),
        ("up.weight", (4, 3), base, "trains"),
        ("up.A", (2, 3), adapter, "trains"),
        ("scale", (1,), base, "trains"),
        ("gate", (6,), base, "still"),
    ]
    return parameters, [("head.weight", "embed.weight")] if tied else [], [("table", (5,), base, tied)]


def kept_edges(rng: Random):
    shared = [("a.weight", (3, 4), "float32", "trains")], [("b.table", "table")], [("table", (5,), "float32", True)]
    yield "weigh a buffer once that has two names", (*shared, "SGD", {"lr": 0.1})
    counting = *small("float32", "float32", True), "Counting", {"lr": 0.1, "momentum": 0.9}
    yield "weigh tensors alone where an optimizer counts in plain numbers", counting
    for base, adapter in (("float64", "float64"), ("float16", "float32"), ("bfloat16", "bfloat16")):
        for optimizer, settings in (
            ("RMSprop", {"lr": 0.1}),
            ("Adagrad", {"lr": 0.1}),
            ("SGD", {"lr": 0.1}),
            ("Adamax", {"lr": 0.1}),
        ):
            model = small(base, adapter, base != "float16")
            yield (
                f"weigh {optimizer} over a base in {base}, with an adapter in {adapter}",
                (*model, optimizer, settings),
            )


def repaired_memory(model):
    trains = [p for p in model.parameters() if p.requires_grad]
    return {
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "master": sum(4 * p.numel() for p in trains if p.element_size() < 4),
        "gradients": sum(p.nbytes for p in trains),
        "moments": sum(8 * p.numel() for p in trains),
    }


def repair_edges(rng: Random):
    for base in ("float16", "bfloat16", "float32", "float64"):
        for adapter in ("float16", "float32"):
            yield (
                f"foretell the bytes of a base in {base} and an adapter in {adapter}",
                small(base, adapter, base != "float64"),
            )
    frozen = [("a.weight", (3, 4), "float16", "frozen")], [], []
    yield "foretell that nothing trains", frozen
    yield "foretell for numbers of one byte", ([("a.weight", (3, 4), "float8_e4m3fn", "trains")], [], [])
    shared = [("a.weight", (3, 4), "float32", "trains")], [("b.table", "table")], [("table", (5,), "float32", True)]
    yield "weigh a buffer once that has two names", shared
    yield "foretell for a model of one number that trains", ([("a", (1,), "bfloat16", "trains")], [], [])


DRAWN_MODEL = {
    each: "the model is drawn from names and sizes in the drive" for each in ("strided", "types", "gradient", "order")
}
EDGES = {
    "target_shapes": {
        "reference": (target_shapes,),
        "edges": shape_edges,
        "without": {"order": "blocks share earlier ones"},
    },
    "count_trainable": {"reference": (count_trainable,), "edges": count_edges},
    "training_bytes": {"positive": ("width",), "reference": (training_bytes,), "edges": bytes_edges},
    "step_multiply_adds": {"reference": (step_multiply_adds,), "edges": step_edges},
    "largest_rank": {"reference": (largest_rank,), "edges": rank_edges},
    "kept_bytes": {"reference": (kept_bytes,), "edges": kept_edges, "without": DRAWN_MODEL},
    "repaired_memory": {"reference": (repaired_memory,), "edges": repair_edges, "without": DRAWN_MODEL},
}
