"""Real reviews under small changes, measured once and shipped: `python -m minipeft.course.shaken --folder runs`.

MiniLM with LoRA r=8 and a new classifier learns 128 film snippets of at most 12 words, plainly or with FGM. Then 100
test snippets are asked as they are and under attack: synonyms for every replaceable word, a paraphrase by rule, FGM,
and PGD of three steps. Either training has its own learning rate, the best on clean validation rows with a seed that
reports nothing; five seeds draw the rows, their order and the initial values.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date
from functools import cache, partial
from pathlib import Path

from minipeft.course.notes import Notes
from minipeft.learn.protocol import SEARCH_SEED, SEEDS
from minipeft.whole import write_whole
from minipeft.world.words import paraphrase, synonyms

FILE = Path(__file__).with_name("shaken.json")
ROWS, HELD_OUT, WORDS, STEPS, BATCH, RATES = 128, 100, 12, 32, 8, (3e-4, 1e-3, 3e-3)
EPSILON = 0.1  # the length of a text's shift; a token's embedding has length 1.07 in the mean
TRAININGS = ("plain", "FGM")
ATTACKS = ("none", "synonyms", "rules", "FGM", "PGD")


@cache
def snippets(seed: int):
    """Film snippets of at most WORDS words; `seed` draws the training rows, the others are always the same."""
    from minipeft.world.real import reviews
    from minipeft.world.tasks import Task

    data = reviews("films", seed=seed).filter(lambda row: len(row["text"].split()) <= WORDS)
    for name in data:
        data[name] = data[name].select(range(ROWS if name == "train" else HELD_OUT))
    return Task("film snippets", "class", data, metric="accuracy", classes=("negative", "positive"))


@cache
def known() -> frozenset[str]:
    """The encoder's own words: a synonym that it reads in pieces would be another kind of attack."""
    from minipeft.world.base import load

    return frozenset(word for word in load("minilm", labels=2)[1].get_vocab() if word.isalpha())


def learn(training: str, lr: float, seed: int):
    """The encoder, tuned in one of the TRAININGS."""
    from minipeft.attach import attach
    from minipeft.learn.fit import fit
    from minipeft.learn.robust import Adversarial
    from minipeft.methods.lora import LoRA
    from minipeft.methods.select import Softmax
    from minipeft.world.base import load

    rows = snippets(seed).data["train"]
    tuned = attach(load("minilm", labels=2)[0], [LoRA(rank=8), Softmax()], seed=seed)
    objective = Adversarial(EPSILON) if training == "FGM" else None
    fit(tuned, rows, STEPS, lr, BATCH, seed, progress=False, objective=objective)
    return tuned


def ask(tuned, seed: int) -> dict[str, float]:
    """{attack: accuracy} on the test rows."""
    from minipeft.learn.fit import evaluate
    from minipeft.learn.robust import under_attack

    task = snippets(seed)
    changed = {
        "synonyms": task.data["test"].map(lambda row: {"text": synonyms(row["text"], 1.0, 0, known())}),
        "rules": task.data["test"].map(lambda row: {"text": paraphrase(row["text"])}),
    }
    return {
        "none": evaluate(tuned, task).accuracy,
        **{name: evaluate(tuned, rows).accuracy for name, rows in changed.items()},
        "FGM": under_attack(tuned, task, EPSILON).accuracy,
        "PGD": under_attack(tuned, task, EPSILON, steps=3).accuracy,
    }


def measure(notes: Notes) -> dict:
    import torch
    from datasets import disable_progress_bars

    from minipeft.learn.fit import evaluate
    from minipeft.world.real import majority_rate

    disable_progress_bars()
    torch.set_num_threads(1)
    test = snippets(0).data["test"]["text"]
    changes = {"synonyms": partial(synonyms, share=1.0, known=known()), "rules": paraphrase}
    result = {
        "changed": {name: sum(change(text, seed=0) != text for text in test) for name, change in changes.items()},
        "majority": majority_rate(snippets(0).data["test"]),
        "epsilon": EPSILON, "n": HELD_OUT, "rates": {}, "runs": [],
    }  # fmt: skip
    for training in TRAININGS:
        result["rates"][training] = notes.best_rate(
            f"shaken {training}",
            lambda lr, t=training: evaluate(learn(t, lr, SEARCH_SEED), snippets(SEARCH_SEED), "validation").loss,
            RATES,
        )
    for seed in SEEDS:
        for training, lr in result["rates"].items():
            found = notes.get(f"shaken {training} {seed}", lambda t=training, lr=lr, s=seed: ask(learn(t, lr, s), s))
            result["runs"].append({"training": training, "seed": seed, "lr": lr} | found)
    where = {"device": "CPU, 1 thread", "torch": torch.__version__, "python": platform.python_version()}
    return result | {"measured": where | {"date": date.today().isoformat()}}


def measured() -> dict:
    """What `measure` found when the course was made."""
    return json.loads(FILE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where each finished run is kept")
    folder = parser.parse_args().folder
    write_whole(FILE, json.dumps(measure(Notes(folder, lambda text: print(text, flush=True))), indent=1) + "\n")
