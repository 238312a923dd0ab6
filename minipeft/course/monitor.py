"""An opinion monitor: sentences come in, their sentiment is read, and an alarm says when opinion has turned.

    sentence ──▶ encoder with LoRA ──▶ p(negative) ──▶ mean of a batch, x_t ──▶ Page and Hinkley's test ──▶ alarm

`python -m minipeft.course.monitor --folder runs` measures what the reading costs, once, and ships it: p(positive) of
every validation and test tweet, by five seeds. Streams are drawn from these: calm ones, on which each alarm is false,
and some in which the share of positive tweets falls. λ is chosen on streams of validation tweets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from minipeft.course.notes import Notes
from minipeft.course.notes import measure as measure_parts
from minipeft.learn.protocol import SEARCH_SEED, SEEDS
from minipeft.learn.stream import PageHinkley

FILE = Path(__file__).with_name("monitor.json")
DOMAIN, OTHER, STEPS, BATCH = "tweets", "products", 100, 8
HELD, FALLS, LENGTH, TURN = 0.7, 0.4, 60, 30  # share of positive tweets before and after batch TURN of a stream
SIZE, DELTA, STREAMS = 8, 0.05, 100  # tweets a batch, δ, streams of a kind
THRESHOLDS, ALLOWED = (0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0), 2.0  # λ; false alarms that may be in 1,000 batches


# Reading --------------------------------------------------------------------------------------------------------------
@cache
def reader():
    """MiniLM whose last layer and classifier learn; see `course/upper.py`."""
    from minipeft.course.upper import Upper

    return Upper(below=5)


@cache
def tweets(domain: str = DOMAIN):
    from minipeft.world.real import reviews

    return reviews(domain)


def learnt(lr: float, seed: int, steps: int = STEPS):
    """The encoder after `steps` batches of labelled tweets, with LoRA of rank 8 and a classifier."""
    from minipeft.attach import attach
    from minipeft.learn.fit import fit
    from minipeft.methods.lora import LoRA
    from minipeft.methods.select import Full

    linear = re.compile(r"above\..*(query|key|value|dense)")
    head = Full(targets=["classifier.weight", "classifier.bias"])
    tuned = attach(reader(), [LoRA(rank=8, targets=linear), head], seed=seed)
    fit(tuned, tweets(), steps, lr, BATCH, seed, "linear", progress=False)
    return tuned


def read(tuned, rows) -> list[float]:
    """p(positive) of each row's text."""
    from minipeft.learn.fit import evaluate

    score = evaluate(tuned, rows)
    return [round(c if guess else 1 - c, 3) for c, guess in zip(score.confidence, score.predictions, strict=True)]


def run(lr: float, seed: int) -> dict:
    from minipeft.learn.fit import evaluate

    tuned = learnt(lr, seed)
    try:
        if seed == SEARCH_SEED:
            return {"loss": evaluate(tuned, tweets(), "validation").loss}
        other = tweets(OTHER)["test"].select(range(400))
        found = {split: read(tuned, tweets()[split]) for split in ("validation", "test")}
        return found | {"other": read(tuned, other), "accuracy": evaluate(tuned, tweets()).accuracy}
    finally:
        tuned.detach()


def measure(notes: Notes) -> dict:
    lr = notes.best_rate("monitor", lambda lr: run(lr, SEARCH_SEED)["loss"], (1e-3, 3e-3))
    runs = [{"seed": seed} | notes.get(f"monitor {seed}", lambda s=seed: run(lr, s)) for seed in SEEDS]
    return {"rate": lr, "runs": runs}


def measured() -> dict:
    """What `measure` found when the course was made."""
    return json.loads(FILE.read_text(encoding="utf-8"))["monitor"]


# Streams --------------------------------------------------------------------------------------------------------------
def drawn(labels: Sequence[int], share: Sequence[float], seed: int) -> list[list[int]]:
    """Numbers of tweets, SIZE for each batch, of which a share is positive: share[t] is that of batch t.

    Raises ValueError where a class is missing, for then no share can be drawn."""
    labels = np.asarray(labels)
    by = [np.flatnonzero(labels == wanted) for wanted in (0, 1)]
    if not all(map(len, by)):
        raise ValueError("A stream needs positive and negative sentences, but one class has none.")
    rng, size = np.random.default_rng(seed), (len(share), SIZE)
    negative, positive = (rng.choice(each, size) for each in by)
    return np.where(rng.random(size) < np.asarray(share)[:, None], positive, negative).tolist()


def calm() -> list[float]:
    return [HELD] * LENGTH


def turning(after: float = FALLS) -> list[float]:
    return [HELD] * TURN + [after] * (LENGTH - TURN)


def values(p: Sequence[float], stream: Sequence[Sequence[int]]) -> list[float]:
    """x_t, how negative each batch is: the mean of 1 − p(positive)."""
    return [sum(1 - p[i] for i in batch) / len(batch) for batch in stream]


def alarms(x: Sequence[float], threshold: float) -> list[int]:
    """The batches at which Page and Hinkley's test raises an alarm."""
    detector = PageHinkley(DELTA, threshold)
    return [t for t, value in enumerate(x) if detector.update(value)]


def streams(labels: Sequence[int], share: Sequence[float], seed: int = 0) -> list[list[list[int]]]:
    """STREAMS streams of one kind."""
    labels = np.asarray(labels)  # once, as a column of a data set is slow to read
    return [drawn(labels, share, seed + n) for n in range(STREAMS)]


def false_alarms(calm: Sequence[Sequence[float]], threshold: float) -> int:
    """Alarms on the values of calm streams, all of which are false."""
    return sum(len(alarms(x, threshold)) for x in calm)


def delays(turned: Sequence[Sequence[float]], threshold: float) -> list[int | None]:
    """Of each turning stream, how many batches after the turn the first alarm came; None where none came."""
    late = [[t - TURN for t in alarms(x, threshold) if t >= TURN] for x in turned]
    return [each[0] if each else None for each in late]


def chosen(calm: Sequence[Sequence[float]]) -> float:
    """The least λ of THRESHOLDS with at most ALLOWED false alarms in 1,000 calm batches, else the largest."""
    within = ALLOWED / 1000 * sum(map(len, calm))
    return next((t for t in THRESHOLDS if false_alarms(calm, t) <= within), THRESHOLDS[-1])


def rate(count: int, batches: int) -> tuple[float, float, float]:
    """(alarms in 1,000 batches, and the exact 95 % interval of that, as counts are Poisson's)."""
    from scipy.special import gammaincinv  # scipy.stats' chi² divided by 2, without a second's import

    low = gammaincinv(count, 0.025) if count else 0.0
    return tuple(1000 * float(n) / batches for n in (count, low, gammaincinv(count + 1, 0.975)))


if __name__ == "__main__":
    measure_parts(FILE, {"monitor": measure}, __doc__.splitlines()[0])
