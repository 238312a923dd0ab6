"""What the two files of an adapter hold, per method: one `Layout` for each, in the words of Hugging Face PEFT.

A method gets a file format in two steps. Its layer says `stored()`: {end of the key: numbers}. A subclass of `Layout`
says which `peft_type` that is, what `adapter_config.json` must hold, and which methods rebuild the layers from it; the
decorator `@register` makes it known. `minipeft.serve.checkpoint` checks, writes and reads for all of them.
"""

from __future__ import annotations

import dataclasses
import re

import torch
from torch import nn

from minipeft.layer import Layer, Method, WeightLayer
from minipeft.targets import exact, flipped, is_convolution, is_matrix, module_at

PREFIX, OURS = "base_model.model.", "MINIPEFT_"
NUMBER, WORDS, MAPPING = (int, float), (list, type(None)), (dict, type(None))
Tensors = dict[str, torch.Tensor]


class Layout:
    """One kind of adapter file.

    `peft_type`: PEFT's name, or one of ours that begins with MINIPEFT_ where PEFT has no such method.
    `layer`: the class of layers that it writes, `others` those that the method has where no linear layer is.
    `flag`: options that tell it from others with its `peft_type`.
    `kinds`: {option: the types that it may have}. `foreign`: options that change what the numbers mean, in ways that
    are not done here; `fixed`: {option: the values under which they mean what they mean here}.
    `head`: what stands before the names of trained parameters of the base, such as the head's.
    """

    peft_type: str
    layer: type[Layer]
    others: tuple[type[Layer], ...] = ()
    flag: dict[str, object] = {}
    kinds: dict[str, tuple[type, ...]] = {}
    foreign: tuple[str, ...] = ()
    fixed: dict[str, tuple] = {}
    head = PREFIX

    def config(self, base: nn.Module, layers: list[Layer]) -> dict:
        """The options that rebuild these layers; a `peft_type` among them replaces the layout's own."""
        raise NotImplementedError(f"{type(self).__name__} does not define config")

    def methods(self, base: nn.Module, config: dict, tensors: Tensors) -> list[Method]:
        """The methods that build layers for what the file holds; ValueError when it cannot fit `base`.

        It runs before anything is allocated, so sizes in `config` must be held against the shapes in `tensors` here.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define methods")

    def owns(self, key: str) -> bool:
        """Whether a key of the file is the method's own, and not a parameter of the base that was trained as well."""
        raise NotImplementedError(f"{type(self).__name__} does not define owns")

    def place(self, layer: Layer) -> str:
        """What stands before the names that `layer.stored()` gives."""
        return f"{PREFIX}{layer.key}."

    def tensors(self, layers: list[Layer], config: dict) -> Tensors:
        """{key: numbers}: what is written, and what a file must hold."""
        return {self.place(layer) + key: value for layer in layers for key, value in layer.stored().items()}

    def written(self, base: nn.Module, config: dict, tensors: Tensors) -> Tensors:
        """`tensors` as they stand in the file, where PEFT has other names for them."""
        return tensors

    def restore(self, layers: list[Layer], config: dict, tensors: Tensors) -> None:
        """Puts numbers that passed every check into built layers."""
        for layer in layers:
            layer.restore({key: tensors[self.place(layer) + key] for key in layer.stored()})


LAYOUTS: list[Layout] = []


def register(cls: type[Layout]) -> type[Layout]:
    LAYOUTS.append(cls())
    return cls


def layout_of(layer: Layer) -> Layout:
    """The layout that writes this layer."""
    found = next((layout for layout in LAYOUTS if type(layer) in (layout.layer, *layout.others)), None)
    if found is None:
        raise ValueError(f"A {type(layer).__name__} has no file format, so it cannot be saved.")
    return found


