"""Assignment `feedback`: a loss for preferences, a baseline, a price for leaving the base, a clip, a sum, a mask."""

from __future__ import annotations

import math
import statistics
from random import Random

import torch

from minipeft.course.exercises.draw import normal
from minipeft.course.verdict import Case, Exercise


def tensor(values, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype)


# Bradley and Terry ---------------------------------------------------------------------------------------------------
def preference_cases(rng: Random):
    for dtype in (torch.float64, torch.float32, torch.float64):
        n = rng.randint(3, 9)
        chosen, rejected = 2 * normal(rng, n, dtype=dtype), 2 * normal(rng, n, dtype=dtype) + 0.5
        odds = (chosen.double() - rejected.double()).tolist()
        each = [math.log1p(math.exp(-d)) for d in odds]
        mean = statistics.fmean(each)

        def value(x, c=chosen):
            return tensor(x, c)

        yield Case(
            f"be −mean log σ(r(chosen) − r(rejected)) of {n} pairs in {dtype}",
            (chosen, rejected),
            value(mean),
            wrong={
                "it is summed over the pairs: take the mean": lambda e=each, f=value: f(sum(e)),
                "chosen and rejected are exchanged": lambda o=odds, f=value: f(
                    statistics.fmean(math.log1p(math.exp(d)) for d in o)
                ),
                "the sign is wrong: a loss is positive": lambda m=mean, f=value: f(-m),
                "it is the probability, without its logarithm": lambda o=odds, f=value: f(
                    -statistics.fmean(1 / (1 + math.exp(-d)) for d in o)
                ),
                "the mean is taken before the logarithm": lambda o=odds, f=value: f(
                    -math.log(statistics.fmean(1 / (1 + math.exp(-d)) for d in o))
                ),
                "it is the loss of the mean difference": lambda o=odds, f=value: f(
                    math.log1p(math.exp(-statistics.fmean(o)))
                ),
                "each score has a loss of its own, and only differences should": lambda c=chosen, r=rejected, f=value: (
                    f(
                        statistics.fmean(
                            math.log1p(math.exp(-a)) + math.log1p(math.exp(b))
                            for a, b in zip(c.double().tolist(), r.double().tolist(), strict=True)
                        )
                    )
                ),
                "it is not passed through σ": lambda o=odds, f=value: f(-statistics.fmean(o)),
            },
        )
    far = torch.tensor([900.0, -900.0, 0.0])
    yield Case(
        "stay finite where a difference is hundreds: log σ, not log of σ",
        (far, torch.zeros(3)),
        torch.tensor((0.0 + 900.0 + math.log(2)) / 3),
        lenses=False,
    )


# the baseline --------------------------------------------------------------------------------------------------------
def baseline_cases(rng: Random):
    for groups, size in ((1, rng.randint(3, 6)), (rng.randint(2, 4), rng.randint(5, 7)), (3, 2)):
        R = normal(rng, groups, size, dtype=torch.float64) + 3

        def by_row(function, R=R):
            return torch.tensor([[function(row, i) for i in range(len(row))] for row in R.tolist()], dtype=R.dtype)

        def others(row, i):
            return row[i] - statistics.fmean(row[:i] + row[i + 1 :])

        known = {
            "its own reward is part of its baseline: leave it out": lambda f=by_row: f(
                lambda row, i: row[i] - statistics.fmean(row)
            ),
            "the sum of the others is divided by G instead of G − 1": lambda f=by_row: f(
                lambda row, i: row[i] - (sum(row) - row[i]) / len(row)
            ),
            "the baseline is returned, not the advantage": lambda f=by_row: f(
                lambda row, i: statistics.fmean(row[:i] + row[i + 1 :])
            ),
            "the sign is wrong": lambda f=by_row: -f(others),
            "it is divided by the spread, which is GRPO's": lambda f=by_row: f(
                lambda row, i: (row[i] - statistics.fmean(row)) / (statistics.stdev(row) + 1e-4)
            ),
        }
        if groups > 1:
            known["all groups share one baseline"] = lambda R=R: R - (R.sum() - R) / (R.numel() - 1)
            known["the mean is taken over the groups, not within one"] = lambda R=R: R - (R.sum(0) - R) / (len(R) - 1)
        yield Case(
            f"subtract from each reward the mean of the others of its group, for {groups}×{size} rewards",
            (R,),
            by_row(others),
            wrong=known,
        )


