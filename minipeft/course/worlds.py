"""Changing worlds, measured once and shipped: `python -m minipeft.course.worlds --folder runs` writes `worlds.json`.

Every part is a list of runs. A finished run has a small file in the folder, so whoever kills the script starts it again
and it goes on. Learning rates are the best of a row, half a decade apart, on validation rows and with a seed that no
reported run has; the row grows until its best lies inside.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import cache
from pathlib import Path

from minipeft.course.notes import Notes
from minipeft.whole import write_whole

FILE = Path(__file__).with_name("worlds.json")
SEEDS, CHOOSING = (0, 1, 2, 3, 4), 100  # the second is the seed with which a learning rate is chosen


# Domains: from films to tweets, products and editorials, with few labelled sentences ----------------------------------
SOURCE, TARGETS, SIZES = "films", ("tweets", "products", "editorials"), (16, 64, 256)
SOURCE_STEPS, STEPS, TESTED = 150, 40, 300
RATES = (3e-4, 1e-3, 3e-3)
BELOW = 4  # of MiniLM's six layers are below every adapter


def upper():
    """MiniLM as a classifier of the mean of its tokens, whose frozen layers below the first adapter are computed once
    for each sentence: they give the same every time. The head starts at zero."""
    from types import SimpleNamespace

    import torch
    from torch import nn

    from minipeft.world.base import load

    class Upper(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.config, self.tokenizer = model.config, model.tokenizer
            self.below = nn.ModuleList([model.bert.embeddings, *model.bert.encoder.layer[:BELOW]])
            self.layer = model.bert.encoder.layer[BELOW:]
            self.classifier = nn.Linear(model.config.hidden_size, model.config.num_labels)
            nn.init.zeros_(self.classifier.weight), nn.init.zeros_(self.classifier.bias)
            self.known: dict[tuple[int, ...], torch.Tensor] = {}

        def run(self, layers, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden = torch.zeros(mask.shape).masked_fill(mask == 0, torch.finfo(torch.float32).min)[:, None, None]
            for layer in layers:
                found = layer(states, attention_mask=hidden)
                states = found[0] if isinstance(found, tuple) else found
            return states

        @torch.no_grad()
        def learn(self, keys: list, input_ids: torch.Tensor, mask: torch.Tensor) -> None:
            embeddings, *layers = self.below
            states = self.run(layers, embeddings(input_ids=input_ids), mask)
            self.known |= {key: row[: len(key)].clone() for key, row in zip(keys, states, strict=True)}

        def forward(self, input_ids, attention_mask, labels=None):
            keys = [tuple(ids[m == 1].tolist()) for ids, m in zip(input_ids, attention_mask, strict=True)]
            if any(key not in self.known for key in keys):
                self.learn(keys, input_ids, attention_mask)
            states = nn.utils.rnn.pad_sequence([self.known[key] for key in keys], batch_first=True)
            mask = attention_mask[:, : states.shape[1]]
            states = self.run(self.layer, states, mask)
            logits = self.classifier((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return SimpleNamespace(loss=loss, logits=logits)

    return Upper(load("minilm", labels=2)[0]).eval()


@cache
def encoder():
    import re

    from minipeft.attach import attach
    from minipeft.methods.lora import LoRA
    from minipeft.methods.select import Full

    linear = re.compile(r"layer\..*(query|key|value|dense)")
    return attach(upper(), [LoRA(rank=8, targets=linear), Full(targets=["classifier.weight", "classifier.bias"])])


def start(tuned, seed: int) -> None:
    """A fresh adapter, and a head of zeros."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for layer in tuned.layers():
        if layer.slots:
            layer.value.data.zero_()
        else:
            layer.start("kaiming", generator)
            layer.B.data.zero_()


