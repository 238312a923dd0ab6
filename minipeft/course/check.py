"""What a learner calls in an exercise: `check.lora_forward(lora_forward)`, `check.hint("lora_forward", 1)`,
`check.progress()`.

A check calls the learner's code on random inputs, compares with a slow and obvious reference, and shows one of four
outcomes: correct, wrong (with the first property that fails and what that usually means), not attempted, could not run.
A call that takes longer than `SECONDS` is stopped, and the kernel lives on: by a signal, which Python runs in the main
thread between two of its steps. Elsewhere (Windows, another thread, one endless step of a library) there is no limit,
and the notebook's stop button ends the call.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from minipeft.course.drives import perform
from minipeft.course.exercises import exercise, exercises
from minipeft.course.verdict import CORRECT, COULD_NOT_RUN, NOT_ATTEMPTED, Verdict, examine, raised
from minipeft.whole import write_whole

SEED = 0  # of the visible checks: the same failing case comes again until it is mended
SECONDS = 10  # that one call may take


def verdict(name: str, *objects, seed: int = SEED) -> Verdict:
    """Examines the learner's objects (one, or as many as the exercise names) and returns what came out.

    Raises ValueError for an unknown exercise or another number of objects.
    """
    it = exercise(name)
    if len(objects) != len(it.objects):
        raise ValueError(f"check.{name} needs {', '.join(it.objects)}, but got {len(objects)} objects.")
    return examine(it, lambda *args: in_time(it.drive, objects, args), seed)


def in_time(drive: str, objects: tuple, args: tuple) -> tuple[object, tuple]:
    """`perform`, where the main thread stops it after `SECONDS`."""
    try:
        with alarm(SECONDS):
            return perform(drive, objects, args)
    except TimeoutError as error:
        return raised(error), args


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """TimeoutError after `seconds`, and every second from then on, in case that the code goes on after the first."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def out_of_time(signum, frame):
        raise TimeoutError("it took too long")

    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def grade(name: str, *objects) -> None:
    """The same with other random numbers, for graders: AssertionError with the verdict unless it is correct."""
    found = verdict(name, *objects, seed=int.from_bytes(os.urandom(4), "big"))
    if found.outcome != CORRECT:
        raise AssertionError(repr(found))


def show(name: str, *objects) -> None:
    """Shows the verdict, and remembers it for `progress`."""
    from IPython.display import display

    try:
        found = verdict(name, *objects)
    except ValueError as error:
        found = Verdict(name, COULD_NOT_RUN, (str(error),))
    remember(name, found.outcome)
    display(found)


def hint(name: str, number: int = 1) -> None:
    """Prints the first or the second hint. ValueError for another number."""
    hints = exercise(name).hints
    if number not in range(1, len(hints) + 1):
        raise ValueError(f"{name} has {len(hints)} hints, so there is no hint {number!r}; ask for 1 or {len(hints)}.")
    print(f"Hint {number} of {len(hints)} for {name}: {hints[number - 1]}")


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    try:
        exercise(name)
    except ValueError as error:
        raise AttributeError(str(error)) from None
    return partial(show, name)


def __dir__():
    return ["hint", "progress", *(name for several in exercises().values() for name in several)]


# ---------------------------------------------------------------------------------------------------------------------
# Where the learner stands
# ---------------------------------------------------------------------------------------------------------------------
def store() -> Path:
    """The file with the learner's last outcomes, in the user's data folder."""
    from platformdirs import user_data_path

    return Path(os.environ.get("MINIPEFT_PROGRESS") or user_data_path("minipeft") / "progress.json")


def outcomes() -> dict[str, str]:
    """{exercise: last outcome}; {} when there are none, or the file is damaged."""
    try:
        found = json.loads(store().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def remember(name: str, outcome: str) -> None:
    """Keeps an outcome; a learner who may not write there does without."""
    try:
        write_whole(store(), json.dumps(outcomes() | {name: outcome}, indent=1))
    except OSError:
        return


def progress() -> None:
    """Shows every exercise of every assignment with its last outcome: full, half or empty."""
    import matplotlib.pyplot as plt

    figure = progress_figure()
    plt.show()
    plt.close(figure)


def progress_figure():
    """The picture that `progress` shows; shapes say what colours say."""
    import matplotlib.pyplot as plt

    known, every = outcomes(), exercises()
    longest = max(len(several) for several in every.values())
    figure, axes = plt.subplots(figsize=(min(1.15 * longest + 1.8, 13), 1.3 * len(every) + 0.7), layout="constrained")
    kinds = {
        CORRECT: ("o", "#1a7f37", "full"),
        NOT_ATTEMPTED: ("o", "#8c959f", "none"),
        "tried": ("o", "#bf8700", "left"),
    }
    for y, (assignment, several) in enumerate(every.items()):
        done = sum(known.get(name) == CORRECT for name in several)
        for x, name in enumerate(several):
            outcome = known.get(name, NOT_ATTEMPTED)
            marker, colour, fill = kinds[outcome if outcome in kinds else "tried"]
            axes.plot(x, y, marker, color=colour, fillstyle=fill, markerfacecoloralt="white", markersize=20, mew=2)
            axes.text(x, y + 0.36, name.replace("_", "_\n"), ha="center", va="top", fontsize=8)
        axes.text(-0.75, y, f"{assignment}\n{done} of {len(several)}", ha="right", va="center", fontweight="bold")
    axes.set(xlim=(-0.7, longest - 0.5), ylim=(len(every) - 0.15, -0.5))
    axes.axis("off")
    axes.set_title("Exercises: full = correct, half = tried, empty = not attempted", fontsize=10)
    return figure
