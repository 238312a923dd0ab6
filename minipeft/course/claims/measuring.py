"""The rows of the ledger that runs decide: those of the atlas, and some that train anew."""

from __future__ import annotations

import math
import statistics
from functools import cache

import torch

from minipeft.analyze.budget import budget, training_bytes
from minipeft.analyze.spectrum import random_spectrum, spectra, truncated
from minipeft.attach import attach
from minipeft.course import atlas
from minipeft.course.claims.ledger import CANNOT_TELL, HOLDS, WRONG, claim, only
from minipeft.layer import Method
from minipeft.learn.protocol import Interval, paired, verdict
from minipeft.methods.lora import LoRA
from minipeft.methods.select import BitFit, Full, Softmax

# ---------------------------------------------------------------------------------------------------------------------
# From the atlas
# ---------------------------------------------------------------------------------------------------------------------
LANGUAGE = ("pirate", "cipher", "flip")
TASKS = (*LANGUAGE, "facts(64)")


@cache
def _runs():
    return atlas.load()


@cache
def _before(task: str) -> float:
    """The base's loss on what the runs are scored on."""
    from minipeft.learn.fit import evaluate
    from minipeft.learn.sweep import task_of
    from minipeft.world.base import load

    chosen = task_of(task)
    return evaluate(load("pocket")[0], chosen, n=None if chosen.bits else 100).loss


def lora(rank: int, **settings) -> LoRA:
    return LoRA(rank=rank, gamma=2.0, **settings)


def gain(task: str, method: Method) -> float:
    """The fall in loss over full fine-tuning's after 60 steps, each at its best learning rate, mean of the seeds."""
    ours, full = (atlas.best(_runs(), task, which)["mean"] for which in (method, Full()))
    return round((_before(task) - ours) / (_before(task) - full), 3)


@claim(
    "C13",
    "BitFit may not capture complex tasks",
    "D §3.1",
    "atlas",
    lambda f: only([t for t in TASKS if f[t] < 0.9], len(TASKS)),
)
def _() -> dict:
    """BitFit's gain over full fine-tuning's after 60 steps, each at its best rate, on the pocket model. Below 0.9
    counts as not captured; `flip`, one reversed attribute, is the simple task."""
    return {t: gain(t, BitFit()) for t in TASKS}


@claim(
    "C14",
    "PEFT reaches 90–100 % of full fine-tuning's gain with 0.1–1 % of the parameters",
    "E §2",
    "atlas",
    lambda f: only([t for t in LANGUAGE if f[f"{t}, r=1 of full"] >= 0.9], len(LANGUAGE)),
)
def _() -> dict:
    """Gain of LoRA over full fine-tuning's after 60 steps, each at its best rate, on the pocket model. Rank 1 is the
    least there is, and just above 1 % of so small a model."""
    figures = {f"{t}, r={r} of full": gain(t, lora(r)) for t in LANGUAGE for r in (1, 16)}
    one = atlas.of(_runs(), "pirate", lora(1)).iloc[0]
    return figures | {"trainable share at r=1 in %": round(float(100 * one.trainable / one.total), 2)}


def stored_bits(row) -> float:
    """The bits that a run on `facts` holds: those asked for, minus what is missing, loss · tokens / ln 2. A completion
    has five tokens: four words and the end."""
    facts = int(row.task.removeprefix("facts(").removesuffix(")"))
    return max(0.0, row.bits - row.loss * 5 * facts / math.log(2))


