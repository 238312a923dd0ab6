"""Training and scoring: the same few lines for every method, because a method only decides what is trainable.

history = fit(tuned, task, steps=60, lr=1e-2)          # AdamW, no weight decay
score = evaluate(tuned, task)                          # loss in nats a token, and the task's accuracy
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import nn

from minipeft.attach import Tuned
from minipeft.front import IGNORE
from minipeft.layer import Layer
from minipeft.learn.peak import PeakMemory, kept
from minipeft.learn.plan import Plan
from minipeft.world.tasks import Task


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


@dataclass(frozen=True)
class Score:
    """Mean `loss` in nats a token over `n` rows, `accuracy` where the task has one, and for classes each guess."""

    loss: float
    n: int
    accuracy: float | None = None
    predictions: tuple[int, ...] = ()
    truth: tuple[int, ...] = ()

    def __repr__(self) -> str:
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.3f}"
        return f"Score(loss {self.loss:.3f} nats a token{accuracy}, {self.n:,} rows)"


def fit(
    model: nn.Module,
    task: Task,
    steps: int = 60,
    lr: float = 1e-2,
    batch: int = 16,
    seed: int = 0,
    schedule: str = "constant",
    tokenizer=None,
    callback: Callable[[int, History], object] | None = None,
    progress: bool = True,
) -> History:
    """Train whatever of `model` requires a gradient on `task.data["train"]`.

    θ ← AdamW(θ, ∇ mean loss of a batch) without weight decay. The order of the rows and every dropout mask follow from
    `seed`. `callback(step, history)` is called after each step; returning False stops
    the run. Interrupting the kernel stops it too; model and history stay usable either way.

    Args:
        lr: the learning rate; constant, or with `schedule="linear"` rising over the first tenth of the steps and then
            falling to 0.
        tokenizer: the default is the one that `load` put on the model.

    Raises:
        ValueError: for settings, data, model and tokenizer that do not fit together; nothing has changed then.
    """
    from tqdm.auto import tqdm

    history = History()
    run = training(model, task, history, Plan(steps, lr, batch, seed, schedule), tokenizer)
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


def training(model: nn.Module, task: Task, history: History, plan: Plan, tokenizer=None) -> Iterator[int]:
    """The loop inside `fit` as a generator: it yields after each step, so a widget can draw, or stop by closing it."""
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if isinstance(model, Tuned):
        model.check_acting("fit")
    rows = _check(model, task, tokenizer)
    encoded = encode(task.kind, rows, tokenizer, _context(model))
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("No parameter of the model requires a gradient: attach a method first, e.g. mp.LoRA(rank=8).")
    return _train(model, task.kind, encoded, tokenizer, history, plan)


def _train(model: nn.Module, kind: str, encoded: list, tokenizer, history: History, plan: Plan) -> Iterator[int]:
    optimizer = torch.optim.AdamW(groups(model, plan.lr), lr=plan.lr, weight_decay=0.0)
    order = _order([len(ids) for ids, _ in encoded], plan.batch, plan.seed)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.share)
    device = next(p for p in model.parameters() if p.requires_grad).device
    started = time.perf_counter()
    model.train()
    try:
        for step in range(plan.steps):
            inputs = collate(kind, [encoded[i] for i in next(order)], tokenizer, device)
            memory = PeakMemory(chain(*kept(model, optimizer).values())) if step == 1 else None  # step 0 makes moments
            with torch.random.fork_rng():  # dropout follows from the seed, whatever else is drawn between two steps
                torch.manual_seed(plan.seed * 1_000_003 + step)
                if memory is None:
                    loss = _step(model, inputs, optimizer, step + 1)
                else:
                    with memory:
                        loss = _step(model, inputs, optimizer, step + 1)
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
            history.tokens += int(inputs["attention_mask"].sum())
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


def _step(model, inputs, optimizer, step: int) -> float:
    """One step; returns the task's loss, without what the method adds to it."""
    loss = model(**inputs).loss
    objective = loss + model.penalty() if isinstance(model, Tuned) else loss
    if torch.isfinite(objective):  # a step along a NaN would spoil the model for good
        optimizer.zero_grad(set_to_none=True)
        objective.backward()
        optimizer.step()
        if isinstance(model, Tuned):
            model.stepped(step)
    return loss.item() if torch.isfinite(objective) else math.nan


def _warn_of_idle(layers: list[Layer]) -> None:
    """Says which layers the first step has not reached."""
    learning = {layer.path: [p for p in layer.parameters() if p.requires_grad] for layer in layers}
    idle = [path for path, numbers in learning.items() if numbers and all(p.grad is None for p in numbers)]
    if idle:
        warnings.warn(
            f"{len(idle)} of {len(learning)} places got no gradient in the first step, {idle[0]!r} for one: the model "
            "did not call them on this batch, so they learn nothing from such data.",
            stacklevel=5,
        )


BLOCK = 8  # batches that are drawn together, so that each can hold rows of similar length: little padding, little waste


