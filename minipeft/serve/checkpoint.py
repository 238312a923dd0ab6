"""Adapters on disk: a directory with `adapter_config.json` and `adapter_model.safetensors`.

LoRA, with or without a trained output layer, is written as Hugging Face PEFT writes it, and read from PEFT's files:

    base_model.model.<path>.lora_A.weight       (r, d_in)       lora_alpha = γ·r, or γ·√r with use_rslora
    base_model.model.<path>.lora_B.weight       (d_out, r)
    base_model.model.<path>.lora_embedding_A    (r, V)          on an embedding; lora_embedding_B is (d, r)
    base_model.model.<module>.<parameter>                       of a module in modules_to_save: the output layer

PEFT has no slices of fused projections, no BitFit and no selective training. Those use the same two files with a
`peft_type` of our own, MINIPEFT_LORA or MINIPEFT_SELECT, where `entries` names the base's parameters that were trained.

Only JSON and safetensors are ever read: loading an adapter runs no code from it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn

from minipeft.attach import (
    Layer,
    Method,
    Tuned,
    build,
    carries_adapters,
    check_name,
    wrap,
)
from minipeft.methods.lora import LoRA, LoRALayer
from minipeft.methods.select import Full, Selected, parameter_name
from minipeft.targets import flipped, is_matrix, slots

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
LORA_KEY = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(?:embedding_[AB]|[AB]\.weight)")
# Options of PEFT's LoraConfig that change what the numbers mean.
FOREIGN = (
    *("use_dora", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication", "use_qalora"),
    *("use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
)
PLAIN_INITS = (
    None,
    True,
    False,
    "gaussian",
    "orthogonal",
    "eva",
)  # the others (PiSSA, OLoRA, …) change the base as well


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------
def save_adapter(tuned: Tuned, path: str | os.PathLike, name: str | None = None) -> None:
    """Writes adapter `name`, or the active one, to the directory `path`: both files, or nothing.

    Raises ValueError when no name is given and not exactly one adapter is active, and for a layer that it cannot write.
    """
    if name is None and len(tuned.active) != 1:
        raise ValueError(f"{len(tuned.active)} adapters are active; say which to save, one of {list(tuned.adapters)}.")
    name = tuned.active[0] if name is None else name
    if name not in tuned.adapters:
        raise ValueError(f"There is no adapter {name!r}; this model carries {list(tuned.adapters)}.")
    layers = list(tuned.adapters[name].values())
    with tuned.disabled():
        config = describe(tuned.base, layers)
    config["base_model_name_or_path"] = getattr(getattr(tuned.base, "config", None), "name_or_path", "") or None
    parameters = file_keys(layers, config)
    if any(parameter.is_meta for parameter in parameters.values()):
        raise ValueError(f"Adapter {name!r} is on the meta device, so it has no numbers to save; use tuned.to_empty().")
    tensors = {key: parameter.detach().cpu().contiguous() for key, parameter in parameters.items()}
    write(Path(path), config, tensors)


def describe(base: nn.Module, layers: list[Layer]) -> dict:
    """The configuration of an adapter: PEFT's if PEFT can hold it, else one of our own."""
    loras = [layer for layer in layers if type(layer) is LoRALayer]
    selected = [layer for layer in layers if type(layer) is Selected]
    other = next((layer for layer in layers if layer not in loras and layer not in selected), None)
    if other is not None:
        raise ValueError(
            f"A {type(other).__name__} has no file format here; LoRA, Full, BitFit and Softmax can be saved."
        )
    whole = whole_modules(base, selected)
    entries = [parameter_name(slot) for layer in selected for slot in layer.slots]
    if not loras:
        return {"peft_type": "MINIPEFT_SELECT", "entries": entries}
    first = loras[0]
    if not all(layer.path for layer in loras):
        raise ValueError(
            "The model is itself the adapted layer, so the layer has no name to save; wrap it in nn.Sequential."
        )
    by_peft = whole is not None and not any(any(layer.padding) for layer in loras)
    scale = math.sqrt if first.rank_stabilized else float
    config = {
        "peft_type": "LORA" if by_peft else "MINIPEFT_LORA",
        "task_type": None,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.gamma * scale(first.rank),
        "use_rslora": first.rank_stabilized,
        "lora_dropout": first.dropout,
        "bias": "none",
        "fan_in_fan_out": any(flipped(base.get_submodule(x.path)) and not x.embedding for x in loras),
        "target_modules": target_modules(base, sorted({layer.path for layer in loras})),
        "rank_pattern": {exactly(x.key): x.rank for x in loras if x.rank != first.rank},
        "alpha_pattern": {
            exactly(x.key): x.gamma * scale(x.rank) for x in loras if (x.rank, x.gamma) != (first.rank, first.gamma)
        },
        "modules_to_save": whole or None,
    }
    return config if by_peft else config | {"entries": entries}


