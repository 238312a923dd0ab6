"""The LoRA explorer: move rank, γ, targets or learning rate and watch the pocket model being trained again."""

from __future__ import annotations

import torch
from matplotlib.ticker import MaxNLocator
from torch.nn import functional as F

from minipeft.explore.runs import singular_values
from minipeft.explore.slider import BLUE, GREY, blank
from minipeft.explore.training import TrainingExplorer, choice, slider
from minipeft.methods.lora import LoRA


class LoRAExplorer(TrainingExplorer):
    """Live LoRA on the pocket model: loss against the task's exact floor, spectrum of ΔW, count, and what it writes."""

    name = "LoRA"
    rates = {"pirate": 1e-2, "flip": 3e-3, "cipher": 1e-2}  # steady at rank 8, γ = 2
    look = staticmethod(singular_values)

    def __init__(self, model=None, task: str = "pirate"):
        knobs = {
            "rank": slider("rank r", [1, 2, 4, 8, 16, 32, 64], 8),
            "gamma": slider("γ", [0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0], 2.0),
            "targets": choice("which layers", ["all-linear", "attention", "mlp"]),
        }
        super().__init__(model, task, knobs)

    def method(self, rank: int, gamma: float, targets: str) -> LoRA:
        return LoRA(rank=rank, gamma=gamma, targets=targets)

    def title(self, rank: int, gamma: float, targets: str) -> str:
        return f"r={rank}, γ={gamma:g}, {targets}"

    def side(self, axes, task: str) -> None:
        if self.seen is None and self.history.losses:  # before the first step B = 0
            self.seen = self.look(self.tuned)
        draw_spectrum(axes, self.seen)


def draw_spectrum(axes, sigma: torch.Tensor | None) -> None:
    """Singular values of γ·B·A, (matrices, r): one thin line a matrix, the median thick. At most r are not zero."""
    axes.set_title("spectrum of ΔW = γ·B·A")
    if sigma is None or not sigma.max() > 0:
        blank(axes, "ΔW = 0" if sigma is None or sigma.max() == 0 else "ΔW is not finite")
        return
    axes.set(xlabel="i", ylabel="singular value σᵢ")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    n, r = sigma.shape
    apart = F.pad(sigma, (0, 1), value=torch.nan)  # so that all are one line, which takes less time
    axes.plot([*range(1, r + 2)] * n, apart.flatten(), color=GREY, linewidth=0.5, marker="." if r == 1 else "")
    axes.plot(range(1, r + 1), sigma.median(0).values, color=BLUE, linewidth=2.5, marker="o", markersize=3)
    axes.set(xlim=(0, r + 1), ylim=(0, 1.2 * sigma.max()))  # whole numbers below, and room for the text
    axes.text(0.97, 0.96, f"{n} matrices, median in blue", ha="right", va="top", transform=axes.transAxes)
