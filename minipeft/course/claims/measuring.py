"""The rows of the ledger that train anew, or read other shipped runs than the atlas's."""

from __future__ import annotations

import statistics

import torch

from minipeft.analyze.spectrum import random_spectrum, spectra, truncated
from minipeft.attach import attach
from minipeft.course import atlas
from minipeft.course.claims.ledger import HOLDS, WRONG, claim, over
from minipeft.learn.protocol import SEARCH_SEED, SEEDS, Interval, best_rate, interval, paired, verdict
from minipeft.methods.lora import LoRA
from minipeft.methods.select import Full, Softmax

LANGUAGE = ("pirate", "cipher", "flip")


@claim(
    "C07",
    "Both A and B drawn at random is a fine initialisation",
    "D §3.6.2",
    "measured",
    lambda f: WRONG if min(f["A and B random"]) > f["B = 0"] + 0.5 else HOLDS,
)
def _() -> dict:
    """Loss of the untrained model on its own stories, standard normal A and B, r=8, γ=1, five seeds."""
    from minipeft.learn.fit import evaluate
    from minipeft.world import load, plain

    model = load("pocket")[0]
    tuned = attach(model, LoRA(rank=8, gamma=1.0))
    losses = [evaluate(tuned, plain(), n=50).loss]
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        for layer in tuned.adapters["default"].values():
            layer.A.data = torch.randn(layer.A.shape, generator=generator)
            layer.B.data = torch.randn(layer.B.shape, generator=generator)
        losses.append(evaluate(tuned, plain(), n=50).loss)
    return {"B = 0": round(losses[0], 3), "A and B random": [round(x, 2) for x in losses[1:]]}


def _low(f: dict) -> str:
    """By what the model loses, as the claim says "captured in few directions"; effective rank is shown beside it."""
    return over({task: verdict(Interval(*f[task]["gain kept at r=8, 95 %"]), 0.9) for task in LANGUAGE}, "task")


@claim("C18", "Fine-tuning updates are low-rank", "E §4", "measured", _low)
def _() -> dict:
    """Full fine-tuning for 60 steps at its best rate (validation rows, another seed), five seeds: which share of the
    gain in loss stays when each ΔW is cut to its best rank 8 of 128 (vectors keep their whole change)? Low-rank: more
    than 0.9, by the interval over seeds. Beside it the median stable and effective ranks of the linear layers' ΔW, and
    those of a random matrix."""
    from minipeft.learn.fit import evaluate, fit
    from minipeft.learn.sweep import task_of
    from minipeft.world import load

    model, runs, figures = load("pocket")[0], atlas.load(), {}
    for name in LANGUAGE:
        task, before = task_of(name), evaluate(model, task_of(name), n=100).loss
        rate, kept, ranks = atlas.best(runs, name, Full())["lr"], [], []
        for seed in SEEDS:
            tuned = attach(model, Full())
            fit(tuned, task, steps=60, lr=rate, batch=10, seed=seed, progress=False)
            found, whole = spectra(tuned), evaluate(tuned, task, n=100).loss
            with truncated(tuned, 8, found):
                kept.append((before - evaluate(tuned, task, n=100).loss) / (before - whole))
            tuned.detach()
            ranks += [(s.stable_rank, s.effective_rank) for path, s in found.items() if "layers" in path]
        stable, effective = (round(statistics.median(each), 1) for each in zip(*ranks, strict=True))
        figures[name] = {
            "rate": rate,
            "stable rank": stable,
            "effective rank": effective,
            "gain kept at r=8, 95 %": [round(x, 3) for x in interval(kept)],
        }
    sigma = random_spectrum((128, 128), 1.0)
    share = sigma / sigma.sum()
    figures["random"] = {
        "stable rank": round(float((sigma**2).sum() / sigma[0] ** 2), 1),
        "effective rank": round(float(2 ** -(share * torch.tensor(share).log2().numpy()).sum()), 1),
    }
    return figures


