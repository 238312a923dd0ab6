"""Changing worlds, measured once and shipped: `python -m minipeft.course.worlds --folder runs` writes `worlds.json`.

Every part is a list of runs. A finished run has a small file in the folder, so whoever kills the script starts it again
and it goes on. Learning rates are the best of a row, half a decade apart, on validation rows and with a seed that no
reported run has; the row grows until its best lies inside.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path

from minipeft.course.notes import Notes, measure

FILE = Path(__file__).with_name("worlds.json")
SEEDS, CHOOSING = (0, 1, 2, 3, 4), 100  # the second is the seed with which a learning rate is chosen


# Drift: pirate, then forecasts, then pirate again -------------------------------------------------------------------
LENGTHS, BATCH, THRESHOLDS = (20, 20, 10), 8, (0.25, 0.5, 1.0, 2.0, 4.0)


def meet(way: str, lr: float, seed: int) -> dict:
    """One way through the stream: the prequential losses, alarms, adapters, and what is kept at the end."""
    from minipeft.learn.stream import follow, forgetting, regimes
    from minipeft.methods.lora import LoRA
    from minipeft.world import corpus, tasks
    from minipeft.world.base import load

    tested = {"pirate": tasks.pirate, "forecast": tasks.forecast}
    worlds = [tasks.pirates(), corpus.forecasts(), tasks.pirates()]
    found = follow(load("pocket")[0], LoRA(rank=4), regimes(worlds, LENGTHS, BATCH, seed), way, lr, seed=seed)
    tests = {name: make(600, 100, 91).data["test"].select(range(50)) for name, make in tested.items()}
    kept = forgetting(found, tests)
    return {"losses": found.losses, "alarms": found.alarms, "used": found.used, "kept": kept}


def still(seed: int) -> dict:
    """The losses of an adapter on a stream that does not change, so that every alarm is false."""
    from minipeft.learn.stream import follow, regimes
    from minipeft.methods.lora import LoRA
    from minipeft.world import tasks
    from minipeft.world.base import load

    return {"losses": follow(load("pocket")[0], LoRA(rank=4), regimes([tasks.pirates()], [50], BATCH, seed)).losses}


def drift(notes: Notes) -> dict:
    from minipeft.learn.stream import WAYS

    rates, runs = {"frozen": 1e-2}, []
    for way in WAYS[1:]:
        rates[way] = notes.best_rate(
            f"drift {way}", lambda lr, w=way: statistics.fmean(meet(w, lr, CHOOSING)["losses"]), (3e-3, 1e-2, 3e-2)
        )
    for seed in SEEDS:
        for way in WAYS:
            found = notes.get(f"drift {way} {seed}", lambda w=way, s=seed: meet(w, rates[w], s))
            runs.append({"way": way, "seed": seed} | found)
    quiet = [notes.get(f"drift still {seed}", lambda s=seed: still(200 + s))["losses"] for seed in range(5)]
    return {"rates": rates, "lengths": LENGTHS, "batch": BATCH, "runs": runs, "still": quiet}


# Domains: from films to tweets, products and editorials, with few labelled sentences ----------------------------------
SOURCE, TARGETS, SIZES, ARMS = "films", ("tweets", "products", "editorials"), (16, 64, 256), ("from films", "alone")
SOURCE_STEPS, STEPS, SENTENCES, TESTED, DOMAIN_RATES = 60, 20, 8, 200, (1e-3,)


@cache
def reader():
    """MiniLM with LoRA r=8 in its last layer and a classifier on the mean of its tokens."""
    from minipeft.attach import attach
    from minipeft.course.upper import Upper
    from minipeft.methods.lora import LoRA
    from minipeft.methods.select import Full

    linear = re.compile(r"above\..*(query|key|value|dense)")
    head = Full(targets=["classifier.weight", "classifier.bias"])
    return attach(Upper(below=5), [LoRA(rank=8, targets=linear), head])


@cache
def sentences(domain: str, seed: int):
    from minipeft.world.real import reviews

    return reviews(domain, seed=seed, test=TESTED, validation=TESTED)


def adapt(domain: str, size: int | None, steps: int, lr: float, seed: int, split: str, before: dict | None) -> dict:
    """Train on `size` sentences (None: as many as the steps see) from the numbers `before` or a fresh start; score."""
    import torch

    from minipeft.learn.fit import evaluate, fit
    from minipeft.world.real import majority_rate

    tuned, data = reader(), sentences(domain, seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in tuned.layers():
        if layer.slots:
            layer.value.data.zero_()
        else:
            layer.start("kaiming", generator)
            layer.B.data.zero_()
    if before:
        tuned.load_state_dict(before)
    if steps:
        rows = data["train"].select(range(size or SENTENCES * steps))
        fit(tuned, rows, steps=steps, lr=lr, batch=SENTENCES, seed=seed, progress=False)
    score = evaluate(tuned, data, split)
    return {"loss": score.loss, "accuracy": score.accuracy, "majority": majority_rate(data[split]), "n": score.n}


def domains(notes: Notes) -> dict:
    """Accuracy on each target domain: the films' adapter as it is, adapted with k sentences, and k sentences alone. The
    rates are chosen on validation rows of the products, with 64 sentences; a seed draws the sentences of both domains
    and their order."""
    rate = notes.best_rate(
        "domains source", lambda lr: adapt(SOURCE, None, SOURCE_STEPS, lr, CHOOSING, "validation", None)["loss"],
        DOMAIN_RATES,
    )  # fmt: skip

    @cache
    def source(seed: int) -> dict:
        adapt(SOURCE, None, SOURCE_STEPS, rate, seed, "test", None)
        return {name: value.clone() for name, value in reader().state_dict().items()}

    def run(domain: str, arm: str, size: int, lr: float, seed: int, split: str) -> dict:
        before = source(seed) if arm == "from films" else None
        return adapt(domain, size or None, STEPS if size else 0, lr, seed, split, before)

    runs = []
    rates = {
        arm: notes.best_rate(
            f"domains {arm}",
            lambda lr, a=arm: run("products", a, 64, lr, CHOOSING, "validation")["loss"],
            DOMAIN_RATES,
        )
        for arm in ARMS
    }
    for seed in SEEDS:
        for domain, arm, size in [(SOURCE, ARMS[0], 0)] + [
            (d, a, n) for d in TARGETS for n in (0, *SIZES) for a in ARMS if n or a == ARMS[0]
        ]:
            figures = notes.get(
                f"domains {domain} {arm} {size} {seed}",
                lambda d=domain, a=arm, n=size, s=seed: run(d, a, n, rates[a], s, "test"),
            )
            runs.append({"domain": domain, "arm": arm, "size": size, "seed": seed} | figures)
    return {"source rate": rate, "rates": rates, "steps": STEPS, "source steps": SOURCE_STEPS, "runs": runs}


# Sites: four clients with a dialect each, and six ways to average -----------------------------------------------------
CLIENTS, ROWS, ROUNDS, LOCAL, SCORED = 4, 40, 3, 5, 100
SITE_RATES = (3e-2,)


@cache
def dialects(split: str, seed: int) -> list:
    """Rows of pirate stories and of forecasts. Validation and test rows are of seeds that no training has."""
    from minipeft.world import tasks

    makers = (tasks.pirate, tasks.forecast)
    if split == "train":
        return [make(400, 10, 50 + seed).data["train"] for make in makers]
    return [make(10, SCORED, 90 if split == "validation" else 91).data["test"] for make in makers]


def both(model, split: str) -> float:
    """The mean loss on the two dialects, in nats a token."""
    from minipeft.learn.fit import evaluate

    return statistics.fmean(evaluate(model, rows).loss for rows in dialects(split, 0))


def site(rule: str, difference: float, lr: float, seed: int, split: str) -> dict:
    """One federation of ROUNDS rounds, or "pooled": one place trains on all rows, in CLIENTS times larger batches."""
    from datasets import concatenate_datasets

    from minipeft.attach import attach
    from minipeft.learn.federated import federate, parted
    from minipeft.learn.fit import fit
    from minipeft.learn.plan import Plan
    from minipeft.methods.lora import LoRA
    from minipeft.world.base import load

    model, plan = load("pocket")[0], Plan(steps=LOCAL, lr=lr, batch=8, seed=seed)
    clients = parted(dialects("train", seed), CLIENTS, difference, ROWS, seed)
    if rule == "pooled":
        tuned = attach(model, LoRA(rank=4), seed=seed)
        rows = concatenate_datasets([client.data for client in clients])
        fit(tuned, rows, steps=ROUNDS * LOCAL, lr=lr, batch=8 * CLIENTS, seed=seed, progress=False)
        return {"loss": both(tuned, split)}
    done = federate(model, LoRA(rank=4), clients, rule, ROUNDS, plan)
    up, down = (sum(values) for values in zip(*((r.up["site 1"], r.down) for r in done.rounds), strict=True))
    return {"loss": both(done.tuned(model), split), "missed": done.rounds[-1].missed, "up": up, "down": down}


def sites(notes: Notes) -> dict:
    """The loss on both dialects after three rounds of five local steps, by rule, each at its own best rate."""
    from minipeft.learn.averaging import RULES
    from minipeft.world.base import load

    before = notes.get("sites before", lambda: {"loss": both(load("pocket")[0], "test")})["loss"]
    rules, runs, rates = ("pooled", *RULES), [], {}
    for rule in rules:
        rates[rule] = notes.best_rate(
            f"sites {rule}", lambda lr, rule=rule: site(rule, 1.0, lr, CHOOSING, "validation")["loss"], SITE_RATES
        )
    for seed in SEEDS:
        for rule in rules:
            found = notes.get(f"sites {rule} {seed}", lambda r=rule, s=seed: site(r, 1.0, rates[r], s, "test"))
            runs.append({"rule": rule, "seed": seed} | found)
    return {"before": before, "rates": rates, "runs": runs, "clients": CLIENTS, "rounds": ROUNDS, "local": LOCAL}


# Privacy: one round, clipped and noised ------------------------------------------------------------------------------
EXPONENTS, STEPS_AT_HOME = (-2.5, -2.0, -1.5, -1.0), 15  # σ = 10^k
SPENT = [k / 2 for k in range(-5, 5)]  # of the σ whose ε is stored


@cache
def learnt(lr: float, seed: int) -> tuple:
    """(the state before the round, what four sites of one mixture send after training B at rank 1, in the clear)."""
    from minipeft.learn.averaging import RULES
    from minipeft.learn.federated import State, fresh, parted, train
    from minipeft.learn.plan import Plan
    from minipeft.methods.lora import LoRA
    from minipeft.world.base import load

    model, method, plan = load("pocket")[0], LoRA(rank=1), Plan(steps=STEPS_AT_HOME, lr=lr, batch=8, seed=seed)
    state = State(fresh(model, method, seed))
    clients = parted(dialects("train", seed), CLIENTS, 0.0, ROWS, seed)
    return state, [train(model, method, state, client, RULES["ffa"], plan) for client in clients]


def hidden(lr: float, clip: float, exponent: int | None, seed: int, split: str) -> dict:
    """The loss after the round, when each site clips its change to length `clip` and adds noise of σ = 10^exponent."""
    from dataclasses import replace

    from minipeft.learn.averaging import RULES
    from minipeft.learn.federated import Privacy, aggregate, seated
    from minipeft.methods.lora import LoRA
    from minipeft.world.base import load

    state, sent = learnt(lr, seed)
    privacy, noisy = Privacy(clip, 0.0 if exponent is None else 10.0**exponent, seed), []
    for update in sent:
        change = privacy.hide({n: t - state.numbers[n] for n, t in update.numbers.items()}, update.name, 0)
        noisy.append(replace(update, numbers={n: state.numbers[n] + t for n, t in change.items()}))
    after, _ = aggregate(state, noisy, RULES["ffa"])
    return {"loss": both(seated(load("pocket")[0], LoRA(rank=1), after), split)}


def privacy(notes: Notes) -> dict:
    """FFA-LoRA at rank 1, one round of 15 steps at home on four sites of one mixture. The rate is chosen without noise,
    the clip at the second noise, on validation rows. What counts is the noise of the mean, σ/√n: a hundred times the
    sites with ten times the noise are the same point, as long as their mean change is the same. ε is that of a site."""
    from minipeft.learn.federated import epsilon

    lr = notes.best_rate("hidden", lambda lr: hidden(lr, 1e6, None, CHOOSING, "validation")["loss"], (3e-2,))
    clip = notes.best_rate(
        "hidden clip", lambda clip: hidden(lr, clip, EXPONENTS[1], CHOOSING, "validation")["loss"], (10.0,)
    )
    runs = [
        {"rank": 1, "exponent": k, "seed": seed}
        | notes.get(f"hidden {k} {seed}", lambda k=k, s=seed: hidden(lr, clip, k, s, "test"))
        for seed in SEEDS
        for k in (None, *EXPONENTS)
    ]
    spent = {str(k): epsilon(10.0**k, 1) for k in SPENT}
    return {"rate": lr, "clip": clip, "epsilon": spent, "runs": runs, "clients": CLIENTS, "steps": STEPS_AT_HOME}


PARTS: dict[str, Callable[[Notes], dict]] = {"drift": drift, "domains": domains, "sites": sites, "privacy": privacy}


def measured() -> dict:
    """What was found when the course was made, by part."""
    return json.loads(FILE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    measure(FILE, PARTS, __doc__.splitlines()[0])
