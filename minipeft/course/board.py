"""The capstone's board: four methods on real reviews, measured once and shipped: `python -m minipeft.course.board`.

Every method adapts the real encoder on the same 150 batches of 16 film sentences. Its rate is the best on validation
sentences (`learn/protocol.py`), and five other seeds are scored on the test sentences at that rate. Beside them stands
a logistic regression on the frozen encoder's averaged tokens, given as many sentences, five draws of them.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import nn

from minipeft.attach import attach
from minipeft.learn.calibration import calibration_error, reliability
from minipeft.learn.fit import evaluate, fit, report
from minipeft.learn.protocol import SEARCH_SEED, SEEDS, best_rate
from minipeft.methods.lora import LoRA
from minipeft.methods.select import BitFit, Full, Softmax
from minipeft.whole import write_whole
from minipeft.world import base, real
from minipeft.world.tasks import Task

FILE = Path(__file__).with_name("board.json")
STEPS, BATCH = 150, 16
METHODS = {  # and the rates that the search begins with
    "head only": (Softmax(), (3e-2, 1e-1)),
    "BitFit": ([BitFit(), Softmax()], (3e-3,)),
    "LoRA r=8": ([LoRA(rank=8), Softmax()], (1e-3, 3e-3)),
    "full fine-tuning": (Full(), (1e-4,)),
}


def films(test: int = 1000) -> Task:
    """Film-review sentences of two classes, with `test` test sentences (all 1,000 or so tell 3 % apart)."""
    data = real.reviews("films")
    data["test"] = data["test"].select(range(test))
    return Task("films", "class", data, metric="accuracy", classes=("negative", "positive"))


def adapted(name: str, lr: float, seed: int, task: Task, progress: bool = False) -> tuple[nn.Module, object]:
    """(the encoder adapted by that method, the history of its training)."""
    tuned = attach(base.load("minilm", labels=2)[0], METHODS[name][0], seed=seed)
    history = fit(tuned, task, STEPS, lr, BATCH, seed, "linear", progress=progress)
    return tuned, history


def run(name: str, lr: float, seed: int, task: Task) -> dict:
    """One run: the validation loss where the seed chooses; where not, accuracy, macro-F1, calibration and which test
    sentences it got wrong."""
    tuned, history = adapted(name, lr, seed, task)
    if seed == SEARCH_SEED:
        return {"validation loss": evaluate(tuned, task, "validation").loss if history.stopped == "finished" else None}
    score = evaluate(tuned, task)
    right = [guess == truth for guess, truth in zip(score.predictions, score.truth, strict=True)]
    bins = reliability(score.confidence, right)
    return {
        "accuracy": score.accuracy,
        "macro-F1": float(report(score, task).loc["macro avg", "f1-score"]),
        "ECE": round(calibration_error(bins), 4),
        "bins": [[b.n, round(b.confidence, 4), round(b.accuracy, 4)] for b in bins],
        "wrong": [i for i, hit in enumerate(right) if not hit],
    }


@torch.no_grad()
def averaged(texts: list[str]) -> torch.Tensor:
    """(n, 384): what the frozen encoder makes of each text, averaged over its tokens."""
    encoder, tokenizer = base.load("minilm", labels=2)
    found = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(list(texts[start : start + 64]), return_tensors="pt", padding=True)
        states, kept = encoder.bert(**batch).last_hidden_state, batch["attention_mask"][..., None]
        found.append((states * kept).sum(1) / kept.sum(1))
    return torch.cat(found)


def regression(task: Task, seed: int, train: torch.Tensor, test: torch.Tensor) -> float:
    """Accuracy of scikit-learn's logistic regression on as many averaged sentences as a method sees."""
    from sklearn.linear_model import LogisticRegression

    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: STEPS * BATCH].tolist()
    labels = torch.tensor(task.data["train"]["label"])
    head = LogisticRegression(C=10, max_iter=2000).fit(train[rows], labels[rows])
    return float(head.score(test, task.data["test"]["label"]))


def measure(tell: Callable[[str], object] = print) -> dict:
    """All runs. Each is in the file as soon as it is done, and is not done again."""
    torch.set_num_threads(1)
    found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"runs": {}}
    task, runs = films(), found["runs"]

    def once(name: str, lr: float, seed: int) -> dict:
        key = f"{name} | {lr:g} | {seed}"
        if key not in runs:
            runs[key] = {"method": name, "rate": lr, "seed": seed} | run(name, lr, seed, task)
            write_whole(FILE, json.dumps(found, indent=1) + "\n")
            tell(f"{key}: {runs[key]}")
        return runs[key]

    for name, (_, rates) in METHODS.items():
        best, _ = best_rate(lambda lr, name=name: once(name, lr, SEARCH_SEED)["validation loss"], rates)
        for seed in SEEDS:
            once(name, best, seed)
    train, test = averaged(task.data["train"]["text"]), averaged(task.data["test"]["text"])
    found["averaged tokens"] = [regression(task, seed, train, test) for seed in SEEDS]
    found["measured"] = {
        "device": "CPU, 1 thread",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "steps": STEPS,
        "batch": BATCH,
        "test sentences": len(task.data["test"]),
    }
    write_whole(FILE, json.dumps(found, indent=1) + "\n")
    return found


def board() -> dict[str, dict]:
    """{method: {"rate", "accuracy": [a seed each], "macro-F1", "ECE", "bins" and "wrong" as well, "searched": {rate:
    validation loss}}}."""
    runs = json.loads(FILE.read_text(encoding="utf-8"))["runs"].values()
    found = {}
    for name in METHODS:
        own = [each for each in runs if each["method"] == name]
        scored = [each for each in own if each["seed"] != SEARCH_SEED]
        found[name] = {
            "rate": scored[0]["rate"],
            **{key: [each[key] for each in scored] for key in ("accuracy", "macro-F1", "ECE", "bins", "wrong")},
            "searched": {each["rate"]: each["validation loss"] for each in own if each["seed"] == SEARCH_SEED},
        }
    return found


def hard(least: float = 0.9) -> dict[int, float]:
    """{number of a test sentence: the share of runs that got it wrong}, the hardest first, down to `least`."""
    wrong = [run for found in board().values() for run in found["wrong"]]
    missed = Counter(i for run in wrong for i in run)
    ranked = sorted(missed.items(), key=lambda each: (-each[1], each[0]))
    return {i: n / len(wrong) for i, n in ranked if n >= least * len(wrong)}


def averaged_scores() -> list[float]:
    """The accuracy of a logistic regression on the frozen encoder's averaged tokens, for five draws of sentences."""
    return json.loads(FILE.read_text(encoding="utf-8"))["averaged tokens"]


if __name__ == "__main__":
    measure()
