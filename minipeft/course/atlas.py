"""The atlas: runs that were measured once and shipped, so that a slider can read what would take hours to train.

    runs = atlas.load()             # a pandas table, one row a run, with the columns of `minipeft.learn.sweep.run`
    runs.attrs["provenance"]        # versions, device, seeds, date, wall time

It was made by `python -m minipeft.learn.sweep --folder runs --out minipeft/course/atlas.parquet --workers 2`.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

PATH = Path(__file__).with_name("atlas.parquet")


def load(path: str | os.PathLike = PATH):
    """All runs; `settings` is JSON, and `size` (rank, bottleneck, length or dim, missing for methods without one) and
    `targets` are taken out of it.

    Raises ValueError when the file is missing or no atlas.
    """
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        provenance = json.loads(table.schema.metadata[b"provenance"])
    except (OSError, pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is no atlas ({error}); `python -m minipeft.learn.sweep` writes one."
        ) from error
    runs = table.to_pandas()
    settings = [json.loads(text) for text in runs["settings"]]
    sizes = [next((s[name] for name in ("rank", "bottleneck", "length", "dim") if name in s), None) for s in settings]
    runs["size"] = pd.array(sizes, dtype="Int64")
    runs["targets"] = [s.get("targets", "all-linear") for s in settings]
    runs.attrs["provenance"] = provenance
    return runs


def describe(runs) -> str:
    """One line for a figure: where its numbers come from."""
    p = runs.attrs["provenance"]
    return f"measured {p['date']}, {p['device']}, torch {p['torch']}, seeds {', '.join(map(str, p['seeds']))}"


def curve(runs, task: str, method: str, size: int | None = None, value: str = "loss", **others):
    """Mean, least and largest `value` over the seeds for each learning rate: a table indexed by `lr`.

    `size`: the rank, bottleneck or length. `others`: `steps`, `batch` and `targets`, if not 60, 10 and "all-linear".
    Raises ValueError where there are no such runs.
    """
    wanted = {"task": task, "method": method, "steps": 60, "batch": 10, "targets": "all-linear"} | others
    if size is not None:
        wanted["size"] = size
    chosen = runs
    for column, each in wanted.items():
        chosen = chosen[chosen[column] == each]
    if chosen.empty:
        what = ", ".join(f"{column} {each}" for column, each in wanted.items())
        raise ValueError(f"The atlas has no runs of {what}; it has {', '.join(sorted(set(runs.method)))}.")
    return chosen.groupby("lr")[value].agg(["mean", "min", "max", "count"])


def best(runs, task: str, method: str, size: int | None = None, **others):
    """The row of `curve` with the least mean loss, as a mapping: "lr", "mean", "min", "max", "count"."""
    means = curve(runs, task, method, size, **others).reset_index()
    return means.loc[means["mean"].idxmin()].to_dict()


@cache
def measured() -> tuple[dict[tuple[str, str, float], tuple[int, list[float]]], str]:
    """What an explorer looks up: {(the method as its repr, task, learning rate): (numbers trained, loss by seed)}, of
    the runs that are as long as an explorer's own, and where they come from."""
    from minipeft.learn.sweep import Point, method_of

    runs = load()
    runs = runs[(runs.steps == Point.steps) & (runs.batch == Point.batch)]
    names = {
        (method, settings): repr(method_of(Point(method, settings, "pirate", 1e-3, 0)))
        for method, settings in set(zip(runs.method, runs.settings, strict=True))
    }
    found: dict[tuple[str, str, float], tuple[int, list[float]]] = {}
    for row in runs.itertuples():
        key = names[row.method, row.settings], row.task, row.lr
        found.setdefault(key, (row.trainable, []))[1].append(row.loss)
    return found, describe(runs)
