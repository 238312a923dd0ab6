"""Can the graders be trusted? `make grade-audit` tries them on answers whose worth is known, and prints what came out.

Wrong answers with a name and right answers written differently (variants/), one after another in one process;
unsolved exercises, solutions, a file of wrong answers, hostile and broken submissions (hostile.py), which go the whole
way that a student's file goes.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import socket
import sys
import tempfile
import time
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
from hostile import FIRST, HOSTILE, cell_named

from minipeft.course import assignments
from minipeft.course.exercises import exercises
from minipeft.course.grade import grade
from minipeft.course.mend import exercise_of, is_test
from minipeft.course.sandbox import LIMITS, Killed, Limits, Sandbox, bubblewrap, isolation
from minipeft.course.submission import Run
from minipeft.course.verdict import CORRECT, COULD_NOT_RUN, NOT_ATTEMPTED, Verdict

VARIANTS = Path(__file__).with_name("variants")
KILLED = 0.95  # the least share of wrong answers that the intended test must find


def variants(assignment: str) -> list[tuple[str, str, str, str]]:
    """(exercise, "wrong" or "right", name, code) of each variant; the text before the first serves all of them."""
    head, *parts = re.split(r"^# %% ", (VARIANTS / f"{assignment}.py").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = []
    for part in parts:
        title, code = part.split("\n", 1)
        exercise, kind, name = re.fullmatch(r"(\w+) (wrong|right): (.+)", title).groups()
        found.append((exercise, kind, name, f"{head}\n{code}".strip()))
    return found


def solved(assignment: str):
    return nbformat.read(assignments.sources()[assignment], as_version=4)


def points(assignment: str) -> dict[str, int]:
    return {exercise_of(c): c.metadata.nbgrader.points for c in solved(assignment).cells if is_test(c)}


def tried(assignment: str) -> dict[tuple[str, str], Verdict]:
    """{(exercise, name): what the grader says of that variant}, each in the place of the solution's answer.

    One process runs the solution and tries one variant after another, as a submission's process runs a cell and is
    examined; whatever ends the process is what is said of that variant, and the next has a new one.
    """
    limits, found, todo = replace(LIMITS, seconds=900), {}, variants(assignment)
    while todo:
        run = Run(solved(assignment), assignment, 0, limits)
        with Sandbox(limits) as box:
            run.whole = box.ask(do="state", whole=False)["state"]
            for i, cell in enumerate(run.notebook.cells):
                if cell.cell_type == "code" and not is_test(cell):
                    run.step(box, i, cell)
            while todo:
                exercise, _, name, code = todo.pop(0)
                cell = cell_named(run.notebook, exercise)
                solution, run.errors, run.seed = cell.source, {}, zlib.crc32(code.encode())
                try:
                    cell.source = code
                    run.step(box, 0, cell)
                    run.examined(box, exercise)
                    found[exercise, name] = run.verdicts[exercise]
                    cell.source = solution
                    run.step(box, 0, cell)
                except Killed as killed:
                    found[exercise, name] = Verdict(exercise, COULD_NOT_RUN, (str(killed),))
                    break
    return found


def sheet(assignment: str) -> str:
    """A file with the first wrong answer to every exercise, to go the whole way."""
    notebook = solved(assignment)
    for exercise, kind, _, code in reversed(variants(assignment)):
        if kind == "wrong":
            cell_named(notebook, exercise).source = code
    return nbformat.writes(notebook)


def graded(files: dict[str, str], assignment: str, limits: Limits = LIMITS) -> pd.DataFrame:
    """The grades of these submissions, by file name."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            Path(folder, "in").mkdir(exist_ok=True)
            Path(folder, "in", f"{name}.ipynb").write_text(text, encoding="utf-8")
        table = grade(Path(folder, "in"), Path(folder, "out"), assignment, limits=limits)
        reports = {p.stem: p.read_text(encoding="utf-8") for p in Path(folder, "out").glob("reports/*/*.json")}
    table["report"] = table.student.map(reports)
    return table.set_index("student")