def layout_for(config: dict) -> Layout:
    """The layout that reads a file with this configuration."""
    kind = config.get("peft_type")
    known = dict.fromkeys(layout.peft_type for layout in LAYOUTS)
    found = [
        layout
        for layout in LAYOUTS
        if kind in (layout.peft_type, OURS + layout.peft_type)
        and all(config.get(option) == value for option, value in layout.flag.items())
    ]
    if not found:
        raise ValueError(f"it holds peft_type {kind!r}; {', '.join(known)} and {OURS}SELECT can be loaded.")
    return max(found, key=lambda layout: len(layout.flag))


# ---------------------------------------------------------------------------------------------------------------------
# Methods that sit on weight matrices
# ---------------------------------------------------------------------------------------------------------------------
class WeightLayout(Layout):
    """Keys base_model.model.<path of the module>.<one of `ends`>; the layers are those that the keys name, not what
    `target_modules` matches (PEFT writes short suffixes there), but a layer that it does match must not be missing."""

    ends: str  # a regular expression for what stands behind the path
    needs: str  # the numbers that every target must have, for a message
    conv1d = True  # whether PEFT has the method for GPT-2's Conv1D

    def config(self, base: nn.Module, layers: list[WeightLayer]) -> dict:
        if not all(layer.path for layer in layers):
            raise ValueError(
                "The model is itself the adapted layer, so the layer has no name to save; wrap it in nn.Sequential."
            )
        turned = any(flipped(module_at(base, layer.path)) for layer in layers)
        ours = any(any(layer.padding) for layer in layers) or (turned and not self.conv1d)  # PEFT has no slices either
        ours |= self.peft_type == "LORA" and peft_moves(base, layers)
        ours |= bool(called_otherwise(base, [layer.path for layer in layers]))
        ours |= not all(peft_convolves(module_at(base, layer.path), self.peft_type) for layer in layers)
        ours |= any(layer.reader is not None for layer in layers) and not self.peft_reads(layers)
        return {
            "peft_type": OURS + self.peft_type if ours else self.peft_type,
            "target_modules": target_modules(base, sorted({layer.path for layer in layers})),
            **self.flag,
        }

    def peft_reads(self, layers: list[WeightLayer]) -> bool:
        """Whether PEFT has the method for these layers on what a module reads for itself."""
        return False

    def owns(self, key: str) -> bool:
        return self.split(key) is not None

    def split(self, key: str) -> re.Match | None:
        return re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(?:{self.ends})", key)

    def methods(self, base: nn.Module, config: dict, tensors: Tensors) -> list[Method]:
        places = list(dict.fromkeys(match[1] for key in tensors if (match := self.split(key))))
        if config["peft_type"] == self.peft_type:
            check_complete(base, config, {*places, *(p.removesuffix(".in_proj_weight") for p in places)}, self.needs)
            if twice := called_otherwise(base, [exact(place)[0] for place in places]):
                raise ValueError(
                    f"it adapts {twice[0]!r}, which this model also calls {twice[1]!r}; PEFT adapts the one and leaves "
                    "the other alone, and here both are one layer."
                )
        return self.build(config, places, tensors)

    def build(self, config: dict, places: list[str], tensors: Tensors) -> list[Method]:
        """The methods for these places, each a path or "path[start:stop]"; see `minipeft.targets.exact`."""
        raise NotImplementedError(f"{type(self).__name__} does not define build")


def target_modules(base: nn.Module, paths: list[str]) -> list[str] | str:
    """The paths, or one expression where PEFT, which matches list entries as suffixes, would find further modules."""
    suffixes = tuple(f".{path}" for path in paths)
    found = [path for path, _ in base.named_modules() if f".{path}".endswith(suffixes)]
    return paths if len(found) == len(paths) else "|".join(map(re.escape, paths))


def adaptable(module: nn.Module) -> bool:
    return is_matrix(module) or is_convolution(module) or isinstance(module, nn.MultiheadAttention)


