"""Adapters on disk: a directory with `adapter_config.json` and `adapter_model.safetensors`.

Every method that Hugging Face PEFT has is written as PEFT writes it, and read from PEFT's files: the method's file says
how, method by method. Besides a method's own numbers a file can hold parameters of the base that were trained:

    base_model.model.<module>.<parameter>       of a module in modules_to_save: the output layer

PEFT has no slices of fused projections, no BitFit and no selective training. Those use the same two files with a
`peft_type` of our own, MINIPEFT_LORA or MINIPEFT_SELECT, where `entries` names the base's parameters that were trained.

Only JSON and safetensors are ever read: loading an adapter runs no code from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

from minipeft.attach import Tuned, wrap
from minipeft.build import build, carries_adapters, check_name
from minipeft.files import OURS, PREFIX, WORDS, Layout, layout_for, layout_of
from minipeft.layer import Layer, Method
from minipeft.methods.select import Full, Selected, parameter_name
from minipeft.serve.card import CARD, card, is_ours
from minipeft.targets import is_matrix, module_at, slots

CONFIG, WEIGHTS, SELECT = "adapter_config.json", "adapter_model.safetensors", OURS + "SELECT"
SAVING = ".saving"  # in an adapter's folder: files that are complete and count, but are not all in their place yet


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------
def save_adapter(tuned: Tuned, path: str | os.PathLike, name: str | None = None) -> None:
    """Writes adapter `name`, or the active one, to the directory `path`: both files, or nothing.

    Raises ValueError when no name is given and not exactly one adapter is active, and for a layer that it cannot write.
    Warns when the active one counts in part, for the file holds it in full.
    """
    if not os.fspath(path):
        raise ValueError("The path is empty; name the folder that the adapter shall be in.")
    if name is None and len(tuned.active) != 1:
        raise ValueError(f"{len(tuned.active)} adapters are active; say which to save, one of {list(tuned.adapters)}.")
    if name is None and (share := tuned.weights[tuned.active[0]]) != 1:
        warnings.warn(f"{tuned.active[0]!r} counts with {share:g} here; a file holds it in full.", stacklevel=3)
    config, tensors = packed(tuned, tuned.active[0] if name is None else name)
    write(Path(path), config, tensors)


def packed(tuned: Tuned, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The configuration and the numbers of an adapter, as its two files would hold them; the numbers lie on the CPU."""
    if name not in tuned.adapters:
        raise ValueError(f"There is no adapter {name!r}; this model carries {list(tuned.adapters)}.")
    layers = list(tuned.adapters[name].values())
    with tuned.disabled():
        config = describe(tuned.base, layers)
    config["base_model_name_or_path"] = getattr(getattr(tuned.base, "config", None), "name_or_path", "") or None
    numbers = expected(layers, config)
    if others := split(layers)[1]:
        numbers = layout_of(others[0]).written(tuned.base, config, numbers)
    if any(value.is_meta for value in numbers.values()):
        raise ValueError(f"Adapter {name!r} is on the meta device, so it has no numbers to save; use tuned.to_empty().")
    return config, {key: value.detach().cpu().contiguous() for key, value in numbers.items()}


def describe(base: nn.Module, layers: list[Layer]) -> dict:
    """The configuration of an adapter: PEFT's if PEFT can hold it, else one of our own."""
    selected, others = split(layers)
    whole = whole_modules(base, selected)
    entries = [parameter_name(slot) for layer in selected for slot in layer.slots]
    if not others:
        return {"peft_type": SELECT, "entries": entries}
    kinds = {layout_of(layer).layer.__name__ for layer in others}
    if len(kinds) > 1:
        raise ValueError(f"One file holds one method, not {' and '.join(sorted(kinds))}; put each under its own name.")
    layout = layout_of(others[0])
    config = {
        "peft_type": layout.peft_type,
        "task_type": None,
        "inference_mode": True,
        "modules_to_save": whole or None,
    } | layout.config(base, others)
    both = any(f".{module}." in f".{layer.path}." for layer in others for module in whole or ())  # PEFT drops its LoRA
    if (whole is None or both) and not config["peft_type"].startswith(OURS):
        config["peft_type"] = OURS + config["peft_type"]
    return config | {"entries": entries} if config["peft_type"].startswith(OURS) else config


