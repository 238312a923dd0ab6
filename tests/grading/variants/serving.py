# Answers to the assignment `serving`: wrong ones, named after the misconception, and right ones written differently.
from collections import OrderedDict

import torch
from torch.nn import functional as F


# %% mixed_rows wrong: without γ
def mixed_rows(x, A, B, gammas, own):
    out = torch.zeros(len(x), x.shape[1], len(B[0]), dtype=x.dtype)
    for i, k in enumerate(own):
        if k is not None:
            out[i] = x[i] @ A[k].T @ B[k].T
    return out


# %% mixed_rows wrong: one γ for all
def mixed_rows(x, A, B, gammas, own):
    rows = [x[i] @ A[k].T @ B[k].T if k is not None else x[i] @ A[0].T @ B[0].T * 0 for i, k in enumerate(own)]
    return torch.stack(rows) * gammas[0] if rows else x.new_zeros(0, x.shape[1], len(B[0]))


# %% mixed_rows wrong: None is the first adapter
def mixed_rows(x, A, B, gammas, own):
    rows = [gammas[k or 0] * (x[i] @ A[k or 0].T @ B[k or 0].T) for i, k in enumerate(own)]
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1], len(B[0]))


# %% mixed_rows wrong: adapter 0 is taken for None
def mixed_rows(x, A, B, gammas, own):
    rows = [gammas[k] * (x[i] @ A[k].T @ B[k].T) if k else x[i] @ A[0].T @ B[0].T * 0 for i, k in enumerate(own)]
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1], len(B[0]))


# %% mixed_rows wrong: ranks must be equal
def mixed_rows(x, A, B, gammas, own):
    index = torch.tensor([k or 0 for k in own], dtype=torch.long)
    A, B = torch.stack(A)[index], torch.stack([g * b for g, b in zip(gammas, B, strict=False)])[index]
    keep = torch.tensor([k is not None for k in own])[:, None, None]
    return torch.bmm(torch.bmm(x, A.mT), B.mT) * keep


# %% mixed_rows wrong: cut to the smallest rank
def mixed_rows(x, A, B, gammas, own):
    rank = min(len(a) for a in A)
    out = torch.zeros(len(x), x.shape[1], len(B[0]), dtype=x.dtype)
    for i, k in enumerate(own):
        if k is not None:
            out[i] = gammas[k] * (x[i] @ A[k][:rank].T @ B[k][:, :rank].T)
    return out


# %% mixed_rows wrong: α instead of γ
def mixed_rows(x, A, B, gammas, own):
    rows = [
        gammas[k] / len(A[k]) * (x[i] @ A[k].T @ B[k].T) if k is not None else x[i] @ A[0].T @ B[0].T * 0
        for i, k in enumerate(own)
    ]
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1], len(B[0]))


# %% mixed_rows wrong: no gradient
@torch.no_grad()
def mixed_rows(x, A, B, gammas, own):
    out = torch.zeros(len(x), x.shape[1], len(B[0]), dtype=x.dtype)
    for i, k in enumerate(own):
        if k is not None:
            out[i] = gammas[k] * (x[i] @ A[k].T @ B[k].T)
    return out


# %% mixed_rows right: row by row
def mixed_rows(x, A, B, gammas, own):
    out = torch.zeros(len(x), x.shape[1], len(B[0]), dtype=x.dtype)
    for i, k in enumerate(own):
        if k is not None:
            out[i] = gammas[k] * (x[i] @ A[k].T) @ B[k].T
    return out


# %% mixed_rows right: by groups
def mixed_rows(x, A, B, gammas, own):
    out = x.new_zeros(len(x), x.shape[1], len(B[0]))
    for k in range(len(A)):
        rows = [i for i, each in enumerate(own) if each == k]
        if rows:
            out = out.index_copy(0, torch.tensor(rows), gammas[k] * (x[rows] @ A[k].T @ B[k].T))
    return out


