"""The rules behind lesson 11's figures, each on both sides, and the shipped runs."""

from __future__ import annotations

import math

import pytest

from minipeft.course import shaken, teaching
from minipeft.course.teaching import at_target
from minipeft.learn.protocol import paired, verdict


def test_old_loss_is_read_where_the_task_loss_is_equal():
    run = {"steps": [10, 20], "task": [2.0, 1.0], "old": [1.0, 3.0]}
    assert at_target(run, (4.0, 0.5), 1.5) == pytest.approx(2.0)
    assert at_target(run, (4.0, 0.5), 3.0) == pytest.approx(0.75)
    assert at_target(run, (4.0, 0.5), 0.9) == math.inf


def test_a_verdict_can_be_each_of_three():
    base = [1.0, 1.1, 0.9, 1.05, 0.95]
    less = [x - 0.2 + 0.01 * i for i, x in enumerate(base)]
    assert verdict(paired(base, less), 0.05) == "holds"
    assert verdict(paired(less, base), 0.05) == "wrong"
    assert verdict(paired(base, [x - 0.01 for x in base[:-1]] + [0.94001]), 0.05) == "wrong", "too small to matter"
    assert verdict(paired(base, [x + (-0.5) ** i for i, x in enumerate(base)]), 0.05) == "cannot tell"
    mean, low, high = paired([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 2.4841, 2 + 2.4841), abs=1e-3)  # t(2) = 4.3027, s/√3 = 0.5774


def test_what_shipped_was_chosen_inside_its_grid_over_five_seeds():
    found = teaching.measured()
    for group in ("ways", "sides"):
        for name, side in found[group].items():
            grid = {lr: math.inf if value is None else value for lr, value in side["grid"]}
            best = min(grid, key=grid.get)
            assert {run["lr"] for run in side["runs"]} == {best}, name
            assert [run["seed"] for run in side["runs"]] == list(teaching.SEEDS)
            assert best not in (min(grid), max(grid)), name


@pytest.mark.slow
def test_a_shipped_run_comes_out_again():
    run = teaching.measured()["ways"]["labels"]["runs"][0]
    again = teaching.learn_few(None, run["lr"], run["seed"])
    assert again["loss"] == pytest.approx(run["loss"], abs=5e-3)


def test_the_shaken_reviews_are_whole():
    found = shaken.measured()
    seen = {(run["training"], run["seed"]) for run in found["runs"]}
    assert seen == {(training, seed) for training in shaken.TRAININGS for seed in shaken.SEEDS}
    for run in found["runs"]:
        assert run["lr"] == found["rates"][run["training"]] and set(shaken.ATTACKS) <= run.keys()
        assert all(round(run[a] * found["n"], 9).is_integer() and 0 <= run[a] <= 1 for a in shaken.ATTACKS)
    assert 0 < found["changed"]["rules"] < found["changed"]["synonyms"] < found["n"]