# the price -----------------------------------------------------------------------------------------------------------
def masks(rng: Random, n: int, length: int) -> torch.Tensor:
    """A run of ones somewhere in each row, of unequal lengths."""
    found = torch.zeros(n, length, dtype=torch.float64)
    for i in range(n):
        start = rng.randint(0, length - 3)
        found[i, start : rng.randint(start + 1, length - 1)] = 1
    return found


def price_cases(rng: Random):
    for _ in range(3):
        n, length, beta = rng.randint(2, 5), rng.randint(5, 9), round(rng.uniform(0.1, 0.9), 2)
        rewards, log_p, base = (normal(rng, *s, dtype=torch.float64) for s in ((n,), (n, length), (n, length)))
        mask = masks(rng, n, length)

        def priced(change, p=log_p, q=base, m=mask, R=rewards, b=beta):
            return torch.stack([R[i] - b * sum(change(p[i, t], q[i, t], m[i, t], i) for t in range(len(p[i])))
                                for i in range(len(R))])  # fmt: skip

        counts = mask.sum(1)
        yield Case(
            f"subtract β·Σ_t log(π/base) over a text's own tokens, for {n} texts of at most {length} tokens",
            (rewards, log_p, base, mask, beta),
            priced(lambda p, q, m, i: m * (p - q)),
            wrong={
                "the mask is left out: prompt and padding are paid for": lambda f=priced: f(lambda p, q, m, i: p - q),
                "the mask is turned round": lambda f=priced: f(lambda p, q, m, i: (1 - m) * (p - q)),
                "it is averaged over the tokens: the KL of a text is a sum": lambda f=priced, c=counts: f(
                    lambda p, q, m, i: m * (p - q) / c[i]
                ),
                "it is averaged over all places: the KL of a text is a sum": lambda f=priced, T=length: f(
                    lambda p, q, m, i: m * (p - q) / T
                ),
                "the sign is wrong: leaving the base is rewarded": lambda f=priced: f(lambda p, q, m, i: m * (q - p)),
                "the base is left out: that is a price on certainty": lambda f=priced: f(lambda p, q, m, i: m * p),
                "the difference is made positive: a token may well be less likely than before": lambda f=priced: f(
                    lambda p, q, m, i: m * (p - q).abs()
                ),
                "it is e^d − d − 1: here log(π/base) itself is asked for": lambda f=priced: f(
                    lambda p, q, m, i: m * ((q - p).exp() - (q - p) - 1)
                ),
                "β is left out": lambda f=priced, R=rewards, b=beta: R + (f(lambda p, q, m, i: m * (p - q)) - R) / b,
            },
        )


# the clip ------------------------------------------------------------------------------------------------------------
def clipped(log_p, old, base, mask, rewards, clip, beta, **way) -> torch.Tensor:
    """The group-relative loss, a number at a time; `way` says what is done otherwise."""
    R = rewards.double().tolist()
    spread = (statistics.pstdev if way.get("population") else statistics.stdev)(R)
    A = [(r - statistics.fmean(R)) / (1.0 if way.get("unscaled") else spread + 1e-4 * (not way.get("bare"))) for r in R]
    pick = max if way.get("larger") else min
    texts = []
    for i, a in enumerate(A):
        tokens = []
        for t in range(log_p.shape[1]):
            if not mask[i, t] and not way.get("unmasked"):
                continue
            ratio = math.exp(log_p[i, t] - old[i, t])
            held = min(max(ratio, 1 - clip), 1 + clip)
            surrogate = pick(ratio * a, held * a) if not way.get("clipped only") else held * a
            surrogate = ratio * a if way.get("no clip") else surrogate
            d = (base[i, t] - log_p[i, t]).item() * (-1 if way.get("backwards") else 1)
            kl = -d if way.get("k1") else math.exp(d) - d - 1
            tokens.append((surrogate if way.get("sign") else -surrogate) + beta * kl * (-1 if way.get("paid") else 1))
        texts.append(tokens)
    if way.get("tokens alike"):
        every = [x for tokens in texts for x in tokens]
        return sum(every) / len(every)
    if way.get("sums"):
        return statistics.fmean(map(sum, texts))
    return statistics.fmean(sum(tokens) / max(1, len(tokens)) for tokens in texts)


