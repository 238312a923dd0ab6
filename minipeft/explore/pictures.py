"""The last blocks of ImageNet's network learn digits: what was measured at every rank, and one run live."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from matplotlib.figure import Figure

from minipeft.attach import attach
from minipeft.course import beyond
from minipeft.explore.slider import BLUE, GREY, ORANGE, SliderPlot
from minipeft.explore.training import slider
from minipeft.learn.arrays import evaluate_arrays, training_arrays
from minipeft.learn.fit import History, Score
from minipeft.learn.plan import Plan
from minipeft.learn.protocol import interval
from minipeft.world.pictures import check, few, shown

SEED = 0


class PicturesExplorer(SliderPlot):
    """Rank and pictures a class, on MNIST: accuracy as measured over five seeds, and the run of seed 0 again, live.

    The blocks before the tail are frozen, so what they give is computed once and kept: a run takes seconds. Without the
    packages of `minipeft[beyond]` the measured figures stay and `missing` says why nothing runs.
    """

    REDRAW = 2.0

    def __init__(self) -> None:
        self.part = beyond.measured()["tail"]
        self.history, self.score, self.missing = History(), None, None
        try:
            check()
        except (ModuleNotFoundError, OSError) as error:
            self.missing = str(error)
        controls = {
            "rank": slider("rank", [(str(r), r) for r in beyond.RANKS], 4),
            "n": slider("pictures a class", [(str(n), n) for n in beyond.SIZES], beyond.AT),
        }
        super().__init__(self._draw, controls, None if self.missing else self._train)

    def measured(self, rank: int, n: int) -> list[float]:
        """The test accuracy of each seed."""
        name = f"LoRA r={rank}"
        return [run["test"]["accuracy"] for run in self.part["runs"] if (run["method"], run["n"]) == (name, n)]

    def _train(self, rank: int, n: int) -> Iterator[float]:
        self.history, self.score = History(), None
        yield 0.0
        job = run, rank, n, self.part["rates"][f"LoRA r={rank}"]
        moments = self.elsewhere(*job) if self._mine() else run(*job[1:])
        for history, score in moments:
            self.history, self.score = history, score
            yield len(history.losses) / (beyond.STEPS + 1)

    def grown(self) -> tuple[list[float], str]:
        return self.history.losses, self.text.value

    def _draw(self, figure: Figure, rank: int, n: int) -> str:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        figure.subplots_adjust(left=0.07, right=0.985, top=0.9, bottom=0.14, wspace=0.2)
        losses = self.history.losses
        [line] = left.plot(range(1, len(losses) + 1), losses, ".-", color=BLUE)
        self.growing = line if losses and self.score is None else None
        left.set(xlim=(0, beyond.STEPS + 1), ylim=(0, 2.6), xlabel="step", ylabel="loss of the batch (nats)")
        left.set_title(f"LoRA r={rank} on the last {beyond.BLOCKS} blocks, {n} pictures a class", fontsize="medium")
        if not losses:
            why = "nothing runs here" if self.missing else "the run is about to start"
            left.text(0.5, 0.5, why, ha="center", transform=left.transAxes)
        places = list(range(len(beyond.RANKS)))
        found = [interval(self.measured(each, n)) for each in beyond.RANKS]
        spread = [[i.mean - i.low for i in found], [i.high - i.mean for i in found]]
        right.errorbar(places, [i.mean for i in found], spread, fmt="s--", color=GREY, capsize=4, label="5 seeds, 95 %")
        if self.score:
            place = beyond.RANKS.index(rank)
            right.plot(
                [place], [self.score.accuracy], "D", color=ORANGE, zorder=3, label=f"this run {self.score.accuracy:.3f}"
            )
        right.set_xticks(places, [str(each) for each in beyond.RANKS])
        right.set(xlabel="rank", ylabel="test accuracy", xlim=(-0.5, places[-1] + 0.5), ylim=(0.4, 1))
        right.legend(fontsize="small", loc="lower right")
        same = next(
            run for run in self.part["runs"] if (run["method"], run["n"], run["seed"]) == (f"LoRA r={rank}", n, SEED)
        )
        lines = [
            f"trains {same['trained']:,} numbers; the course's run of this seed reached {same['test']['accuracy']:.3f}"
        ]
        return "<br>".join(lines + ([self.missing] if self.missing else []))


def run(rank: int, n: int, lr: float) -> Iterator[tuple[History, Score | None]]:
    """One run on the pictures of seed 0: its history after each step, and the test at the end."""
    history, rows = History(), few(beyond.pool(), n, SEED)
    tuned = attach(beyond.tail(SEED), beyond.on_tail(rank), seed=SEED)
    plan = Plan(beyond.STEPS, lr, beyond.BATCH, SEED, "linear")
    for _ in training_arrays(tuned, features(n), rows.y, plan, history):
        yield history, None
    yield history, evaluate_arrays(tuned, *beyond.kept("test"))


@functools.cache
def features(n: int):
    """What the tail reads of the pictures that seed 0 draws."""
    return beyond.tail(SEED).features(shown(few(beyond.pool(), n, SEED).x))
