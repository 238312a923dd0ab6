"""The atlas: runs that were measured once and shipped, so that a slider can read what would take hours to train.

    runs = atlas.load()             # a pandas table, one row a run, with the columns of `minipeft.learn.sweep.run`
    atlas.best(runs, "pirate", mp.LoRA(rank=8, gamma=2.0))      # at its best learning rate, over the seeds
    runs.attrs["provenance"]        # versions, device, seeds, date, wall time

It was made by `python -m minipeft.course.grid --folder runs --out minipeft/course/atlas.parquet --workers 2`, and
`python -m minipeft.course.atlas --rerun 20 --seed 1` runs twenty of its points again and compares.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import compress
from pathlib import Path

from minipeft.layer import Method
from minipeft.learn.protocol import CHOOSERS, SEARCH_SEED, VOTERS, bottom
from minipeft.learn.sweep import Point, method_of, run, task_of

PATH = Path(__file__).with_name("atlas.parquet")


def load(path: str | os.PathLike = PATH):
    """All runs; `settings` is JSON. Two columns are made of it: `attached`, what was attached, as Python writes it, and
    `size` (rank, bottleneck, length or dim; missing for methods without one).

    Raises ValueError when the file is missing or no atlas.
    """
    import pandas as pd

    table, provenance = _read(path)
    runs = table.to_pandas()
    runs["attached"] = _attached(runs.method, runs.settings)
    settings = [json.loads(text) for text in runs["settings"]]
    sizes = [next((s[name] for name in ("rank", "bottleneck", "length", "dim") if name in s), None) for s in settings]
    runs["size"] = pd.array(sizes, dtype="Int64")
    runs.attrs["provenance"] = provenance
    return runs


def _read(path: str | os.PathLike):
    """The arrow table and where it comes from; see `load`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        return table, json.loads(table.schema.metadata[b"provenance"])
    except (OSError, pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is no atlas ({error}); `python -m minipeft.course.grid` writes one."
        ) from error


def _attached(methods: Iterable[str], settings: Iterable[str]) -> list[str]:
    """What was attached in each run, as Python writes it."""
    each = list(zip(methods, settings, strict=True))
    names = {which: repr(method_of(*which)) for which in set(each)}
    return [names[which] for which in each]


def describe(runs) -> str:
    """One line for a figure: where its numbers come from."""
    return _described(runs.attrs["provenance"])


def _described(p: dict) -> str:
    return f"measured {p['date']}, {p['device']}, torch {p['torch']}, seeds {', '.join(map(str, p['seeds']))}"


def all_of(runs, task: str, method: Method, steps: int = 60, batch: int = 10):
    """The runs of `method`, given as to `attach`, on `task`: a row for each learning rate and seed, those of
    `CHOOSERS` too, which chose a rate. Raises ValueError where there are none."""
    alike = (runs.task == task) & (runs.steps == steps) & (runs.batch == batch)
    found = runs[alike & (runs.attached == repr(method))]
    if found.empty:
        known = sorted(set(runs[alike & (runs.method == type(method).__name__)].attached))
        raise ValueError(
            f"The atlas has no runs of {method!r} on {task}, {steps} steps of {batch}; "
            f"it has {'; '.join(known) or 'nothing of its kind'}."
        )
    return found


def of(runs, task: str, method: Method, **shape):
    """The runs of `all_of` that report: all but those of `CHOOSERS`."""
    found = all_of(runs, task, method, **shape)
    return found[~found.seed.isin(CHOOSERS)]


def curve(runs, task: str, method: Method, value: str = "loss", **shape):
    """Mean, least and largest `value` over the seeds for each learning rate: a table indexed by `lr`; as for `of`."""
    return of(runs, task, method, **shape).groupby("lr")[value].agg(["mean", "min", "max", "count"])


def searches(runs, task: str, method: Method, **shape) -> tuple[dict[int, dict[float, float]], str]:
    """({seed that chooses: {rate: its loss}}, what that loss is of): of validation rows ("validation"), or of the facts
    themselves where they are learnt by heart, which leave nothing to hold out ("the facts"). Without what diverged."""
    found = all_of(runs, task, method, **shape)
    found = found[found.seed.isin(CHOOSERS) & (found.stopped == "finished")].sort_values("lr")
    column, where = ("valid_loss", "validation") if found.valid_loss.notna().all() else ("loss", "the facts")
    return {int(seed): dict(zip(rows.lr, rows[column], strict=True)) for seed, rows in found.groupby("seed")}, where


def chosen(runs, task: str, method: Method, **shape) -> tuple[float, str]:
    """(the best rate, what it was chosen on): the rate of the least loss in `searches` of `SEARCH_SEED`. Where that
    seed has no runs it is that of the least mean loss on the very rows that report, and "test" says so."""
    by_seed, where = searches(runs, task, method, **shape)
    if SEARCH_SEED not in by_seed:
        return curve(runs, task, method, **shape)["mean"].idxmin(), "test"
    found = by_seed[SEARCH_SEED]
    return min(found, key=found.__getitem__), where


def best_rates(runs, task: str, method: Method, **shape) -> list[float]:
    """The best rate by each of `VOTERS`, read between the rates that it tried (`protocol.bottom`). Raises ValueError
    where they chose none."""
    by_seed, _ = searches(runs, task, method, **shape)
    if not by_seed.keys() >= set(VOTERS):
        raise ValueError(
            f"Only one seed chose a rate for {method!r} on {task}; `minipeft.course.grid` lists its VOTES."
        )
    return [bottom(by_seed[seed]) for seed in VOTERS]


