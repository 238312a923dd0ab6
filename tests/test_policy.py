"""Policy gradient: against closed forms, masks at the ends, the sampler, bad rewards, and a model that does improve."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

import minipeft as mp
from minipeft.learn.plan import Plan
from minipeft.learn.policy import group_relative, grpo_loss, improve, leave_one_out, reinforce_loss
from minipeft.learn.rollouts import Rollouts, divergence, log_probs, roll_out
from minipeft.world import rewards

FAST = Plan(steps=2, lr=1e-2, batch=4)


def brief():
    """A tiny model that writes at most 23 tokens, and prefers some words to others."""
    model = tiny.small()
    model.lm_head.weight.data *= 10
    model.config.max_position_embeddings = 24
    return model


def policy(**settings):
    return mp.attach(brief(), mp.LoRA(rank=2), **settings)


def letters(texts: list[str]) -> list[float]:
    return [len(text) / 10 for text in texts]


# the mathematics -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chances", [[0.3, 0.7], [0.05, 0.95], [0.5, 0.3, 0.2]])
def test_the_expected_gradient_is_the_analytic_one(chances):
    """All groups of two actions, weighted by their probability: E[∇loss] = −∇(p·R) of a softmax bandit, exactly."""
    z = torch.tensor(chances, dtype=torch.float64).log().requires_grad_()
    R = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[: len(chances)]
    log_p = z.log_softmax(0)
    n, expected = len(chances), torch.zeros(len(chances), dtype=torch.float64)
    for a in range(n):
        for b in range(n):
            advantages = leave_one_out(R[[a, b]][None]).flatten()
            loss = reinforce_loss(log_p[[a, b]][:, None], torch.ones(2, 1), advantages)
            expected += (log_p[a] + log_p[b]).exp().detach() * torch.autograd.grad(loss, z, retain_graph=True)[0]
    p = log_p.exp().detach()
    assert torch.allclose(expected, -p * (R - p @ R), atol=1e-12)


def test_the_kl_in_the_reward_gives_the_gradient_of_the_kl():
    """E[∇] with R' = R − β·log(π/base) is ∇ of −(E[R] − β·KL): also where the KL is what moves."""
    z = torch.tensor([0.4, -0.3, 0.1], dtype=torch.float64, requires_grad=True)
    base = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    R, beta = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64), 0.7
    log_p = z.log_softmax(0)
    expected = torch.zeros(3, dtype=torch.float64)
    for a in range(3):
        for b in range(3):
            pick = [a, b]
            worth = R[pick] - beta * (log_p.detach() - base)[pick]
            loss = reinforce_loss(log_p[pick][:, None], torch.ones(2, 1), leave_one_out(worth[None]).flatten())
            expected += (log_p[a] + log_p[b]).exp().detach() * torch.autograd.grad(loss, z, retain_graph=True)[0]
    p = log_p.exp()
    objective = -(p @ R - beta * (p * (log_p - base)).sum())
    assert torch.allclose(expected, torch.autograd.grad(objective, z)[0], atol=1e-12)


def test_advantages_by_hand():
    R = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    assert leave_one_out(R).tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]
    assert torch.allclose(group_relative(R)[0] * (7**0.5 + 1e-4), R[0] - 3)
    assert not group_relative(R)[1].any()
    assert leave_one_out(R[:1, :2]).tolist() == [[-1.0, 1.0]]


def test_the_clip_stops_the_gradient_on_one_side_only():
    old, base = torch.zeros(4, 1), torch.zeros(4, 1)
    log_p = torch.log(torch.tensor([[1.5], [0.5], [1.5], [0.5]])).requires_grad_()
    loss = grpo_loss(log_p, old, base, torch.ones(4, 1), torch.tensor([1.0, 1.0, -1.0, -1.0]), clip=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)
    assert log_p.grad.flatten().tolist() == pytest.approx([0.0, -0.5 / 4, 1.5 / 4, 0.0])


