"""Methods compared on a task of your own, under the protocol of `protocol.py`: `mp.sweep(model, task, {...})`.

rate      each method's own, the best on validation rows, looked for with one seed, never at the grid's edge
seeds     others report: the test rows are looked at with these alone, and the same for every method
"""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from minipeft.attach import attach
from minipeft.layer import Method
from minipeft.learn.fit import evaluate, fit
from minipeft.learn.plan import Plan
from minipeft.learn.protocol import SEARCH_SEED, SEEDS, best_rate, interval, on_grid
from minipeft.learn.rows import as_task
from minipeft.table import table
from minipeft.world.tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from pandas import DataFrame

RATES = (1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Trials:
    """`rates`: {method: its best rate}; `searched`: {method: {rate: validation loss, inf where it diverged}}; `runs`: a
    dictionary for each run that reports: method, lr, seed, loss and accuracy on the test rows, trainable, stopped."""

    rates: dict[str, float]
    searched: dict[str, dict[float, float]]
    runs: list[dict]

    def frame(self) -> DataFrame:
        """`runs` as a pandas table."""
        import pandas as pd

        return pd.DataFrame(self.runs)

    def losses(self, method: str) -> list[float]:
        """The test losses of a method, in the order of the seeds, in nats a token."""
        return [run["loss"] for run in self.runs if run["method"] == method]

    def rows(self) -> Iterator[tuple[str, ...]]:
        """A row for each method, the lowest mean loss first: name, numbers, rate, mean and 95 % interval over seeds."""
        for name in sorted(self.rates, key=lambda name: statistics.fmean(self.losses(name))):
            losses = self.losses(name)
            numbers = next(run["trainable"] for run in self.runs if run["method"] == name)
            known = len(losses) > 1 and all(map(math.isfinite, losses))
            spread = "{1:.3f} to {2:.3f}".format(*interval(losses)) if known else "–"
            yield name, f"{numbers:,}", f"{self.rates[name]:g}", f"{statistics.fmean(losses):.3f}", spread

    def _repr_html_(self) -> str:
        head = ("method", "numbers", "best rate", "test loss (nats a token)", "95 % interval")
        return table(f"{len(self.runs) // max(1, len(self.rates))} seeds for each method", self.rows(), head)

    def __repr__(self) -> str:
        return f"Trials({'; '.join(f'{name} {loss} at {rate}' for name, _, rate, loss, _ in self.rows())})"


def sweep(
    model: nn.Module,
    task: Task | Dataset | DatasetDict | list[str],
    methods: Mapping[str, Method | Sequence[Method]],
    steps: int = 60,
    batch: int = 16,
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = SEEDS,
    tokenizer=None,
    executor: Executor | None = None,
    progress: bool = True,
) -> Trials:
    """Trains every method at its own best learning rate, with every seed, and scores the test rows.

    `rates` are on the grid of half decades, and the grid grows until the best lies inside it. The validation rows are
    the task's split of that name, else a tenth of its training rows, which then train nothing. `executor`: any
    `concurrent.futures.Executor` of processes (a pool, Dask's, MPI's); None runs here, one after the other.

    The model is given back as it was. Raises ValueError like `fit`, and before any run for what no run could do.
    """
    from tqdm.auto import tqdm

    if not isinstance(methods, Mapping) or not methods:
        raise TypeError(f"methods is {methods!r}; give names with their methods, such as {{'LoRA': mp.LoRA(rank=8)}}.")
    if not seeds or SEARCH_SEED in seeds:
        raise ValueError(f"seeds is {list(seeds)!r}; give one or more, but not {SEARCH_SEED}, which chooses the rate.")
    rates = on_grid(rates)
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    task, plan = with_validation(as_task(task)), Plan(steps, batch=batch)
    for method in methods.values():
        attach(model, method).detach()  # says what cannot be, before anything is run
    bar = tqdm(total=len(methods) * (len(rates) + len(seeds)), disable=not progress, leave=False, desc="sweep")
    started: dict[tuple, Future | dict] = {}

    def begin(name: str, lr: float, seed: int, split: str) -> Future | dict:
        if (key := (name, lr, seed)) not in started:
            what = (methods[name], replace(plan, lr=lr, seed=seed), task, split, tokenizer)
            started[key] = executor.submit(apart, model, *what) if executor else train(model, *what)
            bar.update(executor is None)
        return started[key]

    def result(*key) -> dict:
        run = begin(*key)
        if isinstance(run, Future):
            run = run.result()
            bar.update()
        return {"method": key[0], "lr": key[1], "seed": key[2]} | run

    try:
        if executor:
            for name in methods:
                for lr in rates:
                    begin(name, float(lr), SEARCH_SEED, "validation")
        best, searched = {}, {}
        for name in methods:
            loss = lambda lr: result(name, float(lr), SEARCH_SEED, "validation")["loss"]  # noqa: E731, B023
            best[name], searched[name] = best_rate(loss, rates)
        keys = [(name, best[name], seed, "test") for name in methods for seed in seeds]
        for key in keys if executor else ():
            begin(*key)
        return Trials(best, searched, [result(*key) for key in keys])
    finally:
        for run in started.values():
            if isinstance(run, Future):
                run.cancel()
        bar.close()


def with_validation(task: Task) -> Task:
    """The task with validation rows: every tenth of its training rows, where it has none."""
    from datasets import DatasetDict

    if missing := {"train", "test"} - set(task.data):
        raise ValueError(f"Task {task.name!r} has no rows for {min(missing)}: it has {', '.join(task.data)}.")
    if "validation" in task.data:
        return task
    rows = task.data["train"]
    held = range(0, len(rows), 10)
    if len(rows) < 2:
        raise ValueError(f"Task {task.name!r} has {len(rows)} training rows, of which none can be held out.")
    trained = rows.select([i for i in range(len(rows)) if i % 10])
    return replace(task, data=DatasetDict(task.data | {"train": trained, "validation": rows.select(held)}))


def train(model: nn.Module, method, plan: Plan, task: Task, split: str, tokenizer) -> dict:
    """One run: its loss in nats a token, inf where it diverged, and its accuracy on the rows of a split."""
    tuned = attach(model, method, seed=plan.seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a rate is too large is what is looked for
            settings = dict(steps=plan.steps, lr=plan.lr, batch=plan.batch, seed=plan.seed)
            history = fit(tuned, task, tokenizer=tokenizer, progress=False, **settings)
            score = evaluate(tuned, task, split, tokenizer=tokenizer) if history.stopped == "finished" else None
        count = tuned.count().trainable
    finally:
        tuned.detach()
    loss = math.inf if score is None or math.isnan(score.loss) else score.loss
    return {"loss": loss, "accuracy": score and score.accuracy, "trainable": count, "stopped": history.stopped}


def apart(model: nn.Module, *what) -> dict:
    """`train` in a process of an executor: on a copy, and with one thread, so that the figures do not depend on it."""
    torch.set_num_threads(1)
    return train(copy.deepcopy(model), *what)
