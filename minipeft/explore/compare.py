"""Settings side by side: a point for every seed, a bar at their mean, and what they are to be compared with."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt

from minipeft.course import atlas
from minipeft.explore.slider import BLUE, GREEN, RED
from minipeft.layer import Method


def compare(runs, task: str, methods: Mapping[str, Method], lines: Mapping[str, float] | None = None):
    """What the atlas measured for each method at its best learning rate, after 60 steps: draws it, returns a table.

    `methods` as they are given to `attach`, by the label that they get; `lines` as for `draw_seeds`.
    Raises ValueError for a method that is not in the atlas.
    """
    import pandas as pd

    found = {label: atlas.of(runs, task, method) for label, method in methods.items()}
    best = {label: atlas.best(runs, task, method) for label, method in methods.items()}
    numbers = {label: rows.trainable.iloc[0] for label, rows in found.items()}
    losses = {f"{label}\n{numbers[label]:,}": rows[rows.lr == best[label]["lr"]].loss for label, rows in found.items()}
    floor = next(iter(found.values())).floor.iloc[0]
    draw_seeds(losses, f"{task} after 60 steps", "setting, and numbers trained", floor, lines)
    table = pd.DataFrame(best).T[["lr", "mean", "min", "max"]].astype(float).round({"mean": 2, "min": 2, "max": 2})
    table.insert(0, "numbers", numbers)
    table.index = table.index.str.replace("\n", " ")
    return table.rename(columns={"lr": "best rate", "mean": "loss, mean", "min": "least", "max": "largest"})


def draw_seeds(
    losses: Mapping[str, Sequence[float]], title: str, what: str, floor: float, lines: Mapping[str, float] | None = None
) -> None:
    """`losses` by label and seed, in nats a token; `lines` are further levels to draw, by label."""
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for x, each in enumerate(losses.values()):
        axes.plot([x] * len(each), each, "o", color=BLUE)
        axes.plot([x - 0.2, x + 0.2], [statistics.fmean(each)] * 2, color=BLUE)
    for label, level in (lines or {}).items():
        axes.axhline(level, color=RED, linestyle="--", label=f"{label} {level:.2f}")
    axes.axhline(floor, color=GREEN, linestyle=(0, (6, 2)), label=f"floor of the task {floor:.3f}")
    axes.set_xticks(range(len(losses)), losses, fontsize="small")
    axes.set(xlabel=what, ylabel="test loss (nats a token)", ylim=(0, 1.05 * axes.get_ylim()[1]))
    axes.set_title(f"{title} (points: seeds, bar: mean)", fontsize="medium")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    plt.show()
