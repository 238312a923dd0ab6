"""LoRA, DoRA and (IA)³ on convolutions: Hugging Face PEFT computes the same logits and gradients from the same file,
and writes one that is read here. Where PEFT adds what is no ΔW (groups, dilation), the layers keep their promises."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import minipeft as mp

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

SHAPES = {1: (2, 4, 11), 2: (2, 4, 9, 7), 3: (2, 4, 5, 6, 7)}
METHODS = {
    "LoRA": lambda names: mp.LoRA(rank=3, alpha=5, targets=names),
    "rank-stabilised LoRA": lambda names: mp.LoRA(rank=2, alpha=5, rank_stabilized=True, targets=names),
    "DoRA": lambda names: mp.DoRA(rank=2, gamma=1.5, targets=names),
    "IA3, outputs": lambda names: mp.IA3(targets=names, feedforward=()),
    "IA3, inputs": lambda names: mp.IA3(targets=(), feedforward=names),
}


class Network(nn.Module):
    """Two convolutions and a linear layer, in 1, 2 or 3 dimensions."""

    def __init__(self, dimensions: int, **second):
        super().__init__()
        kind = getattr(nn, f"Conv{dimensions}d")
        with torch.random.fork_rng():
            torch.manual_seed(dimensions)
            self.first = kind(4, 6, 3, padding=1, stride=2)
            self.second = kind(6, 12, 1, **second)
            self.out = nn.Linear(12, 5)

    def forward(self, x):
        return self.out(self.second(self.first(x).tanh()).tanh().flatten(2).mean(-1))


def moved(model: nn.Module, method) -> nn.Module:
    """Attached, with every trained number moved."""
    tuned = mp.attach(model, method)
    generator = torch.Generator().manual_seed(1)
    for p in tuned.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return tuned


@pytest.mark.parametrize("dimensions", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_peft_computes_the_same_and_back(name, dimensions, tmp_path):
    if name.startswith("IA3") and dimensions == 1:
        pytest.skip("PEFT's IA3 knows no Conv1d")
    names = ["first", "second", "out"]
    tuned = moved(Network(dimensions), METHODS[name](names)).double()
    tuned.save(tmp_path / "here")
    other = peft.PeftModel.from_pretrained(Network(dimensions), tmp_path / "here", is_trainable=True).double().eval()
    x = torch.randn(SHAPES[dimensions], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mine, theirs = tuned(x), other(x)
    assert (mine - Network(dimensions).double()(x)).abs().max() > 1e-2
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    mine.square().sum().backward()
    theirs.square().sum().backward()
    grads = [
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).sort().values
        for model in (tuned, other)
    ]
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-9)
    other.save_pretrained(tmp_path / "there")
    back = mp.load_adapter(Network(dimensions), tmp_path / "there").double()
    torch.testing.assert_close(back(x), mine, atol=1e-6, rtol=0)
    if dimensions < 3:  # PEFT cannot merge a Conv3d
        merged = other.merge_and_unload()
        tuned.merge()
        torch.testing.assert_close(tuned.detach().second.weight, merged.second.weight, atol=1e-12, rtol=0)


OTHERS = {
    "grouped": {"groups": 2},
    "depthwise": {"groups": 6, "kernel_size": 3},
    "dilated": {"dilation": 2, "kernel_size": 3, "padding": 2},
    "reflecting": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "without a bias": {"bias": False},
}


@pytest.mark.parametrize("dimensions", SHAPES)
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", METHODS)
def test_the_layer_adds_its_delta_on_every_convolution(name, kind, dimensions, tmp_path):
    """The hook gives what W + ΔW gives, put there by hand or by merging, alone or in a batch; the file comes back."""
    model = Network(dimensions)
    settings = {"kernel_size": 1} | OTHERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.second = getattr(nn, f"Conv{dimensions}d")(6, 12, **settings)
    before = {name: p.clone() for name, p in model.named_parameters()}
    tuned = moved(model, METHODS[name](["first", "second"]))
    x = torch.randn(SHAPES[dimensions], generator=torch.Generator().manual_seed(2))
    hidden = model.first(x).tanh()
    out, one = model.second(hidden), model.second(hidden[0])
    torch.testing.assert_close(out[0], one, atol=1e-5, rtol=1e-5)
    changes = tuned.deltas()
    by_hand = torch.func.functional_call(
        model.second.__class__(6, 12, **settings),
        {
            "weight": before["second.weight"] + changes["second"].view_as(before["second.weight"]),
            **({"bias": before["second.bias"] + changes.get("second.bias", 0)} if settings.get("bias", True) else {}),
        },
        (hidden,),
    )
    torch.testing.assert_close(out, by_hand, atol=1e-5, rtol=1e-5)
    tuned.save(tmp_path)
    kind_of_file = json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    peft_differs = dimensions == 1 if name.startswith("IA3") else kind != "without a bias"
    assert kind_of_file.startswith("MINIPEFT_") == peft_differs
    tuned.merge()
    torch.testing.assert_close(model.second(hidden), out, atol=1e-5, rtol=1e-5)
    tuned.unmerge()
    base = tuned.detach()
    assert all(torch.equal(before[name], p) for name, p in base.named_parameters())
    again = mp.load_adapter(base, tmp_path)
    assert torch.equal(base.second(hidden), out) and again.count().trainable == tuned_numbers(name, base)


def tuned_numbers(name: str, model: nn.Module) -> int:
    total = 0
    for module in (model.first, model.second):
        d_out, d_in = module.weight.flatten(1).shape
        rank = {"LoRA": 3, "rank-stabilised LoRA": 2, "DoRA": 2}.get(name)
        if rank is None:
            total += module.out_channels if name == "IA3, outputs" else module.in_channels
        else:
            total += rank * (d_in + d_out) + (d_out if name == "DoRA" else 0)
    return total


def test_what_does_not_work_on_a_convolution_says_so():
    model = Network(2)
    for method, said in (
        (mp.VeRA(rank=2, targets=["first"]), "names Conv2d"),
        (mp.LoRA(rank=2, init="pissa", targets=["first"]), "is a convolution"),
        (mp.LoRA(rank=2, targets=["first[0:3]"]), "no part can be named"),
        (mp.LoRA(rank=7, targets=["first"]), "use at most 6"),
    ):
        with pytest.raises(ValueError, match=said):
            mp.attach(model, method)
    tuned = mp.attach(model, mp.LoRA(rank=2))
    assert list(tuned.deltas()) == ["out"], "all-linear leaves convolutions alone, as PEFT does"


def test_dropout_and_rows_of_a_batch():
    model = Network(2).eval()
    tuned = moved(model, mp.DoRA(rank=2, dropout=0.5, targets=["first"]))
    tuned.add("other", mp.LoRA(rank=1, targets=["first", "second"]))
    for p in tuned.adapters["other"].parameters():
        p.data += 0.3
    x = torch.randn(SHAPES[2], generator=torch.Generator().manual_seed(2))
    mixed = tuned(x, adapters=["other", "default"])
    torch.testing.assert_close(mixed[1], tuned(x)[1])
    tuned.use("other")
    torch.testing.assert_close(mixed[0], tuned(x)[0])
    tuned.use("default")
    tuned.train()
    assert not torch.equal(tuned(x), tuned(x))
