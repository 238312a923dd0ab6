"""How a learner's answers to the assignment `worlds` are called."""

from __future__ import annotations

import torch

from minipeft.course.drives.promises import owned


def halves(function, *args) -> dict:
    """The same of two factors of which each has half of every σ, so that A·Aᵀ is Bᵀ·B."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    seen = product(lambda *given: found.append(function(*given)) or found[0], *args)
    (A, B), size = found[0], 0.0
    if seen["B·A"] is not None:
        size = (A @ A.T - B.T @ B).abs().max() / (A.norm() * B.norm()).clamp(min=torch.finfo(A.dtype).tiny)
    return seen | {"√σ is in each of the two factors": bool(size < 1e-3)}


def product(function, *args) -> dict:
    """An answer that returns two factors (A, B): their shapes and types, and what they multiply to."""
    A, B = function(*args)
    owned((A, B), args)
    shapes = {"A": (tuple(A.shape), str(A.dtype)), "B": (tuple(B.shape), str(B.dtype))}
    return shapes | {"B·A": B @ A if A.ndim == B.ndim == 2 and B.shape[1] == len(A) else None}
