"""What a language model writes, with the log-probabilities that policy gradient needs, and the masks that they need.

    ids     <bos>  on  sunday  tom  sang  <eos>  <pad>      after a prompt of two words
    mask      0    0     1      1     1     0                is the *next* token the model's own?

Prompts are padded on the left while the model writes; afterwards whole texts are padded on the right.
Everything is counted, never read off a padding token, which may be the end mark itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minipeft.learn.rows import padding
from minipeft.reading import is_pair, longest


@dataclass
class Rollouts:
    """What a model wrote, a group of texts for each prompt. Rows are padded on the right.

    `ids` and `attention` (n, T); `mask` (n, T−1), 1 where the *next* token is the model's own; `log_p` (n, T−1) of
    those tokens, as the sampler had them; `texts` whole, in words; `ended` (n,): whether a text came to its <eos>.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    mask: torch.Tensor
    log_p: torch.Tensor
    texts: list[str]
    ended: torch.Tensor


@torch.no_grad()
def roll_out(
    model: torch.nn.Module, prompts: Sequence[str], group: int, seed: int, tokenizer=None, length: int | None = None
) -> Rollouts:
    """`group` texts for each prompt, drawn from the model's own distribution: no word is left out, none made likelier.

    `length`: the most tokens of a text, prompt included; the default leaves room for an <eos>.
    """
    if is_pair(model) or not model.can_generate():
        raise ValueError("Only a causal language model goes on from a prompt: load one without labels, such as pocket.")
    tokenizer = tokenizer if tokenizer is not None else model.tokenizer
    pad, end = padding(model, tokenizer), tokenizer.eos_token_id
    limit = longest(model)
    if length is None:
        length = 128 if limit is None else limit - 1 - getattr(model, "in_front", 0)
    asked = [ids[:-1] if ids[-1:] == [end] else ids for ids in tokenizer(list(prompts)).input_ids]
    if empty := [prompt for prompt, ids in zip(prompts, asked, strict=True) if not ids]:
        raise ValueError(f"The prompt {empty[0]!r} has no tokens, and the model must begin with one: give it a word.")
    if long := [prompt for prompt, ids in zip(prompts, asked, strict=True) if len(ids) >= length]:
        raise ValueError(f"The prompt {long[0]!r} leaves no room for a text of at most {length} tokens: shorten it.")
    asked = [ids for ids in asked for _ in range(group)]
    width, device = max(map(len, asked)), next(model.parameters()).device
    left = torch.tensor([[pad] * (width - len(ids)) + ids for ids in asked], device=device)
    seen = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in asked], device=device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            out = model.generate(
                input_ids=left, attention_mask=seen, max_new_tokens=length - width, do_sample=True, temperature=1.0,
                top_k=0, top_p=1.0, pad_token_id=pad, eos_token_id=end, return_dict_in_generate=True,
                output_scores=True,
            )  # fmt: skip
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise ValueError(
                "The model's probabilities are no numbers, so it cannot write: attach a fresh adapter, and train it "
                "with a learning rate ten times smaller."
            ) from None
    new = out.sequences[:, width:]
    is_end = new == end
    own = (is_end.cumsum(1) - is_end.long()) == 0  # up to the first <eos>, whatever the padding is
    # the scores as they were drawn from, so that a setting which leaves words out is seen
    sampled = wide(torch.stack(out.scores, 1)).log_softmax(-1).gather(2, new[..., None])[..., 0]
    rows = [[*ids, *new[i][own[i]].tolist()] for i, ids in enumerate(asked)]
    ids, attention = torch.full((2, len(rows), max(map(len, rows))), pad, device=device)
    attention.zero_()
    mask = torch.zeros(len(rows), ids.shape[1] - 1, device=device, dtype=sampled.dtype)
    log_p = torch.zeros_like(mask)
    for i, (row, prompt) in enumerate(zip(rows, asked, strict=True)):
        ids[i, : len(row)], attention[i, : len(row)] = torch.tensor(row), 1
        mask[i, len(prompt) - 1 : len(row) - 1] = 1
        log_p[i, len(prompt) - 1 : len(row) - 1] = sampled[i][own[i]]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return Rollouts(ids, attention, mask, log_p, [text.strip() for text in texts], (is_end & own).any(1))


def wide(numbers: torch.Tensor) -> torch.Tensor:
    """In at least float32, in which probabilities are added up."""
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


def log_probs(model: torch.nn.Module, rollouts: Rollouts) -> tuple[torch.Tensor, torch.Tensor]:
    """(log π of each next token (n, T−1), log π of every word there (n, T−1, V))."""
    logits = model(input_ids=rollouts.ids, attention_mask=rollouts.attention).logits[:, :-1]
    every = wide(logits).log_softmax(-1)
    return every.gather(2, rollouts.ids[:, 1:, None])[..., 0], every


def divergence(every: torch.Tensor, base: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """KL(π ‖ base) of each text (n,) in nats, summed along what was written, exact over each next word:
    Σ_t Σ_v π(v)·log(π(v)/base(v)), for `every` and `base` (n, T−1, V)."""
    return ((every.exp() * (every - base)).sum(-1) * mask).sum(1)
