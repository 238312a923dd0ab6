"""The exercises of the assignment `budget` that count bytes: of training, of a model that is held, and the bug."""

from __future__ import annotations

from math import prod
from numbers import Number
from random import Random

import torch

from minipeft.course.verdict import Case, short

LLAMA_7B = 6_738_415_616


def bill(base=0, own=0, added=0, width=2, moments=2) -> dict[str, int]:
    return {
        "weights": width * base + 4 * added,
        "master": 4 * own if width < 4 else 0,
        "gradients": width * own + 4 * added,
        "moments": 4 * moments * (own + added),
    }


def bytes_cases(rng: Random):
    base, few = 1000 * rng.randint(1, 9), 10 * rng.randint(1, 9)
    rows = [
        (LLAMA_7B, LLAMA_7B, 0, 2, 2, "LLaMA-7B, trained whole in 16 bits"),
        (base, 0, few, 2, 2, "a frozen base in 16 bits and an adapter"),
        (base, base, 0, 4, 2, "a model trained whole in float32"),
        (base, few, 0, 2, 2, "a base in 16 bits of which a few numbers train"),
        (base, few, 3 * few, 2, 2, "a few of the base's numbers and an adapter"),
        (base, few, 3 * few, 4, 1, "the same in float32, with momentum"),
        (base, base, 0, 2, 0, "a model trained whole in 16 bits by plain SGD"),
        (base, 0, 0, 2, 2, "a model that only writes"),
    ]
    for number, own, added, width, moments, what in rows:
        right, trains = bill(number, own, added, width, moments), own + added
        changes = {
            "what is frozen has gradients too": {"gradients": width * number + 4 * added},
            "what is frozen has moments too": {"moments": 4 * moments * (number + added)},
            "what is frozen has gradients and moments too": {
                "gradients": width * number + 4 * added,
                "moments": 4 * moments * (number + added),
            },
            "what is frozen has a master copy too": {"master": 4 * number if width < 4 else 0},
            "there are no master copies: numbers in 16 bits that train need one": {"master": 0},
            "float32 numbers have a master copy too: they are their own": {"master": 4 * own},
            "the adapter has a master copy: it is float32 already": {"master": 4 * trains},
            "a master copy has 2 bytes a number: it is float32": {"master": 2 * own if width < 4 else 0},
            "the adapter is as narrow as the base: it is float32": {"weights": width * (number + added)},
            "the adapter is as narrow as the base, and its gradient too: both are float32": {
                "weights": width * (number + added),
                "gradients": width * trains,
            },
            "the adapter is left out of the weights": {"weights": width * number},
            "what trains is left out of the base's weights": {"weights": width * (number - own) + 4 * added},
            "numbers are counted, not bytes": {
                "weights": number + added,
                "master": own if width < 4 else 0,
                "gradients": trains,
                "moments": moments * trains,
            },
            "the adapter's gradient is as narrow as the base: it is float32": {"gradients": width * trains},
            "gradients are all float32: they are as wide as their weights": {"gradients": 4 * trains},
            "the moments are as narrow as the weights: they are float32": {
                "moments": moments * (width * own + 4 * added)
            },
            "there is one moment only": {"moments": 4 * trains},
            "`moments` is left out, so that it is always Adam": {"moments": 8 * trains},
            "only the adapter has moments": {"moments": 4 * moments * added},
        }
        yield Case(
            f"give the bytes of {what}",
            (number, own, added, width, moments),
            right,
            wrong={text: lambda v=right | change: v for text, change in changes.items()},
        )


# multiply-adds -------------------------------------------------------------------------------------------------------
WIDTH = {"float32": 4, "bfloat16": 2}


def part_of_bytes(name: str, right: int, known: dict[str, int]):
    """A judge for one entry; `known`: {misconception: what comes out under it}."""

    def judge(seen):
        if not isinstance(seen, dict) or name not in seen:
            return f"It should be a dict with an entry {name!r}; it is {short(seen)}."
        got = seen[name]
        got = got.item() if isinstance(got, torch.Tensor) and got.numel() == 1 else got
        if not isinstance(got, Number) or isinstance(got, bool):
            return f"The entry {name!r} should be a number of bytes; it is {short(got)}."
        if got != right:
            why = next((f" It looks as if {text}." for text, value in known.items() if value == got), "")
            return f"It is {got:,} bytes instead of {right:,}.{why}"

    return judge


