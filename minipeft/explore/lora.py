"""The LoRA explorer: move rank, γ, targets or learning rate and watch the pocket model being trained again."""

from __future__ import annotations

import copy
import html
from collections.abc import Iterator

import ipywidgets
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minipeft.attach import Tuned, attach
from minipeft.explore.slider import BLUE, GREEN, GREY, ORANGE, SliderPlot
from minipeft.learn.fit import History, evaluate, training
from minipeft.methods.lora import LoRA
from minipeft.world import tasks
from minipeft.world.base import load, write
from minipeft.world.corpus import pretty

TASKS = {"pirate": tasks.pirate, "flip": tasks.flip, "cipher": tasks.cipher}
RATES = {"pirate": 1e-2, "flip": 3e-3, "cipher": 1e-2}  # where the explorer begins: steady at rank 8, γ = 2
STEPS, BATCH = 60, 10


class LoRAExplorer(SliderPlot):
    """Live LoRA on the pocket model: loss against the task's exact floor, spectrum of ΔW, count, and what it writes.

    Every move trains a fresh adapter for 60 steps of 10 texts (seed 0) on the same frozen base; the last few runs stay
    in the picture in grey. `history`, `tuned` and `score` hold the present run.
    """

    def __init__(self, model=None, task: str = "pirate"):
        self.model = (
            load("pocket")[0] if model is None else copy.deepcopy(model)
        )  # the lesson may use its own as it likes
        self.history, self.score, self.tuned = History(), None, None
        self.before: list[tuple[str, str, list[float]]] = []  # (task, settings, losses) of finished runs
        self.samples: dict[str, str] = {}
        style = {"description_width": "initial"}

        def slider(label, options, value):
            return ipywidgets.SelectionSlider(
                options=options, value=value, description=label, continuous_update=False, style=style
            )

        def choice(label, options):
            return ipywidgets.Dropdown(options=options, description=label, style=style)

        controls = {
            "rank": slider("rank r", [1, 2, 4, 8, 16, 32, 64], 8),
            "gamma": slider("γ", [0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0], 2.0),
            "lr": slider("learning rate", [(f"{v:g}", v) for v in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)], RATES[task]),
            "targets": choice("which layers", ["all-linear", "attention", "mlp"]),
            "task": ipywidgets.Dropdown(options=list(TASKS), value=task, description="task", style=style),
        }
        super().__init__(self._draw, controls, self._train)

    def _train(self, rank, gamma, lr, targets, task) -> Iterator[int]:
        if self.tuned is not None:
            self.tuned.detach()
        self.history, self.score, chosen = History(), None, TASKS[task]()
        self.tuned = attach(self.model, LoRA(rank=rank, gamma=gamma, targets=targets))
        yield from training(self.tuned, chosen, self.history, steps=STEPS, lr=lr, batch=BATCH)
        yield None  # a picture of all steps before the slower test
        self.score = evaluate(self.tuned, chosen, n=100)
        self.samples[task] = sample(self.tuned, task)
        self.before = [run for run in self.before if run[0] == task][-3:]
        self.before.append((task, f"r={rank}, γ={gamma:g}, lr={lr:g}, {targets}", self.history.losses))

    def _draw(self, figure: Figure, rank, gamma, lr, targets, task) -> str:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        figure.subplots_adjust(
            left=0.06, right=0.985, top=0.92, bottom=0.13, wspace=0.17
        )  # a layout engine takes 60 ms
        earlier = self.before[:-1] if self.score else self.before
        draw_losses(left, self.history, TASKS[task]().floor, [run[1:] for run in earlier if run[0] == task], self.score)
        left.set_title(f"{task}: LoRA r={rank}, γ={gamma:g}, {targets}, learning rate {lr:g}")
        draw_spectrum(right, self.tuned)
        return self._report(task)

    def _report(self, task: str) -> str:
        if self.tuned is None:
            return ""
        lines = [f"<b>{self.tuned.count()}</b>"]
        if self.score is not None:
            accuracy = (
                ""
                if self.score.accuracy is None
                else (f", accuracy {self.score.accuracy:.2f} of at best {TASKS[task]().ceiling:.2f}")
            )
            lines.append(
                f"test loss {self.score.loss:.3f}, floor {TASKS[task]().floor:.3f} nats a token{accuracy}; "
                f"{self.history.seconds[-1]:.1f} s; {self.history.peak_memory / 2**20:.0f} MiB at the peak"
            )
            lines.append(f"<i>{html.escape(self.samples[task])}</i>")
        else:
            lines.append(f"step {len(self.history.losses)} of {STEPS} …")
        return "<br>".join(lines)


