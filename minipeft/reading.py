"""How a model of transformers reads its text: with which part, through which embeddings, at which positions."""

from __future__ import annotations

import inspect

from torch import nn


def is_pair(model: nn.Module) -> bool:
    """Whether the model is an encoder and a decoder, each with tokens of its own."""
    config = getattr(model, "config", None)
    return getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in arguments(model)


def reader(model: nn.Module) -> nn.Module:
    """The part whose tokens a prompt stands before: the encoder of a pair, else the model."""
    return model.get_encoder() if is_pair(model) else model


def arguments(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def embedders(model: nn.Module) -> list[nn.Embedding]:
    """The modules that embed those tokens, for several may share the table: T5's encoder has one of its own."""
    table = model.get_input_embeddings().weight
    return [m for m in reader(model).modules() if isinstance(m, nn.Embedding) and m.weight is table]


def placeholder(model: nn.Module) -> int:
    """The first token id to which the configuration gives no meaning, such as padding, which models look for."""
    config = model.config
    settings = config.to_dict() | config.get_text_config().to_dict()
    special = [value for name, value in settings.items() if "token" in name or name.endswith(("_id", "_index"))]
    taken = {i for value in special for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    return next(i for i in range(len(taken) + 1) if i not in taken)


def numbering(model: nn.Module) -> nn.Module | None:
    """The part of the model that numbers its tokens in a way of its own, when it is given no positions."""
    ways = ("create_position_ids_from_inputs_embeds", "get_rope_index")
    return next((m for m in model.modules() if any(hasattr(m, way) for way in ways)), None)


def longest(model: nn.Module) -> int | None:
    """How many tokens the model has positions for, if it says."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    own = numbering(model)
    if limit is None or limit < 0:  # XLNet says −1 for as many as there are
        return None
    return limit - own.padding_idx - 1 if hasattr(own, "position_embeddings") else limit
