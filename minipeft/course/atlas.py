"""The atlas: runs that were measured once and shipped, so that a slider can read what would take hours to train.

    runs = atlas.load()             # a pandas table, one row a run, with the columns of `minipeft.learn.sweep.run`
    atlas.best(runs, "pirate", mp.LoRA(rank=8, gamma=2.0))      # at its best learning rate, over the seeds
    runs.attrs["provenance"]        # versions, device, seeds, date, wall time

It was made by `python -m minipeft.learn.sweep --folder runs --out minipeft/course/atlas.parquet --workers 2`.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

from minipeft.layer import Method

PATH = Path(__file__).with_name("atlas.parquet")


def load(path: str | os.PathLike = PATH):
    """All runs; `settings` is JSON. Two columns are made of it: `attached`, what was attached, as Python writes it, and
    `size` (rank, bottleneck, length or dim; missing for methods without one).

    Raises ValueError when the file is missing or no atlas.
    """
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    from minipeft.learn.sweep import method_of

    try:
        table = pq.read_table(path)
        provenance = json.loads(table.schema.metadata[b"provenance"])
    except (OSError, pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is no atlas ({error}); `python -m minipeft.learn.sweep` writes one."
        ) from error
    runs = table.to_pandas()
    names = {which: repr(method_of(*which)) for which in set(zip(runs.method, runs.settings, strict=True))}
    runs["attached"] = [names[which] for which in zip(runs.method, runs.settings, strict=True)]
    settings = [json.loads(text) for text in runs["settings"]]
    sizes = [next((s[name] for name in ("rank", "bottleneck", "length", "dim") if name in s), None) for s in settings]
    runs["size"] = pd.array(sizes, dtype="Int64")
    runs.attrs["provenance"] = provenance
    return runs


def describe(runs) -> str:
    """One line for a figure: where its numbers come from."""
    p = runs.attrs["provenance"]
    return f"measured {p['date']}, {p['device']}, torch {p['torch']}, seeds {', '.join(map(str, p['seeds']))}"


def of(runs, task: str, method: Method, steps: int = 60, batch: int = 10):
    """The runs of `method`, given as to `attach`, on `task`: a row for each learning rate and seed.

    Raises ValueError where there are none.
    """
    alike = (runs.task == task) & (runs.steps == steps) & (runs.batch == batch)
    found = runs[alike & (runs.attached == repr(method))]
    if found.empty:
        known = sorted(set(runs[alike & (runs.method == type(method).__name__)].attached))
        raise ValueError(
            f"The atlas has no runs of {method!r} on {task}, {steps} steps of {batch}; "
            f"it has {'; '.join(known) or 'nothing of its kind'}."
        )
    return found


def curve(runs, task: str, method: Method, value: str = "loss", **shape):
    """Mean, least and largest `value` over the seeds for each learning rate: a table indexed by `lr`; as for `of`."""
    return of(runs, task, method, **shape).groupby("lr")[value].agg(["mean", "min", "max", "count"])


def best(runs, task: str, method: Method, **shape):
    """The row of `curve` with the least mean loss, as a mapping: "lr", "mean", "min", "max", "count"."""
    means = curve(runs, task, method, **shape).reset_index()
    return means.loc[means["mean"].idxmin()].to_dict()


@cache
def measured() -> tuple[dict[tuple[str, str, float], tuple[int, list[float]]], str]:
    """What an explorer looks up: {(the method as its repr, task, learning rate): (numbers trained, loss by seed)}, of
    the runs that are as long as an explorer's own, and where they come from."""
    runs = load()
    found: dict[tuple[str, str, float], tuple[int, list[float]]] = {}
    for row in runs[(runs.steps == 60) & (runs.batch == 10)].itertuples():
        found.setdefault((row.attached, row.task, row.lr), (row.trainable, []))[1].append(row.loss)
    return found, describe(runs)
