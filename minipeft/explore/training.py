"""What every explorer shares: controls for one method's knobs, and the pocket model trained again at every move."""

from __future__ import annotations

import contextlib
import copy
import html
import statistics
import threading
from collections.abc import Iterator

import ipywidgets
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import nn

from minipeft.attach import attach
from minipeft.build import carries_adapters
from minipeft.course import atlas
from minipeft.explore.runs import Look, Moment, beside, fresh, nothing, run
from minipeft.explore.slider import BLUE, GREEN, GREY, ORANGE, RED, SliderPlot, blank
from minipeft.explore.worker import Elsewhere, Packed
from minipeft.layer import Method
from minipeft.learn.fit import History
from minipeft.learn.plan import Plan
from minipeft.methods.lora import LoRA
from minipeft.world import tasks
from minipeft.world.base import load

TASKS = {"pirate": tasks.pirate, "flip": tasks.flip, "cipher": tasks.cipher}
STEPS, BATCH = 60, 10
STYLE = {"description_width": "initial"}


def slider(label: str, options: list, value) -> ipywidgets.SelectionSlider:
    return ipywidgets.SelectionSlider(
        options=options, value=value, description=label, continuous_update=False, style=STYLE
    )


def choice(label: str, options: list, value=None) -> ipywidgets.Dropdown:
    value = options[0] if value is None else value
    return ipywidgets.Dropdown(options=options, value=value, description=label, style=STYLE)


def same(model, other) -> bool:
    """Whether two models hold the same numbers under the same names."""
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    return mine.keys() == theirs.keys() and all(torch.equal(p.cpu(), theirs[name]) for name, p in mine.items())


