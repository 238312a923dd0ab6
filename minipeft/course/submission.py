"""One submission: run in a process of its own, examined from outside, and reported on."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import nbformat

from minipeft.course import pristine, replies, suspicion
from minipeft.course.exercises import exercises
from minipeft.course.mend import exercise_of, is_test, locked, mend, name_of, read, source_of, source_text
from minipeft.course.sandbox import CannotStart, Killed, Limits, Sandbox
from minipeft.course.verdict import CORRECT, COULD_NOT_RUN, NOT_ATTEMPTED, Verdict, examine

RESTARTS = 4  # how often a process that died is started again without the cell or call that ended it
LIMITS = Limits()
REMARKS = 30  # of one submission


def report(
    text: str, assignment: str, limits: Limits = LIMITS, problem: str = "", stop: threading.Event | None = None
) -> dict:
    """Everything about one submission as JSON: verdicts, points, remarks, the executed notebook.

    `problem` says why there is no text. It raises CannotStart where no submission can be run, Stopped when `stop` is
    set, and otherwise nothing, whatever the text holds.
    """
    started = time.perf_counter()
    points = marks(assignment)
    found = {"assignment": assignment, "digest": digest(text, assignment, limits, problem), "peak_memory": 0}
    try:
        if problem:
            raise ValueError(problem)
        notebook, remarks = mend(read(text), assignment)
        run = Run(notebook, assignment, seed_of(text, assignment), limits, stop)
        run.to_the_end()
        verdicts, found["peak_memory"] = run.verdicts, run.peak
        remarks += run.remarks + suspicion.lines_to_look_at(notebook, assignment)
        found["pieces"] = suspicion.pieces(notebook, assignment)
    except ValueError as error:
        notebook, _ = mend(nbformat.v4.new_notebook(), assignment)
        verdicts = {name: Verdict(name, COULD_NOT_RUN, (str(error),)) for name in points}
        remarks, found["pieces"] = [str(error)], []
    verdicts = {name: shortened(verdicts[name]) for name in points}
    for cell in (c for c in notebook.cells if is_test(c)):
        cell.outputs = [as_output(verdicts[exercise_of(cell)])]
    found["remarks"] = [replies.clean(each, 300) for each in dict.fromkeys(remarks)][:REMARKS]
    found["verdicts"] = {name: asdict(verdict) for name, verdict in verdicts.items()}
    found["points"] = {n: (points[n] if v.outcome == CORRECT else 0) for n, v in verdicts.items()}
    found["most"] = points
    found["notebook"] = json.loads(nbformat.writes(notebook))
    found["seconds"] = round(time.perf_counter() - started, 2)
    return found


def marks(assignment: str) -> dict[str, int]:
    """{exercise: the most points} of an assignment."""
    return {exercise_of(c): c.metadata.nbgrader.points for c in source_of(assignment).cells if is_test(c)}


def shortened(verdict: Verdict) -> Verdict:
    """The verdict at a length that any page can take: a line may quote what a stranger returned."""
    return Verdict(verdict.exercise, verdict.outcome, tuple(replies.clean(line, 2000) for line in verdict.lines[:20]))


# ---------------------------------------------------------------------------------------------------------------------
# What a report is about: whoever mends a check, a cell or a limit gets new reports
# ---------------------------------------------------------------------------------------------------------------------
def digest(text: str, assignment: str, limits: Limits = LIMITS, problem: str = "") -> str:
    """A number of all that a report depends on: what was handed in, the assignment, its checks, and the limits."""
    whole = (content(text), problem, source_text(assignment), checks(), repr(limits), *live(assignment))
    return hashlib.sha256("\0".join(whole).encode("utf-8", "replace")).hexdigest()


def seed_of(text: str, assignment: str) -> int:
    """The seed of the numbers that a submission is tried on; it follows from what the cells say alone."""
    whole = f"{content(text)}\0{source_text(assignment)}"
    return int(hashlib.sha256(whole.encode("utf-8", "replace")).hexdigest()[:8], 16)


def content(text: str) -> str:
    """The cells' names, kinds, texts and marks; the text itself if it is no notebook."""
    try:
        return json.dumps([(c.cell_type, c.source, c.metadata.get("nbgrader")) for c in read(text).cells])
    except ValueError:
        return text


