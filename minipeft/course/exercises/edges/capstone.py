"""The edges of the assignment `capstone`."""

from __future__ import annotations

import math
import statistics
from random import Random

import torch

from minipeft.course.exercises.draw import normal


def macro_f1(truth, predictions, classes):
    total = 0.0
    for c in range(classes):
        pairs = [(t == c, p == c) for t, p in zip(truth, predictions, strict=True)]
        found, named, there = (sum(map(f, pairs)) for f in (all, lambda x: x[1], lambda x: x[0]))
        total += 2 * found / (named + there) if found else 0.0
    return total / classes


def f1_edges(rng: Random):
    yield "count a class that nothing belongs to, and that is never named, as 0", ([0, 1, 1], [0, 1, 0], 3)
    yield "hold where every answer is wrong", ([0, 1], [1, 0], 2)
    yield "be 1 where every answer is right", ([2, 0, 1], [2, 0, 1], 3)
    yield "hold where only one class is ever named", ([0, 0, 0, 1], [0, 0, 0, 0], 2)
    yield "hold for one row", ([1], [1], 2)
    yield "hold for a thousand classes", ([999, 700, 5, 999], [999, 700, 700, 5], 1000)


def calibration_error(probabilities, truth, bins=10):
    confidence, said = probabilities.max(-1)
    place = (confidence * bins).ceil().long() - 1
    gaps = ((said == truth).to(confidence.dtype) - confidence).double()
    return sum(gaps[place == b].sum().abs().item() for b in range(bins)) / len(gaps)


def calibration_edges(rng: Random):
    sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    yield "be 0 for a model that is sure and right", (sure, torch.tensor([0, 1]), 10)
    yield "be 1 for a model that is sure and wrong", (sure, torch.tensor([1, 0]), 10)
    yield "hold for one row", (sure[:1], torch.tensor([0]), 4)
    half = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5], [0.0, 0.25, 0.75]], dtype=torch.float64)
    yield "put a confidence of 1/2 into the lower of two bins", (half, torch.tensor([0, 2, 0]), 2)
    yield "put 1/2 and 3/4 into bins 2 and 3 of four", (half, torch.tensor([1, 2, 1]), 4)
    yield "keep 1/2 and 3/4 apart in four bins", (half, torch.tensor([0, 2, 1]), 4)
    P = normal(rng, 30, 3, dtype=torch.float64).softmax(-1)
    truth = torch.tensor([rng.randrange(3) for _ in range(30)])
    yield "use ten bins where nothing is said", (P, truth)
    yield "hold for one bin", (P, truth, 1)


def stop_early(losses, patience):
    best, least = 0, math.inf
    for i, loss in enumerate(losses):
        if loss < least and math.isfinite(loss):
            best, least = i, loss
        elif i - best >= patience:
            return i, best
    return len(losses) - 1, best


def stop_edges(rng: Random):
    yield "hold for one look", ([3.0], 1)
    yield "go to the end where it gets better all the time", ([3.0, 2.0, 1.0], 1)
    yield "stop after patience looks where it only gets worse", ([1.0, 2.0, 3.0, 4.0], 2)
    yield "not take NaN for the best", ([2.0, math.nan, 1.0, math.nan, math.nan], 2)
    yield "keep the first of equal looks", ([2.0, 1.0, 1.0, 1.0], 2)
    falling = [1.0, 4.0, 3.0, 2.0, 1.5, 0.5]
    yield "count the looks since the best, though each is better than the one before", (falling, 3)
    yield "stop at the very last look", ([1.0, 2.0, 2.0], 2)
    yield "name the very last look where patience was not used up", ([3.0, 1.0, 2.0], 2)
    yield "count a loss that is less by very little", ([1.0, 0.99999, 0.99998, 0.99997], 2)
    yield "count a loss that is less in the last digit alone", ([1.0, 1.0 - 1e-15, 1.0 - 2e-15, 1.0 - 3e-15], 2)
    yield "take a loss of 0 for a loss", ([2.0, 0.0, 1.0, 0.0, 0.5], 3)
    yield "take negative losses", ([2.0, -1.0, -3.0, -2.0, -3.0], 2)
    yield "count a look that is NaN as one that was not better", ([2.0, math.nan, 3.0, 1.0], 2)
    yield "not take minus infinity for the best", ([2.0, -math.inf, 1.0, 3.0, -math.inf], 3)
    yield "let an infinite loss pass", ([5.0, math.inf, 4.0, 3.0], 2)


def choose_rate(losses):
    means = {rate: sum(each) / len(each) for rate, each in losses.items()}
    finite = {rate: mean for rate, mean in means.items() if math.isfinite(mean)}
    if not finite:
        raise ValueError("Every rate diverged: try smaller ones.")
    best = min(finite, key=finite.get)
    return best, min(losses) < best < max(losses)