def adapt(
    domain: str, size: int | None, steps: int, lr: float, seed: int, split: str, before=None
) -> tuple[dict, dict]:
    """Trains from `before` (a state, or a fresh start) on `size` sentences and scores: (figures, the state after)."""
    from minipeft.learn.fit import evaluate, fit
    from minipeft.world.real import majority_rate, reviews

    tuned, data = encoder(), reviews(domain, seed=seed, train=size or None)
    if before is None:
        start(tuned, seed)
    else:
        tuned.load_state_dict(before)
    if steps:
        fit(tuned, data, steps=steps, lr=lr, seed=seed, progress=False)
    rows = data[split].select(range(min(TESTED, len(data[split]))))
    score = evaluate(tuned, rows)
    state = {name: value.clone() for name, value in tuned.state_dict().items()}
    return {"loss": score.loss, "accuracy": score.accuracy, "majority": majority_rate(rows), "n": score.n}, state


def domains(notes: Notes) -> dict:
    """Accuracy on each target: the source's adapter as it is, adapted with k sentences, and k sentences alone. There is
    one adapter of the source; the seeds draw the target's sentences, their order, and the fresh adapters."""
    rate = notes.best_rate(
        "domains source", lambda lr: adapt(SOURCE, None, SOURCE_STEPS, lr, CHOOSING, "validation")[0]["loss"], RATES
    )

    @cache
    def source(seed: int) -> dict:
        return adapt(SOURCE, None, SOURCE_STEPS, rate, seed, "test")[1]

    def before(arm: str, seed: int):
        return source(seed) if arm == "from films" else None

    arms, rates = ("from films", "alone"), {}
    for arm in arms:
        for size in SIZES:
            rates[arm, size] = notes.best_rate(
                f"domains {arm} {size}",
                lambda lr, arm=arm, size=size: adapt(
                    "products", size, STEPS, lr, CHOOSING, "validation", before(arm, CHOOSING)
                )[0]["loss"],
                RATES,
            )
    runs, own = [], notes.get("domains source", lambda: adapt(SOURCE, None, 0, rate, 0, "test", source(0))[0])
    known = {
        d: notes.get(f"domains {d} none", lambda d=d: adapt(d, None, 0, rate, 0, "test", source(0))[0]) for d in TARGETS
    }
    for seed in SEEDS:
        for domain in TARGETS:
            runs.append({"domain": domain, "arm": "from films", "size": 0, "seed": seed} | known[domain])
            for arm, size in [(arm, size) for size in SIZES for arm in arms]:

                def run(domain=domain, arm=arm, size=size, seed=seed) -> dict:
                    return adapt(domain, size, STEPS, rates[arm, size], seed, "test", before(arm, 0))[0]

                figures = notes.get(f"domains {domain} {arm} {size} {seed}", run)
                runs.append({"domain": domain, "arm": arm, "size": size, "seed": seed} | figures)
    named = {f"{arm}, {size}": lr for (arm, size), lr in rates.items()}
    return {"source rate": rate, "source": own, "rates": named, "steps": STEPS, "runs": runs}


# Sites: four clients, alike or with a dialect each, and six ways to average ------------------------------------------
CLIENTS, ROWS, ROUNDS, LOCAL = 4, 40, 3, 5
SITE_RATES = (1e-2, 3e-2, 1e-1)


def dialects(split: str, seed: int, n: int | None = None):
    """Pirate stories and forecasts, as two pools of rows. Validation rows are of a seed that no training has."""
    from minipeft.world import tasks

    pools = [make(600, 100, 50 + seed if split == "train" else 90 + (split == "test")) for make in
             (tasks.pirate, tasks.forecast)]  # fmt: skip
    rows = [task.data["train" if split == "train" else "test"] for task in pools]
    return [each.select(range(n)) for each in rows] if n else rows


def both(model, split: str) -> float:
    """The mean loss on the two dialects, in nats a token, on 50 rows of each."""
    from minipeft.learn.fit import evaluate

    return statistics.fmean(evaluate(model, rows).loss for rows in dialects(split, 0, 50))


