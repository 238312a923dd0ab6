"""From a method to layers: what `attach` and `Tuned.add` check and build before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from minipeft.calls import unheard, unseen
from minipeft.front import Front
from minipeft.hook import Seat, seats
from minipeft.layer import Layer, Method, WeightLayer
from minipeft.table import table
from minipeft.targets import Slot, module_at, slots


@dataclass(frozen=True)
class Count:
    """How many numbers train, and how many the adapted model has in all (base + what the active adapters add)."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"trainable {self.trainable:,} of {self.total:,} ({100 * self.share:.3g} %)"

    def _repr_html_(self) -> str:
        rows = ("trained", f"{self.trainable:,}"), ("in all", f"{self.total:,}"), ("share", f"{100 * self.share:.3g} %")
        return table("Numbers of the model", rows)


def carries_adapters(model: nn.Module) -> bool:
    return hasattr(model, "_tuned") or any(isinstance(seat, Seat | Front) for seat in seats(model))


def build(
    model: nn.Module, method: Method | Sequence[Method], seed: int, tried: bool = True
) -> tuple[tuple[Method, ...], dict[str, Layer]]:
    """The layers of `method` for `model`, which is only read.

    With `tried`, a layer that would change the output of a module which the model never calls is refused, or left out
    where the method names no modules ("all-linear").
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; attach needs a torch.nn.Module.")
    if hasattr(model, "peft_config"):
        raise ValueError(
            "This model carries Hugging Face PEFT's adapters; take them off first (unload, delete_adapter)."
        )
    around = type(model).__name__
    if around in ("OptimizedModule", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
        inside = "_orig_mod" if around == "OptimizedModule" else "module"
        raise ValueError(f"This is a {around} around a model; attach to model.{inside}, then wrap what attach returns.")
    offloaded = any(getattr(getattr(m, "_hf_hook", None), "offload", False) for m in model.modules())
    if offloaded or len({p.is_meta for _, p in slots(model)}) > 1:
        raise ValueError("Some of the weights are offloaded to the meta device; load the model whole, on one device.")
    methods = (method,) if isinstance(method, Method) else tuple(method) if isinstance(method, list | tuple) else ()
    if not methods or not all(isinstance(m, Method) for m in methods):
        raise TypeError(f"method is {method!r}; attach needs a method such as LoRA(rank=8), or a list of them.")
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, Layer] = {}
    for each in methods:
        with torch.inference_mode(False):  # what is made in inference mode never trains
            made = {key: maker(generator) for key, maker in each.places(model).items()}
        for key, layer in (heard(model, each, made) if tried else made).items():
            if key in layers and not (layer.slots and layer.slots == layers[key].slots):
                raise ValueError(f"Two of the methods want to train {key!r}; name it in one of them only.")
            layers.setdefault(key, layer)  # one copy of a parameter serves two methods that both select it
    for path in {layer.reader for layer in layers.values()} - {None}:
        forward = vars(module_at(model, path)).get("forward")
        if forward is not None and not isinstance(getattr(forward, "__self__", None), Seat):
            raise ValueError(
                f"Somebody replaced the forward of {path!r}, so nothing can be put in place of its weights."
            )
    if clash := claimed_twice({key: [layer] for key, layer in layers.items()}):
        raise ValueError(f"Two of the methods want to train {'.'.join(clash[2])!r}; name it in one of them only.")
    return methods, layers


def heard(model: nn.Module, method: Method, layers: dict[str, Layer]) -> dict[str, Layer]:
    """Without the layers on modules that are never called, or in vain."""
    paths = [layer.path for layer in layers.values() if isinstance(layer, WeightLayer)]
    silent = unheard(model, paths) | unseen(model, paths)
    left = {key: layer for key, layer in layers.items() if layer.path not in silent}
    if silent and (not left or not isinstance(method.targets, str)):
        path, why = next(iter(silent.items()))
        raise ValueError(f"{type(method).__name__} at {path!r} would have no effect, because {why}; leave it out.")
    return left


def claimed_twice(layers: dict[str, Iterable[Layer]]) -> tuple[str, str, Slot] | None:
    """Two owners of one slot, and the slot."""
    owner: dict[Slot, str] = {}
    for name, slot in ((n, slot) for n, several in layers.items() for layer in several for slot in layer.slots):
        if slot in owner:
            return owner[slot], name, slot
        owner[slot] = name
    return None


def check_name(name: str, used: Sequence[str]) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"{name!r} cannot name an adapter; use a word without dots that nn.ModuleDict does not define."
        )
    if name in used:
        raise ValueError(f"The name {name!r} is in use; this model carries {', '.join(map(repr, used))}.")


def slashed(key: str) -> str:
    """A place's path as a name in a ModuleDict, which knows no dots, and in which "keys" means something else."""
    name = key.replace(".", "/") or "/"
    return f"/{name}" if hasattr(nn.ModuleDict(), name) else name