def draw_model(rng: Random, base: str, adapter: str, tied: bool = True, idle: bool = False) -> tuple[list, list, list]:
    """(parameters, ties, buffers) of a language model: a frozen base, and an adapter that trains."""
    words, d, ff, r = rng.sample(range(5, 40), 4)
    parameters = [
        ("embed.weight", (words, d), base, "trains" if idle else "frozen"),
        ("layers.0.up.weight", (ff, d), base, "frozen"),
        ("layers.0.up.bias", (ff,), base, "trains"),
        ("layers.0.norm.weight", (d,), "float32", "frozen"),
        ("layers.0.up.A", (r, d), adapter, "trains"),
        ("layers.0.up.B", (ff, r), adapter, "trains"),
    ]
    if idle:
        parameters.append(("pooler.weight", (d, d + 1), base, "idle"))
    buffers = [("rotary.frequencies", (d,), "float32", False), ("layers.0.seen", (ff, 3), base, True)]
    return parameters, [("head.weight", "embed.weight")] if tied else [], buffers


def sizes(parameters: list, ties: list, buffers: list, parts=("frozen", "trains", "idle"), twice=False) -> list:
    """(numbers, bytes each) of every parameter that plays one of these parts; tied ones twice if asked."""
    named = {name: (prod(shape), WIDTH[dtype], part) for name, shape, dtype, part in parameters}
    rows = [*named.values(), *(named[other] for _, other in ties if twice)]
    return [(n, width) for n, width, part in rows if part in parts]


def weight_judge(model: tuple[list, list, list]):
    def total(rows, width=None, buffers=True, saved_only=False):
        kept = [(prod(s), WIDTH[t]) for _, s, t, saved in model[2] if buffers and (saved or not saved_only)]
        return sum(n * (width or w) for n, w in [*rows, *kept])

    once, twice = sizes(*model), sizes(*model, twice=True)
    return part_of_bytes(
        "weights",
        total(once),
        {
            "a tied matrix counts twice": total(twice),
            "it is taken from the state_dict, which lists a tied matrix twice and leaves unsaved buffers out": total(
                twice, saved_only=True
            ),
            "the buffers are left out": total(once, buffers=False),
            "the buffers are left out, and a tied matrix counts twice": total(twice, buffers=False),
            "every number is taken for 4 bytes": total(once, 4),
            "every number is taken for 4 bytes, and a tied matrix counts twice": total(twice, 4),
            "numbers are counted, not bytes": total(once, 1),
            "only what trains is counted": total(sizes(*model, parts=("trains", "idle"))),
            "buffers that are not saved are left out": total(once, saved_only=True),
            "gradients are counted with the weights": total(once) + total(sizes(*model, parts=("trains",))),
        },
    )


