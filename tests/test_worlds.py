"""Lesson 14's measured runs, the rules that judge them, and its explorer."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

import minipeft as mp
from minipeft.course import notes, worlds
from minipeft.learn.averaging import RULES
from minipeft.learn.federated import State, Update, aggregate, fresh


def test_verdicts_on_both_sides():
    low, high = [1.0, 1.1, 0.9, 1.05, 0.95], [2.0, 2.1, 2.2, 2.0, 1.9]
    assert notes.verdict(low, high, 0.1) == "lower" and notes.verdict(high, low, 0.1) == "higher"
    assert notes.verdict(low, [v + 0.01 for v in low], 0.1) == "no different"
    assert notes.verdict(low, [0.5, 1.9, 1.0, 0.4, 1.6], 0.1) == "cannot tell"
    assert notes.verdict(low, [v + 0.1 + (i % 2) / 9 for i, v in enumerate(low)], 0.1) == "cannot tell"
    mean, below, above = notes.paired([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert mean == 2.0 and above - 2 == pytest.approx(4.302653 / 3**0.5, abs=1e-5) and below == pytest.approx(4 - above)


def test_the_grid_of_rates_grows(tmp_path):
    kept = notes.Notes(tmp_path, report=lambda text: None)
    asked = []

    def loss(lr):
        asked.append(lr)
        return abs(lr - 0.3)

    assert kept.best_rate("x", loss, (1e-2, 3e-2)) == 0.3 and asked == [1e-2, 3e-2, 1e-1, 3e-1, 1.0]
    assert kept.best_rate("x", loss, (1e-2, 3e-2)) == 0.3 and len(asked) == 5, "what is done is not done again"


def test_what_is_shipped_is_whole():
    found = json.loads(worlds.FILE.read_text(encoding="utf-8"))
    assert set(found) == set(worlds.PARTS)
    for name, part in found.items():
        groups: dict[tuple, list[int]] = {}
        for run in part["runs"]:
            key = tuple(
                run[k] for k in ("domain", "arm", "size", "rule", "difference", "way", "rank", "noise") if k in run
            )
            groups.setdefault(key, []).append(run["seed"])
        assert all(sorted(seeds) == list(worlds.SEEDS) for seeds in groups.values()), name
        assert part["measured"]["torch"]


def test_the_explorer_draws_what_a_round_reports():
    model = tiny.small()
    start = State(fresh(model, mp.LoRA(rank=2), 0))
    g = torch.Generator().manual_seed(0)
    updates = [
        Update(name, rows, {k: torch.randn(t.shape, generator=g) for k, t in start.numbers.items()}, 0)
        for name, rows in (("a", 3), ("b", 8), ("c", 1))
    ]
    explorer = mp.SitesExplorer({"made up": updates})
    explorer.controls["rank"].value = 2
    explorer.redraw()
    widths = dict(zip(RULES, (bar.get_width() for bar in explorer.figure.axes[0].patches), strict=True))
    for rule in ("fedit", "flexlora", "flora", "fedex"):
        happened = aggregate(start, updates, RULES[rule], restart=lambda: start.numbers)[1]
        assert widths[rule] == pytest.approx(happened.missed, abs=1e-6)
        mebibytes = dict(zip(RULES, (bar.get_width() for bar in explorer.figure.axes[1].patches), strict=True))[rule]
        assert mebibytes * 2**20 == pytest.approx(happened.down)
    assert widths["ffa"] < 1e-6 and explorer.image.value
    explorer.controls["clients"].value = 1
    assert max(bar.get_width() for bar in explorer.figure.axes[0].patches) < 1e-6, "alone, nothing is missed"
