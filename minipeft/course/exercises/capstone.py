"""Assignment `capstone`: two measures, when to stop, which rate, a recipe that is trained and scored, a fair choice."""

from __future__ import annotations

import math
import statistics
from random import Random

import torch

from minipeft.course.drives import capstone as drive
from minipeft.course.exercises.draw import normal
from minipeft.course.verdict import Case, Exercise, Raises
from minipeft.learn.plan import Plan

NAN, INF = float("nan"), float("inf")


# macro-F1 ------------------------------------------------------------------------------------------------------------
def f1(truth: list[int], said: list[int], c: int, beta_of=lambda p, r: 2 * p * r / (p + r)) -> float:
    """The F1 of class c by precision and recall; 0 where nothing was found."""
    found = sum(t == s == c for t, s in zip(truth, said, strict=True))
    if not found:
        return 0.0
    return beta_of(found / said.count(c), found / truth.count(c))


def f1_cases(rng: Random):
    for classes, n in ((2, 8), (3, 40), (4, 9), (5, 60)):
        truth = rng.choices(range(classes), weights=range(1, classes + 1), k=n)
        said = [t if rng.random() < 0.6 else rng.randrange(classes) for t in truth]
        every = list(range(classes))
        each = [f1(truth, said, c) for c in every]
        share = [truth.count(c) / n for c in every]
        yield Case(
            f"be the mean over {classes} classes of each class's F1",
            (truth, said, classes),
            statistics.fmean(each),
            wrong={
                "it is the accuracy (for one label a row, micro-F1 is the same)": lambda t=truth, s=said: (
                    statistics.fmean(a == b for a, b in zip(t, s, strict=True))
                ),
                "classes are weighted by how many rows they have": lambda e=each, w=share: sum(
                    a * b for a, b in zip(e, w, strict=True)
                ),
                "the factor 2 of the harmonic mean is missing": lambda e=each: statistics.fmean(e) / 2,
                "it is the F1 of the last class only": lambda e=each: e[-1],
                "it is the mean precision": lambda t=truth, s=said, e=every: statistics.fmean(
                    f1(t, s, c, lambda p, r: p) for c in e
                ),
                "it is the mean recall": lambda t=truth, s=said, e=every: statistics.fmean(
                    f1(t, s, c, lambda p, r: r) for c in e
                ),
                "precision and recall are averaged: F1 is their harmonic mean": lambda t=truth, s=said, e=every: (
                    statistics.fmean(f1(t, s, c, lambda p, r: (p + r) / 2) for c in e)
                ),
            },
        )


# calibration ---------------------------------------------------------------------------------------------------------
def calibration(probabilities, truth, bins, **way) -> float:
    """Σ_b n_b/n · |accuracy_b − confidence_b|, a row at a time."""
    rows = []
    for p, t in zip(probabilities.tolist(), truth.tolist(), strict=True):
        said = max(range(len(p)), key=p.__getitem__)
        rows.append((p[t] if way.get("of the truth") else p[said], said == t))
    total = []
    for b in range(bins):
        inside = [(p, right) for p, right in rows if b / bins < p <= (b + 1) / bins]
        if inside:
            gap = statistics.fmean(right for _, right in inside) - statistics.fmean(p for p, _ in inside)
            total.append((len(inside), gap if way.get("signed") else gap**2 if way.get("squared") else abs(gap)))
    if way.get("alike"):
        return statistics.fmean(gap for _, gap in total)
    if way.get("largest"):
        return max(gap for _, gap in total)
    return sum(n * gap for n, gap in total) / len(rows)


def calibration_cases(rng: Random):
    for classes, n, bins in ((2, 60, 10), (3, 40, 5), (4, 25, 15), (10, 80, 8)):
        P = (normal(rng, n, classes, dtype=torch.float64) * 1.7).softmax(-1)
        truth = torch.tensor([rng.choices(range(classes), weights=p)[0] for p in P.tolist()])
        args = (P, truth, bins)
        flat = [max(p) for p in P.tolist()]
        accuracy = statistics.fmean((P.argmax(-1) == truth).tolist())
        ways = {
            "every bin weighs the same: weigh it by its rows": {"alike": True},
            "gaps of opposite sign cancel: take each one's absolute value": {"signed": True},
            "gaps are squared": {"squared": True},
            "it is the largest gap": {"largest": True},
            "the confidence is that of the true class: take that of the class which the model names": {
                "of the truth": True
            },
        }
        known = {name: lambda a=args, w=way: calibration(*a, **w) for name, way in ways.items()}
        known["all rows are in one bin"] = lambda f=flat, a=accuracy: abs(statistics.fmean(f) - a)
        yield Case(
            f"be Σ n_b/n·|accuracy_b − confidence_b| over {bins} bins, for {n} rows of {classes} classes",
            args,
            calibration(*args),
            wrong=known,
        )


