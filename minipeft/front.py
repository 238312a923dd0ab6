"""What stands before the tokens: soft prompts, as embeddings, and prefixes, as keys and values of every layer.

The model is asked for L tokens and answers for L tokens, so whoever calls it (`fit`, `generate`, a Trainer) need not
know that there are more:

    tokens          p₁ … pₙ x₁ … x_L        placeholder ids, whose embeddings are exchanged for the prompt's; behind
                                            padding on the left, where as many words would stand
    attention mask  1  … 1  m₁ … m_L        a prefix of length n has its 1s here too, and its K and V in the cache
    positions       those of n more words   a model that numbers its tokens by itself (RoBERTa) is left to do so, for a
                                            placeholder is no padding; else counted without padding on the left
    labels          −100 …  y₁ … y_L        no loss is taken where the prompt stands, nor, in a language model, over x₁,
                                            for which the base takes none either: nothing came before it
    places          s + n                   such as the start and end of an answer, which are counted in tokens
    logits                  z₁ … z_L        the prompt's own are cut off

`generate` calls the model once with the whole text and an empty cache, then with one token at a time: prompt and prefix
enter with the first call, and the later ones only count them.

In an encoder–decoder the prompt stands before the encoder's tokens, so the decoder's mask over them grows too, and the
prefix before the decoder's (`PairFront`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from minipeft.reading import arguments, embedders, is_pair, longest, numbering, placeholder, reader

if TYPE_CHECKING:
    from minipeft.hook import State
    from minipeft.layer import Layer

IGNORE = -100  # a label that no loss is taken over
CACHES = ("past_key_values", "cache_params", "state", "mems")  # what models call what they keep from call to call
# Arguments with one entry a token, and the prompt's entry in them; None for what the row's first token has.
PER_TOKEN = {"labels": IGNORE, "token_type_ids": 0, "global_attention_mask": 0, "bbox": 0} | dict.fromkeys(
    ("mm_token_type_ids", "task_type_ids", "langs", "input_shape_ids", "input_pronunciation_ids", "xpath_tags_seq")
    + ("xpath_subs_seq",)
)
# Outputs with one entry a token.
OUTPUTS = ("logits", "prediction_logits", "start_logits", "end_logits", "last_hidden_state", "hidden_states")
OUTPUTS += ("language_output",)
# Arguments that hold places among the tokens.
PLACES = ("start_positions", "end_positions", "lengths", "entity_position_ids", "entity_start_positions")
PLACES += ("entity_end_positions", "logits_to_keep")


class Front:
    """The hooks on the model and on its token embeddings. `layers`: {adapter name: layers}, of which each has either
    `prompt()`, of shape (n, d), or `prefix()`, of shape (n, 2·layers, key-value heads, head width): K, V, K, V, …"""

    before_text = ("prompt", "prefix")

    def __init__(self, base: nn.Module, state: State):
        self.state = state
        self.layers: dict[str, list[Layer]] = {}
        self.names = arguments(base)
        self.placeholder = placeholder(base)
        self.longest = longest(base)
        counts, text = "position_ids" in self.names and numbering(base) is None, getattr(base, "base_model", base)
        self.counted = counts and "past_key_values" in self.names
        self.unseen = counts and "past_key_values" not in {*self.names, *arguments(text)}  # by the numbering: EuroBERT
        self._begin()
        base.register_forward_pre_hook(self.before, with_kwargs=True)
        base.register_forward_hook(self.after)
        for module in embedders(base):
            module.register_forward_hook(self.embed)

    def _begin(self) -> None:
        """Forgets the call before, however it ended."""
        self.pending: torch.Tensor | None = None  # the prompt of the call that is under way
        self.total = 0  # its vectors and the call's tokens
        self.ids: torch.Tensor | None = None  # the call's, with placeholders
        self.placed = False  # whether it stands before the tokens already
        self.turn: torch.Tensor | None = None  # (rows, total), from 0 to n − 1 where it stands, if rows have padding
        self.begun = 0  # vectors in front in the cache that the call begins
        self.drop_cache = self.as_tuple = False
        self.called = True

    def standing(self, kind: str) -> torch.Tensor | None:
        """The prompts, or the prefixes, of the active adapters, one after the other."""
        if self.state.silent or self.state.chosen() is not None:
            return None
        layers = [layer for name in self.state.active for layer in self.layers.get(name, ()) if layer.front == kind]
        return torch.cat([getattr(layer, kind)() for layer in layers]) if layers else None

    @torch.no_grad()
    def count(self) -> int:
        """How many vectors the active adapters put before the tokens of a text, for which it has fewer positions."""
        return sum(len(each) for kind in self.before_text if (each := self.standing(kind)) is not None)

    def before(self, base: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._begin()
        call = dict(zip(self.names, args, strict=False)) | kwargs
        prompt, prefix = self.standing("prompt"), self.standing("prefix")
        n_prompt, n_prefix = (0 if each is None else len(each) for each in (prompt, prefix))
        n = n_prompt + n_prefix
        cache = next((call[name] for name in CACHES if call.get(name) is not None), None)
        begun = has_begun(cache, n)
        if n == 0:
            return None
        rows, length = shape_of_text(call)
        check_room(cache, length if begun else n + length, n)
        mask = call.get("attention_mask")
        if n_prefix:
            check_near(base, self._empty_cache(base) if cache is None else cache, mask, n_prefix)
        self.turn = extend_mask(call, "attention_mask", n_prompt, n_prefix)
        self._positions(base, call, mask, length, 0 if begun else n_prompt, n if begun else n_prefix)
        if begun:
            return (), call
        self._as_dict(base, call)
        if prompt is not None:
            self._put_prompt(base, call, prompt, rows, length)
        if prefix is not None:
            self._put_prefix(base, call, cache, prefix, rows)
        self.begun = n
        for name in CACHES:
            note(call.get(name), n)
        return (), call

    def _positions(self, base: nn.Module, call: dict, mask, length: int, ahead: int, seen: int) -> None:
        """Positions of the prompt (`ahead` of them) and of the tokens, `seen` places further than the caller counts."""
        given, n = call.get("position_ids"), ahead + seen
        if call.get("past_key_values") is None:
            self._check_length(base, n, length)
        if given is None and (self.counted or (self.unseen and seen)) and mask is not None:
            given = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        seen, n = (0, ahead) if self.unseen else (seen, n)
        if given is None:
            return
        if mask is None or mask.shape != given.shape[-2:]:
            places = given.amin(-1, keepdim=True) + torch.arange(seen, n, device=given.device)
            call["position_ids"] = torch.cat([places, given + n], -1)
            return
        first = given.masked_fill(mask == 0, given.max()).amin(-1, keepdim=True)
        turn = turns(mask, ahead)
        after = torch.cat([given[..., :1].expand(*given.shape[:-1], ahead), given], -1) + n
        call["position_ids"] = torch.where(turn < ahead, first + seen + turn.clamp(min=0), after)

    def _check_length(self, model: nn.Module, n: int, length: int) -> None:
        if self.longest is not None and n + length > self.longest:
            raise ValueError(
                f"{n} vectors in front and {length} tokens are more than the {self.longest} positions of "
                f"{type(model).__name__}; use a shorter prompt or shorter texts."
            )

    def _put_prompt(self, base: nn.Module, call: dict, prompt: torch.Tensor, rows: int, length: int) -> None:
        n = len(prompt)
        self.pending, self.total = prompt, n + length
        if call.get("inputs_embeds") is not None:
            embeds = call["inputs_embeds"]
            call["inputs_embeds"] = self._exchange(torch.cat([embeds.new_zeros(rows, n, embeds.shape[2]), embeds], 1))
        else:
            ids = call["input_ids"]
            call["input_ids"] = torch.cat([ids.new_full((rows, n), self.placeholder), ids], 1)
            if self.turn is not None:  # the padding itself stays on the left, for some models look for it in the ids
                ahead = torch.where(self.turn < 0, ids[:, :1], self.placeholder)
                call["input_ids"] = torch.where(self.turn < n, ahead, call["input_ids"])
        self.ids = call.get("input_ids")
        for name, value in PER_TOKEN.items():
            each = call.get(name)
            if each is None or each.shape[:2] != (rows, length) or (name == "labels" and each.is_floating_point()):
                continue  # no entry a token: labels of the whole text may be as many as its tokens
            own = each[:, :1] if value is None else torch.full_like(each[:, :1], value)
            call[name] = torch.cat([own.expand(-1, n, *each.shape[2:]), each], 1)
            if name == "labels" and base.can_generate():
                call[name][:, n] = IGNORE
        for name in PLACES:
            if isinstance(each := call.get(name), torch.Tensor):
                each = each.clamp(min=0) if name in ("start_positions", "end_positions") else each
                call[name] = torch.where(each < 0, each, each + n)

    def _put_prefix(self, base: nn.Module, call: dict, cache, prefix: torch.Tensor, rows: int) -> None:
        if base.training and getattr(base, "is_gradient_checkpointing", False):
            raise ValueError(
                "Gradient checkpointing takes the cache, and with it the prefix, away from the layers; turn it off "
                "with gradient_checkpointing_disable()."
            )
        cache = self._empty_cache(base) if cache is None else cache
        states = prefix.to(base.dtype).transpose(0, 1).transpose(1, 2)  # (2·layers, heads, n, width)
        for i in range(len(states) // 2):
            K, V = (states[j].expand(rows, -1, -1, -1) for j in (2 * i, 2 * i + 1))
            own_tokens(cache).update(K, V, i)
        own = numbering(base)
        if hasattr(own, "rope_deltas") and call.get("position_ids") is None:
            if any(call.get(name) is not None for name in ("image_grid_thw", "video_grid_thw")):
                raise ValueError(
                    f"{type(base).__name__} numbers words and pictures together, and behind a prefix it would number "
                    "them otherwise; give position_ids, or use a prompt or LoRA."
                )
            own.rope_deltas = None  # of a call before, with which the model goes on when the cache holds something
        call["past_key_values"] = cache
        config_uses = getattr(base.config, "use_cache", True)
        asked = call.pop("use_cache", None)
        self.drop_cache = not (config_uses if asked is None else asked)
        if asked or not config_uses:  # a model that uses no cache may keep the one that it is given from its layers
            call["use_cache"] = True

    def _empty_cache(self, base: nn.Module):
        from transformers import DynamicCache

        return DynamicCache(config=base.config)

    def _as_dict(self, base: nn.Module, call: dict) -> None:
        """Has the model answer with names, by which the outputs are cut; the caller still gets what was asked for."""
        asked = call.get("return_dict")
        self.as_tuple = not (getattr(base.config, "return_dict", True) if asked is None else asked)
        if self.as_tuple:
            call["return_dict"] = True

    def embed(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Exchanges the placeholders' embeddings for the prompt, behind what a model puts before its text (CPM-Ant)."""
        if self.pending is None or self.placed or (more := output.shape[1] - self.total) < 0:
            return output
        if more and args and self.ids is not None and torch.equal(args[0][:, more:], self.ids.to(args[0].dtype)):
            return torch.cat([output[:, :more], self._exchange(output[:, more:])], 1)
        return self._exchange(output)

    def _exchange(self, embeds: torch.Tensor) -> torch.Tensor:
        self.placed = True
        n, prompt = len(self.pending), self.pending.to(embeds.dtype)
        if self.turn is None:
            return torch.cat([prompt.expand(len(embeds), -1, -1), embeds[:, n:]], 1)
        turn = nn.functional.pad(self.turn, (0, embeds.shape[1] - self.total), value=n)  # a model may pad on the right
        inside = ((turn >= 0) & (turn < n)).unsqueeze(-1)
        return torch.where(inside, prompt[turn.clamp(0, n - 1)], embeds)

    def after(self, base: nn.Module, args: tuple, output):
        """Cuts off the prompt's own logits and hidden states; attention maps stay whole, to be looked at."""
        name = next((name for name in CACHES if getattr(output, name, None) is not None), None)
        if name and self.begun:
            note(output[name], self.begun)
        if name and self.drop_cache:  # the caller wants none, and must not get the prefix's back
            output = type(output)(**{key: value for key, value in output.items() if key != name})
        if self.pending is not None:
            self._must_be_placed(base)
            output, self.pending = self._cut("logits", output, len(self.pending)), None
        return output.to_tuple() if self.as_tuple and hasattr(output, "to_tuple") else output

    def _must_be_placed(self, model: nn.Module) -> None:
        if not self.placed:
            raise ValueError(
                f"The prompt was not read: {type(model).__name__} does not embed its tokens with "
                "get_input_embeddings(); use LoRA."
            )

    def _cut(self, key: str, value, n: int):
        if isinstance(value, dict):
            for each in OUTPUTS:
                if value.get(each) is not None:
                    value[each] = self._cut(each, value[each], n)
        elif isinstance(value, tuple):
            return tuple(self._cut(key, each, n) for each in value)
        elif isinstance(value, torch.Tensor):
            # One row of logits a text is no row of logits a token, and a model may append an image's patches.
            per_token = value.ndim == 3 or (value.ndim == 2 and key in ("start_logits", "end_logits"))
            return value[:, n:] if per_token and value.shape[1] >= self.total else value
        return value


