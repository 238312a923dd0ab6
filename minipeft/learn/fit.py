"""Training and scoring: the same few lines for every method, because a method only decides what is trainable.

history = fit(tuned, task, steps=60, lr=1e-2)          # AdamW, no weight decay
score = evaluate(tuned, task)                          # loss in nats a token, and the task's accuracy
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import nn

from minipeft.attach import Tuned
from minipeft.front import IGNORE
from minipeft.layer import Layer
from minipeft.learn.curves import Picture, curves
from minipeft.learn.master import adamw
from minipeft.learn.peak import PeakMemory, kept
from minipeft.learn.plan import Plan
from minipeft.learn.rows import (
    as_task,
    collate,
    encode,  # noqa: F401  which is known by this address too
    order,
    padding,
    read,
    warn_of_unknown,
)
from minipeft.reading import is_pair
from minipeft.table import table
from minipeft.world.tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Objective = Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]  # (model, batch) -> the loss, a scalar


@dataclass
class History:
    """What a training run did, step by step.

    `losses` in nats a token (before each step's update), `seconds` since the start at the end of each step, `tokens`
    read in all, `peak_memory` in bytes of the tensors alive within one step (0 if no second step was reached),
    `stopped`: "finished", "interrupted", "cancelled" or "diverged".
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    peak_memory: int = 0
    stopped: str = "cancelled"

    def __repr__(self) -> str:
        if not self.losses:
            return f"History({self.stopped} before the first step)"
        last = self.losses[-10:]
        return (
            f"History({self.stopped}: {len(self.losses)} steps, "
            f"loss {self.losses[0]:.3f} → {sum(last) / len(last):.3f}, "
            f"{self.seconds[-1]:.1f} s, {self.tokens:,} tokens, peak {self.peak_memory / 2**20:.1f} MiB)"
        )

    def _repr_html_(self) -> str:
        if not self.losses:
            return table(f"History: {self.stopped}", [("steps", 0)])
        last = self.losses[-10:]
        rows = [
            ("steps", len(self.losses)),
            ("loss of the first batch", f"{self.losses[0]:.3f} nats a token"),
            (f"mean of the last {len(last)}", f"{sum(last) / len(last):.3f} nats a token"),
            ("time", f"{self.seconds[-1]:.1f} s"),
            ("tokens read", f"{self.tokens:,}"),
            ("peak of a step", f"{self.peak_memory / 2**20:.1f} MiB"),
        ]
        return table(f"History: {self.stopped}", rows)

    def plot(self, *others: History, labels: Sequence[str] = (), floor: float | None = None) -> Picture:
        """The loss by step, beside that of other runs: `history.plot(other, labels=["LoRA", "full"])`.

        `floor`: the least loss that is possible, as `task.floor` says; see `curves.curves`.
        """
        runs = (self, *others)
        names = list(labels) or ["this run", *(f"run {i}" for i in range(2, len(runs) + 1))]
        if len(names) != len(runs):
            raise ValueError(f"There are {len(runs)} runs and {len(names)} labels; give each run one.")
        return curves([(name, run.losses) for name, run in zip(names, runs, strict=True)], floor)


@dataclass(frozen=True)
class Score:
    """Mean `loss` in nats a token over `n` rows, `accuracy` where the task has one; for classes each guess, and the
    probability that the model gives it (`confidence`)."""

    loss: float
    n: int
    accuracy: float | None = None
    predictions: tuple[int, ...] = ()
    truth: tuple[int, ...] = ()
    confidence: tuple[float, ...] = ()

    def __repr__(self) -> str:
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.3f}"
        return f"Score(loss {self.loss:.3f} nats a token{accuracy}, {self.n:,} rows)"

    def _repr_html_(self) -> str:
        accuracy = () if self.accuracy is None else (("accuracy", f"{self.accuracy:.3f}"),)
        return table("Score", [("loss", f"{self.loss:.3f} nats a token"), *accuracy, ("rows", f"{self.n:,}")])


def fit(
    model: nn.Module,
    task: Task | Dataset | DatasetDict | list[str],
    steps: int = 60,
    lr: float = 1e-2,
    batch: int = 16,
    seed: int = 0,
    schedule: str = "constant",
    tokenizer=None,
    callback: Callable[[int, History], object] | None = None,
    progress: bool = True,
    objective: Objective | None = None,
) -> History:
    """Train whatever of `model` requires a gradient on `task.data["train"]`.

    θ ← AdamW(θ, ∇ mean loss of a batch) without weight decay. The order of the rows and every dropout mask follow from
    `seed`. `callback(step, history)` is called after each step; returning False stops
    the run. Interrupting the kernel stops it too; model and history stay usable either way.

    Args:
        task: a `Task`, or what `as_task` makes one of: texts, or a data set with `text`, `prompt` and `completion`, or
            `text` and `label`. An encoder–decoder reads the prompt and writes the completion.
        lr: the learning rate; constant, or with `schedule="linear"` rising over the first tenth of the steps and then
            falling to 0.
        tokenizer: the default is the one that `load` put on the model.
        objective: what is minimised, as a function of the model and a batch; None is the model's own loss. `mp.Distil`
            adds a teacher, `mp.Adversarial` the worst step aside. `History.losses` are its values.

    Raises:
        ValueError: for settings, data, model and tokenizer that do not fit together; nothing has changed then.
    """
    from tqdm.auto import tqdm

    history, task = History(), as_task(task)
    run = training(model, task, history, Plan(steps, lr, batch, seed, schedule), tokenizer, objective)
    with tqdm(total=steps, disable=not progress, leave=False, desc=task.name) as bar:
        try:
            for step in run:
                bar.update()
                bar.set_postfix_str(f"loss {history.losses[-1]:.3f}")
                if callback is not None and callback(step, history) is False:
                    break
        except KeyboardInterrupt:
            history.stopped = "interrupted"
        finally:
            run.close()
    return history


