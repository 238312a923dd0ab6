"""Widgets on a page of Jupyter: whether somebody looks, answers while a cell runs, and a notice without Python."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from _thread import interrupt_main
from collections.abc import Callable, Iterator

import ipywidgets
from IPython import get_ipython

PAUSE = 0.3  # seconds that a cell waits for a picture at most
SIGNAL = getattr(signal, "SIGUSR2", None)  # that it is to wait; none on Windows
TURN = 1e-4  # seconds that a thread waits for its turn while a cell computes; Python waits 5e-3, again and again

# A box that fits its page, a picture that follows the theme, and a notice where Python is gone.
STYLE = """<span class="minipeft-page"></span><style>
.minipeft-box { width: 100%; max-width: 964px; margin: 0; overflow: clip; }
.minipeft-box .widget-label { max-width: none; }
.minipeft-box .widget-readout { margin-right: 8px; }
.minipeft-box img { width: calc(100% - 4px); height: auto; }
body[data-jp-theme-light="false"] .minipeft-box img { filter: invert(0.93) hue-rotate(180deg); }
.jp-OutputArea-child:has(.minipeft-box) + .jp-OutputArea-child { display: none; }
.minipeft-box.jupyter-widgets-disconnected::after, .jp-Notebook:has(
  .jp-Notebook-ExecutionIndicator[data-status="unknown"]) .minipeft-box:not(.jupyter-widgets-disconnected)::after {
  content: "Python was restarted: run this cell again."; display: block; padding: 4px 8px; font-weight: bold;
  color: var(--jp-ui-font-color1); border-left: 4px solid #D55E00; }
.jp-OutputArea-child:has(.minipeft-page) + .jp-OutputArea-child:not(:has(.minipeft-box)) > * { display: none; }
.jp-OutputArea-child:has(.minipeft-page) + .jp-OutputArea-child:not(:has(.minipeft-box))::after {
  content: "The controls need Python: run this cell."; padding: 4px 8px; border-left: 4px solid #D55E00; }
.minipeft-box.jupyter-widgets-disconnected > * { opacity: .4; pointer-events: none; }
</style>"""


def watched() -> bool:
    """Whether somebody looks on: a page that names its cells asked for what runs now, or a control was moved.

    Programs that execute notebooks do neither; they wait for what a cell leaves when it is done.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is None:
        return False
    try:
        request = kernel.get_parent()
    except LookupError:  # nothing was asked for yet
        return False
    return request.get("header", {}).get("msg_type") == "comm_msg" or "cellId" in request.get("metadata", {})


def answer_at_once(*controls: ipywidgets.Widget) -> None:
    """Lets these controls answer while a cell runs, where the kernel can: it would send their moves to the thread that
    spoke last to them, which is that of the cells. The two take turns, and each operation of torch gives up one."""
    for control in controls:
        if hasattr(control.comm, "_reply_subshell_for"):
            control.comm._reply_subshell_for = lambda data, default: default
            sys.setswitchinterval(TURN)


def tell_of_cells(told: Callable[[bool], None]) -> None:
    """Calls `told(True)` when a cell begins, and `told(False)` when it ends, beginning with the one that runs."""
    told(True)
    get_ipython().events.register("pre_run_cell", lambda _: told(True))
    get_ipython().events.register("post_run_cell", lambda _: told(False))


def after_cells(do: Callable[[], None]) -> None:
    """Has the thread of the cells call `do()` as soon as it runs none; without a kernel it is called now."""
    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is None:
        do()
    else:
        kernel.io_loop.add_callback(do)


drawn = threading.Event()
drawn.set()


def wait_for_picture(*_) -> None:
    drawn.wait(PAUSE)


def let_cells_wait() -> None:
    """Allows `cells_wait`, where the system has such a signal and nobody else uses it."""
    if SIGNAL is not None and signal.getsignal(SIGNAL) == signal.SIG_DFL:
        with contextlib.suppress(ValueError):  # only the main thread may say what a signal does
            signal.signal(SIGNAL, wait_for_picture)


@contextlib.contextmanager
def cells_wait() -> Iterator[None]:
    """Within it a cell that runs in the main thread waits at its next step, for PAUSE at most: two threads of Python
    run in turns, and drawing would give up its own a thousand times a picture, at each letter and line."""
    may = SIGNAL is not None and signal.getsignal(SIGNAL) is wait_for_picture
    if not may or threading.current_thread() is threading.main_thread():
        yield
        return
    drawn.clear()
    interrupt_main(SIGNAL)
    try:
        yield
    finally:
        drawn.set()