# when to stop --------------------------------------------------------------------------------------------------------
def stopped(losses: list[float], patience: int, **way) -> tuple[int, int]:
    best, least, waited = 0, INF, 0
    for i, loss in enumerate(losses):
        before = losses[i - 1] if way.get("than before") and i else least
        better = loss <= before if way.get("ties") else loss < before
        if better:
            best, least, waited = i, loss, 0
        else:
            waited += 1
        if waited >= patience + way.get("later", 0):
            return i, (i if way.get("last") else best)
    return len(losses) - 1, (len(losses) - 1 if way.get("last") else best)


def stop_cases(rng: Random):
    for n, patience in ((12, 2), (20, 3), (9, 1), (8, 30)):
        losses, level = [], 5.0
        for _ in range(n):
            level -= rng.uniform(-0.6, 0.7)
            losses.append(round(level, 1))
        if n > 10:
            losses[2], losses[rng.randint(4, 6)] = losses[1], NAN
        usual = stopped(losses, patience)
        ways = {
            "the last look is called the best: training goes on for a while after it": {"last": True},
            "a look is compared with the one before it: compare with the best so far": {"than before": True},
            "it stops one look later": {"later": 1},
            "it stops one look earlier": {"later": -1},
            "a look that is equal counts as better": {"ties": True},
        }
        known = {
            name: lambda a=(losses, patience), w=way: stopped(*a, **w)
            for name, way in ways.items()
            if stopped(losses, patience, **way) != usual
        } | {"the two changed places: first where it stops, then which look is kept": lambda u=usual: u[::-1]}
        yield Case(
            f"say where to stop and which look was best, among {n} looks with patience {patience}",
            (losses, patience),
            usual,
            wrong=known,
        )


# which rate ----------------------------------------------------------------------------------------------------------
def chosen(losses: dict[float, list[float]]) -> tuple[float, bool]:
    """(the rate of least mean loss, whether a smaller and a larger one were tried)."""
    means = {rate: math.fsum(each) / len(each) for rate, each in losses.items()}
    whole = {rate: mean for rate, mean in means.items() if math.isfinite(mean)}
    if not whole:
        raise ValueError("every rate diverged")
    best = min(sorted(whole), key=whole.__getitem__)
    return best, min(losses) < best < max(losses)


def rate_cases(rng: Random):
    grid = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    for at, size, poison in ((2, 5, None), (0, 4, None), (3, 4, INF), (1, 4, NAN), (2, 4, NAN)):
        rates = grid[rng.randint(0, 2) :][:size]
        losses = {
            r: [round(1 + abs(i - at) * 0.5 + rng.uniform(0, 0.3), 3) for _ in range(3)] for i, r in enumerate(rates)
        }
        if poison is None:  # a rate far from the best has one lucky seed
            losses[rates[0 if at else -1]] = [4.1, 0.2, 4.3]
        else:  # one seed diverged at a neighbour, whose other two are the best of all
            worst = rates[(at + 1) % size if at + 1 < size else at - 1]
            losses[worst] = [0.01, poison, 0.01]
        shuffled = dict(rng.sample(list(losses.items()), len(losses)))
        right = chosen(shuffled)
        single = min(shuffled, key=lambda r: min(x for x in shuffled[r] if x == x))
        known = {}
        if single != right[0]:
            known["the best single run chooses, and it may be luck: take the mean over the seeds"] = (
                lambda s=single, d=shuffled: (s, min(d) < s < max(d))
            )
        known["it returns the loss, not the rate"] = lambda r=right, d=shuffled: (
            statistics.fmean(d[r[0]]), r[1]
        )  # fmt: skip
        if poison is not None:
            kept = {r: [x for x in each if math.isfinite(x)] for r, each in shuffled.items()}
            known["runs that diverged are left out of the mean, so the rate looks good"] = lambda k=kept: chosen(k)
            whole = {r: e for r, e in shuffled.items() if all(map(math.isfinite, e))}
            if chosen(whole) != right:
                known["a rate that diverged was tried, too: it counts"] = lambda w=whole: chosen(w)
        if poison is None or len(known) == 2:
            known["the second value is turned round"] = lambda r=right: (r[0], not r[1])
        yield Case(
            f"find the rate of least mean validation loss among {size}, and say whether it lies inside",
            (shuffled,),
            right,
            wrong=known,
        )
    yield Case(
        "raise a ValueError when every rate diverged", ({0.1: [NAN, 2.0], 0.3: [INF, INF]},), Raises("ValueError")
    )