# %% mixed_rows right: the low side is padded
def mixed_rows(x, A, B, gammas, own):
    if not own:
        return x.new_zeros(0, x.shape[1], len(B[0]))
    most = max(map(len, A))
    low = [x.new_zeros(x.shape[1], 1) if k is None else x[i] @ A[k].T for i, k in enumerate(own)]
    low = torch.stack([F.pad(each, (0, most - each.shape[1])) for each in low])
    up = [B[0].new_zeros(len(B[0]), 1) if k is None else gammas[k] * B[k] for k in own]
    up = torch.stack([F.pad(each, (0, most - each.shape[1])) for each in up])
    return torch.einsum("ntr,nor->nto", low, up)


# %% concatenated wrong: A and B are added
def concatenated(A, B, gammas, weights):
    s = [g * w for g, w in zip(gammas, weights, strict=False)]
    rank = max(map(len, A))
    A = [F.pad(a, (0, 0, 0, rank - len(a))) for a in A]
    B = [F.pad(b, (0, rank - b.shape[1])) for b in B]
    return sum(v * b for v, b in zip(s, B, strict=False)), sum(A)


# %% concatenated wrong: without γ
def concatenated(A, B, gammas, weights):
    return torch.cat([w * b for w, b in zip(weights, B, strict=False)], 1), torch.cat(A)


# %% concatenated wrong: without w
def concatenated(A, B, gammas, weights):
    return torch.cat([g * b for g, b in zip(gammas, B, strict=False)], 1), torch.cat(A)


# %% concatenated wrong: the root on both sides
def concatenated(A, B, gammas, weights):
    s = [abs(g * w) ** 0.5 for g, w in zip(gammas, weights, strict=False)]
    up, down = [v * b for v, b in zip(s, B, strict=False)], [v * a for v, a in zip(s, A, strict=False)]
    return torch.cat(up, 1), torch.cat(down)


# %% concatenated wrong: scaled twice
def concatenated(A, B, gammas, weights):
    s = [g * w for g, w in zip(gammas, weights, strict=False)]
    up, down = [v * b for v, b in zip(s, B, strict=False)], [v * a for v, a in zip(s, A, strict=False)]
    return torch.cat(up, 1), torch.cat(down)


# %% concatenated wrong: A first
def concatenated(A, B, gammas, weights):
    return torch.cat(A), torch.cat([g * w * b for g, w, b in zip(gammas, weights, B, strict=False)], 1)


# %% concatenated wrong: the columns of B backwards
def concatenated(A, B, gammas, weights):
    s = [g * w for g, w in zip(gammas, weights, strict=False)]
    return torch.cat([v * b for v, b in zip(s, B, strict=False)][::-1], 1), torch.cat(A)


# %% concatenated right: through a transpose
def concatenated(A, B, gammas, weights):
    return torch.vstack([(g * w) * b.T for g, w, b in zip(gammas, weights, B, strict=False)]).T, torch.vstack(A)


# %% concatenated right: one after another
def concatenated(A, B, gammas, weights):
    up, down = B[0] * (gammas[0] * weights[0]), A[0].clone()
    for a, b, g, w in list(zip(A, B, gammas, weights, strict=False))[1:]:
        up, down = torch.hstack([up, b * (g * w)]), torch.vstack([down, a])
    return up, down


# %% elected wrong: the plain mean
def elected(changes):
    return changes.mean(0)


# %% elected wrong: heads are counted
def elected(changes):
    sign = torch.where(changes.sign().sum(0) >= 0, 1, -1)
    agree = changes.sign() == sign
    return (changes * agree).sum(0) / agree.sum(0).clamp(min=1)


# %% elected wrong: divided by all
def elected(changes):
    sign = torch.where(changes.sum(0) >= 0, 1, -1)
    return (changes * (changes.sign() == sign)).mean(0)


# %% elected wrong: the sum
def elected(changes):
    sign = torch.where(changes.sum(0) >= 0, 1, -1)
    return (changes * (changes.sign() == sign)).sum(0)


# %% elected wrong: 0 / 0
def elected(changes):
    sign = torch.where(changes.sum(0) >= 0, 1, -1)
    agree = changes.sign() == sign
    return (changes * agree).sum(0) / agree.sum(0)


# %% elected wrong: a zero sum elects nobody
def elected(changes):
    agree = (changes.sign() == changes.sum(0).sign()) & (changes != 0)
    return (changes * agree).sum(0) / agree.sum(0).clamp(min=1)


