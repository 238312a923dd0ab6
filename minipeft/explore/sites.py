"""Two explorers of clients that trained apart: what six rules make of their adapters, and what privacy costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from minipeft.explore.slider import BLUE, GREY, ORANGE, SliderPlot
from minipeft.explore.training import choice, slider
from minipeft.learn.averaging import RULES, Pair, mean_product, shares
from minipeft.learn.federated import Update, made, pairs


class SitesExplorer(SliderPlot):
    """How far each rule's next model is from the mean of the clients' changes, and what it makes every client receive.

    `updates`: {label: what the clients sent after training A and B}; the labels are the choices of the first control.
    """

    def __init__(self, updates: Mapping[str, Sequence[Update]]):
        self.updates = updates
        most = min(len(each) for each in updates.values())
        controls = {
            "which": choice("clients", list(updates)),
            "clients": slider("how many", list(range(1, most + 1)), most),
            "rank": slider("FlexLoRA cuts to rank", [1, 2, 4, 8, 16], 4),
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
    # as they are, and as if A had never trained: all clients have the first one's
    kinds = {False: targets, True: [[(each[0][0], B) for _, B in each] for each in targets]}
    means = {shared: [mean_product(each, weights) for each in given] for shared, given in kinds.items()}
    for name, rule in RULES.items():
        shared, apart, whole, numbers = "A" not in rule.trains(0), 0.0, 0.0, 0
        for given, wanted in zip(kinds[shared], means[shared], strict=True):
            made_ = made(rule.combine(given, weights, min(rank, *wanted.shape)), wanted)
            apart += (made_ - wanted).square().sum().item()
            whole += wanted.square().sum().item()
            numbers += rule.sent(tuple(wanted.shape), len(given[0][0]), len(updates), 0)[1]
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


class PrivacyExplorer(SliderPlot):
    """The loss that is left when every site clips what it sends and adds noise, over the ε that this promises.

    `found`, which `course.worlds` measured: {"runs": [{rank, exponent, seed, loss}], "epsilon": {exponent: ε}, …}; a
    site's noise is σ = 10^exponent. The runs have `clients` sites. The noise of a mean of n sites is σ/√n, so with
    100^m times the sites, whose mean change is taken to be the same, a run belongs to a σ that is 10^m larger.
    """

    def __init__(self, found: Mapping, before: float, floor: float):
        self.found, self.before, self.floor = found, before, floor
        measured = sorted({run["exponent"] for run in found["runs"]} - {None})
        noises = [(f"{10**k:.3g}", k) for k in sorted(map(float, found["epsilon"]))]
        sites = [(f"{found['clients'] * 100**m:,}", m) for m in range(4)]
        controls = {
            "more": slider("sites", sites, 0),
            "noise": slider("each adds noise σ =", noises, measured[-1]),
        }
        super().__init__(self._draw, controls)

    def _draw(self, figure: Figure, more: int, noise: float) -> str:
        return draw_privacy(figure, self.found, self.before, self.floor, more, noise)


def draw_privacy(figure: Figure, found: Mapping, before: float, floor: float, more: int, noise: float) -> str:
    """Loss over ε with 100^`more` times the sites that trained, and a mark where each site's σ is 10^`noise`;
    returns what is marked in words."""
    axes, said = figure.subplots(), []
    figure.subplots_adjust(left=0.07, right=0.8, top=0.9, bottom=0.15)
    sites, spent = found["clients"] * 100**more, {float(k): value for k, value in found["epsilon"].items()}
    ranks = sorted({run["rank"] for run in found["runs"]})
    for rank, colour, style in zip(ranks, (BLUE, ORANGE), ("o-", "s--"), strict=False):
        losses: dict[int | None, list[float]] = {}
        for run in found["runs"]:
            if run["rank"] == rank:
                losses.setdefault(run["exponent"], []).append(run["loss"])
        known = [k for k in losses if k is not None and k + more in spent]
        x, mean = [spent[k + more] for k in known], [statistics.fmean(losses[k]) for k in known]
        low, high = ([f(losses[k]) for k in known] for f in (min, max))
        axes.plot(x, mean, style, color=colour, label=f"rank {rank}")
        axes.fill_between(x, low, high, color=colour, alpha=0.15)
        plain = "clipped, no noise" if rank == ranks[0] else None
        axes.axhline(statistics.fmean(losses[None]), color=colour, linewidth=1, linestyle=":", label=plain)
        here = losses.get(noise - more)
        said.append(f"rank {rank}: " + (f"{statistics.fmean(here):.2f} nats" if here else "not measured"))
        if here:
            y = statistics.fmean(here)
            axes.plot([spent[noise]], [y], "D", color=colour, markersize=11, markerfacecolor="none")
    axes.axvline(spent[noise], color=GREY, linewidth=1)
    axes.axhline(before, color=GREY, linestyle="--", label="the base")
    axes.axhline(floor, color="black", linewidth=1, label="floor")
    axes.set(xscale="log", xlabel="ε of a site: the smaller, the better it is hidden")
    axes.minorticks_off()
    axes.set_ylabel("loss (nats a token)")
    axes.set(ylim=(0, 1.15 * max(before, *(run["loss"] for run in found["runs"] if run["loss"] < 2 * before))))
    axes.set_title(f"{sites:,} sites, each with noise σ = {10**noise:.3g}: ε = {spent[noise]:.3g}", fontsize="medium")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return "; ".join(said) + f"; the base has {before:.2f} nats."
