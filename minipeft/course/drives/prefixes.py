"""How a learner's answers to the assignment `prefixes` are called."""

from __future__ import annotations

import torch
from torch import nn

from minipeft.course.drives.common import gradient, leaf
from minipeft.course.drives.promises import NotKept, keeping


def split(function, flat, layers: int, kv_heads: int, rows: int, weights: dict) -> dict:
    """K and V of each layer, and the gradient that reaches the flat prefix from Σ weights · (K, V)."""
    flat = leaf(flat)
    states = {}
    for i, (K, V) in enumerate(function(flat, layers, kv_heads, rows)):
        states |= {f"K of layer {i}": K, f"V of layer {i}": V}
    found = dict(states) | {"gradient": None}
    if {name: each.shape for name, each in states.items()} == {name: each.shape for name, each in weights.items()}:
        loss = sum((states[name].double() * each).sum() for name, each in weights.items())
        found["gradient"] = gradient(loss, flat)
    return found


def look_back(function, q, k, v, prefix_k, prefix_v, mask, weights) -> dict:
    """What real tokens get, and the gradient that reaches (prefix_k, prefix_v) from Σ weights · output."""
    prefix = leaf(torch.stack([prefix_k, prefix_v]))
    output = function(q, k, v, *prefix, mask)
    found = {"output": output, "gradient": None}
    if output.shape == q.shape:
        if not output.isfinite().all():
            raise NotKept(
                "The output has NaN or ∞ in it; where a token sees nothing at all, any finite number will do."
            )
        output = output.masked_fill(~mask.bool()[:, None, :, None], 0.0)
        found = {"output": output, "gradient": gradient((output.double() * weights).sum(), prefix)}
    return found


def fold(function, E, W1, b1, W2, b2) -> dict:
    """What goes to the file, and whether a gradient hangs on it."""
    file = function(*(nn.Parameter(each.clone()) for each in (E, W1, b1, W2, b2)))
    tensors = [each for each in file.values() if isinstance(each, torch.Tensor)] if isinstance(file, dict) else []
    return {"file": file, "gradient": any(each.requires_grad for each in tensors)}


class Decoder(nn.Module):
    """A causal model with grouped queries, and with keys and values in front of its own.

    It gives logits (rows, T, words) for token ids and positions (rows, T). `visible` (rows, T, n + T) says what each
    token sees of [prefix; text], and `past` has (K, V) of each layer, both of shape (rows, kv_heads, n, head_dim).
    """

    def __init__(self, embed: torch.Tensor, places: torch.Tensor, maps: list, head_dim: int):
        super().__init__()
        self.embed, self.places, self.maps, self.head_dim = embed, places, maps, head_dim
        self.layers, self.kv_heads = len(maps), len(maps[0][1]) // head_dim

    def states(self, ids, positions, visible, past=None) -> tuple[torch.Tensor, list]:
        """Hidden states (rows, T, d), and (K, V) of the text itself in each layer."""
        h, own = self.embed[ids] + self.places[positions], []
        bias = torch.zeros(visible.shape, dtype=h.dtype).masked_fill(~visible.bool(), -1e9).unsqueeze(-3)
        for (Wq, Wk, Wv), front in zip(self.maps, past or [None] * self.layers, strict=True):
            q, k, v = ((h @ W.T).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for W in (Wq, Wk, Wv))
            own.append((k, v))
            K, V = (torch.cat(pair, 2) for pair in zip(front, own[-1], strict=True)) if front else own[-1]
            each = nn.functional.scaled_dot_product_attention(q, K, V, attn_mask=bias, enable_gqa=True)
            h = h + each.transpose(1, 2).flatten(2)
        return h, own

    def forward(self, ids, positions, visible, past) -> torch.Tensor:
        return self.states(ids, positions, visible, past)[0] @ self.embed.T


def read_behind_prefix(function, embed, places, maps, head_dim: int, prefix, ids, mask, positions, weights) -> dict:
    """The logits of real tokens, and the gradient that reaches the prefix from Σ weights · logits."""
    prefix = leaf(prefix)
    model = Decoder(embed, places, maps, head_dim).train(len(prefix) % 2 == 0)
    logits = keeping(function, model, prefix, ids, mask, positions)
    found = {"logits": logits, "gradient": None}
    if logits.shape == weights.shape:
        logits = logits.masked_fill(~mask.bool()[..., None], 0.0)
        found = {"logits": logits, "gradient": gradient((logits * weights).sum(), prefix)}
    return found
