"""A whole class graded: `make grade SUBMISSIONS=folder`, or `grade("folder", "graded")`.

    submitted file ─▶ mend ─▶ run in a process of its own ─▶ examine from outside ─▶ report ─▶ nbgrader's gradebook
                     (locked cells from the source)    (never sees the answers)   (on disk at once)

The code of a submission runs in a `Sandbox`. What it defines is called from here, on inputs drawn from a hash of the
file itself, and the results are compared here; so patching a library or reading a stack frame gains nothing. nbgrader
then records what was found, one student at a time. A killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import nbformat
import pandas as pd
from nbgrader.preprocessors import NbGraderPreprocessor

from minipeft.course import assignments
from minipeft.course.exercises import exercises
from minipeft.course.sandbox import CannotStart, Killed, Limits, Sandbox, isolation
from minipeft.course.verdict import CORRECT, COULD_NOT_RUN, NOT_ATTEMPTED, Raised, Verdict, examine
from minipeft.whole import write_whole

RESTARTS = 4  # how often a process that died is started again without the cell or call that ended it
LIMITS = Limits()
LARGEST = 20 * 2**20  # bytes of a submitted file


# ---------------------------------------------------------------------------------------------------------------------
# Mending: what a student must not change comes from the source
# ---------------------------------------------------------------------------------------------------------------------
@cache
def source_text(assignment: str) -> str:
    return assignments.sources()[assignment].read_text(encoding="utf-8")


def read(text: str):
    """A notebook from a stranger's text. ValueError says in one sentence what is wrong with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ids that stand there twice
            notebook = nbformat.reads(text, as_version=4)
        for cell in notebook.cells:
            if not isinstance(cell.source, str) or cell.cell_type not in ("code", "markdown", "raw"):
                raise TypeError("a cell has no text")
    except Exception as error:  # nbformat raises whatever its parsing meets
        raise ValueError(f"The file is not a notebook ({type(error).__name__}: {str(error)[:120]}).") from error
    return notebook


def mend(submitted, assignment: str):
    """(a notebook with every cell of the source and all of the student's code, in the student's order; remarks).

    Cells that the student may edit keep the student's text, and so do cells that the student added. Every other cell is
    taken from the source, once: changed ones are restored, deleted ones put back, copies taken out.
    """
    source = nbformat.reads(source_text(assignment), as_version=4)
    original = {name_of(cell): cell for cell in source.cells if name_of(cell)}
    titles = {cell.source.strip(): name for name, cell in original.items() if locked(cell)}
    released = nbformat.reads(released_text(assignment), as_version=4)
    titles |= {cell.source.strip(): name_of(cell) for cell in released.cells if name_of(cell) and locked(cell)}
    plain = {cell.source.strip() for cell in released.cells if not name_of(cell)}
    known = {name_of(cell) for cell in submitted.cells}
    cells, seen, remarks = [], set(), []
    if not known & set(original):
        remarks.append("The cells have lost their names, and were recognised by what stands in them.")
    for cell in submitted.cells:
        name = name_of(cell) or titles.get(cell.source.strip()) or defines(cell, set(original) - known)
        if cell.source.strip() in plain and cell.cell_type == "markdown":
            continue  # the course's own prose
        if name not in original:
            cells.append(fresh(cell))
        elif name not in seen:
            seen.add(name)
            cells.append(restored(original[name], cell, released, remarks))
        elif locked(original[name]):
            remarks.append(f"A copy of the cell {name} was taken out.")
        else:
            remarks.append(f"A second cell {name} counts as an added cell.")
            cells.append(fresh(cell))
    missing = [name for name in original if name not in seen]
    setup = [n for n in missing if locked(original[n]) and not is_test(original[n])]
    later = [n for n in missing if n not in setup]
    for name in missing:
        remarks.append(f"The cell {name} was missing and has been put back.")
    blank = "# No cell with this name was handed in."
    cells[:0] = [deepcopy(original[n]) for n in setup]
    cells += [deepcopy(original[n]) if locked(original[n]) else blanked(original[n], blank) for n in later]
    source.cells = cells
    assignments.tidy(source)
    return source, remarks


