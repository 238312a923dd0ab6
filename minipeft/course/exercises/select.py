"""Assignment `select`: which entries of the model move, and how the others stay bit-identical."""

from __future__ import annotations

from random import Random

import torch

from minipeft.course.drives.select import classifier, network
from minipeft.course.exercises.draw import holds, normal
from minipeft.course.verdict import Case, Exercise, Raises


# BitFit --------------------------------------------------------------------------------------------------------------
def bitfit_cases(rng: Random):
    for kind in ("biases", "frozen", "biases", "biases"):
        width, seed = rng.randint(3, 6), rng.randrange(10**6)
        modules = dict(network("biases", width, seed).named_modules())
        norms = [p for p, m in modules.items() if type(m).__name__ in ("LayerNorm", "RMSNorm", "NormedScale")]
        suits = norms + [p for p, m in modules.items() if type(m).__name__ in ("Linear", "Conv1D")]
        right = sorted(f"{p}.bias" for p in suits if modules[p].bias is not None)
        every = [n for n, _ in network("biases", width, seed).named_parameters()]
        matrices = [n for n in right if n.removesuffix(".bias") not in norms]
        yield Case(
            "name the biases of linear, Conv1D and norm layers",
            (kind, width, seed),
            right,
            wrong={
                "every parameter with 'bias' in its name is taken": lambda e=every: sorted(n for n in e if "bias" in n),
                "every parameter called bias is taken, the gate's too": lambda e=every: sorted(
                    n for n in e if n.split(".")[-1] == "bias"
                ),
                "the norms are left out": lambda m=matrices: m,
                "only torch's own norms are taken: look for Norm in the name of the class": lambda r=right: [
                    n for n in r if "end_norm" not in n and "ln_1" not in n
                ],
                "a norm is known by its name in the model: look for Norm in the name of the class": (
                    lambda e=every, m=matrices: sorted(m + [n for n in e if "norm" in n and n.endswith(".bias")])
                ),
                "classes that end in Norm are taken: Norm may stand anywhere in the name": lambda r=right: [
                    n for n in r if "ln_1" not in n
                ],
                "capitals are ignored: Norm is written so": lambda e=every, r=right: sorted(
                    r + [n for n in e if n.endswith("tidy.bias")]
                ),
                "the Conv1D layers are left out": lambda r=right: [n for n in r if "c_fc" not in n],
                "only norms are taken": lambda r=right, m=matrices: [n for n in r if n not in m],
            },
        )
    yield Case(
        "raise a ValueError when the model has no such bias",
        ("none", rng.randint(3, 6), rng.randrange(10**6)),
        Raises("ValueError"),
    )


# softmax tuning ------------------------------------------------------------------------------------------------------
def softmax_cases(rng: Random):
    for tied, frozen, alike in (
        *((False, False, False), (True, False, False), (True, True, False), (False, True, False)),
        (False, False, True),
    ):
        words, width = rng.randint(7, 20), rng.randint(3, 6)
        table = normal(rng, words, width)
        head = None if tied else table.clone() if alike else normal(rng, words, width)
        ids = torch.tensor([rng.randrange(words) for _ in range(6)])
        args = (table, head, ids, rng.randrange(10**6), frozen)
        added = words * width if tied else 0

        def judge(seen, tied=tied, added=added):
            if not seen["same output at first"]:
                return "The model's output changes before any training: the head must start as it was."
            if not seen["embedding kept"]:
                return "A step of training moved the embedding" + (": the head is still tied to it." if tied else ".")
            if not seen["body kept"]:
                return "A step of training moved the body: freeze all but the head."
            if not seen["head moved"]:
                return "A step of training did not move the head."
            if seen["trainable"] != ["head.weight"]:
                return f"What requires a gradient is {seen['trainable']}; it should be ['head.weight']."
            if seen["added"] != added or isinstance(seen["added"], bool):
                return f"It returns {seen['added']!r}; the model has {added} numbers more than before."
            return holds(seen)

        start = ", all of which was frozen before," if frozen else ""
        claim = f"train the head of a {'tied' if tied else 'plain'} model{start} and nothing else"
        claim += " (its head has the embedding's numbers in a tensor of its own)" * alike
        yield Case(claim, args, judge=judge)