@cache
def checks() -> str:
    """A number of the files that decide about an answer."""
    folder = Path(__file__).parent
    alone = ("verdict", "submission", "mend", "replies", "suspicion", "pristine", "sandbox", "worker", "wire")
    files = [*sorted(folder.glob("exercises/**/*.py")), *sorted(folder.glob("drives/**/*.py"))]
    texts = [path.read_bytes() for path in (*files, *(folder / f"{name}.py" for name in alone))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


def live(assignment: str) -> Iterator[str]:
    """The exercises as they are in memory, where somebody may have put others in their place."""
    for name, each in exercises()[assignment].items():
        code = getattr(each.cases, "__code__", None)
        yield f"{name} {each.objects} {each.drive} {code and pristine.instructions(code)}"


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """Executes the notebook's cells and examines what they define, at the place of each test.

    `fatal` has the cells that ended the process, and why; they are left out when it is started again.
    """

    notebook: nbformat.NotebookNode
    assignment: str
    seed: int
    limits: Limits
    stop: threading.Event | None = None
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)  # of the cells with answers
    fatal: dict[int, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    whole: str = ""  # what the functions that measure were when the process started
    room: int = replies.ROOM
    peak: int = 0

    def to_the_end(self) -> None:
        deadline = time.monotonic() + self.limits.seconds
        for attempt in range(RESTARTS + 1):
            i = -1
            try:
                with Sandbox(self.limits, self.stop) as box:
                    box.started = deadline - self.limits.seconds  # the restarts share the submission's time
                    try:
                        self.whole = box.ask(do="state", whole=False)["state"]
                        for i, cell in enumerate(self.notebook.cells):
                            if cell.cell_type == "code":
                                self.step(box, i, cell)
                        break
                    finally:
                        self.peak = max(self.peak, box.peak)
            except CannotStart:
                if attempt == RESTARTS:
                    raise
                time.sleep(1)
            except Killed as killed:
                if i < 0 or time.monotonic() > deadline:
                    self.remarks.append(f"The run was ended: {killed}.")
                    break
                self.left_out(i, str(killed))
        for name in exercises()[self.assignment]:
            lost = f"It was not reached: {'; '.join(self.fatal.values()) or 'the time was used up'}."
            self.verdicts.setdefault(name, Verdict(name, COULD_NOT_RUN, (lost,)))

    def left_out(self, i: int, why: str) -> None:
        """Notes that a cell ended the process."""
        cell = self.notebook.cells[i]
        self.fatal[i] = why
        cell.outputs = [error("Killed", f"The process was ended here: {why}.")]
        if is_test(cell):
            name = exercise_of(cell)
            self.verdicts[name] = Verdict(name, COULD_NOT_RUN, (f"When it was called: {why}.",))
        elif name_of(cell):
            self.errors[name_of(cell)] = why
        self.remarks.append(f"Cell {i + 1} ended the process: {why}.")

    def step(self, box: Sandbox, i: int, cell) -> None:
        """One cell: run it, or examine what its exercise names. Those tagged "at-home" take long and earn nothing."""
        if is_test(cell):
            if exercise_of(cell) not in self.verdicts:
                self.examined(box, exercise_of(cell))
        elif i not in self.fatal and "at-home" not in cell.metadata.get("tags", ()):
            cell.outputs = replies.outputs_of(box.ask(do="cell", source=cell.source), self.room)
            self.room -= sum(map(replies.size, cell.outputs))
            for output in cell.outputs:
                if output.output_type == "error":
                    if output.ename == "MemoryError":
                        raise Killed("it used up its memory")
                    self.errors[name_of(cell) or ""] = f"{output.ename}: {output.evalue}"
            if not (name_of(cell) and locked(cell)):
                self.untouched(box)

    def examined(self, box: Sandbox, name: str) -> None:
        exercise = exercises()[self.assignment][name]

        def call(*args):
            reply = box.ask(do="call", objects=list(exercise.objects), drive=exercise.drive, args=args)
            return replies.outcome(reply, args)

        verdict = examine(exercise, call, self.seed)
        self.untouched(box)
        if verdict.outcome == NOT_ATTEMPTED and name in self.errors:
            verdict = Verdict(name, COULD_NOT_RUN, (f"Its cell stops with {self.errors[name]}.",))
        self.verdicts[name] = verdict

    def untouched(self, box: Sandbox) -> None:
        """Raises Killed if a function that measures has been replaced since the process started."""
        if box.ask(do="state", whole=False).get("state") == self.whole:
            return
        with Sandbox(self.limits, self.stop) as pristine_box:
            before = pristine_box.ask(do="state", whole=True)["state"]
        names = pristine.replaced(box.ask(do="state", whole=True).get("state"), before)
        raise Killed(f"it replaced what answers are measured with ({', '.join(names[:3]) or 'and put it back'})")


def error(kind: str, text: str):
    return nbformat.v4.new_output("error", ename=kind, evalue=text, traceback=[text])


def as_output(verdict: Verdict):
    """What nbgrader turns into points: an error costs them."""
    if verdict.outcome == CORRECT:
        return nbformat.v4.new_output("stream", name="stdout", text=repr(verdict))
    return error(verdict.outcome, repr(verdict))
