"""Changing worlds, measured once and shipped: `python -m minipeft.course.worlds --folder runs` writes `worlds.json`.

Every part is a list of runs. A finished run has a small file in the folder, so whoever kills the script starts it again
and it goes on. Learning rates are the best of a row, half a decade apart, on validation rows and with a seed that no
reported run has; the row grows until its best lies inside.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
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


PARTS: dict[str, Callable[[Notes], dict]] = {"drift": drift}


def measured() -> dict:
    """What was found when the course was made, by part."""
    return json.loads(FILE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    measure(FILE, PARTS, __doc__.splitlines()[0])
