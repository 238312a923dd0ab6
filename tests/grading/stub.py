"""A class without the expensive parts: answers that say themselves whether they are right, no process, no nbgrader."""

from __future__ import annotations

import contextlib
import copy
import re
from pathlib import Path

import nbformat
import pytest
from hostile import cell_named

from minipeft import whole
from minipeft.course import grade, submission
from minipeft.course.assignments import sources
from minipeft.course.exercises import exercises
from minipeft.course.gradebook import Gradebook
from minipeft.course.verdict import CORRECT, COULD_NOT_RUN, NOT_ATTEMPTED, WRONG, Raised, Verdict

ASSIGNMENT = "quantisation"
SOURCE = nbformat.read(sources()[ASSIGNMENT], as_version=4)
EXERCISES = list(exercises()[ASSIGNMENT])
POINTS = submission.marks(ASSIGNMENT)


def notebook(wrong: set[str] = frozenset(), forged: str = ""):
    """A submission whose answers are right but for some; `forged` names a reply of `Box.forged` that a cell sends."""
    made = copy.deepcopy(SOURCE)
    for name in EXERCISES:
        cell_named(made, name).source = f"def {name}():\n    return {name not in wrong}"
    if forged:
        made.cells.insert(1, nbformat.v4.new_code_cell(f"FORGES {forged}"))
    return made


def worth(wrong: set[str] = frozenset()) -> int:
    return sum(points for name, points in POINTS.items() if name not in wrong)


class Box:
    """In the place of the Sandbox: finds out from a cell's text what it would define, and sends forged replies."""

    forged: dict[str, object] = {}
    started = peak = 0

    def __init__(self, limits, stop=None):
        self.defined, self.forging = {}, None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def ask(self, do: str, **message):
        if do == "state":
            return {"state": "as it was"}
        if do == "cell":
            self.forging = re.search(r"^FORGES (\w+)$", message["source"], re.MULTILINE) or self.forging
            self.defined |= dict(re.findall(r"^def (\w+)\(\):\n    return (\w+)$", message["source"], re.MULTILINE))
            reply = {"outputs": []}
        else:
            said = self.defined.get(message["objects"][0])
            value = {"value": said == "True"} if said else {"raised": [["NotImplementedError"], "", ""]}
            reply = {"got": value, "after": message["args"]}
        return self.forged[self.forging[1]] if self.forging and self.forging[1] in self.forged else reply


def judged(exercise, run, seed) -> Verdict:
    got, _ = run(1, 2)
    if isinstance(got, Raised):
        return Verdict(exercise.name, NOT_ATTEMPTED if got.kinds[0] == "NotImplementedError" else COULD_NOT_RUN)
    return Verdict(exercise.name, CORRECT if got is True else WRONG)


class NoGradebook(Gradebook):
    """Only Gradescope's files."""

    def __init__(self, out: Path, reveal: bool):
        self.out = out

    def start(self, names):
        return None

    def record(self, each, found):
        return ""

    def penalty(self):
        return {}


@contextlib.contextmanager
def cheap(forged: dict | None = None, gradebook: type = NoGradebook):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submission, "Sandbox", Box)
        patch.setattr(submission, "examine", judged)
        patch.setattr(grade, "Gradebook", gradebook)
        patch.setattr(whole.os, "fsync", lambda file: None)  # no power cut is tested here
        patch.setattr(Box, "forged", forged or {})
        yield
