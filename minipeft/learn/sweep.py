"""Sweeps: method × settings × task × learning rate × seed, one small file a run, one Parquet file in the end.

    points = [point("LoRA", "pirate", lr, seed, rank=8) for lr in (1e-3, 1e-2, 1e-1) for seed in range(5)]
    sweep(points, "runs", executor=ProcessPoolExecutor(4))     # or dask's, or MPI's; None runs here
    collect(points, "runs", "atlas.parquet")

Kill it at any moment and start it again: what is finished stays, the rest is run. A run depends on nothing but its
point, so order, executor and restarts do not change a figure; only `seconds` differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from minipeft.analyze.spectrum import spectra
from minipeft.attach import attach
from minipeft.front import IGNORE
from minipeft.layer import Layer, Method
from minipeft.learn.fit import History, evaluate, training
from minipeft.learn.plan import Plan
from minipeft.learn.protocol import CHOOSERS
from minipeft.learn.rows import collate, read
from minipeft.methods import METHODS
from minipeft.whole import HALF, write_whole
from minipeft.world import base, tasks

if TYPE_CHECKING:
    from datasets import Dataset

VALIDATED = 200  # rows that choose a rate
STALE = 600  # seconds after which nobody is writing half a file any more
WALL_TIME = ("seconds",)  # the columns that differ between two executions


@dataclass(frozen=True)
class Point:
    """One run. `method` is a name that `minipeft` exports, `settings` its arguments as JSON, `task` a pocket task's
    name, with its size where it has one ("facts(64)"); `lr` and `schedule` as in `fit`, `steps` of `batch` rows, `seed`
    of everything."""

    method: str
    settings: str
    task: str
    lr: float
    seed: int
    steps: int = 60
    batch: int = 10
    schedule: str = "constant"

    @property
    def plan(self) -> Plan:
        return Plan(self.steps, self.lr, self.batch, self.seed, self.schedule)

    @property
    def key(self) -> str:
        """The name of its file: it changes with every field."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:20]


def point(method: str, task: str, lr: float, seed: int, steps=60, batch=10, schedule="constant", **settings) -> Point:
    """`point("LoRA", "pirate", 1e-2, 0, rank=8)`. Raises ValueError for an unknown method, task or setting,
    and for numbers that `fit` would refuse."""
    Plan(steps, lr, batch, seed, schedule)
    made = Point(method, json.dumps(settings, sort_keys=True), task, float(lr), seed, steps, batch, schedule)
    method_of(made.method, made.settings), task_of(task)
    return made


def method_of(name: str, settings: str) -> Method:
    """`method_of("LoRA", '{"rank": 8}')`. Raises ValueError for an unknown method or setting."""
    if name not in METHODS:
        raise ValueError(f"{name!r} is no method of minipeft; LoRA and Full are two.")
    try:
        return METHODS[name](**json.loads(settings))
    except TypeError as error:
        raise ValueError(f"{name} does not take {settings}: {error}.") from error


@cache
def task_of(name: str) -> tasks.Task:
    """The task that a name such as "pirate" or "facts(64)" stands for."""
    word, _, size = name.partition("(")
    known = ("pirate", "cipher", "flip", "facts", "forecast", "answer", "plain")
    if word not in known or bool(size) != (word == "facts") or (size and not size.rstrip(")").isdigit()):
        raise ValueError(f'{name!r} is no task of a sweep; there is {", ".join(known)}, with a size in "facts(64)".')
    return tasks.facts(int(size.rstrip(")"))) if size else getattr(tasks, word)()


@cache
def validation(name: str) -> Dataset | None:
    """200 rows from the task's source that are neither trained on nor tested; None for facts, which are learnt by heart
    and leave nothing to hold out."""
    task = task_of(name)
    if task.bits:
        return None
    known = {row for split in task.data.values() for row in split["text"]}
    fresh = getattr(tasks, name)(train=1, test=VALIDATED + 50, seed=1).data["test"]
    return fresh.filter(lambda row: row["text"] not in known).select(range(VALIDATED))


