"""LoRA on what a module reads for itself, PyTorch's attention and transformers' stacked experts: Hugging Face PEFT
computes the same logits and gradients from the same file, and writes one that is read here."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
import torch
from architectures import ARCHITECTURES
from tiny import randomise
from torch import nn

import minipeft as mp

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def called():
    """PyTorch's encoder layer, in its fast path, reads attention's weights and goes past PEFT's wrapper, even while it
    trains; what it does with our adapters is tested in `tests/test_read.py`."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


class Attending(nn.Module):
    """An encoder of PyTorch's and a cross-attention, with a linear layer behind."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True, activation="gelu")
            self.encoder = nn.TransformerEncoder(layer, 2)
            self.cross = nn.MultiheadAttention(16, 2, batch_first=True, bias=False)
            self.out = nn.Linear(16, 5)
            for parameter in self.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        self.eval()

    def forward(self, x):
        hidden = self.encoder(x)
        return self.out(self.cross(x, hidden, hidden, need_weights=False)[0])


CASES = {
    "one rank": ([mp.LoRA(rank=3, alpha=5, targets=["in_proj_weight", "out"])], True),
    "several": (
        [
            mp.LoRA(rank=2, gamma=0.5, targets=["layers.0.self_attn.in_proj_weight", "linear1"]),
            mp.LoRA(rank=4, gamma=3.0, targets=["layers.1.self_attn.in_proj_weight"]),
        ],
        True,
    ),
    "rank-stabilised": ([mp.LoRA(rank=4, alpha=2, rank_stabilized=True, targets=["cross.in_proj_weight"])], True),
    "all of it": ([mp.LoRA(rank=2, targets=["self_attn", "cross"])], False),
    "values only": ([mp.LoRA(rank=2, targets=["self_attn.in_proj_weight[32:48]"])], False),
    "out_proj only": ([mp.LoRA(rank=2, targets=["cross.out_proj"])], False),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_is_peft_s_and_back(name, tmp_path):
    methods, peft_has = CASES[name]
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2)).double()
    found = gaps(Attending, methods, x, tmp_path)
    assert found.effect > 1e-3 and found.loaded == 0 and found.merged <= 1e-9
    assert kind(tmp_path / "here") == ("LORA" if peft_has else "MINIPEFT_LORA")
    assert peft_agrees(found) if peft_has else found.logits is None


EXPERTS = {
    "Mixtral": ["gate_up_proj", "down_proj"],
    "Qwen2-MoE": ["experts.down_proj", "q_proj"],
    "OLMoE": ["experts"],
    "gpt-oss": ["experts.gate_up_proj", "experts.down_proj"],
    "DeepSeek-V3": ["experts"],
    "JetMoe": ["experts.input_linear"],
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_peft_s_and_back(name, tmp_path):
    one = ARCHITECTURES[name]
    methods = [mp.LoRA(rank=2, alpha=3, targets=EXPERTS[name])]

    def eager():  # the other ways have no float64
        model = one.model()
        if name != "JetMoe":
            model.set_experts_implementation("eager")
        return model

    found = gaps(eager, methods, one.batch()["input_ids"], tmp_path)
    assert found.effect > 1e-3 and found.loaded == 0 and found.merged <= 1e-9
    assert kind(tmp_path / "here") == "LORA" and peft_agrees(found)


class Stacks(nn.Module):
    """Three stacks, two of which have the names that attention has for its weights; one matrix in the last."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("out_proj", (4, 6, 3)), ("in_proj_weight", (4, 2, 6)), ("alone", (1, 2, 3))):
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, x):
        hidden = torch.einsum("eoi,ni->neo", self.out_proj, x).tanh()
        return torch.einsum("eoi,nei->no", self.in_proj_weight, hidden) + x @ self.alone[0].T


@pytest.mark.parametrize("named", [["0"], ["out_proj", "alone"], ["0.in_proj_weight"], ["out_proj"]])
def test_stacks_of_any_name(named, tmp_path):
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    method = mp.LoRA(rank=2, alpha=3, targets=named)
    found = gaps(lambda: nn.Sequential(Stacks()), [method], x, tmp_path)
    assert found.effect > 1e-3 and found.loaded == 0 and found.merged <= 1e-9
    assert kind(tmp_path / "here") == "LORA" and peft_agrees(found)


