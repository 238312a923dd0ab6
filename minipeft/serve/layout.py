"""What the two files of an adapter hold, per method: one `Layout` for each, in the words of Hugging Face PEFT.

A method gets a file format in two steps. Its layer says `stored()`: {end of the key: numbers}. A subclass of `Layout`
says which `peft_type` that is, what `adapter_config.json` must hold, and which methods rebuild the layers from it; the
decorator `@register` makes it known. `minipeft.serve.checkpoint` checks, writes and reads for all of them.
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from minipeft.attach import Layer, Method, WeightLayer
from minipeft.methods.adalora import AdaLoRA, AdaLoRALayer
from minipeft.methods.dora import DoRA, DoRALayer
from minipeft.methods.ia3 import IA3, IA3Layer
from minipeft.methods.lora import LoRA, LoRALayer, PiSSALayer
from minipeft.methods.projected import ProjectedLayer, ProjectedLoRA
from minipeft.methods.vera import VeRA, VeRALayer
from minipeft.targets import flipped, is_matrix

PREFIX, OURS = "base_model.model.", "MINIPEFT_"
NUMBER, WORDS, MAPPING = (int, float), (list, type(None)), (dict, type(None))
Tensors = dict[str, torch.Tensor]


class Layout:
    """One kind of adapter file.

    `peft_type`: PEFT's name, or one of ours that begins with MINIPEFT_ where PEFT has no such method.
    `layer`: the class of layers that it writes. `flag`: options that tell it from others with its `peft_type`.
    `kinds`: {option: the types that it may have}. `foreign`: options that change what the numbers mean, in ways that
    are not done here. `head`: what stands before the names of trained parameters of the base, such as the head's.
    """

    peft_type: str
    layer: type[Layer]
    flag: dict[str, object] = {}
    kinds: dict[str, tuple[type, ...]] = {}
    foreign: tuple[str, ...] = ()
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
    found = next((layout for layout in LAYOUTS if layout.layer is type(layer)), None)
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

    def config(self, base: nn.Module, layers: list[WeightLayer]) -> dict:
        if not all(layer.path for layer in layers):
            raise ValueError(
                "The model is itself the adapted layer, so the layer has no name to save; wrap it in nn.Sequential."
            )
        fused = any(any(layer.padding) for layer in layers)  # PEFT has no slices of fused projections
        return {
            "peft_type": OURS + self.peft_type if fused else self.peft_type,
            "target_modules": target_modules(base, sorted({layer.path for layer in layers})),
            **self.flag,
        }

    def owns(self, key: str) -> bool:
        return self.split(key) is not None

    def split(self, key: str) -> re.Match | None:
        return re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(?:{self.ends})", key)

    def methods(self, base: nn.Module, config: dict, tensors: Tensors) -> list[Method]:
        places = list(dict.fromkeys(match[1] for key in tensors if (match := self.split(key))))
        if config["peft_type"] == self.peft_type:
            check_complete(base, config, set(places), self.needs)
        return self.build(config, places, tensors)

    def build(self, config: dict, places: list[str], tensors: Tensors) -> list[Method]:
        """The methods for these places, each a path, or "path[start:stop]" for a slice; see `exact`."""
        raise NotImplementedError(f"{type(self).__name__} does not define build")


def exact(place: str) -> tuple[str, int, int]:
    """(path, start, stop), a target that names one place and no other that ends alike; a stop of 0 is the end."""
    match = re.fullmatch(r"(.+?)(?:\[(\d{1,9}):(\d{1,9})\])?", place)
    return match[1], int(match[2] or 0), int(match[3] or 0)


def target_modules(base: nn.Module, paths: list[str]) -> list[str] | str:
    """The paths, or one expression where PEFT, which matches list entries as suffixes, would find further layers."""
    suffixes = tuple(f".{path}" for path in paths)
    found = [path for path, module in base.named_modules() if is_matrix(module) and f".{path}".endswith(suffixes)]
    return paths if len(found) == len(paths) else "|".join(map(re.escape, paths))


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
    saved = tuple(f".{module}" for module in config.get("modules_to_save") or ())
    matrices = [p for p, m in base.named_modules() if is_matrix(m) and not (saved and f".{p}".endswith(saved))]
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


@register
class LoRALayout(WeightLayout):
    """lora_A.weight (r, d_in), lora_B.weight (d_out, r); on an embedding lora_embedding_A (r, V) and _B (d, r).

    lora_alpha = γ·r, or γ·√r with use_rslora.
    """

    peft_type, layer, method = "LORA", LoRALayer, LoRA
    ends, needs = r"lora_(?:embedding_[AB]|[AB]\.weight)", "lora_A and lora_B"
    kinds = {
        "lora_alpha": NUMBER, "lora_dropout": (*NUMBER, type(None)), "use_rslora": (bool, type(None)),
        "rank_pattern": MAPPING, "alpha_pattern": MAPPING,
    }  # fmt: skip
    foreign = (
        *("use_dora", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication", "use_qalora"),
        *("use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
    )

    def config(self, base: nn.Module, layers: list[LoRALayer]) -> dict:
        first = layers[0]
        scale = math.sqrt if first.rank_stabilized else float
        return super().config(base, layers) | {
            "r": first.rank,
            "lora_alpha": first.gamma * scale(first.rank),
            "use_rslora": first.rank_stabilized,
            "lora_dropout": first.dropout,
            "bias": "none",
            "fan_in_fan_out": any(flipped(base.get_submodule(x.path)) and not x.embedding for x in layers),
            "rank_pattern": {exactly(x.key): x.rank for x in layers if x.rank != first.rank},
            "alpha_pattern": {
                exactly(x.key): x.gamma * scale(x.rank)
                for x in layers
                if (x.rank, x.gamma) != (first.rank, first.gamma)
            },
        }

    def build(self, config: dict, places: list[str], tensors: Tensors) -> list[LoRA]:
        """One method for each combination of rank and γ."""
        if config.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal", "eva"):
            init = config["init_lora_weights"]  # PiSSA, OLoRA and others change the base as well
            raise ValueError(f"it was initialised by {init!r}, which changes the base; only plain LoRA loads.")
        groups: dict[tuple, list[tuple[str, int, int]]] = {}
        for place in places:
            rank = by_pattern(config.get("rank_pattern"), place, config.get("r"), "rank_pattern")
            alpha = by_pattern(config.get("alpha_pattern"), place, config.get("lora_alpha"), "alpha_pattern")
            if isinstance(rank, bool) or not isinstance(rank, int):
                raise ValueError(f"rank={rank!r} is not a whole number.")
            if isinstance(alpha, bool) or not isinstance(alpha, int | float):
                raise ValueError(f"lora_alpha = {alpha!r} is not a number.")
            groups.setdefault((rank, alpha), []).append(exact(place))
        return [self.make(config, rank, alpha, targets) for (rank, alpha), targets in groups.items()]

    def make(self, config: dict, rank: int, alpha: float, targets: list[tuple[str, int, int]]) -> LoRA:
        stable, dropout = bool(config.get("use_rslora")), config.get("lora_dropout") or 0.0
        return self.method(rank=rank, alpha=alpha, rank_stabilized=stable, dropout=dropout, targets=targets)


@register
class PiSSALayout(LoRALayout):
    """A LoRA of rank 2r: lora_A.weight (A; A₀), lora_B.weight (B, −B₀). PEFT loads it as one, here it stays PiSSA."""

    layer, flag = PiSSALayer, {"minipeft": "PiSSA"}

    def config(self, base: nn.Module, layers: list[PiSSALayer]) -> dict:
        config = super().config(base, layers)
        alphas = {exactly(x.key): x.gamma * 2 * x.rank for x in layers}  # γ = α/√r would change with the rank
        return config | {
            "r": 2 * config["r"],
            "use_rslora": False,
            "lora_alpha": alphas[exactly(layers[0].key)],
            "rank_pattern": {key: 2 * rank for key, rank in config["rank_pattern"].items()},
            "alpha_pattern": {key: alphas[key] for key in config["alpha_pattern"]},
        }

    def make(self, config: dict, rank: int, alpha: float, targets: list[tuple[str, int, int]]) -> LoRA:
        if rank % 2 or rank < 2:
            raise ValueError(f"rank={rank} is not twice the rank of a PiSSA.")
        dropout = config.get("lora_dropout") or 0.0
        return LoRA(rank=rank // 2, gamma=alpha / rank, dropout=dropout, targets=targets, init="pissa")


@register
class ProjectedLayout(LoRALayout):
    """A LoRA with lora_A.weight Uᵀ and lora_B.weight L. PEFT loads it as one, here U stays frozen."""

    layer, flag = ProjectedLayer, {"minipeft": "ProjectedLoRA"}

    def make(self, config: dict, rank: int, alpha: float, targets: list[tuple[str, int, int]]) -> ProjectedLoRA:
        return ProjectedLoRA(rank=rank, gamma=alpha / rank, targets=targets)


@register
class DoRALayout(LoRALayout):
    """LoRA's two, and lora_magnitude_vector (d_out,)."""

    layer, method, flag = DoRALayer, DoRA, {"use_dora": True}
    ends, needs = r"lora_(?:[AB]\.weight|magnitude_vector)", "lora_A, lora_B and lora_magnitude_vector"


