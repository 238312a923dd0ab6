"""What prompts and prefixes share: where they stand, what they check, and what a file of theirs holds.

They are written as Hugging Face PEFT writes them: one tensor, without the network that generated it. A P-tuning or a
reparametrised prefix loads as what it wrote: a plain prompt or prefix, which can be trained on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from minipeft.files import OURS, Layout, Tensors
from minipeft.layer import Layer, Method
from minipeft.methods.common import check_whole
from minipeft.reading import arguments, embedders, is_pair, placeholder, reader


def embedding(model: nn.Module, what: str) -> nn.Embedding:
    """The model's token embeddings."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Embedding) or not hasattr(model.config, "get_text_config"):
        name = type(model).__name__
        raise ValueError(
            f"{what} stands before token embeddings, and {name} names none with get_input_embeddings(); use LoRA."
        )
    return found


def check_prompt(model: nn.Module) -> None:
    """Raises ValueError for a model that cannot have a prompt."""
    name = type(model).__name__
    embedding(model, "A prompt")
    if "input_ids" not in arguments(reader(model)) or not embedders(model):
        raise ValueError(f"A prompt stands before input_ids, and {name} embeds none; use LoRA.")
    if "MultipleChoice" in name:
        raise ValueError(f"A prompt stands before one text a row, and {name} reads several; use LoRA.")
    # Orders of the tokens, beam search over places, cells of a table, whether each token is a forgery.
    scoring = {"perm_mask", "p_mask", "table_mask"} & set(arguments(model))
    if scoring or hasattr(model, "discriminator_predictions"):
        raise ValueError(
            f"{name} speaks about single places of the text, and a prompt would be counted among them; use LoRA."
        )


@torch.no_grad()
@torch.random.fork_rng()  # some draw in every call
def keys_and_values(
    model: nn.Module, ids: Sequence[int], again: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each layer keeps of these tokens in its cache: K and V, (1, key-value heads, tokens, head width).

    It is measured, for configurations do not say it: a pair's decoder, one key-value head, a latent of K and V.
    `again` has the model read the tokens once more, behind themselves, as it reads a text behind a prefix.
    Raises ValueError for a model that keeps no keys and values, or not in every layer.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    own, call = DynamicCache(), {"input_ids": torch.tensor([list(ids)], device=model.device), "use_cache": True}
    asked = model
    if is_pair(model):
        asked, encoder = model.get_decoder(), model.get_encoder()
        states = torch.zeros(
            1, 1, getattr(encoder, "config", model.config).hidden_size, dtype=model.dtype, device=model.device
        )
        call |= {"encoder_hidden_states": states, "past_key_values": EncoderDecoderCache(own, DynamicCache())}
    else:
        call["past_key_values"] = own
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        answer = asked(**call)
        found = [(layer.keys, layer.values) for layer in own.layers]
        if again:
            place = {"position_ids": torch.arange(len(ids), 2 * len(ids), device=model.device)[None]}
            behind = asked(**call, **(place if "position_ids" in arguments(asked) else {}))
            if behind[0].shape != answer[0].shape:
                raise ValueError(f"behind {len(ids)} tokens it answers in {tuple(behind[0].shape)}")
    except Exception as error:  # whatever an architecture says to a cache that it does not know
        said = str(error).strip() if not isinstance(error, TypeError | AttributeError) else ""
        reason = f" ({said.splitlines()[0]})" if said else ""
        raise ValueError(f"{_no_cache(model)}{reason}; use a prompt or LoRA.") from error
    finally:
        for module in training:
            module.training = True
    if not found or any(each is None or each.ndim != 4 for pair in found for each in pair):
        raise ValueError(f"{_no_cache(model)}; use a prompt or LoRA.")
    return found


def _no_cache(model: nn.Module) -> str:
    return f"A prefix is keys and values in every layer's cache, and {type(model).__name__} keeps none there"


def check_front(length: int, init: str | Sequence[int], known: tuple[str, ...]) -> str | tuple[int, ...]:
    check_whole("length", length)
    if isinstance(init, str) and init not in known:
        raise ValueError(f"init={init!r} is not {' or '.join(map(repr, known))}; for words, give their token ids.")
    init = tuple(init) if isinstance(init, Iterable) and not isinstance(init, str) else init
    if not isinstance(init, str) and not (isinstance(init, tuple) and init and all(isinstance(i, int) for i in init)):
        raise ValueError(f"init={init!r} holds no token ids; use tokenizer(text).input_ids.")
    return init


def repeated(ids: Sequence[int], n: int, vocabulary: int) -> list[int]:
    if not all(0 <= i < vocabulary for i in ids):
        raise ValueError(f"init={tuple(ids)} has ids outside the {vocabulary:,} tokens of this model.")
    return list(itertools.islice(itertools.cycle(ids), n))


def prefix_shape(model: nn.Module) -> tuple[int, int, int]:
    """(layers, key-value heads, head width), measured on two tokens; on the meta device, from the configuration."""
    if embedding(model, "A prefix").weight.is_meta:
        return configured_shape(model)
    found = keys_and_values(model, [placeholder(model)] * 2, again=True)
    shapes = {each.shape[1::2] for pair in found for each in pair}
    if len(shapes) > 1:
        raise ValueError(
            f"A prefix has keys and values of one size in every layer, and those of {type(model).__name__} are "
            f"{' and '.join(f'{heads} x {width}' for heads, width in sorted(shapes))}; use a prompt or LoRA."
        )
    return len(found), *shapes.pop()


def configured_shape(model: nn.Module) -> tuple[int, int, int]:
    config = model.config.get_text_config(decoder=True)
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
        pair, speaks = is_pair(base), base.can_generate()
        task = ("SEQ_2_SEQ_LM" if pair else "CAUSAL_LM") if speaks else "FEATURE_EXTRACTION"
        # PEFT has fronts on a pair only where it generates, and from tokens
        foreign = pair and not (speaks and "input_ids" in arguments(reader(base)))
        return {
            "peft_type": OURS + self.peft_type if foreign else self.peft_type,
            "task_type": task,
            "num_virtual_tokens": len(layers[0].stored()[self.key]),
            "num_transformer_submodules": 1,
        }

    def owns(self, key: str) -> bool:
        return key == self.key

    def place(self, layer: Layer) -> str:
        return ""

    def methods(self, base: nn.Module, config: dict, tensors: Tensors) -> list[Method]:
        if self.key not in tensors:
            raise ValueError(f"it has no {self.key}; it was saved incompletely.")
        n = config["num_virtual_tokens"]
        if config.get("num_transformer_submodules") == 2 and len(tensors[self.key]) == 2 * n:
            tensors[self.key] = tensors[self.key][:n]  # PEFT has a second prompt for the decoder, and does not use it
        shape, wanted = tuple(tensors[self.key].shape), (n, self.width(base))
        if shape != wanted:
            raise ValueError(f"{self.key!r} has shape {shape}, but this file and model need {wanted}.")
        return [self.plain(n)]

    def width(self, base: nn.Module) -> int:
        """The numbers in a row."""
        raise NotImplementedError(f"{type(self).__name__} does not define width")

    def plain(self, length: int) -> Method:
        """The method whose layer is the `length` rows themselves."""
        raise NotImplementedError(f"{type(self).__name__} does not define plain")
