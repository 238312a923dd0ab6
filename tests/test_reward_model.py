"""The reward model: Bradley and Terry's loss against logistic regression, a rater recovered, files, bad input."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch import nn

import minipeft as mp
from minipeft.learn.plan import Plan
from minipeft.learn.reward import (
    Pair,
    RewardModel,
    agreement,
    calibration,
    check_pairs,
    fit_reward,
    preference_loss,
    read_pairs,
    renamed,
    simulate,
    write_pairs,
)
from minipeft.world import corpus, rewards


def drafts(n: int, seed: int) -> list[tuple[str, str, str]]:
    texts = [t.text for t in corpus.stories().texts(2 * n, seed)]
    return [("", *texts[i : i + 2]) for i in range(0, 2 * n, 2)]


def test_the_loss_and_its_gradient_by_hand():
    chosen = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    loss = preference_loss(chosen, rejected)
    loss.backward()
    odds = [1.0, -3.0, 0.0]
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-d)) for d in odds) / 3)
    # ∂/∂r(chosen) = −(1 − σ(d)) / n, and the other way round
    assert chosen.grad.tolist() == pytest.approx([-1 / (1 + math.exp(d)) / 3 for d in odds])
    assert torch.equal(chosen.grad, -rejected.grad)
    assert preference_loss(torch.tensor([-1e4]), torch.tensor([1e4])).item() == pytest.approx(2e4)  # no underflow


def test_the_least_loss_is_logistic_regression_of_score_differences():
    """Bradley–Terry over linear scores is logistic regression without intercept: scikit-learn's is the oracle."""
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 400, 3, generator=generator, dtype=torch.float64)
    w = torch.tensor([1.5, -0.5, 0.8], dtype=torch.float64)
    better = torch.rand(400, generator=generator, dtype=torch.float64) < ((first - second) @ w).sigmoid()
    mine = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([mine], max_iter=200, tolerance_grad=1e-10)

    def loss():
        optimizer.zero_grad()
        chosen = torch.where(better[:, None], first, second) @ mine
        rejected = torch.where(better[:, None], second, first) @ mine
        value = preference_loss(chosen, rejected)
        value.backward()
        return value

    optimizer.step(loss)
    theirs = LogisticRegression(C=1e12, fit_intercept=False, tol=1e-10).fit((first - second).numpy(), better.numpy())
    assert mine.tolist() == pytest.approx(theirs.coef_[0].tolist(), abs=1e-4)


def test_before_training_every_pair_is_a_coin_toss_and_the_model_is_untouched():
    model = tiny.small()
    with tiny.untouched(model):
        judge = RewardModel(model)
        assert judge.score([t.text for t in corpus.stories().texts(3, 0)]) == [0.0, 0.0, 0.0]
    assert judge.score([]) == []


def test_a_score_does_not_depend_on_the_other_rows():
    """The end is read by the row's own length: beside longer texts, and where padding is the end mark itself."""
    model = tiny.small()
    model.config.pad_token_id = model.tokenizer.eos_token_id
    judge = RewardModel(model)
    nn.init.normal_(judge.w)
    texts = [t.text for t in corpus.stories().texts(5, 0)] + ["tom", ""]
    alone = [judge.score([text])[0] for text in texts]
    assert judge.score(texts) == pytest.approx(alone, abs=1e-5)
    assert len({round(each, 4) for each in alone}) == len(texts)


@pytest.mark.parametrize("family", ["gpt2", "llama", "classifier"])
def test_other_architectures(family):
    model = tiny.MODELS[family]()
    judge = RewardModel(model, mp.LoRA(rank=2), tokenizer=tiny.small().tokenizer)
    nn.init.normal_(judge.w)
    rows = [[1, 5, 7, 2], [1, 2], [1, 9, 9, 9, 9, 2]]
    assert judge(rows).tolist() == pytest.approx([judge([row])[0].item() for row in rows], abs=1e-5)


@pytest.mark.slow
def test_a_simulated_rater_is_recovered_and_the_noise_shows_in_the_calibration():
    model, _ = mp.load("pocket")
    judge, losses = fit_reward(model, simulate(rewards.happy, drafts(260, 1))[:100], Plan(30, 3e-3, 12))
    held_out = simulate(rewards.happy, drafts(240, 2))
    assert losses[0] == pytest.approx(math.log(2)) and losses[-1] < 0.3
    assert agreement(judge, held_out) > 0.9
    predicted, observed = calibration(judge, held_out, bins=4)
    assert predicted == sorted(predicted) and observed[0] < 0.2 and observed[-1] > 0.8


