# ruff: noqa: B905
# Answers to the assignment `worlds`: wrong ones, named after the misconception, and right ones written differently.
import math

import numpy as np
import torch


# %% average_factors wrong: all clients alike
def average_factors(pairs, rows):
    return sum(A for A, _ in pairs) / len(pairs), sum(B for _, B in pairs) / len(pairs)


# %% average_factors wrong: a sum
def average_factors(pairs, rows):
    return sum(n * A for (A, _), n in zip(pairs, rows)), sum(n * B for (_, B), n in zip(pairs, rows))


# %% average_factors wrong: divided by the number of clients
def average_factors(pairs, rows):
    k = len(rows)
    return sum(n / k * A for (A, _), n in zip(pairs, rows)), sum(n / k * B for (_, B), n in zip(pairs, rows))


# %% average_factors wrong: B first
def average_factors(pairs, rows):
    t = sum(rows)
    return sum(n / t * B for (_, B), n in zip(pairs, rows)), sum(n / t * A for (A, _), n in zip(pairs, rows))


# %% average_factors wrong: without the last client
def average_factors(pairs, rows):
    t = sum(rows[:-1]) or 1
    pairs, rows = (pairs[:-1], rows[:-1]) if len(rows) > 1 else (pairs, [1])
    return sum(n / t * A for (A, _), n in zip(pairs, rows)), sum(n / t * B for (_, B), n in zip(pairs, rows))


# %% average_factors wrong: in place
def average_factors(pairs, rows):
    t = sum(rows)
    A, B = pairs[0]
    A *= rows[0] / t
    B *= rows[0] / t
    for (A_k, B_k), n in zip(pairs[1:], rows[1:]):
        A += n / t * A_k
        B += n / t * B_k
    return A, B


# %% average_factors wrong: detached
def average_factors(pairs, rows):
    t = sum(rows)
    with torch.no_grad():
        return sum(n / t * A for (A, _), n in zip(pairs, rows)), sum(n / t * B for (_, B), n in zip(pairs, rows))


# %% average_factors wrong: only A is weighted
def average_factors(pairs, rows):
    t = sum(rows)
    return sum(n / t * A for (A, _), n in zip(pairs, rows)), sum(B for _, B in pairs) / len(pairs)


# %% average_factors right: einsum over a stack
def average_factors(pairs, rows):
    A, B = (torch.stack([pair[i] for pair in pairs]) for i in (0, 1))
    weights = torch.tensor(rows, dtype=torch.float64) / sum(rows)
    return torch.einsum("k,kij->ij", weights.to(A.dtype), A), torch.einsum("k,kij->ij", weights.to(B.dtype), B)


# %% average_factors right: a running mean
def average_factors(pairs, rows):
    seen, A, B = 0, torch.zeros_like(pairs[0][0]), torch.zeros_like(pairs[0][1])
    for (A_k, B_k), n in zip(pairs, rows):
        if n == 0:
            continue
        seen += n
        A, B = A + (A_k - A) * (n / seen), B + (B_k - B) * (n / seen)
    return A, B


# %% average_product wrong: the product of the means
def average_product(pairs, rows):
    t = sum(rows)
    A, B = (sum(n / t * pair[i] for pair, n in zip(pairs, rows)) for i in (0, 1))
    return B @ A


# %% average_product wrong: all clients alike
def average_product(pairs, rows):
    return sum(B @ A for A, B in pairs) / len(pairs)


# %% average_product wrong: a sum
def average_product(pairs, rows):
    return sum(n * (B @ A) for (A, B), n in zip(pairs, rows))


# %% average_product wrong: the weight twice
def average_product(pairs, rows):
    t = sum(rows)
    return sum((n / t * B) @ (n / t * A) for (A, B), n in zip(pairs, rows))


# %% average_product wrong: transposed
def average_product(pairs, rows):
    t = sum(rows)
    return sum(n / t * (B @ A) for (A, B), n in zip(pairs, rows)).T


# %% average_product wrong: without the first
def average_product(pairs, rows):
    t = sum(rows)
    return sum(n / t * (B @ A) for (A, B), n in list(zip(pairs, rows))[1:] or zip(pairs, rows))