def split(layers: list[Layer]) -> tuple[list[Selected], list[Layer]]:
    """Trained copies of the base's parameters, and the layers of a method."""
    selected = [layer for layer in layers if isinstance(layer, Selected)]
    return selected, [layer for layer in layers if not isinstance(layer, Selected)]


def whole_modules(base: nn.Module, selected: list[Selected]) -> list[str] | None:
    """The modules whose parameters are exactly what was trained, as PEFT's `modules_to_save` wants; else None."""
    trained = {slot for layer in selected for slot in layer.slots}
    owners = [path for path in dict.fromkeys(slot[0] for slot in trained) if not isinstance_embedding(base, path)]
    own = {path: {(path, n) for n, p in module_at(base, path)._parameters.items() if p is not None} for path in owners}
    whole = sorted(path for path in owners if path and own[path] <= trained and is_matrix(module_at(base, path)))
    embedded = any(isinstance_embedding(base, path) for path, _ in trained)
    covered = all(any(path in whole for path, _ in layer.slots) for layer in selected)
    return whole if covered and not embedded else None


def isinstance_embedding(base: nn.Module, path: str) -> bool:
    """Whether the module looks its weight up: PyTorch's, or one of a model's own (I-BERT) that multiplies by none."""
    module = module_at(base, path)
    weight = module._parameters.get("weight")
    return isinstance(module, nn.Embedding) or (weight is not None and weight.ndim == 2 and not is_matrix(module))


def expected(layers: list[Layer], config: dict) -> dict[str, torch.Tensor]:
    """{key in the file: numbers} for built layers."""
    selected, others = split(layers)
    layout = layout_for(config) if others else None
    return _copies(selected, config, layout) | (layout.tensors(others, config) if layout else {})


def _copies(selected: list[Selected], config: dict, layout: Layout | None) -> dict[str, torch.Tensor]:
    head, whole = layout.head if layout else PREFIX, set(config.get("modules_to_save") or ())
    keys = {}
    for layer in selected:
        inside = [s for s in layer.slots if any(s[0] == m or s[0].endswith(f".{m}") for m in whole)]
        keys[head + parameter_name((inside or layer.slots)[0])] = layer.value
    return keys


