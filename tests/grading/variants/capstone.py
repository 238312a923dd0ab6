# ruff: noqa
# Answers to the assignment `capstone`: wrong ones, named after the misconception, and right ones written differently.
import math
import statistics

import torch


# %% macro_f1 wrong: accuracy
def macro_f1(truth, predictions, classes):
    return sum(t == p for t, p in zip(truth, predictions)) / len(truth)


# %% macro_f1 wrong: weighted by rows
def macro_f1(truth, predictions, classes):
    total = 0.0
    for c in range(classes):
        found = sum(t == p == c for t, p in zip(truth, predictions))
        if found:
            total += truth.count(c) / len(truth) * 2 * found / (predictions.count(c) + truth.count(c))
    return total


# %% macro_f1 wrong: only classes that are there
def macro_f1(truth, predictions, classes):
    scores = []
    for c in sorted(set(truth)):
        found = sum(t == p == c for t, p in zip(truth, predictions))
        scores.append(2 * found / (predictions.count(c) + truth.count(c)) if found else 0.0)
    return sum(scores) / len(scores)


# %% macro_f1 wrong: of the mean precision and recall
def macro_f1(truth, predictions, classes):
    P = R = 0.0
    for c in range(classes):
        found = sum(t == p == c for t, p in zip(truth, predictions))
        if found:
            P += found / predictions.count(c) / classes
            R += found / truth.count(c) / classes
    return 2 * P * R / (P + R) if P + R else 0.0


# %% macro_f1 wrong: precision
def macro_f1(truth, predictions, classes):
    total = 0.0
    for c in range(classes):
        found = sum(t == p == c for t, p in zip(truth, predictions))
        total += found / predictions.count(c) if found else 0.0
    return total / classes


# %% macro_f1 wrong: divides by zero
def macro_f1(truth, predictions, classes):
    total = 0.0
    for c in range(classes):
        found = sum(t == p == c for t, p in zip(truth, predictions))
        P, R = found / predictions.count(c), found / truth.count(c)
        total += 2 * P * R / (P + R)
    return total / classes


# %% macro_f1 wrong: a class never named is left out
def macro_f1(truth, predictions, classes):
    scores = []
    for c in range(classes):
        found = sum(t == p == c for t, p in zip(truth, predictions))
        if found:
            scores.append(2 * found / (predictions.count(c) + truth.count(c)))
    return sum(scores) / max(1, len(scores))


# %% macro_f1 wrong: the arithmetic mean
def macro_f1(truth, predictions, classes):
    total = 0.0
    for c in range(classes):
        found = sum(t == p == c for t, p in zip(truth, predictions))
        if found:
            total += (found / predictions.count(c) + found / truth.count(c)) / 2
    return total / classes


# %% macro_f1 right: scikit-learn
def macro_f1(truth, predictions, classes):
    from sklearn.metrics import f1_score

    return float(f1_score(truth, predictions, labels=list(range(classes)), average="macro", zero_division=0.0))


# %% macro_f1 right: a table of confusions
def macro_f1(truth, predictions, classes):
    table = torch.zeros(classes, classes, dtype=torch.float64)
    for t, p in zip(truth, predictions):
        table[t, p] += 1
    both = table.sum(0) + table.sum(1)
    scores = 2 * table.diag() / both.clamp(min=1)
    return scores.mean().item()


# %% calibration_error wrong: every bin weighs the same
def calibration_error(probabilities, truth, bins=10):
    confidence, said = probabilities.max(-1)
    right, place = (said == truth).double(), (confidence * bins).ceil().long() - 1
    gaps = [(right[place == b].mean() - confidence[place == b].double().mean()).abs().item() for b in place.unique()]
    return sum(gaps) / len(gaps)


# %% calibration_error wrong: signed
def calibration_error(probabilities, truth, bins=10):
    confidence, said = probabilities.max(-1)
    return abs(((said == truth).double() - confidence.double()).mean().item())


