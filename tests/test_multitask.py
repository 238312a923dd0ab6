"""Several tasks: joint, separate, summed and weighted adapters."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

import minipeft as mp
from minipeft.learn import multitask
from minipeft.learn.plan import Plan
from minipeft.world import tasks

PLAN, METHOD = Plan(steps=3, lr=1e-2, batch=4), mp.LoRA(rank=2, gamma=1.5)


def two() -> dict:
    return {"pirate": tasks.pirate(60, 8), "answer": tasks.answer(60, 8)}


def test_separate_is_fit_for_each():
    model = tiny.small()
    before = tiny.snapshot(model)
    tuned = multitask.separate(model, METHOD, two(), PLAN)
    assert list(tuned.adapters) == ["pirate", "answer"] and tuned.active == ()
    kept = {n: {k: p.detach().clone() for k, p in a.named_parameters()} for n, a in tuned.adapters.items()}
    tuned.detach()
    for name, task in two().items():
        alone = mp.attach(model, METHOD)
        mp.fit(alone, task, steps=3, lr=1e-2, batch=4, progress=False)
        assert all(torch.equal(p, kept[name][k]) for k, p in alone.adapters["default"].named_parameters())
        alone.detach()
    assert tiny.same(tiny.snapshot(model), before)


def test_joint_of_one_task_is_fit():
    model, task = tiny.small(), two()["pirate"]
    tuned = multitask.joint(model, METHOD, {"pirate": task}, PLAN)
    kept = [p.detach().clone() for p in tuned.adapters["joint"].parameters()]
    tuned.detach()
    alone = mp.attach(model, METHOD)
    mp.fit(alone, task, steps=3, lr=1e-2, batch=4, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(kept, alone.adapters["default"].parameters(), strict=True))


def test_joint_learns_both():
    model = mp.load("pocket")[0]
    before = multitask.losses(model, two(), n=8)
    tuned = multitask.joint(model, METHOD, two(), Plan(steps=6, lr=1e-2, batch=4))
    after = multitask.losses(tuned, two(), n=8)
    assert all(after[name] < before[name] - 0.3 for name in before)


@pytest.mark.parametrize("name", ("llama", "gpt2"))
def test_weighted_is_the_weighted_sum_of_the_changes(name):
    model = tiny.MODELS[name]()
    tuned = mp.attach(model, METHOD, name="z")
    tuned.add("a", mp.LoRA(rank=3, gamma=0.5), seed=1)
    tiny.randomise(tuned)
    deltas = {}
    for adapter in ("z", "a"):
        tuned.use(adapter)
        deltas[adapter] = tuned.deltas()
    tuned.use("z")
    batch = tiny.batch(model)
    alone = tuned(**batch).logits
    with tuned.using({"a": 0.3, "z": -2.0}):
        for path, got in tuned.deltas().items():
            assert torch.allclose(got, 0.3 * deltas["a"][path] - 2.0 * deltas["z"][path], atol=1e-6)
    assert tuned.active == ("z",) and torch.equal(tuned(**batch).logits, alone)
    with tuned.using({"a": 1.0, "z": 1.0}):
        summed = tuned(**batch).logits
    tuned.use("a", "z")
    assert torch.equal(tuned(**batch).logits, summed)
    with tuned.using({"a": 0.0}), torch.no_grad():
        zero = tuned(**batch).logits
    with tuned.disabled():
        assert torch.allclose(zero, tuned(**batch).logits, atol=1e-6)


def test_wrong_settings_say_what_to_do():
    model = tiny.small()
    empty = tasks.pirate(60, 8)
    empty = tasks.Task("none", "text", {"train": empty.data["train"].select([]), "test": empty.data["test"]})
    for make in (multitask.separate, multitask.joint):
        for several, message in (({}, "no tasks"), ({"e": empty}, "'e' has no rows")):
            with pytest.raises(ValueError, match=message):
                make(model, METHOD, several, PLAN)
            assert not hasattr(model, "_tuned")
    tuned = mp.attach(model, METHOD)
    tuned.add("soft", mp.PromptTuning(length=2))
    for weights, message in (
        ({"pirate": 1.0}, "no adapter 'pirate'"),
        ({"default": math.nan}, "is nan"),
        ({"default": 2.0, "soft": 0.5}, "no change that could be weighted"),
    ):
        with pytest.raises(ValueError, match=message), tuned.using(weights):
            pass
    assert all(layer.gamma == 1.5 for layer in tuned.adapters["default"].values()) and tuned.active == ("default",)
