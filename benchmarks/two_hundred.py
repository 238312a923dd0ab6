"""Two hundred synthetic submissions of `lora`, graded without supervision: time, memory, and every score checked.

    python benchmarks/two_hundred.py                 # --students 20 for a quick look
    python benchmarks/two_hundred.py --kill          # SIGKILL at a random moment, then the same command again

Each student hands in a random mixture of right and wrong answers to the ten exercises; one in ten hands in something
hostile or broken. What each should get is known, so a wrong score is printed and counted.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
import pandas as pd
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "grading"))

from audit import points, solved, variants  # noqa: E402
from hostile import FIRST, HOSTILE, cell_named  # noqa: E402

from minipeft.course.sandbox import bubblewrap  # noqa: E402


def crowd(students: int, seed: int) -> dict[str, tuple[str, int]]:
    """{student: (the text of the notebook, the score that it deserves)}."""
    rng, most, answers = random.Random(seed), points("lora"), {}
    for exercise, kind, _, code in variants("lora"):
        answers.setdefault(exercise, []).append((kind, code))
    total, found = sum(most.values()), {}
    for i in range(students):
        notebook = copy.deepcopy(solved("lora"))
        if i % 10 == 9:
            make, worth = HOSTILE[rng.choice(list(HOSTILE))]
            text = make(notebook)
            score = {"full": total, "rest": total - most[FIRST], "zero": 0}[worth]
            found[f"student{i:03d}"] = (text if isinstance(text, str) else nbformat.writes(notebook), score)
            continue
        score = 0
        for exercise, several in answers.items():
            # unmerge is tried on what merge gives, so its answers are mixed with the solution's merge only
            kind, code = rng.choice(several) if exercise not in ("merge", "unmerge") else ("right", None)
            if code is not None:
                cell_named(notebook, exercise).source = code
            score += most[exercise] if kind == "right" else 0
        found[f"student{i:03d}"] = (nbformat.writes(notebook), score)
    return found


class Watch(threading.Thread):
    """The most memory, in bytes, of a process and all that it started (and the largest number of them)."""

    def __init__(self, process: psutil.Process):
        super().__init__(daemon=True)
        self.process, self.peak, self.going = process, 0, True

    def run(self) -> None:
        while self.going:
            used = 0
            try:
                for each in [self.process, *self.process.children(recursive=True)]:
                    used += each.memory_info().rss
            except psutil.Error:
                pass
            self.peak = max(self.peak, used)
            time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", type=int, default=200)
    parser.add_argument("--kill", action="store_true", help="kill the run at a random moment, and start it again")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        submissions, out = Path(folder, "in"), Path(folder, "out")
        submissions.mkdir()
        deserved = crowd(asked.students, asked.seed)
        for student, (text, _) in deserved.items():
            (submissions / f"{student}.ipynb").write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "minipeft.course.grade", str(submissions), "--out", str(out)]
        command += ["--assignment", "lora", *([] if bubblewrap() else ["--unsandboxed"])]
        made: dict[str, int] = {}
        started = time.perf_counter()
        if asked.kill:
            moment = random.uniform(5, 2 * asked.students)
            run = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            try:
                run.wait(moment)
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
            made = {path.name: path.stat().st_mtime_ns for path in out.glob("reports/lora/[!.]*.json")}
            print(f"killed after {moment:.0f} s, when {len(made)} reports were on disk")
        run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        watch = Watch(psutil.Process(run.pid))
        watch.start()
        said = run.communicate()[0]
        watch.going = False
        seconds = time.perf_counter() - started
        table = pd.read_csv(out / "grades.csv").set_index("student")
        again = [name for name, stamp in made.items() if (out / "reports" / "lora" / name).stat().st_mtime_ns != stamp]
        pages = len(list(out.glob("feedback/*/lora/lora.html")))
        wrong = [(s, table.score[s], score) for s, (_, score) in deserved.items() if table.score[s] != score]
        print(said.strip().splitlines()[-1])
        print(f"{os.cpu_count()} cores: {seconds:.0f} s in all, {seconds / asked.students:.2f} s a submission")
        print(f"memory: {watch.peak / 2**20:.0f} MiB for the grader and all that it started, "
              f"{table['memory in MiB'].quantile(0.5):.0f} MiB for the median submission")  # fmt: skip
        print(
            f"{len(table)} scores, {pages} feedback pages, {len(again)} graded twice, {len(wrong)} wrong scores {wrong}"
        )
        return bool(wrong or again or run.returncode or len(table) != asked.students)


if __name__ == "__main__":
    sys.exit(main())
