"""What lessons 02 and 07 read was chosen by the protocol, and comes back."""

from __future__ import annotations

import pytest

from minipeft.course import entries
from minipeft.learn.protocol import SEEDS, half_decade


@pytest.mark.parametrize("name", entries.MASKS)
def test_a_masks_rate_is_better_than_both_its_neighbours(name):
    found = entries.measured()["masks"]["masks"][name]
    tried = {float(rate): loss for rate, loss in found["tried"].items()}
    assert min(tried, key=tried.get) == found["rate"] and len(found["losses"]) == len(SEEDS)
    assert {half_decade(found["rate"], up) for up in (True, False)} <= tried.keys()


@pytest.mark.slow
def test_a_run_of_each_side_comes_back():
    sides = entries.measured()["directions"]["sides"]
    for name, lr in (("full", 1e-2), ("LoRA r=4", 1e-3)):
        stored = next(run for run in sides[name] if run["lr"] == lr and run["seed"] == 0)
        again = entries.direction(name, lr, 0)
        assert again["loss"] == pytest.approx(stored["loss"], rel=0.05)
        assert again["norm"] == pytest.approx(stored["norm"], rel=0.05)
        assert abs(again["intruders"] - stored["intruders"]) <= 0.15 * stored["intruders"]


@pytest.mark.slow
def test_a_masked_run_comes_back():
    import minipeft as mp

    model, _ = mp.load("pocket")
    stored = entries.measured()["masks"]["masks"]["largest"]
    again = entries.masked(model, {"largest": "largest"}, "largest", stored["rate"], 0)
    assert again["loss"] == pytest.approx(stored["losses"][0], rel=0.05)
