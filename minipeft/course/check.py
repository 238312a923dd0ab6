"""What a learner calls in an exercise: `check.lora_forward(lora_forward)`, `check.hint("lora_forward", 1)`,
`check.solution("lora_forward")`, `check.progress("lora")`.

A check calls the learner's code on random inputs, compares with a slow and obvious reference, and shows one of four
outcomes: correct, wrong (with the first property that fails and what that usually means), not attempted, could not run.
A call that takes longer than `SECONDS` is stopped, and the kernel lives on: by a signal, which Python runs in the main
thread between two of its steps. Elsewhere (Windows, another thread, one endless step of a library) there is no limit,
and the notebook's stop button ends the call.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from minipeft.course.drives import perform
from minipeft.course.exercises import exercise, exercises
from minipeft.course.folds import folds, why_closed
from minipeft.course.folds import solution as opened
from minipeft.course.standing import Standing, remember, standings, table
from minipeft.course.verdict import CORRECT, COULD_NOT_RUN, Shown, Verdict, examine, raised

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
    """Shows the verdict, with hints and solution folded below, and remembers it for `progress`."""
    from IPython.display import display

    try:
        found = verdict(name, *objects)
    except ValueError as error:
        found = Verdict(name, COULD_NOT_RUN, (str(error),))
    display(found)
    display(folds(name, remember(name, found.outcome, objects)))


def hint(name: str, number: int = 1) -> None:
    """Prints the first or the second hint. ValueError for another number."""
    hints = exercise(name).hints
    if number not in range(1, len(hints) + 1):
        raise ValueError(f"{name} has {len(hints)} hints, so there is no hint {number!r}; ask for 1 or {len(hints)}.")
    print(f"Hint {number} of {len(hints)} for {name}: {hints[number - 1]}")


def solution(name: str) -> None:
    """Shows the solution, or says when it opens (see `folds`). ValueError for an unknown exercise."""
    from IPython.display import display

    closed = why_closed(name, standings().get(exercise(name).name, Standing()))
    text = closed or opened(name)
    display(Shown({"text/plain": text, "text/markdown": text}))


def progress(assignment: str | None = None) -> None:
    """Shows where the learner stands: each exercise of one assignment, and how many of each are right."""
    from IPython.display import display

    display(table(assignment))


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    try:
        exercise(name)
    except ValueError as error:
        raise AttributeError(str(error)) from None
    return partial(show, name)


def __dir__():
    return ["hint", "solution", "progress", *(name for several in exercises().values() for name in several)]
