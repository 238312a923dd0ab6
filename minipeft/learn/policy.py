"""Policy gradient: a language model writes texts, a reward says what each is worth, and what was better than its
companions becomes more likely.

    J(θ) = E_{y∼π}[R(y)] − β·KL(π ‖ base)

The base is the same weights with the adapter off, so it costs no memory. REINFORCE, leave one out (Kool et al. 2019;
Ahmadian et al. 2024, §3.2), with R'_i = R_i − β·Σ_t log(π/base), over G texts:

    A_i = R'_i − mean of the other G−1 rewards,    loss = −mean_i A_i · Σ_t log π(y_t | y_<t)

GRPO (Shao et al. 2024, §4.1), with ρ_t = π/π_old, and k₃ = e^d − d − 1 for d = log(base/π), an estimate of the KL that
is never negative:

    A_i = (R_i − mean) / (std + 10⁻⁴),    loss = mean_i mean_t [ −min(ρ_t·A_i, clip(ρ_t, 1−ε, 1+ε)·A_i) + β·k₃ ]

Sums over t run over what the model itself wrote, its <eos> included (see `rollouts.py`): not the prompt, and nothing
behind the first <eos>. A text that was cut off for its length counts with all of its tokens.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from minipeft.attach import Tuned
from minipeft.learn.fit import groups
from minipeft.learn.plan import Plan
from minipeft.learn.rollouts import Rollouts, divergence, log_probs, roll_out

RULES = ("reinforce", "grpo")
SAME = 0.02  # nats a token by which the sampler and the loss may differ in float32; min-p or dropout differ by far more


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """A_i = R_i − mean of the others in its group; rewards and A have shape (groups, G), G at least 2."""
    others = (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[-1] - 1)
    return rewards - others


def group_relative(rewards: torch.Tensor) -> torch.Tensor:
    """A_i = (R_i − mean) / (std + 10⁻⁴) within its group; (groups, G) → (groups, G), std with G − 1."""
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)


def reinforce_loss(log_p: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """−mean_i A_i · Σ_t log π; log_p and mask have shape (n, T), advantages (n,)."""
    return -(advantages * (log_p * mask).sum(1)).mean()


def grpo_loss(
    log_p: torch.Tensor,
    old: torch.Tensor,
    base: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
    clip: float = 0.2,
    beta: float = 0.0,
) -> torch.Tensor:
    """The clipped group-relative loss; log-probabilities and mask have shape (n, T), advantages (n,).

    The mean over a text's own tokens, then over texts; a text without tokens counts as 0.
    """
    ratio, A = (log_p - old).exp(), advantages[:, None]
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    d = base - log_p
    each = -surrogate + beta * (d.exp() - d - 1)
    return ((each * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


@dataclass
class Trail:
    """What a run did, step by step, before each step's update: mean `rewards`, `kl` to the base in nats a text, mean
    tokens written (`lengths`), the share of texts that `ended`; `seconds` since the start. `stopped`: "finished",
    "cancelled", "interrupted", "diverged", or "held" for β = ∞."""

    rewards: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stopped: str = "cancelled"


def improve(
    tuned: Tuned,
    reward: Callable[[list[str]], Sequence[float]],
    prompts: Sequence[str] = ("",),
    plan: Plan | None = None,
    beta: float = 0.1,
    rule: str = "reinforce",
    epochs: int = 1,
    clip: float = 0.2,
    tokenizer=None,
    callback: Callable[[int, Trail, Rollouts], object] | None = None,
    progress: bool = True,
) -> Trail:
    """Raise the reward of what `tuned` writes, by policy gradient on its adapter.

    Each step writes `plan.batch` new texts, equally many for each prompt, and takes `epochs` steps of AdamW on them.
    Nothing is dropped out, for the model that writes must be the model that learns; a check at every step says so where
    it is not. β = ∞ leaves only the base. `callback(step, trail, rollouts)` runs before the update; False stops the
    run.

    Raises:
        ValueError: for settings that do not fit together, and for rewards that are all the same at first: nothing has
            changed then. For a reward that is no number: the adapter is then as the last step left it.
    """
    from tqdm.auto import tqdm

    plan = plan or Plan(steps=36, lr=3e-3, batch=48)
    group = _check(tuned, prompts, plan, beta, rule, epochs)
    trail = Trail()
    if math.isinf(beta):
        if any(delta.any() for delta in tuned.deltas().values()):
            raise ValueError("β = ∞ leaves only the base, which this adapter has left already; attach a fresh one.")
        trail.stopped = "held"
        return trail
    optimizer = torch.optim.AdamW(groups(tuned, plan.lr), lr=plan.lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.share)
    was_training, started = tuned.training, time.perf_counter()
    tuned.eval()
    try:
        for step in (bar := tqdm(range(plan.steps), disable=not progress, leave=False, desc="policy")):
            rollouts = roll_out(tuned, prompts, group, plan.seed * 1_000_003 + step, tokenizer)
            rewards = _worth(reward, rollouts.texts, step).to(rollouts.mask)
            with torch.no_grad(), tuned.disabled():
                base, base_every = log_probs(tuned, rollouts)
            log_p, every = log_probs(tuned, rollouts)
            old = log_p.detach()
            _check_sampler(rollouts, old, next(tuned.base.parameters()).dtype)
            if rule == "reinforce":
                rewards_less = rewards - beta * ((old - base) * rollouts.mask).sum(1)
                advantages = leave_one_out(rewards_less.view(-1, group)).flatten()
            else:
                advantages = group_relative(rewards.view(-1, group)).flatten()
            if step == 0 and not advantages.any():
                raise ValueError(
                    f"All {len(rewards)} texts have the reward {rewards[0].item():g}, so none is better than another: "
                    "give a reward on which texts differ."
                )
            trail.rewards.append(rewards.mean().item())
            trail.kl.append(divergence(every.detach(), base_every, rollouts.mask).mean().item())
            trail.lengths.append(rollouts.mask.sum(1).mean().item())
            trail.ended.append(rollouts.ended.float().mean().item())
            trail.seconds.append(time.perf_counter() - started)
            bar.set_postfix_str(f"reward {trail.rewards[-1]:.3f}, KL {trail.kl[-1]:.2f}")
            if callback is not None and callback(step, trail, rollouts) is False:
                return trail
            for epoch in range(epochs):
                if epoch:
                    log_p, _ = log_probs(tuned, rollouts)
                if rule == "reinforce":
                    loss = reinforce_loss(log_p, rollouts.mask, advantages)
                else:
                    loss = grpo_loss(log_p, old, base, rollouts.mask, advantages, clip, beta)
                if not math.isfinite(loss.item()):
                    trail.stopped = "diverged"
                    warnings.warn(
                        f"The loss became {loss.item()} at step {step} with lr={plan.lr:g}, so training stopped: "
                        "start again with a learning rate ten times smaller.",
                        stacklevel=2,
                    )
                    return trail
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            scheduler.step()
        trail.stopped = "finished"
    except KeyboardInterrupt:
        trail.stopped = "interrupted"
    finally:
        optimizer.zero_grad(set_to_none=True)
        tuned.train(was_training)
    return trail


def _check(tuned: Tuned, prompts: Sequence[str], plan: Plan, beta: float, rule: str, epochs: int) -> int:
    """How many texts each prompt gets."""
    if not isinstance(tuned, Tuned):
        raise TypeError(
            "improve needs a Tuned, whose base stays beside it: attach a method first, e.g. mp.LoRA(rank=8)."
        )
    tuned.check_acting("improve")
    if rule not in RULES:
        raise ValueError(f'rule is "reinforce" or "grpo", but is {rule!r}.')
    if not beta >= 0:
        raise ValueError(f"beta is the price of a nat away from the base, 0 or more, but is {beta!r}.")
    if isinstance(prompts, str) or not prompts:
        raise ValueError('prompts is a list of beginnings, such as [""], and not empty.')
    if rule == "reinforce" and epochs != 1:
        raise ValueError(f"REINFORCE takes one step on what was written, not {epochs}; GRPO's clip allows more.")
    group, rest = divmod(plan.batch, len(prompts))
    if rest or group < 2:
        raise ValueError(
            f"A batch of {plan.batch} texts gives {len(prompts)} prompts no equal groups of two or more: change either."
        )
    return group


def _worth(reward: Callable, texts: list[str], step: int) -> torch.Tensor:
    given = reward(texts)
    try:
        rewards = torch.as_tensor(given, dtype=torch.float32)
    except (TypeError, ValueError):
        raise TypeError(
            f"The reward gives {type(given).__name__} that holds no numbers: it takes {len(texts)} texts at once and "
            "returns as many numbers, as rewards.each(f) does."
        ) from None
    if rewards.shape != (len(texts),):
        raise ValueError(
            f"The reward gives {tuple(rewards.shape)} numbers for {len(texts)} texts: it needs one for each."
        )
    if not rewards.isfinite().all():
        worst = int((~rewards.isfinite()).nonzero()[0])
        raise ValueError(
            f"The reward of text {worst} is {rewards[worst].item()} at step {step}, before which the run stopped: "
            f"give every text a finite number ({texts[worst][:60]!r})."
        )
    return rewards


def _check_sampler(rollouts: Rollouts, log_p: torch.Tensor, dtype: torch.dtype) -> None:
    """The model that wrote must be the model that learns; 16 bits round more."""
    apart = ((log_p - rollouts.log_p).abs() * rollouts.mask).max().item()
    if apart > (SAME if dtype in (torch.float32, torch.float64) else 30 * SAME):
        raise ValueError(
            f"What was sampled and what is trained differ by {apart:.2g} nats at a token, so the gradient would be of "
            "another model: look for sampling settings in generation_config, or dropout in the base."
        )
