"""Weights that a module reads for itself, for LoRA, DoRA and IA3: no layer is called for them, so that there is no
output to add to, and the module computes with W' = W + ΔW instead.

    attention (`nn.MultiheadAttention`)   [q k v] = W_in·x + b,  y = W_out·(…) + b     W_in (3·d, d), W_out (d, d)
    the experts of a mixture              y = W[e]·x for the tokens of expert e        W (E, d_out, d_in)

For E experts LoRA has E pairs, ΔW[e] = γ·B_e·A_e, of E·r·(d_in + d_out) numbers together.

W' is formed at each call and has W's dtype: over a base in bfloat16 it is rounded as merging rounds it. An input of the
module is no input of A, so dropout has no place. The seat is `ReadingSeat` in `hook.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from minipeft.files import PREFIX, Tensors
from minipeft.layer import WeightLayer
from minipeft.targets import Target, read


def check_read(targets: Sequence[Target], method: str, dropout: float = 0.0, stacks: bool = False) -> None:
    """Raises ValueError for a stack of experts, unless the method works on `stacks`, and for dropout where nothing can
    be dropped."""
    for target in (target for target in targets if target.reader is not None):
        if target.tensor.ndim == 3 and not stacks:
            raise ValueError(f"{method} works on single matrices, and {target.key!r} is a stack of them; use LoRA.")
        if dropout:
            raise ValueError(
                f"{target.key!r} is read by {target.reader!r} itself, where no input can be dropped; use dropout=0."
            )


def bias(module: nn.Module, parameter: str, rows: slice) -> tuple[str, slice]:
    """The name of the bias that is added to these rows of W·x, and where they are in it."""
    if not isinstance(module, nn.MultiheadAttention):
        return "bias", rows
    before = {"k_proj_weight": 1, "v_proj_weight": 2}.get(parameter, 0) * module.embed_dim
    return "in_proj_bias", slice(before + rows.start, before + rows.stop)


# ---------------------------------------------------------------------------------------------------------------------
# Names in PEFT's files
# ---------------------------------------------------------------------------------------------------------------------
WRAPPED = ".base_layer.out_proj"  # attention's W_out


class Name(NamedTuple):
    """Where PEFT stores the A and B of a place, and what its patterns are held against."""

    stored: str
    matched: str


def peft_names(base: nn.Module, config: dict) -> dict[str, Name]:
    """{place: PEFT's name for it} of all attention, and of the stacks in `target_parameters`.

    PEFT has a wrapper around attention and one around its out_proj, and as many around experts as they have stacks that
    are adapted, the first stack's innermost.
    """
    wanted = tuple(f".{name}" for name in config.get("target_parameters") or ())
    names: dict[str, Name] = {}
    for path, module in base.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            names[f"{path}.in_proj_weight"] = Name(path, path)
            names[f"{path}.out_proj"] = Name(f"{path}{WRAPPED}", path)
        own = [key for name in module._parameters if (key := f"{path}.{name}") and f".{key}".endswith(wanted)]
        for i, key in enumerate(own):
            names[key.removesuffix(".weight")] = Name(path + ".base_layer" * (len(own) - 1 - i), key)
    return names


def peft_has(layers: Sequence[WeightLayer]) -> bool:
    """Whether PEFT's LoRA can hold these: stacks, and attention's W_in.

    W_out is written in a file of our own: PEFT up to 0.21.0 adds its ΔW twice (its pull request 3774), a later one
    may not, so no file would mean the same to both.
    """
    own = [layer for layer in layers if layer.reader is not None]
    return all(layer.reader and (layer.path == layer.reader) for layer in own) and not any(
        layer.parameter in ("q_proj_weight", "k_proj_weight", "v_proj_weight") for layer in own
    )


def counts_twice(config: dict) -> bool:
    """Whether the PEFT that wrote the file adds the ΔW of attention's W_out twice."""
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(config.get("peft_version") or "0.0.0"))
    return version is None or tuple(map(int, version.groups())) <= (0, 21, 0)


def to_peft(names: dict[str, Name], tensors: Tensors) -> Tensors:
    """The same under PEFT's names, and beside each W_in the A and B of W_out, all zero, that PEFT has there."""
    for place, (stored, matched) in names.items():
        A, B = (tensors.get(f"{PREFIX}{place}.lora_{each}.weight") for each in "AB")
        if stored == matched and A is not None:
            out = place.removesuffix("in_proj_weight") + "out_proj"
            zeros = A.new_zeros(A.shape), B.new_zeros(len(B) // 3, B.shape[1])
            tensors = tensors | {
                f"{PREFIX}{out}.lora_{each}.weight": zero for each, zero in zip("AB", zeros, strict=True)
            }
    return moved(tensors, {ours: name.stored for ours, name in names.items()})


def from_peft(base: nn.Module, names: dict[str, Name], config: dict, tensors: Tensors) -> None:
    """Gives the tensors of PEFT's file, in place, our names. Raises ValueError for what PEFT does otherwise."""
    stacks = {f".{target.path}.{target.parameter}" for target in read(base) if target.tensor.ndim == 3}
    for name in config.get("target_parameters") or ():
        if not any(stack.endswith(f".{name}") for stack in stacks):
            raise ValueError(f"target_parameters has {name!r}, which names no stack of experts of this model.")
    for place, (stored, matched) in names.items():
        if stored.endswith(WRAPPED) and f"{PREFIX}{place}.lora_A.weight" in tensors:
            raise ValueError(f"it adapts {place!r} alone, which attention reads and never calls, so PEFT does nothing.")
        if f".{matched}" in stacks and f"{PREFIX}{stored}.lora_A.weight" not in tensors:
            raise ValueError(f"it has no lora_A for {matched!r}, which target_parameters names.")
    found = moved(tensors, {name.stored: ours for ours, name in names.items()})
    tensors.clear()
    tensors.update(found)
    for place in (place for place, name in names.items() if name.stored.endswith(WRAPPED)):
        A, B = (f"{PREFIX}{place}.lora_{each}.weight" for each in "AB")
        if A in tensors and B in tensors and not tensors[A].any() and not tensors[B].any():  # it never moves, either
            del tensors[A], tensors[B]
        elif B in tensors and counts_twice(config):
            tensors[B] = 2 * tensors[B]


def moved(tensors: Tensors, places: dict[str, str]) -> Tensors:
    """The same under other names: LoRA's A and B that lie at one of `places` lie where that leads."""
    names = {
        f"{PREFIX}{place}.lora_{each}.weight": f"{PREFIX}{to}.lora_{each}.weight"
        for place, to in places.items()
        for each in "AB"
    }
    return {names.get(key, key): value for key, value in tensors.items()}