def restored(original, cell, released, remarks: list[str]):
    """The source's cell, with the student's text if the student may edit it."""
    name, new = name_of(original), deepcopy(original)
    if locked(original):
        given = next(c for c in released.cells if name_of(c) == name)
        if cell.source.strip() not in (given.source.strip(), original.source.strip()):
            remarks.append(f"The cell {name} was changed and has been restored.")
    else:
        new.source = cell.source
    before = cell.metadata.get("nbgrader")
    if isinstance(before, dict) and before.get("points", 0) != original.metadata.nbgrader.get("points", 0):
        remarks.append(f"The marks of the cell {name} were changed and have been restored.")
    return new


def defines(cell, names: set[str]) -> str | None:
    """The one of these names that the cell defines as a function or class, if it is a cell without a name."""
    found = re.findall(r"^(?:def|class) (\w+)", cell.source, re.MULTILINE) if cell.cell_type == "code" else []
    return next((name for name in found if name in names), None)


def fresh(cell):
    new = nbformat.from_dict({k: cell[k] for k in ("cell_type", "source")} | {"metadata": {}})
    if new.cell_type == "code":
        new |= {"outputs": [], "execution_count": None}
    return nbformat.from_dict(new)


def blanked(cell, text: str):
    new = deepcopy(cell)
    new.source = text
    return new


def name_of(cell) -> str | None:
    data = cell.metadata.get("nbgrader")
    name = data.get("grade_id") if isinstance(data, dict) else None
    return name if isinstance(name, str) else None


def locked(cell) -> bool:
    return not cell.metadata.nbgrader.get("solution")


def is_test(cell) -> bool:
    return bool(cell.metadata.get("nbgrader", {}).get("grade"))


@cache
def released_text(assignment: str) -> str:
    return assignments.release(assignments.sources()[assignment])


# ---------------------------------------------------------------------------------------------------------------------
# One submission
# ---------------------------------------------------------------------------------------------------------------------
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


def exercise_of(cell) -> str:
    return name_of(cell).removeprefix("test_")


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


# ---------------------------------------------------------------------------------------------------------------------
# nbgrader's part
# ---------------------------------------------------------------------------------------------------------------------
class Mend(NbGraderPreprocessor):
    """Before nbgrader looks at a submission: `mend`."""

    def preprocess(self, nb, resources):
        return mend(nb, resources["nbgrader"]["assignment"])[0], resources


class Isolated(NbGraderPreprocessor):
    """In the place of nbgrader's Execute: runs the notebook in a sandbox, or takes the report that there is."""

    reports: dict[tuple[str, str], dict] = {}  # what `grade` has found: {(assignment, student): report}

    def preprocess(self, nb, resources):
        known = resources["nbgrader"]
        found = self.reports.get((known["assignment"], known["student"]))
        if found is None:
            found = report(nbformat.writes(nb), known["assignment"])
        return nbformat.reads(json.dumps(found["notebook"]), as_version=4), resources


# ---------------------------------------------------------------------------------------------------------------------
# A class
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Submission:
    student: str
    assignment: str
    path: Path | None
    problem: str = ""


def discover(folder: Path, assignment: str | None = None) -> list[Submission]:
    """What was handed in: <student>.ipynb, <student>/<any>.ipynb or nbgrader's <student>/<assignment>/<any>.ipynb.

    Without `assignment`, the file's or folder's name says which it is. ValueError when there is nothing.
    """
    known = list(assignments.sources())
    if assignment is not None and assignment not in known:
        raise ValueError(f"There is no assignment {assignment!r}; there is {', '.join(known)}.")
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r} with submissions.")
    found: dict[tuple[str, str], Submission] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or not (entry.is_dir() or entry.suffix == ".ipynb"):
            continue
        student = entry.stem if entry.is_file() else entry.name
        files = [entry] if entry.is_file() else sorted(entry.rglob("*.ipynb"))
        files = [file for file in files if ".ipynb_checkpoints" not in file.parts and not file.is_symlink()]
        for file in files:
            parts = [*file.relative_to(folder).parts[1:-1], file.stem]
            which = (
                next((p for p in parts if p in known), None) or assignment or (known[0] if len(known) == 1 else None)
            )
            if which is None or (assignment is not None and which != assignment):
                if which is None:
                    print(
                        f"{file}: it does not say which assignment it is; name it, or give ASSIGNMENT=", file=sys.stderr
                    )
                continue
            first = found.setdefault((student, which), Submission(student, which, file))
            if first.path != file and file.stem == which and first.path.stem != which:
                found[student, which] = Submission(student, which, file)  # the file with the right name counts
        if not files and assignment is not None:
            found[student, assignment] = Submission(student, assignment, None, "No notebook was handed in.")
    if not found:
        raise ValueError(f"There is no notebook in {str(folder)!r}, neither <student>.ipynb nor <student>/….ipynb.")
    return [found[key] for key in sorted(found)]