# magnitude -----------------------------------------------------------------------------------------------------------
def magnitude_cases(rng: Random):
    few = {"up": torch.tensor([[3.0, -1.0], [0.5, 2.0]]), "down": torch.tensor([-4.0, 1.5, 0.0, -2.5])}
    for share in (0.375, 0.25, 0.5, 0.1, 0.0, 1.0, 0.0357, 0.77):
        weights = {f"layer{i}.weight": normal(rng, 10, 2 * i + 2) * (i + 1) for i in range(rng.randint(2, 4))}
        weights = few if share == 0.375 else weights
        total = sum(w.numel() for w in weights.values())
        count = round(share * total)

        def keep(score, weights=weights, count=count):
            """The `count` places with the highest score over all tensors, found by sorting a list of pairs."""
            flat = sorted(((score(v), n, i) for n, w in weights.items() for i, v in enumerate(w.flatten().tolist())))
            masks = {n: torch.zeros(w.numel(), dtype=torch.bool) for n, w in weights.items()}
            for _, name, i in flat[len(flat) - count :] if count else []:
                masks[name][i] = True
            return {n: masks[n].reshape(w.shape) for n, w in weights.items()}

        def apart(weights=weights, share=share):
            masks = {}
            for name, w in weights.items():
                k = round(share * w.numel())
                chosen = torch.zeros(w.numel(), dtype=torch.bool)
                chosen[w.flatten().abs().argsort(descending=True)[:k]] = True
                masks[name] = chosen.reshape(w.shape)
            return masks

        every = {n: torch.ones(w.shape, dtype=torch.bool) for n, w in weights.items()}
        yield Case(
            f"mark the {count} of {total} entries of largest |w|, over all tensors together",
            (weights, share),
            keep(abs),
            wrong={
                "a share of 0 marks everything: the last 0 of a list, [-0:], are all of it": lambda e=every: e,
                "the largest entry is marked at a share of 0: `>=` a threshold always lets one in": lambda s=keep: s(
                    abs, count=1
                ),
            }
            if share == 0
            else {
                "the others are marked, and those that should be are not": lambda keep=keep, n=total - count: keep(
                    abs, count=n
                ),
                "each tensor gets its own share": apart,
                "the sign counts: take |w|": lambda keep=keep: keep(lambda v: v),
                "the smallest are marked": lambda keep=keep: keep(lambda v: -abs(v)),
                "the mask is inverted": lambda keep=keep: {n: ~m for n, m in keep(abs).items()},
            },
        )


# Fisher --------------------------------------------------------------------------------------------------------------
def fisher_cases(rng: Random):
    for _ in range(3):
        d_in, hidden, classes, rows = rng.randint(3, 6), rng.randint(3, 5), rng.randint(2, 4), rng.randint(5, 9)
        weights = [normal(rng, hidden, d_in, dtype=torch.float64), normal(rng, classes, hidden, dtype=torch.float64)]
        inputs = normal(rng, rows, d_in, dtype=torch.float64)
        labels = torch.tensor([rng.randrange(classes) for _ in range(rows)])

        def slopes(score, weights=weights, inputs=inputs, labels=labels):
            """The gradients of score(logits)[label] for each example, one tensor a parameter."""
            found = []
            for x, y in zip(inputs, labels, strict=True):
                model = classifier(weights)
                score(model(x))[y].backward()
                found.append([p.grad for p in model.parameters()])
            return [torch.stack([each[i] for each in found]) for i in range(len(weights))]

        names = [name for name, _ in classifier(weights).named_parameters()]

        def named(values, names=names):
            return {"importance": dict(zip(names, values, strict=True)), "weights kept": True}

        each, plain = slopes(lambda logits: logits.log_softmax(-1)), slopes(lambda logits: logits)
        yield Case(
            "be the mean over the examples of the squared gradient of log p(label | input)",
            (weights, inputs, labels),
            # F_i = 1/n Σ (∂ log p(y|x) / ∂θ_i)²
            named([g.square().mean(0) for g in each]),
            wrong={
                "it squares the mean gradient: gradients of opposite sign cancel there": lambda e=each, f=named: f(
                    [g.mean(0).square() for g in e]
                ),
                "it adds over the examples: take the mean": lambda e=each, f=named: f([g.square().sum(0) for g in e]),
                "the gradient is not squared, only made positive": lambda e=each, f=named: f(
                    [g.abs().mean(0) for g in e]
                ),
                "the gradient is not squared": lambda e=each, f=named: f([g.mean(0) for g in e]),
                "it is of the logit, not of log p: log_softmax is missing": lambda e=plain, f=named: f(
                    [g.square().mean(0) for g in e]
                ),
                "it is the square root of the importance": lambda e=each, f=named: f(
                    [g.square().mean(0).sqrt() for g in e]
                ),
                "it squares the summed gradient": lambda e=each, f=named: f([g.sum(0).square() for g in e]),
            },
        )