def site(rule: str, difference: float, lr: float, seed: int, split: str, privacy=None, rank: int = 4) -> dict:
    from minipeft.learn.federated import federate, parted
    from minipeft.learn.plan import Plan
    from minipeft.methods.lora import LoRA
    from minipeft.world.base import load

    model, plan = load("pocket")[0], Plan(steps=LOCAL, lr=lr, batch=8, seed=seed)
    clients = parted(dialects("train", seed), CLIENTS, difference, ROWS, seed)
    if rule == "pooled":
        from datasets import concatenate_datasets

        from minipeft.attach import attach
        from minipeft.learn.fit import fit

        tuned = attach(model, LoRA(rank=rank), seed=seed)
        rows = concatenate_datasets([client.data for client in clients])
        fit(tuned, rows, steps=ROUNDS * LOCAL, lr=lr, batch=8 * CLIENTS, seed=seed, progress=False)
        return {"loss": both(tuned, split)}
    done = federate(model, LoRA(rank=rank), clients, rule, ROUNDS, plan, privacy=privacy)
    last = done.rounds[-1]
    up, down = (sum(values) for values in zip(*((r.up[clients[0].name], r.down) for r in done.rounds), strict=True))
    return {"loss": both(done.tuned(model), split), "missed": last.missed, "up": up, "down": down}


def sites(notes: Notes) -> dict:
    """Loss on both dialects together after three rounds of five local steps; "pooled" trains in one place on all rows,
    in batches four times as large."""
    from minipeft.learn.averaging import RULES
    from minipeft.world.base import load

    rules, runs, rates = ("pooled", *RULES), [], {}
    before = notes.get("sites before", lambda: {"loss": both(load("pocket")[0], "test")})["loss"]
    for rule in rules:
        rates[rule] = notes.best_rate(
            f"sites {rule}", lambda lr, rule=rule: site(rule, 1.0, lr, CHOOSING, "validation")["loss"], SITE_RATES
        )
    for seed in SEEDS:
        for rule in rules:
            found = notes.get(
                f"sites {rule} 1 {seed}", lambda r=rule, s=seed: site(r, 1.0, rates[r], s, "test")
            )
            runs.append({"rule": rule, "seed": seed} | found)
    return {"before": before, "rates": rates, "runs": runs, "clients": CLIENTS, "rounds": ROUNDS, "local": LOCAL}


# Privacy: the same, with noise ---------------------------------------------------------------------------------------
CLIP, NOISES = 1.0, (0.0, 3e-3, 3e-2)


def privacy(notes: Notes) -> dict:
    """FFA-LoRA, clipped to length 1 and noised, at rank 1 and 8, and ε for each noise (None: no promise)."""
    from minipeft.learn.federated import Privacy, epsilon

    runs, rates = [], {}
    for rank in (1, 8):
        rates[rank] = notes.best_rate(
            f"privacy {rank}",
            lambda lr, rank=rank: site("ffa", 0.0, lr, CHOOSING, "validation", Privacy(CLIP, 0.0), rank)["loss"],
            SITE_RATES,
        )
    for seed in SEEDS:
        for rank in (1, 8):
            for noise in NOISES:
                found = notes.get(
                    f"privacy {rank} {noise:g} {seed}",
                    lambda n=noise, r=rank, s=seed: site("ffa", 0.0, rates[r], s, "test", Privacy(CLIP, n, s), r),
                )
                runs.append({"rank": rank, "noise": noise, "seed": seed, "loss": found["loss"]})
    spent = {f"{noise:g}": epsilon(noise, ROUNDS) if noise else None for noise in NOISES}
    return {"clip": CLIP, "rates": {str(r): lr for r, lr in rates.items()}, "epsilon": spent, "runs": runs}


# Drift: pirate, then forecasts, then pirate again -------------------------------------------------------------------
LENGTHS, BATCH, THRESHOLDS = (20, 20, 10), 8, (0.25, 0.5, 1.0, 2.0, 4.0)


def meet(way: str, lr: float, seed: int) -> dict:
    """One way through the stream: the prequential losses, alarms, adapters, and what is kept at the end."""
    from minipeft.learn.stream import follow, forgetting, regimes
    from minipeft.methods.lora import LoRA
    from minipeft.world import corpus, tasks
    from minipeft.world.base import load

    worlds = [tasks.pirates(), corpus.forecasts(), tasks.pirates()]
    found = follow(load("pocket")[0], LoRA(rank=4), regimes(worlds, LENGTHS, BATCH, seed), way, lr, seed=seed)
    kept = forgetting(found, {"pirate": dialects("test", 0, 50)[0], "forecast": dialects("test", 0, 50)[1]})
    return {"losses": found.losses, "alarms": found.alarms, "used": found.used, "kept": kept}