# %% elected wrong: zeros count as agreeing
def elected(changes):
    sign = torch.where(changes.sum(0) >= 0, 1, -1)
    agree = changes * sign >= 0
    return (changes * agree).sum(0) / agree.sum(0).clamp(min=1)


# %% elected right: two sides
def elected(changes):
    up, down = changes.clamp(min=0), changes.clamp(max=0)
    plus = up.sum(0) / (changes > 0).sum(0).clamp(min=1)
    minus = down.sum(0) / (changes < 0).sum(0).clamp(min=1)
    return torch.where(changes.sum(0) >= 0, plus, minus)


# %% elected right: a loop
def elected(changes):
    flat = changes.reshape(len(changes), -1)
    out = []
    for column in flat.T:
        positive = column.sum() >= 0
        mine = column[column > 0] if positive else column[column < 0]
        out.append(mine.mean() if len(mine) else column.sum() * 0)
    return torch.stack(out).reshape(changes.shape[1:])


# %% least_recent wrong: first in, first out
def least_recent(requests, limit):
    held, loads = {}, 0
    for name, size in requests:
        if size > limit:
            raise ValueError(f"{name} is too large.")
        if name not in held:
            loads += 1
            while sum(held.values()) + size > limit:
                held.pop(next(iter(held)))
            held[name] = size
    return list(held), loads


# %% least_recent wrong: the youngest goes
def least_recent(requests, limit):
    held, loads = {}, 0
    for name, size in requests:
        if size > limit:
            raise ValueError(f"{name} is too large.")
        if name in held:
            held.pop(name)
        else:
            loads += 1
            while sum(held.values()) + size > limit:
                held.popitem()
        held[name] = size
    return list(held), loads


# %% least_recent wrong: one entry is put out, however large the new one
def least_recent(requests, limit):
    held, loads = {}, 0
    for name, size in requests:
        if size > limit:
            raise ValueError(f"{name} is too large.")
        if name in held:
            held.pop(name)
        else:
            loads += 1
            if sum(held.values()) + size > limit:
                held.pop(next(iter(held)))
        held[name] = size
    return list(held), loads


# %% least_recent wrong: a hit is a load
def least_recent(requests, limit):
    held, loads = {}, 0
    for name, size in requests:
        if size > limit:
            raise ValueError(f"{name} is too large.")
        held.pop(name, None)
        loads += 1
        while sum(held.values()) + size > limit:
            held.pop(next(iter(held)))
        held[name] = size
    return list(held), loads


# %% least_recent wrong: never quite full
def least_recent(requests, limit):
    held, loads = {}, 0
    for name, size in requests:
        if size > limit:
            raise ValueError(f"{name} is too large.")
        if name in held:
            held.pop(name)
        else:
            loads += 1
            while held and sum(held.values()) + size >= limit:
                held.pop(next(iter(held)))
        held[name] = size
    return list(held), loads


# %% least_recent wrong: what is too large empties the memory
def least_recent(requests, limit):
    held, loads = {}, 0
    for name, size in requests:
        if name in held:
            held.pop(name)
        else:
            loads += 1
            while held and sum(held.values()) + size > limit:
                held.pop(next(iter(held)))
        if size <= limit:
            held[name] = size
    return list(held), loads


# %% least_recent wrong: the new one is counted after it went in
def least_recent(requests, limit):
    held, loads = {}, 0
    for name, size in requests:
        if size > limit:
            raise ValueError(f"{name} is too large.")
        loads += name not in held
        held.setdefault(name, size)
        while sum(held.values()) > limit:
            held.pop(next(iter(held)))
    return list(held), loads


# %% least_recent right: an OrderedDict
def least_recent(requests, limit):
    from collections import OrderedDict

    held, loads, used = OrderedDict(), 0, 0
    for name, size in requests:
        if size > limit:
            raise ValueError(f"{name} needs {size} bytes; the memory has {limit}.")
        if name in held:
            held.move_to_end(name)
            continue
        loads += 1
        while used + size > limit:
            used -= held.popitem(last=False)[1]
        held[name] = size
        used += size
    return [*held], loads


