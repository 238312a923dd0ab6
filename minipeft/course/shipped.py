"""Adapters that ship with the course, and what trained them: `python -m minipeft.course.shipped [name …]`."""

from __future__ import annotations

import json
import platform
import sys
from datetime import date
from pathlib import Path

FOLDER = Path(__file__).with_name("adapters")


def shipped(name: str) -> Path:
    """The folder of an adapter for the pocket model that came with the course, for `load_adapter(model, …)`.

    Raises:
        ValueError: naming those that there are.
    """
    names = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
    if name not in names:
        raise ValueError(f"No adapter {name!r} ships with the course: there is {', '.join(names)}.")
    return FOLDER / name


RECIPES = {  # {task: settings}
    "pirate": {"steps": 600, "lr": 3e-3, "rank": 8},
    "forecast": {"steps": 300, "lr": 1e-2, "rank": 4},
}


def train(name: str, steps: int, lr: float, rank: int, seed: int = 0) -> dict:
    """Train the adapter of the task `name`, write it with a card beside it, and return the card."""
    import torch

    from minipeft.attach import attach
    from minipeft.learn.fit import evaluate, fit
    from minipeft.methods.lora import LoRA
    from minipeft.world import load, tasks

    model, _ = load("pocket")
    task = getattr(tasks, name)(train=steps * 16)
    tuned = attach(model, LoRA(rank=rank, gamma=2.0), seed=seed)
    before = evaluate(tuned, task).loss
    history = fit(tuned, task, steps=steps, lr=lr, seed=seed)
    tuned.save(FOLDER / name)
    card = {
        "method": f"LoRA, rank {rank}, γ = 2, all linear layers",
        "trainable parameters": tuned.count().trainable,
        "steps of 16 stories": steps,
        "learning rate": lr,
        "seed": seed,
        "test loss before, nats a token": round(before, 4),
        "test loss after, nats a token": round(evaluate(tuned, task).loss, 4),
        "floor, nats a token": round(task.floor, 4),
        "trained on": {
            "device": f"CPU, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": date.today().isoformat(),
            "wall time in seconds": round(history.seconds[-1]),
        },
    }
    (FOLDER / name / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    return card


if __name__ == "__main__":
    for name in sys.argv[1:] or RECIPES:
        print(json.dumps(train(name, **RECIPES[name]), indent=2, ensure_ascii=False))
