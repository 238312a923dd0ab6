"""A reward model from preferences: somebody says which of two texts is better, and a model learns to say how good.

Bradley and Terry (1952): each text has a score r, and the first is preferred with probability

    p(first ≻ second) = σ(r(first) − r(second)),        loss = −mean log σ(r(chosen) − r(rejected))      (nats a pair)

Only differences count, so the scores have no zero. The score is read off the hidden state at the end of the text,
r = wᵀ·h(<eos>), and the model under it is tuned by LoRA (Ouyang et al. 2022, §3.5).
"""

from __future__ import annotations

import copy
import json
import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.attach import attach
from minipeft.layer import Method
from minipeft.learn.fit import groups
from minipeft.learn.plan import Plan
from minipeft.learn.rows import encode, order, padding
from minipeft.methods.lora import LoRA
from minipeft.reading import longest
from minipeft.whole import write_whole
from minipeft.world.rewards import Reward, family

BETTER = ("first", "second", "tie")


@dataclass(frozen=True)
class Pair:
    """Two continuations of one beginning, and which is better: "first", "second" or "tie"."""

    prompt: str
    first: str
    second: str
    better: str

    def __post_init__(self) -> None:
        if self.better not in BETTER:
            raise ValueError(f"better is {self.better!r}; it says first, second or tie.")
        if any(not isinstance(text, str) for text in (self.prompt, self.first, self.second)):
            raise TypeError("prompt, first and second of a pair are texts.")

    @property
    def texts(self) -> tuple[str, str]:
        """Both whole texts, in the order in which they were shown."""
        return tuple(f"{self.prompt} {text}".strip() for text in (self.first, self.second))

    @property
    def ranked(self) -> tuple[str, str]:
        """(chosen, rejected)."""
        return self.texts if self.better == "first" else self.texts[::-1]


def write_pairs(pairs: Sequence[Pair], path: str | Path) -> None:
    """One JSON object a line; whole or not at all."""
    write_whole(path, "".join(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs))