def own_loss(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss that the model itself gives for a batch: cross-entropy with the labels."""
    return model(**inputs).loss


def training(
    model: nn.Module, task: Task, history: History, plan: Plan, tokenizer=None, objective: Objective | None = None
) -> Iterator[int]:
    """The loop inside `fit` as a generator: it yields after each step, so a widget can draw, or stop by closing it."""
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if isinstance(model, Tuned):
        model.check_acting("fit")
    encoded = read(model, task, task.data["train"], tokenizer)
    warn_of_unknown(encoded, tokenizer)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("No parameter of the model requires a gradient: attach a method first, e.g. mp.LoRA(rank=8).")
    device = next(p for p in model.parameters() if p.requires_grad).device
    rows = order([len(ids) for ids, _ in encoded], plan.batch, plan.seed)
    pad = padding(model, tokenizer)
    batches = (collate(task.kind, [encoded[i] for i in chosen], tokenizer, device, pad) for chosen in rows)
    return loop(model, batches, history, plan, objective or own_loss)


def loop(
    model: nn.Module, batches: Iterator[dict[str, torch.Tensor]], history: History, plan: Plan, objective: Objective
) -> Iterator[int]:
    """What every training does, whatever a batch is: a step along the objective of each, and what is kept of it."""
    optimizer = adamw(groups(model, plan.lr), lr=plan.lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.share)
    started = time.perf_counter()
    model.train()
    active = model.active if isinstance(model, Tuned) else ()
    try:
        for step in range(plan.steps):
            inputs = next(batches)
            if isinstance(model, Tuned):
                _check_still(model, active)
            if not model.training:  # a callback wrote with it
                model.train()
            memory = PeakMemory(chain(*kept(model, optimizer).values())) if step == 1 else None  # step 0 makes moments
            with torch.random.fork_rng():  # dropout follows from the seed, whatever else is drawn between two steps
                torch.manual_seed(plan.seed * 1_000_003 + step)
                if memory is None:
                    loss = _step(model, inputs, optimizer, objective)
                else:
                    with memory:
                        loss = _step(model, inputs, optimizer, objective)
                    history.peak_memory = memory.peak
            if not math.isfinite(loss):
                history.stopped = "diverged"
                warnings.warn(
                    f"The loss became {loss} at step {step} with lr={plan.lr:g}, so training stopped: "
                    f"start again with a learning rate ten times smaller.",
                    stacklevel=4,
                )
                return
            if step == 0 and isinstance(model, Tuned):
                _warn_of_idle(model.layers())
            scheduler.step()
            history.losses.append(loss)
            history.tokens += int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else 0
            history.seconds.append(time.perf_counter() - started)
            if step == plan.steps - 1:
                history.stopped = "finished"
            yield step
    finally:
        optimizer.zero_grad(set_to_none=True)
        model.eval()


def groups(model: nn.Module, lr: float) -> list[dict]:
    """AdamW's parameter groups: the trainable parameters by learning rate, of which a layer may ask for a multiple."""
    layers = (module for module in model.modules() if isinstance(module, Layer))
    factor = {id(p): rate for layer in layers for p, rate in layer.rates()}
    found: dict[float, list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            found.setdefault(factor.get(id(p), 1.0), []).append(p)
    return [{"params": parameters, "lr": lr * rate} for rate, parameters in found.items()]


def _step(model, inputs, optimizer, objective: Objective = own_loss) -> float:
    """One step; returns the objective's value. What the method adds to it acts on the way back; see `steps.py`."""
    with model.by_itself() if isinstance(model, Tuned) else contextlib.nullcontext():
        loss = objective(model, inputs)
    if not loss.requires_grad:
        raise ValueError(
            "The loss of this batch depends on no number that trains: the model does not use the adapted places for "
            "it, or gradient checkpointing needs enable_input_require_grads() first."
        )
    total = model.along(loss) if isinstance(model, Tuned) else loss
    if torch.isfinite(loss):  # a step along a NaN would spoil the model for good
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
    return loss.item() if torch.isfinite(loss) else math.nan


def _check_still(model: Tuned, active: tuple[str, ...]) -> None:
    """Raises ValueError where a callback took away what the optimizer moves."""
    model.check_acting("fit")
    if model.active != active:
        raise ValueError(
            f"Between two steps the active adapters became {list(model.active)}, and the optimizer moves those of "
            f"{list(active)}; in a callback use tuned.disabled() or tuned.using(), which put back what was."
        )


def _warn_of_idle(layers: list[Layer]) -> None:
    """Says which layers the first step has not reached."""
    learning = {layer.path: layer for layer in layers if any(p.requires_grad for p in layer.parameters())}
    idle = [path for path, layer in learning.items() if not layer.reached()]
    if idle:
        warnings.warn(
            f"{len(idle)} of {len(learning)} places got no gradient in the first step, {idle[0]!r} for one: the loss "
            "of this batch does not depend on them, so they learn nothing from such data.",
            stacklevel=5,
        )


def batches(model: nn.Module, task, n: int, size: int = 16, seed: int = 0, tokenizer=None) -> Iterator[dict]:
    """`n` batches of training rows as `fit` draws them with this `seed`, each what the model is called with."""
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    task = as_task(task)
    Plan(n, batch=size)  # says which of the two is no number of steps, or of rows
    encoded = read(model, task, task.data["train"], tokenizer)
    rows, device = order([len(ids) for ids, _ in encoded], size, seed), next(model.parameters()).device
    for _ in range(n):
        chosen = [encoded[i] for i in next(rows)]
        yield collate(task.kind, chosen, tokenizer, device, padding(model, tokenizer))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task | Dataset | DatasetDict | list[str],
    split: str = "test",
    n: int | None = None,
    tokenizer=None,
) -> Score:
    """Score `model` on (the first `n` rows of) a split of `task`.

    loss = Σ −log p(token | before) / Σ tokens, over all words, over the completion, or over the class; accuracy as
    `Task` explains. The model's mode is put back afterwards.
    """
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    task = as_task(task)
    if split not in task.data:
        raise ValueError(f"Task {task.name!r} has no split {split!r}: it has {', '.join(task.data)}.")
    rows = task.data[split]
    rows = rows if n is None else rows.select(range(min(n, len(rows))))
    encoded = read(model, task, rows, tokenizer)
    device = next(model.parameters()).device
    was_training, pair = model.training, is_pair(model)
    model.eval()
    total, count, right, predictions, confidence = 0.0, 0, 0.0, [0] * len(encoded), [0.0] * len(encoded)
    shortest_first = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))  # little padding, so little waste
    for start in range(0, len(encoded), 64):
        chosen = shortest_first[start : start + 64]
        inputs = collate(task.kind, [encoded[i] for i in chosen], tokenizer, device, padding(model, tokenizer))
        labels = inputs["labels"] if pair else inputs.pop("labels")  # of which a decoder's input is made
        logits = model(**inputs).logits.float()
        if task.kind != "class" and not pair:
            logits, labels = logits[:, :-1], labels[:, 1:]
        kept = labels != IGNORE
        total += nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum").item()
        count += int(kept.sum())
        if task.kind == "class":
            for i, p, guess in zip(chosen, *(each.tolist() for each in logits.softmax(-1).max(-1)), strict=True):
                predictions[i], confidence[i] = guess, p
            right += (logits.argmax(-1) == labels).sum().item()
        elif task.kind == "answer":
            right += _right_answers(logits, labels, kept, task, tokenizer)
    model.train(was_training)
    truth = tuple(rows["label"]) if task.kind == "class" else ()
    accuracy = None if task.metric == "loss" else right / len(encoded)
    return Score(total / count, len(encoded), accuracy, *map(tuple, (predictions, truth, confidence) if truth else ()))