@register
class VeRALayout(WeightLayout):
    """vera_lambda_b (d_out,), vera_lambda_d (r,), and once base_model.vera_A (r, largest d_in) and vera_B."""

    peft_type, layer = "VERA", VeRALayer
    ends, needs = r"vera_lambda_[bd]", "vera_lambda_b and vera_lambda_d"
    kinds = {
        "r": (int,), "projection_prng_key": (int, type(None)), "d_initial": (*NUMBER, type(None)),
        "vera_dropout": (*NUMBER, type(None)), "save_projection": (bool, type(None)),
    }  # fmt: skip
    pair = {"base_model.vera_A": "A", "base_model.vera_B": "B"}

    def config(self, base: nn.Module, layers: list[VeRALayer]) -> dict:
        first = layers[0]
        if any(layer.pair is not first.pair for layer in layers):
            raise ValueError("These VeRA layers have several pairs A, B, and a file has one; use one VeRA(…) for all.")
        return super().config(base, layers) | {
            "r": first.method.rank,
            "projection_prng_key": first.method.projection_seed,
            "save_projection": True,
            "vera_dropout": first.method.dropout,
            "d_initial": first.method.d_initial,
            "fan_in_fan_out": any(flipped(base.get_submodule(layer.path)) for layer in layers),
            "bias": "none",
        }

    def owns(self, key: str) -> bool:
        return key in self.pair or super().owns(key)

    def build(self, config: dict, places: list[str], tensors: Tensors) -> list[VeRA]:
        held = {tuple(value.shape) for key, value in tensors.items() if key.endswith(".vera_lambda_d")}
        if held != {(config["r"],)} and places:
            raise ValueError(f"r = {config['r']}, but its vera_lambda_d have the shapes {sorted(held)}.")
        values = {"d_initial": "d_initial", "vera_dropout": "dropout", "projection_prng_key": "projection_seed"}
        given = {ours: config[name] for name, ours in values.items() if config.get(name) is not None}
        return [VeRA(rank=config["r"], targets=[exact(place) for place in places], **given)] if places else []

    def tensors(self, layers: list[VeRALayer], config: dict) -> Tensors:
        shared = {key: getattr(layers[0].pair, name) for key, name in self.pair.items()}
        return super().tensors(layers, config) | (shared if config.get("save_projection", True) else {})

    def restore(self, layers: list[VeRALayer], config: dict, tensors: Tensors) -> None:
        super().restore(layers, config, tensors)
        for key, name in self.pair.items():
            if key in tensors:
                getattr(layers[0].pair, name).copy_(tensors[key])


