"""Adapters combined: exact where that is promised, PEFT's numbers where PEFT has the rule, an error that is told."""

from __future__ import annotations

import math

import peft
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from test_tenants import adapters

import minipeft as mp
from minipeft.serve import combine as c

METHODS = {"z": mp.LoRA(rank=2, gamma=3.0), "b": mp.LoRA(rank=5, gamma=0.5, targets="attention"), "m": mp.LoRA(rank=2)}
WEIGHTS = {"z": 0.7, "b": -0.4, "m": 1.5}


@pytest.fixture(params=["llama", "gpt2", "classifier"])
def tuned(request, tmp_path):
    return adapters(tmp_path, tiny.MODELS[request.param](), METHODS)


def wanted(tuned, weights) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for name, w in weights.items():
        tuned.use(name)
        for path, delta in tuned.deltas().items():
            total[path] = total.get(path, 0) + w * delta
    return total


def of(tuned, name) -> dict[str, torch.Tensor]:
    tuned.use(name)
    return tuned.deltas()


@settings(max_examples=15, deadline=None)
@given(w=st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3), exact=st.sampled_from(["cat", "all"]))
def test_concatenation_and_every_direction_are_exact(tmp_path_factory, w, exact):
    tuned = adapters(tmp_path_factory.mktemp("x"), tiny.llama(), METHODS)
    weights = dict(zip(METHODS, w, strict=True))
    c.concatenate(tuned, weights, "new") if exact == "cat" else c.combine(tuned, weights, "new")
    want = wanted(tuned, weights)
    got = of(tuned, "new")
    assert got.keys() == want.keys()
    for path, delta in want.items():
        torch.testing.assert_close(got[path], delta, atol=1e-5, rtol=1e-5)


def test_the_ranks_add_up_where_they_fit_and_the_result_ships(tuned, tmp_path):
    c.concatenate(tuned, WEIGHTS, "new")
    for layer in tuned.adapters["new"].values():
        ranks = [own.rank for name in METHODS for own in tuned.adapters[name].values() if own.key == layer.key]
        assert layer.rank == sum(ranks) or layer.rank <= min(layer.weight.shape) < sum(ranks)
    assert c.error(tuned, "new", WEIGHTS) < 1e-6
    tuned.save(tmp_path / "new", "new")
    tuned.use("new")
    batch = tiny.batch(tuned)
    here = tuned(**batch).logits
    base = tuned.detach()
    torch.testing.assert_close(mp.load_adapter(base, tmp_path / "new")(**batch).logits, here, atol=1e-6, rtol=0)


def test_more_directions_than_the_weight_has(tmp_path):
    tuned = adapters(tmp_path, tiny.llama(), {name: mp.LoRA(rank=7) for name in "qps"})
    c.concatenate(tuned, dict.fromkeys("qps", 0.5), "new")
    assert max(layer.rank for layer in tuned.adapters["new"].values()) == tiny.D
    assert c.error(tuned, "new", dict.fromkeys("qps", 0.5)) < 1e-5


def test_svd_is_the_best_of_its_rank(tuned):
    c.combine(tuned, WEIGHTS, "new", rank=2)
    want = wanted(tuned, WEIGHTS)
    left = sum(torch.linalg.svdvals(d)[2:].square().sum().item() for d in want.values())
    size = sum(d.square().sum().item() for d in want.values())
    assert c.error(tuned, "new", WEIGHTS) == pytest.approx(math.sqrt(left / size), rel=1e-4)


def test_a_negative_weight_takes_the_task_away_again(tuned):
    c.concatenate(tuned, {"z": 1.0, "b": 1.0}, "both")
    c.combine(tuned, {"both": 1.0, "b": -1.0}, "left")
    for path, delta in of(tuned, "z").items():
        torch.testing.assert_close(of(tuned, "left")[path], delta, atol=1e-5, rtol=0)


def test_slices_and_embeddings(tmp_path):
    methods = {"v": mp.LoRA(rank=2, targets=["c_attn[32:48]", "wte"]), "q": mp.LoRA(rank=3, targets=["c_attn[0:16]"])}
    tuned = adapters(tmp_path, tiny.gpt2(), methods)
    for how in (c.concatenate, c.combine):
        how(tuned, {"v": 2.0, "q": -1.0}, how.__name__)
        for path, delta in wanted(tuned, {"v": 2.0, "q": -1.0}).items():
            torch.testing.assert_close(of(tuned, how.__name__)[path], delta, atol=1e-5, rtol=0)


def test_adapters_weighted_act_as_their_sum_and_are_as_before_afterwards(tuned):
    batch = tiny.batch(tuned)
    c.concatenate(tuned, WEIGHTS, "new")
    tuned.use("new")
    want = tuned(**batch).logits
    before = tiny.snapshot(tuned.adapters), of(tuned, "z")
    tuned.use("b")
    with pytest.raises(KeyError), tuned.using(WEIGHTS):
        torch.testing.assert_close(tuned(**batch).logits, want, atol=1e-4, rtol=0)
        raise KeyError
    assert tuned.active == ("b",)
    assert tiny.same(tiny.snapshot(tuned.adapters), before[0]) and tiny.same(of(tuned, "z"), before[1])


# -- Hugging Face PEFT ------------------------------------------------------------------------------------------------
@pytest.fixture(params=["llama", "gpt2"])
def both(request, tmp_path):
    """Two adapters of one rank, for PEFT's rules want that, in a Tuned and in a PeftModel over the same base."""
    tuned = adapters(tmp_path, tiny.MODELS[request.param](), {"z": mp.LoRA(rank=3, gamma=2.0), "b": mp.LoRA(rank=3)})
    theirs = peft.PeftModel.from_pretrained(tiny.MODELS[request.param](), tmp_path / "z", adapter_name="z")
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    return tuned, theirs