def submitted_text(submission: Submission) -> str:
    """The file's text; an empty one, which grades as no notebook, when it cannot be read."""
    try:
        if submission.path is None or submission.path.stat().st_size > LARGEST:
            return ""
        return submission.path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def grade(
    submissions: str | os.PathLike,
    out: str | os.PathLike = "graded",
    assignment: str | None = None,
    executor: concurrent.futures.Executor | None = None,
    limits: Limits = LIMITS,
    reveal: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Grades every submission in a folder and writes everything to `out`; returns the table of grades.csv.

    `executor`: any concurrent.futures.Executor whose workers have the course; two at a time on this machine without.
    `reveal`: whether feedback shows the code of the hidden tests. Called again, it grades only what is new or changed.

    In `out`: reports/ (one JSON a submission), gradebook.db, submitted/, autograded/ and feedback/ (nbgrader's),
    gradescope/ (one JSON a submission), grades.csv.
    """
    from tqdm.auto import tqdm

    out = Path(out).resolve()
    found = discover(Path(submissions), assignment)
    out.mkdir(parents=True, exist_ok=True)
    book = Gradebook(out, reveal)
    texts = {each: submitted_text(each) for each in found}
    book.start({each.assignment for each in found})
    unrecorded: dict[Submission, str] = {}
    with tqdm(total=len(found), disable=not progress, unit="submission") as bar:
        for each, result in reports_of(texts, out, executor, limits):
            try:
                book.record(each, result)
            except RuntimeError as error:  # the class goes on; grades.csv has the grade all the same
                unrecorded[each] = str(error)
            bar.update()
    rows = []
    for each in found:
        result = stored(out, each, texts[each])
        book.gradescope(each, result)
        rows.append(row(each, result, unrecorded.get(each, "")))
    table = pd.DataFrame(rows)
    write_whole(out / "grades.csv", table.to_csv(index=False))
    return table


def reports_of(texts: dict[Submission, str], out: Path, executor, limits: Limits) -> Iterator[tuple[Submission, dict]]:
    """Reports as they come, each on disk before it is given out; those that were there already first."""
    todo = []
    for each, text in texts.items():
        known = stored(out, each, text)
        if known is None:
            todo.append(each)
        else:
            yield each, known
    own = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 2) if executor is None else None
    pool = own or executor
    try:
        waiting = {pool.submit(report, texts[each], each.assignment, limits): each for each in todo}
        while waiting:
            done, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                each = waiting.pop(future)
                try:
                    result = future.result()
                except Exception:  # the executor lost it; grading itself raises nothing
                    result = report(texts[each], each.assignment, limits)
                write_whole(report_path(out, each), json.dumps(result))
                yield each, result
    finally:
        if own:
            own.shutdown(wait=True, cancel_futures=True)


def report_path(out: Path, each: Submission) -> Path:
    return out / "reports" / each.assignment / f"{each.student}.json"


def stored(out: Path, each: Submission, text: str) -> dict | None:
    """The report on disk, if it is about this very text and this source."""
    try:
        found = json.loads(report_path(out, each).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("digest") == digest(text, each.assignment) else None


def row(each: Submission, found: dict, unrecorded: str) -> dict:
    lost: dict[str, list[str]] = {}
    for name, verdict in found["verdicts"].items():
        if verdict["outcome"] != CORRECT:
            lost.setdefault(verdict["outcome"], []).append(name)
    points = {name: found["points"][name] for name in found["most"]}
    return {
        "student": each.student,
        "assignment": each.assignment,
        "score": sum(points.values()),
        "most": sum(found["most"].values()),
        **points,
        "lost": "; ".join(f"{outcome}: {', '.join(names)}" for outcome, names in lost.items()),
        "remarks": " ".join(filter(None, [*found["remarks"], each.problem, unrecorded])),
        "seconds": found["seconds"],
        "memory in MiB": round(found["peak_memory"] / 2**20),
    }


class Gradebook:
    """nbgrader's gradebook and feedback in a folder of their own, filled one student at a time."""

    def __init__(self, out: Path, reveal: bool):
        from nbgrader.apps import NbGraderAPI
        from nbgrader.coursedir import CourseDirectory

        self.out = out
        if shutil.which("alembic") is None:  # nbgrader calls it by name, also where its environment is not activated
            os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
        config = assignments.settings()
        config.CourseDirectory.root = str(out)
        config.CourseDirectory.source_directory = "source"
        config.CourseDirectory.release_directory = "release"
        config.CourseDirectory.db_url = f"sqlite:///{out / 'gradebook.db'}"
        # `mend` and the reports have been through here already
        config.Autograde.sanitize_preprocessors = config.Autograde.sanitize_preprocessors[1:]
        if reveal:
            config.GenerateFeedback.preprocessors = config.GenerateFeedback.preprocessors[1:]
        self.course = CourseDirectory(config=config)
        self.api = NbGraderAPI(self.course, config=config)
        self.api.log.setLevel("ERROR")

    def start(self, names: set[str]) -> None:
        """Makes the assignments known to the gradebook, unless a run before this one got that far."""
        for name in sorted(names):
            mark = self.out / "recorded" / f"{name}.txt"
            if mark.is_file() and mark.read_text() == digest("", name):
                continue
            if not any((self.out / "recorded").glob("*.txt")):
                (self.out / "gradebook.db").unlink(missing_ok=True)  # a killed run may have made half of it
            write_whole(self.out / "source" / name / f"{name}.ipynb", source_text(name))
            self.must(self.api.generate_assignment, name)
            write_whole(mark, digest("", name))

    def record(self, each: Submission, found: dict) -> None:
        """Puts a report into the gradebook, and writes the feedback page; nothing if that was done already."""
        mark = self.out / "recorded" / each.assignment / f"{each.student}.txt"
        if mark.is_file() and mark.read_text() == found["digest"]:
            return
        submitted = self.out / "submitted" / each.student / each.assignment / f"{each.assignment}.ipynb"
        write_whole(submitted, json.dumps(found["notebook"]))
        Isolated.reports[each.assignment, each.student] = found
        try:
            self.must(self.api.autograde, each.assignment, each.student)
            self.must(self.api.generate_feedback, each.assignment, each.student)
        finally:
            del Isolated.reports[each.assignment, each.student]
        write_whole(mark, found["digest"])

    def must(self, step, *names: str) -> None:
        """One step of nbgrader's. RuntimeError when it fails, with the end of what it logged."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SQLAlchemy's about the order in which nbgrader fills its tables
            result = step(*names)
        if not result["success"]:
            said = (result.get("log") or result.get("error") or "").strip()[-1500:]
            raise RuntimeError(f"nbgrader's {step.__name__} failed for {' '.join(names)}: {said}")

    def gradescope(self, each: Submission, found: dict) -> None:
        """Gradescope's results.json of one submission."""
        tests = [
            {
                "name": name,
                "score": found["points"][name],
                "max_score": most,
                "visibility": "visible",
                "output": repr(
                    Verdict(**{**found["verdicts"][name], "lines": tuple(found["verdicts"][name]["lines"])})
                ),
            }
            for name, most in found["most"].items()
        ]
        text = json.dumps({"tests": tests, "output": " ".join(found["remarks"])}, indent=1, ensure_ascii=False)
        write_whole(self.out / "gradescope" / each.assignment / f"{each.student}.json", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("submissions", type=Path)
    parser.add_argument("--out", type=Path, default=Path("graded"))
    parser.add_argument("--assignment")
    parser.add_argument("--reveal", action="store_true", help="show the hidden tests in the feedback")
    asked = parser.parse_args()
    print("Isolation in force:", *(f"  {what:<10} {how}" for what, how in isolation().items()), sep="\n")
    started = time.perf_counter()
    try:
        table = grade(asked.submissions, asked.out, asked.assignment, reveal=asked.reveal)
    except (ValueError, CannotStart) as error:
        print(error, file=sys.stderr)
        return 2
    print(table[["student", "assignment", "score", "most", "lost", "remarks"]].to_string(index=False, max_colwidth=60))
    peak = table["memory in MiB"].max()
    print(
        f"{len(table)} submissions in {time.perf_counter() - started:.0f} s, at most {peak} MiB each; see {asked.out}/."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
