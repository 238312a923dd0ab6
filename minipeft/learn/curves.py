"""The losses of runs as one picture, with what it shows said in words below it."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES = (("-", "#0072b2"), ("--", "#d55e00"), ("-.", "#009e73"), (":", "#cc79a7"), ((0, (6, 1, 1, 1)), "#555555"))


@dataclass(frozen=True)
class Picture:
    """A matplotlib `figure`, and `words` that say what it shows: its text for who cannot see it."""

    figure: Figure
    words: str

    def save(self, path: str | Path) -> None:
        """Writes it, as PNG, SVG or PDF by the name's ending."""
        self.figure.savefig(path)

    def _repr_html_(self) -> str:
        png = io.BytesIO()
        self.figure.savefig(png, format="png", dpi=100, facecolor="white")
        image, words = base64.b64encode(png.getvalue()).decode(), escape(self.words, quote=True)
        return (
            f'<figure><img alt="{words}" src="data:image/png;base64,{image}"><figcaption>{words}</figcaption></figure>'
        )

    def __repr__(self) -> str:
        return f"Picture({self.words})"


def curves(runs: Sequence[tuple[str, Sequence[float]]], floor: float | None = None) -> Picture:
    """Draws {label: losses, one a step, in nats a token}, five at most, smoothed over ten steps, and thin as it is.

    `floor`: the least loss that is possible, as `task.floor` says. ValueError for a run without a step, for more than
    five, and for labels that are given twice.
    """
    from matplotlib.figure import Figure

    labels = [label for label, _ in runs]
    if len(runs) > len(STYLES) or len(set(labels)) < len(labels):
        raise ValueError(f"A picture holds up to {len(STYLES)} runs, each with a label of its own, not {labels}.")
    if empty := next((label for label, losses in runs if not losses), None):
        raise ValueError(f"The run {empty!r} has no step to draw; fit() gives a history with steps.")
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for (label, losses), (line, colour) in zip(runs, STYLES, strict=False):
        steps = range(1, len(losses) + 1)
        smooth = [statistics.fmean(losses[max(0, i - 10) : i]) for i in steps]
        axes.plot(steps, losses, color=colour, linewidth=0.6, alpha=0.4)
        axes.plot(steps, smooth, linestyle=line, color=colour, linewidth=2, label=f"{label}: {smooth[-1]:.3f}")
    if floor is not None:
        axes.axhline(floor, color="black", linewidth=0.8, label=f"floor: {floor:.3f}")
    ends = {label: statistics.fmean(losses[-10:]) for label, losses in runs}
    best = min(ends, key=ends.get)
    title = f"The loss ends at {ends[best]:.3f}"
    if len(runs) > 1:
        title += f" with {best}, at {max(ends.values()):.3f} with {max(ends, key=ends.get)}"
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.legend(title="mean of the last ten batches")
    each = "; ".join(
        f"{label} from {losses[0]:.3f} to {ends[label]:.3f} in {len(losses)} steps" for label, losses in runs
    )
    under = "" if floor is None else f" The floor is {floor:.3f}."
    return Picture(figure, f"Loss in nats a token by step, at the end as the mean of ten batches: {each}.{under}")