def best(runs, task: str, method: Method, **shape):
    """The row of `curve` at the best rate, as a mapping: "lr", "mean", "min", "max", "count", and "chosen on".

    Raises ValueError where no run reports at that rate, but only the one that chose it.
    """
    lr, where = chosen(runs, task, method, **shape)
    means = curve(runs, task, method, **shape)
    if lr not in means.index:
        raise ValueError(
            f"The atlas has only the run of {method!r} on {task} that chose {lr:g}, and it reports nothing."
        )
    return {"lr": lr} | means.loc[lr].to_dict() | {"chosen on": where}


def losses(runs, task: str, method: Method, value: str = "loss", **shape) -> list[float]:
    """The `value` of each run at the best rate, in the order of the seeds, so that two methods' can be paired."""
    rows = of(runs, task, method, **shape)
    return rows[rows.lr == best(runs, task, method, **shape)["lr"]].sort_values("seed")[value].tolist()


@cache
def source(task: str) -> float:
    """−Σ log p / Σ tokens of what wrote a task's texts, on the 100 rows that the runs are scored on, in nats a token:
    the least that a model can be expected to reach there. 0 for facts, which can be learnt by heart."""
    chosen = task_of(task)
    if chosen.bits:
        return 0.0
    rows = chosen.data["test"].select(range(100))
    said = [row["completion"] if chosen.kind == "answer" else row["text"] for row in rows]
    return -sum(rows["log_p"]) / sum(len(text.split()) + 1 for text in said)  # every text has an end


@cache
def measured() -> tuple[dict[tuple[str, str, float], tuple[int, list[float]]], str]:
    """What an explorer looks up: {(the method as its repr, task, learning rate): (numbers trained, loss by seed)}, of
    the runs that are as long as an explorer's own, and where they come from. Where only the seed that searched for a
    rate has been run, its loss stands alone."""
    table, provenance = _read(PATH)  # and no more of it than is needed: what `load` makes of it takes ten times as long
    names = ("method", "settings", "task", "lr", "steps", "batch", "seed", "trainable", "loss")
    *which, task, lr, steps, batch, seeds, numbers, losses = (table[name].to_pylist() for name in names)
    keys = zip(_attached(*which), task, lr, strict=True)
    alike = [shape == (60, 10) for shape in zip(steps, batch, strict=True)]
    runs = [*compress(zip(seeds, keys, numbers, losses, strict=True), alike)]
    found: dict[tuple[str, str, float], tuple[int, list[float]]] = {}
    for seed, key, trainable, loss in runs:
        if seed not in CHOOSERS:
            found.setdefault(key, (trainable, []))[1].append(loss)
    for seed, key, trainable, loss in runs:
        if seed == SEARCH_SEED:
            found.setdefault(key, (trainable, [loss]))
    return found, _described(provenance)


def sample(runs, n: int, seed: int) -> list[dict]:
    """`n` runs drawn at random, of each method in turn, so that every kind is drawn; the long ones never."""
    drawn = runs[runs.steps <= 120].sample(frac=1, random_state=seed)
    turn = drawn.groupby("method", sort=False).cumcount()
    return drawn.assign(turn=turn).sort_values("turn", kind="stable").head(n).to_dict("records")


def came_back(stored: dict, again: dict, best: float, least: float) -> str:
    """How a run compares with itself run again, where its setting's best rate is `best`, and the least loss there
    `least`.

    "same": it ended the same way and trained as many numbers, and its loss is the same to 0.03 nats or 3 %. "unsteady":
    at a rate above the best, steps overshoot, and rounding, which is not the same on two processors, grows without
    bound. Such a run trains as many numbers, and need not come back to its loss, but does not beat `least`. Else
    "OTHER".
    """

    def near(loss: float) -> float:
        return max(0.03, 0.03 * loss)

    if stored["trainable"] != again["trainable"]:
        return "OTHER"
    if stored["stopped"] == again["stopped"] and abs(stored["loss"] - again["loss"]) <= near(stored["loss"]):
        return "same"
    return "unsteady" if stored["lr"] > best and not again["loss"] < least - near(least) else "OTHER"


def rerun(n: int, seed: int, report=print) -> int:
    """Runs `sample` again, reports each, and returns how many are another's."""
    runs, found = load(), Counter()
    for stored in sample(runs, n, seed):
        again = run(Point(**{name: stored[name] for name in Point.__dataclass_fields__}))
        which = stored["task"], method_of(stored["method"], stored["settings"])
        shape = {name: stored[name] for name in ("steps", "batch")}
        best, alike = chosen(runs, *which, **shape)[0], all_of(runs, *which, **shape)
        found[how := came_back(stored, again, best, alike[alike.lr == best].loss.min())] += 1
        where = f"{stored['method']} {stored['settings']} {stored['task']} {stored['lr']:g} seed {stored['seed']}"
        report(f"{how:8} {stored['loss']:.4f} {again['loss']:.4f}  {where}, best rate {best:g}")
    above = "more have a rate above their setting's best, where rounding grows"
    report(f"{found['same']} of {n} runs came back; {found['unsteady']} {above}; {found['OTHER']} are others.")
    return found["OTHER"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Runs a random sample of the atlas again and compares.")
    parser.add_argument("--rerun", type=int, default=20, help="how many runs")
    parser.add_argument("--seed", type=int, default=0, help="which sample")
    options = parser.parse_args()
    raise SystemExit(min(1, rerun(options.rerun, options.seed)))
