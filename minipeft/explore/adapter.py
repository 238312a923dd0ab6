"""The adapter explorer: move the bottleneck and watch the pocket model being trained again."""

from __future__ import annotations

from minipeft.explore.training import TrainingExplorer, choice, slider
from minipeft.methods.adapter import PLACEMENTS, Adapter

SHARING = {"none": (1, False), "within a block": (1, True), "2 blocks": (2, False), "all blocks": (10**6, True)}


class AdapterExplorer(TrainingExplorer):
    """Live bottleneck adapters on the pocket model: loss against the task's exact floor, and by numbers trained."""

    name = "adapter"
    rates = {"pirate": 1e-2, "flip": 3e-3, "cipher": 1e-2}  # steady at bottleneck 16

    def __init__(self, model=None, task: str = "pirate"):
        knobs = {
            "bottleneck": slider("bottleneck m", [1, 2, 4, 8, 16, 32, 64], 8),
            "placement": choice("placement", list(PLACEMENTS)),
            "sharing": choice("sharing", list(SHARING)),
        }
        super().__init__(model, task, knobs)

    def method(self, bottleneck: int, placement: str, sharing: str) -> Adapter:
        share, within = SHARING[sharing]
        return Adapter(bottleneck, placement, share=share, share_within=within)

    def title(self, bottleneck: int, placement: str, sharing: str) -> str:
        return f"m={bottleneck}, {placement}" + ("" if sharing == "none" else f", shared: {sharing}")

    def formula(self, bottleneck: int, placement: str, sharing: str) -> str:
        layers = list(self.tuned.adapters["default"].values())
        m, d, apart = bottleneck, layers[0].down.in_features, len(layers)
        each = f"2dm + m + d = 2·{d}·{m} + {m} + {d} = {2 * d * m + m + d:,}"
        return f"{apart} adapter{'s' if apart > 1 else ''} of {each}"