def test_the_same_seed_gives_the_same_model():
    pairs = simulate(rewards.happy, drafts(20, 1))
    runs = [fit_reward(tiny.small(), pairs, Plan(3, 1e-2, 4, seed=seed)) for seed in (0, 0, 1)]
    assert runs[0][1] == runs[1][1] != runs[2][1]
    text = [pairs[0].first]
    assert runs[0][0].score(text) == runs[1][0].score(text) != runs[2][0].score(text)


def test_noise_is_the_share_of_wrong_answers():
    texts = drafts(600, 3)
    clean, noisy = (simulate(rewards.happy, texts, noise, seed=4) for noise in (0.0, 0.2))
    wrong = sum(a.better != b.better for a, b in zip(clean, noisy, strict=True)) / len(clean)
    assert wrong == pytest.approx(0.2, abs=0.06)
    assert all(rewards.happy(p.ranked[0]) > rewards.happy(p.ranked[1]) for p in clean)
    assert {p.better for p in clean} == {"first", "second"}
    assert len(simulate(rewards.happy, texts, ties=True)) == 600 > len(clean)


def test_pairs_are_read_as_they_were_written(tmp_path):
    pairs = [Pair("on sunday , tom", "felt happy .", 'said , "\n" .', "first"), Pair("", "ä", "b", "tie")]
    write_pairs(pairs, tmp_path / "pairs.jsonl")
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs
    assert len((tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", "{}", '{"prompt": "", "first": "a", "second": "b", "better": "both"}',
             '{"prompt": "", "first": 1, "second": "b", "better": "tie"}']
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path, line):
    write_pairs([Pair("", "a", "b", "tie")], tmp_path / "p")
    (tmp_path / "p").write_text((tmp_path / "p").read_text() + line + "\n")
    with pytest.raises(ValueError, match="Line 2 of .* is no pair"):
        read_pairs(tmp_path / "p")


def test_a_rename_keeps_the_preference_and_the_grammar():
    pair = simulate(rewards.happy, drafts(10, 1))[0]
    other = renamed(pair, 3)
    assert other != pair and other.better == pair.better and renamed(pair, 3) == other
    for a, b in zip(pair.texts, other.texts, strict=True):
        assert rewards.parses(b) and rewards.happy(a) == rewards.happy(b)
        assert [w for w in a.split() if not w.isalpha()] == [w for w in b.split() if not w.isalpha()]


TIE, SAME = Pair("", "a", "b", "tie"), Pair("", "a b", "a  b", "first")


@pytest.mark.parametrize(
    ("pairs", "said"), [([], "no pairs"), ([TIE] * 4, "All 4 pairs are ties"), ([SAME], "pair 0 are the same")]
)
def test_pairs_that_say_nothing(pairs, said):
    model = tiny.small()
    with tiny.untouched(model), pytest.raises(ValueError, match=said):
        fit_reward(model, pairs)


def test_always_the_same_place_is_warned_of():
    pairs = [Pair("", f"a {i}", f"b {i}", "first") for i in range(8)]
    with pytest.warns(UserWarning, match="All 8 pairs prefer the first text"):
        assert check_pairs([*pairs, TIE]) == pairs


def test_too_long_a_text_and_a_loss_that_is_no_number():
    model = tiny.small()
    with pytest.raises(ValueError, match="at most 128"):
        fit_reward(model, [Pair("", "tom " * 200, "anna", "first")])
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="nan at step 0: use a learning rate below"):
        fit_reward(model, [Pair("", "tom", "anna", "first")])


def test_noise_that_is_none():
    with pytest.raises(ValueError, match="noise is the share"):
        simulate(rewards.happy, drafts(2, 0), noise=0.5)


def test_no_number_is_never_an_opinion():
    """A NaN compares as "not larger": it would silently prefer the second text, and be counted as wrong."""
    with pytest.raises(ValueError, match="reward of 'b' is no number"):
        simulate(lambda text: math.nan if text == "b" else 1.0, [("", "a", "b")])
    model = RewardModel(tiny.small())
    model.w.data.fill_(math.nan)
    with pytest.raises(ValueError, match="score of 'tom' is no number"):
        agreement(model, [Pair("", "tom", "anna", "first")])
