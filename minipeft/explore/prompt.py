"""Explorers for prompts and prefixes: choose a template, or move the length and watch the model being trained again."""

from __future__ import annotations

import html
from collections.abc import Callable
from functools import cached_property, partial

import torch
from matplotlib.figure import Figure

from minipeft.attach import Tuned
from minipeft.explore.slider import BLUE, GREEN, GREY, ORANGE, SliderPlot
from minipeft.explore.training import TrainingExplorer, choice, slider
from minipeft.layer import Method
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.prompt import PromptTuning, PTuning, nearest, verbalize
from minipeft.world import tasks
from minipeft.world.base import load

LENGTHS = [1, 2, 4, 8, 16, 32]
TASKS = {"forecast": tasks.forecast, "flip": tasks.flip, "pirate": tasks.pirate}


class TemplateExplorer(SliderPlot):
    """Hard prompts for `mood`: choose a template, and see how often the pocket model is right, with nothing trained.

    `found` holds {template: (accuracy, loss in nats)} of every template so far; each stays in the picture.
    """

    apart = False  # it reads the model, which cells may be training
    templates = (
        *("{text}", "{text} he felt", "{text} she felt", "{text} everyone felt", "he felt {text}"),
        *("{text} question : how did he feel ? answer :", "{text} it was a", "{text} the end . anna felt"),
    )

    def __init__(self, model=None, n: int = 150):
        self.model, self.n, self.found = load("pocket")[0] if model is None else model, n, {}
        super().__init__(self._draw, {"template": choice("template", list(self.templates), self.templates[4])})

    @cached_property
    def rows(self):
        return tasks.mood().data["test"].select(range(self.n))

    def lacking(self, template: str) -> list[Callable[[], object]]:
        wanted = dict.fromkeys((self.templates[0], template))
        return [partial(self.measure, each) for each in wanted if each not in self.found]

    def measure(self, template: str) -> None:
        truth = torch.tensor(self.rows["label"])
        odds = verbalize(self.model, self.model.tokenizer, self.rows["text"], template, tasks.mood_words())
        loss = -odds[torch.arange(len(truth)), truth].log().mean().item()
        self.found[template] = ((odds.argmax(1) == truth).float().mean().item(), loss)

    def _draw(self, figure: Figure, template: str) -> str:
        axes = figure.subplots()
        figure.subplots_adjust(left=0.4, right=0.97, top=0.9, bottom=0.15)
        if not self.found:
            axes.set(title="mood: accuracy of hard prompts", xlabel="accuracy", xlim=(0, 1), yticks=[])
            return "being measured …"
        best, share = tasks.mood().ceiling, sum(self.rows["label"]) / len(self.rows)
        names = list(self.found)
        colours = [ORANGE if name == template else BLUE for name in names]
        axes.barh(names, [self.found[name][0] for name in names], color=colours, height=0.6)
        axes.axvline(best, color=GREEN, linestyle=(0, (6, 2)), label=f"best possible {best:.3f}")
        axes.axvline(max(share, 1 - share), color=GREY, linestyle=":", label="always the commoner class")
        axes.set(title="mood: accuracy of hard prompts", xlabel="accuracy", xlim=(0, 1), ylim=(-0.7, len(names) + 0.6))
        axes.legend(fontsize="small", loc="upper right", ncols=2)
        if template not in self.found:
            return "being measured …"
        accuracy, loss = self.found[template]
        floor = tasks.mood().floor
        return (
            f"accuracy {accuracy:.3f}; loss {loss:.3f}, floor {floor:.3f} nats; {len(self.rows)} texts, none trained on"
        )


class FrontExplorer(TrainingExplorer):
    """What both explorers share: the tasks, and a start from the first words of the task's texts."""

    tasks = TASKS

    def words(self) -> list[int]:
        text = self.tasks[self.values["task"]]().make.first()["text"]
        return self.model.tokenizer(text, add_special_tokens=False).input_ids


