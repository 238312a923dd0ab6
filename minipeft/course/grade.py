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
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pandas as pd

from minipeft.course.gradebook import Gradebook
from minipeft.course.handed_in import Submission, discover, submitted_text
from minipeft.course.replies import clean
from minipeft.course.sandbox import CannotStart, Limits, bubblewrap, isolation
from minipeft.course.submission import LIMITS, digest, report
from minipeft.course.suspicion import nearly_the_same
from minipeft.course.verdict import CORRECT
from minipeft.whole import write_whole

INTERRUPTED = threading.Event()
AHEAD = 32  # submissions that are given to an executor and not back yet
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that a spreadsheet would run


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
    gradescope/ (one JSON a submission), grades.csv. ValueError when there is nothing to grade, or `out` is in use.
    """
    from tqdm.auto import tqdm

    out = Path(out).resolve()
    found = discover(Path(submissions), assignment)
    with alone_in(out):
        book = Gradebook(out, reveal)
        book.start({each.assignment for each in found} - {""})
        rows: dict[Submission, dict] = {}
        with tqdm(total=len(found), disable=not progress, unit="submission") as bar:
            for each, result in reports_of(found, out, executor, limits):
                rows[each] = row(each, result, noted(book, each, result))
                bar.update()
        table = whole_table([rows[each] for each in found], book.penalty())
        write_whole(out / "grades.csv", harmless(table).to_csv(index=False))
    return table


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """ValueError if another run is writing to `out`; the lock goes with the process that holds it."""
    from filelock import FileLock, Timeout

    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(out / ".lock", timeout=0).acquire()
    except Timeout:
        raise ValueError(f"Another run is grading into {out}: wait for it, or give another OUT=.") from None
    with lock:
        yield


def noted(book: Gradebook, each: Submission, result: dict) -> str:
    """Enters a report everywhere; a remark when something could not be entered, as the class goes on."""
    if not each.assignment:
        return ""
    book.gradescope(each, result)
    try:
        return book.record(each, result)
    except OSError:
        raise
    except Exception as error:  # grades.csv has the grade all the same
        return clean(str(error), 1500)


def reports_of(found: list[Submission], out: Path, executor, limits: Limits) -> Iterator[tuple[Submission, dict]]:
    """Reports as they come, each on disk before it is given out; those that were there already first."""
    todo = []
    for each in found:
        text, problem = content_of(each)
        if not each.assignment:
            yield each, {"points": {}, "most": {}, "verdicts": {}, "remarks": [problem], "seconds": 0, "peak_memory": 0}
        elif (known := stored(out, each, digest(text, each.assignment, limits, problem))) is not None:
            yield each, known
        else:
            todo.append(each)
    stop = threading.Event()
    own = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 2) if executor is None else None
    waiting: dict[concurrent.futures.Future, tuple[Submission, tuple]] = {}
    try:
        while todo or waiting:
            while todo and len(waiting) < AHEAD:  # texts of that many are in memory at once
                each = todo.pop(0)
                text, problem = content_of(each)
                of = (text, each.assignment, limits, problem)
                waiting[own.submit(report, *of, stop) if own else executor.submit(report, *of)] = each, of
            done, _ = concurrent.futures.wait(waiting, 1, return_when=concurrent.futures.FIRST_COMPLETED)
            if INTERRUPTED.is_set():
                raise KeyboardInterrupt
            for future in done:
                each, of = waiting.pop(future)
                result = result_of(future, *of)
                write_whole(report_path(out, each), json.dumps(result))
                yield each, result
    finally:
        stop.set()
        if own:
            own.shutdown(wait=True, cancel_futures=True)


def content_of(each: Submission) -> tuple[str, str]:
    """(the text that was handed in, why there is none)."""
    try:
        return submitted_text(each), ""
    except ValueError as error:
        return "", str(error)


def result_of(future: concurrent.futures.Future, text: str, assignment: str, limits: Limits, problem: str) -> dict:
    """The report; made here if the executor lost it, and without marks where the grader itself fails on this file."""
    for attempt in (future.result, lambda: report(text, assignment, limits, problem)):
        try:
            return attempt()
        except (CannotStart, OSError):
            if attempt != future.result:
                raise  # no student's fault
        except Exception as error:
            said = f"The grader failed on this file ({type(error).__name__}: {str(error)[:200]}): look at it by hand."
    return report("", assignment, limits, said) | {"digest": digest(text, assignment, limits, problem)}


def report_path(out: Path, each: Submission) -> Path:
    return out / "reports" / each.assignment / f"{each.folder}.json"


def stored(out: Path, each: Submission, digest: str) -> dict | None:
    """The report on disk, if it is about this very submission, its checks and its limits."""
    try:
        found = json.loads(report_path(out, each).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("digest") == digest else None


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------
def row(each: Submission, found: dict, noted: str) -> dict:
    lost: dict[str, list[str]] = {}
    for name, verdict in found["verdicts"].items():
        if verdict["outcome"] != CORRECT:
            lost.setdefault(verdict["outcome"], []).append(name)
    called = f"Its files are called {each.folder}." if each.folder != each.student else ""
    return {
        "student": each.student,
        "assignment": each.assignment,
        "score": sum(found["points"].values()),
        "most": sum(found["most"].values()),
        "late penalty": 0,
        **{name: found["points"][name] for name in found["most"]},
        "lost": "; ".join(f"{outcome}: {', '.join(names)}" for outcome, names in lost.items()),
        "remarks": [*found["remarks"], each.remark, called, noted],
        "seconds": found["seconds"],
        "memory in MiB": round(found["peak_memory"] / 2**20),
        "pieces": found.get("pieces", []),
        "folder": each.folder,
    }


def whole_table(rows: list[dict], late: dict[tuple[str, str], tuple[float, float]]) -> pd.DataFrame:
    """The rows with what only the whole class tells: late penalties, and whose code is nearly the same."""
    for assignment in {each["assignment"] for each in rows}:
        of = [each for each in rows if each["assignment"] == assignment]
        alike = nearly_the_same({each["student"]: each["pieces"] for each in of})
        for each in of:
            if others := alike.get(each["student"]):
                more = f" and {len(others) - 5} more" if len(others) > 5 else ""
                names = ", ".join(clean(other, 40) for other in others[:5])
                each["remarks"].append(f"To look at: nearly the same code as {names}{more}.")
            seconds, penalty = late.get((each["folder"], assignment), (0, 0))
            if seconds:
                each["remarks"].append(f"Handed in {timedelta(seconds=round(seconds))} late.")
                each["late penalty"], each["score"] = penalty, max(0, each["score"] - penalty)
    for each in rows:
        each["remarks"] = " ".join(filter(None, each["remarks"]))
        del each["pieces"], each["folder"]
    return pd.DataFrame(rows)


def harmless(table: pd.DataFrame) -> pd.DataFrame:
    """The table with an apostrophe before whatever a spreadsheet would take for a formula."""
    return table.map(lambda cell: f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell)


def interrupted(signum, frame) -> None:
    """Ctrl-C, also where the exception falls into code that drops exceptions: the loop looks at the flag."""
    INTERRUPTED.set()
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("submissions", type=Path)
    parser.add_argument("--out", type=Path, default=Path("graded"))
    parser.add_argument("--assignment")
    parser.add_argument("--reveal", action="store_true", help="show the hidden tests in the feedback")
    parser.add_argument("--unsandboxed", action="store_true", help="grade although bubblewrap is not there")
    asked = parser.parse_args()
    print("Isolation in force:", *(f"  {what:<10} {how}" for what, how in isolation().items()), sep="\n")
    if bubblewrap() is None and not asked.unsandboxed:
        print(
            "bubblewrap is not on this machine, so a submission could read and change your files and use the network: "
            "install it (apt install bubblewrap), or give --unsandboxed in a container that holds nothing else.",
            file=sys.stderr,
        )
        return 2
    started = time.perf_counter()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, interrupted)
    try:
        table = grade(asked.submissions, asked.out, asked.assignment, reveal=asked.reveal)
    except (ValueError, CannotStart) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"Stopped. What was graded is in {asked.out}/, and the same command goes on.", file=sys.stderr)
        return 130
    except OSError as error:
        print(
            f"{error.strerror or error}: {error.filename or asked.out} cannot be written or read. "
            "When that is mended, the same command goes on.",
            file=sys.stderr,
        )
        return 2
    shown = table[["student", "assignment", "score", "most", "lost", "remarks"]]
    print(shown.to_string(index=False, max_colwidth=60))
    peak = table["memory in MiB"].max()
    print(
        f"{len(table)} submissions in {time.perf_counter() - started:.0f} s, at most {peak} MiB each; see {asked.out}/."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
