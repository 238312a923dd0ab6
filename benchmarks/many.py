"""K LoRA runs at once (`fit_many`) against K runs one after the other, with minipeft's `fit` and with HF PEFT.

python benchmarks/many.py               the ratios
python benchmarks/many.py --drift       how far a run is from the one that it would be alone: rounding, amplified
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Iterator

import peft
import torch
from side_by_side import DEVICE, Figure, figure, main

import minipeft as mp
from minipeft.learn.many import fit_many
from minipeft.learn.rows import collate, order, padding, read

RATES, RANK = (1e-2, 3e-3), 8
ASKED = {(16, 2): "≥ 1.5", (16, 4): "≥ 1.25"}


def ours_at_once(task, count: int, steps: int, batch: int) -> float:
    """Seconds a step of all runs together: the median, so that the first, which is slower, does not count."""
    rates = [RATES[k % 2] for k in range(count)]
    starts = list(range(count))
    model = mp.load("pocket")[0].to(DEVICE)
    return pace(fit_many(model, mp.LoRA(rank=RANK), task, steps, rates, batch, starts=starts, progress=False)[1][0])


def ours_alone(task, steps: int, batch: int) -> float:
    tuned = mp.attach(mp.load("pocket")[0].to(DEVICE), mp.LoRA(rank=RANK))
    return pace(mp.fit(tuned, task, steps, RATES[0], batch, progress=False))


def pace(history) -> float:
    return statistics.median(b - a for a, b in itertools.pairwise(history.seconds))


def peft_alone(task, steps: int, batch: int) -> float:
    """The same rows, loss and optimizer around PEFT's model."""
    model, tokenizer = mp.load("pocket")
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    encoded, pad = read(model, task, task.data["train"], tokenizer), padding(model, tokenizer)
    tuned = peft.get_peft_model(model, config).train().to(DEVICE)
    rows = order([len(ids) for ids, _ in encoded], batch, 0)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], RATES[0], weight_decay=0)
    ends = []
    for _ in range(steps):
        inputs = collate(task.kind, [encoded[i] for i in next(rows)], tokenizer, DEVICE, pad)
        loss = tuned(**inputs).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()
        ends.append(time.perf_counter())
    return statistics.median(b - a for a, b in itertools.pairwise(ends))


def figures(quick: bool = False) -> Iterator[Figure]:
    task, steps, times = mp.world.pirate(), 4 if quick else 8, 2 if quick else 3
    for batch in (2,) if quick else (2, 4, 10):
        for count in (2,) if quick else (1, 4, 16, 64) if batch == 2 else (1, 4, 16):
            many, fits, pefts = [], [], []
            for _ in range(times):
                many.append(ours_at_once(task, count, steps, batch))
                fits.append(count * ours_alone(task, steps, batch))
                pefts.append(count * peft_alone(task, steps, batch))
            label = f"K = {count} runs of batch {batch} at once"
            yield figure(label, "PEFT's one by one / ours", pefts, many, ASKED.get((count, batch), ""))
            yield figure(label, "fit's one by one / ours", fits, many)


def drift(marks: tuple[int, ...] = (10, 20, 40), batch: int = 4) -> None:
    """Prints the largest difference of any number of an adapter, and of the loss, after so many steps."""
    task = mp.world.pirate()
    print(f"{'steps':>5}   numbers   losses")
    for steps in marks:
        tuned, histories = fit_many(
            mp.load("pocket")[0], mp.LoRA(rank=RANK), task, steps, list(RATES), batch, progress=False
        )
        numbers, losses = 0.0, 0.0
        for k, rate in enumerate(RATES):
            alone = mp.attach(mp.load("pocket")[0], mp.LoRA(rank=RANK))
            history = mp.fit(alone, task, steps, rate, batch, progress=False)
            pairs = zip(tuned.adapters[f"run{k}"].parameters(), alone.adapters["default"].parameters(), strict=True)
            numbers = max(numbers, *((a - b).abs().max().item() for a, b in pairs))
            losses = max(losses, *(abs(a - b) for a, b in zip(histories[k].losses, history.losses, strict=True)))
        print(f"{steps:>5}   {numbers:.1e}   {losses:.1e}")


if __name__ == "__main__":
    drift() if "--drift" in sys.argv else main(figures, __doc__)