def peft_moves(base: nn.Module, layers: list[Layer]) -> bool:
    """Whether PEFT takes the layers for those of experts that transformers has fused since, and puts them there: what
    has an expert's name in a model of which PEFT knows the older form."""
    from transformers import conversion_mapping

    older = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    kind = older.get(getattr(getattr(base, "config", None), "model_type", None))
    names = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}
    return any(layer.path.rpartition(".")[2] in names.get(kind, ()) for layer in layers)


def called_otherwise(base: nn.Module, paths: list[str]) -> tuple[str, str] | None:
    """One of the modules at `paths` that stands in the model under a second name, and that name."""
    every = list(base.named_modules(remove_duplicate=False))
    if len(every) == sum(1 for _ in base.modules()):
        return None
    found = {path: module_at(base, path) for path in paths if path in dict(every)}
    pairs = ((path, other) for path, mine in found.items() for other, module in every if module is mine)
    return next(((path, other) for path, other in pairs if path != other), None)


def peft_convolves(module: nn.Module, peft_type: str) -> bool:
    """Whether PEFT changes the weight of this module, if it is a convolution, as is done here. In LoRA its A has no
    groups and no dilation, and pads with zeros; its IA3 knows no Conv1d."""
    if not is_convolution(module):
        return True
    if peft_type == "IA3":
        return not isinstance(module, nn.Conv1d)
    return module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"


def check_complete(base: nn.Module, config: dict, present: set[str], needs: str) -> None:
    targets = config.get("target_modules")
    partial = any(config.get(o) is not None for o in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    if partial or not targets or targets == "all-linear":
        return
    if isinstance(targets, str):
        matches = compiled(targets, "target_modules").fullmatch
    else:
        suffixes = tuple(f".{target}" for target in targets)
        matches = lambda p: f".{p}".endswith(suffixes)  # noqa: E731
    saved = [f".{module}." for module in config.get("modules_to_save") or ()]  # whole, with all that is inside
    matrices = [p for p, m in base.named_modules() if adaptable(m) and not any(s in f".{p}." for s in saved)]
    if missing := [p for p in matrices if matches(p) and p not in present]:
        raise ValueError(
            f"it has no {needs} for {len(missing)} of its targets, such as {missing[0]!r}; "
            "it was saved incompletely, or from another model."
        )


def compiled(pattern: str, option: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"adapter_config.json has {pattern!r} in {option}, no regular expression ({error})."
        ) from error


def exactly(path: str) -> str:
    """A pattern for rank_pattern and alpha_pattern that fits this path and no longer one that ends alike."""
    return f"^{re.escape(path)}"


def by_pattern(patterns: dict | None, key: str, default, option: str):
    """PEFT's rule: the first pattern that matches the end of the path, at a dot."""
    fits = (v for pattern, v in (patterns or {}).items() if compiled(rf"(.*\.)?({pattern})$", option).match(key))
    return next(fits, default)


class OneMethodLayout(WeightLayout):
    """A file that one method, with one set of settings, built. `options`: {option in the file: the setting it is}."""

    method: type[Method]
    options: dict[str, str] = {}

    def config(self, base: nn.Module, layers: list[WeightLayer]) -> dict:
        settings = {name: getattr(layers[0].method, name) for name in self.options.values()}
        if any(getattr(layer.method, name) != value for layer in layers for name, value in settings.items()):
            raise ValueError(
                f"These layers come from {self.method.__name__} with several settings, and a file has one; put each "
                "under its own name."
            )
        return super().config(base, layers) | {
            **{option: settings[name] for option, name in self.options.items()},
            "fan_in_fan_out": any(flipped(module_at(base, layer.path)) for layer in layers),
        }

    def given(self, config: dict) -> dict:
        """The settings that the file asks for."""
        return {name: config[option] for option, name in self.options.items() if config.get(option) is not None}

    def build(self, config: dict, places: list[str], tensors: Tensors) -> list[Method]:
        return [self.method(**self.given(config), targets=[exact(place) for place in places])] if places else []


# ---------------------------------------------------------------------------------------------------------------------
# Methods of our own that sit elsewhere
# ---------------------------------------------------------------------------------------------------------------------
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
