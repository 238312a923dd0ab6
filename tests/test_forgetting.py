"""Forgetting is measured at matched task loss, and the base is given back."""

from __future__ import annotations

import pytest
import tiny

import minipeft as mp
from minipeft.analyze.forgetting import forgetting, old_questions
from minipeft.methods.lora import LoRA
from minipeft.methods.select import Full, Softmax


def test_the_pocket_model_answers_its_old_questions():
    model, _ = mp.load("pocket")
    score = mp.evaluate(model, old_questions(), n=60)
    assert score.accuracy > 0.5, "what it cannot do, it cannot forget"
    assert mp.evaluate(tiny.small(), old_questions(), n=60).accuracy < 0.1


def test_methods_stop_at_the_target_and_the_base_is_given_back():
    model = tiny.small()
    task = mp.world.pirate()
    before = tiny.snapshot(model)
    methods = {"LoRA": ([LoRA(rank=4), Softmax()], 3e-2), "full": (Full(), 1e-2), "hopeless": (LoRA(rank=1), 1e-6)}
    lora, full, hopeless = forgetting(model, methods, task, target=6.3, steps=30, every=2, n=20)
    assert tiny.same(tiny.snapshot(model), before) and tiny.hooks(model) == 0
    for found in (lora, full):
        assert found.reached and found.task_loss <= 6.3 and found.steps < 30 and found.steps % 2 == 0
    assert not hopeless.reached and hopeless.steps == 30 and hopeless.task_loss > 6.3
    assert lora.plain_before == full.plain_before == mp.evaluate(model, mp.world.plain(), n=20).loss
    assert abs(hopeless.forgot) < abs(lora.forgot)

    tuned = mp.attach(model, [LoRA(rank=4), Softmax()])  # the same by hand
    mp.fit(tuned, task, steps=lora.steps, lr=3e-2, batch=10, progress=False)
    assert mp.evaluate(tuned, task, n=20).loss == pytest.approx(lora.task_loss, rel=1e-5)
    assert mp.evaluate(tuned, mp.world.plain(), n=20).loss == pytest.approx(lora.plain_after, rel=1e-5)


def test_a_target_must_be_somewhere_between():
    model = tiny.small()
    for target, message in ((99.0, "already"), (0.01, "below the floor")):
        with pytest.raises(ValueError, match=message):
            forgetting(model, {}, mp.world.pirate(), target=target, n=5)