def _order(lengths: list[int], batch: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of row numbers: a new permutation each epoch, sorted by length within blocks of BLOCK batches."""
    generator, waiting = torch.Generator().manual_seed(seed), []
    batches = max(1, min(BLOCK, len(lengths) // batch))  # at most an epoch, or sorting would gather copies of a row
    while True:
        while len(waiting) < batches * batch:
            waiting += torch.randperm(len(lengths), generator=generator).tolist()
        block, waiting = sorted(waiting[: batches * batch], key=lengths.__getitem__), waiting[batches * batch :]
        for i in torch.randperm(batches, generator=generator).tolist():
            yield block[i * batch : (i + 1) * batch]


def batches(model: nn.Module, task: Task, n: int, size: int = 16, seed: int = 0, tokenizer=None) -> Iterator[dict]:
    """`n` batches of training rows as `fit` draws them with this `seed`, each what the model is called with."""
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    Plan(n, batch=size)  # says which of the two is no number of steps, or of rows
    rows = _check(model, task, tokenizer)
    encoded = encode(task.kind, rows, tokenizer, _context(model))
    order, device = _order([len(ids) for ids, _ in encoded], size, seed), next(model.parameters()).device
    for _ in range(n):
        yield collate(task.kind, [encoded[i] for i in next(order)], tokenizer, device)


def encode(kind: str, rows, tokenizer, context: int | None) -> list[tuple[list[int], list[int] | int]]:
    """Rows as (token ids, labels): labels are the ids with IGNORE where no loss is taken, or the class of the row.

    Raises:
        ValueError: naming the first row that is longer than the model's context.
    """
    end = tokenizer.eos_token_id
    if kind == "class":
        ids = tokenizer(list(rows["text"])).input_ids if len(rows) else []
        found = list(zip(ids, rows["label"], strict=True))
    elif kind == "text":
        found = []
        for ids in tokenizer(list(rows["text"])).input_ids:
            ids = ids if ids[-1:] == [end] else [*ids, end]
            found.append((ids, ids))
    else:
        prompts = tokenizer(list(rows["prompt"])).input_ids
        answers = tokenizer([f" {text}" for text in rows["completion"]], add_special_tokens=False).input_ids
        found = [(p + a + [end], [IGNORE] * len(p) + a + [end]) for p, a in zip(prompts, answers, strict=True)]
    for i, (ids, _) in enumerate(found):
        if context is not None and len(ids) > context:
            raise ValueError(
                f"Row {i} has {len(ids)} tokens but the model reads at most {context}: shorten or drop it."
            )
    return found


def collate(kind: str, encoded, tokenizer, device) -> dict[str, torch.Tensor]:
    """A batch for the model: input_ids, attention_mask (batch, longest) padded on the right, and labels."""
    width = max(len(ids) for ids, _ in encoded)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in encoded])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in encoded])
    if kind == "class":
        labels = torch.tensor([label for _, label in encoded])
    else:
        labels = torch.tensor([labels + [IGNORE] * (width - len(labels)) for _, labels in encoded])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, split: str = "test", n: int | None = None, tokenizer=None) -> Score:
    """Score `model` on (the first `n` rows of) a split of `task`.

    loss = Σ −log p(token | before) / Σ tokens, over all words, over the completion, or over the class; accuracy as
    `Task` explains. The model's mode is put back afterwards.
    """
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if split not in task.data:
        raise ValueError(f"Task {task.name!r} has no split {split!r}: it has {', '.join(task.data)}.")
    rows = task.data[split]
    rows = rows if n is None else rows.select(range(min(n, len(rows))))
    _check(model, task, tokenizer, rows)
    encoded = encode(task.kind, rows, tokenizer, _context(model))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count, right, predictions = 0.0, 0, 0.0, [0] * len(encoded)
    shortest_first = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))  # little padding, so little waste
    for start in range(0, len(encoded), 64):
        chosen = shortest_first[start : start + 64]
        inputs = collate(task.kind, [encoded[i] for i in chosen], tokenizer, device)
        labels = inputs.pop("labels")
        logits = model(**inputs).logits.float()
        if task.kind != "class":
            logits, labels = logits[:, :-1], labels[:, 1:]
        kept = labels != IGNORE
        total += nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum").item()
        count += int(kept.sum())
        if task.kind == "class":
            for i, guess in zip(chosen, logits.argmax(-1).tolist(), strict=True):
                predictions[i] = guess
            right += (logits.argmax(-1) == labels).sum().item()
        elif task.kind == "answer":
            right += _right_answers(logits, labels, kept, task, tokenizer)
    model.train(was_training)
    truth = tuple(rows["label"]) if task.kind == "class" else ()
    accuracy = None if task.metric == "loss" else right / len(encoded)
    return Score(total / count, len(encoded), accuracy, tuple(predictions) if truth else (), truth)


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


def _context(model) -> int | None:
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def _check(model: nn.Module, task: Task, tokenizer, rows=None):
    """Raise ValueError with one sentence for anything that cannot be trained on; return the training rows."""
    rows = task.data["train"] if rows is None else rows
    if len(rows) == 0:
        raise ValueError(f"Task {task.name!r} has no rows to read: its data set is empty.")
    if tokenizer is None:
        raise ValueError("This model came without a tokenizer: pass tokenizer=…, or load the model with mp.load.")
    devices = {p.device.type for p in model.parameters()}
    if "meta" in devices:
        raise ValueError("The model is on the meta device, which has shapes but no numbers: load it with its weights.")
    if len(devices) > 1:
        raise ValueError(
            f"The model's parameters are spread over {sorted(devices)}: move it to one device with .to(…)."
        )
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if table is not None and len(tokenizer) > table.num_embeddings:
        raise ValueError(
            f"The tokenizer knows {len(tokenizer):,} tokens but the model has embeddings for {table.num_embeddings:,}: "
            f"use the tokenizer that came with the model."
        )
    writes = hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None
    if task.kind == "class":
        if writes:
            raise ValueError(f"Task {task.name!r} asks for a class but the model predicts words: load it with labels=…")
        classes, have = max(rows["label"]) + 1, getattr(model.config, "num_labels", None)
        if have is not None and classes > have:
            raise ValueError(
                f"Task {task.name!r} has {classes} classes but the model only {have}: load it with labels=…"
            )
    elif not writes:
        raise ValueError(f"Task {task.name!r} asks for words but the model predicts classes: load it without labels.")
    return rows
