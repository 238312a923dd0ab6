"""Prompts, P-tuning and prefixes against Hugging Face PEFT: logits, gradients, and each other's files."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from minipeft.attach import attach
from minipeft.methods.lora import LoRA
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.prompt import PromptTuning, PTuning
from minipeft.methods.select import Softmax
from minipeft.serve.checkpoint import load_adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

N = 3
FAMILIES = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "classifier": "SEQ_CLS"}
CONFIGS = {
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=N),
    "p-tuning": lambda task: peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=N, encoder_hidden_size=8),
    "p-tuning, lstm": lambda task: peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=N, encoder_hidden_size=4, encoder_reparameterization_type="LSTM"
    ),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=N),
    "prefix, reparametrised": lambda task: peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=8
    ),
}
METHODS = {
    "prompt": PromptTuning(N),
    "p-tuning": PTuning(N, hidden=8),
    "p-tuning, lstm": PTuning(N, "lstm", hidden=4),
    "p-tuning, task": PTuning(N, "task", hidden=8),
    "prefix": PrefixTuning(N),
    "prefix, reparametrised": PrefixTuning(N, hidden=8),
}


def theirs(family: str, kind: str):
    return peft.get_peft_model(tiny.MODELS[family](), CONFIGS[kind](FAMILIES[family])).eval()


def inputs(family: str) -> dict[str, torch.Tensor]:
    """A batch padded on the right: PEFT counts positions through padding on the left."""
    batch = tiny.batch(tiny.MODELS[family]())
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 5:] = batch["attention_mask"][2, 3:] = 0
    if batch["labels"].ndim == 2:
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][:, 0] = -100  # PEFT's prompts predict the first token too; the base never does
    return batch


def own_part(logits: torch.Tensor, batch: dict) -> torch.Tensor:
    """The logits of the text's real tokens: PEFT returns the prompt's too."""
    if logits.ndim == 2:
        return logits
    return logits[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]


# PEFT 0.21 gives prefixes only to models whose forward names past_key_values, and BERT's does not
PAIRS = [(f, kind) for f in FAMILIES for kind in CONFIGS if not (f == "classifier" and kind.startswith("prefix"))]


@pytest.mark.parametrize("family, kind", PAIRS)
def test_their_files_load_here_and_logits_loss_and_gradients_agree(family, kind, tmp_path):
    reference, batch = theirs(family, kind), inputs(family)
    reference.save_pretrained(tmp_path)
    tuned = load_adapter(tiny.MODELS[family](), tmp_path)
    expected, found = reference(**batch), tuned(**batch)
    with tuned.disabled(), torch.no_grad():
        assert (own_part(tuned(**batch).logits, batch) - own_part(found.logits, batch)).abs().max() > 1e-2
    assert (own_part(expected.logits, batch) - own_part(found.logits, batch)).abs().max() <= 1e-6
    assert (expected.loss - found.loss).abs() <= 1e-6
    if kind in ("prompt", "prefix"):  # the others' numbers are folded in the file
        expected.loss.backward()
        found.loss.backward()
        mine = next(p for n, p in tuned.named_parameters() if p.requires_grad and n.endswith("value"))
        grad = reference.prompt_encoder.default.embedding.weight.grad
        assert grad.any() and (grad - mine.grad).abs().max() <= 1e-6
    if family == "classifier":  # PEFT trains the new head as well
        assert any(layer.slots for layer in tuned.adapters["default"].values())


CASES = [(f, METHODS[kind]) for f, kind in PAIRS] + [
    ("llama", METHODS["p-tuning, task"]),
    ("classifier", [METHODS["prompt"], Softmax()]),
    ("classifier", [METHODS["p-tuning"], Softmax()]),
]


@pytest.mark.parametrize("family, method", CASES, ids=str)
def test_peft_loads_what_is_saved_here(family, method, tmp_path, recwarn):
    tuned, batch = attach(tiny.MODELS[family](), method), inputs(family)
    tiny.randomise(tuned, scale=0.3)
    tuned.save(tmp_path)
    other = peft.PeftModel.from_pretrained(tiny.MODELS[family](), tmp_path).eval()
    assert not [w for w in recwarn if "missing" in str(w.message).lower() or "unexpected" in str(w.message).lower()]
    with torch.no_grad():
        found = tuned(**batch).logits
        expected = other(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert (own_part(expected, batch) - own_part(found, batch)).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", CONFIGS)
def test_counts_agree(kind):
    reference = theirs("llama", kind)
    assert attach(tiny.llama(), METHODS[kind]).count().trainable == reference.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_generated_tokens_agree(family, kind, tmp_path):
    reference = theirs(family, kind)
    reference.save_pretrained(tmp_path)
    tuned = load_adapter(tiny.MODELS[family](), tmp_path)
    ids = tiny.batch(tuned)["input_ids"]
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(reference.generate(input_ids=ids, **options), tuned.generate(ids, **options))


def test_one_file_holds_one_method_and_says_so(tmp_path):
    tuned = attach(tiny.llama(), [PromptTuning(N), LoRA(rank=2)])
    with pytest.raises(ValueError, match="One file holds one method"):
        tuned.save(tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_settings_say_what_peft_says(tmp_path):
    theirs("llama", "prefix").save_pretrained(tmp_path / "theirs")
    attach(tiny.llama(), PrefixTuning(N)).save(tmp_path / "ours")
    reference, ours = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours"))
    for name in ("peft_type", "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "task_type"):
        assert reference[name] == ours[name], name