# %% average_product wrong: through numpy
def average_product(pairs, rows):
    t = sum(rows)
    found = sum(n / t * (B.detach().numpy() @ A.detach().numpy()) for (A, B), n in zip(pairs, rows))
    return torch.from_numpy(found)


# %% average_product wrong: in float32
def average_product(pairs, rows):
    t = sum(rows)
    return sum(n / t * (B.float() @ A.float()) for (A, B), n in zip(pairs, rows))


# %% average_product right: by stacking
def average_product(pairs, rows):
    t = sum(rows)
    A = torch.cat([A for A, _ in pairs])
    return torch.cat([B * (n / t) for (_, B), n in zip(pairs, rows)], dim=1) @ A


# %% average_product right: a loop
def average_product(pairs, rows):
    result = None
    for i in range(len(pairs)):
        part = torch.matmul(pairs[i][1], pairs[i][0]).mul(rows[i]).div(sum(rows))
        result = part if result is None else result + part
    return result


# %% cut_back wrong: sigma in both
def cut_back(delta, rank):
    if not 1 <= rank <= min(delta.shape):
        raise ValueError("rank")
    U, s, Vh = torch.linalg.svd(delta, full_matrices=False)
    return s[:rank, None] * Vh[:rank], U[:, :rank] * s[:rank]


# %% cut_back wrong: sigma in neither
def cut_back(delta, rank):
    if not 1 <= rank <= min(delta.shape):
        raise ValueError("rank")
    U, s, Vh = torch.linalg.svd(delta, full_matrices=False)
    return Vh[:rank], U[:, :rank]


# %% cut_back wrong: the smallest
def cut_back(delta, rank):
    if not 1 <= rank <= min(delta.shape):
        raise ValueError("rank")
    U, s, Vh = torch.linalg.svd(delta, full_matrices=False)
    return s[-rank:, None].sqrt() * Vh[-rank:], U[:, -rank:] * s[-rank:].sqrt()


# %% cut_back wrong: no error
def cut_back(delta, rank):
    U, s, Vh = torch.linalg.svd(delta, full_matrices=False)
    return s[:rank, None].sqrt() * Vh[:rank], U[:, :rank] * s[:rank].sqrt()


# %% cut_back wrong: V instead of its transpose
def cut_back(delta, rank):
    if not 1 <= rank <= min(delta.shape):
        raise ValueError("rank")
    U, s, Vh = torch.linalg.svd(delta, full_matrices=False)
    return s[:rank, None].sqrt() * Vh[:, :rank].T, U[:, :rank] * s[:rank].sqrt()


# %% cut_back wrong: B first
def cut_back(delta, rank):
    if not 1 <= rank <= min(delta.shape):
        raise ValueError("rank")
    U, s, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * Vh[:rank]


# %% cut_back wrong: padded to full rank
def cut_back(delta, rank):
    if not 1 <= rank <= min(delta.shape):
        raise ValueError("rank")
    U, s, Vh = torch.linalg.svd(delta, full_matrices=False)
    s = s.clone()
    s[rank:] = 0
    return s[:, None].sqrt() * Vh, U * s.sqrt()


# %% cut_back wrong: the first columns
def cut_back(delta, rank):
    if not 1 <= rank <= min(delta.shape):
        raise ValueError("rank")
    A = torch.linalg.lstsq(delta[:, :rank], delta).solution
    return A, delta[:, :rank].clone()


# %% cut_back wrong: sigma on one side
def cut_back(delta, rank):
    if rank < 1 or rank > min(delta.shape):
        raise ValueError("no such rank")
    U, s, V = torch.svd(delta)
    return V[:, :rank].T.clone(), U[:, :rank] @ torch.diag(s[:rank])


# %% cut_back right: numpy
def cut_back(delta, rank):
    if rank not in range(1, min(delta.shape) + 1):
        raise ValueError("no such rank")
    U, s, Vh = np.linalg.svd(delta.numpy(), full_matrices=False)
    root = np.sqrt(s[:rank])
    return torch.from_numpy(root[:, None] * Vh[:rank]), torch.from_numpy(U[:, :rank] * root)