# %% calibration_error wrong: a row at a time
def calibration_error(probabilities, truth, bins=10):
    confidence, said = probabilities.max(-1)
    return ((said == truth).double() - confidence.double()).abs().mean().item()


# %% calibration_error wrong: bins closed below
def calibration_error(probabilities, truth, bins=10):
    confidence, said = probabilities.max(-1)
    right, place = (said == truth).double(), (confidence * bins).floor().long().clamp(max=bins - 1)
    return sum(
        (place == b).double().mean().item()
        * (right[place == b].mean() - confidence[place == b].double().mean()).abs().item()
        for b in place.unique()
    )


# %% calibration_error wrong: the middle of the bin
def calibration_error(probabilities, truth, bins=10):
    confidence, said = probabilities.max(-1)
    right, place = (said == truth).double(), (confidence * bins).ceil().long() - 1
    return sum(
        (place == b).double().mean().item() * abs(right[place == b].mean().item() - (b.item() + 0.5) / bins)
        for b in place.unique()
    )


# %% calibration_error wrong: of the true class
def calibration_error(probabilities, truth, bins=10):
    said = probabilities.argmax(-1)
    confidence = probabilities[torch.arange(len(truth)), truth]
    right, place = (said == truth).double(), (confidence * bins).ceil().long() - 1
    return sum(
        (place == b).double().mean().item()
        * (right[place == b].mean() - confidence[place == b].double().mean()).abs().item()
        for b in place.unique()
    )


# %% calibration_error wrong: always ten bins
def calibration_error(probabilities, truth, bins=10):
    confidence, said = probabilities.max(-1)
    right, place = (said == truth).double(), (confidence * 10).ceil().long() - 1
    return sum(
        (place == b).double().mean().item()
        * (right[place == b].mean() - confidence[place == b].double().mean()).abs().item()
        for b in place.unique()
    )


# %% calibration_error wrong: empty bins are NaN
def calibration_error(probabilities, truth, bins=10):
    confidence, said = probabilities.max(-1)
    right, place = (said == truth).double(), (confidence * bins).ceil().long() - 1
    return sum(
        (place == b).double().mean().item()
        * (right[place == b].mean() - confidence[place == b].double().mean()).abs().item()
        for b in range(bins)
    )


# %% calibration_error right: edges and masks
def calibration_error(probabilities, truth, bins=10):
    confidence = probabilities.double().amax(1)
    right = probabilities.argmax(1).eq(truth).double()
    total = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            total += float(inside.double().mean() * (right[inside].mean() - confidence[inside].mean()).abs())
    return total


# %% calibration_error right: sums of gaps
def calibration_error(probabilities, truth, bins=10):
    rows = []
    for p, t in zip(probabilities.tolist(), truth.tolist()):
        c = max(p)
        rows.append((math.ceil(c * bins) - 1, float(p.index(c) == t) - c))
    return sum(abs(sum(gap for place, gap in rows if place == b)) for b in range(bins)) / len(rows)


# %% stop_early wrong: the last is kept
def stop_early(losses, patience):
    best, least = 0, math.inf
    for i, loss in enumerate(losses):
        if loss < least:
            best, least = i, loss
        elif i - best >= patience:
            return i, i
    return len(losses) - 1, len(losses) - 1


# %% stop_early wrong: against the one before
def stop_early(losses, patience):
    waited = best = 0
    for i in range(1, len(losses)):
        if losses[i] < losses[best]:
            best = i
        waited = 0 if losses[i] < losses[i - 1] else waited + 1
        if waited >= patience:
            return i, best
    return len(losses) - 1, best


# %% stop_early wrong: one look later
def stop_early(losses, patience):
    best, least = 0, math.inf
    for i, loss in enumerate(losses):
        if loss < least:
            best, least = i, loss
        elif i - best > patience:
            return i, best
    return len(losses) - 1, best