def audit_answers(assignment: str) -> tuple[pd.DataFrame, list[str]]:
    """A row for each exercise, and what is not as it should be."""
    most = points(assignment)
    table = graded(
        {
            "unsolved": assignments.release(assignments.sources()[assignment]),
            "solution": nbformat.writes(solved(assignment)),
            "wrong": sheet(assignment),
        },
        assignment,
    )
    faults, rows = [], {}
    for exercise, full in most.items():
        rows[exercise] = {"unsolved": "", "solution": "", "wrong": 0, "killed": 0, "right": 0, "passed": 0}
        rows[exercise]["unsolved"] = verdict(table, "unsolved", exercise)
        rows[exercise]["solution"] = verdict(table, "solution", exercise)
        if rows[exercise]["unsolved"] != NOT_ATTEMPTED or table.loc["unsolved", exercise] != 0:
            faults.append(f"{exercise}: the unsolved exercise is {rows[exercise]['unsolved']!r}")
        if table.loc["solution", exercise] != full:
            faults.append(f"{exercise}: the solution gets {table.loc['solution', exercise]} of {full}")
        if table.loc["wrong", exercise] != 0:
            faults.append(f"{exercise}: a file of wrong answers gets {table.loc['wrong', exercise]} of {full}")
    verdicts = tried(assignment)
    for exercise, kind, name, _ in variants(assignment):
        got = verdicts[exercise, name]
        rows[exercise][kind] += 1
        rows[exercise]["killed" if kind == "wrong" else "passed"] += (got.outcome == CORRECT) == (kind == "right")
        if kind == "wrong" and got.outcome == CORRECT:
            faults.append(f"{exercise}: the wrong answer {name!r} gets full marks")
        if kind == "right" and got.outcome != CORRECT:
            faults.append(f"{exercise}: the right answer {name!r} is {got.outcome} {got.lines}")
    result = pd.DataFrame(rows).T
    for exercise, each in result.iterrows():
        if each.wrong < 6 or each.right < 2:
            faults.append(f"{exercise}: {each.wrong} wrong and {each.right} right answers; 6 and 2 are needed")
    if result.killed.sum() < KILLED * result.wrong.sum():
        faults.append(f"{assignment}: only {result.killed.sum()} of {result.wrong.sum()} wrong answers are found")
    return result, faults


def verdict(table: pd.DataFrame, student: str, exercise: str, whole: bool = False) -> str:
    found = json.loads(table.loc[student, "report"])["verdicts"][exercise]
    return f"{found['outcome']} {found['lines']}" if whole else found["outcome"]


def audit_hostile(assignment: str = "lora") -> tuple[pd.DataFrame, list[str]]:
    """A row for each hostile submission; honest ones are graded between them and must not notice."""
    most = points(assignment)
    total = sum(most.values())
    expected = {"full": total, "rest": total - most[FIRST], "zero": 0}
    files, wanted = {}, {}
    server = socket.create_server(("127.0.0.1", 0))
    warnings.simplefilter("ignore")  # nbformat's about what these notebooks have on purpose
    for i, (name, (make, worth)) in enumerate(HOSTILE.items()):
        notebook = copy.deepcopy(solved(assignment))
        text = make(notebook)
        text = text if isinstance(text, str) else nbformat.writes(notebook)
        text = text.replace("PORT", str(server.getsockname()[1]))
        files[f"h{i:02d}"], wanted[f"h{i:02d}"] = text, (name, expected[worth])
        if i % 8 == 0:
            files[f"i{i:02d}-honest"] = nbformat.writes(solved(assignment))
            wanted[f"i{i:02d}-honest"] = ("an honest neighbour", total)
    table = graded(files, assignment, replace(LIMITS, each=5))  # endless loops end sooner
    server.close()
    rows, faults = [], []
    for student, (name, score) in wanted.items():
        got = table.loc[student]
        rows.append({"submission": name, "expected": score, "score": got.score, "seconds": got.seconds,
                     "reason": (got.lost or got.remarks)[:70]})  # fmt: skip
        if got.score != score:
            faults.append(f"{name}: {got.score} points instead of {score}; {got.lost} {got.remarks}")
        reasons = json.loads(got.report)["verdicts"].values()
        if not all(each["outcome"] == CORRECT or each["lines"] for each in reasons):
            faults.append(f"{name}: no reason is given for the lost points")
    if bubblewrap():
        text = "".join(table.report)
        for sign in ("FOUND", "WRITTEN", "REACHED"):
            seen = set(re.findall(rf"{sign} (\[.*?\])", text)) - {"[]"}
            seen = {each for each in seen if "', " in each or "'" in each}
            if seen:
                faults.append(f"a submission {sign.lower()} {seen}")
    return pd.DataFrame(rows), faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assignment", choices=sorted(assignments.sources()))
    parser.add_argument("--no-hostile", action="store_true")
    asked = parser.parse_args()
    print("Isolation in force:", *(f"  {what:<10} {how}" for what, how in isolation().items()), sep="\n")
    faults, tables, started = [], [], time.perf_counter()
    for name in [asked.assignment] if asked.assignment else assignments.sources():
        table, wrong = audit_answers(name)
        tables.append(table)
        faults += wrong
        print(f"\n{name}\n{table.to_string()}")
        for each in exercises()[name].values():
            print(
                *(f"{each.name} does without {lens!r}: {why}.\n" for lens, why in each.without.items()), sep="", end=""
            )
    table = pd.concat(tables)
    rate = table.killed.sum() / table.wrong.sum()
    print(f"\nwrong answers found: {table.killed.sum()} of {table.wrong.sum()} ({rate:.1%})")
    print(f"right answers passed: {table.passed.sum()} of {table.right.sum()}")
    if not asked.no_hostile:
        hostile, wrong = audit_hostile()
        faults += wrong
        print(f"\nHostile and broken submissions\n{hostile.to_string(index=False)}")
    print(f"\n{time.perf_counter() - started:.0f} s")
    print(*(f"FAULT  {fault}" for fault in faults), sep="\n")
    print("The graders hold." if not faults else f"{len(faults)} faults.")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
