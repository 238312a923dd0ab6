"""MiniLM whose lower layers are read once a sentence: they are frozen and lie below every adapter, so that they give
the same every time. It makes runs over real sentences cheaper, to the same numbers but for dropout below."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from minipeft.world.base import load


class Upper(nn.Module):
    """The layers of MiniLM from number `below` on, and a classifier on the mean of the last states; it starts at zero.

    logits (batch, 2) = W·mean_t(h_t) + b, with h (batch, length, 384); the states of layer `below` are kept by text.
    """

    def __init__(self, below: int = 4):
        super().__init__()
        model = load("minilm", labels=2)[0]
        self.config, self.tokenizer = model.config, model.tokenizer
        self.below = nn.ModuleList([model.bert.embeddings, *model.bert.encoder.layer[:below]]).requires_grad_(False)
        self.above = model.bert.encoder.layer[below:]
        self.classifier = nn.Linear(model.config.hidden_size, 2)
        nn.init.zeros_(self.classifier.weight), nn.init.zeros_(self.classifier.bias)
        self.known: dict[tuple[int, ...], torch.Tensor] = {}

    @torch.no_grad()
    def read(self, keys: list[tuple[int, ...]], input_ids: torch.Tensor, mask: torch.Tensor) -> None:
        embeddings, *layers = self.below.eval()
        states = through(layers, embeddings(input_ids=input_ids), mask)
        self.known |= {key: row[: len(key)].clone() for key, row in zip(keys, states, strict=True)}

    def forward(self, input_ids, attention_mask, labels=None):
        keys = [tuple(ids[m == 1].tolist()) for ids, m in zip(input_ids, attention_mask, strict=True)]
        if any(key not in self.known for key in keys):
            self.read(keys, input_ids, attention_mask)
        states = nn.utils.rnn.pad_sequence([self.known[key] for key in keys], batch_first=True)
        mask = attention_mask[:, : states.shape[1]]
        states = through(self.above, states, mask)
        logits = self.classifier((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def through(layers, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`states` (batch, length, d) after the layers, none of which looks at a token whose `mask` is 0."""
    hidden = torch.zeros(mask.shape).masked_fill(mask == 0, torch.finfo(torch.float32).min)[:, None, None]
    for layer in layers:
        found = layer(states, attention_mask=hidden)
        states = found[0] if isinstance(found, tuple) else found
    return states