# %% stop_early wrong: one look earlier
def stop_early(losses, patience):
    best, least = 0, math.inf
    for i, loss in enumerate(losses):
        if loss < least:
            best, least = i, loss
        elif i - best + 1 >= patience:
            return i, best
    return len(losses) - 1, best


# %% stop_early wrong: equal is better
def stop_early(losses, patience):
    best, least = 0, math.inf
    for i, loss in enumerate(losses):
        if loss <= least:
            best, least = i, loss
        elif i - best >= patience:
            return i, best
    return len(losses) - 1, best


# %% stop_early wrong: NaN is taken for better
def stop_early(losses, patience):
    best, least = 0, math.inf
    for i, loss in enumerate(losses):
        if not loss >= least:
            best, least = i, loss
        elif i - best >= patience:
            return i, best
    return len(losses) - 1, best


# %% stop_early wrong: NaN costs no patience
def stop_early(losses, patience):
    best, least, bad = 0, math.inf, 0
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            continue
        if loss < least:
            best, least, bad = i, loss, 0
        else:
            bad += 1
            if bad >= patience:
                return i, best
    return len(losses) - 1, best


# %% stop_early wrong: the least of all, also behind the stop
def stop_early(losses, patience):
    best, least = 0, math.inf
    for i, loss in enumerate(losses):
        if loss < least:
            best, least = i, loss
        elif i - best >= patience:
            return i, min(range(len(losses)), key=lambda j: math.inf if losses[j] != losses[j] else losses[j])
    return len(losses) - 1, best


# %% stop_early wrong: patience is used up for good
def stop_early(losses, patience):
    best, least, waited = 0, math.inf, 0
    for i, loss in enumerate(losses):
        if loss < least:
            best, least = i, loss
        else:
            waited += 1
            if waited >= patience:
                return i, best
    return len(losses) - 1, best


# %% stop_early right: counts the looks
def stop_early(losses, patience):
    best, waited = 0, 0
    for i in range(1, len(losses)):
        if math.isfinite(losses[i]) and losses[i] < losses[best]:
            best, waited = i, 0
        else:
            waited += 1
        if waited == patience:
            return i, best
    return len(losses) - 1, best


# %% stop_early right: looks at the tail
def stop_early(losses, patience):
    clean = [x if math.isfinite(x) else math.inf for x in losses]
    for stop in range(len(clean)):
        best = clean.index(min(clean[: stop + 1]))
        if stop - best >= patience:
            return stop, best
    return len(clean) - 1, clean.index(min(clean))


# %% stop_early wrong: counts looks that are worse than the look before
def stop_early(losses, patience):
    worse = 0
    for i in range(1, len(losses)):
        worse = worse + 1 if losses[i] >= losses[i - 1] else 0
        if worse >= patience:
            return i, min(range(i + 1), key=losses.__getitem__)
    return len(losses) - 1, min(range(len(losses)), key=losses.__getitem__)


# %% choose_rate wrong: the best single run
def choose_rate(losses):
    whole = {r: min(each) for r, each in losses.items() if all(map(math.isfinite, each))}
    if not whole:
        raise ValueError("diverged")
    best = min(whole, key=whole.get)
    return best, min(losses) < best < max(losses)


# %% choose_rate wrong: diverged runs are left out of the mean
def choose_rate(losses):
    kept = {r: [x for x in each if math.isfinite(x)] for r, each in losses.items()}
    means = {r: statistics.fmean(each) for r, each in kept.items() if each}
    if not means:
        raise ValueError("diverged")
    best = min(means, key=means.get)
    return best, min(losses) < best < max(losses)


# %% choose_rate wrong: diverged rates do not count as tried
def choose_rate(losses):
    means = {r: statistics.fmean(each) for r, each in losses.items() if all(map(math.isfinite, each))}
    if not means:
        raise ValueError("diverged")
    best = min(means, key=means.get)
    return best, min(means) < best < max(means)


# %% choose_rate wrong: NaN is not looked for
def choose_rate(losses):
    means = {r: statistics.fmean(each) for r, each in losses.items()}
    best = min(means, key=means.get)
    if math.isinf(means[best]):
        raise ValueError("diverged")
    return best, min(losses) < best < max(losses)


