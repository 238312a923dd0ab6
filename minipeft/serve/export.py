"""A tuned model without minipeft: its adapters merged into a plain model, which transformers' `from_pretrained` loads.

    W' = W + ΔW, computed in float32 (or wider) and rounded once, to the dtype of the file

A base that is stored in 4 bits is made dense again, so the result is as large as the base was before.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn

from minipeft.attach import Tuned
from minipeft.methods.select import parameter_name
from minipeft.reading import is_pair
from minipeft.targets import flipped, foreign, module_at, packed, slots


@torch.no_grad()
def export(tuned: Tuned, path: str | os.PathLike, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> float:
    """Writes the base with the active adapters merged to the new folder `path`, its tokenizer too, whole or not at all.

    Returns the error of merging: the largest |Δlogit| on the token ids `ids` (rows, T) between `tuned` and what
    `from_pretrained(path)` gives. Raises ValueError for a folder that holds something already, a dtype that is neither
    float32 nor bfloat16, a model that transformers has not made, one that bitsandbytes packed, and adapters that change
    no weight: prompts, prefixes, bottlenecks.
    """
    path = Path(path)
    check(tuned, path, ids, dtype)
    base, weights = tuned.base, state(tuned)  # which says so, where an adapter cannot be merged
    with torch.device("meta"):
        plain = type(base)(copy.deepcopy(base.config))
    for name in weights.keys() & turned(plain, base):
        weights[name] = weights[name].T
    with tuned.disabled():  # the base's own parameters are in place
        plain.config.tie_word_embeddings &= not untied(base, weights)
    floating = {name: w.to(dtype).contiguous() if w.is_floating_point() else w for name, w in weights.items()}
    missing, unknown = plain.load_state_dict(floating, strict=False, assign=True)
    if odd := [*missing, *unknown]:
        raise ValueError(
            f"{odd[0]!r} is not where {type(base).__name__} has it: the model was changed after it was built, so "
            "transformers could not build it again."
        )
    plain.tie_weights()
    plain.config.dtype, plain.generation_config = dtype, getattr(base, "generation_config", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        plain.save_pretrained(fresh)
        if getattr(base, "tokenizer", None) is not None:
            base.tokenizer.save_pretrained(fresh)
        again = type(base).from_pretrained(fresh, dtype=dtype).to(ids.device).eval()
        error = (logits(tuned, ids) - logits(again, ids)).abs().max().item()
        fresh.chmod(0o755)
        os.replace(fresh, path)  # over an empty folder, too
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return error


def check(tuned: Tuned, path: Path, ids: torch.Tensor, dtype: torch.dtype) -> None:
    if not isinstance(tuned, Tuned):
        raise TypeError(f"tuned is a {type(tuned).__name__}; export needs the Tuned that attach returned.")
    tuned.check_acting("export")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}; it is torch.float32 or torch.bfloat16.")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
        raise ValueError("ids must be token ids of shape (rows, T), on which the error of merging is measured.")
    if not hasattr(tuned.base, "save_pretrained"):
        raise ValueError(f"{type(tuned.base).__name__} is no model of transformers, so from_pretrained cannot load it.")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{str(path)!r} holds something already; give a new folder.")
    if alien := [name for name, module in tuned.base.named_modules() if foreign(module)]:
        raise ValueError(f"{alien[0]!r} is packed by bitsandbytes; load the base at full precision and export that.")
    if meta := [name for name, value in tuned.state_dict().items() if value.is_meta]:
        raise ValueError(f"{meta[0]!r} is on the meta device, where there are no numbers; load the model's weights.")


def state(tuned: Tuned) -> dict[str, torch.Tensor]:
    """{name: W'} of the whole model, dense, in at least float32 where an adapter changed it."""
    changed = {parameter_name(slot): value for slot, value in tuned.unrounded().items()}
    with tuned.disabled():
        weights = {name: value.detach() for name, value in tuned.base.state_dict().items()}
        for path, module in tuned.base.named_modules():
            if packed(module):
                for name in module.layout.tensors():
                    del weights[f"{path}.{name}"]
                weights[f"{path}.weight"] = module.weight
    return weights | changed


def turned(plain: nn.Module, base: nn.Module) -> set[str]:
    """The weights that `plain` holds as (d_in, d_out) and `base` as (d_out, d_in): a Conv1D that was quantised."""
    return {
        f"{path}.weight"
        for path, module in plain.named_modules()
        if flipped(module) and not flipped(module_at(base, path))
    }


def untied(base: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    """Whether weights that are one in the base have come apart."""
    groups: dict[int, list[str]] = {}
    for slot, parameter in slots(base):
        groups.setdefault(id(parameter), []).append(parameter_name(slot))
    return any(not torch.equal(weights[names[0]], weights[other]) for names in groups.values() for other in names[1:])


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The model's answer in evaluation mode, in float64: (rows, T, V), or (rows, classes)."""
    training = model.training
    model.eval()
    try:
        pair = {"decoder_input_ids": ids} if is_pair(getattr(model, "base", model)) else {}
        return model(input_ids=ids, **pair).logits.double()
    finally:
        model.train(training)