CLIP_MISTAKES = {
    "every token weighs the same: take the mean of each text first": {"tokens alike": True},
    "tokens are summed within a text: take their mean": {"sums": True},
    "the larger of the two is taken: the clip should make the objective no better": {"larger": True},
    "only the clipped ratio is used": {"clipped only": True},
    "nothing is clipped": {"no clip": True},
    "rewards are not divided by their spread": {"unscaled": True},
    "the spread divides by G: it is the sample's, with G − 1": {"population": True},
    "the KL's d is log(π/base); it should be log(base/π)": {"backwards": True},
    "the KL is −d alone: e^d − d − 1 is never negative": {"k1": True},
    "the KL is subtracted from the loss": {"paid": True},
    "the mask is left out": {"unmasked": True},
    "10⁻⁴ is missing from the divisor": {"bare": True},
    "the sign of the first part is turned round: a loss falls where what is good becomes likely": {"sign": True},
}


def clip_cases(rng: Random):
    for beta in (0.0, round(rng.uniform(0.2, 0.9), 2), round(rng.uniform(0.2, 0.9), 2)):
        n, length, clip = rng.randint(3, 5), rng.randint(5, 8), round(rng.uniform(0.1, 0.3), 2)
        log_p, old, base = (normal(rng, n, length, dtype=torch.float64) - 2 for _ in range(3))
        mask, rewards = masks(rng, n, length), normal(rng, n, dtype=torch.float64)
        mask[0], mask[1, :1], mask[1, 1:] = 1, 1, 0  # of very unequal lengths
        args = (log_p, old, base, mask, rewards, clip, beta)
        usual = clipped(*args)
        known = {
            name: lambda a=args, way=way: torch.tensor(clipped(*a, **way), dtype=torch.float64)
            for name, way in CLIP_MISTAKES.items()
            if abs(clipped(*args, **way) - usual) > 1e-6
        }
        yield Case(
            f"be the clipped loss of a group of {n} texts, with ε = {clip} and β = {beta}",
            args,
            torch.tensor(usual, dtype=torch.float64),
            wrong=known,
        )


# the sum -------------------------------------------------------------------------------------------------------------
def sum_cases(rng: Random):
    for subtasks in (1, 2, 3):
        base = {f"{part}.weight": normal(rng, 3, 4, dtype=torch.float64) for part in ("up", "down", "head")}
        names = rng.sample(["zeal", "safe", "happy", "calm"], subtasks)
        deltas = {
            name: {key: normal(rng, 3, 4, dtype=torch.float64) for key in rng.sample(sorted(base), rng.randint(1, 2))}
            for name in names
        }
        alphas = {name: round(rng.uniform(-1.5, 1.5), 2) for name in names[: max(1, subtasks - 1)]}

        def summed(weigh, base=base, deltas=deltas):
            found = {}
            for key, weight in base.items():
                found[key] = weight.clone()
                for name, changes in deltas.items():
                    if key in changes:
                        found[key] = found[key] + weigh(name) * changes[key]
            return found

        known = {
            "a subtask without an α counts as 1: it counts as 0": lambda f=summed, a=alphas: f(lambda n: a.get(n, 1.0)),
            "the α are left out": lambda f=summed, a=alphas: f(lambda n: float(n in a)),
            "only the changes come out, without θ_old": lambda f=summed, a=alphas, b=base: {
                key: w - b[key] for key, w in f(lambda n: a.get(n, 0.0)).items()
            },
        }
        if len(alphas) > 1:
            total = sum(alphas.values())
            known["the α are divided by their sum: they need not add up to 1"] = lambda f=summed, a=alphas, s=total: f(
                lambda n: a.get(n, 0.0) / s
            )
            known["the changes are averaged: add them up"] = lambda f=summed, a=alphas: f(
                lambda n: a.get(n, 0.0) / len(a)
            )
        yield Case(
            f"be θ_old + Σ α_s·Δθ_s for {subtasks} subtask{'s' * (subtasks > 1)}, of which {len(alphas)} with an α",
            (base, deltas, alphas),
            summed(lambda n, a=alphas: a.get(n, 0.0)),
            wrong=known,
        )


