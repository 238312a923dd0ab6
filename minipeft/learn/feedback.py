"""Subtasks put together: one LoRA for each, every one with a slider.

    θ_new = θ_old + Σ_s α_s·Δθ_s

One of the course's source documents calls this, with reinforcement learning and human feedback before it, "LoRA". It is
neither LoRA nor a gradient step: it is a sum of finished changes (Ilharco et al. 2022, "task arithmetic"). The changes
come from `policy.improve`, with rewards from `reward.fit_reward` or exact ones.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

from minipeft.attach import Tuned
from minipeft.merging import merged


@contextlib.contextmanager
def integrated(tuned: Tuned, alphas: Mapping[str, float]) -> Iterator[Tuned]:
    """Within it, the model computes with W_old + Σ_s α_s·ΔW_s, summed in float32 and rounded once.

    `alphas`: {adapter: α}; those not named count as 0. All zero is the base bit for bit, and a single α of 1 is that
    adapter merged, bit for bit. Works for whatever changes weights (LoRA and its relatives).

    Raises ValueError for an unknown adapter, an α that is no number, and an adapter that changes no weight.
    """
    tuned.check_open("integrate")
    scaled = []
    for name, alpha in alphas.items():
        if name not in tuned.adapters:
            raise ValueError(f"There is no adapter {name!r}; this model carries {list(tuned.adapters)}.")
        if not math.isfinite(alpha):
            raise ValueError(f"α of {name!r} is {alpha}, and must be a finite number, such as 1.0.")
        layers = list(tuned.adapters[name].values())
        if replacing := [layer.path for layer in layers if layer.slots]:
            raise ValueError(f"{name!r} replaces {replacing[0]} instead of adding to it, so it takes no α.")
        scaled += [(layer, alpha) for layer in layers if alpha != 0]
    with tuned.using({}):
        weights, _ = merged(tuned.base, scaled)
        with tuned.installed(weights):
            yield tuned
