"""Learning from a stream that drifts: test on what arrives, then train on it.

Every batch is scored before it is learnt from (the *prequential* loss, Dawid 1984), so no test set is needed:

    batch t:   loss_t = loss of the model on the batch;   then one step of AdamW on the batch

A detector that watches loss_t says when the world has changed. Page and Hinkley's test (Page 1954; Hinkley 1971) adds
up how far each loss lies above the mean of all so far; the alarm is raised when the sum has climbed λ above its lowest:

    m_t = m_{t−1} + (x_t − x̄_t − δ),     alarm when m_t − min_{s≤t} m_s > λ

`follow` has four ways to meet a stream: leave the base alone ("frozen"), train one adapter on and on ("one"), mix every
batch with as many remembered rows ("replay"), and take another adapter at every alarm ("fresh").
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from minipeft.attach import Tuned, attach
from minipeft.layer import Method
from minipeft.learn.fit import _step, evaluate, groups
from minipeft.learn.plan import Plan
from minipeft.learn.rows import as_task, collate, padding, read

WAYS = ("frozen", "one", "replay", "fresh")


@dataclass
class PageHinkley:
    """Page and Hinkley's test for a rise of the mean. `delta`: δ, the rise a value that is let pass; `threshold`: λ, in
    the unit of the values; no alarm before `least` values. `update(x)` takes the next value and says whether there is
    an alarm; after one it begins anew.

    Raises ValueError for a value that is no number, a negative δ, and λ that is not positive.
    """

    delta: float = 0.05
    threshold: float = 1.0
    least: int = 5
    count: int = field(default=0, init=False)
    mean: float = field(default=0.0, init=False)
    total: float = field(default=0.0, init=False)
    lowest: float = field(default=math.inf, init=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.delta) and self.delta >= 0 and math.isfinite(self.threshold) and self.threshold > 0):
            raise ValueError(f"delta must be 0 or more, threshold positive; they are {self.delta}, {self.threshold}.")

    def update(self, x: float) -> bool:
        if not math.isfinite(x):
            raise ValueError(f"A detector watches numbers, but the next value is {x}.")
        self.count += 1
        self.mean += (x - self.mean) / self.count
        # m_t = m_{t−1} + (x_t − x̄_t − δ)
        self.total += x - self.mean - self.delta
        self.lowest = min(self.lowest, self.total)
        alarm = self.count >= self.least and self.total - self.lowest > self.threshold
        if alarm:
            self.reset()
        return alarm

    def reset(self) -> None:
        self.count, self.mean, self.total, self.lowest = 0, 0.0, 0.0, math.inf


@dataclass
class Following:
    """What `follow` saw: `losses` of each batch before it was learnt from, in nats a token; `alarms`, the batches at
    which the detector said that the world has changed; `used`, the adapter that met each batch; `tuned`, which carries
    all of them."""

    tuned: Tuned
    losses: list[float] = field(default_factory=list)
    alarms: list[int] = field(default_factory=list)
    used: list[str] = field(default_factory=list)


def follow(
    model: nn.Module,
    method: Method | Sequence[Method],
    stream: Iterable,
    way: str = "one",
    lr: float = 1e-2,
    steps: int = 1,
    detector: PageHinkley | None = None,
    remember: int = 64,
    seed: int = 0,
) -> Following:
    """Meets every batch of `stream` in one of the WAYS; it ends when the stream does.

    A batch is what `as_task` takes: a list of texts, or a `Dataset`. After its loss is taken, `steps` of AdamW at `lr`
    follow on it. "replay" keeps `remember` rows, each of those seen with the same chance (reservoir sampling, Vitter
    1985), and adds as many of them to every batch as it has. "fresh", at an alarm, goes on with the adapter that
    knows this world, or with a new one; see `choose`.

    Raises ValueError for an unknown way, a stream without batches, and a batch without rows.
    """
    if way not in WAYS:
        raise ValueError(f"There is no way {way!r} to meet a stream; there is {', '.join(WAYS)}.")
    Plan(steps, lr)
    detector = detector or PageHinkley()
    detector.reset()
    tuned, rng, memory, seen = attach(model, method, name="world-0", seed=seed), random.Random(seed), [], 0
    tuned.use(*(["world-0"] if way != "frozen" else []))
    found, learner = Following(tuned), _Learner(tuned, lr, seed)
    try:
        for number, batch in enumerate(stream):
            rows = batch_of(batch, number)
            loss = evaluate(tuned, rows).loss
            if detector.update(loss):
                found.alarms.append(number)
                if way == "fresh":
                    loss = choose(found, method, rows, loss, seed)
            found.losses.append(loss)
            found.used.append(tuned.active[0] if tuned.active else "base")
            if way == "frozen":
                continue
            more = rng.sample(memory, min(len(memory), len(rows))) if way == "replay" else []
            for _ in range(steps):
                learner.step(found.used[-1], rows, more)
            for row in rows:  # each of those seen so far is kept with the same chance
                seen += 1
                if len(memory) < remember:
                    memory.append(row)
                elif (place := rng.randrange(seen)) < remember:
                    memory[place] = row
        if not found.losses:
            raise ValueError("The stream ended before its first batch; give at least one.")
    except BaseException:
        tuned.detach()
        raise
    return found


def batch_of(batch, number: int):
    """The rows of a batch as a data set. Raises ValueError for one without rows."""
    if not len(batch):
        raise ValueError(f"Batch {number} of the stream has no rows; leave it out.")
    return as_task(batch).data["test"]


def choose(found: Following, method: Method | Sequence[Method], rows, alarm: float, seed: int) -> float:
    """Takes the adapter that knows the world of `rows` into use, else a new one; returns its loss there.

    An adapter knows a world when its loss on `rows` is nearer to its own usual one, the mean of the last five batches
    that it met, than to `alarm`, the loss that raised the alarm. Of several the best is taken.
    """
    tuned, known = found.tuned, {}
    for name in list(tuned.adapters):
        met = [loss for loss, used in zip(found.losses, found.used, strict=True) if used == name]
        tuned.use(name)
        loss = evaluate(tuned, rows).loss
        if met and loss < (statistics.fmean(met[-5:]) + alarm) / 2:
            known[name] = loss
    new = f"world-{len(tuned.adapters)}"
    if not known:
        tuned.add(new, method, seed=seed)
    tuned.use(min(known, key=known.get) if known else new)
    return evaluate(tuned, rows).loss


class _Learner:
    """One optimizer for each adapter, so that an adapter that comes back goes on where it was."""

    def __init__(self, tuned: Tuned, lr: float, seed: int):
        self.tuned, self.lr, self.seed, self.taken = tuned, lr, seed, 0
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def step(self, name: str, rows, more: list) -> None:
        from datasets import Dataset, concatenate_datasets

        tuned, tokenizer = self.tuned, self.tuned.tokenizer
        if more:
            rows = concatenate_datasets([rows, Dataset.from_list(more)])
        if name not in self.optimizers:
            self.optimizers[name] = torch.optim.AdamW(groups(tuned, self.lr), lr=self.lr, weight_decay=0.0)
        task = as_task(rows)
        inputs = collate(
            task.kind, read(tuned, task, rows, tokenizer), tokenizer, tuned.device, padding(tuned, tokenizer)
        )
        self.taken += 1
        tuned.train()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed * 1_000_003 + self.taken)
            _step(tuned, inputs, self.optimizers[name])
        tuned.eval()


def forgetting(found: Following, tests: Mapping[str, object]) -> dict[str, float]:
    """Loss on the `tests` of earlier worlds once the stream is over, with the adapter that was last in use; where there
    are several, with the best of them for each world."""
    tuned, last = found.tuned, found.tuned.active
    losses = {}
    for world, rows in tests.items():
        each = []
        for name in dict.fromkeys(found.used):
            tuned.use(*([] if name == "base" else [name]))
            each.append(evaluate(tuned, rows).loss)
        losses[world] = min(each)
    tuned.use(*last)
    return losses


def regimes(grammars: Sequence, lengths: Sequence[int], batch: int = 8, seed: int = 0) -> Iterator[list[str]]:
    """A stream of batches of texts that changes at once: `lengths[i]` batches from `grammars[i]`, then the next."""
    rng = random.Random(seed)
    for grammar, length in zip(grammars, lengths, strict=True):
        for _ in range(length):
            yield [grammar.sample(rng).text for _ in range(batch)]
