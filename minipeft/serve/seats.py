"""What an adapter file holds for the methods that train no low-rank change of a weight.

Prompts and prefixes are written as Hugging Face PEFT writes them: one tensor, without the network that generated it.
PEFT has no bottleneck adapters, experts or masks, so those have a `peft_type` of our own. A P-tuning or reparametrised
prefix loads as what it wrote: a plain prompt or prefix, which can be trained on.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from minipeft.attach import Layer, Method
from minipeft.methods.adapter import Adapter, AdapterLayer
from minipeft.methods.experts import Experts, ExpertsLayer
from minipeft.methods.masked import Entries, MaskedLayer
from minipeft.methods.prefix import Prefix, PrefixTuning, prefix_shape
from minipeft.methods.prompt import GeneratedPrompt, PromptTuning, PTuning, SoftPrompt, embedding
from minipeft.serve.layout import OURS, PREFIX, Layout, Tensors, WeightLayout, register


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
        return PromptTuning(length, init="random")


@register
class PromptLayout(FrontLayout):
    """prompt_embeddings (n, d)"""

    peft_type, layer = "PROMPT_TUNING", SoftPrompt


@register
class PTuningLayout(FrontLayout):
    """prompt_embeddings (n, d): what the generator wrote"""

    peft_type, layer = "P_TUNING", GeneratedPrompt

    def config(self, base: nn.Module, layers: list[Layer]) -> dict:
        return super().config(base, layers) | {"encoder_hidden_size": PTuning.hidden}


@register
class PrefixLayout(FrontLayout):
    """prompt_embeddings (n, layers·2·kv heads·head width): K and V of layer 0, of layer 1, …"""

    peft_type, layer = "PREFIX_TUNING", Prefix

    def config(self, base: nn.Module, layers: list[Layer]) -> dict:
        _, heads, width = prefix_shape(base)
        return super().config(base, layers) | {"token_dim": heads * width, "prefix_projection": False}

    def width(self, base: nn.Module) -> int:
        layers, heads, width = prefix_shape(base)
        return layers * 2 * heads * width

    def plain(self, length: int) -> Method:
        return PrefixTuning(length)


class SettingsLayout(Layout):
    """Keys base_model.model.<path of the first module>.<`word`>.<name>; `methods` in the configuration holds the
    settings of each method that the layers came from."""

    method: type[Method]
    word: str
    kinds = {"methods": (list,)}

    def config(self, base: nn.Module, layers: list[Layer]) -> dict:
        methods = list(dict.fromkeys(layer.method for layer in layers))
        return {"methods": [dataclasses.asdict(method) for method in methods]}

    def owns(self, key: str) -> bool:
        return key.startswith(PREFIX) and f".{self.word}." in key

    def place(self, layer: Layer) -> str:
        return f"{PREFIX}{layer.path}."

    def methods(self, base: nn.Module, config: dict, tensors: Tensors) -> list[Method]:
        known = {field.name for field in dataclasses.fields(self.method)}
        for settings in config["methods"]:
            if not isinstance(settings, dict) or not settings.keys() <= known:
                raise ValueError(f"methods must hold settings of {self.method.__name__}, and it has {settings!r}.")
        try:
            found = [self.method(**settings) for settings in config["methods"]]
        except TypeError as error:
            raise ValueError(f"methods holds a setting of a wrong type ({error}).") from error
        for method in found:
            if not any(self.fits(method, key, value) for key, value in tensors.items()):
                raise ValueError(f"it has no numbers of the size that {method} says.")
        return found

    def fits(self, method: Method, key: str, value: torch.Tensor) -> bool:
        """Whether a tensor of the file has the size that the settings ask for."""
        raise NotImplementedError(f"{type(self).__name__} does not define fits")


@register
class AdapterLayout(SettingsLayout):
    """adapter.down.weight (m, d), adapter.up.weight (d, m), and their biases"""

    peft_type, layer, method, word = OURS + "ADAPTER", AdapterLayer, Adapter, "adapter"

    def fits(self, method: Adapter, key: str, value: torch.Tensor) -> bool:
        return key.endswith("adapter.down.bias") and value.shape == (method.bottleneck,)


@register
class ExpertsLayout(SettingsLayout):
    """experts.router (E, d), experts.down (E, m, d), experts.up (E, d, m), and biases"""

    peft_type, layer, method, word = OURS + "EXPERTS", ExpertsLayer, Experts, "experts"

    def fits(self, method: Experts, key: str, value: torch.Tensor) -> bool:
        return key.endswith("experts.down_bias") and value.shape == (method.experts, method.bottleneck)


@register
class MaskedLayout(WeightLayout):
    """mask_index (k,), places in the flattened (d_out, d_in), and mask_value (k,), the changes there"""

    peft_type, layer = OURS + "MASK", MaskedLayer
    ends, needs = "mask_(?:index|value)", "mask_index and mask_value"

    def build(self, config: dict, places: list[str], tensors: Tensors) -> list[Method]:
        keys = {place: f"{PREFIX}{place}.mask_index" for place in places}
        if lost := [place for place, key in keys.items() if key not in tensors]:
            raise ValueError(f"it lacks the mask_index of {lost[0]!r}; it was saved incompletely.")
        return [Entries({place: tensors[key] for place, key in keys.items()})] if places else []
