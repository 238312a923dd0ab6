"""What prompts and prefixes share: where they stand, what they check, and what a file of theirs holds.

They are written as Hugging Face PEFT writes them: one tensor, without the network that generated it. A P-tuning or a
reparametrised prefix loads as what it wrote: a plain prompt or prefix, which can be trained on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from minipeft.files import Layout, Tensors
from minipeft.layer import Layer, Method
from minipeft.methods.common import check_whole


def embedding(model: nn.Module, what: str) -> nn.Embedding:
    """The model's token embeddings, before which a prompt goes."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Embedding):
        raise ValueError(f"{what} stands before token embeddings, and {type(model).__name__} has none; use LoRA.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{what} stands before the tokens of one stack, and {type(model).__name__} has an encoder and a decoder; "
            "attach it to a model with one of them."
        )
    return found


def check_front(length: int, init: str | Sequence[int], known: tuple[str, ...]) -> str | tuple[int, ...]:
    check_whole("length", length)
    if isinstance(init, str) and init not in known:
        raise ValueError(f"init={init!r} is not {' or '.join(map(repr, known))}; for words, give their token ids.")
    init = init if isinstance(init, str) else tuple(init)
    if not init or not (isinstance(init, str) or all(isinstance(i, int) for i in init)):
        raise ValueError(f"init={init!r} holds no token ids; use tokenizer(text).input_ids.")
    return init


def repeated(ids: Sequence[int], n: int, vocabulary: int) -> list[int]:
    if not all(0 <= i < vocabulary for i in ids):
        raise ValueError(f"init={tuple(ids)} has ids outside the {vocabulary:,} tokens of this model.")
    return list(itertools.islice(itertools.cycle(ids), n))


def prefix_shape(model: nn.Module) -> tuple[int, int, int]:
    """(layers, key-value heads, head width). With grouped queries there are fewer key-value heads than heads."""
    config = model.config.get_text_config()
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if not layers or not heads:
        raise ValueError(f"The configuration of {type(model).__name__} names no layers and attention heads.")
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return layers, getattr(config, "num_key_value_heads", None) or heads, width


class FrontLayout(Layout):
    """`prompt_embeddings`, with num_virtual_tokens rows; a trained head is at base_model.<path>."""

    head = "base_model."
    kinds = {"num_virtual_tokens": (int,), "num_transformer_submodules": (int, type(None))}
    key = "prompt_embeddings"

    def config(self, base: nn.Module, layers: list[Layer]) -> dict:
        layers_, heads, width = prefix_shape(base)
        return {
            "task_type": "CAUSAL_LM" if base.can_generate() else "FEATURE_EXTRACTION",
            "num_virtual_tokens": len(layers[0].stored()[self.key]),
            "num_transformer_submodules": 1,
            "token_dim": embedding(base, "A prompt").weight.shape[1],
            "num_attention_heads": heads,
            "num_layers": layers_,
        }

    def owns(self, key: str) -> bool:
        return key == self.key

    def place(self, layer: Layer) -> str:
        return ""

    def methods(self, base: nn.Module, config: dict, tensors: Tensors) -> list[Method]:
        if self.key not in tensors:
            raise ValueError(f"it has no {self.key}; it was saved incompletely.")
        shape, wanted = tuple(tensors[self.key].shape), (config["num_virtual_tokens"], self.width(base))
        if shape != wanted:
            raise ValueError(f"{self.key!r} has shape {shape}, but this file and model need {wanted}.")
        return [self.plain(config["num_virtual_tokens"])]

    def width(self, base: nn.Module) -> int:
        return embedding(base, "A prompt").weight.shape[1]

    def plain(self, length: int) -> Method:
        """The method whose layer is the `length` rows themselves."""
        raise NotImplementedError(f"{type(self).__name__} does not define plain")
