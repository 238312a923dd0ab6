"""Masks: whatever the optimizer does, entries that were not chosen stay as they are, to the bit."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from minipeft.attach import attach
from minipeft.methods.masked import Entries, Masked, fisher, gradient, lasso
from minipeft.serve.checkpoint import load_adapter

OPTIMIZERS = {
    "adam": lambda p, decay: torch.optim.Adam(p, lr=0.05, weight_decay=decay),
    "adamw": lambda p, decay: torch.optim.AdamW(p, lr=0.05, weight_decay=decay),
    "sgd": lambda p, decay: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=decay),
}


def net(seed: int, sizes: tuple[int, int, int]) -> nn.Sequential:
    torch.manual_seed(seed)
    a, b, c = sizes
    return nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(*[st.integers(1, 7)] * 3),
    share=st.floats(0.01, 1.0),
    by=st.sampled_from(["largest", "smallest", "random"]),
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    decay=st.sampled_from([0.0, 0.1, 1.0]),
    clip=st.sampled_from([None, 0.01, 1.0]),
)
def test_entries_that_were_not_chosen_are_bit_identical(seed, sizes, share, by, optimizer, decay, clip):
    model, x = net(seed, sizes), torch.randn(9, sizes[0])
    before = tiny.snapshot(model)
    tuned = attach(model, Masked(share=share, by=by), seed=seed)
    layers = list(tuned.adapters["default"].values())
    total = sizes[0] * sizes[1] + sizes[1] * sizes[2]
    assert tuned.count().trainable == max(1, round(share * total))
    optimize = OPTIMIZERS[optimizer]([p for p in tuned.parameters() if p.requires_grad], decay)
    for _ in range(5):
        optimize.zero_grad()
        tuned(x).square().sum().backward()
        if clip:
            nn.utils.clip_grad_norm_(tuned.parameters(), clip)
        optimize.step()
    moments = sum(v.numel() for s in optimize.state.values() for v in s.values() if v.numel() > 1)
    assert moments <= 2 * tuned.count().trainable, "moments only for what trains"
    tuned.merge()
    after = tuned.detach().state_dict()
    for layer in layers:
        name = f"{layer.path}.weight"
        free = torch.ones(after[name].numel(), dtype=torch.bool)
        free[layer.index] = False
        same = after[name].flatten().view(torch.int32) == before[name].flatten().view(torch.int32)
        assert same[free].all()
        assert torch.equal(after[f"{layer.path}.bias"], before[f"{layer.path}.bias"])


def test_the_chosen_entries_move_as_in_a_full_weight_whose_other_gradients_are_cut():
    """A dense reference: all of W trains, and gradients outside of the mask are set to zero before Adam sees them."""
    model, reference, x = net(1, (5, 6, 4)), net(1, (5, 6, 4)), torch.randn(9, 5)
    tuned = attach(model, Masked(share=0.3))
    masks = {}
    for layer in tuned.adapters["default"].values():
        masks[layer.path] = torch.zeros(layer.shape[0] * layer.shape[1]).index_fill(0, layer.index, 1).view(layer.shape)
    optimizers = [
        torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=0.05),
        torch.optim.Adam([reference.get_submodule(path).weight for path in masks], lr=0.05),
    ]
    for _ in range(10):
        for each, optimizer in zip((tuned, reference), optimizers, strict=True):
            each.zero_grad()
            each(x).square().sum().backward()
            if each is reference:
                for path, mask in masks.items():
                    reference.get_submodule(path).weight.grad *= mask
            optimizer.step()
    for path in masks:
        delta = reference.get_submodule(path).weight - model.get_submodule(path).weight
        torch.testing.assert_close(tuned.deltas()[path], delta.detach(), atol=1e-5, rtol=1e-4)


def test_largest_and_smallest_are_the_order_statistics_over_all_matrices():
    for by, worst in (("largest", torch.min), ("smallest", torch.max)):
        tuned = attach(tiny.llama(), Masked(share=0.1, by=by))
        chosen, rest = [], []
        for layer in tuned.adapters["default"].values():
            size = layer.weight.abs().flatten()
            mask = torch.zeros(len(size), dtype=torch.bool)
            mask[layer.index] = True
            chosen.append(size[mask])
            rest.append(size[~mask])
        chosen, rest = torch.cat(chosen), torch.cat(rest)
        assert len(chosen) == round(0.1 * (len(chosen) + len(rest)))
        assert chosen.min() >= rest.max() if by == "largest" else chosen.max() <= rest.min()
        assert worst(chosen) == worst(chosen)


# -- scores -----------------------------------------------------------------------------------------------------------
def batches(model, n: int = 2) -> list[dict]:
    return [tiny.batch(model, seed=seed) for seed in range(n)]


@pytest.mark.parametrize("family, targets", [("llama", "attention"), ("gpt2", ["c_attn[0:16]", "c_fc"])])
def test_scores_are_the_gradients_of_plain_autograd(family, targets):
    model = tiny.MODELS[family]()
    with tiny.untouched(model):
        found = {f.__name__: f(model, batches(model), targets) for f in (gradient, fisher)}
    layers = attach(tiny.MODELS[family](), Masked(share=0.5, targets=targets)).adapters["default"].values()
    sums, squares = {}, {}
    for batch in batches(model):
        model.zero_grad()
        model(**batch).loss.backward()
        for layer in layers:
            grad = model.get_submodule(layer.path).weight.grad
            grad = (grad.T if family == "gpt2" else grad)[layer.rows]
            sums[layer.key] = sums.get(layer.key, 0) + grad
        for i in range(3):
            model.zero_grad()
            model(**{k: v[i : i + 1] for k, v in batch.items()}).loss.backward()
            for layer in layers:
                grad = model.get_submodule(layer.path).weight.grad
                grad = (grad.T if family == "gpt2" else grad)[layer.rows]
                squares[layer.key] = squares.get(layer.key, 0) + grad**2
    for key in sums:
        torch.testing.assert_close(found["gradient"][key], sums[key].abs(), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(found["fisher"][key], squares[key], atol=1e-6, rtol=1e-4)


def test_lasso_leaves_most_changes_at_exactly_zero_and_the_model_as_it_was():
    model = tiny.llama()
    with tiny.untouched(model):
        zeros = []
        for penalty in (0.0, 0.5, 1e3):
            scores = lasso(model, batches(model, 10), penalty=penalty, lr=1e-2)
            every = torch.cat([s.flatten() for s in scores.values()])
            zeros.append((every == 0).float().mean().item())
    assert zeros[0] < 0.05 < zeros[1] < 0.99 and zeros[2] == 1.0, zeros


def test_scores_choose_the_entries():
    model = tiny.llama()
    scores = fisher(model, batches(model))
    tuned = attach(model, Masked(share=0.02, by=scores))
    every = torch.cat([s.flatten() for s in scores.values()])
    limit = every.topk(tuned.count().trainable).values[-1]
    for layer in tuned.adapters["default"].values():
        assert (scores[layer.key].flatten()[layer.index] >= limit).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Masked(share=0), "share=0"),
        (lambda: Masked(share=1.5), "share=1.5"),
        (lambda: Masked(by="size"), "by='size'"),
        (lambda: attach(tiny.llama(), Masked(by={})), "shape None"),
        (lambda: attach(tiny.llama(), Masked(targets=re.compile("x"))), "whole path"),
        (lambda: fisher(tiny.llama(), []), "no batches"),
        (lambda: attach(tiny.llama(), Entries({"lm_head": torch.tensor([1, 1])})), "different"),
        (lambda: attach(tiny.llama(), Entries({"lm_head": torch.tensor([10**6])})), "outside"),
    ],
)
def test_a_mistake_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- files ------------------------------------------------------------------------------------------------------------
def test_a_file_holds_k_numbers_and_their_places(tmp_path):
    tuned = attach(tiny.gpt2(), Masked(share=0.02, targets=["c_attn[0:16]", "c_fc", "wte"]))
    tiny.randomise(tuned)
    tuned.save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(v.numel() for v in tensors.values()) == 2 * tuned.count().trainable
    loaded = load_adapter(tiny.gpt2(), tmp_path)
    assert tiny.same(loaded.deltas(), tuned.deltas())
    key = next(key for key in tensors if key.endswith("mask_index"))
    for spoil, message in (
        (lambda t: t.update({key: t[key] + 10**6}), "outside"),
        (lambda t: t.update({key: t[key].float()}), "whole numbers"),
        (lambda t: t.update({key: t[key].long()}), "int64"),
        (lambda t: t.update({key: torch.zeros_like(t[key])}), "different"),
        (lambda t: t.pop(key), "lacks the mask_index"),
    ):
        damaged = dict(tensors)
        spoil(damaged)
        save_file(damaged, tmp_path / "adapter_model.safetensors")
        with tiny.untouched(model := tiny.gpt2()), pytest.raises(ValueError, match=message):
            load_adapter(model, tmp_path)
