"""What needs no model: the baseline that a trained one has to beat.

class          p(label) = how often it stands in the training rows; the guess is the most frequent
text, answer   p(token) = (how often it stands in the training rows + 1) / (all tokens there + vocabulary)
"""

from __future__ import annotations

import torch

from minipeft.front import IGNORE
from minipeft.learn.fit import Score
from minipeft.learn.rows import as_task, encode


def trivial(task, tokenizer=None, split: str = "test") -> Score:
    """Counts on the training rows, scored on the rows and tokens of `split` that `evaluate` scores.

    `tokenizer`: needed where words are predicted. Raises ValueError for a split that the task lacks.
    """
    task = as_task(task)
    if split not in task.data:
        raise ValueError(f"Task {task.name!r} has no split {split!r}: it has {', '.join(task.data)}.")
    rows, train = task.data[split], task.data["train"]
    if task.kind == "class":
        seen, truth, size = (
            torch.tensor(train["label"]),
            torch.tensor(rows["label"]),
            1 + max(*train["label"], *rows["label"]),
        )
    else:
        if tokenizer is None:
            raise ValueError("Counting words needs a tokenizer: pass the one that came with the model.")
        seen, truth = (_scored(encode(task.kind, part, tokenizer)) for part in (train, rows))
        size = len(tokenizer)
    counts = torch.bincount(seen, minlength=size) + 1.0
    loss = -(counts / counts.sum()).log()[truth].mean().item()
    if task.kind != "class":
        return Score(loss, len(rows))
    guess = int(counts.argmax())
    accuracy = (truth == guess).float().mean().item()
    return Score(loss, len(rows), accuracy, (guess,) * len(rows), tuple(truth.tolist()))


def _scored(encoded: list) -> torch.Tensor:
    """The tokens that a causal model is scored on: all labels but the first of a text, before which there is none."""
    return torch.tensor([token for _, labels in encoded for token in labels[1:] if token != IGNORE])
