"""LoRA against Hugging Face PEFT: logits, gradients, an optimizer step, merged weights, and each other's files.

Random tiny models, with B randomised: with B = 0 nearly any mistake would agree. Float64 shows that the mathematics is
the same (1e-12); float32 that nothing is lost in practice (1e-6).
"""

from __future__ import annotations

import json
import re

import pytest
import tiny
import torch

from minipeft.attach import attach
from minipeft.methods.lora import LoRA
from minipeft.methods.select import Softmax
from minipeft.serve.checkpoint import load_adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = {
    "llama q, v": ("llama", dict(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])),
    "llama all linear": ("llama", dict(r=2, lora_alpha=8, target_modules="all-linear")),
    "llama rank-stabilized": ("llama", dict(r=4, lora_alpha=3, use_rslora=True, target_modules=["up_proj", "k_proj"])),
    "llama regex": ("llama", dict(r=2, lora_alpha=1, target_modules=r".*layers\.1\..*_proj")),
    "llama embedding": ("llama", dict(r=2, lora_alpha=3, target_modules=["embed_tokens", "q_proj"])),
    "llama patterns": (
        "llama",
        dict(
            r=2,
            lora_alpha=3,
            rank_pattern={"q_proj": 4},
            alpha_pattern={"v_proj": 9},
            target_modules=["q_proj", "v_proj"],
        ),
    ),
    "llama and head": ("llama", dict(r=2, lora_alpha=3, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "gpt2 Conv1D": ("gpt2", dict(r=3, lora_alpha=5, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "bert": ("bert", dict(r=2, lora_alpha=2, target_modules=["query", "value", "intermediate.dense"])),
    "classifier and head": (
        "classifier",
        dict(r=2, lora_alpha=4, target_modules=["query"], modules_to_save=["classifier"]),
    ),
}


def theirs(family: str, config: dict, dtype=torch.float32):
    """PEFT's model with every trainable number moved. PEFT inserts wrapper modules, so its base is built anew."""
    model = peft.get_peft_model(tiny.MODELS[family]().to(dtype), peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(dtype)
            assert "lora_B" not in name or parameter.any()
    return model


def outcome(model, mine: bool) -> dict[str, torch.Tensor]:
    """Logits, loss, gradients, and the trainable numbers after one AdamW step, under PEFT's names."""
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    output = model(**tiny.batch(model.base if mine else model.get_base_model()))
    output.loss.backward()
    result = {"logits": output.logits.detach(), "loss": output.loss.detach()}
    result |= {f"grad {common(n)}": p.grad.clone() for n, p in trainable.items()}
    optimizer.step()
    return result | {f"step {common(n)}": p.detach().clone() for n, p in trainable.items()}


def common(name: str) -> str:
    """One spelling for `base_model.model.….q_proj.lora_A.default.weight` and `adapters.default.…/q_proj.A`."""
    name = re.sub(r"lora_(?:embedding_)?([AB])\.default(\.weight)?", r"\1", name.removeprefix("base_model.model."))
    name = name.replace("modules_to_save.default.", "")
    return name.removeprefix("adapters.default.").replace("/", ".").removesuffix(".value")


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("case", CASES)
def test_logits_gradients_and_one_step_agree(case, dtype, tolerance, tmp_path):
    family, config = CASES[case]
    reference = theirs(family, config, dtype)
    reference.save_pretrained(tmp_path)
    tuned = load_adapter(tiny.MODELS[family]().to(dtype), tmp_path)
    assert {p.dtype for p in tuned.adapters.parameters()} == {dtype}
    with torch.no_grad():
        ids = tiny.batch(tuned.base)["input_ids"]
        assert (tuned(ids).logits - tiny.MODELS[family]().to(dtype)(ids).logits).abs().max() > 1e-2, "it has an effect"
    expected, found = outcome(reference, mine=False), outcome(tuned, mine=True)
    assert expected.keys() == found.keys()
    for key in expected:
        assert (expected[key] - found[key]).abs().max() <= tolerance, key


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_agree(case, tmp_path):
    family, config = CASES[case]
    reference = theirs(family, config)
    reference.save_pretrained(tmp_path)
    tuned = load_adapter(tiny.MODELS[family](), tmp_path)
    tuned.merge()
    mine, merged = tuned.detach().state_dict(), reference.merge_and_unload().state_dict()
    assert mine.keys() == merged.keys()
    changed = 0
    for key, before in tiny.MODELS[family]().state_dict().items():
        if key == "lm_head.weight" and "embedding" in case:
            continue  # tied: PEFT's merge writes into the shared tensor, and so changes the head too (peft #2018)
        assert (mine[key] - merged[key]).abs().max() <= 1e-6, key
        changed += not torch.equal(before, mine[key])
    assert changed


@pytest.mark.parametrize(
    "family, method",
    [
        ("llama", LoRA(rank=3, alpha=5)),
        ("llama", LoRA(rank=4, alpha=3, rank_stabilized=True, targets="mlp")),
        ("llama", LoRA(rank=2, targets=["embed_tokens", "q_proj"])),
        ("llama", [LoRA(rank=2, targets="attention"), LoRA(rank=3, gamma=0.7, targets="mlp")]),
        ("llama", [LoRA(rank=2), Softmax()]),
        ("gpt2", LoRA(rank=3, targets=["c_attn", "c_fc"])),
        ("gpt2", [LoRA(rank=3), Softmax()]),
        ("bert", LoRA(rank=2)),
        ("bert", [LoRA(rank=2), Softmax()]),
        ("classifier", [LoRA(rank=2), Softmax()]),
    ],
    ids=str,
)
def test_peft_loads_what_is_saved_here(family, method, tmp_path, recwarn):
    tuned = attach(tiny.MODELS[family](), method)
    tiny.randomise(tuned, scale=0.3)
    tuned.save(tmp_path)
    model = tiny.MODELS[family]()
    other = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    assert not [w for w in recwarn if "missing" in str(w.message).lower() or "unexpected" in str(w.message).lower()]
    ids = tiny.batch(tuned)["input_ids"]
    with torch.no_grad():
        assert (tuned(ids).logits - other(input_ids=ids).logits).abs().max() <= 1e-6
        assert (tuned(ids).logits - tiny.MODELS[family]()(ids).logits).abs().max() > 1e-2


def test_initial_distribution_and_counts_agree():
    reference = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules="all-linear"))
    tuned = attach(tiny.llama(), LoRA(rank=2))
    assert tuple(reference.get_nb_trainable_parameters()) == (tuned.count().trainable, tuned.count().total)
    A = dict(reference.named_parameters())["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    mine = tuned.adapters["default"]["model/layers/0/self_attn/q_proj"].A
    for each in (A, mine):
        assert 0.7 / 4 < each.abs().max() <= 1 / 4 and each.mean().abs() < 0.1  # U(±1/√16)


def test_files_for_which_peft_has_no_class_say_so(tmp_path):
    attach(tiny.gpt2(), LoRA(rank=2, targets=["c_attn[0:16]"])).save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MINIPEFT_LORA"
    with pytest.raises(Exception, match="MINIPEFT_LORA"):
        peft.PeftModel.from_pretrained(tiny.gpt2(), tmp_path)
