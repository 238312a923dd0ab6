"""The capstone's board: every method has five seeds at a rate that was chosen with another one, inside its grid."""

from __future__ import annotations

import pytest

from minipeft.course import board
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


@pytest.mark.slow
def test_the_regression_beside_it_comes_back():
    task = board.films(test=100)
    train, test = board.averaged(task.data["train"]["text"][:300]), board.averaged(task.data["test"]["text"])
    small = board.Task("films", "class", {"train": task.data["train"].select(range(300)), "test": task.data["test"]})
    first, again = (board.regression(small, 0, train, test) for _ in range(2))
    assert first == again > 0.6