def check_base(model, pocket) -> None:
    """Whether an explorer can train on this model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}; give a model, or leave it out for the pocket one; a task goes by task=….")
    if carries_adapters(model):
        raise ValueError("This model carries adapters; an explorer attaches its own, so call detach() first.")
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size != pocket.config.vocab_size or not hasattr(model, "tokenizer") or not hasattr(model, "generate"):
        raise ValueError(
            f"{type(model).__name__} does not write in the pocket model's {pocket.config.vocab_size} words, and the "
            'explorer\'s tasks are in these; give a model that mp.load("pocket") returned, trained further or not.'
        )


def options(control) -> list:
    """The values that a choice or a slider can take."""
    return [pair[1] if isinstance(pair, tuple) else pair for pair in control.options]


class TrainingExplorer(SliderPlot):
    """Live training of one method on the pocket model: loss against the task's exact floor, and what the model writes.

    Every move shows at once what the atlas measured for these settings, where it has them, and trains a fresh adapter
    for 60 steps of 10 texts (seed 0) on the same frozen base; the last few runs stay in the picture in grey. A setting
    that has been trained is shown again without training. On a page, `worker.py` says where it is trained, and when the
    chosen run of LoRA is done the other positions of its first control are trained together.

    `history`, `tuned` and `score` hold the present run, `points` every finished one.

    A subclass says how the knobs become a method (`method`) and a title (`title`), and what stands on the right
    (`side`) and below (`formula`).
    """

    name: str  # of the method, in titles
    rates: dict[str, float]  # {task: the learning rate where the explorer begins}
    look: Look = staticmethod(nothing)  # what a picture shows of the adapter, where another process trains it
    REDRAW = 2.0
    tasks = TASKS

    def __init__(self, model, task: str, knobs: dict[str, ipywidgets.ValueWidget]):
        pocket = load("pocket")[0]
        if not isinstance(task, str) or task not in self.tasks:
            raise ValueError(f"task is {task!r}; this explorer trains on {', '.join(map(repr, self.tasks))}.")
        if model is not None:
            check_base(model, pocket)
        self.model = pocket if model is None else copy.deepcopy(model)  # the lesson may use its own as it likes
        self.in_atlas = model is None or same(model, pocket)
        self.history, self.score, self.tuned, self.seen = History(), None, None, None
        self.before: list[tuple[str, str, list[float]]] = []  # (task, settings, losses) of finished runs
        self.points: dict[str, dict[str, tuple[int, float]]] = {}  # task -> settings -> (numbers trained, test loss)
        self.samples: dict[str, str] = {}
        self.trained: dict[tuple, Moment] = {}  # the controls' values -> a run at its end, with the adapter's numbers
        self.together = False  # whether the present run was one of several that were trained at once
        self.here = ""  # why training cannot be done outside the kernel, if so
        self.preparing = threading.Thread(target=self.prepare, daemon=True)
        self._pickled: Packed | None = None
        rates = [(f"{v:g}", v) for v in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)]
        controls = knobs | {
            "lr": slider("learning rate", rates, self.rates[task]),
            "task": choice("task", list(self.tasks), task),
        }
        super().__init__(self._draw, controls, self._train)

    def method(self, **knobs) -> Method:
        raise NotImplementedError(f"{type(self).__name__} does not define method")

    def title(self, **knobs) -> str:
        raise NotImplementedError(f"{type(self).__name__} does not define title")

    def side(self, axes, task: str) -> None:
        """The right panel: the test loss of every run so far, by how many numbers it trained."""
        draw_points(axes, self.points.get(task, {}), self.tasks[task]().floor, self.curve())

    def formula(self, **knobs) -> str:
        """HTML that says how many numbers these knobs train."""
        return ""

    def measured(self, lr: float, task: str, **knobs) -> tuple[int, list[float]] | None:
        """(numbers trained, test loss by seed) of these settings in the atlas, if it has them and this model."""
        return atlas.measured()[0].get((repr(self.method(**knobs)), task, lr)) if self.in_atlas else None

    def curve(self) -> list[tuple[int, list[float]]]:
        """`measured` for every position of the first knob, the others staying where they are."""
        name, *_ = self.controls
        each = (self.measured(**self.values | {name: value}) for value in options(self.controls[name]))
        return [found for found in each if found]

    def _moved(self, change) -> None:
        """A move; of the task, with the learning rate that suits it."""
        rate, values = self.controls["lr"], self.values
        if change["owner"] is self.controls["task"] and (good := self.good_rate(**values)) != rate.value:
            rate.value = good  # which comes back here
        else:
            super()._moved(change)

    def good_rate(self, task: str, lr: float, **knobs) -> float:
        """The learning rate with the least mean loss in the atlas, else the one where this task begins."""
        rates = options(self.controls["lr"])
        found = {each: self.measured(each, task, **knobs) for each in rates}
        means = {each: statistics.fmean(known[1]) for each, known in found.items() if known}
        return min(means, key=means.get, default=self.rates[task])

    def _train(self, lr, task, **knobs) -> Iterator[float]:
        with self.drawing:
            if self.tuned is not None:
                self.tuned.detach()
                self.tuned = None
            self.history, self.score, self.seen, method = History(), None, None, self.method(**knobs)
            outside = self._mine() and self._packed()
        known = self.trained.get(key := (task, lr, *knobs.values()))
        if known is None:
            yield 0.0  # a picture of what is known
        with self.drawing:  # nobody draws an adapter that comes or goes
            self.tuned = attach(self.model, method)  # before another process works, which slows it down tenfold
        if known is None:
            for known in self._moments(outside, method, task, Plan(STEPS, lr, BATCH)):
                self.history, self.seen = known.history, known.seen
                if not known.over:
                    self._take(known)
                    yield len(self.history.losses) / (STEPS + 10)  # the test takes as long as ten steps
        self._take(known)
        self.trained[key] = known
        self.history, self.score, self.samples[task] = known.history, known.score, known.sample
        self.seen, self.together = known.seen, known.together
        settings = f"{self.title(**knobs)}, lr={lr:g}"
        self.before = [each for each in self.before if each[0] == task and each[1] != settings][-3:]
        self.before.append((task, settings, self.history.losses))
        self.points.setdefault(task, {}).pop(settings, None)  # the last one is the one that is shown
        if self.score is not None:
            self.points[task][settings] = (self.tuned.count().trainable, self.score.loss)

    def _moments(self, outside: bool, method: Method, task: str, plan: Plan) -> Iterator[Moment]:
        """The run of `self.tuned`, in the process of `worker.py` where it is wanted and can be."""
        if outside:
            try:
                moments = self.elsewhere(fresh, self._pickled, method, self.tasks[task], plan, self.look)
                if self.preparing.ident is None:
                    self.preparing.start()  # while the other process works
                with contextlib.closing(moments):
                    yield from moments
                return
            except Elsewhere as why:
                self.here = repr(why)
        yield from run(self.tuned, self.tasks[task](), plan, self.look)

    def prepare(self) -> None:
        """Computes once what a move to another task needs; a floor takes a fifth of a second."""
        for task in self.tasks.values():
            task()

    def _packed(self) -> bool:
        """Whether the bare model can be sent to another process; `here` says why not."""
        if self._pickled is None and not self.here:
            try:
                self._pickled = Packed(self.model)
            except Exception as error:  # whatever a class of the learner's raises
                self.here = repr(error)
        return not self.here

    def _take(self, moment: Moment) -> None:
        """Puts the adapter's numbers that another process sent into the model here."""
        if moment.state is not None:
            self.tuned.adapters["default"].load_state_dict(moment.state)

    def afterwards(self) -> Iterator[None]:
        """LoRA at the other positions of the first control, those nearest to the chosen one first, three at once."""
        values = self.values
        task, lr, knobs = values.pop("task"), values.pop("lr"), values
        first, chosen = next(iter(knobs.items()))
        places = options(self.controls[first])
        near = sorted(places, key=lambda place: abs(places.index(place) - places.index(chosen)))
        methods = {(task, lr, *(knobs | {first: p}).values()): self.method(**knobs | {first: p}) for p in near}
        wanted = [key for key, m in methods.items() if type(m) is LoRA and key not in self.trained and self._packed()]
        for three in (wanted[i : i + 3] for i in range(0, len(wanted), 3)):
            given, plan = [methods[key] for key in three], Plan(STEPS, lr, BATCH)
            for i, moment in self.elsewhere(
                beside, self._pickled, given, self.tasks[task], plan, self.look, spare=True
            ):
                self.trained[three[i]] = moment
                yield

    def _draw(self, figure: Figure, lr, task, **knobs) -> str:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        # a layout engine takes 60 ms
        figure.subplots_adjust(left=0.075, right=0.985, top=0.92, bottom=0.13, wspace=0.24)
        over = Moment(self.history, self.score).over
        earlier = self.before[:-1] if over else self.before
        line = draw_losses(
            left, self.history, self.tasks[task]().floor, [run[1:] for run in earlier if run[0] == task], self.score
        )
        self.growing = None if over else line
        draw_measured(left, self.measured(lr, task, **knobs))
        left.legend(fontsize="small", loc="upper right")
        left.set_title(f"{task}: {self.name} {self.title(**knobs)}, learning rate {lr:g}")
        left.locator_params(nbins=5)  # a number at an axis takes a millisecond
        self.side(right, task)
        return self._report(lr=lr, task=task, **knobs)

    def grown(self) -> tuple[list[float], str]:
        return self.history.losses, self._report(**self.values)

    def _report(self, lr: float, task: str, **knobs) -> str:
        lines = []
        if self.tuned is not None:
            formula = self.formula(**knobs)
            lines.append(f"<b>{self.tuned.count()}</b>{formula and '; ' + formula}")
        if self.score is not None:
            accuracy = (
                ""
                if self.score.accuracy is None
                else (f", accuracy {self.score.accuracy:.2f} of at best {self.tasks[task]().ceiling:.2f}")
            )
            cost = f"{self.history.seconds[-1]:.1f} s; {self.history.peak_memory / 2**20:.0f} MiB at the peak"
            if self.together:
                cost = "trained with its neighbours at once, so alone it may differ in the second decimal"
            floor = f"floor {self.tasks[task]().floor:.3f} nats a token"
            lines.append(f"test loss {self.score.loss:.3f}, {floor}{accuracy}; {cost}")
            lines.append(f"<i>{html.escape(self.samples[task])}</i>")
        else:
            lines.append(f"step {len(self.history.losses)} of {STEPS} …")
        if self.history.stopped == "diverged":
            lines.append("<b>The loss is not finite any more, so training stopped: choose a smaller learning rate.</b>")
        if self.here:
            lines.append(
                "This model cannot be sent to another process, since its class stands in the notebook or does not "
                "pickle: it is trained in the kernel, so wait for the end before you run a cell."
            )
        if self.measured(lr, task, **knobs):
            lines.append(f"<small>atlas: {atlas.measured()[1]}</small>")
        return "<br>".join(lines)