def peft_deltas(theirs, name) -> dict[str, torch.Tensor]:
    modules = theirs.base_model.model.named_modules()
    found = {path: module.get_delta_weight(name) for path, module in modules if hasattr(module, "get_delta_weight")}
    conv = any(
        type(module.base_layer).__name__ == "Conv1D" for module in theirs.modules() if hasattr(module, "base_layer")
    )
    return {path: (delta.T if conv else delta).detach() for path, delta in found.items()}


SVD = {
    "svd": (c.linear, {}),
    "ties_svd": (c.ties, {"density": 0.3}),
    "magnitude_prune_svd": (c.prune, {"density": 0.3}),
}


@pytest.mark.parametrize("kind", ["cat", *SVD])
@pytest.mark.parametrize("weights", [(0.6, 0.9), (1.3, -0.8)])
def test_as_peft_does(both, kind, weights):
    tuned, theirs = both
    names = dict(zip("zb", weights, strict=True))
    rule, settings = SVD.get(kind, (None, {}))
    if kind == "cat":
        c.concatenate(tuned, names, "new")
    else:
        c.combine(tuned, names, "new", rule, rank=4, **settings)
        settings = settings | {"svd_rank": 4}
    theirs.add_weighted_adapter(["z", "b"], list(weights), "new", combination_type=kind, **settings)
    want = peft_deltas(theirs, "new")
    for path, delta in of(tuned, "new").items():
        torch.testing.assert_close(delta, want[path], atol=1e-5, rtol=1e-4)


RULES = {
    "task_arithmetic": (c.linear, {}), "magnitude_prune": (c.prune, {"density": 0.35}),
    "ties": (c.ties, {"density": 0.35}), "dare_linear": (c.dare, {"density": 0.6}),
    "dare_ties": (c.dare_ties, {"density": 0.6}),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), shape=st.sampled_from([(1, 1), (3, 7), (16, 16)]), k=st.integers(1, 4))
def test_the_rules_are_peft_s(name, seed, shape, k):
    """On the same changes; DARE's with the same random numbers."""
    rule, settings = RULES[name]
    generator = torch.Generator().manual_seed(seed)
    changes, w = torch.randn(k, *shape, generator=generator), torch.randn(k, generator=generator)
    changes[0].view(-1)[0] = 0.0
    torch.manual_seed(seed)
    want = getattr(merge_utils, name)(list(changes), w, **settings)
    if "dare" in name:
        torch.manual_seed(seed)
    torch.testing.assert_close(rule(changes, w, **settings), want, atol=1e-6, rtol=1e-5)


def test_peft_s_linear_has_products_that_nobody_trained(both):
    """(Σ√w·B)·(Σ√w·A) is not Σ w·B·A: PEFT's own numbers, and that they are so by this formula."""
    tuned, theirs = both
    theirs.add_weighted_adapter(["z", "b"], [0.5, 0.5], "new", combination_type="linear")
    names = {"z": 0.5, "b": 0.5}
    want, got = wanted(tuned, names), peft_deltas(theirs, "new")
    layers = {name: {layer.path: layer for layer in tuned.adapters[name].values()} for name in names}
    for path in want:
        A = sum(math.sqrt(w * layers[n][path].gamma) * layers[n][path].A for n, w in names.items())
        B = sum(math.sqrt(w * layers[n][path].gamma) * layers[n][path].B for n, w in names.items())
        torch.testing.assert_close(got[path], (B @ A).detach(), atol=1e-5, rtol=0)
    apart = math.sqrt(sum((got[p] - want[p]).square().sum().item() for p in want))
    assert apart / math.sqrt(sum(d.square().sum().item() for d in want.values())) > 0.5


# -- DARE and what is refused -----------------------------------------------------------------------------------------
def test_dare_keeps_the_expectation_and_its_seed(tuned):
    changes, w = torch.ones(2, 200, 200), torch.tensor([1.0, 2.0])
    got = c.dare(changes, w, 0.25, torch.Generator().manual_seed(0))
    assert got.mean().item() == pytest.approx(3.0, rel=0.05)
    # the mean of N entries of variance (1 + 4)·(1 − p)/p
    assert abs(got.mean().item() - 3.0) < 4 * math.sqrt(5 * 3 / 40_000)
    state = torch.random.get_rng_state()
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        c.combine(tuned, WEIGHTS, name, c.dare, density=0.5, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert tiny.same(of(tuned, "one"), of(tuned, "again")) and not tiny.same(of(tuned, "one"), of(tuned, "two"))


def test_what_is_refused_changes_nothing(tuned):
    tuned.add("scaled", mp.IA3())
    tuned.add("prompt", mp.Adapter(2))
    before = list(tuned.adapters)
    for words, weights, more in (
        ("no adapter 'x'", {"x": 1.0}, {}), ("nothing to combine", {}, {}), ("not a finite", {"z": math.nan}, {}),
        ("not a finite", {"z": True}, {}), ("density=0", {"z": 1.0}, {"rule": c.ties, "density": 0}),
        ("rank=0", {"z": 1.0}, {"rank": 0}),
        ("more than a change", {"prompt": 1.0}, {}), ("in use", {"z": 1.0}, {"name": "b"}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            c.combine(tuned, weights, **{"name": "new"} | more)
    with pytest.raises(ValueError, match="use combine"):
        c.concatenate(tuned, {"scaled": 1.0}, "new")
    assert list(tuned.adapters) == before
    c.combine(tuned, {"z": 1.0, "m": -1.0}, "zero")
    with pytest.raises(ValueError, match="add up to nothing"):
        c.error(tuned, "zero", {"z": 0.0})
