"""What adapters do to the rows of a batch, each row its own: two batched products (Chen et al. 2023, "Punica:
Multi-Tenant LoRA Serving", §4; Sheng et al. 2023, "S-LoRA: Serving Thousands of Concurrent LoRA Adapters", §5).

    y_i = W·x_i + b + γ·B[own_i]·A[own_i]·x_i        for row i, whose adapter is own_i

W·x is one product for the whole batch. A[own] of shape (n, r, d_in) and B[own] of shape (n, d_out, r) are gathered once
for each composition of the batch, ranks filled up with zeros. So the cost follows the rows, not the adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.layer import Layer
from minipeft.methods.dora import DoRALayer
from minipeft.methods.ia3 import IA3Layer
from minipeft.methods.lora import LoRALayer

# What an adapter does at one module, y' = s ⊙ (W·(l ⊙ x) + b) + c + B·A·x, by the parts that it has: A (r, d_in),
# B (d_out, r) with γ in it, s and c (d_out,), l (d_in,); for an embedding T (V, r) instead of A.
Parts = dict[str, torch.Tensor]
NEUTRAL = {"A": 0.0, "B": 0.0, "T": 0.0, "c": 0.0, "s": 1.0, "l": 1.0}


def product(y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """y_i + B_i·A_i·x_i for each row i: x (n, t, d_in), A (n, r, d_in), B (n, d_out, r), y (n, t, d_out)."""
    return torch.baddbmm(y, torch.bmm(x, A.mT), B.mT)


@dataclass(frozen=True)
class Composition:
    """The adapters of a batch, gathered by row: {path: {"A": (n, r, d_in), …}}; T is (distinct, V, r) and not gathered,
    for `own` (n,) says which of the distinct adapters each row has. n is 1 where the whole batch has one adapter."""

    parts: dict[str, Parts]
    own: torch.Tensor


def gather(distinct: Sequence[dict[str, Parts]], own: Sequence[int], device: torch.device) -> Composition:
    """Row i gets the parts of `distinct[own[i]]`, {path: parts}; where that has no such part, what changes nothing."""
    index = torch.tensor([0] if len(distinct) == 1 else own, device=device)
    by_path: dict[str, Parts] = {}
    for path in dict.fromkeys(path for adapter in distinct for path in adapter):
        here = [adapter.get(path, {}) for adapter in distinct]
        for key in dict.fromkeys(key for parts in here for key in parts):
            like = max((parts[key] for parts in here if key in parts), key=torch.Tensor.numel)  # of the highest rank
            stacked = torch.stack([widened(parts.get(key), like, NEUTRAL[key]) for parts in here])
            by_path.setdefault(path, {})[key] = stacked if key == "T" else stacked[index]
    return Composition(by_path, index)


def widened(part: torch.Tensor | None, like: torch.Tensor, neutral: float) -> torch.Tensor:
    if part is None:
        return torch.full_like(like, neutral)
    missing = [w for n, full in zip(reversed(part.shape), reversed(like.shape), strict=True) for w in (0, full - n)]
    return F.pad(part, missing) if any(missing) else part


def act(module: nn.Module, x: torch.Tensor, y: torch.Tensor, parts: Parts, own: torch.Tensor) -> torch.Tensor:
    """The module's output with each row's adapter at work; `y` is its plain output. A row and its beams lie together,
    so (rows·beams, …) is (rows, beams·…) to the adapters."""
    n = len(own)
    if "l" in parts:
        scaled = x.reshape(n, -1, x.shape[-1]) * parts["l"][:, None]
        y = type(module).forward(module, scaled.to(x.dtype).view(x.shape))
    new = y.reshape(n, -1, y.shape[-1])
    if "s" in parts:
        new = torch.addcmul(parts["c"][:, None], parts["s"][:, None], new.to(parts["s"].dtype))
    if "T" in parts:
        new = torch.baddbmm(new.to(parts["B"].dtype), parts["T"][own[:, None], x.reshape(n, -1)], parts["B"].mT)
    elif "A" in parts:
        A, B = parts["A"], parts["B"]
        new = product(new.to(B.dtype), x.reshape(n, -1, x.shape[-1]).to(A.dtype), A, B)
    return new.view(y.shape).to(y.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# From a method's layers to parts
# ---------------------------------------------------------------------------------------------------------------------
def lora_parts(layer: LoRALayer) -> Parts:
    return ({"T": layer.A.T} if layer.embedding else {"A": layer.A}) | {"B": layer.gamma * layer.B}


def dora_parts(layer: DoRALayer) -> Parts:
    # W'·x + b = s ⊙ (W·x + b) + (1 − s) ⊙ b + s ⊙ γ·B·A·x
    s, bias = layer.scale(), getattr(layer.owner[0], "bias", None)
    c = torch.zeros_like(s) if bias is None else (1 - s) * bias[layer.rows]
    return {"A": layer.A, "B": s[:, None] * layer.gamma * layer.B, "s": s, "c": c}


def ia3_parts(layer: IA3Layer) -> Parts:
    l = layer.l.flatten()  # noqa: E741
    return {"l": l} if layer.feedforward else {"s": l, "c": torch.zeros_like(l)}


PARTS = {LoRALayer: lora_parts, DoRALayer: dora_parts, IA3Layer: ia3_parts}


@torch.no_grad()
def parts_of(layers: Sequence[Layer]) -> dict[str, Parts]:
    """{path: parts} of an adapter; the slices of one module together, in its full width."""
    found: dict[str, Parts] = {}
    for layer in layers:
        if type(layer) not in PARTS:
            raise ValueError(f"it holds a {type(layer).__name__}; a bank serves LoRA, DoRA and (IA)³ per row.")
        new, here = {key: part.detach() for key, part in PARTS[type(layer)](layer).items()}, found.get(layer.path)
        if any(layer.padding):
            if "l" in new:
                raise ValueError(f"it scales the inputs of a slice of {layer.path!r}, which is not done per row.")
            for key in new.keys() - {"A", "T"}:
                sides = (0, 0, *layer.padding) if key == "B" else layer.padding
                new[key] = F.pad(new[key], sides, value=NEUTRAL[key])
        if here is not None:  # the ranks of slices lie side by side; s is 1 and c is 0 outside a slice
            joined = {"A": lambda a, b: torch.cat([a, b]), "s": torch.mul, "c": torch.add}
            joined["B"] = joined["T"] = lambda a, b: torch.cat([a, b], dim=1)
            new = {key: joined[key](here[key], part) for key, part in new.items()}
        found[layer.path] = {key: part.contiguous() for key, part in new.items()}
    return found