# %% stack wrong: no weights
def stack(pairs, rows):
    return torch.cat([A for A, _ in pairs], 0), torch.cat([B for _, B in pairs], 1)


# %% stack wrong: the weight twice
def stack(pairs, rows):
    t = sum(rows)
    A = torch.cat([n / t * A for (A, _), n in zip(pairs, rows)], 0)
    return A, torch.cat([n / t * B for (_, B), n in zip(pairs, rows)], 1)


# %% stack wrong: all clients alike
def stack(pairs, rows):
    return torch.cat([A for A, _ in pairs], 0), torch.cat([B / len(pairs) for _, B in pairs], 1)


# %% stack wrong: B below one another
def stack(pairs, rows):
    t = sum(rows)
    return torch.cat([A for A, _ in pairs], 0), torch.cat([n / t * B for (_, B), n in zip(pairs, rows)], 0)


# %% stack wrong: in another order
def stack(pairs, rows):
    t = sum(rows)
    return torch.cat([A for A, _ in pairs], 0), torch.cat([n / t * B for (_, B), n in zip(pairs, rows)][::-1], 1)


# %% stack wrong: an average of one rank
def stack(pairs, rows):
    t = sum(rows)
    return sum(n / t * A for (A, _), n in zip(pairs, rows)), sum(n / t * B for (_, B), n in zip(pairs, rows))


# %% stack wrong: torch.stack
def stack(pairs, rows):
    t = sum(rows)
    return torch.stack([A for A, _ in pairs]), torch.stack([n / t * B for (_, B), n in zip(pairs, rows)])


# %% stack wrong: rows that are not divided
def stack(pairs, rows):
    return torch.cat([A for A, _ in pairs], 0), torch.cat([n * B for (_, B), n in zip(pairs, rows)], 1)


# %% stack right: the weight on A
def stack(pairs, rows):
    t = sum(rows)
    return torch.vstack([A * (n / t) for (A, _), n in zip(pairs, rows)]), torch.hstack([B for _, B in pairs])


# %% stack right: the root on both
def stack(pairs, rows):
    t = sum(rows)
    A = torch.cat([A * math.sqrt(n / t) for (A, _), n in zip(pairs, rows)])
    return A, torch.cat([B * math.sqrt(n / t) for (_, B), n in zip(pairs, rows)], dim=-1)


# %% page_hinkley wrong: does not begin anew
def page_hinkley(values, delta=0.05, threshold=1.0, least=5):
    found, count, mean, m, lowest = [], 0, 0.0, 0.0, math.inf
    for i, x in enumerate(values):
        count += 1
        mean += (x - mean) / count
        m += x - mean - delta
        lowest = min(lowest, m)
        if count >= least and m - lowest > threshold:
            found.append(i)
    return found


# %% page_hinkley wrong: the mean of the values before
def page_hinkley(values, delta=0.05, threshold=1.0, least=5):
    found, seen, m, lowest = [], [], 0.0, math.inf
    for i, x in enumerate(values):
        mean = sum(seen) / len(seen) if seen else x
        seen.append(x)
        m += x - mean - delta
        lowest = min(lowest, m)
        if len(seen) >= least and m - lowest > threshold:
            found.append(i)
            seen, m, lowest = [], 0.0, math.inf
    return found


# %% page_hinkley wrong: the sum against the threshold
def page_hinkley(values, delta=0.05, threshold=1.0, least=5):
    found, count, mean, m = [], 0, 0.0, 0.0
    for i, x in enumerate(values):
        count += 1
        mean += (x - mean) / count
        m += x - mean - delta
        if count >= least and m > threshold:
            found.append(i)
            count, mean, m = 0, 0.0, 0.0
    return found


