"""The atlas: runs that were measured once and shipped, so that a slider can read what would take hours to train.

    runs = atlas.load()             # a pandas table, one row a run, with the columns of `minipeft.learn.sweep.run`
    runs.attrs["provenance"]        # versions, device, seeds, date, wall time

It was made by `python -m minipeft.learn.sweep short --folder runs --out minipeft/course/atlas.parquet`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

PATH = Path(__file__).with_name("atlas.parquet")


def load(path: str | os.PathLike = PATH):
    """All runs; `settings` is JSON, and `rank` is taken out of it (missing for methods without one).

    Raises ValueError when the file is missing or no atlas.
    """
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
    runs["rank"] = [json.loads(settings).get("rank") for settings in runs["settings"]]
    runs["rank"] = runs["rank"].astype("Int64")
    runs.attrs["provenance"] = provenance
    return runs


def describe(runs) -> str:
    """One line for a figure: where its numbers come from."""
    p = runs.attrs["provenance"]
    return f"measured {p['date']}, {p['device']}, torch {p['torch']}, seeds {', '.join(map(str, p['seeds']))}"


def curve(runs, task: str, method: str, rank: int | None = None, value: str = "loss"):
    """Mean, least and largest `value` over the seeds for each learning rate: a table indexed by `lr`."""
    chosen = runs[(runs.task == task) & (runs.method == method)]
    chosen = chosen[chosen["rank"] == rank] if rank is not None else chosen
    if chosen.empty:
        what = f"{method} at rank {rank}" if rank is not None else method
        raise ValueError(f"The atlas has no runs of {what} on {task!r}; it has {', '.join(sorted(set(runs.task)))}.")
    return chosen.groupby("lr")[value].agg(["mean", "min", "max", "count"])
