"""Sliders over a figure: fast enough to drag, a picture without a kernel, and never a frozen notebook."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Callable, Iterator

import ipywidgets
from IPython.display import display
from matplotlib.figure import Figure

# Colours that people with any colour vision tell apart (Okabe and Ito); lines differ in style as well.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"


class SliderPlot:
    """Controls above one figure.

    Args:
        draw: `draw(figure, **values)` draws the figure for the controls' values and returns HTML to put below it.
            Called without controls it is also the way to the plain picture.
        controls: {name: ipywidgets control with a `value`}.
        run: None when `draw` is quick. Else a generator function `run(**values)` that does long work in short steps:
            the figure is redrawn between its steps, and a move of any control closes it and starts a new one.
        size: of the figure in inches.

    One reused figure is rendered to a PNG in an image widget: about 50 ms a redraw. The display also carries that PNG,
    so the picture stays where no kernel runs.
    """

    REDRAW = 0.5  # seconds between two pictures of a running `run`

    def __init__(
        self,
        draw: Callable[..., str | None],
        controls: dict[str, ipywidgets.ValueWidget],
        run: Callable[..., Iterator] | None = None,
        size: tuple[float, float] = (9.6, 3.8),
    ):
        self.draw, self.controls, self.run = draw, controls, run
        self.figure = Figure(figsize=size, dpi=100)
        self.image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(width=f"{size[0] * 100:.0f}px"))
        self.text = ipywidgets.HTML()
        row = ipywidgets.HBox(list(controls.values()), layout=ipywidgets.Layout(flex_flow="row wrap"))
        self.box = ipywidgets.VBox([row, self.image, self.text])
        self.running: asyncio.Task | None = None
        for control in controls.values():
            control.observe(self._moved, "value")

    @property
    def values(self) -> dict:
        """The controls' present values by name."""
        return {name: control.value for name, control in self.controls.items()}

    def redraw(self) -> None:
        """Draw the figure for the present values and show it."""
        self.figure.clear()
        html = self.draw(self.figure, **self.values)
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png")
        self.image.value = buffer.getvalue()
        self.text.value = html or ""

    def finish(self) -> None:
        """Do all of the work for the present values at once, redrawing on the way, and wait for it."""
        self.cancel()
        for _ in self._steps():
            pass

    def cancel(self) -> None:
        """Stop the running work, if any."""
        if self.running is not None:
            self.running.cancel()
            self.running = None

    def _steps(self) -> Iterator[None]:
        """The work in short steps: a redraw after the first two, then every REDRAW seconds, and after the last."""
        if self.run is None:
            self.redraw()
            return
        work, drawn = self.run(**self.values), 0.0
        try:
            for i, _ in enumerate(work):
                if i < 2 or time.perf_counter() - drawn > self.REDRAW:
                    self.redraw()
                    drawn = time.perf_counter()
                yield
            self.redraw()
        except (ValueError, TypeError) as error:
            self.text.value = f"<b>{error}</b>"
        finally:
            work.close()

    def _moved(self, _change) -> None:
        self.cancel()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no event loop, as in a script: work until done
            self.finish()
            return
        if self.run is None:
            self.redraw()
        else:
            self.running = loop.create_task(self._work())

    async def _work(self) -> None:
        await asyncio.sleep(0.05)  # while a slider is dragged, only its last value is worked on
        steps = self._steps()
        try:
            for _ in steps:
                await asyncio.sleep(0.001)  # the kernel looks at its messages here: the next move, another cell
        finally:
            steps.close()

    def _bundle(self) -> dict:
        data = dict(self.box._repr_mimebundle_())
        data["text/plain"] = " · ".join(f"{name} = {value}" for name, value in self.values.items())
        data["image/png"] = base64.b64encode(self.image.value).decode()
        return data

    def _ipython_display_(self) -> None:
        if self.run is None or self.image.value:
            self.redraw()
            display(self._bundle(), raw=True)
            return
        self.redraw()
        shown = display(self._bundle(), raw=True, display_id=True)
        self.finish()
        shown.update(self._bundle(), raw=True)
