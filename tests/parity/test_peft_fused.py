"""At sizes where a layer gives its whole output in one product: the pocket model with PEFT's adapters.

The order of the sums differs from PEFT's there, so in float32 the two round differently: float64 shows that the
mathematics is the same, and that rounding takes no more here than there.
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_peft_family import common

import minipeft as mp
from minipeft.methods.fused import quicker
from minipeft.serve.checkpoint import load_adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGURATIONS = {
    "lora": lambda: peft.LoraConfig(r=8, lora_alpha=13, target_modules=LINEAR),
    "lora of a high rank": lambda: peft.LoraConfig(r=64, lora_alpha=64, target_modules=LINEAR),
    "dora": lambda: peft.LoraConfig(r=8, lora_alpha=13, use_dora=True, target_modules=LINEAR),
    "vera": lambda: peft.VeraConfig(r=64, target_modules=LINEAR),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def outcome(model, inputs) -> dict[str, torch.Tensor]:
    output = model(**inputs)
    output.loss.backward()
    with torch.no_grad():
        one_row = torch.cat([model(input_ids=ids[None, :20]).logits for ids in inputs["input_ids"]])
    gradients = {f"grad {common(n)}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"logits": output.logits.detach(), "one row": one_row, **gradients}


def both(method: str, dtype: torch.dtype, path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """PEFT's outcome and ours, with the same numbers in the same dtype."""
    torch.manual_seed(0)
    base = mp.load("pocket")[0].to(dtype)
    ids = torch.randint(3, base.config.vocab_size, (8, 40))
    assert quicker(ids.numel(), 128, 128)
    reference = peft.get_peft_model(copy.deepcopy(base), CONFIGURATIONS[method]()).eval()
    for name, value in [*reference.named_parameters(), *reference.named_buffers()]:
        if value.requires_grad:
            value.data = value.data.to(dtype) + (0.02 * torch.randn(value.shape)).to(dtype)
        elif "vera_" in name:
            value.data = value.data.to(dtype)
    reference.save_pretrained(path)
    inputs = {"input_ids": ids, "labels": ids}
    return outcome(reference, inputs), outcome(load_adapter(base, path), inputs)


@pytest.mark.parametrize("method", CONFIGURATIONS)
def test_logits_and_gradients_agree(method, tmp_path):
    exact, found = both(method, torch.float64, tmp_path)
    assert exact.keys() == found.keys() and len(found) > 4
    for key, value in exact.items():
        assert (value - found[key]).abs().max() <= 1e-12 * max(1.0, value.abs().max().item()), key
    theirs, ours = both(method, torch.float32, tmp_path)
    for key, value in exact.items():
        # the root of the mean square: which entry is the worst, and how bad, is luck that changes with the processor
        error, allowed = ((v[key].double() - value).square().mean().sqrt().item() for v in (ours, theirs))
        assert error <= max(1e-7, 1.5 * allowed), f"{key}: rounding takes {error:.1e} here, {allowed:.1e} in PEFT"
