"""The shipped runs of rank against reward: complete, each rate inside its grid, and still what the script gives."""

from __future__ import annotations

import pytest

from minipeft.course import one_bit
from minipeft.learn.protocol import SEARCH_SEED, SEEDS, half_decade


def test_every_method_has_every_seed_at_a_rate_inside_its_grid():
    found = one_bit.measured()
    assert SEARCH_SEED not in SEEDS
    for name in one_bit.METHODS:
        runs = [run for run in found["runs"] if run["method"] == name]
        assert [run["seed"] for run in runs] == list(SEEDS)
        searched, rate = {float(lr): value for lr, value in found["searched"][name].items()}, found["rates"][name]
        assert {half_decade(rate, up) for up in (False, True)} <= searched.keys()
        assert searched[rate] == max(value for value in searched.values() if value is not None)
        for run in runs:
            assert run["lr"] == rate and len(run["rewards"]) == one_bit.STEPS and run["stopped"] == "finished"
            assert run["true"] <= min(run["happy"], run["parses"]) and run["kl"] >= 0
    numbers = [next(run["trainable"] for run in found["runs"] if run["method"] == name) for name in one_bit.METHODS]
    assert numbers == sorted(numbers) and numbers[0] == one_bit.HANDFUL < one_bit.STEPS * one_bit.BATCH < numbers[1]


def test_what_a_run_is_worth_and_who_is_worth_more():
    assert one_bit.worth({"happy": 0.9, "kl": 2.0}) == pytest.approx(0.7)
    assert one_bit.worth({"happy": None, "kl": None}) == -float("inf")

    def runs(name, values):
        return [{"method": name, "happy": value, "kl": 0.0} for value in values]

    for other, said in (([0.6, 0.61, 0.59], "higher"), ([0.9, 0.91, 0.92], "lower"), ([0.79, 0.8, 0.81], "no different")):
        found = {"runs": runs("a", [0.79, 0.8, 0.81]) + runs("b", other)}
        assert one_bit.against(found, "a", "b")[2] == said
    found = {"runs": runs("a", [0.5, 0.9, 0.7]) + runs("b", [0.9, 0.5, 0.7])}
    assert one_bit.against(found, "a", "b")[2] == "cannot tell"


@pytest.mark.slow
def test_a_run_begins_as_it_is_stored(monkeypatch):
    monkeypatch.setattr(one_bit, "STEPS", 2)
    monkeypatch.setattr(one_bit, "look", lambda tuned, seed: {"happy": 0, "true happy": 0, "parses": 0, "kl": 0})
    stored = next(r for r in one_bit.measured()["runs"] if (r["method"], r["seed"]) == ("LoRA r=1", 3))
    found = one_bit.learn("LoRA r=1", stored["lr"], 3)
    assert found["trainable"] == stored["trainable"]
    assert found["rewards"] == pytest.approx(stored["rewards"][:2], abs=0.09)  # two of 24 stories, where a CPU rounds