@torch.no_grad()
def row_losses(model, task: tasks.Task, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ −log p of the tokens that are scored, their number) for each row of a task of texts or answers."""
    encoded, nats, tokens = read(model, task, rows, model.tokenizer), [], []
    for start in range(0, len(encoded), 64):
        inputs = collate(task.kind, encoded[start : start + 64], model.tokenizer, model.device)
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1].float().transpose(1, 2)
        each = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)
        nats.append(each.double().sum(1).cpu())
        tokens.append((labels != IGNORE).sum(1).cpu())
    return torch.cat(nats), torch.cat(tokens)


def validated(model, name: str) -> float | None:
    """The loss of a model on `validation(name)`, in nats a token, which may choose a rate; None where there is none."""
    rows = validation(name)
    if rows is None:
        return None
    nats, tokens = row_losses(model, task_of(name), rows)
    return (nats.sum() / tokens.sum()).item()


@cache
def _base(model: str, device: str):
    return base.load(model)[0].to(device)


def run(point: Point, device: str = "cpu", model: str = "pocket") -> dict:
    """Trains a fresh adapter on a base that `mp.load` knows, on one CPU thread or on a GPU, and measures it.

    `loss`, `accuracy` on the first 100 test rows (all facts of a `facts` task) and `plain_loss` on 50 of the base's own
    stories, in nats a token; `loss_se`, the standard error of `loss` over those `n` rows; `valid_loss` on the rows that
    may choose a rate; `train_loss`, the mean of the last ten batches; `delta_norm`, ‖ΔW‖_F of all changed matrices
    together; `stable_rank` and `effective_rank`, medians over them (none where a method changes no weight);
    `peak_memory` of a step in bytes; `seconds` of CPU time. A run that diverged says so in `stopped`, and is scored as
    it is.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        task, history = task_of(point.task), History()
        tuned = attach(_base(model, device), method_of(point.method, point.settings), seed=point.seed)
        try:
            started = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for _ in training(tuned, task, history, point.plan):
                    pass
            score = evaluate(tuned, task, n=None if task.bits else 100)
            nats, tokens = row_losses(tuned, task, task.data["test"].select(range(score.n)))
            _, error = base.excess(nats, tokens, torch.zeros(score.n))
            valid = validated(tuned, point.task)
            plain = evaluate(tuned, tasks.plain(), n=50)
            known = history.stopped == "finished" and all(type(la).delta is not Layer.delta for la in tuned.layers())
            found = list(spectra(tuned).values()) if known else []
            count = tuned.count()
        finally:
            tuned.detach()
    finally:
        torch.set_num_threads(threads)
    return asdict(point) | {
        "trainable": count.trainable,
        "total": count.total,
        "floor": task.floor,
        "bits": task.bits,
        "loss": score.loss,
        "loss_se": error,
        "n": score.n,
        "valid_loss": valid,
        "accuracy": score.accuracy,
        "plain_loss": plain.loss,
        "train_loss": statistics.fmean(history.losses[-10:]) if history.losses else None,
        "delta_norm": math.hypot(*(s.norm for s in found)) if found else None,
        "stable_rank": statistics.median(s.stable_rank for s in found) if found else None,
        "effective_rank": statistics.median(s.effective_rank for s in found) if found else None,
        "tokens": history.tokens,
        "peak_memory": history.peak_memory,
        "stopped": history.stopped,
        "seconds": time.process_time() - started,
    }


def _run_to_disk(point: Point, folder: str, device: str, model: str) -> str:
    write_whole(Path(folder) / f"{point.key}.json", json.dumps(run(point, device, model)))
    return point.key


def sweep(
    points: Sequence[Point],
    folder: str | os.PathLike,
    executor: Executor | None = None,
    seconds: float | None = None,
    device: str = "cpu",
    model: str = "pocket",
) -> int:
    """Runs the points that have no file in `folder` yet, and returns how many are still missing. A folder holds the
    runs of one base, `model`.

    `executor`: any `concurrent.futures.Executor`; None runs them here, one after the other. `seconds`: begin no new run
    after that long. An error in a run is raised once those that were begun are done; finished runs stay.
    """
    from tqdm.auto import tqdm

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for half in folder.glob(f"{HALF}*"):
        with contextlib.suppress(FileNotFoundError):  # another sweep in this folder may be writing it just now
            if time.time() - half.stat().st_mtime > STALE:
                half.unlink()
    waiting = [p for p in dict.fromkeys(points) if not (folder / f"{p.key}.json").exists()]
    started = time.monotonic()
    with tqdm(total=len(waiting), desc="sweep", mininterval=5) as bar:
        if executor is None:
            for each in waiting:
                if seconds is not None and time.monotonic() - started > seconds:
                    break
                _run_to_disk(each, str(folder), device, model)
                bar.update()
        else:
            futures = [executor.submit(_run_to_disk, each, str(folder), device, model) for each in waiting]
            try:
                left = None if seconds is None else max(0.0, seconds)
                for future in as_completed(futures, timeout=left):
                    future.result()
                    bar.update()
            except TimeoutError:
                pass
            finally:
                for future in futures:
                    future.cancel()
    return sum(not (folder / f"{p.key}.json").exists() for p in points)


def collect(
    points: Iterable[Point],
    folder: str | os.PathLike,
    path: str | os.PathLike,
    device: str | None = None,
    model: str = "pocket",
) -> int:
    """Writes the runs of `points`, in their order, to one Parquet file with its provenance; returns its bytes.

    `device`: what they ran on, where it was not one thread of this machine's CPU. `model`: their base.

    Raises ValueError when a run is missing or damaged, and writes nothing then.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for each in dict.fromkeys(points):
        file = Path(folder) / f"{each.key}.json"
        try:
            row = json.loads(file.read_bytes())
            if any(row[name] != value for name, value in asdict(each).items()):
                raise ValueError("it holds another point")
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"The run of {each} is missing or damaged ({error}); delete {file}, sweep again."
            ) from error
        rows.append(row)
    if not rows:
        raise ValueError("There are no points to collect; minipeft.course.grid makes some.")
    columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    table = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows])
    table = table.replace_schema_metadata({"provenance": json.dumps(provenance(rows, device, model))})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_whole(path, sink.getvalue().to_pybytes())
    return Path(path).stat().st_size


def provenance(rows: Sequence[dict], device: str | None = None, model: str = "pocket") -> dict:
    """Where the figures come from: versions, device, seeds, date, and the CPU time of all runs together."""
    import transformers

    return {
        "runs": len(rows),
        "model": model,
        "seeds": sorted({row["seed"] for row in rows} - set(CHOOSERS)),
        "device": device or f"CPU, 1 thread ({platform.machine()})",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
        "seconds": round(sum(row["seconds"] for row in rows)),
    }