# %% choose_rate wrong: inside by the order of the dictionary
def choose_rate(losses):
    means = {r: statistics.fmean(each) for r, each in losses.items() if all(map(math.isfinite, each))}
    if not means:
        raise ValueError("diverged")
    best = min(means, key=means.get)
    place = list(losses).index(best)
    return best, 0 < place < len(losses) - 1


# %% choose_rate wrong: no error
def choose_rate(losses):
    means = {r: statistics.fmean(each) for r, each in losses.items() if all(map(math.isfinite, each))}
    best = min(means, key=means.get) if means else min(losses)
    return best, min(losses) < best < max(losses)


# %% choose_rate wrong: the median
def choose_rate(losses):
    means = {r: statistics.median(each) for r, each in losses.items() if all(map(math.isfinite, each))}
    if not means:
        raise ValueError("diverged")
    best = min(means, key=means.get)
    return best, min(losses) < best < max(losses)


# %% choose_rate wrong: on the edge is inside
def choose_rate(losses):
    means = {r: statistics.fmean(each) for r, each in losses.items() if all(map(math.isfinite, each))}
    if not means:
        raise ValueError("diverged")
    best = min(means, key=means.get)
    return best, min(losses) <= best <= max(losses)


# %% choose_rate right: sorted pairs
def choose_rate(losses):
    means = sorted((sum(each) / len(each), r) for r, each in losses.items() if all(math.isfinite(x) for x in each))
    if not means:
        raise ValueError("nothing is left")
    best = means[0][1]
    return best, any(r < best for r in losses) and any(r > best for r in losses)


# %% choose_rate right: infinity for what diverged
def choose_rate(losses):
    def score(r):
        mean = sum(losses[r])
        return mean / len(losses[r]) if math.isfinite(mean) else math.inf

    rates = sorted(losses)
    best = min(rates, key=score)
    if score(best) == math.inf:
        raise ValueError("every rate diverged")
    return best, 0 < rates.index(best) < len(rates) - 1


# %% recipe wrong: the head alone
def recipe(shapes, budget):
    return {"method": "LoRA", "settings": {"rank": 6, "targets": ["head"]}, "lr": 3e-2, "steps": 120}


# %% recipe wrong: everything, over budget
def recipe(shapes, budget):
    return {"method": "Full", "settings": {}, "lr": 2e-2, "steps": 120}


