"""What a training run does, said once: every loop of the course takes a `Plan`."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("constant", "linear")


@dataclass(frozen=True)
class Plan:
    """`steps` of AdamW without weight decay at learning rate `lr`, each on a batch of `batch` rows.

    The order of the rows and every dropout mask follow from `seed`. `schedule`: "constant", or "linear", which rises
    over the first tenth of the steps and then falls to 0.

    Raises ValueError for a number that is not positive and for an unknown schedule.
    """

    steps: int = 60
    lr: float = 1e-2
    batch: int = 16
    seed: int = 0
    schedule: str = "constant"

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, but is {value!r}.")
        if not (isinstance(self.lr, int | float) and math.isfinite(self.lr) and self.lr > 0) or self.lr is True:
            raise ValueError(f"lr must be a positive number, but is {self.lr!r}.")
        if not isinstance(self.seed, int) or abs(self.seed) >= 2**32:
            raise ValueError(f"seed must be a whole number below 2**32, but is {self.seed!r}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f'schedule is "constant" or "linear", but is {self.schedule!r}.')

    def share(self, step: int) -> float:
        """The share of the learning rate that `step` (from 0) takes."""
        if self.schedule == "constant":
            return 1.0
        warm = max(1, self.steps // 10)
        return min((step + 1) / warm, (self.steps - step) / max(1, self.steps - warm))
