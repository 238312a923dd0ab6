"""AdaLoRA, DoRA, VeRA, (IA)³, projected LoRA, PiSSA and LoRA+ against their equations, and what is special to each."""

from __future__ import annotations

import copy
import math
import re

import pytest
import tiny
import torch
from torch import nn

from minipeft.attach import attach
from minipeft.learn.fit import fit, groups
from minipeft.methods.adalora import AdaLoRA, ranks
from minipeft.methods.dora import DoRA
from minipeft.methods.ia3 import IA3
from minipeft.methods.lora import LoRA
from minipeft.methods.projected import ProjectedLoRA
from minipeft.methods.vera import VeRA

NAN, INF = float("nan"), float("inf")
BAD = [
    (LoRA, dict(init="both"), "kaiming, gaussian, orthogonal, pissa"),
    (LoRA, dict(lr_ratio=0.0), "lr_ratio=0.0"),
    (LoRA, dict(init="pissa", gamma=-1.0), "γ must be positive"),
    (DoRA, dict(init="pissa"), "is for LoRA"),
    (DoRA, dict(rank=0), "rank=0"),
    (ProjectedLoRA, dict(rank=0), "rank=0"),
    (ProjectedLoRA, dict(gamma=NAN), "γ is nan"),
    (ProjectedLoRA, dict(basis="best"), "random, top, bottom"),
    (VeRA, dict(rank=True), "rank=True"),
    (VeRA, dict(d_initial=INF), "d_initial=inf"),
    (VeRA, dict(dropout=1.0), "dropout=1.0"),
    (VeRA, dict(projection_seed=-1), "projection_seed=-1"),
    (IA3, dict(targets=[], feedforward=[]), "both empty"),
    (AdaLoRA, dict(rank=0), "rank=0"),
    (AdaLoRA, dict(rank=8, initial_rank=4), "only shrink"),
    (AdaLoRA, dict(gamma=1.0, alpha=8), "give one"),
    (AdaLoRA, dict(gamma=-1.0), "γ is -1.0"),
    (AdaLoRA, dict(steps=10, warmup=5, final=5), "none of 10 steps"),
    (AdaLoRA, dict(interval=0), "interval=0"),
    (AdaLoRA, dict(beta1=1.0), "beta1=1.0"),
    (AdaLoRA, dict(orthogonality=-0.1), "orthogonality=-0.1"),
    (AdaLoRA, dict(penalty_form="l1"), "'l1'"),
    (AdaLoRA, dict(dropout=NAN), "dropout=nan"),
]