@register
class AdaLoRALayout(WeightLayout):
    """lora_A Q (rank, d_in), lora_B P (d_out, rank), lora_E Λ (rank, 1), without the pruned triplets.

    lora_alpha = γ·(init_r + 10⁻⁵): PEFT divides by that sum. rank_pattern: for each lora_E which of init_r are left.
    """

    peft_type, layer = "ADALORA", AdaLoRALayer
    ends, needs = r"lora_[ABE]", "lora_A, lora_B and lora_E"
    numbers = {
        "target_r": "rank", "total_step": "steps", "tinit": "warmup", "tfinal": "final", "deltaT": "interval",
        "beta1": "beta1", "beta2": "beta2", "orth_reg_weight": "orthogonality", "lora_dropout": "dropout",
    }  # fmt: skip
    kinds = {
        "init_r": (int,), "lora_alpha": NUMBER, "rank_pattern": MAPPING,
        **{name: (*NUMBER, type(None)) for name in numbers},
    }  # fmt: skip
    foreign = LoRALayout.foreign

    def config(self, base: nn.Module, layers: list[AdaLoRALayer]) -> dict:
        first, width = layers[0], max(len(layer.kept) for layer in layers)
        if any(layer.gamma != first.gamma for layer in layers):
            raise ValueError("These AdaLoRA layers differ in γ, and a file has one; save them under separate names.")
        alive = {f"{x.key}.lora_E": x.alive().tolist() + [False] * (width - len(x.kept)) for x in layers}
        return super().config(base, layers) | {
            "init_r": width,
            "lora_alpha": first.gamma * (width + 1e-5),
            **{name: getattr(first.method, ours) for name, ours in self.numbers.items()},
            "fan_in_fan_out": any(flipped(base.get_submodule(layer.path)) for layer in layers),
            "bias": "none",
            "rank_pattern": None if all(map(all, alive.values())) else alive,
        }

    def build(self, config: dict, places: list[str], tensors: Tensors) -> list[AdaLoRA]:
        """One method for each rank that is left. What was pruned stays pruned, and nothing more will be."""
        pattern, width = config.get("rank_pattern") or {}, config["init_r"]
        groups: dict[int, list[tuple[str, int, int]]] = {}
        for place in places:
            left = pattern.get(f"{place}.lora_E", [True] * min(width, 10**6))
            if not isinstance(left, list) or len(left) != width or not all(isinstance(each, bool) for each in left):
                raise ValueError(f"rank_pattern must hold {width} times true or false for {place!r}.")
            groups.setdefault(sum(left), []).append(exact(place))
        given = {ours: config[name] for name, ours in self.numbers.items() if config.get(name) is not None}
        gamma = config["lora_alpha"] / (width + 1e-5)
        return [
            AdaLoRA(gamma=gamma, initial_rank=rank, targets=targets, **(given | {"rank": rank}))
            for rank, targets in groups.items()
        ]


