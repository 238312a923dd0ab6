"""The preference widget: two continuations of one beginning, and somebody who says which is better.

The field holds the answers, one key a pair: 1 for the first, 2 for the second, 0 for a tie. Whoever types in it needs
no mouse, and whoever presses the buttons types in it; to undo is to delete its last key.
"""

from __future__ import annotations

import html
import random
from collections.abc import Sequence
from pathlib import Path

import ipywidgets
from IPython.display import display

from minipeft.explore.page import answer_at_once
from minipeft.learn.reward import Pair, self_agreement, write_pairs
from minipeft.world.corpus import pretty

KEYS = {"1": "first", "2": "second", "0": "tie"}


class Preferences:
    """Ask which of two texts is better.

    Args:
        drafts: (beginning, first continuation, second continuation) of each pair.
        repeats: how many of them come again at the end with their sides exchanged, to see how well the rater agrees
            with himself or herself.
        path: a file that holds the pairs answered so far, as JSON lines, after every answer.
        question: what to judge by.

    `pairs` are those answered so far, in the order in which they were shown; see also `self_agreement`.
    """

    def __init__(
        self,
        drafts: Sequence[tuple[str, str, str]],
        repeats: int = 2,
        path: str | Path | None = None,
        question: str = "Which story do you like better?",
        seed: int = 0,
    ):
        if not drafts:
            raise ValueError("There is nothing to compare: give at least one (beginning, first, second).")
        if not 0 <= repeats <= len(drafts):
            raise ValueError(f"repeats says how many of the {len(drafts)} pairs come again, but is {repeats!r}.")
        again = random.Random(seed).sample(list(drafts), repeats)
        self.drafts = [*drafts, *((prompt, second, first) for prompt, first, second in again)]
        self.question, self.path = question, path
        self.keys = ipywidgets.Text(
            description="your answers:", placeholder="type 1, 2 or 0", style={"description_width": "initial"}
        )
        self.buttons = {
            key: ipywidgets.Button(description=label, layout={"width": "auto"})
            for key, label in (("1", "1 · the first"), ("2", "2 · the second"), ("0", "0 · neither"), ("", "undo"))
        }
        for key, button in self.buttons.items():
            button.on_click(lambda _, key=key: self.press(key))
        self.bar = ipywidgets.IntProgress(max=len(self.drafts), layout={"width": "160px"})
        self.shown, self.said = ipywidgets.HTML(), ipywidgets.HTML()
        row = ipywidgets.HBox([*self.buttons.values(), self.keys, self.bar], layout={"flex_flow": "row wrap"})
        self.box = ipywidgets.VBox([self.shown, row, self.said], layout={"max_width": "900px"})
        answer_at_once(*self.buttons.values(), self.keys)
        self.keys.observe(self._typed, "value")
        self._show()

    def press(self, key: str) -> None:
        """Answers the pair in view by "1", "2" or "0"; "" takes the last answer back."""
        self.keys.value = self.keys.value + key if key else self.keys.value[:-1]

    @property
    def pairs(self) -> list[Pair]:
        return [Pair(*draft, KEYS[key]) for draft, key in zip(self.drafts, self.keys.value, strict=False)]

    def _typed(self, change) -> None:
        kept = "".join(key for key in change["new"] if key in KEYS)[: len(self.drafts)]
        if kept != change["new"]:
            self.keys.value = kept  # which comes back here
            return
        if self.path is not None:
            write_pairs(self.pairs, self.path)
        self._show()

    def _show(self) -> None:
        done = len(self.keys.value)
        self.bar.value = done
        self.shown.value = self._question(done) if done < len(self.drafts) else "<b>That was the last pair.</b>"
        for key, button in self.buttons.items():
            button.disabled = done == 0 if key == "" else done == len(self.drafts)
        agreed = self_agreement(self.pairs)
        again = "" if agreed is None else f" You agree with yourself in {agreed:.0%} of the pairs that came again."
        self.said.value = f"{done} of {len(self.drafts)} pairs answered.{again}"

    def _question(self, number: int) -> str:
        prompt, *two = self.drafts[number]
        # the beginning is cut off again after spelling the whole, so that names and quotes come out right
        start = len(pretty(prompt))
        texts = [html.escape(pretty(f"{prompt} {text}")[start:].strip()) for text in two]
        cells = "".join(
            f'<td style="text-align:left;vertical-align:top;width:50%;padding:6px"><b>{i}</b><br>… {text}</td>'
            for i, text in enumerate(texts, 1)
        )
        head = f"<b>{html.escape(self.question)}</b>"
        return f'{head}<p>{html.escape(pretty(prompt))} …</p><table style="width:100%"><tr>{cells}</tr></table>'

    def _ipython_display_(self) -> None:
        data = dict(self.box._repr_mimebundle_())
        data["text/html"] = self._question(0)  # where no kernel runs: the first pair
        data["text/plain"] = f"{self.question} {len(self.drafts)} pairs, {len(self.keys.value)} answered"
        display(data, raw=True)