@pytest.mark.parametrize("named", [["self_attn", "cross"], ["encoder.layers.1.self_attn", "out"]])
def test_a_file_of_peft_with_all_of_attention(named, tmp_path):
    """PEFT 0.21.0 adds ΔW of W_out twice, at once and merged; what it trained so is read as what it computed."""
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=named, lora_dropout=0.1)
    other = peft.get_peft_model(Attending(), config).eval()
    with torch.no_grad():
        for parameter in (p for p in other.parameters() if p.requires_grad):
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    other.save_pretrained(tmp_path)
    tuned = mp.load_adapter(Attending(), tmp_path)
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(tuned(x), other(x), atol=1e-5, rtol=1e-5)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_version"] == "0.21.0", "another PEFT: see whether it still adds it twice, and counts_twice"
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"peft_version": "0.21.1"}))
    assert (mp.load_adapter(Attending(), tmp_path)(x) - tuned(x)).abs().max() > 1e-3


def test_what_peft_does_otherwise_is_refused(tmp_path):
    def made(model, **settings):
        peft.get_peft_model(model, peft.LoraConfig(r=2, **settings)).save_pretrained(tmp_path)
        return tmp_path

    with pytest.raises(ValueError, match="attention reads and never calls"):
        mp.load_adapter(Attending(), made(Attending(), target_modules=["cross", "out_proj"]))
    with pytest.raises(ValueError, match="names no stack"):
        made(Attending(), target_modules=[], target_parameters=["linear1.weight"])
        mp.load_adapter(Attending(), tmp_path)
    model = ARCHITECTURES["Mixtral"].model
    folder = made(model(), target_modules=[], target_parameters=["experts.gate_up_proj"])
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["target_parameters"].append("experts.down_proj")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="no lora_A for"):
        mp.load_adapter(model(), folder)


class Gaps(NamedTuple):
    """The largest differences from what our adapter computes, of which "PEFT's" are None where it has no such file."""

    effect: float  # of the base without it
    merged: float
    loaded: float  # from our own file
    logits: float | None = None  # PEFT's, from our file
    gradients: float | None = None
    back: float | None = None  # ours again, from PEFT's file


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def values(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = model(x)
    return getattr(out, "logits", out)


def kind(folder) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


def gaps(make, methods, x, folder) -> Gaps:
    """In float64: attached, saved to folder/here, loaded, merged; in PEFT, whose file is folder/there; and back."""
    tuned = mp.attach(make(), methods)
    randomise(tuned, scale=0.3)
    tuned = tuned.double().eval()
    mine = values(tuned, x)
    tuned.save(folder / "here")
    effect = gap(values(make().double().eval(), x), mine)
    loaded = gap(values(mp.load_adapter(make().double(), folder / "here").eval(), x), mine)
    tuned.merge()
    merged = gap(values(tuned, x), mine)
    tuned.unmerge()
    if kind(folder / "here") != "LORA":
        return Gaps(effect, merged, loaded)
    other = peft.PeftModel.from_pretrained(make().double(), folder / "here", is_trainable=True).double().eval()
    theirs = values(other, x)
    mine.square().sum().backward()
    theirs.square().sum().backward()
    trained = {name: p.grad for name, p in other.named_parameters() if p.requires_grad}
    added = [trained.pop(name) for name in list(trained) if "base_layer.out_proj" in name]
    assert not any(gradient.any() for gradient in added), "W_out's, zero in the file"
    own = torch.cat([p.grad.flatten() for p in tuned.parameters() if p.requires_grad])
    gradients = gap(own.sort().values, torch.cat([each.flatten() for each in trained.values()]).sort().values)
    other.save_pretrained(folder / "there")
    back = gap(values(mp.load_adapter(make().double(), folder / "there").eval(), x), mine)
    return Gaps(effect, merged, loaded, gap(mine, theirs), gradients, back)


def peft_agrees(found: Gaps) -> bool:
    return found.logits <= 1e-12 and found.gradients <= 1e-9 and found.back <= 1e-6
