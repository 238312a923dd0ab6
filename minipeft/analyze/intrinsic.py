"""Intrinsic dimension: how many numbers a task needs when they move the weights through a random subspace, see
`methods/subspace.py`."""

from __future__ import annotations

from collections.abc import Mapping


def intrinsic_dimension(losses: Mapping[int, float], before: float, full: float, share: float = 0.9) -> int | None:
    """d₉₀: the least k whose loss recovers at least `share` of full fine-tuning's gain; None if no k tried does.

    (before − loss_k) / (before − full) ≥ share. Raises ValueError when full fine-tuning gained nothing.
    """
    if not full < before:
        raise ValueError(
            f"Full fine-tuning went from {before:g} to {full:g}, so there is no gain to recover a share of."
        )
    return next((k for k in sorted(losses) if before - losses[k] >= share * (before - full)), None)