def _right_answers(logits, labels, kept, task: Task, tokenizer) -> int:
    """How many completions are right: every token the likeliest one, or the right group of synonyms at the first."""
    if task.synonyms is None:
        return ((logits.argmax(-1) == labels) | ~kept).all(1).sum().item()
    groups = [torch.tensor(tokenizer.convert_tokens_to_ids(list(words))) for words in task.synonyms.values()]
    first = kept.int().argmax(1)
    rows = torch.arange(len(labels))
    p = logits[rows, first].softmax(-1)
    guess = torch.stack([p[:, ids].sum(-1) for ids in groups], -1).argmax(-1).cpu()
    truth = labels[rows, first].cpu()
    return sum(int(truth[i] in groups[g]) for i, g in enumerate(guess.tolist()))


def report(score: Score, task: Task):
    """Per-class precision, recall and F1 of a class score, as scikit-learn computes them: a pandas DataFrame."""
    import pandas as pd
    from sklearn.metrics import classification_report

    if not score.truth:
        raise ValueError(
            f"A per-class report needs a score of a class task, but {task.name!r} is of kind {task.kind!r}."
        )
    names = list(task.classes) or None
    labels = list(range(len(names))) if names else None
    table = classification_report(
        score.truth, score.predictions, labels=labels, target_names=names, output_dict=True, zero_division=0.0
    )
    table.pop("accuracy", None)
    return pd.DataFrame(table).T.astype({"support": int}).round(3)
