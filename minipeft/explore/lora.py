"""The LoRA explorer: move rank, γ, targets or learning rate and watch the pocket model being trained again."""

from __future__ import annotations

import torch
from matplotlib.ticker import MaxNLocator

from minipeft.analyze.spectrum import spectra
from minipeft.attach import Tuned
from minipeft.explore.slider import BLUE, GREY
from minipeft.explore.training import TrainingExplorer, choice, slider
from minipeft.methods.lora import LoRA


class LoRAExplorer(TrainingExplorer):
    """Live LoRA on the pocket model: loss against the task's exact floor, spectrum of ΔW, count, and what it writes."""

    name = "LoRA"
    rates = {"pirate": 1e-2, "flip": 3e-3, "cipher": 1e-2}  # steady at rank 8, γ = 2

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
        draw_spectrum(axes, self.tuned if self.history.losses else None)  # before the first step B = 0


def draw_spectrum(axes, tuned: Tuned | None) -> None:
    """Singular values of γ·B·A: one thin line a matrix, the median thick. At most r of them are not zero."""
    axes.set(title="spectrum of ΔW = γ·B·A", xlabel="i", ylabel="singular value σᵢ")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    values = [] if tuned is None else [each.sigma.cpu() for each in spectra(tuned).values()]
    if not values or not any(v.max() > 0 for v in values):
        axes.text(0.5, 0.5, "ΔW = 0", ha="center", va="center", transform=axes.transAxes)
        return
    for v in values:
        axes.plot(range(1, len(v) + 1), v, color=GREY, linewidth=0.5, marker="." if len(v) == 1 else "")
    median = torch.stack(values).median(0).values
    axes.plot(range(1, len(median) + 1), median, color=BLUE, linewidth=2.5, marker="o", markersize=3)
    axes.set_ylim(bottom=0)
    axes.text(0.97, 0.95, f"{len(values)} matrices, median in blue", ha="right", va="top", transform=axes.transAxes)
