"""The memory calculator: what training a real model takes, by precision, optimizer and rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from matplotlib.figure import Figure

from minipeft.analyze.budget import MOMENTS, PRECISIONS, Budget, budget, training_bytes
from minipeft.analyze.catalogue import SIZES
from minipeft.explore.slider import BLUE, GREEN, GREY, ORANGE, SliderPlot
from minipeft.explore.training import choice, slider
from minipeft.methods.lora import LoRA

MODELS = ("gpt2-xl", "llama-7b", "llama-3-8b", "llama-65b", "llama-3-70b", "gpt3-175b", "llama-3.1-405b")
CARDS = {"24 GB": 24e9, "80 GB": 80e9}  # two usual sizes of an accelerator's memory


class MemoryCalculator(SliderPlot):
    """Bytes for weights, gradients and optimizer state of sampling, LoRA on all linear layers and full fine-tuning.

    Exact counts on the meta device and plain arithmetic of bytes per number; activations are left out.
    """

    def __init__(self, model: str = "llama-7b"):
        if model not in MODELS:
            raise ValueError(f"model is {str(model)[:40]!r}; the calculator knows the shapes of {', '.join(MODELS)}.")
        self.budgets: dict[tuple[str, int], Budget] = {}
        controls = {
            "model": choice("model", MODELS, model),
            "precision": choice("base in", list(PRECISIONS), "bfloat16"),
            "optimizer": choice("optimizer", list(MOMENTS), "adam"),
            "rank": slider("rank r", [1, 2, 4, 8, 16, 32, 64, 128, 256], 8),
        }
        super().__init__(self._draw, controls)

    def budget(self, model: str, rank: int) -> Budget:
        """The count, made once for each model and rank."""
        if (model, rank) not in self.budgets:
            self.budgets[model, rank] = budget(model, LoRA(rank=rank))
        return self.budgets[model, rank]

    def lacking(self, model: str, rank: int, **_) -> list[Callable[[], object]]:
        return [] if (model, rank) in self.budgets else [partial(self.budget, model, rank)]

    def _draw(self, figure: Figure, model: str, precision: str, optimizer: str, rank: int) -> str:
        b = self.budgets.get((model, rank))
        base = b.base if b else SIZES.get(model)  # until it is counted, where its publisher says it
        full = "bfloat16" if PRECISIONS[precision] < 2 else precision  # 8 and 4 bits cannot train
        rows = {
            f"full, {full}": base and training_bytes(base, base, 0, full, optimizer),
            f"LoRA r={rank} over {precision}": b and training_bytes(base, *[b.trainable] * 2, precision, optimizer),
            f"sampling, {precision}": base and {"weights": round(base * PRECISIONS[precision])},
        }
        axes = figure.subplots()
        figure.subplots_adjust(left=0.22, right=0.97, top=0.9, bottom=0.16)
        parts = {"weights": (BLUE, ""), "gradients": (ORANGE, "//"), "moments": (GREEN, "..")}
        for y, values in enumerate(rows.values()):
            left = 0.0
            for part, (colour, hatch) in parts.items():
                size = (values or {}).get(part, 0) / 1e9
                axes.barh(y, size, left=left, color=colour, hatch=hatch, label=part if y == 0 else None)
                left += size
            axes.text(left, y, f" {left:,.1f} GB" if values else " …", va="center", bbox={"color": "white", "pad": 0.5})
        for name, size in CARDS.items():
            axes.axvline(size / 1e9, color=GREY, linestyle="--", linewidth=1)
            axes.text(size / 1e9, 2.65, f" {name} card", color=GREY, fontsize="small", va="center", clip_on=True)
        axes.set_yticks(range(3), list(rows))
        axes.set(xlabel="GB, without activations; weights with their float32 master copy", ylim=(-0.5, 2.85))
        if base:
            axes.set(xlim=(0, 1.15 * sum(next(iter(rows.values())).values()) / 1e9))
        axes.set_title(f"{model}: {base:,} numbers" if base else model)
        axes.legend(fontsize="small", loc="center right")
        return f"LoRA trains {b or '…'}"
