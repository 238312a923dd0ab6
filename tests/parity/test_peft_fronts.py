"""Prompts and prefixes on many architectures, encoder–decoders among them, against PEFT: files both ways."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES

from minipeft.attach import attach
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.prompt import PromptTuning
from minipeft.serve.checkpoint import load_adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

N = 3
# PEFT 0.21 does not find the width or the number of heads of these by itself; it reads them in our files.
UNSAID = ("ProphetNet", "T5Gemma", "XGLM", "MPT", "Mamba", "FalconMamba")
PAIRS = [name for name, one in ARCHITECTURES.items() if one.kind == "pair"]
CAUSAL = [
    "GPT-Neo", "GPT-J", "Bloom", "MPT", "Falcon, grouped", "Gemma", "Gemma-2", "Gemma-3", "Qwen3", "Mistral", "Mixtral",
    "GPT-BigCode, one key-value head", "BioGPT", "XGLM", "CTRL", "gpt-oss", "ModernBERT, decoder", "RoBERTa, decoder",
    "JetMoe", "StableLM",
]  # fmt: skip
NO_CACHE = ["Mamba", "FalconMamba", "Jamba", "LFM2", "Qwen3-Next", "DeepSeek-V3", "GPT"]  # prompts only
CASES = [
    (name, kind) for name in PAIRS + CAUSAL for kind in ("prompt", "prefix") if (name, kind) != ("ProphetNet", "prefix")
]
CASES += [(name, "prompt") for name in NO_CACHE] + [("Falcon, one key-value head", "prefix")]
NOT_THEIRS = {("Falcon, one key-value head", "prefix")}  # PEFT draws one of another size; it reads ours
METHODS = {"prompt": PromptTuning(N), "prefix": PrefixTuning(N)}


def batch(name: str) -> dict[str, torch.Tensor]:
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return ARCHITECTURES[name].batch() | {"attention_mask": mask}


def own(name: str, logits: torch.Tensor) -> torch.Tensor:
    """Those of the text's tokens that are no padding: PEFT returns the prompt's too."""
    return logits if name in PAIRS else logits[:, -7:][batch(name)["attention_mask"].bool()]


@pytest.mark.parametrize("name, kind", [case for case in CASES if case not in NOT_THEIRS and case[0] not in UNSAID])
def test_their_files_do_here_what_they_do_there(name, kind, tmp_path):
    one = ARCHITECTURES[name]
    task = "SEQ_2_SEQ_LM" if name in PAIRS else "CAUSAL_LM"
    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    theirs = peft.get_peft_model(one.model(), config(task_type=task, num_virtual_tokens=N)).eval()
    theirs.save_pretrained(tmp_path)
    tuned = load_adapter(one.model(), tmp_path)
    expected, found = (own(name, model(**batch(name)).logits) for model in (theirs, tuned))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    with tuned.disabled(), torch.no_grad():
        assert (own(name, tuned(**batch(name)).logits) - found).abs().max() > 1e-3
    expected.square().sum().backward()
    found.square().sum().backward()
    mine, other = (
        next(p.grad for key, p in model.named_parameters() if p.requires_grad and end in key)
        for model, end in ((tuned, "value"), (theirs, "prompt_encoder"))
    )
    torch.testing.assert_close(mine, other[: len(mine)], atol=1e-4, rtol=1e-4)
    ids = batch(name)["input_ids"]
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    if name != "RoBERTa, decoder":  # PEFT drops the positions that generate gives, and the bare model takes them
        assert torch.equal(tuned.generate(ids, **options), theirs.generate(input_ids=ids, **options))


@pytest.mark.parametrize("name, kind", CASES)
def test_our_files_do_there_what_they_do_here(name, kind, tmp_path):
    one = ARCHITECTURES[name]
    tuned = attach(one.model(), METHODS[kind])
    for parameter in tuned.adapters.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    tuned.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(one.model(), tmp_path).eval()
    with torch.no_grad():
        found, expected = (own(name, model(**batch(name)).logits) for model in (tuned, theirs))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_a_pair_that_cannot_speak_has_a_file_of_its_own_kind(tmp_path):
    """PEFT would put the prompt before the tokens of both stacks."""
    import json

    import transformers
    from architectures import BART, IDS

    torch.manual_seed(0)
    config = transformers.BartConfig(**IDS | BART | dict(num_labels=3))
    model = transformers.BartForSequenceClassification(config).eval()
    ids = ARCHITECTURES["BART"].batch()["input_ids"]
    ids[:, -1] = 2
    tuned = attach(model, PromptTuning(N))
    expected = tuned(ids).logits
    tuned.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MINIPEFT_PROMPT_TUNING"
    assert torch.equal(load_adapter(tuned.detach(), tmp_path)(ids).logits, expected)
