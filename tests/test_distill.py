"""A teacher's loss and its gradient against their closed forms; self-distillation against the frozen base."""

from __future__ import annotations

import copy
import gc

import pytest
import tiny
import torch
from torch.nn import functional as F

import minipeft as mp
from minipeft.analyze.forgetting import forgetting
from minipeft.learn.distill import Distil, divergence
from minipeft.learn.fit import fit

TEMPERATURES = (0.5, 1.0, 2.0, 10.0)


def logits(rows: int = 5, classes: int = 7, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_loss_and_gradient_are_the_closed_forms_and_torchs(temperature):
    z, t = logits(seed=1).requires_grad_(), logits(seed=2)
    loss = divergence(z, t, temperature)
    (slope,) = torch.autograd.grad(loss, z)
    p, q = (torch.softmax(x.double() / temperature, -1) for x in (z.detach(), t))
    by_hand = temperature**2 * (q * (q.log() - p.log())).sum(-1).mean()
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-6, rel=1e-6)
    assert torch.allclose(slope.double(), temperature * (p - q) / len(z), atol=1e-6)

    other = z.detach().clone().requires_grad_()  # as torch, and transformers' distillation examples, write it
    theirs = (
        torch.nn.KLDivLoss(reduction="batchmean")(
            F.log_softmax(other / temperature, -1), F.softmax(t / temperature, -1)
        )
        * temperature**2
    )
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert torch.allclose(slope, torch.autograd.grad(theirs, other)[0], atol=1e-6)


def test_at_temperature_one_with_a_hard_teacher_it_is_cross_entropy():
    z, labels = logits().requires_grad_(), torch.tensor([0, 3, 6, 2, 2])
    hard = torch.full_like(z, -torch.inf).scatter(1, labels[:, None], 0.0)  # words that the teacher rules out
    assert divergence(z, hard).item() == pytest.approx(F.cross_entropy(z, labels).item(), rel=1e-6)


def test_at_high_temperature_it_compares_centred_logits():
    """Hinton et al. 2015, eq. 4: T·(p − q) → ((z − z̄) − (t − t̄)) / V for large T."""
    z, t = logits(seed=1).requires_grad_(), logits(seed=2)
    (slope,) = torch.autograd.grad(divergence(z, t, 1000.0), z)
    centred = (z - z.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    assert torch.allclose(slope * len(z), centred / z.shape[1], atol=5e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "classifier", "t5"])
def test_the_objective_is_the_mixture_at_the_labelled_places(kind):
    student, teacher = tiny.MODELS[kind](), tiny.MODELS[kind]()
    for p in teacher.parameters():
        p.data += 0.1
    inputs = tiny.batch(student)
    if inputs["labels"].ndim > 1:
        inputs["labels"] = inputs["labels"].clone()
        inputs["labels"][:, :3] = -100  # a prompt
        inputs["labels"][1] = -100  # a row without any label
    tuned = mp.attach(student, mp.LoRA(rank=2))
    tiny.randomise(tuned)
    z, t = tuned(**inputs).logits, teacher(**inputs).logits
    labels = inputs["labels"]
    if kind in ("llama", "gpt2"):
        z, t, labels = z[:, :-1], t[:, :-1], labels[:, 1:]
    kept = labels != -100
    hard = F.cross_entropy(z[kept], labels[kept])
    soft = 4 * F.kl_div(
        F.log_softmax(z[kept] / 2, -1), F.log_softmax(t[kept] / 2, -1), log_target=True, reduction="sum"
    )
    want = 0.75 * hard + 0.25 * soft / kept.sum()
    assert Distil(teacher, 2.0, 0.25)(tuned, inputs).item() == pytest.approx(want.item(), rel=1e-5)
    assert Distil(teacher, 2.0, 0.0)(tuned, inputs).item() == pytest.approx(hard.item(), rel=1e-5)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("method", [mp.LoRA(rank=4), mp.Full(), mp.DoRA(rank=2), mp.Adapter(4)])
def test_self_distillation_alone_moves_nothing_from_the_start(method):
    """To the last bit: Adam would make steps of a gradient of 1e-9."""
    tuned = mp.attach(tiny.small(), method)
    before = tiny.snapshot(tuned)
    history = fit(tuned, mp.world.pirate(), steps=3, lr=1e-1, batch=4, progress=False, objective=Distil(weight=1.0))
    if isinstance(method, mp.DoRA):  # computes W/‖W‖·‖W‖, which is W up to rounding
        assert max(history.losses) < 1e-6
        return
    assert history.losses == [0.0, 0.0, 0.0]
    assert tiny.same(tiny.snapshot(tuned), before)


def test_the_base_as_teacher_is_the_base_and_needs_no_second_copy():
    model = tiny.small()
    apart = copy.deepcopy(model)
    tuned = mp.attach(model, mp.LoRA(rank=4))
    tiny.randomise(tuned)
    inputs = tiny.batch(tuned, length=9)
    inputs["labels"] = inputs["input_ids"]
    alive = []
    hook = model.register_forward_pre_hook(lambda *_: alive.append(numbers_alive()))
    before = numbers_alive()
    own = Distil(temperature=3.0)(tuned, inputs)
    hook.remove()
    assert alive == [before, before], "the student's pass and the teacher's, over one set of parameters"
    assert own.item() == Distil(apart, temperature=3.0)(tuned, inputs).item()