def write(path: Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Both files, and a card unless a person wrote one; whenever the process dies, the old pair loads or the new one.

    They are completed in a folder beside, whose renaming to `SAVING` is the moment from which they count: `read`
    prefers what lies there. Then each is moved into its place, the weights first. What reads the places alone, as PEFT
    does, can find new weights under an old configuration between those two moves, where the configuration changes. An
    error restores what was there.
    """
    from safetensors.torch import save_file

    if there := next((each for each in (path, *path.parents) if each.exists() and not each.is_dir()), None):
        raise ValueError(f"{str(there)!r} is a file, and an adapter is a folder of files; give another path.")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path if path.is_dir() else path.parent  # on the same file system, even where the path is a link to another
    fresh = Path(tempfile.mkdtemp(dir=beside, prefix=f".{path.name}-"))
    try:
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        (fresh / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if is_ours(path / CARD):
            (fresh / CARD).write_text(card(config, tensors), encoding="utf-8")
        fresh.chmod(0o755)
        if not path.exists():
            with contextlib.suppress(OSError):  # another process may have been quicker
                os.replace(fresh, path)
                return
        with locked(path):
            exchange(path, fresh)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path):
    """Within it, no other process is in here for this folder; where the system has such locks, which end with it."""
    folder = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(ModuleNotFoundError, OSError):
            import fcntl

            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def exchange(path: Path, fresh: Path) -> None:
    """Puts the files in `fresh` in place of those in `path`, all of them or none."""
    files = (WEIGHTS, CONFIG, CARD)
    settle(path)
    for file in files:
        if (path / file).exists() and (fresh / file).exists():
            shutil.copy2(path / file, fresh / f"old-{file}")
    os.replace(fresh, path / SAVING)
    try:
        settle(path)
    except BaseException:
        os.replace(path / SAVING, fresh)
        for file in files:
            if (fresh / f"old-{file}").exists():
                os.replace(fresh / f"old-{file}", path / file)
        raise


def settle(path: Path) -> None:
    """Moves what a save, perhaps one that was cut off, has completed into its place."""
    for file in (WEIGHTS, CONFIG, CARD):
        if (path / SAVING / file).exists():
            os.replace(path / SAVING / file, path / file)
    shutil.rmtree(path / SAVING, ignore_errors=True)


def current(path: Path, file: str) -> Path:
    """Where the newest complete `file` of the adapter in `path` lies."""
    return saving if (saving := path / SAVING / file).is_file() else path / file


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
        tuned.check_open("load_adapter")
    check_name(name, list(tuned.adapters) if tuned else ())
    base, config = tuned.base if tuned else model, {}
    try:
        config, tensors = read(Path(path))
        with tuned.disabled() if tuned else contextlib.nullcontext():
            methods, layers = unpacked(base, config, tensors)
    except (ValueError, OverflowError) as error:
        made, here = config.get("base_model_name_or_path"), getattr(getattr(base, "config", None), "name_or_path", "")
        other = f", which was made on {made!r}, does not load on {here!r}" if made and here and made != here else ""
        raise ValueError(f"The adapter in {str(path)!r}{other or ' does not load'}: {error}") from error
    if tuned is None:
        return wrap(model, name, methods, layers)
    tuned.seat(name, methods, layers)
    tuned.use(name)
    return tuned


def unpacked(
    base: nn.Module, config: dict, tensors: dict[str, torch.Tensor]
) -> tuple[tuple[Method, ...], dict[str, Layer]]:
    """The layers that the two files hold, built for `base`, which is only read."""
    methods, layers = build(base, interpret(base, config, tensors), seed=0, tried=False)
    fill(list(layers.values()), config, tensors)
    return methods, layers


def read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The configuration and the numbers in the directory `path`."""
    return parsed(*contents(path))


def contents(path: Path) -> tuple[bytes, bytes]:
    """The bytes of the two files, of one save even while another one is under way."""
    while True:
        for file in (CONFIG, WEIGHTS):
            if not ((path / SAVING / file).is_file() or (path / file).is_file()):  # in the order in which it moves
                raise ValueError(f"it has no {file}; an adapter is a directory with {CONFIG} and {WEIGHTS}.")
        with contextlib.suppress(FileNotFoundError):  # one was moved into its place meanwhile
            text, weights = current(path, CONFIG).read_bytes(), current(path, WEIGHTS).read_bytes()
            if current(path, CONFIG).read_bytes() == text:
                return text, weights


def parsed(text: bytes, weights: bytes) -> tuple[dict, dict[str, torch.Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        config = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG} is not JSON ({error}); save the adapter again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} holds a {type(config).__name__}; it must be a JSON object.")
    try:
        return config, load(weights)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{WEIGHTS} is not a safetensors file ({error}); save the adapter again.") from error


def interpret(base: nn.Module, config: dict, tensors: dict[str, torch.Tensor]) -> list[Method]:
    """The methods that build what the files hold."""
    rename(base, tensors)
    layout = None if config.get("peft_type") == SELECT else layout_for(config)
    check_config(config, layout)
    for key in [key for key in tensors if key.endswith(".base_layer.weight")]:
        drop_if_equal(base, key, tensors)
    methods = layout.methods(base, config, tensors) if layout else []
    head = layout.head if layout else PREFIX
    rest = [key.removeprefix(head) for key in tensors if key.startswith(head) and not (layout and layout.owns(key))]
    ours = config["peft_type"].startswith(OURS)
    names = config.get("entries") or [] if ours else with_aliases(base, rest, config)
    if not methods and not names:
        raise ValueError("it holds no numbers of any method; it was saved incompletely.")
    return methods + ([Full(targets=tuple(names))] if names else [])


def rename(base: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Takes out of the keys what training put around the model: the names of an adapter and of wrappers, and PEFT's
    "base_layer" before a bias that was trained along."""
    paths = {part for path, _ in base.named_modules() for part in path.split(".")}
    around = {"default", "_orig_mod", "module"} - paths
    for key in list(tensors):
        name = key.removesuffix(".base_layer.bias") + ".bias" if key.endswith(".base_layer.bias") else key
        name = ".".join(part for part in name.split(".") if part not in around)
        if name != key and name in tensors:
            raise ValueError(f"{key!r} and {name!r} stand for the same numbers; keep one of them.")
        tensors[name] = tensors.pop(key)


def check_config(config: dict, layout: Layout | None) -> None:
    """Refuses entries of a wrong type, which would fail later in words that say nothing about the file."""
    kinds = {"target_modules": (str, *WORDS), "modules_to_save": WORDS, "entries": WORDS}
    for option, types in (kinds | (layout.kinds if layout else {})).items():
        value = config.get(option)
        words = not (option in kinds and isinstance(value, list)) or all(isinstance(v, str) for v in value)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types) or not words:
            raise ValueError(f"{CONFIG} has {option} = {value!r}, which is of the wrong type.")
    for option, values in (layout.fixed if layout else {}).items():
        if config.get(option) not in values:
            raise ValueError(
                f"it has {option} = {config[option]!r}, which is not done here; {values[-1]!r} would load."
            )
    if layout and (used := [o for o in layout.foreign if config.get(o) and o not in layout.flag]):
        raise ValueError(f"it uses {', '.join(used)}, which is not done here; only plain {layout.peft_type} loads.")


def with_aliases(base: nn.Module, names: list[str], config: dict) -> list[str]:
    """These parameters, and the places that share them; but an output layer and an embedding that are tied train apart,
    each for itself, since PEFT's `modules_to_save` holds a copy of the one."""
    every = {parameter_name(slot): (slot, p) for slot, p in slots(base)}
    tied = config.get("ensure_weight_tying")
    shared = [every[n] for n in names if n in every and (tied or not isinstance_embedding(base, every[n][0][0]))]
    wanted = {id(p) for _, p in shared}
    known = [
        n
        for n, (s, p) in every.items()
        if n in names or (id(p) in wanted and (tied or not isinstance_embedding(base, s[0])))
    ]
    return known + [name for name in names if name not in every]


def drop_if_equal(base: nn.Module, key: str, tensors: dict[str, torch.Tensor]) -> None:
    """PEFT stores the frozen weight of an adapted embedding too. It is not needed, if it is this model's."""
    name = key.removeprefix(PREFIX).removesuffix(".base_layer.weight")
    own = {f"{p}.{n}": value for (p, n), value in slots(base)}.get(f"{name}.weight")
    if own is None or own.shape != tensors[key].shape or not torch.equal(own.cpu(), tensors[key].to(own.dtype)):
        raise ValueError(f"it was trained over another {name!r} than this model's; load it on its own base.")
    del tensors[key]


@torch.no_grad()
def fill(layers: list[Layer], config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Copies the file's numbers into built layers, each into its own place."""
    places = expected(layers, config)
    for layer in split(layers)[0]:  # a tied parameter may be in the file under each of its names
        names = [PREFIX + parameter_name(slot) for slot in layer.slots]
        own = next((name for name in names if name in places), None)
        for name in names if own else ():
            if name in tensors and name != own and torch.equal(tensors[name], tensors.get(own, tensors[name])):
                tensors[own] = tensors.pop(name)
    for what, keys in (("lacks", places.keys() - tensors.keys()), ("has", tensors.keys() - places.keys())):
        if keys:
            use = "which this model needs" if what == "lacks" else "for which this model has no place"
            raise ValueError(f"it {what} {len(keys)} tensors, such as {min(keys)!r}, {use}.")
    for key, mine in places.items():
        value = tensors[key]
        if value.shape != mine.shape:
            raise ValueError(f"{key!r} has shape {tuple(value.shape)}, but this model needs {tuple(mine.shape)}.")
        real = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        if value.dtype not in (real if mine.is_floating_point() else (mine.dtype,)):
            raise ValueError(f"{key!r} holds {value.dtype} numbers; an adapter's are float32, float16 or bfloat16.")
        if not torch.isfinite(value.to(mine.dtype)).all():
            raise ValueError(f"{key!r} holds NaN or infinite numbers; save it from a run that converged.")
    selected, others = split(layers)
    layout = layout_for(config) if others else None
    for key, mine in _copies(selected, config, layout).items():
        mine.copy_(tensors[key])
    if layout:
        layout.restore(others, config, tensors)