# %% least_recent right: times of use
def least_recent(requests, limit):
    size_of, time_of, loads = {}, {}, 0
    for now, (name, size) in enumerate(requests):
        if size > limit:
            raise ValueError(f"{name} does not fit into {limit} bytes.")
        if name not in size_of:
            loads += 1
            while sum(size_of.values()) + size > limit:
                oldest = min(size_of, key=time_of.get)
                del size_of[oldest]
        size_of[name], time_of[name] = size, now
    return sorted(size_of, key=time_of.get), loads


# %% repaired_rows wrong: as it was
def repaired_rows(x, A, B, own, beams):
    own = own.repeat(beams)
    chosen = F.one_hot(own.clamp(min=0), len(A)).to(x.dtype)
    return (chosen[:, :, None] * torch.einsum("ni,kri,kor->nko", x, A, B)).sum(1)


# %% repaired_rows wrong: the beams only
def repaired_rows(x, A, B, own, beams):
    own = own.repeat_interleave(beams)
    chosen = F.one_hot(own.clamp(min=0), len(A)).to(x.dtype)
    return (chosen[:, :, None] * torch.einsum("ni,kri,kor->nko", x, A, B)).sum(1)


# %% repaired_rows wrong: still a mask
def repaired_rows(x, A, B, own, beams):
    own = own.repeat_interleave(beams)
    chosen = F.one_hot(own.clamp(min=0), len(A)).to(x.dtype) * (own >= 0)[:, None]
    return (chosen[:, :, None] * torch.einsum("ni,kri,kor->nko", x, A, B)).sum(1)


# %% repaired_rows wrong: −1 is the last adapter
def repaired_rows(x, A, B, own, beams):
    own = own.repeat_interleave(beams)
    return torch.bmm(B[own], torch.bmm(A[own], x[:, :, None]))[:, :, 0]


# %% repaired_rows wrong: −1 is the first adapter
def repaired_rows(x, A, B, own, beams):
    own = own.repeat_interleave(beams).clamp(min=0)
    return torch.bmm(B[own], torch.bmm(A[own], x[:, :, None]))[:, :, 0]


# %% repaired_rows wrong: beams in the wrong order
def repaired_rows(x, A, B, own, beams):
    own = own.repeat(beams)
    y = torch.bmm(B[own], torch.bmm(A[own], x[:, :, None]))[:, :, 0]
    return y.masked_fill((own < 0)[:, None], 0)


# %% repaired_rows wrong: adapter 0 is nobody
def repaired_rows(x, A, B, own, beams):
    own = own.repeat_interleave(beams)
    y = torch.bmm(B[own], torch.bmm(A[own], x[:, :, None]))[:, :, 0]
    return y.masked_fill((own <= 0)[:, None], 0)