def exactly(path: str) -> str:
    """A pattern for rank_pattern and alpha_pattern that fits this path and no longer one that ends alike."""
    return f"^{re.escape(path)}"


def target_modules(base: nn.Module, paths: list[str]) -> list[str] | str:
    """The paths, or one expression where PEFT, which matches list entries as suffixes, would find further layers."""
    suffixes = tuple(f".{path}" for path in paths)
    found = [path for path, module in base.named_modules() if is_matrix(module) and f".{path}".endswith(suffixes)]
    return paths if len(found) == len(paths) else "|".join(map(re.escape, paths))


def whole_modules(base: nn.Module, selected: list[Selected]) -> list[str] | None:
    """The modules whose parameters are exactly what was trained, as PEFT's `modules_to_save` wants; else None."""
    trained = {slot for layer in selected for slot in layer.slots}
    owners = [path for path in dict.fromkeys(slot[0] for slot in trained) if not isinstance_embedding(base, path)]
    own = {
        path: {(path, n) for n, p in base.get_submodule(path)._parameters.items() if p is not None} for path in owners
    }
    whole = sorted(path for path in owners if path and own[path] <= trained and is_matrix(base.get_submodule(path)))
    embedded = any(isinstance_embedding(base, path) for path, _ in trained)
    covered = all(any(path in whole for path, _ in layer.slots) for layer in selected)
    return whole if covered and not embedded else None


def isinstance_embedding(base: nn.Module, path: str) -> bool:
    return isinstance(base.get_submodule(path), nn.Embedding)


def file_keys(layers: list[Layer], config: dict) -> dict[str, nn.Parameter]:
    """{key in the file: parameter} for built layers."""
    keys = {}
    whole = set(config.get("modules_to_save") or ()) if config["peft_type"] == "LORA" else set()
    for layer in layers:
        if isinstance(layer, Selected):
            inside = [s for s in layer.slots if any(s[0] == m or s[0].endswith(f".{m}") for m in whole)]
            keys[PREFIX + parameter_name((inside or layer.slots)[0])] = layer.value
        elif layer.embedding:
            keys |= {f"{PREFIX}{layer.key}.lora_embedding_{n}": getattr(layer, n) for n in "AB"}
        else:
            keys |= {f"{PREFIX}{layer.key}.lora_{n}.weight": getattr(layer, n) for n in "AB"}
    return keys