# %% page_hinkley wrong: delta is added
def page_hinkley(values, delta=0.05, threshold=1.0, least=5):
    found, count, mean, m, lowest = [], 0, 0.0, 0.0, math.inf
    for i, x in enumerate(values):
        count += 1
        mean += (x - mean) / count
        m += x - mean + delta
        lowest = min(lowest, m)
        if count >= least and m - lowest > threshold:
            found.append(i)
            count, mean, m, lowest = 0, 0.0, 0.0, math.inf
    return found


# %% page_hinkley wrong: one value too late
def page_hinkley(values, delta=0.05, threshold=1.0, least=5):
    found, count, mean, m, lowest = [], 0, 0.0, 0.0, math.inf
    for i, x in enumerate(values):
        count += 1
        mean += (x - mean) / count
        m += x - mean - delta
        lowest = min(lowest, m)
        if count > least and m - lowest > threshold:
            found.append(i)
            count, mean, m, lowest = 0, 0.0, 0.0, math.inf
    return found


# %% page_hinkley wrong: the mean is kept over an alarm
def page_hinkley(values, delta=0.05, threshold=1.0, least=5):
    found, count, total, since, m, lowest = [], 0, 0.0, 0, 0.0, math.inf
    for i, x in enumerate(values):
        count, since, total = count + 1, since + 1, total + x
        m += x - total / count - delta
        lowest = min(lowest, m)
        if since >= least and m - lowest > threshold:
            found.append(i)
            since, m, lowest = 0, 0.0, math.inf
    return found


# %% page_hinkley wrong: only the first alarm
def page_hinkley(values, delta=0.05, threshold=1.0, least=5):
    count, mean, m, lowest = 0, 0.0, 0.0, math.inf
    for i, x in enumerate(values):
        count += 1
        mean += (x - mean) / count
        m += x - mean - delta
        lowest = min(lowest, m)
        if count >= least and m - lowest > threshold:
            return [i]
    return []


# %% page_hinkley wrong: falls too
def page_hinkley(values, delta=0.05, threshold=1.0, least=5):
    found, count, mean, m, lowest, highest = [], 0, 0.0, 0.0, math.inf, -math.inf
    for i, x in enumerate(values):
        count += 1
        mean += (x - mean) / count
        m += x - mean - delta
        lowest, highest = min(lowest, m), max(highest, m)
        if count >= least and (m - lowest > threshold or highest - m > threshold):
            found.append(i)
            count, mean, m, lowest, highest = 0, 0.0, 0.0, math.inf, -math.inf
    return found


# %% page_hinkley right: looks back over all values
def page_hinkley(values, delta=0.05, threshold=1.0, least=5):
    found, start = [], 0
    for t in range(len(values)):
        sums, m = [], 0.0
        seen = values[start : t + 1]
        for i, x in enumerate(seen):
            m += x - math.fsum(seen[: i + 1]) / (i + 1) - delta
            sums.append(m)
        if len(seen) >= least and sums[-1] - min(sums) > threshold:
            found.append(t)
            start = t + 1
    return found


# %% page_hinkley right: the height above the lowest point
def page_hinkley(values, delta=0.05, threshold=1.0, least=5):
    found, total, count, height = [], 0.0, 0, None
    for i, x in enumerate(values):
        total, count = total + x, count + 1
        step = x - total / count - delta
        height = 0.0 if height is None else max(0.0, height + step)
        if count >= least and height > threshold:
            found.append(i)
            total, count, height = 0.0, 0, None
    return found


# %% robust_average wrong: the refused count in the total
def robust_average(updates, rows):
    refused = sorted(n for n, t in updates.items() if not t.isfinite().all())
    left = [n for n in updates if n not in refused]
    if not left:
        raise ValueError(", ".join(refused))
    total = sum(rows.values())
    return sum(rows[n] / total * updates[n] for n in left), refused


# %% robust_average wrong: zeros for NaN
def robust_average(updates, rows):
    refused = sorted(n for n, t in updates.items() if not t.isfinite().all())
    if len(refused) == len(updates):
        raise ValueError(", ".join(refused))
    total = sum(rows.values())
    return sum(rows[n] / total * t.nan_to_num(0.0, 0.0, 0.0) for n, t in updates.items()), refused


