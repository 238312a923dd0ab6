"""Adapters, prompts and prefixes on a real encoder and real reviews, measured once and shipped for lesson 05:

    python -m minipeft.course.encoder --folder runs

They get what the capstone's board gives to biases, LoRA and full fine-tuning (`course/board.py`): the same encoder,
150 batches of 16 film sentences, the rate of least validation loss, and five other seeds on 1,000 test sentences.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from minipeft.course import board
from minipeft.course.notes import Notes, measure
from minipeft.learn.protocol import SEARCH_SEED, SEEDS

FILE = Path(__file__).with_name("encoder.json")


def methods() -> dict:
    """{name: (what to attach, rates to begin with)}"""
    import minipeft as mp

    return {
        "adapter m=16": ([mp.Adapter(16), mp.Softmax()], (1e-3, 3e-3)),
        "prefix n=8": ([mp.PrefixTuning(8), mp.Softmax()], (1e-2, 3e-2)),
        "prompt n=8": ([mp.PromptTuning(8), mp.Softmax()], (1e-2, 3e-2)),
    }


films = cache(board.films)


def run(name: str, lr: float, seed: int) -> dict:
    """One run: the validation loss where the seed chooses, accuracy on the test sentences where not."""
    import minipeft as mp

    tuned = mp.attach(mp.load("minilm", labels=2)[0], methods()[name][0], seed=seed)
    history = mp.fit(tuned, films(), board.STEPS, lr, board.BATCH, seed, "linear", progress=False)
    score = mp.evaluate(tuned, films(), "validation" if seed == SEARCH_SEED else "test")
    return {
        "loss": score.loss if history.stopped == "finished" else None,
        "accuracy": score.accuracy,
        "trainable": tuned.count().trainable,
    }


def reviews(notes: Notes) -> dict:
    """{name: {"rate", "trainable", "accuracies": one a seed}}"""
    found = {}
    for name, (_, rates) in methods().items():
        rate = notes.best_rate(name, lambda lr, n=name: run(n, lr, SEARCH_SEED)["loss"], rates)
        runs = [notes.get(f"{name} seed {seed}", lambda n=name, lr=rate, s=seed: run(n, lr, s)) for seed in SEEDS]
        accuracies = [each["accuracy"] for each in runs]
        found[name] = {"rate": rate, "trainable": runs[0]["trainable"], "accuracies": accuracies}
    return {"methods": found}


PARTS = {"reviews": reviews}


def measured() -> dict:
    """The shipped figures, by part."""
    return json.loads(FILE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    measure(FILE, PARTS, __doc__.splitlines()[0])
