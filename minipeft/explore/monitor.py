"""The opinion monitor as a page: sentences come in, and an alarm says when opinion has turned.

python -m voila docs/opinion_monitor.ipynb
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import ipywidgets
from matplotlib.figure import Figure

from minipeft.course import monitor
from minipeft.explore.slider import BLUE, GREY, ORANGE, SliderPlot

LATEST = 4  # sentences that are shown


class OpinionMonitor(SliderPlot):
    """How negative each batch is, the alarms, and the latest sentences, at any moment of a stream.

    `p`: p(positive) of each sentence; `labels`: what people said; `texts`: the sentences. λ begins at `threshold`.
    `now` is the batch that came last: whatever lies behind it is not known yet, and is not drawn. The share of positive
    sentences turns at batch TURN to what the second control says. The text states the false alarms of this λ.

    Raises ValueError for lists of unequal length.
    """

    def __init__(self, p: Sequence[float], labels: Sequence[int], texts: Sequence[str], threshold: float = 1.0):
        if not len(p) == len(labels) == len(texts):
            found = f"{len(p)} scores, {len(labels)} labels and {len(texts)} texts"
            raise ValueError(f"There are {found}: give one for each.")
        self.p, self.labels, self.texts = list(p), list(labels), list(texts)  # columns of a data set are slow
        self.calm = [monitor.values(self.p, each) for each in monitor.streams(self.labels, monitor.calm())]
        style = {"description_width": "initial"}
        shares = [(f"{share:.0%}", share) for share in (0.2, 0.4, 0.55, monitor.HELD, 0.9)]
        controls = {
            "now": ipywidgets.IntSlider(
                monitor.LENGTH, min=5, max=monitor.LENGTH, description="batches so far", style=style
            ),
            "after": ipywidgets.SelectionSlider(
                options=shares, value=monitor.FALLS, description="positive after the turn", style=style
            ),
            "threshold": ipywidgets.SelectionSlider(
                options=monitor.THRESHOLDS, value=threshold, description="alarm at λ =", style=style
            ),
            "stream": ipywidgets.IntSlider(1, min=1, max=9, description="stream", style=style),
        }
        super().__init__(self._draw, controls, size=(9.6, 3.4))

    def _draw(self, figure: Figure, now: int, after: float, threshold: float, stream: int) -> str:
        drawn = monitor.drawn(self.labels, monitor.turning(after), stream)[:now]
        x, axes = monitor.values(self.p, drawn), figure.subplots()
        raised = monitor.alarms(x, threshold)
        axes.plot(range(now), x, "o-", color=BLUE, markersize=3, linewidth=1, label="read by the model")
        told = [sum(1 - self.labels[i] for i in batch) / len(batch) for batch in drawn]
        axes.plot(range(now), told, ":", color=GREY, label="as people rated it")
        for i, t in enumerate(raised):
            axes.axvline(t, color=ORANGE, linewidth=2, linestyle="--", label=None if i else "alarm")
        if now > monitor.TURN:
            axes.axvline(monitor.TURN - 0.5, color="black", linewidth=1, label="the turn")
        axes.set(xlim=(-1, monitor.LENGTH), ylim=(0, 1), xlabel=f"batch of {monitor.SIZE} tweets", ylabel="negative")
        axes.set_title(f"Alarms at batch {', '.join(map(str, raised))}" if raised else "No alarm so far")
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        figure.subplots_adjust(left=0.07, right=0.8, top=0.9, bottom=0.15)
        mean, low, high = monitor.rate(monitor.false_alarms(self.calm, threshold), sum(map(len, self.calm)))
        said = f"λ = {threshold:g} raises {mean:.1f} false alarms in 1,000 calm batches ({low:.1f} to {high:.1f})."
        latest = [f"{1 - self.p[i]:.2f} negative: {html.escape(self.texts[i])}" for i in drawn[-1][:LATEST]]
        return f"<p>{said}</p><ul>{''.join(f'<li>{each}</li>' for each in latest)}</ul>"


def opinion_monitor() -> OpinionMonitor:
    """The page of the course: test tweets, read by the first of the measured models."""
    found, test = monitor.measured(), monitor.tweets()["test"]
    run, validation = found["runs"][0], monitor.tweets()["validation"]["label"]
    calm = [monitor.values(run["validation"], each) for each in monitor.streams(validation, monitor.calm())]
    return OpinionMonitor(run["test"], test["label"], test["text"], monitor.chosen(calm))
