"""Merging: W' = W + ΔW, computed wide and rounded once to what the base stores, and put in W's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from minipeft.layer import Layer
from minipeft.targets import Slot, flipped, foreign, module_at, packed, slots


@torch.no_grad()
def merged(base: nn.Module, layers: Sequence[tuple[Layer, float]]) -> tuple[dict[Slot, nn.Parameter], dict[str, float]]:
    """The parameters of the merged model that differ from the base's, and how much of each ΔW rounding took; `layers`
    come with the weight of each.

    Called while the trained copies of `layers` are in place, since a ΔW may depend on the weight that it changes.
    """
    new, lost = trained(layers), {}
    for (path, name), delta in summed(base, layers).items():
        owner = module_at(base, path)
        old = getattr(owner, name)
        # W' = W + ΔW in at least float32: several deltas on one weight are rounded once, at the end
        stored, kept = rounded(owner, name, old.to(delta.dtype) + delta.to(old.device))
        new |= {(path, part): value for part, value in stored.items()}
        if not old.is_meta and (size := delta.norm()) > 0:
            moved = kept.to(delta.dtype) - old.to(delta.dtype)
            lost[path if name == "weight" else f"{path}.{name}"] = ((moved - delta).norm() / size).item()
    # one parameter for each value, so that what is tied stays tied
    shared = {id(v): nn.Parameter(v, requires_grad=False) for v in new.values()}
    return {slot: shared[id(value)] for slot, value in new.items()}, lost


@torch.no_grad()
def unrounded(base: nn.Module, layers: Sequence[tuple[Layer, float]]) -> dict[Slot, torch.Tensor]:
    """What `merged` rounds: W' as W is stored, but dense and in at least float32. Called like it."""
    sums = summed(base, layers)
    old = {(path, name): getattr(module_at(base, path), name).detach() for path, name in sums}
    return trained(layers) | {
        slot: old[slot].to(delta.dtype) + delta.to(old[slot].device) for slot, delta in sums.items()
    }


def trained(layers: Sequence[tuple[Layer, float]]) -> dict[Slot, torch.Tensor]:
    """The trained copies, by every place that points to one."""
    found: dict[Slot, torch.Tensor] = {}
    for layer in (layer for layer, _ in layers if layer.slots):
        found |= dict.fromkeys(layer.slots, layer.value.detach())  # one tensor, so that what is tied stays tied
    return found


def summed(base: nn.Module, layers: Sequence[tuple[Layer, float]]) -> dict[Slot, torch.Tensor]:
    """Σ share·ΔW of each parameter, shaped as the parameter is (a packed weight: as it is when dense)."""
    deltas: dict[Slot, torch.Tensor] = {}
    for layer, share in ((layer, share) for layer, share in layers if not layer.slots):
        changes = layer.changes()  # says so, where a layer changes no weight
        owner = module_at(base, layer.path)
        if changes and foreign(owner):
            raise ValueError(
                f"{layer.path!r} is packed by bitsandbytes, so nothing can be merged into it; keep the adapter apart, "
                "or merge it into the base at full precision."
            )
        for name, delta in changes.items():
            slot = (layer.path, name)
            if name not in owner._parameters and not (name == "weight" and packed(owner)):
                raise ValueError(f"{layer.path!r} computes its {name} from other tensors, so nothing can be merged.")
            wide = torch.promote_types(getattr(owner, name).dtype, torch.float32)
            if not delta.is_meta and not delta.isfinite().all():
                raise ValueError(
                    f"ΔW at {layer.path!r} holds NaN or infinite numbers, so it is not merged; train it again."
                )
            delta = share * (delta.T if name == "weight" and flipped(owner) else delta).to(wide)
            delta = delta if packed(owner) else delta.view_as(getattr(owner, name))  # a convolution's kernel
            deltas[slot] = deltas[slot] + delta if slot in deltas else delta
    return deltas


def rounded(owner: nn.Module, name: str, exact: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What `owner` would store for `exact`, by parameter name, and what it then computes with: a quantised weight is
    rounded to its code again."""
    if packed(owner) and name == "weight":
        stored = owner.stored(exact)
        return stored, owner.dense(list(stored.values()))
    kept = exact.to(getattr(owner, name).dtype)
    return {name: kept}, kept


def broken_ties(base: nn.Module, new: dict[Slot, nn.Parameter]) -> list[str]:
    """Names among `new` of which another alias in the base, which is in place, stays as it was."""
    everywhere = list(slots(base))
    left = {id(p) for slot, p in everywhere if slot not in new}
    return [".".join(slot) for slot, p in everywhere if slot in new and id(p) in left]


def installed(
    base: nn.Module, before: Mapping[Slot, nn.Parameter], new: Mapping[Slot, nn.Parameter]
) -> dict[Slot, nn.Parameter]:
    """Puts back what `before` holds, then `new` in its places; returns what that replaced.

    A module that is not training may keep what it computed from its weights, as LeViT does with its biases; its own
    `train` forgets it.
    """
    replaced: dict[Slot, nn.Parameter] = {}
    for (path, name), original in before.items():
        module_at(base, path)._parameters[name] = original
    for (path, name), value in new.items():
        parameters = module_at(base, path)._parameters
        replaced[path, name], parameters[name] = parameters[name], value
    for module in {module_at(base, path) for path, _ in (*before, *new)}:
        if type(module).train is not nn.Module.train and not module.training:
            training = [each for each in module.modules() if each.training]
            module.train()
            module.eval()
            for each in training:
                each.training = True
    return replaced
