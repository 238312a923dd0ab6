"""LoRA over a base that bitsandbytes packed into 4 or 8 bits: the same logits and gradients as Hugging Face PEFT's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import minipeft as mp

peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes", reason="needs pip install bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")


def four(d_in: int, d_out: int, bias: bool) -> nn.Module:
    return bnb.nn.Linear4bit(d_in, d_out, bias=bias, compute_dtype=torch.float32, quant_type="nf4")


def eight(d_in: int, d_out: int, bias: bool) -> nn.Module:
    return bnb.nn.Linear8bitLt(d_in, d_out, bias=bias, has_fp16_weights=False)


class Network(nn.Module):
    """Widths that bitsandbytes' kernels for the CPU take."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second, self.out = nn.Linear(64, 128), nn.Linear(128, 64, bias=False), nn.Linear(64, 3)

    def forward(self, x):
        return self.out(self.second(self.first(x).tanh()).tanh())


def packed(make) -> nn.Module:
    """The network, its first two layers packed."""
    model = Network()
    for name in ("first", "second"):
        module = getattr(model, name)
        new = make(module.in_features, module.out_features, module.bias is not None)
        new.load_state_dict(module.state_dict())
        setattr(model, name, new.to("cpu"))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = make is four, make is eight
    return model


X = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [four, eight])
def test_peft_computes_the_same_and_back(make, tmp_path):
    tuned = mp.attach(packed(make), mp.LoRA(rank=3, alpha=5, targets=["first", "second", "out"]))
    generator = torch.Generator().manual_seed(2)
    for p in tuned.adapters.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    tuned.save(tmp_path / "here")
    other = peft.PeftModel.from_pretrained(packed(make), tmp_path / "here", is_trainable=True).train()
    mine, theirs, base = (model(X) for model in (tuned, other, packed(make)))
    assert (mine - base).abs().max() > 1e-2
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    mine.square().sum().backward()
    theirs.square().sum().backward()
    grads = [
        torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).sort().values
        for model in (tuned, other)
    ]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)
    other.save_pretrained(tmp_path / "there")
    back = mp.load_adapter(packed(make), tmp_path / "there")
    torch.testing.assert_close(back(X), mine, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [four, eight])
def test_what_needs_the_weight_says_so_and_changes_nothing(make):
    model, names = packed(make), ["first", "second"]
    for method in (
        mp.DoRA(rank=2, targets=names),
        mp.LoRA(rank=2, init="pissa", targets=names),
        mp.VeRA(rank=2, targets=names),
        mp.IA3(targets=names, feedforward=()),
        mp.MiSS(rank=2, targets=names),
    ):
        with pytest.raises(ValueError, match="use mp.quantize"):
            mp.attach(model, method)
    with pytest.raises(ValueError, match="few bits"):
        mp.attach(model, mp.Full())
    tuned, whole = (mp.attach(each, mp.LoRA(rank=2)) for each in (model, Network()))
    assert tuned.count() == whole.count(), "a packed weight counts as the numbers that it stands for"
    with pytest.raises(ValueError, match="keep the adapter apart"):
        tuned.merge()
    base = tuned.detach()
    adapter = mp.attach(base, mp.Adapter(bottleneck=2, placement=["second"]))
    with adapter.disabled():
        expected = adapter(X)
    torch.testing.assert_close(adapter(X), expected, atol=1e-5, rtol=1e-5)  # a new bottleneck adds nothing
