"""The losses of feedback against Hugging Face trl's own code: the same pairs and rollouts, the same loss and gradients.

trl's trainers are not constructed, which would load models and data; their loss methods are called on what they need,
over trl's own layout: prompts padded on the left, completions on the right.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import tiny
import torch

import minipeft as mp
from minipeft.learn.policy import group_relative, grpo_loss, leave_one_out, reinforce_loss
from minipeft.learn.reward import RewardModel, preference_loss
from minipeft.learn.rollouts import log_probs, roll_out

trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl compares the losses of feedback with it")
CLIP, BETA, GROUP, PROMPTS = 0.2, 0.3, 4, ("on sunday", "tom walked to the river . the sun")


@pytest.fixture(scope="module")
def rollouts():
    """Two prompts of unequal length, some texts cut off, of a model whose adapter has an effect; and the model."""
    model = tiny.small().double()  # so that rounding hides nothing
    model.lm_head.weight.data[model.tokenizer.eos_token_id] *= 6  # so that some texts end by themselves
    tuned = mp.attach(model, mp.LoRA(rank=2))
    tiny.randomise(tuned, scale=0.2)
    written = roll_out(tuned, PROMPTS, GROUP, seed=3, length=24)
    ended = written.ended.float().mean().item()
    assert 0 < ended < 1, f"texts that end and texts that are cut off are both needed, but {ended} ended"
    return tuned, written


def trainer(cls: type, tuned, **settings):
    """An object of trl's class with what its loss reads, and nothing else."""
    made = object.__new__(cls)
    made.model, made._metrics = SimpleNamespace(training=False), defaultdict(lambda: defaultdict(list))
    made.accelerator = SimpleNamespace(
        gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x, num_processes=1
    )
    plain = dict(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=BETA, loss_type="grpo",
        importance_sampling_level="token", epsilon_low=CLIP, epsilon_high=CLIP, use_vllm=False, _tp_size=1,
        vllm_importance_sampling_correction=False, _entropy_bonus_enabled=False, _total_train_tokens=0,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, center_rewards_coefficient=None),
        _get_per_token_logps_and_entropies=per_token,
    )  # fmt: skip
    for name, value in (plain | settings).items():
        setattr(made, name, value)
    return made


def per_token(model, input_ids, attention_mask, logits_to_keep, **_):
    """What trl's fused head computes: log-probabilities and entropies of the completion's tokens."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -logits_to_keep - 1 : -1]
    every = logits.log_softmax(-1)
    return every.gather(2, input_ids[:, -logits_to_keep:, None])[..., 0], -(every.exp() * every).sum(-1), None


def in_layout(written, *values: torch.Tensor):
    """trl's batch of the same rollouts, and values (n, T−1) a token moved to their places (n, completion)."""
    starts = written.mask.argmax(1) + 1  # of the completions
    counts = written.mask.sum(1).long()
    left, right = int(starts.max()), int(counts.max())
    n = len(starts)
    batch = {
        name: torch.zeros(n, width, dtype=torch.long)
        for name, width in (
            ("prompt_ids", left),
            ("prompt_mask", left),
            ("completion_ids", right),
            ("completion_mask", right),
        )
    }
    moved = [value.new_zeros(n, right) for value in values]
    for i, (s, c) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        batch["prompt_ids"][i, left - s :], batch["prompt_mask"][i, left - s :] = written.ids[i, :s], 1
        batch["completion_ids"][i, :c], batch["completion_mask"][i, :c] = written.ids[i, s : s + c], 1
        for old, new in zip(values, moved, strict=True):
            new[i, :c] = old[i, s - 1 : s - 1 + c]
    return batch, *moved


def slopes(loss, tuned):
    return torch.autograd.grad(loss, [p for p in tuned.parameters() if p.requires_grad])


def slope_gap(mine, theirs, tuned) -> float:
    """The largest difference between the gradients of two losses."""
    ours, other = slopes(mine, tuned), slopes(theirs, tuned)
    assert max(g.abs().max().item() for g in other) > 1e-3, "there is something to compare"
    return max((a - b).abs().max().item() for a, b in zip(ours, other, strict=True))


def gap(mine, theirs, tuned) -> float:
    """The largest difference between two losses and their gradients; rotary positions, in float32, are most of it."""
    return max(abs(mine.item() - theirs.item()), slope_gap(mine, theirs, tuned))


