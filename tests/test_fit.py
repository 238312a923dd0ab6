"""Training: seeded, interruptible, and refusing what cannot work with one sentence and an unchanged model."""

import math

import pytest
import torch
from datasets import Dataset, DatasetDict
from sklearn.metrics import precision_recall_fscore_support
from tiny import small

import minipeft as mp
from minipeft.learn.fit import IGNORE, evaluate, fit, report, training
from minipeft.learn.peak import PeakMemory
from minipeft.learn.plan import Plan
from minipeft.learn.rows import collate, encode, order
from minipeft.world import tasks
from minipeft.world.base import build_model, build_tokenizer, held_out_loss


def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_fit_learns_and_the_same_seed_gives_the_same_numbers():
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 99)  # what the rest of the world drew must not matter
        tuned = mp.attach(small(), [mp.LoRA(rank=4, dropout=0.3), mp.Softmax()])
        runs.append(fit(tuned, tasks.pirate(), steps=12, seed=seed, progress=False))
    assert runs[0].losses == runs[1].losses != runs[2].losses
    assert runs[0].losses[-1] < runs[0].losses[0] - 0.3
    assert runs[0].stopped == "finished" and len(runs[0].seconds) == 12
    assert sorted(runs[0].seconds) == runs[0].seconds
    assert runs[0].tokens > 12 * 16 * 30
    assert runs[0].peak_memory > 0


@pytest.mark.parametrize("method", [mp.Full(), mp.BitFit(), mp.Softmax(), mp.LoRA(rank=2)])
def test_the_base_is_bit_identical_after_training(method):
    model = small()
    before = weights(model)
    tuned = mp.attach(model, method)
    fit(tuned, tasks.pirate(), steps=20, progress=False)
    assert any(delta.abs().max() > 0 for delta in tuned.deltas().values())
    assert same(weights(tuned.detach()), before)


def test_evaluate_agrees_with_the_plain_loss_and_leaves_the_mode_alone():
    model = small().train()
    score = evaluate(model, tasks.plain(), n=80)
    assert model.training
    texts = tasks.plain().data["test"]["text"][:80]
    assert score.loss == pytest.approx(held_out_loss(model.eval(), model.tokenizer, texts), rel=1e-5)
    assert score.accuracy is None and score.n == 80


def test_the_loss_of_an_answer_is_taken_over_the_completion_only():
    tokenizer = build_tokenizer()
    rows = tasks.answer().data["test"].select(range(20))
    for (ids, labels), row in zip(encode("answer", rows, tokenizer, 128), rows, strict=True):
        counted = [i for i, label in zip(ids, labels, strict=True) if label != IGNORE]
        assert tokenizer.decode(counted) == row["completion"] + " <eos>"
        assert tokenizer.decode(ids) == f"<bos> {row['prompt']} {row['completion']} <eos>"
    for (ids, labels), row in zip(encode("text", rows, tokenizer, 128), rows, strict=True):
        assert ids == labels and tokenizer.decode(ids) == f"<bos> {row['text']} <eos>"


def test_accuracy_counts_whole_answers_and_groups_of_synonyms():
    class Oracle(torch.nn.Module):
        """Predicts the next token of the texts it is given, or another word of the same mood."""

        def __init__(self, model, swap):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))
            self.tokenizer, self.config, self.swap = model.tokenizer, model.config, swap
            self.get_output_embeddings = lambda: object()

        def forward(self, input_ids, attention_mask):
            following = torch.roll(input_ids, -1, 1)
            for a, b in self.swap.items():
                following = following.masked_fill(following == a, b)
            logits = torch.nn.functional.one_hot(following, len(self.tokenizer)) * 50.0
            return type("Output", (), {"logits": logits})

    model = small()
    ids = model.tokenizer.convert_tokens_to_ids
    red, blue, happy, proud, sad = ids(["red", "blue", "happy", "proud", "sad"])
    assert evaluate(Oracle(model, {}), tasks.answer()).accuracy == 1
    wrong = evaluate(Oracle(model, {red: blue}), tasks.answer()).accuracy
    reds = [c.startswith("red") for c in tasks.answer().data["test"]["completion"]]
    assert wrong == pytest.approx(1 - sum(reds) / len(reds))
    assert evaluate(Oracle(model, {happy: proud}), tasks.flip()).accuracy == 1
    happies = [c.startswith("happy") for c in tasks.flip().data["test"]["completion"]]
    assert evaluate(Oracle(model, {happy: sad}), tasks.flip()).accuracy == pytest.approx(1 - sum(happies) / 300)


