"""What shows itself in a notebook, runs drawn beside each other, and methods compared on a task of one's own."""

from __future__ import annotations

import html
import math
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch

import minipeft as mp
from minipeft.learn.fit import History, Score
from minipeft.learn.protocol import SEARCH_SEED
from minipeft.learn.trials import with_validation

TEXTS = [
    f"on {day} , it was {word} ." for day in ("sunday", "monday", "friday") for word in ("cold", "warm", "dry", "wet")
]


def cells(page: str) -> list[str]:
    assert "color" not in page and "background" not in page, "the page's theme says which colours"
    return [html.unescape(cell) for cell in re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", page)]


def test_what_is_adapted_shows_itself():
    model = tiny.llama()
    tuned = mp.attach(model, mp.LoRA(rank=2))
    tuned.add("<b>other</b>".replace(".", ""), [mp.LoRA(rank=1, targets="attention"), mp.BitFit()])
    tuned.use({"default": 0.5})
    count = tuned.count()
    shown = cells(tuned._repr_html_())
    assert f"{count.trainable:,}" in shown and f"{100 * count.share:.3g} %" in shown and "0.5" in shown
    assert "<b>other</b>" in shown and "<b>" not in tuned._repr_html_() and shown.count("no") == 1
    assert str(model.num_parameters()) not in shown
    assert cells(count._repr_html_()) == [
        *("trained", f"{count.trainable:,}", "in all", f"{count.total:,}", "share", f"{100 * count.share:.3g} %")
    ]
    tuned.use("default")
    tuned.merge()
    assert "merged" in cells(tuned._repr_html_())
    tuned.detach()
    assert cells(tuned._repr_html_())[:2] == ["adapter", "method"]


def test_runs_and_scores_show_themselves():
    history = History([3.0, 2.0, 1.0], [0.1, 0.2, 0.3], 90, 2**21, "finished")
    assert {"3", "3.000 nats a token", "2.000 nats a token", "90", "2.0 MiB"} <= set(cells(history._repr_html_()))
    assert cells(History()._repr_html_()) == ["steps", "0"] and "before the first step" in repr(History())
    assert cells(Score(1.25, 1000, 0.5)._repr_html_()) == [
        *("loss", "1.250 nats a token", "accuracy", "0.500", "rows", "1,000")
    ]
    for one in (history, Score(1.25, 10)):
        assert "\n" not in repr(one)


def test_a_run_beside_a_run():
    a, b = History([3.0, 2.0, 1.0], [1, 2, 3]), History([3.0, 2.0], [1, 2])
    picture = a.plot(b, labels=["<LoRA>", "full"], floor=0.5)
    axes = picture.figure.axes[0]
    assert axes.get_title() == "The loss ends at 2.000 with <LoRA>, at 2.500 with full"
    assert {line.get_linestyle() for line in axes.lines if line.get_linewidth() == 2} == {"-", "--"}, (
        "told apart unseen"
    )
    assert "full from 3.000 to 2.500 in 2 steps" in picture.words and "floor is 0.500" in picture.words
    page = picture._repr_html_()
    assert f'alt="{html.escape(picture.words, quote=True)}"' in page and "data:image/png;base64," in page
    assert a.plot().words.startswith("Loss in nats a token by step") and "\n" not in repr(a.plot())
    for runs, settings, said in (
        ((b,), dict(labels=["one"]), "2 runs and 1 labels"),
        ((History(),), {}, "has no step to draw"),
        ((b,), dict(labels=["x", "x"]), "a label of its own"),
        ((b,) * 5, {}, "up to 5 runs"),
    ):
        with pytest.raises(ValueError, match=said):
            a.plot(*runs, **settings)


@pytest.fixture(scope="module")
def pocket():
    torch.set_num_threads(1)
    return mp.load("pocket")[0]


def test_methods_compared_on_texts_of_ones_own(pocket):
    """A rate inside its grid for each, chosen without the test rows or the seeds that report; the base untouched."""
    before = {name: p.clone() for name, p in pocket.named_parameters()}
    methods = {
        "LoRA": mp.LoRA(rank=1, targets=["q_proj", "v_proj"]),
        "both": [mp.LoRA(rank=1, targets=["o_proj"]), mp.BitFit()],
    }
    how = dict(steps=2, batch=4, rates=[1e-2], seeds=[0, 1], progress=False)
    found = mp.sweep(pocket, TEXTS, methods, **how)
    for name, method in methods.items():
        rates, best = list(found.searched[name]), found.rates[name]
        assert rates[0] < best < rates[-1] and best == min(rates, key=found.searched[name].get)
        runs = [run for run in found.runs if run["method"] == name]
        assert [run["seed"] for run in runs] == [0, 1] and {run["lr"] for run in runs} == {best}
        assert runs[0]["loss"] != runs[1]["loss"] and all(run["stopped"] == "finished" for run in runs)
        task = with_validation(mp.learn.rows.as_task(TEXTS))
        chosen = SEARCH_SEED, "validation", found.searched[name][best]
        for seed, split, loss in ((1, "test", runs[1]["loss"]), chosen):
            tuned = mp.attach(pocket, method, seed=seed)
            mp.fit(tuned, task, steps=2, batch=4, lr=best, seed=seed, progress=False)
            assert math.isclose(mp.evaluate(tuned, task, split).loss, loss, rel_tol=1e-6)
            tuned.detach()
    assert all(torch.equal(before[name], p) for name, p in pocket.named_parameters())
    shown = cells(found._repr_html_())
    assert shown[:2] == ["method", "numbers"] and shown[5] in methods and "\n" not in repr(found)
    assert list(found.frame().columns) == ["method", "lr", "seed", "loss", "accuracy", "trainable", "stopped"]


class Pickling(ThreadPoolExecutor):
    """Hands over what a process or another machine would get."""

    def submit(self, call, *args):
        return super().submit(*pickle.loads(pickle.dumps((call, *args))))


def test_an_executor_gives_the_same(pocket):
    methods = {"LoRA": mp.LoRA(rank=1, targets=["q_proj"])}
    how = dict(steps=2, batch=4, rates=[1e-2], seeds=[0, 1], progress=False)
    with Pickling(1) as executor:
        assert mp.sweep(pocket, TEXTS, methods, executor=executor, **how) == mp.sweep(pocket, TEXTS, methods, **how)


def test_a_sweep_that_cannot_be_says_so(pocket):
    lora = {"LoRA": mp.LoRA(rank=1)}
    for kind, said, task, methods, more in (
        (TypeError, "give names", TEXTS, mp.LoRA(rank=1), {}),
        (TypeError, "give names", TEXTS, {}, {}),
        (ValueError, "chooses the rate", TEXTS, lora, dict(seeds=[SEARCH_SEED])),
        (ValueError, "chooses the rate", TEXTS, lora, dict(seeds=[])),
        (ValueError, "half decades", TEXTS, lora, dict(rates=[2e-3], steps=1)),
        (ValueError, "none can be held out", TEXTS[:1], lora, {}),
        (ValueError, "no layer matches", TEXTS, {"x": mp.LoRA(rank=1, targets=["nope"])}, {}),
    ):
        with pytest.raises(kind, match=said):
            mp.sweep(pocket, task, methods, progress=False, **more)
    task = with_validation(mp.learn.rows.as_task(TEXTS))
    assert (len(task.data["train"]), len(task.data["validation"])) == (10, 2)
    assert not set(task.data["train"]["text"]) & set(task.data["validation"]["text"])
