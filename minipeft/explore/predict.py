"""Predict first: commit to an answer before you measure."""

from __future__ import annotations

import html

import ipywidgets
from IPython.display import display

from minipeft.explore.page import answer_at_once


class Predict:
    """A question with options; pressing one locks it and shows what to look for. Without a kernel it is plain text.

    There is no right answer here: the measurement below the question gives it. `chosen` holds the learner's choice, and
    `before` those that were taken back, which stay in view beside it.
    """

    def __init__(self, question: str, options: list[str], then: str):
        self.question, self.options, self.then = question, options, then
        self.chosen: str | None = None
        self.before: list[str] = []
        self.buttons = [ipywidgets.Button(description=option, layout={"width": "auto"}) for option in options]
        self.answer = ipywidgets.HTML()
        self.undo = ipywidgets.Button(description="choose again", layout={"width": "auto", "display": "none"})
        self.undo.on_click(self._take_back)
        for button in self.buttons:
            button.on_click(self._choose)
        answer_at_once(*self.buttons, self.undo)
        row = ipywidgets.HBox([*self.buttons, self.undo], layout={"flex_flow": "row wrap"})
        self.box = ipywidgets.VBox([ipywidgets.HTML(f"<b>{question}</b>"), row, self.answer])

    def _choose(self, pressed: ipywidgets.Button) -> None:
        self.chosen = pressed.description
        for button in self.buttons:
            button.disabled = True
            button.button_style = "info" if button is pressed else ""
        self.undo.layout.display = None
        earlier = "".join(f", after “{html.escape(each)}”" for each in reversed(self.before))
        self.answer.value = f"You said “{html.escape(self.chosen)}”{earlier}. {self.then}"

    def _take_back(self, _) -> None:
        self.before.append(self.chosen)
        self.chosen = None
        for button in self.buttons:
            button.disabled = False
        self.undo.layout.display = "none"
        self.answer.value = f"You had said “{html.escape(self.before[-1])}”."

    def _ipython_display_(self) -> None:
        data = dict(self.box._repr_mimebundle_())
        listed = "".join(f"<li>{option}</li>" for option in self.options)
        data["text/html"] = f"<b>{self.question}</b><ul>{listed}</ul>"
        data["text/plain"] = f"{self.question} ({' / '.join(self.options)})"
        display(data, raw=True)
