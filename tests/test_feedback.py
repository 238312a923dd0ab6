"""Integration: W_old + Σ α·ΔW, exact at the corners, linear between them, and what it refuses."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

import minipeft as mp
from minipeft.learn.feedback import integrated


def two(model=None):
    """A model with two subtasks, named against the alphabet."""
    tuned = mp.attach(model or tiny.llama(), mp.LoRA(rank=2), name="zeal")
    tuned.add("calm", mp.LoRA(rank=3, gamma=0.5, targets="attention"), seed=1)
    for i, layers in enumerate(tuned.adapters.values()):
        for parameter in layers.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return tuned


def logits(tuned):
    with torch.no_grad():
        return tuned(input_ids=tiny.batch(tuned)["input_ids"]).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("alphas", [{}, {"zeal": 0.0}, {"zeal": 0.0, "calm": 0.0}])
def test_zero_is_the_base_bit_for_bit(family, alphas):
    tuned = two(tiny.MODELS[family]())
    with tuned.disabled():
        base = logits(tuned)
    assert not torch.equal(logits(tuned), base)
    with integrated(tuned, alphas):
        assert torch.equal(logits(tuned), base)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["zeal", "calm"])
def test_a_single_one_is_that_subtask(family, name):
    tuned = two(tiny.MODELS[family]())
    tuned.use(name)
    hooked = logits(tuned)
    tuned.merge()
    merged = logits(tuned)
    tuned.unmerge()
    other = {"zeal": "calm", "calm": "zeal"}[name]
    with integrated(tuned, {other: 0.0, name: 1.0}):
        assert torch.equal(logits(tuned), merged)
    assert torch.allclose(merged, hooked, atol=1e-5) and tuned.active == (name,)


def test_the_sum_of_both_is_both_active_and_the_order_is_nothing():
    tuned = two()
    tuned.use("zeal", "calm")
    together = logits(tuned)
    with integrated(tuned, {"calm": 1.0, "zeal": 1.0}):
        one = logits(tuned)
    with integrated(tuned, {"zeal": 1.0, "calm": 1.0}):
        other = logits(tuned)
    assert torch.allclose(one, together, atol=1e-5) and torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(("a", "b"), [(0.5, -1.5), (2.0, 0.25)])
def test_weights_are_the_formula(a, b):
    tuned = two()
    path = "model.layers.1.self_attn.q_proj"
    tuned.use("zeal")
    one = tuned.deltas()[path]
    tuned.use("calm")
    two_ = tuned.deltas()[path]
    base = tuned.base.get_submodule(path).weight.detach().clone()
    with integrated(tuned, {"zeal": a, "calm": b}):
        weight = tuned.base.get_submodule(path).weight.detach().clone()
    assert torch.allclose(weight, base + a * one + b * two_, atol=1e-6)
    assert torch.equal(tuned.base.get_submodule(path).weight, base) and tuned.active == ("calm",)


def test_inside_it_the_base_is_still_one_disabled_away_and_it_writes():
    model = tiny.small()
    tuned = two(model)
    with tuned.disabled():
        base = logits(tuned)
    with integrated(tuned, {"zeal": 3.0}):
        with tuned.disabled():
            assert torch.equal(logits(tuned), base)
        assert mp.write(tuned, model.tokenizer, "tom", 1)[0].startswith("tom")


@pytest.mark.parametrize(
    ("alphas", "said"),
    [({"calm": math.nan}, "must be a finite number"), ({"nobody": 1.0}, "There is no adapter 'nobody'"),
     ({"bias": 1.0}, "instead of adding"), ({"soft": 1.0}, "changes no weight")],
)  # fmt: skip
def test_what_takes_no_alpha(alphas, said):
    tuned = two()
    tuned.add("bias", mp.BitFit())
    tuned.add("soft", mp.PromptTuning(2))
    before = logits(tuned)
    with pytest.raises(ValueError, match=said), integrated(tuned, alphas):
        pass
    assert torch.equal(logits(tuned), before) and tuned.active == ("zeal",)


def test_an_error_inside_puts_everything_back():
    tuned = two()
    before = logits(tuned)
    with pytest.raises(RuntimeError), integrated(tuned, {"calm": 1.0}):
        raise RuntimeError
    assert torch.equal(logits(tuned), before)
    tuned.merge()
    with pytest.raises(ValueError, match="merged"), integrated(tuned, {"calm": 1.0}):
        pass
