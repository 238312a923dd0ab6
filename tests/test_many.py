"""Many runs at once: each is the run that it would be alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import tiny
import torch

import minipeft as mp
from minipeft.attach import attach
from minipeft.learn.fit import fit
from minipeft.learn.many import fit_many
from minipeft.methods.dora import DoRA
from minipeft.methods.lora import LoRA

STEPS = 10


def texts(n: int = 40) -> list[str]:
    import random

    rng, words = random.Random(0), ["anna", "went", "to", "the", "forest", "dog", "saw", "a", "red", "hat", "."]
    return [" ".join(rng.choice(words) for _ in range(rng.randrange(2, 12))) for _ in range(n)]


def alone(model, task, method, lr, start, **how):
    tuned = attach(model, method, seed=start)
    return tuned, fit(tuned, task, steps=STEPS, lr=lr, progress=False, **how)


def numbers(layers) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in layers.named_parameters()}


RUNS = [
    (LoRA(rank=1, gamma=0.5), 1e-2, 0),
    (LoRA(rank=4), 3e-3, 7),
    (LoRA(rank=4, lr_ratio=4.0), 3e-3, 7),
    (LoRA(rank=2, alpha=3, rank_stabilized=True, targets=["q_proj", "down_proj"], init="orthogonal"), 3e-2, 1),
    (LoRA(rank=3, targets=["embed_tokens", "v_proj"]), 1e-2, 2),
]


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_each_run_equals_its_own_fit(schedule):
    """Ranks, γ, rates, seeds, targets and starts differ; losses and numbers agree to 1e-5 after ten steps."""
    methods, rates, starts = zip(*RUNS, strict=True)
    how = {"batch": 4, "seed": 3, "schedule": schedule}
    tuned, histories = fit_many(
        tiny.small(), methods, texts(), steps=STEPS, lr=rates, starts=starts, progress=False, **how
    )
    assert tuned.active == ("run0",) and list(tuned.adapters) == [f"run{k}" for k in range(len(RUNS))]
    for k, run in enumerate(RUNS):
        single, history = alone(tiny.small(), texts(), *run, **how)
        assert histories[k].losses == pytest.approx(history.losses, abs=1e-5)
        assert (histories[k].tokens, histories[k].stopped) == (history.tokens, "finished")
        mine, its = numbers(tuned.adapters[f"run{k}"]), numbers(single.adapters["default"])
        start = numbers(attach(tiny.small(), run[0], seed=run[2]).adapters["default"])
        assert mine.keys() == its.keys()
        for name in its:
            assert (mine[name] - its[name]).abs().max() < 1e-5, name
        assert max((its[name] - start[name]).abs().max() for name in its) > 1e-3, "it learned"


@pytest.mark.parametrize("family", ["gpt2", "classifier", "t5"])
def test_other_architectures(family):
    """Conv1D with slices of a fused projection, a classifier, an encoder and decoder; the last in float64, for in
    float32 it moves numbers whose gradients are little but rounding, by steps of Adam that are not little."""
    exact = 1e-9 if family == "t5" else 1e-5
    from datasets import Dataset

    data = {
        "gpt2": texts(),
        "classifier": Dataset.from_dict({"text": texts(), "label": [i % 3 for i in range(40)]}),
        "t5": Dataset.from_dict({"prompt": texts(), "completion": texts()[::-1]}),
    }[family]
    methods = {
        "gpt2": [LoRA(rank=2, targets=["c_attn[0:16]", "c_attn[32:48]"]), LoRA(rank=1, targets=["c_attn", "c_proj"])],
        "classifier": [LoRA(rank=2, targets=["query", "value"]), LoRA(rank=1, targets=["query"])],
        "t5": [LoRA(rank=2), LoRA(rank=1, gamma=1.0)],
    }[family]

    def model():
        made = tiny.MODELS[family]()
        made = made.double() if family == "t5" else made
        words = sorted({word for text in texts() for word in text.split()})
        made.tokenizer = tokenizer_of(words)
        return made

    tuned, histories = fit_many(model(), methods, data, steps=STEPS, lr=1e-2, batch=4, progress=False)
    for k, method in enumerate(methods):
        single, history = alone(model(), data, method, 1e-2, 0, batch=4)
        assert histories[k].losses == pytest.approx(history.losses, abs=exact)
        mine, its = numbers(tuned.adapters[f"run{k}"]), numbers(single.adapters["default"])
        assert all((mine[name] - its[name]).abs().max() < exact for name in its)


def tokenizer_of(words):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<bos>", "<eos>", *words])}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


def test_one_run_and_one_row():
    (tuned, (history,)), method = fit_many(tiny.small(), [LoRA(rank=2)], ["anna"], 3, batch=1, progress=False), LoRA(2)
    own = fit(attach(tiny.small(), method), ["anna"], steps=3, batch=1, progress=False)
    assert history.losses == pytest.approx(own.losses, abs=1e-5) and tuned.count().trainable


def test_a_run_that_diverges_leaves_the_others_alone():
    rates = [1e-2, 1e30, 3e-3]
    with pytest.warns(UserWarning, match="run 1 became"):
        tuned, histories = fit_many(tiny.small(), LoRA(rank=2), texts(), steps=STEPS, lr=rates, batch=4, progress=False)
    assert [history.stopped for history in histories] == ["finished", "diverged", "finished"]
    assert len(histories[1].losses) < STEPS
    for k in (0, 2):
        single, history = alone(tiny.small(), texts(), LoRA(rank=2), rates[k], 0, batch=4)
        assert histories[k].losses == pytest.approx(history.losses, abs=1e-5)
        mine, its = numbers(tuned.adapters[f"run{k}"]), numbers(single.adapters["default"])
        assert all((mine[name] - its[name]).abs().max() < 1e-5 for name in its)


def test_afterwards_the_runs_are_ordinary_adapters(tmp_path):
    model = tiny.small()
    before, hooks = tiny.snapshot(model), tiny.hooks(model)
    tuned, histories = fit_many(model, [LoRA(rank=2), LoRA(rank=1)], texts(), steps=3, batch=4, progress=False)
    assert tiny.same(tiny.snapshot(model), before) and not tuned.training
    for name in tuned.adapters:
        tuned.use(name)
        score = mp.evaluate(tuned, texts())
        tuned.save(tmp_path / name)
        assert mp.evaluate(mp.load_adapter(tiny.small(), tmp_path / name), texts()).loss == score.loss
        assert math.isfinite(score.loss) and all(p.grad is None for p in tuned.parameters())
    assert tiny.hooks(tuned.detach()) == hooks


REFUSED = [
    ({"methods": LoRA(rank=2)}, "got none"),
    ({"methods": []}, "got methods 0"),
    ({"methods": [LoRA(rank=2)] * 2, "lr": [1e-2] * 3}, "methods 2, lr 3"),
    ({"methods": [LoRA(rank=2), DoRA(rank=2)]}, "got DoRA"),
    ({"methods": [LoRA(rank=2, dropout=0.1)]}, "use dropout=0"),
    ({"methods": [LoRA(rank=2, init="pissa")]}, "only plain LoRA layers"),
    ({"methods": [LoRA(rank=2), LoRA(rank=99)]}, "rank"),
    ({"methods": [LoRA(rank=2), LoRA(targets=["nowhere"])]}, "nowhere"),
    ({"methods": [LoRA(rank=2)], "lr": math.nan}, "lr must be"),
    ({"methods": [LoRA(rank=2)], "steps": 0}, "steps must be"),
    ({"methods": [LoRA(rank=2)], "task": [" "]}, "row 0"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_what_cannot_run_together_is_refused(case):
    arguments, message = REFUSED[case]
    with tiny.untouched(model := tiny.small()), pytest.raises(ValueError, match=message):
        fit_many(model, **({"task": texts()} | arguments), progress=False)


def test_a_loss_of_its_own_is_noticed():
    class Doubled(type(tiny.small())):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            return dataclasses.replace(out, loss=2 * out.loss) if out.loss is not None else out

    model = tiny.small()
    model.__class__ = Doubled
    with pytest.raises(ValueError, match="another loss"):
        fit_many(model, [LoRA(rank=2)], texts(), steps=2, batch=4, progress=False)
