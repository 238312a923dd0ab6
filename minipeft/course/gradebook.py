"""nbgrader's part: its preprocessors, its gradebook and its feedback pages, and Gradescope's file."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import nbformat
from nbgrader.preprocessors import NbGraderPreprocessor

from minipeft.course import assignments
from minipeft.course.mend import mend, source_text
from minipeft.course.submission import Submission, digest, report
from minipeft.course.verdict import Verdict
from minipeft.whole import write_whole


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