def test_what_is_masked_changes_nothing_and_each_text_weighs_the_same():
    generator = torch.Generator().manual_seed(0)
    log_p, old, base = (torch.randn(3, 5, generator=generator) for _ in range(3))
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0.0]])
    A = torch.tensor([1.0, -2.0, 3.0])
    other = [torch.where(mask.bool(), x, 9 + x) for x in (log_p, old, base)]
    for loss in (lambda *x: grpo_loss(*x, mask, A, 0.2, 0.5), lambda x, *_: reinforce_loss(x, mask, A)):
        assert loss(*other).item() == pytest.approx(loss(log_p, old, base).item())
    alone = [grpo_loss(*(x[i : i + 1] for x in (log_p, old, base, mask, A)), 0.2, 0.5).item() for i in range(3)]
    assert grpo_loss(log_p, old, base, mask, A, 0.2, 0.5).item() == pytest.approx(sum(alone) / 3)
    assert alone[2] == 0.0


def test_the_divergence_is_the_mean_of_what_is_sampled():
    """Exact over the next word, it has the mean of Σ log(π/base) over texts, which is KL(π ‖ base)."""
    tuned = policy(seed=1)
    tiny.randomise(tuned, scale=0.15)
    written = roll_out(tuned, ["tom"], 400, seed=0, length=7)
    with torch.no_grad():
        log_p, every = log_probs(tuned, written)
        with tuned.disabled():
            base, base_every = log_probs(tuned, written)
    exact = divergence(every, base_every, written.mask)
    sampled = ((log_p - base) * written.mask).sum(1)
    assert (exact >= 0).all() and exact.mean() > 0.1
    error = sampled.std().item() / 20
    assert exact.mean().item() == pytest.approx(sampled.mean().item(), abs=4 * error)
    assert exact.std() < sampled.std()