def write(path: Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Both files complete in a directory beside, then renamed into place; an error restores what was there."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        (fresh / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        fresh.chmod(0o755)
        if not path.exists():
            os.replace(fresh, path)
            return
        with contextlib.ExitStack() as undo:
            for file in (WEIGHTS, CONFIG):
                if (path / file).exists():
                    os.replace(path / file, fresh / f"old-{file}")
                    undo.callback(os.replace, fresh / f"old-{file}", path / file)
                os.replace(fresh / file, path / file)
            undo.pop_all()
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------
def load_adapter(model: nn.Module, path: str | os.PathLike, name: str = "default") -> Tuned:
    """Attaches the adapter in the directory `path`, trainable and active; a `Tuned` gets it as a further adapter.

    Raises ValueError, and leaves the model as it was, when a file is missing or damaged, holds another method, or does
    not fit the model: every number in the file must find its place, and every place its number.
    """
    tuned = model if isinstance(model, Tuned) else None
    if tuned is None and isinstance(model, nn.Module) and carries_adapters(model):
        raise ValueError("This model already carries adapters; pass the Tuned that attach returned.")
    if tuned is not None:
        tuned._must_be_open("load_adapter")
    check_name(name, list(tuned.adapters) if tuned else ())
    base = tuned.base if tuned else model
    try:
        config, tensors = read(Path(path))
        with tuned.disabled() if tuned else contextlib.nullcontext():
            methods, layers = build(base, interpret(base, config, tensors), seed=0)
            fill(file_keys(list(layers.values()), config), tensors)
    except ValueError as error:
        raise ValueError(f"The adapter in {str(path)!r} does not load: {error}") from error
    if tuned is None:
        return wrap(model, name, methods, layers)
    tuned.seat(name, methods, layers)
    tuned.use(name)
    return tuned


def read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for file in (CONFIG, WEIGHTS):
        if not (path / file).is_file():
            raise ValueError(f"it has no {file}; an adapter is a directory with {CONFIG} and {WEIGHTS}.")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{CONFIG} is not JSON ({error}); save the adapter again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} holds a {type(config).__name__}; it must be a JSON object.")
    try:
        return config, load_file(path / WEIGHTS)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{WEIGHTS} is not a safetensors file ({error}); save the adapter again.") from error


def interpret(base: nn.Module, config: dict, tensors: dict[str, torch.Tensor]) -> list[Method]:
    """The methods that build what the files hold. The layers are the ones that the keys name, not what
    `target_modules` matches (PEFT writes short suffixes there), but a layer that it does match must not be missing."""
    kind = config.get("peft_type")
    if kind not in ("LORA", "MINIPEFT_LORA", "MINIPEFT_SELECT"):
        raise ValueError(f"it holds peft_type {kind!r}; LORA, MINIPEFT_LORA and MINIPEFT_SELECT can be loaded.")
    check_config(config)
    if used := [option for option in FOREIGN if config.get(option)]:
        raise ValueError(f"it uses {', '.join(used)}, which plain LoRA does not have; only plain LoRA loads.")
    if config.get("init_lora_weights") not in PLAIN_INITS:
        init = config["init_lora_weights"]
        raise ValueError(f"it was initialised by {init!r}, which changes the base; only plain LoRA loads.")
    for key in [key for key in tensors if key.endswith(".base_layer.weight")]:
        drop_if_equal(base, key, tensors)
    found = {key: LORA_KEY.fullmatch(key) for key in tensors}
    methods = loras(config, list(dict.fromkeys(m[1] for m in found.values() if m)))
    if kind == "LORA":
        check_complete(base, config, {m[1] for m in found.values() if m})
    rest = [key.removeprefix(PREFIX) for key in found if not found[key] and key.startswith(PREFIX)]
    names = config.get("entries", []) if kind != "LORA" else with_aliases(base, rest)
    return methods + ([Full(targets=tuple(names))] if names else [])


def check_config(config: dict) -> None:
    """Refuses entries of a wrong type, which would fail later in words that say nothing about the file."""
    words, mapping = (list, type(None)), (dict, type(None))
    kinds = {
        "target_modules": (str, *words),
        "modules_to_save": words,
        "rank_pattern": mapping,
        "alpha_pattern": mapping,
    }
    if config["peft_type"] != "LORA":
        kinds["entries"] = words
    if config["peft_type"] != "MINIPEFT_SELECT":
        kinds |= {"lora_alpha": (int, float), "lora_dropout": (int, float, type(None))}
    for option, types in kinds.items():
        value = config.get(option)
        if not isinstance(value, types) or (isinstance(value, list) and not all(isinstance(v, str) for v in value)):
            raise ValueError(f"{CONFIG} has {option} = {value!r}, which is of the wrong type.")
    patterns = [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]
    targets = config.get("target_modules")
    for pattern in [*patterns, *([targets] if isinstance(targets, str) else [])]:
        try:
            re.compile(pattern)
        except re.error as error:
            which = "target_modules" if pattern is targets else "rank_pattern or alpha_pattern"
            raise ValueError(f"{CONFIG} has {pattern!r} in {which}, no regular expression ({error}).") from error