def draw_losses(axes, history: History, floor: float | None, earlier=(), score=None) -> Line2D:
    """Loss by step, the line that is returned, with the floor; `earlier` is [(label, losses)], `score` the test result
    at the end."""
    for style, (label, losses) in zip(("--", "-.", ":"), reversed(list(earlier)), strict=False):
        axes.plot(range(1, len(losses) + 1), losses, style, color=GREY, linewidth=1, label=f"before: {label}")
    losses = history.losses
    label = "this run, each batch" if losses else "_nothing to be seen yet"  # which a legend leaves out
    [line] = axes.plot(range(1, len(losses) + 1), losses, color=BLUE, marker=".", label=label)
    if score is not None:
        axes.plot([STEPS + 1.5], [score.loss], "D", color=ORANGE, label=f"test after training {score.loss:.3f}")
    if floor is not None:
        axes.axhline(floor, color=GREEN, linestyle=(0, (6, 2)), label=f"floor of the task {floor:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats a token)", xlim=(0, STEPS + 4))
    if not losses:
        axes.margins(y=0.4)  # room for the legend, which would lie over the atlas's point
    return line


def draw_measured(axes, found: tuple[int, list[float]] | None) -> None:
    """The atlas's test losses of these settings after the last step: a bar from the best seed to the worst."""
    if found:
        _, losses = found
        mean = statistics.fmean(losses)
        spread = [[mean - min(losses)], [max(losses) - mean]]
        label = f"atlas: {mean:.3f}, {len(losses)} seeds"
        axes.errorbar([STEPS + 3], [mean], spread, fmt="s", color=RED, capsize=4, label=label)


