"""Spectra against scipy, numpy, closed forms, HF PEFT and chance; truncation and random subspaces in a model."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft.analyze.intrinsic import intrinsic_dimension
from minipeft.analyze.spectrum import (
    amplification,
    base_weight,
    decompose,
    intruders,
    marchenko_pastur,
    random_similarity,
    random_spectrum,
    similarity,
    spectra,
    truncated,
)
from minipeft.attach import attach
from minipeft.methods.lora import LoRA
from minipeft.methods.select import BitFit, Full, Softmax
from minipeft.methods.subspace import Subspace, hadamard


def diagonal(values) -> torch.Tensor:
    """A matrix with these singular values and no zero entry: Q₁·diag(σ)·Q₂ᵀ."""
    n = len(values)
    Q1, Q2 = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for _ in range(2))
    return Q1 * torch.tensor(values, dtype=torch.float64) @ Q2.T


@pytest.mark.parametrize(
    "values, effective, stable",
    [
        ([2.0**-k for k in range(60)], 4.0, 4 / 3),
        ([1 / k for k in range(1, 101)], 39.677, 1.63498),
        ([3.0] * 7, 7.0, 7.0),
        ([5.0, 0.0, 0.0], 1.0, 1.0),
    ],
)
def test_ranks_of_known_spectra(values, effective, stable):
    s = decompose(diagonal(values))
    assert s.effective_rank == pytest.approx(effective, abs=5e-4)
    assert s.stable_rank == pytest.approx(stable, abs=5e-6)
    assert s.numerical_rank == np.linalg.matrix_rank(diagonal(values).numpy())


def test_the_zero_matrix_has_rank_zero_by_every_measure():
    s = decompose(torch.zeros(4, 3))
    assert (s.effective_rank, s.stable_rank, s.numerical_rank, s.norm) == (0.0, 0.0, 0, 0.0)
    assert s.energy.tolist() == [0.0] * 3


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 12), st.integers(0, 10**6))
def test_factors_give_the_dense_spectrum(d_out, d_in, r, seed):
    generator = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((d_out, r), (r, d_in)))
    s = decompose(B, A)
    dense = scipy.linalg.svdvals((B @ A).numpy())
    np.testing.assert_allclose(s.sigma.numpy(), dense[: len(s.sigma)], atol=1e-12 * dense[0])
    torch.testing.assert_close(s.matrix(), B @ A)
    for Z in (s.U, s.V):
        torch.testing.assert_close(Z.T @ Z, torch.eye(Z.shape[1], dtype=torch.float64))
    assert s.norm == pytest.approx(torch.linalg.matrix_norm(B @ A).item())
    assert s.energy[-1].item() == pytest.approx(1.0)


def test_a_large_low_rank_spectrum_takes_milliseconds_and_equals_the_dense_one():
    B, A = torch.randn(4096, 16), torch.randn(16, 4096)
    decompose(B, A)
    start = time.process_time()
    s = decompose(B, A)
    assert time.process_time() - start < 0.2, "a dense decomposition takes half a minute"
    # σ² are the eigenvalues of A·Aᵀ·BᵀB, 16 × 16, in float64
    exact = np.linalg.eigvals((A.double() @ A.double().T @ (B.double().T @ B.double())).numpy()).real
    np.testing.assert_allclose(s.sigma.numpy(), np.sqrt(np.sort(exact)[::-1]), rtol=2e-6)


def test_truncation_is_the_best_approximation():
    M = torch.randn(9, 6, dtype=torch.float64)
    s = decompose(M)
    for r in range(7):
        error = (M - s.truncate(r).matrix()).norm().item()
        assert error == pytest.approx(s.sigma[r:].norm().item(), abs=1e-12)
        for _ in range(20):  # no other subspace of that size does better
            Q = torch.linalg.qr(torch.randn(9, r, dtype=torch.float64)).Q if r else torch.zeros(9, 0).double()
            assert (M - Q @ Q.T @ M).norm().item() >= error - 1e-12
    assert [s.rank_for(share) for share in (1.0, 1e-9)] == [6, 1]
    assert s.energy[s.rank_for(0.9) - 1] >= 0.9 > (s.energy[s.rank_for(0.9) - 2] if s.rank_for(0.9) > 1 else 0)


# -- chance -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(300, 300), (200, 500), (500, 200), (40, 4000)])
def test_marchenko_pastur_is_what_random_matrices_show(shape):
    expected, drawn = marchenko_pastur(shape, 7.0), random_spectrum(shape, 7.0)
    assert len(expected) == min(shape) and (np.diff(expected) < 0).all()
    assert np.linalg.norm(drawn) == pytest.approx(7.0)
    assert np.linalg.norm(expected) == pytest.approx(7.0, rel=2e-3)
    s = 7.0 / math.sqrt(shape[0] * shape[1])
    assert expected[0] < s * (math.sqrt(shape[0]) + math.sqrt(shape[1])) < 1.05 * expected[0]
    assert np.abs(drawn - expected).max() < 0.03 * expected[0]


def test_the_baseline_of_a_rank_has_that_rank():
    drawn = random_spectrum((128, 384), 2.0, rank=8)
    assert len(drawn) == 8 and np.linalg.norm(drawn) == pytest.approx(2.0)
    assert (random_spectrum((128, 384), 2.0, rank=8) == drawn).all()
    assert (random_spectrum((128, 384), 2.0, rank=8, seed=1) != drawn).any()


# -- directions -------------------------------------------------------------------------------------------------------
def orthonormal(d: int, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, n, generator=generator, dtype=torch.float64)).Q


def test_similarity_of_all_pairs_is_the_definition_pair_by_pair():
    X, Y = orthonormal(20, 6, 0), orthonormal(20, 4, 1)
    phi = similarity(X, Y)
    assert phi.shape == (6, 4)
    for i in range(1, 7):
        for j in range(1, 5):
            angles = scipy.linalg.subspace_angles(X[:, :i].numpy(), Y[:, :j].numpy())
            assert phi[i - 1, j - 1].item() == pytest.approx((np.cos(angles) ** 2).sum() / min(i, j))
    assert similarity(X, X).allclose(torch.ones(6, 6).double())
    assert similarity(X[:, :3], X[:, 3:]).abs().max() < 1e-12


def test_the_mean_similarity_of_random_subspaces():
    d, m, n, draws = 24, 5, 8, 400
    mean = sum(similarity(orthonormal(d, m, 2 * s), orthonormal(d, n, 2 * s + 1)) for s in range(draws)) / draws
    expected = random_similarity(m, n, d)
    assert expected[1, 4] == 5 / 24 and expected[4, 1] == 5 / 24
    assert (mean - expected).abs().max() < 0.02


def test_similarity_refuses_what_has_no_angle():
    with pytest.raises(ValueError, match="same length"):
        similarity(orthonormal(8, 2, 0), orthonormal(9, 2, 0))
    with pytest.raises(ValueError, match="not orthonormal"):
        similarity(orthonormal(8, 2, 0), torch.randn(8, 2))


def test_amplification_has_the_papers_parts():
    W = torch.randn(40, 30, dtype=torch.float64)
    delta = decompose(torch.randn(40, 3, dtype=torch.float64), torch.randn(3, 30, dtype=torch.float64))
    found = amplification(delta, W)
    assert found.along == pytest.approx((delta.U.T @ W @ delta.V).norm().item())
    assert found.factor == pytest.approx(delta.norm / found.along)
    chance = [
        amplification(decompose(orthonormal(40, 3, s), orthonormal(30, 3, s + 500).T), W).along ** 2 for s in range(400)
    ]
    assert math.sqrt(sum(chance) / 400) == pytest.approx(found.random, rel=0.05)
    # what the paper prints for GPT-3's W_q: ‖W‖ = 61.95, d = 12288 gives 0.02 at r = 4
    assert 61.95 * 4 / 12288 == pytest.approx(0.02, abs=5e-4)
    itself = decompose(W).truncate(2)
    assert amplification(itself, W).factor == pytest.approx(1.0), "W's own directions are amplified once"
    with pytest.raises(ValueError, match="d_out, d_in"):
        amplification(delta, W.T)


@pytest.mark.parametrize("scale, some", [(0.01, False), (1.0, True), (6.0, True)])
def test_intruder_dimensions_as_peft_finds_them(scale, some):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    # Wide enough that a random direction stays below ε = 0.5, with falling singular values as a trained weight has.
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(120, 200, bias=False), torch.nn.Linear(200, 90, bias=False))
    for layer in net:
        U, sigma, Vh = torch.linalg.svd(torch.randn_like(layer.weight), full_matrices=False)
        layer.weight.data = U * (3.0 / torch.arange(1, len(sigma) + 1)) @ Vh
    weights = [layer.weight.detach().clone() for layer in net]
    peft = get_peft_model(net, LoraConfig(r=4, lora_alpha=4, target_modules=["0", "1"]))
    deltas = []
    for layer in (peft.base_model.model[0], peft.base_model.model[1]):
        layer.lora_B["default"].weight.data.normal_().mul_(scale / 14)
        deltas.append(layer.get_delta_weight("default").detach())
    said = []
    reduce_intruder_dimension(peft, logging_sink=said.append)
    theirs = [0 if "No intruders" in line else int(line.rsplit(" ", 1)[1]) for line in said[:2]]
    ours = [len(intruders(w, d)) for w, d in zip(weights, deltas, strict=True)]
    assert ours == theirs and bool(sum(ours)) == some


# -- in a model -------------------------------------------------------------------------------------------------------
METHODS = {
    "lora": LoRA(rank=3),
    "embedding": LoRA(rank=2, targets=["embed_tokens", "wte", "word_embeddings"]),
    "full": Full(),
    "head": [LoRA(rank=2), Softmax()],
}


@pytest.mark.parametrize("family", tiny.MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_spectra_of_a_model_are_those_of_its_deltas(family, name):
    names = {"llama": "embed_tokens", "gpt2": "wte", "t5": "embed_tokens"}
    method = METHODS[name] if name != "embedding" else LoRA(rank=2, targets=[names.get(family, "word_embeddings")])
    tuned = attach(tiny.MODELS[family](), method)
    tiny.randomise(tuned)
    deltas = {path: delta for path, delta in tuned.deltas().items() if delta.ndim == 2}
    found = spectra(tuned)
    assert found.keys() == deltas.keys()
    for path, s in found.items():
        torch.testing.assert_close(s.matrix(), deltas[path], atol=2e-6, rtol=0)
        if name == "lora":
            assert len(s.sigma) == 3
        if path in dict(tuned.base.named_modules()):
            assert base_weight(tuned, path).shape == s.shape


def test_several_adapters_and_slices_add_up():
    tuned = attach(tiny.gpt2(), LoRA(rank=2, targets=["c_attn[0:16]", "c_attn[32:48]"]))
    tuned.add("other", LoRA(rank=1, targets=["c_attn"]), seed=1)
    tuned.use("default", "other")
    tiny.randomise(tuned)
    for path, delta in tuned.deltas().items():
        torch.testing.assert_close(spectra(tuned)[path].matrix(), delta, atol=2e-6, rtol=0)


def logits(tuned):
    with torch.no_grad():
        return tuned(input_ids=tiny.batch(tuned)["input_ids"]).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [LoRA(rank=4), Full()], ids=["lora", "full"])
def test_a_truncation_replaces_every_matrix_and_nothing_else(family, method):
    tuned = attach(tiny.MODELS[family](), method)
    tiny.randomise(tuned)
    whole, deltas, found = logits(tuned), tuned.deltas(), spectra(tuned)
    with truncated(tuned, 100, found):
        assert (logits(tuned) - whole).abs().max() < 1e-5, "nothing cut off, nothing changed"
    with truncated(tuned, 0):
        bare = attach(tiny.MODELS[family](), Full())
        for layer in bare.adapters["default"].values():
            if layer.path in deltas and deltas[layer.path].ndim == 1:
                layer.value.data += deltas[layer.path]
        assert (logits(tuned) - logits(bare)).abs().max() < 1e-5, "rank 0 is the base with the vectors' changes"
    path = next(path for path in found if "mlp" in path)
    with truncated(tuned, 2, found):
        owner = tuned.base.get_submodule(path)
        weight = owner.weight.T if family == "gpt2" else owner.weight
        U, sigma, Vh = scipy.linalg.svd(deltas[path].numpy(), full_matrices=False)
        best = torch.tensor(U[:, :2] * sigma[:2] @ Vh[:2])
        torch.testing.assert_close(weight.detach() - base_weight(tuned, path), best, atol=2e-6, rtol=0)
        assert (logits(tuned) - whole).abs().max() > 1e-4
    assert torch.equal(logits(tuned), whole)
    with tuned.disabled():
        assert torch.equal(logits(tuned), logits(tiny.MODELS[family]()))


def test_a_tied_weight_stays_tied_within_a_truncation():
    tuned = attach(tiny.llama(), Full())
    tiny.randomise(tuned)
    with truncated(tuned, 2):
        assert tuned.base.lm_head.weight is tuned.base.model.embed_tokens.weight


def test_mistakes_are_said_and_change_nothing():
    tuned = attach(tiny.llama(), LoRA(rank=2))
    tiny.randomise(tuned)
    whole = logits(tuned)
    with pytest.raises(ValueError, match="whole number"), truncated(tuned, -1):
        pass
    assert torch.equal(logits(tuned), whole)
    with pytest.raises(ValueError, match="inner sizes"):
        decompose(torch.randn(4, 2), torch.randn(3, 4))
    with pytest.raises(ValueError, match="not finite"):
        decompose(torch.full((2, 2), math.nan))
    with pytest.raises(ValueError, match="outside"):
        decompose(torch.eye(3)).rank_for(0.0)
    assert spectra(attach(tiny.llama(), BitFit())) == {}


# -- intrinsic dimension ----------------------------------------------------------------------------------------------
def test_the_fast_transform_is_the_hadamard_matrix():
    x = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(hadamard(x), x @ torch.tensor(scipy.linalg.hadamard(16)).double())


def flat(tuned) -> torch.Tensor:
    return torch.cat([delta.flatten() for delta in tuned.deltas().values()]).double()


@pytest.mark.parametrize("projection", ["dense", "fastfood"])
def test_a_subspace_is_linear_shared_and_as_long_as_z(projection):
    dim = 12
    tuned = attach(tiny.llama(), Subspace(dim, projection))
    count = tuned.count()
    with tuned.disabled():
        base = sum(p.numel() for p in tuned.base.parameters())
    assert (count.trainable, count.total) == (dim, base + dim)
    [z] = {id(p): p for p in tuned.parameters() if p.requires_grad}.values()
    columns = []
    for i in range(dim):
        z.data = torch.eye(dim)[i]
        columns.append(flat(tuned))
    P = torch.stack(columns, 1)
    assert torch.linalg.matrix_rank(P) == dim, "k independent directions"
    assert (P.norm(dim=0) - 1).abs().max() < 0.2 and P.norm(dim=0).square().mean() == pytest.approx(1, abs=0.1)
    z.data = torch.randn(dim)
    torch.testing.assert_close(flat(tuned), P @ z.data.double(), atol=1e-5, rtol=1e-4)
    merged_before = logits(tuned)
    tuned.merge()
    assert (logits(tuned) - merged_before).abs().max() < 1e-5


@pytest.mark.parametrize("projection", ["dense", "fastfood"])
def test_a_subspace_trains_from_the_identity_and_more_dimensions_fit_more(projection):
    losses = {}
    for dim in (1, 64):
        tuned = attach(tiny.llama(), Subspace(dim, projection), seed=5)
        assert torch.equal(logits(tuned), logits(tiny.llama()))
        again = attach(tiny.llama(), Subspace(dim, projection), seed=5)
        [z], [other] = ([p for p in t.parameters() if p.requires_grad] for t in (tuned, again))
        optimizer = torch.optim.Adam([z], lr=0.3)
        for _ in range(30):
            loss = tuned(**tiny.batch(tuned)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[dim] = loss.item()
        other.data = z.data
        assert torch.equal(logits(again), logits(tuned)), "P follows from the seed"
    assert losses[64] < losses[1] - 0.3


def test_intrinsic_dimension_is_the_least_that_recovers_the_share():
    losses = {10: 2.0, 100: 1.15, 1000: 1.01}
    assert intrinsic_dimension(losses, before=2.5, full=1.0) == 100
    assert intrinsic_dimension(losses, before=2.5, full=1.0, share=0.99) == 1000
    assert intrinsic_dimension({10: 2.0}, before=2.5, full=1.0) is None
    with pytest.raises(ValueError, match="no gain"):
        intrinsic_dimension(losses, before=1.0, full=1.0)


def test_subspace_mistakes_leave_the_model_alone():
    for bad in (dict(dim=0), dict(projection="sparse")):
        with pytest.raises(ValueError):
            Subspace(**bad)
    with tiny.untouched(model := tiny.llama()):
        with pytest.raises(ValueError, match="at most"):
            attach(model, Subspace(10**6))
        with pytest.raises(ValueError, match="embedding"):
            attach(model, Subspace(4, targets=["embed_tokens"]))


def test_what_has_no_spectrum_to_compare_is_refused():
    with pytest.raises(TypeError, match="what attach returned"):
        spectra(tiny.llama())
    with pytest.raises(ValueError, match=r"ΔW is \(4, 5\) but W is \(4, 4\)"):
        intruders(torch.eye(4), torch.ones(4, 5))
    with pytest.raises(ValueError, match="k=0"):
        intruders(torch.eye(4), torch.eye(4), k=0)