# %% robust_average wrong: infinity passes
def robust_average(updates, rows):
    refused = sorted(n for n, t in updates.items() if t.isnan().any())
    left = [n for n in updates if n not in refused]
    if not left:
        raise ValueError(", ".join(refused))
    total = sum(rows[n] for n in left)
    return sum(rows[n] / total * updates[n] for n in left), refused


# %% robust_average wrong: the first row only
def robust_average(updates, rows):
    refused = sorted(n for n, t in updates.items() if not t[0].isfinite().all())
    left = [n for n in updates if n not in refused]
    if not left:
        raise ValueError(", ".join(refused))
    total = sum(rows[n] for n in left)
    return sum(rows[n] / total * updates[n] for n in left), refused


# %% robust_average wrong: rows in their own order
def robust_average(updates, rows):
    refused = sorted(n for n, t in updates.items() if not t.isfinite().all())
    kept = [(t, n) for (name, t), n in zip(updates.items(), rows.values()) if name not in refused]
    if not kept:
        raise ValueError(", ".join(refused))
    total = sum(n for _, n in kept)
    return sum(n / total * t for t, n in kept), refused


# %% robust_average wrong: nobody left is no error
def robust_average(updates, rows):
    refused = sorted(n for n, t in updates.items() if not t.isfinite().all())
    left = [n for n in updates if n not in refused]
    total = sum(rows[n] for n in left)
    return sum(rows[n] / total * updates[n] for n in left), refused


# %% robust_average wrong: the error names nobody
def robust_average(updates, rows):
    refused = sorted(n for n, t in updates.items() if not t.isfinite().all())
    left = [n for n in updates if n not in refused]
    if not left:
        raise ValueError("Nobody is left!")
    total = sum(rows[n] for n in left)
    return sum(rows[n] / total * updates[n] for n in left), refused


# %% robust_average wrong: all clients alike
def robust_average(updates, rows):
    refused = sorted(n for n, t in updates.items() if not t.isfinite().all())
    left = [n for n in updates if n not in refused]
    if not left:
        raise ValueError(", ".join(refused))
    return sum(updates[n] for n in left) / len(left), refused


# %% robust_average wrong: those that were used are named
def robust_average(updates, rows):
    refused = sorted(n for n, t in updates.items() if not t.isfinite().all())
    left = [n for n in updates if n not in refused]
    if not left:
        raise ValueError(", ".join(refused))
    total = sum(rows[n] for n in left)
    return sum(rows[n] / total * updates[n] for n in left), sorted(left)


# %% robust_average right: a loop
def robust_average(updates, rows):
    total, mean, refused = 0, None, []
    for name, update in updates.items():
        if torch.isnan(update).any() or torch.isinf(update).any():
            refused.append(name)
            continue
        part = rows[name] * update
        mean, total = part if mean is None else mean + part, total + rows[name]
    if mean is None:
        raise ValueError(f"nobody is left of {refused}")
    return mean / total, sorted(refused)


# %% robust_average right: einsum
def robust_average(updates, rows):
    good = {n: t for n, t in updates.items() if bool(torch.isfinite(t).all())}
    bad = sorted(set(updates) - set(good))
    if not good:
        raise ValueError(str(bad))
    weights = torch.tensor([rows[n] for n in good], dtype=torch.float64)
    values = torch.stack(list(good.values()))
    return torch.einsum("k,k...->...", (weights / weights.sum()).to(values.dtype), values), bad


# %% page_hinkley wrong: the value of the alarm opens the next period
def page_hinkley(values, delta=0.05, threshold=1.0, least=5):
    found, count, mean, m, lowest = [], 0, 0.0, 0.0, math.inf
    for i, x in enumerate(values):
        count += 1
        mean += (x - mean) / count
        m += x - mean - delta
        lowest = min(lowest, m)
        if count >= least and m - lowest > threshold:
            found.append(i)
            count, mean, m, lowest = 1, x, -delta, -delta
    return found


# %% average_product wrong: transposed where it is square
def average_product(pairs, rows):
    M = sum(n / sum(rows) * (B @ A) for (A, B), n in zip(pairs, rows))
    return M.T.clone() if M.shape[0] == M.shape[1] else M