def test_a_classifier_learns_the_mood_and_reports_like_scikit_learn():
    tuned = mp.attach(small(labels=2), [mp.LoRA(rank=4), mp.Softmax()])
    fit(tuned, tasks.mood(), steps=10, progress=False)
    score = evaluate(tuned, tasks.mood())
    table = report(score, tasks.mood())
    precision, recall, f1, support = precision_recall_fscore_support(score.truth, score.predictions, zero_division=0.0)
    assert list(table.loc["sad"]) == pytest.approx([precision[0], recall[0], f1[0], support[0]], abs=6e-4)
    assert list(table.loc["glad"]) == pytest.approx([precision[1], recall[1], f1[1], support[1]], abs=6e-4)
    assert score.truth == tuple(tasks.mood().data["test"]["label"])
    right = sum(a == b for a, b in zip(score.truth, score.predictions, strict=True))
    assert score.accuracy == pytest.approx(right / 300)
    with pytest.raises(ValueError, match="class task"):
        report(evaluate(mp.attach(small(), mp.LoRA(rank=2)), tasks.plain(), n=8), tasks.plain())


def test_an_interrupt_leaves_a_usable_model_and_history():
    tuned = mp.attach(small(), mp.LoRA(rank=2))

    def press(step, history):
        if step == 3:
            raise KeyboardInterrupt

    history = fit(tuned, tasks.pirate(), steps=10, callback=press, progress=False)
    assert history.stopped == "interrupted" and len(history.losses) == 4
    assert math.isfinite(evaluate(tuned, tasks.pirate(), n=16).loss) and not tuned.training
    assert fit(tuned, tasks.pirate(), steps=2, progress=False).stopped == "finished"


def test_a_callback_can_stop_the_run_and_a_generator_can_be_closed():
    tuned = mp.attach(small(), mp.LoRA(rank=2))
    history = fit(tuned, tasks.pirate(), steps=10, callback=lambda step, _: step < 2, progress=False)
    assert history.stopped == "cancelled" and len(history.losses) == 3
    history = mp.learn.fit.History()
    run = training(tuned, tasks.pirate(), history, Plan(steps=10))
    next(run)
    assert tuned.training
    run.close()
    assert not tuned.training and all(p.grad is None for p in tuned.parameters())


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda tuned: tuned.merge(), "are merged; call unmerge"),
        (lambda tuned: tuned.detach(), "is detached"),
        (lambda tuned: tuned.use(), r"active adapters became \[\], and .* \['default'\]"),
        (lambda tuned: tuned.use("other"), r"active adapters became \['other'\]"),
        (lambda tuned: tuned.delete("default"), r"active adapters became \[\]"),
    ],
)
def test_a_callback_takes_nothing_away_from_the_optimizer(act, message):
    tuned = mp.attach(small(), mp.LoRA(rank=2))
    tuned.add("other", mp.LoRA(rank=2))
    before = weights(tuned.adapters["other"])
    with pytest.raises(ValueError, match=message):
        fit(tuned, tasks.pirate(), steps=3, callback=lambda *_: act(tuned), progress=False)
    assert not tuned.training and ("other" not in tuned.adapters or same(weights(tuned.adapters["other"]), before))


def test_a_callback_may_look_at_the_base_and_write():
    """AdaLoRA's schedule goes on, though each look leaves the model in eval mode."""

    def look(step, history):
        with tuned.disabled():
            seen.append(evaluate(tuned, tasks.pirate(), n=4).loss)
        tuned.eval()

    seen, heard = [], []
    tuned = mp.attach(small(), mp.AdaLoRA(rank=2, steps=4))
    tuned.stepped = lambda step=None: heard.append(step)
    fit(tuned, tasks.pirate(), steps=4, callback=look, progress=False)
    assert len(set(seen)) == 1 and len(heard) == 4


def test_a_loss_that_is_not_a_number_stops_with_advice_and_spoils_nothing():
    model = small()
    tuned = mp.attach(model, mp.LoRA(rank=2))
    with torch.no_grad():
        next(iter(tuned.adapters["default"].values())).B.fill_(float("nan"))
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    with pytest.warns(UserWarning, match="ten times smaller"):
        history = fit(tuned, tasks.pirate(), steps=5, lr=0.5, progress=False)
    assert history.stopped == "diverged" and history.losses == []
    assert all(torch.equal(p.nan_to_num(), before[n].nan_to_num()) for n, p in tuned.named_parameters())


