"""Calibration: is a classifier right as often as it says?

A guess has a confidence, the largest probability. Guesses are put into M bins of equal width by their confidence;
confidence and accuracy of a bin are means over its n_b guesses:

    ECE = Σ_b (n_b / n) · |accuracy_b − confidence_b|          0 for a classifier that knows how often it is right

Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", §2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Bin(NamedTuple):
    n: int
    confidence: float
    accuracy: float


def reliability(confidence: Sequence[float], right: Sequence[bool], bins: int = 10) -> list[Bin]:
    """The bins that hold a guess, from low to high confidence; ( b/M, (b+1)/M ] is the b-th.

    Raises ValueError for no guesses, sides of unequal length, and a confidence that does not lie from 0 to 1.
    """
    if not len(confidence) or len(confidence) != len(right):
        raise ValueError(f"There are {len(confidence)} confidences and {len(right)} guesses: give one for each.")
    if wrong := [c for c in confidence if not 0 <= c <= 1]:
        raise ValueError(f"A confidence is a probability, from 0 to 1, but one is {wrong[0]!r}.")
    held: dict[int, list[tuple[float, bool]]] = {}
    for c, hit in zip(confidence, right, strict=True):
        held.setdefault(max(0, math.ceil(c * bins) - 1), []).append((c, bool(hit)))
    return [
        Bin(len(each), sum(c for c, _ in each) / len(each), sum(hit for _, hit in each) / len(each))
        for _, each in sorted(held.items())
    ]


def calibration_error(found: Sequence[Bin]) -> float:
    """The expected calibration error of what `reliability` found."""
    return sum(b.n * abs(b.accuracy - b.confidence) for b in found) / sum(b.n for b in found)
