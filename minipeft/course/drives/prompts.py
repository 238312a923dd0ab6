"""How a learner's answers to the assignment `prompts` are called."""

from __future__ import annotations

import torch
from torch import nn

from minipeft.course.drives.common import gradient, leaf
from minipeft.course.drives.plain import plain
from minipeft.course.drives.promises import keeping


def put_before(function, prompt, embeds, mask, labels, weights) -> dict:
    """What comes out, and the gradient that reaches the prompt from Σ weights · embeddings."""
    prompt = leaf(prompt)
    found = dict(zip(("embeds", "mask", "labels"), function(prompt, embeds, mask, labels), strict=True))
    return found | {"gradient": gradient((found["embeds"].double() * weights).sum(), prompt)}


def draw_rows(function, table, n: int, seed: int) -> dict:
    """Draws with a seed, with the same one and with forty others; then trains what was drawn."""
    weight = nn.Parameter(table.clone())
    before = torch.random.get_rng_state()
    one, used = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    torch.rand(3, generator=used)
    draws = [function(weight, n, torch.Generator().manual_seed(s)) for s in (seed, *range(seed, seed + 41))]
    seen = {"draws": [each.detach().clone() for each in draws]}
    seen["one generator"] = [function(weight, n, each).detach().clone() for each in (one, one, used)]
    seen["global"] = torch.equal(before, torch.random.get_rng_state())
    if draws[0].requires_grad and draws[0].grad_fn is not None:
        draws[0].square().sum().backward()
    seen["gradient in table"] = weight.grad is not None
    draws[0].data.add_(1.0)
    seen["table kept"] = torch.equal(weight.detach(), table)
    return seen


def name_rows(function, prompt, table, k: int):
    """Indices, whatever their whole-number type."""
    found = plain(function(prompt, table, k))
    whole = isinstance(found, torch.Tensor) and found.dtype in (torch.int32, torch.int16, torch.uint8)
    return found.long() if whole else found


class Reader(nn.Module):
    """A causal model of one attention layer: logits (rows, L, words) from embeddings, a mask and positions."""

    def __init__(self, table: torch.Tensor, places: torch.Tensor):
        super().__init__()
        self.register_buffer("table", table)
        self.register_buffer("places", places)

    def forward(self, inputs_embeds, attention_mask, position_ids) -> torch.Tensor:
        h = inputs_embeds + self.places[position_ids]
        length, width = h.shape[-2:]
        seen = torch.ones(length, length, dtype=torch.bool).tril() & attention_mask.bool()[:, None, :]
        scores = (h @ h.transpose(-1, -2) / width**0.5).masked_fill(~seen, -1e9)
        return (h + scores.softmax(-1) @ h) @ self.table.T


def read_with_prompt(function, table, places, prompt, embeds, mask, positions, labels) -> dict:
    prompt = leaf(prompt)
    model = Reader(table, places).train(len(prompt) % 2 == 0)
    logits, loss = keeping(function, model, prompt, embeds, mask, positions, labels)
    return {"logits": logits, "loss": loss, "gradient": gradient(loss, prompt)}
