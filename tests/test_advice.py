"""The advice: what it says follows from the tables and from the memory calculator, and it leaves the model alone."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import tiny
import torch
import transformers

import minipeft as mp
from minipeft.analyze.memory import Memory
from minipeft.course import advice, atlas, board
from minipeft.course.advice import Advice, Measured, Option, advise, choose, scaled
from minipeft.learn.protocol import half_decade


def option(name, peak, scores=None, fits="fits", file=1):
    told = None if scores is None else Measured(0.01, tuple(scores), (0.01,))
    memory = Memory(peak, 0, 0, 0, 0, 0)
    return Option(name, mp.LoRA(), "float32", 1, file, memory, fits, 0.01, (0.003, 0.01, 0.03), told, "It fits.")


BEST = option("best", 100, (0.90, 0.91, 0.92, 0.91, 0.90))
CHOICES = {  # for classes: more is better, and 0.02 matters
    "the best alone": ([BEST, option("worse", 10, (0.8, 0.81, 0.82, 0.8, 0.8))], "best"),
    "a cheap one that is alike": ([BEST, option("alike", 10, (0.90, 0.90, 0.91, 0.90, 0.89))], "alike"),
    "a dear one that is alike": ([BEST, option("alike", 200, (0.90, 0.90, 0.91, 0.90, 0.89))], "best"),
    "cannot tell is not alike": ([BEST, option("loose", 10, (0.95, 0.85, 0.97, 0.83, 0.93))], "best"),
    "the best is too large": ([replace(BEST, fits="too large"), option("b", 10, (0.5, 0.5))], "b"),
    "tight is not enough": ([replace(BEST, fits="tight"), option("b", 10, (0.5, 0.5))], "b"),
    "its file is too large": ([replace(BEST, file=10**9), option("b", 10, (0.5, 0.5))], "b"),
    "measured before unmeasured": ([BEST, option("4 bits", 1)], "best"),
    "only an unmeasured one fits": ([replace(BEST, fits="too large"), option("4 bits", 1), option("x", 9)], "4 bits"),
    "none fits": ([replace(BEST, fits="too large")], None),
    "none can": ([replace(BEST, fits="cannot", memory=None)], None),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_rule_of_choice(case):
    options, name = CHOICES[case]
    first = choose(options, "class", file=10**6)
    assert (first and first.name) == name


def test_less_loss_is_better_for_words():
    options = [option("high", 10, (2.0, 2.1, 2.0)), option("low", 100, (1.0, 1.1, 1.0))]
    assert choose(options, "text").name == "low"
    assert choose(options, "class").name == "high"
    assert choose([option("near", 10, (1.05, 1.14, 1.05)), options[1]], "text").name == "near"


@pytest.mark.parametrize("seen, own, rate, expected", [
    (128, 128, 0.01, 0.01), (128, 64, 0.01, 0.01), (128, 1280, 0.01, 0.001), (128, 4096, 0.01, 3e-4),
    (384, 768, 0.001, 3e-4 if math.log(5e-4 / 3e-4) < math.log(1e-3 / 5e-4) else 1e-3), (128, 10**9, 0.3, 3e-8),
])  # fmt: skip
def test_a_wider_model_begins_lower(seen, own, rate, expected):
    assert scaled(rate, seen, own) == pytest.approx(expected)
    assert half_decade(scaled(rate, seen, own), True) > scaled(rate, seen, own)  # it is on the grid


def test_the_tables_are_quoted_as_they_stand():
    runs, words = atlas.load(), advice.measured("text")
    for name, method in advice.WORDS.items():
        best = atlas.best(runs, "pirate", method)
        assert words[name].rate == best["lr"] in words[name].rates
        assert statistics.fmean(words[name].scores) == pytest.approx(best["mean"])
        assert len(words[name].scores) == best["count"]
    assert advice.measured("answer")["LoRA r=8"].rates == words["LoRA r=8"].rates
    for name, found in board.board().items():
        assert advice.measured("class")[name].scores == tuple(found["accuracy"])


@pytest.fixture
def weighed(monkeypatch):
    """A scale that is quick: one byte for each number that trains, and a million for the base."""

    def weigh(model, method, *_, **__):
        count = advice.budget(model, method)
        return Memory(10**6, count.trainable, 0, 0, 0, 0)

    monkeypatch.setattr(advice, "predict", weigh)


MODELS = {
    "GQA": (tiny.llama, "text"),
    "Conv1D": (tiny.gpt2, "text"),
    "classifier": (tiny.MODELS["classifier"], "class"),
}


@pytest.mark.parametrize("family", MODELS)
def test_any_architecture_is_advised_on_and_left_alone(family, request):
    make, kind = MODELS[family]
    if family == "Conv1D":
        request.getfixturevalue("weighed")
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = advise(model, kind, batch=2, length=8, memory=2**30)
    assert found.first.fits == "fits" and found.first.measured and found.first.name in repr(found)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not hasattr(model, "_tuned") and all(p.requires_grad for p in model.parameters())
    for each in found.options:
        assert each.rate in each.rates and each.rates == tuple(sorted(each.rates))
        assert each.memory is not None or each.why.startswith(each.name), "what cannot be says why"
    lora = next(o for o in found.options if o.name == "LoRA r=8" and o.storage == "float32")
    assert lora.memory == advice.predict(model, lora.method, 2, 8)
    assert lora.trainable == mp.attach(model, lora.method).count().trainable


def test_less_memory_changes_the_advice(weighed):
    """Exactly at the limits: what needs 1.3 times its tensors fits, a byte less is tight, a byte less than the tensors
    is too large."""
    model = tiny.bert("SequenceClassification", labels=2)
    full = advice.predict(model, mp.Full()).peak
    said = {}
    for memory in (1.3 * full, 1.3 * full - 1, full, full - 1):
        found = advise(model, "class", 2, 8, memory)
        said[memory] = next(o.fits for o in found.options if o.name == "full fine-tuning")
    assert list(said.values()) == ["fits", "tight", "tight", "too large"]
    nothing = advise(model, "class", 2, 8, 1)
    assert nothing.first is None and "Nothing fits" in repr(nothing)
    small = advise(model, "class", 2, 8, 2**30, file=2000)
    assert small.first.file <= 2000


def test_a_model_without_biases_has_no_bitfit(weighed):
    config = tiny.llama().config
    config.attention_bias = config.mlp_bias = False
    found = advise(config, "text", 2, 8, 2**30)
    bitfit = next(o for o in found.options if o.name == "BitFit")
    assert (bitfit.fits, bitfit.memory) == ("cannot", None) and "bias" in bitfit.why
    assert isinstance(found, Advice) and found.table().loc["BitFit, float32", "fits?"] == "cannot"


@pytest.mark.parametrize("call, message", [
    (lambda m: advise(m, "picture"), 'kind is "class", "text" or "answer"'),
    (lambda m: advise(m, "text", memory=0), "must be more than 0"),
    (lambda m: advise(m, "text", memory=math.nan), "must be more than 0"),
    (lambda m: advise(m, "text", 2, 65, 2**30), "the model reads 1 to 64 tokens"),
    (lambda m: advise(m, "text", 0, 8, 2**30), "do not fit"),
    (lambda m: advise(m, "class", 2, 8, 2**30), "asks for a class but the model predicts words"),
    (lambda m: advise(tiny.bert("SequenceClassification"), "text", 2, 8, 2**30), "asks for words but the model"),
    (lambda m: advise(transformers.ViTConfig(hidden_size=24, num_attention_heads=2), "class"), "ViTModel reads no"),
    (lambda m: advise(transformers.T5Config(vocab_size=61), "text", 2, 8, 2**30), "T5Model, has no output layer over"),
    (lambda m: advise(mp.attach(m, mp.LoRA(2)), "text", 2, 8, 2**30), "carries adapters already"),
])  # fmt: skip
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny.llama())


def test_free_memory_is_asked_of_the_machine():
    assert 0 < advice.free(tiny.llama()) < 2**50