def draw_losses(axes, history: History, floor: float | None, earlier=(), score=None) -> None:
    """Loss by step with the floor; `earlier` is [(label, losses)], `score` the test result at the end."""
    for style, (label, losses) in zip(("--", "-.", ":"), reversed(list(earlier)), strict=False):
        axes.plot(range(1, len(losses) + 1), losses, style, color=GREY, linewidth=1, label=f"before: {label}")
    axes.plot(range(1, len(history.losses) + 1), history.losses, color=BLUE, marker=".", label="this run, each batch")
    if score is not None:
        axes.plot([STEPS + 1.5], [score.loss], "D", color=ORANGE, label=f"test after training {score.loss:.3f}")
    if floor is not None:
        axes.axhline(floor, color=GREEN, linestyle=(0, (6, 2)), label=f"floor of the task {floor:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats a token)", xlim=(0, STEPS + 3))
    axes.legend(fontsize="small", loc="upper right")


def draw_spectrum(axes, tuned: Tuned | None) -> None:
    """Singular values of γ·B·A: one thin line a matrix, the median thick. At most r of them are not zero."""
    axes.set(title="spectrum of ΔW = γ·B·A", xlabel="i", ylabel="singular value σᵢ")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    values = [] if tuned is None else singular_values(tuned)
    if not values or not any(v.max() > 0 for v in values):
        axes.text(0.5, 0.5, "ΔW = 0", ha="center", va="center", transform=axes.transAxes)
        return
    for v in values:
        axes.plot(range(1, len(v) + 1), v, color=GREY, linewidth=0.5, marker="." if len(v) == 1 else "")
    median = torch.stack(values).median(0).values
    axes.plot(range(1, len(median) + 1), median, color=BLUE, linewidth=2.5, marker="o", markersize=3)
    axes.set_ylim(bottom=0)
    axes.text(0.97, 0.95, f"{len(values)} matrices, median in blue", ha="right", va="top", transform=axes.transAxes)


@torch.no_grad()
def singular_values(tuned: Tuned) -> list[torch.Tensor]:
    """σ of γ·B·A for every adapted matrix, (r,) each, from the factors alone: B = Q_B R_B, Aᵀ = Q_A R_A,
    so σ(B·A) = σ(R_B·R_Aᵀ), an r × r problem."""
    found = []
    for layer in tuned.adapters["default"].values():
        r_b, r_a = torch.linalg.qr(layer.B).R, torch.linalg.qr(layer.A.T).R
        found.append(torch.linalg.svdvals(layer.gamma * r_b @ r_a.T).cpu())
    return found


def sample(tuned: Tuned, task: str) -> str:
    """What the tuned model says now, as a reader would want to see it for this task."""
    tokenizer = tuned.tokenizer
    if task == "flip":
        prompt = "on sunday , anna went to the lake . the sun was hot . anna won a red boat in a race . anna felt"
        ids = tokenizer(prompt, return_tensors="pt").to(tuned.device)
        with torch.no_grad():
            p = tuned(**ids).logits[0, -1].softmax(-1)
        words = {
            m: sum(p[tokenizer.convert_tokens_to_ids(w)].item() for w in ws) for m, ws in tasks.mood_words().items()
        }
        return f"{pretty(prompt)} … glad {words['glad']:.2f}, sad {words['sad']:.2f}"
    if task == "cipher":
        key = tasks.permutation()
        back = {secret: word for word, secret in key.items()}
        [text] = write(tuned, tokenizer, f"{key['one']} {key['morning']}")
        return f"{text} — deciphered: {pretty(' '.join(back.get(w, w) for w in text.split()))}"
    return pretty(write(tuned, tokenizer, "on sunday")[0])
