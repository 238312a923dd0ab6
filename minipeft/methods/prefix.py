"""Prefix tuning: train the keys and values of n places before the text, in every layer (Li and Liang 2021,
"Prefix-Tuning: Optimizing Continuous Prompts for Generation", §4).

    layer l:   attention(Q, [P_K⁽ˡ⁾; K], [P_V⁽ˡ⁾; V])        P_K, P_V trained, of shape (n, kv heads · head width)

A token of the text asks (Q) and is answered from what stands before it (K, V). In an encoder–decoder the prefix stands
before the decoder's tokens, and, as in PEFT 0.21, layer l of L has the numbers of 2l mod L: with an even L two layers
share each pair (K, V) that is used, and every other pair has no effect. At n = 5 in GPT-2 medium (24 layers,
width 1024) the flat prefix holds 5 · 24 · 2 · 1024 = 245,760 numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from minipeft.files import register
from minipeft.layer import Layer, Method
from minipeft.methods.common import check_whole, like
from minipeft.methods.fronts import FrontLayout, check_front, embedding, keys_and_values, prefix_shape, repeated
from minipeft.reading import is_pair


@dataclass(frozen=True)
class PrefixTuning(Method):
    """`length`: n, the number of places before the text (§7.2: 10 for tables, 200 for summaries).

    `hidden`: None trains the prefix itself; a number trains an embedding E (n, key-value width) and a network that
        writes the prefix, P = W₂·tanh(W₁·E) (§4.3: steadier training). A file holds the P that it wrote.
    `init` of a flat prefix: "random" draws from N(0, 1); or token ids, repeated or cut to n, whose own keys and values
        are copied (§7.4: much better than random where data are few).

    Raises ValueError for a length or `hidden` below 1, an unknown init, or both `hidden` and ids; and, at `attach`, for
    a model without token embeddings, and one that does not keep keys and values of one size in every layer's cache.
    Whether it does is measured: it reads two tokens.
    """

    length: int = 8
    hidden: int | None = None
    init: str | Sequence[int] = "random"

    examples = ({"length": 3}, {"length": 3, "hidden": 8})

    def __post_init__(self) -> None:
        object.__setattr__(self, "init", check_front(self.length, self.init, ("random",)))
        if self.hidden is not None:
            check_whole("hidden", self.hidden)
        if self.hidden is not None and self.init != "random":
            raise ValueError("Token ids say what the prefix itself is at first, and hidden= has a network write it.")

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], Prefix]]:
        shape = prefix_shape(model)
        if is_pair(model) and self.init != "random":
            raise ValueError(
                f"In PEFT's form the layers of {type(model).__name__}'s decoder share keys and values, so the prefix "
                'cannot start as tokens; use init="random".'
            )
        return {"prefix": partial(Prefix, model, self, shape)}


class Prefix(Layer):
    """`value` (n, layers·2·kv·w) if flat; else `E` (n, kv·w) and `layers`, which turn it into that."""

    front = "prefix"

    def __init__(self, model: nn.Module, method: PrefixTuning, shape: tuple[int, int, int], generator: torch.Generator):
        super().__init__("prefix")
        table = embedding(model, "A prefix").weight
        self.shape, n = shape, method.length
        layers, heads, width = shape
        self.order = [2 * i % layers if is_pair(model) else i for i in range(layers)]
        self.flat = method.hidden is None
        with like(table, generator):
            if self.flat:
                self.value = nn.Parameter(torch.randn(n, layers * 2 * heads * width))
            else:
                self.E = nn.Parameter(torch.randn(n, heads * width))
                last = nn.Linear(method.hidden, layers * 2 * heads * width)
                self.layers = nn.Sequential(nn.Linear(heads * width, method.hidden), nn.Tanh(), last)
        self.to(table.device, torch.promote_types(table.dtype, torch.float32))
        if method.init != "random" and not table.is_meta:
            self.value.data.copy_(words(model, repeated(method.init, n, len(table))))

    def folded(self) -> torch.Tensor:
        """(n, layers·2·kv·w): K and V of layer 0, of layer 1, …"""
        return self.value if self.flat else self.layers(self.E)

    def stored(self) -> dict[str, torch.Tensor]:
        return {"prompt_embeddings": self.folded()}

    def prefix(self) -> torch.Tensor:
        """(n, 2·layers, kv, w): K and V of each layer"""
        layers, heads, width = self.shape
        return self.folded().view(-1, layers, 2, heads, width)[:, self.order].flatten(1, 2)


@register
class PrefixLayout(FrontLayout):
    """prompt_embeddings (n, layers·2·kv heads·head width): K and V of layer 0, of layer 1, …"""

    peft_type, layer = "PREFIX_TUNING", Prefix

    def config(self, base: nn.Module, layers: list[Layer]) -> dict:
        count, heads, width = layers[0].shape
        return super().config(base, layers) | {
            "num_transformer_submodules": 2 if is_pair(base) else 1,
            "token_dim": heads * width,
            "num_attention_heads": heads,
            "num_layers": count,
            "prefix_projection": False,
        }

    def width(self, base: nn.Module) -> int:
        layers, heads, width = prefix_shape(base)
        return layers * 2 * heads * width

    def plain(self, length: int) -> Method:
        return PrefixTuning(length)


def words(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """The keys and values that the model computes for these tokens, (n, layers·2·kv·w)."""
    states = [state[0].transpose(0, 1).flatten(1) for pair in keys_and_values(model, ids) for state in pair]
    return torch.cat(states, 1)
