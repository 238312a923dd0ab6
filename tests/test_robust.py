"""Shifts of embeddings: FGM and PGD against their formulas, and nothing else touched."""

from __future__ import annotations

import pytest
import tiny
import torch
from datasets import Dataset

import minipeft as mp
from minipeft.learn.fit import evaluate, fit
from minipeft.learn.robust import Adversarial, shifted, under_attack, worst_shift

KINDS = ["llama", "gpt2", "classifier"]


def padded(model) -> dict[str, torch.Tensor]:
    inputs = tiny.batch(model, rows=3, length=7)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 4:] = 0
    return inputs


def by_hand(model, inputs) -> torch.Tensor:
    """∂L/∂e through `inputs_embeds`, which is how the model itself takes embeddings."""
    table = model.get_input_embeddings().weight.detach()
    embeds = table[inputs["input_ids"]].clone().requires_grad_()
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    loss = model(inputs_embeds=embeds, **rest).loss
    return torch.autograd.grad(loss, embeds)[0] * inputs["attention_mask"].unsqueeze(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_fgm_is_epsilon_times_the_unit_gradient_of_each_text(kind):
    model = tiny.MODELS[kind]()
    inputs = padded(model)
    g = by_hand(model, inputs)
    want = torch.stack([0.7 * row / row.norm() for row in g])
    assert torch.allclose(worst_shift(model, inputs, 0.7), want, atol=1e-6)
    tuned = mp.attach(model, mp.LoRA(rank=2))  # frozen: the gradient must reach the embeddings all the same
    assert torch.allclose(worst_shift(tuned, inputs, 0.7), want, atol=1e-6)


def test_vectors_in_front_are_not_shifted():
    """A shift of the tokens behind a soft prompt is what it is when the prompt is handed over as embeddings."""
    model = tiny.gpt2()
    inputs, table = padded(model), model.get_input_embeddings().weight.detach().clone()
    tuned = mp.attach(model, mp.PromptTuning(3))
    shift = worst_shift(tuned, inputs, 0.5)
    assert shift.shape == (3, 7, tiny.D) and (shift.flatten(1).norm(dim=1) - 0.5).abs().max() < 1e-5
    with torch.no_grad(), shifted(tuned, shift):
        seen = tuned(**inputs).logits
    vectors = next(p for p in tuned.adapters.parameters()).detach().expand(3, -1, -1)
    embeds = torch.cat([vectors, table[inputs["input_ids"]] + shift], 1)
    mask = torch.cat([torch.ones(3, 3, dtype=torch.int64), inputs["attention_mask"]], 1)
    with torch.no_grad(), tuned.disabled():
        want = model(inputs_embeds=embeds, attention_mask=mask).logits[:, 3:]
    real = inputs["attention_mask"].bool()
    assert torch.allclose(seen[real], want[real], atol=1e-4)


def test_one_text_alone_and_one_token_get_the_same_as_in_a_batch():
    model = tiny.bert("SequenceClassification")
    inputs = padded(model)
    together = worst_shift(model, inputs, 0.7)
    alone = worst_shift(
        model, {name: value[1:2, :4] if value.ndim > 1 else value[1:2] for name, value in inputs.items()}, 0.7
    )
    assert torch.allclose(together[1:2, :4], alone, atol=1e-5) and not together[1, 4:].any()
    single = {"input_ids": torch.tensor([[5]]), "labels": torch.tensor([2])}
    assert worst_shift(model, single, 0.1).norm() == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_pgd_stays_in_the_ball_and_raises_the_loss(steps):
    model = tiny.bert("SequenceClassification")
    inputs, epsilon = padded(model), 0.5
    shift = worst_shift(model, inputs, epsilon, steps)
    assert (shift.flatten(1).norm(dim=1) <= epsilon * (1 + 1e-6)).all()
    with torch.no_grad():
        clean = model(**inputs).loss
        with shifted(model, shift):
            worse = model(**inputs).loss
        random = shift.norm() * torch.nn.functional.normalize(torch.randn_like(shift).flatten(), dim=0).view_as(shift)
        with shifted(model, random):
            other = model(**inputs).loss
    assert worse > clean and worse > other


def test_pgd_is_its_formula_written_again():
    model, epsilon, steps = tiny.bert("SequenceClassification"), 0.5, 3
    inputs = padded(model)
    table = model.get_input_embeddings().weight.detach()
    e, r = table[inputs["input_ids"]], torch.zeros(3, 7, tiny.D)
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    for _ in range(steps):
        x = (e + r).requires_grad_()
        g = torch.autograd.grad(model(inputs_embeds=x, **rest).loss, x)[0] * inputs["attention_mask"].unsqueeze(-1)
        for i in range(3):
            r[i] += 1.5 * epsilon / steps * g[i] / g[i].norm()
            if r[i].norm() > epsilon:
                r[i] *= epsilon / r[i].norm()
    assert torch.allclose(worst_shift(model, inputs, epsilon, steps), r, atol=1e-5)


def test_table_gradients_hooks_and_mode_stay_as_they_were():
    model = tiny.bert("SequenceClassification")
    inputs = padded(model)
    model(**inputs).loss.backward()  # the gradients of a clean pass, which somebody means to use
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with tiny.untouched(model):
        worst_shift(model, inputs, 1.0, 3)
        Adversarial(1.0)(model, inputs)
        with pytest.raises(RuntimeError), shifted(model, torch.zeros(9, 9, 9)):
            model(**inputs)
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters() if name in gradients)


