"""What stands before the tokens: soft prompts, as embeddings, and prefixes, as keys and values of every layer.

The model is asked for L tokens and answers for L tokens, so whoever calls it (`fit`, `generate`, a Trainer) need not
know that there are more:

    tokens          p₁ … pₙ x₁ … x_L        placeholder ids, whose embeddings are exchanged for the prompt's
    attention mask  1  … 1  m₁ … m_L        a prefix of length n has its 1s here too, and its K and V in the cache
    positions       0 … n−1 n + those of x  counted without padding, so left padding changes nothing
    labels          −100 …  y₁ … y_L        no loss is taken where the prompt stands, nor, in a language model, over x₁,
                                            for which the base takes none either: nothing came before it
    logits                  z₁ … z_L        the prompt's own are cut off

`generate` calls the model once with the whole text and an empty cache, then with one token at a time: prompt and prefix
enter with the first call, and the later ones only count them.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from minipeft.hook import State
    from minipeft.layer import Layer

IGNORE = -100  # a label that no loss is taken over


class Front:
    """The hooks on the model and on its token embeddings. `layers`: {adapter name: layers}, of which each has either
    `prompt()`, of shape (n, d), or `prefix()`, of shape (n, 2·layers, key-value heads, head width): K, V, K, V, …"""

    def __init__(self, base: nn.Module, state: State):
        self.state = state
        self.layers: dict[str, list[Layer]] = {}
        self.names = list(inspect.signature(base.forward).parameters)
        self.pending: torch.Tensor | None = None  # the prompt of the call that is under way
        self.total = 0  # its vectors and the call's tokens
        self.drop_cache = False
        self.begun = 0  # vectors in front in the cache that the call begins
        base.register_forward_pre_hook(self.before, with_kwargs=True)
        base.register_forward_hook(self.after)
        base.get_input_embeddings().register_forward_hook(self.embed)

    def active(self, kind: str) -> list[Layer]:
        if self.state.silent or self.state.rows is not None:
            return []
        return [layer for name in self.state.active for layer in self.layers.get(name, ()) if layer.front == kind]

    def before(self, base: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self.pending, self.drop_cache, self.begun = None, False, 0
        prompts, prefixes = self.active("prompt"), self.active("prefix")
        call = dict(zip(self.names, args, strict=False)) | kwargs
        cache = call.get("past_key_values")
        started = cache is not None and cache.get_seq_length() > 0
        prompt = torch.cat([layer.prompt() for layer in prompts]) if prompts else None
        prefix = torch.cat([layer.prefix() for layer in prefixes]) if prefixes else None
        n_prompt, n_prefix = (0 if each is None else len(each) for each in (prompt, prefix))
        n = n_prompt + n_prefix
        if started and getattr(cache, "in_front", 0) != n:
            raise ValueError(
                f"past_key_values began with {getattr(cache, 'in_front', 0)} vectors in front of its tokens, but the "
                f"active adapters put {n} there; start with an empty cache."
            )
        if n == 0:
            return None
        text = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
        rows, length = text.shape[:2]
        room = -1 if cache is None else cache.get_max_length()
        if 0 <= room < (cache.get_seq_length() if started else n) + length:
            raise ValueError(
                f"The cache has room for {room} tokens and must hold {n} vectors in front of them as well; "
                "call generate with its default, dynamic cache."
            )
        self._positions(base, call, rows, length, n_prompt if not started else 0, n_prefix if not started else n)
        if (mask := call.get("attention_mask")) is not None:
            if getattr(mask, "ndim", 0) != 2:
                raise ValueError(
                    "A prompt or prefix extends an attention mask of shape (rows, tokens), and this one has another "
                    "shape; call generate with its default, dynamic cache."
                )
            call["attention_mask"] = torch.cat([mask.new_ones(rows, n), mask], 1)
        if prompt is not None and not started:
            self._put_prompt(base, call, prompt, rows, length)
        if prefix is not None and not started:
            call["past_key_values"] = cache = self._put_prefix(base, cache, prefix, rows)
            self.drop_cache = call.get("use_cache") is False
        if not started:
            self.begun = n
        return (), call

    def _positions(self, base: nn.Module, call: dict, rows: int, length: int, ahead: int, seen: int) -> None:
        """Positions of the prompt (`ahead` of them) and of the tokens, `seen` places further than the caller counts."""
        given, mask = call.get("position_ids"), call.get("attention_mask")
        limit = getattr(getattr(base, "config", None), "max_position_embeddings", None)
        if limit is not None and ahead + seen + length > limit and call.get("past_key_values") is None:
            raise ValueError(
                f"{ahead + seen} vectors in front and {length} tokens are more than the {limit} positions of "
                f"{type(base).__name__}; use a shorter prompt or shorter texts."
            )
        if given is None and "past_key_values" in self.names and getattr(mask, "ndim", 0) == 2:
            given = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        if given is not None:
            before = torch.arange(seen, seen + ahead, device=given.device).expand(len(given), ahead)
            call["position_ids"] = torch.cat([before, given + ahead + seen], 1)

    def _put_prompt(self, base: nn.Module, call: dict, prompt: torch.Tensor, rows: int, length: int) -> None:
        n = len(prompt)
        if call.get("inputs_embeds") is not None:
            embeds = call["inputs_embeds"]
            call["inputs_embeds"] = torch.cat([prompt.to(embeds.dtype).expand(rows, -1, -1), embeds], 1)
        else:
            ids, pad = call["input_ids"], getattr(base.config, "pad_token_id", None)
            # any token but the padding, which some models look for in the ids
            call["input_ids"] = torch.cat([ids.new_full((rows, n), int(pad == 0)), ids], 1)
        for name, value in (("labels", IGNORE), ("token_type_ids", 0)):
            each = call.get(name)
            if each is not None and each.shape == (rows, length):
                call[name] = torch.cat([each.new_full((rows, n), value), each], 1)
                if name == "labels" and base.can_generate():
                    call[name][:, n] = IGNORE
        if isinstance(call.get("logits_to_keep"), torch.Tensor):
            call["logits_to_keep"] = call["logits_to_keep"] + n
        self.pending, self.total = prompt, n + length

    def _put_prefix(self, base: nn.Module, cache, prefix: torch.Tensor, rows: int):
        if base.training and getattr(base, "is_gradient_checkpointing", False):
            raise ValueError(
                "Gradient checkpointing takes the cache, and with it the prefix, away from the layers; turn it off "
                "with gradient_checkpointing_disable()."
            )
        if cache is None:
            from transformers import DynamicCache

            cache = DynamicCache(config=base.config)
        states = prefix.to(base.dtype).transpose(0, 1).transpose(1, 2)  # (2·layers, heads, n, width)
        for i in range(len(states) // 2):
            K, V = (states[j].expand(rows, -1, -1, -1) for j in (2 * i, 2 * i + 1))
            cache.update(K, V, i)
        return cache

    def embed(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Exchanges the placeholders' embeddings for the prompt."""
        if self.pending is None:
            return output
        prompt = self.pending.to(output.dtype).expand(len(output), -1, -1)
        return torch.cat([prompt, output[:, len(self.pending) :]], 1)

    def after(self, base: nn.Module, args: tuple, output):
        """Cuts off the prompt's own logits and hidden states; attention maps stay whole, to be looked at."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self.begun:
            cache.in_front = self.begun
        if cache is not None and self.drop_cache:
            # the caller wants none, and must not get the prefix's back
            output = type(output)(**{key: value for key, value in output.items() if key != "past_key_values"})
        if self.pending is None:
            return output
        n, self.pending = len(self.pending), None
        return self._cut(output, n)

    def _cut(self, output, n: int):
        if isinstance(output, torch.Tensor):
            return output[:, n:] if output.ndim == 3 and output.shape[1] == self.total else output
        if isinstance(output, dict):
            for key, value in output.items():
                output[key] = self._cut(value, n)
            return output
        return tuple(self._cut(value, n) for value in output) if isinstance(output, tuple) else output