# the recipe ----------------------------------------------------------------------------------------------------------
# A mean over DRAWS lights and splits, above a new head on the frozen network at the best of HEADS. One light is a
# lottery; how far right and wrong recipes are from MARGIN in standard errors of the mean is measured in test_check.
MARGIN, DRAWS = 0.12, 5
HEADS = (1e-2, 3e-2, 1e-1)
SHAPES = {"lower": (64, 64), "upper": (64, 64), "head": (10, 64)}
BUDGETS = ((512, 639), (1024, 2900))


def new_heads(x: torch.Tensor, y: torch.Tensor, hidden: torch.Tensor, truth: torch.Tensor) -> float:
    """The accuracy of a new head on what the frozen layers make of x (k, n, 64): the mean over k at the best rate."""
    model = drive.network(drive.base())
    head = model.head
    with torch.no_grad():
        x, hidden = model[:-1](x), model[:-1](hidden)
    reached = []
    for lr in HEADS:
        right = []
        for rows, labels, others, classes in zip(x, y, hidden, truth, strict=True):
            model.load_state_dict(drive.base())
            drive.train(head, head.parameters(), rows, labels, Plan(drive.STEPS, lr, drive.BATCH, 0, "linear"))
            right.append((head(others).argmax(-1) == classes).double().mean().item())
        reached.append(statistics.fmean(right))
    return max(reached)


