"""The capstone's board: every method has five seeds at a rate that was chosen with another one, inside its grid."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import minipeft as mp
from minipeft.course import board
from minipeft.learn.calibration import calibration_error, reliability
from minipeft.learn.fit import evaluate
from minipeft.learn.protocol import SEEDS, half_decade, interval, paired, verdict


def test_every_method_has_five_seeds_at_a_rate_inside_its_grid():
    found = board.board()
    assert found.keys() == board.METHODS.keys()
    for name, each in found.items():
        searched, rate = each["searched"], each["rate"]
        assert min(searched, key=searched.get) == rate, name
        assert {half_decade(rate, up) for up in (False, True)} <= searched.keys(), f"{name}: both neighbours were tried"
        assert len(each["accuracy"]) == len(each["macro-F1"]) == len(SEEDS), name
        assert all(
            0 <= f1 <= accuracy + 0.05 <= 1 for accuracy, f1 in zip(each["accuracy"], each["macro-F1"], strict=True)
        )


def test_lora_stands_with_full_fine_tuning_and_above_the_frozen_encoder():
    """What lesson 16 says in words, by the protocol's rule: the smallest difference that matters is one point."""
    found, frozen = board.board(), interval(board.averaged_scores())
    accuracy = {name: each["accuracy"] for name, each in found.items()}
    behind = paired(accuracy["full fine-tuning"], accuracy["LoRA r=8"])
    assert verdict(behind, 0.01) == "cannot tell" and behind.low < 0 < behind.high
    assert verdict(paired(accuracy["LoRA r=8"], accuracy["BitFit"]), 0.01) == "holds"
    assert interval(accuracy["LoRA r=8"]).low > frozen.high > interval(accuracy["head only"]).high


def test_calibration_and_misses_belong_to_the_accuracy():
    found = board.board()
    for name, each in found.items():
        assert len(each["ECE"]) == len(each["wrong"]) == len(SEEDS), name
        for accuracy, wrong, error, bins in zip(*(each[n] for n in ("accuracy", "wrong", "ECE", "bins")), strict=True):
            assert accuracy == pytest.approx(1 - len(wrong) / 1000) and sum(n for n, *_ in bins) == 1000
            assert error == pytest.approx(sum(n * abs(a - c) for n, c, a in bins) / 1000, abs=2e-4)


def test_hard_sentences_are_those_that_most_runs_get_wrong():
    found = board.hard(0.9)
    runs = [set(run) for each in board.board().values() for run in each["wrong"]]
    assert found and list(found.values()) == sorted(found.values(), reverse=True)
    for i in range(1000):
        share = sum(i in run for run in runs) / len(runs)
        assert found.get(i) == (pytest.approx(share) if share >= 0.9 else None)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40), st.integers(1, 12))
def test_the_calibration_error_is_its_definition(guesses, m):
    confidence, right = (np.array(side) for side in zip(*guesses, strict=True))
    error = 0.0
    for b in range(m):
        held = (confidence > b / m) & (confidence <= (b + 1) / m) | (confidence == 0) & (b == 0)
        if held.any():
            error += held.mean() * abs(right[held].mean() - confidence[held].mean())
    found = reliability(confidence.tolist(), right.tolist(), m)
    assert calibration_error(found) == pytest.approx(error) and sum(b.n for b in found) == len(guesses)


def test_sure_and_wrong_is_the_worst_and_bad_input_is_named():
    assert calibration_error(reliability([1.0] * 4, [False] * 4)) == 1.0
    assert [b.n for b in reliability([0.0, 0.5, 0.6, 1.0], [True] * 4, bins=2)] == [2, 2], "an edge is the lower bin's"
    assert calibration_error(reliability([0.75] * 4, [True, True, True, False])) == 0.0
    with pytest.raises(ValueError, match="give one for each"):
        reliability([], [])
    with pytest.raises(ValueError, match="from 0 to 1, but one is nan"):
        reliability([float("nan")], [True])


def test_a_score_carries_the_probability_of_each_guess():
    """Of two classes the loss is −log of it where the guess is right, and of the rest where it is wrong."""
    model = tiny.small(labels=2)
    score = evaluate(model, mp.world.mood(train=8, test=12))
    p = [c if g == t else 1 - c for c, g, t in zip(score.confidence, score.predictions, score.truth, strict=True)]
    assert score.loss == pytest.approx(-np.log(p).mean(), rel=1e-4) and min(score.confidence) >= 0.5


@pytest.mark.slow
def test_the_regression_beside_it_comes_back():
    task = board.films(test=100)
    train, test = board.averaged(task.data["train"]["text"][:300]), board.averaged(task.data["test"]["text"])
    small = board.Task("films", "class", {"train": task.data["train"].select(range(300)), "test": task.data["test"]})
    first, again = (board.regression(small, 0, train, test) for _ in range(2))
    assert first == again > 0.6


@pytest.mark.slow
def test_a_run_of_the_board_comes_back():
    stored = board.board()["head only"]
    again = board.run("head only", stored["rate"], 0, board.films())
    assert again["accuracy"] == pytest.approx(stored["accuracy"][0], abs=0.005)
    assert len(set(again["wrong"]) ^ set(stored["wrong"][0])) <= 10, "the same sentences"