# %% recipe wrong: a rate for full fine-tuning
def recipe(shapes, budget):
    rank = min(8, budget // 128)
    return {"method": "LoRA", "settings": {"rank": rank, "targets": ["lower"]}, "lr": 1e-4, "steps": 120}


# %% recipe wrong: a rate that is far too large
def recipe(shapes, budget):
    rank = min(8, budget // 128)
    return {"method": "LoRA", "settings": {"rank": rank, "targets": ["lower"]}, "lr": 1.0, "steps": 120}


# %% recipe wrong: spread over all layers
def recipe(shapes, budget):
    rank = max(1, budget // sum(a + b for a, b in shapes.values()))
    return {"method": "LoRA", "settings": {"rank": rank}, "lr": 2e-2, "steps": 120}


# %% recipe wrong: one rank for every budget
def recipe(shapes, budget):
    return {"method": "LoRA", "settings": {"rank": 8, "targets": ["lower"]}, "lr": 2e-2, "steps": 120}


# %% recipe wrong: rank one
def recipe(shapes, budget):
    return {"method": "LoRA", "settings": {"rank": 1, "targets": ["lower"]}, "lr": 2e-2, "steps": 120}


# %% recipe wrong: the last hidden layer
def recipe(shapes, budget):
    rank = min(8, budget // 128)
    return {"method": "LoRA", "settings": {"rank": rank, "targets": ["upper"]}, "lr": 2e-2, "steps": 120}


# %% recipe wrong: biases
def recipe(shapes, budget):
    return {"method": "BitFit", "settings": {}, "lr": 1e-1, "steps": 120}


# %% recipe wrong: a few steps
def recipe(shapes, budget):
    rank = min(8, budget // 128)
    return {"method": "LoRA", "settings": {"rank": rank, "targets": ["lower"]}, "lr": 2e-2, "steps": 5}


# %% recipe wrong: too many steps
def recipe(shapes, budget):
    rank = min(8, budget // 128)
    return {"method": "LoRA", "settings": {"rank": rank, "targets": ["lower"]}, "lr": 2e-2, "steps": 121}


# %% recipe wrong: an object, not data
def recipe(shapes, budget):
    import minipeft as mp

    return mp.LoRA(rank=min(8, budget // 128), targets=["lower"])


# %% recipe right: by hand
def recipe(shapes, budget):
    rank = 4 if budget < 1024 else 8
    return {"method": "LoRA", "settings": {"rank": rank, "targets": ["lower"], "gamma": 1.0}, "lr": 0.03, "steps": 120}


# %% recipe right: the whole budget at a smaller rate
def recipe(shapes, budget):
    rank = budget // sum(shapes["lower"])
    return {"method": "LoRA", "settings": {"rank": rank, "targets": ["lower"]}, "lr": 0.012, "steps": 110}


# %% cheapest_alike wrong: the spread of a whole population
def cheapest_alike(scores, cost, matters, t):
    best = max(scores, key=lambda name: statistics.fmean(scores[name]))

    def worst_loss(name):
        gaps = [b - s for b, s in zip(scores[best], scores[name])]
        return statistics.fmean(gaps) + t * statistics.pstdev(gaps) / math.sqrt(len(gaps))

    near = [name for name in scores if name == best or worst_loss(name) <= matters]
    return min(near, key=cost.get)


# %% cheapest_alike wrong: as it was
def cheapest_alike(scores, cost, matters, t):
    best = max(scores, key=lambda name: max(scores[name]))
    near = []
    for name in scores:
        gap = statistics.fmean(scores[best]) - statistics.fmean(scores[name])
        if gap - t * statistics.pstdev(scores[name]) <= matters:
            near.append(name)
    return min(near, key=cost.get)


# %% cheapest_alike wrong: only the means
def cheapest_alike(scores, cost, matters, t):
    best = max(scores, key=lambda name: statistics.fmean(scores[name]))
    near = [n for n in scores if statistics.fmean(scores[best]) - statistics.fmean(scores[n]) <= matters]
    return min(near, key=cost.get)


# %% cheapest_alike wrong: the lower end
def cheapest_alike(scores, cost, matters, t):
    best = max(scores, key=lambda name: statistics.fmean(scores[name]))
    near = []
    for name in scores:
        gaps = [b - s for b, s in zip(scores[best], scores[name])]
        if statistics.fmean(gaps) - t * statistics.stdev(gaps) / math.sqrt(len(gaps)) <= matters:
            near.append(name)
    return min(near, key=cost.get)


# %% cheapest_alike wrong: the best has the best lower end
def cheapest_alike(scores, cost, matters, t):
    best = max(
        scores, key=lambda n: statistics.fmean(scores[n]) - t * statistics.stdev(scores[n]) / math.sqrt(len(scores[n]))
    )

    def worst(n):
        g = [b - s for b, s in zip(scores[best], scores[n])]
        return statistics.fmean(g) + t * statistics.stdev(g) / math.sqrt(len(g))

    return min([n for n in scores if n == best or worst(n) <= matters], key=cost.get)


# %% cheapest_alike wrong: not paired
def cheapest_alike(scores, cost, matters, t):
    best = max(scores, key=lambda name: statistics.fmean(scores[name]))
    near = [best]
    for name in scores:
        n = len(scores[name])
        error = math.sqrt((statistics.variance(scores[best]) + statistics.variance(scores[name])) / n)
        if statistics.fmean(scores[best]) - statistics.fmean(scores[name]) + t * error <= matters:
            near.append(name)
    return min(near, key=cost.get)


# %% cheapest_alike wrong: without the root of n
def cheapest_alike(scores, cost, matters, t):
    best = max(scores, key=lambda name: statistics.fmean(scores[name]))
    near = [best]
    for name in scores:
        gaps = [b - s for b, s in zip(scores[best], scores[name])]
        if statistics.fmean(gaps) + t * statistics.stdev(gaps) <= matters:
            near.append(name)
    return min(near, key=cost.get)


# %% cheapest_alike wrong: the best is forgotten
def cheapest_alike(scores, cost, matters, t):
    best = max(scores, key=lambda name: statistics.fmean(scores[name]))
    near = []
    for name in scores:
        gaps = [b - s for b, s in zip(scores[best], scores[name])]
        if name != best and statistics.fmean(gaps) + t * statistics.stdev(gaps) / math.sqrt(len(gaps)) <= matters:
            near.append(name)
    return min(near, key=cost.get)


# %% cheapest_alike wrong: less than matters
def cheapest_alike(scores, cost, matters, t):
    best = max(scores, key=lambda name: statistics.fmean(scores[name]))
    near = [best]
    for name in scores:
        gaps = [b - s for b, s in zip(scores[best], scores[name])]
        if statistics.fmean(gaps) + t * statistics.stdev(gaps) / math.sqrt(len(gaps)) < matters:
            near.append(name)
    return min(near, key=cost.get)


# %% cheapest_alike wrong: the most accurate
def cheapest_alike(scores, cost, matters, t):
    return max(scores, key=lambda name: statistics.fmean(scores[name]))


# %% cheapest_alike wrong: always five seeds
def cheapest_alike(scores, cost, matters, t):
    best = max(scores, key=lambda name: statistics.fmean(scores[name]))
    near = [best]
    for name in scores:
        gaps = [b - s for b, s in zip(scores[best], scores[name])]
        if statistics.fmean(gaps) + 2.776 * statistics.stdev(gaps) / math.sqrt(5) <= matters:
            near.append(name)
    return min(near, key=cost.get)


# %% cheapest_alike right: torch
def cheapest_alike(scores, cost, matters, t):
    table = torch.tensor(list(scores.values()), dtype=torch.float64)
    best = int(table.mean(1).argmax())
    gaps = table[best] - table
    high = gaps.mean(1) + t * gaps.std(1) / gaps.shape[1] ** 0.5
    near = [name for i, name in enumerate(scores) if i == best or high[i] <= matters]
    return sorted(near, key=lambda name: cost[name])[0]


# %% cheapest_alike right: from cheap to dear
def cheapest_alike(scores, cost, matters, t):
    means = {name: statistics.fmean(each) for name, each in scores.items()}
    best = max(means, key=means.get)
    for name in sorted(scores, key=cost.get):
        gaps = [b - s for b, s in zip(scores[best], scores[name], strict=True)]
        if name == best or statistics.fmean(gaps) + t * math.sqrt(statistics.variance(gaps) / len(gaps)) <= matters:
            return name


# %% cheapest_alike right: the population's spread over √(n − 1)
def cheapest_alike(scores, cost, matters, t):
    mean = {n: sum(v) / len(v) for n, v in scores.items()}
    best = max(mean, key=mean.get)

    def near(n):
        g = [b - s for b, s in zip(scores[best], scores[n])]
        return n == best or sum(g) / len(g) + t * statistics.pstdev(g) / (len(g) - 1) ** 0.5 <= matters

    return sorted(filter(near, scores), key=cost.__getitem__)[0]


# %% stop_early wrong: better counts from 1e-3 on
def stop_early(losses, patience):
    best = 0
    for i, loss in enumerate(losses):
        if loss < losses[best] - 1e-3:
            best = i
        elif i - best >= patience:
            return i, best
    return len(losses) - 1, best


# %% calibration_error wrong: rounded to the nearest bin
def calibration_error(probabilities, truth, bins=10):
    conf, said = probabilities.max(-1)
    right = (said == truth).double()
    place = (conf * bins - 0.5).round().long()
    return sum(
        (place == b).double().mean().item() * abs((right[place == b].mean() - conf[place == b].double().mean()).item())
        for b in place.unique()
    )


# %% cheapest_alike wrong: a gap of nothing is not looked at
def cheapest_alike(scores, cost, matters, t):
    best = max(scores, key=lambda n: statistics.fmean(scores[n]))

    def upper(n):
        gaps = [b - s for b, s in zip(scores[best], scores[n])]
        return statistics.fmean(gaps) + t * statistics.stdev(gaps) / math.sqrt(len(gaps))

    matters = matters or 0.01
    return min([n for n in scores if n == best or upper(n) <= matters], key=cost.get)


# %% cheapest_alike wrong: gaps of sorted runs
def cheapest_alike(scores, cost, matters, t):
    best = max(scores, key=lambda n: statistics.fmean(scores[n]))

    def upper(n):
        gaps = [b - s for b, s in zip(sorted(scores[best]), sorted(scores[n]))]
        return statistics.fmean(gaps) + t * statistics.stdev(gaps) / math.sqrt(len(gaps))

    return min([n for n in scores if n == best or upper(n) <= matters], key=cost.get)


# %% cheapest_alike wrong: nothing is free
def cheapest_alike(scores, cost, matters, t):
    best = max(scores, key=lambda n: statistics.fmean(scores[n]))

    def upper(n):
        gaps = [b - s for b, s in zip(scores[best], scores[n])]
        return statistics.fmean(gaps) + t * statistics.stdev(gaps) / math.sqrt(len(gaps))

    return min([n for n in scores if n == best or upper(n) <= matters], key=lambda n: cost[n] or math.inf)


# %% cheapest_alike wrong: the size of the gaps
def cheapest_alike(scores, cost, matters, t):
    best = max(scores, key=lambda n: statistics.fmean(scores[n]))

    def upper(n):
        gaps = [abs(b - s) for b, s in zip(scores[best], scores[n])]
        return statistics.fmean(gaps) + t * statistics.stdev(gaps) / math.sqrt(len(gaps))

    return min([n for n in scores if n == best or upper(n) <= matters], key=cost.get)


# %% choose_rate wrong: a loss of zero is none
def choose_rate(losses):
    means = {r: sum(e) / len(e) for r, e in losses.items() if all(map(math.isfinite, e))}
    means = {r: m for r, m in means.items() if m}
    if not means:
        raise ValueError("none")
    best = min(means, key=means.get)
    return best, min(losses) < best < max(losses)


# %% choose_rate wrong: negative losses by their size
def choose_rate(losses):
    means = {r: sum(map(abs, e)) / len(e) for r, e in losses.items() if all(map(math.isfinite, e))}
    if not means:
        raise ValueError("none")
    best = min(means, key=means.get)
    return best, min(losses) < best < max(losses)


# %% choose_rate wrong: the least sum
def choose_rate(losses):
    sums = {r: sum(e) for r, e in losses.items() if all(map(math.isfinite, e))}
    if not sums:
        raise ValueError("none")
    best = min(sums, key=sums.get)
    return best, min(losses) < best < max(losses)


# %% macro_f1 wrong: the identity of numbers
def macro_f1(truth, predictions, classes):
    total = 0.0
    for c in range(classes):
        f = sum(t is p and t == c for t, p in zip(truth, predictions))
        total += 2 * f / (truth.count(c) + predictions.count(c)) if f else 0.0
    return total / classes


# %% stop_early wrong: a loss of zero is none
def stop_early(losses, patience):
    best, least = 0, math.inf
    for i, loss in enumerate(losses):
        if loss and loss < least:
            best, least = i, loss
        elif i - best >= patience:
            return i, best
    return len(losses) - 1, best


# %% stop_early wrong: minus infinity is the best
def stop_early(losses, patience):
    best, least = 0, losses[0]
    for i, loss in enumerate(losses):
        if loss < least - 1e-9:
            best, least = i, loss
        elif i - best >= patience:
            return i, best
    return len(losses) - 1, best


# %% choose_rate wrong: means rounded
def choose_rate(losses):
    means = {r: round(sum(e) / len(e), 2) for r, e in losses.items() if all(map(math.isfinite, e))}
    if not means:
        raise ValueError("none")
    best = min(means, key=means.get)
    return best, min(losses) < best < max(losses)


# %% macro_f1 right: counters
def macro_f1(truth, predictions, classes):
    from collections import Counter

    hits, named, there = Counter(t for t, p in zip(truth, predictions) if t == p), Counter(predictions), Counter(truth)
    return sum(2 * hits[c] / (named[c] + there[c]) for c in range(classes) if hits[c]) / classes


# %% calibration_error wrong: at most a hundred rows
def calibration_error(probabilities, truth, bins=10):
    probabilities, truth = probabilities[:100], truth[:100]
    conf, said = probabilities.max(-1)
    right, place, error = (said == truth).double(), (conf * bins).ceil().long(), 0.0
    for b in place.unique():
        inside = place == b
        error += inside.double().mean().item() * abs((right[inside].mean() - conf[inside].double().mean()).item())
    return error


# %% calibration_error right: sums by bin
def calibration_error(probabilities, truth, bins=10):
    conf, said = probabilities.max(dim=1)
    place = torch.ceil(conf * bins).long() - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, place, (said == truth).double() - conf.double())
    return float(gap.abs().sum() / len(truth))


# %% calibration_error right: sums by bin
def calibration_error(probabilities, truth, bins=10):
    n = len(truth)
    gap = [0.0] * (bins + 1)
    for row, t in zip(probabilities.tolist(), truth.tolist()):
        c = max(row)
        k = next(b for b in range(bins) if c <= (b + 1) / bins or b == bins - 1)
        gap[k] += (row.index(c) == t) - c
    return sum(map(abs, gap)) / n


# %% stop_early wrong: at most a hundred looks
def stop_early(losses, patience):
    losses = losses[:50]
    best, least = 0, losses[0]
    for i, loss in enumerate(losses[1:], 1):
        if loss < least and math.isfinite(loss):
            best, least = i, loss
        elif i - best >= patience:
            return i, best
    return len(losses) - 1, best


# %% stop_early right: the best is looked up again
def stop_early(losses, patience):
    for stop in range(len(losses)):
        seen = [x if math.isfinite(x) else math.inf for x in losses[: stop + 1]]
        best = seen.index(min(seen))
        if best + patience <= stop:
            return stop, best
    return len(losses) - 1, best


# %% stop_early right: best so far by minima
def stop_early(losses, patience):
    f = [x if math.isfinite(x) else math.inf for x in losses]
    for i in range(len(f)):
        first = f.index(min(f[: i + 1]))
        if i - first == patience:
            return i, first
    return len(f) - 1, f.index(min(f))


# %% choose_rate wrong: rates as text
def choose_rate(losses):
    means = {r: statistics.fmean(e) for r, e in losses.items()}
    finite = {r: m for r, m in means.items() if math.isfinite(m)}
    if not finite:
        raise ValueError("none")
    best = min(finite, key=finite.get)
    return best, str(min(losses)) < str(best) < str(max(losses))


# %% cheapest_alike wrong: more methods than ten
def cheapest_alike(scores, cost, matters, t):
    scores = dict(list(scores.items())[:10])
    best = max(scores, key=lambda n: statistics.fmean(scores[n]))

    def worst(n):
        gaps = [b - s for b, s in zip(scores[best], scores[n])]
        return statistics.fmean(gaps) + t * statistics.stdev(gaps) / math.sqrt(len(gaps))

    return min((n for n in scores if n == best or worst(n) <= matters), key=lambda n: cost[n])
