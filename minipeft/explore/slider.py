"""Sliders over a figure: fast enough to drag, a picture without a kernel, and never a frozen notebook."""

from __future__ import annotations

import base64
import contextlib
import gc
import html
import io
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import ipywidgets
from IPython.display import DisplayHandle, display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.lines import Line2D
from traitlets import Unicode

from minipeft.explore.page import STYLE, after_cells, answer_at_once, cells_wait, watched
from minipeft.explore.worker import WORKER, Job, Stopped, sentence

# Colours that people with any colour vision tell apart (Okabe and Ito); lines differ in style as well.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"


def blank(axes, why: str) -> None:
    """An empty frame that says why: numbers at its axes would mean nothing, and each takes its time to draw."""
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes)


class Picture(ipywidgets.Image):
    """An image whose tooltip is its name for whoever does not see it; views want a description beside a tooltip."""

    description = Unicode("").tag(sync=True)


@contextlib.contextmanager
def garbage_later() -> Iterator[None]:
    """Within it Python does not look for garbage, which takes half a second where torch and transformers are loaded."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class SliderPlot:
    """Controls above one figure.

    Args:
        draw: `draw(figure, **values)` draws the figure for the controls' values and returns HTML to put below it.
            Called without controls it is also the way to the plain picture.
        controls: {name: ipywidgets control with a `value`}.
        run: None when `draw` is quick. Else a generator function `run(**values)` that does long work in short steps,
            yielding the share that is done: the figure is redrawn between its steps, and a move of any control ends it
            and starts a new one.
        size: of the figure in inches.

    One reused figure is rendered to a PNG in an image widget. The display also carries that PNG, so the picture stays
    where no kernel runs.

    On a page the picture is first shown without what is `lacking`. The work of `run` is done in a thread there, and the
    controls answer while a cell runs, which waits while they draw; `elsewhere` takes what is long out of the kernel.
    Everywhere else a move and a display wait until the work is done.
    """

    REDRAW = 0.5  # seconds between two pictures of a running `run`
    ADVANCE = 0.2  # and between two in which only `growing` has grown, which take a tenth of the work
    growing: Line2D | None = None  # a line of which `draw` says that it grows with each step of `run`
    dpi = 100
    apart = True  # False where what is `lacking` is measured on a model that cells use too, and so waits for them

    def __init__(
        self,
        draw: Callable[..., str | None],
        controls: dict[str, ipywidgets.ValueWidget],
        run: Callable[..., Iterator[float]] | None = None,
        size: tuple[float, float] = (9.6, 3.8),
    ):
        self.draw, self.controls, self.run = draw, controls, run
        self.figure = Figure(figsize=size, dpi=100)
        FigureCanvasAgg(self.figure)  # which stays, and so do the sizes of texts that it has measured
        self.image = Picture(format="png", layout={"max_width": f"{size[0] * 100:.0f}px"})
        self.text = ipywidgets.HTML(layout={"min_height": "4.6em" if run else "1.5em"})
        self.bar = ipywidgets.FloatProgress(max=1.0, layout={"width": "160px"})
        self.stop = ipywidgets.Button(description="stop", disabled=True, layout={"width": "auto"})
        self.stop.on_click(lambda _: self.cancel())
        progress = [self.bar, self.stop] if run else []
        row = ipywidgets.HBox([*controls.values(), *progress], layout={"flex_flow": "row wrap"})
        self.box = ipywidgets.VBox([row, self.image, self.text]).add_class("minipeft-box")
        self.running: threading.Thread | None = None  # whose work is wanted
        self.last: threading.Thread | None = None  # which may still be about to end
        self.job: Job | None = None  # what the running thread waits for
        self.picture: DisplayHandle | None = None  # what the saved notebook shows
        self.behind = None  # the pixels that `growing` is drawn over, while they are the picture that is shown
        self.drawing, self.starting = threading.RLock(), threading.Lock()
        answer_at_once(*controls.values(), self.stop)
        for control in controls.values():
            control.observe(self._moved, "value")

    @property
    def values(self) -> dict:
        """The controls' present values by name."""
        return {name: control.value for name, control in self.controls.items()}

    def lacking(self, **values) -> Iterable[Callable[[], object]]:
        """The measurements that the picture needs and that have not been made; `draw` can do without."""
        return ()

    def redraw(self, sharp: bool = True) -> None:
        """Draw the figure for the present values and show it; `sharp`, which takes longer, when no more is to come."""
        with self.drawing:
            for measure in self.lacking(**self.values):
                measure()
            self._redraw(sharp)

    def _redraw(self, sharp: bool) -> None:
        with self.drawing, cells_wait(), garbage_later():
            for axes in self.figure.axes:
                self.figure.delaxes(axes)  # as it is: `clear` would first empty it, which takes a tenth of the time
            self.figure.clear()
            text = self.draw(self.figure, **self.values)
            for axes in self.figure.axes:
                axes._autotitlepos = False  # titles stay at the top: to look for what is there takes a fifth of it
            buffer, line, canvas, self.behind = io.BytesIO(), self.growing, self.figure.canvas, None
            if sharp or line is None:
                self.figure.savefig(buffer, format="png", dpi=self.dpi if sharp else 100)
            else:
                line.set_animated(True)  # the others first, and it over a copy of them
                canvas.draw()
                self.behind = canvas.copy_from_bbox(line.axes.bbox)
                self._draw_growing(buffer)
            self._put(buffer, text)

    def _draw_growing(self, buffer: io.BytesIO) -> None:
        self.growing.axes.draw_artist(self.growing)
        imsave(buffer, self.figure.canvas.buffer_rgba(), format="png", pil_kwargs={"compress_level": 1})

    def _put(self, buffer: io.BytesIO, text: str | None) -> None:
        with self.image.hold_sync():  # one message, so that a picture never has another one's name
            self.image.value = buffer.getvalue()
            self.image.tooltip = self._said()  # for whoever does not see it
        self.text.value = text or ""

    def grown(self) -> tuple[Sequence[float], str]:
        """The heights of `growing` by now, at 1, 2, …, and the HTML below the figure."""
        raise NotImplementedError(f"{type(self).__name__} does not define grown")

    def advance(self) -> None:
        """Put what `growing` is now into the picture that is there; a point outside the axes waits for a new one."""
        with self.drawing, cells_wait():
            if self.behind is None:
                return
            (heights, text), buffer = self.grown(), io.BytesIO()
            self.growing.set_data(range(1, len(heights) + 1), heights)
            self.figure.canvas.restore_region(self.behind)
            self._draw_growing(buffer)
            self._put(buffer, text)

    def finish(self) -> None:
        """Do all of the work for the present values at once and wait for it."""
        self.cancel()
        if self.last is not None:
            self.last.join()
        for _ in self._steps(between=False):
            pass

    def start(self) -> None:
        """Do the work for the present values in a thread, in place of what runs now."""
        with self.starting:
            self.running = self.last = threading.Thread(target=self._work, args=(self.last,), daemon=True)
            self.running.start()

    def cancel(self) -> None:
        """Stop the running work, if any."""
        self.running, job = None, self.job
        if job is not None:
            job.cancel()

    def elsewhere(self, function: Callable[..., Iterator], *args, spare: bool = False) -> Iterator:
        """What the generator `function(*args)` yields in the process that trains for the kernel, which begins at once;
        see `Worker.submit`.

        Raises Elsewhere where that process cannot have it, and Stopped when the work is cancelled.
        """
        answers = self._answers(WORKER.submit(function, *args, spare=spare))
        next(answers)
        return answers

    def _answers(self, job: Job) -> Iterator:
        """None at first; the job ends with whoever reads it."""
        self.job = job
        if not self._mine():  # a move came while the job was being sent
            job.cancel()
        try:
            yield
            yield from job
        finally:
            self.job = None
            job.cancel()

    def afterwards(self) -> Iterable:
        """Work in short steps that a page does when the picture is complete, until a control is moved."""
        return ()

    def _steps(self, between: bool = True) -> Iterator[None]:
        """The work in short steps: a new picture after the first two, then every REDRAW seconds, and after the last."""
        if self.run is None:
            self.redraw()
            return
        work, drawn, shown = self.run(**self.values), 0.0, 0.0
        self.stop.disabled = False
        try:
            for i, self.bar.value in enumerate(work):
                now = time.perf_counter()
                if between and (i < 2 or now - drawn > self.REDRAW):
                    self.redraw(sharp=False)
                    drawn = shown = time.perf_counter()
                elif between and now - shown > self.ADVANCE:
                    self.advance()
                    shown = time.perf_counter()
                yield
            self.bar.value = 1.0
            self.redraw()
        except (ValueError, TypeError) as error:
            self.text.value = f"<b>{html.escape(str(error), quote=False)}</b>"
        finally:
            self.stop.disabled = True
            work.close()

    def _moved(self, _change) -> None:
        if not watched():  # as in a script: work until done
            self.finish()
        elif self.run is not None:
            self.start()
        else:
            self._say_errors(self._redraw_in_two)

    def _redraw_in_two(self) -> None:
        if not self.lacking(**self.values):
            self.redraw()
            return
        self._redraw(sharp=False)
        if self.apart:
            self.redraw()
        else:
            if WORKER.computing:
                self.text.value = "A cell runs that may use this model: what is new is measured when it has ended …"
            after_cells(partial(self._say_errors, self.redraw))

    def _work(self, before: threading.Thread | None) -> None:
        if before is not None:
            if (job := self.job) is not None:
                job.cancel()
            before.join()
        time.sleep(0.01)  # while a slider is dragged, only its last value is worked on
        if self._mine():
            self._say_errors(self._through)

    def _mine(self) -> bool:
        """Whether the work of this thread is still wanted."""
        return self.running is threading.current_thread()

    def _through(self) -> None:
        for work in (self._steps(), self.afterwards()):
            for _ in work:
                if not self._mine():
                    work.close()
                    raise Stopped
            self._keep()

    def _keep(self) -> None:
        """Puts the present picture into the saved notebook."""
        if self.picture is not None:
            self.picture.update(self._picture(), metadata=self._width(), raw=True)

    def _say_errors(self, do: Callable[[], None]) -> None:
        """Nobody reads what a thread raises, so it is shown below the picture."""
        try:
            do()
        except Stopped:
            if self.running is None:
                self.text.value += "<br>Stopped; move a control to start again."
        except Exception as error:
            self.text.value = f"<b>{html.escape(sentence(error), quote=False)}</b>"

    def _said(self) -> str:
        return " · ".join(f"{name} = {value}" for name, value in self.values.items())

    def _picture(self) -> dict:
        return {"text/plain": self._said(), "image/png": base64.b64encode(self.image.value).decode()}

    def _width(self) -> dict:
        return {"image/png": {"width": round(100 * self.figure.get_size_inches()[0])}}

    def _bundle(self) -> dict:
        return dict(self.box._repr_mimebundle_()) | self._picture()

    def _ipython_display_(self) -> None:
        if watched():
            self._show()
        elif self.run is None or self.image.value:
            self.redraw()
            display(self._bundle(), raw=True)
        else:
            self.redraw()
            shown = display(self._bundle(), raw=True, display_id=True)
            self.finish()
            shown.update(self._bundle(), raw=True)

    def _show(self) -> None:
        """On a page: style, box and, for readers of the saved notebook, the picture."""
        new, self.dpi = not self.image.value, 200  # sharp at any zoom
        works, lacks = self.run is not None and new, bool(self.lacking(**self.values))
        self._redraw(sharp=not (works or lacks))
        box = self._bundle()
        del box["image/png"]
        display({"text/html": STYLE, "text/plain": ""}, raw=True)
        display(box, raw=True)
        self.picture = display(self._picture(), metadata=self._width(), raw=True, display_id=True)
        if works:
            self.start()
        elif lacks:
            self.redraw()
            self._keep()