@register
class IA3Layout(WeightLayout):
    """ia3_l: (d_out, 1), or (1, d_in) for a layer in feedforward_modules."""

    peft_type, layer = "IA3", IA3Layer
    ends, needs = "ia3_l", "ia3_l"
    kinds = {"feedforward_modules": (str, *WORDS)}

    def config(self, base: nn.Module, layers: list[IA3Layer]) -> dict:
        inputs = sorted({layer.path for layer in layers if layer.feedforward})
        mistaken = any(layer.path.endswith(tuple(inputs)) for layer in layers if not layer.feedforward)
        return super().config(base, layers) | {
            "feedforward_modules": "|".join(map(re.escape, inputs)) if mistaken else inputs,
            "fan_in_fan_out": any(flipped(base.get_submodule(layer.path)) for layer in layers),
        }

    def build(self, config: dict, places: list[str], tensors: Tensors) -> list[IA3]:
        inputs = config.get("feedforward_modules") or []
        if isinstance(inputs, str):
            scaled = compiled(inputs, "feedforward_modules").fullmatch
        else:
            scaled = lambda path: path.endswith(tuple(inputs))  # noqa: E731
        groups: dict[bool, list[tuple[str, int, int]]] = {False: [], True: []}
        for place in map(exact, places):
            groups[bool(scaled(place[0]))].append(place)
        return [IA3(targets=groups[False], feedforward=groups[True])] if places else []