def task_of(rows, kind="text"):
    data = Dataset.from_list(rows) if rows else Dataset.from_dict({"text": [], "label": []})
    return tasks.Task("mine", kind, DatasetDict(train=data, test=data))


LONG = task_of([{"text": "tom went to the lake . " * 40}])
BAD = [
    ({"steps": 0}, "steps must be"),
    ({"steps": 2.5}, "steps must be"),
    ({"lr": 0.0}, "lr must be"),
    ({"lr": float("nan")}, "lr must be"),
    ({"batch": 0}, "batch must be"),
    ({"lr": True}, "lr must be"),
    ({"seed": 1.5}, "seed must be"),
    ({"seed": "a"}, "seed must be"),
    ({"seed": 2**62}, "seed must be"),
    ({"schedule": "cosine"}, "schedule is"),
    ({"task": task_of([])}, "empty"),
    ({"task": LONG}, "at most 128"),
    ({"task": tasks.mood()}, "load it with labels"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD)
def test_bad_input_is_refused_before_anything_changes(change, sentence):
    tuned = mp.attach(small(), mp.LoRA(rank=2))
    before = weights(tuned)
    with pytest.raises(ValueError, match=sentence):
        fit(**{"model": tuned, "task": tasks.pirate(), "steps": 2, "progress": False} | change)
    assert same(weights(tuned), before) and not tuned.training


def test_models_and_tokenizers_that_do_not_fit_are_refused():
    tuned = mp.attach(small(), mp.LoRA(rank=2))
    bigger = build_tokenizer()
    bigger.add_tokens(["zebra", "giraffe"])
    with pytest.raises(ValueError, match="use the tokenizer that came with the model"):
        fit(tuned, tasks.pirate(), tokenizer=bigger, progress=False)
    with pytest.raises(ValueError, match="No parameter of the model requires a gradient"):
        fit(small().requires_grad_(False), tasks.pirate(), progress=False)
    with torch.device("meta"):
        shapes = build_model(len(bigger), hidden=32, layers=1, heads=2, ff=48)
    with pytest.raises(ValueError, match="meta device"):
        fit(shapes, tasks.pirate(), tokenizer=bigger, progress=False)
    plain = small()
    del plain.tokenizer
    with pytest.raises(ValueError, match="without a tokenizer"):
        fit(plain, tasks.pirate(), progress=False)
    with pytest.raises(ValueError, match="load it without labels"):
        fit(small(labels=2), tasks.pirate(), progress=False)
    three = task_of([{"text": "tom went", "label": 2}], "class")
    with pytest.raises(ValueError, match="3 classes"):
        fit(small(labels=2), three, progress=False)


def test_batches_use_every_row_once_an_epoch_and_hold_similar_lengths():
    lengths = [(7 * i) % 50 + 1 for i in range(128)]
    rows = order(lengths, 4, seed=0)
    epoch = [next(rows) for _ in range(32)]
    assert sorted(sum(epoch, [])) == list(range(128))
    padding = sum(max(lengths[i] for i in batch) * 4 - sum(lengths[i] for i in batch) for batch in epoch)
    assert padding < 0.15 * sum(lengths)
    again = order(lengths, 4, seed=0)
    assert [next(again) for _ in range(32)] == epoch
    few = order([3, 1], 16, seed=0)
    assert sorted(set(next(few))) == [0, 1]


def test_a_linear_schedule_rises_and_falls_to_nothing():
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self, *args):
            seen.append(self.param_groups[0]["lr"])
            return super().step(*args)

    tuned = mp.attach(small(), mp.LoRA(rank=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Spy)
        fit(tuned, tasks.pirate(), steps=20, lr=1.0e-3, schedule="linear", progress=False)
        fit(tuned, tasks.pirate(), steps=3, lr=1.0e-3, progress=False)
    assert seen[:4] == pytest.approx([0.5e-3, 1e-3, 1e-3, 17e-3 / 18])
    assert seen[18:20] == pytest.approx([2e-3 / 18, 1e-3 / 18]) and seen[20:] == [1e-3] * 3


def test_collate_pads_on_the_right_and_masks_the_padding():
    tokenizer = build_tokenizer()
    inputs = collate("text", [([1, 5, 2], [1, 5, 2]), ([1, 2], [1, 2])], tokenizer, "cpu")
    assert inputs["input_ids"].tolist() == [[1, 5, 2], [1, 2, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert inputs["labels"].tolist() == [[1, 5, 2], [1, 2, IGNORE]]


def test_peak_memory_counts_every_tensor_alive_once():
    held = torch.zeros(1000)  # 4,000 bytes
    with PeakMemory([held, held.view(10, 100)]) as memory:
        a = held + 1  # + 4,000
        b = a * 2  # + 4,000
        del a
        c = b.view(100, 10).T  # a view costs nothing
        d = c.contiguous()  # + 4,000
    assert memory.peak == 12_000 and memory.live == 12_000
    del b, c, d
    with PeakMemory() as memory:
        x = torch.ones(256, 256, requires_grad=True)  # 256 KiB
        y = (x * x).sum()
        y.backward()
    assert memory.peak >= 3 * 256 * 1024  # x, x·x or its gradient, and x.grad


def test_full_fine_tuning_needs_more_memory_than_lora():
    peaks = {}
    for name, method in (("full", mp.Full()), ("lora", mp.LoRA(rank=1, targets="attention"))):
        peaks[name] = fit(mp.attach(small(), method), tasks.forecast(), steps=2, batch=2, progress=False).peak_memory
    parameters = sum(p.numel() for p in small().parameters())
    assert peaks["full"] - peaks["lora"] > 3 * 4 * parameters * 0.5  # gradients and Adam's two moments, and more


def test_batches_are_those_that_fit_draws():
    model, task = small(), mp.world.flip()
    seen = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    tuned = mp.attach(model, mp.LoRA(rank=1))
    mp.fit(tuned, task, steps=3, batch=5, seed=4, progress=False)
    found = [batch["input_ids"] for batch in mp.batches(model, task, 3, size=5, seed=4)]
    assert len(found) == 3 and all(map(torch.equal, found, seen))


def test_fit_is_adam_on_its_batches_without_weight_decay():
    task, (fitted, by_hand) = mp.world.flip(), [mp.attach(small(), mp.Full()) for _ in range(2)]
    fit(fitted, task, steps=3, lr=1e-2, batch=5, seed=4, progress=False)
    optimizer = torch.optim.Adam([p for p in by_hand.parameters() if p.requires_grad], lr=1e-2)
    for inputs in mp.batches(by_hand, task, 3, size=5, seed=4):
        optimizer.zero_grad()
        by_hand(**inputs).loss.backward()
        optimizer.step()
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(fitted.state_dict()[name], value, atol=1e-6, rtol=0)


# -- bfloat16 ----------------------------------------------------------------------------------------------------------
def test_small_steps_in_bfloat16_add_up_in_the_masters():
    """At 1e-4 a step is rounded away nearly everywhere; its master is what float32's AdamW makes of the gradients."""
    from minipeft.learn.master import adamw

    torch.manual_seed(0)
    start = torch.randn(400).clamp_(min=0.5)
    p, reference, plain = (torch.nn.Parameter(start.to(t)) for t in (torch.bfloat16, torch.float32, torch.bfloat16))
    reference.data = start.bfloat16().float()
    optimizers = adamw([p], lr=1e-4), torch.optim.AdamW([reference], lr=1e-4), torch.optim.AdamW([plain], lr=1e-4)
    for _ in range(100):
        gradient = torch.randn(400).bfloat16() + 1
        p.grad, reference.grad, plain.grad = gradient, gradient.float(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(optimizers[0].masters[p], reference) and torch.equal(p, reference.bfloat16())
    moved = [(each.float() != start.bfloat16().float()).float().mean().item() for each in (p, plain)]
    assert moved[0] > 0.9 and moved[1] < 0.1, moved
    optimizers[0].zero_grad()
    assert p.grad is None and optimizers[0].masters[p].grad is None


def test_full_fine_tuning_in_bfloat16_learns_as_in_float32():
    task, found = tasks.pirate(train=64, test=8), {}
    for dtype in (torch.float32, torch.bfloat16):
        tuned = mp.attach(small().to(dtype), mp.Full())
        history = fit(tuned, task, steps=30, batch=8, lr=1e-3, progress=False)
        assert all(p.dtype == dtype for p in tuned.base.parameters())
        found[dtype] = history.losses[0] - sum(history.losses[-3:]) / 3
    assert found[torch.bfloat16] > 0.8 * found[torch.float32] > 0.1