# find the bug --------------------------------------------------------------------------------------------------------
def token_cases(rng: Random):
    for _ in range(3):
        n, length, end = rng.randint(3, 6), rng.randint(5, 9), rng.randint(0, 5)
        rows, masked = [], []
        for i in range(n):
            words = [w for w in rng.choices(range(20), k=3 * length) if w != end]
            stop = length if i == 0 else 0 if i == 1 else rng.randint(1, length - 1)
            after = [end if i % 2 else rng.randrange(20) for _ in range(length)]
            rows.append([*words[:stop], end, *after][:length])
            masked.append([t <= stop for t in range(length)])
        tokens, right = torch.tensor(rows), torch.tensor(masked)
        first = [row.index(end) if end in row else length for row in rows]
        yield Case(
            f"mark each text's own tokens up to its first end mark {end}, for {n} texts of {length} tokens",
            (tokens, end),
            right,
            wrong={
                "the end mark itself is left out, which the model chose too": lambda f=first, n=length: torch.tensor(
                    [[t < stop for t in range(n)] for stop in f]
                ),
                "every end mark is left out, and what follows the first is kept": lambda t=tokens, e=end: t != e,
                "a text that was cut off, and has no end mark, loses all of its tokens": lambda f=first, n=length: (
                    torch.tensor([[stop < n and t <= stop for t in range(n)] for stop in f])
                ),
                "everything up to the last end mark is kept": lambda r=rows, e=end, n=length: torch.tensor(
                    [[t <= max((j for j, w in enumerate(row) if w == e), default=n) for t in range(n)] for row in r]
                ),
            },
        )


EXERCISES = (
    Exercise(
        "preference_loss", "Bradley and Terry's loss", preference_cases,
        (
            "Only the difference of the two scores counts; log σ of it has a function of its own in torch.",
            "torch's `logsigmoid` stays finite where the logarithm of σ is −∞. A good pair has a small loss: mind "
            "the sign.",
        ),
        ("preference_loss",),
    ),
    Exercise(
        "leave_one_out", "The baseline that leaves one out", baseline_cases,
        (
            "The sum of the others is the sum of all, less one's own.",
            "Rewards 1, 2, 6: the others of the 6 have the mean 1.5, so it gets 4.5. `keepdim=True` keeps (groups, "
            "1).",
        ),
        ("leave_one_out",),
    ),
    Exercise(
        "priced_reward", "A price for leaving the base", price_cases,
        (
            "One number a text: sum over its tokens, where the mask is 1.",
            "A log ratio for each token, only where the mask is 1, summed over T. What cuts the gradient at the end?",
        ),
        ("priced_reward",),
    ),
    Exercise(
        "group_relative_loss", "The clipped group-relative loss", clip_cases,
        (
            "Three parts: A for each text, then a number for each token, then the mean of each text and of all texts.",
            "A is one number a text: give it an axis for tokens. The minimum is of two *products*, for A may be "
            "negative. Each text has its own count, at least 1.",
        ),
        ("group_relative_loss",),
    ),
    Exercise(
        "integrate", "Subtasks put together", sum_cases,
        (
            "Go over the weights of the base; for each, over the subtasks that change it.",
            "Begin with a clone of the base's weight. `dict.get` knows a default for a missing α, `in` whether a "
            "subtask has the weight.",
        ),
        ("integrate",),
    ),
    Exercise(
        "own_tokens", "Find the bug", token_cases,
        (
            "Try it on a text that was cut off before its end mark, and on one that ends at once.",
            "`cumsum` counts the end marks up to each token *and its own*. How many stand before it? Own tokens have "
            "none before them.",
        ),
        ("own_tokens",),
    ),
)  # fmt: skip
