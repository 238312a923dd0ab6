"""One product with W' = W + γ·B·A gives what the plain form gives, wherever it is used, and is not used elsewhere."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import tiny
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import minipeft as mp
from minipeft.attach import attach
from minipeft.methods import fused
from minipeft.methods.lora import LoRALayer

N, D_IN, D_OUT = 300, 80, 64  # rows enough for one product, training or not


class Toy(nn.Module):
    def __init__(self, kind: str = "linear"):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.l = Conv1D(D_OUT, D_IN) if kind == "conv1d" else nn.Linear(D_IN, D_OUT, bias=kind != "no bias")

    def forward(self, x):
        return self.l(x)


METHODS = {
    "lora": mp.LoRA(rank=4, gamma=1.7),
    "lora of a high rank": mp.LoRA(rank=40, gamma=0.3),
    "dora": mp.DoRA(rank=4),
    "vera": mp.VeRA(rank=70),
    "ia3": mp.IA3(targets=["l"], feedforward=()),
    "ia3 of the input": mp.IA3(targets=(), feedforward=["l"]),
}


def moved(method, kind="linear", dtype=torch.float64) -> mp.Tuned:
    tuned = attach(Toy(kind).to(dtype), method)
    tiny.randomise(tuned)
    return tuned.train()


def x_like(dtype=torch.float64, rows=(3, N // 3)) -> torch.Tensor:
    return torch.randn(*rows, D_IN, generator=torch.Generator().manual_seed(3), dtype=dtype)


class Spy:
    """How often a layer gave the whole output itself."""

    def __init__(self, monkeypatch, tuned):
        self.times = 0
        for layer in tuned.adapters.modules():
            if hasattr(layer, "whole"):
                monkeypatch.setattr(layer, "whole", self.around(layer.whole), raising=False)

    def around(self, whole):
        def spy(x):
            output = whole(x)
            self.times += output is not None
            return output

        return spy


def outcome(tuned, x, call=None) -> dict[str, torch.Tensor]:
    """The output, and the gradients of x and of all that trains."""
    x = x.clone().requires_grad_()
    y = (call or tuned)(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    grads = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    tuned.zero_grad()
    return {"y": y.detach(), "x": x.grad, **grads}


def plain(monkeypatch, tuned, x, call=None) -> dict[str, torch.Tensor]:
    with monkeypatch.context() as patch:
        for layer in tuned.layers():
            patch.setattr(layer, "whole", lambda x: None, raising=False)
        return outcome(tuned, x, call)


def agree(found, expected, tolerance: float) -> None:
    assert found.keys() == expected.keys() and len(found) > 2
    for key, value in expected.items():
        assert (found[key] - value).abs().max() <= tolerance * max(1.0, value.abs().max().item()), key


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 3e-6)], ids=["f64", "f32"])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients_are_the_plain_form_s(method, kind, dtype, tolerance, monkeypatch):
    tuned = moved(METHODS[method], kind, dtype)
    x = x_like(dtype)
    expected = plain(monkeypatch, tuned, x)
    spy = Spy(monkeypatch, tuned)
    agree(outcome(tuned, x), expected, tolerance)
    with torch.no_grad():
        assert (tuned(x) - expected["y"]).abs().max() <= 10 * tolerance
        small = tuned(x[:1, :1])
        assert (small - expected["y"][:1, :1]).abs().max() <= 10 * tolerance
    assert spy.times >= 2, "the short way was taken"
    assert moved(METHODS[method], kind).adapters.state_dict().keys() == tuned.adapters.state_dict().keys()


@pytest.mark.parametrize("method", METHODS)
def test_before_the_first_step_the_model_is_the_base_bit_for_bit(method, monkeypatch):
    base = Toy().float()
    x = x_like(torch.float32)
    expected = base(x)
    tuned = attach(base, METHODS[method]).train()
    spy = Spy(monkeypatch, tuned)
    assert torch.equal(tuned(x), expected) and spy.times == 1
    with torch.no_grad():
        assert torch.equal(tuned(x), expected) and spy.times == 2
    tiny.randomise(tuned)
    assert not torch.equal(tuned(x), expected)
    with tuned.disabled():
        assert torch.equal(tuned(x), expected)


@pytest.mark.parametrize("frozen", ["A", "B", "x", "A and B"])
def test_what_needs_no_gradient_gets_none_and_changes_no_other(frozen, monkeypatch):
    tuned = moved(METHODS["lora"])
    x = x_like()
    expected = plain(monkeypatch, tuned, x)
    layer = tuned.layers()[0]
    for name in frozen.split(" and "):
        if name != "x":
            getattr(layer, name).requires_grad_(False)
    x.requires_grad_(frozen != "x")
    y = tuned(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    for name, value in (("x", x.grad), ("A", layer.A.grad), ("B", layer.B.grad)):
        if name in frozen.split(" and "):
            assert value is None
        else:
            key = next(k for k in expected if k.split(".")[-1] == name)
            assert (value - expected[key]).abs().max() <= 1e-13 * expected[key].abs().max()


@pytest.mark.parametrize("rank", [1, 5], ids=["thin products", "gᵀ·x"])
def test_second_derivatives(rank):
    numbers = [torch.randn(*shape, dtype=torch.float64) for shape in ((5, 8), (6, 8), (6,), (rank, 8), (6, rank))]
    x, W, b, A, B = numbers

    def function(x, A, B):
        return fused.OneProduct.apply(x, W, b, A, B, 1.7)

    inputs = [v.requires_grad_() for v in (x, A, B)]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_only_sizes_at_which_it_is_quicker():
    assert fused.quicker(1424, 128, 128) and fused.quicker(1424, 128, 384)  # the pocket's step
    assert not fused.quicker(1, 4096, 4096)  # a token at a time: W' would be formed for each
    assert not fused.quicker(512, 4096, 4096) and fused.quicker(4096, 4096, 4096)
    assert not fused.quicker(21, 16, 16) and not fused.quicker(10**6, 16, 16)


# ---------------------------------------------------------------------------------------------------------------------
# Where the plain form stays
# ---------------------------------------------------------------------------------------------------------------------
def wide_base() -> mp.Tuned:
    tuned = moved(METHODS["lora"], dtype=torch.float32)
    tuned.base.double()
    return tuned


CASES = {  # {what: (the model, the dtype of its base)}
    "a base in bfloat16": (lambda: moved(METHODS["lora"], dtype=torch.bfloat16), torch.bfloat16),
    "an adapter in another dtype": (wide_base, torch.float64),
    "dropout": (lambda: moved(mp.LoRA(rank=4, dropout=0.3)), torch.float64),
    "dropout in DoRA": (lambda: moved(mp.DoRA(rank=4, dropout=0.3)), torch.float64),
    "dropout in VeRA": (lambda: moved(mp.VeRA(rank=70, dropout=0.3)), torch.float64),
    "a slice": (lambda: moved(mp.LoRA(rank=4, targets=["l[8:40]"])), torch.float64),
    "a trained bias": (lambda: moved([mp.LoRA(rank=4), mp.BitFit()]), torch.float64),
    "a trained weight": (lambda: moved([mp.LoRA(rank=4), mp.Full()]), torch.float64),
    "PiSSA": (lambda: moved(mp.LoRA(rank=4, init="pissa")), torch.float64),
}


@pytest.mark.parametrize("case", CASES)
def test_the_plain_form_stays(case, monkeypatch):
    make, dtype = CASES[case]
    tuned = make()
    spy = Spy(monkeypatch, tuned)
    x = x_like(dtype)

    def call(x):
        torch.manual_seed(5)
        return tuned(x)

    found = outcome(tuned, x, call)
    assert spy.times == 0
    expected = plain(monkeypatch, tuned, x, call)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_autocast_keeps_the_plain_form(monkeypatch):
    tuned = moved(METHODS["lora"], dtype=torch.float32)
    spy = Spy(monkeypatch, tuned)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return tuned(x)

    found = outcome(tuned, x_like(torch.float32), call)
    assert spy.times == 0 and found["y"].dtype == torch.bfloat16


def test_several_adapters_and_a_choice_per_row_keep_the_plain_form(monkeypatch):
    tuned = moved(METHODS["lora"], dtype=torch.float32)
    tuned.add("other", mp.LoRA(rank=2))
    tiny.randomise(tuned)
    x = x_like(torch.float32)
    alone = [tuned(x)]
    tuned.use("other")
    alone.append(tuned(x))
    spy = Spy(monkeypatch, tuned)
    rows = tuned(x, adapters=["other", None, "default"])
    with tuned.disabled():
        bare = tuned(x)
    assert spy.times == 0
    for i, expected in enumerate((alone[1], bare, alone[0])):
        assert (rows[i] - expected[i]).abs().max() <= 1e-5
    tuned.use("default", "other")
    assert (tuned(x) - (alone[0] + alone[1] - bare)).abs().max() <= 1e-5 and spy.times == 0
    tuned.use("other")
    tuned(x)
    assert spy.times == 1


def test_a_hook_on_the_layer_sees_its_output(monkeypatch):
    tuned = moved(METHODS["lora"])
    layer, x, seen = tuned.layers()[0], x_like(), []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    y = tuned(x)
    with tuned.disabled():
        assert (y - tuned(x) - seen[0]).abs().max() <= 1e-12
    handle.remove()
    tuned(x)
    assert len(seen) == 1


def test_a_layer_with_a_forward_of_its_own_is_not_asked_for_its_parent_s_product():
    class Twice(LoRALayer):
        def forward(self, x):
            return 2 * super().forward(x)

    tuned = moved(METHODS["lora"])
    x = x_like()
    once = tuned(x)
    tuned.layers()[0].__class__ = Twice
    twice = tuned(x)
    with tuned.disabled():
        bare = tuned(x)
    assert (twice - bare - 2 * (once - bare)).abs().max() <= 1e-12
    assert Twice.whole is mp.layer.WeightLayer.whole


def test_torch_func_and_forward_mode(monkeypatch):
    from torch.func import functional_call, grad, jvp, vmap

    tuned = moved(METHODS["lora"])
    x, numbers = x_like(), dict(tuned.adapters.named_parameters(prefix="adapters"))

    def loss(numbers, x):
        return functional_call(tuned, numbers, (x,)).square().sum()

    total = grad(loss)(numbers, x)
    each = vmap(grad(loss), in_dims=(None, 0))(numbers, x)
    tuned(x).square().sum().backward()
    for name, p in tuned.named_parameters():
        if p.grad is not None:
            assert (total[name] - p.grad).abs().max() <= 1e-12 * p.grad.abs().max()
            assert (each[name].sum(0) - p.grad).abs().max() <= 1e-12 * p.grad.abs().max()
    _, along = jvp(tuned, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = tuned(torch.autograd.forward_ad.make_dual(x, x))
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, along)
    assert (along - (tuned(x) - tuned(torch.zeros_like(x)))).abs().max() <= 1e-12


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, monkeypatch):
    tuned = moved(METHODS["lora"])
    x = x_like()
    expected = outcome(tuned, x)
    found = outcome(tuned, x, lambda x: checkpoint(tuned, x, use_reentrant=reentrant))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# ---------------------------------------------------------------------------------------------------------------------
# Standing in for the module's forward
# ---------------------------------------------------------------------------------------------------------------------
def test_hooks_see_the_changed_output_in_the_order_that_they_were_put_on():
    base = Toy().double()
    seen = []
    base.l.register_forward_hook(lambda module, args, output: seen.append(output))
    tuned = attach(base, METHODS["lora"])
    base.l.register_forward_hook(lambda module, args, output: output + 1, prepend=True)
    tiny.randomise(tuned)
    y = tuned(x_like())
    assert torch.equal(seen[0], y)
    with tuned.disabled():
        assert not torch.equal(tuned(x_like()), y)


def test_pytorch_s_encoder_does_not_pass_the_adapter_by():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 64)
    tuned = attach(encoder, mp.LoRA(rank=4, targets=["linear1"]))
    tiny.randomise(tuned)
    with torch.no_grad():
        changed = tuned(x)
        with tuned.disabled():
            assert (tuned(x) - changed).abs().max() > 1e-2


def test_copies_are_independent_and_detach_leaves_nothing():
    tuned, x = moved(METHODS["lora"]), x_like()
    y = tuned(x)
    buffer = io.BytesIO()
    pickle.dump(tuned, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(tuned), pickle.load(buffer)):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            other.layers()[0].B.zero_()
            other.base.l.weight.zero_()
        assert torch.equal(tuned(x), y) and not torch.equal(other(x), y)
        other.detach()
        assert "forward" not in vars(other.base.l)
    base = tuned.detach()
    assert "forward" not in vars(base.l) and tiny.hooks(base) == 0
    assert torch.equal(base(x), nn.functional.linear(x, base.l.weight, base.l.bias))


def test_a_forward_that_somebody_replaced_is_left_alone():
    base = Toy().double()
    base.l.forward = replaced = lambda x: 3 * nn.Linear.forward(base.l, x)
    x = x_like()
    bare = base(x)
    tuned = attach(base, METHODS["lora"])
    assert torch.equal(tuned(x), bare)
    tiny.randomise(tuned)
    assert not torch.equal(tuned(x), bare)
    assert tuned.detach().l.forward is replaced and torch.equal(base(x), bare)