# masked Adam ---------------------------------------------------------------------------------------------------------
def adam_on_entries(values, masks, gradients, settings, **changes) -> list:
    """torch's AdamW on the marked entries alone, which are laid out in vectors; the others are copied."""
    vectors = [torch.nn.Parameter(v[m].clone()) for v, m in zip(values, masks, strict=True)]
    optimizer = torch.optim.AdamW(vectors, **(settings | changes))
    history = []
    for several in gradients:
        for vector, mask, gradient in zip(vectors, masks, several, strict=True):
            vector.grad = gradient[mask].clone()
        optimizer.step()
        now = [v.clone() for v in values]
        for tensor, mask, vector in zip(now, masks, vectors, strict=True):
            tensor[mask] = vector.detach()
        history.append(now)
    return history


def adam_cases(rng: Random):
    for decay, dtype, poisoned in (
        (0.0, torch.float64, False),
        (0.1, torch.float32, False),
        (3.0, torch.float64, True),
    ):
        shapes = [(4, 5), (7,), (2, 3, 2)][: rng.randint(2, 3)]
        values = [normal(rng, *s, dtype=dtype) for s in shapes]
        masks = [normal(rng, *s) > 0 for s in shapes]
        for mask in masks:
            mask.view(-1)[0], mask.view(-1)[1] = False, True
        steps = rng.randint(3, 6)
        gradients = [[normal(rng, *s, dtype=dtype) for s in shapes] for _ in range(steps)]
        if poisoned:  # entries that do not train may have any gradient, and any value
            for several in gradients:
                several[0].view(-1)[0] = float("nan")
            values[0].view(-1)[0] = -0.0
        settings = {"lr": round(rng.uniform(0.01, 0.1), 3), "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": decay}
        right = adam_on_entries(values, masks, gradients, settings)

        def judge(seen, values=values, masks=masks, right=right, decay=decay):
            for step, (now, want) in enumerate(zip(seen, right, strict=True), 1):
                for i, (p, v, m, w) in enumerate(zip(now, values, masks, want, strict=True)):
                    if p.shape != v.shape or p.dtype != v.dtype:
                        return f"Parameter {i} became a {tuple(p.shape)} tensor of {p.dtype}."
                    still = p[~m].view(torch.uint8).equal(v[~m].view(torch.uint8))
                    if not still:
                        return (
                            f"After step {step}, masked entries of parameter {i} have moved by up to "
                            f"{(p[~m].double() - v[~m].double()).abs().max().item():.3g}"
                            + (": weight decay reaches them, whatever their gradient." if decay else ".")
                        )
                    error = (p.double() - w.double()).abs().max().item()
                    if not error <= (1e-10 if v.dtype == torch.float64 else 1e-5):
                        why = " Nothing has moved: `p = …` names another tensor, `p[mask] = …` writes." * p.equal(v)
                        return f"After step {step}, trained entries differ from AdamW's by up to {error:.3g}.{why}"

        claim = f"be AdamW on the marked entries (weight decay {decay:g}) and leave the others bit for bit"
        yield Case(
            claim + (", even where their gradient is NaN" if poisoned else ""),
            (values, masks, gradients, settings),
            judge=judge,
        )