def test_the_objective_is_the_mixture_of_clean_and_shifted():
    tuned = mp.attach(tiny.gpt2(), mp.LoRA(rank=2))
    tiny.randomise(tuned)
    inputs = padded(tuned)
    with shifted(tuned, worst_shift(tuned, inputs, 0.3, 2)):
        worse = tuned(**inputs).loss
    want = 0.6 * tuned(**inputs).loss + 0.4 * worse
    assert Adversarial(0.3, 2, 0.4)(tuned, inputs).item() == pytest.approx(want.item(), rel=1e-6)
    assert Adversarial(0.3, weight=0.0)(tuned, inputs).item() == pytest.approx(tuned(**inputs).loss.item(), rel=1e-6)


def test_training_and_asking_under_attack():
    task = mp.world.mood()
    runs = [
        fit(mp.attach(tiny.small(labels=2), mp.LoRA(rank=2, dropout=0.1)), task, 4, 1e-2, 4, seed=s, progress=False,
            objective=Adversarial(0.1)).losses
        for s in (0, 0, 1)
    ]  # fmt: skip
    assert runs[0] == runs[1] != runs[2]
    model = tiny.small(labels=2).train()
    clean, none = evaluate(model, task, n=40), under_attack(model, task, 1e-9, n=40)
    assert none.predictions == clean.predictions and none.loss == pytest.approx(clean.loss, rel=1e-4)
    fgm, pgd, chance = (under_attack(model, task, 0.3, n=40, **how) for how in ({}, {"steps": 4}, {"random": True}))
    assert clean.loss < fgm.loss and chance.loss < fgm.loss and fgm.truth == clean.truth and fgm.n == 40
    assert pgd.loss > chance.loss
    assert under_attack(model, task, 0.3, n=40, random=True) == chance and model.training


def test_what_cannot_be_says_so():
    model, task = tiny.small(labels=2), mp.world.mood()
    for epsilon in (0, -1.0, float("nan"), None):
        with pytest.raises(ValueError, match="epsilon is the length of the shift"):
            Adversarial(epsilon)
    with pytest.raises(ValueError, match="steps is 1 for FGM"):
        under_attack(model, task, 0.1, steps=0)
    with pytest.raises(ValueError, match="share of the loss"):
        Adversarial(0.1, weight=2)
    with pytest.raises(ValueError, match="an attack here changes the class"):
        under_attack(tiny.small(), mp.world.pirate(), 0.1)
    with pytest.raises(ValueError, match="embeds two texts with one table"):
        worst_shift(tiny.t5(), tiny.batch(tiny.t5()), 0.1)
    empty = Dataset.from_dict({"text": [], "label": []})
    with pytest.raises(ValueError, match="no rows to read"):
        under_attack(model, empty, 0.1)
    model.model.embed_tokens.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="gradient at the embeddings is no number"):
        under_attack(model, task, 0.1, n=2)
