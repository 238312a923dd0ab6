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

from minipeft.whole import write_whole

FILE = Path(__file__).with_name("worlds.json")
SEEDS, CHOOSING = (0, 1, 2, 3, 4), 100  # the second is the seed with which a learning rate is chosen
RATES = (3e-4, 1e-3, 3e-3)


class Notes:
    """What is done already: {name: figures}, a file a run."""

    def __init__(self, folder: Path, report: Callable[[str], object] = print):
        self.folder, self.report = folder, report

    def get(self, name: str, run: Callable[[], dict]) -> dict:
        path = self.folder / f"{name.replace(' ', '_').replace('/', '-')}.json"
        if not path.exists():
            found = run()
            write_whole(path, json.dumps(found))
            self.report(f"{name}: {found}")
        return json.loads(path.read_text(encoding="utf-8"))

    def best_rate(self, name: str, loss: Callable[[float], float], rates=RATES) -> float:
        """The rate with the least loss; the row is widened while the best is at an end of it."""
        rates = list(rates)
        found = {lr: self.get(f"{name} rate {lr:g}", lambda lr=lr: {"loss": loss(lr)})["loss"] for lr in rates}
        while (best := min(rates, key=found.get)) in (rates[0], rates[-1]) and 1e-5 < best < 1:
            new = beside(best, down=best == rates[0])
            rates = sorted([*rates, new])
            found[new] = self.get(f"{name} rate {new:g}", lambda lr=new: {"loss": loss(lr)})["loss"]
        return best


def beside(rate: float, down: bool) -> float:
    """Half a decade further: 1e-2 → 3e-2 → 1e-1, or down."""
    mantissa, exponent = f"{rate:.0e}".split("e")
    return float(f"3e{int(exponent) - down}" if mantissa == "1" else f"1e{int(exponent) + 1 - down}")


# Domains: from films to tweets, products and editorials, with few labelled sentences ----------------------------------
SOURCE, TARGETS, SIZES = "films", ("tweets", "products", "editorials"), (16, 64, 256)
SOURCE_STEPS, STEPS, TESTED = 150, 40, 300
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


def adapt(domain: str, size: int | None, steps: int, lr: float, seed: int, split: str, before=None) -> tuple[dict, dict]:
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
    """Accuracy on each target: the source's adapter as it is, adapted with k sentences, and k sentences alone."""
    rate = notes.best_rate(
        "domains source", lambda lr: adapt(SOURCE, None, SOURCE_STEPS, lr, CHOOSING, "validation")[0]["loss"]
    )
    sources: dict[int, dict] = {}

    def source(seed: int) -> dict:
        if seed not in sources:
            sources.clear()
            sources[seed] = adapt(SOURCE, None, SOURCE_STEPS, rate, seed, "test")[1]
        return sources[seed]

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
            )
    runs = []
    for seed in SEEDS:
        own = notes.get(
            f"domains source {seed}", lambda s=seed: adapt(SOURCE, None, 0, rate, s, "test", source(s))[0]
        )
        runs.append({"domain": SOURCE, "arm": "from films", "size": 0, "seed": seed} | own)
        for domain in TARGETS:
            for arm, size in [("from films", 0), *((arm, size) for size in SIZES for arm in arms)]:

                def run(domain=domain, arm=arm, size=size, seed=seed) -> dict:
                    steps, lr = (STEPS, rates[arm, size]) if size else (0, 1.0)
                    return adapt(domain, size, steps, lr, seed, "test", before(arm, seed))[0]

                figures = notes.get(f"domains {domain} {arm} {size} {seed}", run)
                runs.append({"domain": domain, "arm": arm, "size": size, "seed": seed} | figures)
    named = {f"{arm}, {size}": lr for (arm, size), lr in rates.items()}
    return {"source rate": rate, "rates": named, "steps": STEPS, "runs": runs}


PARTS: dict[str, Callable[[Notes], dict]] = {"domains": domains}


def measure(notes: Notes, parts=PARTS) -> Iterator[tuple[str, dict]]:
    import torch

    torch.set_num_threads(1)
    for name in parts:
        started = time.process_time()
        found = PARTS[name](notes)
        yield name, found | {
            "measured": {
                "device": "CPU, 1 thread",
                "torch": torch.__version__,
                "python": platform.python_version(),
                "date": date.today().isoformat(),
                "CPU seconds": round(time.process_time() - started),
            }
        }


def measured() -> dict:
    """What `measure` found when the course was made, by part."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def spread(values: list[float]) -> str:
    """The mean over the seeds with the least and the largest, for a table."""
    return f"{statistics.fmean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


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
