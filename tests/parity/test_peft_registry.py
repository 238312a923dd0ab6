"""Every method that Hugging Face PEFT has, from its line in the registry: PEFT reads the file that is written here, and
computes the same logits and the same gradients; and what PEFT writes back is read here.

In float64, where only the formula can differ: 1e-12. In float32: 1e-6.
"""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from architectures import ARCHITECTURES

import minipeft as mp
from minipeft.attach import attach
from minipeft.files import OURS
from minipeft.methods import METHODS
from minipeft.serve.checkpoint import load_adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLES = [(name, settings) for name, kind in METHODS.items() for settings in kind.examples]
FAMILIES = {"llama": lambda: tiny.llama(tied=False), "gpt2": tiny.gpt2, "bert": tiny.bert, "t5": tiny.t5}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name, settings", EXAMPLES, ids=[f"{name} {settings}" for name, settings in EXAMPLES])
def test_peft_computes_the_same_from_our_file(name, settings, family, tmp_path):
    try:
        tuned = attach(FAMILIES[family](), METHODS[name](**settings))
    except ValueError as error:
        pytest.skip(f"{name} refuses {family}: {str(error)[:100]}")
    if tuned.layers()[0].front:
        pytest.skip("prompts and prefixes are compared in test_peft_prompts.py: PEFT's logits have their places too")
    tiny.randomise(tuned, scale=0.3)
    try:
        tuned.save(tmp_path)
    except ValueError as error:
        pytest.skip(str(error))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    if config["peft_type"].startswith(OURS):
        pytest.skip(f"PEFT has no {name} for {family}")
    other = peft.PeftModel.from_pretrained(FAMILIES[family](), tmp_path, is_trainable=True).eval()
    plain = FAMILIES[family]().double()
    if "minipeft" not in config:  # PiSSA's difference of large products: PEFT's float32 rounds it otherwise
        close(tuned, other, plain, 1e-6)
    tuned, other = tuned.double(), other.double()
    for parameter_name, parameter in other.named_parameters():
        if "ranknum" in parameter_name:  # AdaLoRA's divisor becomes a parameter with a gradient by .double()
            parameter.requires_grad_(False)
    close(tuned, other, plain, 1e-12)
    if "minipeft" not in config:  # PEFT takes such a file for a LoRA, of which it would train other numbers
        gradients(tuned, other)
    other.save_pretrained(tmp_path / "back")
    back = load_adapter(FAMILIES[family](), tmp_path / "back").double()
    close(back, other, plain, 1e-6)


def close(tuned, other, plain, bound: float) -> None:
    batch = tiny.batch(plain)
    with torch.no_grad():
        mine, theirs, base = (model(**batch).logits.double() for model in (tuned, other, plain))
    assert (mine - base).abs().max() > 1e-2, "the adapter has an effect"
    difference, size = (mine - theirs).abs().max().item(), max(1.0, mine.abs().max().item())
    # logits of a model that works in float32 inside differ by the rounding of several layers
    assert difference <= 10 * bound * size, f"{difference:g}"


def gradients(tuned, other) -> None:
    """The same numbers get the same gradients: sorted by size, since each side has its own names and orders."""
    batch = tiny.batch(tuned)
    for model in (tuned, other):
        model.zero_grad()
        model(**batch).loss.backward()
    mine = [p.grad for p in tuned.parameters() if p.requires_grad]
    theirs = [p.grad for n, p in other.named_parameters() if p.requires_grad]
    assert all(g is not None for g in mine) == all(g is not None for g in theirs)
    flat = [torch.cat([g.flatten() for g in gs if g is not None]).sort().values for gs in (mine, theirs)]
    torch.testing.assert_close(*flat, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Qwen3-Next"])
def test_a_file_that_peft_would_put_elsewhere_is_of_a_kind_of_ours(name, tmp_path):
    """PEFT takes `shared_experts.up_proj` for an expert's, of which transformers keeps all in one tensor now."""
    one = ARCHITECTURES[name]
    tuned = attach(one.model(), mp.LoRA(2))
    tiny.randomise(tuned)
    tuned.save(tmp_path)
    with pytest.raises((KeyError, ValueError), match="MINIPEFT_LORA"):
        peft.PeftModel.from_pretrained(one.model(), tmp_path)
    again = mp.load_adapter(one.model(), tmp_path)
    assert torch.equal(one.hidden(again(**one.batch())), one.hidden(tuned(**one.batch())))
    attention = attach(one.model(), mp.LoRA(2, targets=["o_proj"]))
    attention.save(tmp_path)
    peft.PeftModel.from_pretrained(one.model(), tmp_path)