def lights(rng: Random, draws: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures (draws, 200, 64) under a light of their own with their labels, and hidden ones with theirs."""
    pictures, labels = drive.digits()
    found = []
    for seed in rng.sample(range(10**6), draws):
        rows = drive.READ + torch.randperm(len(labels) - drive.READ, generator=torch.Generator().manual_seed(seed))
        found.append((drive.lit(pictures[rows], seed), labels[rows]))
    x, y = (torch.stack(each) for each in zip(*found, strict=True))
    return x[:, :200], y[:, :200], x[:, 300:], y[:, 300:]


def recipe_cases(rng: Random):
    x, y, hidden, truth = lights(rng, DRAWS)
    head = new_heads(x, y, hidden, truth)
    for low, high in BUDGETS:
        budget = rng.randint(low, high)

        def judge(seen, budget=budget):
            if seen["trains"] > budget:
                return f"It trains {seen['trains']:,} numbers, and the budget is {budget:,}."
            reached = (torch.tensor(seen["classes"]).view_as(truth) == truth).double().mean().item()
            if not reached >= head + MARGIN:
                return (
                    f"It reads {reached:.1%} of the hidden pictures, as the mean over {DRAWS} lights; "
                    f"{head + MARGIN:.1%} are asked for, which is {100 * MARGIN:.0f} points more than a new head on "
                    f"the frozen network reads ({head:.1%})."
                )

        yield Case(
            f"train at most {budget:,} numbers and read hidden pictures much better than a new head does",
            (dict(SHAPES), budget, drive.base(), x, y, hidden),
            judge=judge,
            lenses=False,
        )


# find the bug --------------------------------------------------------------------------------------------------------
def cheapest(scores, cost, matters, t, **way) -> str:
    """The least cost among those that are surely not worse than the best by more than `matters`."""
    best = max(scores, key=lambda name: statistics.fmean(scores[name]))

    def bound(name: str) -> float:
        gaps = [b - s for b, s in zip(scores[best], scores[name], strict=True)]
        n = len(gaps)
        spread = statistics.pstdev(gaps) if way.get("population") else statistics.stdev(gaps)
        if way.get("unpaired"):
            spread = math.hypot(statistics.stdev(scores[best]), statistics.stdev(scores[name]))
        half = t * spread / (1 if way.get("no root") else math.sqrt(n))
        if way.get("five"):
            half = 2.776 * spread / math.sqrt(5)
        sign = 0 if way.get("mean only") else -1 if way.get("low") else 1
        return statistics.fmean(gaps) + sign * half

    if way.get("best"):
        return best
    near = [name for name in scores if name == best or bound(name) <= matters]
    return (max if way.get("dearest") else min)(near, key=lambda name: cost[name])


WAYS = {
    "only the means are compared: a wide interval may hide a loss": {"mean only": True},
    "the lower end of the interval decides, so that whatever cannot be told apart counts as equal": {"low": True},
    "seeds are not paired: take the differences seed by seed": {"unpaired": True},
    "the spread is not divided by √n": {"no root": True},
    "the spread is taken with n: a sample's has n − 1": {"population": True},
    "it counts on five seeds: use the t and the number of seeds that are given": {"five": True},
    "the dearest of them is taken": {"dearest": True},
    "the best is taken, whatever it costs": {"best": True},
}


def choice_cases(rng: Random):
    done = set()
    for _ in range(400):
        if done == set(WAYS):
            break
        n = rng.choice((3, 4, 5))
        t = {3: 4.303, 4: 3.182, 5: 2.776}[n]
        shared = [rng.gauss(0, 0.02) for _ in range(n)]
        names = rng.sample(["LoRA", "head", "full", "BitFit", "DoRA"], 4)
        scores = {
            name: [round(0.8 - drop + s + rng.gauss(0, noise), 4) for s in shared]
            for name, drop, noise in zip(
                names, (0.0, 0.004, 0.012, 0.03), rng.sample((0.002, 0.004, 0.02, 0.006), 4), strict=True
            )
        }
        cost = {name: rng.randint(1, 10**6) for name in names}
        args = (scores, cost, 0.02, t)
        right = cheapest(*args)
        ways = {name: cheapest(*args, **way) for name, way in WAYS.items()}
        new = {name for name, value in ways.items() if value != right} - done
        if not new:
            continue
        done |= new
        yield Case(
            "name the cheapest that is surely not worse than the best by more than 0.02",
            args,
            right,
            wrong={name: lambda v=value: v for name, value in ways.items() if value != right},
        )


EXERCISES = (
    Exercise(
        "macro_f1", "A score that small classes count in", f1_cases,
        (
            "For each class count three things: found, named without being it, missed.",
            "`predictions.count(c)` is found + wrongly named. What is `truth.count(c)`? A class without any counts "
            "in the mean, too.",
        ),
        ("macro_f1",),
    ),
    Exercise(
        "calibration_error", "Is it as sure as it is right?", calibration_cases,
        (
            "The largest probability of a row is its confidence; put each row into the bin of its confidence.",
            "0.3 of 10 bins lies in (0.2, 0.3]: round up, then one less. Two means in each bin, and the gap weighs "
            "as the bin's share.",
        ),
        ("calibration_error",),
    ),
    Exercise(
        "stop_early", "When to stop, and what to keep", stop_cases,
        (
            "Keep the least loss so far, where it was, and how many looks have passed since.",
            "A comparison with `<` is False for NaN, as it should be. How many looks have passed since the best one?",
        ),
        ("stop_early",),
    ),
    Exercise(
        "choose_rate", "Which learning rate", rate_cases,
        (
            "The mean of a list with NaN or infinity in it is not finite: such a rate is out, but it was tried.",
            "A mean with NaN in it is not finite. The best is among the finite ones; its neighbours are among *all* "
            "that were tried.",
        ),
        ("choose_rate",),
    ),
    Exercise(
        "recipe", "Your recipe, trained and scored", recipe_cases,
        (
            "The light is added to the picture before the first layer; four patterns ask for a change of rank 4.",
            "LoRA costs rank · 128 at a 64 × 64 layer. Put all of the budget where the light comes in, and try rates "
            "from 0.003 to 0.1.",
        ),
        ("recipe",), "capstone.adapt",
    ),
    Exercise(
        "cheapest_alike", "Find the bug", choice_cases,
        (
            "Take the differences best − candidate seed by seed: their mean, and their spread with n − 1.",
            "Differences first, seed by seed; then their mean and spread (`stdev` has n − 1). The best itself always "
            "belongs.",
        ),
        ("cheapest_alike",),
    ),
)  # fmt: skip
