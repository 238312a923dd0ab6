"""The sites explorer: clients that trained apart, and what six rules make of their adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ipywidgets
from matplotlib.figure import Figure

from minipeft.explore.slider import BLUE, ORANGE, SliderPlot
from minipeft.learn.averaging import RULES, Pair, mean_product, shares
from minipeft.learn.federated import Update, made, pairs


class SitesExplorer(SliderPlot):
    """How far each rule's next model is from the mean of the clients' changes, and what it makes every client receive.

    `updates`: {label: what the clients sent after training A and B}; the labels are the choices of the first control.
    """

    def __init__(self, updates: Mapping[str, Sequence[Update]]):
        self.updates = updates
        style = {"description_width": "initial"}
        most = min(len(each) for each in updates.values())
        controls = {
            "which": ipywidgets.Dropdown(options=list(updates), description="clients", style=style),
            "clients": ipywidgets.SelectionSlider(
                options=list(range(1, most + 1)), value=most, description="how many", style=style
            ),
            "rank": ipywidgets.SelectionSlider(
                options=[1, 2, 4, 8, 16], value=4, description="FlexLoRA cuts to rank", style=style
            ),
        }
        super().__init__(self._draw, controls)

    def _draw(self, figure: Figure, which: str, clients: int, rank: int) -> str:
        return draw_rules(figure, self.updates[which][:clients], rank, which)


def draw_rules(figure: Figure, updates: Sequence[Update], rank: int, title: str) -> str:
    """Two panels, distance and bytes by rule; returns the distances in words."""
    missed, sent = {}, {}
    weights = shares([update.rows for update in updates])
    targets: list[list[Pair]] = [
        [(u.numbers[f"{key}.A"], u.numbers[f"{key}.B"]) for u in updates] for key in pairs(updates[0].numbers)
    ]
    for name, rule in RULES.items():
        shared = "A" not in rule.trains(0)  # as if A had never trained: all clients have the first one's
        apart = whole = numbers = 0.0
        for each in targets:
            given = [(each[0][0], B) for _, B in each] if shared else each
            wanted = mean_product(given, weights)
            made_ = made(rule.combine(given, weights, min(rank, *wanted.shape)), wanted)
            apart += (made_ - wanted).square().sum().item()
            whole += wanted.square().sum().item()
            numbers += rule.sent(tuple(wanted.shape), len(each[0][0]), len(updates), 0)[1]
        missed[name], sent[name] = (apart / whole) ** 0.5 if whole else 0.0, 4 * numbers / 2**20
    left, right = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.1, right=0.96, top=0.86, bottom=0.15, wspace=0.08)
    for axes, values, colour, hatch, form in (
        (left, missed, BLUE, "", "{:.3f}"),
        (right, sent, ORANGE, "//", "{:.2f}"),
    ):
        axes.barh(list(values), list(values.values()), color=colour, hatch=hatch)
        for y, value in enumerate(values.values()):
            axes.text(value, y, " " + form.format(value), va="center")
        axes.set_xlim(0, 1.25 * max(values.values()) or 1)
    left.invert_yaxis()
    left.set(title="distance from the mean change", xlabel="‖made − ΔW*‖ / ‖ΔW*‖")
    right.set(title="sent to every client, a round", xlabel="MiB")
    figure.suptitle(f"{title}: {len(updates)} client{'s' * (len(updates) > 1)}", fontsize="medium")
    return ", ".join(f"{name} {value:.3f}" for name, value in missed.items())
