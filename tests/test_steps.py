"""Penalties and schedules in anybody's loop: accumulation, loss scaling, a resume, transformers' Trainer."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

import minipeft as mp
from minipeft.methods.adalora import ranks

METHODS = {
    "experts": mp.Experts(bottleneck=3, experts=3, chosen=1, balance=1.0),
    "adalora": mp.AdaLoRA(rank=1, initial_rank=2, steps=6, warmup=1, final=1, orthogonality=3.0),
}


def attached(name: str):
    tuned = mp.attach(tiny.llama(tied=False), METHODS[name], seed=1)
    tiny.randomise(tuned, scale=0.2)
    return tuned.train()


def gradients(tuned, parts: int = 1, scale: float = 1.0) -> torch.Tensor:
    tuned.zero_grad()
    batch = tiny.batch(tuned, rows=8)
    batch = {k: torch.cat([v[:1]] * 8) for k, v in batch.items()}  # rows alike: each part has the same mean
    for chunk in range(parts):
        rows = slice(chunk * 8 // parts, (chunk + 1) * 8 // parts)
        (tuned(**{k: v[rows] for k, v in batch.items()}).loss * scale / parts).backward()
    return torch.cat([p.grad.flatten() for p in tuned.parameters() if p.requires_grad]) / scale


@pytest.mark.parametrize("checkpointing", (None, True, False), ids=("plain", "reentrant", "not reentrant"))
@pytest.mark.parametrize("name", METHODS)
def test_accumulation_and_loss_scaling_change_no_gradient(name, checkpointing):
    tuned = attached(name)
    once = gradients(tuned)
    tuned.penalty()
    bare = mp.attach(tiny.llama(tied=False), METHODS["experts"].__class__(3, 3, 1, balance=0.0), seed=1)
    if checkpointing is not None:
        tuned.train()
        tuned.enable_input_require_grads()
        tuned.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        torch.testing.assert_close(gradients(tuned), once, atol=1e-5, rtol=1e-4)
    for parts, scale in ((4, 1.0), (1, 1024.0), (2, 64.0)):
        torch.testing.assert_close(gradients(tuned, parts, scale), once, atol=1e-5, rtol=1e-4)
    if name == "experts":  # and the balance is in it
        tiny.randomise(bare, scale=0.2)
        assert (gradients(bare) - once).abs().max() > 1e-3


def loop(tuned, steps: int, optimizer=None):
    optimizer = optimizer or torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.05)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        tuned(**tiny.batch(tuned, seed=step)).loss.backward()
        optimizer.step()
        seen.append(sum(ranks(tuned).values()))
    return seen


def test_a_loop_of_one_s_own_moves_the_ranks_without_being_told():
    tuned, told = attached("adalora"), attached("adalora")
    seen = loop(tuned, 6)
    optimizer = torch.optim.SGD([p for p in told.parameters() if p.requires_grad], lr=0.05)
    for step in range(6):
        optimizer.zero_grad()
        told(**tiny.batch(told, seed=step)).loss.backward()
        optimizer.step()
        told.stepped(step + 1)  # by hand as well: once is enough
        assert sum(ranks(told).values()) == seen[step]
    layers = len(ranks(tuned))
    assert seen == [METHODS["adalora"].budget(t, layers) for t in range(1, 7)] and seen[-1] == layers
    other = attached("adalora")
    loop(attached("experts"), 3)
    assert sum(ranks(other).values()) == 2 * layers, "another model's optimizer is none of its business"


def test_an_optimizer_of_something_else_does_not_count():
    tuned = attached("adalora")
    strange = torch.nn.Linear(2, 2)
    strange(torch.ones(2)).sum().backward()
    for _ in range(9):
        torch.optim.SGD(strange.parameters(), lr=0.1).step()
    assert int(next(iter(tuned.adapters["default"].values())).taken) == 0


def test_a_resume_goes_on_as_if_nothing_had_been():
    whole, first = attached("adalora"), attached("adalora")
    loop(whole, 6, torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], lr=0.05))
    loop(first, 3)
    second = attached("adalora")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    optimizer = torch.optim.SGD([p for p in second.parameters() if p.requires_grad], lr=0.05)
    for step in range(3, 6):
        optimizer.zero_grad()
        second(**tiny.batch(second, seed=step)).loss.backward()
        optimizer.step()
    assert ranks(second) == ranks(whole)
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), whole.parameters(), strict=True))


def test_a_copy_hears_of_its_own_optimizer():
    tuned = attached("adalora")
    other = copy.deepcopy(tuned).train()
    loop(other, 6)
    assert sum(ranks(other).values()) == len(ranks(other)) and sum(ranks(tuned).values()) == 2 * len(ranks(tuned))


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", (1, 2))
def test_the_trainer_of_transformers_moves_the_ranks(accumulate, tmp_path):
    from transformers import Trainer, TrainingArguments

    tuned = attached("adalora")
    rows = [{k: v[0] for k, v in tiny.batch(tuned, rows=1, seed=i).items()} for i in range(12 * accumulate)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=1, gradient_accumulation_steps=accumulate,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(tuned, arguments, train_dataset=rows).train()
    assert int(next(iter(tuned.adapters["default"].values())).taken) == 6
    assert sum(ranks(tuned).values()) == len(ranks(tuned))


def test_a_shared_parameter_stands_once_in_the_state(tmp_path):
    from safetensors.torch import load_file, save_file

    tuned = mp.attach(tiny.llama(), mp.Subspace(dim=8))
    next(p for p in tuned.parameters() if p.requires_grad).data += 0.1
    save_file(tuned.state_dict(), tmp_path / "x.safetensors")  # what the Trainer does
    again = mp.attach(tiny.llama(), mp.Subspace(dim=8))
    again.load_state_dict(load_file(tmp_path / "x.safetensors"))
    batch = tiny.batch(tuned)
    assert torch.equal(again(**batch).logits, tuned(**batch).logits)
    assert tuned.count().trainable == 8


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("method", [mp.AdaLoRA(rank=2, steps=9), mp.Experts(2)], ids=lambda m: type(m).__name__)
def test_a_penalty_alone_teaches_nothing(method, name):
    """Reformer's layers, and a checkpoint whose input needs no gradient, pass none on: a loop shall hear of it."""
    model = tiny.MODELS[name]()
    model.register_forward_hook(lambda _, __, output: setattr(output, "loss", output.loss.detach()) or output)
    tuned = mp.attach(model, method).train()
    loss = tuned(**tiny.batch(model)).loss
    assert not loss.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()
