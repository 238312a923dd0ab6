"""A merged model is a plain one: transformers loads it without minipeft, and it computes what the tuned model does."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny
import torch
import transformers

from minipeft.attach import attach
from minipeft.methods.adapter import Adapter
from minipeft.methods.dora import DoRA
from minipeft.methods.ia3 import IA3
from minipeft.methods.lora import LoRA
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.prompt import PromptTuning
from minipeft.methods.qlora import quantize
from minipeft.methods.select import BitFit, Full, Softmax
from minipeft.serve.export import export


def ids(rows: int = 3) -> torch.Tensor:
    return tiny.batch(tiny.llama(), rows)["input_ids"]


def tuned_with(family: str, method, **more):
    tuned = attach(tiny.MODELS[family](), method, **more)
    tiny.randomise(tuned)
    return tuned


@torch.no_grad()
def logits(model, **more):
    return model(input_ids=ids(), **more).logits


CASES = [
    ("llama", LoRA(rank=2)),
    ("llama", LoRA(rank=2, targets=["embed_tokens", "q_proj"])),  # which unties the head
    ("llama", LoRA(rank=2, targets=["lm_head"])),
    ("llama", [LoRA(rank=2), Softmax()]),
    ("llama", [LoRA(rank=2), BitFit()]),
    ("llama", Full()),
    ("llama", DoRA(rank=2)),
    ("llama", IA3()),
    ("gpt2", LoRA(rank=2, targets=["c_attn[0:16]", "c_proj"])),
    ("classifier", [LoRA(rank=2), Softmax()]),
    ("bert", LoRA(rank=2)),
    ("t5", LoRA(rank=2)),
]


@pytest.mark.parametrize("family, method", CASES, ids=lambda each: str(each)[:50])
def test_transformers_loads_what_was_exported(family, method, tmp_path):
    tuned = tuned_with(family, method)
    before = tiny.snapshot(tuned.base)
    error = export(tuned, tmp_path / "deep" / "plain", ids())
    assert tiny.same(tiny.snapshot(tuned.base), before) and [p.name for p in (tmp_path / "deep").iterdir()] == ["plain"]
    plain = type(tuned.base).from_pretrained(tmp_path / "deep" / "plain")
    more = {"decoder_input_ids": ids()} if family == "t5" else {}
    moved = (logits(tuned, **more) - logits(plain, **more)).abs().max().item()
    assert moved == pytest.approx(error, abs=1e-6) and error < 2e-5
    with tuned.disabled():
        assert (logits(tuned, **more) - logits(plain, **more)).abs().max() > 100 * error + 1e-3, "it has an effect"
    assert tiny.hooks(plain) == 0 and next(plain.parameters()).dtype == torch.float32


def test_ties_stay_where_they_can(tmp_path):
    for method, tied in ((LoRA(rank=2), True), (LoRA(rank=2, targets=["embed_tokens"]), False)):
        export(tuned_with("llama", method), tmp_path / str(tied), ids())
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(tied))
        assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied


def test_a_process_without_minipeft_reads_it(tmp_path):
    tuned = attach(model := tiny.small(), LoRA(rank=2))
    tiny.randomise(tuned)
    export(tuned, tmp_path / "plain", ids())
    text = "anna went to the"
    written = tuned.generate(**model.tokenizer(text, return_tensors="pt"), max_new_tokens=5, do_sample=False)
    program = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; path = sys.argv[1]\n"
        "ids = T.from_pretrained(path)(sys.argv[2], return_tensors='pt')\n"
        "print(M.from_pretrained(path).generate(**ids, max_new_tokens=5, do_sample=False)[0].tolist())\n"
        "assert 'minipeft' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "plain", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == str(written[0].tolist())


def test_four_bits_become_dense(tmp_path):
    """The error is that of rounding nothing; the merge into the codes themselves would lose far more."""
    for family in ("llama", "gpt2"):
        tuned = attach(quantize(tiny.MODELS[family](), block=16), LoRA(rank=2))
        tiny.randomise(tuned)
        error = export(tuned, tmp_path / family, ids())
        plain = type(tuned.base).from_pretrained(tmp_path / family)
        assert error < 2e-5 and type(plain) is type(tiny.MODELS[family]())
        with pytest.warns(UserWarning, match="Rounding to what the base stores loses"):
            tuned.merge()
        assert (logits(tuned) - logits(plain)).abs().max() > 1000 * error


def test_bfloat16_says_what_it_costs(tmp_path):
    tuned = tuned_with("llama", LoRA(rank=2))
    error = export(tuned, tmp_path / "plain", ids(), dtype=torch.bfloat16)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.dtype == torch.bfloat16 and error == (logits(tuned) - logits(plain)).abs().max().item() > 1e-3
    wide = attach(tiny.llama().bfloat16(), LoRA(rank=2))
    tiny.randomise(wide)
    assert export(wide, tmp_path / "wide", ids()) > 0
    merged = wide.unrounded()["model.layers.0.self_attn.q_proj", "weight"]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert torch.equal(plain.model.layers[0].self_attn.q_proj.weight, merged), "not rounded to the base's dtype"


def test_several_adapters_in_parts(tmp_path):
    tuned = tuned_with("llama", LoRA(rank=2))
    tuned.add("b", LoRA(rank=1))
    tiny.randomise(tuned, seed=3)
    tuned.use({"default": 0.3, "b": -0.5})
    assert export(tuned, tmp_path / "plain", ids()) < 2e-5


@pytest.mark.parametrize(
    "method", [PromptTuning(length=2), PrefixTuning(length=2), Adapter(bottleneck=2)], ids=lambda m: type(m).__name__
)
def test_what_changes_no_weight_is_refused(method, tmp_path):
    tuned = tuned_with("llama", method)
    with pytest.raises(ValueError, match="changes no weight") as error:
        export(tuned, tmp_path / "plain", ids())
    assert str(error.value).count(". ") == 0 and not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_refused(tmp_path):
    tuned, new = tuned_with("llama", LoRA(rank=2)), tmp_path / "plain"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    cases = [
        (lambda: export(tuned, tmp_path / "full", ids()), "holds something already"),
        (lambda: export(tuned, new, ids(), dtype=torch.float16), "dtype is torch.float16"),
        (lambda: export(tuned, new, torch.zeros(2, 0, dtype=torch.long)), "ids must be token ids"),
        (lambda: export(tuned, new, [[1, 2]]), "ids must be token ids"),
        (
            lambda: export(attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoRA(rank=1)), new, ids()),
            "no model of tr",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="needs the Tuned"):
        export(tuned.base, new, ids())
    tuned.merge()
    with pytest.raises(ValueError, match="unmerge"):
        export(tuned, new, ids())
    with torch.device("meta"):
        empty = attach(tiny.llama(), LoRA(rank=2))
    with pytest.raises(ValueError, match="meta device"):
        export(empty, new, ids())
    assert not new.exists() and (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    tuned.unmerge()
    export(tuned, tmp_path / "empty", ids())