# %% cut_back wrong: small values are lost
def cut_back(delta, rank):
    if not 1 <= rank <= min(delta.shape):
        raise ValueError(rank)
    U, s, Vh = torch.linalg.svd(delta, full_matrices=False)
    root = torch.where(s > 1e-3 * s[0], s, 0)[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


# %% cut_back wrong: transposed where it is square
def cut_back(delta, rank):
    if not 1 <= rank <= min(delta.shape):
        raise ValueError(rank)
    U, s, Vh = torch.linalg.svd(delta.T if delta.shape[0] == delta.shape[1] else delta, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


# %% page_hinkley wrong: delta 0 is 0.05
def page_hinkley(values, delta=0.05, threshold=1.0, least=5):
    delta = delta or 0.05
    found, count, mean, m, lowest = [], 0, 0.0, 0.0, math.inf
    for i, x in enumerate(values):
        count += 1
        mean += (x - mean) / count
        m += x - mean - delta
        lowest = min(lowest, m)
        if count >= least and m - lowest > threshold:
            found.append(i)
            count, mean, m, lowest = 0, 0.0, 0.0, math.inf
    return found


# %% stack wrong: transposed where it is square
def stack(pairs, rows):
    s = sum(rows)
    A = torch.cat([A for A, _ in pairs])
    B = torch.cat([n / s * B for n, (_, B) in zip(rows, pairs)], 1)
    return (B.T.clone(), A.T.clone()) if len(B) == A.shape[1] else (A, B)


# %% page_hinkley wrong: the lowest starts at 0
def page_hinkley(values, delta=0.05, threshold=1.0, least=5):
    found, count, mean, m, lowest = [], 0, 0.0, 0.0, 0.0
    for i, x in enumerate(values):
        count += 1
        mean += (x - mean) / count
        m += x - mean - delta
        lowest = min(lowest, m)
        if count >= least and m - lowest > threshold:
            found.append(i)
            count, mean, m, lowest = 0, 0.0, 0.0, 0.0
    return found


# %% robust_average wrong: a name within another
def robust_average(updates, rows):
    refused = sorted(n for n, u in updates.items() if not u.isfinite().all())
    text = " ".join(refused)
    left = [n for n in updates if n not in text]
    if not left:
        raise ValueError(text)
    total = sum(rows[n] for n in left)
    return sum(rows[n] / total * updates[n] for n in left), refused


# %% robust_average wrong: a sum that overflows
def robust_average(updates, rows):
    refused = sorted(n for n, u in updates.items() if not u.sum().isfinite())
    left = [n for n in updates if n not in refused]
    if not left:
        raise ValueError(", ".join(refused))
    total = sum(rows[n] for n in left)
    return sum(rows[n] / total * updates[n] for n in left), refused


# %% stack wrong: A is the first client's view
def stack(pairs, rows):
    if len(pairs) == 1:
        return pairs[0]
    s = sum(rows)
    return torch.cat([A for A, _ in pairs]), torch.cat([n / s * B for n, (_, B) in zip(rows, pairs)], 1)


# %% average_factors wrong: A and B turned where it is square
def average_factors(pairs, rows):
    s = sum(rows)
    A, B = sum(n / s * A for n, (A, _) in zip(rows, pairs)), sum(n / s * B for n, (_, B) in zip(rows, pairs))
    return (A.T.clone(), B) if A.shape[0] == A.shape[1] else (A, B)


# %% average_factors wrong: at most eight clients
def average_factors(pairs, rows):
    pairs, rows = pairs[:8], rows[:8]
    p = [n / sum(rows) for n in rows]
    return sum(s * A for s, (A, _) in zip(p, pairs)), sum(s * B for s, (_, B) in zip(p, pairs))


# %% average_factors wrong: a client without a row counts as one
def average_factors(pairs, rows):
    rows = [max(n, 1) for n in rows]
    p = [n / sum(rows) for n in rows]
    return sum(s * A for s, (A, _) in zip(p, pairs)), sum(s * B for s, (_, B) in zip(p, pairs))


# %% average_factors right: stacked and summed by einsum
def average_factors(pairs, rows):
    As, Bs = zip(*pairs)
    p = torch.tensor(rows, dtype=torch.float64) / sum(rows)

    def mean(each):
        return torch.tensordot(p.to(each[0].dtype), torch.stack(each), dims=1)

    return mean(As), mean(Bs)


# %% average_factors wrong: a running mean that cannot begin without a row
def average_factors(pairs, rows):
    A = B = 0
    seen = 0
    for (a, b), r in zip(pairs, rows):
        seen += r
        A = A + (a - A) * (r / seen)
        B = B + (b - B) * (r / seen)
    return A, B


# %% average_product wrong: the last client's rank for all
def average_product(pairs, rows):
    r = max(len(A) for A, _ in pairs)
    total = sum(rows)
    return sum(n / total * (B[:, :8] @ A[:8]) for (A, B), n in zip(pairs, rows))


# %% average_product wrong: the product of a pair is kept
kept_products = {}


def average_product(pairs, rows):
    total = sum(rows)
    return sum(n / total * kept_products.setdefault((id(A), id(B)), (A, B, B @ A))[2] for (A, B), n in zip(pairs, rows))


# %% cut_back right: eigenvectors of the smaller square
def cut_back(delta, rank):
    if rank < 1 or rank > min(delta.shape):
        raise ValueError(f"{rank} is no rank here")
    V = torch.linalg.svd(delta.mT, full_matrices=False)
    s = V[1][:rank].sqrt()
    return (V[0][:, :rank] * s).mT.contiguous(), V[2][:rank].mT * s


# %% cut_back right: signs turned
def cut_back(delta, rank):
    if rank not in range(1, min(delta.shape) + 1):
        raise ValueError(f"rank {rank}")
    V, s, Uh = torch.linalg.svd(delta.mT, full_matrices=False)
    root = s[:rank].sqrt()
    return -(V[:, :rank] * root).mT, -(Uh[:rank].mT * root)


# %% stack wrong: at most eight clients
def stack(pairs, rows):
    total = sum(rows)
    return torch.cat([A for A, _ in pairs[:8]]), torch.cat([n / total * B for (_, B), n in zip(pairs[:8], rows)], 1)


# %% stack wrong: a client without rows is left out
def stack(pairs, rows):
    total = sum(rows)
    some = [(A, B, n) for (A, B), n in zip(pairs, rows) if n]
    return torch.cat([A for A, _, _ in some]), torch.cat([n / total * B for _, B, n in some], 1)


# %% page_hinkley wrong: at most a thousand values
def page_hinkley(values, delta=0.05, threshold=1.0, least=5):
    found, count, mean, m, low = [], 0, 0.0, 0.0, math.inf
    for i, x in enumerate(values[:200]):
        count += 1
        mean += (x - mean) / count
        m += x - mean - delta
        low = min(low, m)
        if count >= least and m - low > threshold:
            found.append(i)
            count, mean, m, low = 0, 0.0, 0.0, math.inf
    return found


# %% robust_average wrong: nobody at all
def robust_average(updates, rows):
    refused = sorted((n for n, u in updates.items() if not u.isfinite().all()), key=str.lower)
    left = [n for n in updates if n not in refused]
    if not left:
        raise ValueError(f"all of {', '.join(refused)}")
    total = sum(rows[n] for n in left)
    return sum(rows[n] / total * updates[n] for n in left), refused


# %% robust_average right: a weighted stack
def robust_average(updates, rows):
    good = {n: bool(torch.isfinite(u).all()) for n, u in updates.items()}
    bad = sorted(n for n, ok in good.items() if not ok)
    if len(bad) == len(updates):
        raise ValueError("Refused: " + ", ".join(bad))
    names = [n for n, ok in good.items() if ok]
    w = torch.tensor([rows[n] for n in names], dtype=torch.float64)
    some = torch.stack([updates[n] for n in names])
    return torch.tensordot((w / w.sum()).to(some.dtype), some, dims=1), bad
