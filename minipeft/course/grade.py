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
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from minipeft.course import assignments
from minipeft.course.gradebook import Gradebook
from minipeft.course.sandbox import CannotStart, Limits, isolation
from minipeft.course.submission import LIMITS, Submission, digest, report
from minipeft.course.verdict import CORRECT
from minipeft.whole import write_whole

LARGEST = 20 * 2**20  # bytes of a submitted file


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