def _less(f: dict) -> str:
    return over({name: verdict(Interval(*found), 0.05) for name, found in f["full − this, 95 %"].items()}, "method")


@claim("C22", "Full fine-tuning forgets; PEFT forgets less", "E §2", "atlas", _less)
def _() -> dict:
    """Rise of the loss on the base's own stories where the loss on pirate speech is 1.4 (floor 0.794), from the runs of
    lesson 11: pocket model, each side at the rate at which it forgets least on validation rows within 90 steps, five
    seeds. "Less" means by 0.05 nats or more, by the 95 % interval of the paired difference. LoRA stands for PEFT."""
    from minipeft.course import teaching

    found = teaching.measured()
    start, sides = found["before, test"], found["sides"]
    names = {"full": "full fine-tuning", "LoRA r=8": "LoRA r=8"}
    rise = {
        name: [round(teaching.at_target(run, start) - start[1], 3) for run in sides[side]["runs"]]
        for name, side in names.items()
    }
    less = {name: [round(x, 3) for x in paired(rise["full"], rise[name])] for name in rise if name != "full"}
    return rise | {"full − this, 95 %": less}


def _harmful(f: dict) -> str:
    return over({name: verdict(Interval(*found), 0.02) for name, found in f["harm, 95 %"].items()}, "combination")


@claim("C26", "An adapter should generally not be combined with LoRA or softmax tuning", "C §2.2", "measured", _harmful)
def _() -> dict:
    """Loss on pirate after 60 steps, each at its best rate (validation rows, another seed; one rate for both parts of a
    combination), five seeds; what stands alone is read from the atlas. Harm is the combination's loss less that of its
    better part alone, by 0.02 nats or more, paired by seed; adapter m=4 with LoRA r=1 has the budget of either alone,
    and the output layer has more numbers than both."""
    from minipeft.course.claims.comparing import losses
    from minipeft.learn.fit import evaluate, fit
    from minipeft.learn.sweep import validated
    from minipeft.methods.adapter import Adapter
    from minipeft.world import load, pirate

    model = load("pocket")[0]

    def loss(method, lr, seed):
        tuned = attach(model, method, seed=seed)
        fit(tuned, pirate(), steps=60, lr=lr, batch=10, seed=seed, progress=False)
        value = validated(tuned, "pirate") if seed == SEARCH_SEED else evaluate(tuned, pirate(), n=100).loss
        tuned.detach()
        return value

    def at_best(method):
        lr, _ = best_rate(lambda lr: loss(method, lr, SEARCH_SEED), [1e-2])
        return {"rate": lr, "losses": [round(loss(method, lr, seed), 3) for seed in SEEDS]}

    parts = {"adapter": Adapter(8), "LoRA": LoRA(rank=2, gamma=2.0), "softmax": Softmax()}
    alone = {name: [round(each, 3) for each in losses("pirate", method)] for name, method in parts.items()}
    together = {
        "adapter and LoRA, half each": (["adapter", "LoRA"], [Adapter(4), LoRA(rank=1, gamma=2.0)]),
        "adapter and softmax": (["adapter", "softmax"], [parts["adapter"], parts["softmax"]]),
        "LoRA and softmax": (["LoRA", "softmax"], [parts["LoRA"], parts["softmax"]]),
    }
    tried = {name: {"of": of} | at_best(method) for name, (of, method) in together.items()}
    return {"alone": alone, "together": tried, "harm, 95 %": _harm(alone, tried)}


def _harm(alone: dict[str, list[float]], together: dict[str, dict]) -> dict[str, list[float]]:
    """{combination: [mean, low, high] of its losses less those of its better part}"""
    better = {name: min((alone[part] for part in each["of"]), key=statistics.fmean) for name, each in together.items()}
    return {name: [round(x, 3) for x in paired(each["losses"], better[name])] for name, each in together.items()}