# writing -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pad_is_end", [False, True])
def test_masks_hold_what_the_model_wrote(pad_is_end):
    model = brief()
    model.lm_head.weight.data[model.tokenizer.eos_token_id] *= 4  # so that some texts end early
    if pad_is_end:
        model.config.pad_token_id = model.tokenizer.eos_token_id
    end = model.tokenizer.eos_token_id
    prompts = ["on sunday", "tom walked to the river ."]
    written = roll_out(model, prompts, 16, seed=1, length=20)
    assert 0 < written.ended.float().mean() < 1
    lengths = [len(model.tokenizer(p).input_ids) for p in prompts]
    for i, row in enumerate(written.ids.tolist()):
        n, total = lengths[i // 16], int(written.attention[i].sum())
        own = written.mask[i].nonzero().flatten().tolist()
        assert own == list(range(n - 1, total - 1))  # from the token that predicts the first new one
        assert written.texts[i].startswith(prompts[i // 16])
        new = row[n:total]
        assert (new[-1] == end and new.count(end) == 1) if written.ended[i] else (total == 20 and end not in new)
    # the sampler's log-probabilities are the model's, in the other layout too
    log_p = log_probs(model, written)[0]
    assert ((log_p - written.log_p).abs() * written.mask).max() < 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_other_architectures_write_and_learn(family):
    tuned = mp.attach(tiny.MODELS[family](), mp.LoRA(rank=2))
    tokenizer = tiny.small().tokenizer  # whose ids beyond the model's are never written
    trail = improve(tuned, letters, plan=FAST, tokenizer=tokenizer, progress=False) if family == "gpt2" else None
    written = roll_out(tuned, [""], 3, 0, tokenizer, length=9)
    assert written.ids.shape[1] <= 9 and (trail is None or trail.stopped == "finished")


def test_the_same_seed_writes_the_same_and_leaves_the_global_seed_alone():
    model = tiny.small()
    with tiny.untouched(model):
        one, two, other = (roll_out(model, [""], 2, seed, length=9).texts for seed in (0, 0, 1))
    assert one == two != other


@pytest.mark.parametrize("method", [mp.PromptTuning(3), mp.PrefixTuning(2), mp.Adapter(4), mp.BitFit(), mp.DoRA(2)])
def test_whatever_is_tuned_can_be_improved(method):
    """The sampler is checked against the loss at every step, also with a prompt before the text."""
    tuned = mp.attach(brief(), method)
    before = tiny.snapshot(tuned.adapters)
    assert improve(tuned, letters, ["tom", "anna ran"], FAST, progress=False).stopped == "finished"
    assert not tiny.same(tiny.snapshot(tuned.adapters), before)


@pytest.mark.parametrize("family", ["t5", "bert", "classifier"])
def test_what_writes_nothing_is_refused(family):
    with pytest.raises(ValueError, match="Only a causal language model"):
        roll_out(tiny.MODELS[family](), ["tom"], 2, 0, tiny.small().tokenizer)


def test_prompts_that_cannot_be_gone_on_from():
    model = tiny.small()
    with pytest.raises(ValueError, match="leaves no room"):
        roll_out(model, ["tom " * 10], 2, 0, length=8)
    model.tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match="has no tokens"):
        roll_out(model, [""], 2, 0)


# training ------------------------------------------------------------------------------------------------------------
def one_word():
    """A policy that writes a single word after "on"."""
    model = brief()
    model.config.max_position_embeddings = 4
    return mp.attach(model, mp.LoRA(rank=2))


def early(texts: list[str]) -> list[float]:
    """1 for a last word from the first half of the alphabet."""
    return [float(text.split()[-1] < "m") for text in texts]


@pytest.mark.parametrize("settings", [{}, {"rule": "grpo"}, {"rule": "grpo", "epochs": 3}, {"beta": 0.0}])
def test_a_simple_reward_rises(settings):
    trail = improve(one_word(), early, ["on"], Plan(20, 2e-2, 64), progress=False, **({"beta": 0.05} | settings))
    assert trail.stopped == "finished" and len(trail.rewards) == len(trail.kl) == 20
    assert sum(trail.rewards[-3:]) / 3 > sum(trail.rewards[:3]) / 3 + 0.2
    assert trail.kl[0] == pytest.approx(0, abs=1e-6) and trail.kl[-1] > 0.05


def test_the_base_is_never_moved_and_the_mode_is_put_back():
    model = brief()
    before = tiny.snapshot(model)
    tuned = mp.attach(model, mp.LoRA(rank=2)).train()
    improve(tuned, letters, plan=FAST, progress=False)
    assert tuned.training and any(d.any() for d in tuned.deltas().values())
    assert all(p.grad is None for p in tuned.parameters())
    assert tiny.same(tiny.snapshot(tuned.detach()), before)


def test_the_same_seed_gives_the_same_run():
    trails = [improve(policy(), letters, plan=Plan(2, 1e-2, 4, seed=s), progress=False) for s in (0, 0, 1)]
    assert trails[0].rewards == trails[1].rewards != trails[2].rewards and trails[0].kl == trails[1].kl


def test_an_infinite_price_keeps_the_base_exactly():
    tuned = policy()
    ids = tiny.batch(tuned)["input_ids"]
    with tuned.disabled():
        base = tuned(input_ids=ids).logits
    trail = improve(tuned, letters, plan=FAST, beta=math.inf, progress=False)
    assert trail.stopped == "held" and torch.equal(tuned(input_ids=ids).logits, base)
    tiny.randomise(tuned)
    with pytest.raises(ValueError, match="leaves only the base"):
        improve(tuned, letters, beta=math.inf)


@pytest.mark.parametrize("rule", ["reinforce", "grpo"])
def test_a_high_price_leads_back_to_the_base(rule):
    ends = []
    for beta in (0.0, 1e3):
        tuned = one_word()
        tiny.randomise(tuned, scale=0.2)
        trail = improve(tuned, early, ["on"], Plan(16, 1e-2, 64), beta=beta, rule=rule, progress=False)
        ends.append(trail.kl[-1] / trail.kl[0])
    assert ends[1] < 0.7 < ends[0]


def test_a_run_can_be_stopped():
    seen = []

    def callback(step, trail, rollouts):
        assert isinstance(rollouts, Rollouts) and len(rollouts.texts) == 4
        seen.append(step)
        return step < 1

    trail = improve(policy(), letters, plan=Plan(5, 1e-2, 4), callback=callback, progress=False)
    assert seen == [0, 1] and trail.stopped == "cancelled" and len(trail.rewards) == 2

    def interrupt(*_):
        raise KeyboardInterrupt

    assert improve(policy(), letters, plan=FAST, callback=interrupt, progress=False).stopped == "interrupted"


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (lambda texts: [1.0] * len(texts), "All 4 texts have the reward 1"),
        (lambda texts: [0.0, math.nan, 0.0, 1.0], "reward of text 1 is nan at step 0"),
        (lambda texts: [0.0, 1.0, math.inf, 1.0], "reward of text 2 is inf"),
        (lambda texts: [0.0, 1.0], "numbers for 4 texts"),
        (lambda texts: 1.0, "numbers for 4 texts"),
    ],
)
def test_bad_rewards_change_nothing(reward, said):
    tuned = policy()
    before = {name: p.detach().clone() for name, p in tuned.named_parameters()}
    with pytest.raises(ValueError, match=said):
        improve(tuned, reward, plan=FAST, progress=False)
    assert all(torch.equal(p, before[name]) for name, p in tuned.named_parameters())


