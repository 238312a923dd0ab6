"""The rank explorer: cut a learnt ΔW to its strongest directions and see what the model loses."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from functools import cached_property

import ipywidgets
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minipeft.analyze.spectrum import Spectrum, marchenko_pastur, similarity, spectra, truncated
from minipeft.attach import Tuned
from minipeft.explore.slider import BLUE, GREEN, GREY, ORANGE, SliderPlot
from minipeft.explore.training import STYLE, slider
from minipeft.learn.fit import evaluate
from minipeft.world.tasks import Task

RANKS = (0, 1, 2, 4, 8, 16, 32, 64, 128)


class RankExplorer(SliderPlot):
    """A slider over the rank that is kept of every ΔW of a trained model, with the model's loss measured at each.

    `losses` {rank: loss in nats a token on the first `n` test rows} is measured when a rank is first asked for; rank 0
    keeps the changes of vectors (biases, norms) only. `whole` is the loss with all of ΔW, `before` the base's.
    """

    apart = False  # it changes the model, which cells use too

    def __init__(self, tuned: Tuned, task: Task, path: str | None = None, n: int = 50):
        self.tuned, self.task, self.n = tuned, task, n
        self.found = spectra(tuned)
        if not self.found:
            raise ValueError("The active adapter changes no matrix, so there is no rank to cut; use LoRA or Full.")
        linear = [p for p in self.found if "layers" in p] or list(self.found)
        if path not in (None, *linear):
            raise ValueError(f"The adapter changes no {path!r}; {linear[-1]!r} is one that it changes.")
        self.losses: dict[int, float] = {}
        most = max(len(s.sigma) for s in self.found.values())
        controls = {
            "rank": slider("directions kept r", [r for r in RANKS if r <= most], min(8, most)),
            "path": ipywidgets.Dropdown(
                options=linear, value=path or linear[-1], description="spectrum of", style=STYLE,
                layout=ipywidgets.Layout(width="32em"),
            ),
        }  # fmt: skip
        super().__init__(self._draw, controls)

    @cached_property
    def whole(self) -> float:
        return evaluate(self.tuned, self.task, n=self.n).loss

    @cached_property
    def before(self) -> float:
        with self.tuned.disabled():
            return evaluate(self.tuned, self.task, n=self.n).loss

    def loss(self, rank: int) -> float:
        """The task loss with every ΔW cut to its best rank `rank`, measured once."""
        if rank not in self.losses:
            with truncated(self.tuned, rank, self.found):
                self.losses[rank] = evaluate(self.tuned, self.task, n=self.n).loss
        return self.losses[rank]

    def lacking(self, rank: int, path: str) -> list[Callable[[], object]]:
        return [] if rank in self.losses and self._levels() else [lambda: (self.loss(rank), self.whole, self.before)]

    def _levels(self) -> dict[str, float]:
        """`whole` and `before`, where they have been measured."""
        return {name: vars(self)[name] for name in ("whole", "before") if name in vars(self)}

    def _draw(self, figure: Figure, rank: int, path: str) -> str:
        left, right = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.07, right=0.985, top=0.9, bottom=0.14, wspace=0.2)
        s = self.found[path]
        draw_spectrum(left, s, rank)
        left.set_title(path.removeprefix("model."))
        right.set_title(f"{self.task.name}: loss with ΔW cut to rank r everywhere")
        draw_truncation(right, self.losses, self._levels(), self.task.floor, rank)
        if self.lacking(rank, path):
            return "being measured …"
        loss = self.losses[rank]
        kept = s.energy[rank - 1].item() if rank else 0.0
        return (
            f"rank {rank} keeps {100 * kept:.0f} % of this ΔW's energy; loss {loss:.3f}, with all {self.whole:.3f}"
            f"<br>{html.escape(path)}: effective rank {s.effective_rank:.1f}, stable rank {s.stable_rank:.1f}"
        )


def draw_spectrum(axes, s: Spectrum, rank: int = 0) -> None:
    """σᵢ of one ΔW, what random entries of the same norm would have, and the rank that is kept."""
    i = np.arange(1, len(s.sigma) + 1)
    axes.plot(i, s.sigma.cpu(), color=BLUE, linewidth=2, label="σᵢ of ΔW")
    chance = marchenko_pastur(s.shape, s.norm)
    axes.plot(np.arange(1, len(chance) + 1), chance, "--", color=GREY, label="random matrix of this norm")
    if rank:
        axes.axvspan(0.9, rank, color=ORANGE, alpha=0.25, label=f"kept: r = {rank}")
    axes.set(xscale="log", xlabel="i", ylabel="singular value σᵢ", ylim=(0, None))
    axes.minorticks_off()
    axes.legend(fontsize="small", loc="upper right")


def draw_truncation(axes, losses: dict[int, float], levels: dict[str, float], floor: float | None, rank: int) -> None:
    """Loss by rank kept; rank 0 stands at ½ on the logarithmic axis. `levels`: with "whole" ΔW, and "before" it."""
    ranks = sorted(losses)
    axes.plot([max(r, 0.5) for r in ranks], [losses[r] for r in ranks], "o-", color=BLUE, label="measured so far")
    if rank in losses:
        label = f"r = {rank}: {losses[rank]:.3f}"
        axes.plot([max(rank, 0.5)], [losses[rank]], "D", color=ORANGE, markersize=9, label=label)
    if "whole" in levels:
        axes.axhline(levels["whole"], color=BLUE, linestyle=":", label=f"all of ΔW {levels['whole']:.3f}")
    if "before" in levels:
        axes.axhline(levels["before"], color=GREY, linestyle="--", label=f"base {levels['before']:.3f}")
    if floor is not None:
        axes.axhline(floor, color=GREEN, linestyle=(0, (6, 2)), label=f"floor {floor:.3f}")
    axes.set(xscale="log", xlim=(0.4, 160), xlabel="r", ylabel="test loss (nats a token)")
    axes.set_xticks([0.5, 1, 4, 16, 64], ["0", "1", "4", "16", "64"])
    axes.minorticks_off()
    axes.legend(fontsize="small", loc="upper right")


def draw_similarity(figure: Figure, pairs: Sequence[tuple[str, Spectrum, Spectrum]], labels=("i", "j")) -> None:
    """φ(i, j) of the input directions V of pairs of updates as heat maps with one scale; `pairs` (title, X, Y)."""
    panels = figure.subplots(1, len(pairs), squeeze=False)[0]
    for axes, (title, X, Y) in zip(panels, pairs, strict=True):
        phi = similarity(X.V, Y.V).cpu()
        m, n = phi.shape
        picture = axes.imshow(phi, origin="lower", vmin=0, vmax=1, cmap="cividis", extent=(0.5, n + 0.5, 0.5, m + 0.5),
                              aspect="auto")  # fmt: skip
        axes.set(title=title, xlabel=labels[1], ylabel=labels[0])
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(picture, ax=list(panels), label="φ(i, j)")