@claim(
    "C17",
    "One parameter is about one bit",
    "E §2",
    "atlas",
    lambda f: HOLDS if 0.5 <= max(v for name, v in f.items() if name.startswith("learnt")) <= 2 else WRONG,
)
def _() -> dict:
    """Bits a number: as stored in float32 and in NF4; and as learnt by heart by LoRA r=1 in the MLPs' last layers, from
    n facts that it saw 500 times each (mean of two seeds): a lower bound of what it could hold."""
    from minipeft.methods import nf4

    one = lora(1, targets=["down_proj"])
    figures = {"stored, float32": 32, "stored, NF4": round(nf4.quantize(torch.zeros(4096, 64), double=True).bits(), 3)}
    for n in (64, 128, 256, 512):
        rows = atlas.of(_runs(), f"facts({n})", one, steps=2000, batch=n // 4).itertuples()
        figures[f"learnt, LoRA r=1, {n} facts"] = round(statistics.fmean(stored_bits(r) / r.trainable for r in rows), 2)
    return figures


@claim(
    "C25",
    "Softmax tuning alone is a usable PEFT method",
    "C §1.2",
    "atlas",
    lambda f: only([t for t in TASKS if f[t] >= 0.9], len(TASKS)),
)
def _() -> dict:
    """Gain of training the output layer alone over full fine-tuning's after 60 steps, each at its best rate. Usable
    means 0.9 or more."""
    return {t: gain(t, Softmax()) for t in TASKS}


@claim(
    "C27",
    "LoRA's result depends on the projection's initialisation",
    "C §3.3",
    "atlas",
    lambda f: (
        HOLDS
        if f["A trains, spread of starts"] > 2 * f["spread of seeds"]
        else "holds when the projection is frozen"
        if f["U fixed, spread of starts"] > 2 * f["spread of seeds"]
        else WRONG
    ),
)
def _() -> dict:
    """Shipped runs of the LoRA family on pirate, three seeds, each at its best rate: the largest minus the least mean
    loss over four starts of a trained A and over three of a fixed U, and over the seeds of plain LoRA."""
    from minipeft.course import family

    sweeps = family.measured()["sweeps"]
    losses = {name: [run["loss"] for run in family.best_of(runs)] for name, runs in sweeps.items()}
    groups = {
        "A trains": ["LoRA r=8", "LoRA r=8, gaussian A", "LoRA r=8, orthogonal A", "PiSSA r=8"],
        "U fixed": ["projected k=8, random", "projected k=8, top", "projected k=8, bottom"],
    }
    figures = {}
    for label, names in groups.items():
        means = [statistics.fmean(losses[name]) for name in names]
        figures[f"{label}, spread of starts"] = round(max(means) - min(means), 3)
    return figures | {"spread of seeds": round(max(losses["LoRA r=8"]) - min(losses["LoRA r=8"]), 3)}


@claim(
    "C28",
    "Low rank hurts, high rank costs more for little",
    "D §3.6.5, E",
    "atlas",
    lambda f: only([t for t in LANGUAGE if f[f"{t}, r=1 − r=16"] > 0.1 > f[f"{t}, r=16 − r=64"]], len(LANGUAGE)),
)
def _() -> dict:
    """Loss at rank 1 minus loss at rank 16, and at 16 minus at 64, after 60 steps, each at its best rate, in nats a
    token. Low rank hurts: more than 0.1; high rank brings little: less than 0.1."""
    best = {(t, r): atlas.best(_runs(), t, lora(r))["mean"] for t in LANGUAGE for r in (1, 16, 64)}
    pairs = ((1, 16), (16, 64))
    return {f"{t}, r={a} − r={b}": round(best[t, a] - best[t, b], 3) for t in LANGUAGE for a, b in pairs}


@claim(
    "C29",
    "LoRA suits large matrices; on small models the gain is limited",
    "A 9.6, D",
    "atlas",
    lambda f: HOLDS if f["memory, pocket, measured"] > 0.5 and f["memory, llama-7b, counted"] < 0.25 else WRONG,
)
def _() -> dict:
    """LoRA r=8 on all linear layers over full fine-tuning: peak memory of a step and CPU seconds of the pocket model's
    runs on pirate, and for LLaMA-7B the bytes of weights, gradients and Adam's moments in bfloat16. Limited: more than
    half of the memory stays."""
    ours, full = (atlas.of(_runs(), "pirate", method) for method in (lora(8), Full()))
    llama = budget("llama-7b", LoRA(rank=8))
    small, whole = (training_bytes(llama.base, n, m) for n, m in ((llama.trainable, llama.trainable), (llama.base, 0)))
    return {
        "memory, pocket, measured": round(float(ours.peak_memory.mean() / full.peak_memory.mean()), 2),
        "seconds, pocket, measured": round(float(ours.seconds.mean() / full.seconds.mean()), 2),
        "memory, llama-7b, counted": round(sum(small.values()) / sum(whole.values()), 2),
        "gain, pocket, pirate": gain("pirate", lora(8)),
    }


def _article(f: dict) -> str:
    rates = all(5 <= f[f"{t}, best rate r=16 ÷ full"] <= 20 for t in TASKS)
    layers = f["pirate, attention only − MLPs only"] > 0.05
    if rates and layers:
        return HOLDS
    part = "layers, not learning rates" if layers else "learning rates, not layers"
    return f"holds when it speaks of {part}" if rates or layers else WRONG


@claim(
    "C33",
    "LoRA's best learning rate is about ten times full fine-tuning's, and LoRA for all layers beats attention only",
    "the article that E retells",
    "atlas",
    _article,
)
def _() -> dict:
    """Best rate of LoRA r=16 over that of full fine-tuning after 60 steps; the rates tried are a factor 3 apart, and 5
    to 20 counts as ten. And loss on pirate, each at its best rate: attention only (r=24) minus the MLPs only (r=16),
    which train equal numbers; more than 0.05 counts."""
    figures = {}
    for task in TASKS:
        ours, full = (atlas.best(_runs(), task, method)["lr"] for method in (lora(16), Full()))
        figures[f"{task}, best rate r=16 ÷ full"] = round(ours / full, 1)
    attention = atlas.best(_runs(), "pirate", lora(24, targets="attention"))["mean"]
    mlp = atlas.best(_runs(), "pirate", lora(16, targets="mlp"))["mean"]
    return figures | {"pirate, attention only − MLPs only": round(attention - mlp, 3)}


# ---------------------------------------------------------------------------------------------------------------------
# Measured anew
# ---------------------------------------------------------------------------------------------------------------------
@claim(
    "C07",
    "Both A and B drawn at random is a fine initialisation",
    "D §3.6.2",
    "measured",
    lambda f: WRONG if min(f["A and B random"]) > f["B = 0"] + 0.5 else HOLDS,
)
def _() -> dict:
    """Loss of the untrained model on its own stories, standard normal A and B, r=8, γ=1, three seeds."""
    from minipeft.learn.fit import evaluate
    from minipeft.world import load, plain

    model = load("pocket")[0]
    tuned = attach(model, LoRA(rank=8, gamma=1.0))
    losses = [evaluate(tuned, plain(), n=50).loss]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for layer in tuned.adapters["default"].values():
            layer.A.data = torch.randn(layer.A.shape, generator=generator)
            layer.B.data = torch.randn(layer.B.shape, generator=generator)
        losses.append(evaluate(tuned, plain(), n=50).loss)
    return {"B = 0": round(losses[0], 3), "A and B random": [round(x, 2) for x in losses[1:]]}


def _low(f: dict) -> str:
    tasks, chance = [f[t] for t in LANGUAGE], f["random"]
    energy = all(t["gain kept at r=8"] >= 0.85 and t["stable rank"] < chance["stable rank"] / 4 for t in tasks)
    wide = any(t["effective rank"] > chance["effective rank"] / 4 for t in tasks)
    if energy and wide:
        return "holds when rank means energy or loss; by effective rank the updates are wide"
    return HOLDS if energy else WRONG


@claim("C18", "Fine-tuning updates are low-rank", "E §4", "measured", _low)
def _() -> dict:
    """Full fine-tuning, 60 steps: median ranks of the linear layers' ΔW beside a random matrix's, and the share of the
    gain in loss that stays when each ΔW is cut to its best rank 8 (vectors keep their whole change)."""
    from minipeft.learn.fit import evaluate, fit
    from minipeft.learn.sweep import task_of
    from minipeft.world import load

    model, figures = load("pocket")[0], {}
    for name in LANGUAGE:
        task, before = task_of(name), evaluate(model, task_of(name), n=50).loss
        tuned = attach(model, Full())
        fit(tuned, task, steps=60, lr=1e-3, batch=10, progress=False)
        found, whole = spectra(tuned), evaluate(tuned, task, n=50).loss
        with truncated(tuned, 8, found):
            cut = evaluate(tuned, task, n=50).loss
        tuned.detach()
        linear = [s for path, s in found.items() if "layers" in path]
        figures[name] = {
            "stable rank": round(statistics.median(s.stable_rank for s in linear), 1),
            "effective rank": round(statistics.median(s.effective_rank for s in linear), 1),
            "gain kept at r=8": round((before - cut) / (before - whole), 3),
        }
    sigma = random_spectrum((128, 128), 1.0)
    share = sigma / sigma.sum()
    figures["random"] = {
        "stable rank": round(float((sigma**2).sum() / sigma[0] ** 2), 1),
        "effective rank": round(float(2 ** -(share * torch.tensor(share).log2().numpy()).sum()), 1),
    }
    return figures


def _comparable(f: dict) -> str:
    norms, losses = f["γ = α/r"]["‖ΔW‖"], f["γ = α/r"]["loss"]
    size, effect = max(norms) / min(norms) <= 2, max(losses) - min(losses) <= 0.25
    if size and effect:
        return HOLDS
    what = "norm, not effect on the loss" if size else "effect on the loss, not norm"
    return f"holds when size means {what}" if size or effect else WRONG


@claim("C20", "γ = α/r keeps the update's size comparable when r changes", "E §4", "measured", _comparable)
def _() -> dict:
    """‖ΔW‖, median over the matrices, and the training loss after 12 steps of pirate at one learning rate (0.003), for
    r = 1, 4, 16 and 64 with α = 16; mean of two seeds. Comparable: norms within a factor of two, losses within 0.25."""
    from minipeft.learn.fit import fit
    from minipeft.world import load, pirate

    model, figures = load("pocket")[0], {}
    for rule, power in (("γ = α/r", 1.0), ("γ = α/√r", 0.5)):
        figures[rule] = {"‖ΔW‖": [], "loss": []}
        for rank in (1, 4, 16, 64):
            norms, losses = [], []
            for seed in (0, 1):
                tuned = attach(model, LoRA(rank=rank, gamma=16 / rank**power), seed=seed)
                history = fit(tuned, pirate(), steps=12, lr=3e-3, batch=10, seed=seed, progress=False)
                norms.append(statistics.median(s.norm for s in spectra(tuned).values()))
                losses.append(history.losses[-1])
                tuned.detach()
            figures[rule]["‖ΔW‖"].append(round(statistics.fmean(norms), 2))
            figures[rule]["loss"].append(round(statistics.fmean(losses), 2))
    return figures


def _over(verdicts: dict[str, str], what: str) -> str:
    """One verdict of several: that of all, the cases in which the claim holds, or that none can be told."""
    if "holds" in verdicts.values():
        return only([name for name, said in verdicts.items() if said == "holds"], len(verdicts), what)
    return CANNOT_TELL if CANNOT_TELL in verdicts.values() else WRONG


def _less(f: dict) -> str:
    return _over({name: verdict(Interval(*found), 0.05) for name, found in f["full − this, 95 %"].items()}, "method")


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
    return _over({name: verdict(Interval(*found), 0.02) for name, found in f["harm, 95 %"].items()}, "combination")


@claim("C26", "An adapter should generally not be combined with LoRA or softmax tuning", "C §2.2", "measured", _harmful)
def _() -> dict:
    """Loss on pirate after 60 steps, each at the best of three rates (chosen with seed 0), three seeds. Harm is the
    combination's loss less that of its better part alone, by 0.02 nats or more, paired by seed; adapter m=4 with LoRA
    r=1 has the budget of either alone, and the output layer has more numbers than both."""
    from minipeft.learn.fit import evaluate, fit
    from minipeft.methods.adapter import Adapter
    from minipeft.world import load, pirate

    model = load("pocket")[0]

    def loss(method, lr, seed):
        tuned = attach(model, method, seed=seed)
        fit(tuned, pirate(), steps=60, lr=lr, batch=10, seed=seed, progress=False)
        value = evaluate(tuned, pirate(), n=100).loss
        tuned.detach()
        return value

    def best(method):
        first = {lr: loss(method, lr, 0) for lr in (3e-3, 1e-2, 3e-2)}
        lr = min(first, key=first.get)
        return [round(each, 3) for each in (first[lr], *(loss(method, lr, seed) for seed in (1, 2)))]

    adapter, low_rank, softmax = Adapter(8), lora(2), Softmax()
    alone = {"adapter": best(adapter), "LoRA": best(low_rank), "softmax": best(softmax)}
    together = {
        "adapter and LoRA, half each": (["adapter", "LoRA"], [Adapter(4), lora(1)]),
        "adapter and softmax": (["adapter", "softmax"], [adapter, softmax]),
        "LoRA and softmax": (["LoRA", "softmax"], [low_rank, softmax]),
    }
    tried = {name: {"of": of, "losses": best(method)} for name, (of, method) in together.items()}
    return {"alone": alone, "together": tried, "harm, 95 %": _harm(alone, tried)}


def _harm(alone: dict[str, list[float]], together: dict[str, dict]) -> dict[str, list[float]]:
    """{combination: [mean, low, high] of its losses less those of its better part}"""
    better = {name: min((alone[part] for part in each["of"]), key=statistics.fmean) for name, each in together.items()}
    return {name: [round(x, 3) for x in paired(each["losses"], better[name])] for name, each in together.items()}