def test_a_reward_that_breaks_later_leaves_the_last_good_step():
    calls, kept = [], []

    def reward(texts):
        calls.append(1)
        return letters(texts) if len(calls) < 3 else [math.nan] * len(texts)

    tuned = policy()
    with pytest.raises(ValueError, match="at step 2, before which the run stopped"):
        improve(tuned, reward, plan=Plan(5, 1e-2, 4), progress=False, callback=lambda s, t, r: kept.append(t))
    assert len(kept[0].rewards) == 2 and all(p.isfinite().all() for p in tuned.parameters())


def test_far_too_large_a_step_is_said_in_a_sentence():
    with pytest.raises(ValueError, match="probabilities are no numbers"):
        improve(policy(), letters, plan=Plan(3, 1e30, 4), progress=False)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"plan": Plan(2, 1e-2, 5), "prompts": ["tom", "anna"]}, "no equal groups"),
        ({"plan": Plan(2, 1e-2, 2), "prompts": ["tom", "anna"]}, "no equal groups"),
        ({"prompts": []}, "prompts is a list"),
        ({"prompts": "tom"}, "prompts is a list"),
        ({"beta": -1.0}, "beta is the price"),
        ({"beta": math.nan}, "beta is the price"),
        ({"rule": "ppo"}, 'rule is "reinforce" or "grpo"'),
        ({"epochs": 2}, "REINFORCE takes one step"),
    ],
)
def test_settings_that_do_not_fit(settings, said):
    with pytest.raises(ValueError, match=said):
        improve(policy(), letters, **({"plan": FAST} | settings), progress=False)


def test_who_may_be_improved():
    with pytest.raises(TypeError, match="needs a Tuned"):
        improve(tiny.small(), letters)
    tuned = policy()
    with tuned.disabled(), pytest.raises(ValueError, match="disabled"):
        improve(tuned, letters)


def test_the_sampler_must_be_the_policy():
    """A generation_config that leaves words out would train another model than the one that writes."""
    tuned = policy()
    tuned.base.generation_config.min_p = 0.5
    with pytest.raises(ValueError, match="sampled and what is trained differ"):
        improve(tuned, letters, plan=FAST, progress=False)


@pytest.mark.slow
def test_the_pocket_model_learns_to_end_happily_and_stays_readable():
    tuned = mp.attach(mp.load("pocket")[0], mp.LoRA(rank=8))
    improve(tuned, rewards.each(rewards.happy), plan=Plan(14, 1e-2, 24), progress=False)
    written = roll_out(tuned, [""], 64, 99)
    assert sum(map(rewards.happy, written.texts)) / 64 > 0.75  # 0.54 before
    assert sum(map(rewards.parses, written.texts)) / 64 > 0.6  # 0.9 before


@pytest.mark.parametrize("given", [[None] * 4, ["good"] * 4, None])
def test_a_reward_that_gives_no_numbers_is_told_what_to_give(given):
    with pytest.raises(TypeError, match="takes 4 texts at once"):
        improve(policy(), lambda texts: given, plan=FAST, progress=False)
