"""K LoRA runs at once (`fit_many`) against K runs one after the other, with minipeft's `fit` and with HF PEFT.

    python benchmarks/many.py

Ratios of processor time, interleaved in one process, on one thread: what else the machine does disturbs them little.
The second table says how far a run is from the one that it would be alone: rounding, which training amplifies.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
import warnings
from types import SimpleNamespace
from unittest import mock

import peft
import torch

import minipeft as mp
from minipeft.learn.many import fit_many
from minipeft.learn.rows import collate, order, padding, read

RATES = (1e-2, 3e-3)


def ours_at_once(task, count: int, steps: int, batch: int, rank: int) -> float:
    """Seconds a step, without the first: of all runs together."""
    model, _ = mp.load("pocket")
    rates = [RATES[k % 2] for k in range(count)]
    with clock("many"):
        _, (history, *_) = fit_many(
            model, mp.LoRA(rank=rank), task, steps, rates, batch, starts=list(range(count)), progress=False
        )
    return (history.seconds[-1] - history.seconds[0]) / (steps - 1)


def ours_alone(task, steps: int, batch: int, rank: int) -> float:
    model, _ = mp.load("pocket")
    with clock("fit"):
        history = mp.fit(mp.attach(model, mp.LoRA(rank=rank)), task, steps, RATES[0], batch, progress=False)
    return (history.seconds[-1] - history.seconds[0]) / (steps - 1)


def peft_alone(task, steps: int, batch: int, rank: int) -> float:
    """The same rows, loss and optimizer around PEFT's model."""
    model, tokenizer = mp.load("pocket")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    tuned = peft.get_peft_model(model, config).train()
    encoded, pad = read(model, task, task.data["train"], tokenizer), padding(model, tokenizer)
    rows = order([len(ids) for ids, _ in encoded], batch, 0)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], RATES[0], weight_decay=0)
    ends = []
    for _ in range(steps):
        inputs = collate(task.kind, [encoded[i] for i in next(rows)], tokenizer, "cpu", pad)
        loss = tuned(**inputs).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()
        ends.append(time.process_time())
    return (ends[-1] - ends[0]) / (steps - 1)


def clock(room: str):
    """Within it, the `seconds` of a history are of processor time."""
    return mock.patch(f"minipeft.learn.{room}.time", SimpleNamespace(perf_counter=time.process_time))


def ratios(task, counts, batches, steps: int, rank: int, times: int) -> None:
    print(f"{'K':>3} {'batch':>5}   K·fit / fit_many   K·PEFT / fit_many   (rank {rank}, median of {times})")
    for batch in batches:
        for count in counts:
            ours, theirs = [], []
            for _ in range(times):
                many = ours_at_once(task, count, steps, batch, rank)
                ours.append(count * ours_alone(task, steps, batch, rank) / many)
                theirs.append(count * peft_alone(task, steps, batch, rank) / many)
            print(f"{count:>3} {batch:>5}   {statistics.median(ours):>16.2f}   {statistics.median(theirs):>17.2f}")


def drift(task, marks: tuple[int, ...], batch: int, rank: int) -> None:
    """The largest difference of any number of an adapter, and of the loss, after so many steps."""
    print(f"\n{'steps':>5}   numbers   losses")
    for steps in marks:
        tuned, histories = fit_many(
            mp.load("pocket")[0], mp.LoRA(rank=rank), task, steps, list(RATES), batch, progress=False
        )
        numbers, losses = 0.0, 0.0
        for k, rate in enumerate(RATES):
            alone = mp.attach(mp.load("pocket")[0], mp.LoRA(rank=rank))
            history = mp.fit(alone, task, steps, rate, batch, progress=False)
            pairs = zip(tuned.adapters[f"run{k}"].parameters(), alone.adapters["default"].parameters(), strict=True)
            numbers = max(numbers, *((a - b).abs().max().item() for a, b in pairs))
            losses = max(losses, *(abs(a - b) for a, b in zip(histories[k].losses, history.losses, strict=True)))
        print(f"{steps:>5}   {numbers:.1e}   {losses:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = mp.world.pirate()
    with warnings.catch_warnings(), contextlib.suppress(KeyboardInterrupt):
        warnings.simplefilter("ignore")
        ratios(task, options.counts, options.batches, options.steps, options.rank, options.times)
        drift(task, (10, 20, 40), 4, options.rank)


if __name__ == "__main__":
    main()
