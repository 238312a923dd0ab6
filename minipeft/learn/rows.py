"""From rows of text to the batches that a model is called with: what `fit` and `evaluate` read and refuse."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from minipeft.attach import Tuned
from minipeft.front import IGNORE
from minipeft.reading import is_pair, longest
from minipeft.world.tasks import Task

COLUMNS = {"text": ("text",), "answer": ("prompt", "completion"), "class": ("text", "label")}
Encoded = list[tuple[list[int], list[int] | int]]


def as_task(data) -> Task:
    """The task itself, or one made of what people have: a list of texts, or of rows as dicts, a `datasets.Dataset` or
    `DatasetDict` with the columns `text`, `prompt` and `completion`, or `text` and `label`. Rows without splits are for
    training and testing.
    """
    from datasets import Dataset, DatasetDict

    if isinstance(data, Task):
        return data
    if isinstance(data, list | tuple) and data:
        kind = dict if isinstance(data[0], dict) else str
        for i, row in enumerate(data):
            if not isinstance(row, kind) or (kind is dict and row.keys() != data[0].keys()):
                wanted = "a text" if kind is str else f"a row with {sorted(data[0])} as row 0"
                raise TypeError(f"Row {i} is {str(row)[:60]!r}, not {wanted}.")
        data = Dataset.from_list([row if kind is dict else {"text": row} for row in data])
    if isinstance(data, Dataset):
        data = DatasetDict(train=data, test=data)
    if not isinstance(data, DatasetDict):
        what = "an empty list" if isinstance(data, list | tuple) else f"a {type(data).__name__}"
        raise TypeError(f"task is {what}; give a Task, a list of texts, or a datasets.Dataset.")
    there = set(next(iter(data.values())).column_names)
    kind = next((kind for kind in ("class", "answer", "text") if there.issuperset(COLUMNS[kind])), None)
    if kind is None:
        raise ValueError(
            f"The data has the columns {sorted(there)}; it needs text, text and label, or prompt and completion."
        )
    return Task("data", kind, data, metric="accuracy" if kind == "class" else "loss")


BLOCK = 8  # batches that are drawn together, so that each can hold rows of similar length: little padding, little waste


def order(lengths: list[int], batch: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of row numbers: a new permutation each epoch, sorted by length within blocks of BLOCK batches."""
    generator, waiting = torch.Generator().manual_seed(seed), []
    batches = max(1, min(BLOCK, len(lengths) // batch))  # at most an epoch, or sorting would gather copies of a row
    while True:
        while len(waiting) < batches * batch:
            waiting += torch.randperm(len(lengths), generator=generator).tolist()
        block, waiting = sorted(waiting[: batches * batch], key=lengths.__getitem__), waiting[batches * batch :]
        for i in torch.randperm(batches, generator=generator).tolist():
            yield block[i * batch : (i + 1) * batch]


def read(model: nn.Module, task: Task, rows, tokenizer) -> Encoded:
    """The rows as (token ids, labels), all checked: labels are ids with IGNORE where no loss is taken, or a class.

    Raises ValueError, naming the row, for what cannot be read or is longer than the model reads; nothing has changed.
    """
    check_model(model, task, tokenizer)
    check_rows(task, rows, getattr(getattr(model, "config", None), "num_labels", None))
    pair = is_pair(model)
    if pair and task.kind == "text":
        raise ValueError("An encoder–decoder reads one text and writes another: give prompt and completion, not text.")
    if padding(model, tokenizer) is None:
        raise ValueError("Neither model nor tokenizer has a token for padding; set tokenizer.pad_token.")
    in_front = model.in_front if isinstance(model, Tuned) else 0
    return encode(task.kind, rows, tokenizer, longest(model), pair, in_front)


def encode(kind: str, rows, tokenizer, context: int | None = None, pair: bool = False, in_front: int = 0) -> Encoded:
    """Rows as (token ids, labels). An end mark stands once, at the end, whatever the tokenizer appends.

    For a `pair` of encoder and decoder the ids are the prompt's and the labels the completion's.

    Raises:
        ValueError: naming the first row that is longer than `context` less the vectors `in_front`, and for a tokenizer
            without an end.
    """
    end = tokenizer.eos_token_id
    if kind != "class" and end is None:
        raise ValueError("The tokenizer has no token for the end of a text; set tokenizer.eos_token.")

    def tokens(texts: Sequence[str], **how) -> list[list[int]]:
        ids = tokenizer(list(texts), **how).input_ids if len(texts) else []
        return ids if kind == "class" else [each[:-1] if each[-1:] == [end] else each for each in ids]

    if kind == "class":
        found = list(zip(tokens(rows["text"][:]), rows["label"], strict=True))
    elif kind == "text":
        found = [([*ids, end],) * 2 for ids in tokens(rows["text"][:])]
    else:
        prompts = tokens(rows["prompt"][:])
        answers = tokens([f" {text}" for text in rows["completion"][:]], add_special_tokens=False)
        if pair:
            found = [([*p, end], [*a, end]) for p, a in zip(prompts, answers, strict=True)]
        else:
            found = [([*p, *a, end], [IGNORE] * len(p) + [*a, end]) for p, a in zip(prompts, answers, strict=True)]
    for i, (ids, labels) in enumerate(found):
        long = max(len(ids), len(labels) if pair else 0)
        if context is not None and long > context - in_front:
            behind = f" behind the {in_front} vectors in front" if in_front else ""
            most = f"{context - in_front}{behind}"
            raise ValueError(f"Row {i} has {long} tokens but the model reads at most {most}: shorten or drop it.")
    return found


def padding(model: nn.Module, tokenizer) -> int | None:
    """The model's own token for padding, by which a classifier finds the end of a text; else the tokenizer's."""
    tokens = (
        getattr(getattr(model, "config", None), "pad_token_id", None),
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    )
    return next((token for token in tokens if token is not None), None)


def collate(kind: str, encoded: Encoded, tokenizer, device, pad: int | None = None) -> dict[str, torch.Tensor]:
    """A batch for the model: input_ids, attention_mask (batch, longest) padded on the right, and labels."""
    pad = (
        pad
        if pad is not None
        else tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id
    )

    def padded(lists: Sequence[list[int]], filler: int) -> torch.Tensor:
        width = max(map(len, lists))
        return torch.tensor([each + [filler] * (width - len(each)) for each in lists]).to(device)

    ids, labels = zip(*encoded, strict=True)
    mask = padded([[1] * len(each) for each in ids], 0)
    labels = torch.tensor(labels).to(device) if kind == "class" else padded(labels, IGNORE)
    return {"input_ids": padded(ids, pad), "attention_mask": mask, "labels": labels}


def warn_of_unknown(encoded: Encoded, tokenizer) -> None:
    """Says so where more than a hundredth of the tokens stand for words that the tokenizer does not know."""
    unknown = tokenizer.unk_token_id
    counts = [ids.count(unknown) for ids, _ in encoded]
    total = sum(len(ids) for ids, _ in encoded)
    if unknown is not None and sum(counts) > total / 100:
        worst = max(range(len(counts)), key=counts.__getitem__)
        warnings.warn(
            f"{100 * sum(counts) / total:.0f} % of the tokens are words that the tokenizer lacks (row {worst} has "
            f"{counts[worst]}), and the model reads all of them as one.",
            stacklevel=4,
        )


def check_rows(task: Task, rows, classes: int | None) -> None:
    if len(rows) == 0:
        raise ValueError(f"Task {task.name!r} has no rows to read: its data set is empty.")
    for column in COLUMNS[task.kind]:
        if column not in rows.column_names:
            raise ValueError(f"Task {task.name!r} is of kind {task.kind!r}, so its rows need a column {column!r}.")
        for i, value in enumerate(rows[column][:]):  # a column read row by row takes ten times as long
            if column == "label":
                if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                    raise ValueError(
                        f"Row {i} has the label {value!r}, which is no class; classes are 0, 1, 2 and so on."
                    )
            elif not isinstance(value, str) or not value.strip():
                what = "is empty" if isinstance(value, str) else f"is {value!r} and no text"
                raise ValueError(f"The {column} of row {i} {what}: fill it in or drop the row.")
    if task.kind == "class" and classes is not None and (most := max(rows["label"]) + 1) > classes:
        raise ValueError(f"Task {task.name!r} has {most} classes but the model only {classes}: load it with labels=…")


def check_model(model: nn.Module, task: Task, tokenizer) -> None:
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
    if task.kind == "class" and writes:
        raise ValueError(f"Task {task.name!r} asks for a class but the model predicts words: load it with labels=…")
    if task.kind != "class" and not writes:
        raise ValueError(f"Task {task.name!r} asks for words but the model predicts classes: load it without labels.")
