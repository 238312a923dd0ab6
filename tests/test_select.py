"""Which existing parameters each selective method trains."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from torch import nn

from minipeft.attach import attach
from minipeft.methods.lora import LoRA
from minipeft.methods.select import BitFit, Full, Softmax


def entries(tuned) -> set[str]:
    return {".".join(s) for layer in tuned.adapters["default"].values() for s in layer.slots}


def test_full_takes_everything_and_keeps_ties():
    model = tiny.llama(tied=True)
    tuned = attach(model, Full())
    assert entries(tuned) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert model.lm_head.weight is model.model.embed_tokens.weight is not None
    assert model.lm_head.weight is tuned.adapters["default"]["model/embed_tokens/weight"].value
    assert tuned.count().trainable == tuned.count().total


def test_full_can_be_restricted():
    tuned = attach(tiny.gpt2(), Full(targets=re.compile(r"transformer\.h\.1\..*")))
    assert entries(tuned) == {n for n, _ in tuned.base.named_parameters() if n.startswith("transformer.h.1.")}
    tuned = attach(tiny.llama(), Full(targets=["model.norm.weight"]))
    assert entries(tuned) == {"model.norm.weight"}
    with pytest.raises(TypeError, match="string"):
        Full(targets="model.norm.weight")


def test_bitfit_takes_the_biases_of_linears_conv1d_and_norms_only():
    for family in tiny.MODELS.keys() - {"t5"}:  # which has no biases
        model = tiny.MODELS[family]()
        expected = {n for n, _ in model.named_parameters(remove_duplicate=False) if n.endswith(".bias")}
        assert entries(attach(model, BitFit())) == expected, family
    one = attach(tiny.bert(), BitFit(targets=re.compile(r".*\.layer\.1\.intermediate\.dense")))
    assert entries(one) == {"bert.encoder.layer.1.intermediate.dense.bias"}
    conv = nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2), nn.Linear(2, 2))
    assert entries(attach(conv, BitFit())) == {"1.bias", "2.bias"}


def test_bitfit_says_when_there_are_no_biases():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    with tiny.untouched(model), pytest.raises(ValueError, match="LlamaForCausalLM has no biases"):
        attach(model, BitFit())
    with pytest.raises(TypeError, match="compile"):
        BitFit(targets="encoder")


def test_softmax_finds_the_output_layer():
    expected = {
        "llama": {"lm_head.weight"},
        "gpt2": {"lm_head.weight"},
        "bert": {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "cls.predictions.bias"},
        "classifier": {"classifier.weight", "classifier.bias"},
    }
    for family, names in expected.items():
        assert entries(attach(tiny.MODELS[family](), Softmax())) == names
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Softmax(-1))
    assert entries(attach(plain, Softmax())) == {"2.weight", "2.bias"}
    for headless in (nn.Sequential(nn.ReLU()), tiny.bert().bert):
        with tiny.untouched(headless), pytest.raises(ValueError, match="no output layer"):
            attach(headless, Softmax())


def test_softmax_on_a_tied_head_leaves_the_input_embedding_alone():
    model = tiny.llama(tied=True)
    embedding = model.model.embed_tokens.weight
    values = embedding.detach().clone()
    tuned = attach(model, Softmax())
    tiny.randomise(tuned)
    assert model.model.embed_tokens.weight is embedding and torch.equal(embedding, values)
    assert not torch.equal(model.lm_head.weight, values)
    assert tuned.count().trainable == tiny.V * tiny.D
    assert tuned.deltas().keys() == {"lm_head"}


def test_the_copy_has_the_parameter_s_dtype_and_only_floats_train():
    model = tiny.llama().to(torch.bfloat16)
    model.counter = nn.Parameter(torch.arange(3), requires_grad=False)
    tuned = attach(model, Full())
    assert {p.dtype for p in tuned.adapters.parameters()} == {torch.bfloat16} and "counter" not in entries(tuned)


def test_an_optimizer_made_before_attach_cannot_move_the_base():
    model = tiny.llama()
    before = tiny.snapshot(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    tuned = attach(model, [LoRA(rank=2), BitFit()])
    tuned(**tiny.batch(model)).loss.backward()
    optimizer.step()
    with tuned.disabled():
        assert tiny.same(tiny.snapshot(model), before)
