"""The quantisation explorer: choose bits, block and code, and see what a real weight becomes."""

from __future__ import annotations

import ipywidgets
import torch
from matplotlib.figure import Figure

from minipeft.explore.slider import BLUE, GREY, ORANGE, RED, SliderPlot
from minipeft.explore.training import choice, slider
from minipeft.methods import nf4
from minipeft.targets import flipped, resolve

# sign, exponent and mantissa bits of the small floats: E1M0 (2 bits), E2M0, E2M1 (FP4), …, E4M3 (FP8)
FLOATS = {2: (1, 0), 3: (2, 0), 4: (2, 1), 5: (2, 2), 6: (2, 3), 7: (3, 3), 8: (4, 3)}
CODES = {
    "normal float": nf4.normal_float,
    "integer": nf4.integer,
    "float": lambda bits: nf4.floating(*FLOATS[bits]),
}


class QuantisationExplorer(SliderPlot):
    """One linear weight of `model` under any code of 2 to 8 bits: its values beside the code's, and the error.

    Blocks are normalised by their largest value, so the histogram shows w/absmax, between −1 and 1, and the code's
    values as ticks below it. `path` names the layer; the default is the middle one of all.
    """

    def __init__(self, model, path: str | None = None):
        targets = resolve(model, "all-linear")
        chosen = {target.path: target.module for target in targets}
        self.path = targets[len(targets) // 2].path if path is None else path
        if self.path not in chosen:
            raise ValueError(f"{self.path!r} is no linear layer of this model; {targets[0].path!r} is one.")
        module = chosen[self.path]
        self.weight = (module.weight.T if flipped(module) else module.weight).detach().float()
        controls = {
            "bits": slider("bits a code", list(range(2, 9)), 4),
            "block": slider("block size", [16, 32, 64, 128, 256, 1024, 4096], 64),
            "code": choice("code", list(CODES)),
            "double": ipywidgets.Checkbox(value=True, description="quantise the scales too"),
        }
        super().__init__(self._draw, controls)

    def _draw(self, figure: Figure, bits: int, block: int, code: str, double: bool) -> str:
        return draw_quantisation(figure, self.weight, bits, block, code, double, title=self.path)


def draw_quantisation(
    figure: Figure, weight: torch.Tensor, bits=4, block=64, code="normal float", double=True, title=""
) -> str:
    """Draws one weight and its error under a code; returns the figures in words."""
    q = nf4.quantize(weight, CODES[code](bits), block, double)
    error = q.dequantize() - weight
    relative, limit = (error.norm() / weight.norm()).item(), 2.5 * weight.std().item()
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.07, right=0.985, top=0.9, bottom=0.15, wspace=0.2)
    draw_code(left, weight, q.code, block)
    left.set_title(f"{title or 'weights'}: {code}, {bits} bits", fontsize="medium")
    stairs(right, weight, limit, color=GREY, linewidth=1.5, label="weight w")
    stairs(right, error, limit, color=ORANGE, fill=True, alpha=0.8, label="error ŵ − w")
    right.set(xlabel="value", ylabel="density (cut off at the top)", xlim=(-limit, limit), ylim=(0, 4 / limit))
    right.set_title(f"error: {100 * relative:.2f} % of the weights' size", fontsize="medium")
    right.legend(fontsize="small", loc="upper right")
    return (
        f"<b>{q.bits():.3f} bits a parameter</b> stored, scales included ({len(q.code)} values, blocks of {block}); "
        f"‖ŵ − w‖ / ‖w‖ = {relative:.4f}; largest error {error.abs().max():.4f}"
    )


def stairs(axes, values: torch.Tensor, limit: float, **style) -> None:
    """A histogram of 100 bins as a density, counted by torch: ten times faster than `axes.hist`."""
    counts = torch.histc(values, 100, -limit, limit) / values.numel() * 100 / (2 * limit)
    axes.stairs(counts.numpy(), torch.linspace(-limit, limit, 101).numpy(), **style)


def draw_code(axes, weight: torch.Tensor, code: nf4.Code, block: int) -> None:
    """How the normalised weights spread, and where the code's values lie."""
    whole = weight.flatten()[: weight.numel() // block * block].view(-1, block)
    unit = (whole / whole.abs().amax(1, keepdim=True).clamp(min=1e-38)).flatten()
    stairs(axes, unit, 1.0, color=BLUE, fill=True, alpha=0.6)
    top = axes.get_ylim()[1]
    axes.vlines(code, -0.12 * top, 0, color=RED, linewidth=1.2 if len(code) < 40 else 0.3)
    axes.set(xlabel="w / largest |w| of its block; red: the code's values", ylabel="density", xlim=(-1.05, 1.05))
    axes.set_ylim(-0.12 * top, top)