# %% repaired_rows right: one after another
def repaired_rows(x, A, B, own, beams):
    rows = []
    for i, row in enumerate(x):
        k = int(own[i // beams])
        rows.append(B[k] @ (A[k] @ row) if k >= 0 else B[0, :, 0] * 0)
    return torch.stack(rows)


# %% repaired_rows right: the beams as a dimension
def repaired_rows(x, A, B, own, beams):
    rows = x.reshape(len(own), beams, -1)
    y = rows @ A[own.clamp(min=0)].mT @ B[own.clamp(min=0)].mT
    y = torch.where((own >= 0)[:, None, None], y, torch.zeros_like(y))
    return y.reshape(len(x), -1)


# %% elected wrong: a tiny sum counts as zero
def elected(changes):
    total = changes.sum(0)
    sign = torch.where(total > -1e-6, 1, -1)
    agree = changes.sign() == sign
    return (changes * agree).sum(0) / agree.sum(0).clamp(min=1)


# %% elected wrong: one sign for each change
def elected(changes):
    flat = changes.view(len(changes), -1)
    sign = torch.where(flat.sum(0) >= 0, 1, -1)
    agree = flat.sign() == sign
    return ((flat * agree).sum(0) / agree.sum(0).clamp(min=1)).view(changes.shape[1:])


# %% elected wrong: the sign of the first where the sum is zero
def elected(changes):
    sign = changes.sum(0).sign()
    sign = torch.where(sign == 0, changes[0].sign(), sign)
    agree = changes.sign() == sign
    return (changes * agree).sum(0) / agree.sum(0).clamp(min=1)


# %% least_recent wrong: no bytes is not there
def least_recent(requests, limit):
    held, loads = {}, 0
    for name, size in requests:
        if size > limit:
            raise ValueError(name)
        if held.get(name):
            held.pop(name)
        else:
            loads += 1
            held.pop(name, None)
            while sum(held.values()) + size > limit:
                held.pop(next(iter(held)))
        held[name] = size
    return list(held), loads


# %% mixed_rows wrong: a mask times NaN
def mixed_rows(x, A, B, gammas, own):
    rank = max(len(a) for a in A)
    A = torch.stack([F.pad(a, (0, 0, 0, rank - len(a))) for a in A])
    B = torch.stack([F.pad(g * b, (0, rank - b.shape[1])) for g, b in zip(gammas, B, strict=False)])
    index = torch.tensor([k or 0 for k in own], dtype=torch.long)
    some = torch.tensor([k is not None for k in own], dtype=x.dtype)
    return torch.bmm(torch.bmm(x, A[index].mT), B[index].mT) * some[:, None, None]


# %% mixed_rows wrong: one-hot choices
def mixed_rows(x, A, B, gammas, own):
    out = 0
    for k, (a, b, g) in enumerate(zip(A, B, gammas, strict=False)):
        mine = torch.tensor([o == k for o in own], dtype=x.dtype)
        out = out + mine[:, None, None] * (g * (x @ a.T @ b.T))
    return out


# %% repaired_rows wrong: NaN is made 0 everywhere
def repaired_rows(x, A, B, own, beams):
    own = own.repeat_interleave(beams)
    hot = F.one_hot(own.clamp(min=0), len(A)).to(x.dtype) * (own >= 0)[:, None]
    every = torch.einsum("kor,kri,ni->nko", B, A, x).nan_to_num(0.0)
    return (every * hot[:, :, None]).sum(1)


# %% concatenated wrong: a γ of 0 is 1
def concatenated(A, B, gammas, weights):
    return torch.cat([(g or 1.0) * w * b for g, w, b in zip(gammas, weights, B, strict=False)], dim=1), torch.cat(A)


# %% mixed_rows wrong: more than eight adapters
def mixed_rows(x, A, B, gammas, own):
    out = x.new_zeros(len(x), x.shape[1], B[0].shape[0])
    for k in range(min(8, len(A))):
        rows = torch.tensor([i for i, o in enumerate(own) if o == k], dtype=torch.long)
        out = out.index_add(0, rows, gammas[k] * (x[rows] @ A[k].mT @ B[k].mT))
    return out


# %% mixed_rows wrong: stacked once for a list
kept_stacks = {}


def mixed_rows(x, A, B, gammas, own):
    key = tuple(map(id, (*A, *B)))
    if key not in kept_stacks:
        r = max(map(len, A))
        kept_stacks[key] = (
            A,
            B,
            torch.stack([F.pad(a, (0, 0, 0, r - len(a))) for a in A]),
            torch.stack([F.pad(b, (0, r - b.shape[1])) for b in B]),
        )
    SA, SB = kept_stacks[key][2:]
    at = torch.tensor([k or 0 for k in own], dtype=torch.long)
    none = torch.tensor([k is None for k in own], dtype=torch.bool)
    g = torch.tensor(gammas, dtype=x.dtype)[at]
    y = torch.bmm(torch.bmm(x, SA[at].mT), SB[at].mT) * g[:, None, None]
    return y.masked_fill(none[:, None, None], 0)


# %% mixed_rows right: einsum over the sorted rows
def mixed_rows(x, A, B, gammas, own):
    out = [
        torch.zeros(x.shape[1], B[0].shape[0], dtype=x.dtype)
        if k is None
        else torch.einsum("ti,ri,or->to", x[i], A[k], B[k] * gammas[k])
        for i, k in enumerate(own)
    ]
    return torch.stack(out) if out else x.new_zeros(0, x.shape[1], B[0].shape[0])


# %% concatenated wrong: at most four
def concatenated(A, B, gammas, weights):
    return torch.cat([w * g * b for w, g, b in zip(weights[:4], gammas, B, strict=False)], 1), torch.cat(A[:4])


# %% concatenated right: filled slices
def concatenated(A, B, gammas, weights):
    scale = torch.cat(
        [torch.full((a.shape[0],), g * w, dtype=b.dtype) for a, b, g, w in zip(A, B, gammas, weights, strict=False)]
    )
    return torch.hstack(list(B)) * scale, torch.vstack(list(A))


# %% elected wrong: at most eight voters
def elected(changes):
    changes = changes[:8]
    sign = torch.where(changes.sum(0) >= 0, 1, -1)
    agree = changes.sign() == sign
    return (changes * agree).sum(0) / agree.sum(0).clamp(min=1)


# %% elected right: means of what is clamped
def elected(changes):
    up, down = changes.clamp(min=0), changes.clamp(max=0)
    plus = up.sum(0) / (changes > 0).sum(0).clamp(min=1)
    minus = down.sum(0) / (changes < 0).sum(0).clamp(min=1)
    return torch.where(changes.sum(0) < 0, minus, plus)


# %% least_recent wrong: a limit of 0
def least_recent(requests, limit):
    held, loads = OrderedDict(), 0
    if not limit:
        return [], len(requests)
    for name, size in requests:
        if size > limit:
            raise ValueError(f"{name} is too large")
        if name in held:
            held.move_to_end(name)
            continue
        loads += 1
        while sum(held.values()) + size > limit:
            held.popitem(last=False)
        held[name] = size
    return list(held), loads


# %% least_recent wrong: fewer than nine names are held
def least_recent(requests, limit):
    held, loads = OrderedDict(), 0
    for name, size in requests:
        if size > limit:
            raise ValueError(f"{name} is too large")
        if name in held:
            held.move_to_end(name)
            continue
        loads += 1
        while sum(held.values()) + size > limit or len(held) > 7:
            held.popitem(last=False)
        held[name] = size
    return list(held), loads


# %% least_recent right: a list and a dict of sizes
def least_recent(requests, limit):
    order, sizes, loads = [], dict(requests), 0
    for name, size in requests:
        if size > limit:
            raise ValueError(f"{name!r} does not fit")
        if name in order:
            order.remove(name)
        else:
            loads += 1
            while order and sum(sizes[n] for n in order) + size > limit:
                order.pop(0)
        order.append(name)
    return order, loads


# %% least_recent wrong: one that is too large is told when it comes last
def least_recent(requests, limit):
    from collections import OrderedDict

    c, loads = OrderedDict(), 0
    for n, b in requests:
        if n in c:
            c.move_to_end(n)
            continue
        loads += 1
        while c and sum(c.values()) + b > limit:
            c.popitem(last=False)
        if b > limit:
            continue
        c[n] = b
    big = [n for n, b in requests[-1:] if b > limit]
    if big:
        raise ValueError(big[0])
    return list(c), loads


# %% least_recent right: times of last use
def least_recent(requests, limit):
    last, size, loads = {}, {}, 0
    for t, (n, b) in enumerate(requests):
        if b > limit:
            raise ValueError(f"{n} is larger than the limit")
        if n not in size:
            loads += 1
            while sum(size.values()) + b > limit:
                old = min(size, key=last.get)
                del size[old]
            size[n] = b
        last[n] = t
    return sorted(size, key=last.get), loads


# %% repaired_rows wrong: more than 4 beams
def repaired_rows(x, A, B, own, beams):
    own = own.repeat_interleave(min(beams, 4))
    own = torch.cat([own, own.new_full((len(x) - len(own),), -1)])
    return torch.bmm(B[own], torch.bmm(A[own], x[:, :, None]))[:, :, 0].masked_fill((own < 0)[:, None], 0)


# %% repaired_rows wrong: NaN in x where nobody is chosen spreads
def repaired_rows(x, A, B, own, beams):
    own = own.repeat_interleave(beams)
    y = torch.bmm(B[own.clamp(min=0)], torch.bmm(A[own.clamp(min=0)], x[:, :, None]))[:, :, 0]
    return torch.where((own < 0)[:, None] & ~y.isinf(), 0, y)