def read_pairs(path: str | Path) -> list[Pair]:
    """What `write_pairs` wrote. ValueError names the line that is no pair."""
    pairs = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            pairs.append(Pair(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"Line {number} of {path} is no pair with prompt, first, second and better: {error}"
            ) from None
    return pairs


def simulate(
    reward: Reward, drafts: Sequence[tuple[str, str, str]], noise: float = 0.0, seed: int = 0, ties: bool = False
) -> list[Pair]:
    """What a rater who goes by `reward` says about each (prompt, first, second), wrong with probability `noise`.

    Where both are worth the same the pair is left out, or a tie if `ties`. ValueError for a reward that is NaN.
    """
    if not 0 <= noise < 0.5:
        raise ValueError(f"noise is the share of wrong answers, from 0 to below 0.5, but is {noise!r}.")
    rng, pairs = random.Random(seed), []
    for prompt, first, second in drafts:
        a, b = (reward(f"{prompt} {text}".strip()) for text in (first, second))
        if math.isnan(a) or math.isnan(b):
            raise ValueError(
                f"The reward of {(first if math.isnan(a) else second)!r} is no number: give every text one."
            )
        slip = rng.random() < noise
        if a != b:
            pairs.append(Pair(prompt, first, second, "first" if (a > b) != slip else "second"))
        elif ties:
            pairs.append(Pair(prompt, first, second, "tie"))
    return pairs


def self_agreement(pairs: Sequence[Pair]) -> float | None:
    """The share of pairs that were answered the same when they came again, in whichever order; None if none came again.

    It bounds what a reward model can reach: nobody can be predicted better than they repeat themselves.
    """
    first: dict[tuple, str | None] = {}
    same = []
    for pair in pairs:
        shown = (pair.prompt, *sorted((pair.first, pair.second)))
        choice = None if pair.better == "tie" else getattr(pair, pair.better)
        if shown in first:
            same.append(choice == first[shown])
        first.setdefault(shown, choice)
    return sum(same) / len(same) if same else None


RENAMED = ("NAME", "FRIEND", "COLOUR", "DAY", "THING")  # what a story may exchange and stay as good as it was


def renamed(pair: Pair, seed: int) -> Pair:
    """The pair with other names, colours, days and things in it, the same in both texts: a preference for how a story
    ends does not depend on them, so few pairs can be made many."""
    from minipeft.world.corpus import stories

    rng, mapping = random.Random(seed), {}
    for rule in stories().rules:
        if rule.partition(".")[0] in RENAMED:
            words = family(rule)
            mapping |= dict(zip(words, rng.sample(words, len(words)), strict=True))
    said = (" ".join(mapping.get(w, w) for w in text.split()) for text in (pair.prompt, pair.first, pair.second))
    return Pair(*said, pair.better)


def preference_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """−mean log σ(r(chosen) − r(rejected)) of scores (pairs,), in nats a pair; log σ never underflows."""
    return -F.logsigmoid(chosen - rejected).mean()


class RewardModel(nn.Module):
    """r(text) = wᵀ·h(<eos>), with w zero at first: every pair is a coin toss. The given model is copied."""

    def __init__(self, model: nn.Module, method: Method | None = None, tokenizer=None, seed: int = 0):
        super().__init__()
        self.tokenizer = tokenizer if tokenizer is not None else model.tokenizer
        self.tuned = attach(copy.deepcopy(model), method or LoRA(rank=8), seed=seed)
        table = model.get_input_embeddings().weight
        dtype = torch.promote_types(table.dtype, torch.float32)
        self.w = nn.Parameter(table.new_zeros(model.config.get_text_config().hidden_size, dtype=dtype))
        self.pad, self.context = padding(model, self.tokenizer), longest(model)

    def read(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids for ids, _ in encode("text", {"text": list(texts)}, self.tokenizer, self.context)]

    def forward(self, rows: list[list[int]]) -> torch.Tensor:
        """Scores (n,) of n rows of token ids, each with its <eos>."""
        ends = torch.tensor([len(row) - 1 for row in rows], device=self.w.device)
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (width - len(row)) for row in rows], device=ends.device)
        mask = (torch.arange(width, device=ends.device) <= ends[:, None]).long()
        hidden = self.tuned(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        # by the length of the row: the first pad may be the end mark itself
        return hidden[torch.arange(len(rows)), ends].to(self.w.dtype) @ self.w

    @torch.no_grad()
    def score(self, texts: Sequence[str], batch: int = 64) -> list[float]:
        """r of each text. ValueError where it is no number."""
        rows = self.read(texts)
        scores = [r for i in range(0, len(rows), batch) for r in self(rows[i : i + batch]).tolist()]
        if bad := [text for text, r in zip(texts, scores, strict=True) if not math.isfinite(r)]:
            raise ValueError(
                f"The score of {bad[0][:60]!r} is no number: look for NaN in the reward model, train it anew."
            )
        return scores

    def differences(self, pairs: Sequence[Pair]) -> list[float]:
        """r(first) − r(second) of each pair."""
        scores = self.score([text for pair in pairs for text in pair.texts])
        return [a - b for a, b in zip(scores[::2], scores[1::2], strict=True)]


def check_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs that say something. ValueError where none does; a warning where the place alone may have decided."""
    if not pairs:
        raise ValueError("There are no pairs to learn from: prefer some texts first, or simulate a rater.")
    decided = [pair for pair in pairs if pair.better != "tie"]
    if not decided:
        raise ValueError(f"All {len(pairs)} pairs are ties, which say nothing about what is better: prefer one text.")
    if same := [i for i, pair in enumerate(pairs) if pair.first.split() == pair.second.split()]:
        raise ValueError(f"Both texts of pair {same[0]} are the same, so neither can be better: drop it.")
    if len(decided) >= 8 and len({pair.better for pair in decided}) == 1:
        warnings.warn(
            f"All {len(decided)} pairs prefer the {decided[0].better} text: was it the text, or where it stood?",
            stacklevel=3,
        )
    return decided


def fit_reward(
    model: nn.Module,
    pairs: Sequence[Pair],
    plan: Plan | None = None,
    method: Method | None = None,
    tokenizer=None,
) -> tuple[RewardModel, list[float]]:
    """(a reward model trained on the pairs, its loss in nats a pair before each step's update).

    Raises ValueError for no pairs, ties alone, and a text that is too long.
    """
    plan = plan or Plan(steps=40, lr=3e-3)
    decided = check_pairs(pairs)
    rewards = RewardModel(model, method, tokenizer, plan.seed)
    chosen, rejected = (rewards.read([pair.ranked[i] for pair in decided]) for i in (0, 1))
    optimizer = torch.optim.AdamW(groups(rewards, plan.lr), lr=plan.lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.share)
    rows = order([len(row) for row in chosen], min(plan.batch, len(decided)), plan.seed)
    losses = []
    for step in range(plan.steps):
        drawn = next(rows)
        with torch.random.fork_rng():  # dropout follows from the seed
            torch.manual_seed(plan.seed * 1_000_003 + step)
            scores = rewards([chosen[i] for i in drawn] + [rejected[i] for i in drawn])
        loss = preference_loss(*scores.chunk(2))
        if not math.isfinite(loss.item()):
            raise ValueError(
                f"The loss became {loss.item()} at step {step}: use a learning rate below {plan.lr:g}, or look for NaN "
                "in the model."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return rewards.eval(), losses


def agreement(rewards: RewardModel, pairs: Sequence[Pair]) -> float:
    """The share of decided pairs whose better text scores higher; an equal score counts one half."""
    decided = check_pairs(pairs)
    signs = [d if pair.better == "first" else -d for d, pair in zip(rewards.differences(decided), decided, strict=True)]
    return sum((s > 0) + 0.5 * (s == 0) for s in signs) / len(signs)


def calibration(rewards: RewardModel, pairs: Sequence[Pair], bins: int = 8) -> tuple[list[float], list[float]]:
    """(predicted, observed) share of pairs whose first text is preferred, in bins of equally many pairs."""
    from sklearn.calibration import calibration_curve

    decided = check_pairs(pairs)
    predicted = torch.sigmoid(torch.tensor(rewards.differences(decided), dtype=torch.float64)).numpy()
    observed, mean = calibration_curve(
        [p.better == "first" for p in decided], predicted, n_bins=bins, strategy="quantile"
    )
    return mean.tolist(), observed.tolist()
