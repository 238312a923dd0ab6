"""The edges of the assignment `feedback`."""

from __future__ import annotations

from random import Random

import torch
from torch.nn import functional as F

from minipeft.course.exercises.draw import normal
from minipeft.course.verdict import Case


def preference_loss(chosen, rejected):
    return -F.logsigmoid(chosen - rejected).mean()


def preference_edges(rng: Random):
    yield "hold for a single pair", (normal(rng, 1), normal(rng, 1))
    yield "be log 2 where the scores are equal", (torch.ones(4), torch.ones(4))
    yield "be a slope of one half there, and no kink", (torch.zeros(2), torch.zeros(2))


def leave_one_out(rewards):
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


def baseline_edges(rng: Random):
    yield "hold for one group of two", (normal(rng, 1, 2),)
    yield "hold for many groups of two", (normal(rng, 5, 2),)
    yield "hold for as many groups as texts", (normal(rng, 4, 4),)
    yield "take a reward of 0 for a reward", (torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 0.0]]),)
    yield "take equal rewards for texts of their own", (torch.tensor([[1.0, 1.0, 4.0], [2.0, 5.0, 5.0]]),)
    yield "give zeros where all rewards are equal", (torch.full((2, 4), 3.0),)


def priced_reward(rewards, log_p, base, mask, beta):
    return (rewards - beta * ((log_p - base) * mask).sum(1)).detach()


def price_edges(rng: Random):
    one = (normal(rng, 1), normal(rng, 1, 1), normal(rng, 1, 1))
    yield "hold for one text of one token", (*one, torch.ones(1, 1), 0.5)
    yield "cost nothing for a text without tokens of its own", (*one, torch.zeros(1, 1), 0.5)
    many = (normal(rng, 3), normal(rng, 3, 4), normal(rng, 3, 4))
    square = (normal(rng, 4), normal(rng, 4, 4), normal(rng, 4, 4))
    yield "hold for as many texts as tokens", (*square, (normal(rng, 4, 4) > 0).float(), 0.5)
    yield "cost nothing where no text has tokens of its own", (*square, torch.zeros(4, 4), 0.5)
    yield "be the reward where β is 0", (*many, torch.ones(3, 4), 0.0)
    yield "cost nothing where the policy is the base", (many[0], many[1], many[1].clone(), torch.ones(3, 4), 2.0)


def group_relative_loss(log_p, old, base, mask, rewards, clip=0.2, beta=0.0):
    A = ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[:, None]
    ratio, d = (log_p - old).exp(), base - log_p
    each = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A) + beta * (d.exp() - d - 1)
    return ((each * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def clip_edges(rng: Random):
    def drawn(n, length):
        return [normal(rng, n, length) * 0.3 - 2 for _ in range(3)]

    yield "hold for two texts of one token", (*drawn(2, 1), torch.ones(2, 1), normal(rng, 2), 0.2, 0.1)
    yield "take a clip above 1", (*drawn(4, 6), torch.ones(4, 6), normal(rng, 4), 1.5, 0.0)
    gap = torch.tensor([[1.0, 1, 0], [0, 0, 0], [1, 0, 0]])
    yield "count a text without tokens as 0", (*drawn(3, 3), gap, normal(rng, 3), 0.2, 0.3)
    equal = (*drawn(3, 3), torch.ones(3, 3), torch.ones(3), 0.2, 0.3)
    alone = group_relative_loss(*equal)  # no lenses: where A is 0, either side of the minimum may have the gradient
    yield Case("be the KL alone where all rewards are equal", equal, alone, lenses=False)
    p = drawn(2, 3)[0]
    yield "give a gradient of −A where nothing has moved", (p, p.clone(), p.clone(), torch.ones(2, 3), normal(rng, 2))


def integrate(base, deltas, alphas):
    found = {}
    for key, weight in base.items():
        total = weight.clone()
        for name, changes in deltas.items():
            if key in changes:
                total = total + alphas.get(name, 0.0) * changes[key]
        found[key] = total
    return found


def sum_edges(rng: Random):
    base = {"b.weight": normal(rng, 2, 3), "a.bias": normal(rng, 4), "c": normal(rng, 1, 1)}
    change = {"a.bias": normal(rng, 4), "c": normal(rng, 1, 1)}
    yield "be θ_old, bit for bit, without subtasks", (base, {}, {})
    yield "be θ_old, bit for bit, where every α is 0", (base, {"z": change, "a": {}}, {"z": 0.0, "a": 0.0})
    yield "be θ_old, bit for bit, where no α is given", (base, {"z": change}, {})
    yield "take a small α", (base, {"z": change}, {"z": 1e-3})
    bare = {"a.bias": torch.zeros(4), "b.bias": torch.zeros(4)}
    yield "give weights that are equal tensors of their own", (bare, {"z": {"a.bias": torch.zeros(4)}}, {"z": 1.0})
    yield "take a negative α, which unlearns", (base, {"z": change}, {"z": -2.0})
    yield "pass over an α without a subtask", (base, {"z": change}, {"z": 1.0, "gone": 3.0})
    yield "take a subtask that changes nothing", (base, {"z": {}, "a": change}, {"z": 1.0, "a": 1.0})


def own_tokens(tokens, end):
    ends = (tokens == end).long()
    return ends.cumsum(1) - ends == 0


def token_edges(rng: Random):
    yield "mark a single token that is the end", (torch.tensor([[2]]), 2)
    yield "mark a single token that is not", (torch.tensor([[5]]), 2)
    yield "mark all of a text that was cut off", (torch.tensor([[5, 4, 3]]), 2)
    yield "mark one token where a text ends at once and padding is the end mark", (torch.tensor([[2, 2, 2, 2]]), 2)
    yield "take token 0 for a token like any other", (torch.tensor([[0, 5, 0, 2, 7], [0, 0, 0, 0, 0]]), 2)
    yield "take token 0 for the end", (torch.tensor([[4, 5, 0, 2, 0], [0, 1, 2, 3, 4]]), 0)
    yield "go along the texts, as many as they are long", (torch.tensor([[5, 2, 7], [4, 4, 2], [2, 6, 5]]), 2)
    yield "mark one token of a long text of end marks", (torch.full((2, 700), 2), 2)
    yield "mark up to the end mark where it comes last", (torch.tensor([[5, 6, 2], [2, 5, 2]]), 2)


NUMBERS = "its tensors hold whole numbers"
EDGES = {
    "preference_loss": {"reference": (preference_loss,), "edges": preference_edges},
    "leave_one_out": {"reference": (leave_one_out,), "edges": baseline_edges},
    "priced_reward": {"reference": (priced_reward,), "edges": price_edges},
    "group_relative_loss": {
        "positive": ("clip", "beta"),
        "reference": (group_relative_loss,),
        "edges": clip_edges,
        "constants": ("old", "base", "mask", "rewards"),
    },
    "integrate": {"reference": (integrate,), "edges": sum_edges},
    "own_tokens": {
        "reference": (own_tokens,),
        "edges": token_edges,
        "without": {"gradient": NUMBERS, "types": NUMBERS},
    },
}
