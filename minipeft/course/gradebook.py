"""nbgrader's part: its preprocessors, its gradebook and its feedback pages, and Gradescope's file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path

import nbformat
from nbgrader.preprocessors import NbGraderPreprocessor

from minipeft.course import assignments
from minipeft.course.handed_in import Submission, timestamp_of
from minipeft.course.mend import mend, read, source_text
from minipeft.course.submission import report
from minipeft.course.verdict import Verdict
from minipeft.whole import write_whole


class Mend(NbGraderPreprocessor):
    """Before nbgrader looks at a submission: `mend`."""

    def preprocess(self, nb, resources):
        return mend(read(nbformat.writes(nb)), resources["nbgrader"]["assignment"])[0], resources


class Isolated(NbGraderPreprocessor):
    """In the place of nbgrader's Execute: runs the notebook in a sandbox, or takes the report that there is."""

    reports: dict[tuple[str, str], dict] = {}  # what `grade` has found: {(assignment, student): report}

    def preprocess(self, nb, resources):
        known = resources["nbgrader"]
        found = self.reports.get((known["assignment"], known["student"]))
        if found is None:
            found = report(nbformat.writes(nb), known["assignment"])
        return nbformat.reads(json.dumps(found["notebook"]), as_version=4), resources


class Gradebook:
    """nbgrader's gradebook and feedback in a folder of their own, filled one student at a time.

    `recorded/` says what the gradebook and the pages were made of; whatever of it has changed is made again.
    """

    def __init__(self, out: Path, reveal: bool):
        from nbgrader.apps import NbGraderAPI
        from nbgrader.coursedir import CourseDirectory

        self.out, self.reveal = out, reveal
        self.recorded = out / "recorded"
        self.url = f"sqlite:///{out / 'gradebook.db'}"
        if shutil.which("alembic") is None:  # nbgrader calls it by name, also where its environment is not activated
            os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
        config = assignments.settings()
        config.CourseDirectory.root = str(out)
        config.CourseDirectory.source_directory = "source"
        config.CourseDirectory.release_directory = "release"
        config.CourseDirectory.db_url = self.url
        # `mend` and the reports have been through here already
        config.Autograde.sanitize_preprocessors = config.Autograde.sanitize_preprocessors[1:]
        if reveal:
            config.GenerateFeedback.preprocessors = config.GenerateFeedback.preprocessors[1:]
        self.penalties = f"{config.get('LateSubmissionPlugin')} {config.get('AssignLatePenalties')}"
        self.course = CourseDirectory(config=config)
        self.api = NbGraderAPI(self.course, config=config)
        self.api.log.setLevel("ERROR")

    def start(self, names: set[str]) -> None:
        """Makes the assignments known to the gradebook, unless a run before this one got that far.

        Raises ValueError when nbgrader cannot use the gradebook that is there.
        """
        deadlines = {name: when for name, when in assignments.deadlines().items() if name in names}
        if not (self.out / "gradebook.db").is_file():
            shutil.rmtree(self.recorded, ignore_errors=True)  # it was about another gradebook
        try:
            for name in sorted(names):
                mark = self.recorded / f"{name}.txt"
                if not marked(mark, number(source_text(name))):
                    write_whole(self.out / "source" / name / f"{name}.ipynb", source_text(name))
                    self.must(self.api.generate_assignment, name)
                    write_whole(mark, number(source_text(name)))
            self.due = self.due_dates(deadlines)
        except OSError:
            raise
        except Exception as error:  # whatever a file that is no gradebook, or an old one, gives
            raise ValueError(
                f"nbgrader cannot use {self.out / 'gradebook.db'} ({last_line(error)}): move it away, or back it up "
                "and run nbgrader db upgrade on it; the same command then goes on, and no report is lost."
            ) from error

    def due_dates(self, deadlines: dict[str, datetime]) -> dict[tuple[str, str], str]:
        """{(student, assignment): when it was due, extensions included}; under ("", assignment) for everybody else.

        `deadlines`, those of exercises/deadlines.json, are put into the gradebook first.
        """
        from nbgrader.api import Gradebook as Book

        with Book(self.url) as book:
            for name, when in deadlines.items():
                book.update_or_create_assignment(name, duedate=when.astimezone(UTC).replace(tzinfo=None))
            due = {("", each.name): str(each.duedate) for each in book.assignments}
            for each in book.assignments:
                if each.duedate is not None:
                    due |= {(s.student.id, each.name): str(s.duedate) for s in each.submissions}
        return due

    def record(self, each: Submission, found: dict) -> str:
        """Puts a report into the gradebook, and writes the feedback page, unless that was done already; a remark.

        Raises RuntimeError when nbgrader fails.
        """
        try:
            stamp, remark = timestamp_of(each.path), ""
        except ValueError as error:
            stamp, remark = "", str(error)
        due = self.due.get((each.folder, each.assignment)) or self.due.get(("", each.assignment))
        page = self.out / "feedback" / each.folder / each.assignment / f"{each.assignment}.html"
        graded = self.out / "autograded" / each.folder / each.assignment / f"{each.assignment}.ipynb"
        for what, file, of in (
            ("grade", graded, f"{found['digest']} {stamp} {due} {self.penalties}"),
            ("page", page, f"{found['digest']} {stamp} {due} {self.penalties} {self.reveal}"),
        ):
            mark = self.recorded / each.assignment / f"{each.folder}.{what}.txt"
            if not (file.is_file() and marked(mark, number(of))):
                self.enter(each, found, stamp) if what == "grade" else self.publish(each)
                write_whole(mark, number(of))
        return remark

    def enter(self, each: Submission, found: dict, stamp: str) -> None:
        folder = self.out / "submitted" / each.folder / each.assignment
        (folder / "timestamp.txt").unlink(missing_ok=True)
        if stamp:
            write_whole(folder / "timestamp.txt", stamp)
        write_whole(folder / f"{each.assignment}.ipynb", json.dumps(found["notebook"]))
        Isolated.reports[each.assignment, each.folder] = found
        try:
            self.must(self.api.autograde, each.assignment, each.folder)
        finally:
            del Isolated.reports[each.assignment, each.folder]

    def publish(self, each: Submission) -> None:
        self.must(self.api.generate_feedback, each.assignment, each.folder)

    def must(self, step, *names: str) -> None:
        """One step of nbgrader's. RuntimeError when it fails, with the end of what it logged."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SQLAlchemy's about the order in which nbgrader fills its tables
            result = step(*names)
        if result["success"]:
            return
        if "KeyboardInterrupt" in result.get("error", ""):  # nbgrader catches that as well
            raise KeyboardInterrupt
        said = (result.get("log") or result.get("error") or "").strip()[-1500:]
        raise RuntimeError(f"nbgrader's {step.__name__} failed for {' '.join(names)}: {said}")

    def penalty(self) -> dict[tuple[str, str], tuple[float, float]]:
        """{(student, assignment): (seconds late, points that nbgrader takes off)} of those that came late."""
        from nbgrader.api import Gradebook as Book

        with Book(self.url) as book:
            late = [s for each in book.assignments if each.duedate is not None for s in each.submissions]
            late = [s for s in late if s.total_seconds_late > 0]
            return {
                (s.student.id, s.assignment.name): (s.total_seconds_late, s.late_submission_penalty or 0.0)
                for s in late
            }

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
        write_whole(self.out / "gradescope" / each.assignment / f"{each.folder}.json", text)


def number(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def marked(mark: Path, of: str) -> bool:
    return mark.is_file() and mark.read_text(encoding="utf-8", errors="replace") == of


def last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
