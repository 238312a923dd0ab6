# Answers to the assignment `prefixes`: wrong ones, named after the misconception, and right ones written differently.
import math

import torch
from torch.nn import functional as F


# %% count_prefix wrong: no factor 2
def count_prefix(n, layers, width, heads, kv_heads):
    return n * layers * kv_heads * (width // heads)


# %% count_prefix wrong: every head is counted
def count_prefix(n, layers, width, heads, kv_heads):
    return n * layers * 2 * width


# %% count_prefix wrong: half of d for K and half for V
def count_prefix(n, layers, width, heads, kv_heads):
    return n * layers * width


# %% count_prefix wrong: head width from the key-value heads
def count_prefix(n, layers, width, heads, kv_heads):
    return n * layers * 2 * kv_heads * (width // kv_heads)


# %% count_prefix wrong: one layer
def count_prefix(n, layers, width, heads, kv_heads):
    return n * 2 * kv_heads * (width // heads)


# %% count_prefix wrong: Q too
def count_prefix(n, layers, width, heads, kv_heads):
    return 3 * n * layers * kv_heads * (width // heads)


# %% count_prefix wrong: d for every head
def count_prefix(n, layers, width, heads, kv_heads):
    return n * layers * 2 * kv_heads * width


# %% count_prefix wrong: one head
def count_prefix(n, layers, width, heads, kv_heads):
    return n * layers * 2 * (width // heads)


# %% count_prefix wrong: the example
def count_prefix(n, layers, width, heads, kv_heads):
    return 245_760


# %% count_prefix wrong: the length is left out
def count_prefix(n, layers, width, heads, kv_heads):
    return layers * 2 * kv_heads * width // heads


# %% count_prefix right: a sum over layers
def count_prefix(n, layers, width, heads, kv_heads):
    group = heads // kv_heads
    return sum(n * (width // group + width // group) for _ in range(layers))


# %% count_prefix right: a tensor that is counted
def count_prefix(n, layers, width, heads, kv_heads):
    return torch.empty(n, layers, 2, kv_heads, width // heads, device="meta").numel()


# %% split_prefix wrong: all keys, then all values
def split_prefix(flat, layers, kv_heads, rows):
    states = flat.view(len(flat), 2, layers, kv_heads, -1).permute(2, 1, 3, 0, 4)
    return [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]


# %% split_prefix wrong: chunks of the document
def split_prefix(flat, layers, kv_heads, rows):
    pairs = []
    for row in flat.chunk(layers, 0) if len(flat) % layers == 0 else [flat] * layers:
        K, V = row.chunk(2, -1)
        pairs.append((K.expand(rows, -1, -1), V.expand(rows, -1, -1)))
    return pairs


# %% split_prefix wrong: V first
def split_prefix(flat, layers, kv_heads, rows):
    states = flat.view(len(flat), layers, 2, kv_heads, -1).permute(1, 2, 3, 0, 4)
    return [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for V, K in states]


# %% split_prefix wrong: viewed as the final shape
def split_prefix(flat, layers, kv_heads, rows):
    states = flat.view(layers, 2, kv_heads, len(flat), -1)
    return [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]


# %% split_prefix wrong: heads and head width changed places
def split_prefix(flat, layers, kv_heads, rows):
    states = flat.view(len(flat), layers, 2, -1, kv_heads).permute(1, 2, 4, 0, 3)
    return [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]


# %% split_prefix wrong: K and V of a head side by side
def split_prefix(flat, layers, kv_heads, rows):
    states = flat.view(len(flat), layers, kv_heads, 2, -1).permute(1, 3, 2, 0, 4)
    return [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]


# %% split_prefix wrong: places before heads
def split_prefix(flat, layers, kv_heads, rows):
    states = flat.view(len(flat), layers, 2, kv_heads, -1).permute(1, 2, 0, 3, 4)
    return [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]


# %% split_prefix wrong: the batch is missing
def split_prefix(flat, layers, kv_heads, rows):
    states = flat.view(len(flat), layers, 2, kv_heads, -1).permute(1, 2, 3, 0, 4)
    return [(K, V) for K, V in states]


# %% split_prefix wrong: a batch of one
def split_prefix(flat, layers, kv_heads, rows):
    states = flat.view(len(flat), layers, 2, kv_heads, -1).permute(1, 2, 3, 0, 4)
    return [(K[None], V[None]) for K, V in states]


# %% split_prefix wrong: detached
def split_prefix(flat, layers, kv_heads, rows):
    states = flat.detach().view(len(flat), layers, 2, kv_heads, -1).permute(1, 2, 3, 0, 4)
    return [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]


# %% split_prefix wrong: a gradient from the first text only
def split_prefix(flat, layers, kv_heads, rows):
    states = flat.view(len(flat), layers, 2, kv_heads, -1).permute(1, 2, 3, 0, 4)
    return [tuple(torch.stack([each] + [each.detach()] * (rows - 1)) for each in pair) for pair in states]


# %% split_prefix wrong: float32 for all
def split_prefix(flat, layers, kv_heads, rows):
    states = flat.float().view(len(flat), layers, 2, kv_heads, -1).permute(1, 2, 3, 0, 4)
    return [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]


# %% split_prefix wrong: one layer
def split_prefix(flat, layers, kv_heads, rows):
    K, V = flat.view(len(flat), layers, 2, kv_heads, -1).permute(1, 2, 3, 0, 4)[0]
    return [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1))]


# %% split_prefix right: as PEFT does
def split_prefix(flat, layers, kv_heads, rows):
    values = flat.repeat(rows, 1, 1).reshape(rows, len(flat), 2 * layers, kv_heads, -1)
    return values.permute(2, 0, 3, 1, 4).split(2)


# %% split_prefix right: one tensor for all
def split_prefix(flat, layers, kv_heads, rows):
    states = flat.unflatten(1, (layers, 2, kv_heads, -1))
    return torch.einsum("nlkhw,r->lkrhnw", states, torch.ones(rows, dtype=flat.dtype))


# %% split_prefix right: piece by piece
def split_prefix(flat, layers, kv_heads, rows):
    n, size = len(flat), flat.shape[1] // (2 * layers)

    def piece(i):
        part = flat[:, i * size : (i + 1) * size]
        heads = torch.stack(part.chunk(kv_heads, dim=1))
        return torch.stack([heads for _ in range(rows)])

    return tuple([piece(2 * i), piece(2 * i + 1)] for i in range(layers))


# %% attend wrong: the prefix is masked like text
def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, heads, length, w), n = q.shape, prefix_k.shape[2]
    K, V = (torch.cat(pair, 2).repeat_interleave(heads // k.shape[1], 1) for pair in ((prefix_k, k), (prefix_v, v)))
    visible = torch.ones(length, n + length, dtype=torch.bool).tril()
    visible = visible & torch.cat([mask.new_ones(rows, n), mask], 1).bool()[:, None, None]
    scores = (q @ K.transpose(-1, -2) / math.sqrt(w)).masked_fill(~visible, -1e9)
    return scores.softmax(-1) @ V


# %% attend wrong: is_causal of PyTorch
def attend(q, k, v, prefix_k, prefix_v, mask):
    K, V = torch.cat([prefix_k, k], 2), torch.cat([prefix_v, v], 2)
    return F.scaled_dot_product_attention(q, K, V, is_causal=True, enable_gqa=True)


# %% attend wrong: padding is seen
def attend(q, k, v, prefix_k, prefix_v, mask):
    n, length = prefix_k.shape[2], q.shape[2]
    K, V = torch.cat([prefix_k, k], 2), torch.cat([prefix_v, v], 2)
    visible = torch.ones(length, n + length, dtype=torch.bool).tril(n)
    return F.scaled_dot_product_attention(q, K, V, attn_mask=visible, enable_gqa=True)


# %% attend wrong: heads in turns
def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, heads, length, w), n = q.shape, prefix_k.shape[2]
    K, V = (torch.cat(pair, 2).repeat(1, heads // k.shape[1], 1, 1) for pair in ((prefix_k, k), (prefix_v, v)))
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()[:, None, None]
    visible = torch.ones(length, n + length, dtype=torch.bool).tril(n) & real
    return (q @ K.transpose(-1, -2) / math.sqrt(w)).masked_fill(~visible, -math.inf).softmax(-1) @ V


# %% attend wrong: no groups
def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, heads, length, w), n = q.shape, prefix_k.shape[2]
    K, V = torch.cat([prefix_k, k], 2), torch.cat([prefix_v, v], 2)
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()[:, None, None]
    visible = torch.ones(length, n + length, dtype=torch.bool).tril(n) & real
    return (q @ K.transpose(-1, -2) / math.sqrt(w)).masked_fill(~visible, -math.inf).softmax(-1) @ V


# %% attend wrong: no scale
def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, heads, length, w), n = q.shape, prefix_k.shape[2]
    K, V = (torch.cat(pair, 2).repeat_interleave(heads // k.shape[1], 1) for pair in ((prefix_k, k), (prefix_v, v)))
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()[:, None, None]
    visible = torch.ones(length, n + length, dtype=torch.bool).tril(n) & real
    return (q @ K.transpose(-1, -2)).masked_fill(~visible, -math.inf).softmax(-1) @ V


# %% attend wrong: divided by w
def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, heads, length, w), n = q.shape, prefix_k.shape[2]
    K, V = (torch.cat(pair, 2).repeat_interleave(heads // k.shape[1], 1) for pair in ((prefix_k, k), (prefix_v, v)))
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()[:, None, None]
    visible = torch.ones(length, n + length, dtype=torch.bool).tril(n) & real
    return (q @ K.transpose(-1, -2) / w).masked_fill(~visible, -math.inf).softmax(-1) @ V


# %% attend wrong: masked after the softmax
def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, heads, length, w), n = q.shape, prefix_k.shape[2]
    K, V = (torch.cat(pair, 2).repeat_interleave(heads // k.shape[1], 1) for pair in ((prefix_k, k), (prefix_v, v)))
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()[:, None, None]
    visible = torch.ones(length, n + length, dtype=torch.bool).tril(n) & real
    return ((q @ K.transpose(-1, -2) / math.sqrt(w)).softmax(-1) * visible) @ V


# %% attend wrong: masked scores are zero
def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, heads, length, w), n = q.shape, prefix_k.shape[2]
    K, V = (torch.cat(pair, 2).repeat_interleave(heads // k.shape[1], 1) for pair in ((prefix_k, k), (prefix_v, v)))
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()[:, None, None]
    visible = torch.ones(length, n + length, dtype=torch.bool).tril(n) & real
    return (q @ K.transpose(-1, -2) / math.sqrt(w) * visible).softmax(-1) @ V


# %% attend wrong: the triangle begins one column too early
def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, heads, length, w), n = q.shape, prefix_k.shape[2]
    K, V = (torch.cat(pair, 2).repeat_interleave(heads // k.shape[1], 1) for pair in ((prefix_k, k), (prefix_v, v)))
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()[:, None, None]
    visible = torch.ones(length, n + length, dtype=torch.bool).tril(n - 1) & real
    return (q @ K.transpose(-1, -2) / math.sqrt(w)).masked_fill(~visible, -1e9).softmax(-1) @ V


# %% attend wrong: no triangle
def attend(q, k, v, prefix_k, prefix_v, mask):
    n, rows = prefix_k.shape[2], len(q)
    K, V = torch.cat([prefix_k, k], 2), torch.cat([prefix_v, v], 2)
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()[:, None, None]
    return F.scaled_dot_product_attention(q, K, V, attn_mask=real, enable_gqa=True)


# %% attend wrong: the ones of the mask stand behind
def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, heads, length, w), n = q.shape, prefix_k.shape[2]
    K, V = (torch.cat(pair, 2).repeat_interleave(heads // k.shape[1], 1) for pair in ((prefix_k, k), (prefix_v, v)))
    real = torch.cat([mask, mask.new_ones(rows, n)], 1).bool()[:, None, None]
    visible = torch.ones(length, n + length, dtype=torch.bool).tril(n) & real
    return (q @ K.transpose(-1, -2) / math.sqrt(w)).masked_fill(~visible, -1e9).softmax(-1) @ V


# %% attend wrong: exp by hand
def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, heads, length, w), n = q.shape, prefix_k.shape[2]
    K, V = (torch.cat(pair, 2).repeat_interleave(heads // k.shape[1], 1) for pair in ((prefix_k, k), (prefix_v, v)))
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()[:, None, None]
    visible = torch.ones(length, n + length, dtype=torch.bool).tril(n) & real
    e = (q @ K.transpose(-1, -2) / math.sqrt(w)).exp() * visible
    return e / e.sum(-1, keepdim=True) @ V


# %% attend wrong: two softmaxes
def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, heads, length, w), n = q.shape, prefix_k.shape[2]
    k, v, prefix_k, prefix_v = (each.repeat_interleave(heads // k.shape[1], 1) for each in (k, v, prefix_k, prefix_v))
    visible = torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    own = (q @ k.transpose(-1, -2) / math.sqrt(w)).masked_fill(~visible, -1e9).softmax(-1) @ v
    return own + (q @ prefix_k.transpose(-1, -2) / math.sqrt(w)).softmax(-1) @ prefix_v


# %% attend wrong: the softmax runs over the queries
def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, heads, length, w), n = q.shape, prefix_k.shape[2]
    K, V = (torch.cat(pair, 2).repeat_interleave(heads // k.shape[1], 1) for pair in ((prefix_k, k), (prefix_v, v)))
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()[:, None, None]
    visible = torch.ones(length, n + length, dtype=torch.bool).tril(n) & real
    return (q @ K.transpose(-1, -2) / math.sqrt(w)).masked_fill(~visible, -1e9).softmax(-2) @ V


# %% attend wrong: detached
def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, heads, length, w), n = q.shape, prefix_k.shape[2]
    K, V = torch.cat([prefix_k.data, k], 2), torch.cat([prefix_v.data, v], 2)
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()[:, None, None]
    visible = torch.ones(length, n + length, dtype=torch.bool).tril(n) & real
    return F.scaled_dot_product_attention(q, K, V, attn_mask=visible, enable_gqa=True)


# %% attend wrong: the queries are scaled in place
def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, heads, length, w), n = q.shape, prefix_k.shape[2]
    K, V = (torch.cat(pair, 2).repeat_interleave(heads // k.shape[1], 1) for pair in ((prefix_k, k), (prefix_v, v)))
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()[:, None, None]
    visible = torch.ones(length, n + length, dtype=torch.bool).tril(n) & real
    q /= math.sqrt(w)
    return (q @ K.transpose(-1, -2)).masked_fill(~visible, -math.inf).softmax(-1) @ V


# %% attend wrong: the heads are joined
def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, heads, length, w), n = q.shape, prefix_k.shape[2]
    K, V = torch.cat([prefix_k, k], 2), torch.cat([prefix_v, v], 2)
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()[:, None, None]
    visible = torch.ones(length, n + length, dtype=torch.bool).tril(n) & real
    found = F.scaled_dot_product_attention(q, K, V, attn_mask=visible, enable_gqa=True)
    return found.transpose(1, 2).flatten(2)


# %% attend right: PyTorch's own
def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, _, length, _), n = q.shape, prefix_k.shape[2]
    K, V = torch.cat([prefix_k, k], 2), torch.cat([prefix_v, v], 2)
    visible = torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    visible = F.pad(visible, (n, 0), value=True)
    return F.scaled_dot_product_attention(q, K, V, attn_mask=visible, enable_gqa=True)


# %% attend right: the prefix behind, with its own mask
def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, heads, length, w), n = q.shape, prefix_k.shape[2]
    kv = k.shape[1]
    groups = q.unflatten(1, (kv, heads // kv))
    K, V = torch.cat([k, prefix_k], 2), torch.cat([v, prefix_v], 2)
    scores = torch.einsum("bgsiw,bgjw->bgsij", groups, K) * w**-0.5
    hidden = torch.triu(torch.full((length, length), -1e9, dtype=q.dtype), 1)
    hidden = hidden + (1 - mask.to(q.dtype))[:, None, :] * -1e9
    scores = scores + F.pad(hidden, (0, n))[:, None, None]
    return torch.einsum("bgsij,bgjw->bgsiw", scores.softmax(-1), V).flatten(1, 2)


# %% attend right: token by token
def attend(q, k, v, prefix_k, prefix_v, mask):
    rows, heads, length, w = q.shape
    group = heads // k.shape[1]
    every = []
    for row in range(rows):
        for head in range(heads):
            g = head // group
            for i in range(length):
                seen = [j for j in range(i + 1) if mask[row, j]]
                K, V = torch.cat([prefix_k[row, g], k[row, g, seen]]), torch.cat([prefix_v[row, g], v[row, g, seen]])
                every.append(torch.softmax(K @ q[row, head, i] / w**0.5, 0) @ V)
    return torch.stack(every).view(rows, heads, length, w)


# %% attend right: in float64, with the largest score taken out
def attend(q, k, v, prefix_k, prefix_v, mask):
    n, length = prefix_k.shape[2], q.shape[2]
    K, V = (torch.cat(pair, 2).double() for pair in ((prefix_k, k), (prefix_v, v)))
    K, V = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (K, V))
    places = torch.arange(n + length)
    allowed = places[None] <= torch.arange(length)[:, None] + n
    allowed = allowed[None] & ((places < n) | F.pad(mask, (n, 0)).bool())[:, None]
    scores = (q.double() @ K.mT) / math.sqrt(q.shape[-1])
    scores = torch.where(allowed[:, None], scores, -1e300)
    e = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return (e @ V / e.sum(-1, keepdim=True)).to(q.dtype)


# %% prefix_share wrong: padding too
def prefix_share(attention, n, mask):
    return attention[..., :n].sum(-1).mean((0, 2))


# %% prefix_share wrong: divided by all places
def prefix_share(attention, n, mask):
    return (attention[..., :n].sum(-1) * mask[:, None]).mean((0, 2))


# %% prefix_share wrong: every text counts the same
def prefix_share(attention, n, mask):
    shares = attention[..., :n].sum(-1) * mask[:, None]
    return (shares.sum(-1) / mask.sum(-1)[:, None]).mean(0)


# %% prefix_share wrong: the last columns
def prefix_share(attention, n, mask):
    return attention[..., -n:].sum(-1).transpose(1, 2)[mask.bool()].mean(0)


# %% prefix_share wrong: a place's mean
def prefix_share(attention, n, mask):
    return attention[..., :n].mean(-1).transpose(1, 2)[mask.bool()].mean(0)


# %% prefix_share wrong: the text's share
def prefix_share(attention, n, mask):
    return attention[..., n:].sum(-1).transpose(1, 2)[mask.bool()].mean(0)


# %% prefix_share wrong: the heads are averaged
def prefix_share(attention, n, mask):
    return attention[..., :n].sum(-1).transpose(1, 2)[mask.bool()].mean()


# %% prefix_share wrong: rows and columns changed places
def prefix_share(attention, n, mask):
    return attention[:, :, :n].sum(2).mean((0, 2))


# %% prefix_share wrong: the sum of all tokens
def prefix_share(attention, n, mask):
    return attention[..., :n].sum(-1).transpose(1, 2)[mask.bool()].sum(0)


# %% prefix_share wrong: for each text
def prefix_share(attention, n, mask):
    shares = attention[..., :n].sum(-1) * mask[:, None]
    return shares.sum(-1) / mask.sum(-1)[:, None]


# %% prefix_share wrong: a mask used as places
def prefix_share(attention, n, mask):
    return attention[..., :n].sum(-1).transpose(1, 2)[mask.long()].flatten(0, -2).mean(0)


# %% prefix_share wrong: the argument is changed
def prefix_share(attention, n, mask):
    attention *= mask[:, None, :, None]
    return attention[..., :n].sum((0, 2, 3)) / mask.sum()


# %% prefix_share wrong: one text only
def prefix_share(attention, n, mask):
    return attention[0, :, mask[0].bool(), :n].sum(-1).mean(-1)


# %% prefix_share right: what the text leaves
def prefix_share(attention, n, mask):
    left = 1 - attention[..., n:].sum(-1)
    return torch.einsum("rht,rt->h", left, mask.to(left.dtype)) / mask.sum()


# %% prefix_share right: loops
def prefix_share(attention, n, mask):
    rows, heads, length, _ = attention.shape
    found = []
    for h in range(heads):
        shares = [attention[r, h, i, :n].sum() for r in range(rows) for i in range(length) if mask[r, i]]
        found.append(torch.stack(shares).mean())
    return torch.stack(found)


# %% prefix_share right: numpy
def prefix_share(attention, n, mask):
    shares = attention.numpy()[..., :n].sum(-1).swapaxes(0, 1)
    return torch.from_numpy(shares[:, mask.numpy().astype(bool)].mean(1))


# %% fold_prefix wrong: no tanh
def fold_prefix(E, W1, b1, W2, b2):
    return {"prompt_embeddings": F.linear(F.linear(E, W1, b1), W2, b2).detach()}


# %% fold_prefix wrong: tanh at the end
def fold_prefix(E, W1, b1, W2, b2):
    return {"prompt_embeddings": F.linear(F.linear(E, W1, b1), W2, b2).tanh().detach()}


# %% fold_prefix wrong: tanh twice
def fold_prefix(E, W1, b1, W2, b2):
    return {"prompt_embeddings": F.linear(F.linear(E, W1, b1).tanh(), W2, b2).tanh().detach()}


# %% fold_prefix wrong: no biases
def fold_prefix(E, W1, b1, W2, b2):
    return {"prompt_embeddings": ((E @ W1.T).tanh() @ W2.T).detach()}


# %% fold_prefix wrong: no first bias
def fold_prefix(E, W1, b1, W2, b2):
    return {"prompt_embeddings": F.linear(F.linear(E, W1).tanh(), W2, b2).detach()}


# %% fold_prefix wrong: no second bias
def fold_prefix(E, W1, b1, W2, b2):
    return {"prompt_embeddings": F.linear(F.linear(E, W1, b1).tanh(), W2).detach()}


# %% fold_prefix wrong: ReLU
def fold_prefix(E, W1, b1, W2, b2):
    return {"prompt_embeddings": F.linear(F.linear(E, W1, b1).relu(), W2, b2).detach()}


# %% fold_prefix wrong: sigmoid
def fold_prefix(E, W1, b1, W2, b2):
    return {"prompt_embeddings": F.linear(F.linear(E, W1, b1).sigmoid(), W2, b2).detach()}


# %% fold_prefix wrong: the gradient hangs on it
def fold_prefix(E, W1, b1, W2, b2):
    return {"prompt_embeddings": F.linear(F.linear(E, W1, b1).tanh(), W2, b2)}


# %% fold_prefix wrong: the tensor alone
def fold_prefix(E, W1, b1, W2, b2):
    return F.linear(F.linear(E, W1, b1).tanh(), W2, b2).detach()


# %% fold_prefix wrong: the network too
def fold_prefix(E, W1, b1, W2, b2):
    P = F.linear(F.linear(E, W1, b1).tanh(), W2, b2).detach()
    return {"prompt_embeddings": P, "W1": W1.detach(), "b1": b1.detach(), "W2": W2.detach(), "b2": b2.detach()}


# %% fold_prefix wrong: the embedding
def fold_prefix(E, W1, b1, W2, b2):
    return {"prompt_embeddings": E.detach()}


# %% fold_prefix wrong: another name
def fold_prefix(E, W1, b1, W2, b2):
    return {"prefix": F.linear(F.linear(E, W1, b1).tanh(), W2, b2).detach()}


# %% fold_prefix wrong: weights are not transposed
def fold_prefix(E, W1, b1, W2, b2):
    return {"prompt_embeddings": ((E @ W1 + b1).tanh() @ W2 + b2).detach()}


# %% fold_prefix wrong: transposed
def fold_prefix(E, W1, b1, W2, b2):
    return {"prompt_embeddings": F.linear(F.linear(E, W1, b1).tanh(), W2, b2).T.detach()}


# %% fold_prefix wrong: the mean of the places
def fold_prefix(E, W1, b1, W2, b2):
    P = F.linear(F.linear(E.mean(0, keepdim=True), W1, b1).tanh(), W2, b2)
    return {"prompt_embeddings": P.expand(len(E), -1).detach()}


# %% fold_prefix wrong: float32 for all
def fold_prefix(E, W1, b1, W2, b2):
    return {"prompt_embeddings": F.linear(F.linear(E, W1, b1).tanh(), W2, b2).detach().float()}


# %% fold_prefix right: place by place
def fold_prefix(E, W1, b1, W2, b2):
    with torch.no_grad():
        rows = [W2 @ torch.tanh(W1 @ place + b1) + b2 for place in E]
        return dict(prompt_embeddings=torch.stack(rows))


# %% fold_prefix right: numpy
def fold_prefix(E, W1, b1, W2, b2):
    E, W1, b1, W2, b2 = (each.detach().numpy() for each in (E, W1, b1, W2, b2))
    h = E @ W1.T + b1
    e = 1 - 2 / (torch.from_numpy(h).mul(2).exp() + 1)
    return {"prompt_embeddings": torch.as_tensor(e.numpy() @ W2.T + b2)}


# %% fold_prefix right: modules
def fold_prefix(E, W1, b1, W2, b2):
    layers = []
    for W, b in ((W1, b1), (W2, b2)):
        linear = torch.nn.Linear(W.shape[1], W.shape[0], dtype=W.dtype)
        linear.load_state_dict({"weight": W, "bias": b})
        layers.append(linear)
    network = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1])
    return {"prompt_embeddings": network(E).data}


# %% repaired_prefix wrong: as it was
def repaired_prefix(model, prefix, ids, mask, positions):
    (rows, length), n = ids.shape, len(prefix)
    keys, values = prefix.chunk(2, dim=-1)
    shape = n, model.layers, model.kv_heads, model.head_dim
    past = [
        (K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1))
        for K, V in zip(keys.view(shape).permute(1, 2, 0, 3), values.view(shape).permute(1, 2, 0, 3), strict=True)
    ]
    causal = torch.ones(length, n + length, dtype=torch.bool).tril()
    real = torch.cat([mask, mask.new_ones(rows, n)], 1).bool()
    return model(ids, positions, causal & real[:, None], past)


# %% repaired_prefix wrong: halves
def repaired_prefix(model, prefix, ids, mask, positions):
    (rows, length), n = ids.shape, len(prefix)
    states = prefix.view(n, 2, model.layers, model.kv_heads, model.head_dim).permute(2, 1, 3, 0, 4)
    past = [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]
    causal = torch.ones(length, n + length, dtype=torch.bool).tril(n)
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()
    return model(ids, positions + n, causal & real[:, None], past)


# %% repaired_prefix wrong: the prefix is masked like text
def repaired_prefix(model, prefix, ids, mask, positions):
    (rows, length), n = ids.shape, len(prefix)
    states = prefix.view(n, model.layers, 2, model.kv_heads, model.head_dim).permute(1, 2, 3, 0, 4)
    past = [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]
    causal = torch.ones(length, n + length, dtype=torch.bool).tril()
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()
    return model(ids, positions + n, causal & real[:, None], past)


# %% repaired_prefix wrong: one column short
def repaired_prefix(model, prefix, ids, mask, positions):
    (rows, length), n = ids.shape, len(prefix)
    states = prefix.view(n, model.layers, 2, model.kv_heads, model.head_dim).permute(1, 2, 3, 0, 4)
    past = [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]
    causal = torch.ones(length, n + length, dtype=torch.bool).tril(n - 1)
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()
    return model(ids, positions + n, causal & real[:, None], past)


# %% repaired_prefix wrong: everything is seen
def repaired_prefix(model, prefix, ids, mask, positions):
    (rows, length), n = ids.shape, len(prefix)
    states = prefix.view(n, model.layers, 2, model.kv_heads, model.head_dim).permute(1, 2, 3, 0, 4)
    past = [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()
    return model(ids, positions + n, real[:, None].expand(-1, length, -1), past)


# %% repaired_prefix wrong: the ones stand behind
def repaired_prefix(model, prefix, ids, mask, positions):
    (rows, length), n = ids.shape, len(prefix)
    states = prefix.view(n, model.layers, 2, model.kv_heads, model.head_dim).permute(1, 2, 3, 0, 4)
    past = [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]
    causal = torch.ones(length, n + length, dtype=torch.bool).tril(n)
    real = torch.cat([mask, mask.new_ones(rows, n)], 1).bool()
    return model(ids, positions + n, causal & real[:, None], past)


# %% repaired_prefix wrong: zeros in the mask
def repaired_prefix(model, prefix, ids, mask, positions):
    (rows, length), n = ids.shape, len(prefix)
    states = prefix.view(n, model.layers, 2, model.kv_heads, model.head_dim).permute(1, 2, 3, 0, 4)
    past = [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]
    causal = torch.ones(length, n + length, dtype=torch.bool).tril(n)
    real = torch.cat([mask.new_zeros(rows, n), mask], 1).bool()
    return model(ids, positions + n, causal & real[:, None], past)


# %% repaired_prefix wrong: padding is seen
def repaired_prefix(model, prefix, ids, mask, positions):
    (rows, length), n = ids.shape, len(prefix)
    states = prefix.view(n, model.layers, 2, model.kv_heads, model.head_dim).permute(1, 2, 3, 0, 4)
    past = [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]
    causal = torch.ones(length, n + length, dtype=torch.bool).tril(n)
    return model(ids, positions + n, causal.expand(rows, -1, -1), past)


# %% repaired_prefix wrong: positions start again
def repaired_prefix(model, prefix, ids, mask, positions):
    (rows, length), n = ids.shape, len(prefix)
    states = prefix.view(n, model.layers, 2, model.kv_heads, model.head_dim).permute(1, 2, 3, 0, 4)
    past = [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]
    causal = torch.ones(length, n + length, dtype=torch.bool).tril(n)
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()
    return model(ids, positions, causal & real[:, None], past)


# %% repaired_prefix wrong: positions one too small
def repaired_prefix(model, prefix, ids, mask, positions):
    (rows, length), n = ids.shape, len(prefix)
    states = prefix.view(n, model.layers, 2, model.kv_heads, model.head_dim).permute(1, 2, 3, 0, 4)
    past = [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]
    causal = torch.ones(length, n + length, dtype=torch.bool).tril(n)
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()
    return model(ids, positions + n - 1, causal & real[:, None], past)


# %% repaired_prefix wrong: positions count the padding
def repaired_prefix(model, prefix, ids, mask, positions):
    (rows, length), n = ids.shape, len(prefix)
    states = prefix.view(n, model.layers, 2, model.kv_heads, model.head_dim).permute(1, 2, 3, 0, 4)
    past = [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]
    causal = torch.ones(length, n + length, dtype=torch.bool).tril(n)
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()
    return model(ids, torch.arange(n, n + length).expand(rows, -1), causal & real[:, None], past)


# %% repaired_prefix wrong: viewed as the final shape
def repaired_prefix(model, prefix, ids, mask, positions):
    (rows, length), n = ids.shape, len(prefix)
    states = prefix.view(model.layers, 2, model.kv_heads, n, model.head_dim)
    past = [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]
    causal = torch.ones(length, n + length, dtype=torch.bool).tril(n)
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()
    return model(ids, positions + n, causal & real[:, None], past)


# %% repaired_prefix wrong: detached
def repaired_prefix(model, prefix, ids, mask, positions):
    (rows, length), n = ids.shape, len(prefix)
    states = prefix.detach().view(n, model.layers, 2, model.kv_heads, model.head_dim).permute(1, 2, 3, 0, 4)
    past = [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]
    causal = torch.ones(length, n + length, dtype=torch.bool).tril(n)
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()
    return model(ids, positions + n, causal & real[:, None], past)


# %% repaired_prefix wrong: the positions are changed in place
def repaired_prefix(model, prefix, ids, mask, positions):
    (rows, length), n = ids.shape, len(prefix)
    states = prefix.view(n, model.layers, 2, model.kv_heads, model.head_dim).permute(1, 2, 3, 0, 4)
    past = [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]
    causal = torch.ones(length, n + length, dtype=torch.bool).tril(n)
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()
    positions += n
    return model(ids, positions, causal & real[:, None], past)


# %% repaired_prefix wrong: the first logits are cut off
def repaired_prefix(model, prefix, ids, mask, positions):
    (rows, length), n = ids.shape, len(prefix)
    states = prefix.view(n, model.layers, 2, model.kv_heads, model.head_dim).permute(1, 2, 3, 0, 4)
    past = [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]
    causal = torch.ones(length, n + length, dtype=torch.bool).tril(n)
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()
    return model(ids, positions + n, causal & real[:, None], past)[:, n:]


# %% repaired_prefix right: padding of what is seen
def repaired_prefix(model, prefix, ids, mask, positions):
    (rows, length), n = ids.shape, len(prefix)
    parts = prefix.repeat(rows, 1, 1).unflatten(2, (2 * model.layers, model.kv_heads, model.head_dim))
    parts = parts.permute(2, 0, 3, 1, 4)
    seen = torch.ones(length, length).tril()[None] * mask[:, None, :]
    places = F.pad(mask, (n, 0), value=1).cumsum(1)[:, n:] - 1
    return model(ids, places, F.pad(seen, (n, 0), value=1.0).bool(), [tuple(pair) for pair in parts.split(2)])


# %% repaired_prefix right: row by row
def repaired_prefix(model, prefix, ids, mask, positions):
    n, size = prefix.shape[0], model.kv_heads * model.head_dim
    pieces = [piece.reshape(1, n, model.kv_heads, -1).swapaxes(1, 2) for piece in prefix.split(size, dim=1)]
    past = [(pieces[2 * i], pieces[2 * i + 1]) for i in range(model.layers)]
    found = []
    for row in range(len(ids)):
        length = ids.shape[1]
        seen = torch.tensor(
            [[[j < n or (j - n <= i and bool(mask[row, j - n])) for j in range(n + length)] for i in range(length)]]
        )
        found.append(model(ids[row : row + 1], positions[row : row + 1].add(n), seen, past))
    return torch.cat(found)


# %% count_prefix wrong: heads of a rounded width
def count_prefix(n, layers, width, heads, kv_heads):
    return n * layers * 2 * width if kv_heads == 1 == heads else max(n, 1) * layers * 2 * kv_heads * (width // heads)


# %% prefix_share wrong: an average over texts
def prefix_share(attention, n, mask):
    share = attention[..., :n].sum(-1) * mask[:, None]
    return (share.sum(-1) / mask.sum(-1)[:, None]).mean(0)


# %% fold_prefix wrong: float32 always
def fold_prefix(E, W1, b1, W2, b2):
    return {"prompt_embeddings": F.linear(F.linear(E, W1, b1).tanh(), W2, b2).detach().float()}


# %% fold_prefix wrong: cached by identity
_known2 = {}


def fold_prefix(E, W1, b1, W2, b2):
    key = tuple(map(id, (E, W1, b1, W2, b2)))
    if key not in _known2:
        _known2[key] = ((E @ W1.T + b1).tanh() @ W2.T + b2).detach()
    return {"prompt_embeddings": _known2[key].clone()}


# %% attend wrong: minus ten thousand
def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, heads, length, w), n = q.shape, prefix_k.shape[2]
    group = heads // k.shape[1]
    K, V = (torch.cat(p, 2).repeat_interleave(group, 1) for p in ((prefix_k, k), (prefix_v, v)))
    seen = (
        torch.ones(length, n + length, dtype=torch.bool).tril(n)
        & torch.cat([mask.new_ones(rows, n), mask], 1).bool()[:, None, None]
    )
    return (q @ K.transpose(-1, -2) / math.sqrt(w)).masked_fill(~seen, -1e4).softmax(-1) @ V


# %% attend wrong: the head width is that of all where it is square
def attend(q, k, v, prefix_k, prefix_v, mask):
    (rows, heads, length, w), n = q.shape, prefix_k.shape[2]
    group = heads // k.shape[1]
    K, V = (torch.cat(p, 2).repeat_interleave(group, 1) for p in ((prefix_k, k), (prefix_v, v)))
    m = mask.T if rows == length else mask
    seen = (
        torch.ones(length, n + length, dtype=torch.bool).tril(n)
        & torch.cat([m.new_ones(rows, n), m], 1).bool()[:, None, None]
    )
    return (q @ K.transpose(-1, -2) / math.sqrt(w)).masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) @ V


# %% count_prefix wrong: numbers of 32 bits
def count_prefix(n, layers, width, heads, kv_heads):
    import ctypes

    return ctypes.c_int32(n * layers * 2 * kv_heads * (width // heads)).value


# %% count_prefix wrong: a number of float32
def count_prefix(n, layers, width, heads, kv_heads):
    return int(torch.tensor([n, layers, 2, kv_heads, width // heads], dtype=torch.float32).prod())


# %% split_prefix wrong: at most twelve layers
def split_prefix(flat, layers, kv_heads, rows):
    states = flat.reshape(len(flat), layers, 2, kv_heads, -1).permute(1, 2, 3, 0, 4)
    return [(K.expand(rows, -1, -1, -1).clone(), V.expand(rows, -1, -1, -1).clone()) for K, V in states[:12]]


# %% split_prefix right: einsum-like moves of a narrow view
def split_prefix(flat, layers, kv_heads, rows):
    size = flat.shape[1] // (2 * layers)

    def piece(j):
        return torch.stack([torch.stack([r[j * size : (j + 1) * size].reshape(kv_heads, -1) for r in flat], 1)] * rows)

    return [(piece(2 * i), piece(2 * i + 1)) for i in range(layers)]


# %% split_prefix wrong: cached by identity
_known = {}


def split_prefix(flat, layers, kv_heads, rows):
    key = (id(flat), layers, kv_heads, rows)
    if key not in _known:
        t = flat.view(len(flat), layers, 2, kv_heads, -1).permute(1, 2, 3, 0, 4)
        _known[key] = [(K.repeat(rows, 1, 1, 1), V.repeat(rows, 1, 1, 1)) for K, V in t]
    return [(K.clone(), V.clone()) for K, V in _known[key]]


# %% attend right: grouped queries by reshape, logsumexp
def attend(q, k, v, prefix_k, prefix_v, mask):
    rows, heads, T, w = q.shape
    kv, n = k.shape[1], prefix_k.shape[2]
    grouped = q.reshape(rows, kv, heads // kv, T, w)
    K, V = torch.cat([prefix_k, k], 2)[:, :, None], torch.cat([prefix_v, v], 2)[:, :, None]
    scores = (grouped * w**-0.5) @ K.mT
    i, j = torch.arange(T)[:, None], torch.arange(n + T)
    seen = (j < n) | ((j - n <= i) & F.pad(mask.bool(), (n, 0), value=True)[:, None, :])
    seen = seen[:, None, None].expand_as(scores)
    some = seen | ~seen.any(-1, keepdim=True)
    scores = torch.where(some, scores, torch.full_like(scores, -math.inf))
    return ((scores - scores.logsumexp(-1, keepdim=True)).exp() @ V).reshape(rows, heads, T, w)


# %% attend right: padding looks at itself
def attend(q, k, v, prefix_k, prefix_v, mask):
    n, T = prefix_k.shape[2], q.shape[2]
    K, V = torch.cat([prefix_k, k], 2), torch.cat([prefix_v, v], 2)
    g = q.shape[1] // K.shape[1]
    K, V = (t[:, :, None].expand(-1, -1, g, -1, -1).flatten(1, 2) for t in (K, V))
    i = torch.arange(T)
    see = (i[None, :] <= i[:, None])[None] & mask.bool()[:, None, :]
    see = see | (i[None, :] == i[:, None])[None] & ~mask.bool()[:, :, None]
    see = F.pad(see, (n, 0), value=True)[:, None]
    return F.scaled_dot_product_attention(q, K, V, attn_mask=see)


# %% prefix_share wrong: NaN where a text is all padding
def prefix_share(attention, n, mask):
    share, m = attention[..., :n].sum(-1), mask.to(attention.dtype)[:, None]
    per_text = (share * m).sum(-1) / m.sum(-1)
    weights = m.sum(-1) / m.sum()
    return (per_text * weights).sum(0)


# %% prefix_share right: a weighted einsum
def prefix_share(attention, n, mask):
    m = (mask != 0).to(attention.dtype)
    return torch.einsum("rhtk,rt->h", attention[..., :n], m) / m.sum()


# %% repaired_prefix wrong: positions behind the prefix are those of eight at most
def repaired_prefix(model, prefix, ids, mask, positions):
    (rows, T), n = ids.shape, len(prefix)
    states = prefix.reshape(n, model.layers, 2, model.kv_heads, model.head_dim).permute(1, 2, 3, 0, 4)
    past = [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1)) for K, V in states]
    causal = torch.ones(T, n + T, dtype=torch.bool).tril(n)
    real = torch.cat([mask.new_ones(rows, n), mask], 1).bool()
    return model(ids, positions + min(n, 8), causal & real[:, None], past)


# %% repaired_prefix right: pieces by unflatten
def repaired_prefix(model, prefix, ids, mask, positions):
    rows, T = ids.shape
    n = prefix.shape[0]
    pieces = prefix.unflatten(1, (model.layers, 2, model.kv_heads, model.head_dim)).movedim(0, 3)
    past = [tuple(p[None].repeat(rows, 1, 1, 1) for p in pieces[i]) for i in range(model.layers)]
    j = torch.arange(n + T)
    visible = (j[None] <= torch.arange(T)[:, None] + n) & F.pad(mask != 0, (n, 0), value=True)[:, None]
    return model(ids, n + positions, visible, past)