def references(tuned, written):
    with torch.no_grad(), tuned.disabled():
        base = log_probs(tuned, written)[0]
    generator = torch.Generator().manual_seed(0)
    old = written.log_p + 0.3 * torch.randn(
        written.log_p.shape, generator=generator, dtype=torch.float64
    )  # off policy, so the clip acts
    return old, base, torch.randn(2, GROUP, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.0, BETA])
def test_group_relative_loss(rollouts, beta):
    tuned, written = rollouts
    old, base, rewards = references(tuned, written)
    advantages = group_relative(rewards).flatten()
    # trl's advantages are computed inline: (r − mean) / (std + 1e-4) with the std of its `nanstd`
    from trl.trainer.utils import nanstd

    theirs = (rewards - rewards.mean(1, keepdim=True)) / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    assert torch.allclose(advantages, theirs.flatten(), atol=1e-12)
    mine = grpo_loss(log_probs(tuned, written)[0], old, base, written.mask, advantages, CLIP, beta)
    ratio = (written.log_p - old).exp()[written.mask.bool()]
    assert ((ratio < 1 - CLIP) | (ratio > 1 + CLIP)).any()
    batch, there, base_there = in_layout(written, old, base)
    batch |= {"advantages": advantages, "old_per_token_logps": there, "ref_per_token_logps": base_there}
    assert gap(mine, trainer(trl.GRPOTrainer, tuned, beta=beta)._compute_loss(tuned, batch), tuned) < 1e-6


def test_a_row_without_tokens_counts_as_zero_as_it_does_there(rollouts):
    tuned, written = rollouts
    old, base, rewards = references(tuned, written)
    mask = written.mask.clone()
    batch, there, base_there = in_layout(written, old, base)
    mask[1], batch["completion_mask"][1] = 0, 0
    advantages = group_relative(rewards).flatten()
    mine = grpo_loss(log_probs(tuned, written)[0], old, base, mask, advantages, CLIP, BETA)
    batch |= {"advantages": advantages, "old_per_token_logps": there, "ref_per_token_logps": base_there}
    theirs = trainer(trl.GRPOTrainer, tuned)._compute_loss(tuned, batch)
    assert gap(mine, theirs, tuned) < 1e-6
    counted = grpo_loss(log_probs(tuned, written)[0], old, base, written.mask, advantages, CLIP, BETA)
    assert abs(mine.item() - counted.item()) > 1e-3, "with its tokens the row would count"


def test_leave_one_out_gradient(rollouts):
    """On policy trl's ratio is 1 and its loss the mean −A; the gradient is REINFORCE's."""
    tuned, written = rollouts
    _, _, rewards = references(tuned, written)
    advantages = leave_one_out(rewards).flatten()
    mine = reinforce_loss(log_probs(tuned, written)[0], written.mask, advantages)
    batch, _ = in_layout(written, written.log_p)
    with torch.no_grad():
        keep = batch["completion_ids"].shape[1]
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        old = (per_token(tuned, ids, seen, keep)[0] * batch["completion_mask"]).sum(1)
    batch |= {"advantages": advantages, "old_logps": old}
    theirs = trainer(trl.RLOOTrainer, tuned)._compute_loss(tuned, batch)
    assert theirs.item() == pytest.approx(-advantages.mean().item(), abs=1e-9)
    assert slope_gap(mine, theirs, tuned) < 1e-6


def test_preference_loss():
    from trl.trainer.reward_trainer import RewardTrainer

    judge = RewardModel(tiny.small().double(), mp.LoRA(rank=2))
    torch.nn.init.normal_(judge.w)
    tiny.randomise(judge.tuned)
    chosen = judge.read(["tom felt happy .", "anna sang all the way home . the end was good ."])
    rejected = judge.read(["tom felt sad . it rained all day .", "anna ."])
    mine = preference_loss(judge(chosen), judge(rejected))
    rows = chosen + rejected
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }

    def model(input_ids, attention_mask, **_):
        read = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        return SimpleNamespace(logits=judge(read)[:, None])

    assert gap(mine, trainer(RewardTrainer, judge).compute_loss(model, inputs), judge) < 1e-6