@pytest.mark.parametrize("method, arguments, message", BAD)
def test_bad_arguments(method, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        method(**arguments)


@pytest.mark.parametrize(
    "method, message",
    [
        (DoRA(rank=2, targets=["embed_tokens"]), "DoRA works on linear layers, but 'model.embed_tokens'"),
        (LoRA(rank=2, targets=["embed_tokens"], init="pissa"), "is an embedding"),
        (ProjectedLoRA(rank=2, targets=["embed_tokens"]), "is an embedding"),
        (VeRA(rank=2, targets=["embed_tokens"]), "is an embedding"),
        (AdaLoRA(rank=2, targets=["embed_tokens"]), "is an embedding"),
        (IA3(feedforward=["embed_tokens"]), "is an embedding"),
        (IA3(targets=["q_proj"], feedforward=["q_proj"]), "in targets and in feedforward"),
        (ProjectedLoRA(rank=17, targets=["q_proj"]), "above d_in"),
        (AdaLoRA(rank=8, initial_rank=12), "initial_rank=12 is above"),
        (DoRA(rank=9), "rank=9 is above"),
        (VeRA(targets=["x_proj"]), "x_proj"),
    ],
    ids=str,
)
def test_what_cannot_be_attached_leaves_the_model_alone(method, message):
    with tiny.untouched(model := tiny.llama()), pytest.raises(ValueError, match=message):
        attach(model, method)


def single(method, d_in: int = 7, d_out: int = 5, seed: int = 0):
    """A linear layer, a moved adapter on it, its only layer, and an input."""
    torch.manual_seed(seed)
    linear = nn.Linear(d_in, d_out)
    tuned = attach(copy.deepcopy(linear), method)
    tiny.randomise(tuned, scale=0.5)
    return linear, tuned, tuned.adapters["default"]["/"], torch.randn(4, d_in)


# -- the equations ----------------------------------------------------------------------------------------------------
def test_dora():
    linear, tuned, layer, x = single(DoRA(rank=2, gamma=1.5))
    V = linear.weight + 1.5 * layer.B @ layer.A
    W = layer.m[:, None] * V / V.norm(dim=1, keepdim=True)
    torch.testing.assert_close(tuned(x), x @ W.T + linear.bias)
    assert (
        layer.m.shape == (5,) and torch.equal(attach(linear, DoRA(rank=2)).adapters["default"]["/"].m, layer.m) is False
    )


def test_dora_treats_the_norm_as_a_constant():
    """∂L/∂m = s'·(V/‖V‖)x, and ∂L/∂B of m/‖V‖ held fixed (§4.3)."""
    linear, tuned, layer, x = single(DoRA(rank=2, gamma=1.5))
    tuned(x).square().sum().backward()
    A, B, m = (p.detach().clone().requires_grad_() for p in (layer.A, layer.B, layer.m))
    V = linear.weight.detach() + 1.5 * B @ A
    (x @ (m[:, None] * V / V.detach().norm(dim=1, keepdim=True)).T + linear.bias.detach()).square().sum().backward()
    for mine, free in ((layer.A, A), (layer.B, B), (layer.m, m)):
        torch.testing.assert_close(mine.grad, free.grad)


def test_dora_on_a_row_of_zeros():
    linear = nn.Linear(4, 3)
    linear.weight.data[1] = 0.0
    tuned = attach(linear, DoRA(rank=2))
    x = torch.randn(2, 4)
    assert torch.equal(tuned(x), nn.functional.linear(x, linear.weight, linear.bias))
    tuned(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in tuned.adapters.parameters())


def test_dora_dropout_drops_the_inputs_of_w_too():
    linear, tuned, layer, x = single(DoRA(rank=2, gamma=1.0, dropout=0.5))
    tuned.train()
    torch.manual_seed(3)
    found = tuned(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    s = layer.m / (linear.weight + layer.B @ layer.A).norm(dim=1)
    extra = (s - 1) * (dropped @ linear.weight.T) + s * (dropped @ layer.A.T @ layer.B.T)
    torch.testing.assert_close(found, linear(x) + extra)


def test_vera():
    linear, tuned, layer, x = single(VeRA(rank=20))
    A, B = layer.pair.A[:, :7], layer.pair.B[:5]
    W = linear.weight + torch.diag(layer.b) @ B @ torch.diag(layer.d) @ A
    torch.testing.assert_close(tuned(x), x @ W.T + linear.bias)
    assert A.abs().max() <= math.sqrt(6 / 7) and B.abs().max() <= math.sqrt(6 / 20)


def test_all_layers_of_vera_share_one_frozen_pair():
    tuned = attach(tiny.llama(), VeRA(rank=20), seed=1)
    layers = list(tuned.adapters["default"].values())
    pair = layers[0].pair
    assert all(layer.pair is pair for layer in layers) and pair.A.shape == (20, 24) and pair.B.shape == (24, 20)
    again = attach(tiny.llama(), VeRA(rank=20), seed=2).adapters["default"]
    assert torch.equal(next(iter(again.values())).pair.A, pair.A), "attach's seed does not matter"
    other = attach(tiny.llama(), VeRA(rank=20, projection_seed=1)).adapters["default"]
    assert not torch.equal(next(iter(other.values())).pair.A, pair.A)
    assert not any("pair" in key for key in tuned.state_dict())
    tuned.to(torch.float64)
    assert pair.A.dtype == torch.float64 and all(layer.pair is pair for layer in layers), "still one after a move"
    clone = copy.deepcopy(tuned)
    pairs = {id(layer.pair) for layer in clone.adapters["default"].values()}
    assert len(pairs) == 1 and id(pair) not in pairs


def test_ia3():
    linear, tuned, layer, x = single(IA3(targets=re.compile(""), feedforward=()))
    torch.testing.assert_close(tuned(x), layer.l.flatten() * linear(x))
    linear, tuned, layer, x = single(IA3(targets=(), feedforward=re.compile("")))
    torch.testing.assert_close(tuned(x), linear(layer.l.flatten() * x))
    assert layer.l.shape == (1, 7)


@pytest.mark.parametrize("basis", ["random", "top", "bottom"])
def test_the_projected_update_lives_in_a_fixed_subspace(basis):
    linear, tuned, layer, x = single(ProjectedLoRA(rank=3, gamma=1.5, basis=basis))
    U, start = layer.U, layer.U.clone()
    torch.testing.assert_close(U.T @ U, torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(tuned(x), x @ (linear.weight + 1.5 * layer.L @ U.T).T + linear.bias)
    outside = x - x @ U @ U.T
    torch.testing.assert_close(tuned(outside), linear(outside), atol=1e-5, rtol=0)
    assert not torch.allclose(tuned(x), linear(x))
    if basis != "random":
        sigma = torch.linalg.svdvals(linear.weight.detach())
        held = torch.linalg.svdvals(linear.weight @ U)
        expected = sigma[:3] if basis == "top" else torch.tensor([sigma[4], 0.0, 0.0])  # two directions W does not read
        torch.testing.assert_close(held, expected, atol=1e-5, rtol=0)
    tuned(x).sum().backward()
    torch.optim.AdamW(tuned.adapters.parameters(), lr=0.1).step()
    assert torch.equal(layer.U, start)


def test_projected_subspaces_differ_by_seed():
    a, b, c = (attach(nn.Linear(8, 8), ProjectedLoRA(rank=2), seed=s).adapters["default"]["/"].U for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_pissa_begins_with_the_principal_part_of_w():
    torch.manual_seed(0)
    linear = nn.Linear(7, 5)
    tuned = attach(linear, LoRA(rank=2, gamma=1.5, init="pissa"))
    layer = tuned.adapters["default"]["/"]
    U, S, Vh = torch.linalg.svd(linear.weight.detach())
    best = U[:, :2] * S[:2] @ Vh[:2]
    torch.testing.assert_close(1.5 * layer.B @ layer.A, best)
    assert torch.equal(layer.delta(), torch.zeros(5, 7)) and torch.equal(layer.A, layer.A0)
    tiny.randomise(tuned, scale=0.5)
    x = torch.randn(4, 7)
    torch.testing.assert_close(tuned(x), x @ (linear.weight - best + 1.5 * layer.B @ layer.A).T + linear.bias)
    assert torch.linalg.matrix_rank(tuned.deltas()[""]) == 4, "of rank 2r"


def test_the_named_fault_changes_the_model_and_says_so():
    model = tiny.llama()
    ids = tiny.batch(model)["input_ids"]
    before = model(ids).logits
    with pytest.warns(UserWarning, match="before training begins"):
        tuned = attach(model, LoRA(rank=2, init="both-random"))
    assert (tuned(ids).logits - before).abs().max() > 1
    assert all(0.5 < p.std() < 1.5 for p in tuned.adapters.parameters())


# -- LoRA+ ------------------------------------------------------------------------------------------------------------
def test_lora_plus_gives_b_its_own_rate():
    tuned = attach(tiny.llama(), [LoRA(rank=2, lr_ratio=16, targets="attention"), LoRA(rank=2, targets="mlp")])
    found = {group["lr"]: group["params"] for group in groups(tuned, 0.01)}
    assert sorted(found) == [0.01, 0.16]
    layers = tuned.adapters["default"]
    fast = {id(layer.B) for key, layer in layers.items() if "self_attn" in key}
    assert {id(p) for p in found[0.16]} == fast and len(fast) == 4 * tiny.L
    everything = [id(p) for group in groups(tuned, 0.01) for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in tuned.adapters.parameters())
    assert len(groups(attach(tiny.llama(), LoRA(rank=2)), 0.01)) == 1
    embedding = attach(tiny.llama(), LoRA(rank=2, lr_ratio=16, targets=["embed_tokens"]))
    assert len(groups(embedding, 0.01)) == 1


def test_fit_obeys_the_ratio():
    """Adam's first step moves every entry by its rate: B by ratio·lr (A's first gradient is zero, because B is)."""
    from minipeft.world import pirate

    for ratio in (1.0, 8.0):
        tuned = attach(tiny.small(), LoRA(rank=2, lr_ratio=ratio))
        fit(tuned, pirate(train=32, test=4), steps=1, lr=1e-3, progress=False)
        moved = max(layer.B.abs().max().item() for layer in tuned.adapters["default"].values())
        assert abs(moved - ratio * 1e-3) < 1e-5


# -- AdaLoRA ----------------------------------------------------------------------------------------------------------
def test_adalora():
    linear, tuned, layer, x = single(AdaLoRA(rank=2, initial_rank=3, alpha=6))
    W = linear.weight + 6 / 3 * layer.P @ torch.diag(layer.lam.flatten()) @ layer.Q
    torch.testing.assert_close(tuned(x), x @ W.T + linear.bias)


@pytest.mark.parametrize("form", ["paper", "peft"])
def test_adalora_penalty(form):
    tuned = attach(tiny.llama(), AdaLoRA(rank=2, initial_rank=3, orthogonality=0.3, penalty_form=form))
    tiny.randomise(tuned)
    gaps = []
    for layer in tuned.adapters["default"].values():
        gaps += [layer.P.T @ layer.P - torch.eye(3), layer.Q @ layer.Q.T - torch.eye(3)]
    paper = 0.3 * sum((gap**2).sum() for gap in gaps)
    expected = paper if form == "paper" else 0.3 * sum((gap**2).sum().sqrt() for gap in gaps) / len(gaps)
    torch.testing.assert_close(tuned.penalty(), expected)
    tuned.penalty().backward()
    assert all(layer.P.grad.any() and layer.lam.grad is None for layer in tuned.adapters["default"].values())
    tuned.use()
    assert tuned.penalty() == 0.0 == attach(tiny.llama(), LoRA(rank=2)).penalty()


def test_adalora_budget_follows_the_cubic_schedule():
    method = AdaLoRA(rank=2, initial_rank=6, steps=100, warmup=10, final=30)
    budgets = [method.budget(step, layers=10) for step in range(1, 101)]
    assert budgets[:10] == [60] * 10 and budgets[69:] == [20] * 31
    assert budgets == sorted(budgets, reverse=True) and budgets[39] == int(20 + 40 * 0.5**3)


def test_adalora_takes_ranks_from_where_nothing_happens():
    """Only the first of two layers gets gradients that matter: it keeps its rank, the other pays."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    method = AdaLoRA(rank=2, initial_rank=4, steps=40, warmup=4, final=10, orthogonality=0.0)
    tuned = attach(model, method)
    optimizer = torch.optim.Adam(tuned.adapters.parameters(), lr=1e-2)
    x, target = torch.randn(64, 8), torch.randn(64, 8)
    total = []
    for step in range(1, 41):
        loss = (model[0](x) - target).square().mean() + 1e-4 * model[1](x).square().mean()
        optimizer.zero_grad()
        (loss + tuned.penalty()).backward()
        optimizer.step()
        tuned.stepped(step)
        total.append(sum(ranks(tuned).values()))
    assert ranks(tuned) == {"0": 4, "1": 0} and total == [method.budget(step, 2) for step in range(1, 41)]
    assert torch.linalg.matrix_rank(tuned.deltas()["0"]) == 4 and not tuned.deltas()["1"].any()


def test_fit_moves_the_ranks_and_reports_the_loss_of_the_task_alone():
    from minipeft.world import pirate

    task, seen = pirate(train=64, test=4), []
    method = AdaLoRA(rank=1, initial_rank=3, steps=12, warmup=2, final=3, orthogonality=100.0)
    tuned = attach(tiny.small(), method)
    history = fit(tuned, task, steps=12, batch=4, progress=False, callback=lambda *_: seen.append(ranks(tuned)))
    assert sum(seen[1].values()) == 3 * 14 and sum(seen[-1].values()) == 14 and history.stopped == "finished"
    plain = fit(attach(tiny.small(), LoRA(rank=1)), task, steps=1, batch=4, progress=False)
    assert abs(history.losses[0] - plain.losses[0]) < 1e-5


def test_equal_ranks_prune_nothing():
    """PEFT's kthvalue fails here, with k = 0 (peft #2337)."""
    method = AdaLoRA(rank=3, initial_rank=3, steps=6, warmup=0, final=1)
    tuned = attach(tiny.llama(), method)
    tiny.randomise(tuned)
    for step in range(1, 7):
        tuned(**tiny.batch(tuned)).loss.backward()
        tuned.stepped(step)
    assert set(ranks(tuned).values()) == {3}


# -- what is shipped ---------------------------------------------------------------------------------------------------
def test_the_shipped_sweep_is_complete_and_about_these_methods():
    from minipeft.course import family
    from minipeft.world import load

    found, (model, _) = family.measured(), load("pocket")
    assert found["sweeps"].keys() == family.METHODS.keys()
    for name, method in family.METHODS.items():
        runs = found["sweeps"][name]
        best, rates = family.best_of(runs), sorted(each["lr"] for each in runs if each["seed"] == 0)
        assert {each["seed"] for each in best} == set(family.SEEDS), name
        assert best[0]["lr"] not in (rates[0], rates[-1]), f"{name}: the valley's floor is inside"
        assert all(found["floor"] < each["loss"] < found["before"] for each in best), name
        tuned = attach(model, method)
        assert {each["trainable"] for each in runs} == {tuned.count().trainable}, name
        tuned.detach()
    for budget, record in found["budgets"].items():
        method = AdaLoRA(rank=int(budget), steps=family.STEPS)
        totals = [method.budget(step, len(found["layers"])) for step in record["steps"]]
        assert [sum(each) for each in record["ranks"]] == totals
