"""How a learner's answers to the assignment `worlds` are called."""

from __future__ import annotations

from minipeft.course.drives.promises import owned


def product(function, *args) -> dict:
    """An answer that returns two factors (A, B): their shapes and types, and what they multiply to."""
    A, B = function(*args)
    owned((A, B), args)
    shapes = {"A": (tuple(A.shape), str(A.dtype)), "B": (tuple(B.shape), str(B.dtype))}
    return shapes | {"B·A": B @ A if A.ndim == B.ndim == 2 and B.shape[1] == len(A) else None}