def rate_edges(rng: Random):
    yield "say that the only rate is not inside", ({0.01: [2.0]},)
    yield "say that the smallest rate is not inside", ({0.01: [1.0, 1.2], 0.03: [2.0, 2.0], 0.1: [3.0, 3.0]},)
    yield "say that the largest rate is not inside", ({0.1: [1.0], 0.01: [3.0], 0.03: [2.0]},)
    yield "count rates that diverged on both sides as tried", ({1.0: [math.inf], 0.1: [2.0], 0.01: [math.nan]},)
    yield "raise a ValueError where the only rate diverged", ({0.1: [math.nan]},)
    yield "take the mean over the seeds, not the median", ({0.1: [1.0, 1.0, 4.0], 0.01: [1.5, 1.5, 1.5]},)
    yield "take a loss of 0 for a loss", ({0.1: [0.0, 0.0], 0.01: [1.0, 1.0], 1.0: [0.5, 0.5]},)
    yield "take what is less by a thousandth", ({0.01: [1.0015], 0.1: [1.0012], 1.0: [1.0011], 10.0: [1.0013]},)
    yield "take large losses", ({0.1: [3e5, 1e5], 0.01: [1e6, 1e6], 1.0: [2.5e5, 1e5]},)
    yield "take negative losses", ({0.1: [-3.0, -1.0], 0.01: [-1.0, -1.5], 1.0: [2.0, -4.0]},)
    yield "take the mean where rates have unequally many seeds", ({0.1: [1.0], 0.01: [0.5, 0.9], 1.0: [2.0, 2.0, 2.0]},)
    yield "go by size, not by the order of the rates", ({0.03: [1.0], 0.1: [2.0], 0.01: [2.0]},)


def recipe(shapes, budget):
    d_out, d_in = shapes["lower"]
    rank = min(8, budget // (d_in + d_out))
    return {"method": "LoRA", "settings": {"rank": rank, "targets": ["lower"]}, "lr": 2e-2, "steps": 120}


def cheapest_alike(scores, cost, matters, t):
    best = max(scores, key=lambda name: statistics.fmean(scores[name]))

    def worst_loss(name):
        gaps = [b - s for b, s in zip(scores[best], scores[name], strict=True)]
        return statistics.fmean(gaps) + t * statistics.stdev(gaps) / math.sqrt(len(gaps))

    near = [name for name in scores if name == best or worst_loss(name) <= matters]
    return min(near, key=lambda name: cost[name])


def choice_edges(rng: Random):
    yield "hold for one candidate", ({"LoRA": [0.8, 0.9]}, {"LoRA": 5.0}, 0.02, 12.706)
    same = {"b": [0.5, 0.75, 0.5], "a": [0.5, 0.75, 0.5]}
    yield "take the cheaper of two that score the same", (same, {"a": 1.0, "b": 2.0}, 0.0, 4.303)
    yield "look costs up by name", (same, {"b": 1.0, "a": 2.0}, 0.0, 4.303)
    loose = {"best": [0.75] * 3, "loose": [0.25, 0.75, 1.0]}
    yield "keep the best where nothing else is sure", (loose, {"best": 9.0, "loose": 1.0}, 0.1, 4.303)
    unsteady, dear = {"best": [1.0, 0.5, 1.0], "steady": [0.75] * 3}, {"best": 9.0, "steady": 1.0}
    yield "take the largest mean for the best, however its seeds scatter", (unsteady, dear, 0.1, 4.303)
    swinging = {"best": [0.9, 0.5, 0.7], "cheap": [0.5, 0.7, 0.875]}
    yield "pair the runs by their seeds", (swinging, {"best": 2.0, "cheap": 1.0}, 0.1, 4.303)
    even = {"best": [0.75, 0.5, 0.625], "cheap": [0.75, 0.75, 0.375]}
    yield "let a run that is better make up for one that is worse", (even, {"best": 2.0, "cheap": 1.0}, 0.2, 1.0)
    yield "take a method that costs nothing", (even, {"best": 1.0, "cheap": 0.0}, 0.2, 1.0)
    behind = {"best": [0.75, 0.5], "cheap": [0.7421875, 0.4921875]}
    yield "allow no loss where nothing matters less", (behind, {"best": 2.0, "cheap": 1.0}, 0.0, 12.706)
    steady = {"best": [0.75, 0.5, 1.0], "near": [0.5, 0.25, 0.75], "far": [0.0, 0.0, 0.0]}
    yield "take one whose loss is exactly what matters", (steady, {"best": 3.0, "near": 2.0, "far": 1.0}, 0.25, 4.303)


NUMBERS = {"gradient": "it is a measurement, without a gradient of its own", "types": "it returns a Python number"}
PARALLEL = {"order": "its lists are parallel"}
EDGES = {
    "macro_f1": {"reference": (macro_f1,), "edges": f1_edges, "without": PARALLEL},
    "calibration_error": {
        "reference": (calibration_error,),
        "edges": calibration_edges,
        "without": NUMBERS | PARALLEL | {"sizes": "probabilities lie between 0 and 1"},
    },
    "stop_early": {
        "reference": (stop_early,),
        "edges": stop_edges,
        "without": {"order": "losses stand in the order of time"},
    },
    "choose_rate": {"reference": (choose_rate,), "edges": rate_edges},
    "recipe": {
        "reference": (recipe,),
        "without": dict.fromkeys(
            ("gradient", "strided", "types", "defaults", "order", "memory", "again"),
            "it is trained in its drive, on pictures",
        ),
    },
    "cheapest_alike": {
        "positive": ("matters", "t"),
        "reference": (cheapest_alike,),
        "edges": choice_edges,
        "without": PARALLEL,
    },
}
