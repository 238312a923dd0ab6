"""One submission: run in a process of its own, examined from outside, and reported on."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat

from minipeft.course.exercises import exercises
from minipeft.course.mend import exercise_of, is_test, mend, name_of, read, source_text
from minipeft.course.sandbox import CannotStart, Killed, Limits, Sandbox
from minipeft.course.verdict import CORRECT, COULD_NOT_RUN, NOT_ATTEMPTED, Raised, Verdict, examine

RESTARTS = 4  # how often a process that died is started again without the cell or call that ended it
LIMITS = Limits()


@dataclass(frozen=True)
class Submission:
    """One file of one student; `path` None where there is none, and `problem` says why."""

    student: str
    assignment: str
    path: Path | None
    problem: str = ""


def report(text: str, assignment: str, limits: Limits = LIMITS) -> dict:
    """Everything about one submission as JSON: verdicts, points, remarks, the executed notebook.

    It raises CannotStart where no submission can be run, and otherwise nothing, whatever the text holds.
    """
    started = time.perf_counter()
    source = nbformat.reads(source_text(assignment), as_version=4)
    points = {exercise_of(cell): cell.metadata.nbgrader.points for cell in source.cells if is_test(cell)}
    found = {"assignment": assignment, "digest": digest(text, assignment), "remarks": [], "peak_memory": 0}
    try:
        notebook, found["remarks"] = mend(read(text), assignment)
    except ValueError as error:
        notebook, remarks = mend(nbformat.v4.new_notebook(), assignment)
        verdicts = {name: Verdict(name, COULD_NOT_RUN, (str(error),)) for name in points}
        found["remarks"] = [str(error)]
        for cell in (c for c in notebook.cells if is_test(c)):
            cell.outputs = [as_output(verdicts[exercise_of(cell)])]
    else:
        verdicts = run(notebook, assignment, int(found["digest"][:8], 16), limits, found)
    found["verdicts"] = {name: asdict(verdict) for name, verdict in verdicts.items()}
    found["points"] = {n: (points[n] if v.outcome == CORRECT else 0) for n, v in verdicts.items()}
    found["most"] = points
    found["notebook"] = json.loads(nbformat.writes(notebook))
    found["seconds"] = round(time.perf_counter() - started, 2)
    return found


def digest(text: str, assignment: str) -> str:
    return hashlib.sha256(f"{text}\0{source_text(assignment)}".encode("utf-8", "replace")).hexdigest()


def run(notebook, assignment: str, seed: int, limits: Limits, found: dict) -> dict[str, Verdict]:
    """Executes the notebook's cells and examines what they define, at the place of each test."""
    verdicts: dict[str, Verdict] = {}
    errors: dict[str, str] = {}  # of the cells with answers
    fatal: dict[int, str] = {}  # cells that ended the process, and why; they are left out the next time
    deadline = time.monotonic() + limits.seconds
    for attempt in range(RESTARTS + 1):
        i = -1
        try:
            with Sandbox(limits) as box:
                box.started = deadline - limits.seconds  # the restarts share the submission's time
                try:
                    for i, cell in enumerate(notebook.cells):
                        if cell.cell_type == "code":
                            step(box, i, cell, exercises()[assignment], seed, verdicts, fatal, errors)
                    break
                finally:
                    found["peak_memory"] = max(found["peak_memory"], box.peak)
        except CannotStart:
            if attempt == RESTARTS:
                raise
            time.sleep(1)
        except Killed as killed:
            if i < 0 or time.monotonic() > deadline:
                found["remarks"].append(f"The run was ended: {killed}.")
                break
            fatal[i] = str(killed)
            cell = notebook.cells[i]
            cell.outputs = [problem("Killed", f"The process was ended here: {killed}.")]
            if is_test(cell):
                name = exercise_of(cell)
                verdicts[name] = Verdict(name, COULD_NOT_RUN, (f"When it was called: {killed}.",))
            found["remarks"].append(f"Cell {i + 1} ended the process: {killed}.")
    for cell in (c for c in notebook.cells if is_test(c)):
        name = exercise_of(cell)
        lost = f"It was not reached: {'; '.join(fatal.values()) or 'the time was used up'}."
        verdicts.setdefault(name, Verdict(name, COULD_NOT_RUN, (lost,)))
        cell.outputs = [as_output(verdicts[name])]
    return verdicts


def step(box: Sandbox, i: int, cell, known: dict, seed: int, verdicts: dict, fatal: dict, errors: dict) -> None:
    """One cell: run it, or examine what its exercise names. Cells tagged "at-home" take long and earn nothing."""
    if is_test(cell):
        exercise = known[exercise_of(cell)]
        if exercise.name not in verdicts:

            def call(*args):
                reply = box.ask(do="call", objects=list(exercise.objects), drive=exercise.drive, args=args)
                return outcome(reply), tuple(reply["after"])

            verdict = examine(exercise, call, seed)
            if verdict.outcome == NOT_ATTEMPTED and exercise.name in errors:
                verdict = Verdict(exercise.name, COULD_NOT_RUN, (f"Its cell stops with {errors[exercise.name]}.",))
            verdicts[exercise.name] = verdict
    elif i not in fatal and "at-home" not in cell.metadata.get("tags", ()):
        cell.outputs = outputs_of(box.ask(do="cell", source=cell.source))
        for output in cell.outputs:
            if output.output_type == "error":
                if output.ename == "MemoryError":
                    raise Killed("it used up its memory")
                errors[name_of(cell) or ""] = f"{output.ename}: {output.evalue}"


def outcome(reply):
    """The value in a reply, or the exception. Raises Killed for a reply of another form."""
    try:
        got = reply["got"]
        if "raised" in got:
            kinds, text, where = got["raised"]
            return Raised(tuple(map(str, kinds)) or ("Exception",), str(text), str(where))
        reply["after"]
        return got["value"]
    except (TypeError, KeyError, ValueError) as error:
        raise Killed("it sent a malformed reply") from error


def outputs_of(reply) -> list:
    """Outputs in nbformat's form: whatever is not of that form is left out."""
    kept = []
    for output in reply.get("outputs", []) if isinstance(reply, dict) else []:
        try:
            new = nbformat.from_dict(output)
            nbformat.validate(new, ref="output", version=4)
            kept.append(new)
        except Exception:  # an output that only a forged reply can hold
            continue
    return kept


def problem(kind: str, text: str):
    return nbformat.v4.new_output("error", ename=kind, evalue=text, traceback=[text])


def as_output(verdict: Verdict):
    """What nbgrader turns into points: an error costs them."""
    if verdict.outcome == CORRECT:
        return nbformat.v4.new_output("stream", name="stdout", text=repr(verdict))
    return problem(verdict.outcome, repr(verdict))