def draw_points(axes, points: dict[str, tuple[int, float]], floor: float | None, curve=()) -> None:
    """Test loss by numbers trained; `points` is {settings: (numbers, loss)}, the last one in orange; `curve` the
    atlas's [(numbers, loss by seed)]."""
    axes.set_title("test loss by size")
    numbers = [n for n, _ in (*points.values(), *curve)]
    if not numbers:
        blank(axes, "a point appears when the run ends")
        return
    axes.set(xlabel="numbers trained", ylabel="test loss (nats a token)")
    if curve:
        means = [statistics.fmean(losses) for _, losses in curve]
        spread = [[m - min(losses) for m, (_, losses) in zip(means, curve, strict=True)],
                  [max(losses) - m for m, (_, losses) in zip(means, curve, strict=True)]]  # fmt: skip
        counts = sorted({len(losses) for _, losses in curve})
        seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
        axes.errorbar(
            [n for n, _ in curve], means, spread, fmt="s--", color=RED, capsize=3, markersize=4,
            label=f"atlas, {seeds} seeds",
        )  # fmt: skip
    *before, last = points.values() or [None]
    if before:
        axes.plot(*zip(*before, strict=True), "o", color=GREY, label="before")
    if last:
        axes.plot(*last, "D", color=ORANGE, label="this run")
    if floor is not None:
        axes.axhline(floor, color=GREEN, linestyle=(0, (6, 2)), label="floor")
    axes.locator_params(nbins=5)
    axes.set_xscale("log")
    axes.set_xlim(min(numbers) / 2, max(numbers) * 2)
    axes.minorticks_off()
    axes.legend(fontsize="small", loc="upper right")