# find the bug --------------------------------------------------------------------------------------------------------
def range_cases(rng: Random):
    for style in ("layers", "h", "layer"):
        names = [
            f"model.{style}.{i}.{p}" for i in range(rng.randint(13, 24)) for p in ("attn.q.weight", "mlp.1.up.weight")
        ]
        names = ["embed.3.weight"[:5] + ".weight", *names, "head.weight"]
        depth = max(int(n.split(".")[2]) for n in names if n.startswith("model"))
        for first, last in ((1, 1), (rng.randint(0, 2), rng.randint(3, 9)), (10, depth), (0, 0)):
            right = [n for n in names if n.startswith("model") and first <= int(n.split(".")[2]) <= last]

            def inside(n, numbers):
                return any(f"{i}." in n for i in numbers)

            yield Case(
                f"choose the parameters of layers {first} to {last}, both included, among {depth + 1}",
                (names, first, last),
                right,
                wrong={
                    "the last layer is left out": lambda n=names, f=first, t=last: [
                        x for x in n if x.startswith("model") and f <= int(x.split(".")[2]) < t
                    ],
                    "layer 1 also takes 10 to 19, or numbers further right count": lambda n=names, f=first, t=last: [
                        x for x in n if inside(x, range(f, t + 1))
                    ],
                },
            )
        yield Case(
            "raise a ValueError when there is no such layer", (names, depth + 1, depth + 3), Raises("ValueError")
        )


EXERCISES = (
    Exercise(
        "bitfit_names", "The names of the biases", bitfit_cases,
        (
            "Walk over `model.named_modules()` and look at each module's class, then at its bias.",
            'Two questions a module: is its kind right, and is its bias there (`getattr` with None)? Path and "bias" '
            'make the name.',
        ),
        ("bitfit_names",), "select.name_biases",
    ),
    Exercise(
        "tune_softmax", "Softmax tuning, with tied weights", softmax_cases,
        (
            "`model.head.weight is model.embed.weight` says whether they are tied.",
            "Untie first, with a parameter over a *copy* of the numbers. Set the flags last: then no new tensor "
            "escapes them.",
        ),
        ("tune_softmax",), "select.tune_softmax",
    ),
    Exercise(
        "magnitude_mask", "A mask by magnitude", magnitude_cases,
        (
            "Put all |w| into one long vector: the threshold is the same for every tensor.",
            "`topk` gives places, not a threshold: that settles ties and a share of 0. `split` cuts a long mask back "
            "into pieces.",
        ),
        ("magnitude_mask",),
    ),
    Exercise(
        "fisher_importance", "Importance by Fisher information", fisher_cases,
        (
            "One backward pass for each example: a batch's gradient has already been averaged.",
            "`torch.autograd.grad` returns gradients and touches no `.grad`. Loop over the rows; square first, "
            "average then.",
        ),
        ("fisher_importance",), "select.importance",
    ),
    Exercise(
        "MaskedAdamW", "Adam that leaves masked entries alone", adam_cases,
        (
            "Keep moments for parameter[mask] only: a vector as long as the mask has True.",
            "torch's own AdamW can train short vectors of the marked entries. What is copied in before its step, "
            "what out after?",
        ),
        ("MaskedAdamW",), "select.optimise",
    ),
    Exercise(
        "layer_range", "Find the bug", range_cases,
        (
            "Test it on a model with more than ten layers.",
            "`'h.10.mlp.1.w'.split('.')` has two parts of digits: which one counts? Compare numbers, and mind what "
            "`range` omits.",
        ),
        ("layer_range",),
    ),
)  # fmt: skip