def kept_cases(rng: Random):
    for base, optimizer, settings, states, tied, idle in (
        ("float32", "AdamW", {"lr": 0.1}, 2, False, False),
        ("float32", "AdamW", {"lr": 0.1}, 2, True, False),
        ("bfloat16", "AdamW", {"lr": 0.1}, 2, True, True),
        ("bfloat16", "SGD", {"lr": 0.1, "momentum": 0.9}, 1, True, False),
        ("float32", "SGD", {"lr": 0.1}, 0, False, True),
        ("bfloat16", "AdamW", {"lr": 0.1, "amsgrad": True}, 3, True, True),
    ):
        model = draw_model(rng, base, "float32", tied, idle)
        args = (*model, optimizer, settings)
        trains, could = sizes(*model, parts=("trains",)), sizes(*model, parts=("trains", "idle"))
        again = sizes(*model, parts=("trains",), twice=True)
        counters = 4 * len(trains) if "Adam" in optimizer else 0

        def nbytes(rows, width=None):
            return sum(n * (width or w) for n, w in rows)

        text = f"after a step of {optimizer}{''.join(f', {k}={v}' for k, v in settings.items() if k != 'lr')}"
        what = [
            "frozen base",
            *(["tied head"] if tied else []),
            *(["parameter that the loss never met"] if idle else []),
        ]
        yield Case(
            f"count the weights in {base} {text} once each, buffers too (with a {', a '.join(what)})",
            args,
            judge=weight_judge(model),
        )
        yield Case(
            f"count the gradients {text} (with a {', a '.join(what)})",
            args,
            judge=part_of_bytes(
                "gradients",
                nbytes(trains),
                {
                    "every parameter has a gradient": nbytes(sizes(*model)),
                    "every parameter that requires a gradient has one: the loss may never have met it": nbytes(could),
                    "a tied matrix has two gradients": nbytes(again),
                    "every number is taken for 4 bytes": nbytes(trains, 4),
                    "numbers are counted, not bytes": nbytes(trains, 1),
                    "they were cleared before they were counted": 0,
                },
            ),
        )
        right = states * nbytes(trains) + counters
        yield Case(
            f"count all tensors of the optimizer's state {text}",
            args,
            judge=part_of_bytes(
                "optimizer",
                right,
                {
                    "the step counters, 4 bytes each, are left out": right - counters,
                    "the optimizer always keeps two moments": 2 * nbytes(trains),
                    "the optimizer always keeps two float32 moments: here they have their weight's type": 8
                    * sum(n for n, _ in trains),
                    "only one moment is counted": nbytes(trains),
                    "only one moment and the counters are counted": nbytes(trains) + counters,
                    "tensors are looked up by name, and this optimizer has others: take whatever its state holds": 0,
                    "the two moments are counted by name; look at whatever tensors the state holds": 2 * nbytes(trains)
                    + counters,
                    "a moment's numbers are taken for 4 bytes each": states * nbytes(trains, 4) + counters,
                },
            ),
        )


# find the bug --------------------------------------------------------------------------------------------------------
def repair_cases(rng: Random):
    for base, adapter, tied, idle in (
        ("float32", "float32", True, False),
        ("bfloat16", "float32", False, False),
        ("bfloat16", "float32", True, True),
        ("bfloat16", "bfloat16", True, True),
    ):
        model = draw_model(rng, base, adapter, tied, idle)
        parts = ("trains", "idle")
        rows, twice = sizes(*model, parts=parts), sizes(*model, parts=parts, twice=True)
        every, every_twice = sizes(*model), sizes(*model, twice=True)

        def nbytes(rows):
            return sum(n * width for n, width in rows)

        def master(rows, all_of_them=False):
            return sum(4 * n for n, width in rows if all_of_them or width < 4)

        def moments(rows, width=4):
            return sum(2 * width * n for n, _ in rows)

        known = {
            "gradients": {
                "what is frozen has a gradient": nbytes(every),
                "what is frozen has a gradient, and a tied matrix two": nbytes(every_twice),
                "a tied matrix has two gradients": nbytes(twice),
                "all gradients are float32: they are as wide as their weights": moments(rows) // 2,
                "all gradients have 2 bytes a number: they are as wide as their weights": moments(rows) // 4,
            },
            "moments": {
                "what is frozen has moments": moments(every),
                "what is frozen has moments, and a tied matrix twice": moments(every_twice),
                "a tied matrix has its moments twice": moments(twice),
                "the moments are as narrow as the weights: they are float32": 2 * nbytes(rows),
                "the moments are as narrow as the weights, and what is frozen has them": 2 * nbytes(every),
                "they are as narrow as the weights, what is frozen has them, and a tied matrix twice": 2
                * nbytes(every_twice),
                "there is one moment only": moments(rows) // 2,
            },
            "master": {
                "float32 numbers have a master copy too": master(rows, True),
                "what is frozen has a master copy": master(every),
                "all numbers have a master copy": master(every, True),
                "all numbers have a master copy, and a tied matrix two": master(every_twice, True),
                "a tied matrix has two master copies": master(twice),
                "there are no master copies": 0,
                "a master copy has 2 bytes a number": master(rows) // 2,
            },
        }
        right = {"gradients": nbytes(rows), "moments": moments(rows), "master": master(rows)}
        what = f"a base in {base} and an adapter in {adapter}" + (", with a tied head" if tied else "")
        yield Case(f"count the weights of {what}", model, judge=weight_judge(model))
        for name, value in right.items():
            claim = f"foretell the {'master copies' if name == 'master' else name} of {what}"
            yield Case(claim, model, judge=part_of_bytes(name, value, known[name]))