def numbers_alive() -> int:
    """How many numbers all parameters in this process hold."""
    return sum(p.numel() for p in gc.get_objects() if type(p) is torch.nn.Parameter)


def test_the_teacher_reads_without_dropout_and_modes_are_put_back():
    teacher = tiny.small()
    teacher.model.layers[0].self_attn.attention_dropout = 0.5
    tuned = mp.attach(tiny.small(), mp.LoRA(rank=2, dropout=0.9))
    tuned.train(), teacher.train()
    inputs = tiny.batch(tuned)
    inputs["labels"] = inputs["input_ids"]
    Distil()(tuned, inputs), Distil(teacher)(tuned, inputs)
    assert tuned.training and teacher.training and all(m.training for m in teacher.modules())
    seen = {Distil(teacher, weight=1.0)._teach(tuned, inputs).sum().item() for _ in range(3)}
    assert len(seen) == 1


def test_it_learns_from_a_teacher_and_the_same_seed_gives_the_same_numbers():
    teacher = mp.attach(tiny.small(), [mp.LoRA(rank=4), mp.Softmax()])
    fit(teacher, mp.world.pirate(), steps=25, lr=2e-2, batch=8, progress=False)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 7)
        student = mp.attach(tiny.small(), [mp.LoRA(rank=2, dropout=0.1), mp.Softmax()])
        soft = Distil(teacher, temperature=2.0, weight=1.0)
        runs.append(fit(student, mp.world.pirate(), 12, 1e-2, 8, seed=seed, progress=False, objective=soft).losses)
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][-1] < 0.5 * runs[0][0]
    stopped = fit(student, mp.world.pirate(), 5, callback=lambda *_: False, progress=False, objective=soft)
    assert len(stopped.losses) == 1 and not student.training and not teacher.training


def test_rehearsal_follows_the_teacher_on_other_texts():
    tuned = mp.attach(tiny.small(), mp.LoRA(rank=2))
    tiny.randomise(tuned)
    task, old = (next(mp.batches(tuned, task, 1, 4)) for task in (mp.world.pirate(), mp.world.plain()))
    with tuned.disabled():
        t = tuned(**old).logits[:, :-1]
    kept = old["labels"][:, 1:] != -100
    want = 0.7 * tuned(**task).loss + 0.3 * divergence(tuned(**old).logits[:, :-1][kept], t[kept], 2.0)
    assert Distil(weight=0.3, rehearsal=[old])(tuned, task).item() == pytest.approx(want.item(), rel=1e-6)
    only = Distil(weight=1.0, rehearsal=[old])
    assert only(tuned, task).item() == only(tuned, old).item(), "the task's rows no longer count"


def test_forgetting_takes_an_objective_and_the_teacher_pulls_back():
    plain, held = forgetting(
        tiny.small(),
        {"LoRA": (mp.LoRA(rank=4), 1e-2), "held": (mp.LoRA(rank=4), 1e-2, Distil(weight=0.9))},
        mp.world.pirate(), target=6.0, steps=6, every=6, n=10,
    )  # fmt: skip
    assert held.task_loss > plain.task_loss and abs(held.forgot) < abs(plain.forgot)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "2"])
def test_a_temperature_must_be_positive(value):
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        Distil(temperature=value)
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        divergence(logits(), logits(), value)


def test_what_cannot_teach_says_so_before_a_step():
    tuned = mp.attach(tiny.small(), mp.LoRA(rank=2))
    before = tiny.snapshot(tuned)
    small, broken = tiny.llama(), copy.deepcopy(tuned.detach())
    tuned = mp.attach(tiny.small(), mp.LoRA(rank=2))
    broken.lm_head.weight.data[5] = float("nan")
    strange = tiny.small()
    strange.tokenizer = copy.deepcopy(tuned.tokenizer)
    strange.tokenizer.add_tokens(["xyzzy"])
    for teacher, message in (
        (tuned, "is the student itself"),
        (tuned.base, "is the student itself"),
        (small, "The teacher knows 61 tokens and the student"),
        (strange, "different vocabularies"),
        (broken, "hold NaN"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            fit(tuned, mp.world.pirate(), steps=2, batch=2, progress=False, objective=Distil(teacher))
        assert str(error.value).count("\n") == 0
        assert tiny.same(tiny.snapshot(tuned), before) and not tuned.training
    with pytest.raises(ValueError, match="Only a model with adapters has a base"):
        fit(tiny.small(), mp.world.pirate(), steps=1, progress=False, objective=Distil())
    three, two = tiny.bert("SequenceClassification"), tiny.bert("SequenceClassification", labels=2)
    with pytest.raises(ValueError, match="chooses among 3 and the student among 2"):
        Distil(three)(two, tiny.batch(two) | {"labels": torch.tensor([0, 1, 1])})
    with pytest.raises(ValueError, match="weight is the teacher's share"):
        Distil(weight=1.5)
    with pytest.raises(ValueError, match="both must choose among the same"):
        divergence(logits(), logits(classes=3))
