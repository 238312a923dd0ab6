"""Task arithmetic by hand: a slider for each adapter's weight, and what the sum of them does to the model."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from functools import partial

import ipywidgets
from matplotlib.figure import Figure

from minipeft.attach import Tuned
from minipeft.explore.slider import BLUE, GREEN, GREY, SliderPlot
from minipeft.learn.fit import evaluate
from minipeft.world.base import write
from minipeft.world.corpus import pretty
from minipeft.world.tasks import Task


class MixtureExplorer(SliderPlot):
    """Sliders over the weights w_k of the adapters in `tuned`; the model computes with W + Σ w_k·ΔW_k.

    `losses(**weights)`: {task: loss in nats a token on its first `n` test rows}, measured when first asked for.
    """

    apart = False  # it changes the model, which cells use too

    def __init__(self, tuned: Tuned, tasks: Mapping[str, Task], start: Mapping[str, float], n: int = 20):
        for name, value in dict(start).items():
            if name not in tuned.adapters or not -1 <= value <= 2:
                known = list(tuned.adapters)
                raise ValueError(f"start gives {name!r} the weight {value!r}; it takes −1 to 2 of each of {known}.")
        self.tuned, self.tasks, self.n = tuned, dict(tasks), n
        self.known: dict[tuple, dict[str, float]] = {}
        self.written: dict[tuple, str] = {}
        controls = {
            name: ipywidgets.FloatSlider(
                value=value, min=-1, max=2, step=0.25, description=f"w of {name}", continuous_update=False,
                style={"description_width": "initial"},
            )
            for name, value in start.items()
        }  # fmt: skip
        super().__init__(self._draw, controls, size=(9.6, 3.4))

    def losses(self, **weights: float) -> dict[str, float]:
        key = tuple(weights.values())
        if key not in self.known:
            with self.tuned.using(weights):
                self.known[key] = {name: evaluate(self.tuned, task, n=self.n).loss for name, task in self.tasks.items()}
        return self.known[key]

    def write(self, **weights: float) -> str:
        """What the mixture writes."""
        key = tuple(weights.values())
        if key not in self.written:
            with self.tuned.using(weights):
                self.written[key] = pretty(write(self.tuned, self.tuned.tokenizer, temperature=0)[0])
        return self.written[key]

    def lacking(self, **weights: float) -> list[Callable[[], object]]:
        sides = [dict.fromkeys(weights, 0.0), weights]  # the base and the mixture
        new = [partial(self.losses, **each) for each in sides if tuple(each.values()) not in self.known]
        return new if tuple(weights.values()) in self.written else [*new, partial(self.write, **weights)]

    def _draw(self, figure: Figure, **weights: float) -> str:
        base, now = (self.known.get(tuple(each.values()), {}) for each in (dict.fromkeys(weights, 0.0), weights))
        draw_losses(figure.subplots(), base, now, {n: t.floor for n, t in self.tasks.items()}, weights)
        figure.subplots_adjust(left=0.07, right=0.82, top=0.88, bottom=0.1)
        return f"<i>{html.escape(self.written.get(tuple(weights.values()), '…'))}</i>"


def draw_losses(axes, base: dict, now: dict, floors: dict, weights: Mapping[str, float]) -> None:
    """Two bars for each task, the base and the mixture, and the floor of each as a line across them; `base` and `now`
    are empty until they are measured."""
    for i, (name, floor) in enumerate(floors.items()):
        first, loss = i == 0, now.get(name, 0)
        axes.bar(i - 0.2, base.get(name, 0), 0.36, color=GREY, label="the base" if first else None)
        axes.bar(i + 0.2, loss, 0.36, color=BLUE, hatch="//", edgecolor="white", label="the mixture" if first else None)
        if now:
            axes.text(i + 0.2, loss, f"{loss:.2f}", ha="center", va="bottom", fontsize="small")
        if floor is not None:
            axes.hlines(floor, i - 0.42, i + 0.42, color=GREEN, label="floor of the task" if first else None)
    axes.set_xticks(range(len(floors)), list(floors))
    axes.set(ylabel="test loss (nats a token)", ylim=(0, 1.15 * max([*base.values(), *now.values()], default=1)))
    axes.set_title("W + " + " + ".join(f"{w:g}·ΔW({name})" for name, w in weights.items()))
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
