"""What the advice is worth on text that its tables have not seen: lesson 18's runs, measured once and shipped.

    python -m minipeft.course.yours --notes folder        # each run is kept there as it ends

The rates that `course/advice.py` names for the real encoder come from film reviews. Here they are used unchanged on
product reviews, read from a CSV file as a learner's own are, with five seeds; a sixth looks at the rates beside LoRA's
on the validation rows. Beside them stand what needs no model, and a logistic regression on counts of words.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
from datetime import date
from pathlib import Path

import torch

from minipeft.attach import attach
from minipeft.course import board
from minipeft.course.notes import Notes
from minipeft.learn.early import EarlyStop
from minipeft.learn.fit import evaluate, fit, report
from minipeft.learn.protocol import SEARCH_SEED, SEEDS
from minipeft.learn.trivial import trivial
from minipeft.whole import write_whole
from minipeft.world import base, real, tasks
from minipeft.world.own import own
from minipeft.world.tasks import Task

FILE = Path(__file__).with_name("yours.json")
STEPS, BATCH, EVERY, PATIENCE, LOOKED_AT = 60, 16, 10, 2, 200
ADVISED = ("LoRA r=8", "full fine-tuning")


def example(folder: Path) -> Path:
    """Writes `products.csv` to a folder: 3,590 sentences of product reviews, as a learner's own file may look."""
    path = Path(folder) / "products.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "verdict", "product"])
        for part in real.reviews("products").values():
            for row in part:
                writer.writerow([row["text"], ("negative", "positive")[row["label"]], row["id"].split("_")[0]])
    return path


def stories(folder: Path) -> Path:
    """Writes 400 of a pirate's stories as `.txt` files: an example for the pocket model, which needs no network."""
    for i, row in enumerate(tasks.pirate().data["train"].select(range(400))):
        (Path(folder) / f"story {i:03}.txt").write_text(row["text"], encoding="utf-8")
    return Path(folder)


def read(path: Path) -> Task:
    return own(path, text="review", label="verdict", group="product")


def run(task: Task, name: str, lr: float, seed: int) -> dict:
    """Trains with early stopping; the looks at the validation rows and, but for the search's seed, the test scores."""
    tuned = attach(base.load("minilm", labels=2)[0], board.METHODS[name][0], seed=seed)
    early = EarlyStop(tuned, task, EVERY, PATIENCE, n=LOOKED_AT)
    fit(tuned, task, STEPS, lr, BATCH, seed, "linear", callback=early, progress=False)
    found = {"method": name, "rate": lr, "seed": seed, "best step": early.restore(), "validation loss": early.losses}
    if seed == SEARCH_SEED:
        return found
    score = evaluate(tuned, task)
    return found | {"accuracy": score.accuracy, "macro-F1": float(report(score, task).loc["macro avg", "f1-score"])}


def words(task: Task) -> float:
    """Test accuracy of scikit-learn's logistic regression on weighted counts of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train, test = task.data["train"], task.data["test"]
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000)).fit(train["text"], train["label"])
    return float(model.score(test["text"], test["label"]))


def measure(folder: Path) -> dict:
    """All runs; those that are in `folder` already are not run again."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    notes, task = Notes(folder), read(example(folder))
    runs, rates = [], {name: board.board()[name]["rate"] for name in ADVISED}
    plan = [("LoRA r=8", rates["LoRA r=8"], seed) for seed in SEEDS]
    plan += [("LoRA r=8", lr, SEARCH_SEED) for lr in (3e-4, 1e-3, 3e-3, 1e-2)]
    plan += [("full fine-tuning", rates["full fine-tuning"], seed) for seed in SEEDS]
    for name, lr, seed in plan:
        runs.append(notes.get(f"{name} {lr:g} {seed}", lambda a=name, b=lr, c=seed: run(task, a, b, c)))
    largest = trivial(task)
    return {
        "rows": {name: len(part) for name, part in task.data.items()},
        "largest class": largest.accuracy,
        "counts of words": words(task),
        "runs": runs,
        "measured": {
            "device": "CPU, 1 thread",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": date.today().isoformat(),
        },
    }


def measured() -> dict:
    """What `measure` found when the course was made."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def scores(name: str, value: str = "accuracy") -> list[float]:
    """The test scores of a method at its advised rate, a seed each."""
    return [each[value] for each in measured()["runs"] if each["method"] == name and value in each]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notes", type=Path, required=True, help="a folder for the runs, one file each")
    write_whole(FILE, json.dumps(measure(parser.parse_args().notes), indent=1) + "\n")