def loras(config: dict, keys: list[str]) -> list[LoRA]:
    """One LoRA for each combination of rank and γ."""
    groups: dict[tuple, list[tuple[str, int, int]]] = {}
    for key in keys:
        rank = by_pattern(config.get("rank_pattern"), key, config.get("r"))
        alpha = by_pattern(config.get("alpha_pattern"), key, config.get("lora_alpha"))
        place = re.fullmatch(r"(.+?)(?:\[(\d+):(\d+)\])?", key)
        groups.setdefault((rank, alpha), []).append((place[1], int(place[2] or 0), int(place[3] or 0)))
    stable, dropout = bool(config.get("use_rslora")), config.get("lora_dropout") or 0.0
    return [
        LoRA(rank=rank, alpha=alpha, rank_stabilized=stable, dropout=dropout, targets=places)
        for (rank, alpha), places in groups.items()
    ]


def by_pattern(patterns: dict | None, key: str, default):
    """PEFT's rule: the first pattern that matches the end of the path, at a dot."""
    fits = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", key))
    return next(fits, default)


def with_aliases(base: nn.Module, names: list[str]) -> list[str]:
    """These parameters, and the places that share them; but an output layer is trained apart from a tied embedding."""
    every = {parameter_name(slot): (slot, p) for slot, p in slots(base)}
    wanted = {id(every[name][1]) for name in names if name in every}
    known = [
        n for n, (s, p) in every.items() if id(p) in wanted and (n in names or not isinstance_embedding(base, s[0]))
    ]
    return known + [name for name in names if name not in every]


def drop_if_equal(base: nn.Module, key: str, tensors: dict[str, torch.Tensor]) -> None:
    """PEFT stores the frozen weight of an adapted embedding too. It is not needed, if it is this model's."""
    name = key.removeprefix(PREFIX).removesuffix(".base_layer.weight")
    own = {f"{p}.{n}": value for (p, n), value in slots(base)}.get(f"{name}.weight")
    if own is None or own.shape != tensors[key].shape or not torch.equal(own.cpu(), tensors[key].to(own.dtype)):
        raise ValueError(f"it was trained over another {name!r} than this model's; load it on its own base.")
    del tensors[key]


def check_complete(base: nn.Module, config: dict, present: set[str]) -> None:
    targets = config.get("target_modules")
    partial = any(config.get(o) is not None for o in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    if partial or not targets or targets == "all-linear":
        return
    if isinstance(targets, str):
        matches = re.compile(targets).fullmatch
    else:
        suffixes = tuple(f".{target}" for target in targets)
        matches = lambda p: f".{p}".endswith(suffixes)  # noqa: E731
    saved = tuple(f".{module}" for module in config.get("modules_to_save") or ())
    matrices = [p for p, m in base.named_modules() if is_matrix(m) and not (saved and f".{p}".endswith(saved))]
    if missing := [p for p in matrices if matches(p) and p not in present]:
        raise ValueError(
            f"it has no lora_A and lora_B for {len(missing)} of its targets, such as {missing[0]!r}; "
            "it was saved incompletely, or from another model."
        )


@torch.no_grad()
def fill(places: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor]) -> None:
    """Copies the file's numbers into built layers, each into its own place."""
    for what, keys in (("lacks", places.keys() - tensors.keys()), ("has", tensors.keys() - places.keys())):
        if keys:
            use = "which this model needs" if what == "lacks" else "for which this model has no place"
            raise ValueError(f"it {what} {len(keys)} tensors, such as {min(keys)!r}, {use}.")
    for key, parameter in places.items():
        value = tensors[key]
        if value.shape != parameter.shape:
            raise ValueError(f"{key!r} has shape {tuple(value.shape)}, but this model needs {tuple(parameter.shape)}.")
        if not torch.isfinite(value).all():
            raise ValueError(f"{key!r} holds NaN or infinite numbers; save it from a run that converged.")
    for key, parameter in places.items():
        parameter.copy_(tensors[key])
