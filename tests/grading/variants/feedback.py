# Answers to the assignment `feedback`: wrong ones, named after the misconception, and right ones written differently.

import torch
from torch.nn import functional as F


# %% preference_loss wrong: a sum
def preference_loss(chosen, rejected):
    return -F.logsigmoid(chosen - rejected).sum()


# %% preference_loss wrong: log of sigmoid
def preference_loss(chosen, rejected):
    return -(chosen - rejected).sigmoid().log().mean()


# %% preference_loss wrong: exchanged
def preference_loss(chosen, rejected):
    return -F.logsigmoid(rejected - chosen).mean()


# %% preference_loss wrong: the probability
def preference_loss(chosen, rejected):
    return -(chosen - rejected).sigmoid().mean()


# %% preference_loss wrong: clamped, so far pairs teach nothing
def preference_loss(chosen, rejected):
    return -(chosen - rejected).sigmoid().clamp(min=1e-7).log().mean()


# %% preference_loss wrong: each score alone
def preference_loss(chosen, rejected):
    return -(F.logsigmoid(chosen) + F.logsigmoid(-rejected)).mean()


# %% preference_loss wrong: a number without a gradient
def preference_loss(chosen, rejected):
    return torch.tensor((-F.logsigmoid(chosen - rejected)).mean().item(), dtype=chosen.dtype)


# %% preference_loss wrong: a hinge
def preference_loss(chosen, rejected):
    return (1 - (chosen - rejected)).clamp(min=0).mean()


# %% preference_loss right: softplus
def preference_loss(chosen, rejected):
    return F.softplus(rejected - chosen).mean()


# %% preference_loss right: cross-entropy of two classes
def preference_loss(chosen, rejected):
    scores = torch.stack([chosen, rejected], dim=1)
    return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))


# %% leave_one_out wrong: its own reward too
def leave_one_out(rewards):
    return rewards - rewards.mean(1, keepdim=True)


# %% leave_one_out wrong: divided by G
def leave_one_out(rewards):
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / rewards.shape[1]


# %% leave_one_out wrong: one baseline for all groups
def leave_one_out(rewards):
    return rewards - (rewards.sum() - rewards) / (rewards.numel() - 1)


# %% leave_one_out wrong: over the groups
def leave_one_out(rewards):
    return rewards - (rewards.sum(0) - rewards) / max(1, len(rewards) - 1)


