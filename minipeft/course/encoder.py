"""The methods of lessons 02 to 05 on a real encoder, measured once and shipped for lesson 05:

    python -m minipeft.course.encoder --folder runs

MiniLM (22 million parameters, trained on real text) says whether a story will end glad. Its output layer is new, so it
trains beside every method. Each method has the learning rate of least loss on validation stories, found with a seed of
its own on a grid of half decades that grows until the best lies inside; five other seeds report on the test stories.
"""

from __future__ import annotations

import json
from pathlib import Path

from minipeft.course.notes import Notes, measure
from minipeft.learn.protocol import SEARCH_SEED, SEEDS, best_rate

FILE = Path(__file__).with_name("encoder.json")
STEPS, BATCH, ROWS = 60, 10, 300


def methods() -> dict:
    """{name: (what to attach, rates to begin with)}"""
    import minipeft as mp

    return {
        "output layer alone": (mp.Softmax(), (1e-2, 3e-2, 1e-1)),
        "biases": ([mp.BitFit(), mp.Softmax()], (3e-3, 1e-2)),
        "adapter m=16": ([mp.Adapter(16), mp.Softmax()], (1e-3, 3e-3)),
        "prompt n=8": ([mp.PromptTuning(8), mp.Softmax()], (3e-2, 1e-1)),
        "prefix n=8": ([mp.PrefixTuning(8), mp.Softmax()], (3e-2, 1e-1)),
        "full fine-tuning": (mp.Full(), (1e-4, 3e-4)),
    }


def run(name: str, lr: float, seed: int) -> dict:
    """One run, scored on validation stories for the search's seed and on test stories for the others."""
    import minipeft as mp

    model, _ = mp.load("minilm", labels=2)
    tuned = mp.attach(model, methods()[name][0], seed=seed)
    history = mp.fit(tuned, mp.world.mood(), steps=STEPS, lr=lr, batch=BATCH, seed=seed, progress=False)
    scored = mp.world.mood(10, ROWS, 91) if seed == SEARCH_SEED else mp.world.mood()
    score = mp.evaluate(tuned, scored, n=ROWS)
    loss = score.loss if history.stopped == "finished" else None
    return {"loss": loss, "accuracy": score.accuracy, "trainable": tuned.count().trainable}


def comparison(notes: Notes) -> dict:
    """{"methods": {name: {"rate", "trainable", "losses", "accuracies": one a seed}}}"""
    found = {}
    for name, (_, rates) in methods().items():

        def loss(lr: float, name=name) -> float | None:
            return notes.get(f"{name} rate {lr:g}", lambda: run(name, lr, SEARCH_SEED))["loss"]

        rate, tried = best_rate(loss, rates)
        runs = [notes.get(f"{name} seed {seed}", lambda n=name, lr=rate, s=seed: run(n, lr, s)) for seed in SEEDS]
        found[name] = {
            "rate": rate,
            "tried": tried,
            "trainable": runs[0]["trainable"],
            "losses": [each["loss"] for each in runs],
            "accuracies": [each["accuracy"] for each in runs],
        }
    return {"steps": STEPS, "batch": BATCH, "rows": ROWS, "methods": found}


PARTS = {"comparison": comparison}


def measured() -> dict:
    """The shipped figures, by part."""
    return json.loads(FILE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    measure(FILE, PARTS, __doc__.splitlines()[0])
