"""LoRA against its equation, in every place it can sit."""

from __future__ import annotations

import copy
import dataclasses
import math
import re

import pytest
import tiny
import torch
from torch import nn

from minipeft.attach import attach
from minipeft.methods.lora import LoRA
from minipeft.targets import resolve

INF = float("inf")


class Toy(nn.Module):
    """Names chosen to tempt a careless match."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attn": nn.ModuleDict({"q_proj": nn.Linear(6, 5), "xq_proj": nn.Linear(6, 5)})})
            for _ in range(2)
        )
        self.layers[1]["fc"] = nn.Linear(5, 7)
        self.out = nn.Linear(7, 3)

    def forward(self, ids):
        x = self.embed(ids)
        return self.out(self.layers[1]["fc"](sum(f(input=x) for layer in self.layers for f in layer["attn"].values())))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(rank=0), "rank=0"),
        (dict(rank=-1), "rank=-1"),
        (dict(rank=2.0), "rank=2.0"),
        (dict(rank=True), "rank=True"),
        (dict(rank="8"), "rank='8'"),
        (dict(gamma=float("nan")), "γ is nan"),
        (dict(gamma=INF), "γ is inf"),
        (dict(alpha=float("nan")), "γ is nan"),
        (dict(gamma="2"), "gamma='2'"),
        (dict(gamma=1.0, alpha=16), "give one"),
        (dict(rank_stabilized=True), "alpha"),
        (dict(dropout=1.0), "dropout=1.0"),
        (dict(dropout=-0.1), "dropout=-0.1"),
        (dict(dropout=float("nan")), "dropout=nan"),
        (dict(init="zeros"), "'zeros'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LoRA(**arguments)


def test_gamma_is_alpha_over_r_or_over_its_root():
    assert LoRA().gamma == 2.0 and LoRA(gamma=0.5).gamma == 0.5
    assert LoRA(rank=8, alpha=4).gamma == 0.5
    assert LoRA(rank=16, alpha=4, rank_stabilized=True).gamma == 1.0
    assert dataclasses.replace(LoRA(rank=8, alpha=4), rank=2).gamma == 0.5
    assert hash(LoRA(targets=["q"])) == hash(LoRA(targets=("q",)))


def test_the_equation_on_a_non_square_layer():
    linear = nn.Linear(5, 3)
    model = copy.deepcopy(linear)
    tuned = attach(model, LoRA(rank=2, alpha=3))
    A, B = (p for p in tuned.adapters.parameters())
    assert A.shape == (2, 5) and B.shape == (3, 2) and not B.any() and A.abs().max() <= 1 / math.sqrt(5)
    tiny.randomise(tuned, scale=1.0)
    x = torch.randn(4, 5)
    expected = x @ (linear.weight + 3 / 2 * B @ A).T + linear.bias
    torch.testing.assert_close(tuned(x), expected)
    assert list(tuned.deltas()) == [""] and torch.equal(tuned.deltas()[""], 1.5 * (B @ A))
    tuned.merge()
    torch.testing.assert_close(tuned(x), expected)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_init(init):
    tuned = attach(nn.Linear(400, 300), LoRA(rank=50, init=init))
    A, B = tuned.adapters.parameters()
    assert not B.any()
    if init == "kaiming":
        assert 0.049 < A.abs().max() <= 0.05 and abs(A.std() - 0.05 / math.sqrt(3)) < 1e-3
    elif init == "gaussian":
        assert abs(A.std() - 1 / 50) < 1e-3
    else:
        torch.testing.assert_close(A @ A.T, torch.eye(50), atol=1e-5, rtol=0)


def test_dropout_only_while_training_and_only_on_the_low_rank_path():
    linear = nn.Linear(64, 64)
    tuned = attach(linear, LoRA(rank=4, dropout=0.5))
    x = torch.randn(8, 64)
    assert torch.equal(tuned.train()(x), nn.functional.linear(x, linear.weight, linear.bias)), "B = 0: no noise"
    tiny.randomise(tuned)
    assert not torch.equal(tuned(x), tuned(x))
    assert torch.equal(tuned.eval()(x), tuned(x))


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("all-linear", "q0 x0 q1 x1 fc out"),
        ("attention", "q0 x0 q1 x1"),
        ("mlp", "fc"),
        (["q_proj"], "q0 q1"),
        (["attn.q_proj", "q_proj"], "q0 q1"),
        (["1.attn.q_proj", "out"], "q1 out"),
        (["embed"], "embed"),
        (re.compile(r"layers\.0\..*"), "q0 x0"),
    ],
)
def test_targets(targets, expected):
    short = {"layers.0.attn.q_proj": "q0", "layers.0.attn.xq_proj": "x0", "layers.1.attn.q_proj": "q1"}
    short |= {"layers.1.attn.xq_proj": "x1", "layers.1.fc": "fc"}
    assert " ".join(short.get(t.key, t.key) for t in resolve(Toy(), targets)) == expected
    tuned, ids = attach(Toy(), LoRA(rank=2, targets=targets)), torch.arange(4)
    before = tuned(ids)
    tiny.randomise(tuned)
    after = tuned(ids)
    assert not torch.equal(before, after)
    tuned.merge()
    torch.testing.assert_close(tuned(ids), after)


def test_the_head_is_left_out_where_the_model_names_it():
    for family, heads in {"llama": "lm_head", "gpt2": "lm_head", "bert": "decoder", "classifier": "classifier"}.items():
        model = tiny.MODELS[family]()
        assert not any(t.path.endswith(heads) for t in resolve(model, "all-linear")), family
        assert [t.path.split(".")[-1] for t in resolve(model, [heads])] == [heads]
    paths = {t.path for kind in ("attention", "mlp") for t in resolve(tiny.gpt2(), kind)}
    assert paths == {t.path for t in resolve(tiny.gpt2(), "all-linear")} and len(paths) == 4 * tiny.L


def test_slices_of_a_fused_projection():
    d = tiny.D
    model = tiny.gpt2()
    base = {n: p.clone() for n, p in model.state_dict().items()}
    tuned = attach(model, LoRA(rank=2, targets=[f"c_attn[:{d}]", f"c_attn[{2 * d}:{3 * d}]"]))
    assert list(tuned.adapters["default"]) == [
        f"transformer/h/{layer}/attn/c_attn[{a}:{a + d}]" for layer in range(tiny.L) for a in (0, 2 * d)
    ]
    tiny.randomise(tuned)
    hidden = {}
    module = model.transformer.h[0].attn.c_attn
    module.register_forward_hook(lambda m, args, out: hidden.update(x=args[0], y=out))
    ids = tiny.batch(model)["input_ids"]
    adapted = tuned(ids).logits
    q, v = (tuned.adapters["default"][f"transformer/h/0/attn/c_attn[{a}:{a + d}]"] for a in (0, 2 * d))
    plain = hidden["x"] @ module.weight + module.bias
    extra = [2 * hidden["x"] @ (part.B @ part.A).T for part in (q, v)]
    torch.testing.assert_close(hidden["y"], plain + torch.cat([extra[0], 0 * extra[0], extra[1]], -1))
    delta = tuned.deltas()["transformer.h.0.attn.c_attn"]
    assert delta.shape == (3 * d, d) and not delta[d : 2 * d].any() and delta[:d].any() and delta[2 * d :].any()
    tuned.merge()
    torch.testing.assert_close(tuned(ids).logits, adapted, atol=1e-5, rtol=0)
    assert torch.equal(module.weight[:, d : 2 * d], base["transformer.h.0.attn.c_attn.weight"][:, d : 2 * d])
    with pytest.raises(ValueError, match="above min"):
        attach(tiny.gpt2(), LoRA(rank=5, targets=["c_attn[0:4]"]))


def test_embedding():
    model = nn.Sequential(nn.Embedding(11, 6))
    weight = model[0].weight.detach().clone()
    tuned = attach(model, LoRA(rank=2, targets=["0"]))
    layer = tuned.adapters["default"]["0"]
    assert layer.A.shape == (2, 11) and layer.B.shape == (6, 2) and not layer.A.any() and layer.B.any()
    tiny.randomise(tuned)
    ids = torch.tensor([[3, 10], [0, 3]])
    expected = weight[ids] + 2 * layer.A[:, ids].permute(1, 2, 0) @ layer.B.T
    torch.testing.assert_close(tuned(ids), expected)
    assert tuned.deltas()["0"].shape == (6, 11)
    tuned.merge()
    torch.testing.assert_close(tuned(ids), expected)


def test_weights_that_cannot_be_adapted():
    quantised = nn.Sequential(nn.Linear(4, 4))
    quantised[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)

    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    for model, targets, message in (
        (quantised, "all-linear", "int8"),
        (nn.Sequential(Scaled(4, 4)), ["0"], "forward of its own"),
        (nn.MultiheadAttention(4, 2), "all-linear", "matches nothing"),
        (nn.Sequential(nn.ReLU()), "all-linear", "no linear layer"),
        (nn.Sequential(nn.Linear(4, 4)), "mlpp", "mlpp"),
    ):
        with tiny.untouched(model), pytest.raises(ValueError, match=message):
            attach(model, LoRA(rank=1, targets=targets))


def test_a_module_used_twice_has_one_adapter():
    shared = nn.Linear(4, 4)
    tuned = attach(nn.Sequential(shared, shared), LoRA(rank=1))
    tiny.randomise(tuned, scale=1.0)
    x = torch.randn(2, 4)
    output = tuned(x)
    assert tuned.count().trainable == 8
    tuned.merge()
    torch.testing.assert_close(tuned(x), output)


def test_adam_without_epsilon_sees_alpha_and_learning_rates_only_in_combination():
    """(α, A₀, LR_A, LR_B) and (α/(p·q), p·A₀, p·LR_A, q·LR_B) train identically ("LoRA Without Regret")."""

    def run(p: float, q: float) -> torch.Tensor:
        torch.manual_seed(0)
        linear, x, y = nn.Linear(6, 5).double(), torch.randn(32, 6).double(), torch.randn(32, 5).double()
        tuned = attach(linear, LoRA(rank=2, gamma=2.0 / (p * q)))
        A, B = tuned.adapters.parameters()
        A.data *= p
        # A's first gradient is zero, because B is: one step of B alone, so that Adam never divides 0 by 0
        optimizers = [torch.optim.Adam([dict(params=[t], lr=lr)], eps=0) for t, lr in ((B, q * 1e-2), (A, p * 1e-2))]
        for step in range(20):
            tuned.zero_grad()
            (tuned(x) - y).square().mean().backward()
            for optimizer in optimizers[: 1 if step == 0 else 2]:
                optimizer.step()
        return tuned.deltas()[""]

    torch.testing.assert_close(run(1, 1), run(3, 0.25), atol=1e-10, rtol=0)
