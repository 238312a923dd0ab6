"""Predict first: commit to an answer before you measure."""

from __future__ import annotations

import html

import ipywidgets
from IPython.display import display


class Predict:
    """A question with options; pressing one locks it and shows what to look for. Without a kernel it is plain text.

    There is no right answer here: the measurement below the question gives it. `chosen` holds the learner's choice.
    """

    def __init__(self, question: str, options: list[str], then: str):
        self.question, self.options, self.then = question, options, then
        self.chosen: str | None = None
        self.buttons = [ipywidgets.Button(description=option, layout={"width": "auto"}) for option in options]
        self.answer = ipywidgets.HTML()
        for button in self.buttons:
            button.on_click(self._choose)
        self.box = ipywidgets.VBox([ipywidgets.HTML(f"<b>{question}</b>"), ipywidgets.HBox(self.buttons), self.answer])

    def _choose(self, pressed: ipywidgets.Button) -> None:
        self.chosen = pressed.description
        for button in self.buttons:
            button.disabled = True
            button.button_style = "info" if button is pressed else ""
        self.answer.value = f"You said “{html.escape(self.chosen)}”. {self.then}"

    def _ipython_display_(self) -> None:
        data = dict(self.box._repr_mimebundle_())
        listed = "".join(f"<li>{option}</li>" for option in self.options)
        data["text/html"] = f"<b>{self.question}</b><ul>{listed}</ul>"
        data["text/plain"] = f"{self.question} ({' / '.join(self.options)})"
        display(data, raw=True)