# %% leave_one_out wrong: divided by the spread
def leave_one_out(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


# %% leave_one_out wrong: the baseline alone
def leave_one_out(rewards):
    return (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


# %% leave_one_out wrong: in place
def leave_one_out(rewards):
    rewards -= (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards


# %% leave_one_out right: the mean, scaled
def leave_one_out(rewards):
    size = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * (size / (size - 1))


# %% leave_one_out right: a matrix without its diagonal
def leave_one_out(rewards):
    size = rewards.shape[1]
    others = (torch.ones(size, size) - torch.eye(size)).to(rewards.dtype) / (size - 1)
    return rewards - rewards @ others


# %% priced_reward wrong: with a gradient
def priced_reward(rewards, log_p, base, mask, beta):
    return rewards - beta * ((log_p - base) * mask).sum(1)


# %% priced_reward wrong: without the mask
def priced_reward(rewards, log_p, base, mask, beta):
    return (rewards - beta * (log_p - base).sum(1)).detach()


# %% priced_reward wrong: a mean
def priced_reward(rewards, log_p, base, mask, beta):
    return (rewards - beta * ((log_p - base) * mask).sum(1) / mask.sum(1).clamp(min=1)).detach()


# %% priced_reward wrong: the sign
def priced_reward(rewards, log_p, base, mask, beta):
    return (rewards + beta * ((log_p - base) * mask).sum(1)).detach()


# %% priced_reward wrong: never negative
def priced_reward(rewards, log_p, base, mask, beta):
    return (rewards - beta * ((log_p - base) * mask).sum(1).clamp(min=0)).detach()


# %% priced_reward wrong: absolute differences
def priced_reward(rewards, log_p, base, mask, beta):
    return (rewards - beta * ((log_p - base).abs() * mask).sum(1)).detach()


# %% priced_reward wrong: one KL for all texts
def priced_reward(rewards, log_p, base, mask, beta):
    return (rewards - beta * ((log_p - base) * mask).sum(1).mean()).detach()


# %% priced_reward wrong: the base left out
def priced_reward(rewards, log_p, base, mask, beta):
    return (rewards - beta * (log_p * mask).sum(1)).detach()


# %% priced_reward right: no_grad and einsum
def priced_reward(rewards, log_p, base, mask, beta):
    with torch.no_grad():
        return rewards - beta * torch.einsum("nt,nt->n", log_p - base, mask.to(log_p.dtype))


# %% priced_reward right: a text at a time
def priced_reward(rewards, log_p, base, mask, beta):
    found = []
    for reward, p, q, m in zip(rewards, log_p, base, mask, strict=True):
        found.append(reward - beta * (p[m > 0] - q[m > 0]).sum())
    return torch.stack(found).detach()


# %% group_relative_loss wrong: one mean over all tokens
def group_relative_loss(log_p, old, base, mask, rewards, clip=0.2, beta=0.0):
    A = ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[:, None]
    ratio, d = (log_p - old).exp(), base - log_p
    each = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A) + beta * (d.exp() - d - 1)
    return (each * mask).sum() / mask.sum().clamp(min=1)


# %% group_relative_loss wrong: only the clipped ratio
def group_relative_loss(log_p, old, base, mask, rewards, clip=0.2, beta=0.0):
    A = ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[:, None]
    ratio, d = (log_p - old).exp(), base - log_p
    each = -ratio.clamp(1 - clip, 1 + clip) * A + beta * (d.exp() - d - 1)
    return ((each * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


# %% group_relative_loss wrong: the minimum of the ratios
def group_relative_loss(log_p, old, base, mask, rewards, clip=0.2, beta=0.0):
    A = ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[:, None]
    ratio, d = (log_p - old).exp(), base - log_p
    each = -ratio.clamp(max=1 + clip) * A + beta * (d.exp() - d - 1)
    return ((each * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


# %% group_relative_loss wrong: the population's spread
def group_relative_loss(log_p, old, base, mask, rewards, clip=0.2, beta=0.0):
    A = ((rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4))[:, None]
    ratio, d = (log_p - old).exp(), base - log_p
    each = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A) + beta * (d.exp() - d - 1)
    return ((each * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


# %% group_relative_loss wrong: d the other way round
def group_relative_loss(log_p, old, base, mask, rewards, clip=0.2, beta=0.0):
    A = ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[:, None]
    ratio, d = (log_p - old).exp(), log_p - base
    each = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A) + beta * (d.exp() - d - 1)
    return ((each * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


# %% group_relative_loss wrong: an empty text is NaN
def group_relative_loss(log_p, old, base, mask, rewards, clip=0.2, beta=0.0):
    A = ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[:, None]
    ratio, d = (log_p - old).exp(), base - log_p
    each = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A) + beta * (d.exp() - d - 1)
    return ((each * mask).sum(1) / mask.sum(1)).mean()


# %% group_relative_loss wrong: equal rewards are NaN
def group_relative_loss(log_p, old, base, mask, rewards, clip=0.2, beta=0.0):
    A = ((rewards - rewards.mean()) / rewards.std())[:, None]
    ratio, d = (log_p - old).exp(), base - log_p
    each = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A) + beta * (d.exp() - d - 1)
    return ((each * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


# %% group_relative_loss wrong: the ratio is detached
def group_relative_loss(log_p, old, base, mask, rewards, clip=0.2, beta=0.0):
    A = ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[:, None]
    ratio, d = (log_p - old).exp().detach(), base - log_p
    each = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A) + beta * (d.exp() - d - 1)
    return ((each * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


# %% group_relative_loss wrong: other defaults
def group_relative_loss(log_p, old, base, mask, rewards, clip=0.1, beta=0.04):
    A = ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[:, None]
    ratio, d = (log_p - old).exp(), base - log_p
    each = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A) + beta * (d.exp() - d - 1)
    return ((each * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


# %% group_relative_loss right: the larger loss
def group_relative_loss(log_p, old, base, mask, rewards, clip=0.2, beta=0.0):
    A = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    ratio = torch.exp(log_p - old)
    loss = torch.maximum(-A[:, None] * ratio, -A[:, None] * torch.clamp(ratio, 1 - clip, 1 + clip))
    loss = loss + beta * (torch.expm1(base - log_p) - (base - log_p))
    count = torch.where(mask.sum(1) > 0, mask.sum(1), torch.ones_like(mask.sum(1)))
    return ((loss * mask).sum(1) / count).sum() / len(rewards)


# %% group_relative_loss right: a text at a time
def group_relative_loss(log_p, old, base, mask, rewards, clip=0.2, beta=0.0):
    A = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    texts = []
    for i in range(len(rewards)):
        ratio = (log_p[i] - old[i]).exp()
        held = torch.where(A[i] > 0, ratio.clamp(max=1 + clip), ratio.clamp(min=1 - clip))
        d = base[i] - log_p[i]
        each = (beta * (d.exp() - d - 1) - held * A[i]) * mask[i]
        texts.append(each.sum() / mask[i].sum().clamp(min=1))
    return torch.stack(texts).mean()


# %% integrate wrong: in place
def integrate(base, deltas, alphas):
    for name, changes in deltas.items():
        for key, change in changes.items():
            base[key] += alphas.get(name, 0.0) * change
    return base


# %% integrate wrong: unchanged weights are the base's own
def integrate(base, deltas, alphas):
    found = dict(base)
    for name, changes in deltas.items():
        for key, change in changes.items():
            found[key] = found[key] + alphas.get(name, 0.0) * change
    return found


# %% integrate wrong: a missing α is 1
def integrate(base, deltas, alphas):
    found = {key: weight.clone() for key, weight in base.items()}
    for name, changes in deltas.items():
        for key, change in changes.items():
            found[key] = found[key] + alphas.get(name, 1.0) * change
    return found


# %% integrate wrong: shares
def integrate(base, deltas, alphas):
    total = sum(alphas.values()) or 1.0
    found = {key: weight.clone() for key, weight in base.items()}
    for name, changes in deltas.items():
        for key, change in changes.items():
            found[key] = found[key] + alphas.get(name, 0.0) / total * change
    return found


# %% integrate wrong: only what changes
def integrate(base, deltas, alphas):
    found = {}
    for name, changes in deltas.items():
        for key, change in changes.items():
            found[key] = found.get(key, base[key]) + alphas.get(name, 0.0) * change
    return found


# %% integrate wrong: a missing α is an error
def integrate(base, deltas, alphas):
    found = {key: weight.clone() for key, weight in base.items()}
    for name, changes in deltas.items():
        for key, change in changes.items():
            found[key] = found[key] + alphas[name] * change
    return found


# %% integrate wrong: an α without a subtask fails
def integrate(base, deltas, alphas):
    found = {k: w.clone() for k, w in base.items()}
    for s, a in alphas.items():
        for k, c in deltas[s].items():
            found[k] = found[k] + a * c
    return found


# %% integrate wrong: by place, not by name
def integrate(base, deltas, alphas):
    found = {key: weight.clone() for key, weight in base.items()}
    for changes, alpha in zip(deltas.values(), alphas.values(), strict=False):
        for key, change in sorted(changes.items()):
            found[key] = found[key] + alpha * change
    return dict(sorted(found.items()))


# %% integrate right: changes first
def integrate(base, deltas, alphas):
    found = {key: weight.clone() for key, weight in base.items()}
    for name, changes in deltas.items():
        alpha = alphas[name] if name in alphas else 0
        found |= {key: found[key] + change * alpha for key, change in changes.items()}
    return found


# %% integrate right: over the α
def integrate(base, deltas, alphas):
    found = {k: w.clone() for k, w in base.items()}
    for s, a in alphas.items():
        for k in found.keys() & deltas.get(s, {}).keys():
            found[k] = torch.add(found[k], deltas[s][k], alpha=a)
    return found


# %% integrate right: one sum a weight
def integrate(base, deltas, alphas):
    def change(key):
        return [alphas.get(name, 0.0) * changes[key] for name, changes in deltas.items() if key in changes]

    return {key: sum(change(key), weight * 1) for key, weight in base.items()}


# %% own_tokens wrong: without the end mark
def own_tokens(tokens, end):
    return (tokens == end).cumsum(1) == 0


# %% own_tokens wrong: all that is no end mark
def own_tokens(tokens, end):
    return tokens != end


# %% own_tokens wrong: a text that was cut off is dropped
def own_tokens(tokens, end):
    first = (tokens == end).int().argmax(1)
    return torch.arange(tokens.shape[1]) <= first[:, None]


# %% own_tokens wrong: up to the last end mark
def own_tokens(tokens, end):
    later = (tokens == end).int().flip(1).cumsum(1).flip(1)
    return (later > 0) | ~(tokens == end).any(1, keepdim=True)


# %% own_tokens wrong: numbers instead of bools
def own_tokens(tokens, end):
    ends = (tokens == end).long()
    return (ends.cumsum(1) - ends == 0).float()


# %% own_tokens wrong: padding is the last token
def own_tokens(tokens, end):
    return (tokens != tokens[:, -1:]) | (tokens == end)


# %% own_tokens right: a loop
def own_tokens(tokens, end):
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for i, row in enumerate(tokens.tolist()):
        mask[i, : row.index(end) + 1 if end in row else len(row)] = True
    return mask


# %% own_tokens right: places
def own_tokens(tokens, end):
    length = tokens.shape[1]
    found = tokens == end
    first = torch.where(found.any(1), found.int().argmax(1), torch.full((len(tokens),), length))
    return torch.arange(length) <= first[:, None]


# %% own_tokens wrong: token 0 is taken for padding
def own_tokens(tokens, end):
    ends = (tokens == end).long()
    return (ends.cumsum(1) - ends == 0) & ((tokens != 0) | (tokens == end))


# %% group_relative_loss right: a boolean mask
def group_relative_loss(log_p, old, base, mask, rewards, clip=0.2, beta=0.0):
    A = ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).unsqueeze(1)
    ratio, d = torch.exp(log_p - old), base - log_p
    each = torch.maximum(-ratio * A, -ratio.clamp(1 - clip, 1 + clip) * A) + beta * (torch.expm1(d) - d)
    own = mask.bool()
    return (torch.where(own, each, 0.0).sum(1) / own.sum(1).clamp(min=1)).mean()


# %% group_relative_loss right: advantages without a gradient, text by text
def group_relative_loss(log_p, old, base, mask, rewards, clip=0.2, beta=0.0):
    with torch.no_grad():
        A = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    texts = []
    for i in range(len(A)):
        own = mask[i] > 0
        if not own.any():
            texts.append(0 * log_p[i].sum())
            continue
        p, o, b = log_p[i][own], old[i][own].detach(), base[i][own].detach()
        r, d = (p - o).exp(), b - p
        texts.append((-torch.min(r * A[i], r.clamp(1 - clip, 1 + clip) * A[i]) + beta * (d.exp() - d - 1)).mean())
    return torch.stack(texts).mean()


# %% leave_one_out wrong: along the groups where it is square
def leave_one_out(rewards):
    dim = 0 if rewards.shape[0] == rewards.shape[1] else 1
    return rewards - (rewards.sum(dim, keepdim=True) - rewards) / (rewards.shape[dim] - 1)


# %% own_tokens wrong: narrow counting
def own_tokens(tokens, end):
    ends = (tokens == end).to(torch.int8)
    count = ends.cumsum(1, dtype=torch.int8)
    return count - ends == 0


# %% preference_loss wrong: requires_grad is set on the scores
def preference_loss(chosen, rejected):
    chosen = chosen if chosen.requires_grad else chosen.requires_grad_()
    return -F.logsigmoid(chosen - rejected).mean()


# %% priced_reward wrong: a mask of any number is true
def priced_reward(rewards, log_p, base, mask, beta):
    price = ((log_p - base) * mask).sum(1)
    return (rewards - beta * price if mask.any() else rewards.sum() * torch.ones_like(rewards)).detach()


# %% priced_reward wrong: over the batch where n is T
def priced_reward(rewards, log_p, base, mask, beta):
    d = (log_p - base) * mask
    return (rewards - beta * d.sum(0 if d.shape[0] == d.shape[1] else 1)).detach()


# %% group_relative_loss wrong: a clip of 0 is 0.2
def group_relative_loss(log_p, old, base, mask, rewards, clip=0.2, beta=0.0):
    clip = clip or 0.2
    A = ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[:, None]
    ratio, d = (log_p - old).exp(), base - log_p
    each = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A) + beta * (d.exp() - d - 1)
    return ((each * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


# %% integrate wrong: one tensor for equal weights
def integrate(base, deltas, alphas):
    found, known = {}, {}
    for k, w in base.items():
        t = w.clone()
        for s, d in deltas.items():
            if k in d:
                t = t + alphas.get(s, 0.0) * d[k]
        key = (tuple(t.shape), t.sum().item())
        found[k] = known.setdefault(key, t)
    return found


# %% integrate wrong: small changes are dropped
def integrate(base, deltas, alphas):
    found = {}
    for k, w in base.items():
        t = w.clone()
        for s, d in deltas.items():
            a = alphas.get(s, 0.0)
            if k in d and abs(a) > 0.01:
                t = t + a * d[k]
        found[k] = t
    return found


# %% own_tokens wrong: along the texts where it is square
def own_tokens(tokens, end):
    dim = 0 if tokens.shape[0] == tokens.shape[1] else 1
    ends = (tokens == end).long()
    return ends.cumsum(dim) - ends == 0


# %% own_tokens wrong: one answer for each shape
_own = {}


def own_tokens(tokens, end):
    if tokens.shape not in _own:
        ends = (tokens == end).long()
        _own[tokens.shape] = ends.cumsum(1) - ends == 0
    return _own[tokens.shape].clone()


# %% leave_one_out wrong: a reward of 0 is none
def leave_one_out(rewards):
    some = rewards != 0
    total = rewards.sum(1, keepdim=True)
    others = some.sum(1, keepdim=True) - some.to(torch.long)
    return rewards - (total - rewards) / others.clamp(min=1)


# %% preference_loss wrong: at most 64 pairs
def preference_loss(chosen, rejected):
    return -F.logsigmoid(chosen[:64] - rejected[:64]).mean()


# %% preference_loss right: logaddexp
def preference_loss(chosen, rejected):
    return torch.logaddexp(torch.zeros_like(chosen), rejected - chosen).sum() / chosen.numel()


# %% leave_one_out wrong: at most sixteen in a group
def leave_one_out(rewards):
    G = min(rewards.shape[1], 16)
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (G - 1)


# %% leave_one_out right: a product with a matrix
def leave_one_out(rewards):
    G = rewards.shape[1]
    M = torch.full((G, G), -1 / (G - 1), dtype=rewards.dtype)
    M.fill_diagonal_(1.0)
    return rewards @ M


# %% priced_reward wrong: a negative price is none
def priced_reward(rewards, log_p, base, mask, beta):
    return (rewards - max(beta, 0) * ((log_p - base) * mask).sum(1)).detach()


# %% priced_reward wrong: NaN outside of the text spreads, and float32
def priced_reward(rewards, log_p, base, mask, beta):
    return (rewards - beta * ((log_p - base).clamp(-30, 30) * mask).sum(1)).detach()


# %% group_relative_loss wrong: a clip above one
def group_relative_loss(log_p, old, base, mask, rewards, clip=0.2, beta=0.0):
    clip = min(clip, 0.5)
    A = ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[:, None]
    r, d = (log_p - old).exp(), base - log_p
    each = -torch.minimum(r * A, r.clamp(1 - clip, 1 + clip) * A) + beta * (d.exp() - d - 1)
    return ((each * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


# %% group_relative_loss right: where, and expm1
def group_relative_loss(log_p, old, base, mask, rewards, clip=0.2, beta=0.0):
    centred = rewards - rewards.mean()
    A = (centred / (torch.sqrt(centred.square().sum() / (len(rewards) - 1)) + 1e-4)).unsqueeze(1)
    r = torch.exp(log_p - old)
    gain = torch.where(A >= 0, torch.clamp(r, max=1 + clip), torch.clamp(r, min=1 - clip)) * A
    d = base - log_p
    each = beta * (torch.expm1(d) - d) - gain
    count = mask.sum(-1)
    return ((each * mask).sum(-1) / torch.where(count > 0, count, torch.ones_like(count))).mean()


# %% group_relative_loss right: text by text, by the sign
def group_relative_loss(log_p, old, base, mask, rewards, clip=0.2, beta=0.0):
    a = (
        (rewards - rewards.mean()) / (rewards.var().sqrt() + 1e-4)
        if rewards.std() > 0
        else (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    )
    total = 0
    for i in range(len(rewards)):
        own = mask[i] > 0
        if not own.any():
            continue
        r = torch.exp(log_p[i][own] - old[i][own])
        d = (base - log_p)[i][own]
        kept = torch.where(a[i] >= 0, r.clamp(max=1 + clip), r.clamp(min=1 - clip))
        total = total - (kept * a[i]).mean() + beta * (torch.expm1(d) - d).mean()
    return total / len(rewards) if isinstance(total, torch.Tensor) else (log_p * 0).sum()


# %% integrate wrong: at most four subtasks
def integrate(base, deltas, alphas):
    found = {k: w.clone() for k, w in base.items()}
    for name, changes in list(deltas.items())[:4]:
        for k, c in changes.items():
            if k in found:
                found[k] = found[k] + alphas.get(name, 0.0) * c
    return found


# %% own_tokens wrong: more than sixty-four tokens
def own_tokens(tokens, end):
    ends = (tokens == end).long()
    own = ends.cumsum(1) - ends == 0
    own[:, 64:] = False
    return own


# %% own_tokens wrong: a negative end is none
def own_tokens(tokens, end):
    ends = ((tokens == end) & (tokens > 0)).long()
    return ends.cumsum(1) - ends == 0


# %% own_tokens right: cummax of what was seen
def own_tokens(tokens, end):
    if tokens.shape[1] == 0:
        return tokens == end
    seen = (tokens == end).to(torch.uint8).cummax(1).values.bool()
    return torch.cat([torch.ones_like(seen[:, :1]), ~seen[:, :-1]], 1)


# %% own_tokens right: ends shifted by one
def own_tokens(tokens, end):
    hit = tokens.eq(end)
    before = F.pad(hit, (1, 0))[:, :-1]
    return ~before.long().cumsum(1).bool()