class PromptExplorer(FrontExplorer):
    """Live soft prompts on the pocket model: loss against the task's floor, and the words nearest to the prompt."""

    name = "prompt"
    rates = {"forecast": 1e-1, "flip": 1e-1, "pirate": 3e-1}

    def __init__(self, model=None, task: str = "forecast"):
        knobs = {
            "length": slider("length n", LENGTHS, 8),
            "start": choice("start or generator", ["vocabulary", "random", "words", "mlp", "lstm"]),
        }
        super().__init__(model, task, knobs)

    def method(self, length: int, start: str) -> Method:
        if start in ("mlp", "lstm"):
            return PTuning(length, start)
        return PromptTuning(length, self.words() if start == "words" else start)

    def title(self, length: int, start: str) -> str:
        return f"n={length}, {start}"

    def formula(self, length: int, start: str) -> str:
        [layer] = self.tuned.adapters["default"].values()
        d = layer.prompt().shape[1]
        text = f"n·d = {length}·{d} = {length * d:,} in the file"
        if self.score is not None:
            rows = nearest(self.tuned.base, self.tuned.tokenizer, layer.prompt(), k=1)
            words = ", ".join(f"{html.escape(word)} {cosine:.2f}" for [(word, cosine)] in rows[:8])
            text += f"<br>nearest words (cosine): {words}" + (" …" if length > 8 else "")
        return text


class PrefixExplorer(FrontExplorer):
    """Live prefixes on the pocket model: loss against the task's exact floor, and the attention that they get."""

    name = "prefix"
    rates = {"forecast": 3e-2, "flip": 3e-2, "pirate": 1e-1}

    def __init__(self, model=None, task: str = "pirate"):
        knobs = {
            "length": slider("length n", LENGTHS, 8),
            "start": choice("start or generator", ["random", "words", "reparametrised"]),
        }
        super().__init__(model, task, knobs)

    def method(self, length: int, start: str) -> PrefixTuning:
        if start == "reparametrised":
            return PrefixTuning(length, hidden=64)
        return PrefixTuning(length, init=self.words() if start == "words" else "random")

    def title(self, length: int, start: str) -> str:
        return f"n={length}, {start}"

    def formula(self, length: int, start: str) -> str:
        [layer] = self.tuned.adapters["default"].values()
        layers, heads, width = layer.shape
        numbers = length * layers * 2 * heads * width
        return f"n·L·2·(kv·w) = {length}·{layers}·2·({heads}·{width}) = {numbers:,} in the file"

    def side(self, axes, task: str) -> None:
        axes.set(title="attention that the prefix gets", xlabel="head", ylabel="layer")
        if self.score is None:
            axes.text(0.5, 0.5, "shown when the run ends", ha="center", va="center", transform=axes.transAxes)
            return
        draw_attention(axes, attention_in_front(self.tuned, self.tasks[task]().data["test"]["text"][:16]))


@torch.no_grad()
def attention_in_front(tuned: Tuned, texts: list[str]) -> torch.Tensor:
    """(layers, heads): the mean share of a token's attention that goes to what stands in front of the text."""
    kept = tuned.config._attn_implementation
    tuned.base.set_attn_implementation("eager")  # the fast kernels do not say whom they attended to
    try:
        inputs = tuned.tokenizer(list(texts), return_tensors="pt", padding=True).to(tuned.device)
        maps = tuned(**inputs, output_attentions=True).attentions
    finally:
        tuned.base.set_attn_implementation(kept)
    length, real = inputs["input_ids"].shape[1], inputs["attention_mask"].bool()
    shares = [m[:, :, -length:, : m.shape[-1] - length].sum(-1).transpose(1, 2)[real].mean(0) for m in maps]
    return torch.stack(shares)


def draw_attention(axes, shares: torch.Tensor) -> None:
    """(layers, heads) as squares with their numbers."""
    axes.imshow(shares.cpu(), vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for (row, column), value in zip(
        torch.cartesian_prod(*map(torch.arange, shares.shape)), shares.flatten(), strict=True
    ):
        colour = "white" if value < 0.6 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize="small")
    axes.set_xticks(range(shares.shape[1]))
    axes.set_yticks(range(shares.shape[0]))
