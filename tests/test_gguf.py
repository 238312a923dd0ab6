"""A GGUF file, read back by transformers through the gguf package's reader, computes what the tuned model does."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers

from minipeft.attach import attach
from minipeft.methods.dora import DoRA
from minipeft.methods.lora import LoRA
from minipeft.methods.prompt import PromptTuning
from minipeft.methods.qlora import quantize
from minipeft.methods.select import BitFit, parameter_name
from minipeft.serve.gguf import KINDS, export_gguf

IDS = torch.arange(3, 24).view(3, 7)


def model(kind: str, width: int = 32, **changes):
    if kind == "llama":  # with biases, which the rotation turns too
        return tiny._fresh(transformers.LlamaForCausalLM, config(transformers.LlamaConfig, width, **changes))
    return tiny._fresh(transformers.Qwen2ForCausalLM, config(transformers.Qwen2Config, width, **changes))


def config(cls: type, width: int, **changes):
    biases = {"attention_bias": True, "mlp_bias": True} if cls is transformers.LlamaConfig else {}
    return cls(
        **{
            **{"vocab_size": 61, "hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
            **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **biases, **changes},
        }
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "method", [LoRA(rank=2), DoRA(rank=2), BitFit(), LoRA(rank=2, targets=["embed_tokens"])], ids=str
)
def test_what_was_written_is_read_back(kind, method, tied, tmp_path):
    tuned = attach(model(kind, tie_word_embeddings=tied), method)
    tiny.randomise(tuned)
    before = tiny.snapshot(tuned.base)
    assert export_gguf(tuned, tmp_path / "deep" / "a.gguf", IDS) < 2e-5
    assert [each.name for each in (tmp_path / "deep").iterdir()] == ["a.gguf"]
    assert tiny.same(tiny.snapshot(tuned.base), before)
    with tuned.disabled(), torch.no_grad():
        plain = tuned(IDS).logits
    with torch.no_grad():
        assert (tuned(IDS).logits - plain).abs().max() > 1e-2, "the adapter has an effect"


def test_each_kind_rounds_as_it_says(tmp_path):
    """How far a number in the file may be from W': half a step of bfloat16, half of 1/127 of its block's largest, and
    one of 1/8, for Q4_0 has −8 and no 8."""
    from gguf import GGUFReader, dequantize

    tuned = attach(model("qwen2"), LoRA(rank=2))
    tiny.randomise(tuned)
    W = next(value for slot, value in tuned.unrounded().items() if "layers.1.mlp.down_proj" in parameter_name(slot))
    blocks = W.float().view(-1, 32)
    top = blocks.abs().amax(1, keepdim=True)
    scale = 2**-11  # float16's own rounding of a block's scale, relative
    most = {
        "F32": 0 * top,
        "BF16": blocks.abs() / 256,
        "Q8_0": top / 127 * 0.5 + scale * top,
        "Q4_0": top / 8 + scale * top,
    }
    errors = {}
    for kind in KINDS:
        errors[kind] = export_gguf(tuned, tmp_path / f"{kind}.gguf", IDS, kind)
        tensors = {
            t.name: torch.tensor(dequantize(t.data, t.tensor_type))
            for t in GGUFReader(tmp_path / f"{kind}.gguf").tensors
        }
        stored = tensors["blk.1.ffn_down.weight"].view(-1, 32)
        assert ((stored - blocks).abs() <= most[kind] + 1e-9).all(), kind
        assert tensors["output_norm.weight"].equal(tuned.base.model.norm.weight.detach())
    assert errors["F32"] < errors["BF16"] < errors["Q4_0"] and errors["F32"] < errors["Q8_0"] < errors["Q4_0"]


def test_a_base_in_four_bits_is_written_dense(tmp_path):
    tuned = attach(quantize(model("llama", width=64)), LoRA(rank=2))
    tiny.randomise(tuned)
    assert export_gguf(tuned, tmp_path / "a.gguf", IDS) < 2e-5


SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
REFUSED = {
    "a setting without a word": (lambda: model("llama", rope_parameters=SCALED), "F32", "rope_parameters"),
    "another activation": (lambda: model("llama", hidden_act="gelu"), "F32", "hidden_act"),
    "another architecture": (tiny.gpt2, "F32", "GPT2LMHeadModel is no language model"),
    "rows of 16": (lambda: tiny.llama(), "Q8_0", "32 at a time"),
    "another kind": (lambda: model("llama"), "Q3_K", "one of F32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_another_model_is_refused_and_leaves_nothing(name, tmp_path):
    make, kind, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        export_gguf(attach(make(), LoRA(rank=2)), tmp_path / "a.gguf", IDS, kind)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_merged_or_would_be_overwritten_is_refused(tmp_path):
    with pytest.raises(ValueError):
        export_gguf(attach(model("llama"), PromptTuning(length=2)), tmp_path / "a.gguf", IDS)
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(ValueError, match="there already"):
        export_gguf(attach(model("llama"), LoRA(rank=2)), tmp_path / "a.gguf", IDS)
    assert (tmp_path / "a.gguf").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