class PairFront(Front):
    """A prompt before the encoder's tokens, a prefix before the decoder's."""

    before_text = ("prompt",)

    def __init__(self, base: nn.Module, state: State):
        super().__init__(base, state)
        encoder = reader(base)
        self.encoder_names = arguments(encoder)
        encoder.register_forward_pre_hook(self.before_encoder, with_kwargs=True)
        encoder.register_forward_hook(self.after_encoder)

    def before(self, base: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._begin()
        call = dict(zip(self.names, args, strict=False)) | kwargs
        prompt, prefix = self.standing("prompt"), self.standing("prefix")
        cache = call.get("past_key_values")
        begun = has_begun(cache, 0 if prefix is None else len(prefix))
        if prompt is None and prefix is None:
            return None
        if prompt is not None:
            extend_mask(call, "attention_mask", len(prompt), 0)
            self._check_encoded(call)
        if prefix is not None:
            n = len(prefix)
            extend_mask(call, "decoder_attention_mask", 0, n)
            if call.get("decoder_position_ids") is not None:
                call["decoder_position_ids"] = call["decoder_position_ids"] + n
            ids = call.get("decoder_input_ids")
            check_room(own_tokens(cache), (0 if begun else n) + (0 if ids is None else ids.shape[1]), n)
            if not begun:
                self._as_dict(base, call)
                self._put_prefix(base, call, cache, prefix, rows_of(call))
                self.begun = n
                note(call["past_key_values"], n)
        return (), call

    def _empty_cache(self, base: nn.Module):
        from transformers import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(DynamicCache(config=base.config), DynamicCache())

    def _check_encoded(self, call: dict) -> None:
        encoded, mask = call.get("encoder_outputs"), call.get("attention_mask")
        if encoded is not None and mask is not None and encoded[0].shape[1] != mask.shape[1]:
            raise ValueError(
                f"encoder_outputs holds {encoded[0].shape[1]} states, and with the prompt there must be "
                f"{mask.shape[1]}; encode the text with this adapter active."
            )

    def before_encoder(self, encoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        prompt = self.standing("prompt")
        if prompt is None:
            return None
        call = dict(zip(self.encoder_names, args, strict=False)) | kwargs
        rows, length = shape_of_text(call)
        self._check_length(encoder, len(prompt), length)
        mask = call.get("attention_mask")
        self.placed, self.turn = False, None
        if mask is not None and mask.shape[-1] == length:
            self.turn = extend_mask(call, "attention_mask", len(prompt), 0)
        elif mask is not None:  # the model's own call has extended it already
            self.turn = turns(mask, 0)
        self._put_prompt(encoder, call, prompt, rows, length)
        return (), call

    def after_encoder(self, encoder: nn.Module, args: tuple, output):
        """The states of the prompt stay: the decoder attends to them."""
        if self.pending is not None:
            self._must_be_placed(encoder)
        self.pending = None
        return output


def front(base: nn.Module, state: State) -> Front:
    return PairFront(base, state) if is_pair(base) else Front(base, state)


@contextlib.contextmanager
def generating(base: nn.Module, front: Front | None) -> Iterator[None]:
    """Around `generate`: raises ValueError where it passed by the model, and with it by what stands in front."""
    if front is not None:
        front.called = front.count() == 0
    yield
    if front is not None and not front.called:
        raise ValueError(
            f"What stands in front was not read: generate of {type(base).__name__} calls a part of the model and not "
            "the model itself; use LoRA."
        )


# ---------------------------------------------------------------------------------------------------------------------
# The arguments of a call
# ---------------------------------------------------------------------------------------------------------------------
def shape_of_text(call: dict) -> tuple[int, int]:
    """(rows, tokens)"""
    text = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
    if text is None:
        raise ValueError(
            "A prompt or prefix stands before tokens, and this call has no input_ids and no inputs_embeds."
        )
    return tuple(text.shape[:2])


def rows_of(call: dict) -> int:
    """How many rows a call of an encoder–decoder has, whatever its encoder reads."""
    names = ("decoder_input_ids", "decoder_inputs_embeds", "labels", "input_ids", "inputs_embeds")
    given = next((call[name] for name in names if call.get(name) is not None), None)
    return len(call["encoder_outputs"][0] if given is None else given)


def extend_mask(call: dict, name: str, n_prompt: int, n_prefix: int) -> torch.Tensor | None:
    """Puts ones for the prompt and, in front of all, for the prefix into a mask; returns the `turns` of the prompt."""
    mask = call.get(name)
    if mask is None:
        return None
    if getattr(mask, "ndim", 0) != 2:
        raise ValueError(
            "A prompt or prefix extends an attention mask of shape (rows, tokens), and this one has another shape; "
            "call generate with its default, dynamic cache."
        )
    turn = turns(mask, n_prompt)
    with_prompt = torch.where(turn < n_prompt, (turn >= 0).to(mask.dtype), nn.functional.pad(mask, (n_prompt, 0)))
    call[name] = nn.functional.pad(with_prompt, (n_prefix, 0), value=1)
    return turn


def turns(mask: torch.Tensor, n: int) -> torch.Tensor:
    """(rows, n + tokens): below 0 in a row's padding on the left, 0 to n − 1 where n vectors follow, then more."""
    padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
    return torch.arange(n + mask.shape[1], device=mask.device) - padding


def note(cache, n: int) -> None:
    """Writes down how many vectors a cache began with."""
    if hasattr(cache, "get_seq_length"):
        cache.in_front = n


def own_tokens(cache):
    """The part of a cache that holds the keys and values of the tokens that were read one after the other."""
    return getattr(cache, "self_attention_cache", cache)


def has_begun(cache, n: int) -> bool:
    """Whether earlier calls left something in the cache; raises ValueError when it began with other than n vectors."""
    if cache is None:
        return False
    if not hasattr(cache, "layers") and not hasattr(cache, "self_attention_cache"):
        return True  # a recurrent state, which models make only when they have read
    layers = own_tokens(cache).layers
    begun = any(
        any(layer.has_previous_state.values()) if hasattr(layer, "has_previous_state") else layer.get_seq_length() > 0
        for layer in layers
    )
    if begun and getattr(cache, "in_front", 0) != n:
        raise ValueError(
            f"past_key_values began with {getattr(cache, 'in_front', 0)} vectors in front of its tokens, but the "
            f"active adapters put {n} there; start with an empty cache."
        )
    return begun


def check_room(cache, tokens: int, n: int) -> None:
    """A sliding window forgets as the base does; a static cache of full length must hold what comes."""
    layers = [layer for layer in getattr(cache, "layers", ()) if not getattr(layer, "is_sliding", False)]
    rooms = [room for layer in layers if (room := layer.get_max_length()) >= 0]
    if rooms and min(rooms) < tokens + int(cache.get_seq_length()):
        raise ValueError(
            f"The cache has room for {min(rooms)} tokens and must hold {n} vectors in front of them as well; "
            "call generate with its default, dynamic cache."
        )


def check_near(base: nn.Module, cache, mask: torch.Tensor | None, n: int) -> None:
    """Padding on the left lies between a prefix and its text, so it must not count as distance."""
    config = base.config.get_text_config()
    windows = [layer.get_max_length() for layer in cache.layers if getattr(layer, "is_sliding", False)]
    windows += [config.window_size] if "local" in getattr(config, "attention_layers", ()) else []  # GPT-Neo
    windows += [0] if getattr(getattr(config, "attn_config", None), "alibi", False) else []  # MPT
    if windows and mask is not None and n + mask.shape[1] > min(windows) and not mask[:, 0].all():
        raise ValueError(
            f"A prefix stands before the padding on the left, and {type(base).__name__} would count that as distance; "
            "pad on the right, put texts of one length into a batch, or use a prompt or LoRA."
        )