def still(way: str, seed: int) -> dict:
    """The losses on a stream that does not change, so that every alarm is false."""
    from minipeft.learn.stream import follow, regimes
    from minipeft.methods.lora import LoRA
    from minipeft.world import tasks
    from minipeft.world.base import load

    return {
        "losses": follow(load("pocket")[0], LoRA(rank=4), regimes([tasks.pirates()], [50], BATCH, seed), way).losses
    }


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
    quiet = {
        way: [notes.get(f"drift still {way} {s}", lambda w=way, s=s: still(w, 200 + s))["losses"] for s in range(5)]
        for way in ("frozen", "one")
    }
    return {"rates": rates, "lengths": LENGTHS, "batch": BATCH, "runs": runs, "still": quiet}


# Tasks: together, apart, summed --------------------------------------------------------------------------------------
def several(split: str) -> dict:
    from minipeft.world import tasks

    names = {"pirate": tasks.pirate, "forecast": tasks.forecast, "flip": tasks.flip}
    return {name: make(2000, 200, 0 if split == "test" else 95) for name, make in names.items()}


def together(arrangement: str, lr: float, seed: int, split: str) -> dict:
    """{task: loss on 100 rows} of separate adapters each on its own task, of their sum, their mean, and of one joint
    adapter of three times the rank: equal numbers, equal batches."""
    from minipeft.learn import multitask
    from minipeft.learn.plan import Plan
    from minipeft.methods.lora import LoRA
    from minipeft.world.base import load

    training, scored = several("test"), several(split)
    model, plan = load("pocket")[0], Plan(steps=40, lr=lr, batch=10, seed=seed)
    if arrangement == "joint":
        return {"joint": multitask.losses(multitask.joint(model, LoRA(rank=12), training, plan), scored, 100)}
    tuned, found = multitask.separate(model, LoRA(rank=4), training, plan), {}
    found["separate"] = {}
    for name in scored:
        tuned.use(name)
        found["separate"] |= multitask.losses(tuned, {name: scored[name]}, 100)
    for label, alpha in (("summed", 1.0), ("mean", 1 / 3)):
        with multitask.weighted(tuned, dict.fromkeys(scored, alpha)):
            found[label] = multitask.losses(tuned, scored, 100)
    return found


def tasks(notes: Notes) -> dict:
    from minipeft.learn.multitask import losses
    from minipeft.world.base import load

    rates, runs = {}, []
    for which in ("separate", "joint"):
        rates[which] = notes.best_rate(
            f"tasks {which}",
            lambda lr, w=which: statistics.fmean(together(w, lr, CHOOSING, "validation")[w].values()),
            SITE_RATES,
        )
    for seed in SEEDS:
        for which in rates:
            found = notes.get(f"tasks {which} {seed}", lambda w=which, s=seed: together(w, rates[w], s, "test"))
            runs += [{"arrangement": name, "seed": seed} | each for name, each in found.items()]
    before = notes.get("tasks before", lambda: losses(load("pocket")[0], several("test"), 100))
    return {"rates": rates, "before": before, "floors": {n: t.floor for n, t in several("test").items()}, "runs": runs}


PARTS: dict[str, Callable[[Notes], dict]] = {
    "drift": drift, "sites": sites, "tasks": tasks, "privacy": privacy, "domains": domains,
}  # fmt: skip


def measure(notes: Notes, parts=PARTS) -> Iterator[tuple[str, dict]]:
    import torch

    torch.set_num_threads(1)
    for name in parts:
        started = time.process_time()
        found = PARTS[name](notes)
        yield (
            name,
            found
            | {
                "measured": {
                    "device": "CPU, 1 thread",
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                    "date": date.today().isoformat(),
                    "CPU seconds": round(time.process_time() - started),
                }
            },
        )


def measured() -> dict:
    """What `measure` found when the course was made, by part."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where each finished run is kept")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    options = parser.parse_args()
    for name, found in measure(Notes(options.folder, lambda text: print(text, flush=True)), options.parts):
        whole = measured() if FILE.exists() else {}
        write_whole(FILE, json.dumps(whole | {name: found}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
